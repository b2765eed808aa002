"""The check of `verify --data`: whether a pipeline describes its cache, and whether its teacher computes it again."""

from __future__ import annotations

from logitcache.cache.reader import open_cache
from logitcache.config.build import (
    build_context,
    build_runner,
    has_teacher,
    resolve_data,
    resolve_plan,
    resolve_teacher,
    teacher_identity,
)
from logitcache.config.schema import Pipeline
from logitcache.verify.audit import Problem
from logitcache.verify.fit import all_differences, open_fitting_cache, views_of_cache
from logitcache.verify.spot_check import spot_check


def verify_match(pipeline: Pipeline, *, recompute: int = 0, seed: int = 0, trust: bool = False) -> list[Problem]:
    """Compare a pipeline's data, views and teacher with its cache; then run the teacher again on some samples.

    Args:
        pipeline: what the cache was built from.
        recompute: samples, drawn over all views, on which the teacher runs again; 0 runs it on none.
        seed: of the draw.
        trust: allow entry points from outside the working directory.

    Raises:
        UsageError: the teacher can't be built, or the cache is a mean of several teachers, with `recompute`.
        IncompleteCache: the cache is not sealed, with `recompute`.
    """
    data = resolve_data(pipeline, trust=trust)
    plan = resolve_plan(pipeline, data, trust=trust)
    teacher, fingerprint = None, None
    if recompute or has_teacher(pipeline):
        teacher, fingerprint = resolve_teacher(pipeline, data, plan, trust=trust)
    identity = teacher_identity(pipeline, fingerprint)
    cache = open_cache(pipeline.cache.path, trust=trust)
    count = pipeline.views.count
    differences = all_differences(cache, data, plan, identity, num_views=count, num_workers=pipeline.num_workers)
    if differences or not recompute:
        return [Problem("", line, "differs") for line in differences]
    assert teacher is not None
    cache, rows = open_fitting_cache(
        pipeline.cache.path, data, plan, identity, num_views=count, subset=pipeline.data.subset, trust=trust
    )
    outputs = [name for name in cache.extra_outputs if name in pipeline.cache.outputs]
    runner = build_runner(pipeline, teacher, build_context(pipeline, trust=trust), outputs)
    views = views_of_cache(cache, data.train, plan, rows)
    return spot_check(cache, views, runner, recompute, outputs=outputs, seed=seed)
