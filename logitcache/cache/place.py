"""Whether a cache may lie somewhere: asked before it is begun there, and before any long work."""

from __future__ import annotations

from pathlib import Path

from logitcache.cache.manifest import MANIFEST, MAX_MANIFEST_BYTES, read_manifest
from logitcache.errors import LogitCacheError, UsageError
from logitcache.storage import LocalStorage, Storage


def check_place(storage: Storage) -> None:
    """Refuse a place that no cache can be written to.

    Raises:
        UsageError: a web server, a file, a folder below a file, or one inside of another cache.
    """
    if not storage.can_write:
        raise UsageError(
            f"{storage.url} can only be read, as every web server; choose a directory, or s3://, gs:// or az://"
        )
    if not isinstance(storage, LocalStorage):
        return
    for folder in (storage.root, *storage.root.parents):
        if folder.exists() and not folder.is_dir():
            raise UsageError(f"{folder} is a file, and a cache is a folder; choose another place")
    for folder in storage.root.parents:
        if _holds_cache(folder):
            raise UsageError(
                f"{storage.url} lies inside of another cache, {folder}, which would be damaged; choose another place"
            )


def _holds_cache(folder: Path) -> bool:
    try:
        read_manifest(LocalStorage(folder).get(MANIFEST, limit=MAX_MANIFEST_BYTES), url=str(folder))
    except LogitCacheError:
        return False
    return True
