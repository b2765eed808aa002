"""A sampler that chooses the view and the order of every epoch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch.distributed
from torch.utils.data import Sampler

from logitcache.data.order import epoch_order, epochs_of_group, pairs_of_epoch
from logitcache.data.views import ViewDataset
from logitcache.errors import UsageError


class ViewSampler(Sampler[tuple[int, int]]):
    """Yields (view, i) for `ViewDataset`: one view per epoch, in an order that depends only on seed and epoch.

    ```python
    sampler = logitcache.ViewSampler(views)
    loader = DataLoader(views, batch_size=64, sampler=sampler, num_workers=4, persistent_workers=True)
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        for index, inputs, targets in loader:
            teacher_logits = cache.logits(index)
    ```

    The view travels with every sample, so prefetching and persistent workers always render the right one. Epoch `e`
    uses `cycle[e % len(cycle)]`. Call `set_epoch` before each epoch, as with `DistributedSampler`; Lightning and
    Accelerate do it for you.

    With several replicas each one gets an equal share. As in `DistributedSampler`, a few samples come twice if the
    number of samples isn't divisible by the number of replicas; `drop_last=True` leaves the remainder out instead.

    Args:
        views: the dataset that the loader reads.
        cycle: view numbers to cycle through; by default the views of the cache that the plan comes from, or was
            compared with by `cache.check_plan`; of any other plan, a new view each epoch.
        indices: samples to use, as indices of `views`; default all of them.
        shuffle: whether each epoch has an order of its own.
        seed: of the order; the same on every replica.
        num_replicas, rank: as in `DistributedSampler`; by default those of the process group, if there is one.
        drop_last: leave out samples that can't be divided evenly, instead of repeating some.
        per_decode: views of each sample in a row, so that a batch loads it once for all of them. As many epochs form a
            group, which has each sample once in each of the views `cycle[e % len(cycle)]` of its epochs `e`. Use a
            batch size that is a multiple of it. At most the length of the cycle.

    Raises:
        UsageError: no samples, a view that the plan does not have, or a rank outside the replicas.
    """

    def __init__(
        self,
        views: ViewDataset,
        *,
        cycle: Sequence[int] | None = None,
        indices: Sequence[int] | np.ndarray | None = None,
        shuffle: bool = True,
        seed: int = 0,
        num_replicas: int | None = None,
        rank: int | None = None,
        drop_last: bool = False,
        per_decode: int = 1,
    ) -> None:
        grouped = torch.distributed.is_available() and torch.distributed.is_initialized()
        self._num_replicas = num_replicas or (torch.distributed.get_world_size() if grouped else 1)
        self._rank = rank if rank is not None else (torch.distributed.get_rank() if grouped else 0)
        if not 0 <= self._rank < self._num_replicas:
            raise UsageError(f"rank is {self._rank}; expected 0 to {self._num_replicas - 1}, one for each replica")
        self._plan = views.plan
        self._given_cycle = cycle
        for view in () if cycle is None else cycle:
            views.check_view(view)
        self._indices = np.arange(len(views)) if indices is None else np.asarray(indices, dtype=np.int64)
        most = per_decode if self._cycle is None else len(self._cycle)
        if not 1 <= per_decode <= most:
            raise UsageError(f"per_decode is {per_decode}; expected 1 to {most}, the number of views")
        self._per_decode = per_decode
        self._shuffle = shuffle
        self._seed = seed
        self._length = len(self._indices) // self._num_replicas
        if not drop_last and self._length * self._num_replicas < len(self._indices):
            self._length += 1
        if not self._length or (self._cycle is not None and not len(self._cycle)):
            raise UsageError(f"{len(self._indices)} samples for {self._num_replicas} replicas; expected at least one")
        self._epoch = 0
        self._start = 0
        self._position = 0

    @property
    def _cycle(self) -> Sequence[int] | None:
        """The views of the epochs. Those of a cache may become known later, when `cache.check_plan` is called."""
        return self._plan.views if self._given_cycle is None else self._given_cycle

    @property
    def view(self) -> int:
        """The view of the current epoch; with `per_decode`, batches have those of all epochs of the group."""
        return self._view_of(self._epoch)

    def _view_of(self, epoch: int) -> int:
        return epoch if self._cycle is None else self._cycle[epoch % len(self._cycle)]

    def __len__(self) -> int:
        """Samples per epoch and replica."""
        return self._length

    def set_epoch(self, epoch: int, *, start: int | None = None) -> None:
        """Choose the epoch, and with it the view and the order, of the next iteration.

        Args:
            epoch: counted from 0.
            start: number of samples of this replica to skip, to resume within an epoch: batches done times batch size.
        """
        if start is not None or epoch != self._epoch:
            self._start = start or 0
        self._epoch = epoch

    def __iter__(self) -> Iterator[tuple[int, int]]:
        group, turn = divmod(self._epoch, self._per_decode)
        views = [self._view_of(epoch) for epoch in epochs_of_group(group, per_decode=self._per_decode)]
        samples, numbers = pairs_of_epoch(self._share(group), len(views), turn)
        start, self._start = self._start, 0
        for self._position in range(start + 1, len(samples) + 1):
            yield views[numbers[self._position - 1]], int(samples[self._position - 1])

    def _share(self, group: int) -> np.ndarray:
        """This replica's samples of a group of epochs, in order; without `per_decode` a group is one epoch."""
        order = self._indices
        if self._shuffle:
            order = order[epoch_order(len(order), seed=self._seed, epoch=group)]
        return np.resize(order, self._length * self._num_replicas)[self._rank :: self._num_replicas]

    def state_dict(self) -> dict[str, int]:
        """Epoch and position, for torchdata's `StatefulDataLoader`, which accounts for prefetched batches.

        With a plain `DataLoader` use `set_epoch(epoch, start=...)`, because its workers read ahead.
        """
        return {"epoch": self._epoch, "position": self._position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue from a `state_dict`, in an iteration that starts afterwards."""
        self._epoch = state["epoch"]
        self._start = self._position = state["position"] % self._length
