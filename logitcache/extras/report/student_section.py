"""Students side by side: the table, accuracy against what it costs, and learning curves."""

from __future__ import annotations

import statistics
from typing import Any

from logitcache.extras.report import charts
from logitcache.extras.report.explained import agreement_figure
from logitcache.extras.report.figures import Figure, Section, Table
from logitcache.extras.report.students import RunsFound, Student, spread
from logitcache.extras.report.words import ClassNames, count, counted, decimal, name_of, percent, size, with_spread
from logitcache.train.finished import CurvePoint, Run

MAX_SERIES = 12
"""Students that are drawn; all are in the table."""
MAX_POINTS = 40
"""Of one learning curve; of a longer one every so manyth epoch is drawn."""


def student_section(found: RunsFound, class_names: ClassNames, num_classes: int) -> Section:
    """What a folder of runs holds."""
    section = Section("students", "Students")
    students = sorted(found.students, key=lambda student: -(student.row.accuracy_mean or 0.0))
    drawn = students[:MAX_SERIES]
    section.lead += _lead(found, students)
    if students or found.teachers:
        section.tables.append(("Students, best first, and their teacher", _table(students, found.teachers)))
    names = [student.name for student in drawn]
    section.series = names
    teacher = found.teachers[0].result.accuracy if len(found.teachers) == 1 else None
    section.figures += [
        figure
        for figure in (
            _cost_figure(drawn, "parameters", "Accuracy against size", "parameters", "~s", teacher),
            _cost_figure(drawn, "latency", "Accuracy against latency", "latency, ms", "~g", teacher),
            _cost_figure(drawn, "epoch", "Accuracy against training time", "seconds an epoch", "~g", teacher),
            _curve_figure(
                drawn, "validation_accuracy", "Validation accuracy along training", "validation accuracy", "~%"
            ),
            _curve_figure(drawn, "loss", "Training loss", "loss", "~g"),
            agreement_figure(found, names, class_names, num_classes),
        )
        if figure is not None
    ]
    return section


def _lead(found: RunsFound, students: list[Student]) -> list[str]:
    lead = []
    if students:
        runs = sum(len(student.runs) for student in students)
        lead.append(
            f"{counted(len(students), 'student', 'students')} in {counted(runs, 'finished run', 'finished runs')}; "
            "accuracy on the test split, mean ± standard deviation between seeds."
        )
    else:
        lead.append("No run of a student is finished yet.")
    if found.agreement_rows:
        lead.append(
            f"Agreement: how often a student's first class is the teacher's, on {count(found.agreement_rows)} rows of "
            "one cached view of the training samples. Latency: median of forward passes of one sample on one CPU "
            "thread of the machine that wrote this page."
        )
    reasons = dict.fromkeys(student.not_measured for student in students if student.not_measured)
    for reason in reasons:
        named = ", ".join(student.name for student in students if student.not_measured == reason)
        lead.append(f"Latency and agreement of {name_of(named, 200)} are not measured: {name_of(reason, 300)}")
    if any(student.product for student in students):
        lead.append(
            "Of exported students: multiply-accumulates (MACs) of matrix products and convolutions a sample, sizes of "
            "the files, and test accuracy in int8 beside the float one of the same seed."
        )
    for student in students:
        if student.not_exported:
            lead.append(f"What was exported of {student.name} is left out: {name_of(student.not_exported, 300)}")
    if found.unfinished:
        lead.append(f"Not finished, and left out: {name_of(', '.join(found.unfinished), 300)}.")
    if found.unreadable:
        lead.append(f"Not readable, and left out: {name_of(', '.join(found.unreadable), 300)}.")
    if len(students) > MAX_SERIES:
        lead.append(f"The {MAX_SERIES} best are drawn; all are in the table.")
    return lead


def _table(students: list[Student], teachers: list[Run]) -> Table:
    columns = [
        "student", "test accuracy", "agreement with the teacher", "parameters", "latency, ms", "seconds an epoch",
        "samples", "seeds", "labels from",
    ]  # fmt: skip
    exported = any(student.product for student in students)
    if exported:
        columns += ["MACs", "file size", "int8 accuracy"]
    rows = []
    for student in students:
        row = student.row
        agreement = "–" if student.agreement is None else with_spread(*spread(student.agreement))
        rows.append(
            [
                student.name,
                with_spread(row.accuracy_mean, row.accuracy_sd),
                agreement,
                count(row.parameters),
                decimal(student.latency_ms),
                decimal(row.epoch_seconds),
                count(row.samples),
                str(len(row.seeds)),
                student.labels,
                *(_exported(student) if exported else []),
            ]
        )
    for run in teachers:
        result = run.result
        rows.append(
            ["teacher", percent(result.accuracy), "–", count(result.parameters), "–", decimal(result.epoch_seconds),
             count(result.samples), "1", "true labels", *(["–"] * 3 if exported else [])]
        )  # fmt: skip
    return Table(columns, rows)


