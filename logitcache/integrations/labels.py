"""The teacher's labels for batches of another tool's loop."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from logitcache.cache.reader import RESIDENT_BYTES, LogitCache
from logitcache.data.index import split_index
from logitcache.data.views import ViewDataset
from logitcache.errors import UsageError, unsealed
from logitcache.targets import Targets
from logitcache.train.labels import CachedLabels

# B batch


class CheckedLabels:
    """The teacher's labels of batches, whatever their view: checks each view before its first labels are used.

    The view that follows is loaded in the background.

    Args:
        cache: sealed.
        views: the dataset of the batches, from `verify.fit.matched_views`.
        cycle: the views of the epochs, in their order; default those of the cache.
        memory_budget: bytes of encoded labels to keep in memory; larger views are streamed.

    Raises:
        IncompleteCache: the cache is not sealed.
        UsageError: a view that the cache does not have.
        IdentityMismatch: samples of the first view are not what the teacher saw.
    """

    def __init__(
        self,
        cache: LogitCache,
        views: ViewDataset,
        *,
        cycle: Sequence[int] | None = None,
        memory_budget: int = RESIDENT_BYTES,
    ) -> None:
        self.cache = cache
        self.views = views
        self.cycle = list(cache.views if cycle is None else cycle)
        self._memory_budget = memory_budget
        self._labels: CachedLabels | None = None
        self._device: torch.device | None = None
        self._current: list[int] = []
        self._checked: set[int] = set()
        if not cache.sealed:
            raise unsealed(cache.storage.url)
        for view in self.cycle:
            views.check_view(view)
        cache.verify_inputs(views, self.cycle[0])

    def targets(self, index: Tensor, device: torch.device) -> Targets:
        """The teacher's distributions of a batch, on a device.

        Args:
            index: int (B,), from the batch; on the CPU, else each call waits for the device.
            device: where labels are kept and decoded.

        Raises:
            IdentityMismatch: at the first batch of a view: samples of the view are not what the teacher saw.
            UsageError: plain row numbers, or a view that the cache does not have.
        """
        numbers = sorted(set(split_index(index)[0].tolist()))
        if numbers[0] < 0:
            raise UsageError(
                "the batch has plain row numbers, which name no view; pass the index that `ViewDataset` gives"
            )
        if self._labels is None or device != self._device:
            self._labels = CachedLabels(self.cache, self.views, device, memory_budget=self._memory_budget)
            self._device, self._current = device, []
        if numbers != self._current:
            self._labels.start_views(numbers, self._following(numbers))
            self._current = numbers
        return self._labels.targets(index, None, index)

    def check_batch(self, index: Tensor, inputs: Any) -> None:
        """Compare the first batch of each view, as it reaches the model, with the view that its index names.

        Raises:
            IdentityMismatch: something between the dataset and the model changes the inputs.
        """
        view = int(split_index(index[:1])[0])
        if view not in self._checked:
            self.cache.check_batch(index, inputs, views=self.views)
            self._checked.add(view)

    def _following(self, numbers: list[int]) -> list[int]:
        """The view after the last of some in the cycle."""
        if numbers[-1] not in self.cycle:
            return []
        return [self.cycle[(self.cycle.index(numbers[-1]) + 1) % len(self.cycle)]]
