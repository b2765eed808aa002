"""Stage 2 against its bounds: an epoch from the cache, and a large view made resident.

Epochs: one student trained three ways by turns in one process, over the same images: on true labels alone (a fresh
view every epoch, which is the same rendering), from the cache, and with the live teacher. The cache's epoch takes at
most 1.05 of the labels-only one. Its speed-up over the live teacher is shown beside (teacher + student) / student,
what it would be if there were nothing but the two nets; they are timed alone, on an epoch's rendered inputs.

Losses: a student's training step with each loss and cached logits against the same step on true labels, by turns,
over the same rendered batches: time, and the peak of what the step allocates (on the CPU as torch's profiler sees its
allocator, on a GPU as CUDA's does). Then each loss alone, forward and backward, on random logits over 1000 classes.

Hints: a step of each student of `pipelines/hints_mnist.yaml`, which learn from cached features as well, against the one
on true labels; by turns, over the same rendered batches.

Resident view: ImageNet's 1.28 M rows of random logits over 1000 classes as TopK(k=10): opening the cache and loading
the view, and random batches of it, against the same batches from a float16 memmap (2.6 GB of disk while it runs).

    python benchmarks/stage2.py --write
    python benchmarks/stage2.py --only epochs --repeats 9 --epochs 16 teacher.model=resnet20 teacher.args={}
    python benchmarks/stage2.py --only resident --rows 100000
    python benchmarks/stage2.py --only losses
"""

from __future__ import annotations

import gc
import itertools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring import TINY, Comparison, compare, conditions, options, parse, table, write_result
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import logitcache
from logitcache.config.schema import Pipeline, StudentConfig, load_pipeline
from logitcache.data.loading import rendered_batches
from logitcache.data.order import batches, epoch_order
from logitcache.devices import autocast, pick_device, to_device
from logitcache.losses import LOSSES, CrossEntropy, Loss, loss_from_config
from logitcache.progress import silence, track
from logitcache.stages.cache_teacher import cache_teacher
from logitcache.stages.train_student import Experiment
from logitcache.train.job import Job
from logitcache.train.labels import CachedLabels, LiveLabels
from logitcache.train.loop import Run as TrainingRun
from logitcache.train.loop import train, train_epoch
from logitcache.train.runs import METRICS, RunFolder

# B batch, C classes

