"""Checks a cache against its receipts: what is missing, damaged or unaccounted for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from logitcache.cache.layout import (
    GROUP,
    PER_CACHE,
    ROW_ARRAYS,
    SAMPLE_ARRAYS,
    array_specs,
    decode_object,
    group_metadata,
    has_right_rows,
    is_receipt_name,
    num_blocks,
    object_key,
    receipt_key,
    receipt_names,
    view_blocks,
    view_receipts_key,
)
from logitcache.cache.manifest import (
    CARD,
    MANIFEST,
    MAX_RECEIPT_BYTES,
    RECEIPTS,
    Manifest,
    Receipt,
    ReceiptIndex,
    output_of,
    read_receipt,
    read_receipts_or_index,
    receipts_limit,
)
from logitcache.cache.outputs import OutputLayout, output_layouts, outputs_of
from logitcache.cache.packages import require_packages
from logitcache.cache.per_cache import fitted_encoding, row_map_from_arrays, samples_from_arrays
from logitcache.cache.receipts import ReceiptsByView
from logitcache.cache.records import CacheObject, Records
from logitcache.cache.stored_records import collect_receipts, gathered_receipts, indexed_receipts, stored_manifest
from logitcache.digest import array_digest, sha256_hex
from logitcache.encodings import ENCODINGS, encoding_from_config
from logitcache.errors import CorruptCache
from logitcache.progress import track
from logitcache.storage import Storage, open_storage
from logitcache.storage.claims import CLAIMS

MAX_MISSING = 2**16
"""The search for receipts ends after this many are missing: a hostile manifest may claim millions."""


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a cache."""

    block: str
    """Such as "v00003/b00012"; "fixed" for the per-cache arrays; "" for the cache as a whole."""
    path: str
    kind: str
    """"missing", "wrong size", "wrong bytes", "wrong values", "wrong rows", "wrong digest", "damaged", "not finite",
    "stray" or "differs"."""


def verify(location: str, *, deep: bool = False) -> list[Problem]:
    """Compare a cache with its receipts.

    Args:
        location: the cache.
        deep: also read every object, check its SHA-256, decode it, check the SHA-256 of its values, and look for NaN
            or infinite labels and for invalid per-cache arrays.

    Returns:
        The problems; at most the first 65 536 missing receipts.

    Raises:
        NotACache: no cache there.
        CorruptCache: the manifest can't be read.
        MissingPackage: with `deep`, the encoding comes from a package that is not installed.
    """
    storage = open_storage(location)
    manifest = stored_manifest(storage)
    if deep:
        require_packages(manifest, ENCODINGS, url=storage.url)
    layout = manifest.layout
    problems: list[Problem] = []
    # Listed once where the store can: a request for each size would be slow.
    sizes = dict(storage.sizes()) if storage.can_list else None
    check = _Check(storage, manifest, sizes, deep=deep)
    metadata = group_metadata(layout)
    expected = {MANIFEST, RECEIPTS, CARD, *metadata}
    records, parts = _receipts(storage, manifest, problems)
    # Those of a large cache are not read twice, to count them.
    counted = None if records is None or records.by_view.entries else records.objects()
    total = num_blocks(layout) * len(layout.arrays) if counted is None else len(list(counted))
    with ThreadPoolExecutor(storage.concurrency) as threads, track("verifying", total, unit="objects") as meter:
        for receipts in parts:
            for name, receipt in receipts.items():
                if not has_right_rows(layout, name, receipt.rows):
                    problems.append(Problem(name, RECEIPTS, "wrong rows"))
                unknown = receipt.objects.keys() - array_specs(layout, name).keys()
                problems += [Problem(name, array, "damaged") for array in sorted(unknown)]
                expected |= {f"{GROUP}/{array}/zarr.json" for array in receipt.objects}
            objects = list(Records(manifest, receipts).objects())
            for checked, kind in zip(objects, threads.map(check, objects), strict=True):
                problems += [] if kind is None else [Problem(checked.receipt, checked.key, kind)]
                meter.advance()
            if sizes is not None:  # what remains is part of nothing
                for checked in objects:
                    sizes.pop(checked.key, None)
    problems += [Problem(PER_CACHE, path, "damaged") for path in check.invalid_per_cache_arrays()]

    for path, data in metadata.items():
        found = storage.get(path, limit=len(data))
        if found != data:
            problems.append(Problem("", path, "missing" if found is None else "wrong bytes"))
    of_others = ("receipts/", f"{CLAIMS}/")
    strays = [path for path in sizes or () if path not in expected and not path.startswith(of_others)]
    problems += [Problem("", path, "stray") for path in strays]
    if manifest.state == "sealed" and (records is None or records.content_digest() != manifest.digest):
        problems.append(Problem("", MANIFEST, "wrong digest"))
    return problems


