"""Supervised training of the pipeline's own teacher, where `teacher.weights` is "trained"."""

from __future__ import annotations

from typing import Any

import numpy as np

from logitcache.config.build import (
    TRAINED,
    build_context,
    build_evaluation,
    build_tracker,
    resolve_data,
    resolve_model,
    resolve_plan,
    teacher_folder,
)
from logitcache.config.schema import Pipeline
from logitcache.data.order import run_seed
from logitcache.data.streamed import refuse_stream
from logitcache.data.views import ViewDataset
from logitcache.errors import UsageError
from logitcache.losses import CrossEntropy
from logitcache.train.job import Job
from logitcache.train.loop import train
from logitcache.train.ranks import joined


def train_teacher(pipeline: Pipeline, *, trust: bool = False) -> dict[str, Any]:
    """Train the teacher on true labels, on the pipeline's views, with a new view each epoch.

    Raises:
        UsageError: `teacher.weights` is not "trained".
    """
    config = pipeline.teacher
    if config.weights != TRAINED:
        raise UsageError(
            f"teacher.weights is {config.weights!r}; set teacher.weights={TRAINED} to train one here, and "
            "teacher.start_from to the weights to fine-tune from, if any"
        )
    data = resolve_data(pipeline, trust=trust)
    refuse_stream(data.train, "training takes samples in any order")
    plan = resolve_plan(pipeline, data, trust=trust)
    settings = pipeline.train_config(config)
    seed = settings.seeds[0]
    model = resolve_model(config, data, plan, weights=config.start_from, seed=run_seed(seed), trust=trust)
    context = build_context(pipeline, trust=trust)
    with joined(context.device) as ranks:
        return train(
            Job(
                name="teacher",
                model=model,
                views=ViewDataset(data.train, plan, on_device=pipeline.views.on_device),
                indices=np.arange(len(data.train)),
                loss=CrossEntropy(),
                config=settings,
                seed=seed,
                validation=build_evaluation(pipeline, data.validation, config, context),
                test=build_evaluation(pipeline, data.test, config, context),
                device=context.device,
                num_workers=context.num_workers,
                folder=teacher_folder(pipeline),
                identity=pipeline.run_identity(config, seed),
                resolved=pipeline.as_yaml(),
                tracker=build_tracker(pipeline, trust=trust),
            ),
            ranks,
        )
