"""Students from a folder of runs: results, learning curves, latency, and agreement with the teacher."""

from __future__ import annotations

import functools
import json
import os
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from pydantic import ValidationError
from torch import nn

from logitcache.cache.reader import LogitCache
from logitcache.catalog.calling import call_model, model_logits
from logitcache.config.build import recorded_pipeline, resolve_model
from logitcache.config.schema import StudentConfig
from logitcache.data.batching import num_bytes
from logitcache.data.loading import part_of
from logitcache.errors import InvalidLogits, LogitCacheError, UsageError
from logitcache.extras.report.fitted import FittedData, fit_data
from logitcache.extras.report.measures import log_softmax
from logitcache.extras.report.teacher import chosen_rows, decoded_batches
from logitcache.extras.report.trees import mean_use
from logitcache.extras.report.words import name_of
from logitcache.extras.soft_tree import SoftTree
from logitcache.extras.student_export.cost import median_seconds
from logitcache.extras.student_export.facts import Product
from logitcache.extras.student_export.source import exported_product
from logitcache.progress import track
from logitcache.stages.train_student import Row, summarise
from logitcache.train.finished import Run, read_run
from logitcache.train.runs import CONFIG, RESULT

# B batch, C classes, I inner nodes, L leaves, M rows, S seeds

AGREEMENT_ROWS = 2_000
"""Rows of one view on which students and teacher are compared, at most."""
AGREEMENT_BLOCKS = 8
RENDERED_BYTES = 2**28
"""Of rendered inputs that are held for it."""

TeacherAnswers = dict[int, tuple[int, float]]
"""(the teacher's first class, its probability) by row."""


@dataclass(frozen=True)
class Compared:
    """What a student says of some rows of one view of the cache."""

    fitted: FittedData
    config: StudentConfig
    weights: str
    """The file of the first seed's."""
    rows: np.ndarray
    """int64 (M,)."""
    predicted: np.ndarray
    """int64 (S, M): the most probable class, by seed."""
    confidence: np.ndarray
    """float32 (M,): its probability, by the first seed."""
    reached: np.ndarray | None
    """Of a soft tree, the mean probability of reaching each node over these rows, float64 (I + L,), likewise."""

    def load(self) -> nn.Module:
        """The first seed's net, on the CPU, in evaluation mode."""
        fitted = self.fitted
        return resolve_model(
            self.config, fitted.data, fitted.plan, weights=self.weights, seed=0, trust=fitted.trust
        ).eval()


@dataclass
class Student:
    """One student's runs, a seed each."""

    name: str
    runs: list[Run]
    row: Row
    labels: str
    """Where its labels came from, in words."""
    latency_ms: float | None = None
    """Median of forward passes of one sample on one thread of the CPU."""
    agreement: list[float] | None = None
    """With the teacher's first class, for each seed."""
    compared: Compared | None = None
    not_measured: str | None = None
    """Why latency and agreement are missing."""
    product: Product | None = None
    """What was exported of the first run that was."""
    not_exported: str | None = None
    """Why what was exported is not shown."""


@dataclass(frozen=True)
class RunsFound:
    """What lies in a folder of runs."""

    students: list[Student]
    teachers: list[Run]
    unfinished: list[str]
    unreadable: list[str]
    agreement_rows: int = 0
    """On which agreement was measured."""
    teacher_answers: TeacherAnswers = field(default_factory=dict)
    """What the teacher says of these."""
    view: int = 0
    """Which view they are of."""

    def compared(self) -> list[tuple[Student, Compared]]:
        """The students that were compared with the teacher, best first."""
        best_first = sorted(self.students, key=lambda student: -(student.row.accuracy_mean or 0.0))
        return [(student, student.compared) for student in best_first if student.compared is not None]

    def common_rows(self) -> np.ndarray:
        """The rows on which all of them were, int64 (M,), sorted."""
        rows = [compared.rows for _, compared in self.compared()]
        return functools.reduce(np.intersect1d, rows) if rows else np.empty(0, dtype=np.int64)


