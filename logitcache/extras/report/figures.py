"""What a page consists of: sections with text, metadata, figures and tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal

import numpy as np

from logitcache.extras.report import charts
from logitcache.extras.report.formatting import decimal, percent


@dataclass(frozen=True)
class Table:
    """A table whose first column names the row."""

    columns: list[str]
    rows: list[list[str]]


@dataclass(frozen=True)
class Figure:
    """A chart with a caption and a table of its numbers."""

    id: str
    title: str
    caption: str
    spec: dict[str, Any]
    table: Table
    width: Literal["third", "half", "two-thirds", "full"] = "third"
    """Share of a wide page."""


@dataclass
class Section:
    """A part of the page; the template renders the filled fields in this order."""

    id: str
    title: str
    lead: list[str] = field(default_factory=list)
    metadata: list[tuple[str, str]] = field(default_factory=list)
    tables: list[tuple[str, Table]] = field(default_factory=list)
    series: list[str] = field(default_factory=list)
    """Names of the students, in the order of their colours."""
    figures: list[Figure] = field(default_factory=list)
    trees: Sequence[Any] = ()
    """`TreeDrawing`s."""
    decisions: Sequence[tuple[str, Sequence[Any]]] = ()
    """(title, `ShownDecisions`)."""
    gallery: Sequence[tuple[str, Sequence[Any]]] = ()
    """(title, `ShownSample`s)."""


def histogram_figure(
    groups: dict[str, np.ndarray],
    edges: np.ndarray,
    *,
    id: str,
    title: str,
    caption: str,
    quantity: str,
    axis_format: str,
    width: Literal["third", "full"] = "third",
) -> Figure:
    """A histogram of one quantity; the bars of several groups are side by side, each a share of its own group."""
    groups = {name: values for name, values in groups.items() if len(values)}
    shares = {name: np.histogram(values, edges)[0] / len(values) for name, values in groups.items()}
    bar_width = (edges[1] - edges[0]) / max(len(groups), 1)
    bars: list[dict[str, Any]] = [
        {
            "lower": float(low + number * bar_width),
            "upper": float(low + (number + 1) * bar_width),
            "from": float(low),
            "to": float(high),
            "share": float(share),
            "group": name,
        }
        for number, (name, shares_of_group) in enumerate(shares.items())
        for (low, high), share in zip(pairwise(edges), shares_of_group, strict=True)
        if share
    ]

    def shown(value: float) -> str:
        return percent(value, 1) if axis_format.endswith("%") else decimal(value)

    rows = [
        [f"{shown(low)} to {shown(high)}", *map(percent, of_bin)]
        for (low, high), *of_bin in zip(pairwise(edges), *shares.values(), strict=True)
        if any(of_bin)
    ]
    table = Table([quantity, *(f"share of {name}" for name in groups)], rows)
    spec = charts.histogram(
        bars,
        title=quantity,
        axis_format=axis_format,
        groups=list(groups) if len(groups) > 1 else (),
        domain=(float(edges[0]), float(edges[-1])),
    )
    return Figure(id, title, caption, spec, table, width)
