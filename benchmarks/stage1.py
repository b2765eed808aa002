"""Stage 1 against its two bounds: time beside a bare loop over the teacher, and memory that a sample takes.

Time: `cache_teacher` whole (fingerprints, views, teacher, encoding, writing, fsync, sealing) against the same data,
views, loader and teacher with the output thrown away. Both set up data and teacher themselves, run by turns in one
process, and write to a fresh folder each time. At most 1.05.

Memory: peak of `cache_teacher` over many and over few rows of a synthetic dataset, each in a process of its own; the
growth a sample. Less than 64 bytes.

    python benchmarks/stage1.py --write
    python benchmarks/stage1.py --only time --teachers dear --repeats 15
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring import TINY, compare, conditions, options, parse, table, write_result
from torch import Tensor, nn

from logitcache.config.build import resolve_data, resolve_plan, resolve_teacher
from logitcache.config.schema import Pipeline, load_pipeline, parse_pipeline
from logitcache.data.loading import rendered_batches
from logitcache.data.views import ViewDataset
from logitcache.devices import autocast, pick_device, to_device
from logitcache.progress import silence
from logitcache.stages.cache_teacher import cache_teacher

PIPELINE = Path(__file__).parent.parent / "pipelines" / "mnist5k.yaml"
MAX_RATIO = 1.05
MAX_BYTES_PER_SAMPLE = 64
SAMPLING_SECONDS = 0.05
"""Between two looks at the memory of a process tree."""

Arm = Callable[[Pipeline], Any]

TEACHERS = {
    "cheap": ["teacher.weights=random", "views.count=12"],
    "dear": ["teacher.model=resnet20", "teacher.args={}", "teacher.weights=random", "views.count=3"],
}
"""The demo's own CNN, which costs less than rendering its input, and one that costs more; views for 5 to 15 s a run."""


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--pipeline", type=Path, default=PIPELINE)
    parser.add_argument("--only", choices=["time", "memory"], help="one of the two measurements")
    parser.add_argument("--teachers", choices=list(TEACHERS), nargs="+", default=list(TEACHERS), help="for time")
    parser.add_argument("--repeats", type=int, default=9, help="pairs of timed runs")
    parser.add_argument("--rows", type=int, nargs=2, default=[10_000, 1_000_000], help="few and many, for memory")
    parser.add_argument("--rows-per-block", type=int, default=2048, help="for memory")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2], help="numbers of workers, for memory")
    parser.add_argument("--folder", type=Path, help="where caches are written and removed again; on a real disk")
    parser.add_argument("--build", help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", help="key=value of the pipeline")
    arguments = parse(parser, repeats=1, rows=[1000, 2000], rows_per_block=256, workers=[1])
    if arguments.build is not None:
        build_and_report(json.loads(arguments.build))
        return

    sections = ["# Stage 1", conditions()]
    print(sections[-1], flush=True)
    if arguments.only != "memory":
        for name in arguments.teachers:
            tiny = [*TINY, "views.count=1"] if arguments.tiny else []
            pipeline = load_pipeline(arguments.pipeline, [*TEACHERS[name], *tiny, *arguments.overrides])
            sections.append(time_section(name, pipeline, arguments.repeats, arguments.folder))
            print(f"\n{sections[-1]}", flush=True)
    if arguments.only != "time":
        sections.append(memory_section(arguments.rows, arguments.rows_per_block, arguments.workers, arguments.folder))
        print(f"\n{sections[-1]}", flush=True)
    if arguments.write:
        path = write_result(
            "stage1", "\n\n".join(sections) + "\n", device=pick_device(load_pipeline(arguments.pipeline).device)
        )
        print(f"\nwritten to {path}")


def time_section(name: str, pipeline: Pipeline, repeats: int, folder: Path | None) -> str:
    """Both arms by turns, whoever goes first changing each time, so that a slow minute hits both."""
    arms: list[Arm] = [cache_teacher, bare_loop]
    costs: dict[Arm, list[Cost]] = {arm: [] for arm in arms}
    warm_up = pipeline.model_copy(update={"views": pipeline.views.model_copy(update={"count": 1})})
    for arm in arms:
        timed(arm, warm_up, folder)
    for repeat in range(repeats):
        for arm in arms if repeat % 2 == 0 else reversed(arms):
            costs[arm].append(timed(arm, pipeline, folder))
    wall, cpu = (compare(*([getattr(cost, kind) for cost in costs[arm]] for arm in arms)) for kind in ("wall", "cpu"))
    start, cpu_start = time.perf_counter(), time.process_time()
    samples = len(resolve_data(pipeline, trust=True).train) * pipeline.views.count
    reading = [f"{time.perf_counter() - start:.2f} s", f"{time.process_time() - cpu_start:.2f} s"]
    about = (
        f"{pipeline.name}: {samples} samples ({pipeline.views.count} views), teacher {pipeline.teacher.model} "
        f"{pipeline.teacher.args}, {pipeline.num_workers} workers, {repeats} pairs of runs."
    )
    rows = [
        ["`cache_teacher`, median", f"{wall.median:.2f} s", f"{cpu.median:.2f} s"],
        ["bare loop, median", f"{wall.reference_median:.2f} s", f"{cpu.reference_median:.2f} s"],
        ["of either, reading the data set", *reading],
        ["ratio", wall, cpu],
        ["bound", f"<= {MAX_RATIO}", ""],
    ]
    return f"## Time, with a {name} teacher\n\n{about}\n\n{table(['', 'wall time', 'CPU time, with workers'], rows)}"


@dataclass(frozen=True)
class Cost:
    """What one run took, in seconds."""

    wall: float
    cpu: float
    """Of all threads and of the workers: hardly touched by what else the machine does."""


def timed(arm: Arm, pipeline: Pipeline, folder: Path | None) -> Cost:
    """What an arm takes into a folder of its own."""
    with tempfile.TemporaryDirectory(dir=folder) as fresh:
        cache = pipeline.cache.model_copy(update={"path": f"{fresh}/views.cache"})
        gc.collect()
        start, cpu_start = time.perf_counter(), sum(os.times()[:4])
        arm(pipeline.model_copy(update={"cache": cache}))
        return Cost(time.perf_counter() - start, sum(os.times()[:4]) - cpu_start)


def bare_loop(pipeline: Pipeline) -> None:
    """The teacher over every batch that `cache_teacher` gives it, and nothing kept."""
    loaded_bare_loop(pipeline)()


def loaded_bare_loop(pipeline: Pipeline, *, index: int = 0, count: int = 1) -> Callable[[], None]:
    """The bare loop with data and teacher loaded; of `count` processes, each has every `count`-th block.

    Views are rendered outside of inference mode, as in DataLoader's workers: a dataset may keep tensors that students
    train on later. Inference mode would save random transforms some time.
    """
    data = resolve_data(pipeline, trust=True)
    plan = resolve_plan(pipeline, data, trust=True)
    device = pick_device(pipeline.device, threads=pipeline.threads)
    config = pipeline.teacher
    teacher, _ = resolve_teacher(pipeline, data, plan, trust=True)
    teacher = teacher.to(device)
    if config.channels_last:
        teacher = teacher.to(memory_format=torch.channels_last)
    forward = torch.compile(teacher) if config.compile else teacher

    def loop() -> None:
        loader = rendered_batches(
            ViewDataset(data.train, plan),
            teacher_places(pipeline, len(data.train), index=index, count=count),
            num_workers=pipeline.num_workers,
            pin_memory=device.type == "cuda",
        )
        for _, inputs, _ in loader:
            on_device = to_device(inputs, device, channels_last=config.channels_last)
            with torch.inference_mode(), autocast(device, config.precision):
                forward(on_device)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return loop


def teacher_places(
    pipeline: Pipeline, num_samples: int, *, index: int = 0, count: int = 1
) -> Iterator[list[tuple[int, int]]]:
    """(view, row) of the samples of each batch, cut as `cache_teacher` cuts them: no batch crosses a block's end.

    Only those of every `count`-th block, from `index`.
    """
    block, size = pipeline.cache.rows_per_block, pipeline.teacher.batch_size
    blocks = [(view, first) for view in range(pipeline.views.count) for first in range(0, num_samples, block)]
    for view, first in blocks[index::count]:
        stop = min(first + block, num_samples)
        for start in range(first, stop, size):
            yield [(view, row) for row in range(start, min(start + size, stop))]


@dataclass(frozen=True)
class Peak:
    """Memory of one run of `cache_teacher`, in bytes."""

    before: int
    """Resident when it began: the libraries."""
    main: int
    """Peak of the main process."""
    tree: int
    """Peak of the process and its workers without the libraries' pages, each shared page counted once; sampled."""


def memory_section(sizes: list[int], rows_per_block: int, workers: list[int], folder: Path | None) -> str:
    few, many = sizes
    rows = []
    for num_workers in workers:
        small, large = (
            peak_memory(size, rows_per_block=rows_per_block, num_workers=num_workers, folder=folder) for size in sizes
        )
        for name, low, high in (("main", small.main, large.main), ("tree", small.tree, large.tree)):
            growth = f"{(high - low) / (many - few):.1f}"
            started = f"{small.before / 2**20:.1f}" if name == "main" else ""
            rows.append([num_workers, name, started, f"{low / 2**20:.1f}", f"{high / 2**20:.1f}", growth])
    header = ["workers", "processes", "before, MiB", f"peak at {few}, MiB", f"peak at {many}, MiB", "bytes a sample"]
    about = (
        f"10 classes, dense float16, blocks of {rows_per_block} rows; the dataset's own targets take 8 bytes a sample "
        f"of the growth. Bound: < {MAX_BYTES_PER_SAMPLE} bytes a sample.\n\n"
        "main: peak resident set of the main process. tree: with its workers, proportional set sizes of heap and "
        "shared memory (without the pages of files, whose shares depend on other processes), summed every "
        f"{1000 * SAMPLING_SECONDS:.0f} ms."
    )
    return f"## Memory\n\n{about}\n\n{table(header, rows)}"


def peak_memory(rows: int, *, rows_per_block: int, num_workers: int, folder: Path | None) -> Peak:
    """Peak memory of building a synthetic cache, in a process of its own."""
    with tempfile.TemporaryDirectory(dir=folder) as fresh:
        task = {"rows": rows, "rows_per_block": rows_per_block, "num_workers": num_workers, "folder": fresh}
        command = [sys.executable, __file__, "--build", json.dumps(task)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            tree = sampled_peak(process)
            assert process.stdout is not None
            reported = process.stdout.read()
        if process.returncode:
            raise RuntimeError(f"building a cache of {rows} rows failed; its error is above")
        return Peak(**json.loads(reported), tree=tree)


def sampled_peak(process: subprocess.Popen[str]) -> int:
    """The largest sum of heap and shared memory over a process and its descendants, until it ends."""
    import psutil

    root = psutil.Process(process.pid)
    peak = 0
    while process.poll() is None:
        with suppress(psutil.Error, OSError):  # one that ended while we looked
            members = [process.pid, *(child.pid for child in root.children(recursive=True))]
            rollups = [f"/proc/{pid}/smaps_rollup" for pid in members]
            peak = max(peak, sum(kernel_bytes(path, field) for path in rollups for field in ("Pss_Anon", "Pss_Shmem")))
        time.sleep(SAMPLING_SECONDS)
    return peak


def build_and_report(task: dict[str, Any]) -> None:
    """Build a synthetic cache, and print as JSON the memory that it took."""
    module = Path(__file__).stem
    pipeline = parse_pipeline(
        {
            "name": "synthetic",
            "data": {"name": f"{module}:synthetic_dataset", "args": {"rows": task["rows"]}},
            "teacher": {"model": f"{module}:synthetic_teacher", "batch_size": 1024},
            "cache": {"path": f"{task['folder']}/views.cache", "rows_per_block": task["rows_per_block"]},
            "device": "cpu",
            "num_workers": task["num_workers"],
            "threads": 1,
        },
        source=__file__,
    )
    silence()
    # A long run's garbage collections write to every object that there was before the fork, and so copy it into each
    # worker; a short run has none. Frozen objects are left alone, so that this constant is no growth.
    gc.collect()
    gc.freeze()
    # The peak from here on: neither what importing took, nor (as in ru_maxrss) what the parent had before exec.
    Path("/proc/self/clear_refs").write_text("5")
    before = kernel_bytes("/proc/self/status", "VmRSS")
    cache_teacher(pipeline, trust=True)
    print(json.dumps({"before": before, "main": kernel_bytes("/proc/self/status", "VmHWM")}))


def kernel_bytes(path: str, field: str) -> int:
    """A size from one of the kernel's files on a process; 0 where the process has just ended."""
    found = re.search(rf"^{field}:\s+(\d+) kB$", Path(path).read_text(), re.MULTILINE)
    return 0 if found is None else int(found[1]) * 1024


def synthetic_dataset(rows: int) -> SyntheticVectors:
    """What the pipeline of the memory measurement names."""
    return SyntheticVectors(rows)


def synthetic_teacher(num_classes: int) -> nn.Module:
    """A teacher of next to no size."""
    return nn.Linear(4, num_classes)


class SyntheticVectors:
    """Inputs computed from their index, so that all growth is logitcache's, but for the targets."""

    in_memory = True
    num_classes = 10

    def __init__(self, rows: int) -> None:
        self.targets = np.arange(rows, dtype=np.int64)
        self.targets %= self.num_classes

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.tensor([index % 7, index % 11, index % 13, 1.0]), int(self.targets[index])

    def content(self, index: int) -> bytes:
        return index.to_bytes(8, "little")


if __name__ == "__main__":
    main()
