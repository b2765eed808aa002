"""A directory as a store: durable writes, and safe against links, pipes and partial files."""

from __future__ import annotations

import errno
import itertools
import os
import re
import secrets
import socket
import stat
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import TypeVar

from logitcache.errors import CorruptCache, StorageError, UsageError
from logitcache.storage.folder_lock import LOCK, locked_folder
from logitcache.storage.protocol import Storage

Found = TypeVar("Found")

LEFTOVER_SECONDS = 86_400
"""A partial file of this age is a leftover, even if its writer ran on another host."""
STALE_ATTEMPTS = 10
"""Attempts to read a file that another NFS client keeps replacing."""
_PARTIAL = re.compile(r"\.[^/]+\.(?P<host>[0-9a-f]{8})\.(?P<pid>\d+)\.[0-9a-f]+\.partial$")


def _process_space() -> str:
    """Identifies the namespace of process ids: containers may share a host name, but not their process ids."""
    space = [socket.gethostname()]
    with suppress(OSError):  # not on Linux
        space += [Path("/proc/sys/kernel/random/boot_id").read_text(), str(Path("/proc/self/ns/pid").readlink())]
    return f"{zlib.crc32(' '.join(space).encode()):08x}"


_HOST = _process_space()


class LocalStorage(Storage):
    """A directory. An object gets its name when it is complete and on the disk."""

    is_remote = False
    concurrency = 4
    can_write = True
    can_list = True

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()
        self.url = str(root)
        self._real_root = os.path.realpath(root)

    def get(self, key: str, *, limit: int | None = None) -> bytes | None:
        path = self._path(key)

        def read() -> bytes:
            data = read_regular(path, limit=limit)
            if data is None:
                raise CorruptCache(f"{path} is not a regular file")
            return data

        with _accessing("read", path):
            return self._find(path, read)

    def put(self, key: str, data: bytes | memoryview, *, durable: bool = True) -> None:
        path = self._path(key)
        partial = self._write_partial(path, data, durable=durable)
        try:
            partial.replace(path)
            if durable:
                fsync_path(path.parent)
        except OSError as error:
            _discard(partial)
            raise _storage_error("write", path, error) from error

    def make_durable(self, keys: Iterable[str]) -> None:
        # Objects share folders: each folder is synced once.
        folders = {self.root / folder for key in keys for folder in PurePosixPath(key).parents}
        with _accessing("write", self.root), ThreadPoolExecutor(self.concurrency) as threads:
            list(threads.map(fsync_path, folders))

    def create(self, key: str, data: bytes) -> bool:
        path = self._path(key)
        if self.size(key) is not None:
            return False
        partial = self._write_partial(path, data)
        try:
            # Unlike a rename, a link fails where the name exists.
            os.link(partial, path)
            fsync_path(path.parent)
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise _storage_error("write", path, error) from error
            partial.replace(path)
            fsync_path(path.parent)
        finally:
            _discard(partial)
        return True

    def size(self, key: str) -> int | None:
        path = self._path(key)
        with _accessing("read", path):
            return self._find(path, lambda: path.stat().st_size)

    def sizes(self, prefix: str = "") -> Iterator[tuple[str, int]]:
        for key in self.list_keys(prefix):
            size = self.size(key)
            if size is not None:
                yield key, size

    def written(self, prefix: str = "") -> Iterator[tuple[str, float]]:
        for key in self.list_keys(prefix):
            path = self._path(key)
            with _accessing("read", path):
                written = self._find(path, lambda path=path: path.stat().st_mtime)  # type: ignore[misc]
            if written is not None:
                yield key, written

    def folders(self, prefix: str = "") -> list[str]:
        start = self._path(prefix) if prefix else self.root
        with _accessing("list", start), suppress(FileNotFoundError, NotADirectoryError):
            return sorted(entry.name for entry in os.scandir(start) if entry.is_dir(follow_symlinks=False))
        return []

    def list_keys(self, prefix: str = "") -> Iterator[str]:
        start = self._path(prefix) if prefix else self.root
        for folder, subfolders, names in os.walk(start):
            subfolders.sort()
            for name in sorted(names):
                if not _PARTIAL.search(name) and not _is_lock(name):
                    yield Path(folder, name).relative_to(self.root).as_posix()

    def delete(self, key: str) -> None:
        path = self._path(key)
        with _accessing("delete", path):
            path.unlink(missing_ok=True)

    def remove_leftovers(self) -> int:
        """Delete partial files of dead writers: of this host by process id, of other hosts after a day."""
        removed = 0
        for path in self.root.rglob(".*.partial"):
            leftover = _PARTIAL.search(path.name)
            if leftover and (_is_dead(leftover) or _age(path) > LEFTOVER_SECONDS):
                with suppress(OSError):
                    path.unlink()
                    removed += 1
        return removed

    @contextmanager
    def lock(self) -> Iterator[None]:
        with ExitStack() as held:
            with _accessing("lock", self.root):
                self._make_folder(self.root)
                held.enter_context(locked_folder(self.root))
            yield

    def _path(self, key: str) -> Path:
        parts = key.split("/")
        if key.startswith("/") or ".." in parts or "" in parts:
            raise UsageError(f"{key!r} is not a key inside the cache")
        path = self.root.joinpath(*parts)
        # Links are rare, and looking for one is cheaper than resolving the path.
        if any(map(os.path.islink, itertools.accumulate(parts, os.path.join, initial=str(self.root)))):
            real = os.path.realpath(path)
            if real != self._real_root and not real.startswith(self._real_root.rstrip(os.sep) + os.sep):
                raise CorruptCache(f"{path} is a link to outside the cache, which is not followed")
        return path

    def _find(self, path: Path, look: Callable[[], Found]) -> Found | None:
        """What `look` returns, or None if the file doesn't exist.

        For up to a minute, an NFS client remembers that a name did not exist. When it opens a folder, it asks the
        server for the names that were added.
        """
        with suppress(FileNotFoundError, NotADirectoryError):
            return _look_again_if_stale(look)
        for folder in reversed([each for each in path.parents if each.is_relative_to(self.root.parent)]):
            with suppress(OSError):
                os.close(os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
        with suppress(FileNotFoundError, NotADirectoryError):
            return _look_again_if_stale(look)
        return None

    def _write_partial(self, path: Path, data: bytes | memoryview, *, durable: bool = True) -> Path:
        """Write the data to the disk under a temporary name."""
        partial = path.with_name(f".{path.name}.{_HOST}.{os.getpid()}.{secrets.token_hex(8)}.partial")
        try:
            if durable:
                self._make_folder(path.parent)
            else:
                self._make_folder(self.root)
                path.parent.mkdir(parents=True, exist_ok=True)
            with partial.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            _discard(partial)
            raise _storage_error("write", path, error) from error
        return partial

    def _make_folder(self, folder: Path) -> None:
        if folder.is_dir():
            return
        self._make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        fsync_path(folder.parent)


def _look_again_if_stale(look: Callable[[], Found]) -> Found:
    """What `look` returns, also if on NFS another host replaces the file while it is read."""
    for _ in range(STALE_ATTEMPTS - 1):
        try:
            return look()
        except OSError as error:
            if error.errno != errno.ESTALE:
                raise
    return look()


def _is_lock(name: str) -> bool:
    """Whether a file is a folder's lock, or one that NFS or FUSE keeps for a moment after its deletion."""
    return name == LOCK or name.startswith((".nfs", ".fuse_hidden"))


def read_regular(path: Path, *, limit: int | None = None) -> bytes | None:
    """The bytes of a regular file, at most one more than the limit; None for a pipe, a socket, a device or a folder.

    Allocates no more memory than the file's size, however high the limit.

    Raises:
        OSError: it can't be read.
    """
    try:
        # O_NONBLOCK: opening a pipe or a device would block.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError as error:
        if error.errno == errno.ENXIO:  # a socket
            return None
        raise
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            return None
        return file.read(status.st_size if limit is None else min(status.st_size, limit + 1))


def _is_dead(leftover: re.Match[str]) -> bool:
    return leftover["host"] == _HOST and not is_alive(int(leftover["pid"]))


def _age(path: Path) -> float:
    """Seconds since the last write to a file; 0 if it doesn't exist."""
    try:
        return time.time() - path.stat().st_mtime
    except OSError:
        return 0.0


def _discard(partial: Path) -> None:
    """Delete a partial file; errors are ignored so that they don't hide the original one."""
    with suppress(OSError):  # a read-only file system refuses even to delete a missing file
        partial.unlink()


def is_alive(pid: int) -> bool:
    """Whether a process of this host is running."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # of another user
        return True
    return True


def fsync_path(path: Path) -> None:
    """Make a file, or the names in a folder, survive a power loss."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)
"""Errors of file systems without hard links, where the second of two simultaneous writers wins."""

_REMEDY = {
    errno.ENOSPC: "the disk is full; free some space and run the same command again (committed blocks are kept)",
    errno.EDQUOT: "the quota is exceeded; free some space and run the same command again (committed blocks are kept)",
    errno.EFBIG: "the file exceeds the allowed size; raise the limit and run the same command again",
    errno.EACCES: "permission denied; choose another path, or ask its owner for access",
    errno.EPERM: "operation not permitted; choose another path",
    errno.EROFS: "the file system is read-only; choose another path",
}


@contextmanager
def _accessing(action: str, path: Path) -> Iterator[None]:
    """Turn errors of the operating system into a `StorageError`."""
    try:
        yield
    except OSError as error:
        raise _storage_error(action, path, error) from error


def _storage_error(action: str, path: Path, error: OSError) -> StorageError:
    reason = _REMEDY.get(error.errno or 0, error.strerror or str(error))
    return StorageError(f"can't {action} {path}: {reason}")