PIPELINE = Path(__file__).parent.parent / "pipelines" / "mnist5k.yaml"
HINTS = PIPELINE.with_name("hints_mnist.yaml")
MAX_RATIO = 1.05
LABELS_ONLY, CACHED, LIVE = "labels only", "from the cache", "live teacher"
NUM_CLASSES, K, ROWS_PER_BLOCK, BATCH_SIZE = 1000, 10, 65_536, 256
"""Of the resident view."""
ROWS_AT_ONCE = 8192
"""Random rows made at a time."""
MEASURED_WITH: dict[str, list[dict[str, Any]]] = {
    "stages": [],  # one of the others at any step
    "weighted": [{"parts": [{"loss": "cross_entropy"}, {"loss": "dist", "weight": 2.0}]}],
    "kl": [{}, {"temperature": 2.0}, {"temperature": 2.0, "standardise": True}],
}
"""Parameters of the losses that are measured with others than their defaults."""


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--pipeline", type=Path, default=PIPELINE)
    parser.add_argument(
        "--only",
        choices=["epochs", "alternating", "added", "losses", "hints", "resident"],
        help="one of the measurements",
    )
    parser.add_argument("--student", help="trained three ways; by default the first that learns from the cache")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each of the three")
    parser.add_argument("--epochs", type=int, default=8, help="of each run, whose median counts")
    parser.add_argument("--pairs", type=int, default=40, help="of neighbouring epochs, for `alternating`")
    parser.add_argument("--turns", type=int, default=15, help="repeats of `added`, `losses` and `hints`")
    parser.add_argument("--rows", type=int, default=1_280_000, help="of the resident view")
    parser.add_argument("--opens", type=int, default=7, help="of the resident view")
    parser.add_argument("--gathers", type=int, default=500, help="batches of the resident view")
    parser.add_argument("--folder", type=Path, help="where caches and runs are written and removed again")
    parser.add_argument("overrides", nargs="*", help="key=value of the pipeline")
    arguments = parse(parser, repeats=1, epochs=1, pairs=4, turns=1, rows=2048, opens=1, gathers=2)

    silence()
    sections = ["# Stage 2", conditions()]
    print(sections[-1], flush=True)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        paths = [f"cache.path={folder}/views.cache", f"runs.path={folder}/runs"]
        common = ["teacher.weights=random", *(TINY if arguments.tiny else [])]
        pipeline = load_pipeline(arguments.pipeline, [*common, *arguments.overrides, *paths])
        device = pick_device(pipeline.device, threads=pipeline.threads)
        if arguments.only in (None, "epochs"):
            sections.append(epochs_section(pipeline, arguments.student, arguments.repeats, arguments.epochs))
            print(f"\n{sections[-1]}", flush=True)
        if arguments.only in (None, "alternating"):
            sections.append(alternating_section(pipeline, arguments.student, arguments.pairs))
            print(f"\n{sections[-1]}", flush=True)
        if arguments.only in (None, "added"):
            sections.append(added_section(pipeline, arguments.student, arguments.turns))
            print(f"\n{sections[-1]}", flush=True)
        if arguments.only in (None, "losses"):
            sections.append(losses_section(pipeline, arguments.student, device, arguments.turns))
            print(f"\n{sections[-1]}", flush=True)
        if arguments.only in (None, "hints"):
            hinting = load_pipeline(HINTS, [*common, f"cache.path={folder}/outputs.cache", paths[1]])
            sections.append(hints_section(hinting, device, arguments.turns))
            print(f"\n{sections[-1]}", flush=True)
        if arguments.only in (None, "resident"):
            sections.append(resident_section(Path(folder), arguments.rows, arguments.opens, arguments.gathers, device))
            print(f"\n{sections[-1]}", flush=True)
    if arguments.write:
        path = write_result("stage2", "\n\n".join(sections) + "\n", device=device)
        print(f"\nwritten to {path}")


def epochs_section(pipeline: Pipeline, student_name: str | None, repeats: int, epochs: int) -> str:
    """The three arms by turns, whoever goes first changing each time, so that a slow minute hits all of them."""
    cache_teacher(pipeline, trust=True)
    bench = Experiment(pipeline, trust=True)
    # Evaluation is no part of an epoch's time, and would only let the workers run ahead.
    bench.data = replace(bench.data, validation=None, test=None)
    arms = three_ways(pipeline, student_name, epochs)
    costs: dict[str, list[Cost]] = {name: [] for name in arms}
    alone: list[Alone] = []
    warm_up = {"name": "warm-up", "train": {**arms[LIVE].train, "epochs": 1}}
    train_once(bench, arms[LIVE].model_copy(update=warm_up), 0)
    names = list(arms)
    for repeat in range(repeats):
        for name in names[repeat % len(names) :] + names[: repeat % len(names)]:
            costs[name].append(train_once(bench, arms[name], repeat))
        alone.append(measure_alone(pipeline, bench, arms, repeat))

    wall, cpu = ({name: [getattr(cost, kind) for cost in costs[name]] for name in names} for kind in ("wall", "cpu"))
    least = {name: min(cost.least for cost in costs[name]) for name in names}
    teacher, student, rendering = (
        statistics.median(getattr(each, part) for each in alone) for part in ("teacher", "student", "rendering")
    )
    bounds = [(each.teacher + each.student) / each.student for each in alone]
    config = pipeline.train_config(arms[CACHED])
    about = (
        f"{pipeline.name}: {alone[0].samples} samples an epoch, student {arms[CACHED].model} {arms[CACHED].args}, "
        f"teacher {pipeline.teacher.model} {pipeline.teacher.args}, batches of {config.batch_size}, "
        f"{pipeline.num_workers} workers; {repeats} runs of {epochs} epochs each way, medians."
    )
    rows = [
        *(
            [f"an epoch, {name}", f"{statistics.median(wall[name]):.3f} s", f"{statistics.median(cpu[name]):.3f} s"]
            for name in names
        ),
        ["from the cache / labels only", *(compare(kind[CACHED], kind[LABELS_ONLY]) for kind in (wall, cpu))],
        [f"the same of the least of {repeats * epochs} epochs each", f"{least[CACHED] / least[LABELS_ONLY]:.3f}", ""],
        ["bound", f"<= {MAX_RATIO}", ""],
        ["live teacher / from the cache", *(compare(kind[LIVE], kind[CACHED]) for kind in (wall, cpu))],
        [
            "(teacher + student) / student",
            f"{(teacher + student) / student:.3f} (runs: {min(bounds):.3f} to {max(bounds):.3f})",
            "",
        ],
        ["teacher alone, an epoch", f"{teacher:.3f} s", ""],
        ["student's steps alone, an epoch", f"{student:.3f} s", ""],
        ["rendering alone, an epoch", f"{rendering:.3f} s", ""],
    ]
    return f"## Epochs\n\n{about}\n\n{table(['', 'wall time', 'CPU time, with workers'], rows)}"


