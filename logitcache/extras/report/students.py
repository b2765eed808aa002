"""Students from a folder of runs: results, learning curves, latency, and agreement with the teacher."""

from __future__ import annotations

import functools
import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from pydantic import ValidationError
from torch import nn

from logitcache.cache.reader import LogitCache
from logitcache.catalog.calling import call_model, model_logits
from logitcache.config.schema import StudentConfig
from logitcache.data.batching import num_bytes
from logitcache.data.loading import part_of
from logitcache.errors import InvalidLogits, LogitCacheError, UsageError
from logitcache.extras.report.formatting import plain_text
from logitcache.extras.report.measures import log_softmax
from logitcache.extras.report.teacher import decoded_batches, select_rows
from logitcache.extras.report.trees import node_use
from logitcache.extras.soft_tree import SoftTree
from logitcache.extras.student_export.cost import median_seconds
from logitcache.extras.student_export.metadata import StudentMetadata
from logitcache.extras.student_export.source import exported_metadata, label_source
from logitcache.progress import track
from logitcache.stages.matched_data import MatchedData
from logitcache.stages.train_student import Row, summarise
from logitcache.train.finished import Run, read_run
from logitcache.train.runs import CONFIG, RESULT
from logitcache.train.table import spread

# B batch, I inner nodes, L leaves, M rows, S seeds

AGREEMENT_ROWS = 2_000
"""Rows of one view on which students and teacher are compared, at most."""
AGREEMENT_BLOCKS = 8
RENDERED_BYTES = 2**28
"""Of rendered inputs held for the comparison."""


@dataclass(frozen=True)
class Score:
    """The measure by which the charts compare students."""

    name: str
    """Of the result's field; the field of a learning curve is `validation_` and this name."""
    heading: str
    title: str
    axis_format: str
    """As d3-format, like that of the tooltip."""
    tooltip_format: str
    filter: str
    """Of the templates, for text and tables."""
    largest: float
    """The largest possible value."""


ACCURACY = Score("accuracy", "Accuracy", "accuracy", "~%", ".2%", "percent", 1.0)
NLL = Score("nll", "NLL", "NLL, nats per row", "~g", ".4f", "decimal", math.inf)


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
        return self.matched.model(self.config, self.weights)


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

    @property
    def agreement_spread(self) -> tuple[float | None, float | None]:
        """(mean, standard deviation between seeds) of the agreement; of sequences that of the runs' evaluation."""
        if self.agreement is None:
            return self.row.teacher_agreement_mean, self.row.teacher_agreement_sd
        return spread(self.agreement)

    def headline(self) -> dict[str, Any]:
        """The main numbers, as JSON."""
        return {
            "name": self.name,
            "accuracy_mean": self.row.accuracy_mean,
            "accuracy_sd": self.row.accuracy_sd,
            "epoch_seconds": self.row.epoch_seconds,
            "latency_ms": self.latency_ms,
            "agreement_mean": self.agreement_spread[0],
            **({} if self.row.nll_mean is None else {"nll_mean": self.row.nll_mean, "nll_sd": self.row.nll_sd}),
            **({} if self.row.teacher_kl_mean is None else {"teacher_kl_mean": self.row.teacher_kl_mean}),
        }


@dataclass
class RunsFound:
    """The contents of a folder of runs."""

    students: list[Student]
    """Best first."""
    teachers: list[Run]
    unfinished: list[str]
    unreadable: list[str]
    agreement_rows: int = 0
    """Rows that agreement was measured on."""
    teacher_predictions: dict[int, tuple[int, float]] = field(default_factory=dict)
    """(the teacher's most probable class, its probability) on these rows."""
    view: int = 0
    """The view that these rows are from."""

    @property
    def score(self) -> Score:
        """The NLL if every student has one, as for sequences; else the accuracy."""
        of_sequences = self.students and all(student.row.nll_mean is not None for student in self.students)
        return NLL if of_sequences else ACCURACY

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
    found = RunsFound([], [], [], [])
    for path in sorted(Path(path) for path, _, files in os.walk(folder) if CONFIG in files):
        name = path.relative_to(folder).as_posix()
        if not (path / RESULT).is_file():
            found.unfinished.append(name)
            continue
        try:
            run = read_run(path)
        except (OSError, ValueError, yaml.YAMLError):
            found.unreadable.append(name)
            continue
        if "teacher" in run.config:
            found.teachers.append(run)
        else:
            finished.setdefault(path.parent, []).append(run)
    if not (finished or found.teachers or found.unfinished or found.unreadable):
        raise UsageError(f"--runs {folder} contains no run; expected folders with {CONFIG} and {RESULT} below it")
    names = [plain_text(runs[0].result.name) for runs in finished.values()]
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
        found.students.append(student)
    found.students.sort(key=_order)
    return found