def find_runs(folder: Path, cache: LogitCache) -> RunsFound:
    """Every run under a folder; nothing is measured yet.

    Raises:
        UsageError: no such folder, or no run in it.
    """
    if not folder.is_dir():
        raise UsageError(
            f"--runs {folder}: there is no such folder; expected one that `train-student` left its runs in"
        )
    finished: dict[Path, list[Run]] = {}
    teachers, unfinished, unreadable = [], [], []
    for path in _run_folders(folder):
        name = path.relative_to(folder).as_posix()
        if not (path / RESULT).is_file():
            unfinished.append(name)
            continue
        try:
            run = read_run(path)
        except (OSError, ValueError, yaml.YAMLError):
            unreadable.append(name)
            continue
        if "teacher" in run.config:
            teachers.append(run)
        else:
            finished.setdefault(path.parent, []).append(run)
    if not (finished or teachers or unfinished or unreadable):
        raise UsageError(
            f"--runs {folder} holds no run; expected folders with {CONFIG} and {RESULT} somewhere below it"
        )
    names = [name_of(runs[0].result.name) for runs in finished.values()]
    students: list[Student] = []
    for parent, runs in finished.items():
        name = name_of(runs[0].result.name)
        if names.count(name) > 1:
            name = f"{name} ({name_of(parent.relative_to(folder).as_posix())})"
        runs.sort(key=lambda run: run.result.seed)
        row = summarise(name, [run.result.model_dump() for run in runs])
        student = Student(name, runs, row, _labels(runs[0].config, cache))
        try:
            student.product = next(filter(None, map(exported_product, runs)), None)
        except UsageError as error:
            student.not_exported = str(error).splitlines()[0]
        students.append(student)
    return RunsFound(students, teachers, unfinished, unreadable)


def _run_folders(folder: Path) -> Iterator[Path]:
    for path, subfolders, files in os.walk(folder):
        subfolders.sort()
        if CONFIG in files:
            yield Path(path)


def _labels(config: dict[str, Any], cache: LogitCache) -> str:
    """Where a student's labels came from."""
    source = config.get("labels")
    source = source if isinstance(source, dict) else {}
    if "given" in source:
        return "given by the program"
    if source.get("cache") == cache.id:
        return "this cache"
    if "cache" in source:
        return f"another cache ({name_of(source['cache'])[:12]}…)"
    if "teacher" in source:
        return "the live teacher"
    student = config.get("student")
    loss = student.get("loss") if isinstance(student, dict) else None
    truth_only = isinstance(loss, dict) and loss.get("name") == "true_label"
    return "true labels" if truth_only else "not stated"


def measure_students(
    found: RunsFound, cache: LogitCache, location: str, fitted: FittedData | None, view: int, *, trust: bool
) -> RunsFound:
    """Load each student's weights and measure its latency and its agreement with the teacher.

    Args:
        fitted: the data to measure on; without it each run's own pipeline is asked for its data.
        view: which one the agreement is measured on.
    """
    bench = _Measuring(cache, location, fitted, view, trust=trust)
    with track("measuring students", sum(len(student.runs) for student in found.students), unit="runs") as meter:
        for student in found.students:
            try:
                bench.measure(student)
            except (LogitCacheError, ValidationError) as error:
                student.not_measured = str(error).splitlines()[0]
                student.latency_ms = student.agreement = student.compared = None
            meter.advance(len(student.runs))
    return replace(found, agreement_rows=bench.num_rows, teacher_answers=bench.teacher_answers, view=view)