def alternating_section(pipeline: Pipeline, student_name: str | None, epochs: int) -> str:
    """Two runs under way at once, an epoch of each by turns: neighbours share what else the machine does."""
    cache_teacher(pipeline, trust=True)
    bench = Experiment(pipeline, trust=True)
    bench.data = replace(bench.data, validation=None, test=None)
    arms = three_ways(pipeline, student_name, epochs)
    runs = {}
    for name in (LABELS_ONLY, CACHED):
        job = bench.job(arms[name].model_copy(update={"name": f"{arms[name].name}-alternating"}), seed=0)
        run = TrainingRun(job, RunFolder(job.folder, job.identity))
        # Workers of the run that waits render a few batches ahead and stop: alike for both.
        loader = rendered_batches(job.views, run.places(), num_workers=job.num_workers)
        runs[name] = (run, loader)
    with track("alternating", 2 * epochs, unit="epochs") as meter:
        for epoch in range(epochs):
            for run, loader in list(runs.values()) if epoch % 2 == 0 else reversed(runs.values()):
                train_epoch(run, loader, meter)
    # The first two warm up.
    plain, cached = (runs[name][0].state.epoch_seconds[2:] for name in (LABELS_ONLY, CACHED))
    found = compare(cached, plain)
    rows = [
        ["an epoch, labels only", f"{found.reference_median:.3f} s"],
        ["an epoch, from the cache", f"{found.median:.3f} s"],
        ["ratio of the medians", f"{found.ratio:.3f}"],
        ["median of the pairs' ratios", found.quartiles],
        ["bound", f"<= {MAX_RATIO}"],
    ]
    return f"## Epochs by turns\n\n{len(plain)} pairs of neighbouring epochs.\n\n{table(['', ''], rows)}"


