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
from logitcache.extras.report.formatting import plain_text
from logitcache.extras.report.matched_data import MatchedData, match_data
from logitcache.extras.report.measures import log_softmax
from logitcache.extras.report.teacher import decoded_batches, select_rows
from logitcache.extras.report.trees import node_use
from logitcache.extras.soft_tree import SoftTree
from logitcache.extras.student_export.cost import median_seconds
from logitcache.extras.student_export.metadata import StudentMetadata
from logitcache.extras.student_export.source import exported_metadata, label_source
from logitcache.progress import track
from logitcache.stages.train_student import Row, summarise
from logitcache.train.finished import Run, read_run
from logitcache.train.runs import CONFIG, RESULT

# B batch, I inner nodes, L leaves, M rows, S seeds

AGREEMENT_ROWS = 2_000
"""Rows of one view on which students and teacher are compared, at most."""
AGREEMENT_BLOCKS = 8
RENDERED_BYTES = 2**28
"""Of rendered inputs held for the comparison."""

TeacherPredictions = dict[int, tuple[int, float]]
"""(the teacher's most probable class, its probability) by row."""


@dataclass(frozen=True)
class ComparedStudent:
    """A student's predictions on some rows of one view of the cache."""

    matched: MatchedData
    config: StudentConfig
    weights: str
    """The weights file of the first seed."""
    rows: np.ndarray
    """int64 (M,)."""
    predicted: np.ndarray
    """int64 (S, M): the most probable class, by seed."""
    confidence: np.ndarray
    """float32 (M,): its probability, by the first seed."""
    node_use: np.ndarray | None
    """Of a soft tree: the mean probability of reaching each node, float64 (I + L,), by the first seed."""

    def load(self) -> nn.Module:
        """The model of the first seed, on the CPU, in evaluation mode."""
        return _load(self.matched, self.config, self.weights)


def _load(matched: MatchedData, config: StudentConfig, weights: str) -> nn.Module:
    return resolve_model(config, matched.data, matched.plan, weights=weights, seed=0, trust=matched.trust).eval()


@dataclass
class Student:
    """The runs of one student, one per seed."""

    name: str
    runs: list[Run]
    row: Row
    labels: str
    """The source of its labels."""
    latency_ms: float | None = None
    """Median of forward passes of one sample on one CPU thread."""
    agreement: list[float] | None = None
    """Share of rows with the teacher's most probable class, for each seed."""
    compared: ComparedStudent | None = None
    not_measured: str | None = None
    """Why latency and agreement are missing."""
    exported: StudentMetadata | None = None
    """Of the first run that was exported."""
    not_exported: str | None = None
    """Why the export is not shown."""


@dataclass(frozen=True)
class RunsFound:
    """The contents of a folder of runs."""

    students: list[Student]
    """Best first."""
    teachers: list[Run]
    unfinished: list[str]
    unreadable: list[str]
    agreement_rows: int = 0
    """Rows that agreement was measured on."""
    teacher_predictions: TeacherPredictions = field(default_factory=dict)
    """On these rows."""
    view: int = 0
    """The view that these rows are from."""

    def compared(self) -> list[tuple[Student, ComparedStudent]]:
        """The students that were compared with the teacher, best first."""
        return [(student, student.compared) for student in self.students if student.compared is not None]

    def common_rows(self) -> np.ndarray:
        """The rows that all of them were compared on, int64 (M,), sorted."""
        rows = [compared.rows for _, compared in self.compared()]
        return functools.reduce(np.intersect1d, rows) if rows else np.empty(0, dtype=np.int64)


def find_runs(folder: Path, cache: LogitCache) -> RunsFound:
    """Every run below a folder, not yet measured.

    Raises:
        UsageError: the folder is missing or contains no run.
    """
    if not folder.is_dir():
        raise UsageError(f"--runs {folder}: there is no such folder; expected one that `train-student` wrote runs to")
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
        raise UsageError(f"--runs {folder} contains no run; expected folders with {CONFIG} and {RESULT} below it")
    names = [plain_text(runs[0].result.name) for runs in finished.values()]
    students: list[Student] = []
    for (parent, runs), name in zip(finished.items(), names, strict=True):
        if names.count(name) > 1:
            name = f"{name} ({plain_text(parent.relative_to(folder).as_posix())})"
        runs.sort(key=lambda run: run.result.seed)
        row = summarise(name, [run.result.model_dump() for run in runs])
        student = Student(name, runs, row, _labels(runs[0], cache))
        try:
            student.exported = next(filter(None, map(exported_metadata, runs)), None)
        except UsageError as error:
            student.not_exported = str(error).splitlines()[0]
        students.append(student)
    students.sort(key=lambda student: -(student.row.accuracy_mean or 0.0))
    return RunsFound(students, teachers, unfinished, unreadable)


def _run_folders(folder: Path) -> Iterator[Path]:
    for path, subfolders, files in os.walk(folder):
        subfolders.sort()
        if CONFIG in files:
            yield Path(path)


def _labels(run: Run, cache: LogitCache) -> str:
    kind, identity = label_source(run)
    if kind == "cache":
        return "this cache" if identity == cache.id else f"another cache ({plain_text(identity)[:12]}…)"
    if kind == "true labels":
        student = run.config.get("student")
        loss = student.get("loss") if isinstance(student, dict) else None
        if not isinstance(loss, dict) or loss.get("name") not in ("true_label", "cross_entropy"):
            return "not stated"
    return kind