def _exported(student: Student) -> list[str]:
    """MACs, file sizes and int8 accuracy of what was exported."""
    product = student.product
    if product is None:
        return ["–"] * 3
    sizes = [f"{form.name} {size(form.bytes)}" for form in product.variants if form.bytes is not None]
    int8, float32 = product.variant("onnx int8"), product.variant("torch")
    beside = "" if float32 is None else f" (float {percent(float32.test_accuracy)})"
    accuracy = "–" if int8 is None else f"{percent(int8.test_accuracy)}{beside}"
    return [count(product.macs), ", ".join(sizes) or "–", accuracy]


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
    costs = [row["value"] for row in rows]
    best, cheapest = rows[0], min(rows, key=lambda row: row["value"])
    unit = {"parameters": "parameters", "latency": "ms a sample", "epoch": "seconds an epoch"}[kind]
    said = f"The best, {best['student']}, is right on {percent(best['accuracy'])}"
    said += f" at {_shown(best['value'])} {unit}"
    if cheapest["value"] == best["value"]:
        caption = f"{said}; none has less."
    else:
        cheap = f"{cheapest['student']}, on {percent(cheapest['accuracy'])} at {_shown(cheapest['value'])}"
        caption = f"{said}; the cheapest, {cheap}."
    logarithmic = min(costs) > 0 and max(costs) > 10 * min(costs)
    spec = charts.accuracy_against(
        rows, title=quantity, axis_format=axis_format, logarithmic=logarithmic, teacher=teacher,
        students=[student.name for student in students],
    )  # fmt: skip
    table = Table(
        ["student", quantity, "test accuracy"],
        [[row["student"], _shown(row["value"]), percent(row["accuracy"])] for row in rows],
    )
    return Figure(f"accuracy-{kind}", title, caption, spec, table)


def _curve_figure(students: list[Student], quantity: str, title: str, axis: str, axis_format: str) -> Figure | None:
    rows: list[dict[str, Any]] = []
    ends: list[tuple[str, float]] = []
    for student in students:
        points = _mean_curve(student, quantity)
        if points:
            ends.append((student.name, points[-1]["mean"]))
            step = -(-len(points) // MAX_POINTS)
            rows += points[::-1][::step][::-1]  # the last epoch stays
    if not rows:
        return None

    def shown(value: float) -> str:
        return percent(value) if quantity != "loss" else decimal(value)

    least, greatest = min(ends, key=lambda end: end[1]), max(ends, key=lambda end: end[1])
    if quantity == "loss":
        caption = "Mean loss of each epoch. Students with different losses can't be compared by its height."
    else:
        caption = (
            f"At the end {greatest[0]} is highest with {shown(greatest[1])}, {least[0]} lowest with "
            f"{shown(least[1])}; bands reach from the least to the greatest of the seeds."
        )
    spec = charts.learning_curves(
        rows, students=[student.name for student in students], title=axis, axis_format=axis_format
    )
    table = Table(
        ["student", "steps", f"mean {axis}", "least seed", "greatest seed"],
        [[row["student"], count(row["step"]), *(shown(row[key]) for key in ("mean", "low", "high"))] for row in rows],
    )
    return Figure(f"curve-{quantity.replace('_', '-')}", title, caption, spec, table, width="half")


def _mean_curve(student: Student, quantity: str) -> list[dict[str, Any]]:
    """Mean, least and greatest over the seeds of each epoch that all of them have."""
    curves = [{point.epoch: point for point in run.curve} for run in student.runs]
    epochs = sorted(set.intersection(*(set(curve) for curve in curves)))
    points = []
    for epoch in epochs:
        here: list[CurvePoint] = [curve[epoch] for curve in curves]
        values = [getattr(point, quantity) for point in here]
        if any(value is None for value in values):
            continue
        points.append(
            {
                "student": student.name,
                "step": here[0].step,
                "mean": statistics.fmean(values),
                "low": min(values),
                "high": max(values),
            }
        )
    return points