def added_section(pipeline: Pipeline, student_name: str | None, repeats: int) -> str:
    """What the cache adds to an epoch, part by part, each timed alone: little next to the noise of whole epochs."""
    cache_teacher(pipeline, trust=True)
    bench = Experiment(pipeline, trust=True)
    bench.data = replace(bench.data, validation=None, test=None)
    arms = three_ways(pipeline, student_name, 1)
    job = bench.job(arms[CACHED], seed=0)
    loss = job.loss
    size, num_classes = job.config.batch_size, bench.data.num_classes
    rows_B = torch.arange(size)
    student_BC = torch.randn(size, num_classes, requires_grad=True)
    target_BC = torch.randn(size, num_classes).softmax(dim=1)
    true_label = CrossEntropy()
    starts, cached, plain, epochs = [], [], [], []
    for repeat in range(repeats):
        labels = bench.job(arms[CACHED], seed=0).labels  # one that has proven no view yet
        assert isinstance(labels, CachedLabels)
        start = time.perf_counter()
        labels.start_views([repeat % pipeline.views.count], [])
        starts.append(time.perf_counter() - start)
        for seconds, step in (
            (cached, lambda labels=labels: loss(student_BC, labels.logits(rows_B, None, target_BC), target_BC)),
            (plain, lambda: true_label(student_BC, None, target_BC)),
        ):
            start = time.perf_counter()
            for _ in range(200):
                step().mean().backward()
            seconds.append((time.perf_counter() - start) / 200)
        epochs.append(train_once(bench, arms[LABELS_ONLY], repeat).wall)
    steps = -(-len(job.indices) // size)
    start_view, per_step = statistics.median(starts), statistics.median(cached) - statistics.median(plain)
    added, epoch = start_view + steps * per_step, statistics.median(epochs)
    rows = [
        ["start of a new view: load, and proof by rendering", f"{1e3 * start_view:.2f} ms"],
        [f"labels and their loss instead of cross-entropy, {steps} steps", f"{1e3 * steps * per_step:.2f} ms"],
        ["an epoch, labels only", f"{1e3 * epoch:.0f} ms"],
        ["added / an epoch on labels only", f"{added / epoch:.3f}"],
    ]
    return f"## What the cache adds, alone\n\nMedians of {repeats}, by turns.\n\n{table(['', ''], rows)}"


def losses_section(pipeline: Pipeline, student_name: str | None, device: torch.device, repeats: int) -> str:
    """A step with each loss from the cache, and each loss alone over many classes, against true labels."""
    cache_teacher(pipeline, trust=True)
    bench = Experiment(pipeline, trust=True)
    bench.data = replace(bench.data, validation=None, test=None)
    cached = three_ways(pipeline, student_name, 1)[CACHED]
    job = bench.job(cached, seed=0)
    labels, config = job.labels, job.config
    assert isinstance(labels, CachedLabels)
    view = job.view_of(0)
    labels.start_views([view], [])
    cuts = batches(epoch_order(len(job.indices), seed=0, epoch=0), config.batch_size)[:20]
    places = [[(view, int(index)) for index in job.indices[cut]] for cut in cuts]
    rendered = [
        (rows, to_device(inputs, device, channels_last=config.channels_last), to_device(targets, device))
        for rows, inputs, targets in rendered_batches(job.views, places, num_workers=job.num_workers)
    ]
    model = job.model.to(device).train()
    if config.channels_last:
        model = model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr)
    following = itertools.cycle(rendered)

    def step(loss: Loss) -> None:
        rows, inputs, targets = next(following)
        teacher_BC = labels.logits(rows, None, targets) if loss.needs_teacher else None
        with autocast(device, config.precision):
            student_BC = model(inputs)
        optimizer.zero_grad(set_to_none=True)
        loss(student_BC, teacher_BC, targets).mean().backward()
        optimizer.step()

    generator = torch.Generator().manual_seed(0)
    many_BC = torch.randn(BATCH_SIZE, NUM_CLASSES, generator=generator).to(device).requires_grad_()
    teacher_BC = torch.randn(BATCH_SIZE, NUM_CLASSES, generator=generator).to(device)
    target = torch.randint(NUM_CLASSES, (BATCH_SIZE,), generator=generator).to(device)

    def alone(loss: Loss) -> None:
        many_BC.grad = None
        loss(many_BC, teacher_BC, target).mean().backward()

    about_step = (
        f"{pipeline.name}: student {cached.model} {cached.args}, batches of {config.batch_size}, rendered beforehand; "
        "gather of the cached logits, forward, loss, backward and update with AdamW."
    )
    about_alone = f"Forward and backward on {BATCH_SIZE} rows of random logits over {NUM_CLASSES} classes; no net."
    sections = []
    for title, about, work, count in (("A step", about_step, step, 20), ("Alone", about_alone, alone, 2)):
        times, peaks = loss_costs(work, device, repeats=repeats, count=count)
        rows = [
            [name, f"{1e3 * time.median:.3f} ms", str(time), f"{peaks[name] / 2**20:.2f} MiB"]
            for name, time in times.items()
        ]
        found = table(["loss", "time", "/ true labels", "peak of what it allocates"], rows)
        sections.append(f"### {title}\n\n{about} Medians of {repeats} by turns, of {count} each.\n\n{found}")
    return "## Losses\n\n" + "\n\n".join(sections)


