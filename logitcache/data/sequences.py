"""The rows of a batch of sequences: their indices, and their places in a model's output."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from logitcache.data.index import NO_ROW, ROW_MASK, index_tensor
from logitcache.data.packing import POSITION_IDS, is_packed
from logitcache.data.rows import RowMap
from logitcache.data.views import ViewDataset
from logitcache.errors import ShapeError, UsageError

# B batch, L positions of the longest sequence, R rows of the batch, C classes


def sequence_rows(views: ViewDataset) -> RowMap | None:
    """The row map of views of sequences; None with one row per sample."""
    rows = views.plan.rows
    return None if rows is None or rows.one_each else rows


def lengths(rows: RowMap) -> np.ndarray:
    """Positions of each sample up to that of its last row, int64 (N,); 0 without rows."""
    counts_N = np.diff(rows.offsets)
    if rows.positions is None:
        return counts_N
    length_N = np.zeros_like(counts_N)
    with_rows = counts_N > 0
    length_N[with_rows] = rows.positions[rows.offsets[1:][with_rows] - 1].astype(np.int64) + 1
    return length_N


def row_counts(index: Any, rows: RowMap) -> np.ndarray:
    """The number of rows of each sequence of a batch, int64 (B,).

    Args:
        index: int (B,), from `ViewDataset`: the first row of each sequence; -1 for a sequence without rows.
        rows: the row map of the cache.

    Raises:
        UsageError: plain row numbers, or the index of a row that is not the first of a sample.
    """
    index_B = index_tensor(index).cpu().numpy()
    has_rows_B = index_B != NO_ROW
    first_B = np.where(has_rows_B, index_B & ROW_MASK, 0)
    if bool((index_B[has_rows_B] == first_B[has_rows_B]).any()):
        raise UsageError("plain row numbers name no view; pass the index that `ViewDataset` gives with each sample")
    sample_B = rows.samples_of(np.minimum(first_B, rows.num_rows - 1))
    is_first_B = rows.offsets[sample_B] == first_B
    if not is_first_B[has_rows_B].all():
        row = int(first_B[has_rows_B & ~is_first_B][0])
        raise UsageError(f"row {row} is not the first one of a sample; pass the index that `ViewDataset` gives")
    return np.where(has_rows_B, rows.offsets[sample_B + 1] - first_B, 0)


def samples_of_sequences(index: Any, rows: RowMap) -> np.ndarray:
    """The sample of each sequence of a batch, int64 (B,); 0 for a sequence without rows.

    Args:
        index: int (B,), from `ViewDataset`: the first row of each sequence; -1 for a sequence without rows.
        rows: the row map of the cache.
    """
    index_B = index_tensor(index).cpu().numpy()
    return rows.samples_of(np.where(index_B == NO_ROW, 0, index_B & ROW_MASK))


def position_index(index: Any, rows: RowMap, length: int) -> Tensor:
    """The index of each position of a padded batch, int64 (B, L); -1 where a position has no row.

    `view.targets(at[at >= 0])` are then the labels of the rows `logits[at >= 0]` of a model's output, in this order.

    Args:
        index: view and first row of each sequence, int64 (B,), from `ViewDataset`; -1 if it has no rows.
        rows: the row map of the cache.
        length: L, counted from each sequence's first token.

    Raises:
        ShapeError: a row lies beyond L.
        UsageError: an index that is not that of a sample's first row.
    """
    sequence_R, position_R, index_R = _row_places(index, rows)
    if len(position_R) and int(position_R.max()) >= length:
        raise ShapeError(
            f"a row lies at position {int(position_R.max())} of its sample, and the batch has {length} positions; a "
            "collate function must not shorten sequences"
        )
    at_BL = torch.full((len(index), length), NO_ROW, dtype=torch.int64)
    at_BL[sequence_R, position_R] = index_R
    return at_BL


def packed_index(index: Any, rows: RowMap, position_ids: Tensor) -> Tensor:
    """The index of each position of a packed batch, int64 (P, L); -1 where a position has no row.

    Args:
        index: view and first row of each sequence, int64 (B,), in the order of the batch; -1 if it has no rows.
        rows: the row map of the cache.
        position_ids: int (P, L) of `data.packing.pack`: each sequence starts at 0.

    Raises:
        ShapeError: another number of sequences than indices.
        UsageError: an index that is not that of a sample's first row.
    """
    starts_B = torch.nonzero(position_ids.flatten() == 0).flatten()
    if len(starts_B) != len(index):
        raise ShapeError(f"the packed batch has {len(starts_B)} sequences, and {len(index)} indices; expected one each")
    sequence_R, position_R, index_R = _row_places(index, rows)
    at_PL = torch.full((position_ids.numel(),), NO_ROW, dtype=torch.int64)
    at_PL[starts_B[sequence_R] + position_R] = index_R
    return at_PL.reshape(position_ids.shape)


def _row_places(index: Any, rows: RowMap) -> tuple[Tensor, Tensor, Tensor]:
    """For each row of a batch: its sequence's number in the batch, its position there, and its index; int64 (R,)."""
    counts_B = row_counts(index, rows)
    sequence_R = np.repeat(np.arange(len(counts_B)), counts_B)
    within_R = np.arange(len(sequence_R)) - np.repeat(np.cumsum(counts_B) - counts_B, counts_B)
    index_R = index_tensor(index).cpu().numpy()[sequence_R] + within_R
    position_R = rows.positions_of(index_R & ROW_MASK).astype(np.int64)
    return torch.from_numpy(sequence_R), torch.from_numpy(position_R), torch.from_numpy(index_R)


