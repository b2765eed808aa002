"""The records of a cache: its manifest, its receipts, and the objects that the receipts describe."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from logitcache.cache.layout import (
    GROUP,
    PER_CACHE,
    Block,
    array_specs,
    decode_object,
    group_metadata,
    has_right_rows,
    is_receipt_name,
    object_key,
    object_limits,
    receipt_key,
    receipt_names,
    view_blocks,
    view_name,
    view_number,
    view_receipts_key,
)
from logitcache.cache.manifest import (
    LOGITS,
    MANIFEST,
    MAX_MANIFEST_BYTES,
    MAX_RECEIPT_BYTES,
    RECEIPTS,
    Contents,
    Layout,
    Manifest,
    Receipt,
    ReceiptIndex,
    Sha256,
    StoredObject,
    ViewEntry,
    dump_manifest,
    index_limit,
    output_of,
    read_manifest,
    read_receipt,
    read_receipts,
    read_receipts_or_index,
    receipts_limit,
    view_receipts_limit,
)
from logitcache.cache.objects import ATTEMPTS, PAUSE_SECONDS, ObjectReader, read_object
from logitcache.cache.outputs import output_layouts, outputs_of, row_arrays
from logitcache.cache.packages import encoding_names, missing_packages, recorded_packages
from logitcache.cache.receipts import (
    ReceiptsByView,
    by_view,
    dump_index,
    dump_receipts,
    index_contents,
    is_large,
    lines_digest,
    mean_kl_at,
    selected,
    splits_receipts,
    value_lines,
    view_digest,
    view_entry,
)
from logitcache.digest import array_digest, sha256_hex
from logitcache.encodings import ENCODINGS, encoding_from_config
from logitcache.errors import CorruptCache, LogitCacheError
from logitcache.storage import Storage

DIGEST_HEADER = "logitcache content 2"


class CacheObject(NamedTuple):
    """One object of a cache, as its receipt describes it."""

    key: str
    receipt: str
    """Name of the receipt: a block's, or `PER_CACHE`."""
    array: str
    num_rows: int
    """As the receipt states."""
    stored: StoredObject

    def values(self, layout: Layout, data: bytes | memoryview) -> np.ndarray:
        """The values of the object, decoded from its bytes.

        Raises:
            ValueError: the bytes can't be decoded, or hold other values than the receipt states.
        """
        values = decode_object(layout, self.receipt, self.array, data, num_rows=self.num_rows)
        if array_digest(values) != self.stored.values_sha256:
            raise ValueError("the values differ from the receipt")
        return values


def description(name: str) -> str:
    """What a receipt describes, for messages."""
    return "the per-cache arrays" if name == PER_CACHE else f"block {name}"


