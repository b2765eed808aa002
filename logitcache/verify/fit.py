"""Compares a cache with the data, views and teacher of a pipeline; runs before the first step of every student."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from logitcache.cache.averaging import check_same_pixels, check_same_views, refuse_sampled
from logitcache.cache.ensemble import merged_parts
from logitcache.cache.manifest import LOGITS
from logitcache.cache.reader import LogitCache, open_cache
from logitcache.catalog.datasets import Data
from logitcache.catalog.outputs import sources_of
from logitcache.config.build import RANDOM, resolve_data, resolve_plan, resolve_teacher, teacher_name, teacher_weights
from logitcache.config.schema import Pipeline, TeachersConfig
from logitcache.data.samples import compare_samples, content_table, match_rows, sample_table
from logitcache.data.views import ViewDataset, ViewPlan
from logitcache.errors import IdentityMismatch, IncompleteCache, unsealed
from logitcache.progress import track


def open_fitting_cache(
    pipeline: Pipeline, data: Data, plan: ViewPlan, *, trust: bool, any_teacher: bool = False
) -> tuple[LogitCache, np.ndarray | None]:
    """Open the pipeline's cache, and compare it with data, views and teacher.

    Of the teacher, the fingerprint of its weights is compared where the weights are available, else only its name.

    Args:
        pipeline: names the cache and the teacher.
        data, plan: built from the pipeline.
        trust: allow entry points from outside the working folder.
        any_teacher: don't compare the teacher and its precision.

    Returns:
        The cache, and the cache's row of each sample in the data, int64 (M,); None where both have the same order.

    Raises:
        IdentityMismatch: something differs; names the field or the sample.
        IncompleteCache: the cache is not sealed, or has fewer views than the pipeline needs.
    """
    cache = open_cache(pipeline.cache.path, trust=trust)
    _check_sealed(cache, pipeline.cache.path)
    differences = view_differences(cache, data, plan)
    if not any_teacher:
        differences += teacher_differences(cache, pipeline, data, plan, trust=trust)
    if differences:
        raise IdentityMismatch(
            f"cache {cache.id[:12]}… at {pipeline.cache.path} doesn't match this pipeline; they differ in\n  "
            + "\n  ".join(differences)
            + "\nRevert these differences, or build another cache with another cache.path."
        )
    _check_views(cache, pipeline.cache.path, pipeline.views.count)
    if cache.samples is None:
        if cache.num_samples != len(data.train):
            raise IdentityMismatch(
                f"cache {cache.id[:12]}… has {cache.num_samples} samples; this dataset has {len(data.train)}"
            )
        return cache, None
    rows = match_rows(cache.samples, sample_table(data.train), cache_id=cache.id, subset=pipeline.data.subset)
    same_order = len(rows) == cache.num_samples and bool((rows == np.arange(len(rows))).all())
    return cache, None if same_order else rows


def open_fitting_caches(
    teachers: TeachersConfig, pipeline: Pipeline, data: Data, plan: ViewPlan, *, trust: bool
) -> tuple[list[LogitCache], np.ndarray | None]:
    """Open the caches of several teachers; compare the first with data and views, and the others with the first.

    Raises:
        UsageError: a mean of logits is configured, and a cache has the encoding `Sampled`.
        IdentityMismatch, IncompleteCache: as `open_fitting_cache`; names the cache.
    """
    caches: list[LogitCache] = []
    for location in teachers.caches:
        moved = pipeline.model_copy(update={"cache": pipeline.cache.model_copy(update={"path": location})})
        if not caches:
            cache, rows = open_fitting_cache(moved, data, plan, trust=trust, any_teacher=True)
        else:
            cache = open_cache(location, trust=trust)
            _check_sealed(cache, location)
            check_same_views(teachers.caches[0], caches[0], location, cache)
        _check_views(cache, location, pipeline.views.count)
        caches.append(cache)
    check_same_pixels(teachers.caches, caches, pipeline.views.count)
    if teachers.combine == "logits":
        refuse_sampled(teachers.caches, caches)
    return caches, rows


def _check_sealed(cache: LogitCache, location: str) -> None:
    if not cache.sealed:
        raise unsealed(location)


def _check_views(cache: LogitCache, location: str, count: int) -> None:
    if count > len(cache.views):
        raise IncompleteCache(
            f"the pipeline needs {count} views; {location} has {len(cache.views)}. "
            "Add views with `logitcache cache-teacher`, copy shared ones with `logitcache pull`, or lower views.count"
        )


def view_differences(cache: LogitCache, data: Data, plan: ViewPlan) -> list[str]:
    """The fields of the cache's identity that differ from the views here; samples are compared separately."""
    cached = cache.manifest.identity
    here: dict[str, Any] = {"view_seed": plan.seed, "outputs": cached.outputs | {LOGITS: [data.num_classes]}}
    if cached.transform is not None:
        here["transform"] = plan.describe()
    if cached.class_names is not None and data.class_names is not None:
        here["class_names"] = data.class_names
    return _differences(cache, here)


