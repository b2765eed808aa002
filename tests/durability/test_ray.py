"""A Ray cluster of two nodes with one CPU each, of which one is killed: the digest of a single process.

`python benchmarks/kills.py --only ray` does this ten times, at other seeded instants.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import re
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from PIL import Image
from torch.distributed import TCPStore

import logitcache
from logitcache.cache.layout import Block
from logitcache.cache.openblock import OpenBlock
from logitcache.config.schema import Pipeline
from logitcache.data import views
from logitcache.data.samples import load_sample
from logitcache.engines import CacheResult, Job
from logitcache.engines import ray as engine_of_ray
from logitcache.engines.ray import Ray
from logitcache.errors import LogitCacheError, UsageError
from logitcache.stages.cache_teacher import TeacherJob, TeacherWorker, cache_teacher
from logitcache.storage import LocalStorage
from logitcache.verify.audit import verify
from tests.commands import logitcache as command
from tests.conftest import ALL_DIGITS, FEW_DIGITS
from tests.durability.test_engines import DATA
from tests.dying import die
from tests.needs import need_package

Make = Callable[..., Pipeline]


@dataclass
class TwoNodes:
    """The cluster. The driver is on its first node."""

    cluster: Any
    doomed: list[Any] = field(default_factory=list)
    """The second node, if it is there."""

    @property
    def engine(self) -> Ray:
        return Ray(address=self.cluster.address)

    def second(self) -> str:
        """Start the second node if it is not there; Ray's id of it."""
        if not self.doomed:
            self.doomed.append(self.cluster.add_node(num_cpus=1, object_store_memory=2**27))
        return str(self.doomed[0].node_id)

    def forget_second(self) -> None:
        """Remove the second node, or what is left of it."""
        while self.doomed:
            self.cluster.remove_node(self.doomed.pop(), allow_graceful=False)


@contextmanager
def two_nodes() -> Iterator[TwoNodes]:
    """Start the cluster with its first node, from the checkout; stop it at the end."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("PYTHONPATH", str(Path.cwd()))
        environment.setenv("RAY_USAGE_STATS_ENABLED", "0")
        from ray.cluster_utils import Cluster

        nodes = TwoNodes(Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": 2**27}))
        try:
            yield nodes
        finally:
            nodes.cluster.shutdown()


@pytest.fixture(scope="module")
def nodes() -> Iterator[TwoNodes]:
    need_package("ray", "ray")
    with two_nodes() as nodes:
        yield nodes


@dataclass(frozen=True)
class KilledNode(Job):
    """A job whose worker on one node kills this node as it stores an object; workers elsewhere wait for that."""

    job: TeacherJob
    node: str
    dies_at: int
    """Objects that the worker has stored, and one more."""
    others_wait_at: int
    """A block that they begin: so they are at work as well, and don't do everything alone."""
    port: int
    """Of a store of torch, for the news of the death."""

    def load(self) -> TeacherWorker:
        import ray

        news, numbers = TCPStore("127.0.0.1", self.port), itertools.count(1)
        put, begin = LocalStorage.put, OpenBlock.__init__

        def dying(*arguments: Any, **options: Any) -> None:
            if next(numbers) == self.dies_at:
                news.set("dead", "")
                os.kill(os.getppid(), signal.SIGKILL)  # the node's raylet, which starts its processes
                die()
            put(*arguments, **options)

        def waiting(*arguments: Any, **options: Any) -> None:
            if next(numbers) >= self.others_wait_at:
                news.get("dead")
            begin(*arguments, **options)

        if ray.get_runtime_context().get_node_id() == self.node:
            LocalStorage.put = dying  # type: ignore[method-assign]
        else:
            OpenBlock.__init__ = waiting  # type: ignore[method-assign]
        return self.job.load()


class Killed(NamedTuple):
    """A build of which a node was killed."""

    data: str
    """Of `DATA`."""
    dies_at: int
    """The object of its worker, counted from 1, that the node did not store."""
    died: bool
    """Whether the node was gone at the end of the build."""
    single: CacheResult
    """Of the same pipeline in one process."""
    result: CacheResult
    problems: list[Any]
    """Found in the cache by `verify(deep=True)`."""


def build_with_a_killed_node(seed: int, nodes: TwoNodes, make: Make, folder: Path) -> Killed:
    """At a seeded object of the node: as the cache begins, in a block, or between a block and its receipt."""
    data, draw = "images" if seed % 2 else "tokens", random.Random(seed)
    single = cache_teacher(make(*DATA[data], f"cache.path={folder}/single.cache"))
    pipeline, node, news = make(*DATA[data]), nodes.second(), TCPStore("127.0.0.1", 0, is_master=True)
    dies_at, others_wait_at = draw.randint(1, 16), draw.randint(1, 4)
    job = KilledNode(TeacherJob(pipeline, trust=False), node, dies_at, others_wait_at, news.port)
    result = nodes.engine.run(job)
    died = not nodes.doomed[0].remaining_processes_alive()
    nodes.forget_second()
    return Killed(data, dies_at, died, single, result, verify(pipeline.cache.path, deep=True))


