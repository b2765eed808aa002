"""Regression on the logits themselves."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

from torch import Tensor

from logitcache.losses.protocol import Loss, Reduction, given, reduced, same_shape, wide

# B batch, C classes


def logit_mse(student_BC: Tensor, teacher_BC: Tensor, *, reduction: Reduction = "none") -> Tensor:
    """Mean squared difference of the centred logits over classes, in squared logits, (B,).

    A cache stores logits up to a constant per row, which softmax ignores. So rows are centred, and the loss is the
    variance over classes of student minus teacher. Sources: Ba and Caruana 2014, arXiv:1312.6184; Kim et al. 2021,
    arXiv:2105.08919, who show that it is the limit of KL times T² for large T. Classes that the teacher masks by -inf
    are left out.

    Args:
        reduction: "mean" or "sum" over the batch returns a scalar; "none" returns (B,).

    Raises:
        ShapeError: the two differ in shape.
    """
    same_shape(student_BC, teacher_BC)
    masked_BC = teacher_BC == -math.inf
    num_kept_B1 = (~masked_BC).sum(dim=1, keepdim=True)
    gap_BC = (wide(student_BC) - wide(teacher_BC)).masked_fill(masked_BC, 0.0)
    centred_BC = (gap_BC - gap_BC.sum(dim=1, keepdim=True) / num_kept_B1).masked_fill(masked_BC, 0.0)
    return reduced(centred_BC.square().sum(dim=1) / num_kept_B1.squeeze(1), reduction)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogitMSE(Loss):
    """Mean squared difference of the centred logits (Ba and Caruana 2014, arXiv:1312.6184)."""

    name: ClassVar[str] = "logit_mse"

    def __call__(self, student_BC: Tensor, teacher_BC: Tensor | None, target: Tensor) -> Tensor:
        return logit_mse(student_BC, given(teacher_BC))
