"""Digests of samples are taken while the teacher sees them; the sealed cache is that of a build in two passes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import logitcache
import logitcache.data.views
from logitcache.cache.contents import contents_key
from logitcache.cache.manifest import MANIFEST, read_manifest
from logitcache.cache.stored_records import collect_receipts
from logitcache.cache.writer import CacheWriter
from logitcache.config.schema import Pipeline
from logitcache.data.samples import SeenContents, content_table, sample_table
from logitcache.errors import IdentityMismatch, IncompleteCache, SampleMismatch, UsageError
from logitcache.stages import cache_teacher as stage
from logitcache.stages.cache_teacher import TeacherWorker, cache_teacher, compute_blocks, plan_blocks
from logitcache.storage import Storage, open_storage
from logitcache.verify.audit import verify
from tests.conftest import PICTURES
from tests.models import Pictures

Make = Callable[..., Pipeline]


@pytest.fixture
def pipeline(tiny: Make) -> Pipeline:
    """Forty pictures in three blocks, two views."""
    return tiny(*PICTURES, "data.args.order=null")


def storage_of(pipeline: Pipeline) -> Storage:
    return open_storage(pipeline.cache.path)


def in_two_passes(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch, path: Path) -> Pipeline:
    """The same cache at another path, by a build that reads the data first."""
    other = pipeline.model_copy(update={"cache": pipeline.cache.model_copy(update={"path": str(path)})})
    with monkeypatch.context() as patched:
        patched.setattr(
            stage,
            "identify_samples",
            lambda dataset, location: replace(sample_table(dataset), contents=content_table(dataset)),
        )
        cache_teacher(other)
    return other


def same_cache(expected: Pipeline, found: Pipeline) -> bool:
    """Objects, receipts, id and digest are the same; only the provenance may differ."""
    stores = storage_of(expected), storage_of(found)
    manifests = [read_manifest(store.get(MANIFEST), url="") for store in stores]
    keys = [sorted(key for key in store.list_keys() if key not in (MANIFEST, "README.md")) for store in stores]
    differing = [key for key in keys[0] if stores[0].get(key) != stores[1].get(key)]
    return (
        keys[0] == keys[1]
        and [] == differing
        and manifests[0] == manifests[1].model_copy(update={"provenance": manifests[0].provenance})
    )


class Killed(Exception):
    pass


def stop_after(monkeypatch: pytest.MonkeyPatch, receipts: int) -> pytest.MonkeyPatch:
    """The writer fails when it has stored some receipts of blocks."""
    store = CacheWriter._store
    stored: list[str] = []

    def counted(writer: CacheWriter, name: str, *args: Any, **options: Any) -> Any:
        if len(stored) == receipts and name != "fixed":
            raise Killed
        stored.extend([] if name == "fixed" else [name])
        return store(writer, name, *args, **options)

    monkeypatch.setattr(CacheWriter, "_store", counted)
    return monkeypatch


def build_partly(pipeline: Pipeline, receipts: int) -> None:
    with pytest.MonkeyPatch.context() as patched, pytest.raises(Killed):
        stop_after(patched, receipts)
        cache_teacher(pipeline)


@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param([], id="pictures"),
        pytest.param(["views.mixup=0.4", "views.cutmix=1.0"], id="mixed"),
        pytest.param(["cache.encoding={name: lowrank, rank: 4, k: 2}"], id="a fitted encoding"),
        pytest.param(["num_workers=2"], id="worker processes"),
    ],
)
def test_the_sealed_cache_is_that_of_two_passes(
    pipeline: Pipeline, tiny: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, overrides: list[str]
) -> None:
    pipeline = tiny(*PICTURES, *overrides)
    cache_teacher(pipeline)

    assert same_cache(in_two_passes(pipeline, monkeypatch, tmp_path / "two.cache"), pipeline)
    assert [] == verify(pipeline.cache.path, deep=True)


def test_each_content_is_read_once_and_none_before_the_teacher(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[int] = []
    events: list[str] = []
    digest, write = logitcache.data.views.content_digest, CacheWriter.write

    def counted(dataset: Any, index: int, *loaded: Any) -> bytes:
        taken.append(index)
        return digest(dataset, index, *loaded)

    def noted(writer: CacheWriter, **options: Any) -> None:
        events.append(f"{len(taken)} digests")
        write(writer, **options)

    monkeypatch.setattr(logitcache.data.views, "content_digest", counted)
    monkeypatch.setattr(CacheWriter, "write", noted)
    cache_teacher(pipeline)

    assert list(range(40)) == sorted(taken)
    assert "16 digests" == events[0]


def test_an_open_cache_states_that_its_contents_are_pending(pipeline: Pipeline) -> None:
    build_partly(pipeline, receipts=2)
    storage = storage_of(pipeline)
    cache = logitcache.open(pipeline.cache.path)
    table = sample_table(Pictures())

    assert cache.manifest.contents_pending
    assert table.pending_fingerprint() == cache.manifest.identity.dataset
    assert cache.samples is not None
    assert (table.keys, None) == (cache.samples.keys, cache.samples.contents)
    assert {contents_key(0), contents_key(1)} <= set(storage.list_keys("receipts"))
    cache_teacher(pipeline)
    sealed = logitcache.open(pipeline.cache.path)

    assert sealed.id != cache.id
    assert sample_table(Pictures(), contents=True).fingerprint() == sealed.manifest.identity.dataset
    assert [] == list(storage.list_keys("receipts"))


@pytest.mark.parametrize("receipts", range(7))
def test_a_build_that_was_stopped_anywhere_resumes_to_the_same_cache(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, receipts: int
) -> None:
    if receipts < 6:
        build_partly(pipeline, receipts)
        assert 6 - receipts == len(cache_teacher(pipeline).computed_blocks)
    else:  # while the last records are written
        with monkeypatch.context() as patched, pytest.raises(Killed):
            patched.setattr("logitcache.cache.writer.replace_records", raise_killed)
            cache_teacher(pipeline)
        assert [] == cache_teacher(pipeline).computed_blocks

    assert same_cache(in_two_passes(pipeline, monkeypatch, tmp_path / "two.cache"), pipeline)


def raise_killed(*_: Any, **__: Any) -> None:
    raise Killed


def test_a_build_that_was_stopped_before_its_first_arrays_resumes(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(CacheWriter, "_store", raise_killed)
        cache_teacher(pipeline)
    cache_teacher(pipeline)

    assert same_cache(in_two_passes(pipeline, monkeypatch, tmp_path / "two.cache"), pipeline)


def test_a_sample_that_changed_since_the_teacher_saw_it_stops_a_resumed_build(pipeline: Pipeline, tiny: Make) -> None:
    worker = opened(pipeline)
    worker.compute(worker.missing_blocks()[:3])  # the first view
    worker.close()

    with pytest.raises(SampleMismatch, match=r"sample 5 \(scan/0005.png\) is not what the teacher saw"):
        cache_teacher(tiny(*PICTURES, "data.args.repaint=5"))


def test_a_sample_may_change_before_the_teacher_sees_it(pipeline: Pipeline, tiny: Make) -> None:
    worker = opened(pipeline)
    worker.compute(worker.missing_blocks()[:1])
    worker.close()
    cache_teacher(tiny(*PICTURES, "data.args.repaint=30"))

    changed = sample_table(Pictures(repaint=30), contents=True).fingerprint()
    assert changed == logitcache.open(pipeline.cache.path).manifest.identity.dataset


def test_other_samples_at_the_same_place_are_refused(pipeline: Pipeline, tiny: Make) -> None:
    build_partly(pipeline, receipts=1)

    with pytest.raises(IdentityMismatch, match=r"was built from dataset pending:.*\nFirst difference: sample 5 "):
        cache_teacher(tiny(*PICTURES, "data.args.relabel=5"))


@pytest.mark.parametrize("damage", ["lost", "cut off", "changed"])
def test_lost_digests_cost_one_block_and_nothing_else(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, damage: str
) -> None:
    worker = opened(pipeline)
    worker.compute([block for block in worker.all_blocks() if block.number < 2 or block.view == 0])
    worker.close()
    path = Path(pipeline.cache.path) / contents_key(1)
    data = path.read_bytes()
    path.unlink()
    if damage != "lost":
        path.write_bytes(data[:-1] if damage == "cut off" else bytes([data[0] ^ 1]) + data[1:])

    assert [(0, 1), (1, 2)] == [(each.view, each.number) for each in cache_teacher(pipeline).computed_blocks]
    assert same_cache(in_two_passes(pipeline, monkeypatch, tmp_path / "two.cache"), pipeline)


def test_processes_that_share_the_blocks_share_the_digests(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Each sees some samples only; sealing reads the digests of all."""
    for shard in ("0/3", "1/3", "2/3"):
        compute_blocks(pipeline, plan_blocks(pipeline, shard=shard))
    logitcache.seal(pipeline.cache.path)

    assert same_cache(in_two_passes(pipeline, monkeypatch, tmp_path / "two.cache"), pipeline)


