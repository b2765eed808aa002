"""What `info` states of a build while its workers run: one place for all engines, since it reads only the store."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest

import logitcache
from logitcache.cache.build_progress import WINDOW_SECONDS, build_progress
from logitcache.cache.stored_records import read_records
from logitcache.cache.summary import summarise
from logitcache.config.schema import Pipeline
from logitcache.engines import Shard
from logitcache.stages.cache_teacher import cache_teacher
from logitcache.storage import LocalStorage, Storage, Timestamped, open_storage
from logitcache.storage.claims import Claims, held_claims
from tests.commands import logitcache as command
from tests.contract.test_sealing import LOGITS, written

NOW = 1.7e9
"""Seconds since 1970."""


def committed_at(path: Path, ages: list[float]) -> None:
    """Set when the receipts of the blocks were written, in seconds before `NOW`."""
    receipts = sorted((path / "receipts").glob("v*/b*.json"))
    for receipt, age in zip(receipts, ages, strict=True):
        os.utime(receipt, (NOW - age, NOW - age))


def test_the_rate_is_that_of_the_last_minutes_and_gives_the_time_that_is_left(tmp_path: Path) -> None:
    """View 0 of 2 is there: blocks of 4, 4 and 2 rows, of which the first is of an earlier run."""
    path = written(tmp_path / "a.cache", views=1)
    committed_at(path, [WINDOW_SECONDS + 1, 30, 10])
    progress = build_progress(LocalStorage(path), read_records(LocalStorage(path)), now=NOW)

    assert (3, 6, 10, 20) == (progress.blocks, progress.total_blocks, progress.rows, progress.total_rows)
    assert (10.0, 2 / 20, 10 / (2 / 20)) == (
        progress.seconds_since_commit,
        progress.rows_per_second,
        progress.seconds_left,
    )


def test_one_commit_in_the_last_minutes_gives_no_rate(tmp_path: Path) -> None:
    path = written(tmp_path / "a.cache", views=1)
    committed_at(path, [WINDOW_SECONDS + 2, WINDOW_SECONDS + 1, 10])
    progress = build_progress(LocalStorage(path), read_records(LocalStorage(path)), now=NOW)

    assert (None, None, 10.0) == (progress.rows_per_second, progress.seconds_left, progress.seconds_since_commit)


def test_the_claims_name_the_workers_and_which_of_them_are_late(tmp_path: Path) -> None:
    """A claim on a committed block is left out: its worker has finished it, or died after the commit."""
    path = written(tmp_path / "a.cache", views=1)
    storage = LocalStorage(path)
    Claims(storage, owner="node-1").take("v00000/b00001")
    Claims(storage, owner="node-1", seconds=30.0).take("v00001/b00000")
    Claims(storage, owner="node-2").take("v00001/b00001")
    for claim in (path / "claims").iterdir():
        os.utime(claim, (NOW - 31, NOW - 31))

    assert [("v00001/b00000", "node-1", 31.0, True), ("v00001/b00001", "node-2", 31.0, False)] == [
        (claim.name, claim.worker, claim.seconds_since_renewal, claim.expired)
        for claim in held_claims(storage, now=NOW)
        if claim.name != "v00000/b00001"
    ]
    shown = summarise(str(path)).progress
    assert shown is not None
    assert ["v00001/b00000", "v00001/b00001"] == [claim.name for claim in shown.claims]


def test_a_claim_that_was_taken_over_is_shown_once_with_its_new_worker(tmp_path: Path) -> None:
    storage, clock = LocalStorage(tmp_path), iter([0.0, 60.0])
    Claims(storage, seconds=60, owner="dead").take("creation")
    alive = Claims(storage, seconds=60, owner="alive", clock=lambda: next(clock))
    assert [False, True] == [alive.take("creation"), alive.take("creation")]

    assert [("creation", "alive")] == [(claim.name, claim.worker) for claim in held_claims(storage)]


def test_a_claim_without_an_owner_is_shown_too(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    storage.put("claims/block.00001.json", b"[]")

    assert ["unknown"] == [claim.worker for claim in held_claims(storage)]


def test_info_shows_the_blocks_of_all_shards(tiny: Callable[..., Pipeline], tmp_path: Path) -> None:
    """Two of three jobs have run; neither of them knows of the other."""
    for index in (0, 2):
        cache_teacher(tiny("cache.rows_per_block=128"), engine=Shard(index=index, count=3))
    progress = json.loads(command("info", tmp_path / "tiny.cache", "--json").stdout)["progress"]

    assert (4, 6) == (progress["blocks"], progress["total_blocks"])
    assert progress["rows_per_second"] > 0
    assert progress["seconds_left"] == (progress["total_rows"] - progress["rows"]) / progress["rows_per_second"]


def test_info_prints_blocks_rate_and_claims_in_lines(tmp_path: Path) -> None:
    path = written(tmp_path / "a.cache", views=1)
    Claims(LocalStorage(path), owner="node-1").take("v00001/b00000")
    shown = command("info", path).stdout

    assert "blocks: 3 of 6 committed, the last one 0 s ago" in shown
    assert "rate of all workers: " in shown
    assert "  v00001/b00000: node-1, renewed 0 s ago" in shown


def test_a_sealed_cache_has_no_progress(tmp_path: Path) -> None:
    path = written(tmp_path / "a.cache")
    logitcache.seal(path)

    assert summarise(str(path)).progress is None


@pytest.mark.parametrize("store", ["folder", "memory", "moto"])
def test_a_store_states_when_objects_were_written(store: str, on: Callable[[str], str], tmp_path: Path) -> None:
    storage: Storage = open_storage(tmp_path / "a" if store == "folder" else on(store))
    assert isinstance(storage, Timestamped)
    storage.put("a/first", b"1")
    storage.put("b/other", b"2")
    [(key, first)] = storage.written("a")
    storage.put("a/second", b"3")

    assert "a/first" == key
    assert first <= dict(storage.written("a"))["a/second"]
    assert {"a/first", "a/second"} == dict(storage.written("a")).keys()
    assert [] == list(storage.written("nothing"))


def test_the_progress_of_a_build_on_s3_comes_from_the_times_of_its_objects(on: Callable[[str], str]) -> None:
    url = f"{on('moto')}/{uuid.uuid4().hex}.cache"
    writer = logitcache.create(
        url, num_samples=10, num_classes=5, num_views=2, rows_per_block=4, teacher="net", dataset="pictures"
    )
    writer.write(view=0, start=0, logits=LOGITS[0])
    writer.close()
    progress = summarise(url).progress

    assert progress is not None
    assert (3, 6) == (progress.blocks, progress.total_blocks)
    assert progress.seconds_since_commit is not None
