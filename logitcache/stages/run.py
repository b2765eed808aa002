"""A pipeline from end to end, skipping what is done."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from logitcache.cache.reader import open_cache
from logitcache.config.build import TRAINED, resolve_data, resolve_plan, teacher_folder
from logitcache.config.schema import Pipeline
from logitcache.errors import NotACache, UsageError
from logitcache.stages.cache_teacher import cache_teacher
from logitcache.stages.train_student import Row, train_students, train_teacher
from logitcache.train.ranks import launched
from logitcache.train.runs import RESULT


@dataclass(frozen=True)
class Step:
    """One stage of a pipeline."""

    stage: str
    what: str
    done: bool


def plan_run(pipeline: Pipeline, *, trust: bool = False) -> list[Step]:
    """What `run_pipeline` would do; loads the data and builds the transforms, so that they are known to work."""
    data = resolve_data(pipeline, trust=trust)
    resolve_plan(pipeline, data, trust=trust)
    steps = []
    if pipeline.teacher.weights == TRAINED:
        steps.append(Step("train-teacher", pipeline.teacher.model, (teacher_folder(pipeline) / RESULT).is_file()))
    what = f"{pipeline.views.count} views of {len(data.train):,} samples, {pipeline.encoding()!r}"
    steps.append(Step("cache-teacher", f"{what} -> {pipeline.cache.path}", _cached(pipeline)))
    for student in pipeline.students:
        seeds = pipeline.train_config(student).seeds
        folders = [Path(pipeline.runs.path) / student.name / f"seed-{seed}" for seed in seeds]
        done = all((folder / RESULT).is_file() for folder in folders)
        steps.append(Step("train-student", f"{student.name} ({student.model}), {len(seeds)} seeds", done))
    return steps


def run_pipeline(pipeline: Pipeline, *, trust: bool = False) -> list[Row]:
    """Teacher, cache and students of a pipeline; each stage goes on from where it was left.

    Raises:
        UsageError: under `torchrun`, which starts the processes of one stage.
    """
    if launched():
        raise UsageError(
            "`run` takes one stage after another in one process; with torchrun start the stages one by one: "
            "train-teacher, cache-teacher, train-student"
        )
    if pipeline.teacher.weights == TRAINED:
        train_teacher(pipeline, trust=trust)
    cache_teacher(pipeline, trust=trust)
    return train_students(pipeline, trust=trust) if pipeline.students else []


def _cached(pipeline: Pipeline) -> bool:
    with suppress(NotACache):
        cache = open_cache(pipeline.cache.path)
        return cache.sealed and cache.views.stop >= pipeline.views.count
    return False