def hints_section(pipeline: Pipeline, device: torch.device, repeats: int, steps: int = 20) -> str:
    """A step of the training loop with hints, without, and on true labels."""
    cache_teacher(pipeline, trust=True)
    bench = Experiment(pipeline, trust=True)
    bench.data = replace(bench.data, validation=None, test=None)
    reference = "true-labels"
    seconds: dict[str, list[float]] = {student.name: [] for student in pipeline.students}
    peaks = {}
    for repeat in range(repeats):
        students = pipeline.students if repeat % 2 == 0 else pipeline.students[::-1]
        for student in students:
            # A seed of its own for each run; views that were proven before the clock starts.
            job = bench.job(student, seed=repeat)
            run = TrainingRun(job, RunFolder(job.folder, job.identity))
            rendered = list(itertools.islice(rendered_batches(job.views, run.places(), num_workers=0), steps + 3))
            run.begin_epoch()
            run.train_step(*rendered[0])
            following = iter(rendered[1:])
            if repeat == 0:
                peaks[student.name] = peak_bytes(
                    lambda run=run, following=following: run.train_step(*next(following)), device
                )
            start = now(device)
            for batch in rendered[3:]:
                run.train_step(*batch)
            seconds[student.name].append((now(device) - start) / steps)
    times = {name: compare(seconds[name], seconds[reference]) for name in sorted(seconds, key=lambda n: n != reference)}
    rows = [
        [name, f"{1e3 * time.median:.3f} ms", str(time), f"{peaks[name] / 2**20:.2f} MiB"]
        for name, time in times.items()
    ]
    student = pipeline.students[0]
    return (
        f"## Hints\n\n{pipeline.name}: student {student.model} {student.args}, batches of "
        f"{pipeline.train.batch_size}, rendered beforehand; labels and features gathered, forward, losses, backward "
        f"and update. Medians of {repeats} by turns, of {steps} steps each.\n\n"
        + table(["student", "time", "/ true labels", "peak of what it allocates"], rows)
    )


def loss_costs(
    work: Callable[[Loss], None], device: torch.device, *, repeats: int, count: int
) -> tuple[dict[str, Comparison], dict[str, int]]:
    """Seconds of a piece of work with each loss, beside true labels, and the most bytes that it holds at once."""
    arms = {LABELS_ONLY: loss_from_config("cross_entropy")}
    for name in LOSSES:
        for arguments in MEASURED_WITH.get(name, [{}]):
            if name != "cross_entropy":
                shown = ", ".join(f"{key}={value}" for key, value in arguments.items() if key != "parts")
                shown = "cross_entropy + 2 dist" if name == "weighted" else shown
                arms[f"{name} ({shown})" if shown else name] = loss_from_config({"name": name, **arguments})
    peaks = {}
    for name, loss in arms.items():
        work(loss)  # warms up, and makes what an optimizer keeps
        peaks[name] = peak_bytes(lambda loss=loss: work(loss), device)
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for repeat in range(repeats):
        for name, loss in list(arms.items()) if repeat % 2 == 0 else reversed(arms.items()):
            start = now(device)
            for _ in range(count):
                work(loss)
            seconds[name].append((now(device) - start) / count)
    return {name: compare(seconds[name], seconds[LABELS_ONLY]) for name in arms}, peaks


