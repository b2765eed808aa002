"""The check of a pipeline before any of its stages runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from logitcache.cache.reader import open_cache
from logitcache.catalog.datasets import Data
from logitcache.catalog.models import check_model_name
from logitcache.config.build import (
    TRAINED,
    load_configured,
    resolve_collate,
    resolve_loss,
    student_folder,
    teacher_folder,
)
from logitcache.config.schema import DataConfig, ModelConfig, Pipeline, ViewsConfig
from logitcache.data.transforms import build_transform
from logitcache.encodings import encoding_or_auto
from logitcache.entry_points import is_entry_point, load_entry_point
from logitcache.errors import DatasetUnavailable, NotACache, UntrustedCode, UsageError
from logitcache.train.runs import RESULT


@dataclass(frozen=True)
class Step:
    """One stage of a pipeline."""

    stage: str
    what: str
    done: bool


@dataclass(frozen=True)
class RunPlan:
    """The stages of a pipeline or a federation, and what is missing to run them."""

    file: str = ""
    steps: list[Step] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    """Data, weights, packages and code that are not on this machine or not trusted, one message each."""
    unchecked: list[str] = field(default_factory=list)
    """What was not checked, one message each."""
    error: str | None = None
    """Why the file is invalid."""


class Inspection:
    """Checks the names in a pipeline file and collects what is not on this machine; downloads and trains nothing.

    Args:
        trust: import entry points from outside the working folder.
        load_all: load datasets of the user's own code too. Without it, that code is imported but not called, since it
            may download.
    """

    def __init__(self, *, trust: bool, load_all: bool) -> None:
        self.trust = trust
        self.load_all = load_all
        self.missing: list[str] = []
        self.unchecked: list[str] = []

    def data(self, config: DataConfig) -> Data | None:
        """Load a dataset without downloading it; None if it is missing or not loaded."""
        with self.collect():
            if is_entry_point(config.name):
                load_entry_point(config.name, trust=self.trust)
                if not self.load_all:
                    self.unchecked.append(f"{config.name} was not called; --require-data calls it")
                    return None
            return load_configured(config.model_copy(update={"download": False}), trust=self.trust)
        return None

    def views(self, config: ViewsConfig) -> None:
        """Build the transform."""
        with self.collect():
            build_transform(config.transform or [], trust=self.trust)

    def model(self, config: ModelConfig) -> None:
        """Check the model's name, its input transform and its weights file."""
        with self.collect():
            check_model_name(config.model, trust=self.trust)
        with self.collect():
            build_transform(config.input or [], trust=self.trust)
        if config.weights is not None:
            self.weights(config.weights)

    def weights(self, name: str) -> None:
        """Check that a weights file exists; weights that torchvision downloads are not checked."""
        if name.endswith(".safetensors") and not Path(name).is_file():
            self.missing.append(f"weights file {name} does not exist")

    def plan(self, steps: list[Step]) -> RunPlan:
        """The steps with everything that was found."""
        missing, unchecked = list(dict.fromkeys(self.missing)), list(dict.fromkeys(self.unchecked))
        return RunPlan(steps=steps, missing=missing, unchecked=unchecked)

    @contextmanager
    def collect(self) -> Iterator[None]:
        """Collect an error whose cause is that something is not on this machine; other errors pass."""
        try:
            yield
        except (DatasetUnavailable, UntrustedCode) as error:
            self.missing.append(str(error))
        except UsageError as error:
            if not isinstance(error.__cause__, ImportError | OSError):
                raise
            self.missing.append(str(error))


def plan_run(pipeline: Pipeline, *, trust: bool = False, load_all: bool = True) -> RunPlan:
    """Check the names in a pipeline and list its stages.

    Args:
        pipeline: its schema, losses and encodings were checked when it was read, but no code was imported.
        trust: import entry points from outside the working folder.
        load_all: see `Inspection`.

    Raises:
        UsageError: an unknown name, or a parameter that does not fit.
    """
    inspection = Inspection(trust=trust, load_all=load_all)
    data = inspection.data(pipeline.data)
    with inspection.collect():
        resolve_collate(pipeline, trust=trust)
    inspection.views(pipeline.views)
    cached = _cached(pipeline)
    # A sealed cache needs no teacher, and `trained` weights come from train-teacher.
    teacher = pipeline.teacher
    inspection.model(teacher.model_copy(update={"weights": None}) if cached else teacher)
    if teacher.start_from is not None:
        inspection.weights(teacher.start_from)
    for student in pipeline.students:
        inspection.model(student)
        with inspection.collect():
            resolve_loss(student, trust=trust)
    return inspection.plan(_steps(pipeline, data, cached=cached))


def _steps(pipeline: Pipeline, data: Data | None, *, cached: bool) -> list[Step]:
    steps = []
    if pipeline.teacher.weights == TRAINED:
        steps.append(Step("train-teacher", pipeline.teacher.model, (teacher_folder(pipeline) / RESULT).is_file()))
    samples = "" if data is None else f" of {len(data.train):,} samples"
    what = f"{_counted(pipeline.views.count, 'view')}{samples}, {encoding_or_auto(pipeline.cache.encoding)!r}"
    steps.append(Step("cache-teacher", f"{what} -> {pipeline.cache.path}", cached))
    for student in pipeline.students:
        seeds = pipeline.train_config(student).seeds
        done = all((student_folder(pipeline, student.name, seed) / RESULT).is_file() for seed in seeds)
        steps.append(Step("train-student", f"{student.name} ({student.model}), {_counted(len(seeds), 'seed')}", done))
    return steps


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _cached(pipeline: Pipeline) -> bool:
    with suppress(NotACache):
        cache = open_cache(pipeline.cache.path)
        return cache.sealed and cache.views.stop >= pipeline.views.count
    return False
