"""Losses in sequence, such as the teacher's soft labels first and the true labels afterwards."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from torch import Tensor

from logitcache.errors import UsageError
from logitcache.losses.protocol import Loss

# B batch, C classes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """One loss and the share of training at which it ends."""

    loss: Loss
    until: float = 1.0
    """Greater than in the previous stage; at most 1, the end of training."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stages(Loss):
    """Losses in sequence, each over its own part of training.

    A schedule within a stage runs over that stage. In a stage that needs no teacher, no cached labels are read.

    Raises:
        UsageError: no stages, or ends that do not increase to 1.
    """

    name: ClassVar[str] = "stages"
    stages: tuple[Stage, ...]

    def __post_init__(self) -> None:
        if not self.stages:
            raise UsageError(
                "'stages' is empty; expected for example stages: [{until: 0.8, loss: kl}, {loss: cross_entropy}]"
            )
        start = 0.0
        for number, stage in enumerate(self.stages, start=1):
            if not start < stage.until <= 1.0:
                raise UsageError(
                    f"stage {number} ends at {stage.until:g} and the one before at {start:g}; `until` is a share of "
                    "training that increases from stage to stage, above 0 and at most 1"
                )
            start = stage.until
        if start != 1.0:
            raise UsageError(f"the last stage ends at {start:g}; leave out its `until` so that it lasts to the end")

    @property
    def needs_teacher(self) -> bool:
        return any(stage.loss.needs_teacher for stage in self.stages)

    @property
    def needs_target(self) -> bool:
        return any(stage.loss.needs_target for stage in self.stages)

    @property
    def takes_targets(self) -> bool:
        return all(stage.loss.takes_targets for stage in self.stages)

    def needs_teacher_during(self, start: float, end: float) -> bool:
        return any(
            stage.loss.needs_teacher
            for begin, stage in zip(self._begins(), self.stages, strict=True)
            if begin < end and stage.until > start
        )

    def at(self, progress: float) -> Loss:
        for begin, stage in zip(self._begins(), self.stages, strict=True):
            if progress < stage.until or stage.until == 1.0:
                return stage.loss.at((progress - begin) / (stage.until - begin))
        raise AssertionError("the last stage lasts to the end")

    def __call__(self, student_BC: Tensor, teacher_BC: Tensor | None, target: Tensor) -> Tensor:
        raise UsageError("the loss has stages: call `loss.at(progress)` first, with progress from 0 to 1")

    def _begins(self) -> list[float]:
        return [0.0, *(stage.until for stage in self.stages[:-1])]
