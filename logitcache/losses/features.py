"""Losses between intermediate features of student and teacher, of any shapes.

Each returns one number per sample, (B,), unless `reduction` is given; in float64 if the features are, else float32.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from typing import ClassVar, Self

import torch.nn.functional as F
from torch import Tensor

from logitcache.errors import UsageError
from logitcache.losses.protocol import Reduction, reduced, same_shape, wide
from logitcache.losses.relational import relations
from logitcache.losses.schedules import Scheduled, check_parameter, fixed, settled

# B batch, C and D channels, H height, W width

MAP_NDIM = 4


def feature_mse(student_BCHW: Tensor, teacher_BCHW: Tensor, *, reduction: Reduction = "none") -> Tensor:
    """Mean squared difference of the features, (B,): the hint loss of FitNets, without its factor 1/2.

    Maps of different height or width are pooled to the smaller of each (adaptive average pooling). Source: Romero et
    al. 2015, "FitNets: Hints for Thin Deep Nets", arXiv:1412.6550, equation 3, which takes the sum. The caller brings
    the student's channels to the teacher's, for example by a regressor.

    Args:
        reduction: "mean" or "sum" over the batch returns a scalar; "none" returns (B,).

    Raises:
        ShapeError: different channels or numbers of dimensions.
    """
    student_BCHW, teacher_BCHW = at_same_places(wide(student_BCHW), wide(teacher_BCHW))
    same_shape(student_BCHW, teacher_BCHW)
    return reduced((student_BCHW - teacher_BCHW).square().flatten(1).mean(dim=1), reduction)


def attention_transfer(student_BCHW: Tensor, teacher_BDHW: Tensor, *, reduction: Reduction = "none") -> Tensor:
    """Squared L2 distance of the normalized attention maps, from 0 to 2, unitless, (B,).

    An attention map is the sum over channels of the squared values. Maps of different height or width are pooled to
    the smaller of each (adaptive average pooling). Source: Zagoruyko and Komodakis 2017, "Paying More Attention to
    Attention", arXiv:1612.03928, equation 2 with F_sum^2; squared as in the authors' code, because the distance itself
    has no gradient where the maps agree.

    Args:
        reduction: "mean" or "sum" over the batch returns a scalar; "none" returns (B,).

    Raises:
        UsageError: features that are not maps (B, C, H, W).
    """
    for features in (student_BCHW, teacher_BDHW):
        if features.ndim != MAP_NDIM:
            raise UsageError(f"'attention' compares maps (B, C, H, W), not {tuple(features.shape)}")
    squares = (wide(features).square().sum(dim=1, keepdim=True) for features in (student_BCHW, teacher_BDHW))
    student_B1HW, teacher_B1HW = at_same_places(*squares)
    student_BP, teacher_BP = (F.normalize(each.flatten(1), dim=1) for each in (student_B1HW, teacher_B1HW))
    return reduced((student_BP - teacher_BP).square().sum(dim=1), reduction)


def feature_rkd(
    student_BCHW: Tensor,
    teacher_BDHW: Tensor,
    *,
    distance_weight: float = 1.0,
    angle_weight: float = 2.0,
    reduction: Reduction = "none",
) -> Tensor:
    """RKD between features of any shapes; each sample's flattened features are one point, (B,).

    Like `rkd`, but rows are not centred, because features are not logits. Source: Park et al. 2019, "Relational
    Knowledge Distillation", arXiv:1904.05068, section 3.

    Args:
        distance_weight, angle_weight: weights of the two parts.
        reduction: "mean" or "sum" over the batch returns a scalar; "none" returns (B,).
    """
    student_BV, teacher_BV = wide(student_BCHW).flatten(1), wide(teacher_BDHW).flatten(1)
    loss_B = relations(student_BV, teacher_BV, distance_weight=distance_weight, angle_weight=angle_weight)
    return reduced(loss_B, reduction)


def at_same_places(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Two maps (B, C, H, W) pooled to the smaller height and width of the two; other tensors are returned unchanged."""
    if one.ndim != MAP_NDIM or other.ndim != MAP_NDIM or one.shape[2:] == other.shape[2:]:
        return one, other
    places = (min(one.shape[2], other.shape[2]), min(one.shape[3], other.shape[3]))
    return F.adaptive_avg_pool2d(one, places), F.adaptive_avg_pool2d(other, places)


class FeatureLoss(ABC):
    """A configured loss between features: called with (student (B, ...), teacher (B, ...))."""

    name: ClassVar[str]
    regresses: ClassVar[bool] = False
    """Whether a trained regressor first maps the student's channels to the teacher's."""
    needs_maps: ClassVar[bool] = False
    """Whether the loss takes only maps (B, C, H, W)."""

    def at(self, progress: float) -> Self:
        """The loss at this share of training, 0 to 1."""
        return settled(self, progress)

    @abstractmethod
    def __call__(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The loss of each sample, (B,)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class HintLoss(FeatureLoss):
    """Hint loss of FitNets: mean squared error of regressed features (Romero et al. 2015, arXiv:1412.6550)."""

    name: ClassVar[str] = "hint"
    regresses: ClassVar[bool] = True

    def __call__(self, student: Tensor, teacher: Tensor) -> Tensor:
        return feature_mse(student, teacher)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionLoss(FeatureLoss):
    """Attention transfer (Zagoruyko and Komodakis 2017, arXiv:1612.03928)."""

    name: ClassVar[str] = "attention"
    needs_maps: ClassVar[bool] = True

    def __call__(self, student: Tensor, teacher: Tensor) -> Tensor:
        return attention_transfer(student, teacher)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RelationalLoss(FeatureLoss):
    """RKD on features (Park et al. 2019, arXiv:1904.05068)."""

    name: ClassVar[str] = "relational"
    distance_weight: Scheduled = 1.0
    angle_weight: Scheduled = 2.0

    def __post_init__(self) -> None:
        check_parameter("distance_weight", self.distance_weight, least=0.0)
        check_parameter("angle_weight", self.angle_weight, least=0.0)

    def __call__(self, student: Tensor, teacher: Tensor) -> Tensor:
        return feature_rkd(
            student, teacher, distance_weight=fixed(self.distance_weight), angle_weight=fixed(self.angle_weight)
        )