@dataclass(frozen=True)
class Records:
    """The manifest of a cache, and receipts by name: all of a sealed cache, those that exist of an open one."""

    manifest: Manifest
    receipts: Mapping[str, Receipt]

    @property
    def layout(self) -> Layout:
        """The manifest's layout."""
        return self.manifest.layout

    def objects(self, names: Iterable[str] | None = None) -> Iterator[CacheObject]:
        """The objects that receipts describe: those of the given names, or all.

        Arrays that the layout doesn't have are left out.
        """
        layout = self.layout
        for name in self.receipts if names is None else names:
            specs = array_specs(layout, name)
            receipt = self.receipts[name]
            for array, stored in receipt.objects.items():
                if array in specs:
                    yield CacheObject(object_key(layout, name, array), name, array, receipt.rows, stored)

    def content_digest(self) -> Sha256:
        """The content digest as the cache's format defines it; in format 2 it is the pin."""
        if self.manifest.identity.format_version > 1:
            return self.pin()
        # Format 1 covers which values there are, not where they are.
        hashes = sorted(stored.values_sha256 for each in self.receipts.values() for stored in each.objects.values())
        return sha256_hex("\n".join(hashes).encode())

    @cached_property
    def by_view(self) -> ReceiptsByView:
        """The receipts, grouped by view."""
        return by_view(self.receipts)

    def pin(self) -> Sha256:
        """SHA-256 over the id and the values of each array in each block (docs/format.md)."""
        lines = [
            DIGEST_HEADER,
            f"id {self.manifest.id}",
            f"num_samples {self.layout.num_samples}",
            f"rows_per_block {self.layout.rows_per_block}",
        ]
        if self.by_view.per_cache is not None:
            lines += (f"fixed {line}" for line in value_lines(self.by_view.per_cache))
        lines += (f"view {view} {self.view_digest(view)}" for view in self.by_view.views)
        return lines_digest(lines)

    def view_digest(self, view: int) -> Sha256:
        """The digest of one view; from the index, if there is one."""
        entry = self.by_view.entries.get(view)
        return view_digest(self.by_view.of_view(view)) if entry is None else entry.object.values_sha256

    def view_entry(self, view: int) -> ViewEntry:
        """Sums over one view; from the index, if there is one. Only then `object` is that of its receipts."""
        return self.by_view.entries.get(view) or view_entry(self.by_view.of_view(view), b"")

    def contents(self) -> Contents:
        """Sizes and fidelity, summed over all receipts, or over the entries of the index."""
        receipts = self.by_view
        if receipts.is_indexed:
            return index_contents(receipts.per_cache, receipts.entries.values())
        total = rows = measured_rows = 0
        kl_sum = 0.0
        output_bytes: dict[str, int] = {}
        for name, receipt in self.receipts.items():
            total += sum(stored.bytes for stored in receipt.objects.values())
            if name == PER_CACHE:
                continue
            rows += receipt.rows
            if receipt.kl_mean is not None:
                measured_rows += receipt.rows
                kl_sum += receipt.rows * receipt.kl_mean
            for array, stored in receipt.objects.items():
                output_bytes[output_of(array)] = output_bytes.get(output_of(array), 0) + stored.bytes
        kl_mean = kl_sum / measured_rows if measured_rows else math.nan
        return Contents(
            bytes=total,
            label_bytes=sum(output_bytes.values()),
            rows=rows,
            kl_mean=kl_mean if math.isfinite(kl_mean) else None,
            kl_at=mean_kl_at(receipt for name, receipt in self.receipts.items() if name != PER_CACHE),
            output_bytes=output_bytes if output_bytes.keys() - {LOGITS} else {},
        )

    def sealed(self, *, put: Callable[[str, bytes], None] | None = None, **changes: Any) -> tuple[Records, bytes]:
        """The same records with a sealed manifest, and the bytes of its `receipts.json`.

        Args:
            put: stores the objects with the receipts of single views, of a cache that has them; `put_view_receipts`
                stores them later.
            changes: fields of the manifest to replace, such as its layout or provenance.
        """
        records, gathered = Records(self.manifest.model_copy(update=changes), self.receipts).gathered(put=put)
        sealed = {
            "state": "sealed",
            "digest": records.content_digest(),
            "receipts": sha256_hex(gathered),
            "receipts_by_view": splits_receipts(records.manifest),
            "contents": records.contents(),
        }
        return Records(records.manifest.model_copy(update=sealed), records.receipts), gathered

    def gathered(self, *, put: Callable[[str, bytes], None] | None = None) -> tuple[Records, bytes]:
        """The same records, with the entries of the index if there is one, and the bytes of `receipts.json`.

        Args:
            put: as in `sealed`.
        """
        if not splits_receipts(self.manifest):
            return self, dump_receipts(self.receipts)
        receipts = self.by_view
        assert receipts.per_cache is not None
        entries: dict[int, ViewEntry] = {}
        for view in receipts.views:
            entry = receipts.entries.get(view)
            if entry is None:
                of_view = receipts.of_view(view)
                data = dump_receipts(of_view)
                entry = view_entry(of_view, data)
                if put is not None:
                    put(view_receipts_key(view, entry.object.sha256), data)
            entries[view] = entry
        indexed = ReceiptsByView(receipts.per_cache, receipts.views, receipts.of_view, entries=entries)
        named = {view_name(view): entry for view, entry in entries.items()}
        return Records(self.manifest, indexed), dump_index(receipts.per_cache, named)

    def view_receipts_keys(self) -> dict[str, int]:
        """The keys of the objects with the receipts of single views, and the views; none of a small cache."""
        return {view_receipts_key(view, each.object.sha256): view for view, each in self.by_view.entries.items()}


