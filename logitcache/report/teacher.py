"""What a cache's teacher says: some rows of every kind, read from the cache, one view in memory at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from logitcache.errors import CorruptCache, IncompleteCache, LogitCacheError
from logitcache.layout import Block, block_rows, blocks_per_view
from logitcache.progress import track
from logitcache.reader import LogitCache
from logitcache.report.measures import NO_TARGET, Answers, answers_of, concatenate
from logitcache.views import Mixing, Mixture, ViewPlan

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
MAX_ALPHA = 1e6
"""Of a Beta distribution that a cache may ask to draw from."""


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
    views = [
        view for view in range(cache.num_views) if all(Block(view, number).name in cache.receipts for number in numbers)
    ]
    if not views:
        raise IncompleteCache(
            f"{cache.storage.url} holds no whole view yet, so there is nothing to report on; "
            "run `logitcache cache-teacher` to go on"
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


def targets_of(cache: LogitCache) -> np.ndarray | None:
    """The true class of each sample, int64 (N,), `NO_TARGET` where it is no class; None in a cache without targets.

    Raises:
        CorruptCache: a table of another shape.
    """
    try:
        samples = cache.samples
    except (KeyError, UnicodeDecodeError) as error:
        raise CorruptCache(f"{cache.storage.url}: its sample table makes no sense: {error}") from None
    if samples is None:
        return None
    targets_N = samples.targets
    if targets_N.shape != (cache.num_samples,) or targets_N.dtype.kind not in "iu":
        raise CorruptCache(
            f"{cache.storage.url}: its targets are {targets_N.dtype} {targets_N.shape}; "
            f"expected whole numbers ({cache.num_samples},)"
        )
    if samples.keys is not None and len(samples.keys) != cache.num_samples:
        raise CorruptCache(f"{cache.storage.url} has {len(samples.keys)} keys for {cache.num_samples} samples")
    known = (targets_N >= 0) & (targets_N < cache.num_classes)
    return np.where(known, targets_N, NO_TARGET).astype(np.int64)


class MixingOfCache:
    """Which rows of a cache are mixed; it needs no transform, so no foreign code is built to find out.

    Raises:
        CorruptCache: an identity whose mixing makes no sense.
    """

    def __init__(self, cache: LogitCache) -> None:
        self._num_samples = cache.num_samples
        identity = cache.manifest.identity
        transform: Any = identity.transform
        config = transform.get("mixing") if isinstance(transform, dict) else None
        try:
            mixing = Mixing(**{name: float(value) for name, value in (config or {}).items()})
            if not all(math.isfinite(value) and value <= MAX_ALPHA for value in mixing.config().values()):
                raise ValueError(mixing)
        except (TypeError, ValueError, AttributeError, LogitCacheError) as error:
            raise CorruptCache(
                f"{cache.storage.url}: its identity mixes samples in a way that makes no sense"
            ) from error
        self.active = mixing.active
        self._plan = ViewPlan(seed=identity.view_seed, mixing=mixing, num_classes=cache.num_classes)

    def of_rows(self, view: int, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(whether mixed, bool (B,); the row of the sample that has the most weight, int64 (B,)) of rows of a view."""
        if not self.active:
            return np.zeros(len(rows), dtype=np.bool_), rows
        mixtures = [self._plan.mixture(view, row, self._num_samples) for row in rows.tolist()]
        dominant = [
            row if mixture is None or _own_weight(mixture) >= 0.5 else mixture.partner
            for row, mixture in zip(rows.tolist(), mixtures, strict=True)
        ]
        return np.array([mixture is not None for mixture in mixtures]), np.array(dominant, dtype=np.int64)


def _own_weight(mixture: Mixture) -> float:
    """The weight that a sample keeps; CutMix's patch may lie partly outside, and then takes less than was drawn."""
    if mixture.box is None:
        return mixture.weight
    side = math.sqrt(1.0 - mixture.weight)
    lengths = [max(0.0, min(centre + side / 2, 1.0) - max(centre - side / 2, 0.0)) for centre in mixture.box]
    return 1.0 - lengths[0] * lengths[1]
