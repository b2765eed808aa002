"""Sets of classes, one for each row, as the gaps between sorted numbers."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from logitcache.arrays import ArraySpec
from logitcache.encodings.protocol import smallest_id_dtype

# B batch, K places for entries of a row

LEVEL = 19
"""Of zstd. Below 15, these arrays take a tenth more; at 19 it still compresses thousands of rows per second."""


def set_specs(num_classes: int, most: int) -> dict[str, ArraySpec]:
    """The arrays of sets of at most `most` classes: their number, and the low and the high bytes of the gaps.

    A random set of k of C classes has about log2(eC / k) bits per class. The low bytes of its gaps are nearly random,
    and the high bytes nearly all zero: as arrays of their own, both are compressed almost to that.
    """
    return {
        "count": ArraySpec(dtype=smallest_id_dtype(most + 1), row_shape=(), level=LEVEL),
        "low": entry_spec(most),
        "high": entry_spec(most, smallest_id_dtype((num_classes - 1) // 256 + 1)),
    }


def entry_spec(most: int, dtype: str = "uint8") -> ArraySpec:
    """An array of one number for each place. Unused places are zeros at the end of a row."""
    return ArraySpec(dtype=dtype, row_shape=(most,), level=LEVEL, by_row=True)


def pack_sets(numbers_BK: Tensor, count_B: Tensor, num_classes: int) -> dict[str, Tensor]:
    """The arrays of sets.

    Args:
        numbers_BK: int64: increasing within a row, up to the row's count; what follows is ignored.
        count_B: int64, at least 1.
        num_classes: all classes.
    """
    specs = set_specs(num_classes, numbers_BK.shape[1])
    gaps_BK = numbers_BK.clone()
    gaps_BK[:, 1:] -= numbers_BK[:, :-1] + 1
    gaps_BK.masked_fill_(~is_used(count_B, numbers_BK.shape[1]), 0)
    parts = {"count": count_B, "low": gaps_BK & 255, "high": gaps_BK >> 8}
    return {name: part.to(getattr(torch, specs[name].dtype)) for name, part in parts.items()}


def unpack_sets(encoded: Mapping[str, Tensor], num_classes: int) -> Tensor:
    """Increasing numbers of classes, int64 (B, K), at least one in each row, and -1 at the end for unused places.

    Whatever the arrays hold, the numbers are different and below `num_classes`.
    """
    gaps_BK = encoded["low"].to(torch.int64) + (encoded["high"].to(torch.int64) << 8)
    gaps_BK[:, 1:] += 1
    numbers_BK = gaps_BK.cumsum(dim=1)
    numbers_BK[:, 0].clamp_(max=num_classes - 1)
    is_used_BK = is_used(encoded["count"].to(torch.int64).clamp(min=1), numbers_BK.shape[1])
    return numbers_BK.masked_fill_(~is_used_BK | (numbers_BK >= num_classes), -1)


def is_used(count_B: Tensor, most: int) -> Tensor:
    """Which places hold an entry, bool (B, K)."""
    return torch.arange(most, device=count_B.device) < count_B[:, None]
