"""Relational distillation: distances and angles between the samples of a batch (RKD)."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from logitcache.errors import UsageError
from logitcache.losses.protocol import Loss, Reduction, given, reduced, same_shape, wide
from logitcache.losses.schedules import Scheduled, check_parameter, fixed

# B batch, C classes, D and E values of a row of features


def rkd(
    student_BC: Tensor,
    teacher_BC: Tensor,
    *,
    distance_weight: float = 1.0,
    angle_weight: float = 2.0,
    reduction: Reduction = "none",
) -> Tensor:
    """Huber losses between the distances of all pairs and the angles of all triplets of samples, unitless, (B,).

    Distances between rows of logits are divided by their mean over the batch; angles are cosines, at each sample,
    between any two others. A sample's loss is the mean over its pairs plus the mean over the triplets with the sample
    as vertex, so that the mean over the batch is the paper's loss; it depends on the composition of the batch. Rows
    are centred first, because a cache stores logits up to a constant per row. Source: Park et al. 2019, "Relational
    Knowledge Distillation", arXiv:1904.05068, section 3, on logits instead of embeddings, with the same weight ratio
    of 1 to 2.

    A batch of one sample has no pairs and one of two has no angles; those parts are then 0. Two equal rows have
    distance 0, no angle and no gradient, so use this loss together with another one. Memory grows as B³.

    Args:
        distance_weight, angle_weight: weights of the two parts.
        reduction: "mean" or "sum" over the batch returns a scalar; "none" returns (B,).

    Raises:
        ShapeError: the two differ in shape.
        UsageError: the teacher masks a class by -inf, so distances are infinite.
    """
    same_shape(student_BC, teacher_BC)
    if bool((teacher_BC == -math.inf).any()):
        raise UsageError(
            "'rkd' measures distances between rows of logits, and the teacher masks some classes by -inf, as caches "
            "with Sampled do; expected finite logits: use Dense, LowRank or TopK, or a loss such as 'kl'"
        )
    student_BC, teacher_BC = (wide(rows) - wide(rows).mean(dim=1, keepdim=True) for rows in (student_BC, teacher_BC))
    loss_B = relations(student_BC, teacher_BC, distance_weight=distance_weight, angle_weight=angle_weight)
    return reduced(loss_B, reduction)


def relations(student_BD: Tensor, teacher_BE: Tensor, *, distance_weight: float, angle_weight: float) -> Tensor:
    """The losses of `rkd` between points of any two spaces, such as features of different widths, (B,).

    Rows are not centred.
    """
    loss_B = student_BD.new_zeros(len(student_BD))
    student_BB, teacher_BB = _distances(student_BD), _distances(teacher_BE)
    if distance_weight:
        gaps_BB = F.smooth_l1_loss(_relative(student_BB), _relative(teacher_BB), reduction="none")
        loss_B = loss_B + distance_weight * gaps_BB.mean(dim=1)
    if angle_weight:
        angles_BBB = _angles(teacher_BE, teacher_BB)
        gaps_BBB = F.smooth_l1_loss(_angles(student_BD, student_BB), angles_BBB, reduction="none")
        loss_B = loss_B + angle_weight * gaps_BBB.mean(dim=(1, 2))
    return loss_B


def _distances(rows_BC: Tensor) -> Tensor:
    """Euclidean distances of all pairs, (B, B)."""
    # Not by matrix products, which round the distances of near neighbours to 0.
    return torch.cdist(rows_BC, rows_BC, compute_mode="donot_use_mm_for_euclid_dist")


def _relative(distances_BB: Tensor) -> Tensor:
    """Distances divided by the mean of the non-zero ones, (B, B)."""
    mean = distances_BB.sum() / (distances_BB > 0).sum().clamp_min(1)
    return distances_BB / torch.where(mean > 0, mean, 1.0)


def _angles(rows_BC: Tensor, distances_BB: Tensor) -> Tensor:
    """Cosine of the angle at sample i between samples j and k, (B, B, B); 0 if one of them equals i."""
    # Products of edges from products of rows: (B, B, C) edges would take a hundred times as long for 1000 classes. In
    # float64, because the common part of near neighbours cancels.
    rows_BC = (rows_BC - rows_BC.mean(dim=0)).double()
    products_BB = rows_BC @ rows_BC.T
    to_vertex_BB = products_BB - 0.5 * products_BB.diagonal().unsqueeze(1)
    edges_BBB = (products_BB - to_vertex_BB.unsqueeze(2) - to_vertex_BB.unsqueeze(1)).to(distances_BB.dtype)
    apart_BB = distances_BB > 0
    inverse_BB = apart_BB / torch.where(apart_BB, distances_BB, 1.0)
    return edges_BBB * inverse_BB.unsqueeze(2) * inverse_BB.unsqueeze(1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RKD(Loss):
    """RKD: distances and angles between the samples of a batch (Park et al. 2019, arXiv:1904.05068)."""

    name: ClassVar[str] = "rkd"
    distance_weight: Scheduled = 1.0
    angle_weight: Scheduled = 2.0

    def __post_init__(self) -> None:
        check_parameter("distance_weight", self.distance_weight, least=0.0)
        check_parameter("angle_weight", self.angle_weight, least=0.0)

    def __call__(self, student_BC: Tensor, teacher_BC: Tensor | None, target: Tensor) -> Tensor:
        return rkd(
            student_BC,
            given(teacher_BC),
            distance_weight=fixed(self.distance_weight),
            angle_weight=fixed(self.angle_weight),
        )
