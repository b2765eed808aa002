"""Weighted sums of losses."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from typing import ClassVar

from torch import Tensor

from logitcache.errors import UsageError
from logitcache.losses.hard import check_hard, hard_cross_entropy, hard_term, uses_true_label
from logitcache.losses.protocol import Loss, Term, given, teacher_for
from logitcache.losses.schedules import Scheduled, check_parameter, check_temperature, fixed, value_at
from logitcache.losses.soft import kl_divergence
from logitcache.targets import Targets

# B batch, C classes


@dataclasses.dataclass(frozen=True, kw_only=True)
class _HardAndSoft(Loss):
    """Cross-entropy to a hard label and KL to the teacher's soft labels, each with a weight."""

    temperature: Scheduled = 1.0
    hard: str = "cross_entropy"
    """"cross_entropy", to the true label; or "teacher_argmax"."""

    def __post_init__(self) -> None:
        check_temperature(self.temperature)
        check_hard(self.hard)

    @abstractmethod
    def weights(self) -> tuple[float, float]:
        """Of the hard and of the soft part; call `at(progress)` first."""

    @property
    def needs_target(self) -> bool:
        return uses_true_label(self.hard)

    @property
    def takes_targets(self) -> bool:
        return True

    def terms(self) -> tuple[Term, ...]:
        of_hard, of_soft = self.weights()
        return hard_term(self.hard, of_hard), Term("kl", of_soft, fixed(self.temperature))

    def __call__(self, student_BC: Tensor, teacher_BC: Tensor | Targets | None, target: Tensor) -> Tensor:
        of_hard, of_soft = self.weights()
        soft_B = kl_divergence(student_BC, given(teacher_BC), temperature=fixed(self.temperature))
        return of_hard * hard_cross_entropy(self.hard, student_BC, given(teacher_BC), target) + of_soft * soft_B


@dataclasses.dataclass(frozen=True, kw_only=True)
class HardPlusSoft(_HardAndSoft):
    """Cross-entropy to a hard label + λ · KL to the teacher's soft labels."""

    name: ClassVar[str] = "hard_plus_soft"
    weight: Scheduled = 0.5
    """λ, weight of the soft part."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_parameter("weight", self.weight, least=0.0)

    def weights(self) -> tuple[float, float]:
        return 1.0, fixed(self.weight)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Blend(_HardAndSoft):
    """α · KL to the teacher's soft labels + (1 - α) · cross-entropy to a hard label."""

    name: ClassVar[str] = "blend"
    alpha: Scheduled = 0.5
    """α, between 0 (hard label only) and 1 (teacher only)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_parameter("alpha", self.alpha, least=0.0, most=1.0)

    def weights(self) -> tuple[float, float]:
        return 1.0 - fixed(self.alpha), fixed(self.alpha)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """One loss of a weighted sum, with its weight."""

    loss: Loss
    weight: Scheduled = 1.0

    def __post_init__(self) -> None:
        check_parameter("weight", self.weight, least=0.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Weighted(Loss):
    """A weighted sum of any losses; the weights need not add up to 1."""

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

    @property
    def takes_targets(self) -> bool:
        return any(part.loss.takes_targets for part in self.parts)

    def at(self, progress: float) -> Loss:
        parts = tuple(
            dataclasses.replace(part, loss=part.loss.at(progress), weight=value_at(part.weight, progress))
            for part in self.parts
        )
        return self if parts == self.parts else Weighted(parts=parts)

    def terms(self) -> tuple[Term, ...]:
        return tuple(
            term._replace(weight=term.weight * fixed(part.weight)) for part in self.parts for term in part.loss.terms()
        )

    def __call__(self, student_BC: Tensor, teacher_BC: Tensor | Targets | None, target: Tensor) -> Tensor:
        first, *rest = (
            fixed(part.weight) * part.loss(student_BC, teacher_for(part.loss, teacher_BC), target)
            for part in self.parts
        )
        return sum(rest, start=first)
