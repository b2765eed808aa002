"""What of a cache has been committed: its receipts, and the arrays that are stored once."""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import numpy as np

from logitcache.arrays import ArraySpec
from logitcache.cache.layout import (
    FIXED,
    FIXED_RECEIPT_KEY,
    GROUP,
    Block,
    all_blocks,
    block_key,
    block_rows,
    chunk_limit,
    decode_fixed,
    fixed_array_key,
    is_block,
    num_blocks,
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
    output_of,
    read_manifest,
    read_receipt,
    read_receipts,
    receipts_limit,
)
from logitcache.cache.objects import ATTEMPTS, PAUSE_SECONDS, ObjectReader
from logitcache.cache.outputs import outputs_of, row_arrays
from logitcache.cache.packages import encoding_names, missing_packages, recorded_packages
from logitcache.data.samples import SampleTable
from logitcache.digest import array_digest, sha256_hex
from logitcache.encodings import ENCODINGS, Encoding, encoding_from_config
from logitcache.errors import CorruptCache, LogitCacheError, UsageError
from logitcache.storage import Storage


def stored_encoding(
    storage: Storage, manifest: Manifest, fixed: Receipt, objects: ObjectReader | None = None
) -> Encoding:
    """A cache's encoding, with what it was fitted to.

    Raises:
        CorruptCache: that is damaged, or gone.
    """
    encoding = encoding_from_config(manifest.identity.encoding)
    arrays = {name: read_fixed(storage, manifest.layout, fixed, name, objects) for name in encoding.fitted_arrays}
    return fitted_encoding(manifest, arrays, url=storage.url)


def fitted_encoding(manifest: Manifest, arrays: Mapping[str, np.ndarray], *, url: str) -> Encoding:
    """A cache's encoding with the arrays that it was fitted to.

    Raises:
        CorruptCache: arrays that make no sense.
    """
    encoding = encoding_from_config(manifest.identity.encoding)
    try:
        fitted = encoding.with_fitted(arrays)
        if fitted.arrays(manifest.layout.num_classes) != arrays_of(manifest.layout, LOGITS):
            raise ValueError("the rows of layout.arrays are of another length")
        return fitted
    except (ValueError, TypeError, LogitCacheError) as error:
        raise CorruptCache(f"{url}: what {encoding.name} was fitted to makes no sense: {error}") from None


