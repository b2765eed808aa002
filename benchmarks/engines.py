"""Engines of stage 1: what each one adds to the bare loop, and how two workers compare with one.

Overhead: each engine alone in this process, by turns with a bare loop over the same data, views and teacher that stores
nothing. Both set up data and teacher themselves, and each engine writes to a fresh folder. At most 1.05.

Scaling: one process against two on the same cache, with one thread each, as shards and with claims. Time from the
moment when all of them have loaded data and teacher until the last one has ended; the cache is created and sealed
within it.

    python benchmarks/engines.py --write
"""

from __future__ import annotations

import argparse
import gc
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from measuring import TINY, compare, conditions, options, parse, table, write_result
from stage1 import MAX_RATIO, PIPELINE, TEACHERS, Cost, bare_loop, timed

from logitcache.config.schema import Pipeline, load_pipeline
from logitcache.engines import Claiming, Engine, Job, Local, Shard, Torchrun, Worker
from logitcache.progress import silence
from logitcache.stages.cache_teacher import TeacherJob, cache_teacher

Arm = Callable[[Pipeline], object]

ALONE: list[Engine] = [Local(), Shard(index=0, count=1), Claiming(), Torchrun()]
"""Each engine as one that has no other process."""
TOGETHER: dict[str, list[Engine]] = {
    "one process, `local`": [Local()],
    "two processes, `--shard`": [Shard(index=0, count=2), Shard(index=1, count=2)],
    "two processes, `claims`": [Claiming(), Claiming()],
}


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--pipeline", type=Path, default=PIPELINE)
    parser.add_argument("--teachers", choices=list(TEACHERS), default="dear")
    parser.add_argument("--repeats", type=int, default=7, help="rounds, in each of which every arm runs once")
    parser.add_argument("--folder", type=Path, help="where caches are written and removed again; on a real disk")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", help="key=value of the pipeline")
    arguments = parse(parser, repeats=1, teachers="cheap")
    tiny = [*TINY, "views.count=1", "cache.rows_per_block=256"] if arguments.tiny else []
    overrides = [*TEACHERS[arguments.teachers], "cache.rows_per_block=1024", "threads=1", *tiny, *arguments.overrides]
    silence()
    if arguments.worker is not None:
        work(load_pipeline(arguments.pipeline, overrides), arguments.worker)
        return

    sections = ["# Engines", conditions()]
    print(sections[-1], flush=True)
    pipeline = load_pipeline(arguments.pipeline, overrides)
    sections.append(overhead(pipeline, arguments.repeats, arguments.folder))
    print(f"\n{sections[-1]}", flush=True)
    sections.append(scaling(arguments))
    print(f"\n{sections[-1]}", flush=True)
    if arguments.write:
        written = write_result("engines", "\n\n".join(sections) + "\n", device=torch.device("cpu"))
        print(f"\nwritten to {written}")


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
    about = (
        f"{pipeline.name}: {pipeline.views.count} views, teacher {pipeline.teacher.model}, blocks of "
        f"{pipeline.cache.rows_per_block} rows, {pipeline.num_workers} workers, {repeats} rounds. "
        f"Bound: <= {MAX_RATIO}."
    )
    header = ["engine", "wall time, median", "wall time ÷ bare loop", "CPU time ÷ bare loop"]
    return f"## Overhead\n\n{about}\n\n{table(header, rows)}"


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


def scaling(arguments: argparse.Namespace) -> str:
    """All arms by turns; each process renders its views itself."""
    arms = list(TOGETHER)[:2] if arguments.tiny else list(TOGETHER)
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for repeat in range(arguments.repeats):
        for name in arms if repeat % 2 == 0 else reversed(arms):
            seconds[name].append(together(TOGETHER[name], arguments))
    [alone, *pairs] = seconds
    rows: list[list[object]] = [[alone, f"{statistics.median(seconds[alone]):.2f} s", ""]]
    for name in pairs:
        speed = compare([1 / each for each in seconds[name]], [1 / each for each in seconds[alone]])
        rows.append([name, f"{statistics.median(seconds[name]):.2f} s", speed])
    about = f"One thread for each process, no DataLoader workers, {arguments.repeats} rounds."
    return f"## Scaling\n\n{about}\n\n{table(['', 'wall time, median', 'speed ÷ one process'], rows)}"


def together(engines: list[Engine], arguments: argparse.Namespace) -> float:
    """Seconds that processes take to build one cache, from when all are ready."""
    with tempfile.TemporaryDirectory(dir=arguments.folder) as fresh:
        options = ["--tiny"] if arguments.tiny else []
        settings = [*arguments.overrides, f"cache.path={fresh}/views.cache", "num_workers=0"]
        workers = [
            subprocess.Popen(
                [
                    *(sys.executable, __file__, f"--worker={engine!r}", f"--pipeline={arguments.pipeline}"),
                    *(f"--teachers={arguments.teachers}", *options, *settings),
                ],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for engine in engines
        ]
        for worker in workers:
            assert worker.stdout is not None
            if worker.stdout.readline() != "ready\n":
                raise RuntimeError(f"{worker.args} failed; its error is above")
        start = time.perf_counter()
        for worker in workers:
            assert worker.stdin is not None
            worker.stdin.write("go\n")
            worker.stdin.close()
        codes = [worker.wait() for worker in workers]
        elapsed = time.perf_counter() - start
        for worker in workers:
            assert worker.stdout is not None
            worker.stdout.close()
    if any(codes):
        raise RuntimeError(f"workers ended with {codes}; their errors are above")
    return elapsed


@dataclass(frozen=True)
class Loaded(Job):
    """A job whose worker is loaded already."""

    worker: Worker

    def load(self) -> Worker:
        return self.worker


def work(pipeline: Pipeline, engine: str) -> None:
    """One process of `together`."""
    [chosen] = [each for engines in TOGETHER.values() for each in engines if repr(each) == engine][:1]
    job = Loaded(TeacherJob(pipeline, trust=True).load())
    gc.collect()
    print("ready", flush=True)
    sys.stdin.readline()
    chosen.run(job)


if __name__ == "__main__":
    main()
