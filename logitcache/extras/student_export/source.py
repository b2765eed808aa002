"""The source of an export: the run's weights, its other seeds, and the cache that it was trained from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from logitcache.cache.summary import summarise
from logitcache.errors import LogitCacheError, UsageError
from logitcache.extras.student_export.metadata import (
    METADATA,
    Seeds,
    SourceCache,
    SourceRun,
    StudentMetadata,
    read_metadata,
    record_file,
)
from logitcache.stages.finished_student import FinishedStudent, Weights
from logitcache.train.finished import Run, read_run
from logitcache.train.runs import CONFIG, RESULT
from logitcache.train.table import spread

DEFAULT_FOLDER = "product"
"""Inside the run; the report looks for exports there."""


def record_source(folder: Path, weights: Weights) -> SourceRun:
    """The identity of a run's weights."""
    return SourceRun(
        weights=weights,
        weights_sha256=record_file(folder / f"{weights}.safetensors").sha256,
        run_sha256=record_file(folder / CONFIG).sha256,
    )


def exported_metadata(run: Run) -> StudentMetadata | None:
    """The metadata of a run's export in its default folder, if there is one.

    Raises:
        UsageError: it can't be read, or belongs to other weights than the run's.
    """
    folder = run.folder / DEFAULT_FOLDER
    if not (folder / METADATA).is_file():
        return None
    metadata = read_metadata(folder)
    try:
        current = record_source(run.folder, metadata.source.weights)
    except OSError as error:
        raise UsageError(f"the weights that {folder} was exported from can't be read: {error.strerror}") from error
    if metadata.source != current:
        raise UsageError(f"{folder} was exported from other weights than the run's; export it again")
    return metadata


def seeds_of(run: Run) -> Seeds:
    """Accuracies of this run and of the runs beside it that differ only in the seed."""
    results = []
    for folder in run.folder.resolve().parent.iterdir():
        if not ((folder / CONFIG).is_file() and (folder / RESULT).is_file()):
            continue
        try:
            sibling = read_run(folder)
        except (OSError, ValueError, yaml.YAMLError):
            continue
        if _without_seed(sibling.config) == _without_seed(run.config):
            results.append(sibling.result)
    results.sort(key=lambda result: result.seed)
    test, validation = (
        spread([getattr(result, name) for result in results]) for name in ("accuracy", "validation_accuracy")
    )
    return Seeds(
        seeds=[result.seed for result in results],
        test_mean=test[0],
        test_sd=test[1],
        validation_mean=validation[0],
        validation_sd=validation[1],
    )


def _without_seed(config: dict[str, Any]) -> dict[str, Any]:
    train = config.get("train")
    return config if not isinstance(train, dict) else {**config, "train": {**train, "seed": None}}


def label_source(run: Run) -> tuple[str, str]:
    """(kind of a run's labels, id of the cache if the kind is "cache", else "")."""
    labels = run.config.get("labels")
    labels = labels if isinstance(labels, dict) else {}
    if "given" in labels:
        return "given by the program", ""
    if "cache" in labels:
        return "cache", str(labels["cache"])
    return ("the live teacher" if "teacher" in labels else "true labels"), ""


def source_cache(student: FinishedStudent) -> SourceCache | None:
    """The cache that a student was trained from, with its digest if the cache is available."""
    kind, identity = label_source(student.run)
    if kind != "cache":
        return None
    digest = None
    if student.cache is not None:
        try:
            manifest = summarise(student.cache).manifest
            digest = manifest.digest if manifest.id == identity else None
        except (LogitCacheError, OSError):
            pass
    return SourceCache(id=identity, digest=digest)
