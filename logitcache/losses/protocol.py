"""The interface of every loss, and the checks and conversions that all of them share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, Literal, NamedTuple, TypeVar, overload

import torch
from torch import Tensor

from logitcache.errors import ShapeError, UsageError
from logitcache.losses.schedules import settled
from logitcache.targets import Targets

T = TypeVar("T")

# B batch, C classes, R rows that count

Reduction = Literal["none", "mean", "sum"]
"""What a loss function returns, as in torch: (B,) losses of the samples, or their mean or sum, a scalar."""


class Term(NamedTuple):
    """A part of a loss that needs one row of logits at a time, so that a head can compute it chunk by chunk."""

    kind: Literal["kl", "soft_cross_entropy", "js", "cross_entropy", "teacher_argmax"]
    """The last two are cross-entropies to the true label and to the teacher's most probable class."""
    weight: float = 1.0
    temperature: float = 1.0


class Loss(ABC):
    """A configured loss: called with (student (B, C), teacher (B, C) or None, target).

    If `takes_targets`, the teacher may also be `Targets`; see `teacher_for`.
    """

    name: ClassVar[str]

    @property
    def needs_teacher(self) -> bool:
        """Whether any part of the loss uses the teacher's logits."""
        return True

    @property
    def needs_target(self) -> bool:
        """Whether any part of the loss uses the true label."""
        return False

    @property
    def takes_targets(self) -> bool:
        """Whether the teacher may be sparse or factored `Targets`; if not, the loss is given their logits."""
        return False

    def needs_teacher_during(self, start: float, end: float) -> bool:
        """Whether the teacher's logits are used anywhere in [start, end), in shares of training from 0 to 1."""
        return self.needs_teacher

    def at(self, progress: float) -> Loss:
        """The loss at this share of training, 0 to 1; the same object if nothing in it is scheduled."""
        return settled(self, progress)

    def terms(self) -> tuple[Term, ...]:
        """The terms whose sum is the loss, if each can be computed chunk by chunk; call `at(progress)` first.

        Raises:
            UsageError: the loss needs the logits of all rows at once.
        """
        raise UsageError(
            f"loss {self.name!r} can't be computed by chunks of rows; leave out `train.chunked_head`, or use kl, "
            "soft_cross_entropy, js, cross_entropy, teacher_argmax or a weighted sum of them"
        )

    @abstractmethod
    def __call__(self, student_BC: Tensor, teacher_BC: Tensor | None, target: Tensor) -> Tensor:
        """The loss of each sample, (B,); float64 if the logits are float64, else float32."""


def teacher_for(loss: Loss, teacher_BC: Tensor | Targets | None) -> Any:
    """The teacher in a form that a loss takes: itself, or the logits (B, C) of targets that the loss can't take."""
    return teacher_BC.dense() if isinstance(teacher_BC, Targets) and not loss.takes_targets else teacher_BC


@overload
def given(teacher_BC: Tensor | None) -> Tensor: ...
@overload
def given(teacher_BC: Tensor | Targets | None) -> Tensor | Targets: ...
def given(teacher_BC: Tensor | Targets | None) -> Tensor | Targets:
    """The teacher's logits or targets, checked not to be None.

    Raises:
        UsageError: they are None.
    """
    if teacher_BC is None:
        raise UsageError(
            "this loss needs the teacher's logits, and none were given; name a cache, or use 'cross_entropy'"
        )
    return teacher_BC


def same_shape(student_BC: Tensor, teacher_BC: Tensor | Targets) -> None:
    """Check that student and teacher have the same batch and classes.

    Raises:
        ShapeError: the shapes differ; the message gives both.
    """
    if student_BC.shape != teacher_BC.shape:
        raise ShapeError(
            f"student's logits are {tuple(student_BC.shape)}, the teacher's {tuple(teacher_BC.shape)}; "
            "expected (B, C) of the same batch and the same classes"
        )


def reduced(loss_B: Tensor, reduction: Reduction) -> Tensor:
    """The losses of a batch, (B,), or their mean or sum, ().

    Raises:
        UsageError: an unknown reduction.
    """
    if reduction == "none":
        return loss_B
    if reduction == "mean":
        return loss_B.mean()
    if reduction == "sum":
        return loss_B.sum()
    raise UsageError(f"reduction is 'none', 'mean' or 'sum', not {reduction!r}")


def over_rows(
    loss: Callable[[Tensor, T], Tensor], student_BC: Tensor, teacher: T, mask: Tensor | None, reduction: Reduction
) -> Tensor:
    """The losses of a batch, (B,), or their mean or sum, over the rows that count.

    Args:
        loss: of student and teacher, (R,).
        teacher: logits, targets or labels: what can be indexed by rows.
        mask: bool (B,), true for the rows that count; None for all. The others have loss 0 and no gradient, whatever
            they contain, and the mean is over those that count; it is 0 if there are none.

    Raises:
        ShapeError: the mask is not (B,).
        UsageError: the mask is not bool; an unknown reduction.
    """
    if mask is None:
        return reduced(loss(student_BC, teacher), reduction)
    rows_R = counting_rows(mask, len(student_BC)).to(student_BC.device)
    loss_R = loss(student_BC[rows_R], teacher[rows_R])  # type: ignore[index]
    if reduction == "none":
        return loss_R.new_zeros(len(student_BC)).index_copy(0, rows_R, loss_R)
    return loss_R.sum() / max(1, len(rows_R)) if reduction == "mean" else reduced(loss_R, reduction)


def counting_rows(mask: Tensor, num_rows: int) -> Tensor:
    """The numbers of the rows that a mask selects, int64 (R,).

    Raises:
        ShapeError: the mask is not (B,).
        UsageError: the mask is not bool.
    """
    if mask.shape != (num_rows,):
        raise ShapeError(f"the mask is {tuple(mask.shape)}; expected ({num_rows},), one value for each row")
    if mask.dtype != torch.bool:
        raise UsageError(f"the mask is {mask.dtype}; expected torch.bool, true for the rows that count")
    return mask.nonzero()[:, 0]


def wide(logits_BC: Tensor) -> Tensor:
    """Logits in float32 or float64: half precision is too coarse for a loss."""
    return logits_BC if logits_BC.dtype == torch.float64 else logits_BC.float()
