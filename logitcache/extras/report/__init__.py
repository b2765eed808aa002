"""One self-contained HTML page about a cache and the students that were trained from it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from logitcache.cache.names import names_of
from logitcache.cache.reader import LogitCache, open_cache
from logitcache.config.schema import Pipeline
from logitcache.errors import UsageError
from logitcache.extras.report.decision_views import choose_samples, decision_section
from logitcache.extras.report.formatting import ClassNames, count, decimal, percent, plain_text, with_spread
from logitcache.extras.report.matched_data import MatchedData, match_data
from logitcache.extras.report.page import check_installed as check_installed
from logitcache.extras.report.page import render
from logitcache.extras.report.samples import disagreement, shown_rows, shown_samples
from logitcache.extras.report.sections import (
    bytes_per_row,
    cache_section,
    disagreement_section,
    fidelity_section,
    teacher_section,
)
from logitcache.extras.report.student_section import student_section, tree_section
from logitcache.extras.report.students import RunsFound, find_runs, measure_students, spread
from logitcache.extras.report.teacher import measure_teacher
from logitcache.storage import LocalStorage, local_path


@dataclass(frozen=True)
class WrittenReport:
    """A report that was written."""

    path: Path
    bytes: int
    headline: dict[str, Any]
    """Its main numbers, as JSON."""


def write_report(
    cache: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    runs: str | os.PathLike[str] | None = None,
    data: Pipeline | None = None,
    trust: bool = False,
) -> WrittenReport:
    """Write an HTML page about a cache: metadata, teacher, fidelity, views, and the students of a folder of runs.

    Memory and time are bounded for a cache of any size; the page states how many rows were measured.

    Args:
        cache: its location.
        out: the HTML file to write. It is written atomically.
        runs: a folder that contains runs at any depth.
        data: the pipeline that names the data, for pictures and to measure students; by default students are measured
            on the data of their own pipelines.
        trust: run `package.module:function` code from outside the working folder.

    Raises:
        UsageError: the file can't be written, the folder of runs is missing, or the extra `report` is not installed.
        IdentityMismatch: the data differs from the cache's.
        LogitCacheError: the cache can't be read.
    """
    path = local_path(out)
    check_output(path)
    check_installed()
    location = os.fspath(cache)
    opened = open_cache(location, trust=trust)
    found = None if runs is None else find_runs(Path(runs), opened)
    matched = None if data is None else match_data(opened, location, data, trust=trust)
    page, headline = _page(opened, location, found, matched, trust=trust)
    encoded = page.encode()
    LocalStorage(path.absolute().parent).put(path.name, encoded)
    return WrittenReport(path, len(encoded), headline)


def check_output(path: Path) -> None:
    """Refuse a file that can't be written, before anything is computed.

    Raises:
        UsageError: it is a directory, or its folder is missing or read-only.
    """
    if path.is_dir():
        raise UsageError(f"{path} is a directory; name the file to write, such as {path / 'report.html'}")
    folder = path.absolute().parent
    if not folder.is_dir():
        raise UsageError(f"there is no folder {folder} to write {path.name} into; create it first")
    if not os.access(folder, os.W_OK):
        raise UsageError(f"can't write into {folder}; choose another --output")


def _page(
    cache: LogitCache, location: str, found: RunsFound | None, matched: MatchedData | None, *, trust: bool
) -> tuple[str, dict[str, Any]]:
    stats = measure_teacher(cache)
    names = ClassNames(cache.manifest.identity.class_names)
    teacher, numbers = teacher_section(cache, stats)
    views = disagreement(cache, stats.views)
    most, drawn = ([], []) if views is None else shown_rows(views)
    shown = [] if views is None else shown_samples(cache, views, [*most, *drawn], matched)
    sections = [
        cache_section(cache),
        teacher,
        fidelity_section(cache),
        disagreement_section(views, shown[: len(most)], shown[len(most) :], pictures=matched is not None),
    ]
    if found is not None:
        found = measure_students(found, cache, location, matched, stats.views[0], trust=trust)
        chosen = choose_samples(found, cache, matched)
        sections.append(student_section(found, names, cache.num_classes))
        trees = tree_section(found, chosen, names)
        sections += [] if trees is None else [trees]
        sections.append(decision_section(found, chosen, matched))
    page = render(
        title=plain_text(names_of(cache.manifest).title, 200),
        sections=sections,
        tiles=_tiles(cache, numbers, found),
        class_names=names,
    )
    students = [
        {
            "name": student.name,
            "accuracy_mean": student.row.accuracy_mean,
            "accuracy_sd": student.row.accuracy_sd,
            "epoch_seconds": student.row.epoch_seconds,
            "latency_ms": student.latency_ms,
            "agreement_mean": None if student.agreement is None else spread(student.agreement)[0],
        }
        for student in (found.students if found is not None else ())
    ]
    return page, {"kl_mean": cache.kl_mean, **numbers, "students": students}


def _tiles(cache: LogitCache, numbers: dict[str, float | None], found: RunsFound | None) -> list[tuple[str, str, str]]:
    tiles = []
    if numbers.get("accuracy") is not None:
        top5 = numbers["top5_accuracy"]
        remark = "on cached training views" if top5 is None else f"top-5: {percent(top5)}"
        tiles = [
            ("teacher top-1 accuracy", percent(numbers["accuracy"]), remark),
            ("calibration error", percent(numbers["ece"]), f"NLL {decimal(numbers['nll'])} nats"),
        ]
    tiles += [
        ("mean confidence", percent(numbers["confidence_mean"]), f"entropy {decimal(numbers['entropy_mean'])} nats"),
        ("bytes per row", decimal(bytes_per_row(cache)), f"KL {decimal(cache.kl_mean)} nats"),
    ]
    if found is not None and found.students and found.students[0].row.accuracy_mean is not None:
        best = found.students[0]
        accuracy = with_spread(best.row.accuracy_mean, best.row.accuracy_sd)
        tiles.append(("best student", accuracy, f"{best.name}; {count(best.row.parameters)} parameters"))
    return tiles
