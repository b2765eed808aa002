"""The targets of a cache's samples, and which rows of which views are mixed.

Both are validated, since a cache may be hostile; none of its transforms is built.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from logitcache.cache.reader import LogitCache, ViewParameters
from logitcache.data.recorded import RecordedMixing
from logitcache.data.views import Mixing, Mixture, ViewPlan
from logitcache.errors import CorruptCache, LogitCacheError, UsageError

# B batch, N samples

NO_TARGET = -1
"""Marks a target that is not a class."""


def targets_of(cache: LogitCache) -> np.ndarray | None:
    """The true class of each sample, int64 (N,), or `NO_TARGET`; None for a cache without targets, or of sequences.

    Raises:
        CorruptCache: the sample table is invalid.
    """
    samples = cache.samples
    if samples is None or not cache.row_map.one_each:
        return None
    targets_N = samples.targets
    known = (targets_N >= 0) & (targets_N < cache.num_classes)
    return np.where(known, targets_N, NO_TARGET).astype(np.int64)


class MixingOfCache:
    """Which rows of a cache are mixed, from the identity alone.

    Raises:
        CorruptCache: the mixing in the identity is invalid.
    """

    def __init__(self, cache: LogitCache) -> None:
        self._num_samples = cache.num_samples
        identity = cache.manifest.identity
        transform: Any = identity.transform
        config = transform.get("mixing") if isinstance(transform, dict) else None
        try:
            mixing = Mixing(**{name: float(value) for name, value in (config or {}).items()})
        except (TypeError, ValueError, AttributeError, LogitCacheError) as error:
            raise CorruptCache(f"{cache.storage.url}: identity.transform.mixing is invalid") from error
        try:
            self._recorded = RecordedMixing.of(transform, ViewParameters(cache))
        except UsageError as error:
            raise CorruptCache(f"{cache.storage.url}: identity.transform.shared is invalid: {error}") from error
        self.active = mixing.active or self._recorded is not None
        self.always = mixing.active and mixing.probability == 1 and cache.num_samples > 1
        self._plan = ViewPlan(seed=identity.view_seed, mixing=mixing, num_classes=cache.num_classes)

    def mixed(self, view: int, rows: range) -> np.ndarray:
        """Whether each of these rows of a view is mixed, bool (B,); faster than `of_rows`, which finds partners."""
        if not self.active:
            return np.zeros(len(rows), dtype=np.bool_)
        if self._recorded is not None:
            return self._recorded.of_view(view)[0][rows.start : rows.stop] >= 0
        return np.array([self._plan.mixes(view, row, self._num_samples) for row in rows], dtype=np.bool_)

    def of_rows(self, view: int, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Whether each of these rows is mixed, bool (B,), and the row of its sample with most weight, int64 (B,)."""
        if not self.active:
            return np.zeros(len(rows), dtype=np.bool_), rows
        if self._recorded is not None:
            partners, weights = (values[rows] for values in self._recorded.of_view(view))
            return partners >= 0, np.where((partners < 0) | (weights >= 0.5), rows, partners)
        mixtures = [self._plan.mixture(view, row, self._num_samples) for row in rows.tolist()]
        dominant = [
            row if mixture is None or _own_weight(mixture) >= 0.5 else mixture.partner
            for row, mixture in zip(rows.tolist(), mixtures, strict=True)
        ]
        return np.array([mixture is not None for mixture in mixtures]), np.array(dominant, dtype=np.int64)


def _own_weight(mixture: Mixture) -> float:
    """The weight that a sample keeps, which is higher than drawn where CutMix's patch is partly outside the image."""
    if mixture.box is None:
        return mixture.weight
    side = math.sqrt(1.0 - mixture.weight)
    lengths = [max(0.0, min(centre + side / 2, 1.0) - max(centre - side / 2, 0.0)) for centre in mixture.box]
    return 1.0 - lengths[0] * lengths[1]
