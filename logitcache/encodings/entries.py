"""Entries of a serving engine: checked, without duplicates, and sorted."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from logitcache.errors import InvalidLogits, ShapeError

# B batch, C classes, K entries

ROUNDING = 1e-3
"""How far a sum of probabilities, or a probability, may exceed 1 in float32."""
HALF_ROUNDING = 1e-2
"""Likewise in float16 and bfloat16."""


def distinct_entries(
    ids_BK: Tensor, log_probs_BK: Tensor, num_classes: int, *, start: int = 0
) -> tuple[Tensor, Tensor]:
    """Classes, int64 (B, K), and log-probabilities, float64 (B, K), of each row, most probable first.

    Unused entries and repetitions are last, with class -1 and log-probability -inf.

    Args:
        ids_BK, log_probs_BK, num_classes, start: as for `Encoding.encode_sparse`.

    Raises:
        ShapeError: the shapes differ.
        InvalidLogits: a row is not part of a distribution; the message names it.
    """
    if ids_BK.ndim != 2 or ids_BK.shape != log_probs_BK.shape:
        raise ShapeError(
            f"ids are {tuple(ids_BK.shape)} and log-probabilities {tuple(log_probs_BK.shape)}; expected (B, K) twice"
        )
    if ids_BK.is_floating_point() or ids_BK.dtype == torch.bool or not log_probs_BK.is_floating_point():
        raise InvalidLogits(
            f"ids are {ids_BK.dtype} and log-probabilities {log_probs_BK.dtype}; expected integers and floats"
        )
    rounding = HALF_ROUNDING if log_probs_BK.dtype.itemsize == 2 else ROUNDING
    ids_BK = ids_BK.to(torch.int64)
    log_probs_BK = log_probs_BK.double().masked_fill(ids_BK == -1, -math.inf)
    for wrong_BK, message in (
        ((ids_BK < -1) | (ids_BK >= num_classes), f"class {{id}}; expected 0 to {num_classes - 1}, or -1 for no entry"),
        (log_probs_BK.isnan(), "NaN as the log-probability of class {id}"),
        (log_probs_BK > rounding, "log-probability {value:g} of class {id}; expected at most 0, at T = 1"),
    ):
        _refuse(wrong_BK, message, ids_BK, log_probs_BK, start)
    ids_BK, order_BK = ids_BK.sort(dim=1, stable=True)
    log_probs_BK = log_probs_BK.gather(1, order_BK).clamp_(max=0.0)
    repeated_BK = torch.zeros_like(ids_BK, dtype=torch.bool)
    repeated_BK[:, 1:] = (ids_BK[:, 1:] == ids_BK[:, :-1]) & (ids_BK[:, 1:] >= 0)
    before_BK = log_probs_BK.roll(1, dims=1)
    equal_BK = (log_probs_BK == before_BK) | ((log_probs_BK - before_BK).abs() <= rounding)
    _refuse(repeated_BK & ~equal_BK, "two different log-probabilities of class {id}", ids_BK, log_probs_BK, start)
    ids_BK, log_probs_BK = ids_BK.masked_fill(repeated_BK, -1), log_probs_BK.masked_fill(repeated_BK, -math.inf)
    total_B1 = log_probs_BK.exp().sum(dim=1, keepdim=True)
    above = (
        "probabilities with a sum of {total:g}; expected log-probabilities at T = 1, of probabilities up to a sum of 1"
    )
    _refuse(total_B1 > 1.0 + rounding, above, ids_BK, log_probs_BK, start)
    _refuse(total_B1 == 0.0, "no entry with a probability above 0", ids_BK, log_probs_BK, start)
    used_first_BK = (ids_BK < 0).to(torch.int8).argsort(dim=1, stable=True)
    log_probs_BK, order_BK = log_probs_BK.gather(1, used_first_BK).sort(dim=1, descending=True, stable=True)
    return ids_BK.gather(1, used_first_BK).gather(1, order_BK), log_probs_BK


def _refuse(wrong: Tensor, message: str, ids_BK: Tensor, log_probs_BK: Tensor, start: int) -> None:
    """Raise InvalidLogits for the first wrong entry, (B, K), or row, (B, 1)."""
    if not bool(wrong.any()):
        return
    row, entry = (int(number) for number in wrong.nonzero()[0])
    found = message.format(
        id=int(ids_BK[row, entry]), value=float(log_probs_BK[row, entry]), total=float(log_probs_BK[row].exp().sum())
    )
    raise InvalidLogits(f"row {start + row} has {found}", row=start + row)
