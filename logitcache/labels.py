"""Where a student's teacher logits come from: the cache, or the teacher itself."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from logitcache.devices import autocast, to_device
from logitcache.labelview import View
from logitcache.pipeline import TeacherConfig
from logitcache.reader import LogitCache
from logitcache.resolve import place_teacher
from logitcache.views import ViewDataset

# B batch, C classes


class Labels(Protocol):
    """Teacher logits for the batches of a run, joined in the main process."""

    needs_teacher_inputs: bool
    """Whether batches must carry the teacher's own rendering beside the student's; else it sees the student's."""

    def start_view(self, view: int, following: int | None) -> None:
        """Get ready for a view, and begin to get ready for the one that follows."""

    def logits(self, rows: Tensor, teacher_inputs: Any) -> Tensor:
        """Float32 (B, C) for row numbers (B,) of the current view."""


class CachedLabels:
    """Logits from a cache: each view is checked, resident while it is trained on, and the next one loads behind it.

    Before a view's first step its proof rows are rendered as the teacher's input and held to the cache's digests.
    """

    needs_teacher_inputs = False

    def __init__(
        self,
        cache: LogitCache,
        views: ViewDataset,
        device: torch.device,
        *,
        memory_budget: int | None = None,
    ) -> None:
        self._cache = cache
        self._views = views
        self._device = device
        self._memory_budget = memory_budget
        self._proven: set[int] = set()
        self._view: View | None = None
        self._number: int | None = None

    @property
    def window_blocks(self) -> int | None:
        """Blocks that batches should stay within, where views are streamed."""
        return self._cache.window_blocks(self._memory_budget)

    def start_view(self, view: int, following: int | None) -> None:
        if view not in self._proven:
            self._cache.check_inputs(self._views, view)
            self._proven.add(view)
        if view != self._number:
            self._view = self._cache.view(view, self._device, memory_budget=self._memory_budget)
            self._number = view
        if following is not None and following != view and self.window_blocks is None:
            self._cache.prefetch(following, self._device)

    def logits(self, rows: Tensor, teacher_inputs: Any) -> Tensor:
        assert self._view is not None
        return self._view.logits(rows)


class LiveLabels:
    """Logits from the teacher, run on every batch: what a cache saves."""

    def __init__(
        self, teacher: nn.Module, device: torch.device, config: TeacherConfig, *, needs_teacher_inputs: bool
    ) -> None:
        self.needs_teacher_inputs = needs_teacher_inputs
        self._teacher = place_teacher(teacher, device, config)
        self._device = device
        self._config = config

    def start_view(self, view: int, following: int | None) -> None:
        """Nothing to get ready."""

    def logits(self, rows: Tensor, teacher_inputs: Any) -> Tensor:
        inputs = to_device(teacher_inputs, self._device, channels_last=self._config.channels_last)
        with torch.no_grad(), autocast(self._device, self._config.precision):
            logits_BC: Tensor = self._teacher(inputs)
        return logits_BC.float()
