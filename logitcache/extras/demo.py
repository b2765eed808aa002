"""The whole story on embedded real data: one teacher, one cache, one small student trained five ways."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from logitcache.cache.reader import LogitCache, open_cache
from logitcache.config.schema import Pipeline, load_pipeline
from logitcache.data.index import split_index
from logitcache.data.views import ViewDataset, ViewPlan
from logitcache.extras.report import check_installed, write_report
from logitcache.stages.cache_teacher import cache_teacher
from logitcache.stages.train_student import Experiment, Row, summarise
from logitcache.stages.train_teacher import train_teacher
from logitcache.train.loop import train

# B batch, C classes


@dataclass(frozen=True)
class DemoResult:
    """The table, and what it says."""

    rows: list[Row]
    teacher_accuracy: float
    findings: list[str]
    cache_path: str
    report_path: str


def embedded_pipeline(overrides: Sequence[str] = ()) -> Pipeline:
    """`pipelines/mnist5k.yaml`, from the checkout or from inside the installed package."""
    here = Path(__file__).parent
    checkout = here.parent / "pipelines" / "mnist5k.yaml"
    return load_pipeline(checkout if checkout.is_file() else here / "catalog" / "mnist5k.yaml", overrides)


def run_demo(folder: Path, overrides: Sequence[str] = ()) -> DemoResult:
    """Teacher, cache, and the same student five ways with every seed; what is done already is not repeated."""
    paths = [f"runs.path={folder}/runs", f"cache.path={folder}/views.cache"]
    pipeline = embedded_pipeline([*paths, *overrides])
    check_installed()  # now, rather than after minutes of training
    teacher = train_teacher(pipeline)
    cache_teacher(pipeline)
    clean = pipeline.model_copy(
        update={
            "views": pipeline.views.model_copy(update={"transform": None, "mixup": 0.0, "cutmix": 0.0, "count": 1}),
            "cache": pipeline.cache.model_copy(update={"path": f"{folder}/clean.cache"}),
        }
    )
    cache_teacher(clean)

    bench = Experiment(pipeline)
    clean_labels = CleanLabels(open_cache(clean.cache.path), bench.plan, bench.device)
    # The mistake is no pipeline's business: nothing but this demonstration can ask for it.
    mismatched = pipeline.student(MATCHED).model_copy(update={"name": MISMATCHED})
    students = [
        pipeline.student(TENTH),
        pipeline.student(ALL),
        mismatched,
        pipeline.student(MATCHED),
        pipeline.student(LIVE),
    ]
    results: dict[str, list[dict[str, Any]]] = {student.name: [] for student in students}
    for seed in pipeline.train.seeds:  # students side by side, so that a slow minute of the machine hits all of them
        for student in students:
            labels = clean_labels if student.name == MISMATCHED else None
            results[student.name].append(train(bench.job(student, seed, labels=labels)))
    rows = [summarise(name, runs) for name, runs in results.items()]
    report = write_report(pipeline.cache.path, folder / "report.html", runs=pipeline.runs.path, data=pipeline)
    return DemoResult(
        rows, teacher["accuracy"], findings({row.name: row for row in rows}), pipeline.cache.path, str(report.path)
    )


TENTH, ALL, MISMATCHED, MATCHED, LIVE = (
    "true-labels-of-a-tenth",
    "true-labels-of-all",
    "labels-of-one-clean-view",
    "labels-of-matching-views",
    "live-teacher",
)
"""Four students of `pipelines/mnist5k.yaml`, and the third, which only this demonstration trains."""


class CleanLabels:
    """Everybody's mistake, made as well as it can be: labels of the clean image for whatever it was augmented to.

    The labels of mixed samples are mixed in proportion, as a practitioner would; only the augmentation is unseen.
    """

    needs_teacher_inputs = False

    def __init__(self, clean: LogitCache, plan: ViewPlan, device: torch.device) -> None:
        self._labels = clean.view(0, device)
        self._plan = plan
        self._num_samples = clean.num_samples
        self._device = device
        self._view = 0

    def start_view(self, view: int, following: int | None) -> None:
        self._view = view

    def check_batch(self, index: Tensor, inputs: Any, views: ViewDataset) -> None:
        """Nothing to compare: that these inputs are not what the teacher was given is the point."""

    def logits(self, index: Tensor, teacher_inputs: Any, targets: Tensor) -> Tensor:
        rows = split_index(index)[1]
        mixtures = [self._plan.mixture(self._view, row, self._num_samples) for row in rows.tolist()]
        partners = torch.tensor(
            [row if m is None else m.partner for row, m in zip(rows.tolist(), mixtures, strict=True)]
        )
        weights_B1 = torch.tensor([[1.0 if m is None else m.weight] for m in mixtures], device=self._device)
        own_BC = self._labels.logits(rows).softmax(dim=1)
        other_BC = self._labels.logits(partners).softmax(dim=1)
        return (weights_B1 * own_BC + (1 - weights_B1) * other_BC).log()


def findings(rows: dict[str, Row]) -> list[str]:
    """What the table says, in sentences; what does not hold is said as it is."""
    matched = rows[MATCHED]
    lines = [
        _compare("Matching views", matched, "a tenth's true labels", rows[TENTH]),
        _compare("Matching views", matched, "one clean view's labels", rows[MISMATCHED]),
        _compare("Matching views", matched, "true labels of all", rows[ALL]),
        _compare("Matching views", matched, "the live teacher", rows[LIVE]),
    ]
    for name, row in (("a labels-only epoch", rows[ALL]), ("an epoch with the live teacher", rows[LIVE])):
        if matched.epoch_seconds and row.epoch_seconds:
            ratio = matched.epoch_seconds / row.epoch_seconds
            lines.append(f"An epoch from the cache takes {ratio:.2f} of {name}.")
    return lines


def _compare(name: str, row: Row, other_name: str, other: Row) -> str:
    if row.accuracy_mean is None or other.accuracy_mean is None:
        return f"{name} against {other_name}: no test split to compare on."
    difference = 100 * (row.accuracy_mean - other.accuracy_mean)
    if row.accuracy_sd is None or other.accuracy_sd is None:
        return f"{name} against {other_name}: {difference:+.2f} points (one seed, no spread)."
    error = 100 * math.sqrt(row.accuracy_sd**2 / len(row.seeds) + other.accuracy_sd**2 / len(other.seeds))
    verdict = "more than two standard errors" if abs(difference) > 2 * error else "within two standard errors"
    return f"{name} against {other_name}: {difference:+.2f} points, {verdict} (standard error {error:.2f})."
