"""The records of a cache: its manifest, its receipts, and the objects that the receipts describe."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
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
    Sha256,
    StoredObject,
    dump_manifest,
    output_of,
    read_manifest,
    read_receipt,
    read_receipts,
    receipts_limit,
)
from logitcache.cache.objects import ATTEMPTS, PAUSE_SECONDS, ObjectReader
from logitcache.cache.outputs import output_layouts, outputs_of, row_arrays
from logitcache.cache.packages import encoding_names, missing_packages, recorded_packages
from logitcache.digest import array_digest, canonical_json, sha256_hex
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

    def pin(self) -> Sha256:
        """SHA-256 over the id and the values of each array in each block (docs/format.md)."""
        by_view: dict[int, list[tuple[int, Receipt]]] = {}
        for name, receipt in self.receipts.items():
            if name != PER_CACHE:
                block = Block.from_name(name)
                by_view.setdefault(block.view, []).append((block.number, receipt))
        lines = [
            DIGEST_HEADER,
            f"id {self.manifest.id}",
            f"num_samples {self.layout.num_samples}",
            f"rows_per_block {self.layout.rows_per_block}",
        ]
        if PER_CACHE in self.receipts:
            lines += (f"fixed {line}" for line in _value_lines(self.receipts[PER_CACHE]))
        for view in sorted(by_view):
            blocks = sorted(by_view[view], key=lambda numbered: numbered[0])
            digest = _lines_digest(f"{number} {line}" for number, receipt in blocks for line in _value_lines(receipt))
            lines.append(f"view {view} {digest}")
        return _lines_digest(lines)

    def contents(self) -> Contents:
        """Sizes and fidelity, summed over all receipts."""
        total = sum(stored.bytes for receipt in self.receipts.values() for stored in receipt.objects.values())
        blocks = [receipt for name, receipt in self.receipts.items() if name != PER_CACHE]
        measured = [receipt for receipt in blocks if receipt.kl_mean is not None]
        rows = sum(receipt.rows for receipt in measured)
        kl_mean = sum(receipt.rows * (receipt.kl_mean or 0.0) for receipt in measured) / rows if rows else math.nan
        output_bytes: dict[str, int] = {}
        for receipt in blocks:
            for array, stored in receipt.objects.items():
                output_bytes[output_of(array)] = output_bytes.get(output_of(array), 0) + stored.bytes
        return Contents(
            bytes=total,
            label_bytes=sum(output_bytes.values()),
            rows=sum(receipt.rows for receipt in blocks),
            kl_mean=kl_mean if math.isfinite(kl_mean) else None,
            output_bytes=output_bytes if output_bytes.keys() - {LOGITS} else {},
        )

    def sealed(self, **changes: Any) -> tuple[Records, bytes]:
        """The same records with a sealed manifest, and the bytes of its `receipts.json`.

        Args:
            changes: fields of the manifest to replace, such as its layout or provenance.
        """
        manifest = self.manifest.model_copy(update=changes)
        gathered = dump_receipts(self.receipts)
        records = Records(manifest, self.receipts)
        sealed = {
            "state": "sealed",
            "digest": records.content_digest(),
            "receipts": sha256_hex(gathered),
            "contents": records.contents(),
        }
        return Records(manifest.model_copy(update=sealed), self.receipts), gathered


def _value_lines(receipt: Receipt) -> list[str]:
    return [f"{array} {stored.values_sha256}" for array, stored in sorted(receipt.objects.items())]


def _lines_digest(lines: Iterable[str]) -> Sha256:
    return sha256_hex("".join(f"{line}\n" for line in lines).encode())


def dump_receipts(receipts: Mapping[str, Receipt]) -> bytes:
    """The bytes of `receipts.json`."""
    return canonical_json({name: receipt.model_dump() for name, receipt in receipts.items()})


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
    if differs or not encoding.fitted_arrays.keys() <= layout.fixed.keys():
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


def collect_receipts(storage: Storage, manifest: Manifest, objects: ObjectReader | None = None) -> dict[str, Receipt]:
    """Receipts by name: all of a sealed cache; of an open one, those whose objects are stored.

    Args:
        storage: the cache.
        manifest: its manifest.
        objects: reads `receipts.json` of a remote cache, or its local copy.

    Raises:
        CorruptCache: a sealed cache without its receipts.
    """
    layout = manifest.layout
    if manifest.state == "sealed":
        return _sealed_receipts(storage, manifest, objects)
    gathered = storage.get(RECEIPTS, limit=receipts_limit(layout))
    receipts = {} if gathered is None else read_receipts(gathered, url=storage.url)
    names = [key.removeprefix("receipts/").removesuffix(".json") for key in storage.list_keys("receipts")]
    keys = {name: receipt_key(name) for name in names if is_receipt_name(layout, name)}
    with ThreadPoolExecutor(storage.concurrency) as threads:
        found = list(threads.map(lambda key: storage.get(key, limit=MAX_RECEIPT_BYTES), keys.values()))
    for (name, key), data in zip(keys.items(), found, strict=True):
        if data is not None:
            # A damaged receipt counts as missing: its block is computed again.
            with suppress(CorruptCache):
                receipts[name] = read_receipt(data, key=key)
    return in_place(storage, layout, {name: receipts[name] for name in receipts if is_receipt_name(layout, name)})


def in_place(storage: Storage, layout: Layout, receipts: Mapping[str, Receipt]) -> dict[str, Receipt]:
    """The receipts that fit the layout, and whose objects are stored with the size that they state."""
    sizes = dict(storage.sizes(GROUP)) if receipts else {}
    limits = object_limits(layout)

    def is_stored(name: str, receipt: Receipt) -> bool:
        if _contradiction(layout, name, receipt, limits) is not None:
            return False
        # A lost per-cache array is reported when it is read. To write another one would invalidate every block.
        return name == PER_CACHE or all(
            sizes.get(object_key(layout, name, array)) == stored.bytes for array, stored in receipt.objects.items()
        )

    return {name: receipt for name, receipt in receipts.items() if is_stored(name, receipt)}


def _sealed_receipts(storage: Storage, manifest: Manifest, objects: ObjectReader | None) -> dict[str, Receipt]:
    layout = manifest.layout
    expected = str(manifest.receipts)
    nearby = None if objects is None else objects.nearby
    gathered = None if nearby is None else nearby.get(expected, limit=receipts_limit(layout))
    if gathered is None or sha256_hex(gathered) != expected:
        gathered, is_right = gathered_receipts(storage, manifest)
        if gathered is not None and not is_right:
            raise CorruptCache(f"{storage.url}: {RECEIPTS} is damaged: its SHA-256 differs from the one in {MANIFEST}")
        if gathered is not None and objects is not None:
            objects.keep(expected, [gathered])
    found = {} if gathered is None else read_receipts(gathered, url=storage.url)
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


def gathered_receipts(storage: Storage, manifest: Manifest) -> tuple[bytes | None, bool]:
    """The bytes of a sealed cache's `receipts.json`, and whether they have the SHA-256 that the manifest states.

    While the records are replaced, the right file may have its second key only.
    """
    limit = receipts_limit(manifest.layout)
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


def matching_receipts(manifest: Manifest, receipts: Mapping[str, Receipt]) -> dict[str, Receipt] | None:
    """The receipts of a sealed cache from those of a copy, which may have more views; None if the labels differ."""
    if not all(name in receipts for name in receipt_names(manifest.layout)):
        return None
    kept = {name: receipts[name] for name in receipt_names(manifest.layout)}
    return kept if Records(manifest, kept).content_digest() == manifest.digest else None