def test_a_killed_node_leaves_the_cache_of_one_process(nodes: TwoNodes, tiny: Make, tmp_path: Path) -> None:
    killed = build_with_a_killed_node(0, nodes, tiny, tmp_path)

    assert killed.died
    assert killed.single.manifest.digest == killed.result.manifest.digest
    assert set(killed.single.computed_blocks) == set(killed.result.computed_blocks), "a worker reports each block"
    assert [] == killed.problems


@dataclass(frozen=True)
class CountedLoads(Job):
    """A job of two workers that begin at the same time, and list the samples that they load, one file each."""

    job: TeacherJob
    folder: Path
    port: int
    """Of a store of torch, where they meet."""

    def load(self) -> TeacherWorker:
        news = TCPStore("127.0.0.1", self.port)

        def listing(dataset: Any, index: int) -> tuple[Any, Any]:
            with (self.folder / f"{os.getpid()}.loads").open("a") as file:
                file.write(f"{index}\n")
            return load_sample(dataset, index)

        worker = self.job.load()
        compute_each = worker.compute_each

        def computing(*arguments: Any, **options: Any) -> Iterator[Block]:
            if news.add("ready", 1) == 2:
                news.set("both are ready", "")
            news.get("both are ready")
            return compute_each(*arguments, **options)

        worker.compute_each = computing  # type: ignore[method-assign]
        views.load_sample = listing
        return worker


def test_workers_load_a_sample_once_for_several_views(nodes: TwoNodes, tiny: Make, tmp_path: Path) -> None:
    settings = [*FEW_DIGITS, "views.count=4"]
    single = cache_teacher(tiny(*settings, f"cache.path={tmp_path}/single.cache"))
    nodes.second()
    pipeline = tiny(*settings, "views.per_decode=4")
    logitcache.plan_blocks(pipeline)  # creation loads a few samples, too
    news = TCPStore("127.0.0.1", 0, is_master=True)
    result = nodes.engine.run(CountedLoads(TeacherJob(pipeline, trust=False), tmp_path, news.port))
    loads = Counter(line for file in tmp_path.glob("*.loads") for line in file.read_text().split())

    assert single.manifest.digest == result.manifest.digest
    assert {1: 96} == Counter(loads.values())


@dataclass(frozen=True)
class NothingHere(Job):
    """A job that can't be loaded on one node."""

    job: TeacherJob
    node: str

    def load(self) -> TeacherWorker:
        import ray

        if ray.get_runtime_context().get_node_id() == self.node:
            raise UsageError("there is no data here")
        return self.job.load()


def test_a_node_that_lacks_the_data_is_left_out_with_a_warning(nodes: TwoNodes, tiny: Make, tmp_path: Path) -> None:
    single = cache_teacher(tiny(*FEW_DIGITS, f"cache.path={tmp_path}/single.cache"))
    job = NothingHere(TeacherJob(tiny(*FEW_DIGITS), trust=False), nodes.second())
    with pytest.warns(RuntimeWarning, match="a worker can't be used: UsageError: there is no data here. The others"):
        result = nodes.engine.run(job)

    assert single.manifest.digest == result.manifest.digest


@dataclass(frozen=True)
class WaitingForHelp(Job):
    """A job whose worker on the node of the driver states that it has begun, and waits for a block of another node."""

    job: TeacherJob
    node: str
    """Of the driver."""
    port: int
    """Of a store of torch, for the news."""

    def load(self) -> TeacherWorker:
        import ray

        news, blocks, begin = TCPStore("127.0.0.1", self.port), itertools.count(1), OpenBlock.__init__
        is_first = ray.get_runtime_context().get_node_id() == self.node

        def beginning(*arguments: Any, **options: Any) -> None:
            number = next(blocks)
            news.set("begun" if is_first else "help", "")
            if is_first and number == 2:
                news.get("help")
            begin(*arguments, **options)

        OpenBlock.__init__ = beginning  # type: ignore[method-assign]
        return self.job.load()


def test_a_node_that_joins_later_computes_blocks_as_well(
    nodes: TwoNodes, tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_of_ray, "LOOK_SECONDS", 0.5)
    single = cache_teacher(tiny(*FEW_DIGITS, f"cache.path={tmp_path}/single.cache"))
    nodes.forget_second()
    news = TCPStore("127.0.0.1", 0, is_master=True)
    job = WaitingForHelp(TeacherJob(tiny(*FEW_DIGITS), trust=False), nodes.cluster.head_node.node_id, news.port)
    with ThreadPoolExecutor(1) as threads:
        running = threads.submit(nodes.engine.run, job)
        news.get("begun")
        nodes.second()
        result = running.result()

    assert single.manifest.digest == result.manifest.digest


