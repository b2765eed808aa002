"""Finds existing caches and runs that the stages of a pipeline will refuse; reads no labels and builds no model."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

from logitcache.cache.creation import other_choice
from logitcache.cache.ensemble import merged_parts
from logitcache.cache.manifest import LOGITS
from logitcache.cache.reader import LogitCache, open_cache
from logitcache.catalog.datasets import Data
from logitcache.catalog.outputs import sources_of
from logitcache.config.build import (
    has_teacher,
    input_part,
    mixing_of,
    recorded_views,
    resolve_loss,
    resolve_plan,
    student_folder,
    teacher_folder,
    teacher_identity,
)
from logitcache.config.schema import Pipeline, StudentConfig, TeachersConfig
from logitcache.data.text_views import TEXT_VIEWS
from logitcache.data.transforms import build_transform
from logitcache.data.views import ViewPlan
from logitcache.encodings import Auto, encoding_or_auto
from logitcache.errors import IdentityMismatch, NotACache
from logitcache.train.runs import check_configuration, recorded_configuration
from logitcache.verify.fit import identity_differences, plan_differences, teacher_differences, view_differences


def check_teacher_run(pipeline: Pipeline) -> None:
    """Compare the folder of `train-teacher` with the pipeline.

    Raises:
        UsageError: it contains a run of another configuration; names the keys.
        CorruptRun: its `run.yaml` is damaged.
    """
    folder, config = teacher_folder(pipeline), pipeline.teacher
    before = recorded_configuration(folder)
    if before is not None:
        check_configuration(
            folder, before, _plain(pipeline.run_identity(config, pipeline.train_config(config).seeds[0]))
        )


def check_student_runs(pipeline: Pipeline, student: StudentConfig, cache: LogitCache | None, *, trust: bool) -> None:
    """Compare the run folders of a student with the pipeline: the settings, the number of views and the cache's id.

    Hashes that need data or teacher are not compared.

    Args:
        pipeline, student: the configuration.
        cache: the pipeline's, if it is sealed and fits.
        trust: import the code of the loss from outside the working directory.

    Raises:
        UsageError: a folder contains a run of another configuration; names the keys.
        CorruptRun: a `run.yaml` is damaged.
    """
    uses_teacher = bool(student.hints) or resolve_loss(student, trust=trust).needs_teacher
    for seed in pipeline.train_config(student).seeds:
        folder = student_folder(pipeline, student.name, seed)
        before = recorded_configuration(folder)
        if before is None:
            continue
        config = pipeline.run_identity(student, seed)
        config["num_views"] = pipeline.views.count if uses_teacher else None
        if uses_teacher and isinstance(student.labels, TeachersConfig):
            config["student"] = student.ensemble_identity()
        config = _plain(config)
        compared = {key: before.get(key) for key in config}
        labels = before.get("labels")
        if uses_teacher and student.labels == "cache" and cache is not None and isinstance(labels, dict):
            config["labels"], compared["labels"] = {"cache": cache.id}, {"cache": labels.get("cache")}
        check_configuration(folder, compared, config)


def existing_cache(pipeline: Pipeline) -> LogitCache | None:
    """The cache at `cache.path`, complete or not; None if there is none."""
    with suppress(NotACache):
        return open_cache(pipeline.cache.path)
    return None


def check_cache(cache: LogitCache, pipeline: Pipeline, data: Data | None, *, trust: bool) -> list[str]:
    """Compare what a cache records with a pipeline: views, teacher and encoding, and with `data` its shape and classes.

    Of the teacher, the name, the precision and the modules of the outputs are compared, not the weights. Encodings and
    blocks are compared only if `cache-teacher` can run here, because it alone needs the same ones.

    Args:
        cache: the cache at `cache.path`, complete or not.
        pipeline: its configuration.
        data: the pipeline's, if it is loaded.
        trust: import transforms from outside the working directory.

    Returns:
        What was not compared, one message each.

    Raises:
        IdentityMismatch: names the fields that differ.
    """
    not_compared = ["the teacher's weights and arguments"]
    differences: list[str] = []
    if data is not None:
        plan = resolve_plan(pipeline, data, trust=trust)
        differences += view_differences(cache, data, plan)
        smaller = pipeline.data.subset and len(data.train) < cache.num_samples
        if len(data.train) != cache.num_samples and not smaller:
            differences.append(f"num_samples: {cache.num_samples} in the cache, {len(data.train)} here")
        not_compared.append("the contents of the samples")
    else:
        plan = None
        not_compared.append("the samples")
        if _needs_tokenizer(pipeline):
            not_compared.append("the transform")
        else:
            differences += plan_differences(cache, _plan_without_data(pipeline, trust=trust))
    differences += teacher_differences(cache, teacher_identity(pipeline, None))
    # `train-student` alone also accepts caches that were made in other ways, by `merge` or from Python.
    if has_teacher(pipeline) and cache.manifest.identity.transform is not None and not merged_parts(cache.manifest):
        differences += _build_differences(cache, pipeline, plan)
    if differences:
        raise IdentityMismatch(
            f"{cache.storage.url} holds another cache ({cache.id[:12]}…); it differs in\n  "
            + "\n  ".join(dict.fromkeys(differences))
            + "\nChoose another `cache.path`, delete this cache, or restore what differs."
        )
    return not_compared


def _build_differences(cache: LogitCache, pipeline: Pipeline, plan: ViewPlan | None) -> list[str]:
    """What `cache-teacher` alone compares: the encodings and sources of all outputs, and the size of blocks."""
    requested, outputs = encoding_or_auto(pipeline.cache.encoding), pipeline.cache.outputs
    differences = []
    if plan is not None and plan.rows is not None and plan.rows.rows_per_block != cache.layout.rows_per_block:
        here = plan.rows.rows_per_block
        differences.append(f"rows_per_block: {cache.layout.rows_per_block} in the cache, {here} here")
    current: dict[str, Any] = {
        "output_encodings": {name: config["encoding"] for name, config in outputs.items() if name != LOGITS},
        "output_sources": sources_of(outputs),
    }
    if isinstance(requested, Auto):
        chosen_by = other_choice(cache.manifest, requested)
        if chosen_by is not None:
            differences.append(f"encoding: chosen by {chosen_by} in the cache, by {requested.config()} here")
    else:
        current["encoding"] = requested.config()
    return identity_differences(cache, current) + differences


def _needs_tokenizer(pipeline: Pipeline) -> bool:
    """Whether the data completes the transform."""
    return any(name in TEXT_VIEWS for step in pipeline.views.transform or [] for name in step)


def _plan_without_data(pipeline: Pipeline, *, trust: bool) -> ViewPlan:
    transform = pipeline.views.transform
    shared: Any = recorded_views(pipeline.views, pipeline.cache.path, trust=trust)
    if transform is not None and shared is None:
        shared = build_transform(transform, trust=trust)
    return ViewPlan(
        transform=shared,
        seed=pipeline.views.seed,
        mixing=mixing_of(pipeline),
        preprocess=input_part(pipeline.teacher, trust=trust),
    )


def _plain(config: dict[str, Any]) -> dict[str, Any]:
    plain: dict[str, Any] = json.loads(json.dumps(config))
    return plain
