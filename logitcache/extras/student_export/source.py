"""The source of an export: a finished run with its model, its data, its other seeds, and its cache."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import ValidationError

from logitcache.cache.summary import summarise
from logitcache.config.build import recorded_pipeline
from logitcache.config.schema import DataConfig, Pipeline, StudentConfig
from logitcache.errors import IdentityMismatch, LogitCacheError, UsageError
from logitcache.extras.student_export.metadata import (
    METADATA,
    Seeds,
    SourceCache,
    SourceRun,
    StudentMetadata,
    read_metadata,
    record_file,
)
from logitcache.train.finished import Run, read_run
from logitcache.train.runs import CONFIG, RESULT

Weights = Literal["best", "last"]
DEFAULT_FOLDER = "product"
"""Inside the run; the report looks for exports there."""


@dataclass(frozen=True)
class Source:
    """A finished run of a student."""

    run: Run
    student: StudentConfig
    weights: Weights
    given: Pipeline | None
    """The pipeline that names the data; None for the run's own."""

    @property
    def weights_file(self) -> Path:
        """The weights to export."""
        return self.run.folder / f"{self.weights}.safetensors"

    def pipeline(self) -> Pipeline:
        """The pipeline that names the data, checked against the run.

        Raises:
            IdentityMismatch: it names other data; lists the keys that differ.
        """
        pipeline = recorded_pipeline(self.run.folder) if self.given is None else self.given
        there = _data_identity(self.run.config.get("data"))
        here = _data_identity(pipeline.data.model_dump())
        different = [f"data.{key}: {here[key]!r} here, {there[key]!r} there" for key in here if here[key] != there[key]]
        if different:
            raise IdentityMismatch(
                f"the run in {self.run.folder} was not trained on the data of this pipeline:\n  "
                + "\n  ".join(different)
                + "\nPass the pipeline that it was trained with as --data."
            )
        return pipeline

    def record(self) -> SourceRun:
        """The identity of the source."""
        return _record_source(self.run.folder, self.weights)


def open_source(folder: Path, *, weights: Weights, given: Pipeline | None) -> Source:
    """A student's finished run.

    Raises:
        UsageError: the folder is not a run, the run is not finished or not a student's, or the weights are missing.
    """
    if not (folder / CONFIG).is_file():
        raise UsageError(f"{folder} contains no run; expected a folder such as runs/STUDENT/seed-0 with a {CONFIG}")
    if not (folder / RESULT).is_file():
        raise UsageError(f"the run in {folder} is not finished; `logitcache train-student` resumes it")
    try:
        run = read_run(folder)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UsageError(f"the run in {folder} can't be read: {str(error).splitlines()[0]}") from error
    if "teacher" in run.config:
        raise UsageError(f"{folder} is a teacher's run; only students can be exported, such as runs/STUDENT/seed-0")
    try:
        student = StudentConfig.model_validate(run.config.get("student"))
    except (ValidationError, LogitCacheError) as error:
        raise UsageError(f"{folder / CONFIG} describes no valid student: {str(error).splitlines()[0]}") from error
    source = Source(run, student, weights, given)
    if not source.weights_file.is_file():
        raise UsageError(f"there is no {source.weights_file}; a finished run has best and last weights")
    return source


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
        current = _record_source(run.folder, metadata.source.weights)
    except OSError as error:
        raise UsageError(f"the weights that {folder} was exported from can't be read: {error.strerror}") from error
    if metadata.source != current:
        raise UsageError(f"{folder} was exported from other weights than the run's; export it again")
    return metadata


def seeds_of(run: Run) -> Seeds:
    """Accuracies of this run and of the runs beside it that differ only in the seed."""
    results = []
    for folder in sorted(run.folder.resolve().parent.iterdir()):
        if not ((folder / CONFIG).is_file() and (folder / RESULT).is_file()):
            continue
        try:
            sibling = read_run(folder)
        except (OSError, ValueError, yaml.YAMLError):
            continue
        if _without_seed(sibling.config) == _without_seed(run.config):
            results.append(sibling.result)
    results.sort(key=lambda result: result.seed)
    test_mean, test_sd = _spread([result.accuracy for result in results])
    validation_mean, validation_sd = _spread([result.validation_accuracy for result in results])
    return Seeds(
        seeds=[result.seed for result in results],
        test_mean=test_mean,
        test_sd=test_sd,
        validation_mean=validation_mean,
        validation_sd=validation_sd,
    )


def _spread(values: Sequence[float | None]) -> tuple[float | None, float | None]:
    """(mean, standard deviation) of the known values; None where there are too few."""
    known = [value for value in values if value is not None]
    return (statistics.fmean(known) if known else None), (statistics.stdev(known) if len(known) > 1 else None)


def label_source(run: Run) -> tuple[str, str]:
    """(kind of a run's labels, id of the cache if the kind is "cache", else "")."""
    labels = run.config.get("labels")
    labels = labels if isinstance(labels, dict) else {}
    if "given" in labels:
        return "given by the program", ""
    if "cache" in labels:
        return "cache", str(labels["cache"])
    return ("the live teacher" if "teacher" in labels else "true labels"), ""


def source_cache(run: Run, pipeline: Pipeline, *, given: bool) -> SourceCache | None:
    """The cache that a run was trained from, with its digest if the cache is available.

    URLs are used only from a pipeline that was passed explicitly: one found in a run's folder must not cause requests.
    """
    kind, identity = label_source(run)
    if kind != "cache":
        return None
    digest = None
    if given or "://" not in pipeline.cache.path:
        try:
            manifest = summarise(pipeline.cache.path).manifest
            digest = manifest.digest if manifest.id == identity else None
        except (LogitCacheError, OSError):
            pass
    return SourceCache(id=identity, digest=digest)


def _record_source(folder: Path, weights: Weights) -> SourceRun:
    return SourceRun(
        weights=weights,
        weights_sha256=record_file(folder / f"{weights}.safetensors").sha256,
        run_sha256=record_file(folder / CONFIG).sha256,
    )


def _data_identity(data: Any) -> dict[str, Any]:
    """The data configuration without the keys that only say where the data is."""
    try:
        return DataConfig.model_validate(data).model_dump(exclude={"root", "download"})
    except ValidationError as error:
        raise UsageError(f"{CONFIG} does not describe the run's data: {error.errors()[0]['msg']}") from None


def _without_seed(config: dict[str, Any]) -> dict[str, Any]:
    config = copy.deepcopy(config)
    if isinstance(config.get("train"), dict):
        config["train"].pop("seed", None)
    return config