def put_view_receipts(storage: Storage, records: Records, *, again: bool = False) -> None:
    """Store the receipts of single views that are not there.

    Args:
        storage: the cache.
        records: from `Records.sealed` or `Records.gathered`.
        again: also those that are there, which may be damaged.
    """
    for key, view in records.view_receipts_keys().items():
        stored = records.by_view.entries[view].object
        if again or storage.size(key) != stored.bytes:
            data = dump_receipts(records.by_view.of_view(view))
            if sha256_hex(data) != stored.sha256:
                raise CorruptCache(f"{key} is damaged: it is not canonical JSON (docs/format.md)")
            storage.put(key, data)


def view_of_receipts_key(key: str) -> int | None:
    """The view that an object below `receipts/` has receipts of; None for other keys."""
    found = re.fullmatch(r"receipts/v(\d+)/.*", key)
    return None if found is None else int(found[1])


def stored_manifest(storage: Storage) -> Manifest:
    """The manifest of the cache in a storage.

    Raises:
        NotACache, UnsupportedFormat, CorruptCache: as `manifest.read_manifest`.
    """
    manifest = read_manifest(storage.get(MANIFEST, limit=MAX_MANIFEST_BYTES), url=storage.url)
    check_encoding(manifest, url=storage.url)
    return manifest


def check_encoding(manifest: Manifest, *, url: str) -> None:
    """Compare a manifest's arrays with those of its encodings, if the encodings' packages are installed.

    Raises:
        CorruptCache: they differ.
        UsageError: a package can't be imported.
    """
    layout = manifest.layout
    if manifest.identity.outputs.get(LOGITS) != [layout.num_classes]:
        raise CorruptCache(f"{url}: {MANIFEST} is damaged: identity.outputs and layout.num_classes differ")
    if missing_packages(manifest, ENCODINGS) is not None:
        return  # the bytes can be copied and compared with the receipts; `require_packages` refuses to decode them
    for name in encoding_names(manifest.identity):
        if name in ENCODINGS:
            _ = ENCODINGS[name]  # a package that can't be imported is not the cache's fault
    try:
        encoding = encoding_from_config(manifest.identity.encoding)
        outputs = outputs_of(manifest.identity)
        outputs_on_disk = output_layouts(encoding, layout.num_classes, outputs)
        expected = row_arrays(outputs_on_disk)
    except LogitCacheError as error:
        raise CorruptCache(f"{url}: {MANIFEST} is damaged: identity.encoding: {error}") from None
    # Fitting an encoding may change the length of its arrays' rows, and nothing else.
    differs = layout.arrays.keys() != expected.keys() or any(
        layout.arrays[name].dtype != spec.dtype
        or len(layout.arrays[name].row_shape) != len(spec.row_shape)
        or (not outputs_on_disk[output_of(name)].encoding.fitted_arrays and layout.arrays[name] != spec)
        for name, spec in expected.items()
    )
    fitted = {name for output in outputs_on_disk.values() for name in output.fixed_names()}
    if differs or not fitted <= layout.fixed.keys():
        named = ", ".join(f"{name}: {output.encoding!r}" for name, output in outputs.items())
        versions = ", ".join(f"{package} wrote it" for package in recorded_packages(manifest).values())
        raise CorruptCache(
            f"{url}: {MANIFEST} is damaged: layout.arrays are not those of {encoding!r}{named and f' and {named}'}"
            f"{versions and f' ({versions})'}"
        )


def read_records(storage: Storage, objects: ObjectReader | None = None) -> Records:
    """Manifest and receipts that belong together, even while another process replaces the cache by a larger one.

    Raises:
        NotACache, UnsupportedFormat, CorruptCache: as `stored_manifest` and `collect_receipts`.
    """
    manifest = stored_manifest(storage)
    for attempt in range(ATTEMPTS - 1 if storage.is_remote else 0):
        try:
            return Records(manifest, collect_receipts(storage, manifest, objects))
        except CorruptCache:
            time.sleep(PAUSE_SECONDS * 2**attempt)
            manifest = stored_manifest(storage)
    return Records(manifest, collect_receipts(storage, manifest, objects))


