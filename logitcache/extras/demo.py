"""The demo on embedded real data: time that a cache saves, accuracy by view matching, and accuracy with few labels."""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from logitcache.cache.manifest import LOGITS
from logitcache.cache.reader import LogitCache, open_cache
from logitcache.config.build import resolve_teacher
from logitcache.config.schema import load_pipeline
from logitcache.data.index import split_index
from logitcache.data.views import ViewDataset, ViewPlan
from logitcache.devices import pick_device
from logitcache.engines import CacheResult
from logitcache.errors import UsageError
from logitcache.extras.student_export.cost import count_macs
from logitcache.stages.cache_teacher import cache_teacher
from logitcache.stages.matched_data import match_data
from logitcache.stages.train_student import Experiment, Row, summarise
from logitcache.stages.train_teacher import train_teacher
from logitcache.storage import LocalStorage
from logitcache.train.labels import Labels
from logitcache.train.loop import train

# B batch, C classes

TENTH, ALL, MISMATCHED, MATCHED, LIVE = (
    "true-labels-of-a-tenth",
    "true-labels-of-all",
    "labels-of-one-clean-view",
    "labels-of-matching-views",
    "live-teacher",
)
"""Students of `pipelines/demo.yaml`; the third one is trained by this demo only."""

DESCRIPTIONS = {
    TENTH: "true labels of a tenth of the images",
    ALL: "true labels of all images",
    MISMATCHED: "cached logits of the clean images",
    MATCHED: "cached logits of the matching views",
    LIVE: "logits of the live teacher",
}
"""What each student is trained on."""

FULL_SEEDS = 6
"""Seeds of each student with `full`."""
COST_STUDENTS = 4
"""Students whose cost is compared."""
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Comparison:
    """Two rows of the table, compared."""

    row: str
    reference: str
    points: float | None
    """Mean test accuracy of `row` minus that of `reference`, in percentage points; None without a test split."""
    standard_error: float | None
    """Of `points`; None for a single seed."""
    interval: tuple[float, float] | None
    """95 % confidence interval of `points` over seeds (Student's t, pooled variance); None for a single seed."""

    @property
    def significant(self) -> bool:
        """Whether the interval excludes zero."""
        return self.interval is not None and not self.interval[0] <= 0 <= self.interval[1]


@dataclass(frozen=True)
class Cost:
    """Seconds to train several students with the live teacher, and from the cache, stage 1 included."""

    students: int
    stage1_seconds: float
    cached_seconds: float
    """Stage 1 and the students; means over seeds."""
    live_seconds: float
    ratio: float
    """Live over cached, the mean of one ratio per seed."""
    ratio_standard_error: float
    interval: tuple[float, float]
    """95 % confidence interval of `ratio` over seeds."""


@dataclass(frozen=True)
class DemoResult:
    """The results of the demo."""

    rows: list[Row]
    teacher: dict[str, Any]
    """The result of the teacher's own training."""
    teacher_macs: int
    """Multiply-accumulates of the teacher for one image."""
    student_macs: int
    cost: Cost | None
    """None where one seed, or an interrupted stage 1, leaves nothing to compare."""
    view_matching: Comparison
    few_labels: Comparison
    findings: list[str]
    """Three sentences: cost, view matching, few labels."""
    experiment: Experiment = field(compare=False, repr=False)
    """Data, views and pipeline of the students."""


def embedded_file() -> Path:
    """`pipelines/demo.yaml`, from the checkout or from inside the installed package."""
    here = Path(__file__).parent
    checkout = here.parents[1] / "pipelines" / "demo.yaml"
    return checkout if checkout.is_file() else here / "demo.yaml"


