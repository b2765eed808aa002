"""The local directory of blocks of remote caches: content-addressed, shared between processes, limited in size.

An entry is one block, named by the SHA-256 of its content, so two copies of a cache share entries, and an entry is
never outdated. All changes happen under one file lock, so the size limit always holds; reading takes no lock. The
caller checks the hashes of what it reads, so a truncated entry counts as missing.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock

from logitcache.errors import StorageError, UsageError
from logitcache.storage.local import read_regular

FOLDER_VARIABLE = "LOGITCACHE_CACHE_DIR"
SIZE_VARIABLE = "LOGITCACHE_CACHE_GB"
DEFAULT_GB = 50.0
KEPT_SHARE = 0.9
"""Share of the limit that remains after entries were evicted, so that not every new block needs a listing."""


def shared_block_directory() -> BlockDirectory | None:
    """The directory for all caches of this user; None where `LOGITCACHE_CACHE_GB` is 0.

    Raises:
        UsageError: the size is not a number.
    """
    text = os.environ.get(SIZE_VARIABLE, "")
    try:
        gigabytes = float(text) if text else DEFAULT_GB
    except ValueError:
        gigabytes = -1.0
    if not 0 <= gigabytes < 2**40:
        raise UsageError(f"{SIZE_VARIABLE} is {text!r}; expected a number of gigabytes (0: keep nothing)")
    if gigabytes == 0:
        return None
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    folder = os.environ.get(FOLDER_VARIABLE) or f"{base}/logitcache"
    return BlockDirectory(Path(folder).expanduser(), max_bytes=int(gigabytes * 1e9))


class BlockDirectory:
    """Entries by name; the least recently used ones are evicted first.

    Args:
        root: the directory, created with the first entry.
        max_bytes: limit for all entries together.
    """

    def __init__(self, root: Path, *, max_bytes: int) -> None:
        self.root = root.absolute()
        self.max_bytes = max_bytes
        self._blocks = self.root / "blocks"
        self._total = self.root / "bytes"
        """Upper bound of the entries' total size; counted exactly when it reaches the limit."""
        self._lock = FileLock(self.root / "lock")

    def __contains__(self, name: str) -> bool:
        return self._path(name).is_file()

    def get(self, name: str, *, limit: int | None = None) -> bytes | None:
        """An entry's bytes, unchecked; marks the entry as used."""
        path = self._path(name)
        try:
            data = read_regular(path, limit=limit)
        except OSError:  # missing, or being evicted
            return None
        with contextlib.suppress(OSError):  # impossible in a read-only directory
            os.utime(path)
        return data

    def put(self, name: str, data: bytes) -> bool:
        """Store an entry, and evict others if needed; returns whether it was stored.

        Raises:
            StorageError: the directory can't be written to.
        """
        if len(data) > self.max_bytes:
            return False
        path = self._path(name)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with self._lock:
                if path.is_file():
                    return True
                total = self._counted()
                if total is None or total + len(data) > self.max_bytes:
                    total = self._make_room(len(data))
                # Counted first: a process that is killed in between leaves too high a number, never too low.
                self._count(total + len(data))
                # A random name: a pipe or a link at a predictable one would be written to.
                partial = path.with_suffix(f".{secrets.token_hex(8)}.partial")
                with partial.open("xb") as file:
                    file.write(data)
                partial.replace(path)
        except OSError as error:
            raise StorageError(
                f"can't store blocks in {self.root}: {error.strerror or error}; set {FOLDER_VARIABLE} to another "
                f"directory, or {SIZE_VARIABLE}=0 to store none"
            ) from error
        return True

    def drop(self, name: str) -> None:
        """Delete a damaged entry."""
        with contextlib.suppress(OSError):
            self._path(name).unlink(missing_ok=True)

    def stored_bytes(self) -> int:
        """Total size of the entries, counted."""
        return sum(entry.stat().st_size for entry in self._entries())

    def _path(self, name: str) -> Path:
        return self._blocks / name[:2] / name

    def _entries(self) -> Iterator[Path]:
        return self._blocks.glob("??/*")

    def _counted(self) -> int | None:
        try:
            return int(read_regular(self._total, limit=20) or b"")
        except (OSError, ValueError):
            return None

    def _count(self, total: int) -> None:
        # O_NONBLOCK: if the path is a pipe, opening must not wait for a reader.
        descriptor = os.open(self._total, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NONBLOCK, 0o666)
        with os.fdopen(descriptor, "w") as file:
            file.write(str(total))

    def _make_room(self, coming: int) -> int:
        """Evict entries until `coming` bytes fit; returns the size of those that are left."""
        found = []
        for path in self._entries():
            if path.suffix == ".partial":  # of a dead writer: live ones hold the lock
                path.unlink(missing_ok=True)
                continue
            with contextlib.suppress(OSError):
                status = path.stat()
                found.append((status.st_mtime_ns, status.st_size, path))
        left = sum(size for _, size, _ in found)
        if left + coming <= self.max_bytes:
            return left
        for _, size, path in sorted(found):
            if left + coming <= self.max_bytes * KEPT_SHARE:
                break
            path.unlink(missing_ok=True)
            left -= size
        return left
