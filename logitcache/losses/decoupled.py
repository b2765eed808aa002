"""Distillation with the target class and the other classes weighed apart (DKD)."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from logitcache.errors import ShapeError, UsageError
from logitcache.losses.protocol import Loss, given, same_shape
from logitcache.losses.schedules import Scheduled, check_parameter, check_temperature, fixed, shown
from logitcache.losses.soft import check_standardise, softened

# B batch, C classes

AS_IN_KD = "kd"
"""The β that gives each sample the weight 1 - p_t, which the divergence as a whole gives it."""


def decoupled_kd(
    student_BC: Tensor,
    teacher_BC: Tensor,
    target: Tensor,
    *,
    alpha: float = 1.0,
    beta: float | Literal["kd"] = 8.0,
    temperature: float = 4.0,
    standardise: bool = False,
) -> Tensor:
    """α · TCKD + β · NCKD, times T², in nats, (B,).

    With p_t the teacher's probability of the target class, TCKD is the divergence of (p_t, 1 - p_t), and NCKD that of
    the distributions over the other classes alone. KL = TCKD + (1 - p_t) · NCKD: a sure teacher's other classes hardly
    count there, and get a weight of their own here. No constant β is the same as KL for every sample; `beta="kd"` with
    α = 1 is. Source: Zhao et al. 2022, "Decoupled Knowledge Distillation", arXiv:2203.08679, section 3; α = 1, β = 8,
    T = 4 are theirs for most pairs of nets on CIFAR-100.

    A class masked by -inf in the teacher has its probability 0; where it masks all but the target, NCKD is 0.

    Args:
        target: int (B,); or float (B, C), a mixture of labels, whose dominant class is then the target.
        standardise: z-score both rows before the temperature; see `standardised`.

    Raises:
        ShapeError: the two differ in shape, or there are fewer than two classes.
    """
    same_shape(student_BC, teacher_BC)
    if student_BC.shape[1] < 2:
        raise ShapeError("DKD weighs the target class against the others; expected two classes at least, found one")
    target_B = target.argmax(dim=1) if target.is_floating_point() else target.long()
    is_target_BC = F.one_hot(target_B, student_BC.shape[1]).bool()
    student_BC = softened(student_BC, temperature, standardise=standardise)
    teacher_BC = softened(teacher_BC, temperature, standardise=standardise)

    log_student_B2 = _target_or_not(student_BC, is_target_BC)
    teacher_p_B2 = _target_or_not(teacher_BC, is_target_BC).exp()
    target_part_B = F.kl_div(log_student_B2, teacher_p_B2, reduction="none").sum(dim=1)

    log_student_BC = F.log_softmax(student_BC.masked_fill(is_target_BC, -math.inf), dim=1).masked_fill(
        is_target_BC, 0.0
    )
    others_BC = teacher_BC.masked_fill(is_target_BC, -math.inf)
    # A softmax of nothing but -inf is NaN: the teacher says nothing of the others there.
    silent_B1 = (others_BC == -math.inf).all(dim=1, keepdim=True)
    teacher_p_BC = F.softmax(others_BC, dim=1).masked_fill(silent_B1, 0.0)
    other_part_B = F.kl_div(log_student_BC, teacher_p_BC, reduction="none").sum(dim=1)

    weight = teacher_p_B2[:, 1] if isinstance(beta, str) else beta
    return (alpha * target_part_B + weight * other_part_B) * temperature**2


def _target_or_not(logits_BC: Tensor, is_target_BC: Tensor) -> Tensor:
    """Log-probabilities of the target class and of all others together, (B, 2)."""
    log_p_BC = F.log_softmax(logits_BC, dim=1)
    target_B = log_p_BC.masked_fill(~is_target_BC, -math.inf).amax(dim=1)
    others_B = torch.logsumexp(log_p_BC.masked_fill(is_target_BC, -math.inf), dim=1)
    return torch.stack([target_B, others_B], dim=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoupledKD(Loss):
    """DKD: α · TCKD + β · NCKD at temperature T, times T² (Zhao et al. 2022, arXiv:2203.08679).

    The target class is the true label; of a mixture of labels, the dominant one.
    """

    name: ClassVar[str] = "dkd"
    alpha: Scheduled = 1.0
    """α, of the target class against the rest."""
    beta: Scheduled | Literal["kd"] = 8.0
    """β, of the classes beside the target; "kd" weighs each sample by 1 - p_t, which with α = 1 is KL."""
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
