"""Whether a cache fits the data, the views and the teacher at hand; asked before the first step of every student."""

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
    """Open the pipeline's cache and hold it to data, views and teacher.

    The teacher's weights are compared where they are at hand; a team that has only the cache has only its name. Where
    caches are named one by one, `any_teacher` is meant: its teacher and its precision are whatever they are.

    Returns:
        The cache, and the row of each sample at hand, int64 (M,); None where they are the cache's own in its order.

    Raises:
        IdentityMismatch: names the field or the sample that differs.
        IncompleteCache: the cache is not sealed, or holds fewer views than the pipeline asks for.
    """
    cache = open_cache(pipeline.cache.path, trust=trust)
    _check_sealed(cache, pipeline.cache.path)
    differences = view_differences(cache, data, plan)
    if not any_teacher:
        differences += teacher_differences(cache, pipeline, data, plan, trust=trust)
    if differences:
        raise IdentityMismatch(
            f"cache {cache.id[:12]}… at {pipeline.cache.path} was not made for this pipeline; it differs in\n  "
            + "\n  ".join(differences)
            + "\nRestore what differs, or build a cache of its own in another place."
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
    """Open several teachers' caches, hold the first to data and views, and the others to its views and pixels.

    Raises:
        UsageError: one of drawn classes where a mean of logits is asked for, or a best teacher without true labels.
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
            f"the pipeline asks for {count} views; {location} holds {len(cache.views)}. "
            "Run `logitcache cache-teacher` to add the others, `logitcache pull` where they are shared, or lower "
            "views.count"
        )


def view_differences(cache: LogitCache, data: Data, plan: ViewPlan) -> list[str]:
    """The fields of a cache's identity in which the views at hand differ, but for their samples."""
    cached = cache.manifest.identity
    here: dict[str, Any] = {"view_seed": plan.seed, "outputs": cached.outputs | {LOGITS: [data.num_classes]}}
    if cached.transform is not None:
        here["transform"] = plan.describe()
    if cached.class_names is not None and data.class_names is not None:
        here["class_names"] = data.class_names
    return _differences(cache, here)


def teacher_differences(cache: LogitCache, pipeline: Pipeline, data: Data, plan: ViewPlan, *, trust: bool) -> list[str]:
    """The fields of a cache's identity in which the pipeline's teacher differs, or where its outputs come from.

    Outputs that only one of the two names are no difference: a student is held to those that it asks for.
    """
    cached = cache.manifest.identity
    here: dict[str, Any] = {"precision": pipeline.teacher.precision}
    at_hand = has_teacher(pipeline)
    ours = resolve_teacher(pipeline, data, plan, trust=trust)[1] if at_hand else teacher_name(pipeline)

    def is_ours(teacher: str) -> bool:
        return ours == (teacher if at_hand else teacher.partition("@")[0])

    # A mean has no one teacher: a pipeline fits it with any of those that it is the mean of.
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
            f"it is the mean of {', '.join(part.teacher for part in parts)}: `teacher` must be one of these"
        )
    return differences


def has_teacher(pipeline: Pipeline) -> bool:
    """Whether the teacher's weights are at hand; without them only its name can be compared."""
    weights = teacher_weights(pipeline)
    return weights in (None, RANDOM) or Path(str(weights)).is_file()


def _sources(cached: dict[str, Any], asked: dict[str, Any]) -> dict[str, Any]:
    """The cache's sources, with the pipeline's own for the outputs that both have, and for the logits."""
    shared = {name: asked[name] for name in cached.keys() & asked.keys()}
    logits = {LOGITS: asked[LOGITS]} if LOGITS in asked else {}
    return {name: source for name, source in cached.items() if name != LOGITS} | shared | logits


def all_differences(cache: LogitCache, pipeline: Pipeline, *, trust: bool) -> list[str]:
    """Everything in which a pipeline's data, views and teacher differ from a cache's, a line each.

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
