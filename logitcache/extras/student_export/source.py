"""A finished run as what is to be exported: its net, its data, its sibling seeds, and the cache that it came from."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import ValidationError

from logitcache.config.build import recorded_pipeline
from logitcache.config.schema import DataConfig, Pipeline, StudentConfig
from logitcache.errors import IdentityMismatch, LogitCacheError, UsageError
from logitcache.extras.student_export.facts import (
    FACTS,
    CacheFacts,
    Product,
    Seeds,
    SourceFacts,
    file_facts,
    read_product,
)
from logitcache.train.finished import Run, read_run
from logitcache.train.runs import CONFIG, RESULT

Weights = Literal["best", "last"]
DEFAULT_FOLDER = "product"
"""Inside the run, where the report looks for what was exported."""


@dataclass(frozen=True)
class Source:
    """A finished run of a student."""

    run: Run
    student: StudentConfig
    weights: Weights
    given: Pipeline | None
    """The pipeline that has the data, where the run's own is not to be asked."""

    @property
    def weights_file(self) -> Path:
        """The weights to export."""
        return self.run.folder / f"{self.weights}.safetensors"

    def pipeline(self) -> Pipeline:
        """The pipeline that has the data, held to what the run says of them.

        Raises:
            IdentityMismatch: it names other data; says in which keys.
        """
        pipeline = recorded_pipeline(self.run.folder) if self.given is None else self.given
        there = _data_identity(self.run.config.get("data"))
        here = _data_identity(pipeline.data.model_dump())
        different = [f"data.{key}: {here[key]!r} here, {there[key]!r} there" for key in here if here[key] != there[key]]
        if different:
            raise IdentityMismatch(
                f"the run in {self.run.folder} was not trained on the data of this pipeline:\n  "
                + "\n  ".join(different)
                + "\nName the pipeline that it was trained with, with --data."
            )
        return pipeline

    def facts(self) -> SourceFacts:
        """What tells this source from any other."""
        return _source_facts(self.run.folder, self.weights)


def open_source(folder: Path, *, weights: Weights, given: Pipeline | None) -> Source:
    """A student's finished run.

    Raises:
        UsageError: no run, one that is not finished, a teacher's, or one without these weights.
    """
    if not (folder / CONFIG).is_file():
        raise UsageError(f"{folder} holds no run; expected a folder such as runs/STUDENT/seed-0, with a {CONFIG} in it")
    if not (folder / RESULT).is_file():
        raise UsageError(f"the run in {folder} is not finished; `logitcache train-student` goes on with it")
    try:
        run = read_run(folder)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UsageError(f"the run in {folder} can't be read: {str(error).splitlines()[0]}") from error
    if "teacher" in run.config:
        raise UsageError(f"{folder} is a teacher's run; what is exported is a student's, such as runs/STUDENT/seed-0")
    try:
        student = StudentConfig.model_validate(run.config.get("student"))
    except (ValidationError, LogitCacheError) as error:
        raise UsageError(f"{folder / CONFIG} describes no student: {str(error).splitlines()[0]}") from error
    source = Source(run, student, weights, given)
    if not source.weights_file.is_file():
        raise UsageError(f"there is no {source.weights_file}; a finished run has best and last weights")
    return source


def exported_product(run: Run) -> Product | None:
    """What was exported of a run into its default folder, if anything.

    Raises:
        UsageError: it can't be read, or it is of other weights than the run has.
    """
    folder = run.folder / DEFAULT_FOLDER
    if not (folder / FACTS).is_file():
        return None
    product = read_product(folder)
    try:
        current = _source_facts(run.folder, product.source.weights)
    except OSError as error:
        raise UsageError(f"the weights that {folder} was made of can't be read: {error.strerror}") from error
    if product.source != current:
        raise UsageError(f"{folder} was made of other weights than the run's; export it again")
    return product


def seeds_of(run: Run) -> Seeds:
    """Accuracies of this run and of those beside it that differ in nothing but the seed."""
    runs = []
    for folder in sorted(run.folder.resolve().parent.iterdir()):
        if not ((folder / CONFIG).is_file() and (folder / RESULT).is_file()):
            continue
        try:
            sibling = read_run(folder)
        except (OSError, ValueError, yaml.YAMLError):
            continue
        if _without_seed(sibling.config) == _without_seed(run.config):
            runs.append(sibling.result)
    runs.sort(key=lambda result: result.seed)
    test = [result.accuracy for result in runs if result.accuracy is not None]
    validation = [result.validation_accuracy for result in runs if result.validation_accuracy is not None]
    return Seeds(
        seeds=[result.seed for result in runs],
        test_mean=_mean(test),
        test_sd=_deviation(test),
        validation_mean=_mean(validation),
        validation_sd=_deviation(validation),
    )


def labels_of(run: Run) -> str:
    """Where a run's labels came from, in words."""
    labels = run.config.get("labels")
    labels = labels if isinstance(labels, dict) else {}
    if "given" in labels:
        return "given by the program"
    if "cache" in labels:
        return "a cache of teacher's logits"
    return "the live teacher" if "teacher" in labels else "true labels"


def cache_of(run: Run, pipeline: Pipeline, *, given: bool) -> CacheFacts | None:
    """The cache that a run was trained from, with its digest where it is at hand.

    A pipeline found in a folder of runs must not fetch anything, so its URLs are not asked; a given one's are.
    """
    labels = run.config.get("labels")
    identity = labels.get("cache") if isinstance(labels, dict) else None
    if not isinstance(identity, str):
        return None
    digest = None
    if given or "://" not in pipeline.cache.path:
        from logitcache.cache.summary import summarise

        try:
            manifest = summarise(pipeline.cache.path).manifest
            digest = manifest.digest if manifest.id == identity else None
        except (LogitCacheError, OSError):
            pass
    return CacheFacts(id=identity, digest=digest)


def _source_facts(folder: Path, weights: Weights) -> SourceFacts:
    return SourceFacts(
        weights=weights,
        weights_sha256=file_facts(folder / f"{weights}.safetensors").sha256,
        run_sha256=file_facts(folder / CONFIG).sha256,
    )


def _data_identity(data: Any) -> dict[str, Any]:
    """What data are, wherever they lie."""
    try:
        return DataConfig.model_validate(data).model_dump(exclude={"root", "download"})
    except ValidationError as error:
        raise UsageError(
            f"{CONFIG} does not say what data the run was trained on: {error.errors()[0]['msg']}"
        ) from None


def _without_seed(config: dict[str, Any]) -> dict[str, Any]:
    config = copy.deepcopy(config)
    if isinstance(config.get("train"), dict):
        config["train"].pop("seed", None)
    return config


def _mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None


def _deviation(values: Sequence[float]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 else None
