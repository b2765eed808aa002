"""An open cache: whole views in memory, or block by block where a view exceeds the memory budget.

Nothing is ever read row by row. Every object is checked against its receipt when it is read.
"""

from __future__ import annotations

import functools
import math
import os
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from typing import Any

import numpy as np
import torch

from logitcache.cache.labelview import ResidentView, StreamedView, View, ViewOfOutputs, no_output
from logitcache.cache.layout import Block, block_rows, blocks_per_view, decode_rows
from logitcache.cache.manifest import LOGITS, Contents
from logitcache.cache.objects import ObjectReader, Wanted
from logitcache.cache.outputs import output_layouts, outputs_of
from logitcache.cache.per_cache import stored_encoding, stored_samples
from logitcache.cache.records import Records, description, read_records
from logitcache.cache.rendering import check_arrived, check_rendered, recorded_digests, recorded_plan
from logitcache.data.index import split_index
from logitcache.data.samples import SampleTable
from logitcache.data.views import ViewDataset, ViewPlan
from logitcache.encodings import Encoding, encoding_from_config
from logitcache.errors import REBUILD, CorruptCache, IdentityMismatch, IncompleteCache, UsageError
from logitcache.storage import Storage, open_storage
from logitcache.storage.blockdir import shared_block_directory

# B batch, C classes, N samples, V views

RESIDENT_BYTES = 2**32
"""Encoded labels that `cache.logits` keeps in memory, by default."""


def open_cache(location: str | os.PathLike[str], *, trust: bool = False) -> LogitCache:
    """Open a cache: checks manifest and receipts, reads no labels.

    Args:
        location: a directory, or a `file://`, `s3://`, `gs://`, `az://` or `https://` URL. What is read from a remote
            one is kept in a local directory (`~/.cache/logitcache`, moved by `LOGITCACHE_CACHE_DIR`; at most
            `LOGITCACHE_CACHE_GB`, 50 by default), and the view after the one that is asked for comes meanwhile.
        trust: allow `view_plan` to run the `package.module:function` transforms that the cache names, wherever they
            lie.

    Raises:
        NotACache: no cache there.
        UnsupportedFormat: written by a newer version.
        CorruptCache: manifest and receipts contradict each other.
        StorageError: the store refuses, or can't be reached.
    """
    return LogitCache(open_storage(location), trust=trust)


