"""The check of a pipeline before any of its stages runs."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from logitcache.cache.reader import LogitCache
from logitcache.catalog.datasets import Data
from logitcache.catalog.models import check_model_name
from logitcache.config.build import (
    TRAINED,
    load_configured,
    recorded_views,
    resolve_collate,
    resolve_loss,
    student_folder,
    teacher_folder,
)
from logitcache.config.schema import DataConfig, ModelConfig, Pipeline, ViewsConfig
from logitcache.data.transforms import build_transform
from logitcache.encodings import encoding_or_auto
from logitcache.entry_points import is_entry_point, load_entry_point
from logitcache.errors import DatasetUnavailable, LogitCacheError, UntrustedCode, UsageError
from logitcache.stages.conflicts import check_cache, check_student_runs, check_teacher_run, existing_cache
from logitcache.train.runs import RESULT

FILE_SUFFIX = re.compile(
    r"\.(arrow|csv|feather|gz|h5|hdf5|json|jsonl|npy|npz|parquet|pkl|pt|pth|tar|tsv|txt|zip)", re.IGNORECASE
)
"""Of arguments of a user's dataset function that name a file."""


@dataclass(frozen=True)
class Step:
    """One stage of a pipeline."""

    stage: str
    what: str
    done: bool
    conflict: str | None = None
    """Why the stage will refuse the cache or the run that exists."""
    exit_code: int = 0
    """Exit code of the stage then."""


@dataclass(frozen=True)
class RunPlan:
    """The stages of a pipeline or a federation, and what is missing to run them."""

    file: str = ""
    steps: list[Step] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    """Data, weights, packages and code that are not on this machine or not trusted, one message each."""
    missing_data: list[str] = field(default_factory=list)
    """The files, folders and dataset names of the data that is missing."""
    unchecked: list[str] = field(default_factory=list)
    """What was not checked, one message each."""
    error: str | None = None
    """Why the file is invalid."""

    @property
    def exit_code(self) -> int:
        """Of the first stage that will refuse what exists; 0 if there is none."""
        return next((step.exit_code for step in self.steps if step.conflict), 0)


class Inspection:
    """Checks the names in a pipeline file and collects what is not on this machine; downloads and trains nothing.

    Args:
        trust: import entry points from outside the working directory.
        load_all: load datasets of the user's own code too. Without it, that code is imported but not called, since it
            may download.
    """

    def __init__(self, *, trust: bool, load_all: bool) -> None:
        self.trust = trust
        self.load_all = load_all
        self.missing: list[str] = []
        self.missing_data: list[str] = []
        self.unchecked: list[str] = []

    def data(self, config: DataConfig) -> Data | None:
        """Load a dataset without downloading it; None if it is missing or not loaded."""
        own = is_entry_point(config.name)
        files = {key: value for key, value in config.args.items() if _is_missing_file(value)} if own else {}
        with self.collect():
            if own:
                load_entry_point(config.name, trust=self.trust)
                if not self.load_all:
                    self.unchecked.append(f"{config.name} was not called; --require-data calls it")
                    self.missing += [f"data.args.{key}: {value} does not exist" for key, value in files.items()]
                    self.missing_data += files.values()
                    return None
            try:
                return load_configured(config.model_copy(update={"download": False}), trust=self.trust)
            except UsageError as error:
                unavailable = isinstance(error, DatasetUnavailable) and not isinstance(error.__cause__, ImportError)
                if unavailable or isinstance(error.__cause__, OSError):
                    self.missing_data += files.values() if files else [config.name if own else config.root]
                raise
        return None

    def views(self, config: ViewsConfig, location: str | None = None) -> None:
        """Build the transform; recorded views come from the cache at `location`, if the file has one."""
        with self.collect():
            if location is None or recorded_views(config, location, trust=self.trust) is None:
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
        found = (list(dict.fromkeys(each)) for each in (self.missing, self.missing_data, self.unchecked))
        missing, missing_data, unchecked = found
        return RunPlan(steps=steps, missing=missing, missing_data=missing_data, unchecked=unchecked)

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


def _is_missing_file(argument: object) -> bool:
    """Whether an argument of a dataset function looks like the path of a file, and there is none."""
    if not isinstance(argument, str) or "://" in argument:
        return False
    return FILE_SUFFIX.fullmatch(Path(argument).suffix) is not None and not Path(argument).exists()


def plan_run(pipeline: Pipeline, *, trust: bool = False, load_all: bool = True) -> RunPlan:
    """Check the names in a pipeline, compare it with the cache and the runs that exist, and list its stages.

    Of the cache, what it records is compared: views, teacher, encoding, and its shape where the data is loaded. Of the
    runs, their configurations. Contents of samples and weights of the teacher are compared when a stage starts.

    Args:
        pipeline: its schema, losses and encodings were checked when it was read, but no code was imported.
        trust: import entry points from outside the working directory.
        load_all: see `Inspection`.

    Raises:
        UsageError: an unknown name, or a parameter that does not fit.
    """
    inspection = Inspection(trust=trust, load_all=load_all)
    data = inspection.data(pipeline.data)
    with inspection.collect():
        resolve_collate(pipeline, trust=trust)
    inspection.views(pipeline.views, pipeline.cache.path)
    cache = existing_cache(pipeline)
    cached = cache is not None and cache.sealed and cache.views.stop >= pipeline.views.count
    # A sealed cache needs no teacher, and `trained` weights come from train-teacher.
    teacher = pipeline.teacher
    inspection.model(teacher.model_copy(update={"weights": None}) if cached else teacher)
    if teacher.start_from is not None:
        inspection.weights(teacher.start_from)
    for student in pipeline.students:
        inspection.model(student)
        with inspection.collect():
            resolve_loss(student, trust=trust)
    return inspection.plan(_steps(pipeline, data, cache, inspection, cached=cached))


def _steps(
    pipeline: Pipeline, data: Data | None, cache: LogitCache | None, inspection: Inspection, *, cached: bool
) -> list[Step]:
    steps = []

    def add(stage: str, what: str, done: bool, check: Callable[[], None]) -> bool:
        """Add a stage; returns whether it accepts what exists."""
        try:
            with inspection.collect():
                check()
            steps.append(Step(stage, what, done))
        except LogitCacheError as error:
            steps.append(Step(stage, what, done=False, conflict=str(error), exit_code=error.exit_code))
        return steps[-1].conflict is None

    def check_existing_cache() -> None:
        if cache is not None:
            not_compared = check_cache(cache, pipeline, data, trust=inspection.trust)
            inspection.unchecked.append(f"not compared with {pipeline.cache.path}: {', '.join(not_compared)}")

    if pipeline.teacher.weights == TRAINED:
        done = (teacher_folder(pipeline) / RESULT).is_file()
        add("train-teacher", pipeline.teacher.model, done, lambda: check_teacher_run(pipeline))
    samples = "" if data is None else f" of {len(data.train):,} samples"
    what = f"{_counted(pipeline.views.count, 'view')}{samples}, {encoding_or_auto(pipeline.cache.encoding)!r}"
    fits = add("cache-teacher", f"{what} -> {pipeline.cache.path}", cached, check_existing_cache)
    fitting = cache if fits and cached else None
    for student in pipeline.students:
        seeds = pipeline.train_config(student).seeds
        done = all((student_folder(pipeline, student.name, seed) / RESULT).is_file() for seed in seeds)
        what = f"{student.name} ({student.model}), {_counted(len(seeds), 'seed')}"
        check = partial(check_student_runs, pipeline, student, fitting, trust=inspection.trust)
        add("train-student", what, done, check)
    return steps


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