def measure_students(
    found: RunsFound, cache: LogitCache, location: str, matched: MatchedData | None, view: int, *, trust: bool
) -> RunsFound:
    """Load each student's weights and measure its latency and its agreement with the teacher.

    Args:
        matched: the data to measure on; by default the data of each run's own pipeline.
        view: to measure the agreement on.
    """
    comparison = _Comparison(cache, location, matched, view, trust=trust)
    with track("measuring students", sum(len(student.runs) for student in found.students), unit="runs") as meter:
        for student in found.students:
            try:
                comparison.measure(student)
            except (LogitCacheError, ValidationError) as error:
                student.not_measured = str(error).splitlines()[0]
                student.latency_ms = student.agreement = student.compared = None
            meter.advance(len(student.runs))
    return replace(
        found,
        agreement_rows=comparison.num_rows,
        teacher_predictions=comparison.teacher_predictions,
        view=view,
    )


class _Comparison:
    """What the measurements of all students share: matched data, rendered inputs and the teacher's predictions."""

    def __init__(
        self, cache: LogitCache, location: str, matched: MatchedData | None, view: int, *, trust: bool
    ) -> None:
        self._cache, self._location, self._view, self._trust = cache, location, view, trust
        self._given = matched
        self._matched: dict[str, MatchedData | LogitCacheError] = {}
        self._rendered: dict[str, tuple[np.ndarray, Any]] = {}
        self.teacher_predictions: TeacherPredictions = {}
        self.num_rows = 0

    def measure(self, student: Student) -> None:
        first = student.runs[0]
        matched = self._given or self._data_of(first)
        config = StudentConfig.model_validate(first.config.get("student"))
        rows, inputs = self._inputs(matched, config)
        teacher = np.array([self.teacher_predictions[row][0] for row in rows.tolist()])
        models = [_load(matched, config, _weights(run)) for run in student.runs]
        outputs = [_predictions(model, inputs, len(rows)) for model in models]
        forward = functools.partial(call_model, models[0], part_of(inputs, 0, 1))
        student.latency_ms = 1000 * median_seconds({"torch": forward})["torch"]
        student.agreement = [float((predicted == teacher).mean()) for predicted, _ in outputs]
        student.compared = ComparedStudent(
            matched,
            config,
            _weights(first),
            rows,
            np.stack([predicted for predicted, _ in outputs]),
            outputs[0][1],
            node_use(models[0], inputs) if isinstance(models[0], SoftTree) else None,
        )
        self.num_rows = max(self.num_rows, len(rows))

    def _data_of(self, run: Run) -> MatchedData:
        pipeline = recorded_pipeline(run.folder)
        key = json.dumps([pipeline.data.model_dump(), pipeline.views.model_dump(), pipeline.teacher.model_dump()])
        if key not in self._matched:
            try:
                self._matched[key] = match_data(self._cache, self._location, pipeline, trust=self._trust)
            except LogitCacheError as error:
                self._matched[key] = error
        matched = self._matched[key]
        if isinstance(matched, LogitCacheError):
            raise matched
        return matched

    def _inputs(self, matched: MatchedData, config: StudentConfig) -> tuple[np.ndarray, Any]:
        """(rows, rendered inputs) of a student; shared by students with the same input transform."""
        key = json.dumps([id(matched), config.input])
        if key not in self._rendered:
            index_of_row, views = matched.index_of_row, matched.views(config)
            (rows,) = select_rows(
                self._cache, [self._view], max_rows=AGREEMENT_ROWS, max_blocks=AGREEMENT_BLOCKS
            ).values()
            rows = np.array([row for row in rows.tolist() if row in index_of_row], dtype=np.int64)
            if not len(rows):
                raise UsageError("the local data contains none of the rows that agreement is measured on")
            sample = views[(self._view, index_of_row[int(rows[0])])][1]
            sample_bytes = num_bytes(sample)
            if sample_bytes is None:
                raise UsageError(f"the student's inputs are {type(sample).__name__}s, not tensors")
            rows = rows[:: -(-len(rows) * sample_bytes // RENDERED_BYTES)]
            inputs = views.batch([(self._view, index_of_row[row]) for row in rows.tolist()])
            for batch, logits_BC in decoded_batches(self._cache, self._view, rows):
                p_B, predicted_B = log_softmax(logits_BC).exp().max(dim=1)
                predictions = zip(predicted_B.tolist(), p_B.tolist(), strict=True)
                self.teacher_predictions.update(zip(batch.tolist(), predictions, strict=True))
            self._rendered[key] = rows, inputs
        return self._rendered[key]


def _weights(run: Run) -> str:
    return str(run.folder / "last.safetensors")


def _predictions(model: nn.Module, inputs: Any, count: int) -> tuple[np.ndarray, np.ndarray]:
    """(the most probable class, int64 (M,); its probability, float32 (M,)) of rendered inputs.

    Raises:
        InvalidLogits: NaN.
    """
    predicted, confidence = [], []
    with torch.inference_mode():
        for start in range(0, count, 64):
            logits_BC = model_logits(model, part_of(inputs, start, start + 64))
            p_B, predicted_B = logits_BC.float().softmax(dim=1).max(dim=1)
            predicted.append(predicted_B)
            confidence.append(p_B)
    if torch.cat(confidence).isnan().any():
        raise InvalidLogits("the student returns NaN")
    return torch.cat(predicted).numpy(), torch.cat(confidence).numpy()


def spread(values: Sequence[float]) -> tuple[float, float | None]:
    """(mean, standard deviation between seeds; None for a single one)."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None