class LogitCache:
    """The labels of one teacher over views of one dataset.

    Args:
        storage: where it lies.
        trust: see `open_cache`.
        records: manifest and receipts, where they are known already; read from the storage if None.
    """

    def __init__(
        self,
        storage: Storage,
        *,
        trust: bool = False,
        records: Records | None = None,
    ) -> None:
        self.storage = storage
        self.objects = ObjectReader(storage, shared_block_directory() if storage.is_remote else None)
        self.records = read_records(storage, self.objects) if records is None else records
        self.manifest, self.receipts = self.records.manifest, self.records.receipts
        self.layout = self.manifest.layout
        self.encoding: Encoding = encoding_from_config(self.manifest.identity.encoding)
        """Of the logits."""
        self.others = outputs_of(self.manifest.identity)
        """What is held beside the logits: shape, encoding and source by name."""
        self._output_layouts = output_layouts(self.encoding, self.num_classes, self.others)
        self.trust = trust
        self._loader: ThreadPoolExecutor | None = None
        self._loading: dict[tuple[int, str, str], Future[View]] = {}
        self._kept: OrderedDict[tuple[int, str, int], View] = OrderedDict()
        self._plans: list[ViewPlan] = []
        """Those of this cache's views whose datasets `check_batch` may render from."""
        self._process = os.getpid()
        if self.sealed and self.records.content_digest() != self.manifest.digest:
            raise CorruptCache(
                f"{storage.url}: the receipts don't add up to the manifest's digest; run `logitcache verify` on it"
            )

    @property
    def id(self) -> str:
        """SHA-256 of the identity."""
        return self.manifest.id

    @property
    def digest(self) -> str | None:
        """SHA-256 of the content; None until sealed."""
        return self.manifest.digest

    @property
    def pin(self) -> str | None:
        """What `pull --expect` is best given: the digest, or in format 1 its stronger form; None until sealed."""
        return self.records.pin() if self.sealed else None

    @property
    def sealed(self) -> bool:
        """Whether every block is there."""
        return self.manifest.state == "sealed"

    @property
    def num_samples(self) -> int:
        """N."""
        return self.layout.num_samples

    @property
    def num_views(self) -> int:
        """V."""
        return self.layout.num_views

    @property
    def views(self) -> range:
        """The views that are held: all of them, but in a copy that was made of some."""
        return self.layout.views

    @property
    def num_classes(self) -> int:
        """C."""
        return self.layout.num_classes

    @property
    def outputs(self) -> dict[str, tuple[int, ...]]:
        """What is held of the teacher, `logits` first: the shape of each output for one sample."""
        return {name: output.shape for name, output in self._output_layouts.items()}

    @cached_property
    def contents(self) -> Contents:
        """Sizes and fidelity of all that is there."""
        return self.records.contents()

    @property
    def stored_bytes(self) -> int:
        """Size of all stored objects that have receipts."""
        return self.contents.bytes

    @property
    def label_bytes(self) -> int:
        """Size of the labels alone, all outputs, without what is stored once."""
        return self.contents.label_bytes

    @property
    def kl_mean(self) -> float | None:
        """KL(teacher ‖ decoded) of the logits at T = 1, in nats, over all rows that are there."""
        return self.contents.kl_mean

    @property
    def view_bytes(self) -> int:
        """Memory of the logits of one resident view."""
        return self._memory([LOGITS])

    def _memory(self, outputs: Iterable[str]) -> int:
        specs = [spec for name in outputs for spec in self._output_layouts[name].stored(self.layout.arrays).values()]
        return self.num_samples * sum(np.dtype(spec.dtype).itemsize * math.prod(spec.row_shape) for spec in specs)

    @cached_property
    def samples(self) -> SampleTable | None:
        """Keys, targets and content digests of the samples; None where the cache was created without.

        Raises:
            CorruptCache: the table is damaged.
        """
        return stored_samples(self.records, self.objects)

    @cached_property
    def _fitted_encoding(self) -> Encoding:
        return stored_encoding(self.records, self.objects)

    @cached_property
    def view_plan(self) -> ViewPlan:
        """How the views were made, for `ViewDataset`; it holds samples to their content digests.

        Raises:
            UsageError: the cache does not say how its views were made.
            UntrustedCode: the cache names somebody's code, which it lists; open the cache with trust=True.
        """
        plan = recorded_plan(self.manifest, self.samples, url=self.storage.url, trust=self.trust)
        self._plans.append(plan)
        return plan

    def check_plan(self, plan: ViewPlan) -> None:
        """Hold a view plan to the one that the cache was built with.

        Raises:
            IdentityMismatch: names the first parameter that differs.
        """
        identity = self.manifest.identity
        here = identity.model_copy(update={"transform": plan.describe(), "view_seed": plan.seed})
        differences = identity.differences(type(identity).model_validate_json(here.model_dump_json()))
        if differences:
            raise IdentityMismatch(
                f"the views at hand are not those of cache {self.id[:12]}…; they differ in\n  "
                + "\n  ".join(differences)
            )
        self._plans.append(plan)

    def check_inputs(self, views: ViewDataset, view: int) -> int:
        """Render the proof rows of a view and hold their pixels to what the teacher was given.

        Args:
            views: the views at hand, for whichever model; the teacher's own part is rendered.

        Returns:
            How many rows were compared; rows outside a subset are left out.

        Raises:
            UsageError: no such view.
            IdentityMismatch: names the sample, and the library versions that may be the cause.
        """
        self._check_held(view)
        return check_rendered(views, view, self.input_digests(view), self.manifest, self.samples)

    def check_batch(self, index: Any, inputs: Any, *, views: ViewDataset | None = None) -> int:
        """Compare a batch that arrived with its own samples, rendered again: the first and the last one.

        `check_inputs` renders rows itself; this finds what a loader changes on the way (timm's casts floats to uint8).
        Call it at each view's first batch.

        Args:
            index: of the batch, int (B,), as `ViewDataset` gave it.
            inputs: of the batch, as the loader gave them, on any device.
            views: what the batch was loaded from; by default every living `ViewDataset` of `cache.view_plan`, or of a
                plan that passed `check_plan`.

        Returns:
            How many samples were compared.

        Raises:
            UsageError: plain row numbers, or samples that no dataset at hand has.
            IdentityMismatch: names the sample and what differs.
        """
        if views is not None:
            return check_arrived([views], index, inputs, self.manifest, self.samples)
        plans = self._plans or [self.view_plan]
        datasets = [each for plan in plans for each in plan.datasets]
        return check_arrived(datasets, index, inputs, self.manifest, self.samples)

    def rows(self, keys: Sequence[str]) -> np.ndarray:
        """Row numbers of sample keys, int64 (len(keys),), for subsets and other orders.

        Raises:
            SampleMismatch: a key that the cache does not hold.
            UsageError: the cache was created without keys.
        """
        if self.samples is None:
            raise UsageError(f"{self.storage.url} was created without sample keys; count its rows yourself")
        return self.samples.rows(keys)

    def view(
        self,
        view: int,
        device: str | torch.device = "cpu",
        *,
        memory_budget: int | None = None,
        ahead: bool = True,
        outputs: Sequence[str] = (LOGITS,),
    ) -> View:
        """One view on a device: resident, or streamed by blocks where it exceeds the memory budget.

        Args:
            view: 0 <= view < num_views.
            device: where the encoded labels lie and `logits` are decoded.
            memory_budget: bytes that the view's encoded labels may take; None is no limit.
            ahead: of a remote cache, bring the rest of a streamed view and the view after it nearby meanwhile.
            outputs: what is read now. Others are read when they are first asked for, each as if it were alone.

        Raises:
            UsageError: no such view or output.
            IncompleteCache: a block of it is missing.
            CorruptCache: an object is not the one that was written.
        """
        self._check_complete(view)
        window = self.window_blocks(memory_budget, outputs)
        if ahead:
            following = self.views[(self.views.index(view) + 1) % len(self.views)]
            self._fetch_ahead([view, following] if window is not None else [following], outputs)

        def read(output: str) -> View:
            streamed = window if output in outputs else self.window_blocks(memory_budget, [output])
            return self._rows_of(view, output, torch.device(device), streamed)

        if not self.others and tuple(outputs) == (LOGITS,):
            return read(LOGITS)
        whole = ViewOfOutputs(view, self.num_samples, self.outputs, read)
        whole.read(outputs)
        return whole

    def window_blocks(self, memory_budget: int | None, outputs: Sequence[str] = (LOGITS,)) -> int | None:
        """How many blocks of a view batches should stay within, under a budget in bytes; None if the whole view fits.

        Two such windows are kept, since a batch may straddle the end of one.

        Raises:
            UsageError: an output that is not held.
        """
        for name in outputs:
            if name not in self.outputs:
                raise no_output(name, self.outputs)
        view_bytes = self._memory(outputs)
        if memory_budget is None or view_bytes <= memory_budget:
            return None
        block_bytes = view_bytes * self.layout.rows_per_block // self.num_samples
        return max(1, memory_budget // (2 * block_bytes))

    def prefetch(self, view: int, device: str | torch.device = "cpu", outputs: Sequence[str] = (LOGITS,)) -> None:
        """Load outputs of a view in the background, for the `view` call to come."""
        self._check_complete(view)
        self._leave_parent()
        if self._loader is None:
            self._loader = ThreadPoolExecutor(1, thread_name_prefix="logitcache-loader")
        for output in outputs:
            key = (view, str(device), output)
            if key not in self._loading:
                self._loading[key] = self._loader.submit(self._load_view, view, torch.device(device), output)

    def _leave_parent(self) -> None:
        """After a fork: what the parent's thread is loading never arrives here."""
        if self._process != os.getpid():
            self._process, self._loader, self._loading = os.getpid(), None, {}

    def _rows_of(self, view: int, output: str, device: torch.device, window: int | None) -> View:
        """One output of a view: streamed in so many blocks, or resident where that is None."""
        if window is None:
            self._leave_parent()
            loading = self._loading.pop((view, str(device), output), None)
            return loading.result() if loading is not None else self._load_view(view, device, output)
        read = functools.partial(self.read_encoded, view, output=output)
        encoding, num_values = self.encoding_of(output)
        return StreamedView(view, encoding, read, self.layout, device, max_blocks=2 * window, num_values=num_values)

    def _load_view(self, view: int, device: torch.device, output: str) -> View:
        arrays = self.read_encoded(view, range(blocks_per_view(self.layout)), output=output)
        tensors = {name: torch.from_numpy(values).to(device) for name, values in arrays.items()}
        encoding, num_values = self.encoding_of(output)
        return ResidentView(view, encoding, tensors, num_values)

    def encoding_of(self, output: str) -> tuple[Encoding, int]:
        """The encoding of an output, fitted, and how many values a row has."""
        found = self._output_layouts[output]
        return self._fitted_encoding if found.encoding.fitted_arrays else found.encoding, found.num_values

    def read_encoded(self, view: int, numbers: Sequence[int], *, output: str) -> dict[str, np.ndarray]:
        """The arrays (rows, *row_shape) of consecutive blocks of one output, by the encoding's names for them.

        Raises:
            CorruptCache: names the first block that is not as it was written.
        """
        return self._output_layouts[output].encoded(self.read_blocks(view, numbers, output))

    def read_blocks(self, view: int, numbers: Sequence[int], output: str = LOGITS) -> dict[str, np.ndarray]:
        """The encoded arrays (rows, *row_shape) of consecutive blocks of a view, of one output, checked.

        Raises:
            CorruptCache: names the first block that is not as it was written.
        """
        blocks = [Block(view, number) for number in numbers]
        num_rows = sum(len(block_rows(self.layout, block)) for block in blocks)
        objects = self.objects.read_all([self._wanted(block, output) for block in blocks])
        arrays = {}
        stored = self._output_layouts[output]
        for position, (name, spec) in enumerate(stored.stored(self.layout.arrays).items()):
            chunks = [of_block[position] for of_block in objects]
            try:
                arrays[name] = decode_rows(spec, chunks, num_rows, self.layout.rows_per_block)
            except Exception as error:
                raise CorruptCache(f"{self.storage.url}: {name} of view {view} can't be decoded: {error}") from error
            if stored.has_unknown_class(name, arrays[name]):
                raise CorruptCache(
                    f"{self.storage.url}: {name} of view {view} holds class {arrays[name].max()} of {stored.num_values}"
                )
        return arrays

    def _wanted(self, block: Block, output: str) -> tuple[Wanted, str]:
        """The objects of one output in a block, in the layout's order, and their description for messages."""
        if block.name not in self.receipts:
            raise IncompleteCache(f"{self.storage.url}: block {block.name} is missing; {REBUILD}")
        found = {each.array: each for each in self.records.objects([block.name])}
        names = self._output_layouts[output].stored(self.layout.arrays)
        return {found[name].key: found[name].stored for name in names}, description(block.name)

    def _fetch_ahead(self, views: Sequence[int], outputs: Sequence[str]) -> None:
        """Bring views nearby from a remote store in the background, where there is room for them."""
        nearby = self.objects.nearby
        sizes = self.contents.output_bytes or {LOGITS: self.contents.label_bytes}
        label_bytes = sum(sizes[output] for output in outputs) * len(views) // len(self.views)
        if nearby is not None and 2 * label_bytes <= nearby.max_bytes:
            blocks = [Block(view, number) for view in views for number in range(blocks_per_view(self.layout))]
            there = [block for block in blocks if block.name in self.receipts]
            # An entry nearby for each output: whoever asks for one later asks for it alone.
            self.objects.read_ahead([self._wanted(block, output) for block in there for output in outputs])

    def logits(
        self, index: Any, device: str | torch.device = "cpu", *, memory_budget: int = RESIDENT_BYTES
    ) -> torch.Tensor:
        """The teacher's logits of samples in any mix of views, float32 (B, C), on a device.

        Views are loaded when an index first names them, and stay. Beyond the budget those used least recently leave,
        so that batches which mix more views than it holds are slow.

        Args:
            index: int (B,), as `ViewDataset` gives it.
            device: where encoded labels lie and logits are decoded.
            memory_budget: bytes of encoded labels that stay; 4 GiB by default.

        Raises:
            UsageError: plain row numbers, which name no view; no such view; booleans or floats.
            IncompleteCache: a block of a view is missing.
            CorruptCache: an object is not the one that was written.
        """
        views_B, rows_B = split_index(index)
        if bool((views_B < 0).any()):
            raise UsageError(
                "plain row numbers name no view; pass the index that `ViewDataset` gives, or take "
                "`cache.view(view).logits(rows)`"
            )
        target = torch.device(device)
        logits_BC = torch.empty((len(rows_B), self.num_classes), device=target)
        for number in sorted(set(views_B.tolist())):
            chosen_B = views_B == number
            logits_BC[chosen_B.to(target)] = self._kept_view(number, target, memory_budget).logits(rows_B[chosen_B])
        return logits_BC

    def _kept_view(self, number: int, device: torch.device, memory_budget: int) -> View:
        key = (number, str(device), memory_budget)
        if key not in self._kept:
            self._kept[key] = self.view(number, device, memory_budget=memory_budget)
        self._kept.move_to_end(key)
        while len(self._kept) > max(1, memory_budget // self.view_bytes):
            self._kept.popitem(last=False)
        return self._kept[key]

    def _check_held(self, view: int) -> None:
        if not 0 <= view < self.num_views:
            raise UsageError(f"no view {view}: the cache has {self.num_views}, numbered from 0")
        if view not in self.views:
            raise UsageError(
                f"{self.storage.url} is a copy of views {self.views.start} to {self.views.stop - 1} only; view {view} "
                "is not among them: `logitcache pull` the others as well"
            )

    def _check_complete(self, view: int) -> None:
        self._check_held(view)
        names = (Block(view, number).name for number in range(blocks_per_view(self.layout)))
        missing = next((name for name in names if name not in self.receipts), None)
        if missing is not None:
            # Counted by what is there: a manifest may claim millions of blocks.
            there = sum(name.startswith(f"v{view:05d}/") for name in self.receipts)
            raise IncompleteCache(
                f"{self.storage.url}: {blocks_per_view(self.layout) - there} blocks of view {view} are missing, the "
                f"first being {missing}; {REBUILD}"
            )

    def input_digests(self, view: int) -> dict[int, str]:
        """The digest of what the teacher was given, by row, for the proof rows of a view that are known."""
        return recorded_digests(self.manifest, self.receipts, view)
