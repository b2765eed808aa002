"""Relations between the samples of a batch: their distances and angles (RKD)."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from logitcache.errors import UsageError
from logitcache.losses.protocol import Loss, given, same_shape, wide
from logitcache.losses.schedules import Scheduled, check_parameter, fixed

# B batch, C classes


def rkd(student_BC: Tensor, teacher_BC: Tensor, *, distance_weight: float = 1.0, angle_weight: float = 2.0) -> Tensor:
    """Huber losses between the distances of all pairs, and the angles of all triplets, of samples, without unit, (B,).

    Distances of logits are in units of their mean over the batch; angles are cosines at each sample between any two
    others. A sample is given the mean over its pairs, and over the triplets that have it as their vertex, so that the
    mean over the batch is the paper's loss; it depends on who shares a batch. Rows are brought to mean 0 first, for a
    cache's logits are right up to a constant for each row. Source: Park et al. 2019, "Relational Knowledge
    Distillation", arXiv:1904.05068, section 3, on logits rather than embeddings; the weights have its ratio of 1 to 2.

    One sample has no pairs and two have no angle: those parts are then 0. Samples at the same place have distance 0
    and no angle, without a gradient, so this stands beside another loss. Memory grows as B² · C + B³.

    Raises:
        ShapeError: the two differ in shape.
        UsageError: the teacher masks a class by -inf, to which no distance is finite.
    """
    same_shape(student_BC, teacher_BC)
    if bool((teacher_BC == -math.inf).any()):
        raise UsageError(
            "'rkd' measures distances between rows of logits, and the teacher masks some classes by -inf, as caches "
            "with Sampled do; expected finite logits: use Dense, LowRank or TopK, or a loss such as 'kl'"
        )
    student_BC, teacher_BC = (wide(rows) - wide(rows).mean(dim=1, keepdim=True) for rows in (student_BC, teacher_BC))
    loss_B = student_BC.new_zeros(len(student_BC))
    if distance_weight:
        gaps_BB = F.smooth_l1_loss(_relative_distances(student_BC), _relative_distances(teacher_BC), reduction="none")
        loss_B = loss_B + distance_weight * gaps_BB.mean(dim=1)
    if angle_weight:
        gaps_BBB = F.smooth_l1_loss(_angles(student_BC), _angles(teacher_BC), reduction="none")
        loss_B = loss_B + angle_weight * gaps_BBB.mean(dim=(1, 2))
    return loss_B


def _relative_distances(rows_BC: Tensor) -> Tensor:
    """Euclidean distances of all pairs over the mean of those that are not 0, (B, B)."""
    # Not by products of rows: they lose near neighbours to rounding.
    distances_BB = torch.cdist(rows_BC, rows_BC, compute_mode="donot_use_mm_for_euclid_dist")
    mean = distances_BB.sum() / (distances_BB > 0).sum().clamp_min(1)
    return distances_BB / torch.where(mean > 0, mean, 1.0)


def _angles(rows_BC: Tensor) -> Tensor:
    """Cosines of the angle at sample i between samples j and k, (B, B, B); 0 where two of them are at one place."""
    edges_BBC = rows_BC.unsqueeze(0) - rows_BC.unsqueeze(1)
    lengths_BB1 = torch.linalg.vector_norm(edges_BBC, dim=2, keepdim=True)
    directions_BBC = edges_BBC / torch.where(lengths_BB1 > 0, lengths_BB1, 1.0)
    return directions_BBC @ directions_BBC.transpose(1, 2)


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
