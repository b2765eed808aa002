"""From a pipeline to the things that it names: data, view plan, teacher, students."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from logitcache.cache.manifest import LOGITS
from logitcache.catalog.capture import Tap, captured_shapes
from logitcache.catalog.datasets import Data, load_data
from logitcache.catalog.models import build_model, check_output, model_fingerprint
from logitcache.catalog.outputs import taps_of
from logitcache.config.schema import ModelConfig, Pipeline, TeacherConfig
from logitcache.data.batching import COLLATES, Collate
from logitcache.data.samples import Dataset
from logitcache.data.transforms import build_transform
from logitcache.data.views import Mixing, ViewDataset, ViewPlan
from logitcache.entry_points import is_entry_point
from logitcache.errors import ShapeError, UsageError
from logitcache.randomness import preserved_generators, seed_generators

TRAINED = "trained"
"""`teacher.weights` of a teacher that `train-teacher` makes."""
RANDOM = "random"
"""`teacher.weights` of a teacher that is meant to know nothing."""


def resolve_data(pipeline: Pipeline, *, trust: bool) -> Data:
    """The pipeline's dataset."""
    config = pipeline.data
    return load_data(
        config.name,
        root=config.root,
        download=config.download,
        validation=config.validation,
        args=config.args,
        part=config.part,
        trust=trust,
    )


def resolve_plan(pipeline: Pipeline, data: Data, *, trust: bool) -> ViewPlan:
    """The view plan that teacher and students share."""
    views = pipeline.views
    return ViewPlan(
        transform=None if views.transform is None else build_transform(views.transform, trust=trust),
        seed=views.seed,
        mixing=Mixing(mixup=views.mixup, cutmix=views.cutmix, probability=views.mix_probability),
        preprocess=input_part(pipeline.teacher, trust=trust),
        num_classes=data.num_classes,
        num_samples=len(data.train),
        collate=resolve_collate(pipeline, trust=trust),
    )


def resolve_collate(pipeline: Pipeline, *, trust: bool) -> Collate | None:
    """What puts the inputs of a batch together, by `data.collate`; None stacks them.

    Raises:
        UsageError: an entry point that is no function.
    """
    name = pipeline.data.collate
    if name is None:
        return None
    function = COLLATES.resolve(name, trust=trust)
    if not callable(function):
        raise UsageError(f"data.collate {name} is a {type(function).__name__}; expected a function of a list of inputs")
    return function


def input_part(config: ModelConfig, *, trust: bool) -> Callable[[Any], Any]:
    """A model's own deterministic part; no steps at all where the pipeline names none."""
    return build_transform(config.input or [], trust=trust)


def resolve_model(
    config: ModelConfig,
    data: Data,
    plan: ViewPlan,
    *,
    weights: str | None,
    seed: int,
    trust: bool,
    new_head: bool = True,
    logits: Tap | None = None,
) -> nn.Module:
    """A model sized for the data, its fresh weights drawn from a seed, and held to the data's classes.

    Without `new_head` ready weights keep the head that they came with, or are refused. With `logits` a module's
    output is held to the classes, rather than what the model gives.

    Raises:
        UsageError, ShapeError: a model that can't be built or does not fit the data.
    """
    views = ViewDataset(data.train, replace(plan, contents=None), preprocess=input_part(config, trust=trust))
    sample = views[(0, 0)][1]
    with preserved_generators():
        seed_generators(seed)
        model = build_model(
            config.model,
            num_classes=data.num_classes,
            input_shape=tuple(getattr(sample, "shape", ())),
            weights=weights,
            args=config.args,
            trust=trust,
            new_head=new_head,
        )
    if logits is None:
        check_output(model, views.batch([(0, 0)]), data.num_classes, name=config.model)
    else:
        shape = captured_shapes(model, {LOGITS: logits}, views.batch([(0, 0)] * 2))[LOGITS]
        if shape != (data.num_classes,):
            raise ShapeError(
                f"module {logits.module!r} of {config.model!r} gives {shape} for one sample; expected "
                f"({data.num_classes},), one logit for each of the data's classes"
            )
    return model


def teacher_weights(pipeline: Pipeline) -> str | None:
    """The file or name of the teacher's weights; what `train-teacher` leaves, where the pipeline says "trained"."""
    if pipeline.teacher.weights == TRAINED:
        return str(teacher_folder(pipeline) / "last.safetensors")
    return pipeline.teacher.weights


def teacher_name(pipeline: Pipeline) -> str:
    """What a teacher is called in an identity: its model, and the name of its weights where they have one."""
    weights = pipeline.teacher.weights
    named = weights is not None and weights not in (TRAINED, RANDOM) and not weights.endswith(".safetensors")
    return f"{pipeline.teacher.model}/{weights}" if named else pipeline.teacher.model


def teacher_folder(pipeline: Pipeline) -> Path:
    """Where `train-teacher` leaves its run."""
    return Path(pipeline.runs.path) / "teacher"


def resolve_teacher(pipeline: Pipeline, data: Data, plan: ViewPlan, *, trust: bool) -> tuple[nn.Module, str]:
    """The teacher in evaluation mode on the CPU, and its fingerprint.

    Raises:
        UsageError: no weights yet, or weights that don't fit.
    """
    weights = teacher_weights(pipeline)
    if pipeline.teacher.weights is None and not is_entry_point(pipeline.teacher.model):
        raise UsageError(
            f"the teacher {pipeline.teacher.model!r} has no weights; set teacher.weights to {TRAINED!r} (and run "
            f"`logitcache train-teacher`), to a .safetensors file, or to {RANDOM!r} if that is meant"
        )
    if pipeline.teacher.weights == TRAINED and not Path(str(weights)).is_file():
        raise UsageError(f"the teacher is not trained yet: there is no {weights}; run `logitcache train-teacher` first")
    model = resolve_model(
        pipeline.teacher,
        data,
        plan,
        weights=None if weights == RANDOM else weights,
        seed=0,
        trust=trust,
        new_head=False,
        logits=taps_of(pipeline.cache.outputs).get(LOGITS),
    )
    fingerprint = model_fingerprint(model, name=teacher_name(pipeline), args=pipeline.teacher.args)
    return model.eval().requires_grad_(False), fingerprint


def place_teacher(teacher: nn.Module, device: torch.device, config: TeacherConfig) -> nn.Module:
    """The teacher on its device, in the memory format and compiled as its configuration says."""
    teacher = teacher.to(device)
    if config.channels_last:
        teacher = teacher.to(memory_format=torch.channels_last)
    return cast("nn.Module", torch.compile(teacher)) if config.compile else teacher


def clean_views(dataset: Dataset, config: ModelConfig, pipeline: Pipeline, *, trust: bool) -> ViewDataset:
    """A dataset without augmentation, as one model of a pipeline takes it: for validation and test."""
    collate = resolve_collate(pipeline, trust=trust)
    return ViewDataset(dataset, ViewPlan(preprocess=input_part(config, trust=trust), collate=collate))
