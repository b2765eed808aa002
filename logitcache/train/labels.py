"""Where a student's labels come from, logits and whatever else: the cache, or the teacher itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from logitcache.cache.labelview import View
from logitcache.cache.manifest import LOGITS
from logitcache.cache.reader import LogitCache
from logitcache.data.views import ViewDataset
from logitcache.train.inference import AskedTeacher

# B batch, C classes


class Labels(Protocol):
    """Teacher logits for the batches of a run, joined in the main process."""

    needs_teacher_inputs: bool
    """Whether batches must carry the teacher's own rendering beside the student's; else it sees the student's."""

    def start_view(self, view: int, following: int | None) -> None:
        """Get ready for a view, and begin to get ready for the one that follows."""

    def check_batch(self, index: Tensor, inputs: Any, views: ViewDataset) -> None:
        """Compare a batch that arrived with `views` rendered again.

        Raises:
            IdentityMismatch: it is not the view that its index names.
        """

    def logits(self, index: Tensor, teacher_inputs: Any, targets: Tensor) -> Tensor:
        """Float32 (B, C) for samples of the current view.

        Args:
            index: int (B,), as `ViewDataset` gives it.
            teacher_inputs: what the teacher would see, where `needs_teacher_inputs`.
            targets: the true labels, int (B,), or float (B, C) where samples were mixed; on any device.
        """


@runtime_checkable
class OutputLabels(Labels, Protocol):
    """Labels that have more of the teacher than its logits."""

    def expect(self, outputs: Sequence[str], following: Sequence[str]) -> None:
        """Which outputs the view that is started next is asked for, and the one that follows it."""

    def outputs(self, names: Sequence[str], index: Tensor, teacher_inputs: Any, targets: Tensor) -> dict[str, Tensor]:
        """Some of the teacher's outputs by name, `logits` among them if asked for, float32 (B, *shape); as `logits`."""


class CachedLabels:
    """Labels from a cache: each view is checked, resident while it is trained on, and the next one loads behind it.

    Before a view's first step its proof rows are rendered as the teacher's input and held to the cache's digests,
    unless another cache of the same views does that.
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
        """Blocks that batches should stay within, where views are streamed."""
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
        return self._view.logits(index)

    def outputs(self, names: Sequence[str], index: Tensor, teacher_inputs: Any, targets: Tensor) -> dict[str, Tensor]:
        view = self._view
        assert view is not None
        return {name: view.output(name, index) for name in names}


class EnsembleLabels:
    """Logits of several teachers, from caches over the same views, put together for each batch.

    Args:
        members: one for each teacher; the first one proves the pixels, which are the others' too.
        combine: (logits (B, C) of each, true labels) -> (B, C).
    """

    needs_teacher_inputs = False

    def __init__(self, members: Sequence[CachedLabels], combine: Callable[[list[Tensor], Tensor], Tensor]) -> None:
        self._members = members
        self._combine = combine

    @property
    def window_blocks(self) -> int | None:
        """Blocks that batches should stay within, where views are streamed: as many as all members have room for."""
        windows = [member.window_blocks for member in self._members]
        return min((window for window in windows if window is not None), default=None)

    def start_view(self, view: int, following: int | None) -> None:
        for member in self._members:
            member.start_view(view, following)

    def check_batch(self, index: Tensor, inputs: Any, views: ViewDataset) -> None:
        self._members[0].check_batch(index, inputs, views)  # the others are of the same views

    def logits(self, index: Tensor, teacher_inputs: Any, targets: Tensor) -> Tensor:
        return self._combine([member.logits(index, None, targets) for member in self._members], targets)


class LiveLabels:
    """Labels from the teacher, run on every batch: what a cache saves."""

    def __init__(self, teacher: AskedTeacher, *, needs_teacher_inputs: bool) -> None:
        self.needs_teacher_inputs = needs_teacher_inputs
        self._teacher = teacher

    def expect(self, outputs: Sequence[str], following: Sequence[str]) -> None:
        """Nothing to get ready."""

    def start_view(self, view: int, following: int | None) -> None:
        """Nothing to get ready."""

    def check_batch(self, index: Tensor, inputs: Any, views: ViewDataset) -> None:
        """Nothing to compare: the teacher is given these very inputs."""

    def logits(self, index: Tensor, teacher_inputs: Any, targets: Tensor) -> Tensor:
        return self.outputs([LOGITS], index, teacher_inputs, targets)[LOGITS]

    def outputs(self, names: Sequence[str], index: Tensor, teacher_inputs: Any, targets: Tensor) -> dict[str, Tensor]:
        with torch.no_grad():
            logits_BC, others = self._teacher(teacher_inputs)
        said = {LOGITS: logits_BC, **others}
        return {name: said[name].float() for name in names}
