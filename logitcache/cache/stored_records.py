"""Records in a store: how they are found, read and checked there, and replaced."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

from logitcache.cache.layout import (
    GROUP,
    PER_CACHE,
    Block,
    array_specs,
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
    Layout,
    Manifest,
    Receipt,
    ReceiptIndex,
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
    dump_receipts,
    is_large,
    view_entry,
)
from logitcache.cache.records import Records
from logitcache.digest import sha256_hex
from logitcache.encodings import ENCODINGS, encoding_from_config
from logitcache.errors import CorruptCache, LogitCacheError
from logitcache.storage import Storage


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
