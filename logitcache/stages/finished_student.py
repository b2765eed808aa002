"""A student's finished run with the data that it was trained on, as an export needs it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import ValidationError
from torch import nn

from logitcache.cache.card_fields import Card
from logitcache.catalog.datasets import Data
from logitcache.config.build import clean_views, recorded_pipeline, resolve_data, resolve_model, resolve_plan
from logitcache.config.schema import DataConfig, Pipeline, StudentConfig
from logitcache.data.samples import Dataset
from logitcache.data.views import ViewDataset
from logitcache.errors import IdentityMismatch, LogitCacheError, UsageError
from logitcache.train.evaluation import Evaluation
from logitcache.train.finished import Run, read_run
from logitcache.train.runs import CONFIG, RESULT

Weights = Literal["best", "last"]


@dataclass(frozen=True)
class FinishedStudent:
    """A finished run of a student. Its data is loaded on first use."""

    run: Run
    config: StudentConfig
    weights: Weights
    given: Pipeline | None
    """The pipeline that names the data; None for the run's own."""
    trust: bool

    @property
    def weights_file(self) -> Path:
        """The chosen weights."""
        return self.run.folder / f"{self.weights}.safetensors"

    @cached_property
    def _pipeline(self) -> Pipeline:
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

    @cached_property
    def data(self) -> Data:
        """The data that it was trained on.

        Raises:
            IdentityMismatch: the pipeline names other data; lists the keys that differ.
            LogitCacheError: the data is not available.
        """
        return resolve_data(self._pipeline, trust=self.trust)

    @property
    def dataset_name(self) -> str:
        """The dataset's name in the pipeline."""
        return self._pipeline.data.name

    @property
    def card(self) -> Card:
        """What the pipeline states about dataset, teacher and license."""
        return self._pipeline.cache.card

    @property
    def cache(self) -> str | None:
        """The location of the pipeline's cache; None for a URL found in a run's folder, which must cause no request."""
        path = self._pipeline.cache.path
        return None if self.given is None and "://" in path else path

    def model(self) -> nn.Module:
        """The student with the chosen weights, in evaluation mode on the CPU."""
        plan = resolve_plan(self._pipeline, self.data, trust=self.trust)
        weights = str(self.weights_file)
        return resolve_model(self.config, self.data, plan, weights=weights, seed=0, trust=self.trust).eval()

    def clean_views(self, dataset: Dataset) -> ViewDataset:
        """A dataset without augmentation, as the student's input."""
        return clean_views(dataset, self.config, self._pipeline, trust=self.trust)

    def evaluation(self, dataset: Dataset) -> Evaluation:
        """A split ready to measure the student on."""
        return Evaluation(self.clean_views(dataset), batch_size=256, num_workers=self._pipeline.num_workers)


def open_student(
    folder: Path, *, weights: Weights = "last", data: Pipeline | None = None, trust: bool = False
) -> FinishedStudent:
    """A student's finished run.

    Args:
        folder: of the run.
        weights: "last", which the run's accuracy refers to, or "best" by validation accuracy.
        data: the pipeline that names the data; the run's own by default.
        trust: allow entry points from outside the working directory.

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
        config = StudentConfig.model_validate(run.config.get("student"))
    except (ValidationError, LogitCacheError) as error:
        raise UsageError(f"{folder / CONFIG} describes no valid student: {str(error).splitlines()[0]}") from error
    student = FinishedStudent(run, config, weights, data, trust)
    if not student.weights_file.is_file():
        raise UsageError(f"there is no {student.weights_file}; a finished run has best and last weights")
    return student


def _data_identity(data: Any) -> dict[str, Any]:
    """The data configuration without the keys that only say where the data is."""
    try:
        return DataConfig.model_validate(data).model_dump(exclude={"root", "download"})
    except ValidationError as error:
        raise UsageError(f"{CONFIG} does not describe the run's data: {error.errors()[0]['msg']}") from None
