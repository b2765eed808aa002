"""Records put in the place of others, so that a reader, or a kill, meets a pair that belongs together."""

from __future__ import annotations

from collections.abc import Mapping

from logitcache.cache.committed import pinned_receipts_key
from logitcache.cache.digests import content_digest
from logitcache.cache.layout import FIXED, all_blocks, group_metadata
from logitcache.cache.manifest import MANIFEST, RECEIPTS, Layout, Manifest, Receipt, dump_manifest
from logitcache.storage import Storage


def write_group_metadata(storage: Storage, layout: Layout) -> None:
    """The `zarr.json` files of a layout, where others are there or none."""
    for key, data in group_metadata(layout).items():
        if storage.get(key, limit=len(data)) != data:
            storage.put(key, data)


def replace_records(storage: Storage, manifest: Manifest, gathered: bytes, *, replaces: Manifest) -> None:
    """Put manifest and receipts in the place of those of a cache that is there; call it under the storage's lock.

    Args:
        storage: where.
        manifest: of a sealed cache.
        gathered: its `receipts.json`.
        replaces: the manifest that is there.
    """
    if replaces.state == "open":  # then receipts of more or fewer blocks than it has do no harm
        storage.put(RECEIPTS, gathered)
        storage.put(MANIFEST, dump_manifest(manifest))
        return
    pinned = pinned_receipts_key(str(manifest.receipts))
    if replaces.receipts != manifest.receipts:
        # Receipts under a second name first, so that those that the manifest names are there at every moment.
        storage.put(pinned, gathered)
        storage.put(MANIFEST, dump_manifest(manifest))
    if storage.get(RECEIPTS, limit=len(gathered)) != gathered:
        storage.put(RECEIPTS, gathered)
    storage.delete(pinned)


def receipts_in_copy(manifest: Manifest, receipts: Mapping[str, Receipt]) -> dict[str, Receipt] | None:
    """The receipts of a cache that has lost its own, out of a copy's with the same labels; None if it has others.

    Args:
        manifest: of the sealed cache.
        receipts: of a copy with the same id, which may have more views.
    """
    names = [FIXED, *(block.name for block in all_blocks(manifest.layout))]
    if not receipts.keys() >= set(names):
        return None
    kept = {name: receipts[name] for name in names}
    return kept if content_digest(manifest, kept) == manifest.digest else None
