"""Engines of stage 1: what each one adds to the bare loop, and how two workers compare with one.

Overhead: each engine alone in this process, by turns with a bare loop over the same data, views and teacher that stores
nothing. Both set up data and teacher themselves, and each engine writes to a fresh folder. At most 1.05.

Scaling: one and two processes with one thread each, with every engine and with the bare loop, by turns. Time from the
moment when all of them have loaded data and teacher until the last one has ended; the cache is created and sealed
within it. The start of the processes and of Ray's local cluster is not in it, and each process has built a tiny cache
before, so that all code is loaded: this is the steady state of a long build, of which the wait for the last block of
other workers is still a larger part than in a real one.

    python benchmarks/engines.py --write
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from measuring import TINY, compare, conditions, options, parse, table, write_result
from stage1 import MAX_RATIO, PIPELINE, TEACHERS, Cost, bare_loop, loaded_bare_loop, timed
from torch.distributed import TCPStore

from logitcache.cache.layout import Block
from logitcache.config.schema import Pipeline, load_pipeline
from logitcache.engines import Claiming, Engine, Job, Local, Ray, Shard, Torchrun, Worker
from logitcache.progress import silence
from logitcache.stages.cache_teacher import TeacherJob, cache_teacher

Arm = Callable[[Pipeline], object]

ALONE: list[Engine] = [Local(), Shard(index=0, count=1), Claiming(), Torchrun()]
"""Each engine as one that has no other process."""


@dataclass(frozen=True)
class Workers:
    """Processes that build one cache, or run the bare loop, together."""

    name: str
    engines: tuple[Engine | None, ...]
    """One for each process; None runs the bare loop over the blocks of this process."""
    alone: str
    """The workers with one process with which they are compared."""

    @property
    def bare(self) -> str:
        """The bare loop in as many processes."""
        return BARE[len(self.engines)]


BARE = {1: "one process, bare loop", 2: "two processes, bare loop"}
LOCAL = "one process, `local`"
RAY = "Ray, one worker"
TOGETHER = [
    Workers(BARE[1], (None,), BARE[1]),
    Workers(LOCAL, (Local(),), LOCAL),
    Workers(RAY, (Ray(workers=1),), RAY),
    Workers(BARE[2], (None, None), BARE[1]),
    Workers("two processes, `--shard`", (Shard(index=0, count=2), Shard(index=1, count=2)), LOCAL),
    Workers("two processes, `claims`", (Claiming(), Claiming()), LOCAL),
    Workers("two processes, `torchrun`", (Torchrun(), Torchrun()), LOCAL),
    Workers("Ray, two workers", (Ray(workers=2),) * 2, RAY),
]
IN_TINY = {BARE[1], "two processes, `torchrun`", RAY}


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--only", choices=["overhead", "scaling"], help="one of the two measurements")
    parser.add_argument("--pipeline", type=Path, default=PIPELINE)
    parser.add_argument("--teachers", choices=list(TEACHERS), default="dear")
    parser.add_argument("--repeats", type=int, default=5, help="rounds, in each of which every arm runs once")
    parser.add_argument("--arms", nargs="+", help="of the scaling: only those whose names contain one of these")
    parser.add_argument("--folder", type=Path, help="where caches are written and removed again; on a real disk")
    parser.add_argument("--worker", type=int, nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", help="key=value of the pipeline")
    arguments = parse(parser, repeats=1, teachers="cheap")
    tiny = [*TINY, "views.count=1", "cache.rows_per_block=256"] if arguments.tiny else []
    overrides = [*TEACHERS[arguments.teachers], "cache.rows_per_block=225", "threads=1", *tiny, *arguments.overrides]
    silence()
    pipeline = load_pipeline(arguments.pipeline, overrides)
    if arguments.worker is not None:
        work(pipeline, *arguments.worker)
        return

    sections = ["# Engines", conditions()]
    print(sections[-1], flush=True)
    if arguments.only != "scaling":
        sections.append(overhead(pipeline, arguments.repeats, arguments.folder))
        print(f"\n{sections[-1]}", flush=True)
    if arguments.only != "overhead":
        sections.append(scaling(pipeline, arguments))
        print(f"\n{sections[-1]}", flush=True)
    if arguments.write:
        subject = "engines" if arguments.only is None else f"engines-{arguments.only}"
        written = write_result(subject, "\n\n".join(sections) + "\n", device=torch.device("cpu"))
        print(f"\nwritten to {written}")


def about(pipeline: Pipeline, repeats: int) -> str:
    return (
        f"{pipeline.name}: {pipeline.views.count} views, teacher {pipeline.teacher.model}, blocks of "
        f"{pipeline.cache.rows_per_block} rows, {pipeline.num_workers} DataLoader workers, {repeats} rounds. "
        f"Bound: <= {MAX_RATIO} times the bare loop."
    )


def overhead(pipeline: Pipeline, repeats: int, folder: Path | None) -> str:
    """Each engine against the bare loop, which runs once in every round; the order changes each time."""

    def through(engine: Engine) -> Arm:
        def arm(pipeline: Pipeline) -> None:
            with group_of_one() if isinstance(engine, Torchrun) else nothing():
                cache_teacher(pipeline, engine=engine, trust=True)

        return arm

    arms: dict[str, Arm] = {"bare loop": bare_loop} | {engine.name: through(engine) for engine in ALONE}
    costs: dict[str, list[Cost]] = {name: [] for name in arms}
    warm_up = pipeline.model_copy(update={"views": pipeline.views.model_copy(update={"count": 1})})
    for arm in arms.values():
        timed(arm, warm_up, folder)
    for repeat in range(repeats):
        for name in list(arms) if repeat % 2 == 0 else reversed(arms):
            costs[name].append(timed(arms[name], pipeline, folder))
    bare = costs.pop("bare loop")
    rows = []
    for name, measured in costs.items():
        wall = compare([cost.wall for cost in measured], [cost.wall for cost in bare])
        cpu = compare([cost.cpu for cost in measured], [cost.cpu for cost in bare])
        rows.append([f"`{name}`", f"{wall.median:.2f} s", wall, cpu])
    header = ["engine", "wall time, median", "wall time ÷ bare loop", "CPU time ÷ bare loop"]
    return f"## Overhead\n\n{about(pipeline, repeats)}\n\n{table(header, rows)}"


@contextmanager
def group_of_one() -> Iterator[None]:
    """What `torchrun --nproc-per-node 1` sets up."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


