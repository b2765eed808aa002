"""Several processes that share nothing but the store of a cache, some of which are killed: the digest of one process.

`python benchmarks/kills.py --only claims` kills workers at seeded instants, and their claims really expire.
"""

from __future__ import annotations

import errno
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import logitcache
from logitcache.cache.layout import PER_CACHE
from logitcache.cache.openblock import OpenBlock
from logitcache.cache.writer import BLOCKS_IN_FLIGHT, CacheWriter
from logitcache.config.schema import Pipeline
from logitcache.engines import Claiming, Engine, Shard
from logitcache.progress import silence
from logitcache.stages import cache_teacher as stage
from logitcache.storage import LocalStorage, open_storage
from logitcache.storage.claims import Claims
from logitcache.storage.remote import RemoteStorage
from logitcache.verify.audit import verify
from tests.conftest import tiny_pipeline
from tests.dying import die

Make = Callable[..., Pipeline]
On = Callable[[str], str]

DATA = {
    "images": ["views.count=4", "cache.encoding='LowRank(rank=4, k=2)'", "cache.calibration=200"],
    "tokens": [
        "data={name: 'tests.texts:sentences', collate: pad}",
        "views={count: 5, seed: 3}",
        "teacher={model: 'tests.models:NextToken', weights: random, batch_size: 4}",
        "cache.rows_per_block=40",
        "cache.encoding='TopK(k=4)'",
    ],
}