def stored_samples(arrays: Mapping[str, np.ndarray], num_samples: int, *, url: str) -> SampleTable:
    """The sample table from its fixed arrays.

    Raises:
        CorruptCache: arrays that are no table of so many samples.
    """
    try:
        keys = arrays["sample_keys"].tobytes().decode().split("\n") if "sample_keys" in arrays else None
        return SampleTable(num_samples, keys, arrays["sample_targets"], arrays["sample_contents"])
    except (KeyError, UnicodeDecodeError, UsageError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else error
        raise CorruptCache(f"{url}: its sample table makes no sense: {reason}; get the cache again") from None


def arrays_of(layout: Layout, output: str) -> dict[str, ArraySpec]:
    """The arrays of one output, by the names that its encoding has for them."""
    prefix = "" if output == LOGITS else f"{output}_"
    return {name.removeprefix(prefix): spec for name, spec in layout.arrays.items() if output_of(name) == output}


def read_fixed(
    storage: Storage, layout: Layout, fixed: Receipt, name: str, objects: ObjectReader | None = None
) -> np.ndarray:
    """A fixed array, held to its receipt.

    Raises:
        CorruptCache: it is not what was written.
    """
    if name not in fixed.objects:
        raise CorruptCache(f"{storage.url}: the receipt of its fixed arrays lacks {name}, which it must hold")
    spec = layout.fixed[name]
    [data] = (objects or ObjectReader(storage)).read(
        {fixed_array_key(name, spec): fixed.objects[name]}, why="what is stored once"
    )
    try:
        values = decode_fixed(spec, data)
        if array_digest(values) != fixed.objects[name].values_sha256:
            raise ValueError("other values")
    except (ValueError, RuntimeError):
        raise CorruptCache(
            f"{storage.url}: {GROUP}/{name} is not what was written; run `logitcache verify --deep`"
        ) from None
    return values


def stored_manifest(storage: Storage) -> Manifest:
    """The manifest of the cache in a storage.

    Raises:
        NotACache, UnsupportedFormat, CorruptCache: as `manifest.read_manifest`.
    """
    manifest = read_manifest(storage.get(MANIFEST, limit=MAX_MANIFEST_BYTES), url=storage.url)
    check_encoding(manifest, url=storage.url)
    return manifest


def check_encoding(manifest: Manifest, *, url: str) -> None:
    """Compare a manifest's arrays with those of its encoding, if the encoding's package is installed.

    Raises:
        CorruptCache: they differ.
        UsageError: the package can't be imported.
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
        expected = row_arrays(encoding, layout.num_classes, outputs)
    except LogitCacheError as error:
        raise CorruptCache(f"{url}: {MANIFEST} is damaged: identity.encoding: {error}") from None
    # Fitting may change how long a row of an array is, and nothing else.
    differs = layout.arrays.keys() != expected.keys() or any(
        layout.arrays[name].dtype != spec.dtype
        or len(layout.arrays[name].row_shape) != len(spec.row_shape)
        or (not (encoding.fitted_arrays and output_of(name) == LOGITS) and layout.arrays[name] != spec)
        for name, spec in expected.items()
    )
    if differs or not encoding.fitted_arrays.keys() <= layout.fixed.keys():
        named = ", ".join(f"{name}: {output.encoding!r}" for name, output in outputs.items())
        versions = ", ".join(f"{package} wrote it" for package in recorded_packages(manifest).values())
        raise CorruptCache(
            f"{url}: {MANIFEST} is damaged: layout.arrays are not those of {encoding!r}{named and f' and {named}'}"
            f"{versions and f' ({versions})'}"
        )


def read_records(storage: Storage, objects: ObjectReader | None = None) -> tuple[Manifest, dict[str, Receipt]]:
    """Manifest and receipts that belong together, of a cache that may be replaced by a grown one meanwhile.

    Raises:
        NotACache, UnsupportedFormat, CorruptCache: as `stored_manifest` and `collect_receipts`.
    """
    manifest = stored_manifest(storage)
    for attempt in range(ATTEMPTS - 1 if storage.is_remote else 0):
        try:
            return manifest, collect_receipts(storage, manifest, objects)
        except CorruptCache:
            time.sleep(PAUSE_SECONDS * 2**attempt)
            manifest = stored_manifest(storage)
    return manifest, collect_receipts(storage, manifest, objects)


def collect_receipts(storage: Storage, manifest: Manifest, objects: ObjectReader | None = None) -> dict[str, Receipt]:
    """The receipts of a cache by name: of a sealed one all, of an open one those whose objects are in place.

    Args:
        storage: the cache.
        manifest: its manifest.
        objects: reads what a hash is known of, from nearby where that is possible.

    Raises:
        CorruptCache: a sealed cache without its receipts.
    """
    layout = manifest.layout
    if manifest.state == "sealed":
        return _sealed_receipts(storage, manifest, objects)
    gathered = storage.get(RECEIPTS, limit=receipts_limit(layout))
    receipts = {} if gathered is None else read_receipts(gathered, url=storage.url)
    keys = [key for key in storage.list_keys("receipts") if _is_wanted(layout, _receipt_name(key))]
    with ThreadPoolExecutor(storage.concurrency) as threads:
        found = threads.map(lambda key: storage.get(key, limit=MAX_RECEIPT_BYTES), keys)
    for key, data in zip(keys, found, strict=True):
        if data is not None:
            # One that is damaged counts as missing: its block is computed again.
            with suppress(CorruptCache):
                receipts[_receipt_name(key)] = read_receipt(data, key=key)
    return in_place(storage, layout, {name: receipts[name] for name in receipts if _is_wanted(layout, name)})


def in_place(storage: Storage, layout: Layout, receipts: Mapping[str, Receipt]) -> dict[str, Receipt]:
    """Those of some receipts whose objects are there, of the size that they state."""
    sizes = dict(storage.sizes(GROUP)) if receipts else {}
    limits = _object_limits(layout)
    return {name: receipt for name, receipt in receipts.items() if _in_place(sizes, layout, name, receipt, limits)}


def _sealed_receipts(storage: Storage, manifest: Manifest, objects: ObjectReader | None) -> dict[str, Receipt]:
    layout = manifest.layout
    gathered = _gathered_receipts(storage, manifest, receipts_limit(layout), objects)
    found = {} if gathered is None else read_receipts(gathered, url=storage.url)
    names = itertools.chain([FIXED], (block.name for block in all_blocks(layout)))
    # Counted first: a manifest may claim more names than fit into memory.
    wanted = set(names) if len(found) > num_blocks(layout) else names
    lacking = next((name for name in wanted if name not in found), None)
    if lacking is not None:
        raise CorruptCache(f"{storage.url} is sealed, but {RECEIPTS} lacks {lacking}")
    receipts = {name: receipt for name, receipt in found.items() if name in wanted}
    limits = _object_limits(layout)
    for name, receipt in receipts.items():
        if receipt.rows != num_rows(layout, name):
            raise CorruptCache(f"{storage.url}: {RECEIPTS} and {MANIFEST} differ in the rows of {name}")
        if name != FIXED and receipt.objects.keys() != layout.arrays.keys():
            raise CorruptCache(f"{storage.url}: {RECEIPTS} and {MANIFEST} differ in the arrays of {name}")
        too_large = _too_large(receipt, limits)
        if too_large is not None:
            raise CorruptCache(
                f"{storage.url}: {RECEIPTS} states {receipt.objects[too_large].bytes} bytes for {too_large} of {name}; "
                f"a chunk of it takes {limits[too_large]} at most"
            )
    return receipts


def _is_wanted(layout: Layout, name: str) -> bool:
    return name == FIXED or is_block(layout, name)


def _object_limits(layout: Layout) -> dict[str, int]:
    """Bytes that an object may take, by array: more are not asked for, whatever a receipt states."""
    return {
        name: chunk_limit(spec.dtype, (layout.rows_per_block, *spec.row_shape)) for name, spec in layout.arrays.items()
    } | {name: chunk_limit(fixed.dtype, fixed.shape) for name, fixed in layout.fixed.items()}


def _too_large(receipt: Receipt, limits: Mapping[str, int]) -> str | None:
    """The first array of which a receipt states more than there can be."""
    for name, stored in receipt.objects.items():
        if name in limits and stored.bytes > limits[name]:
            return name
    return None


def _gathered_receipts(storage: Storage, manifest: Manifest, limit: int, objects: ObjectReader | None) -> bytes | None:
    """The receipts that the manifest was sealed with; while a cache is replaced, they have a name of their own."""
    nearby = None if objects is None else objects.nearby
    sealed_with = str(manifest.receipts)
    kept = None if nearby is None else nearby.get(sealed_with, limit=limit)
    if kept is not None and sha256_hex(kept) == sealed_with:
        return kept
    any_found = None
    for key in (RECEIPTS, pinned_receipts_key(sealed_with)):
        found = storage.get(key, limit=limit)
        if found is not None and sha256_hex(found) == sealed_with:
            if objects is not None:
                objects.keep(sealed_with, [found])
            return found
        any_found = any_found or found
    if any_found is not None:
        raise CorruptCache(f"{storage.url}: {RECEIPTS} is damaged: it is not the one that the manifest was sealed with")
    return None


def pinned_receipts_key(sha256: str) -> str:
    """Where a cache's receipts lie as well while its manifest and `receipts.json` are replaced one after the other."""
    return f"receipts/{sha256}.json"


def _receipt_name(key: str) -> str:
    return FIXED if key == FIXED_RECEIPT_KEY else key.removeprefix("receipts/").removesuffix(".json")


def num_rows(layout: Layout, name: str) -> int:
    """Rows that the receipt of a name must state."""
    return layout.num_samples if name == FIXED else len(block_rows(layout, Block.from_name(name)))


def _in_place(sizes: Mapping[str, int], layout: Layout, name: str, receipt: Receipt, limits: Mapping[str, int]) -> bool:
    if receipt.rows != num_rows(layout, name) or _too_large(receipt, limits) is not None:
        return False
    if name == FIXED:
        return receipt.objects.keys() == layout.fixed.keys()
    block = Block.from_name(name)
    return receipt.objects.keys() == layout.arrays.keys() and all(
        sizes.get(block_key(array, layout.arrays[array], block)) == stored.bytes
        for array, stored in receipt.objects.items()
    )
