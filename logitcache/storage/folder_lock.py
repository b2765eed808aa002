"""A lock for a folder, held by one thread of one process at a time.

It is the operating system's lock on a file: a killed process releases it, and NFS shares it between hosts. The holder
deletes the file before it releases the lock; on NFS, the file stays after the first time. `filelock` is not used: it
leaves its files, or in some versions deletes them after the release.
"""

from __future__ import annotations

import errno
import os
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

if sys.platform != "win32":
    import fcntl

    _FLAGS = os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK

LOCK = ".lock"
"""Name of the lock file; not an object of the store."""

_renaming_devices: set[int] = set()
"""File systems that rename an open file when it is deleted, such as NFS; found when a lock's file is deleted."""
_CAN_NOT_WRITE = (errno.EROFS, errno.EACCES, errno.EPERM)
_HAS_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)


@contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Wait for the lock of an existing folder, and hold it.

    There is no lock where the file system doesn't support it, or where the folder is read-only.

    Raises:
        OSError: the folder doesn't exist, or the file system fails.
    """
    path = folder / LOCK
    descriptor = _acquire(path)
    try:
        yield
    finally:
        if descriptor is not None:
            with suppress(OSError):
                _delete_or_keep(descriptor, path)
            _release(descriptor)


def _delete_or_keep(descriptor: int, path: Path) -> None:
    """Delete the file of a lock that is held: a process that waits for this file finds it deleted, and starts again.

    On NFS, each process deletes it at most once, and then lets it stay. Otherwise a slower client finds the file
    deleted each time, and never gets the lock.
    """
    held = os.fstat(descriptor)
    if held.st_dev not in _renaming_devices:
        path.unlink()
        if os.fstat(descriptor).st_nlink == held.st_nlink:
            _renaming_devices.add(held.st_dev)
        return
    writable = path.parent.stat().st_mode & 0o222
    mode = writable | writable << 1  # whoever may write to the folder may lock it
    if stat.S_IMODE(held.st_mode) != mode:
        os.fchmod(descriptor, mode)


def _acquire(path: Path) -> int | None:
    if sys.platform == "win32":
        return None
    while True:
        descriptor = _open(path)
        if descriptor is None:
            return None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            if _has_name(descriptor, path):
                return descriptor
        except OSError as error:
            if error.errno in _HAS_NO_LOCKS:
                with suppress(OSError):
                    path.unlink()
                os.close(descriptor)
                return None
            if error.errno != errno.ESTALE:  # on NFS: deleted by another host
                os.close(descriptor)
                raise
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _open(path: Path) -> int | None:
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | _FLAGS, 0o666)
    except OSError as error:
        if error.errno not in _CAN_NOT_WRITE:
            raise
    with suppress(OSError):  # another user's file: read access is enough to lock it, except on NFS
        return os.open(path, os.O_RDONLY | _FLAGS)
    return None


def _has_name(descriptor: int, path: Path) -> bool:
    """Whether the file is still the one at the path."""
    # On NFS, names and attributes may be a minute old, and another host may have renamed the file as it deleted it.
    # Opening the folder and the file asks the server.
    with suppress(OSError):
        os.close(os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
    try:
        again = os.open(path, os.O_RDONLY | _FLAGS)
    except (FileNotFoundError, PermissionError):
        return False
    try:
        named, held = os.fstat(again), os.fstat(descriptor)
    finally:
        os.close(again)
    return held.st_nlink > 0 and (held.st_dev, held.st_ino) == (named.st_dev, named.st_ino)


def _release(descriptor: int) -> None:
    if sys.platform != "win32":
        # Closing alone doesn't release it: a forked process has the file open too.
        fcntl.flock(descriptor, fcntl.LOCK_UN)
    os.close(descriptor)
