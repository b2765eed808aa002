"""A lock for a folder, held by one thread of one process at a time.

It is the operating system's lock on a file: a killed process releases it, and NFS shares it between hosts. The holder
deletes the file before it releases the lock, except on NFS. `filelock` is not used: it leaves its files, or in some
versions deletes them after the release.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

if sys.platform != "win32":
    import fcntl

LOCK = ".lock"
"""Name of the lock file; not an object of the store."""

_renaming_devices: set[int] = set()
"""File systems that rename an open file when it is deleted: NFS. The lock's file stays there."""
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
                _delete(descriptor, path)
            _release(descriptor)


def _delete(descriptor: int, path: Path) -> None:
    """Delete the file of a lock that is held: a process that waits for this file finds it deleted, and starts again.

    On NFS the file stays, from the second time on: a host whose answers take longer would start again and again.
    """
    device = os.fstat(descriptor).st_dev
    if device not in _renaming_devices:
        path.unlink()
        if os.fstat(descriptor).st_nlink:
            _renaming_devices.add(device)


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
    flags = os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | flags, 0o666)
    except OSError as error:
        if error.errno not in _CAN_NOT_WRITE:
            raise
    with suppress(OSError):  # another user's file: read access is enough to lock it, except on NFS
        return os.open(path, os.O_RDONLY | flags)
    return None


def _has_name(descriptor: int, path: Path) -> bool:
    held = os.fstat(descriptor)
    try:
        # Opened, because the answer of stat may be a minute old on NFS: another host may have renamed the file to
        # .nfs… as it deleted it, so that it still has a link.
        again = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:  # also met by the next attempt to open it, unless it is gone by then
        return False
    try:
        named = os.fstat(again)
    finally:
        os.close(again)
    return held.st_nlink > 0 and (held.st_dev, held.st_ino) == (named.st_dev, named.st_ino)


def _release(descriptor: int) -> None:
    if sys.platform != "win32":
        # Closing alone doesn't release it: a forked process has the file open too.
        fcntl.flock(descriptor, fcntl.LOCK_UN)
    os.close(descriptor)
