"""Teacher labels for the batches of a run, from a cache, several caches, or the live teacher."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from logitcache.cache.cut_classes import CutClasses
from logitcache.cache.labelview import MixedViews, View
from logitcache.cache.manifest import LOGITS
from logitcache.cache.reader import LogitCache
from logitcache.data.sequences import rows_of_output
from logitcache.data.views import ViewDataset
from logitcache.targets import DenseTargets, Targets, row_slices
from logitcache.train.inference import TeacherRunner

# B batch, R rows, C classes

MEASURED_ROWS, MEASURED_LOGITS = 4_096, 2**26
"""Limits on the rows, and the logits of these rows, that the mass of left-out classes is measured on."""


class Labels(ABC):
    """The teacher's outputs for the batches of a run, looked up in the main process."""

    needs_teacher_inputs = False
    """Whether batches carry the teacher's input beside the student's; otherwise both are the same."""

    def expect(self, outputs: Sequence[str], following: Sequence[str]) -> None:  # noqa: B027
        """Declare the outputs that are used in the view that starts next, and in the one after it."""

    def start_view(self, view: int, following: int | None) -> None:  # noqa: B027
        """Load the only view of an epoch, and start to load the next one; for labels of one view at a time."""

    def start_views(self, views: Sequence[int], following: Sequence[int]) -> None:
        """Load the views of an epoch, and start to load those of the next one."""
        [view] = views
        self.start_view(view, following[0] if following else None)

    def check_batch(self, index: Tensor, inputs: Any, views: ViewDataset) -> None:  # noqa: B027
        """Compare a batch with the same samples, rendered again from `views`.

        Raises:
            IdentityMismatch: the batch does not show the view that its index names.
        """

    @abstractmethod
    def outputs(self, names: Sequence[str], index: Tensor, teacher_inputs: Any, targets: Tensor) -> dict[str, Tensor]:
        """The named outputs for samples of the current view, float32 (B, *shape), or (R, *shape) for rows of sequences.

        Args:
            names: `logits` is the teacher's logits.
            index: int (B,), from `ViewDataset`; of sequences the index of each position, int (B, L), -1 for none.
            teacher_inputs: the teacher's input, where `needs_teacher_inputs`.
            targets: the true labels, int (B,), or float (B, C) where samples were mixed; on any device.
        """

    def logits(self, index: Tensor, teacher_inputs: Any, targets: Tensor) -> Tensor:
        """The logits (B, C); arguments as in `outputs`."""
        return self.outputs([LOGITS], index, teacher_inputs, targets)[LOGITS]

    def targets(self, index: Tensor, teacher_inputs: Any, targets: Tensor) -> Targets:
        """The distributions as losses consume them, without a (B, C) tensor if they are stored sparse or factored."""
        return DenseTargets(self.logits(index, teacher_inputs, targets))


