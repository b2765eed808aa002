"""The training loop of `train-teacher` and `train-student`. Runs resume exactly.

The order of samples, the views and the model's randomness are pure functions of seed, epoch and step. A run that is
killed and resumed therefore ends with the same weights, with any number of DataLoader workers, and several runs may
alternate in one process.
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
from logitcache.data.batching import NO_TARGET, Batch
from logitcache.data.loading import part_of, rendered_batches
from logitcache.data.order import batches, epoch_order, pairs_of_epoch, step_seed
from logitcache.data.sequences import row_counts, sequence_rows
from logitcache.devices import seed_device
from logitcache.errors import CorruptRun, InvalidLogits
from logitcache.progress import Meter, track
from logitcache.randomness import preserved_generators, seed_generators
from logitcache.train.evaluation import Evaluation
from logitcache.train.job import Job
from logitcache.train.optimizer import OptimizerStep, weight_average
from logitcache.train.ranks import ALONE, Ranks
from logitcache.train.runs import CHECKPOINT, FROM_START, RESOLVED, NullRunFolder, RunFolder
from logitcache.train.step import chunked_loss, losses

# B batch, C classes

LOG_STEPS = 20
"""Steps per line of the log."""


@dataclass
class _State:
    """The state of a run besides weights and optimizer."""

    step: int = 0
    epoch_losses: list[float] = field(default_factory=list)
    """Mean loss of each log line of the current epoch."""
    epoch_counts: list[int] = field(default_factory=list)
    """Steps of each log line."""
    epoch_seconds: list[float] = field(default_factory=list)
    """Duration of each epoch that ran without interruption."""
    best: float = -math.inf
    """Validation score of the best epoch so far: accuracy, or -NLL of sequences."""
    stale_epochs: int = 0
    """Epochs since the best one."""


def train(job: Job, ranks: Ranks = ALONE) -> dict[str, Any]:
    """Train a model, resuming from its run folder; returns the run's result.

    Raises:
        UsageError: the folder contains a run of another configuration.
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
    """The run, resumed from its folder; or its result if it is finished.

    Raises:
        UsageError: the folder contains a run of another configuration.
    """
    folder = NullRunFolder() if ranks.rank else RunFolder(job.folder, job.identity)
    finished = ranks.from_first(lambda: folder.result(job.name, job.seed))
    if finished is not None:
        return finished
    for name, text in {RESOLVED: job.resolved, **job.documents}.items():
        folder.write(name, text)
    return Run(job, folder, ranks)


