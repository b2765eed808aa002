"""What every store owes, held against each of them."""

from __future__ import annotations

import errno
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest

from logitcache.errors import StorageError, UsageError
from logitcache.storage import LocalStorage, Storage, open_storage
from tests import servers


class StorageContract:
    """Inherited by a test class for each kind of store, which gives an empty `storage`."""

    def test_an_object_is_there_whole_or_not_at_all(self, storage: Storage) -> None:
        assert storage.get("a/b/c.json") is None
        assert storage.size("a/b/c.json") is None
        storage.put("a/b/c.json", b"one")
        storage.put("a/b/c.json", b"two!")
        assert b"two!" == storage.get("a/b/c.json")
        assert 4 == storage.size("a/b/c.json")

    def test_no_more_than_a_byte_beyond_the_limit_is_kept(self, storage: Storage) -> None:
        storage.put("a", bytes(range(200)) * 1000)
        assert bytes(range(11)) == storage.get("a", limit=10)
        assert 200_000 == len(storage.get("a", limit=200_000) or b"")
        assert storage.get("a") == storage.get_view("a") == storage.get_view("a", limit=200_000)
        assert bytes(range(11)) == storage.get_view("a", limit=10)
        assert storage.get_view("b") is None

    def test_an_empty_object_is_one(self, storage: Storage) -> None:
        storage.put("a", b"")
        assert b"" == storage.get("a", limit=0)
        assert 0 == storage.size("a")

    def test_of_many_that_create_one_succeeds(self, storage: Storage) -> None:
        created = []
        threads = [
            threading.Thread(target=lambda n=n: created.append((storage.create("a", b"%d" % n), b"%d" % n)))
            for n in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        [winner] = [data for was_first, data in created if was_first]
        assert winner == storage.get("a")
        assert not storage.create("a", b"late")

    def test_listing_gives_keys_sizes_and_folders(self, storage: Storage) -> None:
        for key in ("a/1", "a/10", "a/2/x", "ab", "b/1"):
            storage.put(key, key.encode())
        assert ["a/1", "a/10", "a/2/x", "ab", "b/1"] == sorted(storage.list_keys())
        assert {"a/1": 3, "a/10": 4, "a/2/x": 5} == dict(storage.sizes("a"))
        assert ["a/2/x"] == list(storage.list_keys("a/2"))
        assert ["a", "b"] == storage.folders()
        assert ["2"] == storage.folders("a")
        assert [] == storage.folders("nothing")
        assert [] == list(storage.list_keys("nothing"))

    def test_what_is_deleted_is_gone_and_may_have_been_before(self, storage: Storage) -> None:
        storage.put("a", b"1")
        storage.delete("a")
        storage.delete("a")
        assert storage.get("a") is None

    def test_many_are_stored_at_once_and_made_durable(self, storage: Storage) -> None:
        keys = [f"c/{number}/0" for number in range(20)]
        for key in keys:
            storage.put(key, key.encode(), durable=False)
        storage.make_durable(keys)
        assert 0 == storage.remove_leftovers()
        assert keys == sorted(storage.list_keys(), key=lambda key: int(key.split("/")[1]))

    @pytest.mark.parametrize("key", ["/etc/passwd", "../a", "a/../../b", "a//b", ""])
    def test_a_key_stays_inside(self, storage: Storage, key: str) -> None:
        with pytest.raises(UsageError, match="not a key"):
            storage.get(key)


class TestLocal(StorageContract):
    @pytest.fixture
    def storage(self, tmp_path: Path) -> Storage:
        return open_storage(tmp_path / "a.cache")


class TestFileUrl(StorageContract):
    @pytest.fixture
    def storage(self, tmp_path: Path) -> Storage:
        return open_storage(f"file://{tmp_path}/a%20b.cache")


class TestMemory(StorageContract):
    @pytest.fixture
    def storage(self) -> Storage:
        return open_storage(f"memory://{uuid.uuid4().hex}/a.cache")


@pytest.mark.parametrize("store", ["moto", "google", "azure"])
class TestRemote(StorageContract):
    @pytest.fixture
    def storage(self, store: str, on: Callable[[str], str]) -> Storage:
        return open_storage(f"{on(store)}/a.cache")


def test_a_store_of_one_url_sees_what_another_below_it_stored() -> None:
    name = uuid.uuid4().hex
    open_storage(f"memory://{name}/team/a.cache").put("x", b"1")

    assert b"1" == open_storage(f"memory://{name}").get("team/a.cache/x")
    assert ["team"] == open_storage(f"memory://{name}/").folders()


def test_a_web_server_is_read_and_its_index_pages_are_followed(tmp_path: Path) -> None:
    for folder in ("www/a b/c", "www/ü", "www/.hidden", "nginx"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "www/file").write_bytes(b"12345")
    with servers.nginx(tmp_path / "nginx", tmp_path / "www") as url:
        storage = open_storage(url)
        assert b"12345" == storage.get("file", limit=5)
        assert 5 == storage.size("file")
        assert storage.get("nothing") is None
        assert ["a b", "ü"] == storage.folders()
        assert ["c"] == storage.folders("a b")
        assert [] == storage.folders("ü")
        assert ["c"] == open_storage(f"{url}/a%20b").folders()
        with pytest.raises(StorageError, match="can't be listed"):
            list(storage.list_keys())
        for change in (lambda: storage.put("a", b""), lambda: storage.create("a", b""), lambda: storage.delete("a")):
            with pytest.raises(UsageError, match="is read-only"):
                change()


PARTIAL_AND_WAIT = """
import os, sys
from pathlib import Path
from logitcache.storage import LocalStorage
root = Path(sys.argv[1])
print(os.getpid(), LocalStorage(root)._write_partial(root / "x", b"half").name, flush=True)
sys.stdin.read()
"""


def test_a_writer_among_other_processes_is_not_taken_for_dead(tmp_path: Path) -> None:
    """Containers of one host name delete nothing of each other's: process 2 there is not process 2 here."""
    enter = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
    if shutil.which("unshare") is None or subprocess.run([*enter, "true"], capture_output=True, check=False).returncode:
        pytest.skip("no process namespaces here")
    writer = subprocess.Popen(
        [*enter, sys.executable, "-c", PARTIAL_AND_WAIT, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert writer.stdin is not None
    assert writer.stdout is not None
    try:
        process, name = writer.stdout.readline().split()
        there = tmp_path / name
        dead = there.with_name(name.replace(f".{process}.", f".{2**22 + 1}."))
        there.rename(dead)  # as if nobody here had its number
        assert 0 == LocalStorage(tmp_path).remove_leftovers()
        assert dead.exists()
    finally:
        writer.stdin.close()
        writer.wait()
        writer.stdout.close()


def test_two_writers_of_one_object_never_share_a_partial_file(tmp_path: Path) -> None:
    """Not even where their host, process and count are the same."""
    storage = LocalStorage(tmp_path)
    names = {storage._write_partial(tmp_path / "x", b"half").name for _ in range(20)}

    assert 20 == len({name.split(".")[-2] for name in names})
    assert all(len(name.split(".")[-2]) >= 16 for name in names)


@pytest.mark.parametrize(("hours", "left"), [(23, 1), (25, 0)])
def test_what_a_dead_writer_elsewhere_left_is_cleared_after_a_day(tmp_path: Path, hours: int, left: int) -> None:
    leftover = tmp_path / ".x.00000000.1.7.partial"  # as earlier versions named them, too
    leftover.write_bytes(b"half")
    written = time.time() - 3600 * hours
    os.utime(leftover, (written, written))

    assert 1 - left == LocalStorage(tmp_path).remove_leftovers()
    assert left == len(list(tmp_path.iterdir()))


def test_a_name_that_an_nfs_client_remembers_as_missing_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client forgets what was missing in a folder as that folder is opened."""
    storage = LocalStorage(tmp_path / "a.cache")
    storage.put("receipts/v00000/x", b"1")
    names = [tmp_path / "a.cache" / name for name in (".", "receipts", "receipts/v00000", "receipts/v00000/x")]
    remembered = set(names)
    open_file, stat = os.open, Path.stat

    def refuse_remembered(path: Path) -> None:
        if remembered & {path, *path.parents}:
            raise FileNotFoundError(path)

    def open_afresh(path: str | Path, *arguments: int) -> int:
        refuse_remembered(Path(path))
        remembered.difference_update(name for name in names if name.parent == Path(path))
        return open_file(path, *arguments)

    def stat_remembered(path: Path) -> os.stat_result:
        refuse_remembered(path)
        return stat(path)

    monkeypatch.setattr(os, "open", open_afresh)
    monkeypatch.setattr(Path, "stat", stat_remembered)
    assert b"1" == storage.get("receipts/v00000/x")
    remembered.update(names)
    assert 1 == storage.size("receipts/v00000/x")
    assert None is storage.get("receipts/v00000/y")


def test_a_file_that_another_nfs_client_replaces_while_it_is_read_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = LocalStorage(tmp_path)
    storage.put("x", b"1")
    stale = [OSError(errno.ESTALE, os.strerror(errno.ESTALE))] * 2
    status = os.fstat

    def fstat(descriptor: int) -> os.stat_result:
        if stale:
            raise stale.pop()
        return status(descriptor)

    monkeypatch.setattr(os, "fstat", fstat)
    assert b"1" == storage.get("x")
    assert [] == stale


def test_no_more_memory_is_asked_for_than_a_file_holds(tmp_path: Path) -> None:
    """Whatever the limit: a terabyte could not be had."""
    (tmp_path / "x").write_bytes(b"12345")

    assert b"12345" == LocalStorage(tmp_path).get("x", limit=2**50)


@pytest.mark.parametrize("url", ["file://a.cache", "file://host/a.cache", "s3:/team/a.cache", "https:/host/a.cache"])
def test_a_url_that_would_be_taken_for_another_place_is_refused(url: str) -> None:
    with pytest.raises(UsageError, match=r"names no host|begins with"):
        open_storage(url)


def test_a_server_that_breaks_off_while_it_lists_is_one_clear_error() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()

        def answer() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(1000)
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n<a href=")

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(StorageError, match="can't list"):
            open_storage(f"http://127.0.0.1:{listener.getsockname()[1]}").folders()
        thread.join()
