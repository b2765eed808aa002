"""Cross-entropy to one label a sample: the teacher's, or the true one."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from logitcache.errors import UsageError
from logitcache.losses.protocol import Loss, given, same_shape, wide
from logitcache.losses.schedules import Scheduled, check_parameter, fixed, shown

# B batch, C classes


def teacher_label_cross_entropy(student_BC: Tensor, teacher_BC: Tensor) -> Tensor:
    """Cross-entropy to the teacher's most probable class ("hard" distillation), in nats, (B,).

    Source: Touvron et al. 2021, arXiv:2012.12877, section 4.

    Raises:
        ShapeError: the two differ in shape.
    """
    same_shape(student_BC, teacher_BC)
    return F.cross_entropy(wide(student_BC), teacher_BC.argmax(dim=1), reduction="none")


def true_label_cross_entropy(student_BC: Tensor, target: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    """Cross-entropy to the true label, in nats, (B,).

    `target` is int (B,), or float (B, C) where mixup or CutMix made the label a mixture.
    """
    student_BC = wide(student_BC)
    target = target.to(student_BC.dtype) if target.is_floating_point() else target.long()
    return F.cross_entropy(student_BC, target, reduction="none", label_smoothing=label_smoothing)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TeacherLabel(Loss):
    """Cross-entropy to the teacher's most probable class (Touvron et al. 2021, arXiv:2012.12877)."""

    name: ClassVar[str] = "teacher_label"

    def __call__(self, student_BC: Tensor, teacher_BC: Tensor | None, target: Tensor) -> Tensor:
        return teacher_label_cross_entropy(student_BC, given(teacher_BC))


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrueLabel(Loss):
    """Cross-entropy to the true label: what training without a teacher uses."""

    name: ClassVar[str] = "true_label"
    label_smoothing: Scheduled = 0.0

    def __post_init__(self) -> None:
        check_parameter("label_smoothing", self.label_smoothing, least=0.0, most=1.0)

    @property
    def needs_teacher(self) -> bool:
        return False

    @property
    def needs_target(self) -> bool:
        return True

    def __call__(self, student_BC: Tensor, teacher_BC: Tensor | None, target: Tensor) -> Tensor:
        return true_label_cross_entropy(student_BC, target, label_smoothing=fixed(self.label_smoothing))


def hard_label_cross_entropy(kind: str, student_BC: Tensor, teacher_BC: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy to the hard label of a kind, "true_label" or "teacher_label", in nats, (B,)."""
    if kind == "teacher_label":
        return teacher_label_cross_entropy(student_BC, teacher_BC)
    return true_label_cross_entropy(student_BC, target)


def check_hard(hard: object) -> None:
    """Refuse what is no kind of hard label.

    Raises:
        UsageError: names the two kinds.
    """
    if hard not in ("true_label", "teacher_label"):
        raise UsageError(f"'hard' is 'true_label' or 'teacher_label', not {shown(hard)}")
