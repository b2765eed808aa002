"""What of a cache has been committed: its receipts, and the arrays that are stored once."""

from __future__ import annotations

import numpy as np

from logitcache.digest import array_digest, sha256_hex
from logitcache.encodings import Encoding, encoding_from_config
from logitcache.errors import CorruptCache, LogitCacheError
from logitcache.layout import (
    FIXED,
    FIXED_RECEIPT_KEY,
    GROUP,
    Block,
    all_blocks,
    block_key,
    block_rows,
    decode_fixed,
    fixed_array_key,
)
from logitcache.manifest import (
    MANIFEST,
    MAX_RECEIPT_BYTES,
    RECEIPTS,
    Layout,
    Manifest,
    Receipt,
    read_receipt,
    read_receipts,
    receipts_limit,
)
from logitcache.storage import LocalStorage


def stored_encoding(storage: LocalStorage, manifest: Manifest, fixed: Receipt) -> Encoding:
    """A cache's encoding, with what it was fitted to.

    Raises:
        CorruptCache: that is damaged, or gone.
    """
    encoding = encoding_from_config(manifest.identity.encoding)
    arrays = {name: read_fixed(storage, manifest.layout, fixed, name) for name in encoding.fitted_arrays}
    try:
        fitted = encoding.with_fitted(arrays)
        if fitted.arrays(manifest.layout.num_classes) != manifest.layout.arrays:
            raise ValueError("the rows of layout.arrays are of another length")
        return fitted
    except (ValueError, TypeError, LogitCacheError) as error:
        raise CorruptCache(f"{storage.url}: what {encoding.name} was fitted to makes no sense: {error}") from None


def read_fixed(storage: LocalStorage, layout: Layout, fixed: Receipt, name: str) -> np.ndarray:
    """A fixed array, held to its receipt.

    Raises:
        CorruptCache: it is not what was written.
    """
    if name not in fixed.objects:
        raise CorruptCache(f"{storage.url}: the receipt of its fixed arrays lacks {name}, which it must hold")
    stored, spec = fixed.objects[name], layout.fixed[name]
    data = storage.get(fixed_array_key(name, spec), limit=stored.bytes)
    try:
        if data is None or sha256_hex(data) != stored.sha256:
            raise ValueError("other bytes")
        values = decode_fixed(spec, data)
        if array_digest(values) != stored.values_sha256:
            raise ValueError("other values")
    except (ValueError, RuntimeError):
        raise CorruptCache(
            f"{storage.url}: {GROUP}/{name} is not what was written; run `logitcache verify --deep`"
        ) from None
    return values


def collect_receipts(storage: LocalStorage, manifest: Manifest) -> dict[str, Receipt]:
    """The receipts of a cache by name: of a sealed one all, of an open one those whose objects are in place.

    Raises:
        CorruptCache: a sealed cache without its receipts.
    """
    wanted = {FIXED, *(block.name for block in all_blocks(manifest.layout))}
    gathered = storage.get(RECEIPTS, limit=receipts_limit(len(wanted)))
    receipts = {} if gathered is None else read_receipts(gathered, url=storage.url, num_receipts=len(wanted))
    receipts = {name: receipt for name, receipt in receipts.items() if name in wanted}
    if manifest.state == "sealed":
        if gathered is not None and sha256_hex(gathered) != manifest.receipts:
            raise CorruptCache(
                f"{storage.url}: {RECEIPTS} is damaged: it is not the one that the manifest was sealed with"
            )
        if wanted - receipts.keys():
            raise CorruptCache(f"{storage.url} is sealed, but {RECEIPTS} lacks {sorted(wanted - receipts.keys())[0]}")
        for name, receipt in receipts.items():
            if receipt.rows != num_rows(manifest.layout, name):
                raise CorruptCache(f"{storage.url}: {RECEIPTS} and {MANIFEST} differ in the rows of {name}")
        return receipts
    for key in storage.list_keys("receipts"):
        name = FIXED if key == FIXED_RECEIPT_KEY else key.removeprefix("receipts/").removesuffix(".json")
        data = storage.get(key, limit=MAX_RECEIPT_BYTES)
        if name in wanted and data is not None:
            try:
                receipts[name] = read_receipt(data, key=key)
            except CorruptCache:
                continue  # the block counts as missing, and is computed again
    return {name: receipt for name, receipt in receipts.items() if _in_place(storage, manifest.layout, name, receipt)}


def num_rows(layout: Layout, name: str) -> int:
    """Rows that the receipt of a name must state."""
    return layout.num_samples if name == FIXED else len(block_rows(layout, Block.from_name(name)))


def _in_place(storage: LocalStorage, layout: Layout, name: str, receipt: Receipt) -> bool:
    if receipt.rows != num_rows(layout, name):
        return False
    if name == FIXED:
        return receipt.objects.keys() == layout.fixed.keys()
    block = Block.from_name(name)
    return receipt.objects.keys() == layout.arrays.keys() and all(
        storage.size(block_key(array, layout.arrays[array], block)) == stored.bytes
        for array, stored in receipt.objects.items()
    )
