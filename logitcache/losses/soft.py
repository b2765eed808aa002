"""Losses to the teacher's softened distribution: KL, cross-entropy, Jensen-Shannon; logits standardised on request."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from logitcache.errors import UsageError
from logitcache.losses.protocol import Loss, given, same_shape, wide
from logitcache.losses.schedules import Scheduled, check_temperature, fixed, shown

# B batch, C classes

LEAST_DEVIATION = 1e-3
"""Rows whose logits deviate less count as this wide when they are standardised."""


def kl_divergence(
    student_BC: Tensor, teacher_BC: Tensor, *, temperature: float = 1.0, standardise: bool = False
) -> Tensor:
    """KL(teacher ‖ student) of the softened distributions, times T², in nats, (B,).

    Source: Hinton et al. 2015, arXiv:1503.02531, section 2. A class masked by -inf in the teacher contributes nothing.

    Args:
        standardise: z-score both rows before the temperature; see `standardised`.

    Raises:
        ShapeError: the two differ in shape.
    """
    same_shape(student_BC, teacher_BC)
    log_student_BC = F.log_softmax(softened(student_BC, temperature, standardise=standardise), dim=1)
    teacher_p_BC = F.softmax(softened(teacher_BC, temperature, standardise=standardise), dim=1)
    kl_B = F.kl_div(log_student_BC, teacher_p_BC, reduction="none").sum(dim=1)
    return kl_B if temperature == 1.0 else kl_B * temperature**2


def soft_cross_entropy(
    student_BC: Tensor, teacher_BC: Tensor, *, temperature: float = 1.0, standardise: bool = False
) -> Tensor:
    """Cross-entropy of the student to the teacher's softened distribution, times T², in nats, (B,).

    It exceeds `kl_divergence` by T² times the teacher's entropy; their gradients agree. Source: Hinton et al. 2015,
    arXiv:1503.02531, section 2. A class masked by -inf in the teacher contributes nothing.

    Args:
        standardise: z-score both rows before the temperature; see `standardised`.

    Raises:
        ShapeError: the two differ in shape.
    """
    same_shape(student_BC, teacher_BC)
    log_student_BC = F.log_softmax(softened(student_BC, temperature, standardise=standardise), dim=1)
    teacher_p_BC = F.softmax(softened(teacher_BC, temperature, standardise=standardise), dim=1)
    return -(teacher_p_BC * log_student_BC).sum(dim=1) * temperature**2


def jensen_shannon(student_BC: Tensor, teacher_BC: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Jensen-Shannon divergence of the softened distributions, times T², in nats, (B,): at most T² ln 2.

    The mean of the divergences of the two to their average: symmetric, and bounded where KL is not. Source: Lin 1991,
    "Divergence measures based on the Shannon entropy", IEEE Transactions on Information Theory 37 (1). A class masked
    by -inf in the teacher has its probability 0.

    Raises:
        ShapeError: the two differ in shape.
    """
    same_shape(student_BC, teacher_BC)
    log_student_BC = F.log_softmax(softened(student_BC, temperature), dim=1)
    log_teacher_BC = F.log_softmax(softened(teacher_BC, temperature), dim=1)
    log_mean_BC = torch.logaddexp(log_student_BC, log_teacher_BC) - math.log(2.0)
    of_student_BC = F.kl_div(log_mean_BC, log_student_BC, reduction="none", log_target=True)
    # By its probabilities: the logarithm of a masked class is -inf, and 0 times that no number.
    of_teacher_BC = F.kl_div(log_mean_BC, log_teacher_BC.exp(), reduction="none")
    return 0.5 * (of_student_BC + of_teacher_BC).sum(dim=1) * temperature**2


def standardised(logits_BC: Tensor) -> Tensor:
    """Each row's z-score over its classes: mean 0, deviation 1, (B, C).

    A student then matches how the teacher ranks and spaces classes, not how large its logits are. Source: Sun et al.
    2024, "Logit Standardization in Knowledge Distillation", arXiv:2403.01427; squares are divided by C here, by C - 1
    in the authors' code, which amounts to a slightly other temperature. Classes at -inf are left out and stay -inf. A
    row whose deviation is below 0.001 is divided by 0.001, which bounds the gradient where a head starts at 0.
    """
    logits_BC = wide(logits_BC)
    kept_BC = logits_BC != -math.inf
    num_kept_B1 = kept_BC.sum(dim=1, keepdim=True, dtype=logits_BC.dtype)
    mean_B1 = logits_BC.masked_fill(~kept_BC, 0.0).sum(dim=1, keepdim=True) / num_kept_B1
    centred_BC = (logits_BC - mean_B1).masked_fill(~kept_BC, 0.0)
    deviation_B1 = torch.linalg.vector_norm(centred_BC, dim=1, keepdim=True) / num_kept_B1.sqrt()
    scores_BC: Tensor = centred_BC / deviation_B1.clamp_min(LEAST_DEVIATION)
    return scores_BC.masked_fill(~kept_BC, -math.inf)


def softened(logits_BC: Tensor, temperature: float, *, standardise: bool = False) -> Tensor:
    """Logits over T, standardised before that on request, in float32 at least."""
    logits_BC = standardised(logits_BC) if standardise else wide(logits_BC)
    # At T = 1 the division would cost a small student's step more than the gather of its labels.
    return logits_BC if temperature == 1.0 else logits_BC / temperature


def check_standardise(standardise: object) -> None:
    """Refuse what is neither true nor false.

    Raises:
        UsageError: says so.
    """
    if not isinstance(standardise, bool):
        raise UsageError(f"'standardise' is true or false, not {shown(standardise)}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class KLDivergence(Loss):
    """Hinton's soft-label distillation: KL(teacher ‖ student) at temperature T, times T² (arXiv:1503.02531)."""

    name: ClassVar[str] = "kl"
    temperature: Scheduled = 1.0
    standardise: bool = False
    """Z-score both rows first (Sun et al. 2024, arXiv:2403.01427); T is then the paper's base temperature."""

    def __post_init__(self) -> None:
        check_temperature(self.temperature)
        check_standardise(self.standardise)

    def __call__(self, student_BC: Tensor, teacher_BC: Tensor | None, target: Tensor) -> Tensor:
        return kl_divergence(
            student_BC, given(teacher_BC), temperature=fixed(self.temperature), standardise=self.standardise
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class SoftCrossEntropy(Loss):
    """Cross-entropy to the teacher's softened distribution, times T² (arXiv:1503.02531)."""

    name: ClassVar[str] = "soft_cross_entropy"
    temperature: Scheduled = 1.0
    standardise: bool = False
    """Z-score both rows first (Sun et al. 2024, arXiv:2403.01427); T is then the paper's base temperature."""

    def __post_init__(self) -> None:
        check_temperature(self.temperature)
        check_standardise(self.standardise)

    def __call__(self, student_BC: Tensor, teacher_BC: Tensor | None, target: Tensor) -> Tensor:
        return soft_cross_entropy(
            student_BC, given(teacher_BC), temperature=fixed(self.temperature), standardise=self.standardise
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class JensenShannon(Loss):
    """Jensen-Shannon divergence at temperature T, times T² (Lin 1991)."""

    name: ClassVar[str] = "js"
    temperature: Scheduled = 1.0

    def __post_init__(self) -> None:
        check_temperature(self.temperature)

    def __call__(self, student_BC: Tensor, teacher_BC: Tensor | None, target: Tensor) -> Tensor:
        return jensen_shannon(student_BC, given(teacher_BC), temperature=fixed(self.temperature))