def collect_receipts(
    storage: Storage, manifest: Manifest, objects: ObjectReader | None = None
) -> Mapping[str, Receipt]:
    """Receipts by name: all of a sealed cache; of an open one, those whose objects are stored.

    Those of a large cache are read view by view, when they are needed.

    Args:
        storage: the cache.
        manifest: its manifest.
        objects: reads the receipts of a remote cache, or their local copy.

    Raises:
        CorruptCache: a sealed cache without its receipts.
    """
    if manifest.state == "sealed":
        return _sealed_receipts(storage, manifest, objects)
    layout = manifest.layout
    data = storage.get(RECEIPTS, limit=receipts_limit(layout))
    gathered = {} if data is None else read_receipts_or_index(data, url=storage.url)
    single = _single_receipts(storage, layout)
    if isinstance(gathered, dict):
        gathered = {name: receipt for name, receipt in gathered.items() if is_receipt_name(layout, name)}
        if not is_large(layout):
            names = [name for of_view in single.values() for name in of_view]
            return in_place(storage, layout, gathered | read_single_receipts(storage, names))
    receipts = _open_by_view(storage, layout, gathered, single)
    return receipts if is_large(layout) else dict(receipts)


def _open_by_view(
    storage: Storage, layout: Layout, gathered: dict[str, Receipt] | ReceiptIndex, single: Mapping[str, list[str]]
) -> ReceiptsByView:
    """The receipts of an open cache, read view by view.

    Args:
        storage: the cache.
        layout: its layout.
        gathered: what `receipts.json` holds, if views were sealed before.
        single: the names of single receipts, by the name of the view; that of the per-cache arrays by its own.
    """
    per_cache = read_single_receipts(storage, single.get(PER_CACHE, [])).get(PER_CACHE)
    if isinstance(gathered, ReceiptIndex):
        indexed = {view_number(name): entry for name, entry in gathered.views.items()}
        before = {view: entry for view, entry in indexed.items() if view in layout.views}
        per_cache = per_cache or gathered.fixed

        def read_before(view: int) -> Mapping[str, Receipt]:
            entry = before.get(view)
            if entry is not None and entry.object.bytes <= view_receipts_limit(layout):
                key = view_receipts_key(view, entry.object.sha256)
                with suppress(CorruptCache):  # damaged receipts count as missing: the blocks are computed again
                    return read_receipts(read_object(storage, key, entry.object), url=storage.url, key=key)
            return {}

        views = set(before)
    else:
        grouped = by_view(gathered)
        per_cache = per_cache or grouped.per_cache
        views = set(grouped.views)

        def read_before(view: int) -> Mapping[str, Receipt]:
            return grouped.of_view(view) if view in views else {}

    def read(view: int) -> dict[str, Receipt]:
        receipts = {**read_before(view), **read_single_receipts(storage, single.get(view_name(view), []))}
        right = in_place(
            storage, layout, {name: each for name, each in receipts.items() if _is_of(layout, view, name)}, view=view
        )
        return {name: right[name] for name in sorted(right, key=lambda name: Block.from_name(name).number)}

    if per_cache is not None and _contradiction(layout, PER_CACHE, per_cache, object_limits(layout)) is not None:
        per_cache = None
    return ReceiptsByView(per_cache, views | {view_number(name) for name in single if name != PER_CACHE}, read)


def _is_of(layout: Layout, view: int, name: str) -> bool:
    return is_receipt_name(layout, name) and name.startswith(f"{view_name(view)}/")


def _single_receipts(storage: Storage, layout: Layout) -> dict[str, list[str]]:
    """The names of single receipts in an open cache, by the name of the view; of the per-cache arrays by its own."""
    names: dict[str, list[str]] = {}
    for key in storage.list_keys("receipts"):
        name = key.removeprefix("receipts/").removesuffix(".json")
        if is_receipt_name(layout, name):
            names.setdefault(name.partition("/")[0], []).append(name)
    return names


def read_single_receipts(storage: Storage, names: Iterable[str]) -> dict[str, Receipt]:
    """The receipts of single blocks that can be read; a damaged one counts as missing: its block is computed again."""
    keys = {name: receipt_key(name) for name in names}
    with ThreadPoolExecutor(storage.concurrency) as threads:
        found = list(threads.map(lambda key: storage.get(key, limit=MAX_RECEIPT_BYTES), keys.values()))
    receipts = {}
    for (name, key), data in zip(keys.items(), found, strict=True):
        if data is not None:
            with suppress(CorruptCache):
                receipts[name] = read_receipt(data, key=key)
    return receipts


