"""Figures of the page: Vega-Lite charts, built with Altair, with a table of their numbers.

Vega-Lite renders SVG with ARIA roles and is a fifth of Plotly's size inline. Each function takes rows of plain data.
The page sets colours and fonts for its theme: a mark's `style` names an entry of its configuration. The templates
contain captions and columns of tables.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np

from logitcache.errors import UsageError
from logitcache.extras.report.formatting import decimal, percent

try:
    import altair as alt
except ImportError as error:
    raise UsageError(f"a report needs altair ({error}): pip install 'logitcache[report]'") from error

Rows = Sequence[Mapping[Any, Any]]
Spec = dict[str, Any]

HEIGHT = 260
ROW_HEIGHT = 22
"""Of one bar or cell where the vertical axis has names."""
HIGHLIGHT = "student"
"""The signal that contains the highlighted student; empty for all."""


@dataclass(frozen=True)
class Figure:
    """A chart, and the rows of the table below it."""

    spec: Spec
    rows: Rows
    notes: dict[str, Any] = field(default_factory=dict)
    """Values for title, caption and columns."""


def reliability_chart(rows: Rows) -> Spec:
    """Accuracy against confidence: rows of lower, upper, confidence, accuracy, rows."""
    data, tips = _data(rows), _tips(confidence=".1%", accuracy=".1%", rows=",")
    share: Any = {"scale": alt.Scale(domain=[0, 1]), "axis": alt.Axis(format="%", tickCount=5)}
    bars = alt.Chart(data).mark_bar(style="quantity")
    bars = bars.encode(
        alt.X("lower:Q", bin="binned", title="confidence", **share),
        alt.X2("upper:Q"),
        alt.Y("accuracy:Q", title="accuracy", **share),
        tooltip=tips,
    )
    ideal = alt.Chart(_data([{"x": 0, "y": 0}, {"x": 1, "y": 1}])).mark_line(style="reference").encode(x="x:Q", y="y:Q")
    means = alt.Chart(data).mark_point(style="mean").encode(x="confidence:Q", y="accuracy:Q", tooltip=tips)
    description = "Bars of accuracy for each confidence, and the diagonal of perfect calibration"
    return _finish(alt.layer(bars, ideal, means), description)


def histogram(
    groups: dict[str, np.ndarray], edges: np.ndarray, *, title: str, axis_format: str, **notes: Any
) -> Figure:
    """A histogram of one quantity; the bars of several groups are side by side, each a share of its own group."""
    groups = {name: values for name, values in groups.items() if len(values)}
    bins = list(pairwise(edges.tolist()))
    shares = {name: np.histogram(values, edges)[0] / len(values) for name, values in groups.items()}
    bar_width = (edges[1] - edges[0]) / max(len(groups), 1)
    bars = [
        {"lower": low + place * bar_width, "upper": low + (place + 1) * bar_width, "from": low, "to": high}
        | {"share": float(share), "group": name}
        for place, name in enumerate(groups)
        for (low, high), share in zip(bins, shares[name], strict=True)
        if share
    ]
    scale, axis = alt.Scale(domain=[bins[0][0], bins[-1][1]]), alt.Axis(format=axis_format, tickCount=6)
    tips = _tips(**{"from": axis_format, "to": axis_format, "share": ".2%"})
    chart = alt.Chart(_data(bars)).mark_bar(style="quantity")
    chart = chart.encode(
        alt.X("lower:Q", bin="binned", title=title, axis=axis, scale=scale),
        alt.X2("upper:Q"),
        alt.Y("share:Q", title="share", axis=alt.Axis(format="~%", tickCount=5)),
        tooltip=tips if len(groups) < 2 else [*tips, *_tips(group=None)],
    )
    if len(groups) > 1:
        legend = alt.Legend(orient="top")
        chart = chart.encode(color=alt.Color("group:N", title=None, sort=list(groups), legend=legend))
    shown = (lambda value: percent(value, 1)) if axis_format.endswith("%") else decimal
    rows = [
        {"bin": f"{shown(low)} to {shown(high)}"} | dict(zip(groups, of_bin, strict=True))
        for (low, high), *of_bin in zip(bins, *shares.values(), strict=True)
        if any(of_bin)
    ]
    return Figure(_finish(chart, f"Histogram of {title}"), rows, {"groups": list(groups), **notes})


def confusion_chart(rows: Rows, names: Sequence[str]) -> Spec:
    """Confusion matrix: rows of true, predicted, their numbers, count and share; the diagonal is not coloured."""
    labels = alt.Axis(labelAngle=0 if max(map(len, names)) <= 3 else -40, labelLimit=90)
    base = alt.Chart(_data(rows)).encode(
        alt.X("predicted:N", title="predicted class", sort=list(names), axis=labels),
        alt.Y("true:N", title="true class", sort=list(names), axis=alt.Axis(labelLimit=90)),
        tooltip=_tips(true=None, predicted=None, count=",", share=".2%"),
    )
    legend = alt.Legend(format="~%", orient="top")
    wrong = base.transform_filter("datum.true_number != datum.predicted_number").mark_rect(style="cell")
    right = base.transform_filter("datum.true_number == datum.predicted_number")
    layers = [
        wrong.encode(color=alt.Color("share:Q", title="share of the true class", legend=legend)),
        right.mark_rect(style="diagonal"),
    ]
    if len(names) <= 12:
        layers.append(right.mark_text(style="inside").encode(text=alt.Text("share:Q", format=".0%")))
    return _finish(alt.layer(*layers), "Heat map of true and predicted classes", height=max(len(names), 3) * ROW_HEIGHT)


def bars(rows: Rows, *, title: str, axis_format: str, domain: Sequence[float] | None = None) -> Spec:
    """Horizontal bars in the order given: rows of name, value."""
    scale = alt.Scale(domain=list(domain)) if domain is not None else alt.Scale(zero=True)
    base = alt.Chart(_data(rows)).encode(
        alt.Y("name:N", title=None, sort=[row["name"] for row in rows], axis=alt.Axis(labelLimit=130)),
        alt.X("value:Q", title=title, scale=scale, axis=alt.Axis(format=axis_format, tickCount=5)),
        tooltip=_tips(name=None, value=axis_format),
    )
    return _finish(base.mark_bar(style="quantity"), f"Bars of {title}", height=max(len(rows), 3) * ROW_HEIGHT)


def divergence_by_view(rows: Rows) -> Spec:
    """KL by view: rows of views, mean, low, high, largest."""
    values = [value for row in rows for name, value in row.items() if name != "views" and value is not None]
    logarithmic = min(values) > 0 and max(values) > 20 * min(values)
    scale = alt.Scale(type="log") if logarithmic else alt.Scale(zero=True)
    axis = alt.Axis(labelAngle=0, labelOverlap=True)
    base = alt.Chart(_data(rows)).encode(
        alt.X("views:N", title="view", sort=[row["views"] for row in rows], axis=axis),
        tooltip=_tips(views=None, mean=".3g", low=".3g", high=".3g", largest=".3g"),
    )
    value: Any = {"title": "KL, nats", "scale": scale, "axis": alt.Axis(format="~g", tickCount=5)}
    layers = [
        base.mark_rule(style="spread").encode(alt.Y("low:Q", **value), alt.Y2("high:Q")),
        base.mark_point(style="mean").encode(alt.Y("mean:Q", **value)),
        base.mark_point(style="extreme").encode(alt.Y("largest:Q", **value)),
    ]
    description = "KL divergence of decoded from original logits by view: mean and maximum over rows"
    return _finish(alt.layer(*layers), description)


def accuracy_against(
    rows: Rows, *, students: Sequence[str], title: str, axis_format: str, teacher: float | None
) -> Spec:
    """Test accuracy against a cost: rows of student, value, accuracy, low, high."""
    costs = [row["value"] for row in rows]
    logarithmic = min(costs) > 0 and max(costs) > 10 * min(costs)
    scale = alt.Scale(type="log", padding=24) if logarithmic else alt.Scale(zero=True, padding=24)
    base = alt.Chart(_data(rows)).encode(
        alt.X("value:Q", title=title, scale=scale, axis=alt.Axis(format=axis_format, tickCount=4)),
        opacity=_highlighted(),
        color=_by_student(alt.Color, students),
        tooltip=_tips(student=None, value=axis_format, accuracy=".2%", low=".2%", high=".2%"),
    )
    accuracy: Any = {"title": "test accuracy", "scale": alt.Scale(zero=False)}
    accuracy["axis"] = alt.Axis(format="~%", tickCount=5)
    point = base.mark_point(style="student").encode(shape=_by_student(alt.Shape, students))
    layers = [
        base.mark_rule(style="spread").encode(alt.Y("low:Q", **accuracy), alt.Y2("high:Q")),
        point.encode(alt.Y("accuracy:Q", **accuracy)),
    ]
    if teacher is not None:
        level = alt.Chart(_data([{"accuracy": teacher, "name": "teacher"}])).encode(alt.Y("accuracy:Q", **accuracy))
        layers += [
            level.mark_rule(style="reference").encode(tooltip=_tips(name=None, accuracy=".2%")),
            level.mark_text(style="reference-label").encode(text="name:N", x=alt.value(4)),
        ]
    return _finish(alt.layer(*layers), f"Test accuracy against {title}, a point for each student", highlight=True)


def learning_curves(rows: Rows, *, students: Sequence[str], title: str, axis_format: str) -> Spec:
    """A quantity during training: rows of student, step, mean, low, high."""
    base = alt.Chart(_data(rows)).encode(
        alt.X("step:Q", title="optimizer steps", axis=alt.Axis(format=",d", tickCount=6)),
        color=_by_student(alt.Color, students),
        tooltip=_tips(student=None, step=",", mean=axis_format, low=axis_format, high=axis_format),
    )
    value: Any = {"title": title, "scale": alt.Scale(zero=False), "axis": alt.Axis(format=axis_format, tickCount=5)}
    band = base.mark_area(style="band").encode(alt.Y("low:Q", **value), alt.Y2("high:Q"))
    layers = [
        band.encode(opacity=_highlighted(0.18, 0.03)),
        base.mark_line(style="curve").encode(alt.Y("mean:Q", **value), opacity=_highlighted()),
        base.mark_point(style="curve-point").encode(alt.Y("mean:Q", **value), opacity=_highlighted()),
    ]
    return _finish(alt.layer(*layers), f"{title} during training, a line for each student", highlight=True)


def shares_by_class(rows: Rows, *, students: Sequence[str], title: str) -> Spec:
    """A share for each class and student: rows of name, student, value, rows; classes in the order given."""
    classes = list(dict.fromkeys(row["name"] for row in rows))
    share = alt.X("value:Q", title=title, scale=alt.Scale(domain=[0, 1]), axis=alt.Axis(format="~%", tickCount=5))
    chart = alt.Chart(_data(rows)).mark_point(style="student")
    chart = chart.encode(
        alt.Y("name:N", title=None, sort=classes, axis=alt.Axis(labelLimit=130, grid=True)),
        share,
        color=_by_student(alt.Color, students),
        shape=_by_student(alt.Shape, students),
        opacity=_highlighted(),
        tooltip=_tips(name=None, student=None, value=".1%", rows=","),
    )
    description = f"{title} by class, a point for each student"
    return _finish(chart, description, height=max(len(classes), 3) * ROW_HEIGHT, highlight=True)


def _by_student(channel: Any, names: Sequence[str]) -> Any:
    return channel("student:N", sort=list(names), scale=alt.Scale(domain=list(names)), legend=None)


def _highlighted(on: float = 1.0, off: float = 0.12) -> Any:
    return alt.condition(f"!{HIGHLIGHT} || datum.student == {HIGHLIGHT}", alt.value(on), alt.value(off))


def _data(rows: Rows) -> alt.Data:
    return alt.Data(values=list(rows))  # type: ignore[no-untyped-call]


def _tips(**formats: str | None) -> list[alt.Tooltip]:
    return [
        alt.Tooltip(f"{name}:N") if form is None else alt.Tooltip(f"{name}:Q", format=form)
        for name, form in formats.items()
    ]


def _finish(chart: Any, description: str, *, height: int = HEIGHT, highlight: bool = False) -> Spec:
    """The specification, sized by its container and with a description for screen readers."""
    sizing = alt.AutoSizeParams(type="fit-x", contains="padding")
    sized = chart.properties(width="container", height=height, description=description, autosize=sizing)
    if highlight:
        sized = sized.add_params(alt.param(name=HIGHLIGHT, value=""))
    spec: Spec = sized.to_dict()
    return spec
