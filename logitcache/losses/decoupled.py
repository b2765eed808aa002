"""Distillation with separate weights for the target class and the other classes (DKD)."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from logitcache.errors import ShapeError, UsageError
from logitcache.losses.protocol import Loss, Reduction, given, reduced, same_shape
from logitcache.losses.schedules import Scheduled, check_parameter, check_temperature, fixed, shown
from logitcache.losses.soft import check_standardise, softened

# B batch, C classes

AS_IN_KD = "kd"
"""The β that weights each sample by 1 - p_t, as plain KL does."""


def decoupled_kd(
    student_BC: Tensor,
    teacher_BC: Tensor,
    target: Tensor,
    *,
    alpha: float = 1.0,
    beta: float | Literal["kd"] = 8.0,
    temperature: float = 4.0,
    standardise: bool = False,
    reduction: Reduction = "none",
) -> Tensor:
    """α · TCKD + β · NCKD, times T², in nats, (B,).

    With p_t the teacher's probability of the target class, TCKD is the KL divergence of (p_t, 1 - p_t), and NCKD the
    KL divergence of the distributions over the other classes. KL = TCKD + (1 - p_t) · NCKD, so KL nearly ignores the
    other classes of a confident teacher; DKD weights them separately. No constant β equals KL for every sample;
    `beta="kd"` with α = 1 does. Source: Zhao et al. 2022, "Decoupled Knowledge Distillation", arXiv:2203.08679,
    section 3, who use α = 1, β = 8, T = 4 for most pairs of models on CIFAR-100.

    A class masked by -inf in the teacher has probability 0; if all but the target are masked, NCKD is 0.

    Args:
        target: int (B,); or float (B, C), a mixture of labels whose largest class is then the target.
        standardise: z-score both rows before the temperature; see `standardised`.
        reduction: "mean" or "sum" over the batch returns a scalar; "none" returns (B,).

    Raises:
        ShapeError: the two differ in shape, or there are fewer than two classes.
    """
    same_shape(student_BC, teacher_BC)
    if student_BC.shape[1] < 2:
        raise ShapeError("DKD weighs the target class against the others; expected at least two classes, found one")
    target_B = target.argmax(dim=1) if target.is_floating_point() else target.long()
    student_BC = softened(student_BC, temperature, standardise=standardise)
    teacher_BC = softened(teacher_BC, temperature, standardise=standardise)
    log_student_B2, _, log_others_B1 = _target_and_others(student_BC, target_B)
    log_teacher_B2, others_BC, log_teacher_others_B1 = _target_and_others(teacher_BC, target_B)
    teacher_p_B2 = log_teacher_B2.exp()
    target_part_B = F.kl_div(log_student_B2, teacher_p_B2, reduction="none").sum(dim=1)
    # The softmax of a row of -inf is NaN: there all other classes are masked.
    teacher_p_BC = F.softmax(others_BC, dim=1).masked_fill(log_teacher_others_B1 == -math.inf, 0.0)
    # The target's own entry is not a log-probability; the teacher's 0 removes it from the sum.
    other_part_B = F.kl_div(student_BC - log_others_B1, teacher_p_BC, reduction="none").sum(dim=1)
    weight = teacher_p_B2[:, 1] if isinstance(beta, str) else beta
    return reduced((alpha * target_part_B + weight * other_part_B) * temperature**2, reduction)


def _target_and_others(logits_BC: Tensor, target_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities of the target and of the rest, (B, 2); logits of the rest, (B, C), and their log-sum-exp."""
    target_B1 = target_B.unsqueeze(1)
    others_BC = logits_BC.scatter(1, target_B1, -math.inf)
    log_all_B1 = torch.logsumexp(logits_BC, dim=1, keepdim=True)
    log_others_B1 = torch.logsumexp(others_BC, dim=1, keepdim=True)
    log_p_B2 = torch.cat([logits_BC.gather(1, target_B1), log_others_B1], dim=1) - log_all_B1
    return log_p_B2, others_BC, log_others_B1


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoupledKD(Loss):
    """DKD: α · TCKD + β · NCKD at temperature T, times T² (Zhao et al. 2022, arXiv:2203.08679).

    The target class is the true label, or the largest class of a mixture of labels.
    """

    name: ClassVar[str] = "dkd"
    alpha: Scheduled = 1.0
    """α, weight of the target class against the rest."""
    beta: Scheduled | Literal["kd"] = 8.0
    """β, weight of the other classes; "kd" weights each sample by 1 - p_t, which with α = 1 is KL."""
    temperature: Scheduled = 4.0
    standardise: bool = False
    """Z-score both rows first (Sun et al. 2024, arXiv:2403.01427)."""

    def __post_init__(self) -> None:
        check_parameter("alpha", self.alpha, least=0.0)
        if isinstance(self.beta, str) and self.beta != AS_IN_KD:
            raise UsageError(f"beta is at least 0, or {AS_IN_KD!r} for the weight 1 - p_t, not {shown(self.beta)}")
        if not isinstance(self.beta, str):
            check_parameter("beta", self.beta, least=0.0)
        check_temperature(self.temperature)
        check_standardise(self.standardise)

    @property
    def needs_target(self) -> bool:
        return True

    def __call__(self, student_BC: Tensor, teacher_BC: Tensor | None, target: Tensor) -> Tensor:
        return decoupled_kd(
            student_BC,
            given(teacher_BC),
            target,
            alpha=fixed(self.alpha),
            beta=self.beta if isinstance(self.beta, str) else fixed(self.beta),
            temperature=fixed(self.temperature),
            standardise=self.standardise,
        )
