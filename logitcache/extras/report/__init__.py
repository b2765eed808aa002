"""One self-contained HTML page about a cache and the students that were trained from it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from logitcache.cache.layout import PER_CACHE
from logitcache.cache.names import names_of
from logitcache.cache.reader import LogitCache, open_cache
from logitcache.errors import UsageError
from logitcache.extras.report.decision_views import MAX_STUDENTS, MAX_TREES, choose_samples, decide, draw_trees
from logitcache.extras.report.formatting import ClassNames, plain_text
from logitcache.extras.report.page import check_installed, render
from logitcache.extras.report.samples import TOP, disagreement, shown_rows, shown_samples
from logitcache.extras.report.sections import disagreement_figure, fidelity_figures, teacher_figures
from logitcache.extras.report.student_figures import MAX_SERIES, student_figures
from logitcache.extras.report.students import RunsFound, find_runs, measure_students
from logitcache.extras.report.teacher import measure_teacher
from logitcache.stages.matched_data import MatchedData, RecordedData
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
    data: MatchedData | None = None,
    trust: bool = False,
) -> WrittenReport:
    """Write an HTML page about a cache: metadata, teacher, fidelity, views, and the students of a folder of runs.

    Memory and time are bounded for a cache of any size; the page states how many rows were measured.

    Args:
        cache: its location.
        out: the HTML file to write. It is written atomically.
        runs: a folder that contains runs at any depth.
        data: matched with the cache, for pictures and to measure students; by default students are measured on the
            data of their own pipelines.
        trust: run `package.module:function` code from outside the working directory.

    Raises:
        UsageError: the file can't be written, the folder of runs is missing, or the extra `report` is not installed.
        IdentityMismatch: the data differs from the cache's.
        LogitCacheError: the cache can't be read.
    """
    path = check_report(out)
    location = os.fspath(cache)
    opened = open_cache(location, trust=trust)
    opened.check_has_logits("report")
    found = None if runs is None else find_runs(Path(runs), opened)
    page, headline = _page(opened, found, data, RecordedData(location, trust=trust))
    encoded = page.encode()
    LocalStorage(path.absolute().parent).put(path.name, encoded)
    return WrittenReport(path, len(encoded), headline)


def check_report(out: str | os.PathLike[str]) -> Path:
    """Check that a report can be written, before anything is computed; returns the file's path.

    Raises:
        UsageError: it is a directory, its folder is missing or read-only, or the extra `report` is not installed.
    """
    path = local_path(out)
    if path.is_dir():
        raise UsageError(f"{path} is a directory; name the file to write, such as {path / 'report.html'}")
    folder = path.absolute().parent
    if not folder.is_dir():
        raise UsageError(f"there is no folder {folder} to write {path.name} into; create it first")
    if not os.access(folder, os.W_OK):
        raise UsageError(f"can't write into {folder}; choose another --output")
    check_installed()
    return path


def _page(
    cache: LogitCache, found: RunsFound | None, matched: MatchedData | None, recorded: RecordedData
) -> tuple[str, dict[str, Any]]:
    """(the page, its main numbers)."""
    stats = measure_teacher(cache)
    names = ClassNames(cache.manifest.identity.class_names)
    numbers = stats.headline(cache.num_classes)
    views = disagreement(cache, stats.views)
    most, drawn = ([], []) if views is None else shown_rows(views)
    shown = [] if views is None else shown_samples(cache, views, [*most, *drawn], matched)
    figures = teacher_figures(stats, names, cache.num_classes) | fidelity_figures(cache)
    if views is not None:
        figures["disagreement"] = disagreement_figure(views.divergence)
    trees, decisions = [], None
    if found is not None:
        measure_students(found, cache, stats.views[0], recorded.of_run if matched is None else lambda _: matched)
        figures |= student_figures(found, names, cache.num_classes)
        chosen = choose_samples(found, cache, matched)
        trees = draw_trees(found, chosen)
        decisions = decide(found, chosen, matched) if chosen and matched is not None else None
    page = render(
        figures,
        title=plain_text(names_of(cache.manifest).title, 200),
        cache=cache,
        names=names_of(cache.manifest),
        bytes_per_row=cache.target_bytes / max(1, _stored_rows(cache)),
        class_names=names,
        stats=stats,
        numbers=numbers,
        views=views,
        most=shown[: len(most)],
        drawn=shown[len(most) :],
        top=TOP,
        with_data=matched is not None,
        found=found,
        max_series=MAX_SERIES,
        trees=trees,
        num_trees=0 if found is None else sum(each.node_use is not None for _, each in found.compared()),
        max_trees=MAX_TREES,
        decisions=decisions,
        max_students=MAX_STUDENTS,
    )
    students = [] if found is None else [student.headline() for student in found.students]
    return page, {"kl_mean": cache.kl_mean, **numbers, "students": students}


def _stored_rows(cache: LogitCache) -> int:
    """Rows of the blocks that are present."""
    return sum(receipt.rows for name, receipt in cache.receipts.items() if name != PER_CACHE)
