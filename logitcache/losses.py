"""Every distillation loss, as a frozen configuration that is called on (B, C) logits.

Each returns float32 (B,): one number a sample, in nats, so that the caller weighs and averages. The direction
of every divergence is KL(teacher ‖ student). Soft losses carry the factor T², which keeps the size of their
gradient independent of T (Hinton, Vinyals and Dean 2015, arXiv:1503.02531, section 2).
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor

from logitcache.errors import ShapeError, UsageError

# B batch, C classes


def kl_divergence(student_BC: Tensor, teacher_BC: Tensor, *, temperature: float = 1.0) -> Tensor:
    """KL(teacher ‖ student) of the softened distributions, times T², in nats, float32 (B,).

    Source: Hinton et al. 2015, section 2. A class masked by -inf in the teacher contributes nothing.

    Raises:
        ShapeError: the two differ in shape.
    """
    _same_shape(student_BC, teacher_BC)
    log_student_BC = F.log_softmax(_softened(student_BC, temperature), dim=1)
    teacher_p_BC = F.softmax(_softened(teacher_BC, temperature), dim=1)
    kl_B = F.kl_div(log_student_BC, teacher_p_BC, reduction="none").sum(dim=1)
    return kl_B if temperature == 1.0 else kl_B * temperature**2


def soft_cross_entropy(student_BC: Tensor, teacher_BC: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Cross-entropy of the student to the teacher's softened distribution, times T², in nats, float32 (B,).

    It exceeds `kl_divergence` by T² times the teacher's entropy; their gradients agree.

    Raises:
        ShapeError: the two differ in shape.
    """
    _same_shape(student_BC, teacher_BC)
    log_student_BC = F.log_softmax(_softened(student_BC, temperature), dim=1)
    teacher_p_BC = F.softmax(_softened(teacher_BC, temperature), dim=1)
    return -(teacher_p_BC * log_student_BC).sum(dim=1) * temperature**2


def teacher_label_cross_entropy(student_BC: Tensor, teacher_BC: Tensor) -> Tensor:
    """Cross-entropy to the teacher's most probable class ("hard" distillation), in nats, float32 (B,).

    Raises:
        ShapeError: the two differ in shape.
    """
    _same_shape(student_BC, teacher_BC)
    return F.cross_entropy(student_BC.float(), teacher_BC.argmax(dim=1), reduction="none")


