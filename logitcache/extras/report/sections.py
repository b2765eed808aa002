"""The page's sections on the cache itself: metadata, teacher, fidelity, and views."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from rich.filesize import decimal as size

from logitcache.cache.layout import PER_CACHE, Block
from logitcache.cache.names import names_of
from logitcache.cache.reader import LogitCache
from logitcache.extras.report import charts, measures
from logitcache.extras.report.figures import Figure, Section, Table, histogram_figure
from logitcache.extras.report.formatting import (
    ClassNames,
    count,
    counted,
    decimal,
    percent,
    plain_text,
    transform_lines,
)
from logitcache.extras.report.samples import TOP, Disagreement, ShownSample
from logitcache.extras.report.teacher import TeacherStats

WHOLE_MATRIX = 30
"""Classes up to which the whole confusion matrix is shown; beyond, the most confused pairs."""
WORST = 20
"""Pairs, or classes, that are shown where not all are."""
MAX_POINTS = 60
"""Views, or groups of consecutive views, that the fidelity is shown for."""


def bytes_per_row(cache: LogitCache) -> float:
    """Stored bytes per row of the blocks that are present."""
    rows = sum(receipt.rows for name, receipt in cache.receipts.items() if name != PER_CACHE)
    return cache.target_bytes / max(rows, 1)


def cache_section(cache: LogitCache) -> Section:
    """The cache's metadata."""
    identity, provenance = cache.manifest.identity, cache.manifest.provenance
    names = names_of(cache.manifest)
    metadata = [
        ("id", cache.id),
        ("digest", cache.digest or "none yet: not sealed"),
        ("samples", count(cache.num_samples)),
        ("views", count(cache.num_views)),
        ("classes", count(cache.num_classes)),
        ("encoding", plain_text(repr(cache.encoding), 200)),
        ("size", f"{size(cache.stored_bytes)}; {decimal(bytes_per_row(cache))} bytes per row"),
        ("teacher", plain_text(names.teacher)),
        ("teacher fingerprint", plain_text(identity.teacher, 160)),
        ("precision", plain_text(identity.precision)),
        ("dataset", plain_text(names.dataset)),
        ("dataset fingerprint", plain_text(identity.dataset, 160)),
        *transform_lines(identity.transform),
        ("view seed", str(identity.view_seed)),
        ("created", plain_text(provenance.get("created", "not stated"))),
    ]
    versions = provenance.get("versions")
    if isinstance(versions, dict):
        text = ", ".join(f"{name} {value}" for name, value in versions.items())
        metadata.append(("software", plain_text(text, 300)))
    state = "sealed, all blocks are present" if cache.sealed else "not sealed, blocks are missing"
    lead = [
        f"{counted(cache.num_samples, 'sample')} in {counted(cache.num_views, 'view')}, "
        f"{count(cache.num_classes)} classes; {state}."
    ]
    return Section("cache", "The cache", lead, metadata)


def teacher_section(cache: LogitCache, stats: TeacherStats) -> tuple[Section, dict[str, float | None]]:
    """The teacher's accuracy, calibration, entropy and confusion, and the headline numbers."""
    found, num_classes = stats.predictions, cache.num_classes
    names = ClassNames(cache.manifest.identity.class_names)
    section = Section("teacher", "The teacher", [_rows_measured(stats)])
    headline: dict[str, float | None] = {
        "rows": len(found),
        "confidence_mean": _mean(found.confidence),
        "entropy_mean": _mean(found.entropy),
    }
    scored = found.where(found.scored)
    if not len(scored):
        section.lead.append(
            "This cache has no true classes (it was created with a dataset name and no sample table), so accuracy, "
            "calibration and confusion are omitted."
        )
        section.figures.append(_entropy_figure(found, num_classes))
        return section, headline
    reliability = measures.reliability(scored.confidence, scored.correct)
    nll = _mean(scored.nll)
    headline |= {
        "judged_rows": len(scored),
        "accuracy": float(scored.correct.mean()),
        "top5_accuracy": float(scored.in_top5.mean()) if num_classes >= 10 else None,
        "judged_confidence_mean": _mean(scored.confidence),
        "ece": reliability.ece,
        "nll": nll if math.isfinite(nll) else None,
    }
    section.lead.append(_rows_scored(stats, len(scored)))
    section.figures += [
        _reliability_figure(scored, reliability),
        _confidence_figure(scored),
        _entropy_figure(found, num_classes),
        _confusion_figure(scored, names, num_classes),
        _classes_figure(scored, names, num_classes),
    ]
    return section, headline


