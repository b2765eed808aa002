"""Writes a cache: encodes logits, commits each block when it is complete, and seals.

A block is encoded on the device of its logits, collected in (pinned) host memory, and committed by a writer thread.
Its receipt is written last: a block without a receipt does not count.
"""

from __future__ import annotations

import math
import operator
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from logitcache.cache.agreement import differing_rows
from logitcache.cache.contents import PendingContents, settled_manifest, settled_samples
from logitcache.cache.layout import (
    PER_CACHE,
    Block,
    encode_object,
    num_blocks,
    object_key,
    receipt_key,
)
from logitcache.cache.manifest import (
    CARD,
    LOGITS,
    MAX_RECEIPT_BYTES,
    RECEIPTS,
    SAMPLE_CONTENTS,
    Manifest,
    Receipt,
    StoredObject,
    dump,
    read_receipt,
)
from logitcache.cache.objects import ObjectReader
from logitcache.cache.openblock import HIGHER_TEMPERATURES, OpenBlock
from logitcache.cache.outputs import Output, OutputLayout, output_layouts, outputs_of
from logitcache.cache.per_cache import stored_samples
from logitcache.cache.reader import LogitCache
from logitcache.cache.records import Records
from logitcache.cache.stored_records import (
    collect_receipts,
    replace_records,
    stored_manifest,
    view_of_receipts_key,
    write_group_metadata,
)
from logitcache.cache.written_receipts import WrittenReceipts
from logitcache.data.rows import RowMap
from logitcache.data.samples import SeenContents, batch_item, input_digest
from logitcache.data.views import proof_rows
from logitcache.digest import array_digest, sha256_hex
from logitcache.encodings import Encoding
from logitcache.errors import CorruptCache, IdentityMismatch, IncompleteCache, InvalidLogits, ShapeError, UsageError
from logitcache.storage import Storage
from logitcache.storage.claims import remove_claims
from logitcache.targets import row_slices

# B batch, C classes, N samples

CPU = torch.device("cpu")
WRITER_THREADS = 2
BLOCKS_IN_FLIGHT = 4
"""Blocks that wait for a writer thread or are being written: bounds the memory."""
SHOWN_MISSING = 5
"""Missing blocks that an error message lists."""