def peak_bytes(work: Callable[[], None], device: torch.device) -> int:
    """The most that a piece of work holds at once of what it allocates through torch."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    for _ in range(2):  # what the first frees was allocated before there was a profiler, and goes unseen
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
            work()
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(itertools.accumulate(changes), default=0)


def three_ways(pipeline: Pipeline, student_name: str | None, epochs: int) -> dict[str, StudentConfig]:
    """One student that differs in nothing but where its labels come from."""
    if student_name is None:
        student_name = next(
            student.name
            for student in pipeline.students
            if student.labels == "cache" and loss_from_config(student.loss).needs_teacher
        )
    cached = pipeline.student(student_name)
    cached = cached.model_copy(update={"name": "cached", "train": {**cached.train, "epochs": epochs}})
    return {
        LABELS_ONLY: cached.model_copy(update={"name": "labels-only", "loss": {"name": "cross_entropy"}}),
        CACHED: cached,
        LIVE: cached.model_copy(update={"name": "live", "labels": "live"}),
    }


@dataclass(frozen=True)
class Cost:
    """What an epoch took, in seconds."""

    wall: float
    """Median over the epochs of a run."""
    least: float
    """Of the fastest epoch: what else the machine does only ever adds."""
    cpu: float
    """Of all threads and of the workers, mean over the run with its start: hardly touched by what else goes on."""


def train_once(bench: Experiment, student: StudentConfig, repeat: int) -> Cost:
    """One run, into a folder of its own."""
    job = bench.job(student, seed=repeat)
    cpu_start = sum(os.times()[:4])
    result = train(job)
    gc.collect()  # ends the workers, whose time counts from then on
    cpu = (sum(os.times()[:4]) - cpu_start) / result["epochs"]
    lines = [json.loads(line) for line in (job.folder / METRICS).read_text().splitlines()]
    epochs = [line["epoch_seconds"] for line in lines if "epoch_seconds" in line]
    return Cost(result["epoch_seconds"], min(epochs), cpu)


@dataclass(frozen=True)
class Alone:
    """Parts of an epoch on their own, in seconds."""

    samples: int
    rendering: float
    teacher: float
    student: float


def measure_alone(pipeline: Pipeline, bench: Experiment, arms: dict[str, StudentConfig], repeat: int) -> Alone:
    """Rendering by the workers, then the teacher, then the student's steps, over one epoch's batches in memory."""
    rendered, job = bench.job(arms[LABELS_ONLY], seed=repeat), bench.job(arms[LIVE], seed=repeat)
    device = job.device
    cuts = batches(epoch_order(len(job.indices), seed=repeat, epoch=0), job.config.batch_size)
    epochs = [[[(view, int(index)) for index in rendered.indices[cut]] for cut in cuts] for view in (0, 1)]
    loader = rendered_batches(rendered.views, [*epochs[0], *epochs[1]], num_workers=job.num_workers)
    for _ in epochs[0]:  # the workers' start is no part of it
        next(loader)
    start = time.perf_counter()
    for _ in loader:
        pass
    rendering = time.perf_counter() - start

    places = [[(0, int(index)) for index in job.indices[cut]] for cut in cuts]
    teacher = job.labels
    assert isinstance(teacher, LiveLabels)
    epoch = []
    for _, inputs, targets in rendered_batches(job.views, places, num_workers=job.num_workers):
        student_inputs, teacher_inputs = inputs if teacher.needs_teacher_inputs else (inputs, inputs)
        epoch.append((student_inputs, teacher_inputs, targets))
    start = now(device)
    labels = [teacher.logits(torch.empty(0), teacher_inputs, targets) for _, teacher_inputs, targets in epoch]
    teacher_seconds = now(device) - start
    steps = [(inputs, label_BC, targets) for (inputs, _, targets), label_BC in zip(epoch, labels, strict=True)]
    student_seconds = student_steps(job, steps)
    return Alone(len(job.indices), rendering, teacher_seconds, student_seconds)


def student_steps(job: Job, epoch: list[tuple[Any, Tensor, Any]]) -> float:
    """Seconds of one epoch's forward, loss, backward and update, with everything else at hand."""
    config, device = job.config, job.device
    model = job.model.to(device)
    if config.channels_last:
        model = model.to(memory_format=torch.channels_last)
    model.train()
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[config.optimizer]
    optimizer = kind(model.parameters(), lr=config.lr)
    start = now(device)
    for inputs, teacher_BC, targets in epoch:
        inputs = to_device(inputs, device, channels_last=config.channels_last)
        with autocast(device, config.precision):
            student_BC = model(inputs)
        loss = job.loss(student_BC, teacher_BC, to_device(targets, device)).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    return now(device) - start


