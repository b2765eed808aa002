"""Several losses at once: weighted sums."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from torch import Tensor

from logitcache.errors import UsageError
from logitcache.losses.hard import check_hard, hard_label_cross_entropy
from logitcache.losses.protocol import Loss, given
from logitcache.losses.schedules import Scheduled, check_parameter, check_temperature, fixed, value_at
from logitcache.losses.soft import kl_divergence

# B batch, C classes


@dataclasses.dataclass(frozen=True, kw_only=True)
class HardPlusSoft(Loss):
    """L_hard + λ · L_soft: cross-entropy to a hard label, plus a weighted KL to the soft ones."""

    name: ClassVar[str] = "hard_plus_soft"
    weight: Scheduled = 0.5
    """λ, of the soft part."""
    temperature: Scheduled = 1.0
    hard: str = "true_label"
    """"true_label" or "teacher_label"."""

    def __post_init__(self) -> None:
        check_temperature(self.temperature)
        check_hard(self.hard)
        check_parameter("weight", self.weight, least=0.0)

    @property
    def needs_target(self) -> bool:
        return self.hard == "true_label"

    def __call__(self, student_BC: Tensor, teacher_BC: Tensor | None, target: Tensor) -> Tensor:
        soft_B = kl_divergence(student_BC, given(teacher_BC), temperature=fixed(self.temperature))
        return hard_label_cross_entropy(self.hard, student_BC, given(teacher_BC), target) + fixed(self.weight) * soft_B


@dataclasses.dataclass(frozen=True, kw_only=True)
class Blend(Loss):
    """α · KL + (1 - α) · CE: between the teacher's soft labels and a hard label."""

    name: ClassVar[str] = "blend"
    alpha: Scheduled = 0.5
    """α, between 0 (hard label only) and 1 (teacher only)."""
    temperature: Scheduled = 1.0
    hard: str = "true_label"
    """"true_label" or "teacher_label"."""

    def __post_init__(self) -> None:
        check_temperature(self.temperature)
        check_hard(self.hard)
        check_parameter("alpha", self.alpha, least=0.0, most=1.0)

    @property
    def needs_target(self) -> bool:
        return self.hard == "true_label"

    def __call__(self, student_BC: Tensor, teacher_BC: Tensor | None, target: Tensor) -> Tensor:
        alpha = fixed(self.alpha)
        soft_B = kl_divergence(student_BC, given(teacher_BC), temperature=fixed(self.temperature))
        hard_B = hard_label_cross_entropy(self.hard, student_BC, given(teacher_BC), target)
        return alpha * soft_B + (1.0 - alpha) * hard_B


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """One loss of a weighted sum."""

    loss: Loss
    weight: Scheduled = 1.0

    def __post_init__(self) -> None:
        check_parameter("weight", self.weight, least=0.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Weighted(Loss):
    """A sum of any losses, each times its weight, which need not add up to 1."""

    name: ClassVar[str] = "weighted"
    parts: tuple[Part, ...]

    def __post_init__(self) -> None:
        if not self.parts:
            raise UsageError("loss 'weighted' has no parts; expected for example parts: [{loss: dist, weight: 2}]")

    @property
    def needs_teacher(self) -> bool:
        return any(part.loss.needs_teacher for part in self.parts)

    @property
    def needs_target(self) -> bool:
        return any(part.loss.needs_target for part in self.parts)

    def at(self, progress: float) -> Loss:
        parts = tuple(
            dataclasses.replace(part, loss=part.loss.at(progress), weight=value_at(part.weight, progress))
            for part in self.parts
        )
        return self if parts == self.parts else Weighted(parts=parts)

    def __call__(self, student_BC: Tensor, teacher_BC: Tensor | None, target: Tensor) -> Tensor:
        first, *rest = (fixed(part.weight) * part.loss(student_BC, teacher_BC, target) for part in self.parts)
        return sum(rest, start=first)
