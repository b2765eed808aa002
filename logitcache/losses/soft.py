"""Losses on the teacher's softened distribution: KL, cross-entropy and Jensen-Shannon."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from logitcache.errors import UsageError
from logitcache.losses.kernels import Kind, on_targets
from logitcache.losses.protocol import Loss, Reduction, Term, given, over_rows, same_shape, wide
from logitcache.losses.schedules import Scheduled, check_temperature, check_used_temperature, fixed, shown
from logitcache.targets import DenseTargets, Targets

# B batch, C classes

LEAST_DEVIATION = 1e-3
"""Smallest standard deviation that `standardised` divides by."""


def kl_divergence(
    student_BC: Tensor,
    teacher_BC: Tensor | Targets,
    *,
    temperature: float = 1.0,
    standardise: bool = False,
    mask: Tensor | None = None,
    reduction: Reduction = "none",
) -> Tensor:
    """KL(teacher ‖ student) of the softened distributions, times T², in nats, (B,).

    Source: Hinton et al. 2015, arXiv:1503.02531, section 2. A class masked by -inf in the teacher contributes nothing.

    Args:
        teacher_BC: logits, or targets such as `view.targets(index)`; sparse targets are not expanded to (B, C).
        standardise: z-score both rows before the temperature; see `standardised`. Targets are then expanded.
        mask: bool (B,), true for the rows that count; the others have loss 0, and "mean" is over those that count.
        reduction: "mean" or "sum" over the batch returns a scalar; "none" returns (B,).

    Raises:
        ShapeError: the two differ in shape.
    """

    def between_logits(student_BC: Tensor, teacher_BC: Tensor) -> Tensor:
        log_student_BC = F.log_softmax(softened(student_BC, temperature, standardise=standardise), dim=1)
        teacher_p_BC = F.softmax(softened(teacher_BC, temperature, standardise=standardise), dim=1)
        kl_B = F.kl_div(log_student_BC, teacher_p_BC, reduction="none").sum(dim=1)
        return kl_B if temperature == 1.0 else kl_B * temperature**2

    teacher_BC = _expanded(teacher_BC) if standardise else teacher_BC
    return _soft_loss("kl", between_logits, student_BC, teacher_BC, temperature, mask, reduction)


def soft_cross_entropy(
    student_BC: Tensor,
    teacher_BC: Tensor | Targets,
    *,
    temperature: float = 1.0,
    standardise: bool = False,
    mask: Tensor | None = None,
    reduction: Reduction = "none",
) -> Tensor:
    """Cross-entropy of the student to the teacher's softened distribution, times T², in nats, (B,).

    It equals `kl_divergence` plus T² times the teacher's entropy, so both have the same gradient. Source: Hinton et
    al. 2015, arXiv:1503.02531, section 2. A class masked by -inf in the teacher contributes nothing. On the targets of
    `Sampled` at T = 1 it is the sampled cross-entropy of RS-KD (arXiv:2503.16870): -Σ share · log q over the drawn
    classes, whose expectation is the cross-entropy to the full distribution.

    Args:
        teacher_BC: logits, or targets such as `view.targets(index)`; sparse targets are not expanded to (B, C).
        standardise: z-score both rows before the temperature; see `standardised`. Targets are then expanded.
        mask: bool (B,), true for the rows that count; the others have loss 0, and "mean" is over those that count.
        reduction: "mean" or "sum" over the batch returns a scalar; "none" returns (B,).

    Raises:
        ShapeError: the two differ in shape.
    """

    def between_logits(student_BC: Tensor, teacher_BC: Tensor) -> Tensor:
        log_student_BC = F.log_softmax(softened(student_BC, temperature, standardise=standardise), dim=1)
        teacher_p_BC = F.softmax(softened(teacher_BC, temperature, standardise=standardise), dim=1)
        return -(teacher_p_BC * log_student_BC).sum(dim=1) * temperature**2

    teacher_BC = _expanded(teacher_BC) if standardise else teacher_BC
    return _soft_loss("soft_cross_entropy", between_logits, student_BC, teacher_BC, temperature, mask, reduction)


def jensen_shannon(
    student_BC: Tensor,
    teacher_BC: Tensor | Targets,
    *,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    reduction: Reduction = "none",
) -> Tensor:
    """Jensen-Shannon divergence of the softened distributions, times T², in nats, (B,): at most T² ln 2.

    The mean KL of the two distributions to their average: symmetric and, unlike KL, bounded. Source: Lin 1991,
    "Divergence measures based on the Shannon entropy", IEEE Transactions on Information Theory 37 (1). A class masked
    by -inf in the teacher has probability 0.

    Args:
        teacher_BC: logits, or targets such as `view.targets(index)`; sparse targets are not expanded to (B, C).
        mask: bool (B,), true for the rows that count; the others have loss 0, and "mean" is over those that count.
        reduction: "mean" or "sum" over the batch returns a scalar; "none" returns (B,).

    Raises:
        ShapeError: the two differ in shape.
    """

    def between_logits(student_BC: Tensor, teacher_BC: Tensor) -> Tensor:
        log_student_BC = F.log_softmax(softened(student_BC, temperature), dim=1)
        log_teacher_BC = F.log_softmax(softened(teacher_BC, temperature), dim=1)
        log_mean_BC = torch.logaddexp(log_student_BC, log_teacher_BC) - math.log(2.0)
        of_student_BC = F.kl_div(log_mean_BC, log_student_BC, reduction="none", log_target=True)
        # With probabilities, not log_target: a masked class has log-probability -inf, and 0 * -inf is NaN.
        of_teacher_BC = F.kl_div(log_mean_BC, log_teacher_BC.exp(), reduction="none")
        return 0.5 * (of_student_BC + of_teacher_BC).sum(dim=1) * temperature**2

    return _soft_loss("js", between_logits, student_BC, teacher_BC, temperature, mask, reduction)


def _soft_loss(
    kind: Kind,
    between_logits: Callable[[Tensor, Tensor], Tensor],
    student_BC: Tensor,
    teacher_BC: Tensor | Targets,
    temperature: float,
    mask: Tensor | None,
    reduction: Reduction,
) -> Tensor:
    """A loss between logits, or of logits on targets."""
    same_shape(student_BC, teacher_BC)
    if isinstance(teacher_BC, DenseTargets):
        teacher_BC = teacher_BC.dense()
    if isinstance(teacher_BC, Tensor):
        return over_rows(between_logits, student_BC, teacher_BC, mask, reduction)

    def loss(student_RC: Tensor, targets: Targets) -> Tensor:
        return on_targets(kind, student_RC, targets, temperature)

    return over_rows(loss, student_BC, teacher_BC, mask, reduction)


def _expanded(teacher_BC: Tensor | Targets) -> Tensor:
    return teacher_BC.dense() if isinstance(teacher_BC, Targets) else teacher_BC


def standardised(logits_BC: Tensor) -> Tensor:
    """Each row's z-score over its classes: mean 0, standard deviation 1, (B, C).

    The student then matches the ranking and relative spacing of the teacher's classes, not the scale of its logits.
    Source: Sun et al. 2024, "Logit Standardization in Knowledge Distillation", arXiv:2403.01427. The variance is
    divided by C; the authors' code divides by C - 1, which is a slightly different temperature. Classes at -inf are
    left out and stay -inf. A standard deviation below 0.001 counts as 0.001, which bounds the gradient for a head that
    is initialized to 0.
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
    """Logits divided by T, optionally standardised first, in float32 or float64.

    Raises:
        UsageError: the temperature is not positive.
    """
    check_used_temperature(temperature)
    logits_BC = standardised(logits_BC) if standardise else wide(logits_BC)
    # For a small student the division at T = 1 would cost more than gathering its labels.
    return logits_BC if temperature == 1.0 else logits_BC / temperature