@dataclass(frozen=True)
class NoBlock(Job):
    """A job whose blocks all fail."""

    job: TeacherJob

    def load(self) -> TeacherWorker:
        def failing(*arguments: Any, **options: Any) -> None:
            raise OSError("the store is away")

        OpenBlock.__init__ = failing  # type: ignore[method-assign]
        return self.job.load()


def test_a_build_ends_if_many_blocks_fail_in_a_row(
    nodes: TwoNodes, tiny: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three here, in place of a hundred."""
    monkeypatch.setattr(engine_of_ray, "FAILING_BLOCKS", 3)
    nodes.forget_second()
    with pytest.raises(LogitCacheError, match="of which 12 were left out because 3 failed in a row") as failed:
        nodes.engine.run(NoBlock(TeacherJob(tiny(*FEW_DIGITS), trust=False)))

    assert "OSError: the store is away" in str(failed.value)


@dataclass(frozen=True)
class DeadlyBlock(Job):
    """A job with a block that kills its worker, as one does that needs more memory than there is."""

    job: TeacherJob
    block: Block

    def load(self) -> TeacherWorker:
        begin = OpenBlock.__init__

        def beginning(opened: OpenBlock, block: Block, *arguments: Any, **options: Any) -> None:
            if block == self.block:
                die()
            begin(opened, block, *arguments, **options)

        OpenBlock.__init__ = beginning  # type: ignore[method-assign]
        return self.job.load()


def test_blocks_that_fail_are_named_and_all_others_are_kept(nodes: TwoNodes, tiny: Make, tmp_path: Path) -> None:
    """An image that is damaged after its first view, and a block that kills its worker; both are tried three times."""
    for number in range(48):
        folder = tmp_path / f"photos/{number % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (5 * number, 255 - 5 * number, 7)).save(folder / f"{number:02d}.png")
    settings = [
        f"data={{name: image_folder, root: '{tmp_path}/photos'}}",
        "views.transform=[{ToImage: {}}, {ToDtype: {dtype: float32, scale: true}}]",
        "cache.rows_per_block=4",
        "teacher.batch_size=4",
    ]
    cache_teacher(tiny(*settings, "views.count=1"))
    damaged = tmp_path / "photos/1/22.png"
    damaged.write_bytes(damaged.read_bytes()[:-20])
    pipeline = tiny(*settings, "views.count=2")
    position = sorted((tmp_path / "photos").rglob("*.png")).index(damaged)
    job = DeadlyBlock(TeacherJob(pipeline, trust=False), Block(1, 3))
    nodes.second()
    with pytest.raises(LogitCacheError) as failed:
        nodes.engine.run(job)

    assert {Block(1, 3), Block(1, position // 4)} == set(logitcache.plan_blocks(pipeline))
    message = str(failed.value)
    assert "2 blocks are not computed; a block is tried 3 times" in message
    assert "The 10 blocks that were computed are kept" in message
    assert f"v00001/b{position // 4:05d}: " in message
    assert "22.png" in message
    assert "v00001/b00003: its worker died" in message


def test_the_command_builds_on_the_cluster_of_the_environment(
    nodes: TwoNodes, tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Started in the user's folder, from which the pipeline takes code and the relative path of the cache."""
    (tmp_path / "mine.py").write_text("def flipped():\n    return lambda image: image.rotate(90)\n")
    settings = [*ALL_DIGITS, "views.transform=[{'mine:flipped': {}}]", "cache.path=tiny.cache", "runs.path=runs"]
    (tmp_path / "tiny.yaml").write_text(tiny(*settings).as_yaml())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAY_ADDRESS", nodes.cluster.address)
    monkeypatch.setattr("logitcache.progress._quiet", False)
    nodes.second()
    ended = command("cache-teacher", "tiny.yaml", "--engine", "ray", "--json")

    assert 0 == ended.returncode, ended.stderr
    told = json.loads(ended.stdout)
    assert (12, True) == (told["computed_blocks"], told["sealed"])
    assert f"caching the teacher: {2 * 1295} rows in" in ended.stderr
    assert re.search(r"[12] workers?$", ended.stderr.strip())


def test_without_a_cluster_ray_is_started_for_the_run(tiny: Make, tmp_path: Path) -> None:
    single = cache_teacher(tiny(*FEW_DIGITS, f"cache.path={tmp_path}/single.cache"))
    result = cache_teacher(tiny(*FEW_DIGITS), engine=Ray(address="local", workers=1))

    assert single.manifest.digest == result.manifest.digest
