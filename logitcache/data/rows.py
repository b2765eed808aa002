"""Which rows belong to which sample, and which rows a block holds."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np

from logitcache.digest import array_digest, json_digest
from logitcache.errors import ShapeError, UsageError

# N samples, R rows of a view, B batch

DEFAULT_ROWS_PER_BLOCK = 16_384
MAX_ROWS = 2**40
"""An index has 40 bits for the row number."""


class RowMap(ABC):
    """Which rows of a view belong to which sample, and which rows a block holds.

    Sample i has the rows `offsets[i]` to before `offsets[i + 1]`. Row numbers have no gaps, and a block holds whole
    samples.
    """

    num_samples: int
    num_rows: int
    """Rows of one view."""
    rows_per_block: int
    """The most rows of a block."""
    blocks_per_view: int
    positions: np.ndarray | None = None
    """Position of each row in its sample, int32 (R,), increasing within a sample; None if it is 0, 1, 2, …"""

    @property
    @abstractmethod
    def offsets(self) -> np.ndarray:
        """First row of each sample, and the number of rows at the end, int64 (N + 1,)."""

    @property
    def one_each(self) -> bool:
        """Whether row i is sample i."""
        return isinstance(self, OneRowEach)

    def overlap_hint(self, row: int) -> str:
        """The end of a message about rows that reach into `row`: a likely cause, where the next sample starts there."""
        if self.one_each or row == 0 or row not in self.offsets:
            return ""
        return (
            "\nIf the teacher is a causal language model, leave out the logits of the last token: a sequence of L "
            "tokens has L - 1 rows, `logits[:-1]`"
        )

    @abstractmethod
    def block_rows(self, number: int) -> range:
        """The rows of a block."""

    @abstractmethod
    def block_samples(self, number: int) -> range:
        """The samples whose rows a block holds, from the first to the last that has any rows."""

    def covered_samples(self, number: int) -> range:
        """The samples of a block, with those without rows next to them, so that every sample belongs to one block."""
        start = 0 if number == 0 else self.block_samples(number).start
        last = number + 1 == self.blocks_per_view
        return range(start, self.num_samples if last else self.block_samples(number + 1).start)

    @abstractmethod
    def sample_rows(self, sample: int) -> range:
        """The rows of a sample."""

    @abstractmethod
    def samples_starting(self, start: int, stop: int) -> range:
        """The samples whose first row is in a range of rows."""

    @abstractmethod
    def blocks_of(self, rows: Any) -> np.ndarray:
        """The number of the block that holds each row, int64 (B,)."""

    @abstractmethod
    def samples_of(self, rows: Any) -> np.ndarray:
        """The sample that each row belongs to, int64 (B,)."""

    @abstractmethod
    def fingerprint(self) -> str | None:
        """SHA-256 of offsets and positions, part of the identity of a cache; None with one row per sample."""

    def positions_of(self, rows: Any) -> np.ndarray:
        """The position of each row in its sample, int (B,)."""
        if self.positions is not None:
            chosen: np.ndarray = self.positions[rows]
            return chosen
        positions: np.ndarray = np.asarray(rows) - self.offsets[self.samples_of(rows)]
        return positions


class OneRowEach(RowMap):
    """Row i of a view belongs to sample i."""

    def __init__(self, num_samples: int, rows_per_block: int) -> None:
        self.num_samples = self.num_rows = num_samples
        self.rows_per_block = rows_per_block
        self.blocks_per_view = -(-num_samples // rows_per_block)

    @cached_property
    def offsets(self) -> np.ndarray:
        """0 to N, int64 (N + 1,)."""
        return np.arange(self.num_samples + 1)

    def block_rows(self, number: int) -> range:
        start = number * self.rows_per_block
        return range(start, min(start + self.rows_per_block, self.num_rows))

    def block_samples(self, number: int) -> range:
        return self.block_rows(number)

    def sample_rows(self, sample: int) -> range:
        return range(sample, sample + 1)

    def samples_starting(self, start: int, stop: int) -> range:
        return range(start, stop)

    def blocks_of(self, rows: Any) -> np.ndarray:
        numbers: np.ndarray = np.asarray(rows) // self.rows_per_block
        return numbers

    def samples_of(self, rows: Any) -> np.ndarray:
        return np.asarray(rows)

    def fingerprint(self) -> None:
        return None


class RowsOfSequences(RowMap):
    """The rows of samples that have any number of rows, such as one for each token of a sequence.

    A block takes whole samples in order as long as they fit into `rows_per_block`, so its content does not depend on
    other blocks.

    Args:
        offsets: first row of each sample, and the number of rows at the end, int64 (N + 1,).
        rows_per_block: the most rows of a block.
        positions: position of each row in its sample, int32 (R,); None if it is 0, 1, 2, …

    Raises:
        UsageError: offsets or positions that don't belong together, or a sample that is larger than a block.
    """

    def __init__(self, offsets: np.ndarray, rows_per_block: int, positions: np.ndarray | None = None) -> None:
        if offsets.dtype != np.int64 or offsets.ndim != 1 or len(offsets) < 2 or offsets[0] != 0:
            raise UsageError(
                f"row_offsets are int64 (N + 1,), the first one 0; found {offsets.dtype} {offsets.shape}"
                f"{f' with {offsets.flat[0]} first' if offsets.size else ''}"
            )
        self._offsets = offsets
        self.rows_per_block = rows_per_block
        self.positions = positions
        self.num_samples, self.num_rows = len(offsets) - 1, int(offsets[-1])
        counts = np.diff(offsets)
        if bool((counts < 0).any()):
            sample = int(counts.argmin())
            raise UsageError(f"sample {sample} has {counts[sample]} rows; expected at least 0")
        if not 1 <= self.num_rows <= MAX_ROWS:
            raise UsageError(f"the samples have {self.num_rows} rows in total; expected 1 to {MAX_ROWS}")
        largest = int(counts.argmax())
        if counts[largest] > self.rows_per_block:
            raise UsageError(
                f"sample {largest} has {counts[largest]} rows, and a block at most {self.rows_per_block}; blocks hold "
                f"whole samples: set rows_per_block to at least {counts[largest]}, or split the sample"
            )
        if positions is not None:
            self._check_positions(positions)
        self.block_starts = self._block_starts()
        """First row of each block, and the number of rows at the end, int64 (blocks + 1,)."""
        self.blocks_per_view = len(self.block_starts) - 1

    def _check_positions(self, positions: np.ndarray) -> None:
        if positions.dtype != np.int32 or positions.shape != (self.num_rows,):
            raise UsageError(
                f"row_positions are int32 ({self.num_rows},), one for each row; found {positions.dtype} "
                f"{positions.shape}"
            )
        is_right = np.ones(len(positions), dtype=bool)
        is_right[1:] = positions[1:] > positions[:-1]
        is_right[self.offsets[:-1][np.diff(self.offsets) > 0]] = True  # the first row of a sample
        is_right &= positions >= 0
        if not is_right.all():
            row = int(is_right.argmin())
            raise UsageError(
                f"row {row}, of sample {self.samples_of(row)}, has position {positions[row]}; the positions of a "
                "sample's rows increase, from 0 or more"
            )

    @property
    def offsets(self) -> np.ndarray:
        return self._offsets

    def _block_starts(self) -> np.ndarray:
        starts = [0]
        while starts[-1] < self.num_rows:
            following = np.searchsorted(self.offsets, starts[-1] + self.rows_per_block, side="right") - 1
            starts.append(int(self.offsets[following]))
        return np.array(starts, dtype=np.int64)

    def block_rows(self, number: int) -> range:
        return range(int(self.block_starts[number]), int(self.block_starts[number + 1]))

    def block_samples(self, number: int) -> range:
        rows = self.block_rows(number)
        return range(int(self.samples_of(rows.start)), int(self.samples_of(rows.stop - 1)) + 1)

    def sample_rows(self, sample: int) -> range:
        return range(int(self.offsets[sample]), int(self.offsets[sample + 1]))

    def samples_starting(self, start: int, stop: int) -> range:
        first, last = (int(np.searchsorted(self.offsets[:-1], row)) for row in (start, stop))
        return range(first, last)

    def blocks_of(self, rows: Any) -> np.ndarray:
        return np.searchsorted(self.block_starts, np.asarray(rows), side="right") - 1

    def samples_of(self, rows: Any) -> np.ndarray:
        return np.searchsorted(self.offsets, np.asarray(rows), side="right") - 1

    def fingerprint(self) -> str:
        positions = None if self.positions is None else array_digest(self.positions)
        return json_digest([array_digest(self.offsets), positions])


def make_row_map(
    num_samples: int,
    rows_per_sample: Sequence[int] | np.ndarray | None,
    row_positions: np.ndarray | Sequence[Sequence[int] | np.ndarray] | None,
    *,
    rows_per_block: int | None = None,
) -> RowMap:
    """The row map of a new cache.

    Args:
        num_samples: N.
        rows_per_sample: int (N,); None is one row each.
        row_positions: int (R,), or one sequence of integers for each sample; needs `rows_per_sample`.
        rows_per_block: the most rows of a block; None is 16 384, or the rows of the largest sample.

    Raises:
        UsageError: values that are not integers or impossible.
        ShapeError: not one entry for each sample.
    """
    if rows_per_sample is None:
        if row_positions is not None:
            raise UsageError("row_positions needs rows_per_sample: the number of rows of each sample")
        return OneRowEach(num_samples, min(rows_per_block or DEFAULT_ROWS_PER_BLOCK, num_samples))
    counts = _integers("rows_per_sample", rows_per_sample)
    if counts.shape != (num_samples,):
        raise ShapeError(f"rows_per_sample is {counts.shape}; expected ({num_samples},), one number for each sample")
    if rows_per_block is None:
        rows_per_block = max(DEFAULT_ROWS_PER_BLOCK, int(counts.max()))
    offsets = np.concatenate([[0], np.cumsum(counts)])
    positions = None
    if row_positions is not None:
        if not isinstance(row_positions, np.ndarray):
            parts = [_integers("row_positions", part) for part in row_positions]
            if [len(part) for part in parts] != counts.tolist():
                raise ShapeError("row_positions has one sequence for each sample, with a number for each of its rows")
            row_positions = np.concatenate(parts)
        positions = _integers("row_positions", row_positions)
        if positions.size and not 0 <= int(positions.min()) <= int(positions.max()) <= np.iinfo(np.int32).max:
            raise UsageError(f"row_positions are from {positions.min()} to {positions.max()}; expected 0 to 2^31 - 1")
        positions = positions.astype(np.int32)
    largest_block = max(1, min(rows_per_block, int(offsets[-1])))
    return RowsOfSequences(offsets, largest_block, positions)


def rows_of_dataset(dataset: Any, rows_per_block: int | None = None) -> RowMap:
    """The row map of a dataset: one row per sample, unless it has `rows_per_sample`, and perhaps `row_positions`.

    Raises:
        UsageError, ShapeError: as `make_row_map`.
    """
    rows, positions = getattr(dataset, "rows_per_sample", None), getattr(dataset, "row_positions", None)
    return make_row_map(len(dataset), rows, positions, rows_per_block=rows_per_block)


def _integers(name: str, values: Any) -> np.ndarray:
    try:
        array = np.asarray(values)
    except ValueError as error:
        raise UsageError(f"{name} must be integers: {error}") from None
    if array.size and array.dtype.kind not in "iu":
        raise UsageError(f"{name} must be integers, not {array.dtype}")
    return array.astype(np.int64)