def in_place(
    storage: Storage, layout: Layout, receipts: Mapping[str, Receipt], *, view: int | None = None
) -> dict[str, Receipt]:
    """The receipts that fit the layout, and whose objects are stored with the size that they state.

    Args:
        storage: the cache.
        layout: its layout.
        receipts: by name.
        view: the one that all receipts belong to; None where they belong to several.
    """
    folders = [GROUP] if view is None else [f"{GROUP}/{array}/c/{view}" for array in layout.arrays]
    sizes = {key: size for folder in folders for key, size in storage.sizes(folder)} if receipts else {}
    limits = object_limits(layout)

    def is_stored(name: str, receipt: Receipt) -> bool:
        if _contradiction(layout, name, receipt, limits) is not None:
            return False
        # A lost per-cache array is reported when it is read. To write another one would invalidate every block.
        return name == PER_CACHE or all(
            sizes.get(object_key(layout, name, array)) == stored.bytes for array, stored in receipt.objects.items()
        )

    return {name: receipt for name, receipt in receipts.items() if is_stored(name, receipt)}


def _sealed_receipts(storage: Storage, manifest: Manifest, objects: ObjectReader | None) -> Mapping[str, Receipt]:
    layout = manifest.layout
    expected = str(manifest.receipts)
    nearby = None if objects is None else objects.nearby
    data = None if nearby is None else nearby.get(expected, limit=_gathered_limit(manifest))
    if data is None or sha256_hex(data) != expected:
        data, is_right = gathered_receipts(storage, manifest)
        if data is not None and not is_right:
            raise CorruptCache(f"{storage.url}: {RECEIPTS} is damaged: its SHA-256 differs from the one in {MANIFEST}")
        if data is not None and objects is not None:
            objects.keep(expected, [data])
    found = {} if data is None else read_receipts_or_index(data, url=storage.url)
    if data is not None and isinstance(found, ReceiptIndex) != manifest.receipts_by_view:
        kinds = ("the receipts", "an index of views")
        raise CorruptCache(
            f"{storage.url}: {RECEIPTS} is damaged: {MANIFEST} describes it as {kinds[manifest.receipts_by_view]}, "
            f"and it is {kinds[not manifest.receipts_by_view]}"
        )
    if isinstance(found, ReceiptIndex):
        return indexed_receipts(storage, manifest, found, objects)
    # Ends at the first name that is missing: a manifest may claim more names than fit into memory.
    missing = next((name for name in receipt_names(layout) if name not in found), None)
    if missing is not None:
        raise CorruptCache(f"{storage.url} is sealed, but {RECEIPTS} lacks {missing}")
    receipts = {name: found[name] for name in receipt_names(layout)}
    limits = object_limits(layout)
    for name, receipt in receipts.items():
        contradiction = _contradiction(layout, name, receipt, limits)
        if contradiction is not None:
            raise CorruptCache(f"{storage.url}: {RECEIPTS} {contradiction}")
    return receipts


def indexed_receipts(
    storage: Storage, manifest: Manifest, index: ReceiptIndex, objects: ObjectReader | None = None
) -> ReceiptsByView:
    """The receipts of a sealed cache whose `receipts.json` is an index; those of a view are read when they are needed.

    Raises:
        CorruptCache: index and manifest contradict each other. Reading a view raises it too.
    """
    layout, url = manifest.layout, storage.url
    # Ends at the first view that is missing, as for receipts.
    missing = next((view for view in layout.views if view_name(view) not in index.views), None)
    if missing is not None:
        raise CorruptCache(f"{url} is sealed, but {RECEIPTS} lacks view {missing}")
    limits = object_limits(layout)
    contradiction = _contradiction(layout, PER_CACHE, index.fixed, limits)
    if contradiction is not None:
        raise CorruptCache(f"{url}: {RECEIPTS} {contradiction}")
    entries = {view: index.views[view_name(view)] for view in layout.views}
    limit = view_receipts_limit(layout)
    for view, entry in entries.items():
        if entry.object.bytes > limit:
            raise CorruptCache(
                f"{url}: {RECEIPTS} states {entry.object.bytes} bytes for the receipts of view {view}; they take at "
                f"most {limit}"
            )

    def read(view: int) -> dict[str, Receipt]:
        stored = entries[view].object
        key = view_receipts_key(view, stored.sha256)
        why = f"view {view} ({RECEIPTS})"
        data = (
            read_object(storage, key, stored, why=why) if objects is None else objects.read({key: stored}, why=why)[0]
        )
        found = read_receipts(data, url=url, key=key)
        missing = next((block.name for block in view_blocks(layout, view) if block.name not in found), None)
        if missing is not None or len(found) > layout.blocks_per_view:
            raise CorruptCache(
                f"{url}: {key} is damaged: {f'it lacks {missing}' if missing else 'it has other blocks'}"
            )
        receipts = {block.name: found[block.name] for block in view_blocks(layout, view)}
        for name, receipt in receipts.items():
            contradiction = _contradiction(layout, name, receipt, limits)
            if contradiction is not None:
                raise CorruptCache(f"{url}: {key} {contradiction}")
        if view_entry(receipts, data) != entries[view]:
            raise CorruptCache(f"{url}: {key} doesn't add up to what {RECEIPTS} states of view {view}")
        return receipts

    return ReceiptsByView(index.fixed, layout.views, read, entries=entries)


