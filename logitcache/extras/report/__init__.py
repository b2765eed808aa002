"""One self-contained page on a cache and the students that were trained from it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from logitcache.cache.names import names_of
from logitcache.cache.reader import LogitCache, open_cache
from logitcache.config.schema import Pipeline
from logitcache.errors import UsageError
from logitcache.extras.report.decisions import choose_samples, decide
from logitcache.extras.report.explained import decision_section, tree_section
from logitcache.extras.report.fitted import FittedData, fit_data
from logitcache.extras.report.page import check_installed as check_installed
from logitcache.extras.report.page import render
from logitcache.extras.report.samples import disagreement, shown_rows, shown_samples
from logitcache.extras.report.sections import cache_section, disagreement_section, fidelity_section, teacher_section
from logitcache.extras.report.student_section import student_section
from logitcache.extras.report.students import RunsFound, find_runs, measure_students, spread
from logitcache.extras.report.teacher import listen
from logitcache.extras.report.words import ClassNames, count, decimal, name_of, percent, with_spread
from logitcache.storage import LocalStorage, local_path


@dataclass(frozen=True)
class Written:
    """A report that was written."""

    path: Path
    bytes: int
    headline: dict[str, Any]
    """Its chief numbers, as JSON."""


def write_report(
    cache: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    runs: str | os.PathLike[str] | None = None,
    data: Pipeline | None = None,
    trust: bool = False,
) -> Written:
    """Write a page on a cache: what it is, its teacher, its fidelity, its views, and the students of a folder of runs.

    Memory and time are bounded whatever the cache's size; the page says on how many rows it rests.

    Args:
        cache: where it lies.
        out: the HTML file to write, whole or not at all.
        runs: a folder below which runs lie.
        data: the pipeline that has the data, for pictures, and to measure students on; without it each run's own
            pipeline is asked.
        trust: run `package.module:function` code from outside the working folder.

    Raises:
        UsageError: a file that can't be written, no such folder of runs, or the extra `report` is not installed.
        IdentityMismatch: the data are not those of the cache.
        LogitCacheError: whatever is wrong with the cache.
    """
    path = local_path(out)
    check_output(path)
    check_installed()
    location = os.fspath(cache)
    opened = open_cache(location, trust=trust)
    found = None if runs is None else find_runs(Path(runs), opened)
    fitted = None if data is None else fit_data(opened, location, data, trust=trust)
    page, headline = _page(opened, location, found, fitted, trust=trust)
    encoded = page.encode()
    LocalStorage(path.absolute().parent).put(path.name, encoded)
    return Written(path, len(encoded), headline)


def check_output(path: Path) -> None:
    """Refuse a file that can't be written, before anything is computed for it.

    Raises:
        UsageError: a directory, or one in a folder that is not there.
    """
    if path.is_dir():
        raise UsageError(f"{path} is a directory; name the file to write, such as {path / 'report.html'}")
    folder = path.absolute().parent
    if not folder.is_dir():
        raise UsageError(f"there is no folder {folder} to write {path.name} into; make it first")
    if not os.access(folder, os.W_OK):
        raise UsageError(f"can't write into {folder}; choose another --output")


def _page(
    cache: LogitCache, location: str, found: RunsFound | None, fitted: FittedData | None, *, trust: bool
) -> tuple[str, dict[str, Any]]:
    heard = listen(cache)
    teacher, numbers = teacher_section(cache, heard)
    views = disagreement(cache, heard.views)
    most, drawn = ([], []) if views is None else shown_rows(views)
    shown = [] if views is None else shown_samples(cache, views, [*most, *drawn], fitted)
    sections = [
        cache_section(cache),
        teacher,
        fidelity_section(cache),
        disagreement_section(views, shown[: len(most)], shown[len(most) :], pictures=fitted is not None),
    ]
    students: list[dict[str, Any]] = []
    if found is not None:
        found = measure_students(found, cache, location, fitted, heard.views[0], trust=trust)
        names = ClassNames(cache.manifest.identity.class_names)
        sections.append(student_section(found, names, cache.num_classes))
        chosen = choose_samples(found, cache, fitted)
        trees = tree_section(found, chosen, names)
        sections += [] if trees is None else [trees]
        decisions = None if fitted is None or not chosen else decide(found, chosen, fitted)
        sections.append(decision_section(decisions, found))
        students = [
            {
                "name": student.name,
                "accuracy_mean": student.row.accuracy_mean,
                "accuracy_sd": student.row.accuracy_sd,
                "epoch_seconds": student.row.epoch_seconds,
                "latency_ms": student.latency_ms,
                "agreement_mean": None if student.agreement is None else spread(student.agreement)[0],
            }
            for student in found.students
        ]
    headline = {"kl_mean": cache.kl_mean, **numbers, "students": students}
    page = render(
        title=name_of(names_of(cache.manifest).title, 200),
        sections=sections,
        tiles=_tiles(cache, numbers, found),
        class_names=ClassNames(cache.manifest.identity.class_names),
    )
    return page, headline


def _tiles(cache: LogitCache, numbers: dict[str, float | None], found: RunsFound | None) -> list[tuple[str, str, str]]:
    tiles = []
    if numbers.get("accuracy") is not None:
        top5 = numbers["top5_accuracy"]
        tiles.append(
            (
                "teacher's accuracy",
                percent(numbers["accuracy"]),
                "on cached training views" if top5 is None else f"top-5: {percent(top5)}",
            )
        )
        tiles.append(("calibration error", percent(numbers["ece"]), f"NLL {decimal(numbers['nll'])} nats"))
    tiles.append(
        ("mean confidence", percent(numbers["confidence_mean"]), f"entropy {decimal(numbers['entropy_mean'])} nats")
    )
    rows = sum(receipt.rows for name, receipt in cache.receipts.items() if name != "fixed")
    tiles.append(("bytes a label", decimal(cache.target_bytes / max(rows, 1)), f"KL {decimal(cache.kl_mean)} nats"))
    best = [] if found is None else [student for student in found.students if student.row.accuracy_mean is not None]
    if best:
        student = max(best, key=lambda each: each.row.accuracy_mean or 0.0)
        accuracy = with_spread(student.row.accuracy_mean, student.row.accuracy_sd)
        tiles.append(("best student", accuracy, f"{student.name}; {count(student.row.parameters)} parameters"))
    return tiles