def _mean(values_M: np.ndarray) -> float:
    return float(values_M.mean(dtype=np.float64))


def _rows_measured(stats: TeacherStats) -> str:
    views = counted(len(stats.views), "view")
    if len(stats.predictions) == stats.num_rows:
        return f"Measured on all {count(stats.num_rows)} rows of {views}, decoded from the cache."
    return (
        f"Measured on {count(len(stats.predictions))} of the {count(stats.num_rows)} rows of {views}, evenly spaced "
        "over samples and views, decoded from the cache."
    )


def _rows_scored(stats: TeacherStats, num_scored: int) -> str:
    if stats.scored_by == "unmixed rows":
        return (
            f"Metrics that need a true class use the {count(num_scored)} unmixed rows; a row that mixes two samples "
            "has no single true class."
        )
    if stats.scored_by == "dominant sample":
        return (
            f"Almost all rows mix two samples. On these {count(num_scored)} rows the class of the sample with the "
            "larger weight is used as the true class, so accuracy and calibration are approximate."
        )
    return f"True classes are known for {count(num_scored)} of them. The rows are augmented training samples."


def _reliability_figure(scored: measures.Predictions, found: measures.Reliability) -> Figure:
    rows, cells, num_bins = [], [], len(found.counts)
    for number in np.flatnonzero(found.counts).tolist():
        low, high, num_rows = number / num_bins, (number + 1) / num_bins, int(found.counts[number])
        confidence, accuracy = float(found.confidence[number]), float(found.accuracy[number])
        rows.append({"lower": low, "upper": high, "confidence": confidence, "accuracy": accuracy, "rows": num_rows})
        cells.append(
            [f"{percent(low, 0)} to {percent(high, 0)}", percent(confidence), percent(accuracy), count(num_rows)]
        )
    confidence, accuracy = _mean(scored.confidence), float(scored.correct.mean())
    gap = 100 * (confidence - accuracy)
    caption = (
        f"Teacher top-1 accuracy: {percent(accuracy)}; mean confidence: {percent(confidence)}, {abs(gap):.2f} "
        f"percentage points {'above' if gap > 0 else 'below'} the accuracy. Expected calibration error over "
        f"{num_bins} bins: {percent(found.ece)}. Bars below the diagonal indicate overconfidence."
    )
    table = Table(["confidence", "mean confidence", "accuracy", "rows"], cells)
    return Figure("reliability", "Calibration", caption, charts.reliability_chart(rows), table)


def _confidence_figure(scored: measures.Predictions) -> Figure:
    groups = {"correct": scored.confidence[scored.correct], "wrong": scored.confidence[~scored.correct]}
    medians = [
        f"{percent(float(np.median(values)), 1)} for {name} predictions"
        for name, values in groups.items()
        if len(values)
    ]
    return histogram_figure(
        groups, np.linspace(0, 1, 21), id="confidence", title="Confidence of correct and wrong predictions",
        caption=f"Median confidence: {', '.join(medians)}.", quantity="confidence", axis_format=".0%",
    )  # fmt: skip


def _entropy_figure(found: measures.Predictions, num_classes: int) -> Figure:
    plain, mixed = found.entropy[~found.mixed], found.entropy[found.mixed]
    groups = {"unmixed rows": plain, "mixed rows": mixed} if len(mixed) and len(plain) else {"rows": found.entropy}
    means = ", ".join(f"{decimal(_mean(values))} nats for {name}" for name, values in groups.items())
    caption = (
        f"Mean entropy of the teacher's distributions: {means}. A uniform distribution has ln {count(num_classes)} = "
        f"{decimal(math.log(num_classes))} nats."
    )
    edges = np.linspace(0, math.log(num_classes) * (1 + 1e-6), 25)
    return histogram_figure(
        groups, edges, id="entropy", title="Entropy", caption=caption, quantity="entropy, nats", axis_format="~g"
    )


