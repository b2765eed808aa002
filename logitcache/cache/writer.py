"""Logits in, committed blocks out: bounded queue -> objects -> receipt last -> seal.

A block is encoded on the device that its logits come from, gathered in (pinned) host memory, and committed by a
writer thread once it is whole. A block without a receipt never happened.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from logitcache.arrays import ArraySpec
from logitcache.cache.card import CARD, write_card
from logitcache.cache.committed import collect_receipts
from logitcache.cache.fidelity import fidelity_kl
from logitcache.cache.layout import (
    FIXED,
    FIXED_RECEIPT_KEY,
    Block,
    all_blocks,
    block_key,
    block_rows,
    encode_block,
    encode_fixed,
    fixed_array_key,
    group_metadata,
)
from logitcache.cache.manifest import (
    MANIFEST,
    RECEIPTS,
    Manifest,
    Receipt,
    StoredObject,
    content_digest,
    contents,
    dump,
    dump_manifest,
)
from logitcache.cache.reader import LogitCache
from logitcache.data.samples import batch_item, input_digest
from logitcache.data.views import proof_rows
from logitcache.digest import array_digest, canonical_json, sha256_hex
from logitcache.encodings import Encoding
from logitcache.errors import IncompleteCache, InvalidLogits, ShapeError
from logitcache.storage import Storage

# B batch, C classes, N samples

WRITER_THREADS = 2
BLOCKS_IN_FLIGHT = 4
"""Blocks that wait for a writer thread or are in one: the bound on memory."""
SLAB_LOGITS = 2**20
"""Logits that are encoded at once (4 MB): many enough that small operations cost little, few enough for a cache."""


class CacheWriter:
    """Takes logits in any order, commits each block when it is whole, and seals; a context manager.

    Leaving the `with` seals the cache, or raises `IncompleteCache` that says which rows are missing. After an
    exception everything committed so far is kept, and a writer opened again goes on from there.
    """

    def __init__(
        self,
        storage: Storage,
        manifest: Manifest,
        encoding: Encoding,
        *,
        fixed: Mapping[str, np.ndarray],
    ) -> None:
        self.storage = storage
        self.manifest = manifest
        self.layout = manifest.layout
        self.encoding = encoding
        """Fitted, where it is one that is."""
        self.committed_blocks: list[Block] = []
        """Blocks committed by this writer, in the order of their receipts."""
        self._receipts = collect_receipts(storage, self.manifest)
        self._open_blocks: dict[Block, _OpenBlock] = {}
        self._submitted: set[Block] = set()
        self._lock = threading.Lock()
        self._commits: list[Future[None]] = []
        self._slots = threading.BoundedSemaphore(BLOCKS_IN_FLIGHT)
        self._threads = ThreadPoolExecutor(WRITER_THREADS, thread_name_prefix="logitcache-writer")
        if self.manifest.state == "open":
            storage.remove_leftovers()
            for key, data in group_metadata(self.layout).items():
                if storage.get(key) != data:
                    storage.put(key, data)
            if FIXED not in self._receipts:
                if encoding.fitted_arrays and self._receipts:  # those seen here, not another builder's since
                    self._forget_blocks()
                self._receipts[FIXED] = self._commit_fixed(fixed)

    def _forget_blocks(self) -> None:
        """Blocks in the terms of a basis that is gone say nothing: they are computed again."""
        for key in [*self.storage.list_keys("receipts"), RECEIPTS]:
            self.storage.delete(key)
        self._receipts = {}

    def missing_blocks(self) -> list[Block]:
        """The blocks that have no valid receipt yet, view by view."""
        return [block for block in all_blocks(self.layout) if block.name not in self._receipts]

    def write(
        self, *, view: int, start: int, logits: Any, inputs: Any = None, input_digests: Mapping[int, str] | None = None
    ) -> None:
        """Store the logits of consecutive rows of one view; rows of committed blocks are passed over.

        Args:
            view: 0 <= view < num_views.
            start: the first row.
            logits: (B, C) floats, a tensor on any device or an array; -inf masks a class.
            inputs: what the teacher was given for these rows, batched; digests of a few rows of each view are kept,
                so that a student can prove that it sees the same.
            input_digests: these digests by row, where they are known and the inputs are not at hand.

        Raises:
            ShapeError: not (B, C), or rows beyond the cache.
            InvalidLogits: NaN, +inf, or a row of -inf only.
            StorageError: the store refused an earlier block.
        """
        self._raise_failed_commit()
        logits_BC = torch.as_tensor(logits)
        num_classes, num_samples = self.layout.num_classes, self.layout.num_samples
        if logits_BC.ndim != 2 or logits_BC.shape[1] != num_classes:
            raise ShapeError(
                f"the teacher's output is {tuple(logits_BC.shape)}; expected (B, {num_classes}): one logit for each of "
                f"the {num_classes} classes of the cache"
            )
        stop = start + len(logits_BC)
        if not 0 <= view < self.layout.num_views or start < 0 or stop > num_samples:
            raise ShapeError(
                f"rows {start} to {stop} of view {view} lie outside the cache, which has {num_samples} rows in "
                f"{self.layout.num_views} views"
            )
        logits_BC = logits_BC.detach().float()
        digests = dict(input_digests or {}) | {
            row: input_digest(batch_item(inputs, row - start)).hex()
            for row in (() if inputs is None else proof_rows(self.manifest.identity.view_seed, view, num_samples))
            if start <= row < stop
        }
        row = start
        while row < stop:
            block = Block(view, row // self.layout.rows_per_block)
            rows = block_rows(self.layout, block)
            piece_stop = min(stop, rows.stop)
            if block.name not in self._receipts and block not in self._submitted:
                if block not in self._open_blocks:
                    self._open_blocks[block] = _OpenBlock(block, rows, self.encoding, self.layout.arrays, logits_BC)
                opened = self._open_blocks[block]
                opened.fill(row, logits_BC[row - start : piece_stop - start])
                opened.inputs.update({str(r): digest for r, digest in digests.items() if r in rows})
                if opened.whole:
                    self._submit(self._open_blocks.pop(block))
            row = piece_stop

    def seal(self) -> Manifest:
        """Wait for every commit, gather the receipts, close the cache for writing, and write its card.

        Raises:
            IncompleteCache: names the first rows that are missing.
        """
        self.flush()
        if self.manifest.state == "sealed":
            if self.storage.size(CARD) is None:
                self.storage.remove_leftovers()  # of a writer that was killed as it wrote the card
                write_card(self._written())
            return self.manifest
        if self.missing_blocks():
            self._receipts |= collect_receipts(self.storage, self.manifest)  # another writer may have had them
        missing = self.missing_blocks()
        if missing:
            raise IncompleteCache(self._describe_missing(missing))
        names = [FIXED, *(block.name for block in all_blocks(self.layout))]
        receipts = {name: self._receipts[name] for name in names}
        compact = {name: receipt.model_dump() for name, receipt in receipts.items()}
        gathered = canonical_json(compact)
        self.storage.put(RECEIPTS, gathered)
        changes = {
            "state": "sealed",
            "digest": content_digest(list(receipts.values())),
            "receipts": sha256_hex(gathered),
            "contents": contents(receipts, fixed=FIXED),
            "provenance": {name: value for name, value in self.manifest.provenance.items() if name != "repairing"},
        }
        self.manifest = self.manifest.model_copy(update=changes)
        self.storage.put(MANIFEST, dump_manifest(self.manifest))
        for key in list(self.storage.list_keys("receipts")):
            self.storage.delete(key)
        write_card(self._written())  # last: a cache is whole without it
        return self.manifest

    def _written(self) -> LogitCache:
        """The cache as this writer knows it: another one may be at work on what lies in the storage."""
        return LogitCache(self.storage, written=(self.manifest, dict(self._receipts)))

    def flush(self) -> None:
        """Wait until every whole block is committed; raises what went wrong in a writer thread."""
        for commit in self._commits:
            commit.exception()
        self._raise_failed_commit()

    def close(self) -> None:
        """Let running commits end, and stop the writer threads; nothing is sealed."""
        self._threads.shutdown(wait=True)

    def __enter__(self) -> CacheWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.seal()
        finally:
            self.close()

    def _submit(self, opened: _OpenBlock) -> None:
        opened.wait_for_device()
        opened.check()
        self._slots.acquire()
        self._submitted.add(opened.block)
        self._commits.append(self._threads.submit(self._commit, opened))

    def _commit(self, opened: _OpenBlock) -> None:
        """In a writer thread: the block's objects, then its receipt."""
        try:
            objects = {}
            for name, buffer in opened.buffers.items():
                values = buffer.numpy()
                spec = self.layout.arrays[name]
                data = encode_block(spec, values, self.layout.rows_per_block)
                self.storage.put(block_key(name, spec, opened.block), data)
                objects[name] = _stored(data, values)
            kl = opened.kl.double()
            receipt = Receipt(
                rows=len(opened.rows),
                objects=objects,
                kl_mean=_finite(float(kl.mean())),
                kl_max=_finite(float(kl.max())),
                inputs=opened.inputs,
            )
            # Receipt last: a block without one never happened.
            self.storage.put(opened.block.receipt_key, dump(receipt))
            with self._lock:
                self._receipts[opened.block.name] = receipt
                self.committed_blocks.append(opened.block)
        finally:
            self._slots.release()

    def _commit_fixed(self, arrays: Mapping[str, np.ndarray]) -> Receipt:
        """Store what is stored once, beside the labels."""
        objects = {}
        for name, values in arrays.items():
            data = encode_fixed(values)
            self.storage.put(fixed_array_key(name, self.layout.fixed[name]), data)
            objects[name] = _stored(data, values)
        receipt = Receipt(rows=self.layout.num_samples, objects=objects, kl_mean=None, kl_max=None, inputs={})
        self.storage.put(FIXED_RECEIPT_KEY, dump(receipt))
        return receipt

    def _raise_failed_commit(self) -> None:
        waiting = []
        for commit in self._commits:
            if not commit.done():
                waiting.append(commit)
            elif (error := commit.exception()) is not None:
                raise error
        self._commits = waiting

    def _describe_missing(self, missing: list[Block]) -> str:
        lines = []
        for block in missing[:5]:
            opened = self._open_blocks.get(block)
            rows = block_rows(self.layout, block)
            if opened is None:
                lines.append(f"view {block.view}: rows {rows.start} to {rows.stop - 1}")
            else:
                absent = rows.start + np.flatnonzero(~opened.filled)
                lines.append(f"view {block.view}: {len(absent)} rows from {absent[0]} to {absent[-1]}")
        if len(missing) > 5:
            lines.append(f"and {len(missing) - 5} more blocks")
        total = sum(1 for _ in all_blocks(self.layout))
        return (
            f"{self.storage.url} is not complete: {len(missing)} of {total} blocks are missing.\n  "
            + "\n  ".join(lines)
            + "\nWhat is committed stays; write the missing rows and leave the `with` again."
        )


