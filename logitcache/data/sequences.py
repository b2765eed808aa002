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
from logitcache.data.tokens import packed_index, position_index
from logitcache.data.views import ViewDataset
from logitcache.errors import ShapeError

# B batch, L positions of the longest sequence, R rows of the batch, C classes


def sequence_rows(views: ViewDataset) -> RowMap | None:
    """The row map of views of sequences; None with one row per sample."""
    rows = views.plan.rows
    return None if rows is None or rows.one_each else rows


def row_counts(index: Any, rows: RowMap) -> np.ndarray:
    """The number of rows of each sequence of a batch, int64 (B,); `index` is that of `ViewDataset`."""
    index_B = index_tensor(index).cpu().numpy()
    samples = rows.samples_of(index_B & ROW_MASK)
    samples[index_B == NO_ROW] = 0
    counts: np.ndarray = rows.offsets[samples + 1] - rows.offsets[samples]
    return np.where(index_B == NO_ROW, 0, counts)


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