def _confusion_figure(scored: measures.Predictions, names: ClassNames, num_classes: int) -> Figure:
    pairs = measures.confused_pairs(scored.targets, scored.predicted, WORST)
    in_class = np.bincount(scored.targets, minlength=num_classes)
    caption = "The teacher predicts every row correctly."
    if pairs:
        true, predicted, number = pairs[0]
        caption = (
            f"Most frequent error: {names[true]} predicted as {names[predicted]}, {counted(number, 'row')} or "
            f"{percent(number / in_class[true])} of the true class. Wrong rows in total: "
            f"{count(int((~scored.correct).sum()))}."
        )
    if num_classes > WHOLE_MATRIX:
        spec = charts.bars(
            [{"name": f"{names[true]} → {names[predicted]}", "value": number} for true, predicted, number in pairs],
            title="rows", axis_format="~s",
        )  # fmt: skip
        cells = [
            [names[true], names[predicted], count(number), percent(number / in_class[true])]
            for true, predicted, number in pairs
        ]
        table = Table(["true class", "predicted class", "rows", "share of the true class"], cells)
        title = f"The {len(pairs)} most confused pairs of classes"
        return Figure("confusion", title, caption, spec, table, "two-thirds")
    matrix = measures.confusion(scored.targets, scored.predicted, num_classes)
    rows = [
        {
            "true": names[true],
            "predicted": names[predicted],
            "true_number": true,
            "predicted_number": predicted,
            "count": int(matrix[true, predicted]),
            "share": float(matrix[true, predicted] / in_class[true]),
        }
        for true, predicted in np.argwhere(matrix).tolist()
    ]
    all_names = [names[number] for number in range(num_classes)]
    table = Table(
        ["true class", *all_names],
        [[names[true], *(count(int(number)) for number in matrix[true])] for true in np.flatnonzero(in_class).tolist()],
    )
    spec = charts.confusion_chart(rows, all_names)
    return Figure("confusion", "Confusion between classes", caption, spec, table, "two-thirds")


def _classes_figure(scored: measures.Predictions, names: ClassNames, num_classes: int) -> Figure:
    accuracy_C, counts_C = measures.class_accuracy(scored.targets, scored.correct, num_classes)
    seen = np.flatnonzero(counts_C)
    ascending = seen[np.argsort(accuracy_C[seen], kind="stable")].tolist()
    worst, best = ascending[:WORST], int(seen[np.argmax(accuracy_C[seen])])
    lowest, highest = (f"{percent(float(accuracy_C[number]))} ({names[number]})" for number in (worst[0], best))
    title = "Accuracy by class"
    if len(worst) < len(seen):
        title += f": the lowest {len(worst)} of {len(seen)}"
    table = Table(
        ["class", "accuracy", "rows"],
        [[names[number], percent(float(accuracy_C[number])), count(int(counts_C[number]))] for number in worst],
    )
    rows = [{"name": names[number], "value": float(accuracy_C[number])} for number in worst]
    spec = charts.bars(rows, title="accuracy", axis_format="~%", domain=(0, 1))
    return Figure("classes", title, f"Lowest: {lowest}. Highest: {highest}.", spec, table)


def fidelity_section(cache: LogitCache) -> Section:
    """The divergence that the encoding causes, from the receipts, and the size of each array."""
    section = Section("fidelity", "Fidelity of the encoding")
    figure = _divergence_figure(cache)
    if figure is None:
        section.lead.append("The receipts contain no divergence for this encoding: it is not finite.")
    else:
        section.lead.append(
            "KL(teacher ‖ decoded) at T = 1, measured on every row when it was written and stored in the receipts."
        )
        section.figures.append(figure)
    sizes: dict[str, int] = {}
    for receipt in cache.receipts.values():
        for name, stored in receipt.objects.items():
            sizes[name] = sizes.get(name, 0) + stored.bytes
    total = sum(sizes.values())
    ordered = sorted(sizes.items(), key=lambda item: -item[1])
    caption = (
        f"{size(total)} in {counted(len(sizes), 'array')}; the largest is {plain_text(ordered[0][0])} with "
        f"{percent(ordered[0][1] / max(total, 1), 1)}."
    )
    spec = charts.bars([{"name": name, "value": stored} for name, stored in ordered], title="bytes", axis_format="~s")
    cells = [[name, count(stored), percent(stored / max(total, 1))] for name, stored in ordered]
    table = Table(["array", "bytes", "share"], cells)
    section.figures.append(Figure("bytes", "Stored bytes by array", caption, spec, table, "half"))
    return section


