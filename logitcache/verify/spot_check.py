"""Runs the teacher again on a few samples of a cache, and compares its outputs with the stored ones."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from logitcache.cache.agreement import differing_rows
from logitcache.cache.ensemble import merged_parts
from logitcache.cache.layout import Block
from logitcache.cache.manifest import LOGITS
from logitcache.cache.reader import LogitCache
from logitcache.config.build import build_context, build_runner, resolve_data, resolve_plan, resolve_teacher
from logitcache.config.schema import Pipeline
from logitcache.data.views import ViewDataset
from logitcache.errors import UsageError
from logitcache.progress import track
from logitcache.randomness import counter_seed
from logitcache.verify.audit import Problem
from logitcache.verify.fit import open_fitting_cache

# B batch


def spot_check(pipeline: Pipeline, count: int, *, seed: int = 0, trust: bool = False) -> list[Problem]:
    """Run the teacher on randomly drawn rows, and compare its outputs with the cache's.

    A row may differ by the loss of its encoding and by rounding (see `cache.agreement`).

    Args:
        pipeline: what the cache was built from.
        count: rows to draw, over all views.
        seed: of the draw.
        trust: allow entry points from outside the working folder.

    Raises:
        IdentityMismatch: the pipeline is of another cache.
        UsageError: the cache is a mean of several teachers.
    """
    data = resolve_data(pipeline, trust=trust)
    plan = resolve_plan(pipeline, data, trust=trust)
    cache, rows = open_fitting_cache(pipeline, data, plan, trust=trust)
    if merged_parts(cache.manifest):
        raise UsageError(
            f"{pipeline.cache.path} is the mean of several caches, for which no single teacher can be run again; check "
            "the caches that it was merged from"
        )
    context = build_context(pipeline, trust=trust)
    teacher, _ = resolve_teacher(pipeline, data, plan, trust=trust)
    samples = cache.samples
    plan = replace(plan, num_samples=cache.num_samples, contents=None if samples is None else samples.contents)
    views = ViewDataset(data.train, plan, rows=rows)
    total = len(views) * len(cache.views)
    draws = {counter_seed("spot check", seed, number) % total for number in range(min(count, total))}
    places = sorted((cache.views[draw // len(views)], draw % len(views)) for draw in draws)
    size = pipeline.teacher.batch_size
    batches = [places[start : start + size] for start in range(0, len(places), size)]
    asked = [name for name in cache.extra_outputs if name in pipeline.cache.outputs]
    problems = []
    with track("running the teacher again", len(places), unit="samples") as meter:
        answers = build_runner(pipeline, teacher, context, asked).run(views, batches)
        for batch, said in zip(batches, answers, strict=True):
            for view in sorted({view for view, _ in batch}):
                within = [number for number, place in enumerate(batch) if place[0] == view]
                rows_B = np.array([views.row(batch[number][1]) for number in within])
                for name in (LOGITS, *asked):
                    again = said.logits if name == LOGITS else said.outputs[name]
                    differing = differing_rows(
                        cache.view(view, outputs=[name]).output(name, rows_B).flatten(1),
                        again[within].float().cpu().flatten(1),
                        cache.encoding_of(name)[0],
                        pipeline.teacher.precision,
                        view=view,
                        rows_B=rows_B.tolist(),
                    )
                    problems += [Problem(_block(cache, view, row), f"row {row}", f"other {name}") for row in differing]
            meter.advance(len(batch))
    return problems


def _block(cache: LogitCache, view: int, row: int) -> str:
    return Block(view, int(cache.row_map.blocks_of(row))).name
