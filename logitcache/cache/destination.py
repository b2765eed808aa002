"""Whether a cache can be written to a location; checked before any long work."""

from __future__ import annotations

from pathlib import Path

from logitcache.cache.manifest import MANIFEST, MAX_MANIFEST_BYTES, read_manifest
from logitcache.errors import LogitCacheError, UsageError
from logitcache.storage import LocalStorage, Storage, Transactional


def check_destination(storage: Storage) -> None:
    """Refuse a location that no cache can be written to.

    Raises:
        UsageError: a web server, a repository, a file, a folder below a file, or a folder inside another cache.
    """
    if isinstance(storage, Transactional):
        raise UsageError(
            f"{storage.url} is written as a whole, by `logitcache push`; write to a directory, s3://, gs:// or az://, "
            "and push the sealed cache"
        )
    if not storage.can_write:
        raise UsageError(
            f"{storage.url} is a web server, which is read-only; choose a directory, s3://, gs:// or az://"
        )
    if not isinstance(storage, LocalStorage):
        return
    for folder in (storage.root, *storage.root.parents):
        if folder.exists() and not folder.is_dir():
            raise UsageError(f"{folder} is a file, but a cache is a directory; choose another path")
    for folder in storage.root.parents:
        if _holds_cache(folder):
            raise UsageError(
                f"{storage.url} is inside another cache, {folder}, which would be damaged; choose another path"
            )


def _holds_cache(folder: Path) -> bool:
    try:
        read_manifest(LocalStorage(folder).get(MANIFEST, limit=MAX_MANIFEST_BYTES), url=str(folder))
    except LogitCacheError:
        return False
    return True
