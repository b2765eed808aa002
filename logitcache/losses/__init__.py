"""Distillation losses: functions on (B, C) logits, and named, frozen configurations of them.

Functions return one number per sample, (B,), or a scalar with `reduction="mean"` or "sum"; in float64 if the logits
are, else in float32. Divergences and cross-entropies are in nats, and KL is KL(teacher ‖ student). Soft losses have
the factor T², which keeps the size of their gradient independent of T (Hinton, Vinyals and Dean 2015,
arXiv:1503.02531, section 2). Losses on logits do not change when a constant is added to a row, because a cache stores
logits only up to a constant per row.
"""

from typing import Any

from logitcache.deprecation import warn_renamed
from logitcache.losses.blends import Blend as Blend
from logitcache.losses.blends import HardPlusSoft as HardPlusSoft
from logitcache.losses.blends import Part as Part
from logitcache.losses.blends import Weighted as Weighted
from logitcache.losses.configuration import FEATURE_LOSSES as FEATURE_LOSSES
from logitcache.losses.configuration import LOSSES as LOSSES
from logitcache.losses.configuration import hint_loss_from_config as hint_loss_from_config
from logitcache.losses.configuration import loss_from_config as loss_from_config
from logitcache.losses.correlation import Dist as Dist
from logitcache.losses.correlation import dist as dist
from logitcache.losses.decoupled import DecoupledKD as DecoupledKD
from logitcache.losses.decoupled import decoupled_kd as decoupled_kd
from logitcache.losses.features import FeatureLoss as FeatureLoss
from logitcache.losses.features import attention_transfer as attention_transfer
from logitcache.losses.features import feature_mse as feature_mse
from logitcache.losses.features import feature_rkd as feature_rkd
from logitcache.losses.hard import CrossEntropy as CrossEntropy
from logitcache.losses.hard import TeacherArgmax as TeacherArgmax
from logitcache.losses.hard import cross_entropy as cross_entropy
from logitcache.losses.hard import recorded_loss as recorded_loss
from logitcache.losses.hard import teacher_argmax_cross_entropy as teacher_argmax_cross_entropy
from logitcache.losses.linear import linear_cross_entropy as linear_cross_entropy
from logitcache.losses.linear import linear_kl_divergence as linear_kl_divergence
from logitcache.losses.own_code import load_code as load_code
from logitcache.losses.protocol import Loss as Loss
from logitcache.losses.protocol import Reduction as Reduction
from logitcache.losses.protocol import Term as Term
from logitcache.losses.protocol import teacher_for as teacher_for
from logitcache.losses.regression import LogitMSE as LogitMSE
from logitcache.losses.regression import logit_mse as logit_mse
from logitcache.losses.relational import RKD as RKD
from logitcache.losses.relational import rkd as rkd
from logitcache.losses.schedules import Schedule as Schedule
from logitcache.losses.soft import JensenShannon as JensenShannon
from logitcache.losses.soft import KLDivergence as KLDivergence
from logitcache.losses.soft import SoftCrossEntropy as SoftCrossEntropy
from logitcache.losses.soft import jensen_shannon as jensen_shannon
from logitcache.losses.soft import kl_divergence as kl_divergence
from logitcache.losses.soft import soft_cross_entropy as soft_cross_entropy
from logitcache.losses.soft import standardised as standardised
from logitcache.losses.stages import Stage as Stage
from logitcache.losses.stages import Stages as Stages

_RENAMED = {
    "TeacherLabel": "TeacherArgmax",
    "TrueLabel": "CrossEntropy",
    "teacher_label_cross_entropy": "teacher_argmax_cross_entropy",
    "true_label_cross_entropy": "cross_entropy",
}


def __getattr__(name: str) -> Any:
    if name not in _RENAMED:
        raise AttributeError(f"module 'logitcache.losses' has no attribute {name!r}")
    warn_renamed(f"logitcache.losses.{name}", f"logitcache.losses.{_RENAMED[name]}")
    return globals()[_RENAMED[name]]
