"""A cache through power losses, and through any sequence of builds, interruptions, damage and repair."""

from __future__ import annotations

import itertools
import os
import random
import shutil
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor

import logitcache
from logitcache.cache.objects import read_object
from logitcache.errors import LogitCacheError, NotACache
from logitcache.share import transfer
from logitcache.share.transfer import pull
from logitcache.verify.audit import verify
from logitcache.verify.repair import repair
from tests.durability.test_trust import SAMPLES, build, labels, read_all


@dataclass
class Disk:
    """What a disk has been told, in order, and what of it a power loss may leave.

    A file's data last once it was fsynced; before that, any part of it may be there. A name (made, replaced or
    removed) lasts once its folder was fsynced after; before that, each may have happened or not, in any order.
    """

    root: Path
    events: list[tuple[str, str, Any]] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def record(self, kind: str, path: Path, value: Any = None) -> None:
        if not path.is_relative_to(self.root):
            return
        with self.lock:
            self.events.append((kind, path.relative_to(self.root).as_posix(), value))

    def after_power_losses(self, into: Path) -> Iterator[Path]:
        """A state that a power loss may leave after each of the events, as a folder that lasts until the next."""
        draw = random.Random(0)
        for count in range(len(self.events) + 1):
            left = into / f"left-{count}"
            left.mkdir()
            self.after_power_loss(count, draw, left)
            yield left
            shutil.rmtree(left)

    def after_power_loss(self, count: int, draw: random.Random, into: Path) -> None:
        """Write into a folder one state that the first `count` events may leave."""
        events = self.events[:count]
        names: dict[str, bytes] = {}
        folders: set[str] = set()
        volatile: dict[str, bytes] = {}
        for number, (kind, path, value) in enumerate(events):
            folder = Path(path).parent.as_posix()
            lasting = any(later == ("fsync folder", folder, None) for later in events[number + 1 :])
            if kind == "write":
                torn = value[: draw.randrange(len(value) + 1)] + bytes(draw.randrange(3))
                volatile[path] = value if ("fsync", path, None) in events[number + 1 :] else torn
                if lasting or draw.random() < 0.5:
                    names[path] = volatile[path]
            elif kind == "rename" and (lasting or draw.random() < 0.5):
                names[value] = volatile[path]
                names.pop(path, None)
            elif kind == "unlink" and (lasting or draw.random() < 0.5):
                names.pop(path, None)
            elif kind == "mkdir" and (lasting or draw.random() < 0.5):
                folders.add(path)
        for path, data in names.items():
            if all(parent.as_posix() in folders for parent in list(Path(path).parents)[:-1]):
                (into / path).parent.mkdir(parents=True, exist_ok=True)
                (into / path).write_bytes(data)


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Disk:
    """Everything that is done under `tmp_path / "disk"` from now on, by the calls that storage makes."""
    disk = Disk(tmp_path / "disk")
    disk.root.mkdir()
    fsync, link, replace, unlink, mkdir = os.fsync, os.link, Path.replace, Path.unlink, Path.mkdir

    def recorded_fsync(descriptor: int) -> None:
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        if path.is_dir():
            disk.record("fsync folder", path)
        else:
            disk.record("write", path, path.read_bytes())
            disk.record("fsync", path)
        fsync(descriptor)

    def recorded_replace(path: Path, target: Path) -> Path:
        if not path.is_relative_to(disk.root):
            return replace(path, target)
        if not any(event[:2] == ("write", path.relative_to(disk.root).as_posix()) for event in disk.events):
            disk.record("write", path, path.read_bytes())  # and never fsynced
        disk.record("rename", path, target.relative_to(disk.root).as_posix())
        return replace(path, target)

    def recorded_link(path: Path, target: Path) -> None:
        if path.is_relative_to(disk.root):  # its first name goes with its unlink
            disk.record("rename", path, target.relative_to(disk.root).as_posix())
        link(path, target)

    def recorded_unlink(path: Path, missing_ok: bool = False) -> None:
        disk.record("unlink", path)
        unlink(path, missing_ok=missing_ok)

    def recorded_mkdir(path: Path, mode: int = 0o777, parents: bool = False, exist_ok: bool = False) -> None:
        disk.record("mkdir", path)
        mkdir(path, mode, parents, exist_ok)

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(os, "link", recorded_link)
    monkeypatch.setattr(Path, "replace", recorded_replace)
    monkeypatch.setattr(Path, "unlink", recorded_unlink)
    monkeypatch.setattr(Path, "mkdir", recorded_mkdir)
    return disk


