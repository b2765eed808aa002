"""The local directory of remote blocks: limited, shared, and never believed.

Five processes that read and evict for a minute, one of them killed every six seconds:

    python -m tests.durability.test_blockdir 60
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import logitcache
from logitcache.errors import StorageError
from logitcache.progress import silence
from logitcache.share.transfer import pull
from logitcache.storage.blockdir import BlockDirectory, shared_block_directory
from logitcache.verify.audit import verify
from tests import servers

CACHES, VIEWS, SAMPLES, CLASSES = 3, 4, 600, 16
LIMIT = 60_000
"""Bytes; one view takes 11 kB, all caches together 130 kB."""


def labels(number: int) -> torch.Tensor:
    return torch.randn(VIEWS, SAMPLES, CLASSES, generator=torch.Generator().manual_seed(number)) * 3


def test_the_least_recently_used_go_first_and_the_limit_holds(tmp_path: Path) -> None:
    directory = BlockDirectory(tmp_path / "nearby", max_bytes=1000)
    for number in range(10):
        directory.put(f"{number:064x}", bytes(90))
        os.utime(directory._path(f"{number:064x}"), ns=(number, number))
    assert directory.get(f"{0:064x}") == bytes(90)  # used now, so the last to go
    directory.put(f"{10:064x}", bytes(200))

    left = [number for number in range(11) if f"{number:064x}" in directory]
    assert [0, 4, 5, 6, 7, 8, 9, 10] == left
    assert 830 == directory.stored_bytes()
    assert not directory.put(f"{11:064x}", bytes(1001))


def test_what_others_left_behind_is_counted_and_cleared(tmp_path: Path) -> None:
    directory = BlockDirectory(tmp_path / "nearby", max_bytes=1000)
    directory.put("a" * 64, bytes(500))
    (tmp_path / "nearby/bytes").write_text("")  # killed while it wrote the count
    (tmp_path / "nearby/blocks/aa" / ("b" * 64 + ".partial")).write_bytes(bytes(400))
    directory.put("c" * 64, bytes(450))

    assert 950 == directory.stored_bytes()


def occupy(path: Path, by: str) -> None:
    """Put something else in the place of a file."""
    if by == "pipe":
        os.mkfifo(path)
    elif by == "socket":
        with socket.socket(socket.AF_UNIX) as listener, contextlib.chdir(path.parent):  # its whole name may be too long
            listener.bind(path.name)
    elif by == "device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()


@pytest.mark.parametrize("by", ["pipe", "socket", "device", "folder"])
@pytest.mark.timeout(30)
def test_what_is_no_file_in_the_place_of_an_entry_blocks_nobody(tmp_path: Path, by: str) -> None:
    """A reader waited at a pipe for ever."""
    directory = BlockDirectory(tmp_path / "nearby", max_bytes=1000)
    directory.put("a" * 64, b"one")
    directory.put("b" * 64, b"two")
    path = tmp_path / "nearby/blocks/aa" / ("a" * 64)
    path.unlink()
    occupy(path, by)

    assert directory.get("a" * 64) is None
    assert "a" * 64 not in directory
    assert b"two" == directory.get("b" * 64)
    directory.drop("a" * 64)
    if by != "folder":
        assert directory.put("a" * 64, b"one")
        assert b"one" == directory.get("a" * 64)


@pytest.mark.timeout(30)
def test_a_pipe_in_the_place_of_the_count_blocks_nobody(tmp_path: Path) -> None:
    directory = BlockDirectory(tmp_path / "nearby", max_bytes=1000)
    directory.put("a" * 64, b"one")
    (tmp_path / "nearby/bytes").unlink()
    occupy(tmp_path / "nearby/bytes", "pipe")

    with pytest.raises(StorageError, match="can't store blocks"):
        directory.put("b" * 64, b"two")
    assert b"one" == directory.get("a" * 64)


@contextlib.contextmanager
def nobody(folder: Path) -> Iterator[None]:
    """As somebody who may read a folder, and not write to it."""
    if os.geteuid() != 0:
        pytest.skip("only root can become somebody else")
    for path in (folder, *folder.parents):
        path.chmod(path.stat().st_mode | 0o055)
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_a_directory_that_can_only_be_read_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """All was downloaded each time: a block that could not be marked as used counted as missing."""
    with tempfile.TemporaryDirectory() as name, servers.misbehaving(Path(name) / "www") as server:
        folder = Path(name)
        path = folder / "www/a.cache"
        shape = {"num_samples": SAMPLES, "num_classes": CLASSES, "num_views": VIEWS, "rows_per_block": 100}
        with logitcache.create(path, **shape, encoding=logitcache.Dense(), teacher="t", dataset="d") as writer:
            for view in range(VIEWS):
                writer.write(view=view, start=0, logits=labels(0)[view])
        monkeypatch.setenv("LOGITCACHE_CACHE_DIR", str(folder / "nearby"))
        monkeypatch.setenv("LOGITCACHE_CACHE_GB", "1")
        expected = logitcache.open(f"{server.url}/a.cache").view(0, ahead=False).logits(range(SAMPLES))
        with nobody(folder / "nearby"):
            cache = logitcache.open(f"{server.url}/a.cache")
            with pytest.warns(RuntimeWarning, match="can't store blocks"):
                cache.view(1, ahead=False)
            before = sum(server.counts.values())
            found = cache.view(0, ahead=False).logits(range(SAMPLES))

        assert torch.equal(expected, found)
        assert before == sum(server.counts.values())


@pytest.mark.parametrize(("text", "expected"), [("", 50_000_000_000), ("0.001", 1_000_000), ("0", None)])
def test_the_size_comes_from_the_environment(
    text: str, expected: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOGITCACHE_CACHE_DIR", str(tmp_path / "elsewhere"))
    monkeypatch.setenv("LOGITCACHE_CACHE_GB", text)
    directory = shared_block_directory()

    assert expected == (None if directory is None else directory.max_bytes)
    assert directory is None or directory.root == tmp_path / "elsewhere"


def use(url: str, folder: str, seed: int, ready: Any, ended: Any, reads: Any) -> None:
    """Read views of random caches, and pull some of them, until the time is over; anything wrong ends the process."""
    silence()
    torch.set_num_threads(1)
    draw = random.Random(seed)
    ready.release()
    while not ended.is_set():
        number, view = draw.randrange(CACHES), draw.randrange(VIEWS)
        cache = logitcache.open(f"{url}/{number}.cache")
        found = cache.view(view).logits(range(SAMPLES))
        assert torch.equal(labels(number)[view], found), "other numbers"
        if draw.random() < 0.1:
            target = f"{folder}/{seed}-{time.time_ns()}.cache"
            pull(f"{url}/{number}.cache", target, views=f"{view}:")
            assert [] == verify(target, deep=True), "a pull that is not whole"
        with reads.get_lock():
            reads.value += 1


def together(seconds: float, folder: Path, *, kill: bool) -> tuple[int, int, int]:
    """Reads, kills and the most bytes that ever lay in the directory."""
    (folder / "www").mkdir()
    for number in range(CACHES):
        shape = {"num_samples": SAMPLES, "num_classes": CLASSES, "num_views": VIEWS, "rows_per_block": 100}
        settings = {"encoding": logitcache.Dense(dtype="float32"), "teacher": str(number), "dataset": "d"}
        with logitcache.create(folder / f"www/{number}.cache", **shape, **settings) as writer:
            for view in range(VIEWS):
                writer.write(view=view, start=0, logits=labels(number)[view])
    os.environ |= {"LOGITCACHE_CACHE_DIR": str(folder / "nearby"), "LOGITCACHE_CACHE_GB": str(LIMIT / 1e9)}
    directory = shared_block_directory()
    assert directory is not None
    context = multiprocessing.get_context("spawn")
    reads = context.Value("l", 0)
    most = kills = 0
    with servers.misbehaving(folder / "www") as server:
        ready, ended = context.Semaphore(0), context.Event()

        def start(seed: int) -> Any:
            process = context.Process(target=use, args=(server.url, str(folder), seed, ready, ended, reads))
            process.start()
            return process

        processes = [start(seed) for seed in range(5)]
        for _ in processes:
            assert ready.acquire(timeout=120)
        until = time.time() + seconds
        next_kill = time.time() + 6
        while time.time() < until:
            with directory._lock:  # else an entry that leaves and the one that comes for it may both be counted
                with_partials = sum(size(path) for path in (folder / "nearby").rglob("*") if len(path.name) >= 64)
            most = max(most, with_partials)
            if kill and time.time() > next_kill:
                victim = kills % 5
                os.kill(processes[victim].pid, signal.SIGKILL)
                processes[victim].join()
                processes[victim] = start(5 + kills)
                kills += 1
                next_kill = time.time() + 6
            time.sleep(0.02)
        ended.set()
        for process in processes:
            process.join(60)
        assert [0] * 5 == [process.exitcode for process in processes]
    return reads.value, kills, most


def size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def test_five_processes_read_and_evict_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`python -m tests.durability.test_blockdir 60` for longer, and with some of them killed."""
    monkeypatch.setenv("LOGITCACHE_CACHE_DIR", "")
    monkeypatch.setenv("LOGITCACHE_CACHE_GB", "")
    reads, _, most = together(2, tmp_path, kill=False)

    assert reads > 10
    assert LIMIT / 2 < most <= LIMIT


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        reads, kills, most = together(float(sys.argv[1]), Path(name), kill=True)
        print(f"{reads} views read and pulled by five processes, {kills} killed; at most {most} of {LIMIT} bytes kept")
        assert most <= LIMIT
