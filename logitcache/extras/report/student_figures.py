"""The table of students and their figures: accuracy against cost, learning curves, agreement with the teacher."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from rich.filesize import decimal as size

from logitcache.extras.report import charts
from logitcache.extras.report.charts import Columns, Figure, Table
from logitcache.extras.report.formatting import MISSING, ClassNames, count, decimal, number, percent, with_spread
from logitcache.extras.report.measures import means_by
from logitcache.extras.report.students import ComparedStudent, RunsFound, Student
from logitcache.extras.student_export.metadata import StudentMetadata

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
    teacher = found.teachers[0].result.accuracy if len(found.teachers) == 1 else None
    figures = {
        "accuracy-parameters": _cost(students, teacher, "parameters", "~s", lambda each: float(each.row.parameters)),
        "accuracy-latency": _cost(students, teacher, "latency, ms", "~g", lambda each: each.latency_ms),
        "accuracy-epoch": _cost(students, teacher, "seconds per epoch", "~g", lambda each: each.row.epoch_seconds),
        "curve-validation-accuracy": _curve(students, "validation_accuracy", "validation accuracy", "~%", percent),
        "curve-loss": _curve(students, "loss", "loss", "~g", decimal),
        "agreement-classes": agreement_figure(found, [each.name for each in students], names, num_classes),
    }
    return {name: figure for name, figure in figures.items() if figure is not None}


def students_table(found: RunsFound) -> Table:
    """Results, costs and labels of every student and of the teachers; numbers of exports where there are any."""
    columns = [
        "student", "test accuracy", "agreement with the teacher", "parameters", "latency, ms", "seconds per epoch",
        "samples", "seeds", "labels from", "MACs", "file size", "int8 accuracy",
    ]  # fmt: skip
    rows = [
        [
            student.name,
            with_spread(student.row.accuracy_mean, student.row.accuracy_sd),
            with_spread(*student.agreement_spread),
            count(student.row.parameters),
            decimal(student.latency_ms),
            decimal(student.row.epoch_seconds),
            count(student.row.samples),
            str(len(student.row.seeds)),
            student.labels,
            *_exported(student.exported),
        ]
        for student in found.students
    ]
    for result in (run.result for run in found.teachers):
        costs = [count(result.parameters), MISSING, decimal(result.epoch_seconds), count(result.samples)]
        rows.append(["teacher", percent(result.accuracy), MISSING, *costs, "1", "true labels", *[MISSING] * 3])
    shown = len(columns) if any(student.exported for student in found.students) else len(columns) - 3
    return Table(columns[:shown], [row[:shown] for row in rows])


def _exported(exported: StudentMetadata | None) -> list[str]:
    """MACs, file sizes and int8 accuracy of an export."""
    if exported is None:
        return [MISSING] * 3
    sizes = [f"{form.name} {size(form.bytes)}" for form in exported.variants if form.bytes is not None]
    int8, float32 = exported.variant("onnx int8"), exported.variant("torch")
    accuracy = MISSING if int8 is None else percent(int8.test_accuracy)
    if int8 is not None and float32 is not None:
        accuracy += f" (float32 {percent(float32.test_accuracy)})"
    return [count(exported.macs), ", ".join(sizes) or MISSING, accuracy]


def _cost(
    students: list[Student],
    teacher: float | None,
    quantity: str,
    axis_format: str,
    cost_of: Callable[[Student], float | None],
) -> Figure | None:
    rows: list[dict[str, Any]] = []
    for student in students:
        accuracy, deviation, cost = student.row.accuracy_mean, student.row.accuracy_sd or 0.0, cost_of(student)
        if accuracy is not None and cost is not None:
            low, high = max(0.0, accuracy - deviation), min(1.0, accuracy + deviation)
            rows.append({"student": student.name, "value": cost, "accuracy": accuracy, "low": low, "high": high})
    if not rows:
        return None
    names = [student.name for student in students]
    spec = charts.accuracy_against(rows, students=names, title=quantity, axis_format=axis_format, teacher=teacher)
    columns: Columns = {
        "student": ("student", str),
        quantity: ("value", number),
        "test accuracy": ("accuracy", percent),
    }
    notes = {"best": rows[0], "cheapest": min(rows, key=lambda row: float(row["value"]))}
    return Figure(spec, Table.of(rows, columns), notes)


def _curve(
    students: list[Student], quantity: str, title: str, axis_format: str, form: Callable[[float], str]
) -> Figure | None:
    curves = [curve for student in students if (curve := _mean_curve(student, quantity))]
    if not curves:
        return None
    # Thinned from the end, so that the last point stays.
    rows = [point for curve in curves for point in curve[::-1][:: -(-len(curve) // MAX_POINTS)][::-1]]
    names = [student.name for student in students]
    columns: Columns = {
        "student": ("student", str),
        "steps": ("step", count),
        f"mean {title}": ("mean", form),
        "lowest seed": ("low", form),
        "highest seed": ("high", form),
    }
    ends = sorted((curve[-1] for curve in curves), key=lambda end: float(end["mean"]))
    spec = charts.learning_curves(rows, students=names, title=title, axis_format=axis_format)
    return Figure(spec, Table.of(rows, columns), {"lowest": ends[0], "highest": ends[-1]})


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
        drawn: names of the students that are drawn, in the order of their colours.
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
    cells = [[names[label], count(int(counts_C[label])), *map(percent, by_student[:, label])] for label in lowest]
    low, high = (
        {"name": names[label], "value": float(mean_C[label]), "rows": int(counts_C[label])}
        for label in (lowest[0], int(seen[np.argmax(mean_C[seen])]))
    )
    return Figure(
        charts.shares_by_class(points, students=drawn, title="agreement with the teacher"),
        Table(["class", "rows", *(student.name for student, _ in students)], cells),
        {"rows": len(rows), "shown": len(lowest), "seen": len(seen), "lowest": low, "highest": high},
    )


def _by_class(compared: ComparedStudent, rows: np.ndarray, label_M: np.ndarray, num_classes: int) -> np.ndarray:
    """Agreement by the teacher's class, float64 (C,), mean over seeds; NaN for a class without rows."""
    predicted_SM = compared.predicted[:, np.searchsorted(compared.rows, rows)]
    return np.asarray(means_by(label_M, (predicted_SM == label_M).mean(axis=0), num_classes)[0])