@contextmanager
def nothing() -> Iterator[None]:
    yield


def scaling(pipeline: Pipeline, arguments: argparse.Namespace) -> str:
    """All arms by turns; each process renders its views itself."""
    pipeline = pipeline.model_copy(update={"num_workers": 0})
    arms = [arm for arm in TOGETHER if not arguments.tiny or arm.name in IN_TINY]
    if arguments.arms:
        arms = [arm for arm in arms if any(part in arm.name for part in arguments.arms)]
    costs: dict[str, list[Cost]] = {arm.name: [] for arm in arms}
    with local_ray():
        for repeat in range(arguments.repeats):
            for arm in arms if repeat % 2 == 0 else reversed(arms):
                measure = with_ray if isinstance(arm.engines[0], Ray) else in_processes
                with tempfile.TemporaryDirectory(dir=arguments.folder) as fresh:
                    costs[arm.name].append(measure(arm, pipeline, arguments, fresh))
    seconds = {name: [cost.wall for cost in measured] for name, measured in costs.items()}
    cpu = {name: [cost.cpu for cost in measured] for name, measured in costs.items()}
    rows: list[list[object]] = []
    for arm in arms:
        median = statistics.median(seconds[arm.name])
        row: list[object] = [arm.name, f"{median:.2f} s", "", "", ""]
        if arm.name != arm.bare and arm.bare in seconds:
            row[2:4] = [compare(each[arm.name], each[arm.bare]) for each in (seconds, cpu)]
        if arm.name != arm.alone and arm.alone in seconds:
            row[4] = compare([1 / each for each in seconds[arm.name]], [1 / each for each in seconds[arm.alone]])
        rows.append(row)
    steady = (
        "One thread per process; of Ray, per worker, and its driver and cluster run beside them on the same cores. "
        "From the moment when all workers have loaded data and teacher until the cache is sealed; without the start of "
        "processes and of Ray's cluster. The CPU time is that of all workers, and of Ray's driver."
    )
    of_bare = "÷ bare loop in as many processes"
    header = ["", "wall time, median", f"wall time {of_bare}", f"CPU time {of_bare}", "speed ÷ the same with one"]
    return f"## Scaling\n\n{about(pipeline, arguments.repeats)} {steady}\n\n{table(header, rows)}"


def in_processes(arm: Workers, pipeline: Pipeline, arguments: argparse.Namespace, folder: str) -> Cost:
    """What processes take to build one cache, from when all are ready."""
    size = len(arm.engines)
    options = ["--tiny"] if arguments.tiny else []
    settings = [*arguments.overrides, f"cache.path={folder}/views.cache", "num_workers=0"]
    with closing_store() as store:
        workers = [
            subprocess.Popen(
                [
                    *(sys.executable, __file__, "--worker", str(TOGETHER.index(arm)), str(rank)),
                    *(f"--teachers={arguments.teachers}", f"--pipeline={arguments.pipeline}", *options, *settings),
                ],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=os.environ | as_torchrun(rank, size, store.port) if isinstance(arm.engines[0], Torchrun) else None,
            )
            for rank in range(size)
        ]
        for worker in workers:
            assert worker.stdout is not None
            if worker.stdout.readline() != "ready\n":
                raise RuntimeError(f"{worker.args} failed; its error is above")
        start = time.perf_counter()
        for worker in workers:
            assert worker.stdin is not None
            worker.stdin.write("go\n")
            worker.stdin.flush()
        cpu = 0.0
        for worker in workers:
            assert worker.stdout is not None
            done, _, seconds = worker.stdout.readline().partition(" ")
            if done != "done":
                raise RuntimeError(f"{worker.args} failed; its error is above")
            cpu += float(seconds)
        elapsed = time.perf_counter() - start
        for worker in workers:
            worker.communicate()
    return Cost(elapsed, cpu)