def run_demo(folder: Path, overrides: Sequence[str] = (), *, full: bool = False) -> DemoResult:
    """Train the teacher, cache it, and train one student net from several sources of labels.

    What is done already is not repeated, so `full` after a run without it trains only the seeds and the student that
    are missing.

    Args:
        folder: where runs and caches go.
        overrides: of `pipelines/demo.yaml`, such as `train.epochs=4`.
        full: more seeds, and a student on all true labels.
    """
    paths = [f"runs.path={folder}/runs", f"cache.path={folder}/views.cache"]
    seeds = [f"train.seeds={[*range(FULL_SEEDS)]}"] if full else []
    pipeline = load_pipeline(embedded_file(), [*paths, *seeds, *overrides])
    # Before anything is timed, because the number of threads is set once for the process.
    pick_device(pipeline.device, threads=pipeline.threads)
    teacher = train_teacher(pipeline)
    stage1_seconds = _timed_stage1(lambda: cache_teacher(pipeline), folder)
    experiment = Experiment(pipeline)
    mismatched_labels = clean_labels(experiment, folder / "clean.cache")
    students = [
        pipeline.student(TENTH),
        *([pipeline.student(ALL)] if full else []),
        # No pipeline can ask for mismatched labels, so this student is made here.
        pipeline.student(MATCHED).model_copy(update={"name": MISMATCHED}),
        pipeline.student(MATCHED),
        pipeline.student(LIVE),
    ]
    results: dict[str, list[dict[str, Any]]] = {student.name: [] for student in students}
    for seed in pipeline.train.seeds:  # students alternate, so that other load on the machine affects all of them
        for student in students:
            labels = mismatched_labels if student.name == MISMATCHED else None
            results[student.name].append(train(experiment.job(student, seed, labels=labels)))
    rows = {name: summarise(name, runs) for name, runs in results.items()}
    cost = compare_cost(results[LIVE], results[MATCHED], stage1_seconds)
    view_matching = compare(rows[MATCHED], rows[MISMATCHED])
    few_labels = compare(rows[MATCHED], rows[TENTH])
    image_1 = ViewDataset(experiment.data.train, experiment.plan)[(0, 0)][1][None]
    return DemoResult(
        rows=list(rows.values()),
        teacher=teacher,
        teacher_macs=count_macs(resolve_teacher(pipeline, experiment.data, experiment.plan, trust=False)[0], image_1),
        student_macs=count_macs(experiment.job(pipeline.student(MATCHED), seed=0).model, image_1),
        cost=cost,
        view_matching=view_matching,
        few_labels=few_labels,
        findings=[
            cost_finding(cost),
            accuracy_finding("View matching", view_matching, rows),
            accuracy_finding("Few labels", few_labels, rows),
        ],
        experiment=experiment,
    )


class CleanLabels(Labels):
    """Labels of the clean image for every augmentation of it, which is a common mistake.

    The labels of mixed samples are mixed by the area of each image, so that only the augmentation is ignored.

    Args:
        clean: one view without augmentation or mixing.
        views: what the student sees.
        device: of the labels.
    """

    def __init__(self, clean: LogitCache, views: ViewDataset, device: torch.device) -> None:
        self._labels = clean.view(0, device)
        self._plan: ViewPlan = views.plan
        self._size: tuple[int, int] = tuple(views[(0, 0)][1].shape[-2:])
        self._num_samples = clean.num_samples
        self._device = device
        self._view = 0

    def start_view(self, view: int, following: int | None) -> None:
        self._view = view

    def outputs(self, names: Sequence[str], index: Tensor, teacher_inputs: Any, targets: Tensor) -> dict[str, Tensor]:
        rows = split_index(index)[1]
        mixtures = [self._plan.mixture(self._view, row, self._num_samples) for row in rows.tolist()]
        partners = torch.tensor(
            [row if m is None else m.partner for row, m in zip(rows.tolist(), mixtures, strict=True)]
        )
        weights_B1 = torch.tensor([[1.0 if m is None else m.weight_in(*self._size)] for m in mixtures])
        weights_B1 = weights_B1.to(self._device)
        own_BC = self._labels.logits(rows).softmax(dim=1)
        other_BC = self._labels.logits(partners).softmax(dim=1)
        return {LOGITS: (weights_B1 * own_BC + (1 - weights_B1) * other_BC).log()}


def clean_labels(experiment: Experiment, path: Path) -> CleanLabels:
    """Labels of one clean view for augmented images, from a cache at `path` that is built if it is missing."""
    pipeline = experiment.pipeline
    unmixed = {"transform": None, "mixup": 0.0, "cutmix": 0.0, "count": 1}
    cache_teacher(
        pipeline.model_copy(
            update={
                "views": pipeline.views.model_copy(update=unmixed),
                "cache": pipeline.cache.model_copy(update={"path": str(path)}),
            }
        )
    )
    return CleanLabels(open_cache(str(path)), ViewDataset(experiment.data.train, experiment.plan), experiment.device)


def compare(row: Row, reference: Row) -> Comparison:
    """The difference between two rows' test accuracies, with its standard error and interval over seeds."""
    if row.accuracy_mean is None or reference.accuracy_mean is None:
        return Comparison(row.name, reference.name, None, None, None)
    points = 100 * (row.accuracy_mean - reference.accuracy_mean)
    if row.accuracy_sd is None or reference.accuracy_sd is None:
        return Comparison(row.name, reference.name, points, None, None)
    first, second = len(row.seeds) - 1, len(reference.seeds) - 1
    variance = (first * row.accuracy_sd**2 + second * reference.accuracy_sd**2) / (first + second)
    error = 100 * math.sqrt(variance / (first + 1) + variance / (second + 1))
    half = _t_quantile(first + second) * error
    return Comparison(row.name, reference.name, points, error, (points - half, points + half))


