"""What of a cache has been committed: its receipts, and the arrays that are stored once."""

from __future__ import annotations

import numpy as np

from logitcache.digest import array_digest
from logitcache.encodings import Encoding, encoding_from_config
from logitcache.errors import CorruptCache
from logitcache.layout import (
    FIXED,
    FIXED_RECEIPT_KEY,
    GROUP,
    Block,
    all_blocks,
    block_key,
    decode_fixed,
    fixed_array_key,
)
from logitcache.manifest import RECEIPTS, Layout, Manifest, Receipt, read_receipt, read_receipts
from logitcache.storage import LocalStorage


def stored_encoding(storage: LocalStorage, manifest: Manifest, fixed: Receipt) -> Encoding:
    """A cache's encoding, with what it was fitted to.

    Raises:
        CorruptCache: that is damaged, or gone.
    """
    encoding = encoding_from_config(manifest.identity.encoding)
    if missing := encoding.fitted_arrays.keys() - fixed.objects.keys():
        raise CorruptCache(f"{storage.url}: its receipt of fixed arrays lacks {sorted(missing)[0]}, which it must hold")
    arrays = {name: read_fixed(storage, fixed, name, ndim) for name, ndim in encoding.fitted_arrays.items()}
    return encoding.with_fitted(arrays)


def read_fixed(storage: LocalStorage, fixed: Receipt, name: str, ndim: int) -> np.ndarray:
    """A fixed array, held to its receipt.

    Raises:
        CorruptCache: it is not what was written.
    """
    metadata, data = storage.get(f"{GROUP}/{name}/zarr.json"), storage.get(fixed_array_key(name, ndim))
    try:
        values = decode_fixed(metadata or b"", data or b"")
    except Exception:  # whatever zarr raises for bytes that are no such array
        values = None
    if values is None or array_digest(values) != fixed.objects[name].values_sha256:
        raise CorruptCache(f"{storage.url}: {GROUP}/{name} is not what was written; run `logitcache verify --deep`")
    return values


def collect_receipts(storage: LocalStorage, manifest: Manifest) -> dict[str, Receipt]:
    """The receipts of a cache by name: of a sealed one all, of an open one those whose objects are in place.

    Raises:
        CorruptCache: a sealed cache without its receipts.
    """
    gathered = storage.get(RECEIPTS)
    wanted = {FIXED, *(block.name for block in all_blocks(manifest.layout))}
    receipts = {} if gathered is None else read_receipts(gathered, url=storage.url)
    receipts = {name: receipt for name, receipt in receipts.items() if name in wanted}
    if manifest.state == "sealed":
        if wanted - receipts.keys():
            raise CorruptCache(f"{storage.url} is sealed, but {RECEIPTS} lacks {sorted(wanted - receipts.keys())[0]}")
        return receipts
    for key in storage.list_keys("receipts"):
        name = FIXED if key == FIXED_RECEIPT_KEY else key.removeprefix("receipts/").removesuffix(".json")
        data = storage.get(key)
        if name in wanted and data is not None:
            try:
                receipts[name] = read_receipt(data, key=key)
            except CorruptCache:
                continue  # the block counts as missing, and is computed again
    return {name: receipt for name, receipt in receipts.items() if _in_place(storage, manifest.layout, name, receipt)}


def _in_place(storage: LocalStorage, layout: Layout, name: str, receipt: Receipt) -> bool:
    if name == FIXED:
        return True
    block = Block.from_name(name)
    return receipt.objects.keys() == layout.arrays.keys() and all(
        storage.size(block_key(array, layout.arrays[array], block)) == stored.bytes
        for array, stored in receipt.objects.items()
    )
