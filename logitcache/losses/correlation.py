"""Correlation of the student's probabilities with the teacher's, within rows and within classes (DIST)."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from logitcache.losses.protocol import Loss, Reduction, given, reduced, same_shape
from logitcache.losses.schedules import Scheduled, check_parameter, check_temperature, fixed
from logitcache.losses.soft import softened

# B batch, C classes

LEAST_VARIATION = 1e-3
"""A row or column whose standard deviation is below this share of its norm counts as constant."""


def dist(
    student_BC: Tensor,
    teacher_BC: Tensor,
    *,
    beta: float = 1.0,
    gamma: float = 1.0,
    temperature: float = 1.0,
    reduction: Reduction = "none",
) -> Tensor:
    """β · (1 - correlation over classes) + γ · (1 - correlation over the batch), times T², unitless, (B,).

    Pearson correlations of the softened probabilities: of each sample over its classes (inter-class), and of each
    class over the samples of the batch, averaged over classes (intra-class). The second is one number per batch and is
    added to every sample, so that the mean over the batch is the paper's loss; it depends on the composition of the
    batch. Source: Huang et al. 2022, "Knowledge Distillation from A Stronger Teacher", arXiv:2205.10536, who add a
    cross-entropy to the true label.

    A constant has no correlation. If the teacher's row or column is constant, that part is 0; if only the student's
    is, its correlation counts as 0 and its gradient is bounded. In a batch of one sample the second part is 0. A class
    masked by -inf in the teacher has probability 0.

    Args:
        beta, gamma: weights of the two parts.
        reduction: "mean" or "sum" over the batch returns a scalar; "none" returns (B,).

    Raises:
        ShapeError: the two differ in shape.
    """
    same_shape(student_BC, teacher_BC)
    student_p_BC = F.softmax(softened(student_BC, temperature), dim=1)
    teacher_p_BC = F.softmax(softened(teacher_BC, temperature), dim=1)
    inter_B = _lack_of_correlation(student_p_BC, teacher_p_BC, dim=1)
    intra_C = _lack_of_correlation(student_p_BC, teacher_p_BC, dim=0)
    return reduced((beta * inter_B + gamma * intra_C.mean()) * temperature**2, reduction)


def _lack_of_correlation(student: Tensor, teacher: Tensor, *, dim: int) -> Tensor:
    """1 - Pearson correlation along a dimension; 0 where the teacher is constant."""
    student_direction, _ = _direction(student, dim)
    teacher_direction, teacher_is_constant = _direction(teacher, dim)
    correlation = (student_direction * teacher_direction).sum(dim=dim)
    return (1.0 - correlation).masked_fill(teacher_is_constant.squeeze(dim), 0.0)


def _direction(values: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Centred values scaled to norm 1 along a dimension, and a mask of constant ones; the dimension is kept."""
    centred = values - values.mean(dim=dim, keepdim=True)
    length = torch.linalg.vector_norm(centred, dim=dim, keepdim=True)
    least = LEAST_VARIATION * torch.linalg.vector_norm(values, dim=dim, keepdim=True)
    divisor = torch.maximum(length, least).clamp_min(torch.finfo(values.dtype).tiny)
    return centred / divisor, length <= least


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dist(Loss):
    """DIST: correlations over classes and over the batch, no divergence (Huang et al. 2022, arXiv:2205.10536)."""

    name: ClassVar[str] = "dist"
    beta: Scheduled = 1.0
    """β, of each sample's correlation over classes."""
    gamma: Scheduled = 1.0
    """γ, of each class's correlation over the batch."""
    temperature: Scheduled = 1.0

    def __post_init__(self) -> None:
        check_parameter("beta", self.beta, least=0.0)
        check_parameter("gamma", self.gamma, least=0.0)
        check_temperature(self.temperature)

    def __call__(self, student_BC: Tensor, teacher_BC: Tensor | None, target: Tensor) -> Tensor:
        return dist(
            student_BC,
            given(teacher_BC),
            beta=fixed(self.beta),
            gamma=fixed(self.gamma),
            temperature=fixed(self.temperature),
        )
