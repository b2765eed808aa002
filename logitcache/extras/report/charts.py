"""Charts as Vega-Lite specifications, built with Altair. The page sets colours and fonts for its theme.

Vega-Lite renders SVG with ARIA roles and is a fifth of Plotly's size inline. Each function takes rows of plain data and
returns a JSON object. A mark's `style` names an entry of the page's configuration.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from logitcache.errors import UsageError

try:
    import altair as alt
except ImportError as error:
    raise UsageError(f"a report needs altair ({error}): pip install 'logitcache[report]'") from error

Rows = Sequence[dict[str, Any]]
Spec = dict[str, Any]

HEIGHT = 260
ROW_HEIGHT = 22
"""Of one bar or cell where the vertical axis has names."""
HIGHLIGHT = "student"
"""The signal that contains the highlighted student; empty for all."""


def reliability_chart(rows: Rows) -> Spec:
    """Accuracy against confidence: rows of lower, upper, confidence, accuracy, rows."""
    data, percent = _data(rows), alt.Axis(format="%", tickCount=5)
    whole = alt.Scale(domain=[0, 1])
    tips = _tips(confidence=".1%", accuracy=".1%", rows=",")
    bars = (
        alt.Chart(data)
        .mark_bar(style="quantity")
        .encode(
            alt.X("lower:Q", bin="binned", title="confidence", scale=whole, axis=percent),
            alt.X2("upper:Q"),
            alt.Y("accuracy:Q", title="accuracy", scale=whole, axis=percent),
            tooltip=tips,
        )
    )
    ideal = alt.Chart(_data([{"x": 0, "y": 0}, {"x": 1, "y": 1}])).mark_line(style="reference").encode(x="x:Q", y="y:Q")
    means = alt.Chart(data).mark_point(style="mean").encode(x="confidence:Q", y="accuracy:Q", tooltip=tips)
    return _finish(
        alt.layer(bars, ideal, means), "Bars of accuracy for each confidence, and the diagonal of perfect calibration"
    )


def histogram(rows: Rows, *, title: str, axis_format: str, domain: Sequence[float], groups: Sequence[str] = ()) -> Spec:
    """Shares by some quantity: rows of lower, upper, from, to, share and group."""
    chart = alt.Chart(_data(rows)).mark_bar(style="quantity")
    tips = [
        alt.Tooltip("from:Q", format=axis_format),
        alt.Tooltip("to:Q", format=axis_format),
        alt.Tooltip("share:Q", format=".2%"),
        *([alt.Tooltip("group:N")] if groups else []),
    ]
    encoded = chart.encode(
        alt.X(
            "lower:Q",
            bin="binned",
            title=title,
            axis=alt.Axis(format=axis_format, tickCount=6),
            scale=alt.Scale(domain=list(domain)),
        ),
        alt.X2("upper:Q"),
        alt.Y("share:Q", title="share", axis=alt.Axis(format="~%", tickCount=5)),
        tooltip=tips,
    )
    if groups:
        encoded = encoded.encode(
            color=alt.Color("group:N", title=None, sort=list(groups), legend=alt.Legend(orient="top"))
        )
    return _finish(encoded, f"Histogram of {title}")


def confusion_chart(rows: Rows, names: Sequence[str]) -> Spec:
    """Confusion matrix: rows of true, predicted, their numbers, count and share; the diagonal is not coloured."""
    base = alt.Chart(_data(rows)).encode(
        alt.X(
            "predicted:N",
            title="predicted class",
            sort=list(names),
            axis=alt.Axis(labelAngle=0 if max(map(len, names)) <= 3 else -40, labelLimit=90),
        ),
        alt.Y("true:N", title="true class", sort=list(names), axis=alt.Axis(labelLimit=90)),
        tooltip=_tips(true=None, predicted=None, count=",", share=".2%"),
    )
    wrong = base.transform_filter("datum.true_number != datum.predicted_number").mark_rect(style="cell")
    right = base.transform_filter("datum.true_number == datum.predicted_number").mark_rect(style="diagonal")
    layers = [
        wrong.encode(
            color=alt.Color("share:Q", title="share of the true class", legend=alt.Legend(format="~%", orient="top"))
        ),
        right,
    ]
    if len(names) <= 12:
        shown = base.transform_filter("datum.true_number == datum.predicted_number")
        layers.append(shown.mark_text(style="inside").encode(text=alt.Text("share:Q", format=".0%")))
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


def divergence_by_view(rows: Rows, *, logarithmic: bool) -> Spec:
    """KL by view: rows of views, mean, low, high, largest."""
    axis = alt.Axis(format="~g", tickCount=5)
    scale = alt.Scale(type="log") if logarithmic else alt.Scale(zero=True)
    order = [row["views"] for row in rows]
    tips = _tips(views=None, mean=".3g", low=".3g", high=".3g", largest=".3g")
    base = alt.Chart(_data(rows)).encode(
        alt.X("views:N", title="view", sort=order, axis=alt.Axis(labelAngle=0, labelOverlap=True)), tooltip=tips
    )
    value: Any = {"title": "KL, nats", "scale": scale, "axis": axis}
    return _finish(
        alt.layer(
            base.mark_rule(style="spread").encode(alt.Y("low:Q", **value), alt.Y2("high:Q")),
            base.mark_point(style="mean").encode(alt.Y("mean:Q", **value)),
            base.mark_point(style="extreme").encode(alt.Y("largest:Q", **value)),
        ),
        "KL divergence of decoded from original logits by view: mean and maximum over rows",
    )


def accuracy_against(
    rows: Rows, *, students: Sequence[str], title: str, axis_format: str, logarithmic: bool, teacher: float | None
) -> Spec:
    """Test accuracy against a cost: rows of student, value, accuracy, low, high."""
    scale = alt.Scale(type="log", padding=24) if logarithmic else alt.Scale(zero=True, padding=24)
    base = alt.Chart(_data(rows)).encode(
        alt.X("value:Q", title=title, scale=scale, axis=alt.Axis(format=axis_format, tickCount=4)),
        opacity=_highlighted(),
        color=_by_student(alt.Color, students),
        tooltip=_tips(student=None, value=axis_format, accuracy=".2%", low=".2%", high=".2%"),
    )
    accuracy: Any = {
        "title": "test accuracy",
        "scale": alt.Scale(zero=False),
        "axis": alt.Axis(format="~%", tickCount=5),
    }
    shape = _by_student(alt.Shape, students)
    layers = [
        base.mark_rule(style="spread").encode(alt.Y("low:Q", **accuracy), alt.Y2("high:Q")),
        base.mark_point(style="student").encode(alt.Y("accuracy:Q", **accuracy), shape=shape),
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
    return _finish(
        alt.layer(
            base.mark_area(style="band").encode(
                alt.Y("low:Q", **value), alt.Y2("high:Q"), opacity=_highlighted(0.18, 0.03)
            ),
            base.mark_line(style="curve").encode(alt.Y("mean:Q", **value), opacity=_highlighted()),
            base.mark_point(style="curve-point").encode(alt.Y("mean:Q", **value), opacity=_highlighted()),
        ),
        f"{title} during training, a line for each student",
        highlight=True,
    )


def shares_by_class(rows: Rows, *, students: Sequence[str], title: str) -> Spec:
    """A share for each class and student: rows of name, student, value, rows; classes in the order given."""
    classes = list(dict.fromkeys(row["name"] for row in rows))
    base = alt.Chart(_data(rows)).encode(
        alt.Y("name:N", title=None, sort=classes, axis=alt.Axis(labelLimit=130, grid=True)),
        alt.X("value:Q", title=title, scale=alt.Scale(domain=[0, 1]), axis=alt.Axis(format="~%", tickCount=5)),
        color=_by_student(alt.Color, students),
        shape=_by_student(alt.Shape, students),
        opacity=_highlighted(),
        tooltip=_tips(name=None, student=None, value=".1%", rows=","),
    )
    height = max(len(classes), 3) * ROW_HEIGHT
    chart = base.mark_point(style="student")
    return _finish(chart, f"{title} by class, a point for each student", height=height, highlight=True)


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


def _finish(chart: Any, description: str, *, height: Any = HEIGHT, highlight: bool = False) -> Spec:
    """The specification, sized by its container and with a description for screen readers."""
    sized = chart.properties(width="container", height=height, description=description)
    if highlight:
        sized = sized.add_params(alt.param(name=HIGHLIGHT, value=""))
    sized = sized.properties(autosize=alt.AutoSizeParams(type="fit-x", contains="padding"))
    spec: Spec = sized.to_dict()
    return spec