def opened(pipeline: Pipeline) -> TeacherWorker:
    worker = TeacherWorker(pipeline, trust=False)
    worker.open()
    return worker


def test_a_builder_whose_cache_was_sealed_by_another_one_takes_it_over(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The other one gave the cache its final id meanwhile."""
    slow = opened(pipeline)
    slow.compute(slow.missing_blocks()[:2])
    late = TeacherWorker(pipeline, trust=False)
    with monkeypatch.context() as patched:
        pending = stage.identify_samples(Pictures(), None)
        cache_teacher(pipeline)
        patched.setattr(stage, "identify_samples", lambda dataset, existing: pending)
        late.open()
    expected = in_two_passes(pipeline, monkeypatch, tmp_path / "two.cache")
    blocks = slow.all_blocks()
    slow.compute(blocks[2:])

    for worker in (slow, late):
        assert [] == worker.missing_blocks(refresh=True)
        assert logitcache.open(expected.cache.path).id == worker.seal().id
        worker.close()
    assert same_cache(expected, pipeline)


def test_builders_with_different_data_are_found_out(pipeline: Pipeline, tiny: Make) -> None:
    """They have the same keys and targets, so nothing tells them apart before the contents are read."""
    one, other = opened(pipeline), opened(tiny(*PICTURES, "data.args.repaint=5"))
    one.compute(one.missing_blocks()[:1])

    with pytest.raises(SampleMismatch, match="sample 5 has another content here than where another process"):
        other.compute(other.missing_blocks()[:1])
    one.close()
    other.close()


def test_views_are_added_to_a_cache_of_one_pass(
    pipeline: Pipeline, tiny: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    cache_teacher(pipeline)
    grown = tiny(*PICTURES, "views.count=3")
    assert 3 == len(cache_teacher(grown).computed_blocks)

    assert same_cache(in_two_passes(grown, monkeypatch, tmp_path / "two.cache"), grown)


def test_ones_own_loop_builds_in_one_pass(tmp_path: Path) -> None:
    dataset = Pictures()
    seen = SeenContents(len(dataset))
    plan = logitcache.ViewPlan(seed=1, contents=seen)
    views = logitcache.ViewDataset(dataset, plan)
    logits = torch.randn(40, 10)
    settings: dict[str, Any] = {"num_samples": 40, "num_classes": 10, "teacher": "net", "rows_per_block": 16}
    with logitcache.create(tmp_path / "one", samples=sample_table(dataset), view_plan=plan, **settings) as writer:
        for start in range(0, 40, 8):
            inputs = views.batch([(0, index) for index in range(start, start + 8)])
            writer.write(view=0, start=start, logits=logits[start : start + 8], inputs=inputs)
    table = sample_table(dataset, contents=True)
    with logitcache.create(tmp_path / "two", samples=table, view_plan=plan, **settings) as writer:
        writer.write(view=0, start=0, logits=logits, inputs=views.batch([(0, index) for index in range(40)]))
    one, two = (logitcache.open(tmp_path / name) for name in ("one", "two"))

    assert (two.id, two.digest) == (one.id, one.digest)
    with pytest.raises(UsageError, match="the digests of samples 0 to 15 were not taken, because these samples"):
        with logitcache.create(
            tmp_path / "three",
            samples=sample_table(dataset),
            view_plan=logitcache.ViewPlan(contents=SeenContents(40)),
            **settings,
        ) as writer:
            writer.write(view=0, start=0, logits=logits)


def test_a_cache_without_all_digests_is_not_sealed(pipeline: Pipeline) -> None:
    compute_blocks(pipeline, plan_blocks(pipeline))
    (Path(pipeline.cache.path) / contents_key(2)).unlink()
    storage = storage_of(pipeline)
    manifest = read_manifest(storage.get(MANIFEST), url="")

    assert 7 == len(collect_receipts(storage, manifest))
    with pytest.raises(IncompleteCache, match="1 of 6 blocks are missing"):
        logitcache.seal(pipeline.cache.path)
    assert 1 == len(cache_teacher(pipeline).computed_blocks)


def test_samples_without_rows_have_digests_too(tmp_path: Path, tiny: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = tiny(
        "data.name=tests.contract.test_one_pass:sequences",
        "data.validation=0",
        "data.collate=pad",
        "views.transform=null",
        "teacher.model=tests.models:NextToken",
        "teacher.args={}",
        "cache.rows_per_block=8",
    )
    cache_teacher(pipeline)

    assert same_cache(in_two_passes(pipeline, monkeypatch, tmp_path / "two.cache"), pipeline)


def sequences() -> Any:
    from logitcache.data.tokens import TokenDataset

    random = np.random.default_rng(0)
    ids = [random.integers(0, 20, length) for length in (5, 1, 4, 1, 7, 3)]  # a token alone predicts nothing
    return TokenDataset(ids, keys=list("abcdef"), task="causal", vocab_size=20, tokenization={"tokenizer": "none"})
