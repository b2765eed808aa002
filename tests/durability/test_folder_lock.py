"""The lock of a folder: one holder at a time, gone with its holder, and no part of what lies there."""

from __future__ import annotations

import errno
import os
import signal
import threading
from collections.abc import Callable
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import pytest

from logitcache.errors import StorageError
from logitcache.storage import folder_lock, open_storage
from logitcache.storage.folder_lock import LOCK

TURNS, COUNTING = 25, 4


def count(folder: Path) -> None:
    storage = open_storage(folder)
    for _ in range(TURNS):
        with storage.lock():
            counted = int((folder / "count").read_text())
            (folder / "count").write_text(str(counted + 1))


def hold(folder: Path, held: Event) -> None:
    with open_storage(folder).lock():
        held.set()
        signal.pause()


def test_processes_hold_it_one_at_a_time_though_each_removes_its_file(tmp_path: Path, forks: Any) -> None:
    (tmp_path / "count").write_text("0")
    children = [forks.Process(target=count, args=(tmp_path,)) for _ in range(COUNTING)]
    for child in children:
        child.start()
    for child in children:
        child.join()

    assert [0] * COUNTING == [child.exitcode for child in children]
    assert str(TURNS * COUNTING) == (tmp_path / "count").read_text()
    assert ["count"] == [path.name for path in tmp_path.iterdir()]


def test_threads_hold_it_one_at_a_time(tmp_path: Path) -> None:
    (tmp_path / "count").write_text("0")
    threads = [threading.Thread(target=count, args=(tmp_path,)) for _ in range(COUNTING)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert str(TURNS * COUNTING) == (tmp_path / "count").read_text()


def test_whoever_is_killed_lets_go(tmp_path: Path, forks: Any) -> None:
    held = forks.Event()
    child = forks.Process(target=hold, args=(tmp_path, held))
    child.start()
    held.wait()
    assert (tmp_path / LOCK).exists()
    child.kill()
    child.join()
    with open_storage(tmp_path).lock():
        pass

    assert [] == list(tmp_path.iterdir())


def test_a_file_that_has_another_name_by_now_is_not_the_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An NFS client renames a file as it deletes it while it is open; others may have the old answer of stat."""
    path = tmp_path / LOCK
    descriptor = folder_lock._open(path)
    assert descriptor is not None
    before = os.lstat(path)
    path.rename(tmp_path / ".nfs0001")
    monkeypatch.setattr(Path, "lstat", lambda path: before)
    monkeypatch.setattr(Path, "stat", lambda path, **options: before)
    try:
        assert not folder_lock._has_name(descriptor, path)
    finally:
        os.close(descriptor)


def test_the_file_stays_where_a_deleted_file_that_is_open_is_renamed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on NFS; whoever may write to the folder may lock it."""
    monkeypatch.setattr(folder_lock, "_renaming_devices", set())
    monkeypatch.setattr(Path, "unlink", lambda path: path.rename(path.with_name(".nfs0001")))
    tmp_path.chmod(0o770)
    left = []
    for _ in range(3):
        with open_storage(tmp_path).lock():
            pass
        left.append(sorted(path.name for path in tmp_path.iterdir()))

    assert [[".nfs0001"], [LOCK, ".nfs0001"], [LOCK, ".nfs0001"]] == left
    assert 0o660 == (tmp_path / LOCK).stat().st_mode & 0o777
    assert [] == list(open_storage(tmp_path).list_keys())


def test_without_a_free_descriptor_the_lock_ends_in_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_file = os.open

    def open_few(path: str | Path, flags: int, *arguments: int) -> int:
        if flags & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return open_file(path, flags, *arguments)

    monkeypatch.setattr(os, "open", open_few)
    with pytest.raises(StorageError, match="Too many open files"), open_storage(tmp_path).lock():
        pass


def test_a_process_forked_meanwhile_does_not_keep_it(tmp_path: Path) -> None:
    descriptor = folder_lock._acquire(tmp_path / LOCK)
    assert descriptor is not None
    inherited = os.dup(descriptor)
    folder_lock._release(descriptor)
    try:
        with open_storage(tmp_path).lock():
            pass
    finally:
        os.close(inherited)


def test_its_file_is_no_part_of_what_lies_there(tmp_path: Path) -> None:
    storage = open_storage(tmp_path / "a.cache")
    with storage.lock():
        storage.put("x", b"1")
        assert (tmp_path / "a.cache" / LOCK).exists()
        assert ["x"] == list(storage.list_keys())
        assert {"x": 1} == dict(storage.sizes())

    assert ["x"] == [path.name for path in (tmp_path / "a.cache").iterdir()]


def test_a_link_in_its_place_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / LOCK).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StorageError, match="can't lock"), open_storage(tmp_path / "a").lock():
        pass

    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.EPERM])
def test_a_folder_that_can_not_be_written_to_is_read_without_it(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever finds a cache whole there has nothing to write."""

    def refuse(path: Any, flags: int, *mode: int) -> int:
        raise OSError(code, os.strerror(code), path)

    storage = open_storage(tmp_path)
    monkeypatch.setattr(os, "open", refuse)
    with storage.lock():
        pass


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_does_without(code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("fcntl.flock", refuse)
    with open_storage(tmp_path).lock():
        pass

    assert [] == list(tmp_path.iterdir())


def test_an_object_store_has_none(on: Callable[[str], str]) -> None:
    storage = open_storage(f"{on('memory')}/a.cache")
    with storage.lock(), storage.lock():
        storage.put("x", b"1")

    assert ["x"] == list(storage.list_keys())
