"""Runs the teacher again on a few samples of a cache, and compares its outputs with the stored ones."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from logitcache.cache.agreement import differing_rows
from logitcache.cache.ensemble import merged_parts
from logitcache.cache.layout import Block
from logitcache.cache.manifest import LOGITS
from logitcache.cache.reader import LogitCache
from logitcache.data.views import ViewDataset
from logitcache.errors import UsageError
from logitcache.progress import track
from logitcache.randomness import counter_seed
from logitcache.train.inference import TeacherRunner
from logitcache.verify.audit import Problem

# B batch


def spot_check(
    cache: LogitCache,
    views: ViewDataset,
    runner: TeacherRunner,
    count: int,
    *,
    outputs: Sequence[str] = (),
    seed: int = 0,
) -> list[Problem]:
    """Run the teacher on randomly drawn rows, and compare its outputs with the cache's.

    A row may differ by the loss of its encoding and by rounding (see `cache.agreement`).

    Args:
        cache: sealed.
        views: of the training split, from `views_of_cache`.
        runner: the teacher, with hooks for the outputs.
        count: samples to draw, over all views.
        outputs: compared beside the logits.
        seed: of the draw.

    Raises:
        UsageError: the cache is a mean of several teachers.
    """
    if merged_parts(cache.manifest):
        raise UsageError(
            f"{cache.storage.url} is the mean of several caches, for which no single teacher can be run again; check "
            "the caches that it was merged from"
        )
    total = len(views) * len(cache.views)
    draws = {counter_seed("spot check", seed, number) % total for number in range(min(count, total))}
    places = sorted((cache.views[draw // len(views)], draw % len(views)) for draw in draws)
    size, precision = runner.config.batch_size, runner.config.precision
    batches = [places[start : start + size] for start in range(0, len(places), size)]
    problems = []
    with track("running the teacher again", len(places), unit="samples") as meter:
        for batch, computed in zip(batches, runner.run(views, batches), strict=True):
            for view in sorted({view for view, _ in batch}):
                samples = [cache.row_map.sample_rows(views.row(index)) for _, index in batch]
                of_samples = [np.arange(rows.start, rows.stop) for rows in samples]
                in_view = [np.full(len(rows), place[0] == view) for place, rows in zip(batch, of_samples, strict=True)]
                within = np.flatnonzero(np.concatenate(in_view))
                rows_B = np.concatenate(of_samples)[within]
                if not len(rows_B):  # sequences of one token
                    continue
                for name in (*([LOGITS] if cache.has_logits else []), *outputs):
                    again = computed.logits if name == LOGITS else computed.outputs[name]
                    differing = differing_rows(
                        cache.view(view, outputs=[name]).output(name, rows_B).flatten(1),
                        again[within].float().cpu().flatten(1),
                        cache.encoding_of(name)[0],
                        precision,
                        view=view,
                        rows_B=rows_B.tolist(),
                    )
                    problems += [Problem(_block(cache, view, row), f"row {row}", f"other {name}") for row in differing]
            meter.advance(len(batch))
    return problems


def _block(cache: LogitCache, view: int, row: int) -> str:
    return Block(view, int(cache.row_map.blocks_of(row))).name