def teacher_differences(cache: LogitCache, pipeline: Pipeline, data: Data, plan: ViewPlan, *, trust: bool) -> list[str]:
    """The fields of the cache's identity that differ from the pipeline's teacher, or the sources of its outputs.

    Outputs that only one of them has are no difference: those that a student needs are checked separately.
    """
    cached = cache.manifest.identity
    here: dict[str, Any] = {"precision": pipeline.teacher.precision}
    at_hand = has_teacher(pipeline)
    ours = resolve_teacher(pipeline, data, plan, trust=trust)[1] if at_hand else teacher_name(pipeline)

    def is_ours(teacher: str) -> bool:
        return ours == (teacher if at_hand else teacher.partition("@")[0])

    # The cache of a mean matches a pipeline with any of its teachers.
    parts = merged_parts(cache.manifest)
    if not parts:
        here["output_sources"] = _sources(cached.output_sources, sources_of(pipeline.cache.outputs))
    part = next((part for part in parts if is_ours(part.teacher)), None)
    if part is not None and part.precision == pipeline.teacher.precision:
        del here["precision"]
    if part is None and not is_ours(cached.teacher):
        here["teacher"] = ours
    differences = _differences(cache, here)
    if parts and part is None:
        differences.append(
            f"teacher: the cache is the mean of {', '.join(part.teacher for part in parts)}, none of which is {ours}"
        )
    return differences


def has_teacher(pipeline: Pipeline) -> bool:
    """Whether the teacher's weights are available; without them only its name can be compared."""
    weights = teacher_weights(pipeline)
    return weights in (None, RANDOM) or Path(str(weights)).is_file()


def _sources(cached: dict[str, Any], asked: dict[str, Any]) -> dict[str, Any]:
    """The cache's sources, replaced by the pipeline's for the logits and for outputs that both have."""
    shared = {name: asked[name] for name in cached.keys() & asked.keys()}
    logits = {LOGITS: asked[LOGITS]} if LOGITS in asked else {}
    return {name: source for name, source in cached.items() if name != LOGITS} | shared | logits


def all_differences(cache: LogitCache, pipeline: Pipeline, *, trust: bool) -> list[str]:
    """All differences between a pipeline's data, views and teacher and those of a cache, one line each.

    Reads every sample once, and renders the proof rows of every view.
    """
    data = resolve_data(pipeline, trust=trust)
    plan = resolve_plan(pipeline, data, trust=trust)
    differences = view_differences(cache, data, plan)
    differences += teacher_differences(cache, pipeline, data, plan, trust=trust)
    if pipeline.views.count > len(cache.views):
        differences.append(f"views.count: {len(cache.views)} in the cache, {pipeline.views.count} here")
    if cache.samples is None:
        return differences
    here = sample_table(data.train)
    with track("reading the data", here.num_samples, unit="samples") as meter:
        here = replace(
            here, contents=content_table(data.train, num_workers=pipeline.num_workers, advance=meter.advance)
        )
    differences += compare_samples(cache.samples, here)
    if not differences:
        views = ViewDataset(data.train, plan, rows=match_rows(cache.samples, here, cache_id=cache.id))
        for view in cache.views:
            try:
                cache.verify_inputs(views, view)
            except IdentityMismatch as error:
                differences.append(str(error).splitlines()[0])
    return differences


def _differences(cache: LogitCache, here: dict[str, Any]) -> list[str]:
    cached = cache.manifest.identity
    return cached.differences(type(cached).model_validate(cached.model_dump() | json.loads(json.dumps(here))))
