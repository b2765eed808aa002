"""Read a cache: whole views in memory, or block by block if a view exceeds the memory budget.

Labels are read by the block, never by the row. Every object is checked against its receipt when it is read.
"""

from __future__ import annotations

import functools
import math
import os
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
import torch

from logitcache.cache.labelview import ResidentView, StreamedView, View, ViewOfOutputs, no_output
from logitcache.cache.layout import Block, decode_rows, view_blocks
from logitcache.cache.manifest import LOGITS, Contents
from logitcache.cache.objects import ObjectReader, Wanted
from logitcache.cache.outputs import output_layouts, outputs_of
from logitcache.cache.packages import require_packages
from logitcache.cache.per_cache import stored_encoding, stored_row_map, stored_samples
from logitcache.cache.records import Records, description
from logitcache.cache.rendering import check_arrived, check_rendered, recorded_digests, recorded_plan
from logitcache.cache.stored_records import read_records
from logitcache.cache.streams import StreamViews
from logitcache.data.index import split_index
from logitcache.data.recorded import PARAMETERS
from logitcache.data.rows import RowMap
from logitcache.data.samples import SampleTable
from logitcache.data.views import ViewDataset, ViewPlan
from logitcache.deprecation import RenamedAttribute
from logitcache.encodings import ENCODINGS, Encoding, encoding_from_config
from logitcache.errors import REBUILD, CorruptCache, IdentityMismatch, IncompleteCache, UsageError, unsealed
from logitcache.storage import Storage, open_storage
from logitcache.storage.blockdir import shared_block_directory

# B batch, C classes, N samples, V views

RESIDENT_BYTES = 2**32
"""Default memory budget of `LogitCache.logits`, in bytes of encoded labels."""


def open_cache(location: str | os.PathLike[str], *, trust: bool = False) -> LogitCache:
    """Open a cache: checks manifest and receipts, reads no labels.

    Args:
        location: a directory, or a `file://`, `s3://`, `gs://`, `az://` or `https://` URL. Blocks of a remote cache are
            kept in a local directory (`LOGITCACHE_CACHE_DIR`, default `~/.cache/logitcache`; at most
            `LOGITCACHE_CACHE_GB`, default 50). The view after the one in use is downloaded in the background.
        trust: allow `view_plan` to import and run the `package.module:function` transforms that the cache names.

    Raises:
        NotACache: there is no cache at the location.
        UnsupportedFormat: the cache was written by a newer version.
        CorruptCache: manifest and receipts contradict each other.
        MissingPackage: the encoding comes from a package that is not installed; names it.
        StorageError: the store refuses access or can't be reached.
    """
    return LogitCache(open_storage(location), trust=trust)


def open_sealed(location: str | os.PathLike[str], *, trust: bool = False) -> LogitCache:
    """Open a complete cache.

    Raises:
        IncompleteCache: it is not sealed.
        LogitCacheError: as `open_cache`.
    """
    cache = open_cache(location, trust=trust)
    if not cache.sealed:
        raise unsealed(os.fspath(location))
    return cache


