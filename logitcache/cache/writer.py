"""Logits in, committed blocks out: bounded queue -> objects -> receipt last -> seal.

A block is encoded on the device that its logits come from, gathered in (pinned) host memory, and committed by a
writer thread once it is whole. A block without a receipt never happened.
"""

from __future__ import annotations

import math
import re
import threading
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from logitcache.cache.agreement import differing_rows
from logitcache.cache.card import CARD, write_card
from logitcache.cache.committed import collect_receipts, in_place, stored_manifest
from logitcache.cache.digests import content_digest
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
)
from logitcache.cache.manifest import (
    LOGITS,
    RECEIPTS,
    Manifest,
    Receipt,
    StoredObject,
    contents,
    dump,
)
from logitcache.cache.openblock import OpenBlock
from logitcache.cache.outputs import outputs_of
from logitcache.cache.publish import replace_records, write_group_metadata
from logitcache.cache.reader import LogitCache
from logitcache.data.samples import batch_item, input_digest
from logitcache.data.views import proof_rows
from logitcache.digest import array_digest, canonical_json, sha256_hex
from logitcache.encodings import Encoding
from logitcache.errors import IdentityMismatch, IncompleteCache, InvalidLogits, ShapeError, UsageError
from logitcache.storage import Storage

# B batch, C classes, N samples

WRITER_THREADS = 2
BLOCKS_IN_FLIGHT = 4
"""Blocks that wait for a writer thread or are in one: the bound on memory."""


