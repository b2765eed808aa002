"""Lightning: a callback that makes the training loader of a cache, with the teacher's logits in each batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler

from logitcache.cache.reader import RESIDENT_BYTES, LogitCache
from logitcache.data.sampler import ViewSampler
from logitcache.data.samples import Dataset
from logitcache.data.views import ViewDataset, ViewPlan
from logitcache.errors import IdentityMismatch, UsageError
from logitcache.integrations.labels import CheckedLabels
from logitcache.verify.fit import checked_plan, matched_views

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ImportError as error:
    raise ImportError(
        f"logitcache.integrations.lightning needs pip install 'logitcache[lightning]' ({error})"
    ) from error

# B batch, C classes


class DistillFromCache(Callback):  # type: ignore[misc]
    """Trains a student from a cache in `Trainer.fit`.

    ```python
    distill = DistillFromCache(logitcache.open("mine.cache"), plan)
    trainer = Trainer(max_epochs=16, callbacks=[distill])
    trainer.fit(student, distill.loader(dataset, batch_size=64, num_workers=4))
    ```

    The batches of the training loader are (inputs, targets, teacher logits). Each epoch has the next view of the cache,
    in an order that depends on seed and epoch alone. Training that resumes from a checkpoint, also from one within an
    epoch, goes on with the batch that comes next. In distributed training each process gets its share.

    Before the first step on each view, a few samples are compared with those that the teacher saw, and the batch as it
    reaches `training_step` with the view. The logits of the next view load in the background.

    Args:
        cache: sealed.
        plan: the views; default `cache.view_plan`, which needs a cache that can make them from its record.
        memory_budget: bytes of encoded labels to keep in memory; larger views are streamed.

    Raises:
        IdentityMismatch: the plan is not that of the cache.
        IncompleteCache: the cache is not sealed.
        UsageError: no plan, and the cache can't make one from its record.
    """

    def __init__(self, cache: LogitCache, plan: ViewPlan | None = None, *, memory_budget: int = RESIDENT_BYTES) -> None:
        self.cache = cache
        self.plan = checked_plan(cache, plan)
        self._memory_budget = memory_budget
        self._trainer: Trainer | None = None
        self._loader: DistillationLoader | None = None

    def loader(
        self,
        dataset: Dataset,
        *,
        batch_size: int,
        cycle: Sequence[int] | None = None,
        rows: np.ndarray | None = None,
        preprocess: Any = None,
        shuffle: bool = True,
        seed: int = 0,
        drop_last: bool = False,
        **options: Any,
    ) -> DistillationLoader:
        """The training loader, for `Trainer.fit` or to return from `train_dataloader`.

        Args:
            dataset: map-style, without augmentation; `dataset[i]` returns (input, target). Samples are matched by its
                `keys`, if it has some.
            batch_size: samples of a batch and process.
            cycle: the views of the epochs; default those of the cache.
            rows: the number in the cache of each sample, for a part of a dataset without keys, or another order.
            preprocess: the student's deterministic preprocessing; default the teacher's.
            shuffle, seed: of the order of each epoch.
            drop_last: leave out a smaller batch at the end of an epoch.
            options: of `torch.utils.data.DataLoader`, such as `num_workers` and `persistent_workers`.

        Raises:
            IdentityMismatch: samples, labels or the first view are not what the teacher saw.
            UsageError: an option that the loader sets itself.
        """
        for name in ("sampler", "batch_sampler", "collate_fn"):
            if name in options:
                raise UsageError(f"the loader of a cache sets {name} itself; leave it out")
        views = matched_views(self.cache, dataset, self.plan, preprocess=preprocess, rows=rows)
        labels = CheckedLabels(self.cache, views, cycle=cycle, memory_budget=self._memory_budget)
        sampler = _EpochSampler(self, batch_size, views=views, cycle=labels.cycle, shuffle=shuffle, seed=seed)
        options |= {"batch_size": batch_size, "drop_last": drop_last}
        self._loader = DistillationLoader(self, labels, views, sampler=sampler, collate_fn=views.collate, **options)
        return self._loader

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Remember the trainer, and refuse options that would train on other samples."""
        self._trainer = trainer
        if stage == "fit" and trainer.overfit_batches:
            raise UsageError(
                "overfit_batches replaces the sampler, which chooses the views; use limit_train_batches and "
                "`loader(cycle=[0], shuffle=False)`"
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse a resumed run in which Lightning would leave out an epoch, and with it a view.

        Raises:
            UsageError: `max_steps`, and a checkpoint from the end of an epoch.
        """
        done = trainer.fit_loop.epoch_loop.batch_progress.current.completed
        if trainer.max_steps != -1 and trainer.fit_loop.restarting and done >= trainer.num_training_batches:
            raise UsageError(
                "with max_steps, Lightning leaves out an epoch when it resumes from a checkpoint of the end of an "
                "epoch; set max_epochs instead, or resume from a checkpoint of a step (every_n_train_steps)"
            )

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Compare the first batch of each view, as the student gets it, with the view.

        Raises:
            IdentityMismatch: a hook or another callback changed the inputs.
            UsageError: the training loader is not from `loader`.
        """
        if self._loader is None or self._loader.index is None:
            raise UsageError(
                "DistillFromCache is in Trainer(callbacks=...), but the training batches are not from its `loader`; "
                "pass `distill.loader(...)` to `fit`, or return it from `train_dataloader`"
            )
        self._loader.labels.check_batch(self._loader.index, batch[0])

    def position(self) -> int:
        """The batches of the epoch that are done."""
        if self._trainer is None:
            raise UsageError("add the callback to the trainer: Trainer(callbacks=[distill])")
        return int(self._trainer.fit_loop.epoch_loop.batch_progress.current.ready)

    def device(self) -> torch.device:
        """The device of the process."""
        assert self._trainer is not None
        device: torch.device = self._trainer.strategy.root_device
        return device


class _EpochSampler(DistributedSampler[tuple[int, int]]):
    """A `ViewSampler` of the trainer's epoch, position and processes, which are known when an epoch starts.

    Lightning leaves a DistributedSampler as it is; it would wrap another sampler, and divide the samples a second time.
    """

    def __init__(self, callback: DistillFromCache, batch_size: int, *, views: ViewDataset, **options: Any) -> None:
        super().__init__(views, num_replicas=1, rank=0)  # `ViewSampler` divides the samples
        self._callback = callback
        self._batch_size = batch_size
        self._options = {"views": views, **options}

    def __len__(self) -> int:
        return len(ViewSampler(**self._options))

    def __iter__(self) -> Iterator[tuple[int, int]]:
        sampler = ViewSampler(**self._options)
        sampler.set_epoch(self.epoch, start=self._callback.position() * self._batch_size)
        return iter(sampler)


class DistillationLoader(DataLoader[Any]):
    """Batches (inputs, targets, teacher logits) of a cache's views; made by `DistillFromCache.loader`.

    An epoch starts when its first batch is asked for, not with `iter`: Lightning calls `iter` before it has set the
    epoch of the sampler and the position of a checkpoint, and workers would already load the first view.
    """

    def __init__(self, callback: DistillFromCache, labels: CheckedLabels, views: ViewDataset, **options: Any) -> None:
        super().__init__(views, **options)
        self.labels = labels
        self.index: Tensor | None = None
        """Of the latest batch, int64 (B,)."""
        self._callback = callback

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        return self._batches()

    def _batches(self) -> Iterator[tuple[Any, Any, Tensor]]:
        for index, inputs, targets in super().__iter__():
            self.index = index
            yield inputs, targets, self.labels.targets(index, self._callback.device()).dense()

    def state_dict(self) -> dict[str, Any]:
        """What a position in the epoch depends on, for Lightning's checkpoints."""
        replicas = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
        return {
            "cache": self.labels.cache.id,
            "cycle": self.labels.cycle,
            "batch_size": self.batch_size,
            "processes": replicas,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Check that a checkpoint within an epoch can be resumed with this loader.

        Raises:
            IdentityMismatch: another cache, batch size or number of processes; the rest of the epoch would be another.
        """
        here = self.state_dict()
        different = [
            f"{name}: {state.get(name)} there, {here[name]} here" for name in here if state.get(name) != here[name]
        ]
        if different:
            raise IdentityMismatch(
                "the checkpoint is from the middle of an epoch, which can't go on with another loader: "
                f"{'; '.join(different)}. Use the same loader, or a checkpoint from the end of an epoch"
            )
