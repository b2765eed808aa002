"""Cross-entropy to one hard label per sample: the true label, or the teacher's most probable class."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor

from logitcache.errors import UsageError
from logitcache.losses.protocol import Loss, Reduction, Term, given, over_rows, same_shape, wide
from logitcache.losses.schedules import Scheduled, check_parameter, fixed, shown
from logitcache.targets import Targets

# B batch, C classes

IGNORED = -100
"""The label of a row that does not count, as in torch."""
FIRST_NAMES = {"cross_entropy": "true_label", "teacher_argmax": "teacher_label"}
"""The first names of losses that were renamed. They stay valid in pipelines, and runs are recorded under them."""
CURRENT_NAMES = {first: current for current, first in FIRST_NAMES.items()}
STANDARDISABLE = ("kl", "soft_cross_entropy", "dkd")
"""Losses with the parameter `standardise`. A configuration may also spell it `standardize`; runs are recorded with
the first spelling."""


def recorded_loss(config: Any) -> Any:
    """A loss configuration as a run's identity records it: with first names, so that renaming changes no id."""
    if isinstance(config, list | tuple):
        return [recorded_loss(item) for item in config]
    if not isinstance(config, dict):
        return config
    return {
        key: FIRST_NAMES.get(value, value)
        if key in ("name", "loss", "hard") and isinstance(value, str)
        else recorded_loss(value)
        for key, value in with_one_spelling(config).items()
    }


def with_one_spelling(fields: Mapping[Any, Any]) -> dict[Any, Any]:
    """The fields of one loss, with `standardise` for `standardize`.

    Raises:
        UsageError: both are given.
    """
    if "standardize" not in fields or fields.get("name") not in STANDARDISABLE:
        return dict(fields)
    if "standardise" in fields:
        raise UsageError("'standardise' and 'standardize' are two spellings of one parameter; give one of them")
    return {"standardise" if key == "standardize" else key: value for key, value in fields.items()}


def teacher_argmax_cross_entropy(
    student_BC: Tensor,
    teacher_BC: Tensor | Targets,
    *,
    mask: Tensor | None = None,
    reduction: Reduction = "none",
) -> Tensor:
    """Cross-entropy to the teacher's most probable class ("hard" distillation), in nats, (B,).

    Source: Touvron et al. 2021, arXiv:2012.12877, section 4.

    Args:
        teacher_BC: logits, or targets such as `view.targets(index)`.
        mask: bool (B,), true for the rows that count; the others have loss 0, and "mean" is over those that count.
        reduction: "mean" or "sum" over the batch returns a scalar; "none" returns (B,).

    Raises:
        ShapeError: the two differ in shape.
    """
    same_shape(student_BC, teacher_BC)
    label_B = teacher_BC.argmax() if isinstance(teacher_BC, Targets) else teacher_BC.argmax(dim=1)
    return over_rows(_cross_entropy, student_BC, label_B, mask, reduction)


def _cross_entropy(student_BC: Tensor, target: Tensor, label_smoothing: float = 0.0) -> Tensor:
    return F.cross_entropy(wide(student_BC), target, reduction="none", label_smoothing=label_smoothing)


def cross_entropy(
    student_BC: Tensor,
    target: Tensor,
    *,
    label_smoothing: float = 0.0,
    mask: Tensor | None = None,
    reduction: Reduction = "none",
) -> Tensor:
    """Cross-entropy to the true label, in nats, (B,).

    Args:
        target: int (B,), where a row with -100 does not count; or float (B, C) where mixup or CutMix made the label a
            mixture.
        label_smoothing: as in `torch.nn.functional.cross_entropy`.
        mask: bool (B,), true for the rows that count; the others have loss 0, and "mean" is over those that count.
        reduction: "mean" or "sum" over the batch returns a scalar; "none" returns (B,).
    """
    student_BC = wide(student_BC)
    target = target.to(student_BC.dtype) if target.is_floating_point() else target.long()
    loss = functools.partial(_cross_entropy, label_smoothing=label_smoothing)
    if reduction != "mean" or target.is_floating_point():
        return over_rows(loss, student_BC, target, mask, reduction)
    counts_B = target != IGNORED if mask is None else (target != IGNORED) & mask
    return over_rows(loss, student_BC, target, mask, "sum") / counts_B.sum().clamp_min(1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TeacherArgmax(Loss):
    """Cross-entropy to the teacher's most probable class (Touvron et al. 2021, arXiv:2012.12877)."""

    name: ClassVar[str] = "teacher_argmax"

    @property
    def takes_targets(self) -> bool:
        return True

    def terms(self) -> tuple[Term, ...]:
        return (Term("teacher_argmax"),)

    def __call__(self, student_BC: Tensor, teacher_BC: Tensor | Targets | None, target: Tensor) -> Tensor:
        return teacher_argmax_cross_entropy(student_BC, given(teacher_BC))


@dataclasses.dataclass(frozen=True, kw_only=True)
class CrossEntropy(Loss):
    """Cross-entropy to the true label, as in training without a teacher."""

    name: ClassVar[str] = "cross_entropy"
    label_smoothing: Scheduled = 0.0

    def __post_init__(self) -> None:
        check_parameter("label_smoothing", self.label_smoothing, least=0.0, most=1.0)

    @property
    def needs_teacher(self) -> bool:
        return False

    @property
    def needs_target(self) -> bool:
        return True

    @property
    def takes_targets(self) -> bool:
        return True

    def terms(self) -> tuple[Term, ...]:
        return super().terms() if fixed(self.label_smoothing) else (Term("cross_entropy"),)

    def __call__(self, student_BC: Tensor, teacher_BC: Tensor | Targets | None, target: Tensor) -> Tensor:
        return cross_entropy(student_BC, target, label_smoothing=fixed(self.label_smoothing))


def hard_cross_entropy(hard: str, student_BC: Tensor, teacher_BC: Tensor | Targets, target: Tensor) -> Tensor:
    """Cross-entropy to one kind of hard label, in nats, (B,); `hard` as `check_hard` takes it."""
    if uses_true_label(hard):
        return cross_entropy(student_BC, target)
    return teacher_argmax_cross_entropy(student_BC, teacher_BC)


def hard_term(hard: str, weight: float = 1.0) -> Term:
    """The term of `hard_cross_entropy`."""
    return Term("cross_entropy" if uses_true_label(hard) else "teacher_argmax", weight)


def uses_true_label(hard: str) -> bool:
    """Whether a kind of hard label is the true label."""
    return CURRENT_NAMES.get(hard, hard) == CrossEntropy.name


def check_hard(hard: object) -> None:
    """Check the name of a kind of hard label.

    Raises:
        UsageError: neither "cross_entropy" nor "teacher_argmax", nor one of their first names.
    """
    if not isinstance(hard, str) or CURRENT_NAMES.get(hard, hard) not in FIRST_NAMES:
        raise UsageError(f"'hard' is 'cross_entropy' or 'teacher_argmax', not {shown(hard)}")
