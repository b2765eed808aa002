"""Figures of the page: Vega-Lite charts with their data.

Vega-Lite renders SVG with ARIA roles and is a fifth of Plotly's size inline. The specifications are in
`templates/charts.yaml`, which also names the fields of each chart's rows.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from logitcache.extras.report.formatting import decimal, percent

Rows = Sequence[Mapping[Any, Any]]
Spec = dict[str, Any]

HEIGHT = 260
ROW_HEIGHT = 22
"""Of one bar or cell where the vertical axis has names."""


@dataclass(frozen=True)
class Figure:
    """A chart, and the rows of the table below it."""

    spec: Spec
    rows: Rows
    notes: dict[str, Any] = field(default_factory=dict)
    """Values for title, caption and columns."""


def chart(name: str, rows: Rows, *, names: Sequence[str] | None = None, **values: Any) -> Spec:
    """A chart of `templates/charts.yaml` with its data.

    Args:
        name: of the chart.
        rows: the data.
        names: of the vertical axis, if it has names; they set the height.
        values: replace "$name" in the specification.
    """
    height = HEIGHT if names is None else max(len(names), 3) * ROW_HEIGHT
    spec: Spec = _filled(_specifications()[name], values | {"names": names})
    sizing = {"width": "container", "height": height, "autosize": {"type": "fit-x", "contains": "padding"}}
    return {"data": {"values": list(rows)}, **sizing, **spec}


@functools.cache
def _specifications() -> dict[str, Spec]:
    file = Path(__file__).parent / "templates" / "charts.yaml"
    specifications: dict[str, Spec] = yaml.safe_load(file.read_text(encoding="utf-8"))
    return specifications


def _filled(node: Any, values: Mapping[str, Any]) -> Any:
    if isinstance(node, dict):
        return {key: _filled(value, values) for key, value in node.items()}
    if isinstance(node, list):
        return [_filled(value, values) for value in node]
    return values[node[1:]] if isinstance(node, str) and node.startswith("$") else node


def bars(rows: Rows, *, title: str, axis_format: str, domain: Sequence[float] | None = None) -> Spec:
    """Horizontal bars in the order given: rows of name, value."""
    scale = {"zero": True} if domain is None else {"domain": domain}
    names, description = [row["name"] for row in rows], f"Bars of {title}"
    return chart("bars", rows, names=names, title=title, format=axis_format, scale=scale, description=description)


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
    values = {"title": title, "format": axis_format, "domain": [bins[0][0], bins[-1][1]], "groups": list(groups)}
    spec = chart("histogram", bars, description=f"Histogram of {title}", **values)
    if len(groups) < 2:
        del spec["encoding"]["color"], spec["encoding"]["tooltip"][-1]
    shown = (lambda value: percent(value, 1)) if axis_format.endswith("%") else decimal
    rows = [
        {"bin": f"{shown(low)} to {shown(high)}"} | dict(zip(groups, of_bin, strict=True))
        for (low, high), *of_bin in zip(bins, *shares.values(), strict=True)
        if any(of_bin)
    ]
    return Figure(spec, rows, {"groups": list(groups), **notes})


def confusion_matrix(rows: Rows, names: Sequence[str]) -> Spec:
    """A heat map; the shares on the diagonal are written where there are few classes."""
    spec = chart("confusion", rows, names=names, angle=0 if max(map(len, names)) <= 3 else -40)
    if len(names) > 12:
        del spec["layer"][-1]
    return spec


def divergence_by_view(rows: Rows) -> Spec:
    """Mean, range over blocks, and largest KL of each view."""
    values = [value for row in rows for name, value in row.items() if name != "views" and value is not None]
    scale = {"type": "log"} if min(values) > 0 and max(values) > 20 * min(values) else {"zero": True}
    return chart("divergence", rows, views=[row["views"] for row in rows], scale=scale)


def score_against(
    rows: Rows,
    *,
    students: Sequence[str],
    title: str,
    axis_format: str,
    score: str,
    score_format: str,
    tooltip_format: str,
    teacher: float | None,
) -> Spec:
    """A score on test data against a cost, with the teacher's score as a line."""
    costs = [row["value"] for row in rows]
    scale = {"type": "log"} if min(costs) > 0 and max(costs) > 10 * min(costs) else {"zero": True}
    values: dict[str, Any] = {"title": title, "format": axis_format, "students": students, "teacher": teacher}
    values |= {"score": score, "score_format": score_format, "tooltip_format": tooltip_format}
    description = f"{score[0].upper()}{score[1:]} against {title}, a point for each student"
    spec = chart("cost", rows, scale=scale | {"padding": 24}, description=description, **values)
    if teacher is None:
        del spec["layer"][-1]
    return spec