def _divergence_figure(cache: LogitCache) -> Figure | None:
    by_view: dict[int, list[Any]] = {}
    for name, receipt in cache.receipts.items():
        if name != PER_CACHE and receipt.kl_mean is not None and receipt.rows:
            by_view.setdefault(Block.from_name(name).view, []).append(receipt)
    if not by_view or cache.kl_mean is None:
        return None
    rows, views = [], sorted(by_view)
    step = -(-len(views) // MAX_POINTS)
    for start in range(0, len(views), step):
        group = views[start : start + step]
        receipts = [receipt for view in group for receipt in by_view[view]]
        means = [receipt.kl_mean for receipt in receipts]
        rows.append(
            {
                "views": str(group[0]) if len(group) == 1 else f"{group[0]}–{group[-1]}",
                "mean": float(np.average(means, weights=[receipt.rows for receipt in receipts])),
                "low": min(means),
                "high": max(means),
                "largest": max((receipt.kl_max for receipt in receipts if receipt.kl_max is not None), default=None),
            }
        )
    largest = max((row["largest"] for row in rows if row["largest"] is not None), default=None)
    caption = f"Mean: {decimal(cache.kl_mean)} nats"
    caption += "." if largest is None else f"; worst row: {decimal(largest)} nats."
    caption += " Circles are means, lines span the best and worst block, triangles are the worst rows."
    values = [value for row in rows for name, value in row.items() if name != "views" and value is not None]
    columns = ["view", "mean", "best block", "worst block", "worst row"]
    cells = [[row["views"], *(decimal(row[name]) for name in ("mean", "low", "high", "largest"))] for row in rows]
    spec = charts.divergence_by_view(rows, logarithmic=min(values) > 0 and max(values) > 20 * min(values))
    return Figure("divergence", "Divergence by view", caption, spec, Table(columns, cells), "half")


def disagreement_section(
    found: Disagreement | None, most: list[ShownSample], drawn: list[ShownSample], *, pictures: bool
) -> Section:
    """How much the teacher's outputs differ between the views of a sample."""
    section = Section("views", "Disagreement between views")
    if found is None:
        section.lead.append("The cache has a single view, so there is nothing to compare.")
        return section
    mixing = " Views in which the sample is mixed with another one are left out." if found.unmixed else ""
    section.lead.append(
        f"Jensen-Shannon divergence between the teacher's distributions for {counted(len(found.views), 'view')} of one "
        f"sample, on {counted(len(found.rows), 'sample')}.{mixing}"
    )
    if not pictures:
        section.lead.append("To show pictures, pass the pipeline that names the data: --data PIPELINE.")
    section.lead.append(
        "Below, for some samples: the view closest to the mean distribution and the views farthest from it, with the "
        f"{TOP} most probable classes of the teacher."
    )
    values = found.divergence
    caption = (
        f"Median: {decimal(float(np.median(values)))} nats; 90th percentile: "
        f"{decimal(float(np.quantile(values, 0.9)))}; maximum: {decimal(float(values.max()))}."
    )
    edges = np.linspace(0, max(float(values.max()), 1e-6) * (1 + 1e-6), 25)
    figure = histogram_figure(
        {"samples": values}, edges, width="full", id="disagreement", title="Divergence between views", caption=caption,
        quantity="divergence, nats", axis_format="~g",
    )  # fmt: skip
    section.figures.append(figure)
    gallery = [
        (f"The {len(most)} samples with the largest divergence", most),
        (f"{counted(len(drawn), 'other sample')}, drawn at random", drawn),
    ]
    section.gallery = [(title, shown) for title, shown in gallery if shown]
    return section