def _contradiction(layout: Layout, name: str, receipt: Receipt, limits: Mapping[str, int]) -> str | None:
    """In what a receipt contradicts the layout; None where it fits."""
    if not has_right_rows(layout, name, receipt.rows):
        return f"and {MANIFEST} differ in the rows of {name}"
    if receipt.objects.keys() != array_specs(layout, name).keys():
        return f"and {MANIFEST} differ in the arrays of {name}"
    for array, stored in receipt.objects.items():
        if stored.bytes > limits[array]:
            return f"states {stored.bytes} bytes for {array} of {name}; a chunk of it takes at most {limits[array]}"
    return None


def _gathered_limit(manifest: Manifest) -> int:
    return (index_limit if manifest.receipts_by_view else receipts_limit)(manifest.layout)


def gathered_receipts(storage: Storage, manifest: Manifest) -> tuple[bytes | None, bool]:
    """The bytes of a sealed cache's `receipts.json`, and whether they have the SHA-256 that the manifest states.

    While the records are replaced, the right file may have its second key only.
    """
    limit = _gathered_limit(manifest)
    other = None
    for key in (RECEIPTS, pinned_receipts_key(str(manifest.receipts))):
        found = storage.get(key, limit=limit)
        if found is not None and sha256_hex(found) == manifest.receipts:
            return found, True
        other = other or found
    return other, False


def pinned_receipts_key(sha256: str) -> str:
    """Second key of `receipts.json` while it and the manifest are replaced one after the other."""
    return f"receipts/{sha256}.json"


def write_group_metadata(storage: Storage, layout: Layout) -> None:
    """Write the `zarr.json` files of a layout where they are missing or differ."""
    for key, data in group_metadata(layout).items():
        if storage.get(key, limit=len(data)) != data:
            storage.put(key, data)


def replace_records(storage: Storage, manifest: Manifest, gathered: bytes, *, replaces: Manifest) -> None:
    """Replace the records of a cache so that a reader finds a matching pair at every moment, also after a kill.

    Call it under the storage's lock.

    Args:
        storage: the cache.
        manifest: the new, sealed manifest.
        gathered: its `receipts.json`.
        replaces: the manifest that is there.
    """
    if replaces.state == "open":  # an open cache ignores receipts of other blocks
        storage.put(RECEIPTS, gathered)
        storage.put(MANIFEST, dump_manifest(manifest))
        return
    pinned = pinned_receipts_key(str(manifest.receipts))
    if replaces.receipts != manifest.receipts:
        # The new receipts under a second key first: those that the manifest names exist at every moment.
        storage.put(pinned, gathered)
        storage.put(MANIFEST, dump_manifest(manifest))
    if storage.get(RECEIPTS, limit=len(gathered)) != gathered:
        storage.put(RECEIPTS, gathered)
    storage.delete(pinned)


def matching_receipts(manifest: Manifest, receipts: Mapping[str, Receipt]) -> Mapping[str, Receipt] | None:
    """The receipts of a sealed cache from those of a copy, which may have more views; None if the labels differ."""
    layout, there = manifest.layout, by_view(receipts)
    if there.per_cache is None or not all(has_view(there, layout, view) for view in layout.views):
        return None
    kept = selected(layout, there.per_cache, dict.fromkeys(layout.views, there))
    return kept if Records(manifest, kept).content_digest() == manifest.digest else None


def has_view(receipts: ReceiptsByView, layout: Layout, view: int) -> bool:
    """Whether there is a receipt of each block of a view."""
    if view in receipts.entries:
        return True
    return view in receipts.views and all(block.name in receipts.of_view(view) for block in view_blocks(layout, view))
