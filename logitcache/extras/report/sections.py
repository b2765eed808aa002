"""Figures about the cache itself: its teacher, the fidelity of its encoding, and the disagreement between its views."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any

import numpy as np

from logitcache.cache.layout import PER_CACHE, Block
from logitcache.cache.reader import LogitCache
from logitcache.extras.report import charts
from logitcache.extras.report.charts import Figure, histogram
from logitcache.extras.report.formatting import ClassNames, percent
from logitcache.extras.report.measures import Predictions, confused_pairs, confusion
from logitcache.extras.report.teacher import TeacherStats, mean
from logitcache.train.reliability import means_by

WHOLE_MATRIX = 30
"""Classes up to which the whole confusion matrix is shown; beyond, the most confused pairs."""
WORST = 20
"""Pairs, or classes, that are shown where not all are."""
MAX_POINTS = 60
"""Views, or groups of consecutive views, that the fidelity is shown for."""


def teacher_figures(stats: TeacherStats, names: ClassNames, num_classes: int) -> dict[str, Figure]:
    """Entropy; calibration, confidence and confusion where the cache has true classes."""
    figures = {"entropy": _entropy(stats.predictions, num_classes)}
    if len(stats.scored):
        figures["reliability"] = _reliability(stats)
        figures["confidence"] = _confidence(stats.scored)
        figures["confusion"] = _confusion(stats.scored, names, num_classes)
        figures["classes"] = _classes(stats.scored, names, num_classes)
    return figures


def _reliability(stats: TeacherStats) -> Figure:
    found = stats.reliability
    num_bins = len(found.counts)
    rows = [
        {
            "lower": place / num_bins,
            "upper": (place + 1) / num_bins,
            "bin": f"{percent(place / num_bins, 0)} to {percent((place + 1) / num_bins, 0)}",
            "confidence": float(found.confidence[place]),
            "accuracy": float(found.accuracy[place]),
            "rows": int(found.counts[place]),
        }
        for place in np.flatnonzero(found.counts).tolist()
    ]
    return Figure(charts.chart("reliability", rows), rows, {"num_bins": num_bins})


def _confidence(scored: Predictions) -> Figure:
    groups = {"correct": scored.confidence[scored.correct], "wrong": scored.confidence[~scored.correct]}
    medians = {name: float(np.median(values)) for name, values in groups.items() if len(values)}
    return histogram(groups, np.linspace(0, 1, 21), title="confidence", axis_format=".0%", medians=medians)


def _entropy(found: Predictions, num_classes: int) -> Figure:
    plain, mixed = found.entropy[~found.mixed], found.entropy[found.mixed]
    groups = {"unmixed rows": plain, "mixed rows": mixed} if len(mixed) and len(plain) else {"rows": found.entropy}
    edges = np.linspace(0, math.log(num_classes) * (1 + 1e-6), 25)
    means = {name: mean(values) for name, values in groups.items()}
    return histogram(groups, edges, title="entropy, nats", axis_format="~g", means=means, maximum=math.log(num_classes))


def _confusion(scored: Predictions, names: ClassNames, num_classes: int) -> Figure:
    pairs = confused_pairs(scored.targets, scored.predicted, WORST)
    in_class = np.bincount(scored.targets, minlength=num_classes)
    errors = [
        {"true": names[true], "predicted": names[predicted], "name": f"{names[true]} → {names[predicted]}"}
        | {"value": number, "share": float(number / in_class[true])}
        for true, predicted, number in pairs
    ]
    notes = {"first": errors[0] if errors else None, "wrong": int((~scored.correct).sum())}
    if num_classes > WHOLE_MATRIX:
        return Figure(charts.bars(errors, title="rows", axis_format="~s"), errors, notes | {"names": None})
    matrix = confusion(scored.targets, scored.predicted, num_classes)
    cells = [
        {"true": names[true], "predicted": names[predicted], "true_number": true, "predicted_number": predicted}
        | {"count": int(matrix[true, predicted]), "share": float(matrix[true, predicted] / in_class[true])}
        for true, predicted in np.argwhere(matrix).tolist()
    ]
    all_names = [names[number] for number in range(num_classes)]
    present = np.flatnonzero(in_class).tolist()
    rows = [{"true": names[true], **dict(enumerate(matrix[true].tolist()))} for true in present]
    return Figure(charts.confusion_matrix(cells, all_names), rows, notes | {"names": all_names})


def _classes(scored: Predictions, names: ClassNames, num_classes: int) -> Figure:
    accuracy_C, counts_C = means_by(scored.targets, scored.correct, num_classes)
    seen = np.flatnonzero(counts_C)
    rows = [
        {"name": names[number], "value": float(accuracy_C[number]), "rows": int(counts_C[number])}
        for number in seen[np.argsort(accuracy_C[seen], kind="stable")].tolist()
    ]
    best = int(seen[np.argmax(accuracy_C[seen])])
    highest = {"name": names[best], "value": float(accuracy_C[best])}
    spec = charts.bars(rows[:WORST], title="accuracy", axis_format="~%", domain=(0, 1))
    return Figure(spec, rows[:WORST], {"highest": highest, "seen": len(rows)})


def fidelity_figures(cache: LogitCache) -> dict[str, Figure]:
    """The stored bytes of each array, and the divergence of each view where the receipts contain it."""
    sizes: dict[str, int] = defaultdict(int)
    for receipt in cache.receipts.values():
        for name, stored in receipt.objects.items():
            sizes[name] += stored.bytes
    total = sum(sizes.values())
    rows = [
        {"name": name, "value": stored, "share": stored / max(total, 1)}
        for name, stored in sorted(sizes.items(), key=lambda item: -item[1])
    ]
    spec = charts.bars(rows, title="bytes", axis_format="~s")
    figures = {"bytes": Figure(spec, rows, {"total": total})}
    divergence = _divergence_rows(cache)
    if divergence:
        largest = max((row["largest"] for row in divergence if row["largest"] is not None), default=None)
        figures["divergence"] = Figure(charts.divergence_by_view(divergence), divergence, {"largest": largest})
    return figures


def _divergence_rows(cache: LogitCache) -> list[dict[str, Any]]:
    """The divergence in the receipts, by view or by group of consecutive views; empty where it is not finite."""
    # Numbers rather than receipts: a cache may have hundreds of thousands.
    by_view: dict[int, list[tuple[int, float, float | None]]] = defaultdict(list)
    for name, receipt in cache.receipts.items():
        if name != PER_CACHE and receipt.kl_mean is not None and receipt.rows:
            by_view[Block.from_name(name).view].append((receipt.rows, receipt.kl_mean, receipt.kl_max))
    views = sorted(by_view) if cache.kl_mean is not None else []
    step = -(-len(views) // MAX_POINTS) or 1
    rows = []
    for group in (views[start : start + step] for start in range(0, len(views), step)):
        row_counts, means, largest = zip(*(block for view in group for block in by_view[view]), strict=True)
        rows.append(
            {
                "views": str(group[0]) if len(group) == 1 else f"{group[0]}–{group[-1]}",
                "mean": float(np.average(means, weights=row_counts)),
                "low": min(means),
                "high": max(means),
                "largest": max((each for each in largest if each is not None), default=None),
            }
        )
    return rows


def disagreement_figure(divergence_S: np.ndarray) -> Figure:
    """The divergence between the views of each sample, in nats."""
    largest = float(divergence_S.max())
    edges = np.linspace(0, max(largest, 1e-6) * (1 + 1e-6), 25)
    notes = {"median": float(np.median(divergence_S)), "high": float(np.quantile(divergence_S, 0.9)), "max": largest}
    return histogram({"samples": divergence_S}, edges, title="divergence, nats", axis_format="~g", **notes)
