"""The interface of every loss, and the checks and conversions that all of them share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, Literal

import torch
from torch import Tensor

from logitcache.errors import ShapeError, UsageError
from logitcache.losses.schedules import settled

# B batch, C classes

Reduction = Literal["none", "mean", "sum"]
"""What a loss function returns, as in torch: (B,) losses of the samples, or their mean or sum, a scalar."""


class Loss(ABC):
    """A configured loss: called with (student (B, C), teacher (B, C) or None, target)."""

    name: ClassVar[str]

    @property
    def needs_teacher(self) -> bool:
        """Whether any part of the loss uses the teacher's logits."""
        return True

    @property
    def needs_target(self) -> bool:
        """Whether any part of the loss uses the true label."""
        return False

    def needs_teacher_during(self, start: float, end: float) -> bool:
        """Whether the teacher's logits are used anywhere in [start, end), in shares of training from 0 to 1."""
        return self.needs_teacher

    def at(self, progress: float) -> Loss:
        """The loss at this share of training, 0 to 1; the same object if nothing in it is scheduled."""
        return settled(self, progress)

    @abstractmethod
    def __call__(self, student_BC: Tensor, teacher_BC: Tensor | None, target: Tensor) -> Tensor:
        """The loss of each sample, (B,); float64 if the logits are float64, else float32."""


def given(teacher_BC: Tensor | None) -> Tensor:
    """The teacher's logits, checked not to be None.

    Raises:
        UsageError: they are None.
    """
    if teacher_BC is None:
        raise UsageError(
            "this loss needs the teacher's logits, and none were given; name a cache, or use 'cross_entropy'"
        )
    return teacher_BC


def same_shape(student_BC: Tensor, teacher_BC: Tensor) -> None:
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


def wide(logits_BC: Tensor) -> Tensor:
    """Logits in float32 or float64: half precision is too coarse for a loss."""
    return logits_BC if logits_BC.dtype == torch.float64 else logits_BC.float()
