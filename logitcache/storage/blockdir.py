"""The local directory of blocks that were read from remote caches: content-addressed, shared, limited in size.

An entry is one block of one cache, named by the SHA-256 of what is in it, so the same block of two copies is there
once, and nothing in it can ever be out of date. Several processes share the directory: all that changes it happens
under one file lock, so the limit holds at every moment; reading takes no lock. What is read is held to its hashes by
the caller, so an entry that was cut short is one that is not there.
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
"""Of the limit, that is left when something must go: then the directory is not listed for every block that comes."""


def shared_block_directory() -> BlockDirectory | None:
    """The directory that all caches of this user share; None where `LOGITCACHE_CACHE_GB` is 0.

    Raises:
        UsageError: a size that is no number.
    """
    text = os.environ.get(SIZE_VARIABLE, "")
    try:
        gigabytes = float(text) if text else DEFAULT_GB
    except ValueError:
        gigabytes = -1.0
    if not 0 <= gigabytes < 2**40:
        raise UsageError(f"{SIZE_VARIABLE} is {text!r}; expected a number of gigabytes, 0 to keep nothing")
    if gigabytes == 0:
        return None
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    folder = os.environ.get(FOLDER_VARIABLE) or f"{base}/logitcache"
    return BlockDirectory(Path(folder).expanduser(), max_bytes=int(gigabytes * 1e9))


class BlockDirectory:
    """Entries by name, the least recently used ones leaving first.

    Args:
        root: made when the first entry comes.
        max_bytes: that all entries together may take.
    """

    def __init__(self, root: Path, *, max_bytes: int) -> None:
        self.root = root.absolute()
        self.max_bytes = max_bytes
        self._blocks = self.root / "blocks"
        self._total = self.root / "bytes"
        """What the entries take, at least; the truth is counted when it seems too much."""
        self._lock = FileLock(self.root / "lock")

    def __contains__(self, name: str) -> bool:
        return self._path(name).is_file()

    def get(self, name: str, *, limit: int | None = None) -> bytes | None:
        """An entry's bytes as they lie there, which is for the caller to check; it counts as used now."""
        path = self._path(name)
        try:
            data = read_regular(path, limit=limit)
        except OSError:  # gone, or leaving this very moment
            return None
        with contextlib.suppress(OSError):  # a directory that is shared read-only can't note it
            os.utime(path)
        return data

    def put(self, name: str, data: bytes) -> bool:
        """Keep an entry, and let others go where it would be too much; whether it is kept.

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
                # Counted before it is there: a process killed in between leaves too high a number, never too low.
                self._count(total + len(data))
                # A new name each time: whatever lies at one that can be guessed, a pipe or a link, is not written to.
                partial = path.with_suffix(f".{secrets.token_hex(8)}.partial")
                with partial.open("xb") as file:
                    file.write(data)
                partial.replace(path)
        except OSError as error:
            raise StorageError(
                f"can't keep blocks in {self.root}: {error.strerror or error}; set {FOLDER_VARIABLE} to another "
                f"directory, or {SIZE_VARIABLE}=0 to keep none"
            ) from error
        return True

    def drop(self, name: str) -> None:
        """Remove an entry that was found damaged."""
        with contextlib.suppress(OSError):
            self._path(name).unlink(missing_ok=True)

    def stored_bytes(self) -> int:
        """What the entries take, counted."""
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
        # Never waits for a reader, as it would where somebody put a pipe.
        descriptor = os.open(self._total, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NONBLOCK, 0o666)
        with os.fdopen(descriptor, "w") as file:
            file.write(str(total))

    def _make_room(self, coming: int) -> int:
        """Let the least recently used entries go where so many bytes more are too much; returns what is left."""
        found = []
        for path in self._entries():
            if path.suffix == ".partial":  # of a writer that died: nobody else writes while we hold the lock
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
