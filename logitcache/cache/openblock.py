"""A block that is being written: encoded rows in host memory until all of them have arrived."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from logitcache.cache.agreement import differing, differing_rows
from logitcache.cache.fidelity import TEMPERATURES, targets_kl
from logitcache.cache.layout import Block
from logitcache.cache.manifest import LOGITS, Layout
from logitcache.cache.outputs import OutputLayout
from logitcache.data.rows import RowMap
from logitcache.encodings.largest import MANY_CLASSES
from logitcache.errors import IdentityMismatch, InvalidLogits, UsageError
from logitcache.targets import row_slices

# B batch, C classes (for other outputs: values of a row)

DEVICE_SLAB_LOGITS = 2**24
"""Logits that a device other than a CPU encodes at once (64 MB): enough to occupy it."""
HIGHER_TEMPERATURES = TEMPERATURES[1:]
"""Temperatures above 1 at which the encoding's loss is measured, on some rows."""
STRIDE, STRIDE_OF_MANY_CLASSES = 16, 64
"""One row in so many is measured at the higher temperatures, by row number."""
MEASURED_AT_ONCE = 8
"""Rows of one call that are measured together."""


class OpenBlock:
    """The rows of one block, in all outputs.

    Args:
        block: which block.
        row_map: which rows it has, and to which samples they belong.
        outputs: how each output is stored, with fitted encodings, by name.
        layout: of the cache.
        device: of the rows; all rows of a block come from one.
        precision: the teacher's arithmetic, for comparing rows that are written twice.
    """

    def __init__(
        self,
        block: Block,
        row_map: RowMap,
        outputs: Mapping[str, OutputLayout],
        layout: Layout,
        *,
        device: torch.device,
        precision: str,
    ) -> None:
        self.block = block
        self.rows = row_map.block_rows(block.number)
        self._parts = {
            name: _OpenRows(output, block, row_map, layout, device, precision) for name, output in outputs.items()
        }
        self.kl = self._parts[LOGITS].kl
        """KL(teacher ‖ decoded) of each row's logits, in nats, float32."""
        self.kl_at = self._parts[LOGITS].kl_at
        """The same at `HIGHER_TEMPERATURES` for one row in 16, or in 64 of many classes, float32 (temperatures,
        measured rows); NaN for rows that came encoded."""
        self.inputs: dict[str, str] = {}
        """Digests of the teacher's inputs, by row."""

    @property
    def filled(self) -> np.ndarray:
        """Which rows have arrived, bool."""
        return self._parts[LOGITS].filled

    @property
    def complete(self) -> bool:
        """Whether all rows have arrived and are encoded."""
        return all(rows.complete for rows in self._parts.values())

    def buffers(self) -> dict[str, Tensor]:
        """The encoded rows, by the names of their arrays in the cache."""
        return {name: buffer for part in self._parts.values() for name, buffer in part.buffers.items()}

    def fill(self, start: int, parts: Mapping[str, Tensor]) -> None:
        """Add float32 rows (B, C) of every output.

        Raises:
            InvalidLogits: the encoding can't store these rows; they may be written again.
            IdentityMismatch: the rows were written before with other values.
        """
        for name, rows in self._parts.items():
            rows.fill(start, parts[name])

    def fill_encoded(self, start: int, encoded: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> None:
        """Add logits that are encoded already, by the encoding's array names; nothing is known of their KL.

        Args:
            start: number of the first row.
            encoded: the logits.
            others: float32 rows (B, D) of every other output.

        Raises:
            InvalidLogits: an encoding can't store the rows of another output.
            IdentityMismatch: the rows were written before with other values.
            UsageError: other rows of the block were not encoded already.
        """
        for name, rows in others.items():
            self._parts[name].fill(start, rows)
        self._parts[LOGITS].fill_encoded(start, encoded)

    def wait_for_device(self) -> None:
        """Wait for the copies from the device that were started."""
        for rows in self._parts.values():
            rows.wait_for_device()

    def check(self) -> None:
        """Raise InvalidLogits if a row can't be stored."""
        for rows in self._parts.values():
            rows.check()


class _OpenRows:
    """The rows of one output in one block.

    Rows are encoded in slabs of fixed rows, never in the batches that they arrive in: stored values don't depend on
    the batches, and encoding is fast for small batches of few classes too. No slab has rows of two sequences, so that
    whole sequences may arrive in any order without filling the memory.
    """

    def __init__(
        self, output: OutputLayout, block: Block, row_map: RowMap, layout: Layout, device: torch.device, precision: str
    ) -> None:
        self.block = block
        self.rows = rows = row_map.block_rows(block.number)
        self._overlap_hint = row_map.overlap_hint
        self._output = output
        self._precision = precision
        self._encoding = output.encoding
        self._device = device
        self._num_classes = output.num_values
        slab_rows = max(1, DEVICE_SLAB_LOGITS // self._num_classes)
        if device.type == "cpu":
            slab_rows = self._encoding.rows_at_once(self._num_classes)
        self._bounds = _slab_bounds(row_map, block, slab_rows)
        self._slabs: dict[int, Tensor] = {}
        """The logits of incomplete slabs, by number."""
        self.pinned = self._device.type == "cuda"
        """Only copies into pinned memory run asynchronously."""
        self.buffers = {
            name: torch.empty((len(rows), *spec.row_shape), dtype=getattr(torch, spec.dtype), pin_memory=self.pinned)
            for name, spec in output.stored(layout.arrays).items()
        }
        self.kl = torch.empty(len(rows) if output.measures_kl else 0, pin_memory=self.pinned)
        self._stride = STRIDE if self._num_classes < MANY_CLASSES else STRIDE_OF_MANY_CLASSES
        self._first_measured = -rows.start % self._stride
        num_measured = len(range(self._first_measured, len(self.kl), self._stride))
        self.kl_at = torch.full((len(HIGHER_TEMPERATURES), num_measured), math.nan, pin_memory=self.pinned)
        self._to_measure: list[tuple[int, dict[str, Tensor], Tensor]] = []
        """Rows to measure at higher temperatures, by slab: their first place in `kl_at`, their arrays and logits."""
        self.invalid = torch.zeros(len(rows), dtype=torch.bool, pin_memory=self.pinned)
        self.filled = np.zeros(len(rows), dtype=bool)
        self._kind: str | None = None
        """How the first rows came: as logits, or encoded."""

    @property
    def complete(self) -> bool:
        return not self._slabs and bool(self.filled.all())

    def fill(self, start: int, logits_BC: Tensor) -> None:
        """Add rows; complete slabs are encoded on their device, without waiting for a GPU."""
        self._check_kind("logits")
        first = start - self.rows.start
        written = np.flatnonzero(self.filled[first : first + len(logits_BC)])
        if len(written):
            self._compare(first, written.tolist(), logits_BC)
        self.invalid[first : first + len(logits_BC)] = False
        if logits_BC.device.type == "cpu" and not math.isfinite(float(logits_BC.sum())):  # NaN, infinite, or masked
            self.invalid[first : first + len(logits_BC)] = self._encoding.refused(logits_BC)
            self.check()
        stop = first + len(logits_BC)
        for number in range(self._slab_of(first), int(np.searchsorted(self._bounds, stop))):
            span = slice(int(self._bounds[number]), int(self._bounds[number + 1]))
            within = slice(max(span.start, first), min(span.stop, stop))
            if number not in self._slabs:
                if self.filled[span].all():
                    continue  # written before
                if within == span:
                    self.filled[span] = True
                    self._encode(span, logits_BC[span.start - first : span.stop - first])
                    continue
                shape = (span.stop - span.start, self._num_classes)
                self._slabs[number] = torch.empty(shape, device=self._device)
            slab_BC = self._slabs[number]
            slab_BC[within.start - span.start : within.stop - span.start] = logits_BC[
                within.start - first : within.stop - first
            ]
            self.filled[within] = True
            if self.filled[span].all():
                self._encode(span, self._slabs.pop(number))
        if self._to_measure:
            self._measure_at_higher_temperatures()

    def fill_encoded(self, start: int, encoded: Mapping[str, Tensor]) -> None:
        """Add rows that are encoded already."""
        self._check_kind("entries")
        first, count = start - self.rows.start, len(next(iter(encoded.values())))
        span = slice(first, first + count)
        written = np.flatnonzero(self.filled[span])
        for part in row_slices(len(written), self._num_classes, torch.device("cpu")):
            again = {name: values[torch.from_numpy(written[part])] for name, values in encoded.items()}
            self._compare_encoded(first, written[part].tolist(), self._encoding.decode(again, self._num_classes))
        for name, values in encoded.items():
            self.buffers[self._output.stored_name(name)][span].copy_(values, non_blocking=self.pinned)
        self.kl[span] = math.nan
        self.filled[span] = True

    def _compare_encoded(self, first: int, written: list[int], again_MC: Tensor) -> None:
        self.wait_for_device()
        rows = [first + offset for offset in written]
        encoded = {name: values[rows] for name, values in self._output.encoded(self.buffers).items()}
        stored_MC = self._encoding.decode(encoded, self._num_classes)
        numbers = [self.rows.start + row for row in rows]
        differing = differing_rows(
            stored_MC, again_MC.cpu(), self._encoding, self._precision, view=self.block.view, rows_B=numbers
        )
        if differing:
            raise self._written_before(differing[0])

    def _check_kind(self, kind: str) -> None:
        if self._kind not in (None, kind):
            raise UsageError(
                f"block {self.block.name} has rows from {self._kind}; write all rows of a block either with `write` or "
                "with `write_sparse`"
            )
        self._kind = kind

    def _written_before(self, row: int) -> IdentityMismatch:
        return IdentityMismatch(
            f"row {row} of view {self.block.view} was written before with other {self._output.name}; the first values "
            "are kept. Write each row once, or the same values again" + self._overlap_hint(row)
        )

    def _slab_of(self, row: int) -> int:
        return int(np.searchsorted(self._bounds, row, side="right")) - 1

    def _encode(self, span: slice, logits_BC: Tensor) -> None:
        if logits_BC.device.type != "cpu" or self._encoding.keeps_constants:  # its bound differs from finite sums
            self.invalid[span].copy_(self._encoding.refused(logits_BC), non_blocking=self.pinned)
        start = self.rows.start + span.start
        encoded, kl_B = self._encoding.encode_with_kl(logits_BC, view=self.block.view, start=start)
        for name, values in encoded.items():
            self.buffers[self._output.stored_name(name)][span].copy_(values, non_blocking=self.pinned)
        if self._output.measures_kl:
            # On a CPU only: on other devices the check would wait.
            if kl_B is None or (kl_B.device.type == "cpu" and bool(kl_B.isnan().any())):
                kl_B = targets_kl(self._encoding.targets(encoded, self._num_classes), logits_BC)
            self.kl[span].copy_(kl_B, non_blocking=self.pinned)
            some = slice(-start % self._stride, None, self._stride)
            if some.start < len(logits_BC):
                place = (span.start + some.start - self._first_measured) // self._stride
                arrays = {name: values[some] for name, values in encoded.items()}
                self._to_measure.append((place, arrays, logits_BC[some]))
            if sum(len(few_BC) for _, _, few_BC in self._to_measure) >= MEASURED_AT_ONCE:
                self._measure_at_higher_temperatures()

    def _measure_at_higher_temperatures(self) -> None:
        """Measure the rows that are to be measured; several slabs at once, since most have one or two such rows."""
        places, encoded, logits = zip(*self._to_measure, strict=True)
        self._to_measure.clear()
        few_BC = torch.cat(logits)
        arrays = {name: torch.cat([each[name] for each in encoded]) for name in encoded[0]}
        targets = self._encoding.targets(arrays, self._num_classes)
        for kl_at_B, temperature in zip(self.kl_at, HIGHER_TEMPERATURES, strict=True):
            parts = torch.split(targets_kl(targets, few_BC, temperature), [len(each) for each in logits])
            for place, kl_B in zip(places, parts, strict=True):
                kl_at_B[place : place + len(kl_B)].copy_(kl_B, non_blocking=self.pinned)

    def _compare(self, first: int, written: list[int], logits_BC: Tensor) -> None:
        """Compare rows with those that were written before; `written` counts from `first`."""
        self.wait_for_device()
        for offset in written:
            row, again_1C = first + offset, logits_BC[offset : offset + 1].cpu()
            number = self._slab_of(row)
            slab = self._slabs.get(number)
            if slab is not None:
                stored_1C = slab[row - int(self._bounds[number])][None].cpu()
                differs = bool(differing(stored_1C, again_1C, again_1C, self._encoding, self._precision))
            else:
                encoded = {name: values[row : row + 1] for name, values in self._output.encoded(self.buffers).items()}
                stored_1C = self._encoding.decode(encoded, self._num_classes)
                numbers, view = [self.rows.start + row], self.block.view
                differs = bool(
                    differing_rows(stored_1C, again_1C, self._encoding, self._precision, view=view, rows_B=numbers)
                )
            if differs:
                raise self._written_before(self.rows.start + row)

    def wait_for_device(self) -> None:
        """Wait for the copies from the device that were started."""
        if self.pinned:
            torch.cuda.current_stream(self._device).synchronize()

    def check(self) -> None:
        """Raise InvalidLogits if the encoding can't store a row."""
        invalid = np.flatnonzero(self.invalid.numpy())
        if not len(invalid):
            return
        masks = ""
        if self._encoding.keeps_constants:
            largest = f"{self._encoding.largest:.2g}".replace("e+", "e")
            what = f"NaN, or values beyond {largest}"
        elif self._encoding.holds_masks:
            what = "NaN or +inf, or nothing but -inf"
        else:
            what = "NaN, +inf or -inf"
            masks = f" {self._encoding.name} can't store masked classes: use Dense."
        row = self.rows.start + int(invalid[0])
        raise InvalidLogits(
            f"view {self.block.view}, row {row}: the teacher's {self._output.name} "
            f"hold {what} ({len(invalid)} such rows of {len(self.rows)} in this block).\n"
            "The block was not stored. Check the teacher's weights, its inputs and its precision "
            f"(float16 overflows; try bfloat16).{masks}",
            row=row,
        )


def _slab_bounds(row_map: RowMap, block: Block, slab_rows: int) -> np.ndarray:
    """Where the slabs of a block start, counted from its first row, and the number of its rows at the end."""
    rows = row_map.block_rows(block.number)
    if row_map.one_each:
        return np.append(np.arange(0, len(rows), slab_rows), len(rows))
    samples = map(row_map.sample_rows, row_map.block_samples(block.number))
    starts = [np.arange(each.start, each.stop, slab_rows) - rows.start for each in samples]
    return np.append(np.concatenate(starts), len(rows))