@contextmanager
def closing_store() -> Iterator[TCPStore]:
    """Where the processes of a torchrun arm meet; `torchrun` has such a store, too."""
    yield TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def as_torchrun(rank: int, size: int, port: int) -> dict[str, str]:
    """Variables that `torchrun` sets."""
    return {
        "TORCHELASTIC_RUN_ID": "benchmark",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
    }


@contextmanager
def without_torchrun() -> Iterator[None]:
    """This process alone, although it has torchrun's variables."""
    run = os.environ.pop("TORCHELASTIC_RUN_ID", None)
    yield
    if run is not None:
        os.environ["TORCHELASTIC_RUN_ID"] = run


@dataclass(frozen=True)
class Loaded(Job):
    """A job whose worker is loaded already."""

    worker: Worker

    def load(self) -> Worker:
        return self.worker


def warm_up(folder: str) -> None:
    """Build a tiny cache, so that everything is imported that a build needs."""
    settings = [
        *TEACHERS["cheap"],
        *TINY,
        "views.count=1",
        "threads=1",
        f"cache.path={folder}/warm.{os.getpid()}.cache",
    ]
    cache_teacher(load_pipeline(PIPELINE, settings), engine=Local(), trust=True)


def work(pipeline: Pipeline, arm: int, rank: int) -> None:
    """One process of `in_processes`."""
    with without_torchrun():
        warm_up(str(Path(pipeline.cache.path).parent))
    engine = TOGETHER[arm].engines[rank]
    run: Callable[[], object]
    if engine is None:
        run = loaded_bare_loop(pipeline, index=rank, count=len(TOGETHER[arm].engines))
    else:
        job = Loaded(TeacherJob(pipeline, trust=True).load())
        run = lambda: engine.run(job)  # noqa: E731
    gc.collect()
    print("ready", flush=True)
    sys.stdin.readline()
    start = cpu_seconds()
    run()
    print("done", cpu_seconds() - start, flush=True)


def cpu_seconds() -> float:
    """Of this process so far, in all threads."""
    return sum(os.times()[:2])


@contextmanager
def local_ray() -> Iterator[None]:
    """A cluster on this machine, which stays for all rounds."""
    import ray

    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error")
    try:
        yield
    finally:
        ray.shutdown()


@dataclass(frozen=True)
class Gathered(Job):
    """A job whose workers wait, once they are loaded, until all are; then each notes the time in a file."""

    job: TeacherJob
    folder: str
    count: int

    def load(self) -> Worker:
        warm_up(self.folder)
        worker = self.job.load()
        folder = Path(self.folder)
        (folder / f"{os.getpid()}.loaded").touch()
        while len(list(folder.glob("*.loaded"))) < self.count:
            time.sleep(0.01)
        (folder / f"{os.getpid()}.start").write_text(repr(time.time()))
        cpu_start, compute_each = cpu_seconds(), worker.compute_each

        def counted(*arguments: Any, **options: Any) -> Iterator[Block]:
            yield from compute_each(*arguments, **options)
            (folder / f"{os.getpid()}.cpu").write_text(repr(cpu_seconds() - cpu_start))

        worker.compute_each = counted  # type: ignore[method-assign]
        return worker

    def start(self) -> float:
        """When the last worker was loaded, in seconds since 1970."""
        return max(float(path.read_text()) for path in Path(self.folder).glob("*.start"))


def with_ray(arm: Workers, pipeline: Pipeline, arguments: argparse.Namespace, folder: str) -> Cost:
    """What Ray's workers take to build one cache, from when all are loaded."""
    cache = pipeline.cache.model_copy(update={"path": f"{folder}/views.cache"})
    job = Gathered(TeacherJob(pipeline.model_copy(update={"cache": cache}), trust=True), folder, len(arm.engines))
    engine = arm.engines[0]
    assert engine is not None
    cpu_start = cpu_seconds()
    engine.run(job)
    elapsed = time.time() - job.start()
    of_workers = sum(float(path.read_text()) for path in Path(folder).glob("*.cpu"))
    return Cost(elapsed, of_workers + cpu_seconds() - cpu_start)


if __name__ == "__main__":
    main()
