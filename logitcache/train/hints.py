"""A student with hooks, and regressors from its features to the teacher's: trained with it, and no part of it."""

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
    """What one run's student learns beside the logits, ready to be trained on.

    Args:
        hints: of the student.
        student: on the CPU; it is run once, and left as it was.
        inputs: a batch of two samples as the student takes them.
        num_classes: of the teacher's logits.
        outputs: what there is of the teacher beside them.
        seed: of the run; the regressors are drawn from it, and from nothing else.

    Raises:
        UsageError: an output that is not there, a module of the student that is not, or shapes that don't fit.
        ShapeError: a module of the student that gives no row for each sample.
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
                    f"hint {number} asks for the output {hint.output!r}; there are: {', '.join(shapes)}. Name it under "
                    "`cache.outputs`, and build a cache that has it under another `cache.path`"
                )
            if isinstance(hint.loss, FeatureLoss) and hint.output not in constants:
                raise UsageError(
                    f"hint {number}: {hint.output!r} holds logits, right up to a constant per row; {hint.loss.name!r} "
                    "is for features: use a loss of logits such as 'kl', or keep the output as Values"
                )
        self._taps = {str(number): hint.tap for number, hint in enumerate(hints)}
        found = captured_shapes(student, self._taps, inputs)
        self._regressors = nn.ModuleDict()
        with preserved_generators():
            seed_generators(counter_seed("regressors", seed))
            for number, hint in enumerate(hints):
                try:
                    regressor = _bridge(hint, found[str(number)], shapes[hint.output])
                except UsageError as error:
                    raise UsageError(f"hint {number + 1}, {hint.module!r} to {hint.output!r}: {error}") from None
                if regressor is not None:
                    self._regressors[str(number)] = regressor

    def needed_during(self, start: float, end: float) -> set[str]:
        """Those that are asked for anywhere between two shares of training."""
        return {hint.output for hint in self.hints if hint.is_needed_during(start, end)}

    def needed_at(self, progress: float) -> set[str]:
        """Those that are asked for when so much of training is done."""
        return {hint.output for hint in self.hints if hint.weight_at(progress)}

    def around(self, student: nn.Module) -> HintedStudent:
        """The student with its regressors, as one module to be trained."""
        return HintedStudent(Capture(student, self._taps), self._regressors)

    def losses(self, features: Mapping[str, Tensor], from_teacher: Mapping[str, Tensor], progress: float) -> Tensor:
        """The weighted sum of all, for each sample, (B,).

        Args:
            features: what the student's modules gave, regressed, by the number of the hint.
            from_teacher: the teacher's outputs by name, those that are needed now.
            progress: the share of training that is done.
        """
        losses = []
        for number, hint in enumerate(self.hints):
            values = features[str(number)]
            weight = hint.weight_at(progress)
            if weight:
                loss = hint.loss.at(progress)
                teacher = from_teacher[hint.output]
                # No true label: a loss that takes one was refused.
                part_B = loss(values, teacher) if isinstance(loss, FeatureLoss) else loss(values, teacher, teacher)
                losses.append(weight * part_B)
            else:
                # In the graph all the same: where processes share a batch, each parameter's gradient is waited for.
                losses.append(0.0 * values.float().flatten(1).sum(dim=1))
        return torch.stack(losses).sum(dim=0)


class HintedStudent(nn.Module):
    """A student and the regressors beside it: forward -> (what it gives, {number of the hint: features, regressed})."""

    def __init__(self, capture: Capture, regressors: nn.ModuleDict) -> None:
        super().__init__()
        self.capture = capture
        self.regressors = regressors

    def forward(self, *inputs: Any, **options: Any) -> tuple[Any, dict[str, Tensor]]:
        given, taken = self.capture(*inputs, **options)
        for number, regressor in self.regressors.items():
            taken[number] = regressor(taken[number])
        return given, taken


class Regressor(nn.Module):
    """From the student's channels to the teacher's, linear: of each place of a map, of each token, or of a row.

    Maps are first brought to the smaller height and width of the two by adaptive average pooling, and to their mean
    where the teacher's features have no places. Source: Romero et al. 2015, arXiv:1412.6550, section 2.2, with a
    convolution of 1x1 as in later comparisons.

    Raises:
        UsageError: shapes of which one is a map and the other is not, or of other numbers of tokens.
    """

    def __init__(self, student: Shape, teacher: Shape) -> None:
        super().__init__()
        self.places: tuple[int, int] | None = None
        self.to_mean = len(student) == 3 and len(teacher) == 1
        if len(student) == len(teacher) == 3:
            self.places = (min(student[1], teacher[1]), min(student[2], teacher[2]))
            self.linear: nn.Module = nn.Conv2d(student[0], teacher[0], 1)
        elif self.to_mean or len(student) == len(teacher) == 1:
            self.linear = nn.Linear(student[0], teacher[0])
        elif len(student) == len(teacher) == 2 and student[0] == teacher[0]:
            self.linear = nn.Linear(student[1], teacher[1])
        else:
            raise UsageError(
                f"no regressor leads from {student} to {teacher}; expected maps (C, H, W) or rows (C,), or equally "
                "many tokens (T, C) on both sides"
            )

    def forward(self, features: Tensor) -> Tensor:
        if self.to_mean:
            features = features.mean(dim=(2, 3))
        elif self.places is not None and features.shape[2:] != self.places:
            features = F.adaptive_avg_pool2d(features, self.places)
        regressed: Tensor = self.linear(features)
        return regressed


def _bridge(hint: Hint, student: Shape, teacher: Shape) -> Regressor | None:
    """The regressor that a hint needs, if any.

    Raises:
        UsageError: shapes that its loss can't compare.
    """
    if not isinstance(hint.loss, FeatureLoss):
        if student != teacher or len(teacher) != 1:
            raise UsageError(
                f"{hint.loss.name!r} compares logits, one for each class; the student's module gives {student}, the "
                f"teacher's output is {teacher}"
            )
        return None
    if hint.loss.needs_maps and not len(student) == len(teacher) == 3:
        raise UsageError(
            f"{hint.loss.name!r} compares maps (C, H, W); the student's module gives {student}, the teacher's output "
            f"is {teacher}"
        )
    return Regressor(student, teacher) if hint.loss.regresses else None