class CacheWriter:
    """Takes logits in any order, commits each block when it is complete, and seals. A context manager.

    Leaving the `with` block seals the cache, or raises `IncompleteCache` with the rows that are missing. After an
    exception everything that was committed is kept, and a new writer resumes there.

    Args:
        storage: where the cache is; the caller holds its lock.
        manifest: as it is stored.
        encoding: of the logits, fitted.
        rows: which rows belong to which sample.
        per_cache: the per-cache arrays, by name; written unless they are stored already.
        write_card: writes the card of a sealed cache that has none; called under the storage's lock.
        seen: takes the content digests of the samples, if the manifest has `contents_pending`.
        outputs: the other outputs with fitted encodings; by default as the manifest describes them.
    """

    def __init__(
        self,
        storage: Storage,
        manifest: Manifest,
        encoding: Encoding,
        *,
        rows: RowMap,
        per_cache: Mapping[str, np.ndarray],
        write_card: Callable[[LogitCache], None],
        seen: SeenContents | None = None,
        outputs: Mapping[str, Output] | None = None,
    ) -> None:
        self.storage = storage
        self.manifest = manifest
        self.layout = manifest.layout
        self.row_map = rows
        """Which rows belong to which sample and block."""
        self.encoding = encoding
        """Of the logits, fitted."""
        self.outputs = outputs_of(manifest.identity) if outputs is None else dict(sorted(outputs.items()))
        """The outputs that are written in addition to the logits, by name."""
        self.committed_blocks: list[Block] = []
        """Blocks committed by this writer, in the order of their receipts."""
        self._write_card = write_card
        self._output_layouts = output_layouts(encoding, self.layout.num_classes, self.outputs)
        self._pending: PendingContents | None = None
        if manifest.contents_pending:
            seen = seen or SeenContents(rows.num_samples)
            self._pending = PendingContents(storage, rows, len(self.layout.views), seen)
            self._pending.resume()
        self._receipts = WrittenReceipts(storage, manifest)
        self._open_blocks: dict[Block, OpenBlock] = {}
        self._submitted: set[Block] = set()
        self._lock = threading.Lock()
        self._writing = threading.RLock()
        self._settled_ids: set[str] = set()
        """Final ids of this cache, while its own is provisional."""
        self._stored_block: tuple[Block, dict[str, dict[str, Tensor]]] | None = None
        """The committed block that rows were compared with last."""
        self._commits: list[Future[None]] = []
        self._slots = threading.BoundedSemaphore(BLOCKS_IN_FLIGHT)
        self._threads = ThreadPoolExecutor(WRITER_THREADS, thread_name_prefix="logitcache-writer")
        write_group_metadata(storage, self.layout)
        if manifest.state == "open":
            storage.remove_leftovers()
            if PER_CACHE not in self._receipts:
                fitted = any(output.fixed_names() for output in self._output_layouts.values())
                if fitted and self._receipts:  # only what was seen under the lock
                    self._discard_blocks()
                self._receipts.add(PER_CACHE, self._store(PER_CACHE, self._encoded(PER_CACHE, per_cache)))

    def _discard_blocks(self) -> None:
        """Blocks are useless without the arrays that the encoding was fitted to: they are computed again."""
        for key in [*self.storage.list_keys("receipts"), RECEIPTS]:
            self.storage.delete(key)
        self._receipts.clear()

    def missing_blocks(self, *, refresh: bool = False) -> list[Block]:
        """The blocks that have no valid receipt, view by view.

        Args:
            refresh: read the receipts again, to see what other writers have committed since this one was opened.
        """
        if refresh:
            self.flush()
            self._receipts = WrittenReceipts(self.storage, self.manifest, self._stored_receipts())
        return list(self._receipts.missing())

    def _stored_receipts(self) -> Mapping[str, Receipt]:
        there = self._manifest_there()
        while True:
            receipts = collect_receipts(self.storage, there)
            # Another writer that seals deletes receipts while they are read here.
            before, there = there, self._manifest_there()
            if (before.state, before.layout) == (there.state, there.layout):
                return receipts

    def is_committed(self, block: Block, *, refresh: bool = False) -> bool:
        """Whether a block has a valid receipt.

        Args:
            block: of this cache.
            refresh: look at the store, for a block that another writer may have committed.
        """
        return block.name in self._receipts or (refresh and self._receipt_of_another(block) is not None)

    def write(
        self,
        *,
        view: int,
        start: int,
        logits: Any = None,
        outputs: Mapping[str, Any] | None = None,
        inputs: Any = None,
        input_digests: Mapping[int, str] | None = None,
    ) -> None:
        """Store the logits of consecutive rows of one view; several threads may call it.

        Logits are stored up to a constant per row. Rows that were written before are not stored again, but compared
        with the stored ones, within the encoding's loss and rounding.

        Args:
            view: 0 <= view < num_views.
            start: number of the first row; `row_map.sample_rows(i).start` is that of sample i.
            logits: (B, C) floats, a tensor on any device or an array; -inf masks a class. Not probabilities. None for
                a cache without logits.
            outputs: (B, *shape) of each extra output of the cache, by name.
            inputs: the teacher's batched inputs, one for each sample whose first row is among these rows. Digests of a
                few samples of each view are stored, against which a student checks its own views. Don't pass a padded
                batch: the digests would include the padding.
            input_digests: these digests by sample, for padded inputs or where the inputs are not available;
                `ViewDataset.input_digests(view)` computes them.

        Raises:
            ShapeError: not (B, C), another shape of an output, or rows beyond the cache.
            UsageError: an output is missing, or is not one of the cache.
            InvalidLogits: NaN, +inf, or a row of -inf only; probabilities, integers or complex numbers; for additional
                outputs, values that the encoding can't store.
            IdentityMismatch: rows were written before with other logits or inputs.
            StorageError: an earlier block could not be written.
        """
        if not self.has_logits:
            logits = self._in_place_of_logits(logits, outputs or {})
        elif logits is None:
            raise UsageError("the logits are missing; only caches that were created with num_classes=0 have none")
        logits_BC = _as_tensor(logits)
        if not logits_BC.is_floating_point():
            raise InvalidLogits(
                f"logits are {logits_BC.dtype}; expected floats, the teacher's output before softmax or arg max"
            )
        num_classes = self.layout.num_classes
        if logits_BC.ndim != 2 or logits_BC.shape[1] != num_classes:
            raise ShapeError(
                f"the teacher's output is {tuple(logits_BC.shape)}; expected (B, {num_classes}): one logit for each of "
                f"the {num_classes} classes of the cache"
            )
        parts = {LOGITS: logits_BC.detach().float(), **self._flattened(outputs or {}, len(logits_BC))}
        tolerance = SUM_TOLERANCE.get(logits_BC.dtype, 1e-3)

        def fill(opened: OpenBlock, row: int, piece: Mapping[str, Tensor]) -> None:
            if not opened.filled.any():
                _refuse_probabilities(piece[LOGITS], tolerance)
            opened.fill(row, piece)

        with self._writing:
            self._write(view, start, parts, fill, self._compare, inputs, input_digests or {})

    @property
    def has_logits(self) -> bool:
        """Whether logits are stored, and not only other outputs."""
        return self.manifest.identity.has_logits

    def _in_place_of_logits(self, logits: Any, outputs: Mapping[str, Any]) -> Tensor:
        """Zeros (B, C) that take no memory, on the device of the outputs."""
        if logits is not None:
            raise UsageError(
                f"this cache has no logits; leave them out, and pass only outputs: {', '.join(self.outputs)}"
            )
        first = torch.as_tensor(next(iter(outputs.values()), ()))
        num_rows = len(first) if first.ndim else 0
        return torch.zeros(1, 1, device=first.device).expand(num_rows, self.layout.num_classes)

    def write_sparse(
        self,
        *,
        view: int,
        start: int,
        ids: Any,
        log_probs: Any,
        outputs: Mapping[str, Any] | None = None,
        inputs: Any = None,
        input_digests: Mapping[int, str] | None = None,
    ) -> None:
        """Store consecutive rows of which only some log-probabilities are known, as serving engines return them.

        What the entries lack of a mass of 1 belongs to the other classes, evenly. The cache has the encoding `TopK` or
        `PackedTopK`. Receipts then state no KL, since the teacher's other probabilities are not known.

        Args:
            view, start, outputs, inputs, input_digests: as in `write`.
            ids: int (B, K): classes, in any order; -1 marks an unused entry.
            log_probs: float (B, K): their log-probabilities at T = 1.

        Raises:
            ShapeError: not (B, K), or rows beyond the cache.
            UsageError: the cache has another encoding or other outputs.
            InvalidLogits: a row is not part of a distribution; names it.
            IdentityMismatch: rows were written before with other values.
            StorageError: an earlier block could not be written.
        """
        if not self.has_logits:
            raise UsageError("this cache has no logits; use `write` with `outputs` only")
        num_classes = self.layout.num_classes
        ids_BK, log_probs_BK = _as_entries("ids", ids), _as_entries("log_probs", log_probs).detach()
        encoded = self.encoding.encode_sparse(ids_BK, log_probs_BK, num_classes, start=start)
        others = self._flattened(outputs or {}, len(ids_BK))
        # No array of an encoding has a name with a slash.
        parts = encoded | {f"output/{name}": values for name, values in others.items()}

        def divided(piece: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
            return {name: piece[name] for name in encoded}, {name: piece[f"output/{name}"] for name in others}

        def fill(opened: OpenBlock, row: int, piece: Mapping[str, Tensor]) -> None:
            opened.fill_encoded(row, *divided(piece))

        def compare(block: Block, row: int, piece: Mapping[str, Tensor], digests: Mapping[str, str]) -> None:
            entries, values = divided(piece)
            for part in row_slices(len(next(iter(entries.values()))), num_classes, CPU):
                logits = self.encoding.decode({name: each[part] for name, each in entries.items()}, num_classes)
                outputs_here = {name: each[part] for name, each in values.items()}
                self._compare(block, row + part.start, {LOGITS: logits} | outputs_here, digests)

        with self._writing:
            self._write(view, start, parts, fill, compare, inputs, input_digests or {})

    def _write(
        self,
        view: int,
        start: int,
        parts: Mapping[str, Tensor],
        fill: Callable[[OpenBlock, int, Mapping[str, Tensor]], None],
        compare: Callable[[Block, int, Mapping[str, Tensor], Mapping[str, str]], None],
        inputs: Any,
        input_digests: Mapping[int, str],
    ) -> None:
        """Give each block its part of some rows: tensors (B, ...) by output, or by array."""
        self._raise_failed_commit()
        view, start = _whole_number("view", view), _whole_number("start", start)
        stop = start + len(next(iter(parts.values())))
        if not 0 <= view < self.layout.num_views or start < 0 or stop > self.row_map.num_rows:
            starts_inside = 0 <= view < self.layout.num_views and 0 <= start < self.row_map.num_rows
            hint = self.row_map.overlap_hint(self.row_map.num_rows) if starts_inside else ""
            raise ShapeError(
                f"rows {start} to {max(start, stop - 1)} of view {view} lie outside the cache, which has the rows 0 to "
                f"{self.row_map.num_rows - 1} of {self.layout.num_views} view{'s' * (self.layout.num_views > 1)} "
                f"(numbered from 0){hint}"
            )
        samples = self.row_map.samples_starting(start, stop)
        self._check_number_of_inputs(inputs, samples)
        digests = dict(input_digests) | {
            sample: input_digest(batch_item(inputs, sample - samples.start)).hex()
            for sample in (() if inputs is None else self._proof_samples(view))
            if sample in samples
        }
        row = start
        while row < stop:
            block = Block(view, int(self.row_map.blocks_of(row)))
            rows = self.row_map.block_rows(block.number)
            piece_stop = min(stop, rows.stop)
            piece = {name: part[row - start : piece_stop - start] for name, part in parts.items()}
            of_block = self.row_map.block_samples(block.number)
            inside = {str(sample): digest for sample, digest in digests.items() if sample in of_block}
            if block.name in self._receipts or block in self._submitted:
                compare(block, row, piece, inside)
            else:
                opened = self._open_blocks.get(block) or OpenBlock(
                    block,
                    self.row_map,
                    self._output_layouts,
                    self.layout,
                    device=next(iter(parts.values())).device,
                    precision=self.manifest.identity.precision,
                )
                fill(opened, row, piece)
                self._open_blocks[block] = opened
                opened.inputs.update(inside)
                if opened.complete:
                    self._submit(self._open_blocks.pop(block))
            row = piece_stop

    def _check_number_of_inputs(self, inputs: Any, samples: range) -> None:
        if not isinstance(inputs, Tensor | np.ndarray) or len(inputs) == len(samples):
            return
        if self.row_map.one_each:
            raise ShapeError(f"{len(inputs)} inputs for {len(samples)} rows of logits; expected one input for each row")
        raise ShapeError(
            f"{len(inputs)} inputs for rows in which {len(samples)} samples start; expected a batch with one input for "
            "each of these samples, such as `ids[None]` for one sequence"
        )

    def _proof_samples(self, view: int) -> tuple[int, ...]:
        """The samples of a view whose input digests are stored."""
        return proof_rows(self.manifest.identity.view_seed, view, self.layout.num_samples)

    def _compare(self, block: Block, start: int, parts: Mapping[str, Tensor], digests: Mapping[str, str]) -> None:
        """Compare rows with those of a committed block.

        Raises:
            IdentityMismatch: they differ.
        """
        if block.name not in self._receipts:
            self.flush()
        first = start - self.row_map.block_rows(block.number).start
        recorded = self._receipts[block.name].inputs
        differing = {int(row) for row, digest in digests.items() if recorded.get(row, digest) != digest}
        what = "from other inputs" if differing else "with other logits"
        for name, encoded in self._stored(block).items():
            values = parts[name]
            encoding = self._output_layouts[name].encoding
            for part in row_slices(len(values), values.shape[1], CPU):
                rows = {array: stored[first + part.start : first + part.stop] for array, stored in encoded.items()}
                differing |= set(
                    differing_rows(
                        encoding.decode(rows, values.shape[1]),
                        values[part].cpu(),
                        encoding,
                        self.manifest.identity.precision,
                        view=block.view,
                        rows_B=list(range(start + part.start, start + part.stop)),
                    )
                )
        if differing:
            raise self._written_before(block, min(differing), what)

    def _stored(self, block: Block) -> dict[str, dict[str, Tensor]]:
        """The encoded rows of a committed block, by output and array."""
        if self._stored_block is None or self._stored_block[0] != block:
            cache = self._cache()
            arrays = {
                name: cache.read_encoded(block.view, [block.number], output=name) for name in self._output_layouts
            }
            tensors = {name: {key: torch.from_numpy(a) for key, a in each.items()} for name, each in arrays.items()}
            self._stored_block = block, tensors
        return self._stored_block[1]

    def _flattened(self, outputs: Mapping[str, Any], num_rows: int) -> dict[str, Tensor]:
        """The extra outputs, with their shapes checked, as float32 rows (B, D)."""
        if outputs.keys() != self.outputs.keys():
            raise UsageError(
                f"the extra outputs are {', '.join(sorted(outputs)) or 'none'}; expected those of this cache, by "
                f"name: {', '.join(self.outputs) or 'none'}"
            )
        flat = {}
        for name, output in self.outputs.items():
            values = torch.as_tensor(outputs[name])
            if tuple(values.shape) != (num_rows, *output.shape):
                raise ShapeError(
                    f"output {name!r} is {tuple(values.shape)}; expected {(num_rows, *output.shape)}, one row for each "
                    "row of logits"
                )
            flat[name] = values.detach().reshape(num_rows, output.num_values).float()
        return flat

    def seal(self) -> Manifest:
        """Wait for every commit, then replace the receipts by one file and close the cache for writing.

        If another writer sealed the cache meanwhile, with these views or more, its records are kept.

        Raises:
            IncompleteCache: rows are missing; another writer may have removed views.
            IdentityMismatch: the path holds another cache by now, or another writer sealed other labels.
        """
        self.flush()
        if self.manifest.state == "open" or self.storage.size(CARD) is None:
            with self.storage.lock():
                if self.manifest.state == "open":
                    self._seal_records()
                if self.storage.size(CARD) is None:
                    self.storage.remove_leftovers()  # of a writer that was killed while it wrote the card
                    self._write_card(self._cache())
        return self.manifest

    def _seal_records(self) -> None:
        there = self._manifest_there()
        if self._pending is not None:
            self._settle_contents(self._pending, there)
        if there.state == "sealed" and set(self.layout.views) <= set(there.layout.views):
            self._compare_sealed(collect_receipts(self.storage, there))
            self.manifest, self._receipts = there, WrittenReceipts(self.storage, there)
            self._delete_receipts(Records(there, self._receipts.stored))
            return
        # Other writers may have removed blocks of this cache, and added others.
        self._receipts.read_again()
        missing = self.missing_blocks()
        if missing:
            raise IncompleteCache(self._describe_missing(missing))
        provenance = {name: value for name, value in there.provenance.items() if name != "repairing"}
        complete = Records(self.manifest, self._receipts.complete())
        records, gathered = complete.sealed(put=self.storage.put, provenance=provenance)
        if records.contents().rows != len(self.layout.views) * self.row_map.num_rows:
            self._receipts.read_again(count=True)  # of a large cache: receipts that were there before are gone
            raise IncompleteCache(self._describe_missing(self.missing_blocks()))
        self.manifest = records.manifest
        self.storage.delete(CARD)  # it describes the records that are replaced; a missing card is written again
        if there.layout != self.layout:
            write_group_metadata(self.storage, self.layout)
        replace_records(self.storage, self.manifest, gathered, replaces=there)
        self._delete_receipts(records)
        if records.manifest.receipts_by_view:  # they were read from the receipts that are deleted now
            self._receipts = WrittenReceipts(self.storage, self.manifest)

    def _settle_contents(self, pending: PendingContents, there: Manifest) -> None:
        """Add the digests of all samples to the per-cache arrays, and the dataset's fingerprint to the identity.

        Raises:
            IncompleteCache: blocks, and so digests, are missing.
            SampleMismatch: another writer has sealed the cache with other digests.
        """
        if there.contents_pending:
            missing = self.missing_blocks(refresh=True) if self.missing_blocks() else []
            if missing:
                raise IncompleteCache(self._describe_missing(missing))
            samples = stored_samples(Records(self.manifest, self._receipts.snapshot({})), ObjectReader(self.storage))
            assert samples is not None
            contents = pending.table()
            self.manifest = settled_manifest(self.manifest, replace(samples, contents=contents))
            self.layout = self.manifest.layout
            encoded = self._encoded(PER_CACHE, {SAMPLE_CONTENTS: contents})
            for array, (data, _) in encoded.items():
                self.storage.put(object_key(self.layout, PER_CACHE, array), data)
            stored = self._receipts[PER_CACHE]
            objects = stored.objects | {array: each for array, (_, each) in encoded.items()}
            receipt = stored.model_copy(update={"objects": objects})
        else:  # another writer has sealed it
            samples = settled_samples(self.storage, there, self.manifest.identity)
            assert samples is not None
            assert samples.contents is not None
            pending.compare(samples.contents)
            self.manifest = settled_manifest(self.manifest, samples)
            self.layout = self.manifest.layout
            receipt = collect_receipts(self.storage, there)[PER_CACHE]
        self._receipts.settle(self.manifest, receipt)
        self._pending = None

    def _compare_sealed(self, sealed: Mapping[str, Receipt]) -> None:
        """Compare the blocks of this writer with those that another writer sealed.

        Raises:
            IdentityMismatch: they differ, so the objects of one may lie under the receipts of the other.
        """
        for block in self.committed_blocks:
            if self._receipts[block.name].objects != sealed[block.name].objects:
                raise IdentityMismatch(
                    f"{self.storage.url} was sealed by another writer, whose labels in {block.name} differ from this "
                    "one's: the teacher ran twice, with different rounding.\nBlocks may be damaged: "
                    "`logitcache verify --deep` lists them, and `logitcache repair` restores them."
                )

    def _delete_receipts(self, records: Records) -> None:
        """Delete the receipts of single blocks, which are gathered now, and the claims of workers."""
        remove_claims(self.storage)
        kept = records.view_receipts_keys()
        for key in list(self.storage.list_keys("receipts")):
            view = view_of_receipts_key(key)
            # Receipts of later views belong to a writer that adds views and is not finished.
            if key not in kept and (view is None or view < self.manifest.layout.num_views):
                self.storage.delete(key)

    def _cache(self, others: Mapping[str, Receipt] | None = None) -> LogitCache:
        """The cache with the records of this writer, which those in the storage may differ from.

        Args:
            others: receipts that replace those of this writer.
        """
        return LogitCache(self.storage, records=Records(self.manifest, self._receipts.snapshot(others or {})))

    def flush(self) -> None:
        """Wait until every complete block is committed; raises the first error of a writer thread."""
        for commit in self._commits:
            commit.exception()
        self._raise_failed_commit()

    def close(self) -> None:
        """Finish running commits and stop the writer threads, without sealing."""
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
        """Write a block, unless another writer has committed it; runs in a writer thread.

        Raises:
            IdentityMismatch: another writer has committed the block with other values; they stay.
        """
        block = opened.block
        try:
            kl = opened.kl.double()
            arrays = {name: buffer.numpy() for name, buffer in opened.buffers().items()}
            objects = self._encoded(block.name, arrays)
            # Compared and written under one lock: objects of two teachers must not end up under one receipt.
            with self.storage.lock():
                receipt = self._receipt_of_another(block)
                if self._pending is not None:
                    self._pending.store(block.number)
                if receipt is None:
                    receipt = self._store(
                        block.name,
                        objects,
                        kl_mean=_finite(float(kl.mean())),
                        kl_max=_finite(float(kl.max())) if len(kl) else None,
                        kl_at=_means(opened.kl_at.double()),
                        inputs=opened.inputs,
                    )
                    self.committed_blocks.append(block)
            if receipt.objects.keys() != objects.keys() or any(
                receipt.objects[name].values_sha256 != stored.values_sha256 for name, (_, stored) in objects.items()
            ):
                self._compare_with_another(block, receipt, arrays)
            with self._lock:
                self._receipts.add(block.name, receipt)
                self._submitted.discard(block)
        finally:
            self._slots.release()

    def _manifest_there(self) -> Manifest:
        """The manifest as it is stored by now.

        Raises:
            IdentityMismatch: it is another cache's.
        """
        there = stored_manifest(self.storage)
        if there.id != self.manifest.id and not self._is_settled(there):
            raise IdentityMismatch(
                f"{self.storage.url} holds another cache by now ({there.id[:12]}…, not {self.manifest.id[:12]}…); "
                "nothing of it was changed. Choose another path, and build again"
            )
        return there

    def _is_settled(self, there: Manifest) -> bool:
        """Whether a stored manifest is that of this cache, after another writer has sealed it with its final id."""
        if self._pending is None:
            return False
        if there.id not in self._settled_ids and settled_samples(self.storage, there, self.manifest.identity):
            self._settled_ids.add(there.id)
        return there.id in self._settled_ids

    def _receipt_of_another(self, block: Block) -> Receipt | None:
        """The receipt of a block that another writer has committed since this one began; call it under the lock.

        Raises:
            IdentityMismatch: another cache is there by now.
        """
        there = self._manifest_there()
        if (there.state, there.layout) != (self.manifest.state, self.manifest.layout):  # sealed or grown meanwhile
            return collect_receipts(self.storage, there).get(block.name)
        data = self.storage.get(receipt_key(block.name), limit=MAX_RECEIPT_BYTES)
        if data is None:
            return None
        with suppress(CorruptCache):
            receipt = read_receipt(data, key=receipt_key(block.name))
            sizes = {name: self.storage.size(object_key(self.layout, block.name, name)) for name in receipt.objects}
            if sizes == {name: stored.bytes for name, stored in receipt.objects.items()}:
                return receipt
        return None  # damaged, or without its objects: written again

    def _compare_with_another(self, block: Block, receipt: Receipt, arrays: Mapping[str, np.ndarray]) -> None:
        """Compare the values of a block with those that another writer has committed: other roundings are the same.

        Raises:
            IdentityMismatch: they differ.
        """
        cache = self._cache({block.name: receipt})
        rows = self.row_map.block_rows(block.number)
        for name, layout in self._output_layouts.items():
            stored = cache.read_encoded(block.view, [block.number], output=name)
            ours = layout.encoded(arrays)

            def decoded(encoded: Mapping[str, np.ndarray], part: slice, layout: OutputLayout = layout) -> Tensor:
                tensors = {array: torch.from_numpy(values[part]) for array, values in encoded.items()}
                return layout.encoding.decode(tensors, layout.num_values)

            for part in row_slices(len(rows), layout.num_values, CPU):
                differing = differing_rows(
                    decoded(stored, part),
                    decoded(ours, part),
                    layout.encoding,
                    self.manifest.identity.precision,
                    view=block.view,
                    rows_B=list(rows[part]),
                )
                if differing:
                    raise self._written_before(block, differing[0], "with other logits by another writer")

    def _written_before(self, block: Block, row: int, what: str) -> IdentityMismatch:
        return IdentityMismatch(
            f"block {block.name} of {self.storage.url} was written {what}: row {row} of view {block.view} differs from "
            "what is written now.\nNothing was changed. Choose another path, give this teacher another name, or "
            "replace the cache with `create(..., overwrite=True)`." + self.row_map.overlap_hint(row)
        )

    def _encoded(self, name: str, arrays: Mapping[str, np.ndarray]) -> dict[str, tuple[bytes, StoredObject]]:
        """The objects of a receipt, by array."""
        objects = {}
        for array, values in arrays.items():
            data = encode_object(self.layout, name, array, values)
            stored = StoredObject(bytes=len(data), sha256=sha256_hex(data), values_sha256=array_digest(values))
            objects[array] = data, stored
        return objects

    def _store(
        self,
        name: str,
        objects: Mapping[str, tuple[bytes, StoredObject]],
        *,
        kl_mean: float | None = None,
        kl_max: float | None = None,
        kl_at: Mapping[str, float] | None = None,
        inputs: Mapping[str, str] | None = None,
    ) -> Receipt:
        """Write the objects of a receipt, and the receipt last: a block without a receipt does not count."""
        for array, (data, _) in objects.items():
            self.storage.put(object_key(self.layout, name, array), data)
        receipt = Receipt(
            rows=self.layout.num_samples if name == PER_CACHE else self._num_rows(name),
            objects={array: stored for array, (_, stored) in objects.items()},
            kl_mean=kl_mean,
            kl_max=kl_max,
            kl_at=dict(kl_at or {}),
            inputs=dict(inputs or {}),
        )
        self.storage.put(receipt_key(name), dump(receipt))
        return receipt

    def _num_rows(self, name: str) -> int:
        return len(self.row_map.block_rows(Block.from_name(name).number))

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
        for block in missing[:SHOWN_MISSING]:
            opened = self._open_blocks.get(block)
            rows = self.row_map.block_rows(block.number)
            if opened is None:
                lines.append(f"view {block.view}: rows {rows.start} to {rows.stop - 1}")
            else:
                absent = rows.start + np.flatnonzero(~opened.filled)
                lines.append(f"view {block.view}: {len(absent)} rows from {absent[0]} to {absent[-1]}")
        if len(missing) > SHOWN_MISSING:
            lines.append(f"and {len(missing) - SHOWN_MISSING} more blocks")
        return (
            f"{self.storage.url} is not complete: {len(missing)} of {num_blocks(self.layout)} blocks are missing.\n  "
            + "\n  ".join(lines)
            + "\nComplete blocks are kept. Run the program again to write the missing ones (`writer.missing_blocks()`)."
        )


SUM_TOLERANCE = {torch.bfloat16: 3e-2, torch.float16: 1e-2}
"""By which a row of probabilities may miss a sum of 1; 1e-3 in other types."""


def _refuse_probabilities(logits_BC: Tensor, tolerance: float) -> None:
    """Refuse softmax outputs, to which a loss would apply softmax again.

    Raises:
        InvalidLogits: every row is a distribution.
    """
    if len(logits_BC) and bool(((logits_BC.sum(dim=1) - 1).abs() < tolerance).all()) and bool((logits_BC >= 0).all()):
        raise InvalidLogits(
            "these rows are probabilities: no value is negative, and each row sums to 1. Pass the logits before "
            "softmax, or `probabilities.log()`. If they are logits, add any constant: softmax ignores it"
        )


def _whole_number(name: str, value: Any) -> int:
    try:
        return operator.index(value)
    except TypeError:
        raise UsageError(f"{name} is {value!r}; expected a whole number") from None


def _as_tensor(logits: Any) -> Tensor:
    try:
        return torch.as_tensor(logits)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ShapeError(
            f"logits are a {type(logits).__name__}; expected one tensor or array (B, C). If the teacher returns a "
            "mapping, a tuple or an object, pass its tensor of logits, such as `output.logits`"
        ) from error


def _as_entries(name: str, values: Any) -> Tensor:
    try:
        return torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ShapeError(
            f"{name} is a {type(values).__name__} that makes no tensor ({error}); expected (B, K). If rows have "
            "different numbers of entries, fill the unused places with the id -1"
        ) from error


def _finite(nats: float) -> float | None:
    """A divergence for a receipt; None where it is infinite, since the encoding leaves classes out."""
    return nats if math.isfinite(nats) else None


def _means(kl_TB: Tensor) -> dict[str, float]:
    """Mean divergences by temperature, over the measured rows; none that is infinite or of no row."""
    means = dict(zip(map("{:g}".format, HIGHER_TEMPERATURES), kl_TB.nanmean(dim=1).tolist(), strict=True))
    return {temperature: mean for temperature, mean in means.items() if math.isfinite(mean)}