def _receipts(
    storage: Storage, manifest: Manifest, problems: list[Problem]
) -> tuple[Records | None, Iterator[Mapping[str, Receipt]]]:
    """The records of a cache as far as they can be read, and its receipts in parts: each view's, if there are many.

    Problems with receipts are added to `problems` when their part is read. Records are None where there is no index.
    """
    if manifest.state == "open" or not manifest.receipts_by_view:
        records = Records(manifest, _all_receipts(storage, manifest, problems))
        return records, iter([records.receipts])
    data, is_right = gathered_receipts(storage, manifest)
    if not is_right:
        problems.append(Problem("", RECEIPTS, "missing" if data is None else "wrong bytes"))
    indexed: ReceiptsByView | None = None
    if data is not None:
        with suppress(CorruptCache):
            index = read_receipts_or_index(data, url=storage.url)
            if isinstance(index, ReceiptIndex):
                indexed = indexed_receipts(storage, manifest, index)
        if indexed is None:
            problems.append(Problem("", RECEIPTS, "damaged"))
    if indexed is None:
        return None, iter([_single_receipts(storage, manifest, {}, receipt_names(manifest.layout), problems)])
    return Records(manifest, indexed), _parts(storage, manifest, indexed, problems)


def _parts(
    storage: Storage, manifest: Manifest, indexed: ReceiptsByView, problems: list[Problem]
) -> Iterator[Mapping[str, Receipt]]:
    """The receipts of the per-cache arrays, then those of each view, one view in memory at a time."""
    assert indexed.per_cache is not None
    yield {PER_CACHE: indexed.per_cache}
    for view in indexed.views:
        try:
            of_view = indexed.of_view(view)
        except CorruptCache:
            key = view_receipts_key(view, indexed.entries[view].object.sha256)
            problems.append(Problem("", key, "missing" if storage.size(key) is None else "damaged"))
            names = (block.name for block in view_blocks(manifest.layout, view))
            of_view = _single_receipts(storage, manifest, {}, names, problems)
        yield of_view


def _all_receipts(storage: Storage, manifest: Manifest, problems: list[Problem]) -> dict[str, Receipt]:
    """Every receipt that can be read; the problems with the others are added to `problems`."""
    layout = manifest.layout
    receipts: dict[str, Receipt] = {}
    if manifest.state == "sealed":
        gathered, is_right = gathered_receipts(storage, manifest)
        if not is_right:
            problems.append(Problem("", RECEIPTS, "missing" if gathered is None else "wrong bytes"))
    else:
        gathered = storage.get(RECEIPTS, limit=receipts_limit(layout))
    if gathered is not None:
        try:
            found = read_receipts_or_index(gathered, url=storage.url)
            # Of an open cache that was sealed before: the receipts that its index names.
            receipts = found if isinstance(found, dict) else dict(collect_receipts(storage, manifest))
        except CorruptCache:
            problems.append(Problem("", RECEIPTS, "damaged"))
    return _single_receipts(storage, manifest, receipts, receipt_names(layout), problems)


