"""What a page is made of: sections of facts, figures and tables."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal

import numpy as np

from logitcache.extras.report import charts
from logitcache.extras.report.decisions import ChosenSample, Decision
from logitcache.extras.report.samples import ShownSample
from logitcache.extras.report.trees import Node
from logitcache.extras.report.words import decimal, percent


@dataclass(frozen=True)
class Table:
    """A table whose first column names the row."""

    columns: list[str]
    rows: list[list[str]]


@dataclass(frozen=True)
class Figure:
    """A chart, what it shows in a sentence, and its numbers."""

    id: str
    title: str
    caption: str
    spec: dict[str, Any]
    table: Table
    width: Literal["third", "half", "two-thirds", "full"] = "third"
    """Of the page, where that is wide."""


@dataclass(frozen=True)
class TreeDrawing:
    """A soft tree, drawn, with the paths of some samples."""

    id: str
    title: str
    caption: str
    width: float
    height: float
    """Of the drawing, in pixels."""
    nodes: list[DrawnNode]
    edges: list[tuple[float, float, float, float, int]]
    """(x, y, x, y, the child's number) of the lines from parents to children."""
    paths: list[DrawnPath]
    table: Table


@dataclass(frozen=True)
class DrawnNode:
    """A node with what stands in it."""

    node: Node
    filter: str | None
    """Its weights as a picture, a data URI."""
    signs: list[tuple[float, float, str]]
    """(x, y, sign) in pixels: where the weights of each sign are strongest."""
    lines: list[str]
    """What a leaf says."""


@dataclass(frozen=True)
class DrawnPath:
    """The path of a sample, in words and as the numbers of its nodes."""

    sample: ChosenSample
    nodes: list[int]
    words: list[str]


@dataclass
class Section:
    """A part of the page."""

    id: str
    title: str
    lead: list[str] = field(default_factory=list)
    facts: list[tuple[str, str]] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)
    tables: list[tuple[str, Table]] = field(default_factory=list)
    gallery: list[tuple[str, list[ShownSample]]] = field(default_factory=list)
    trees: list[TreeDrawing] = field(default_factory=list)
    decisions: list[tuple[str, list[tuple[ChosenSample, list[Decision]]]]] = field(default_factory=list)
    """(title, samples with what each net says of them)."""
    series: list[str] = field(default_factory=list)
    """Names of the students, in the order of their colours."""


def _histogram(
    values: np.ndarray, edges: np.ndarray, group: str | None, place: tuple[float, float]
) -> list[dict[str, Any]]:
    """Shares of values between edges; a group's bars take a part of each bin's width."""
    shares = np.histogram(values, edges)[0] / max(len(values), 1)
    width = edges[1] - edges[0]
    return [
        {
            "lower": float(low + place[0] * width),
            "upper": float(low + place[1] * width),
            "from": float(low),
            "to": float(low + width),
            "share": float(share),
        }
        | ({} if group is None else {"group": group})
        for low, share in zip(edges[:-1], shares, strict=True)
        if share
    ]


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
    """A histogram of one quantity, the groups side by side, each as shares of its own."""
    groups = {name: values for name, values in groups.items() if len(values)}
    several = len(groups) > 1
    rows: list[dict[str, Any]] = []
    for number, (name, values) in enumerate(groups.items()):
        place = (number / len(groups), (number + 1) / len(groups))
        rows += _histogram(values, edges, name if several else None, place)
    shares = [np.histogram(values, edges)[0] / len(values) for values in groups.values()]

    def shown(value: float) -> str:
        return percent(value, 1) if axis_format.endswith("%") else decimal(value)

    cells = [
        [f"{shown(low)} to {shown(high)}", *(percent(share[number]) for share in shares)]
        for number, (low, high) in enumerate(pairwise(edges))
        if any(share[number] for share in shares)
    ]
    spec = charts.histogram(
        rows,
        title=quantity,
        axis_format=axis_format,
        groups=list(groups) if several else (),
        domain=(float(edges[0]), float(edges[-1])),
    )
    return Figure(id, title, caption, spec, Table([quantity, *(f"share of {name}" for name in groups)], cells), width)
