"""The distance of the logits themselves."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

from torch import Tensor

from logitcache.losses.protocol import Loss, given, same_shape, wide

# B batch, C classes


def logit_mse(student_BC: Tensor, teacher_BC: Tensor) -> Tensor:
    """Mean squared difference of the logits over classes, each row first brought to mean 0, in squared logits, (B,).

    A cache's logits are right up to a constant for each row, which softmax does not see; so rows are centred, and the
    loss is the variance over classes of student minus teacher. Sources: Ba and Caruana 2014, arXiv:1312.6184; Kim et
    al. 2021, arXiv:2105.08919, who find it the limit of KL with T² at a large T. A class masked by -inf in the teacher
    is left out.

    Raises:
        ShapeError: the two differ in shape.
    """
    same_shape(student_BC, teacher_BC)
    masked_BC = teacher_BC == -math.inf
    num_kept_B1 = (~masked_BC).sum(dim=1, keepdim=True)
    gap_BC = (wide(student_BC) - wide(teacher_BC)).masked_fill(masked_BC, 0.0)
    centred_BC = (gap_BC - gap_BC.sum(dim=1, keepdim=True) / num_kept_B1).masked_fill(masked_BC, 0.0)
    return centred_BC.square().sum(dim=1) / num_kept_B1.squeeze(1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogitMSE(Loss):
    """Mean squared difference of the centred logits (Ba and Caruana 2014, arXiv:1312.6184)."""

    name: ClassVar[str] = "logit_mse"

    def __call__(self, student_BC: Tensor, teacher_BC: Tensor | None, target: Tensor) -> Tensor:
        return logit_mse(student_BC, given(teacher_BC))