def _single_receipts(
    storage: Storage,
    manifest: Manifest,
    receipts: dict[str, Receipt],
    names: Iterable[str],
    problems: list[Problem],
) -> dict[str, Receipt]:
    """Receipts, with those of single blocks where they lack a name; what is missing is added to `problems`."""
    missing = sum(problem.kind == "missing" for problem in problems)
    for name in names if missing < MAX_MISSING else ():
        if name in receipts:
            continue
        data = storage.get(receipt_key(name), limit=MAX_RECEIPT_BYTES)
        if data is None:
            problems.append(Problem(name, receipt_key(name), "missing"))
            missing += 1
            if missing == MAX_MISSING:
                break
            continue
        try:
            receipts[name] = read_receipt(data, key=receipt_key(name))
        except CorruptCache:
            problems.append(Problem(name, receipt_key(name), "damaged"))
    return {name: receipt for name, receipt in receipts.items() if is_receipt_name(manifest.layout, name)}


class _Check:
    """Checks objects, several at once; keeps the per-cache arrays that it reads.

    Args:
        storage: the cache.
        manifest: its manifest.
        sizes: of all objects, by key; None where the store can't list them.
        deep: whether objects are read.
    """

    def __init__(self, storage: Storage, manifest: Manifest, sizes: Mapping[str, int] | None, *, deep: bool) -> None:
        self._storage = storage
        self._manifest = manifest
        self._sizes = sizes
        self._deep = deep
        self._outputs: dict[str, OutputLayout] = {}
        if deep:  # only then the package of the encoding is needed
            encoding = encoding_from_config(manifest.identity.encoding)
            self._outputs = output_layouts(encoding, manifest.layout.num_classes, outputs_of(manifest.identity))
        self._per_cache: dict[str, np.ndarray] = {}

    def __call__(self, checked: CacheObject) -> str | None:
        """What is wrong with an object; None if nothing is."""
        size = self._storage.size(checked.key) if self._sizes is None else self._sizes.get(checked.key)
        if size is None:
            return "missing"
        if size != checked.stored.bytes:
            return "wrong size"
        return self._read(checked) if self._deep else None

    def _read(self, checked: CacheObject) -> str | None:
        data = self._storage.get(checked.key, limit=checked.stored.bytes) or b""
        if sha256_hex(data) != checked.stored.sha256:
            return "wrong bytes"
        try:
            values = decode_object(
                self._manifest.layout, checked.receipt, checked.array, data, num_rows=checked.num_rows
            )
        except ValueError:
            return "damaged"
        if array_digest(values) != checked.stored.values_sha256:
            return "wrong values"
        if checked.receipt == PER_CACHE:
            self._per_cache[checked.array] = values
            return None
        output = self._outputs[output_of(checked.array)]
        if output.has_unknown_class(checked.array, values):
            return "damaged"
        array = checked.array.removeprefix(output.prefix)
        return None if output.encoding.accepts(array, torch.from_numpy(values)) else "not finite"

    def invalid_per_cache_arrays(self) -> Iterator[str]:
        """A path of each group of per-cache arrays whose bytes fit the receipt, but whose values are invalid."""
        if self._per_cache.keys() != self._manifest.layout.fixed.keys():
            return
        in_order = {name: self._per_cache[name] for name in self._manifest.layout.fixed}
        table = {name: in_order.pop(name) for name in SAMPLE_ARRAYS if name in in_order}
        rows = {name: in_order.pop(name) for name in ROW_ARRAYS if name in in_order}
        fitted: list[tuple[dict[str, np.ndarray], Callable[..., object]]] = [
            ({name: in_order[name] for name in output.fixed_names()}, partial(fitted_encoding, output=output.name))
            for output in self._outputs.values()
        ]
        for arrays, read in ((table, samples_from_arrays), (rows, row_map_from_arrays), *fitted):
            if arrays:
                try:
                    read(self._manifest, arrays, url="")
                except CorruptCache:
                    yield object_key(self._manifest.layout, PER_CACHE, next(iter(arrays)))
