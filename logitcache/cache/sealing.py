"""Seal a cache whose blocks are all written, for example by several machines."""

from __future__ import annotations

import os

from logitcache.cache.card import write_card
from logitcache.cache.layout import PER_CACHE, all_blocks, num_blocks
from logitcache.cache.objects import ObjectReader
from logitcache.cache.packages import require_packages
from logitcache.cache.per_cache import stored_encoding, stored_row_map
from logitcache.cache.reader import LogitCache, open_cache
from logitcache.cache.stored_records import read_records
from logitcache.cache.writer import CacheWriter
from logitcache.encodings import ENCODINGS
from logitcache.errors import REBUILD, IncompleteCache
from logitcache.storage import open_storage

SHOWN_BLOCKS = 5
"""Missing blocks that an error message lists."""


def seal(path: str | os.PathLike[str]) -> LogitCache:
    """Seal a cache whose blocks all have receipts, and open it; a cache that is sealed already stays as it is.

    Leaving the `with` block of `create` seals too. Call this where writers were only closed.

    Args:
        path: a directory or URL.

    Raises:
        NotACache: the path holds no cache.
        IncompleteCache: blocks are missing; names them.
        MissingPackage: the cache's encoding comes from a package that is not installed.
    """
    storage = open_storage(path)
    records = read_records(storage)
    manifest = records.manifest
    require_packages(manifest, ENCODINGS, url=storage.url)
    missing = [block.name for block in all_blocks(records.layout) if block.name not in records.receipts]
    if missing or PER_CACHE not in records.receipts:
        named = ", ".join(missing[:SHOWN_BLOCKS]) + (" and more" if len(missing) > SHOWN_BLOCKS else "")
        raise IncompleteCache(
            f"{storage.url} can't be sealed: {len(missing)} of {num_blocks(records.layout)} blocks are missing"
            f"{f' ({named})' if missing else ', but its per-cache arrays are'}; {REBUILD}"
        )
    objects = ObjectReader(storage)
    encoding, rows = stored_encoding(records, objects), stored_row_map(records, objects)
    with storage.lock():
        writer = CacheWriter(storage, manifest, encoding, rows=rows, per_cache={}, write_card=write_card)
    try:
        writer.seal()
    finally:
        writer.close()
    return open_cache(path)