def check_standardise(standardise: object) -> None:
    """Check that `standardise` is a bool.

    Raises:
        UsageError: it is not.
    """
    if not isinstance(standardise, bool):
        raise UsageError(f"'standardise' is true or false, not {shown(standardise)}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class _SoftLoss(Loss):
    """A loss on softened distributions, which is one term."""

    name: ClassVar[Kind]
    temperature: Scheduled = 1.0

    def __post_init__(self) -> None:
        check_temperature(self.temperature)

    @property
    def takes_targets(self) -> bool:
        return True

    def terms(self) -> tuple[Term, ...]:
        return (Term(self.name, temperature=fixed(self.temperature)),)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _StandardisableLoss(_SoftLoss):
    standardise: bool = False
    """Z-score both rows first (Sun et al. 2024, arXiv:2403.01427); T is then the paper's base temperature."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_standardise(self.standardise)

    def terms(self) -> tuple[Term, ...]:
        return Loss.terms(self) if self.standardise else super().terms()


@dataclasses.dataclass(frozen=True, kw_only=True)
class KLDivergence(_StandardisableLoss):
    """Hinton's soft-label distillation: KL(teacher ‖ student) at temperature T, times T² (arXiv:1503.02531)."""

    name: ClassVar[Kind] = "kl"

    def __call__(self, student_BC: Tensor, teacher_BC: Tensor | Targets | None, target: Tensor) -> Tensor:
        return kl_divergence(
            student_BC, given(teacher_BC), temperature=fixed(self.temperature), standardise=self.standardise
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class SoftCrossEntropy(_StandardisableLoss):
    """Cross-entropy to the teacher's softened distribution, times T² (arXiv:1503.02531)."""

    name: ClassVar[Kind] = "soft_cross_entropy"

    def __call__(self, student_BC: Tensor, teacher_BC: Tensor | Targets | None, target: Tensor) -> Tensor:
        return soft_cross_entropy(
            student_BC, given(teacher_BC), temperature=fixed(self.temperature), standardise=self.standardise
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class JensenShannon(_SoftLoss):
    """Jensen-Shannon divergence at temperature T, times T² (Lin 1991)."""

    name: ClassVar[Kind] = "js"

    def __call__(self, student_BC: Tensor, teacher_BC: Tensor | Targets | None, target: Tensor) -> Tensor:
        return jensen_shannon(student_BC, given(teacher_BC), temperature=fixed(self.temperature))
