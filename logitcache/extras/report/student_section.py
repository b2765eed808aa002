"""The page's sections on students: results, accuracy against cost, learning curves, agreement by class, soft trees."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np
from rich.filesize import decimal as size

from logitcache.extras.report import charts, measures
from logitcache.extras.report.decision_views import ChosenSample, inputs_of
from logitcache.extras.report.figures import Figure, Section, Table
from logitcache.extras.report.formatting import (
    MISSING,
    ClassNames,
    count,
    counted,
    decimal,
    percent,
    plain_text,
    with_spread,
)
from logitcache.extras.report.students import ComparedStudent, RunsFound, Student, spread
from logitcache.extras.report.trees import draw_tree, most_probable_paths
from logitcache.extras.soft_tree import SoftTree
from logitcache.train.finished import Run

# C classes, M rows, S seeds

MAX_SERIES = 12
"""Students that are drawn; all are in the table."""
MAX_POINTS = 40
"""Of one learning curve; longer curves are thinned evenly."""
LOWEST = 20
"""Classes shown, those with the lowest agreement."""
MAX_TREES = 4


def student_section(found: RunsFound, class_names: ClassNames, num_classes: int) -> Section:
    """The students of a folder of runs."""
    section = Section("students", "Students", _lead(found))
    drawn = found.students[:MAX_SERIES]
    if found.students or found.teachers:
        section.tables.append(("Students, best first, and their teacher", _table(found.students, found.teachers)))
    section.series = [student.name for student in drawn]
    teacher = found.teachers[0].result.accuracy if len(found.teachers) == 1 else None
    figures = (
        _cost_figure(drawn, "parameters", "Accuracy against size", "parameters", "~s", teacher),
        _cost_figure(drawn, "latency", "Accuracy against latency", "latency, ms", "~g", teacher),
        _cost_figure(drawn, "epoch", "Accuracy against training time", "seconds per epoch", "~g", teacher),
        _curve_figure(drawn, "validation_accuracy", "Validation accuracy during training", "validation accuracy", "~%"),
        _curve_figure(drawn, "loss", "Training loss", "loss", "~g"),
        agreement_figure(found, section.series, class_names, num_classes),
    )
    section.figures += [figure for figure in figures if figure is not None]
    return section


def _lead(found: RunsFound) -> list[str]:
    students = found.students
    lead = ["No student run is finished."]
    if students:
        runs = sum(len(student.runs) for student in students)
        lead = [
            f"{counted(len(students), 'student')} in {counted(runs, 'finished run')}; accuracy on the test split, mean "
            "± standard deviation over seeds."
        ]
    if found.agreement_rows:
        lead.append(
            "Agreement: share of rows on which student and teacher have the same most probable class, on "
            f"{count(found.agreement_rows)} rows of one cached view of the training samples. Latency: median of "
            "forward passes of one sample on one CPU thread of the machine that wrote this page."
        )
    for reason in dict.fromkeys(student.not_measured for student in students if student.not_measured):
        names = ", ".join(student.name for student in students if student.not_measured == reason)
        lead.append(f"Latency and agreement of {plain_text(names, 200)} are not measured: {plain_text(reason, 300)}")
    if any(student.exported for student in students):
        lead.append(
            "For exported students: multiply-accumulates (MACs) of matrix products and convolutions per sample, file "
            "sizes, and test accuracy in int8 with the float32 accuracy of the same seed."
        )
    for student in students:
        if student.not_exported:
            lead.append(f"The export of {student.name} is left out: {plain_text(student.not_exported, 300)}")
    for what, left_out in (("Not finished", found.unfinished), ("Not readable", found.unreadable)):
        if left_out:
            lead.append(f"{what}, and left out: {plain_text(', '.join(left_out), 300)}.")
    if len(students) > MAX_SERIES:
        lead.append(f"The {MAX_SERIES} best are drawn; all are in the table.")
    return lead


def _table(students: list[Student], teachers: list[Run]) -> Table:
    columns = [
        "student", "test accuracy", "agreement with the teacher", "parameters", "latency, ms", "seconds per epoch",
        "samples", "seeds", "labels from",
    ]  # fmt: skip
    with_exports = any(student.exported for student in students)
    if with_exports:
        columns += ["MACs", "file size", "int8 accuracy"]
    rows = [
        [
            student.name,
            with_spread(student.row.accuracy_mean, student.row.accuracy_sd),
            MISSING if student.agreement is None else with_spread(*spread(student.agreement)),
            count(student.row.parameters),
            decimal(student.latency_ms),
            decimal(student.row.epoch_seconds),
            count(student.row.samples),
            str(len(student.row.seeds)),
            student.labels,
            *_exported(student),
        ]
        for student in students
    ]
    rows += [
        ["teacher", percent(run.result.accuracy), MISSING, count(run.result.parameters), MISSING,
         decimal(run.result.epoch_seconds), count(run.result.samples), "1", "true labels", *[MISSING] * 3]
        for run in teachers
    ]  # fmt: skip
    return Table(columns, [row[: len(columns)] for row in rows])


def _exported(student: Student) -> list[str]:
    """MACs, file sizes and int8 accuracy of the export."""
    exported = student.exported
    if exported is None:
        return [MISSING] * 3
    sizes = [f"{form.name} {size(form.bytes)}" for form in exported.variants if form.bytes is not None]
    int8, float32 = exported.variant("onnx int8"), exported.variant("torch")
    accuracy = MISSING if int8 is None else percent(int8.test_accuracy)
    if int8 is not None and float32 is not None:
        accuracy += f" (float32 {percent(float32.test_accuracy)})"
    return [count(exported.macs), ", ".join(sizes) or MISSING, accuracy]


def _cost(student: Student, kind: str) -> float | None:
    if kind == "parameters":
        return float(student.row.parameters)
    return student.latency_ms if kind == "latency" else student.row.epoch_seconds


def _shown(cost: float) -> str:
    return count(int(cost)) if cost.is_integer() else decimal(cost)


def _cost_figure(
    students: list[Student], kind: str, title: str, quantity: str, axis_format: str, teacher: float | None
) -> Figure | None:
    rows: list[dict[str, Any]] = []
    for student in students:
        accuracy, deviation, cost = student.row.accuracy_mean, student.row.accuracy_sd or 0.0, _cost(student, kind)
        if accuracy is None or cost is None:
            continue
        low, high = max(0.0, accuracy - deviation), min(1.0, accuracy + deviation)
        rows.append({"student": student.name, "value": cost, "accuracy": accuracy, "low": low, "high": high})
    if not rows:
        return None
    unit = {"parameters": "parameters", "latency": "ms per sample", "epoch": "seconds per epoch"}[kind]
    extremes = {"Best": rows[0], "Cheapest": min(rows, key=lambda row: float(row["value"]))}
    caption = " ".join(
        f"{what}: {row['student']}, {percent(row['accuracy'])} at {_shown(row['value'])} {unit}."
        for what, row in extremes.items()
    )
    costs = [row["value"] for row in rows]
    spec = charts.accuracy_against(
        rows, title=quantity, axis_format=axis_format, teacher=teacher,
        logarithmic=min(costs) > 0 and max(costs) > 10 * min(costs),
        students=[student.name for student in students],
    )  # fmt: skip
    table = Table(
        ["student", quantity, "test accuracy"],
        [[row["student"], _shown(row["value"]), percent(row["accuracy"])] for row in rows],
    )
    return Figure(f"accuracy-{kind}", title, caption, spec, table)


def _curve_figure(students: list[Student], quantity: str, title: str, axis: str, axis_format: str) -> Figure | None:
    curves = [curve for student in students if (curve := _mean_curve(student, quantity))]
    if not curves:
        return None
    rows = [point for curve in curves for point in _thinned(curve)]
    shown = decimal if quantity == "loss" else percent
    caption = "Mean loss of each epoch. Values of students with different losses are not comparable."
    if quantity != "loss":
        ends = [curve[-1] for curve in curves]
        highest, lowest = max(ends, key=lambda end: float(end["mean"])), min(ends, key=lambda end: float(end["mean"]))
        caption = (
            f"Final value, highest: {highest['student']}, {shown(highest['mean'])}; lowest: {lowest['student']}, "
            f"{shown(lowest['mean'])}. Bands span the minimum and maximum over seeds."
        )
    spec = charts.learning_curves(
        rows, students=[student.name for student in students], title=axis, axis_format=axis_format
    )
    table = Table(
        ["student", "steps", f"mean {axis}", "lowest seed", "highest seed"],
        [[row["student"], count(row["step"]), *(shown(row[key]) for key in ("mean", "low", "high"))] for row in rows],
    )
    return Figure(f"curve-{quantity.replace('_', '-')}", title, caption, spec, table, "half")


def _thinned(points: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """At most `MAX_POINTS` points, the last one included."""
    return points[::-1][:: -(-len(points) // MAX_POINTS)][::-1]


def _mean_curve(student: Student, quantity: str) -> list[dict[str, Any]]:
    """Mean, minimum and maximum over seeds, of each epoch that all runs have."""
    curves = [{point.epoch: point for point in run.curve} for run in student.runs]
    points = []
    for epoch in sorted(set.intersection(*(set(curve) for curve in curves))):
        values = [getattr(curve[epoch], quantity) for curve in curves]
        if None not in values:
            points.append(
                {
                    "student": student.name,
                    "step": curves[0][epoch].step,
                    "mean": statistics.fmean(values),
                    "low": min(values),
                    "high": max(values),
                }
            )
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
        {"name": names[number], "student": student.name, "value": float(by_student[place, number]),
         "rows": int(counts_C[number])}
        for number in lowest
        for place, (student, _) in enumerate(students)
    ]  # fmt: skip
    cells = [
        [names[number], count(int(counts_C[number])), *(percent(float(share)) for share in by_student[:, number])]
        for number in lowest
    ]
    extremes = {"Lowest": lowest[0], "highest": int(seen[np.argmax(mean_C[seen])])}
    means = "; ".join(
        f"{what}: {names[number]}, {percent(float(mean_C[number]))} of {counted(int(counts_C[number]), 'row')}"
        for what, number in extremes.items()
    )
    caption = (
        f"On {count(len(rows))} rows of one cached view, mean over seeds. Classes are the teacher's predictions, "
        f"lowest agreement first. {means} (mean over students)."
    )
    title = "Agreement with the teacher by class"
    if len(lowest) < len(seen):
        title = f"Agreement by class: the lowest {len(lowest)} of {count(len(seen))}"
    spec = charts.shares_by_class(points, students=drawn, title="agreement with the teacher")
    table = Table(["class", "rows", *(student.name for student, _ in students)], cells)
    return Figure("agreement-classes", title, caption, spec, table, "half")


def _by_class(compared: ComparedStudent, rows: np.ndarray, label_M: np.ndarray, num_classes: int) -> np.ndarray:
    """Agreement by the teacher's class, float64 (C,), mean over seeds; NaN for a class without rows."""
    predicted_SM = compared.predicted[:, np.searchsorted(compared.rows, rows)]
    shares = [measures.class_accuracy(label_M, predicted_M == label_M, num_classes)[0] for predicted_M in predicted_SM]
    return np.asarray(np.mean(shares, axis=0))


