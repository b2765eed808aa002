"""Hint losses: hooks on the student, and regressors from its features to the teacher's, trained along with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from logitcache.cache.manifest import LOGITS
from logitcache.cache.outputs import Output
from logitcache.catalog.capture import Capture, captured_shapes
from logitcache.errors import UsageError
from logitcache.losses import FeatureLoss
from logitcache.randomness import counter_seed, preserved_generators, seed_generators
from logitcache.train.hint_config import Hint

# B batch, C and D channels, H height, W width, T tokens

Shape = tuple[int, ...]


class Hints:
    """The hints of one run, with their regressors.

    Args:
        hints: of the student.
        student: on the CPU; it is run once to find shapes, and not changed.
        inputs: a batch of two samples, preprocessed for the student.
        num_classes: of the teacher's logits.
        outputs: the teacher's other outputs.
        seed: of the run; the regressors' initial weights depend on nothing else.

    Raises:
        UsageError: an output of the teacher or a module of the student does not exist, or shapes don't match.
        ShapeError: a module's output does not have one row per sample.
    """

    def __init__(
        self,
        hints: Sequence[Hint],
        student: nn.Module,
        inputs: Any,
        num_classes: int,
        outputs: Mapping[str, Output],
        *,
        seed: int,
    ) -> None:
        self.hints = list(hints)
        shapes = {LOGITS: (num_classes,)} | {name: output.shape for name, output in outputs.items()}
        constants = [name for name, output in outputs.items() if output.encoding.keeps_constants]
        for number, hint in enumerate(hints, start=1):
            if hint.output not in shapes:
                raise UsageError(
                    f"hint {number} needs the output {hint.output!r}; available: {', '.join(shapes)}. Add it under "
                    "`cache.outputs`, and build a new cache at another `cache.path`"
                )
            if isinstance(hint.loss, FeatureLoss) and hint.output not in constants:
                raise UsageError(
                    f"hint {number}: {hint.output!r} is encoded as logits, up to a constant per row; "
                    f"{hint.loss.name!r} needs features: use a loss of logits such as 'kl', or encode the output as "
                    "Values"
                )
        self._taps = {str(number): hint.tap for number, hint in enumerate(hints)}
        found = captured_shapes(student, self._taps, inputs)
        self._regressors = nn.ModuleDict()
        with preserved_generators():
            seed_generators(counter_seed("regressors", seed))
            for number, hint in enumerate(hints):
                try:
                    regressor = _regressor(hint, found[str(number)], shapes[hint.output])
                except UsageError as error:
                    raise UsageError(f"hint {number + 1}, {hint.module!r} to {hint.output!r}: {error}") from None
                if regressor is not None:
                    self._regressors[str(number)] = regressor

    def needed_during(self, start: float, end: float) -> set[str]:
        """Teacher outputs that are used anywhere between two fractions of training."""
        return {hint.output for hint in self.hints if hint.is_needed_during(start, end)}

    def needed_at(self, progress: float) -> set[str]:
        """Teacher outputs that are used at a fraction of training."""
        return {hint.output for hint in self.hints if hint.weight_at(progress)}

    def attach(self, student: nn.Module) -> HintedStudent:
        """The student and its regressors as one module, to be trained together."""
        return HintedStudent(Capture(student, self._taps), self._regressors)

    def losses(self, features: Mapping[str, Tensor], from_teacher: Mapping[str, Tensor], progress: float) -> Tensor:
        """The weighted sum of all hint losses for each sample, (B,).

        Args:
            features: the student's regressed features, by hint number.
            from_teacher: the teacher's outputs that are used now, by name.
            progress: the fraction of training that is done.
        """
        losses = []
        for number, hint in enumerate(self.hints):
            values = features[str(number)]
            weight = hint.weight_at(progress)
            if weight:
                loss = hint.loss.at(progress)
                teacher = from_teacher[hint.output]
                # The third argument fills in for targets: `hint_loss_from_config` rejects losses that use them.
                part_B = loss(values, teacher) if isinstance(loss, FeatureLoss) else loss(values, teacher, teacher)
                losses.append(weight * part_B)
            else:
                # Still part of the graph: DistributedDataParallel waits for the gradient of every parameter.
                losses.append(0.0 * values.float().flatten(1).sum(dim=1))
        return torch.stack(losses).sum(dim=0)


class HintedStudent(nn.Module):
    """A student and its regressors: forward -> (the student's output, {hint number: regressed features})."""

    def __init__(self, capture: Capture, regressors: nn.ModuleDict) -> None:
        super().__init__()
        self.capture = capture
        self.regressors = regressors

    def forward(self, *inputs: Any, **options: Any) -> tuple[Any, dict[str, Tensor]]:
        output, features = self.capture(*inputs, **options)
        for number, regressor in self.regressors.items():
            features[number] = regressor(features[number])
        return output, features


class Regressor(nn.Module):
    """A linear layer from the student's channels to the teacher's, applied to each position of a map or each token.

    Adaptive average pooling first reduces maps to the smaller height and width of the two, or to their mean where the
    teacher's features have no positions. Source: Romero et al. 2015, arXiv:1412.6550, section 2.2, with a 1x1
    convolution as in later comparisons.

    Raises:
        UsageError: the shapes are of different kinds, or differ in the number of tokens.
    """

    def __init__(self, student: Shape, teacher: Shape) -> None:
        super().__init__()
        self.pooled_size: tuple[int, int] | None = None
        self.to_mean = len(student) == 3 and len(teacher) == 1
        if len(student) == len(teacher) == 3:
            self.pooled_size = (min(student[1], teacher[1]), min(student[2], teacher[2]))
            self.linear: nn.Module = nn.Conv2d(student[0], teacher[0], 1)
        elif self.to_mean or len(student) == len(teacher) == 1:
            self.linear = nn.Linear(student[0], teacher[0])
        elif len(student) == len(teacher) == 2 and student[0] == teacher[0]:
            self.linear = nn.Linear(student[1], teacher[1])
        else:
            raise UsageError(
                f"no regressor from {student} to {teacher}; expected maps (C, H, W), rows (C,), or the same number "
                "of tokens (T, C) on both sides"
            )

    def forward(self, features: Tensor) -> Tensor:
        if self.to_mean:
            features = features.mean(dim=(2, 3))
        elif self.pooled_size is not None and features.shape[2:] != self.pooled_size:
            features = F.adaptive_avg_pool2d(features, self.pooled_size)
        regressed: Tensor = self.linear(features)
        return regressed


def _regressor(hint: Hint, student: Shape, teacher: Shape) -> Regressor | None:
    """The regressor of a hint, if it needs one.

    Raises:
        UsageError: the loss does not support the shapes.
    """
    if not isinstance(hint.loss, FeatureLoss):
        if student != teacher or len(teacher) != 1:
            raise UsageError(
                f"{hint.loss.name!r} compares logits, one for each class; the student returns {student}, the "
                f"teacher's output is {teacher}"
            )
        return None
    if hint.loss.needs_maps and not len(student) == len(teacher) == 3:
        raise UsageError(
            f"{hint.loss.name!r} compares maps (C, H, W); the student returns {student}, the teacher's output "
            f"is {teacher}"
        )
    return Regressor(student, teacher) if hint.loss.regresses else None