def test_a_power_loss_at_any_moment_leaves_whole_blocks_only(
    disk: Disk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = build(disk.root / "a.cache")
    right = read_all(disk.root / "a.cache")
    monkeypatch.undo()
    opened = 0
    for left in disk.after_power_losses(tmp_path):
        path = left / "a.cache"
        try:
            cache = logitcache.open(path)
        except LogitCacheError:
            cache = None
        if cache is not None:
            opened += 1
            for view in range(cache.num_views):
                try:
                    found = cache.view(view).logits(range(SAMPLES))
                except LogitCacheError:
                    assert not cache.sealed
                    continue
                assert torch.equal(right[view], found)
        assert whole.digest == build(path).digest
        assert [] == verify(str(path), deep=True)

    assert opened > 50


@pytest.mark.parametrize("stopped_at", [None, 5])
def test_a_power_loss_in_a_pull_leaves_a_whole_cache_or_none(
    stopped_at: int | None, disk: Disk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folders are made durable all together there; those of a pull that was stopped by the one that goes on."""
    build(tmp_path / "a.cache")
    right = read_all(tmp_path / "a.cache")
    if stopped_at is not None:
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            calls = itertools.count()

            def read(*arguments: Any, **options: Any) -> bytes:
                if next(calls) == stopped_at:
                    raise KeyboardInterrupt
                return read_object(*arguments, **options)

            patch.setattr(transfer, "read_object", read)
            pull(str(tmp_path / "a.cache"), str(disk.root / "b.cache"))
    pull(str(tmp_path / "a.cache"), str(disk.root / "b.cache"))
    monkeypatch.undo()
    opened = 0
    for left in disk.after_power_losses(tmp_path):
        try:
            found = read_all(left / "b.cache")
        except NotACache:
            continue
        finally:
            pull(str(tmp_path / "a.cache"), str(left / "b.cache"))
            assert [] == verify(str(left / "b.cache"), deep=True)
        opened += 1
        assert torch.equal(right, found)

    assert opened > 0


class CacheMachine(RuleBasedStateMachine):
    """Build, stop, go on, add views, damage, repair from a copy and read, against labels held in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.path = self.folder / "a.cache"
        self.copy = self.folder / "copy.cache"
        self.views = 1
        self.complete = False
        self.damaged = False
        self.all_labels: Tensor = torch.cat([labels(), labels().flip(0) + 1.0])

    def teardown(self) -> None:
        shutil.rmtree(self.folder)

    def writer(self) -> logitcache.CacheWriter:
        return logitcache.create(
            self.path, num_samples=SAMPLES, num_classes=6, num_views=self.views, rows_per_block=8,
            encoding=logitcache.Dense(dtype="float32"), teacher="net", dataset="pictures",
        )  # fmt: skip

    @initialize()
    def begin(self) -> None:
        self.writer().close()

    @precondition(lambda self: not self.damaged)
    @rule(view=st.integers(0, 3), start=st.integers(0, SAMPLES - 1), count=st.integers(1, SAMPLES))
    def write_some_and_stop(self, view: int, start: int, count: int) -> None:
        writer = self.writer()
        stop = min(start + count, SAMPLES)
        if view < self.views:
            writer.write(view=view, start=start, logits=self.all_labels[view, start:stop])
        writer.flush()
        writer.close()

    @precondition(lambda self: not self.damaged)
    @rule()
    def write_all_and_seal(self) -> None:
        with self.writer() as writer:
            for view in range(self.views):
                writer.write(view=view, start=0, logits=self.all_labels[view])
        self.complete = True
        shutil.rmtree(self.copy, ignore_errors=True)
        shutil.copytree(self.path, self.copy)

    @precondition(lambda self: self.complete and not self.damaged and self.views < 4)
    @rule()
    def ask_for_one_more_view(self) -> None:
        self.views += 1
        self.writer().close()
        self.complete = False

    @precondition(lambda self: self.complete and not self.damaged)
    @rule(draw=st.randoms(use_true_random=False))
    def damage_a_file(self, draw: random.Random) -> None:
        victim = draw.choice(sorted(file for file in self.path.rglob("*") if file.is_file()))
        data = bytearray(victim.read_bytes())
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        victim.write_bytes(data)
        self.damaged = True

    @precondition(lambda self: self.damaged)
    @rule()
    def find_and_repair(self) -> None:
        result = repair(str(self.path), source=str(self.copy))
        assert [] == result.remaining
        self.damaged = False

    @invariant()
    def reads_right_or_refuses(self) -> None:
        if not self.path.exists():
            return
        try:
            cache = logitcache.open(self.path)
        except LogitCacheError:
            assert self.damaged
            return
        assert self.damaged or cache.sealed == self.complete
        for view in range(cache.num_views):
            try:
                found = cache.view(view).logits(range(SAMPLES))
            except LogitCacheError:
                assert self.damaged or not self.complete
                continue
            assert torch.equal(self.all_labels[view], found)
        if not self.damaged:
            assert all(problem.kind == "missing" for problem in verify(str(self.path), deep=True))


CacheMachine.TestCase.settings = settings(max_examples=25, stateful_step_count=20)
TestCacheMachine = CacheMachine.TestCase
