"""Teacher labels for the batches of a run, from a cache, several caches, or the live teacher."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from logitcache.cache.labelview import View
from logitcache.cache.manifest import LOGITS
from logitcache.cache.reader import LogitCache
from logitcache.data.sequences import rows_of_output
from logitcache.data.views import ViewDataset
from logitcache.train.inference import TeacherRunner

# B batch, C classes


class Labels(Protocol):
    """Teacher logits for the batches of a run, looked up in the main process."""

    needs_teacher_inputs: bool
    """Whether batches carry the teacher's input beside the student's; otherwise both are the same."""

    def start_view(self, view: int, following: int | None) -> None:
        """Load a view, and start to load the next one."""

    def check_batch(self, index: Tensor, inputs: Any, views: ViewDataset) -> None:
        """Compare a batch with the same samples, rendered again from `views`.

        Raises:
            IdentityMismatch: the batch does not show the view that its index names.
        """

    def logits(self, index: Tensor, teacher_inputs: Any, targets: Tensor) -> Tensor:
        """Float32 (B, C) for samples of the current view, or (R, C) for the rows of sequences.

        Args:
            index: int (B,), from `ViewDataset`; of sequences the index of each position, int (B, L), -1 for none.
            teacher_inputs: the teacher's input, where `needs_teacher_inputs`.
            targets: the true labels, int (B,), or float (B, C) where samples were mixed; on any device.
        """


@runtime_checkable
class OutputLabels(Labels, Protocol):
    """Labels that also provide other outputs of the teacher."""

    def expect(self, outputs: Sequence[str], following: Sequence[str]) -> None:
        """Declare the outputs that are used in the view that starts next, and in the one after it."""

    def outputs(self, names: Sequence[str], index: Tensor, teacher_inputs: Any, targets: Tensor) -> dict[str, Tensor]:
        """The named outputs of the teacher, `logits` included, float32 (B, *shape); arguments as in `logits`."""


class CachedLabels:
    """Labels from a cache. The current view is kept in memory while the next one loads in the background.

    Args:
        cache: sealed.
        views: of the training split, with rows of the cache.
        device: where labels are decoded.
        memory_budget: bytes; larger views are streamed.
        prove: before the first step of each view, render its proof rows and compare them with the cache's digests.
        outputs: all outputs that the run uses.
    """

    needs_teacher_inputs = False

    def __init__(
        self,
        cache: LogitCache,
        views: ViewDataset,
        device: torch.device,
        *,
        memory_budget: int | None = None,
        prove: bool = True,
        outputs: Sequence[str] = (LOGITS,),
    ) -> None:
        self._cache = cache
        self._all_outputs = outputs
        self._expected = outputs, outputs
        self._prove = prove
        self._views = views
        self._device = device
        self._memory_budget = memory_budget
        self._proven: set[int] = set()
        self._view: View | None = None
        self._number: int | None = None

    @property
    def window_blocks(self) -> int | None:
        """Blocks that each batch stays within, where views are streamed."""
        return self._cache.window_blocks(self._memory_budget, self._all_outputs)

    def expect(self, outputs: Sequence[str], following: Sequence[str]) -> None:
        self._expected = outputs, following

    def start_view(self, view: int, following: int | None) -> None:
        if self._prove and view not in self._proven:
            self._cache.verify_inputs(self._views, view)
            self._proven.add(view)
        if view != self._number:
            self._view = self._cache.view(
                view, self._device, memory_budget=self._memory_budget, outputs=self._expected[0]
            )
            self._number = view
        if following is not None and following != view and self.window_blocks is None:
            self._cache.prefetch(following, self._device, self._expected[1])

    def check_batch(self, index: Tensor, inputs: Any, views: ViewDataset) -> None:
        self._cache.check_batch(index, inputs, views=views)

    def logits(self, index: Tensor, teacher_inputs: Any, targets: Tensor) -> Tensor:
        assert self._view is not None
        return self._view.logits(index if index.ndim == 1 else index[index >= 0])

    def outputs(self, names: Sequence[str], index: Tensor, teacher_inputs: Any, targets: Tensor) -> dict[str, Tensor]:
        view = self._view
        assert view is not None
        return {name: view.output(name, index) for name in names}


class EnsembleLabels:
    """Combined logits of several teachers, from caches of the same views.

    Args:
        members: one per teacher; inputs are verified against the first one.
        combine: (logits (B, C) of each, true labels) -> (B, C).
    """

    needs_teacher_inputs = False

    def __init__(self, members: Sequence[CachedLabels], combine: Callable[[list[Tensor], Tensor], Tensor]) -> None:
        self._members = members
        self._combine = combine

    @property
    def window_blocks(self) -> int | None:
        """Blocks that each batch stays within, where views are streamed: the smallest number of all members."""
        windows = [member.window_blocks for member in self._members]
        return min((window for window in windows if window is not None), default=None)

    def start_view(self, view: int, following: int | None) -> None:
        for member in self._members:
            member.start_view(view, following)

    def check_batch(self, index: Tensor, inputs: Any, views: ViewDataset) -> None:
        self._members[0].check_batch(index, inputs, views)  # all members have the same views

    def logits(self, index: Tensor, teacher_inputs: Any, targets: Tensor) -> Tensor:
        return self._combine([member.logits(index, None, targets) for member in self._members], targets)


class LiveLabels:
    """Labels from the teacher, run on every batch."""

    def __init__(self, teacher: TeacherRunner, *, needs_teacher_inputs: bool) -> None:
        self.needs_teacher_inputs = needs_teacher_inputs
        self._teacher = teacher

    def expect(self, outputs: Sequence[str], following: Sequence[str]) -> None:
        """Nothing to load."""

    def start_view(self, view: int, following: int | None) -> None:
        """Nothing to load."""

    def check_batch(self, index: Tensor, inputs: Any, views: ViewDataset) -> None:
        """Nothing to compare: the teacher gets the same inputs."""

    def logits(self, index: Tensor, teacher_inputs: Any, targets: Tensor) -> Tensor:
        logits = self.outputs([LOGITS], index, teacher_inputs, targets)[LOGITS]
        return logits if index.ndim == 1 else rows_of_output(logits, index)

    def outputs(self, names: Sequence[str], index: Tensor, teacher_inputs: Any, targets: Tensor) -> dict[str, Tensor]:
        with torch.no_grad():
            logits_BC, extra_outputs = self._teacher(teacher_inputs)
        outputs = {LOGITS: logits_BC, **extra_outputs}
        return {name: outputs[name].float() for name in names}