class CacheWriter:
    """Takes logits in any order, commits each block when it is whole, and seals; a context manager.

    Leaving the `with` seals the cache, or raises `IncompleteCache` that says which rows are missing. After an
    exception everything committed so far is kept, and a writer opened again goes on from there. It is made under the
    storage's lock.
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
        """Of the logits; fitted, where it is one that is."""
        self.outputs = outputs_of(manifest.identity)
        """What is written beside the logits, by name."""
        self._encodings = {LOGITS: encoding} | {name: output.encoding for name, output in self.outputs.items()}
        self.committed_blocks: list[Block] = []
        """Blocks committed by this writer, in the order of their receipts."""
        self._receipts = collect_receipts(storage, self.manifest)
        self._open_blocks: dict[Block, OpenBlock] = {}
        self._submitted: set[Block] = set()
        self._lock = threading.Lock()
        self._writing = threading.RLock()
        self._stored_block: tuple[Block, dict[str, dict[str, Tensor]]] | None = None
        """The committed block that rows were compared with last."""
        self._commits: list[Future[None]] = []
        self._slots = threading.BoundedSemaphore(BLOCKS_IN_FLIGHT)
        self._threads = ThreadPoolExecutor(WRITER_THREADS, thread_name_prefix="logitcache-writer")
        write_group_metadata(storage, self.layout)
        if self.manifest.state == "open":
            storage.remove_leftovers()
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
        self,
        *,
        view: int,
        start: int,
        logits: Any,
        outputs: Mapping[str, Any] | None = None,
        inputs: Any = None,
        input_digests: Mapping[int, str] | None = None,
    ) -> None:
        """Store the logits of consecutive rows of one view; several threads may call it.

        Logits are stored up to a constant per row. Rows that were written before are compared with what is stored, up
        to the encoding's loss and other roundings, and are not stored again.

        Args:
            view: 0 <= view < num_views.
            start: the first row.
            logits: (B, C) floats, a tensor on any device or an array; -inf masks a class. Not probabilities.
            outputs: (B, *shape) of each output that the cache has beside the logits, by name.
            inputs: what the teacher was given for these rows, batched; digests of a few rows of each view are kept,
                so that a student can prove that it sees the same. Not for a padded batch, whose padding would count.
            input_digests: these digests by row, where they are known and the inputs are not at hand, or are padded;
                `ViewDataset.input_digests(view)` gives them.

        Raises:
            ShapeError: not (B, C), another shape of an output, or rows beyond the cache.
            UsageError: an output is missing, or one that the cache does not have.
            InvalidLogits: NaN, +inf, or a row of -inf only; probabilities, integers or complex numbers; of another
                output, anything that its encoding can't hold.
            IdentityMismatch: rows that were written before, with other logits or from other inputs.
            StorageError: the store refused an earlier block.
        """
        with self._writing:
            self._write(view, start, logits, outputs or {}, inputs, input_digests or {})

    def _write(
        self,
        view: int,
        start: int,
        logits: Any,
        outputs: Mapping[str, Any],
        inputs: Any,
        input_digests: Mapping[int, str],
    ) -> None:
        self._raise_failed_commit()
        logits_BC = _as_tensor(logits)
        if not logits_BC.is_floating_point():
            raise InvalidLogits(
                f"logits are {logits_BC.dtype}; expected floats, the teacher's output before softmax or arg max"
            )
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
        parts = {LOGITS: logits_BC.detach().float(), **self._flattened(outputs, len(logits_BC))}
        digests = dict(input_digests) | {
            row: input_digest(batch_item(inputs, row - start)).hex()
            for row in (() if inputs is None else proof_rows(self.manifest.identity.view_seed, view, num_samples))
            if start <= row < stop
        }
        row = start
        while row < stop:
            block = Block(view, row // self.layout.rows_per_block)
            rows = block_rows(self.layout, block)
            piece_stop = min(stop, rows.stop)
            piece = {name: part[row - start : piece_stop - start] for name, part in parts.items()}
            inside = {str(r): digest for r, digest in digests.items() if r in rows}
            if block.name in self._receipts or block in self._submitted:
                self._compare(block, row, piece, inside)
            else:
                if block not in self._open_blocks:
                    _refuse_probabilities(piece[LOGITS])
                    self._open_blocks[block] = OpenBlock(
                        block, rows, self._encodings, self.layout, parts, precision=self.manifest.identity.precision
                    )
                opened = self._open_blocks[block]
                opened.fill(row, piece)
                opened.inputs.update(inside)
                if opened.whole:
                    self._submit(self._open_blocks.pop(block))
            row = piece_stop

    def _compare(self, block: Block, start: int, parts: Mapping[str, Tensor], digests: Mapping[str, str]) -> None:
        """Compare rows of a committed block with what it holds.

        Raises:
            IdentityMismatch: they are others.
        """
        if block.name not in self._receipts:
            self.flush()
        first = start - block_rows(self.layout, block).start
        recorded = self._receipts[block.name].inputs
        differing = {int(row) for row, digest in digests.items() if recorded.get(row, digest) != digest}
        what = "from other inputs" if differing else "with other logits"
        for name, encoded in self._stored(block).items():
            values = parts[name]
            rows = {array: stored[first : first + len(values)] for array, stored in encoded.items()}
            differing |= set(
                differing_rows(
                    self._encodings[name].decode(rows, values.shape[1]),
                    values.cpu(),
                    self._encodings[name],
                    self.manifest.identity.precision,
                    view=block.view,
                    rows_B=list(range(start, start + len(values))),
                )
            )
        if differing:
            raise IdentityMismatch(
                f"block {block.name} of {self.storage.url} was written {what}: row {min(differing)} of view "
                f"{block.view} differs from what is written now ({len(differing)} of {len(parts[LOGITS])} rows).\n"
                "Nothing was changed. Choose another path, give this teacher another name, or delete what is there by "
                "`create(..., overwrite=True)`."
            )

    def _stored(self, block: Block) -> dict[str, dict[str, Tensor]]:
        """The encoded rows of a committed block, by output and array."""
        if self._stored_block is None or self._stored_block[0] != block:
            cache = self._written()
            arrays = {name: cache.read_encoded(block.view, [block.number], output=name) for name in self._encodings}
            tensors = {name: {key: torch.from_numpy(a) for key, a in each.items()} for name, each in arrays.items()}
            self._stored_block = block, tensors
        return self._stored_block[1]

    def _flattened(self, outputs: Mapping[str, Any], num_rows: int) -> dict[str, Tensor]:
        """Outputs beside the logits, held to their shapes, as float32 rows (B, D)."""
        if outputs.keys() != self.outputs.keys():
            raise UsageError(
                f"the outputs beside the logits are {', '.join(sorted(outputs)) or 'none'}; this cache has "
                f"{', '.join(self.outputs) or 'none'}: give each of them, by its name"
            )
        flat = {}
        for name, output in self.outputs.items():
            values = torch.as_tensor(outputs[name])
            if tuple(values.shape) != (num_rows, *output.shape):
                raise ShapeError(
                    f"output {name!r} is {tuple(values.shape)}; expected {(num_rows, *output.shape)}, one row for each "
                    "of the logits"
                )
            flat[name] = values.detach().reshape(num_rows, output.num_values).float()
        return flat

    def seal(self) -> Manifest:
        """Wait for every commit, gather the receipts, close the cache for writing, and write its card.

        Another builder of the same cache may have sealed it meanwhile: with these views or more, it is left as it is.

        Raises:
            IncompleteCache: names the first rows that are missing; another builder may have taken back views.
            IdentityMismatch: another cache has been put in its place, or another builder sealed other labels.
        """
        self.flush()
        if self.manifest.state == "open" or self.storage.size(CARD) is None:
            with self.storage.lock():
                self._seal()
        return self.manifest

    def _seal(self) -> None:
        there = stored_manifest(self.storage)
        if there.id != self.manifest.id:
            raise IdentityMismatch(
                f"{self.storage.url} holds another cache by now ({there.id[:12]}…, not {self.manifest.id[:12]}…); "
                "nothing of it was changed. Choose another path, and build again"
            )
        if there.state == "sealed" and set(self.layout.views) <= set(there.layout.views):
            self._compare_sealed(collect_receipts(self.storage, there))
            self.manifest = there
            self._forget_receipts()
            if self.storage.size(CARD) is None:
                self.storage.remove_leftovers()  # of a writer that was killed as it wrote the card
                write_card(LogitCache(self.storage))
            return
        opened = self.manifest.model_copy(update={"state": "open"})
        # What other builders took back is gone, and what they had may be there.
        self._receipts = in_place(self.storage, self.layout, self._receipts)
        if self.missing_blocks():
            self._receipts |= collect_receipts(self.storage, opened)
        missing = self.missing_blocks()
        if missing:
            raise IncompleteCache(self._describe_missing(missing))
        names = [FIXED, *(block.name for block in all_blocks(self.layout))]
        receipts = {name: self._receipts[name] for name in names}
        compact = {name: receipt.model_dump() for name, receipt in receipts.items()}
        gathered = canonical_json(compact)
        changes = {
            "state": "sealed",
            "digest": content_digest(self.manifest, receipts),
            "receipts": sha256_hex(gathered),
            "contents": contents(receipts, fixed=FIXED),
            "provenance": {name: value for name, value in there.provenance.items() if name != "repairing"},
        }
        self.manifest = self.manifest.model_copy(update=changes)
        if there.layout != self.layout:
            write_group_metadata(self.storage, self.layout)
        replace_records(self.storage, self.manifest, gathered, replaces=there)
        self._forget_receipts()
        write_card(self._written())  # last: a cache is whole without it

    def _compare_sealed(self, sealed: Mapping[str, Receipt]) -> None:
        """Compare what this writer committed with what another builder sealed meanwhile.

        Raises:
            IdentityMismatch: they differ, so that objects of the one may lie under receipts of the other.
        """
        for block in self.committed_blocks:
            if self._receipts[block.name].objects != sealed[block.name].objects:
                raise IdentityMismatch(
                    f"{self.storage.url} was sealed by another builder, whose labels differ from this one's in "
                    f"{block.name}: the teacher ran twice, and rounded differently.\nBlocks may be damaged by that: "
                    "`logitcache verify --deep` names them, and `logitcache repair` mends them."
                )

    def _forget_receipts(self) -> None:
        """Remove the receipts that are gathered now."""
        for key in list(self.storage.list_keys("receipts")):
            of_view = re.fullmatch(r"receipts/v(\d+)/.*", key)
            # Those of later views are another builder's, who asked for more and goes on.
            if of_view is None or int(of_view[1]) < self.manifest.layout.num_views:
                self.storage.delete(key)

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

    def _submit(self, opened: OpenBlock) -> None:
        opened.wait_for_device()
        opened.check()
        self._slots.acquire()
        self._submitted.add(opened.block)
        self._commits.append(self._threads.submit(self._commit, opened))

    def _commit(self, opened: OpenBlock) -> None:
        """In a writer thread: the block's objects, then its receipt."""
        try:
            objects = {}
            for name, buffer in opened.buffers().items():
                values = buffer.numpy()
                spec = self.layout.arrays[name]
                data = encode_block(spec, values, self.layout.rows_per_block)
                self.storage.put(block_key(name, spec, opened.block), data)
                objects[name] = _stored_object(data, values)
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
            objects[name] = _stored_object(data, values)
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


def _refuse_probabilities(logits_BC: Tensor) -> None:
    """Softmax outputs are no logits: a loss would apply softmax to them again.

    Raises:
        InvalidLogits: every row is a distribution.
    """
    if len(logits_BC) and bool(((logits_BC.sum(dim=1) - 1).abs() < 1e-3).all()) and bool((logits_BC >= 0).all()):
        raise InvalidLogits(
            "these rows are probabilities: none is negative, and each sums to 1. Pass the logits before softmax, or "
            "`probabilities.log()`. If they are logits after all, add any constant: it changes no distribution"
        )


def _as_tensor(logits: Any) -> Tensor:
    try:
        return torch.as_tensor(logits)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ShapeError(
            f"logits are a {type(logits).__name__}; expected one tensor or array (B, C). Where the teacher returns a "
            "mapping, a tuple or an object, pass the tensor in it, such as `output.logits`"
        ) from error


def _finite(nats: float) -> float | None:
    """A divergence for a receipt; none where classes that the teacher may choose are left out altogether."""
    return nats if math.isfinite(nats) else None


def _stored_object(data: bytes, values: np.ndarray) -> StoredObject:
    return StoredObject(bytes=len(data), sha256=sha256_hex(data), values_sha256=array_digest(values))
