"""Sample indices that contain their view: one int64 for (view, row), so labels always match the pixels."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from logitcache.errors import ShapeError, UsageError

# B batch

ROW_BITS = 40
"""The row number is in the low 40 bits; a cache has at most 2^40 rows."""
ROW_MASK = 2**ROW_BITS - 1
NO_ROW = -1
"""Index of a position that has no row, such as padding."""


def join_index(view: int, row: int) -> int:
    """The index of one row of one view: `(view + 1) << 40 | row`. A plain row number is below 2^40."""
    return (view + 1) << ROW_BITS | row


def split_index(index: Any) -> tuple[Tensor, Tensor]:
    """View numbers and row numbers of indices, int64 (B,) each; the view of a plain row number is -1.

    Args:
        index: int (B,), from `ViewDataset`: a tensor, array or list.

    Raises:
        UsageError: booleans or floats.
        ShapeError: not one-dimensional.
    """
    index_B = index_tensor(index)
    return (index_B >> ROW_BITS) - 1, index_B & ROW_MASK


def index_tensor(index: Any) -> Tensor:
    """Row numbers or indices as an int64 tensor (B,), on their device.

    Raises:
        UsageError: booleans (a mask) or floats (which lose the low bits).
        ShapeError: not one-dimensional.
    """
    try:
        index_B = torch.as_tensor(np.asarray(index) if isinstance(index, range) else index)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UsageError(
            f"expected integer row numbers or indices (B,), found {type(index).__name__}: {error}"
        ) from None
    if index_B.numel() and (index_B.dtype == torch.bool or index_B.is_floating_point() or index_B.is_complex()):
        remedy = "for a mask, pass mask.nonzero()[:, 0]" if index_B.dtype == torch.bool else "convert them first"
        raise UsageError(f"expected integer row numbers or indices, found {index_B.dtype}; {remedy}")
    if index_B.ndim != 1:
        raise ShapeError(f"expected row numbers or indices of shape (B,), found {tuple(index_B.shape)}")
    return index_B.to(torch.int64)


def rows_of_view(index: Any, view: int, num_rows: int) -> Tensor:
    """Row numbers within one view, int64 (B,).

    Args:
        index: plain row numbers, or indices of this view; not a mix of both.
        view: the view number.
        num_rows: rows of the view.

    Raises:
        UsageError: an index of another view, or values that are not integers.
        IndexError: a row number beyond the view.
    """
    index_B = index_tensor(index)
    if not index_B.numel():
        return index_B
    lowest, highest = (int(end.item()) for end in index_B.aminmax())
    first, last = (lowest >> ROW_BITS) - 1, (highest >> ROW_BITS) - 1
    if first != last or first not in (-1, view):
        if lowest < 0:
            raise IndexError(
                f"row {lowest} is negative; rows are numbered from 0 to {num_rows - 1}. In an index of positions, -1 "
                "stands for one without a row: select those with `index >= 0`"
            )
        other = last if last != view else first
        found = "plain row numbers" if other == -1 else f"indices of view {other}"
        raise UsageError(
            f"these labels are of view {view}, but the batch has {found}; use `cache.logits(index)`, which takes any "
            f"views, or `cache.view({max(other, 0)})`. A batch that was loaded before `set_view` keeps its view"
        )
    if first != -1:
        # Subtracted rather than masked: half the time of a small gather.
        index_B, highest = index_B - ((view + 1) << ROW_BITS), highest & ROW_MASK
    if highest >= num_rows:
        raise IndexError(f"row {highest} is beyond the view, which has rows 0 to {num_rows - 1}")
    return index_B