def train_epoch(run: Run, loader: Iterator[Batch], meter: Meter) -> None:
    """Train for one epoch, or for the rest of an interrupted one."""
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
        self._hinted = None if job.hints is None else job.hints.attach(self.model).to(job.device)
        whole = self._hinted or self.model
        # Before the optimizer and the hooks: synchronized batch norm replaces modules.
        self._parallel = ranks.wrap(whole, job.device, sync_batchnorm=config.sync_batchnorm)
        if self._hinted is not None:
            self._hinted.capture.hook()
        # dynamic=False: with dynamic shapes the kernel depends on earlier shapes, so a resumed run might round
        # differently.
        self._net = cast(
            "nn.Module", torch.compile(self._parallel, dynamic=False) if config.compile else self._parallel
        )
        self._optimizer_step = OptimizerStep(whole, config, job.device, self.steps_per_epoch)
        self._average = None if config.ema is None else weight_average(self.model, config.ema)
        self.state = _State()
        self.done = False
        self._stop_at = 0
        self._epoch = self._skipped = 0
        self._start = self._saving_seconds = 0.0
        self._pending: list[Tensor] = []
        self._checked_views: set[int] = set()
        saved = ranks.from_first(folder.checkpoint)
        if saved is not None:
            self._restore(saved)
        folder.start_log(self.state.step, None if job.tracker is None else job.tracker(), job.description())

    @property
    def step(self) -> int:
        """Steps that are done."""
        return self.state.step

    @property
    def in_epoch(self) -> bool:
        """Whether the current epoch has batches left."""
        return self.state.step < self._stop_at

    @property
    def trained(self) -> nn.Module:
        """The model that is evaluated and saved: the average, where weights are averaged."""
        return self.model if self._average is None else self._average.module

    def places(self) -> Iterator[list[tuple[int, int]]]:
        """(view, index) of this process's share of each remaining batch of all epochs."""
        job = self.job
        blocks = None if job.window_blocks is None else job.views.blocks_of(job.indices)
        first_epoch, skipped = divmod(self.state.step, self.steps_per_epoch)
        for epoch in range(first_epoch, job.config.epochs):
            group, turn = divmod(epoch, job.per_decode)
            order = epoch_order(
                len(job.indices),
                seed=job.seed,
                epoch=group,
                blocks=blocks,
                window_blocks=job.window_blocks,
                classes=job.classes,
            )
            views = np.array(job.views_of(epoch))
            positions, numbers = pairs_of_epoch(order, len(views), turn)
            for batch in batches(np.arange(len(order)), job.config.batch_size)[skipped:]:
                share = self.ranks.share(batch)
                # Every process takes part in every gradient exchange, and batch norm needs two samples: smaller shares
                # are padded with samples of other processes, which get weight 0.
                filled = np.concatenate([share, np.setdiff1d(batch, share)[: max(2 - len(share), 0)]])
                yield list(zip(views[numbers[filled]].tolist(), job.indices[positions[filled]].tolist(), strict=True))
            skipped = 0

    def begin_epoch(self) -> None:
        """Prepare the next epoch, or the rest of an interrupted one."""
        job = self.job
        self._epoch, self._skipped = divmod(self.state.step, self.steps_per_epoch)
        self._stop_at = (self._epoch + 1) * self.steps_per_epoch
        self._start = time.perf_counter()
        self._saving_seconds = 0.0
        needed, next_needed = self._needed(self._epoch), self._needed(self._epoch + 1)
        if job.labels is not None and needed:
            job.labels.expect(needed, next_needed)
            job.labels.start_views(job.views_of(self._epoch), job.views_of(self._epoch + 1) if next_needed else [])

    def train_step(self, index: Tensor, inputs: Any, targets: Any) -> None:
        """Train on one rendered batch, or this process's share of it.

        Args:
            index: view and row of each sample, int64 (B,), from `views`.
            inputs: from `views`.
            targets: true labels, int (B,) or float (B, C).

        Raises:
            IdentityMismatch: the first batch of a view differs from what `views` renders.
            InvalidLogits: the loss became NaN or infinite.
        """
        job, state = self.job, self.state
        view = job.views_of(self._epoch)[0]
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
        num_rows = self._rows_of_step(index, targets, share)
        loss = torch.zeros((), device=job.device)
        for number, (start, stop) in enumerate(parts):
            batch = index, inputs, targets
            if len(parts) > 1:
                batch = tuple(part_of(value, start, stop) for value in batch)
            counted = min(max(share - start, 0), stop - start)
            part_loss = self._part_loss(batch, counted, batch_size, num_rows)
            last = number + 1 == len(parts)
            with nullcontext() if last else self._without_exchange():
                # The exchange averages over processes, but each one's loss is its part of the mean of the whole batch.
                self._optimizer_step.backward(part_loss * self.ranks.size)
            loss += part_loss.detach()
        self._optimizer_step.apply(state.step)
        if self._average is not None:
            self._average.update_parameters(self.model)
        self._pending.append(loss)
        state.step += 1
        if len(self._pending) == LOG_STEPS:
            self._log_losses()
        steps = job.config.checkpoint_steps
        if steps and state.step % steps == 0 and self.in_epoch:  # `end_epoch` saves its own checkpoint
            saving = time.perf_counter()
            self._log_losses()
            self._checkpoint()
            self._saving_seconds += time.perf_counter() - saving

    def end_epoch(self) -> str:
        """Evaluate, log, and save the best weights and a checkpoint; returns a summary for the progress bar."""
        job, state = self.job, self.state
        if job.device.type == "cuda":
            torch.cuda.synchronize(job.device)
        seconds = time.perf_counter() - self._start - self._saving_seconds
        if not self._skipped:
            state.epoch_seconds.append(seconds)
        self._log_losses()
        metrics = {"epoch": self._epoch + 1, "loss": float(np.average(state.epoch_losses, weights=state.epoch_counts))}
        state.epoch_losses, state.epoch_counts = [], []
        metrics |= {"lr": self._optimizer_step.learning_rate(state.step - 1), "epoch_seconds": seconds}
        metrics |= self._measured(job.validation, "validation_")
        score = metrics.get("validation_accuracy")
        if "validation_nll" in metrics:
            score = -metrics["validation_nll"]
        if score is None or score > state.best:
            state.best = state.best if score is None else score
            state.stale_epochs = 0
            self.folder.save_weights(self.trained, "best", state.step)
        else:
            state.stale_epochs += 1
        self.folder.log_epoch(state.step, metrics)
        patience = job.config.early_stopping
        self.done = state.step >= self.total_steps or (patience is not None and state.stale_epochs >= patience)
        if not self.done:
            self._checkpoint()
        if "validation_nll" in metrics:
            return f"loss {metrics['loss']:.3f}, validation NLL {metrics['validation_nll']:.3f}"
        return f"loss {metrics['loss']:.3f}" + ("" if score is None else f", validation {score:.1%}")

    def finish(self) -> dict[str, Any]:
        """Save the last weights, and measure the result: on the best weights where early stopping is on."""
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

    def _rows_of_step(self, index: Tensor, targets: Tensor, share: int) -> float | None:
        """Rows that count in a batch of sequences, in all processes; None with one row per sample.

        For a loss on true labels alone these are the rows that have one.

        Args:
            index: of this process's part of the batch, (B,).
            targets: true classes, int (B, rows).
            share: how many of these samples count.
        """
        rows = sequence_rows(self.job.views)
        if rows is None:
            return None
        count = float(row_counts(index[:share], rows).sum())
        if not self.job.loss.at(self.state.step / self.total_steps).needs_teacher:
            count = float((targets[:share] != NO_TARGET).sum())
        return max(float(self.ranks.sum(torch.tensor(count, device=self.job.device))), 1.0)

    def _part_loss(self, batch: tuple[Any, ...], counted: int, batch_size: int, num_rows: float | None) -> Tensor:
        """The loss of a micro-batch as its part of the mean over the whole batch: over rows, or over samples.

        Args:
            batch: index, inputs and targets.
            counted: samples that count, the first ones.
            batch_size: samples of the whole batch, in all processes.
            num_rows: rows of the whole batch; None with one row per sample.
        """
        progress = self.state.step / self.total_steps
        if self.job.config.chunked_head:
            return chunked_loss(self.job, self._net, progress, counted, *batch) / (num_rows or batch_size)
        loss_B = losses(self.job, self._net, progress, *batch)
        if num_rows is not None:
            return loss_B[:counted].sum() / num_rows
        if counted == len(loss_B):
            return loss_B.mean() * (counted / batch_size)
        return loss_B[:counted].sum() / batch_size

    def _micro_batches(self, size: int) -> list[tuple[int, int]]:
        """(start, stop) of each micro-batch, of nearly equal sizes for batch norm."""
        config = self.job.config
        if config.accumulate == 1:
            return [(0, size)]
        largest = math.ceil(self.ranks.largest_share(config.batch_size) / config.accumulate)
        bounds = np.linspace(0, size, math.ceil(size / largest) + 1).round().astype(int).tolist()
        return list(itertools.pairwise(bounds))

    def _without_exchange(self) -> AbstractContextManager[Any]:
        """Skip the gradient exchange until the last micro-batch of a batch."""
        if isinstance(self._parallel, nn.parallel.DistributedDataParallel):
            return self._parallel.no_sync()
        return nullcontext()

    def _measured(self, evaluation: Evaluation | None, prefix: str) -> dict[str, float]:
        """Metrics, measured by the first process."""
        if evaluation is None:
            return {}
        measured = self.ranks.from_first(lambda: evaluation.measure(self.trained, self.job.device))
        return {f"{prefix}{name}": value for name, value in measured.items()}

    def _needed(self, epoch: int) -> list[str]:
        """Names of the teacher's outputs that any step of an epoch uses."""
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
                "updates": self._optimizer_step.state_dict(),
                "average": None if self._average is None else self._average.state_dict(),
                "state": vars(self.state),
                "steps": [self.steps_per_epoch, self.total_steps],
            }
        )

    def _restore(self, saved: dict[str, Any]) -> None:
        try:
            expected = [self.steps_per_epoch, self.total_steps]
            if saved["steps"] != expected:
                raise ValueError(f"expected {expected} steps per epoch and in total, found {saved['steps']}")
            self.model.load_state_dict(saved["model"])
            if self._hinted is not None:
                self._hinted.regressors.load_state_dict(saved["regressors"])
            self._optimizer_step.load_state_dict(saved["updates"])
            if self._average is not None:
                self._average.load_state_dict(saved["average"])
            self.state = _State(**saved["state"])
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise CorruptRun(
                f"{self.job.folder / CHECKPOINT} does not fit this run: {' '.join(str(error).split())}; {FROM_START}"
            ) from error
        if self._best_step():
            self.ranks.from_first(lambda: bool(self._best_weights()))  # fail now rather than after training

    def _best_step(self) -> int:
        """The last step of the best epoch so far, or 0."""
        epochs = self.state.step // self.steps_per_epoch
        return (epochs - self.state.stale_epochs) * self.steps_per_epoch

    def _best_weights(self) -> dict[str, Tensor]:
        return self.folder.best_weights(self._best_step())