def rows_of_output(output: Tensor, at_BL: Tensor) -> Tensor:
    """The rows (R, C) of a model's output at the positions that have an index, in the order of `at_BL[at_BL >= 0]`.

    Args:
        output: (B, L, C); or (B, C, *size), such as of images with a row for each pixel: L is the product of the sizes.
        at_BL: the index of each position, int64 (B, L), from `position_index`.

    Raises:
        ShapeError: the output has other dimensions.
    """
    every = every_position(output, at_BL)
    return every.index_select(0, places_of_rows(at_BL).to(every.device))


def places_of_rows(at_BL: Tensor) -> Tensor:
    """The places of the rows among all positions of a batch, int64 (R,), increasing."""
    return torch.nonzero(at_BL.reshape(-1) >= 0)[:, 0]


def every_position(output: Tensor, at_BL: Tensor) -> Tensor:
    """A model's output at every position of a batch, (B·L, C); arguments and errors of `rows_of_output`."""
    if output.ndim > 3:
        output = output.flatten(2).transpose(1, 2)
    if output.ndim != 3 or output.shape[:2] != at_BL.shape:
        raise ShapeError(
            f"the model's output is {tuple(output.shape)}; expected {(*at_BL.shape, 'C')}: logits for each position of "
            "each sequence"
        )
    return output.reshape(-1, output.shape[2])


@dataclass(frozen=True)
class BatchRows:
    """The rows of a batch of sequences, in the order of the batch."""

    index: Tensor
    """The index of each position of the model's output, int64 (B, L), or (packed rows, L); -1 where there is no row."""
    counts: Tensor
    """Rows of each sequence, int64 (B,)."""

    def of_output(self, output: Tensor) -> Tensor:
        """The rows (R, C) of a model's output; see `rows_of_output`."""
        return rows_of_output(output, self.index)

    def of_targets(self, targets: Tensor) -> Tensor:
        """The true class of each row, int64 (R,), from targets that are padded to (B, most rows of a sequence).

        Raises:
            ShapeError: the targets are not one class for each row.
        """
        if targets.ndim != 2 or len(targets) != len(self.counts) or targets.shape[1] < int(self.counts.max()):
            raise ShapeError(
                f"the targets of the batch are {tuple(targets.shape)}; expected one class for each row of each of "
                f"{len(self.counts)} sequences, ({len(self.counts)}, {int(self.counts.max())})"
            )
        is_row = torch.arange(targets.shape[1]) < self.counts[:, None]
        return targets[is_row.to(targets.device)]

    def summed(self, loss_R: Tensor) -> Tensor:
        """The sum of the losses of each sequence's rows, (B,)."""
        samples_R = torch.repeat_interleave(self.counts).to(loss_R.device)
        return loss_R.new_zeros(len(self.counts)).index_add(0, samples_R, loss_R)


def batch_rows(index: Any, rows: RowMap, inputs: Any, output: Tensor) -> BatchRows:
    """The rows of a batch, padded or packed.

    Args:
        index: int (B,), from `ViewDataset`.
        rows: the row map of the cache.
        inputs: of the model; a mapping with `position_ids` from `data.packing.pack` is packed.
        output: of the model.

    Raises:
        UsageError, ShapeError: as `position_index` and `packed_index`.
    """
    counts = torch.from_numpy(row_counts(index, rows))
    if isinstance(inputs, Mapping) and is_packed(inputs):
        return BatchRows(packed_index(index, rows, inputs[POSITION_IDS].cpu()), counts)
    length = output.shape[1] if output.ndim <= 3 else math.prod(output.shape[2:])
    return BatchRows(position_index(index, rows, length), counts)
