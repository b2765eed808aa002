"""Losses between what modules of student and teacher give on the way to their logits, of any shapes.

Each gives (B,), one number a sample, in float64 where the features are, else in float32.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from typing import ClassVar, Self

import torch.nn.functional as F
from torch import Tensor

from logitcache.errors import UsageError
from logitcache.losses.protocol import same_shape, wide
from logitcache.losses.relational import relations
from logitcache.losses.schedules import Scheduled, check_parameter, fixed, settled

# B batch, C and D channels, H height, W width

MAP_NDIM = 4


def feature_mse(student_BCHW: Tensor, teacher_BCHW: Tensor) -> Tensor:
    """Mean squared difference of features over their values, (B,): FitNets' hint, but for its factor 1/2.

    Maps of other heights or widths are both brought to the smaller one of each by adaptive average pooling. Source:
    Romero et al. 2015, "FitNets: Hints for Thin Deep Nets", arXiv:1412.6550, equation 3, which takes the sum; the
    regressor from the student's channels to the teacher's is the caller's.

    Raises:
        ShapeError: other channels, or another number of dimensions.
    """
    student_BCHW, teacher_BCHW = at_same_places(wide(student_BCHW), wide(teacher_BCHW))
    same_shape(student_BCHW, teacher_BCHW)
    return (student_BCHW - teacher_BCHW).square().flatten(1).mean(dim=1)


def attention_transfer(student_BCHW: Tensor, teacher_BDHW: Tensor) -> Tensor:
    """Squared L2 distance of the attention maps, each of norm 1, from 0 to 2, without unit, (B,).

    A map is the sum over channels of the squared values; maps of other heights or widths are both brought to the
    smaller one of each by adaptive average pooling. Source: Zagoruyko and Komodakis 2017, "Paying More Attention to
    Attention", arXiv:1612.03928, equation 2 with F_sum^2; squared as in its authors' code, for the distance itself has
    no gradient where the maps agree.

    Raises:
        UsageError: no maps (B, C, H, W).
    """
    for features in (student_BCHW, teacher_BDHW):
        if features.ndim != MAP_NDIM:
            raise UsageError(f"'attention' compares maps (B, C, H, W), not {tuple(features.shape)}")
    squares = (wide(features).square().sum(dim=1, keepdim=True) for features in (student_BCHW, teacher_BDHW))
    student_B1HW, teacher_B1HW = at_same_places(*squares)
    student_BP, teacher_BP = (F.normalize(each.flatten(1), dim=1) for each in (student_B1HW, teacher_B1HW))
    return (student_BP - teacher_BP).square().sum(dim=1)


def feature_rkd(
    student_BCHW: Tensor, teacher_BDHW: Tensor, *, distance_weight: float = 1.0, angle_weight: float = 2.0
) -> Tensor:
    """RKD between features of any shapes, each sample's values as one point, (B,).

    As `rkd`, but that rows are not brought to mean 0: features are no logits. Source: Park et al. 2019, "Relational
    Knowledge Distillation", arXiv:1904.05068, section 3.
    """
    student_BV, teacher_BV = wide(student_BCHW).flatten(1), wide(teacher_BDHW).flatten(1)
    return relations(student_BV, teacher_BV, distance_weight=distance_weight, angle_weight=angle_weight)


def at_same_places(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Two maps (B, C, H, W) at the smaller height and the smaller width of the two; what is no map stays as it is."""
    if one.ndim != MAP_NDIM or other.ndim != MAP_NDIM or one.shape[2:] == other.shape[2:]:
        return one, other
    places = (min(one.shape[2], other.shape[2]), min(one.shape[3], other.shape[3]))
    return F.adaptive_avg_pool2d(one, places), F.adaptive_avg_pool2d(other, places)


class FeatureLoss(ABC):
    """A loss between features by name: called with (student (B, ...), teacher (B, ...))."""

    name: ClassVar[str]
    regresses: ClassVar[bool] = False
    """Whether the student's features are first brought to the teacher's channels, by a regressor that is trained."""
    needs_maps: ClassVar[bool] = False
    """Whether it compares (B, C, H, W) only."""

    def at(self, progress: float) -> Self:
        """The loss when so much of training is done, 0 to 1."""
        return settled(self, progress)

    @abstractmethod
    def __call__(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The loss of each sample, (B,)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class HintLoss(FeatureLoss):
    """FitNets' hint: mean squared error of regressed features (Romero et al. 2015, arXiv:1412.6550)."""

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
        weights = {"distance_weight": fixed(self.distance_weight), "angle_weight": fixed(self.angle_weight)}
        return feature_rkd(student, teacher, **weights)