class Log(NamedTuple):
    """What processes did, one file each."""

    folder: Path

    def write(self, who: str, what: str) -> None:
        descriptor = os.open(self.folder / who, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.write(descriptor, f"{what}\n".encode())
        os.close(descriptor)

    def of(self, who: str, what: str) -> list[str]:
        """The blocks that a process started ("start"), committed ("commit") or claimed after another one, whose claim
        had expired ("takeover"); or its calibrations ("fit")."""
        lines = (self.folder / who).read_text().splitlines()
        return [line.split()[1] for line in lines if line.startswith(what)]

    def all(self, what: str) -> Counter[str]:
        return Counter(name for file in sorted(self.folder.iterdir()) for name in self.of(file.name, what))


class Role(NamedTuple):
    """A process: its name, what it does, and when it dies."""

    name: str
    engine: Engine
    dies_at: int | None = None
    """Its receipt of which it dies: the objects of the block are stored, and the receipt is not."""


def watch(log: Log, role: Role) -> None:
    """Log the blocks that this process starts, commits and takes over, and its calibrations."""
    begin, store, fit, take = OpenBlock.__init__, CacheWriter._store, stage.calibrate, Claims.take

    def beginning(opened: OpenBlock, block: Any, *arguments: Any, **options: Any) -> None:
        log.write(role.name, f"start {block.name}")
        begin(opened, block, *arguments, **options)

    def storing(writer: CacheWriter, name: str, *arguments: Any, **options: Any) -> Any:
        receipt = store(writer, name, *arguments, **options)
        if name != PER_CACHE:
            log.write(role.name, f"commit {name}")
        return receipt

    def fitting(*arguments: Any, **options: Any) -> Any:
        log.write(role.name, "fit encoding")
        return fit(*arguments, **options)

    def taking(claims: Claims, name: str) -> bool:
        taken = take(claims, name)
        if taken and claims._held.get(name, 0) > 1:
            log.write(role.name, f"takeover {name}")
        return taken

    OpenBlock.__init__, CacheWriter._store, stage.calibrate = beginning, storing, fitting  # type: ignore[method-assign]
    Claims.take = taking  # type: ignore[method-assign]


def die_at_receipt(count: int) -> None:
    left = count

    def dying(put: Any) -> Any:
        def put_or_die(storage: Any, key: str, data: bytes, *, durable: bool = True) -> None:
            nonlocal left
            left -= key.startswith("receipts/v")
            if left == 0:
                die()
            put(storage, key, data, durable=durable)

        return put_or_die

    for kind in (LocalStorage, RemoteStorage):
        kind.put = dying(kind.put)  # type: ignore[method-assign]


def wait_for_the_dead(dead: Any) -> None:
    """Start no second block before the other workers are dead; then let their claims expire at the first pause."""
    begin = OpenBlock.__init__
    begun = []

    def beginning(*arguments: Any, **options: Any) -> None:
        if begun:
            dead.wait()
        begun.append(True)
        begin(*arguments, **options)

    def jump(claims: Claims) -> None:
        dead.wait()
        now = claims._clock()
        claims._clock = lambda: now + claims.seconds

    OpenBlock.__init__, Claims.pause = beginning, jump  # type: ignore[method-assign]


def work(log: Log, role: Role, pipeline: Pipeline, environment: dict[str, str], start: Any, dead: Any) -> None:
    silence()
    os.environ |= environment
    watch(log, role)
    if role.dies_at is not None:
        die_at_receipt(role.dies_at)
    elif dead is not None:
        wait_for_the_dead(dead)
    start.wait()
    stage.cache_teacher(pipeline, engine=role.engine)


def run(forks: Any, log: Log, pipeline: Pipeline, roles: list[Role], *, survivors_wait: bool = False) -> None:
    """Run processes at the same time, of which the right ones die."""
    log.folder.mkdir(exist_ok=True)
    environment = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    start, dead = forks.Barrier(len(roles)), forks.Event() if survivors_wait else None
    children = [
        forks.Process(target=work, args=(log, role, pipeline, environment, start, dead), daemon=True) for role in roles
    ]
    for child in children:
        child.start()
    for child, role in sorted(zip(children, roles, strict=True), key=lambda each: each[1].dies_at is None):
        if role.dies_at is None and dead is not None:
            dead.set()
        child.join(120)
        assert (0 if role.dies_at is None else -9) == child.exitcode, role


def check_blocks_of_the_dead(log: Log, victims: list[str]) -> None:
    """Only what the killed processes had begun and not committed was computed twice."""
    lost = {name for who in victims for name in set(log.of(who, "start")) - set(log.of(who, "commit"))}
    repeated = {name for name, count in log.all("start").items() if count > 1}

    assert repeated <= lost
    assert {1} == set(log.all("commit").values())
    assert all(
        1 <= len(set(log.of(who, "start")) - set(log.of(who, "commit"))) <= BLOCKS_IN_FLIGHT + 1 for who in victims
    )


@pytest.mark.parametrize("data", DATA)
def test_shards_of_which_two_are_killed_and_run_again_build_the_cache_of_one_process(
    data: str, tiny: Make, tmp_path: Path, forks: Any
) -> None:
    single = stage.cache_teacher(tiny(*DATA[data], f"cache.path={tmp_path}/single.cache"))
    pipeline, log = tiny(*DATA[data]), Log(tmp_path / "log")
    shards = [Shard(index=index, count=4) for index in range(4)]
    deaths = {1: 2, 2: 1}
    run(forks, log, pipeline, [Role(f"shard {shard.index}", shard, deaths.get(shard.index)) for shard in shards])
    assert not logitcache.open(pipeline.cache.path).sealed
    run(forks, log, pipeline, [Role(f"shard {index} again", shards[index]) for index in deaths])

    cache = logitcache.open(pipeline.cache.path)
    assert (True, single.manifest.digest) == (cache.sealed, cache.digest)
    assert [] == verify(pipeline.cache.path, deep=True)
    check_blocks_of_the_dead(log, ["shard 1", "shard 2"])
    assert single.total_blocks == len(log.all("commit"))
    assert (1 if data == "images" else 0) == log.all("fit").total(), "one shard fits the encoding for all"
    assert [] == list(open_storage(pipeline.cache.path).list_keys("claims"))


@pytest.mark.parametrize(("store", "data"), [("folder", "tokens"), ("moto", "images")])
def test_claim_workers_of_which_three_are_killed_build_the_cache_of_one_process(
    store: str, data: str, tiny: Make, tmp_path: Path, forks: Any, on: On
) -> None:
    single = stage.cache_teacher(tiny(*DATA[data], f"cache.path={tmp_path}/single.cache"))
    path = str(tmp_path / "b.cache") if store == "folder" else on(store)
    pipeline, log = tiny(*DATA[data], f"cache.path={path}"), Log(tmp_path / "log")
    roles = [Role(f"worker {number}", Claiming(), dies_at) for number, dies_at in enumerate([None, 1, 2, 3])]
    run(forks, log, pipeline, roles, survivors_wait=True)

    cache = logitcache.open(path)
    assert (True, single.manifest.digest) == (cache.sealed, cache.digest)
    assert [] == verify(path, deep=True)
    check_blocks_of_the_dead(log, ["worker 1", "worker 2", "worker 3"])
    assert single.total_blocks == len(log.all("commit"))
    assert (1 if data == "images" else 0) == log.all("fit").total(), "one worker fits the encoding for all"
    assert [] == list(open_storage(path).list_keys("claims"))


def claim_without_conditional_writes() -> None:
    """As on a store that has none: every claim succeeds."""

    def create(storage: LocalStorage, key: str, data: bytes) -> bool:
        storage.put(key, data)
        return True

    LocalStorage.create = create  # type: ignore[method-assign]
    Claims._newest = lambda claims, name: (0, None)  # type: ignore[method-assign]


def link_nothing() -> None:
    """As on a file system without hard links."""

    def link(source: Any, target: Any) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    os.link = link  # type: ignore[assignment]


def work_on_a_poor_store(lack: Callable[[], None], pipeline: Pipeline, start: Any) -> None:
    silence()
    lack()
    start.wait()
    stage.cache_teacher(pipeline, engine=Claiming())


@pytest.mark.parametrize("lack", [claim_without_conditional_writes, link_nothing])
def test_workers_whose_claims_may_all_succeed_write_the_same_blocks(
    tiny: Make, tmp_path: Path, forks: Any, lack: Callable[[], None]
) -> None:
    single = stage.cache_teacher(tiny("views.count=4", f"cache.path={tmp_path}/single.cache"))
    pipeline, start = tiny("views.count=4"), forks.Barrier(2)
    children = [forks.Process(target=work_on_a_poor_store, args=(lack, pipeline, start), daemon=True) for _ in range(2)]
    for child in children:
        child.start()
    for child in children:
        child.join(120)

    assert [0, 0] == [child.exitcode for child in children]
    assert single.manifest.digest == logitcache.open(pipeline.cache.path).digest
    assert [] == verify(pipeline.cache.path, deep=True)


class Survived(NamedTuple):
    """A build by four workers with claims, of which the last three were killed."""

    killed: int
    """Workers that were still running."""
    unfinished: int
    """Blocks that the killed workers had begun, and not committed."""
    takeovers: int
    """Claims, of blocks or of the creation of the cache, that a worker took over after they had expired."""
    repeated: int
    """Blocks that were begun more than once."""
    same_digest: bool
    """As that of one process."""
    problems: list[Any]
    """Found in the cache by `verify(deep=True)`."""


def kill_at_seeded_instants(count: int, seed: int, folder: Path) -> Iterator[Survived]:
    """Builds with claims that expire after a second."""
    context, draw = get_context("forkserver"), random.Random(seed)
    context.set_forkserver_preload(["logitcache.stages.cache_teacher", "torchvision", "sklearn"])
    start = time.perf_counter()
    digest = stage.cache_teacher(tiny_pipeline(folder / "single", *DATA["images"])).manifest.digest
    duration = time.perf_counter() - start
    for attempt in range(count):
        pipeline, barrier = tiny_pipeline(folder / f"{attempt}", *DATA["images"]), context.Barrier(5)
        log = Log(folder / f"log-{attempt}")
        log.folder.mkdir()
        roles = [Role(f"worker {number}", Claiming(seconds=1.0)) for number in range(4)]
        children = [context.Process(target=work, args=(log, role, pipeline, {}, barrier, None)) for role in roles]
        for child in children:
            child.start()
        barrier.wait()
        victims = []
        for role, child, delay in zip(
            roles[1:], children[1:], sorted(draw.uniform(0, duration) for _ in range(3)), strict=True
        ):
            child.join(delay / 3)  # returns early if the worker ends
            child.kill()
            child.join()
            victims += [role.name] * (child.exitcode == -signal.SIGKILL)
        children[0].join()
        assert 0 == children[0].exitcode
        logged = [who for who in victims if (log.folder / who).exists()]
        starts = log.all("start")
        yield Survived(
            killed=len(victims),
            unfinished=sum(len(set(log.of(who, "start")) - set(log.of(who, "commit"))) for who in logged),
            takeovers=log.all("takeover").total(),
            repeated=sum(number > 1 for number in starts.values()),
            same_digest=digest == logitcache.open(pipeline.cache.path).digest,
            problems=verify(pipeline.cache.path, deep=True),
        )