def true_label_cross_entropy(student_BC: Tensor, target: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    """Cross-entropy to the true label, in nats, float32 (B,).

    `target` is int (B,), or float (B, C) where mixup or CutMix made the label a mixture.
    """
    target = target.float() if target.is_floating_point() else target.long()
    return F.cross_entropy(student_BC.float(), target, reduction="none", label_smoothing=label_smoothing)


class Loss(ABC):
    """A loss by name, with what it needs: called with (student (B, C), teacher (B, C) or None, target)."""

    name: ClassVar[str]
    needs_teacher: ClassVar[bool] = True

    @abstractmethod
    def __call__(self, student_BC: Tensor, teacher_BC: Tensor | None, target: Tensor) -> Tensor:
        """The loss of each sample, float32 (B,)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class KLDivergence(Loss):
    """Hinton's soft-label distillation: KL(teacher ‖ student) at temperature T, times T²."""

    name: ClassVar[str] = "kl"
    temperature: float = 1.0

    def __post_init__(self) -> None:
        _check_temperature(self.temperature)

    def __call__(self, student_BC: Tensor, teacher_BC: Tensor | None, target: Tensor) -> Tensor:
        return kl_divergence(student_BC, _given(teacher_BC), temperature=self.temperature)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SoftCrossEntropy(Loss):
    """Cross-entropy to the teacher's softened distribution, times T²."""

    name: ClassVar[str] = "soft_cross_entropy"
    temperature: float = 1.0

    def __post_init__(self) -> None:
        _check_temperature(self.temperature)

    def __call__(self, student_BC: Tensor, teacher_BC: Tensor | None, target: Tensor) -> Tensor:
        return soft_cross_entropy(student_BC, _given(teacher_BC), temperature=self.temperature)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TeacherLabel(Loss):
    """Cross-entropy to the teacher's most probable class."""

    name: ClassVar[str] = "teacher_label"

    def __call__(self, student_BC: Tensor, teacher_BC: Tensor | None, target: Tensor) -> Tensor:
        return teacher_label_cross_entropy(student_BC, _given(teacher_BC))


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrueLabel(Loss):
    """Cross-entropy to the true label: what training without a teacher uses."""

    name: ClassVar[str] = "true_label"
    needs_teacher: ClassVar[bool] = False
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        _check_fraction("label_smoothing", self.label_smoothing)

    def __call__(self, student_BC: Tensor, teacher_BC: Tensor | None, target: Tensor) -> Tensor:
        return true_label_cross_entropy(student_BC, target, label_smoothing=self.label_smoothing)


@dataclasses.dataclass(frozen=True, kw_only=True)
class HardPlusSoft(Loss):
    """L_hard + λ · L_soft: cross-entropy to a hard label, plus a weighted KL to the soft ones."""

    name: ClassVar[str] = "hard_plus_soft"
    weight: float = 0.5
    """λ, of the soft part."""
    temperature: float = 1.0
    hard: str = "true_label"
    """"true_label" or "teacher_label"."""

    def __post_init__(self) -> None:
        _check_temperature(self.temperature)
        _check_hard(self.hard)
        if not isinstance(self.weight, int | float) or self.weight < 0:
            raise UsageError(f"loss 'hard_plus_soft': weight is at least 0, not {self.weight!r}")

    def __call__(self, student_BC: Tensor, teacher_BC: Tensor | None, target: Tensor) -> Tensor:
        soft_B = kl_divergence(student_BC, _given(teacher_BC), temperature=self.temperature)
        return _hard(self.hard, student_BC, _given(teacher_BC), target) + self.weight * soft_B


@dataclasses.dataclass(frozen=True, kw_only=True)
class Blend(Loss):
    """α · KL + (1 - α) · CE: between the teacher's soft labels and a hard label."""

    name: ClassVar[str] = "blend"
    alpha: float = 0.5
    """α, between 0 (hard label only) and 1 (teacher only)."""
    temperature: float = 1.0
    hard: str = "true_label"
    """"true_label" or "teacher_label"."""

    def __post_init__(self) -> None:
        _check_temperature(self.temperature)
        _check_hard(self.hard)
        _check_fraction("alpha", self.alpha)

    def __call__(self, student_BC: Tensor, teacher_BC: Tensor | None, target: Tensor) -> Tensor:
        soft_B = kl_divergence(student_BC, _given(teacher_BC), temperature=self.temperature)
        hard_B = _hard(self.hard, student_BC, _given(teacher_BC), target)
        return self.alpha * soft_B + (1.0 - self.alpha) * hard_B


LOSSES: dict[str, type[Loss]] = {
    loss.name: loss for loss in (KLDivergence, SoftCrossEntropy, TeacherLabel, TrueLabel, HardPlusSoft, Blend)
}


def loss_from_config(config: str | Mapping[str, Any]) -> Loss:
    """A loss from its name, or from a mapping such as `{name: kl, temperature: 2}`.

    Raises:
        UsageError: an unknown loss or parameter, or a parameter out of range.
    """
    if not isinstance(config, str | Mapping):
        raise UsageError(f"a loss is a name or a mapping such as {{name: kl, temperature: 2}}, not {config!r}")
    fields = {"name": config} if isinstance(config, str) else dict(config)
    name = fields.pop("name", None)
    if not isinstance(name, str) or name not in LOSSES:
        raise UsageError(f"unknown loss {name!r}; expected one of: {', '.join(LOSSES)}")
    known = [field.name for field in dataclasses.fields(LOSSES[name])]  # type: ignore[arg-type]
    for field in fields:
        if field not in known:
            raise UsageError(f"loss {name!r} has no parameter {field!r}; it has: {', '.join(known) or 'none'}")
    try:
        return LOSSES[name](**fields)
    except TypeError as error:
        raise UsageError(f"loss {name!r}: {error}; its parameters are: {', '.join(known) or 'none'}") from error


def _softened(logits_BC: Tensor, temperature: float) -> Tensor:
    # At T = 1 the division would cost a small student's step more than the gather of its labels.
    return logits_BC.float() if temperature == 1.0 else logits_BC.float() / temperature


def _same_shape(student_BC: Tensor, teacher_BC: Tensor) -> None:
    if student_BC.shape != teacher_BC.shape:
        raise ShapeError(
            f"student's logits are {tuple(student_BC.shape)}, the teacher's {tuple(teacher_BC.shape)}; "
            "expected (B, C) of the same batch and the same classes"
        )


def _given(teacher_BC: Tensor | None) -> Tensor:
    if teacher_BC is None:
        raise UsageError("this loss needs the teacher's logits, and none were given; name a cache, or use 'true_label'")
    return teacher_BC


def _hard(kind: str, student_BC: Tensor, teacher_BC: Tensor, target: Tensor) -> Tensor:
    if kind == "teacher_label":
        return teacher_label_cross_entropy(student_BC, teacher_BC)
    return true_label_cross_entropy(student_BC, target)


def _check_temperature(temperature: float) -> None:
    if not isinstance(temperature, int | float) or not temperature > 0:
        raise UsageError(f"a temperature is positive, not {temperature!r}")


def _check_fraction(name: str, value: float) -> None:
    if not isinstance(value, int | float) or not 0.0 <= value <= 1.0:
        raise UsageError(f"{name} lies between 0 and 1, not {value!r}")


def _check_hard(hard: str) -> None:
    if hard not in ("true_label", "teacher_label"):
        raise UsageError(f"'hard' is 'true_label' or 'teacher_label', not {hard!r}")