def resident_section(folder: Path, num_rows: int, opens: int, gathers: int, device: torch.device) -> str:
    """A view of random logits as a cache and as a float16 memmap, both warm in the page cache."""
    path = folder / "resident.cache"
    dense_BC = np.memmap(folder / "logits.f16", dtype=np.float16, mode="w+", shape=(num_rows, NUM_CLASSES))
    writing = write_both(path, dense_BC)
    dense_BC.flush()  # or it would be written back while we measure

    opening, loading = [], []
    for _ in range(opens):
        start = time.perf_counter()
        cache = logitcache.open(path)
        opened = time.perf_counter()
        view = cache.view(0, device)
        loading.append(now(device) - opened)
        opening.append(opened - start)

    generator = np.random.default_rng(0)
    from_view, from_memmap = [], []
    for _ in range(gathers):
        rows_B = generator.integers(num_rows, size=BATCH_SIZE)
        index_B = torch.from_numpy(rows_B)
        start = now(device)
        view.logits(index_B)
        middle = now(device)
        torch.from_numpy(dense_BC[rows_B]).to(device).float()
        from_memmap.append(now(device) - middle)
        from_view.append(middle - start)
    gather = compare(from_view, from_memmap)
    about = (
        f"{num_rows} rows of {NUM_CLASSES} random logits, TopK(k={K}), blocks of {ROWS_PER_BLOCK} rows, on {device}; "
        f"files in the page cache. {opens} opens, {gathers} batches of {BATCH_SIZE} random rows, medians."
    )
    both = [first + second for first, second in zip(opening, loading, strict=True)]
    rows = [
        ["written by `logitcache.create` in", f"{writing:.1f} s"],
        ["cache on disk", f"{cache.stored_bytes / 2**20:.1f} MiB"],
        ["view in memory", f"{cache.view_bytes / 2**20:.1f} MiB"],
        ["memmap on disk", f"{dense_BC.nbytes / 2**20:.1f} MiB"],
        ["`logitcache.open`", f"{1e3 * statistics.median(opening):.1f} ms"],
        ["`view(0)`, resident and checked", f"{1e3 * statistics.median(loading):.1f} ms"],
        [
            "both",
            f"{1e3 * statistics.median(both):.1f} ms ({1e3 * min(both):.1f} to {1e3 * max(both):.1f})",
        ],
        ["`view.logits` of a batch", f"{1e3 * gather.median:.3f} ms"],
        ["the same from the memmap", f"{1e3 * gather.reference_median:.3f} ms"],
        ["`view.logits` / memmap", f"{gather.ratio:.3f}"],
    ]
    return f"## Resident view\n\n{about}\n\n{table(['measured', 'value'], rows)}"


def write_both(path: Path, dense_BC: np.ndarray) -> float:
    """Fill a cache and an array with the same random logits; returns the seconds that the cache took."""
    num_rows = len(dense_BC)
    generator = torch.Generator().manual_seed(0)
    seconds = 0.0
    start = time.perf_counter()
    with logitcache.create(
        path,
        num_samples=num_rows,
        num_classes=NUM_CLASSES,
        encoding=logitcache.TopK(k=K),
        teacher="random",
        dataset="random",
        rows_per_block=ROWS_PER_BLOCK,
    ) as writer:
        for first in range(0, num_rows, ROWS_AT_ONCE):
            seconds += time.perf_counter() - start
            logits_BC = torch.randn(min(ROWS_AT_ONCE, num_rows - first), NUM_CLASSES, generator=generator)
            dense_BC[first : first + len(logits_BC)] = logits_BC.numpy()
            start = time.perf_counter()
            writer.write(view=0, start=first, logits=logits_BC)
    return seconds + time.perf_counter() - start


def now(device: torch.device) -> float:
    """The time when a device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


if __name__ == "__main__":
    main()
