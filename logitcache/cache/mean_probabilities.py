"""The teacher's probabilities of each sample, averaged over the views in which it is not mixed, block by block."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from logitcache.cache.ground_truth import MixingOfCache
from logitcache.cache.reader import LogitCache
from logitcache.errors import UsageError
from logitcache.progress import track

# B batch, C classes, N samples

PIECE_PROBABILITIES = 2**25
"""Averages in memory at once (128 MiB); larger blocks are read in parts."""
BATCH_LOGITS = 2**22
"""Logits decoded at once."""
KEPT_PROBABILITIES = 2**26
"""Averages that are kept for the next pass (256 MiB); larger caches are decoded in every pass."""


@dataclass(frozen=True)
class SampleProbabilities:
    """The teacher's probabilities of consecutive samples."""

    rows: range
    probabilities: np.ndarray
    """float32 (B, C) at T = 1, the mean over the views in which the sample is not mixed; 0 without such a view."""
    num_views: np.ndarray
    """int64 (B,): the number of these views."""


class MeanProbabilities:
    """The mean probabilities of all samples, in the order of rows. May be iterated several times.

    Args:
        cache: a cache in which these views are complete.
        views: to average over; by default all views of the cache.

    Raises:
        UsageError: every sample is mixed with another one in every view.
    """

    def __init__(self, cache: LogitCache, views: Sequence[int] | None = None) -> None:
        self.cache = cache
        self.views = list(cache.views if views is None else views)
        self._mixing = MixingOfCache(cache)
        if self._mixing.always:
            raise UsageError(
                f"{cache.storage.url}: mixup or CutMix mixed every sample in every view, so the cache has no "
                "prediction for a single sample; build a cache with views.mix_probability below 1"
            )
        self._keep = cache.num_rows * cache.num_classes <= KEPT_PROBABILITIES
        self._kept: list[SampleProbabilities] | None = None

    def __iter__(self) -> Iterator[SampleProbabilities]:
        if self._kept is not None:
            yield from self._kept
            return
        kept = []
        with track("reading the labels", len(self.views) * self.cache.num_rows, unit="rows") as meter:
            for rows in self._pieces():
                piece = self._read(rows)
                meter.advance(len(rows) * len(self.views))
                if self._keep:
                    kept.append(piece)
                yield piece
        if self._keep:
            self._kept = kept

    def _pieces(self) -> Iterator[range]:
        """The rows of the cache, block by block; large blocks in parts."""
        layout = self.cache.layout
        size = max(1, PIECE_PROBABILITIES // layout.num_classes)
        for number in range(layout.blocks_per_view):
            rows = self.cache.row_map.block_rows(number)
            for start in range(rows.start, rows.stop, size):
                yield range(start, min(start + size, rows.stop))

    def _read(self, rows: range) -> SampleProbabilities:
        num_classes = self.cache.num_classes
        sums_BC = np.zeros((len(rows), num_classes), dtype=np.float32)
        counts_B = np.zeros(len(rows), dtype=np.int64)
        size = max(1, BATCH_LOGITS // num_classes)
        for view in self.views:
            unmixed = np.flatnonzero(~self._mixing.mixed(view, rows))
            counts_B[unmixed] += 1
            labels = self.cache.view(view, memory_budget=1, ahead=False)  # at most two blocks in memory
            for start in range(0, len(unmixed), size):
                places = unmixed[start : start + size]
                sums_BC[places] += labels.logits(rows.start + places).softmax(dim=1).numpy()
        return SampleProbabilities(rows, sums_BC / np.maximum(counts_B, 1, dtype=np.float32)[:, None], counts_B)
