"""An open cache: whole views in memory, or block by block where a view exceeds the memory budget.

Nothing is ever read row by row. Every object is checked against its receipt when it is read.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property

import numpy as np
import torch

from logitcache.cache.committed import read_fixed, read_records, stored_encoding
from logitcache.cache.labelview import ResidentView, StreamedView, View
from logitcache.cache.layout import (
    FIXED,
    SAMPLE_ARRAYS,
    Block,
    block_key,
    block_rows,
    blocks_per_view,
    decode_rows,
)
from logitcache.cache.manifest import Contents, Manifest, Receipt, content_digest, contents
from logitcache.cache.objects import ObjectReader, Wanted
from logitcache.data.samples import SampleTable, input_digest
from logitcache.data.transforms import build_transform
from logitcache.data.views import Mixing, ViewDataset, ViewPlan, proof_rows
from logitcache.encodings import Encoding, encoding_from_config
from logitcache.errors import CorruptCache, IdentityMismatch, IncompleteCache, UsageError
from logitcache.storage import Storage, open_storage
from logitcache.storage.blockdir import shared_block_directory

# B batch, C classes, N samples, V views


def open_cache(location: str | os.PathLike[str], *, trust: bool = False) -> LogitCache:
    """Open a cache: checks manifest and receipts, reads no labels.

    Args:
        location: a directory, or a `file://`, `s3://`, `gs://`, `az://` or `https://` URL. What is read from a remote
            one is kept in a local directory (`~/.cache/logitcache`, moved by `LOGITCACHE_CACHE_DIR`; at most
            `LOGITCACHE_CACHE_GB`, 50 by default), and the view after the one that is asked for comes meanwhile.
        trust: allow `package.module:function` transforms from outside the working folder in `view_plan`.

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
        written: manifest and receipts, for the writer that has them at hand.
    """

    def __init__(
        self,
        storage: Storage,
        *,
        trust: bool = False,
        written: tuple[Manifest, dict[str, Receipt]] | None = None,
    ) -> None:
        self.storage = storage
        self.objects = ObjectReader(storage, shared_block_directory() if storage.is_remote else None)
        self.manifest, self.receipts = read_records(storage, self.objects) if written is None else written
        self.layout = self.manifest.layout
        self.encoding: Encoding = encoding_from_config(self.manifest.identity.encoding)
        self.trust = trust
        self._loader = ThreadPoolExecutor(1, thread_name_prefix="logitcache-loader")
        self._loading: dict[tuple[int, str], Future[View]] = {}
        if self.sealed and content_digest(list(self.receipts.values())) != self.manifest.digest:
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

    @cached_property
    def contents(self) -> Contents:
        """Sizes and fidelity of all that is there."""
        return contents(self.receipts, fixed=FIXED)

    @property
    def stored_bytes(self) -> int:
        """Size of all stored objects that have receipts."""
        return self.contents.bytes

    @property
    def label_bytes(self) -> int:
        """Size of the labels alone, without what is stored once."""
        return self.contents.label_bytes

    @property
    def kl_mean(self) -> float | None:
        """KL(teacher ‖ decoded) at T = 1, in nats, over all rows that are there."""
        return self.contents.kl_mean

    @property
    def view_bytes(self) -> int:
        """Memory of one resident view."""
        row = sum(np.dtype(spec.dtype).itemsize * int(np.prod(spec.row_shape)) for spec in self.layout.arrays.values())
        return row * self.num_samples

    @cached_property
    def samples(self) -> SampleTable | None:
        """Keys, targets and content digests of the samples; None where the cache was created without.

        Raises:
            CorruptCache: the table is damaged.
        """
        fixed = self.receipts.get(FIXED)
        if fixed is None or "sample_targets" not in self.layout.fixed:
            return None
        wanted = [name for name in SAMPLE_ARRAYS if name in self.layout.fixed]
        arrays = {name: read_fixed(self.storage, self.layout, fixed, name, self.objects) for name in wanted}
        keys = arrays["sample_keys"].tobytes().decode().split("\n") if "sample_keys" in arrays else None
        return SampleTable(self.num_samples, keys, arrays["sample_targets"], arrays["sample_contents"])

    @cached_property
    def _fitted_encoding(self) -> Encoding:
        if FIXED not in self.receipts:
            raise IncompleteCache(
                f"{self.storage.url}: what is stored once is missing; run `logitcache cache-teacher` again"
            )
        return stored_encoding(self.storage, self.manifest, self.receipts[FIXED], self.objects)

    @cached_property
    def view_plan(self) -> ViewPlan:
        """How the views were made, for `ViewDataset`; it holds samples to their content digests.

        Raises:
            UsageError: the cache does not say how its views were made.
            UntrustedCode: a transform from outside the working folder; open the cache with trust=True.
        """
        transform = self.manifest.identity.transform
        if transform is None:
            raise UsageError(
                f"{self.storage.url} does not say how its views were made: it was created without `view_plan`; "
                "render the views as its maker did"
            )
        parts = []
        for part in ("shared", "teacher_input"):
            spec = transform[part]
            if spec is not None and not isinstance(spec, list):
                raise UsageError(
                    f"{self.storage.url} was made with a transform given as a Python object ({part}): make the same "
                    "ViewPlan again, and hold it to the cache with `cache.check_plan(plan)`"
                )
            parts.append(None if spec is None else build_transform(spec, trust=self.trust))
        samples = self.samples
        return ViewPlan(
            transform=parts[0],
            seed=self.manifest.identity.view_seed,
            mixing=Mixing(**(transform["mixing"] or {})),
            model_input=parts[1],
            num_classes=self.num_classes,
            num_samples=self.num_samples,
            contents=None if samples is None else samples.contents,
        )

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

    def check_inputs(self, views: ViewDataset, view: int) -> int:
        """Render the proof rows of a view and hold their pixels to what the teacher was given.

        Args:
            views: the views at hand, for whichever model; the teacher's own part is rendered.

        Returns:
            How many rows were compared; rows outside a subset are left out.

        Raises:
            IdentityMismatch: names the sample, and the library versions that may be the cause.
        """
        views = ViewDataset(views.dataset, views.plan, rows=views.rows)  # the teacher's own part, whatever the model's
        index_of_row = None if views.rows is None else {int(row): index for index, row in enumerate(views.rows)}
        compared = 0
        for row, expected in self.input_digests(view).items():
            index = row if index_of_row is None else index_of_row.get(row)
            if index is None:
                continue
            found = input_digest(views[(view, index)][1]).hex()
            if found != expected:
                raise IdentityMismatch(self._describe_other_pixels(view, row, found, expected))
            compared += 1
        return compared

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
    ) -> View:
        """One view on a device: resident, or streamed by blocks where it exceeds the memory budget.

        Args:
            view: 0 <= view < num_views.
            device: where the encoded labels lie and `logits` are decoded.
            memory_budget: bytes that the view's encoded labels may take; None is no limit.
            ahead: of a remote cache, bring the rest of a streamed view and the view after it nearby meanwhile.

        Raises:
            UsageError: no such view.
            IncompleteCache: a block of it is missing.
            CorruptCache: an object is not the one that was written.
        """
        self._check_complete(view)
        window = self.window_blocks(memory_budget)
        if ahead:
            following = self.views[(self.views.index(view) + 1) % len(self.views)]
            self._fetch_ahead([view, following] if window is not None else [following])
        if window is not None:
            read = functools.partial(self.read_blocks, view)
            return StreamedView(
                view, self._fitted_encoding, read, self.layout, torch.device(device), max_blocks=2 * window
            )
        loading = self._loading.pop((view, str(device)), None)
        return loading.result() if loading is not None else self._load_view(view, device)

    def window_blocks(self, memory_budget: int | None) -> int | None:
        """How many blocks of a view batches should stay within, under a budget in bytes; None if the whole view fits.

        Two such windows are kept, since a batch may straddle the end of one.
        """
        if memory_budget is None or self.view_bytes <= memory_budget:
            return None
        block_bytes = self.view_bytes * self.layout.rows_per_block // self.num_samples
        return max(1, memory_budget // (2 * block_bytes))

    def prefetch(self, view: int, device: str | torch.device = "cpu") -> None:
        """Load a view in the background, for the `view` call to come."""
        self._check_complete(view)
        key = (view, str(device))
        if key not in self._loading:
            self._loading[key] = self._loader.submit(self._load_view, view, device)

    def _load_view(self, view: int, device: str | torch.device) -> View:
        numbers = range(blocks_per_view(self.layout))
        arrays = self.read_blocks(view, numbers)
        tensors = {name: torch.from_numpy(values).to(device) for name, values in arrays.items()}
        return ResidentView(view, self._fitted_encoding, tensors, self.num_classes)

    def read_blocks(self, view: int, numbers: Sequence[int]) -> dict[str, np.ndarray]:
        """The encoded arrays (rows, *row_shape) of consecutive blocks of a view, checked and decompressed.

        Raises:
            CorruptCache: names the first block that is not as it was written.
        """
        blocks = [Block(view, number) for number in numbers]
        num_rows = sum(len(block_rows(self.layout, block)) for block in blocks)
        objects = self.objects.read_all([self._wanted(block) for block in blocks])
        arrays = {}
        for position, (name, spec) in enumerate(self.layout.arrays.items()):
            chunks = [of_block[position] for of_block in objects]
            try:
                arrays[name] = decode_rows(spec, chunks, num_rows, self.layout.rows_per_block)
            except Exception as error:
                raise CorruptCache(f"{self.storage.url}: {name} of view {view} can't be decoded: {error}") from error
            if name == "ids" and arrays[name].size and int(arrays[name].max()) >= self.num_classes:
                raise CorruptCache(
                    f"{self.storage.url}: {name} of view {view} holds class {arrays[name].max()} of {self.num_classes}"
                )
        return arrays

    def _wanted(self, block: Block) -> tuple[Wanted, str]:
        """A block's objects by key, and who vouches for them."""
        receipt = self.receipts.get(block.name)
        if receipt is None:
            raise IncompleteCache(
                f"{self.storage.url}: block {block.name} is missing; run `logitcache cache-teacher` again"
            )
        keys = {block_key(name, spec, block): receipt.objects[name] for name, spec in self.layout.arrays.items()}
        return keys, f"block {block.name}"

    def _fetch_ahead(self, views: Sequence[int]) -> None:
        """Bring views nearby from a remote store in the background, where there is room for them."""
        nearby = self.objects.nearby
        label_bytes = self.contents.label_bytes * len(views) // len(self.views)
        if nearby is not None and 2 * label_bytes <= nearby.max_bytes:
            blocks = [Block(view, number) for view in views for number in range(blocks_per_view(self.layout))]
            self.objects.read_ahead([self._wanted(block) for block in blocks if block.name in self.receipts])

    def _check_complete(self, view: int) -> None:
        if not 0 <= view < self.num_views:
            raise UsageError(f"no view {view}: the cache has {self.num_views}, numbered from 0")
        if view not in self.views:
            raise UsageError(
                f"{self.storage.url} is a copy of views {self.views.start} to {self.views.stop - 1} only; view {view} "
                "is not among them: `logitcache pull` the others as well"
            )
        missing = [
            number for number in range(blocks_per_view(self.layout)) if Block(view, number).name not in self.receipts
        ]
        if missing:
            raise IncompleteCache(
                f"{self.storage.url}: {len(missing)} blocks of view {view} are missing, the first being "
                f"{Block(view, missing[0]).name}; run `logitcache cache-teacher` again"
            )

    def input_digests(self, view: int) -> dict[int, str]:
        """The digest of what the teacher was given, by row, for the proof rows of a view that are known."""
        digests: dict[int, str] = {}
        for row in proof_rows(self.manifest.identity.view_seed, view, self.num_samples):
            receipt = self.receipts.get(Block(view, row // self.layout.rows_per_block).name)
            if receipt is not None and str(row) in receipt.inputs:
                digests[row] = receipt.inputs[str(row)]
        return digests

    def _describe_other_pixels(self, view: int, row: int, found: str, expected: str) -> str:
        key = self.samples.key(row) if self.samples is not None else str(row)
        versions = self.manifest.provenance.get("versions", {})
        built_with = ", ".join(f"{name} {versions[name]}" for name in ("torchvision", "pillow") if name in versions)
        return (
            f"view {view} of sample {row} ({key}) is not what the teacher saw: rendered here its digest is {found}, "
            f"in the cache {expected}.\n"
            "Data, transform and seed agree, so the transform's code renders otherwise here: the cache was built with "
            f"{built_with or 'unknown library versions'} on {self.manifest.provenance.get('platform', 'unknown')}.\n"
            "Use those versions, or build the cache again."
        )
