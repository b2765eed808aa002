"""Training one net, exactly resumable: the loop that `train-teacher` and `train-student` share.

The order of samples, the views and the net's own randomness are pure functions of seed, epoch and step, so a run
that was killed goes on to the weights that it would have had, on any number of DataLoader workers; and several runs
may take turns in one process.
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from logitcache.cache.manifest import LOGITS
from logitcache.catalog.models import load_state
from logitcache.data.batching import Batch
from logitcache.data.loading import part_of, rendered_batches
from logitcache.data.order import batches, epoch_order, step_seed
from logitcache.devices import seed_device
from logitcache.errors import CorruptRun, InvalidLogits
from logitcache.progress import Meter, track
from logitcache.randomness import preserved_generators, seed_generators
from logitcache.train.evaluation import Evaluation
from logitcache.train.job import Job
from logitcache.train.labels import OutputLabels
from logitcache.train.optimizer import OptimizerStep, WeightAverage
from logitcache.train.ranks import ALONE, Ranks
from logitcache.train.runs import CHECKPOINT, FROM_START, RESOLVED, NullRunFolder, RunFolder
from logitcache.train.step import losses

# B batch, C classes

LOG_STEPS = 20
"""Steps whose losses make one line of the log."""


@dataclass
class _State:
    """What a run carries from step to step besides weights and optimizer."""

    step: int = 0
    epoch_losses: list[float] = field(default_factory=list)
    """Mean losses of the log lines of the epoch under way, and their lengths beside them."""
    epoch_counts: list[int] = field(default_factory=list)
    epoch_seconds: list[float] = field(default_factory=list)
    """Of the epochs that ran without interruption."""
    best: float = -1.0
    """Validation accuracy of the best epoch so far."""
    stale_epochs: int = 0
    """Epochs since then."""


def train(job: Job, ranks: Ranks = ALONE) -> dict[str, Any]:
    """Train a net to the end, from wherever its folder says; returns the run's result.

    Raises:
        UsageError: the folder holds a run of another configuration.
        InvalidLogits: the loss became NaN or infinite.
    """
    with preserved_generators():
        run = begin(job, ranks)
        if not isinstance(run, Run):
            return run
        loader = rendered_batches(
            job.views, run.places(), num_workers=job.num_workers, pin_memory=job.device.type == "cuda"
        )
        with track(f"training {job.name}, seed {job.seed}", run.total_steps, unit="steps") as meter:
            meter.advance(run.step)
            while not run.done:
                train_epoch(run, loader, meter)
        return run.finish()


def begin(job: Job, ranks: Ranks = ALONE) -> Run | dict[str, Any]:
    """A run, where its folder says that it was left, or its result where it is finished.

    Raises:
        UsageError: the folder holds a run of another configuration.
    """
    folder = NullRunFolder() if ranks.rank else RunFolder(job.folder, job.identity)
    finished = ranks.from_first(lambda: folder.result(job.name, job.seed))
    if finished is not None:
        return finished
    for name, text in {RESOLVED: job.resolved, **job.documents}.items():
        folder.write(name, text)
    return Run(job, folder, ranks)


def train_epoch(run: Run, loader: Iterator[Batch], meter: Meter) -> None:
    """Take one run through its next epoch, or through the rest of one that was interrupted."""
    run.begin_epoch()
    while run.in_epoch:
        run.train_step(*next(loader))
        meter.advance()
    meter.advance(0, note=run.end_epoch())


class Run:
    """A job in progress.

    Until `done`, call `begin_epoch`, then `train_step` on each rendered batch of the epoch in the order of `places`,
    then `end_epoch`; after that, `finish`. A run owns all state between two batches, so several runs may alternate in
    one process, batch by batch, with the same bits as alone. It resumes from the folder's checkpoint, and writes one at
    the end of each epoch and every `checkpoint_steps`.

    Args:
        job: what to train.
        folder: of checkpoints and results.
        ranks: the processes that train together; each calls the same methods, with its share of every batch.
    """

    def __init__(self, job: Job, folder: RunFolder | NullRunFolder, ranks: Ranks = ALONE) -> None:
        self.job = job
        self.folder = folder
        self.ranks = ranks
        config = job.config
        self.model = job.model.to(job.device)
        if config.channels_last:
            self.model = self.model.to(memory_format=torch.channels_last)
        self._batch_sizes = [len(batch) for batch in batches(np.arange(len(job.indices)), config.batch_size)]
        self.steps_per_epoch = len(self._batch_sizes)
        self.total_steps = self.steps_per_epoch * config.epochs
        self._hinted = None if job.hints is None else job.hints.around(self.model).to(job.device)
        whole = self._hinted or self.model
        # Before anything else holds its parameters, and before any hook: synchronised batch norm replaces modules.
        self._parallel = ranks.wrap(whole, job.device, sync_batchnorm=config.sync_batchnorm)
        if self._hinted is not None:
            self._hinted.capture.hook()
        # One kernel for each shape: with dynamic shapes the kernel would depend on the shapes that came before, so
        # that a resumed run might round differently.
        self._net = cast(
            "nn.Module", torch.compile(self._parallel, dynamic=False) if config.compile else self._parallel
        )
        self._updates = OptimizerStep(whole, config, job.device, self.steps_per_epoch)
        self._average = None if config.ema is None else WeightAverage(self.model, config.ema)
        self.state = _State()
        self.done = False
        self._stop_at = 0
        self._epoch = self._skipped = 0
        self._start = self._aside = 0.0
        self._pending: list[Tensor] = []
        self._checked_views: set[int] = set()
        saved = ranks.from_first(folder.checkpoint)
        if saved is not None:
            self._restore(saved)
        folder.start_log(self.state.step, None if job.tracker is None else job.tracker(), job.description())

    @property
    def step(self) -> int:
        """Steps that were taken."""
        return self.state.step

    @property
    def in_epoch(self) -> bool:
        """Whether the epoch that was begun still has batches."""
        return self.state.step < self._stop_at

    @property
    def trained(self) -> nn.Module:
        """The model whose weights are the run's: the averaged one, where weights are averaged."""
        return self.model if self._average is None else self._average.model

    def places(self) -> Iterator[list[tuple[int, int]]]:
        """(view, index) of this process's share of each batch to come, across the ends of epochs, for workers."""
        job = self.job
        rows = job.indices if job.views.rows is None else job.views.rows[job.indices]
        first_epoch, skipped = divmod(self.state.step, self.steps_per_epoch)
        for epoch in range(first_epoch, job.config.epochs):
            order = epoch_order(
                rows,
                seed=job.seed,
                epoch=epoch,
                rows_per_block=job.rows_per_block,
                window_blocks=job.window_blocks,
                classes=job.classes,
            )
            view = job.view_of(epoch)
            for batch in batches(order, job.config.batch_size)[skipped:]:
                share = self.ranks.share(batch)
                # Every process takes part in every exchange of gradients, and batch norm needs two samples: a smaller
                # share is filled up with samples of others, which then weigh nothing.
                filled = np.concatenate([share, np.setdiff1d(batch, share)[: max(2 - len(share), 0)]])
                yield [(view, int(index)) for index in job.indices[filled]]
            skipped = 0

    def begin_epoch(self) -> None:
        """Get ready for the batches of the next epoch, or of the rest of one that was interrupted."""
        job = self.job
        self._epoch, self._skipped = divmod(self.state.step, self.steps_per_epoch)
        self._stop_at = (self._epoch + 1) * self.steps_per_epoch
        self._start = time.perf_counter()
        self._aside = 0.0
        needed, next_needed = self._needed(self._epoch), self._needed(self._epoch + 1)
        if job.labels is not None and needed:
            if isinstance(job.labels, OutputLabels):
                job.labels.expect(needed, next_needed)
            following = job.view_of(self._epoch + 1) if next_needed else None
            job.labels.start_view(job.view_of(self._epoch), following)

    def train_step(self, index: Tensor, inputs: Any, targets: Any) -> None:
        """Train on one rendered batch, or on this process's share of it.

        Args:
            index: view and row of each sample, int64 (B,), as `views` gave it.
            inputs: as `views` gave them.
            targets: true labels, int (B,) or float (B, C).

        Raises:
            IdentityMismatch: a view's first batch is not what `views` renders.
            InvalidLogits: the loss became NaN or infinite.
        """
        job, state = self.job, self.state
        view = job.view_of(self._epoch)
        if job.labels is not None and view not in self._checked_views and self._needed(self._epoch):
            job.labels.check_batch(index, inputs, job.views)
            self._checked_views.add(view)
        seed = step_seed(job.seed, state.step, self.ranks.rank)
        seed_generators(seed)
        seed_device(job.device, seed)
        self.model.train()
        batch_size = self._batch_sizes[state.step % self.steps_per_epoch]
        share = len(self.ranks.share(np.arange(batch_size)))
        parts = self._micro_batches(len(index))
        loss = torch.zeros((), device=job.device)
        for number, (start, stop) in enumerate(parts):
            batch = (part_of(value, start, stop) for value in (index, inputs, targets)) if len(parts) > 1 else None
            loss_B = losses(job, self._net, state.step / self.total_steps, *(batch or (index, inputs, targets)))
            counted = min(max(share - start, 0), stop - start)
            if counted == stop - start:
                part_loss = loss_B.mean() * (counted / batch_size)
            else:
                part_loss = loss_B[:counted].sum() / batch_size
            last = number + 1 == len(parts)
            with nullcontext() if last else self._without_exchange():
                # The exchange averages over processes; each has its part of the whole batch's mean.
                self._updates.backward(part_loss * self.ranks.size)
            loss += part_loss.detach()
        self._updates.apply(state.step)
        if self._average is not None:
            self._average.update(self.model)
        self._pending.append(loss)
        state.step += 1
        if len(self._pending) == LOG_STEPS:
            self._log_losses()
        steps = job.config.checkpoint_steps
        if steps and state.step % steps == 0 and self.in_epoch:  # the end of an epoch saves anyway
            saving = time.perf_counter()
            self._log_losses()
            self._checkpoint()
            self._aside += time.perf_counter() - saving

    def end_epoch(self) -> str:
        """Evaluate, log, keep what is best and what resumes; returns the epoch in a few words."""
        job, state = self.job, self.state
        if job.device.type == "cuda":
            torch.cuda.synchronize(job.device)
        seconds = time.perf_counter() - self._start - self._aside
        if not self._skipped:
            state.epoch_seconds.append(seconds)
        self._log_losses()
        metrics = {"epoch": self._epoch + 1, "loss": float(np.average(state.epoch_losses, weights=state.epoch_counts))}
        state.epoch_losses, state.epoch_counts = [], []
        metrics |= {"lr": self._updates.learning_rate(state.step - 1), "epoch_seconds": seconds}
        metrics |= self._measured(job.validation, "validation_")
        accuracy = metrics.get("validation_accuracy")
        if accuracy is None or accuracy > state.best:
            state.best = state.best if accuracy is None else accuracy
            state.stale_epochs = 0
            self.folder.save_weights(self.trained, "best", state.step)
        else:
            state.stale_epochs += 1
        self.folder.log_epoch(state.step, metrics)
        patience = job.config.early_stopping
        self.done = state.step >= self.total_steps or (patience is not None and state.stale_epochs >= patience)
        if not self.done:
            self._checkpoint()
        return f"loss {metrics['loss']:.3f}" + ("" if accuracy is None else f", validation {accuracy:.1%}")

    def finish(self) -> dict[str, Any]:
        """Leave the last weights and the result: of the best epoch's weights where training stops early."""
        job, state = self.job, self.state
        self.folder.save_weights(self.trained, "last", state.step)
        if job.config.early_stopping is not None:
            self.ranks.from_first(
                lambda: load_state(self.trained, self._best_weights(), job.folder / "best.safetensors")
            )
        test = self._measured(job.test, "")
        validation = self._measured(job.validation, "validation_")
        result: dict[str, Any] = {
            "name": job.name,
            "seed": job.seed,
            "accuracy": None,
            "validation_accuracy": None,
            **test,
            **validation,
            "measured": "last" if job.config.early_stopping is None else "best",
            "epoch_seconds": statistics.median(state.epoch_seconds) if state.epoch_seconds else None,
            "epochs": state.step // self.steps_per_epoch,
            "samples": len(job.indices),
            "parameters": sum(parameter.numel() for parameter in self.model.parameters()),
        }
        result = self.ranks.from_first(lambda: result)
        self.folder.finish(result)
        return result

    def _micro_batches(self, size: int) -> list[tuple[int, int]]:
        """(start, stop) of the parts of a batch that are computed one after another: alike in size, for batch norm."""
        config = self.job.config
        if config.accumulate == 1:
            return [(0, size)]
        largest = math.ceil(self.ranks.largest_share(config.batch_size) / config.accumulate)
        bounds = np.linspace(0, size, math.ceil(size / largest) + 1).round().astype(int).tolist()
        return list(itertools.pairwise(bounds))

    def _without_exchange(self) -> AbstractContextManager[Any]:
        """Gradients stay in this process until the last part of a batch has been added to them."""
        if isinstance(self._parallel, nn.parallel.DistributedDataParallel):
            return self._parallel.no_sync()
        return nullcontext()

    def _measured(self, evaluation: Evaluation | None, prefix: str) -> dict[str, float]:
        """What the first process measures."""
        if evaluation is None:
            return {}
        measured = self.ranks.from_first(lambda: evaluation.measure(self.trained, self.job.device))
        return {f"{prefix}{name}": value for name, value in measured.items()}

    def _needed(self, epoch: int) -> list[str]:
        """The teacher's outputs that any step of an epoch that is to come takes, by name."""
        if epoch >= self.job.config.epochs:
            return []
        first_step = epoch * self.steps_per_epoch
        start, end = first_step / self.total_steps, (first_step + self.steps_per_epoch) / self.total_steps
        needed = {LOGITS} if self.job.loss.needs_teacher_during(start, end) else set()
        if self.job.hints is not None:
            needed |= self.job.hints.needed_during(start, end)
        return sorted(needed)

    def _log_losses(self) -> None:
        if not self._pending:
            return
        loss = float(self.ranks.sum(torch.stack(self._pending)).cpu().double().mean())
        if not math.isfinite(loss):
            raise InvalidLogits(
                f"the loss of {self.job.name} (seed {self.job.seed}) became {loss} around step {self.state.step}; "
                "lower `train.lr`, or use a wider precision than float16"
            )
        self.state.epoch_losses.append(loss)
        self.state.epoch_counts.append(len(self._pending))
        self._pending = []
        self.folder.log(self.state.step, {"train_loss": loss})

    def _checkpoint(self) -> None:
        self.folder.save_checkpoint(
            {
                "model": self.model.state_dict(),
                "regressors": None if self._hinted is None else self._hinted.regressors.state_dict(),
                "updates": self._updates.state_dict(),
                "average": None if self._average is None else self._average.state_dict(),
                "state": vars(self.state),
                "steps": [self.steps_per_epoch, self.total_steps],
            }
        )

    def _restore(self, saved: dict[str, Any]) -> None:
        try:
            expected = [self.steps_per_epoch, self.total_steps]
            if saved["steps"] != expected:
                raise ValueError(f"expected {expected} steps an epoch and in all, found {saved['steps']}")
            self.model.load_state_dict(saved["model"])
            if self._hinted is not None:
                self._hinted.regressors.load_state_dict(saved["regressors"])
            self._updates.load_state_dict(saved["updates"])
            if self._average is not None:
                self._average.load_state_dict(saved["average"])
            self.state = _State(**saved["state"])
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise CorruptRun(
                f"{self.job.folder / CHECKPOINT} does not fit this run: {' '.join(str(error).split())}; {FROM_START}"
            ) from error
        if self._best_step():
            self.ranks.from_first(lambda: bool(self._best_weights()))  # now, rather than after the whole training

    def _best_step(self) -> int:
        """The step at the end of the best epoch so far, or 0."""
        epochs = self.state.step // self.steps_per_epoch
        return (epochs - self.state.stale_epochs) * self.steps_per_epoch

    def _best_weights(self) -> dict[str, Tensor]:
        return self.folder.best_weights(self._best_step())