def compare_cost(
    live: Sequence[dict[str, Any]], cached: Sequence[dict[str, Any]], stage1_seconds: float | None
) -> Cost | None:
    """The cost of `COST_STUDENTS` students with the live teacher and from the cache; None for fewer than two seeds.

    The cost of a run is its number of epochs times the median seconds of one, without evaluation.

    Args:
        live, cached: results of `train` with the same seeds.
        stage1_seconds: of `cache_teacher`; None if it is not known.
    """
    timed = all(run["epoch_seconds"] is not None for run in [*live, *cached])
    if stage1_seconds is None or len(live) < 2 or not timed:
        return None
    live_seconds, training_seconds = (
        [COST_STUDENTS * run["epochs"] * run["epoch_seconds"] for run in runs] for runs in (live, cached)
    )
    cached_seconds = [stage1_seconds + seconds for seconds in training_seconds]
    ratios = [both[0] / both[1] for both in zip(live_seconds, cached_seconds, strict=True)]
    ratio, error = statistics.fmean(ratios), statistics.stdev(ratios) / math.sqrt(len(ratios))
    half = _t_quantile(len(ratios) - 1) * error
    return Cost(
        students=COST_STUDENTS,
        stage1_seconds=stage1_seconds,
        cached_seconds=statistics.fmean(cached_seconds),
        live_seconds=statistics.fmean(live_seconds),
        ratio=ratio,
        ratio_standard_error=error,
        interval=(ratio - half, ratio + half),
    )


def cost_finding(cost: Cost | None) -> str:
    """The cost as a sentence."""
    if cost is None:
        return "Cost: no statement; it needs at least two seeds and a stage 1 that was not interrupted."
    low, high = cost.interval
    seconds = (
        f"{cost.students} students take {cost.live_seconds:.0f} s with the live teacher and "
        f"{cost.cached_seconds:.0f} s with the cache, running the teacher once ({cost.stage1_seconds:.0f} s) included"
    )
    ratio = f"{cost.ratio:.2f} times as long (95 % interval {low:.2f} to {high:.2f})"
    shown = "" if low > 1 or high < 1 else ", no significant difference"
    return f"Cost: {seconds}: {ratio}{shown}; training the teacher, needed for both, is not counted."


def accuracy_finding(subject: str, found: Comparison, rows: dict[str, Row]) -> str:
    """A comparison as a sentence; it states whether the difference is significant."""
    row, reference = rows[found.row], rows[found.reference]
    if found.points is None:
        return f"{subject}: no statement; there is no test split."
    values = (
        f"{subject}: {DESCRIPTIONS[row.name]} give {100 * (row.accuracy_mean or 0):.1f} %, "
        f"{DESCRIPTIONS[reference.name]} {100 * (reference.accuracy_mean or 0):.1f} %"
    )
    if found.interval is None:
        return f"{values}; no conclusion from one seed."
    low, high = found.interval
    spread = f"{found.points:+.1f} points (95 % interval {low:+.1f} to {high:+.1f})"
    if found.significant:
        return f"{values}: {spread}."
    more = "; try --full" if len(row.seeds) < FULL_SEEDS else ""
    return f"{values}: {spread}, no significant difference over {len(row.seeds)} seeds{more}."


def _t_quantile(degrees: int) -> float:
    """Of Student's t, two-sided, for `CONFIDENCE`."""
    from scipy.special import stdtrit

    return float(stdtrit(degrees, (1 + CONFIDENCE) / 2))


def _timed_stage1(stage1: Callable[[], CacheResult], folder: Path) -> float | None:
    """Seconds of stage 1, kept in the folder for a later run of the demo; None if it was interrupted."""
    storage, name = LocalStorage(folder), "stage1.json"
    start = time.perf_counter()
    result = stage1()
    seconds = time.perf_counter() - start
    if len(result.computed_blocks) == result.total_blocks:
        storage.put(name, json.dumps({"digest": result.manifest.digest, "seconds": seconds}).encode())
    elif result.computed_blocks:
        storage.delete(name)
    record = json.loads(storage.get(name) or b"{}")
    return record["seconds"] if record.get("digest") == result.manifest.digest else None


def demo_report(result: DemoResult, out: Path) -> Path | None:
    """Write a report on the demo's cache and students; None where the extra `report` is not installed."""
    from logitcache.extras.report import write_report
    from logitcache.extras.report.page import check_installed

    try:
        check_installed()
    except UsageError:
        return None
    pipeline = result.experiment.pipeline
    cache = pipeline.cache.path
    return write_report(cache, out, runs=pipeline.runs.path, data=match_data(cache, pipeline)).path
