"""What every loss is, and what every loss does with its logits first."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from logitcache.errors import ShapeError, UsageError
from logitcache.losses.schedules import settled

# B batch, C classes


class Loss(ABC):
    """A loss by name, with what it needs: called with (student (B, C), teacher (B, C) or None, target)."""

    name: ClassVar[str]

    @property
    def needs_teacher(self) -> bool:
        """Whether any part of it takes the teacher's logits."""
        return True

    @property
    def needs_target(self) -> bool:
        """Whether any part of it takes the true label."""
        return False

    def needs_teacher_during(self, start: float, end: float) -> bool:
        """Whether it takes the teacher's logits anywhere between two shares of training, the end left out."""
        return self.needs_teacher

    def at(self, progress: float) -> Loss:
        """The loss when so much of training is done, 0 to 1: itself, where nothing in it changes."""
        return settled(self, progress)

    @abstractmethod
    def __call__(self, student_BC: Tensor, teacher_BC: Tensor | None, target: Tensor) -> Tensor:
        """The loss of each sample, (B,): float64 where the logits are, else float32."""


def given(teacher_BC: Tensor | None) -> Tensor:
    """The teacher's logits.

    Raises:
        UsageError: there are none.
    """
    if teacher_BC is None:
        raise UsageError("this loss needs the teacher's logits, and none were given; name a cache, or use 'true_label'")
    return teacher_BC


def same_shape(student_BC: Tensor, teacher_BC: Tensor) -> None:
    """Refuse logits of different batches or classes.

    Raises:
        ShapeError: states both shapes.
    """
    if student_BC.shape != teacher_BC.shape:
        raise ShapeError(
            f"student's logits are {tuple(student_BC.shape)}, the teacher's {tuple(teacher_BC.shape)}; "
            "expected (B, C) of the same batch and the same classes"
        )


def wide(logits_BC: Tensor) -> Tensor:
    """Logits in float32 at least: halves lose what a loss is made of."""
    return logits_BC if logits_BC.dtype == torch.float64 else logits_BC.float()
