"""Figures about students: accuracy or NLL against cost, learning curves, agreement with the teacher."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from logitcache.extras.report import charts
from logitcache.extras.report.charts import Figure
from logitcache.extras.report.formatting import ClassNames
from logitcache.extras.report.students import ComparedStudent, RunsFound, Score, Student
from logitcache.train.reliability import means_by

# C classes, M rows, S seeds

MAX_SERIES = 12
"""Students that are drawn; all are in the table."""
MAX_POINTS = 40
"""Of one learning curve; longer curves are thinned evenly."""
LOWEST = 20
"""Classes shown, those with the lowest agreement."""


def student_figures(found: RunsFound, names: ClassNames, num_classes: int) -> dict[str, Figure]:
    """The figures for which there are values."""
    students = found.students[:MAX_SERIES]
    score = found.score
    teacher = getattr(found.teachers[0].result, score.name) if len(found.teachers) == 1 else None
    figures = {
        "score-parameters": _cost(students, score, teacher, "parameters", "~s", lambda it: float(it.row.parameters)),
        "score-latency": _cost(students, score, teacher, "latency, ms", "~g", lambda it: it.latency_ms),
        "score-epoch": _cost(students, score, teacher, "seconds per epoch", "~g", lambda it: it.row.epoch_seconds),
        "curve-validation": _curve(
            students, f"validation_{score.name}", f"validation {score.title}", score.axis_format
        ),
        "curve-loss": _curve(students, "loss", "loss", "~g"),
        "agreement-classes": agreement_figure(found, [each.name for each in students], names, num_classes),
    }
    return {name: figure for name, figure in figures.items() if figure is not None}


def _cost(
    students: list[Student],
    score: Score,
    teacher: float | None,
    quantity: str,
    axis_format: str,
    cost_of: Callable[[Student], float | None],
) -> Figure | None:
    rows: list[dict[str, Any]] = []
    for student in students:
        mean, deviation = getattr(student.row, f"{score.name}_mean"), getattr(student.row, f"{score.name}_sd") or 0.0
        cost = cost_of(student)
        if mean is not None and cost is not None:
            low, high = max(0.0, mean - deviation), min(score.largest, mean + deviation)
            rows.append({"student": student.name, "value": cost, "score": mean, "low": low, "high": high})
    if not rows:
        return None
    names = [student.name for student in students]
    spec = charts.score_against(
        rows,
        students=names,
        title=quantity,
        axis_format=axis_format,
        score=f"test {score.title}",
        score_format=score.axis_format,
        tooltip_format=score.tooltip_format,
        teacher=teacher,
    )
    notes = {"best": rows[0], "cheapest": min(rows, key=lambda row: float(row["value"]))}
    return Figure(spec, rows, notes)


def _curve(students: list[Student], quantity: str, title: str, axis_format: str) -> Figure | None:
    curves = [curve for student in students if (curve := _mean_curve(student, quantity))]
    if not curves:
        return None
    # Thinned from the end, so that the last point stays.
    rows = [point for curve in curves for point in curve[::-1][:: -(-len(curve) // MAX_POINTS)][::-1]]
    names = [student.name for student in students]
    ends = sorted((curve[-1] for curve in curves), key=lambda end: float(end["mean"]))
    description = f"{title} during training, a line for each student"
    spec = charts.chart("curves", rows, students=names, title=title, format=axis_format, description=description)
    return Figure(spec, rows, {"lowest": ends[0], "highest": ends[-1]})


def _mean_curve(student: Student, quantity: str) -> list[dict[str, Any]]:
    """Mean, minimum and maximum over seeds, of each epoch that all runs have."""
    curves = [{point.epoch: point for point in run.curve} for run in student.runs]
    points = []
    for epoch in sorted(set.intersection(*(set(curve) for curve in curves))):
        values = [getattr(curve[epoch], quantity) for curve in curves]
        if None not in values:
            mean, low, high = statistics.fmean(values), min(values), max(values)
            step = curves[0][epoch].step
            points.append({"student": student.name, "step": step, "mean": mean, "low": low, "high": high})
    return points


def agreement_figure(found: RunsFound, drawn: Sequence[str], names: ClassNames, num_classes: int) -> Figure | None:
    """The share of rows on which a student predicts the teacher's class, by the teacher's class.

    Args:
        found: after the measurements.
        drawn: names of the students that are drawn, in the order of their colors.
        names: of the classes.
        num_classes: C.
    """
    students = [(student, compared) for student, compared in found.compared() if student.name in drawn]
    rows = found.common_rows()
    if not students or not len(rows):
        return None
    label_M = np.array([found.teacher_predictions[row][0] for row in rows.tolist()])
    counts_C = np.bincount(label_M, minlength=num_classes)
    seen = np.flatnonzero(counts_C)
    by_student = np.stack([_by_class(compared, rows, label_M, num_classes) for _, compared in students])
    mean_C = by_student.mean(axis=0)
    lowest = seen[np.argsort(mean_C[seen], kind="stable")][:LOWEST].tolist()
    points = [
        {"name": names[label], "student": student.name, "value": float(share), "rows": int(counts_C[label])}
        for label in lowest
        for (student, _), share in zip(students, by_student[:, label], strict=True)
    ]
    rows_of_table, [highest] = (
        [
            {"name": names[label], "rows": int(counts_C[label]), "mean": float(mean_C[label])}
            | dict(enumerate(by_student[:, label].tolist()))
            for label in labels
        ]
        for labels in (lowest, [int(seen[np.argmax(mean_C[seen])])])
    )
    spec = charts.chart("agreement", points, names=[names[label] for label in lowest], students=drawn)
    compared = [student.name for student, _ in students]
    notes = {"rows": len(rows), "seen": len(seen), "highest": highest, "students": compared}
    return Figure(spec, rows_of_table, notes)


def _by_class(compared: ComparedStudent, rows: np.ndarray, label_M: np.ndarray, num_classes: int) -> np.ndarray:
    """Agreement by the teacher's class, float64 (C,), mean over seeds; NaN for a class without rows."""
    predicted_SM = compared.predicted[:, np.searchsorted(compared.rows, rows)]
    return np.asarray(means_by(label_M, (predicted_SM == label_M).mean(axis=0), num_classes)[0])
