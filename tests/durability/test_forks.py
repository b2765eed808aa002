"""A cache that was opened before a fork: read in the child, or refused at once; nobody waits for ever."""

from __future__ import annotations

import json
import multiprocessing
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import logitcache
from logitcache.cache.reader import LogitCache
from logitcache.errors import LogitCacheError
from logitcache.storage import open_storage
from tests import servers

SAMPLES, CLASSES, VIEWS = 20, 6, 3

pytestmark = [
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
    pytest.mark.timeout(120),
]


def labels(view: int) -> Tensor:
    return torch.randn(SAMPLES, CLASSES, generator=torch.Generator().manual_seed(view)) * 3


@pytest.fixture
def whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LOGITCACHE_CACHE_DIR", str(tmp_path / "nearby"))
    monkeypatch.setenv("LOGITCACHE_CACHE_GB", "0")
    path = tmp_path / "www/whole.cache"
    shape = {"num_samples": SAMPLES, "num_classes": CLASSES, "num_views": VIEWS, "rows_per_block": 8}
    encoding = logitcache.Dense(dtype="float32")
    with logitcache.create(path, **shape, encoding=encoding, teacher="t", dataset="d") as writer:
        for view in range(VIEWS):
            writer.write(view=view, start=0, logits=labels(view))
    return path


def in_child(read: Callable[[], Tensor], *, context: str = "fork") -> Any:
    """What is read in a child: logits as an array, or the text of an error of ours."""
    processes = multiprocessing.get_context(context)
    receiver, sender = processes.Pipe(duplex=False)
    child = processes.Process(target=_read_and_send, args=(read, sender))
    child.start()
    try:
        assert receiver.poll(60), "the child waits for ever"
        return receiver.recv()
    finally:
        child.kill()
        child.join()


def _read_and_send(read: Callable[[], Tensor], sender: Any) -> None:
    torch.set_num_threads(1)
    try:
        sender.send(read().numpy())
    except LogitCacheError as error:
        sender.send(f"{type(error).__name__}: {error}")


class Read:
    """Reads a view, of a cache that is open already or is opened there; can be sent to a spawned process."""

    def __init__(self, cache: LogitCache | str, view: int) -> None:
        self.cache, self.view = cache, view

    def __call__(self) -> Tensor:
        cache = logitcache.open(self.cache) if isinstance(self.cache, str) else self.cache
        return cache.view(self.view).logits(range(SAMPLES))


def assert_same(expected: Tensor, found: Any) -> None:
    assert not isinstance(found, str), found
    assert torch.equal(expected, torch.from_numpy(found))


@pytest.mark.parametrize("opened", ["before", "there"])
def test_reading_a_url_after_a_fork_is_refused_with_the_remedy(whole: Path, opened: str) -> None:
    """It hung, be the cache opened before the fork or in the child: the client's threads are left behind."""
    with servers.misbehaving(whole.parent) as server:
        url = f"{server.url}/whole.cache"
        cache = logitcache.open(url)
        found = in_child(Read(cache if opened == "before" else url, 1))

        assert isinstance(found, str)
        assert found.startswith(f"StorageError: {url} can't be read in this process, which was forked from one")
        assert "multiprocessing_context='spawn' or 'forkserver' and open the cache in the worker" in found
        assert_same(labels(1), cache.view(1).logits(range(SAMPLES)).numpy())  # here all goes on


class Labels(torch.utils.data.Dataset[Tensor]):
    def __init__(self, cache: LogitCache | str) -> None:
        self.cache = cache

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> Tensor:
        self.cache = logitcache.open(self.cache) if isinstance(self.cache, str) else self.cache
        return self.cache.view(1).logits([index])[0]


def test_a_dataloader_s_forked_workers_say_so_and_spawned_ones_read(whole: Path) -> None:
    with servers.misbehaving(whole.parent) as server:
        url = f"{server.url}/whole.cache"
        settings: dict[str, Any] = {"batch_size": 5, "num_workers": 2}
        forked = torch.utils.data.DataLoader(Labels(logitcache.open(url)), multiprocessing_context="fork", **settings)
        with pytest.raises(LogitCacheError, match="multiprocessing_context='spawn'"):
            list(forked)
        spawned = torch.utils.data.DataLoader(Labels(url), multiprocessing_context="forkserver", **settings)

        assert torch.equal(labels(1), torch.cat(list(spawned)))


def test_what_was_read_before_or_lies_nearby_is_there_after_a_fork(
    whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOGITCACHE_CACHE_GB", "1")
    with servers.misbehaving(whole.parent) as server:
        cache = logitcache.open(f"{server.url}/whole.cache")
        resident = cache.view(0, ahead=False)
        cache.view(1, ahead=False)

        assert_same(labels(0), in_child(lambda: resident.logits(range(SAMPLES))))
        assert_same(labels(1), in_child(lambda: cache.view(1, ahead=False).logits(range(SAMPLES))))


def test_a_child_of_a_process_that_read_no_url_reads_them(whole: Path, tmp_path: Path) -> None:
    """Where nothing was begun before the fork, nothing is left behind."""
    program = (
        "import sys\nfrom tests.durability.test_forks import Read, in_child\nfrom logitcache.storage import open_storage\n"
        "open_storage(sys.argv[1])\nprint(in_child(Read(sys.argv[1], 2)).tolist())"
    )
    with servers.misbehaving(whole.parent) as server:
        command = [sys.executable, "-c", program, f"{server.url}/whole.cache"]
        printed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=100).stdout

    assert labels(2).tolist() == json.loads(printed)


def test_a_memory_store_is_read_after_a_fork() -> None:
    url = f"memory://{uuid.uuid4().hex}/a.cache"
    storage = open_storage(url)
    storage.put("x", b"1")
    found = in_child(lambda: torch.tensor([int(storage.get("x") or b"0")]))

    assert [1] == found.tolist()


@pytest.mark.parametrize("view", [1, 2])
def test_a_local_cache_that_loads_ahead_is_read_after_a_fork(whole: Path, view: int) -> None:
    """It hung: what the parent's thread was to load never came."""
    cache = logitcache.open(whole)
    started, go_on = threading.Event(), threading.Event()
    read_blocks = cache.read_blocks

    def slowly(*arguments: Any) -> Any:
        started.set()
        assert go_on.wait(100)
        return read_blocks(*arguments)

    cache.read_blocks = slowly  # type: ignore[method-assign]
    cache.prefetch(1)
    assert started.wait(100)

    def read() -> Tensor:
        go_on.set()
        cache.prefetch(view)
        return cache.view(view).logits(range(SAMPLES))

    assert_same(labels(view), in_child(read))
    go_on.set()
    assert_same(labels(1), cache.view(1).logits(range(SAMPLES)).numpy())