def _order(student: Student) -> float:
    """Sorts the best student first: by likelihood for sequences, else by accuracy."""
    row = student.row
    return -(row.accuracy_mean or 0.0) if row.nll_mean is None else row.nll_mean


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
    found: RunsFound, cache: LogitCache, view: int, data_of_run: Callable[[Path], MatchedData]
) -> None:
    """Load each student's weights and measure its latency and its agreement with the teacher.

    Args:
        found: the measurements are added to it.
        cache: of the teacher.
        view: to measure the agreement on.
        data_of_run: returns the data to measure a run on, from the run's folder.
    """
    found.view = view
    inputs = _SharedInputs(found, cache)
    with track("measuring students", sum(len(student.runs) for student in found.students), unit="runs") as meter:
        for student in found.students:
            try:
                _measure(student, data_of_run(student.runs[0].folder), inputs, found)
            except (LogitCacheError, ValidationError) as error:
                student.not_measured = str(error).splitlines()[0]
            meter.advance(len(student.runs))


def _measure(student: Student, matched: MatchedData, inputs_of: _SharedInputs, found: RunsFound) -> None:
    if not matched.cache.row_map.one_each:
        raise UsageError(
            "their samples have several rows; `evaluation.teacher` of the pipeline compares such students with the "
            "teacher on held-out data"
        )
    config = StudentConfig.model_validate(student.runs[0].config.get("student"))
    rows, inputs = inputs_of(matched, config)
    teacher = np.array([found.teacher_predictions[row][0] for row in rows.tolist()])
    weights = [str(run.folder / "last.safetensors") for run in student.runs]
    models = [matched.model(config, file) for file in weights]
    predicted, confidence = zip(*(_predictions(model, inputs, len(rows)) for model in models), strict=True)
    use = node_use(models[0], inputs) if isinstance(models[0], SoftTree) else None
    forward = functools.partial(call_model, models[0], part_of(inputs, 0, 1))
    student.latency_ms = 1000 * median_seconds({"torch": forward})["torch"]
    student.agreement = [float((each == teacher).mean()) for each in predicted]
    student.compared = ComparedStudent(matched, config, weights[0], rows, np.stack(predicted), confidence[0], use)
    found.agreement_rows = max(found.agreement_rows, len(rows))


class _SharedInputs:
    """Rendered inputs; students with the same input transform share them. Adds the teacher's predictions on them."""

    def __init__(self, found: RunsFound, cache: LogitCache) -> None:
        self._found, self._cache = found, cache
        self._rendered: dict[str, tuple[np.ndarray, Any]] = {}

    def __call__(self, matched: MatchedData, config: StudentConfig) -> tuple[np.ndarray, Any]:
        """(rows, rendered inputs)."""
        key = json.dumps([id(matched), config.input])
        if key not in self._rendered:
            self._rendered[key] = self._render(matched, config)
        return self._rendered[key]

    def _render(self, matched: MatchedData, config: StudentConfig) -> tuple[np.ndarray, Any]:
        cache, view = self._cache, self._found.view
        index_of_row, views = matched.index_of_row, matched.views(config)
        (rows,) = select_rows(cache, [view], max_rows=AGREEMENT_ROWS, max_blocks=AGREEMENT_BLOCKS).values()
        rows = np.array([row for row in rows.tolist() if row in index_of_row], dtype=np.int64)
        if not len(rows):
            raise UsageError("the local data contains none of the rows that agreement is measured on")
        sample = views[(view, index_of_row[int(rows[0])])][1]
        sample_bytes = num_bytes(sample)
        if sample_bytes is None:
            raise UsageError(f"the student's inputs are {type(sample).__name__}s, not tensors")
        rows = rows[:: -(-len(rows) * sample_bytes // RENDERED_BYTES)]
        for batch, logits_BC in decoded_batches(cache, view, rows):
            p_B, predicted_B = log_softmax(logits_BC).exp().max(dim=1)
            predictions = zip(predicted_B.tolist(), p_B.tolist(), strict=True)
            self._found.teacher_predictions.update(zip(batch.tolist(), predictions, strict=True))
        return rows, views.batch([(view, index_of_row[row]) for row in rows.tolist()])


def _predictions(model: nn.Module, inputs: Any, count: int) -> tuple[np.ndarray, np.ndarray]:
    """(the most probable class, int64 (M,); its probability, float32 (M,)) of rendered inputs.

    Raises:
        InvalidLogits: NaN.
    """
    with torch.inference_mode():
        batches = [model_logits(model, part_of(inputs, start, start + 64)).float() for start in range(0, count, 64)]
        confidence, predicted = torch.cat(batches).softmax(dim=1).max(dim=1)
    if confidence.isnan().any():
        raise InvalidLogits("the student returns NaN")
    return predicted.numpy(), confidence.numpy()