class LogitCache:
    """The labels of one teacher over views of one dataset. Open one with `logitcache.open`.

    The attributes `storage`, `manifest`, `receipts`, `layout` and `contents`, and the methods `window_blocks`,
    `read_encoded`, `read_blocks`, `encoding_of` and `input_digests`, give access to the stored form. Most programs
    need only `view_plan`, `view`, `logits` and the checks.

    Args:
        storage: where the cache is stored.
        trust: see `open_cache`.
        records: manifest and receipts, if the caller has them already.
    """

    objects = RenamedAttribute("_objects")
    trust = RenamedAttribute("_trust")
    others = RenamedAttribute("extra_outputs")
    label_bytes = RenamedAttribute("target_bytes")
    check_inputs = RenamedAttribute("verify_inputs")

    def __init__(
        self,
        storage: Storage,
        *,
        trust: bool = False,
        records: Records | None = None,
    ) -> None:
        self.storage = storage
        self._objects = ObjectReader(storage, shared_block_directory() if storage.is_remote else None)
        self.records = read_records(storage, self._objects) if records is None else records
        self.manifest, self.receipts = self.records.manifest, self.records.receipts
        require_packages(self.manifest, ENCODINGS, url=storage.url)
        self.layout = self.manifest.layout
        """Shape of the stored arrays; `layout.num_views` counts from view 0, also in a partial copy."""
        self.encoding: Encoding = encoding_from_config(self.manifest.identity.encoding)
        """Encoding of the logits."""
        self.extra_outputs = outputs_of(self.manifest.identity)
        """Outputs other than the logits, by name: shape, encoding and source."""
        self._output_layouts = output_layouts(self.encoding, self.num_classes, self.extra_outputs)
        self._trust = trust
        self._loader: ThreadPoolExecutor | None = None
        self._loading: dict[tuple[int, str, str], Future[View]] = {}
        self._kept: OrderedDict[tuple[int, str, int], View] = OrderedDict()
        self._plans: list[ViewPlan] = []
        """Plans of this cache's views; `check_batch` renders from their datasets."""
        self._verified: weakref.WeakKeyDictionary[ViewDataset | StreamViews, set[int]] = weakref.WeakKeyDictionary()
        """The views of each dataset that `verify_inputs` has passed."""
        self._process = os.getpid()
        if self.sealed and self.records.content_digest() != self.manifest.digest:
            raise CorruptCache(
                f"{storage.url}: the receipts don't add up to the manifest's digest; run `logitcache verify` on it"
            )

    def __repr__(self) -> str:
        rows = "" if self.num_rows == self.num_samples else f", num_rows={self.num_rows}"
        return (
            f"LogitCache({self.storage.url!r}, num_samples={self.num_samples}{rows}, num_classes={self.num_classes}, "
            f"views={self.views}, encoding={self.encoding!r}, sealed={self.sealed})"
        )

    @property
    def id(self) -> str:
        """SHA-256 of the identity: dataset, teacher, views and encoding."""
        return self.manifest.id

    @property
    def digest(self) -> str | None:
        """SHA-256 of the content; None until sealed."""
        return self.manifest.digest

    @property
    def pin(self) -> str | None:
        """The hash for `pull --expect`: the digest, or in format 1 a stronger form of it; None until sealed."""
        return self.records.pin() if self.sealed else None

    @property
    def sealed(self) -> bool:
        """Whether the cache is complete."""
        return self.manifest.state == "sealed"

    @property
    def num_samples(self) -> int:
        """Number of samples."""
        return self.layout.num_samples

    @property
    def num_rows(self) -> int:
        """Number of rows of each view: one per sample, or one for each token of sequences."""
        return self.layout.num_rows

    @cached_property
    def row_map(self) -> RowMap:
        """Which rows belong to which sample, and which to which block.

        Raises:
            CorruptCache: the row map is damaged.
        """
        return stored_row_map(self.records, self._objects)

    @property
    def row_offsets(self) -> np.ndarray:
        """The first row of each sample, and the number of rows at the end, int64 (N + 1,)."""
        return self.row_map.offsets

    @property
    def num_views(self) -> int:
        """Number of views in this cache: `len(views)`."""
        return len(self.views)

    @property
    def views(self) -> range:
        """The view numbers in this cache: from 0, except in a partial copy such as of views 2 and 3."""
        return self.layout.views

    @property
    def num_classes(self) -> int:
        """Number of classes. Without meaning for a cache without logits: see `has_logits`."""
        return self.layout.num_classes

    @property
    def has_logits(self) -> bool:
        """Whether the cache stores logits, and not only other outputs."""
        return self.manifest.identity.has_logits

    def check_has_logits(self, purpose: str) -> None:
        """Refuse a cache without logits.

        Args:
            purpose: what needs them, as the subject of a sentence.

        Raises:
            UsageError: there are none.
        """
        if not self.has_logits:
            raise UsageError(
                f"{purpose} needs logits, and {self.storage.url} was created without; it has the outputs: "
                f"{', '.join(self.outputs)}"
            )

    @property
    def outputs(self) -> dict[str, tuple[int, ...]]:
        """The shape of each stored output for one sample, by name, `logits` first if they are stored."""
        layouts = self._output_layouts.items()
        return {name: output.shape for name, output in layouts if name != LOGITS or self.has_logits}

    @cached_property
    def contents(self) -> Contents:
        """Sizes and fidelity of the stored labels."""
        return self.records.contents()

    @property
    def stored_bytes(self) -> int:
        """Bytes of all stored objects."""
        return self.contents.bytes

    @property
    def target_bytes(self) -> int:
        """Bytes of the stored labels of all rows and outputs, without the arrays that are stored once per cache."""
        return self.contents.label_bytes

    @property
    def kl_mean(self) -> float | None:
        """Mean KL(teacher ‖ decoded) of the logits at T = 1, in nats, over all stored rows."""
        return self.contents.kl_mean

    @property
    def view_bytes(self) -> int:
        """Bytes of memory that the encoded logits of one view take."""
        return self._memory([LOGITS])

    def _memory(self, outputs: Iterable[str]) -> int:
        specs = [spec for name in outputs for spec in self._output_layouts[name].stored(self.layout.arrays).values()]
        return self.num_rows * sum(np.dtype(spec.dtype).itemsize * math.prod(spec.row_shape) for spec in specs)

    @cached_property
    def samples(self) -> SampleTable | None:
        """Keys, targets and content digests of the samples; None if the cache was created without them.

        Raises:
            CorruptCache: the table is damaged.
        """
        return stored_samples(self.records, self._objects)

    @cached_property
    def view_plan(self) -> ViewPlan:
        """How the views are made, for `ViewDataset`; samples are checked against their content digests.

        Raises:
            UsageError: the cache was created without a view plan.
            UntrustedCode: the cache names third-party code; the message lists it. Open the cache with trust=True.
        """
        return self.view_plan_with(None)

    def view_plan_with(self, replay: Callable[[Any, Mapping[str, float]], Any] | None) -> ViewPlan:
        """The view plan of a cache that was imported from another tool, with your function to render the views.

        Args:
            replay: called with a sample and what the tool stored of this view of it, such as a crop box or a seed;
                returns the view. None is `view_plan`.

        Raises:
            UsageError: the cache has no recorded views, or lacks parameters that the function states in `columns`.
            UntrustedCode: as `view_plan`.
        """
        plan = recorded_plan(
            self.manifest,
            self.samples,
            self.row_map,
            url=self.storage.url,
            trust=self._trust,
            read=ViewParameters(self),
            replay=replay,
        )
        self._plans.append(plan)
        return plan

    def check_plan(self, plan: ViewPlan) -> None:
        """Check that a view plan is the one that the cache was built with.

        Raises:
            IdentityMismatch: it differs; names the first parameter that does.
        """
        identity = self.manifest.identity
        if identity.transform is None:
            raise IdentityMismatch(
                f"{self.storage.url} was created without `view_plan`, so no plan can be compared with it; leave out "
                "`check_plan`, and prepare the inputs as for the teacher"
            )
        here = identity.model_copy(update={"transform": plan.describe(), "view_seed": plan.seed})
        differences = identity.differences(type(identity).model_validate_json(here.model_dump_json()))
        if differences:
            raise IdentityMismatch(
                f"the view plan is not that of cache {self.id[:12]}…; it differs in\n  " + "\n  ".join(differences)
            )
        plan.limit_views(self.views)
        self._plans.append(plan)

    def verify_inputs(self, views: ViewDataset | StreamViews, view: int) -> int:
        """Render a few rows of a view and compare them with digests of the teacher's inputs.

        Args:
            views: the dataset; rows are rendered with the teacher's preprocessing, whatever the dataset's own is. A
                stream compares these rows itself when they arrive, and this method counts those that have arrived.
            view: a number in `cache.views`.

        Returns:
            The number of rows compared; rows outside a subset are skipped.

        Raises:
            UsageError: the cache has no such view.
            IdentityMismatch: a row differs; names the sample and the library versions that may be the cause.
        """
        self._check_view(view)
        if isinstance(views, StreamViews):
            return views.verified(view)
        compared = check_rendered(views, view, self.input_digests(view), self.manifest, self.samples)
        self._verified.setdefault(views, set()).add(view)
        return compared

    def check_batch(self, index: Any, inputs: Any, *, views: ViewDataset | StreamViews | None = None) -> int:
        """Compare a batch with its dataset, and its dataset with the cache.

        The first and the last sample of the batch are rendered again: this finds what a loader changes on the way
        (timm's casts floats to uint8, for example). At the first batch of a view, `verify_inputs` is called as well.
        Call this on the first batch of each view.

        Args:
            index: the batch's index from `ViewDataset`, int (B,).
            inputs: the batch's inputs from the loader, on any device; of views `on_device`, before or after `finish`.
            views: the dataset of the batch; by default any live `ViewDataset` or `StreamViews` of `cache.view_plan`, or
                of a plan that passed `check_plan`. Of a stream, only samples of its first batches can be compared.

        Returns:
            The number of samples compared.

        Raises:
            UsageError: plain row numbers, samples that none of the datasets has, or a plan that the cache can't make
                and `check_plan` has not seen.
            IdentityMismatch: a sample differs; names it and the difference.
        """
        if views is None:
            plans = self._plans or [self._plan_for_check()]
            datasets: list[ViewDataset | StreamViews] = [each for plan in plans for each in plan.datasets]
        else:
            datasets = [views]
        compared = check_arrived(datasets, index, inputs, self.manifest, self.samples, self.row_map)
        for view, dataset in compared:
            if view not in self._verified.setdefault(dataset, set()):
                self.verify_inputs(dataset, view)
        return len(compared)

    def _plan_for_check(self) -> ViewPlan:
        try:
            return self.view_plan
        except UsageError as error:
            raise UsageError(
                "check_batch does not know the dataset of this batch: pass it as `views=`, or call "
                f"`cache.check_plan(plan)` first, with the ViewPlan of your ViewDataset. {error}"
            ) from error

    def rows(self, keys: Sequence[str]) -> np.ndarray:
        """Row numbers of keys, int64 (len(keys),), for subsets and datasets in another order.

        Raises:
            SampleMismatch: a key that is not in the cache.
            UsageError: the cache was created without keys, or its samples have several rows.
        """
        if self.samples is None:
            raise UsageError(f"{self.storage.url} was created without sample keys; pass row numbers instead")
        if not self.row_map.one_each:
            raise UsageError(
                f"the samples have several rows in {self.storage.url}, so a key names no single row; "
                "`cache.samples.rows(keys)` gives sample numbers, as `ViewDataset(rows=...)` takes them, and sample i "
                "has the rows `cache.row_offsets[i]` to before `cache.row_offsets[i + 1]`"
            )
        return self.samples.rows(keys)

    def view(
        self,
        view: int,
        device: str | torch.device = "cpu",
        *,
        memory_budget: int | None = None,
        ahead: bool = True,
        outputs: Sequence[str] | None = None,
    ) -> View:
        """One view on a device: resident in memory, or streamed by blocks if it exceeds the memory budget.

        Args:
            view: a number in `cache.views`.
            device: holds the encoded labels; `logits` are decoded there.
            memory_budget: bytes that the view's encoded labels may take; None is no limit.
            ahead: for a remote cache, download the rest of a streamed view, and the next view, in the background.
            outputs: outputs to read now; by default the logits, if there are any. Each other one is read when it is
                first used.

        Raises:
            UsageError: the cache has no such view or output.
            IncompleteCache: a block of the view is missing.
            CorruptCache: an object differs from what was written.
        """
        self._check_complete(view)
        if outputs is None:
            outputs = (LOGITS,) if self.has_logits else ()
        window = self.window_blocks(memory_budget, outputs)
        if ahead:
            following = self.views[(self.views.index(view) + 1) % len(self.views)]
            self._fetch_ahead([view, following] if window is not None else [following], outputs)

        def read(output: str) -> View:
            streamed = window if output in outputs else self.window_blocks(memory_budget, [output])
            return self._rows_of(view, output, torch.device(device), streamed)

        if not self.extra_outputs and tuple(outputs) == (LOGITS,):
            return read(LOGITS)
        whole = ViewOfOutputs(view, self.num_rows, self.outputs, self.num_classes, read)
        whole.read(outputs)
        return whole

    def window_blocks(self, memory_budget: int | None, outputs: Sequence[str] = (LOGITS,)) -> int | None:
        """Number of blocks that consecutive batches should stay within; None if a whole view fits the memory budget.

        A streamed view keeps two such windows in memory, because a batch may span the end of one.

        Raises:
            UsageError: the cache has no such output.
        """
        for name in outputs:
            if name not in self.outputs:
                raise no_output(name, self.outputs)
        view_bytes = self._memory(outputs)
        if memory_budget is None or view_bytes <= memory_budget:
            return None
        block_bytes = view_bytes * self.layout.rows_per_block // self.num_rows
        return max(1, memory_budget // (2 * block_bytes))

    def prefetch(self, view: int, device: str | torch.device = "cpu", outputs: Sequence[str] = (LOGITS,)) -> None:
        """Load outputs of a view in the background, for a later call of `view`."""
        self._check_complete(view)
        self._leave_parent()
        if self._loader is None:
            self._loader = ThreadPoolExecutor(1, thread_name_prefix="logitcache-loader")
        for output in outputs:
            key = (view, str(device), output)
            if key not in self._loading:
                self._loading[key] = self._loader.submit(self._load_view, view, torch.device(device), output)

    def _leave_parent(self) -> None:
        """After a fork, forget loads of the parent's thread: they never finish in the child."""
        if self._process != os.getpid():
            self._process, self._loader, self._loading = os.getpid(), None, {}

    def _rows_of(self, view: int, output: str, device: torch.device, window: int | None) -> View:
        """One output of a view: streamed with a window of blocks, or resident if the window is None."""
        if window is None:
            self._leave_parent()
            loading = self._loading.pop((view, str(device), output), None)
            return loading.result() if loading is not None else self._load_view(view, device, output)
        read = functools.partial(self.read_encoded, view, output=output)
        encoding, num_values = self.encoding_of(output)
        return StreamedView(view, encoding, read, self.row_map, device, max_blocks=2 * window, num_values=num_values)

    def _load_view(self, view: int, device: torch.device, output: str) -> View:
        arrays = self.read_encoded(view, range(self.layout.blocks_per_view), output=output)
        tensors = {name: torch.from_numpy(values).to(device) for name, values in arrays.items()}
        encoding, num_values = self.encoding_of(output)
        return ResidentView(view, encoding, tensors, num_values)

    def encoding_of(self, output: str) -> tuple[Encoding, int]:
        """The fitted encoding of an output, and the number of values of a row."""
        found = self._output_layouts[output]
        if not found.encoding.is_fitted:
            fitted = stored_encoding(self.records, self._objects, output)
            found = self._output_layouts[output] = replace(found, encoding=fitted)
        return found.encoding, found.num_values

    def read_encoded(self, view: int, numbers: Sequence[int], *, output: str) -> dict[str, np.ndarray]:
        """The arrays (rows, *row_shape) of consecutive blocks of one output, under the encoding's names.

        Raises:
            CorruptCache: a block differs from what was written; names the first one.
        """
        return self._output_layouts[output].encoded(self.read_blocks(view, numbers, output))

    def read_blocks(self, view: int, numbers: Sequence[int], output: str = LOGITS) -> dict[str, np.ndarray]:
        """The checked arrays (rows, *row_shape) of consecutive blocks of one output, under their stored names.

        Raises:
            CorruptCache: a block differs from what was written; names the first one.
        """
        blocks = [Block(view, number) for number in numbers]
        counts = [len(self.row_map.block_rows(number)) for number in numbers]
        wanted = [self._wanted(block, output) for block in blocks]
        for block, count in zip(blocks, counts, strict=True):
            if self.receipts[block.name].rows != count:
                raise CorruptCache(
                    f"{self.storage.url}: the receipt of {block.name} and the row map differ in the rows"
                )
        objects = self._objects.read_all(wanted)
        arrays = {}
        stored = self._output_layouts[output]
        for position, (name, spec) in enumerate(stored.stored(self.layout.arrays).items()):
            chunks = [of_block[position] for of_block in objects]
            try:
                arrays[name] = decode_rows(spec, chunks, counts, self.layout.rows_per_block)
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
        """Download views from a remote store in the background, if the local directory has room for them."""
        nearby = self._objects.nearby
        sizes = self.contents.output_bytes or {LOGITS: self.contents.label_bytes}
        target_bytes = sum(sizes[output] for output in outputs) * len(views) // len(self.views)
        if nearby is not None and 2 * target_bytes <= nearby.max_bytes:
            # One local entry per output, because outputs are read one at a time later. In the background, since the
            # receipts of the next view may have to be read too.
            self._objects.read_ahead(
                self._wanted(block, output)
                for view in views
                for block in view_blocks(self.layout, view)
                if block.name in self.receipts
                for output in outputs
            )

    def logits(
        self, index: Any, device: str | torch.device = "cpu", *, memory_budget: int = RESIDENT_BYTES
    ) -> torch.Tensor:
        """The teacher's logits of samples of any views, float32 (B, C), on a device.

        A view is loaded when an index first names it, and kept. Beyond the memory budget the least recently used views
        are dropped, so batches that mix more views than fit are slow.

        Args:
            index: int (B,), from `ViewDataset`; of sequences, one for each row, from `position_index`.
            device: holds the encoded labels; logits are decoded there.
            memory_budget: bytes of encoded labels to keep; default 4 GiB.

        Raises:
            UsageError: plain row numbers, which name no view; a view that is not in the cache; booleans or floats.
            IncompleteCache: a block of a view is missing.
            CorruptCache: an object differs from what was written.
        """
        views_B, rows_B = split_index(index)
        if bool((views_B < 0).any()):
            raise UsageError(
                "plain row numbers name no view; pass the index that `ViewDataset` gives, or use "
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

    def _check_view(self, view: int) -> None:
        if not 0 <= view < self.views.stop:
            raise UsageError(
                f"no view {view}: the cache has {self._views_in_words()}. To use them again in later epochs, call "
                "`cache.check_plan(plan)` before training, or give ViewSampler cycle=cache.views"
            )
        if view not in self.views:
            raise UsageError(
                f"{self.storage.url} is a partial copy with {self._views_in_words()}, without view {view}; "
                "`logitcache pull` adds views"
            )

    def _views_in_words(self) -> str:
        first, last = self.views.start, self.views.stop - 1
        return f"only view {first}" if first == last else f"views {first} to {last}"

    def _check_complete(self, view: int) -> None:
        self._check_view(view)
        names = (block.name for block in view_blocks(self.layout, view))
        missing = next((name for name in names if name not in self.receipts), None)
        if missing is not None:
            # Counts the receipts: an untrusted manifest may claim millions of blocks.
            there = len(self.records.by_view.of_view(view)) if view in self.records.by_view.views else 0
            raise IncompleteCache(
                f"{self.storage.url}: {self.layout.blocks_per_view - there} blocks of view {view} are missing, "
                f"{missing} first; {REBUILD}"
            )

    def input_digests(self, view: int) -> dict[int, str]:
        """Digests of the teacher's inputs for a few samples of a view, by sample number."""
        return recorded_digests(self.manifest, self.receipts, self.row_map, view)


class ViewParameters:
    """Reads the parameters of recorded views; opens the cache again in a process that it is sent to."""

    def __init__(self, cache: LogitCache) -> None:
        self._cache: LogitCache | None = cache
        self._location = cache.storage.url

    def __getstate__(self) -> dict[str, Any]:
        return {"_cache": None, "_location": self._location}

    def __call__(self, view: int) -> np.ndarray:
        """Float32 (N, D)."""
        if self._cache is None:
            self._cache = open_cache(self._location)
        blocks = range(self._cache.layout.blocks_per_view)
        return self._cache.read_encoded(view, blocks, output=PARAMETERS)["values"]
