"""Runs all stages of a pipeline, and skips those that are done."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass

from logitcache.cache.reader import open_cache
from logitcache.config.build import TRAINED, resolve_data, resolve_plan, student_folder, teacher_folder
from logitcache.config.schema import Pipeline
from logitcache.errors import NotACache, UsageError
from logitcache.stages.cache_teacher import cache_teacher
from logitcache.stages.train_student import Row, train_students
from logitcache.stages.train_teacher import train_teacher
from logitcache.train.ranks import launched
from logitcache.train.runs import RESULT


@dataclass(frozen=True)
class Step:
    """One stage of a pipeline."""

    stage: str
    what: str
    done: bool


def plan_run(pipeline: Pipeline, *, trust: bool = False) -> list[Step]:
    """The stages of `run_pipeline`; loads the data and builds the transforms, to check them."""
    data = resolve_data(pipeline, trust=trust)
    resolve_plan(pipeline, data, trust=trust)
    steps = []
    if pipeline.teacher.weights == TRAINED:
        steps.append(Step("train-teacher", pipeline.teacher.model, (teacher_folder(pipeline) / RESULT).is_file()))
    what = f"{pipeline.views.count} views of {len(data.train):,} samples, {pipeline.encoding()!r}"
    steps.append(Step("cache-teacher", f"{what} -> {pipeline.cache.path}", _cached(pipeline)))
    for student in pipeline.students:
        seeds = pipeline.train_config(student).seeds
        done = all((student_folder(pipeline, student.name, seed) / RESULT).is_file() for seed in seeds)
        steps.append(Step("train-student", f"{student.name} ({student.model}), {len(seeds)} seeds", done))
    return steps


def run_pipeline(pipeline: Pipeline, *, trust: bool = False) -> list[Row]:
    """Train the teacher, build the cache and train the students; each stage resumes where it was interrupted.

    Raises:
        UsageError: started by `torchrun`.
    """
    if launched():
        raise UsageError(
            "`run` runs all stages in one process; with torchrun start each stage on its own: "
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
