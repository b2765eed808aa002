"""Batches of sequences: the index of each position, and the rows of a model's output."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from logitcache.data.index import NO_ROW, ROW_BITS, ROW_MASK, index_tensor
from logitcache.data.rows import RowMap
from logitcache.errors import ShapeError, UsageError

# B batch, L positions of the longest sequence, R rows of the batch, C classes


def position_index(index: Any, rows: RowMap, length: int) -> Tensor:
    """The index of each position of a batch of sequences, int64 (B, L); -1 where the cache has no row.

    A position has no row if it is padding, was left out of the cache, or predicts nothing, as the last token of a text.
    Concatenate or cut the result as the batch is packed: `view.targets(at[at >= 0])` are the labels of the output's
    rows `logits[at >= 0]`, in the same order.

    Args:
        index: int (B,), from `ViewDataset`: the first row of each sequence; -1 for a sequence without rows.
        rows: `cache.row_map`.
        length: L, the positions of the model's output, from each sequence's first token on.

    Raises:
        UsageError: plain row numbers, or the index of a row that is not the first of a sample.
        ShapeError: a sequence of the cache is longer than the batch.
    """
    index_B = index_tensor(index).cpu().numpy()
    at_BL = np.full((len(index_B), length), NO_ROW, dtype=np.int64)
    with_rows = np.flatnonzero(index_B != NO_ROW)
    if bool((index_B[with_rows] >> ROW_BITS <= 0).any()):
        raise UsageError("plain row numbers name no view; pass the index that `ViewDataset` gives with each sample")
    firsts = index_B[with_rows] & ROW_MASK
    for place, sample, first in zip(with_rows, rows.samples_of(firsts), firsts, strict=True):
        of_sample = rows.sample_rows(int(sample))
        if of_sample.start != first:
            raise UsageError(f"row {first} is not the first row of sample {sample}; pass the index of `ViewDataset`")
        positions = rows.positions_of(np.arange(of_sample.start, of_sample.stop))
        if int(positions[-1]) >= length:
            raise ShapeError(
                f"sample {sample} has a row at position {positions[-1]}, but the batch has {length} positions: the "
                "sequence was truncated, or the model's output is shorter than its input"
            )
        at_BL[place, positions] = index_B[place] + np.arange(len(of_sample))
    return torch.from_numpy(at_BL)


def rows_of_output(output: Tensor, at_BL: Tensor) -> Tensor:
    """The rows (R, C) of a model's output at the positions that have an index, in the order of `at_BL[at_BL >= 0]`.

    Args:
        output: (B, L, C); or (B, C, *size), such as of images with a row for each pixel: L is the product of the sizes.
        at_BL: from `position_index`.

    Raises:
        ShapeError: the output has other dimensions.
    """
    if output.ndim > 3:
        output = output.flatten(2).transpose(1, 2)
    if output.ndim != 3 or output.shape[:2] != at_BL.shape:
        raise ShapeError(
            f"the model's output is {tuple(output.shape)}; expected {(*at_BL.shape, 'C')}: logits for each position of "
            "each sequence"
        )
    places = (at_BL.reshape(-1) >= 0).nonzero()[:, 0].to(output.device)
    return output.reshape(-1, output.shape[2]).index_select(0, places)


def positions_in(output: Tensor) -> int:
    """L: the number of positions in a model's output, (B, L, C) or (B, C, *size)."""
    return output.shape[1] if output.ndim <= 3 else int(np.prod(output.shape[2:]))
