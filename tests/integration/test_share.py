"""Caches from place to place: real stores, a network that misbehaves, and processes that are killed."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from obstore.exceptions import NotSupportedError
from torch import Tensor

import logitcache
from logitcache import encodings, progress
from logitcache.cache import objects
from logitcache.cache.layout import Block, group_metadata
from logitcache.cache.objects import entry_name
from logitcache.cache.summary import find_caches, summarise
from logitcache.config.schema import Pipeline
from logitcache.errors import (
    CorruptCache,
    IdentityMismatch,
    IncompleteCache,
    NotACache,
    StorageError,
    UsageError,
)
from logitcache.share.transfer import UNFINISHED_PUSH, pull, push
from logitcache.stages.cache_teacher import cache_teacher
from logitcache.stages.train_student import train_students
from logitcache.stages.verify_match import verify_match
from logitcache.storage import LocalStorage, open_storage, remote
from logitcache.storage.remote import RemoteStorage
from logitcache.verify.audit import verify
from tests import servers
from tests.commands import logitcache as run_command
from tests.commands import run_json

VIEWS, SAMPLES, CLASSES = 4, 40, 6
STORES = ["memory", "moto", "seaweedfs", "google", "azure"]


def labels() -> Tensor:
    return torch.randn(VIEWS + 1, SAMPLES, CLASSES, generator=torch.Generator().manual_seed(0)) * 3


def build(location: Path | str, *, num_views: int = VIEWS, shift: float = 0.0, teacher: str = "net@1") -> str:
    """A small cache; returns its digest."""
    shape = {"num_samples": SAMPLES, "num_classes": CLASSES, "num_views": num_views, "rows_per_block": 16}
    settings = {"encoding": logitcache.TopK(k=2), "teacher": teacher, "dataset": "pictures"}
    with logitcache.create(location, **shape, **settings) as writer:
        for view in range(num_views):
            writer.write(view=view, start=0, logits=labels()[view] * (1 + shift))
    return logitcache.open(location).digest or ""


def read(location: Path | str) -> dict[int, Tensor]:
    cache = logitcache.open(location)
    return {view: cache.view(view).logits(range(SAMPLES)) for view in cache.views}


def assert_reads(location: Path | str, source: Path, views: range = range(VIEWS)) -> None:
    found, right = read(location), read(source)
    assert list(views) == list(found)
    assert all(torch.equal(found[view], right[view]) for view in views)


@pytest.fixture(autouse=True)
def nearby(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The local directory of remote blocks, and no configuration of this machine's."""
    monkeypatch.setenv("LOGITCACHE_CACHE_DIR", str(tmp_path / "nearby"))
    for name in [name for name in os.environ if name.startswith(("AWS_", "GOOGLE_", "AZURE_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "aws-config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "aws-credentials"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setattr(objects, "PAUSE_SECONDS", 0.001)
    return tmp_path / "nearby"


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    """A cache of four views, twelve blocks."""
    build(tmp_path / "whole.cache")
    return tmp_path / "whole.cache"


@pytest.mark.parametrize("store", STORES)
def test_a_cache_goes_there_and_back(store: str, on: Any, whole: Path, tmp_path: Path) -> None:
    place = on(store)
    sent = push(str(whole), f"{place}/team/a.cache")
    came = pull(f"{place}/team/a.cache", str(tmp_path / "back.cache"), expect=sent.digest)

    assert sent.digest == came.digest == logitcache.open(whole).digest
    assert sent.copied_objects == came.copied_objects == VIEWS * 3 * 3
    assert [] == verify(str(tmp_path / "back.cache"), deep=True)
    assert [] == verify(f"{place}/team/a.cache", deep=True)
    assert_reads(tmp_path / "back.cache", whole)
    assert sorted(open_storage(whole).list_keys()) == sorted(open_storage(tmp_path / "back.cache").list_keys())
    assert UNFINISHED_PUSH not in list(open_storage(f"{place}/team/a.cache").list_keys())


@pytest.mark.parametrize("store", STORES)
def test_ls_finds_what_lies_at_a_location_and_info_says_what_it_is(store: str, on: Any, whole: Path) -> None:
    place = on(store)
    push(str(whole), f"{place}/vision/a.cache")
    build(f"{place}/b.cache", num_views=1, teacher="other")

    found = {summary.url: summary for summary in find_caches(place)}

    assert [f"{place}/b.cache", f"{place}/vision/a.cache"] == list(found)
    assert found[f"{place}/vision/a.cache"] == summarise(f"{place}/vision/a.cache")
    assert logitcache.open(whole).contents == summarise(f"{place}/vision/a.cache").contents
    assert [] == find_caches(f"{place}/nothing")


@pytest.mark.parametrize(
    "encoding",
    [
        logitcache.Dense(dtype="uint8"), logitcache.TopK(k=3), logitcache.Sampled(draws=5),
        logitcache.Sampled(draws=5, packed=True), logitcache.PackedTopK(k=2), logitcache.LowRank(rank=2, step=0.5),
    ],
    ids=repr,
)  # fmt: skip
def test_info_spells_an_encoding_as_python_that_makes_it(encoding: Any, tmp_path: Path) -> None:
    shape = {"num_samples": 4, "num_classes": CLASSES, "teacher": "t", "dataset": "d"}
    calibration = labels().flatten(0, 1)
    with logitcache.create(tmp_path / "a", **shape, encoding=encoding, calibration=calibration) as writer:
        writer.write(view=0, start=0, logits=labels()[0, :4])

    assert encoding == eval(summarise(str(tmp_path / "a")).encoding, vars(encodings))


@pytest.mark.parametrize("store", STORES)
def test_some_views_are_a_cache_that_says_which_it_holds(store: str, on: Any, whole: Path, tmp_path: Path) -> None:
    place, part = f"{on(store)}/a.cache", tmp_path / "part.cache"
    push(str(whole), place)

    first = pull(place, str(part), views="0:2")
    assert "0:2" == first.views
    assert logitcache.open(part).digest == first.digest != first.source_digest == logitcache.open(whole).digest
    assert 2 == logitcache.open(part).num_views
    assert [] == verify(str(part), deep=True)
    assert_reads(part, whole, range(2))
    with pytest.raises(UsageError, match="gap"):
        pull(place, str(part), views="3:4")

    grown = pull(place, str(part))
    assert (grown.copied_objects, grown.kept_objects) == (18, 18)
    assert logitcache.open(whole).digest == grown.digest
    assert [] == verify(str(part), deep=True)

    pull(place, str(tmp_path / "later.cache"), views="2:")
    later = logitcache.open(tmp_path / "later.cache")
    assert range(2, 4) == later.views
    assert "2:4" == run_json("info", tmp_path / "later.cache")["views"]
    assert [] == verify(str(tmp_path / "later.cache"), deep=True)
    assert_reads(tmp_path / "later.cache", whole, range(2, 4))
    with pytest.raises(UsageError, match="partial copy with views 2 to 3, without view 0"):
        later.view(0)


@pytest.mark.parametrize("views", ["5:6", "2:2", "x", "0:9", "-1:2"])
def test_views_that_are_not_there_are_refused_before_anything_is_copied(
    whole: Path, tmp_path: Path, views: str
) -> None:
    with pytest.raises(UsageError, match="no views"):
        pull(str(whole), str(tmp_path / "part.cache"), views=views)

    assert not (tmp_path / "part.cache").exists()


def test_another_digest_than_expected_is_refused_before_anything_is_copied(whole: Path, tmp_path: Path) -> None:
    digest = logitcache.open(whole).digest or ""
    with pytest.raises(IdentityMismatch, match="expected 0000"):
        pull(str(whole), str(tmp_path / "b"), expect="0" * 64)
    with pytest.raises(UsageError, match="12 hexadecimal digits"):
        pull(str(whole), str(tmp_path / "b"), expect="abc")

    assert not (tmp_path / "b").exists()
    assert digest == pull(str(whole), str(tmp_path / "b"), expect=digest[:12]).digest


def test_nothing_of_anybody_else_is_written_over(whole: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/chapter1.tex").write_text("…")
    build(tmp_path / "other.cache", teacher="other")
    build(tmp_path / "again.cache", shift=0.1)
    with pytest.raises(NotACache, match=r"chapter1\.tex"):
        pull(str(whole), str(tmp_path / "thesis"))
    with pytest.raises(IdentityMismatch, match="holds another cache"):
        pull(str(whole), str(tmp_path / "other.cache"))
    with pytest.raises(IdentityMismatch, match="with other labels: v0000"):
        pull(str(whole), str(tmp_path / "again.cache"))

    assert [] == verify(str(tmp_path / "other.cache"), deep=True)
    assert [] == verify(str(tmp_path / "again.cache"), deep=True)


def test_a_place_where_no_cache_can_be_is_refused_before_anything_is_copied(whole: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("…")
    for place, reason in (
        ("file", "is a file"),
        ("file/b.cache", "is a file"),
        ("whole.cache/sub", "inside another"),
    ):
        with pytest.raises(UsageError, match=reason):
            pull(str(whole), str(tmp_path / place))
        with pytest.raises(UsageError, match=reason):
            build(tmp_path / place)

    assert [] == verify(str(whole), deep=True)
    assert not (whole / "sub").exists()


def test_what_a_killed_copy_left_half_written_is_cleared_away(whole: Path, tmp_path: Path) -> None:
    pull(str(whole), str(tmp_path / "b.cache"), views="0:2")
    partial = LocalStorage(tmp_path / "b.cache")._write_partial(tmp_path / "b.cache/labels.zarr/x", b"half")
    dead = partial.with_name(partial.name.replace(f".{os.getpid()}.", f".{2**22 + 1}."))
    partial.rename(dead)
    pull(str(whole), str(tmp_path / "b.cache"))

    assert not dead.exists()


def test_whoever_interrupts_a_pull_does_not_wait_for_a_slow_network(whole: Path, tmp_path: Path) -> None:
    """Ctrl-C: a line that says what to do, the exit code of shells, and whatever had arrived stays."""
    command = [sys.executable, "-m", "logitcache.cli", "pull"]
    with servers.misbehaving(whole.parent) as server:
        server.fault = lambda path, count: "silent" if path.endswith("c/3/2/0") else None
        process = subprocess.Popen(
            [*command, f"{server.url}/whole.cache", str(tmp_path / "b.cache"), "--json"],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        while "silent" not in server.faults:
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        said, complained = process.communicate(timeout=20)  # the server is silent for longer
        server.fault = lambda path, count: None
        assert 130 == process.returncode
        assert "interrupted" in json.loads(said)["error"]
        assert "re-run the same command to resume" in complained
        assert pull(f"{server.url}/whole.cache", str(tmp_path / "b.cache")).kept_objects > 0


def test_an_unfinished_cache_is_not_shared(tmp_path: Path) -> None:
    settings = {"num_samples": SAMPLES, "num_classes": CLASSES, "teacher": "t", "dataset": "d"}
    logitcache.create(tmp_path / "open.cache", **settings).close()
    with pytest.raises(IncompleteCache, match="not sealed"):
        push(str(tmp_path / "open.cache"), "memory://unfinished")


def test_a_push_of_something_else_is_not_mixed_with(whole: Path, tmp_path: Path, on: Any) -> None:
    place = f"{on('memory')}/a.cache"
    open_storage(place).put(UNFINISHED_PUSH, json.dumps({"digest": "1" * 64}).encode())
    with pytest.raises(UsageError, match="unfinished push of other content"):
        push(str(whole), place)


@pytest.mark.parametrize("store", STORES)
def test_a_cache_that_has_grown_is_pushed_again_and_read_all_the_while(
    store: str, on: Any, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between any two steps of the second push a reader finds the old cache or the new one."""
    place = f"{on(store)}/a.cache"
    push(str(whole), place)
    build(whole, num_views=VIEWS + 1)
    lengths = []
    really_put = RemoteStorage._put

    def put(storage: RemoteStorage, key: str, data: bytes, *, mode: Any) -> bool:
        stored = really_put(storage, key, data, mode=mode)
        if key.endswith(".json"):
            lengths.append(logitcache.open(place).num_views)
        return stored

    monkeypatch.setattr(RemoteStorage, "_put", put)
    grown = push(str(whole), place)

    assert (grown.copied_objects, grown.kept_objects) == (9, 36)
    assert sorted(lengths) == lengths
    assert {VIEWS, VIEWS + 1} == set(lengths)
    assert [] == verify(place, deep=True)
    assert_reads(place, whole, range(VIEWS + 1))


@pytest.mark.parametrize("store", STORES)
def test_students_train_from_the_url_as_from_the_folder(
    store: str, on: Any, tiny: Callable[..., Pipeline], tmp_path: Path, nearby: Path
) -> None:
    place = f"{on(store)}/tiny.cache"
    here = tiny(f"runs.path={tmp_path / 'here'}")
    cache_teacher(here)
    push(here.cache.path, place)
    [right] = train_students(here, ["small"])
    for name, overrides in {"resident": [], "streamed": ["cache.memory_budget_mb=0.02"]}.items():
        [found] = train_students(tiny(f"cache.path={place}", f"runs.path={tmp_path / name}", *overrides), ["small"])
        if name == "resident":
            weights = "small/seed-0/last.safetensors"
            assert (tmp_path / "here" / weights).read_bytes() == (tmp_path / name / weights).read_bytes()
            assert right.accuracy_mean == found.accuracy_mean
    assert any(nearby.glob("blocks/*/*"))


def test_students_train_on_a_copy_of_later_views_only(tiny: Callable[..., Pipeline], tmp_path: Path) -> None:
    pipeline = tiny("views.count=3")
    cache_teacher(pipeline)
    pull(pipeline.cache.path, str(tmp_path / "later.cache"), views="1:3")
    later = tiny(f"cache.path={tmp_path / 'later.cache'}", f"runs.path={tmp_path / 'later'}")
    [row] = train_students(later, ["small"])

    assert row.accuracy_mean is not None
    assert [] == verify_match(later, recompute=20)
    with pytest.raises(IncompleteCache, match="needs 3 views.*has 2"):
        train_students(tiny("views.count=3", f"cache.path={tmp_path / 'later.cache'}"), ["small"])


def test_what_was_read_once_is_read_nearby(on: Any, whole: Path, monkeypatch: pytest.MonkeyPatch, nearby: Path) -> None:
    place = f"{on('memory')}/a.cache"
    push(str(whole), place)
    asked = []
    really_get = RemoteStorage._get

    def get(storage: RemoteStorage, key: str, *arguments: Any, **options: Any) -> memoryview | None:
        asked.append(key)
        return really_get(storage, key, *arguments, **options)

    monkeypatch.setattr(RemoteStorage, "_get", get)
    assert_reads(place, whole)
    first = asked.copy()
    assert len(first) == len(set(first)) == 2 + VIEWS * 3 * 3  # each once, though views are fetched ahead as well
    asked.clear()
    assert_reads(place, whole)
    assert ["manifest.json"] == asked

    for entry in nearby.glob("blocks/*/*"):  # whatever happens to them there
        entry.write_bytes(entry.read_bytes()[:-1] + b"?")
    assert_reads(place, whole)
    shutil.rmtree(nearby)
    assert_reads(place, whole)


def test_the_next_view_is_fetched_while_this_one_trains(on: Any, whole: Path, nearby: Path) -> None:
    place = f"{on('memory')}/a.cache"
    push(str(whole), place)
    cache = logitcache.open(place)
    for view, fetched in ((3, {3, 0}), (0, {3, 0, 1})):  # the first follows the last
        cache.view(view)
        for thread in threading.enumerate():
            if thread.name == "logitcache-ahead":
                thread.join()
        there = {entry.name for entry in nearby.glob("blocks/*/*")}
        blocks = {
            view: [entry_name(cache._wanted(Block(view, number), "logits")[0]) for number in range(3)]
            for view in range(4)
        }
        assert fetched == {view for view, names in blocks.items() if there.issuperset(names)}


def test_a_store_without_conditional_writes_is_written_to_all_the_same(
    on: Any, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    really_put = RemoteStorage._put

    def put(storage: RemoteStorage, key: str, data: bytes, *, mode: Any) -> bool:
        if mode == "create":
            raise StorageError(f"can't write {key}") from NotSupportedError("no If-None-Match here")
        return really_put(storage, key, data, mode=mode)

    monkeypatch.setattr(RemoteStorage, "_put", put)
    place = f"{on('memory')}/a.cache"
    push(str(whole), place)
    assert_reads(place, whole)
    assert not open_storage(place).create("manifest.json", b"{}")


def test_without_room_nearby_everything_is_read_from_afar(
    on: Any, whole: Path, monkeypatch: pytest.MonkeyPatch, nearby: Path
) -> None:
    place = f"{on('memory')}/a.cache"
    push(str(whole), place)
    monkeypatch.setenv("LOGITCACHE_CACHE_GB", "0")
    assert_reads(place, whole)
    assert not nearby.exists()
    monkeypatch.setenv("LOGITCACHE_CACHE_GB", "lots")
    with pytest.raises(UsageError, match="number of gigabytes"):
        logitcache.open(place)


def test_a_full_disk_nearby_is_said_once_and_does_not_stop_reading(
    on: Any, whole: Path, nearby: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = f"{on('memory')}/a.cache"
    push(str(whole), place)
    nearby.write_text("a file in the place of the folder")
    with pytest.warns(RuntimeWarning, match="LOGITCACHE_CACHE_DIR") as said:
        assert_reads(place, whole)
    assert 1 == len(said)


@pytest.mark.parametrize("store", STORES)
def test_a_teacher_is_cached_straight_to_the_store(
    store: str, on: Any, tiny: Callable[..., Pipeline], tmp_path: Path
) -> None:
    place = f"{on(store)}/tiny.cache"
    right = cache_teacher(tiny()).manifest.digest

    built = cache_teacher(tiny(f"cache.path={place}"))

    assert right == built.manifest.digest
    assert [] == verify(place, deep=True)
    assert [] == cache_teacher(tiny(f"cache.path={place}")).computed_blocks
    grown = cache_teacher(tiny(f"cache.path={place}", "views.count=3"))
    assert {2} == {block.view for block in grown.computed_blocks}


def die_at(environment: dict[str, str], call: int, job: Callable[..., object], *arguments: Any) -> None:
    """In a process of its own: SIGKILL before the n-th object is stored, wherever it is stored."""
    os.environ.update(environment)
    stored = 0
    lock = threading.Lock()

    def count() -> None:
        nonlocal stored
        with lock:
            stored += 1
            if stored == call:
                os.kill(os.getpid(), signal.SIGKILL)

    really_remote, really_local = RemoteStorage._put, LocalStorage._write_partial

    def remote_put(storage: RemoteStorage, key: str, data: bytes, *, mode: Any) -> bool:
        count()
        return really_remote(storage, key, data, mode=mode)

    def local_put(storage: LocalStorage, path: Path, data: bytes, *, durable: bool = True) -> Path:
        count()
        return really_local(storage, path, data, durable=durable)

    RemoteStorage._put = remote_put  # type: ignore[method-assign]
    LocalStorage._write_partial = local_put  # type: ignore[method-assign]
    job(*arguments)


def killed(forks: multiprocessing.context.BaseContext, call: int, job: Callable[..., object], *arguments: Any) -> bool:
    """Whether it was; else it came to its end before."""
    process = forks.Process(target=die_at, args=(dict(os.environ), call, job, *arguments))  # type: ignore[attr-defined]
    process.start()
    process.join(60)
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode != 0


@pytest.mark.parametrize("store", ["moto", "seaweedfs"])
def test_a_push_that_is_killed_goes_on_and_shows_nothing_before(
    store: str, on: Any, whole: Path, forks: multiprocessing.context.BaseContext
) -> None:
    digest = logitcache.open(whole).digest
    kept = []
    for call in (1, 2, 20, 42, 43):
        place = f"{on(store)}/a.cache"
        assert killed(forks, call, push, str(whole), place)
        with pytest.raises(NotACache):
            logitcache.open(place)
        assert [] == find_caches(place)
        sent = push(str(whole), place)
        kept.append(sent.kept_objects)
        assert digest == sent.digest
        assert [] == verify(place, deep=True)
    assert kept[0] == 0
    assert kept[2] > 0
    assert kept[-1] == 36


@pytest.mark.parametrize("store", ["moto", "seaweedfs"])
def test_a_pull_that_is_killed_goes_on_and_shows_nothing_before(
    store: str, on: Any, whole: Path, tmp_path: Path, forks: multiprocessing.context.BaseContext
) -> None:
    place = f"{on(store)}/a.cache"
    push(str(whole), place)
    for call in (1, 10, 41, 42):
        here = tmp_path / f"{call}.cache"
        assert killed(forks, call, pull, place, str(here))
        with pytest.raises(NotACache):
            logitcache.open(here)
        assert logitcache.open(whole).digest == pull(place, str(here)).digest
        assert [] == verify(str(here), deep=True)

    # More views for a cache that is there: the old one or the new one at every moment.
    for call in (1, 9, *range(18, 25)):
        here = tmp_path / "grows.cache"
        pull(place, str(here), views="0:2")
        done = not killed(forks, call, pull, place, str(here))
        assert logitcache.open(here).num_views in (2, 4)
        assert_reads(here, whole, range(logitcache.open(here).num_views))
        assert {"stray", "wrong bytes"} >= {problem.kind for problem in verify(str(here), deep=True)}
        pull(place, str(here))
        assert [] == verify(str(here), deep=True)
        shutil.rmtree(here)
        if done:
            break
    assert call > 21


@pytest.mark.parametrize("store", ["moto", "seaweedfs"])
def test_a_build_on_the_store_that_is_killed_goes_on(
    store: str, on: Any, whole: Path, forks: multiprocessing.context.BaseContext
) -> None:
    for call in (1, 7, 20, 55):
        place = f"{on(store)}/a.cache"
        assert killed(forks, call, build, place)
        assert logitcache.open(whole).digest == build(place)
        assert [] == verify(place, deep=True)


def test_a_web_server_shares_a_folder(
    whole: Path, tmp_path: Path, tiny: Callable[..., Pipeline], forks: multiprocessing.context.BaseContext
) -> None:
    """nginx: ls, info, pull, partial pull, kill and resume, train; and what it can't do, it says."""
    (tmp_path / "www/vision").mkdir(parents=True)
    push(str(whole), str(tmp_path / "www/vision/a.cache"))
    pipeline = tiny(f"cache.path={tmp_path / 'www/tiny.cache'}")
    cache_teacher(pipeline)
    [right] = train_students(pipeline, ["small"])
    (tmp_path / "nginx").mkdir()
    with servers.nginx(tmp_path / "nginx", tmp_path / "www") as url:
        assert [f"{url}/tiny.cache", f"{url}/vision/a.cache"] == [found.url for found in find_caches(url)]
        assert VIEWS == run_json("info", f"{url}/vision/a.cache")["num_views"]
        assert killed(forks, 10, pull, f"{url}/vision/a.cache", str(tmp_path / "here.cache"))
        assert logitcache.open(whole).digest == pull(f"{url}/vision/a.cache", str(tmp_path / "here.cache")).digest
        assert "1:3" == pull(f"{url}/vision/a.cache", str(tmp_path / "part.cache"), views="1:3").views
        assert [] == verify(f"{url}/vision/a.cache", deep=True)
        [found] = train_students(tiny(f"cache.path={url}/tiny.cache", f"runs.path={tmp_path / 'remote'}"), ["small"])
        assert right.accuracy_mean == found.accuracy_mean
        with pytest.raises(UsageError, match="read-only"):
            push(str(whole), f"{url}/b.cache")
        with pytest.raises(UsageError, match="read-only"):
            cache_teacher(tiny(f"cache.path={url}/new.cache"))
        with pytest.raises(NotACache, match="is not a logit cache"):
            logitcache.open(f"{url}/nothing.cache")


def test_a_server_is_held_to_its_certificate(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`SSL_CERT_FILE` names an authority of one's own, as for other tools."""
    (tmp_path / "nginx").mkdir()
    monkeypatch.setitem(remote._RETRY, "max_retries", 0)
    monkeypatch.setattr(remote, "BODY_ATTEMPTS", 1)
    with servers.nginx(tmp_path / "nginx", tmp_path, tls=True) as url:
        with pytest.raises(StorageError, match="can't read"):
            logitcache.open(f"{url}/whole.cache")
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "nginx/ca.pem"))
        assert [f"{url}/whole.cache"] == [found.url for found in find_caches(url)]
        assert_reads(f"{url}/whole.cache", whole)


FAULTS_THAT_PASS = ["reset", "short", "long", "truncated", "page", "changed", "503", "404", "200 for a range"]


@pytest.mark.parametrize("fault", FAULTS_THAT_PASS)
def test_what_the_network_does_to_an_object_once_is_mended(fault: str, whole: Path, tmp_path: Path) -> None:
    with servers.misbehaving(whole.parent) as server:

        def once(path: str, count: int) -> str | None:
            if fault == "200 for a range":  # broken off in the middle, then sent whole where the rest was asked for
                return None if "/c/" not in path else "reset" if count == 1 else fault
            return fault if count == 1 and "/c/" in path else None

        server.fault = once
        assert_reads(f"{server.url}/whole.cache", whole)
        server.counts.clear()
        pull(f"{server.url}/whole.cache", str(tmp_path / "b.cache"))
        assert server.faults
    assert [] == verify(str(tmp_path / "b.cache"), deep=True)
    assert_reads(tmp_path / "b.cache", whole)


def test_progress_counts_bytes_as_they_come_and_those_that_come_again_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks may be large and the network slow; what turns out wrong is taken back."""
    monkeypatch.setattr(remote, "PIECE_BYTES", 1000)
    shape = {"num_samples": 20_000, "num_classes": 4, "teacher": "t", "dataset": "d"}
    with logitcache.create(tmp_path / "a.cache", **shape, encoding=logitcache.Dense(dtype="float32")) as writer:
        writer.write(view=0, start=0, logits=torch.randn(20_000, 4))
    counted = []
    monkeypatch.setattr(progress.Meter, "advance", lambda meter, count=1, *, note="": counted.append(count))
    with servers.misbehaving(tmp_path) as server:
        server.fault = lambda path, count: "changed" if "/c/0/0" in path and count == 1 else None
        done = pull(f"{server.url}/a.cache", str(tmp_path / "b.cache"))
        assert "changed" in server.faults
    assert len(counted) > 10
    assert min(counted) < 0
    assert sum(counted) == done.copied_bytes
    assert [] == verify(str(tmp_path / "b.cache"), deep=True)


@pytest.mark.parametrize("key", ["manifest.json", "receipts.json"])
@pytest.mark.parametrize("fault", ["reset", "short", "503"])
def test_what_the_network_does_to_a_record_once_is_mended(fault: str, key: str, whole: Path) -> None:
    with servers.misbehaving(whole.parent) as server:
        server.fault = lambda path, count: fault if count == 1 and path.endswith(key) else None
        assert_reads(f"{server.url}/whole.cache", whole)
        assert [fault] == server.faults


@pytest.mark.parametrize("fault", [*FAULTS_THAT_PASS, "403", "silent", "trickle"])
def test_what_the_network_does_for_ever_is_one_clear_error(
    fault: str, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nearby: Path
) -> None:
    """And what had arrived before is used the next time; no cache shows, and nothing wrong is kept."""
    monkeypatch.setattr(remote, "REQUEST_SECONDS", 0.5)
    monkeypatch.setattr(remote, "BODY_ATTEMPTS", 2)
    monkeypatch.setitem(remote._RETRY, "max_retries", 1)
    broken = "whole.cache/labels.zarr/ids/c/2/1/0"
    with servers.misbehaving(whole.parent) as server:
        server.fault = lambda path, count: ("reset" if "200" in fault else fault) if path == broken else None
        expected = StorageError if fault in ("reset", "short", "503", "403", "silent", "trickle") else CorruptCache
        with pytest.raises(StorageError if "200" in fault else expected, match="ids/c/2/1/0"):
            pull(f"{server.url}/whole.cache", str(tmp_path / "b.cache"))
        with pytest.raises(NotACache):
            logitcache.open(tmp_path / "b.cache")
        cache = logitcache.open(f"{server.url}/whole.cache")
        assert torch.equal(read(whole)[0], cache.view(0).logits(range(SAMPLES)))
        with pytest.raises(StorageError if "200" in fault else expected, match="ids/c/2/1/0"):
            cache.view(2)
        server.fault = lambda path, count: None
        assert pull(f"{server.url}/whole.cache", str(tmp_path / "b.cache")).kept_objects > 0
        assert_reads(f"{server.url}/whole.cache", whole)
    assert [] == verify(str(tmp_path / "b.cache"), deep=True)


def test_a_cache_that_is_replaced_between_two_reads_is_read_as_it_was_or_as_it_is(whole: Path, tmp_path: Path) -> None:
    """The manifest is of the old one, the receipts of the new one: both are read again."""
    shutil.copytree(whole, tmp_path / "www/a.cache")
    build(whole, num_views=VIEWS + 1)
    with servers.misbehaving(tmp_path / "www") as server:

        def replace(path: str, count: int) -> None:
            if path.endswith("receipts.json") and count == 1:
                shutil.rmtree(tmp_path / "www/a.cache")
                shutil.copytree(whole, tmp_path / "www/a.cache")

        server.fault = replace
        assert_reads(f"{server.url}/a.cache", whole, range(VIEWS + 1))


def test_another_cache_in_the_place_of_the_one_that_is_being_read_is_noticed(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "www/a.cache")
    build(tmp_path / "other.cache", shift=0.1)
    with servers.misbehaving(tmp_path / "www") as server:
        cache = logitcache.open(f"{server.url}/a.cache")
        shutil.rmtree(tmp_path / "www/a.cache")
        shutil.copytree(tmp_path / "other.cache", tmp_path / "www/a.cache")
        with pytest.raises(CorruptCache, match="differs from its receipt"):
            cache.view(0)


def test_a_server_that_is_not_there_is_one_clear_error(tmp_path: Path) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/a.cache"
    ended = run_command("info", url)

    assert 1 == ended.returncode
    assert f"can't read {url}/manifest.json" in ended.stderr
    assert "Connection refused" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_credentials_come_from_a_profile_and_a_wrong_bucket_says_so(
    moto_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: Path
) -> None:
    (tmp_path / "aws-config").write_text(f"[profile lab]\nregion = us-east-1\nendpoint_url = {moto_url}\n")
    (tmp_path / "aws-credentials").write_text("[lab]\naws_access_key_id = key\naws_secret_access_key = secret\n")
    monkeypatch.setenv("AWS_PROFILE", "lab")
    place = f"s3://team/{uuid.uuid4().hex}/a.cache"

    push(str(whole), place)

    assert_reads(place, whole)
    for job in (lambda url: push(str(whole), url), lambda url: pull(url, str(tmp_path / "b.cache")), find_caches):
        with pytest.raises(StorageError, match="no such bucket") as refused:
            job("s3://no-such-bucket-here/a.cache")
        assert "<" not in str(refused.value)
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    with pytest.raises(UsageError, match="nobody"):
        logitcache.open(place)


def test_a_public_bucket_needs_no_credentials(moto_url: str, monkeypatch: pytest.MonkeyPatch, whole: Path) -> None:
    import boto3

    monkeypatch.setenv("AWS_ENDPOINT_URL", moto_url)
    place = f"s3://team/{uuid.uuid4().hex}/a.cache"
    with monkeypatch.context() as with_keys:
        for name, value in servers.KEYS.items():
            with_keys.setenv(name, value)
        push(str(whole), place)
        client = boto3.client("s3", endpoint_url=moto_url)
        for entry in client.list_objects_v2(Bucket="team", Prefix=place.split("/")[3])["Contents"]:
            client.put_object_acl(Bucket="team", Key=entry["Key"], ACL="public-read")

    assert_reads(place, whole)


def test_an_endpoint_that_is_no_url_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "127.0.0.1:9000")
    for name, value in servers.KEYS.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match="begins with http://"):
        logitcache.open("s3://team/a.cache")


@pytest.mark.parametrize("url", ["s3:///a.cache", "ftp://host/a.cache", "https://host/a.cache?version=2"])
def test_a_url_that_makes_no_sense_is_refused(url: str) -> None:
    with pytest.raises(UsageError):
        logitcache.open(url)


def test_the_records_of_a_copy_are_those_that_zarr_needs(whole: Path, tmp_path: Path) -> None:
    pull(str(whole), str(tmp_path / "part.cache"), views="1:2")
    layout = logitcache.open(tmp_path / "part.cache").layout

    assert all((tmp_path / "part.cache" / key).read_bytes() == data for key, data in group_metadata(layout).items())