class _OpenBlock:
    """A block on its way: encoded rows in host memory until all have come.

    Rows are encoded a slab at a time, never batch by batch: a slab is always the same rows, so the batches that they
    came in show neither in what is stored nor, where classes are few, in the time it takes.
    """

    def __init__(
        self, block: Block, rows: range, encoding: Encoding, specs: Mapping[str, ArraySpec], like_BC: Tensor
    ) -> None:
        self.block = block
        self.rows = rows
        self._encoding = encoding
        self._device = like_BC.device
        self._num_classes = like_BC.shape[1]
        self._slab_rows = max(1, SLAB_LOGITS // self._num_classes)
        self._slabs: dict[int, Tensor] = {}
        """The logits of slabs that are not whole yet, by number."""
        self.pinned = self._device.type == "cuda"
        """Only copies into pinned memory may be left running; others would be read before they arrive."""
        self.buffers = {
            name: torch.empty((len(rows), *spec.row_shape), dtype=getattr(torch, spec.dtype), pin_memory=self.pinned)
            for name, spec in specs.items()
        }
        self.kl = torch.empty(len(rows), pin_memory=self.pinned)
        self.invalid = torch.zeros(len(rows), dtype=torch.bool, pin_memory=self.pinned)
        self.filled = np.zeros(len(rows), dtype=bool)
        self.inputs: dict[str, str] = {}

    @property
    def whole(self) -> bool:
        return not self._slabs and bool(self.filled.all())

    def fill(self, start: int, logits_BC: Tensor) -> None:
        """Take rows of this block; slabs that are whole are encoded on their device, without waiting for a GPU."""
        first = start - self.rows.start
        if logits_BC.device.type == "cpu" and not math.isfinite(float(logits_BC.sum())):  # NaN, infinite, or masked
            self.invalid[first : first + len(logits_BC)] = self._invalid(logits_BC)
            self.check()
        for number in range(first // self._slab_rows, -(-(first + len(logits_BC)) // self._slab_rows)):
            place = slice(number * self._slab_rows, min((number + 1) * self._slab_rows, len(self.rows)))
            within = slice(max(place.start, first), min(place.stop, first + len(logits_BC)))
            if number not in self._slabs:
                if self.filled[place].all():
                    continue  # written before
                shape = (place.stop - place.start, self._num_classes)
                self._slabs[number] = torch.empty(shape, device=self._device)
            slab_BC = self._slabs[number]
            slab_BC[within.start - place.start : within.stop - place.start] = logits_BC[
                within.start - first : within.stop - first
            ]
            self.filled[within] = True
            if self.filled[place].all():
                self._encode(place, self._slabs.pop(number))

    def _encode(self, place: slice, logits_BC: Tensor) -> None:
        if logits_BC.device.type != "cpu":
            self.invalid[place].copy_(self._invalid(logits_BC), non_blocking=self.pinned)
        start = self.rows.start + place.start
        encoded = self._encoding.encode(logits_BC, view=self.block.view, start=start)
        for name, values in encoded.items():
            self.buffers[name][place].copy_(values, non_blocking=self.pinned)
        decoded_BC = self._encoding.decode(encoded, self._num_classes)
        self.kl[place].copy_(fidelity_kl(decoded_BC, logits_BC), non_blocking=self.pinned)

    def wait_for_device(self) -> None:
        """Until the copies that were started have arrived."""
        if self.pinned:
            torch.cuda.current_stream(self._device).synchronize()

    def check(self) -> None:
        """Refuse rows that no distribution can be made of, naming them."""
        invalid = np.flatnonzero(self.invalid.numpy())
        if len(invalid):
            what = "NaN or +inf, or nothing but -inf" if self._encoding.holds_masks else "NaN, +inf or -inf"
            masks = (
                "" if self._encoding.holds_masks else f" {self._encoding.name} can't hold masked classes: use Dense."
            )
            raise InvalidLogits(
                f"view {self.block.view}, row {self.rows.start + invalid[0]}: the teacher's logits hold {what} "
                f"({len(invalid)} such rows of {len(self.rows)} in this block).\n"
                "The block was not stored. Look at the teacher's weights and inputs, or at its precision "
                f"(float16 overflows; try bfloat16).{masks}"
            )

    def _invalid(self, logits_BC: Tensor) -> Tensor:
        """Where no distribution can be made of a row, or this encoding can't hold it, bool (B,)."""
        # A row's largest logit is NaN, +inf or -inf exactly where no distribution can be made of it.
        invalid_B = ~torch.isfinite(logits_BC.amax(dim=1))
        return invalid_B if self._encoding.holds_masks else invalid_B | ~torch.isfinite(logits_BC.amin(dim=1))


def _finite(nats: float) -> float | None:
    """A divergence for a receipt; none where classes that the teacher may choose are left out altogether."""
    return nats if math.isfinite(nats) else None


def _stored(data: bytes, values: np.ndarray) -> StoredObject:
    return StoredObject(bytes=len(data), sha256=sha256_hex(data), values_sha256=array_digest(values))