def tree_section(found: RunsFound, chosen: list[ChosenSample], names: ClassNames) -> Section | None:
    """The students that are soft trees, drawn; None where there are none."""
    trees = [
        (student, compared, compared.node_use)
        for student, compared in found.compared()
        if compared.node_use is not None
    ]
    if not trees:
        return None
    section = Section("trees", "Soft decision trees")
    section.lead.append(
        "Students that are soft decision trees (Frosst and Hinton 2017), first seed. Each inner node shows its filter: "
        "a brighter pixel sends a sample to the right where the filter is orange (strongest at +), to the left where "
        "it is blue (strongest at −). Each leaf shows its distribution over classes. Percentages are of the "
        f"{count(found.agreement_rows)} rows of one cached view that students were compared on."
    )
    if len(trees) > MAX_TREES:
        section.lead.append(f"The {MAX_TREES} best of {count(len(trees))} trees are drawn.")
    drawings = []
    for number, (student, compared, use) in enumerate(trees[:MAX_TREES]):
        tree = compared.load()
        assert isinstance(tree, SoftTree)
        rows = [sample.row for sample in chosen]
        found_paths = most_probable_paths(tree, inputs_of(compared.matched, compared.config, found.view, rows))
        paths = list(zip(chosen, found_paths, strict=True))
        drawings.append(draw_tree(f"tree-{number}", student.name, tree, use, paths, names))
    section.trees = drawings
    return section
