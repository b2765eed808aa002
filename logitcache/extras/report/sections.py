"""From what was measured on a cache to what the page says: its facts, figures, captions and tables."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from logitcache.cache.layout import PER_CACHE, Block
from logitcache.cache.names import names_of
from logitcache.cache.reader import LogitCache
from logitcache.extras.report import charts, measures
from logitcache.extras.report.figures import Figure, Section, Table, histogram_figure
from logitcache.extras.report.samples import TOP, Disagreement, ShownSample
from logitcache.extras.report.teacher import Heard
from logitcache.extras.report.words import (
    ClassNames,
    count,
    counted,
    decimal,
    name_of,
    percent,
    size,
    transform_lines,
)

# C classes

WHOLE_MATRIX = 30
"""Classes up to which the whole confusion is shown; beyond, the most confused pairs."""
WORST = 20
"""Pairs, or classes, that are shown where not all are."""
MAX_POINTS = 60
"""Views, or groups of neighbouring views, that the fidelity is shown for."""


def cache_section(cache: LogitCache) -> Section:
    """What the cache is."""
    identity, provenance = cache.manifest.identity, cache.manifest.provenance
    rows = sum(receipt.rows for name, receipt in cache.receipts.items() if name != PER_CACHE)
    names = names_of(cache.manifest)
    versions = provenance.get("versions")
    facts = [
        ("id", cache.id),
        ("digest", cache.digest or "none yet: not sealed"),
        ("samples", count(cache.num_samples)),
        ("views", count(cache.num_views)),
        ("classes", count(cache.num_classes)),
        ("encoding", name_of(repr(cache.encoding), 200)),
        ("size", f"{size(cache.stored_bytes)}; {decimal(cache.target_bytes / max(rows, 1))} bytes a label"),
        ("teacher", name_of(names.teacher)),
        ("teacher's fingerprint", name_of(identity.teacher, 160)),
        ("precision", name_of(identity.precision)),
        ("dataset", name_of(names.dataset)),
        ("dataset's fingerprint", name_of(identity.dataset, 160)),
        *transform_lines(identity.transform),
        ("view seed", str(identity.view_seed)),
        ("created", name_of(provenance.get("created", "not stated"))),
    ]
    if isinstance(versions, dict):
        facts.append(("made with", name_of(", ".join(f"{name} {value}" for name, value in versions.items()), 300)))
    state = "sealed: every block is there" if cache.sealed else "not sealed: blocks are still missing"
    lead = [
        f"{counted(cache.num_samples, 'sample', 'samples')} in {counted(cache.num_views, 'view', 'views')}, "
        f"{count(cache.num_classes)} classes; {state}."
    ]
    return Section("cache", "What the cache is", lead, facts)


def teacher_section(cache: LogitCache, heard: Heard) -> tuple[Section, dict[str, float | None]]:
    """What the teacher says, and its headline numbers."""
    answers = heard.answers
    names = ClassNames(cache.manifest.identity.class_names)
    section = Section("teacher", "The teacher", [_which_rows(heard)])
    headline: dict[str, float | None] = {
        "rows": len(answers),
        "confidence_mean": float(answers.confidence.mean(dtype=np.float64)),
        "entropy_mean": float(answers.entropy.mean(dtype=np.float64)),
    }
    judged = answers.where(answers.judged)
    if len(judged):
        section.lead.append(_judged_by(heard, len(judged)))
        headline |= _judge(cache, judged)
        section.figures += [_reliability_figure(judged), _confidence_figure(judged)]
    else:
        section.lead.append(
            "This cache has no true classes (it was created with a dataset's name, without a sample table), so "
            "accuracy, calibration and confusion are left out."
        )
    section.figures.append(_entropy_figure(answers, cache.num_classes))
    if len(judged):
        section.figures += [
            _confusion_figure(judged, names, cache.num_classes),
            _classes_figure(judged, names, cache.num_classes),
        ]
    return section, headline


def _which_rows(heard: Heard) -> str:
    answers, views = heard.answers, counted(len(heard.views), "view", "views")
    if len(answers) == heard.num_rows:
        return f"Measured on all {count(heard.num_rows)} rows of {views}, as they are decoded from the cache."
    return (
        f"Measured on {count(len(answers))} of the {count(heard.num_rows)} rows of {views}, evenly spread over "
        "samples and views, as they are decoded from the cache."
    )


def _judged_by(heard: Heard, judged: int) -> str:
    if heard.judged_by == "unmixed rows":
        return (
            f"What needs a true class is measured on the {count(judged)} rows in which no two samples were mixed; "
            "a mixed row has no one true class."
        )
    if heard.judged_by == "dominant sample":
        return (
            f"Nearly every row mixes two samples: on these {count(judged)} rows the class of the sample with the "
            "greater weight counts as the true one, so accuracy and calibration are rough."
        )
    return f"True classes are known for {count(judged)} of them; they are training samples, seen through augmentation."


def _judge(cache: LogitCache, judged: measures.Answers) -> dict[str, float | None]:
    nll = float(judged.nll.mean(dtype=np.float64))
    return {
        "judged_rows": len(judged),
        "accuracy": float(judged.right.mean()),
        "top5_accuracy": float(judged.in_top5.mean()) if cache.num_classes >= 10 else None,
        "judged_confidence_mean": float(judged.confidence.mean(dtype=np.float64)),
        "ece": measures.reliability(judged.confidence, judged.right).ece,
        "nll": nll if math.isfinite(nll) else None,
    }


def _reliability_figure(judged: measures.Answers) -> Figure:
    found = measures.reliability(judged.confidence, judged.right)
    rows, cells, num_bins = [], [], len(found.counts)
    for number, rows_in_bin in enumerate(found.counts.tolist()):
        if not rows_in_bin:
            continue
        low, high = number / num_bins, (number + 1) / num_bins
        confidence, accuracy = float(found.confidence[number]), float(found.accuracy[number])
        rows.append({"lower": low, "upper": high, "confidence": confidence, "accuracy": accuracy, "rows": rows_in_bin})
        cells.append(
            [f"{percent(low, 0)} to {percent(high, 0)}", percent(confidence), percent(accuracy), count(rows_in_bin)]
        )
    confidence, accuracy = float(judged.confidence.mean(dtype=np.float64)), float(judged.right.mean())
    gap = 100 * (confidence - accuracy)
    caption = (
        f"The teacher is right on {percent(accuracy)} and on average {percent(confidence)} sure, "
        f"{abs(gap):.2f} points {'more' if gap > 0 else 'less'} than it should be; "
        f"the expected calibration error over {num_bins} bins is {percent(found.ece)}. "
        "Bars below the diagonal are overconfident."
    )
    table = Table(["confidence", "mean confidence", "accuracy", "rows"], cells)
    return Figure("reliability", "Calibration", caption, charts.reliability_chart(rows), table)


def _confidence_figure(judged: measures.Answers) -> Figure:
    right, wrong = judged.confidence[judged.right], judged.confidence[~judged.right]
    parts = [
        f"when it is {name} the teacher's median confidence is {percent(float(np.median(values)), 1)}"
        for name, values in (("right", right), ("wrong", wrong))
        if len(values)
    ]
    caption = f"{'; '.join(parts)}.".capitalize()
    groups = {"right rows": right, "wrong rows": wrong}
    edges = np.linspace(0, 1, 21)
    return histogram_figure(
        groups, edges, id="confidence", title="Confidence, when right and when wrong", caption=caption,
        quantity="confidence", axis_format=".0%",
    )  # fmt: skip


def _entropy_figure(answers: measures.Answers, num_classes: int) -> Figure:
    plain, mixed = answers.entropy[~answers.mixed], answers.entropy[answers.mixed]
    groups = {"plain rows": plain, "mixed rows": mixed} if len(mixed) and len(plain) else {"rows": answers.entropy}
    said = " and ".join(f"{decimal(float(np.mean(values)))} nats for {name}" for name, values in groups.items())
    caption = (
        f"The entropy of the teacher's distribution is on average {said}; ln {count(num_classes)} = "
        f"{decimal(math.log(num_classes))} nats would be pure guessing."
    )
    edges = np.linspace(0, math.log(num_classes) * (1 + 1e-6), 25)
    return histogram_figure(
        groups, edges, id="entropy", title="Entropy", caption=caption, quantity="entropy, nats", axis_format="~g"
    )


def _confusion_figure(judged: measures.Answers, names: ClassNames, num_classes: int) -> Figure:
    pairs = measures.confused_pairs(judged.targets, judged.predicted, WORST)
    wrong = int((~judged.right).sum())
    columns = ["true class", "teacher's class", "rows", "share of the true class"]
    in_class = np.bincount(judged.targets, minlength=num_classes)
    cells = [[names[a], names[b], count(number), percent(number / in_class[a])] for a, b, number in pairs]
    if pairs:
        a, b, number = pairs[0]
        caption = (
            f"Most often {names[a]} is taken for {names[b]}: {counted(number, 'row', 'rows')}, "
            f"{percent(number / in_class[a])} of its class; {counted(wrong, 'row is', 'rows are')} wrong in all."
        )
    else:
        caption = "The teacher is wrong on no row."
    if num_classes > WHOLE_MATRIX:
        spec = charts.bars(
            [{"name": f"{names[a]} → {names[b]}", "value": number} for a, b, number in pairs],
            title="rows", axis_format="~s",
        )  # fmt: skip
        title = f"The {len(pairs)} most confused pairs of classes"
        return Figure("confusion", title, caption, spec, Table(columns, cells), width="two-thirds")
    matrix = measures.confusion(judged.targets, judged.predicted, num_classes)
    rows = [
        {
            "true": names[a],
            "predicted": names[b],
            "true_number": a,
            "predicted_number": b,
            "count": int(matrix[a, b]),
            "share": float(matrix[a, b] / in_class[a]),
        }
        for a in range(num_classes)
        for b in range(num_classes)
        if matrix[a, b]
    ]
    table = Table(
        ["true class", *map(names.__getitem__, range(num_classes))],
        [[names[a], *(count(int(number)) for number in matrix[a])] for a in range(num_classes) if in_class[a]],
    )
    return Figure(
        "confusion",
        "Confusion between classes",
        caption,
        charts.confusion_chart(rows, [names[number] for number in range(num_classes)]),
        table,
        width="two-thirds",
    )


def _classes_figure(judged: measures.Answers, names: ClassNames, num_classes: int) -> Figure:
    accuracy_C, counts_C = measures.class_accuracy(judged.targets, judged.right, num_classes)
    seen = np.flatnonzero(counts_C)
    worst = seen[np.argsort(accuracy_C[seen], kind="stable")][:WORST].tolist()
    rows = [{"name": names[number], "value": float(accuracy_C[number])} for number in worst]
    best = int(seen[np.argmax(accuracy_C[seen])])
    least, greatest = (f"{percent(float(accuracy_C[number]))} ({names[number]})" for number in (worst[0], best))
    caption = f"From {least} to {greatest}."
    title = (
        "Accuracy by class" if len(worst) == len(seen) else f"Accuracy of the {len(worst)} worst of {len(seen)} classes"
    )
    table = Table(
        ["class", "accuracy", "rows"],
        [[names[number], percent(float(accuracy_C[number])), count(int(counts_C[number]))] for number in worst],
    )
    spec = charts.bars(rows, title="accuracy", axis_format="~%", domain=(0, 1))
    return Figure("classes", title, caption, spec, table)


def fidelity_section(cache: LogitCache) -> Section:
    """What the encoding lost, by the receipts, and where the bytes lie."""
    section = Section("fidelity", "Fidelity of the encoding")
    figure = _divergence_figure(cache)
    if figure is None:
        section.lead.append("The receipts state no divergence for this encoding: it is not finite.")
    else:
        section.lead.append(
            "KL(teacher ‖ decoded) at T = 1, measured on every row when it was written, and kept in the receipts."
        )
        section.figures.append(figure)
    sizes: dict[str, int] = {}
    for receipt in cache.receipts.values():
        for name, stored in receipt.objects.items():
            sizes[name] = sizes.get(name, 0) + stored.bytes
    total = max(sum(sizes.values()), 1)
    ordered = sorted(sizes.items(), key=lambda item: -item[1])
    caption = (
        f"{size(sum(sizes.values()))} in {counted(len(sizes), 'array', 'arrays')}; {name_of(ordered[0][0])} takes "
        f"{percent(ordered[0][1] / total, 1)}."
    )
    spec = charts.bars([{"name": name, "value": held} for name, held in ordered], title="bytes", axis_format="~s")
    table = Table(["array", "bytes", "share"], [[name, count(held), percent(held / total)] for name, held in ordered])
    section.figures.append(Figure("bytes", "Where the bytes are", caption, spec, table, "half"))
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
        num_rows = sum(receipt.rows for receipt in receipts)
        rows.append(
            {
                "views": str(group[0]) if len(group) == 1 else f"{group[0]}–{group[-1]}",
                "mean": sum(receipt.rows * receipt.kl_mean for receipt in receipts) / num_rows,
                "low": min(means),
                "high": max(means),
                "largest": max((receipt.kl_max for receipt in receipts if receipt.kl_max is not None), default=None),
            }
        )
    largest = [row["largest"] for row in rows if row["largest"] is not None]
    caption = f"On average {decimal(cache.kl_mean)} nats are lost"
    caption += f"; the worst row loses {decimal(max(largest))}." if largest else "."
    caption += " Circles are means, lines reach from the best to the worst block, triangles are the worst rows."
    values = [value for row in rows for name, value in row.items() if name != "views" and value is not None]
    logarithmic = min(values) > 0 and max(values) > 20 * min(values)
    columns = ["view", "mean", "least block", "greatest block", "worst row"]
    cells = [[row["views"], *(decimal(row[name]) for name in ("mean", "low", "high", "largest"))] for row in rows]
    spec = charts.divergence_by_view(rows, logarithmic=logarithmic)
    return Figure("divergence", "Divergence by view", caption, spec, Table(columns, cells), "half")


def disagreement_section(
    found: Disagreement | None, most: list[ShownSample], drawn: list[ShownSample], *, pictures: bool
) -> Section:
    """Where views of one sample make the teacher say different things."""
    section = Section("views", "Where views disagree")
    if found is None:
        section.lead.append("The cache holds a single view, so there is nothing to compare.")
        return section
    mixing = " Views in which the sample is mixed with another are left out." if found.unmixed else ""
    section.lead.append(
        f"How far the teacher's distributions over {counted(len(found.views), 'view', 'views')} of one sample lie "
        f"apart: their Jensen-Shannon divergence, on {counted(len(found.rows), 'sample', 'samples')}.{mixing}"
    )
    if not pictures:
        section.lead.append("For the pictures, name the pipeline that has the data: --data PIPELINE.")
    values = found.divergence
    caption = (
        f"Half of the samples lie below {decimal(float(np.median(values)))} nats, nine of ten below "
        f"{decimal(float(np.quantile(values, 0.9)))}; the largest divergence is {decimal(float(values.max()))}."
    )
    edges = np.linspace(0, max(float(values.max()), 1e-6) * (1 + 1e-6), 25)
    figure = histogram_figure(
        {"samples": values}, edges, width="full", id="disagreement", title="Divergence between views", caption=caption,
        quantity="divergence, nats", axis_format="~g",
    )  # fmt: skip
    section.figures.append(figure)
    section.gallery = [
        (f"The {len(most)} samples whose views disagree most", most),
        (f"{counted(len(drawn), 'other', 'others')}, drawn at random", drawn),
    ]
    section.gallery = [(title, shown) for title, shown in section.gallery if shown]
    section.lead.append(
        f"Below, for some samples, the view that is closest to the mean and those farthest from it, with the teacher's "
        f"{TOP} most probable classes."
    )
    return section
