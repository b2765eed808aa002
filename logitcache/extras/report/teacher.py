"""What a cache's teacher says: some rows of every kind, read from the cache, one view in memory at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from logitcache.cache.ground_truth import NO_TARGET, MixingOfCache, targets_of
from logitcache.cache.layout import Block, block_rows, blocks_per_view
from logitcache.cache.reader import LogitCache
from logitcache.errors import REBUILD, IncompleteCache
from logitcache.extras.report.measures import Answers, answers_of, concatenate
from logitcache.progress import track

# B batch, C classes, N samples

MAX_ROWS = 200_000
"""Rows that the teacher is judged on, at most: their number bounds memory and time on a cache of any size."""
MAX_LOGITS = 2**29
"""Logits that are decoded for it, at most; it lowers `MAX_ROWS` beyond some 2 700 classes."""
BATCH_LOGITS = 2**22
"""Logits decoded at once."""
MAX_PARTS = 64
"""Blocks that are read for a part of their rows, where not all rows are: datasets are often sorted by class."""
STREAMED = 1
"""A memory budget in bytes that no view fits into, so that it is read block by block."""
MIN_UNMIXED = 100
"""Rows without mixing that are enough to judge a teacher by; with fewer, mixed rows are judged too."""


@dataclass(frozen=True)
class Heard:
    """What the teacher said, and of which rows."""

    answers: Answers
    num_rows: int
    """Rows of the views that are there; `answers` are some or all of them."""
    views: list[int]
    """The views whose blocks are all there."""
    judged_by: str
    """"targets", "unmixed rows", "dominant sample", or "nothing" where the cache has no targets."""


def complete_views(cache: LogitCache) -> list[int]:
    """The views whose blocks are all there.

    Raises:
        IncompleteCache: there is none.
    """
    numbers = range(blocks_per_view(cache.layout))
    views = [view for view in cache.views if all(Block(view, number).name in cache.receipts for number in numbers)]
    if not views:
        raise IncompleteCache(
            f"{cache.storage.url} holds no whole view yet, so there is nothing to report on; {REBUILD}"
        )
    return views


def chosen_rows(
    cache: LogitCache, views: list[int], *, max_rows: int, max_blocks: int = MAX_PARTS
) -> dict[int, np.ndarray]:
    """Which rows to read of which views, int64, sorted: all of them, or `max_rows` spread over blocks and views.

    Datasets are often sorted by class, so blocks are taken from the whole length of the dataset, each from the next
    view in turn, and in each block rows from one end to the other.
    """
    layout, per_view = cache.layout, blocks_per_view(cache.layout)
    everything = len(views) * cache.num_samples <= max_rows
    num_blocks = len(views) * per_view
    if not everything:
        num_blocks = min(num_blocks, max_rows, max(max_blocks, max_rows // layout.rows_per_block))
    chosen: dict[int, list[np.ndarray]] = {}
    for place in range(num_blocks):
        number = (2 * place + 1) * per_view // (2 * num_blocks)
        rows = block_rows(layout, Block(0, number))
        taken = len(rows) if everything else min(len(rows), max_rows // num_blocks)
        chosen.setdefault(views[place % len(views)], []).append(rows.start + np.arange(taken) * len(rows) // taken)
    return {view: np.concatenate(chosen[view]) for view in sorted(chosen)}


def decoded_batches(cache: LogitCache, view: int, rows: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(rows (B,), logits float32 (B, C)) of sorted rows of one view, a bounded batch at a time."""
    labels = cache.view(view, memory_budget=STREAMED)
    size = max(1, BATCH_LOGITS // cache.num_classes)
    for start in range(0, len(rows), size):
        batch = rows[start : start + size]
        yield batch, labels.logits(batch).numpy()


def listen(cache: LogitCache) -> Heard:
    """Read what the teacher said of at most `MAX_ROWS` rows.

    Raises:
        IncompleteCache: no view is whole.
        CorruptCache: stored bytes are not those that were written, or say nothing that makes sense.
    """
    views = complete_views(cache)
    rows_of_view = chosen_rows(cache, views, max_rows=min(MAX_ROWS, max(1, MAX_LOGITS // cache.num_classes)))
    targets_N = targets_of(cache)
    mixing = MixingOfCache(cache)
    parts = []
    with track("reading the labels", sum(map(len, rows_of_view.values())), unit="rows") as meter:
        for view, chosen in rows_of_view.items():
            for rows, logits_BC in decoded_batches(cache, view, chosen):
                mixed_B, dominant_B = mixing.of_rows(view, rows)
                targets_B = np.full(len(rows), NO_TARGET) if targets_N is None else targets_N[dominant_B]
                parts.append(answers_of(logits_BC, targets_B, mixed_B))
                meter.advance(len(rows))
    answers = concatenate(parts)
    judged_by = "nothing" if targets_N is None else "targets"
    if targets_N is not None and answers.mixed.any():
        judged_by = "dominant sample"
        if int((~answers.mixed).sum()) >= MIN_UNMIXED:
            judged_by = "unmixed rows"
            unjudged = answers.mixed
            answers.targets[unjudged] = NO_TARGET
            answers.nll[unjudged] = np.nan
            answers.in_top5[unjudged] = False
    return Heard(answers, len(views) * cache.num_samples, views, judged_by)
