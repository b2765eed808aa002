"""Statistics of a cache's teacher, from a bounded number of rows; one view in memory at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from torch import Tensor

from logitcache.cache.ground_truth import NO_TARGET, MixingOfCache, targets_of
from logitcache.cache.layout import Block
from logitcache.cache.reader import LogitCache
from logitcache.errors import REBUILD, IncompleteCache
from logitcache.extras.report.measures import Predictions, concatenate, predictions_of
from logitcache.progress import track
from logitcache.train.reliability import Reliability, reliability

# B batch, C classes, N samples

MAX_ROWS = 200_000
"""Rows measured, at most. This bounds memory and time on a cache of any size."""
MAX_LOGITS = 2**29
"""Logits decoded in total, at most; lowers `MAX_ROWS` beyond about 2 700 classes."""
BATCH_LOGITS = 2**22
"""Logits decoded at once."""
MAX_PARTS = 64
"""Blocks that are read partly, where not all rows are read: datasets are often sorted by class."""
STREAMED = 1
"""A memory budget in bytes that is smaller than any view, so that views are read block by block."""
MIN_UNMIXED = 100
"""Unmixed rows that are enough to score the teacher on; with fewer, mixed rows are scored too."""


@dataclass(frozen=True)
class TeacherStats:
    """What was measured of the teacher, and on which rows."""

    predictions: Predictions
    num_rows: int
    """Rows of the complete views; `predictions` covers all or some of them."""
    views: list[int]
    """The complete views."""
    scored_by: str
    """"targets", "unmixed rows", "dominant sample", or "nothing" where the cache has no targets."""

    @cached_property
    def scored(self) -> Predictions:
        """The rows with a true class."""
        return self.predictions.where(self.predictions.scored)

    @cached_property
    def reliability(self) -> Reliability:
        """The calibration on the scored rows."""
        return reliability(self.scored.confidence, self.scored.correct)

    def headline(self, num_classes: int) -> dict[str, float | None]:
        """The main numbers, as JSON; those that need true classes only where there are some."""
        found, scored = self.predictions, self.scored
        numbers: dict[str, float | None] = {
            "rows": len(found),
            "confidence_mean": mean(found.confidence),
            "entropy_mean": mean(found.entropy),
        }
        if not len(scored):
            return numbers
        nll = mean(scored.nll)
        return numbers | {
            "judged_rows": len(scored),
            "accuracy": float(scored.correct.mean()),
            "top5_accuracy": float(scored.in_top5.mean()) if num_classes >= 10 else None,
            "judged_confidence_mean": mean(scored.confidence),
            "ece": self.reliability.ece,
            "nll": nll if math.isfinite(nll) else None,
        }


def mean(values_M: np.ndarray) -> float:
    """The mean, accumulated in float64."""
    return float(values_M.mean(dtype=np.float64))


def complete_views(cache: LogitCache) -> list[int]:
    """The views whose blocks are all present.

    Raises:
        IncompleteCache: no view is complete.
    """
    numbers = range(cache.layout.blocks_per_view)
    views = [view for view in cache.views if all(Block(view, number).name in cache.receipts for number in numbers)]
    if not views:
        raise IncompleteCache(f"{cache.storage.url} has no complete view yet, so there is nothing to report; {REBUILD}")
    return views


def select_rows(
    cache: LogitCache, views: list[int], *, max_rows: int, max_blocks: int = MAX_PARTS
) -> dict[int, np.ndarray]:
    """The rows to read of each view, int64, sorted: all of them, or `max_rows` spread over blocks and views.

    Datasets are often sorted by class, so blocks are evenly spaced over the dataset, views alternate, and the rows of
    a block are evenly spaced too.
    """
    layout, per_view = cache.layout, cache.layout.blocks_per_view
    everything = len(views) * cache.num_rows <= max_rows
    num_blocks = len(views) * per_view
    if not everything:
        num_blocks = min(num_blocks, max_rows, max(max_blocks, max_rows // layout.rows_per_block))
    chosen: dict[int, list[np.ndarray]] = {}
    for place in range(num_blocks):
        number = (2 * place + 1) * per_view // (2 * num_blocks)
        rows = cache.row_map.block_rows(number)
        taken = len(rows) if everything else min(len(rows), max_rows // num_blocks)
        chosen.setdefault(views[place % len(views)], []).append(rows.start + np.arange(taken) * len(rows) // taken)
    return {view: np.concatenate(chosen[view]) for view in sorted(chosen)}


def decoded_batches(cache: LogitCache, view: int, rows: np.ndarray) -> Iterator[tuple[np.ndarray, Tensor]]:
    """(rows (B,), logits float32 (B, C)) of sorted rows of one view, in batches of bounded size."""
    labels = cache.view(view, memory_budget=STREAMED)
    size = max(1, BATCH_LOGITS // cache.num_classes)
    for start in range(0, len(rows), size):
        batch = rows[start : start + size]
        yield batch, labels.logits(batch)


def measure_teacher(cache: LogitCache) -> TeacherStats:
    """Measure the teacher on at most `MAX_ROWS` rows.

    Raises:
        IncompleteCache: no view is complete.
        CorruptCache: stored bytes differ from those that were written, or are not valid.
    """
    views = complete_views(cache)
    rows_of_view = select_rows(cache, views, max_rows=min(MAX_ROWS, max(1, MAX_LOGITS // cache.num_classes)))
    targets_N = targets_of(cache)
    mixing = MixingOfCache(cache)
    parts = []
    with track("reading the labels", sum(map(len, rows_of_view.values())), unit="rows") as meter:
        for view, chosen in rows_of_view.items():
            for rows, logits_BC in decoded_batches(cache, view, chosen):
                mixed_B, dominant_B = mixing.of_rows(view, rows)
                targets_B = np.full(len(rows), NO_TARGET) if targets_N is None else targets_N[dominant_B]
                parts.append(predictions_of(logits_BC, targets_B, mixed_B))
                meter.advance(len(rows))
    found = concatenate(parts)
    scored_by = "nothing" if targets_N is None else "targets"
    if targets_N is not None and found.mixed.any():
        scored_by = "dominant sample"
        if int((~found.mixed).sum()) >= MIN_UNMIXED:
            scored_by = "unmixed rows"
            found.targets[found.mixed] = NO_TARGET
            found.nll[found.mixed] = np.nan
            found.in_top5[found.mixed] = False
    return TeacherStats(found, len(views) * cache.num_rows, views, scored_by)