class CachedLabels(Labels):
    """Labels from a cache. The current view is kept in memory while the next one loads in the background.

    Args:
        cache: sealed.
        views: of the training split, with rows of the cache.
        device: where labels are decoded.
        memory_budget: bytes; larger views are streamed.
        prove: before the first step of each view, render its proof rows and compare them with the cache's digests.
        outputs: all outputs that the run uses.
    """

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
        self._current: dict[int, View] = {}
        self._mixed: MixedViews | None = None

    @property
    def window_blocks(self) -> int | None:
        """Blocks that each batch stays within, where views are streamed."""
        return self._cache.window_blocks(self._memory_budget, self._all_outputs)

    def expect(self, outputs: Sequence[str], following: Sequence[str]) -> None:
        self._expected = outputs, following

    def start_views(self, views: Sequence[int], following: Sequence[int]) -> None:
        for view in views:
            if self._prove and view not in self._proven:
                self._cache.verify_inputs(self._views, view)
                self._proven.add(view)
        # Views that are not needed any more are dropped before others are loaded.
        self._current = {view: loaded for view, loaded in self._current.items() if view in views}
        for view in views:
            if view not in self._current:
                self._current[view] = self._cache.view(
                    view, self._device, memory_budget=self._memory_budget, outputs=self._expected[0]
                )
        self._mixed = MixedViews(self._current) if len(views) > 1 else None
        if self.window_blocks is None:
            for view in following:
                if view not in views:
                    self._cache.prefetch(view, self._device, self._expected[1])

    @property
    def _labels(self) -> View:
        if self._mixed is not None:
            return self._mixed
        [view] = self._current.values()
        return view

    def left_out(self, view: int, num_classes: int) -> CutClasses | None:
        """The classes from a number on, and their probability on the first rows of a view; None if there are none."""
        if num_classes >= self._cache.num_classes:
            return None
        num_rows = min(self._cache.num_rows, MEASURED_ROWS, max(1, MEASURED_LOGITS // self._cache.num_classes))
        targets = self._cache.view(view, memory_budget=1, ahead=False).targets(range(num_rows))
        masses = []
        for rows in row_slices(num_rows, self._cache.num_classes, targets.device):
            p_BC = targets[rows].dense().double().softmax(dim=1)
            masses.append(p_BC[:, num_classes:].sum(dim=1).clamp(max=1.0))
        mass_R = torch.cat(masses)
        return CutClasses(
            classes=self._cache.num_classes - num_classes,
            rows=num_rows,
            mass_mean=float(mass_R.mean()),
            mass_max=float(mass_R.max()),
        )

    def check_batch(self, index: Tensor, inputs: Any, views: ViewDataset) -> None:
        self._cache.check_batch(index, inputs, views=views)

    def outputs(self, names: Sequence[str], index: Tensor, teacher_inputs: Any, targets: Tensor) -> dict[str, Tensor]:
        view = self._labels
        index = index if index.ndim == 1 else index[index >= 0]
        return {name: view.output(name, index) for name in names}

    def targets(self, index: Tensor, teacher_inputs: Any, targets: Tensor) -> Targets:
        return self._labels.targets(index if index.ndim == 1 else index[index >= 0])


class EnsembleLabels(Labels):
    """Combined logits of several teachers, from caches of the same views.

    Args:
        members: one per teacher; inputs are verified against the first one.
        combine: (logits (B, C) of each, true labels) -> (B, C).
    """

    def __init__(self, members: Sequence[CachedLabels], combine: Callable[[list[Tensor], Tensor], Tensor]) -> None:
        self._members = members
        self._combine = combine

    @property
    def window_blocks(self) -> int | None:
        """Blocks that each batch stays within, where views are streamed: the smallest number of all members."""
        windows = [member.window_blocks for member in self._members]
        return min((window for window in windows if window is not None), default=None)

    def start_views(self, views: Sequence[int], following: Sequence[int]) -> None:
        for member in self._members:
            member.start_views(views, following)

    def check_batch(self, index: Tensor, inputs: Any, views: ViewDataset) -> None:
        self._members[0].check_batch(index, inputs, views)  # all members have the same views

    def outputs(self, names: Sequence[str], index: Tensor, teacher_inputs: Any, targets: Tensor) -> dict[str, Tensor]:
        return {LOGITS: self._combine([member.logits(index, None, targets) for member in self._members], targets)}


class LiveLabels(Labels):
    """Labels from the teacher, run on every batch."""

    def __init__(self, teacher: TeacherRunner, *, needs_teacher_inputs: bool) -> None:
        self.needs_teacher_inputs = needs_teacher_inputs
        self._teacher = teacher

    def start_views(self, views: Sequence[int], following: Sequence[int]) -> None:
        """Nothing to load."""

    def outputs(self, names: Sequence[str], index: Tensor, teacher_inputs: Any, targets: Tensor) -> dict[str, Tensor]:
        with torch.no_grad():
            logits_BC, extra_outputs = self._teacher(teacher_inputs)
        outputs = {LOGITS: logits_BC, **extra_outputs}
        found = {name: outputs[name].float() for name in names}
        return found if index.ndim == 1 else {name: rows_of_output(values, index) for name, values in found.items()}