class _Measuring:
    """What students share while they are measured: data that fits, rendered inputs, the teacher's classes."""

    def __init__(self, cache: LogitCache, location: str, fitted: FittedData | None, view: int, *, trust: bool) -> None:
        self._cache, self._location, self._view, self._trust = cache, location, view, trust
        self._given = fitted
        self._fitted: dict[str, FittedData | LogitCacheError] = {}
        self._rendered: dict[str, tuple[np.ndarray, Any]] = {}
        self.teacher_answers: TeacherAnswers = {}
        self.num_rows = 0

    def measure(self, student: Student) -> None:
        fitted = self._data_of(student.runs[0])
        config = StudentConfig.model_validate(student.runs[0].config.get("student"))
        rows, inputs = self._inputs(fitted, config)
        classes = np.array([self.teacher_answers[row][0] for row in rows.tolist()])
        predicted, confidence, reached = [], np.empty(0, dtype=np.float32), None
        for run in student.runs:
            weights = str(run.folder / "last.safetensors")
            model = resolve_model(config, fitted.data, fitted.plan, weights=weights, seed=0, trust=self._trust).eval()
            labels, sureness = _asked(model, inputs, len(rows))
            predicted.append(labels)
            if run is student.runs[0]:
                forward = functools.partial(call_model, model, part_of(inputs, 0, 1))
                student.latency_ms = 1000 * median_seconds({"torch": forward})["torch"]
                confidence = sureness
                reached = mean_use(model, inputs) if isinstance(model, SoftTree) else None
        student.agreement = [float((classes_of_seed == classes).mean()) for classes_of_seed in predicted]
        first = str(student.runs[0].folder / "last.safetensors")
        student.compared = Compared(fitted, config, first, rows, np.stack(predicted), confidence, reached)
        self.num_rows = max(self.num_rows, len(rows))

    def _data_of(self, run: Run) -> FittedData:
        if self._given is not None:
            return self._given
        pipeline = recorded_pipeline(run.folder)
        key = json.dumps([pipeline.data.model_dump(), pipeline.views.model_dump(), pipeline.teacher.model_dump()])
        if key not in self._fitted:
            try:
                self._fitted[key] = fit_data(self._cache, self._location, pipeline, trust=self._trust)
            except LogitCacheError as error:
                self._fitted[key] = error
        fitted = self._fitted[key]
        if isinstance(fitted, LogitCacheError):
            raise fitted
        return fitted

    def _inputs(self, fitted: FittedData, config: StudentConfig) -> tuple[np.ndarray, Any]:
        """(rows, rendered inputs) as a student takes them; students with the same input share them."""
        key = json.dumps([id(fitted), config.input])
        if key not in self._rendered:
            index_of_row = fitted.index_of_row()
            views = fitted.views(config)
            (rows,) = chosen_rows(
                self._cache, [self._view], max_rows=AGREEMENT_ROWS, max_blocks=AGREEMENT_BLOCKS
            ).values()
            rows = np.array([row for row in rows.tolist() if row in index_of_row], dtype=np.int64)
            if not len(rows):
                raise UsageError("none of the rows that agreement is measured on is among the data at hand")
            sample = views[(self._view, index_of_row[int(rows[0])])][1]
            sample_bytes = num_bytes(sample)
            if sample_bytes is None:
                raise UsageError(f"the student's inputs are {type(sample).__name__}s, not tensors")
            step = -(-len(rows) * sample_bytes // RENDERED_BYTES)
            rows = rows[::step]
            items = [(self._view, index_of_row[row]) for row in rows.tolist()]
            inputs = views.batch(items)
            self._learn_answers(rows)
            self._rendered[key] = rows, inputs
        return self._rendered[key]

    def _learn_answers(self, rows: np.ndarray) -> None:
        for batch, logits_BC in decoded_batches(self._cache, self._view, rows):
            log_p_BC = log_softmax(logits_BC)
            said = zip(log_p_BC.argmax(axis=1).tolist(), np.exp(log_p_BC.max(axis=1)).tolist(), strict=True)
            self.teacher_answers.update(zip(batch.tolist(), said, strict=True))


def _asked(model: nn.Module, inputs: Any, count: int) -> tuple[np.ndarray, np.ndarray]:
    """(the most probable class, int64 (M,); its probability, float32 (M,)) of rendered inputs.

    Raises:
        InvalidLogits: NaN.
    """
    labels, sureness = [], []
    with torch.inference_mode():
        for start in range(0, count, 64):
            logits_BC = model_logits(model, part_of(inputs, start, start + 64))
            probability_B, label_B = logits_BC.float().softmax(dim=1).max(dim=1)
            labels.append(label_B)
            sureness.append(probability_B)
    confidence = torch.cat(sureness)
    if confidence.isnan().any():
        raise InvalidLogits("the student says NaN")
    return torch.cat(labels).numpy(), confidence.numpy()


def spread(values: Sequence[float]) -> tuple[float, float | None]:
    """(mean, standard deviation between seeds; None for a single one)."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None
