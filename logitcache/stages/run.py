"""All stages of a pipeline."""

from __future__ import annotations

from logitcache.config.build import TRAINED
from logitcache.config.schema import Pipeline
from logitcache.errors import UsageError
from logitcache.stages.cache_teacher import cache_teacher
from logitcache.stages.train_student import Row, train_students
from logitcache.stages.train_teacher import train_teacher
from logitcache.train.ranks import launched


def run_pipeline(pipeline: Pipeline, *, trust: bool = False) -> list[Row]:
    """Run all stages of a pipeline; stages that are complete are skipped, and interrupted ones resume.

    Raises:
        UsageError: under `torchrun`, which starts the processes of a single stage.
    """
    if launched():
        raise UsageError(
            "`run` executes all stages in one process; with torchrun, start each stage on its own: train-teacher, "
            "cache-teacher, train-student"
        )
    if pipeline.teacher.weights == TRAINED:
        train_teacher(pipeline, trust=trust)
    cache_teacher(pipeline, trust=trust)
    return train_students(pipeline, trust=trust) if pipeline.students else []
