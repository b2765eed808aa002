"""Training one net, exactly resumable: the loop that `train-teacher` and `train-student` share.

The order of samples, the views and the net's own randomness are pure functions of seed, epoch and step, so a run
that was killed goes on to the weights that it would have had, on any number of DataLoader workers.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from logitcache.devices import autocast, to_device
from logitcache.errors import InvalidLogits
from logitcache.labels import Labels
from logitcache.loading import rendered_batches
from logitcache.losses import Loss
from logitcache.order import batches, epoch_order, run_seed
from logitcache.pipeline import TrainConfig
from logitcache.progress import track
from logitcache.randomness import preserved_generators, seed_generators
from logitcache.runs import RESOLVED, RunFolder
from logitcache.views import ViewDataset

# B batch, C classes

LOG_STEPS = 20
"""Steps whose losses make one line of the log."""
KEPT_BYTES = 256 * 2**20
"""A rendered split no larger than this stays in memory."""


class Evaluation:
    """A split held ready to measure accuracy on: rendered once and kept, where it is small.

    Args:
        views: the split without augmentation, as the model takes it.
        batch_size: of evaluation; it does not change the result.
        num_workers: DataLoader workers for a split that is too large to keep.
    """

    def __init__(self, views: ViewDataset, *, batch_size: int, num_workers: int) -> None:
        self._views = views
        self._places = [
            [(0, index) for index in batch.tolist()] for batch in batches(np.arange(len(views)), batch_size)
        ]
        self._num_workers = num_workers
        self._kept: list[tuple[Any, Tensor]] | None = None
        self._small: bool | None = None

    def accuracy(self, model: nn.Module, device: torch.device) -> float:
        """Share of the samples whose target is the model's most probable class."""
        was_training = model.training
        model.eval()
        right = 0
        with torch.inference_mode():
            for inputs, targets in self._batches():
                predicted = model(to_device(inputs, device)).argmax(dim=1).cpu()
                right += int((predicted == targets).sum())
        model.train(was_training)
        return right / len(self._views)

    def _batches(self) -> Iterable[tuple[Any, Tensor]]:
        if self._kept is not None:
            return self._kept
        if self._small is None:
            sample = self._views[0][1]
            self._small = isinstance(sample, Tensor) and sample.nbytes * len(self._views) <= KEPT_BYTES
        # Starting workers takes longer than rendering what is small enough to keep.
        workers = 0 if self._small else self._num_workers
        rendered = (
            (inputs, targets) for _, inputs, targets in rendered_batches(self._views, self._places, num_workers=workers)
        )
        if not self._small:
            return rendered
        self._kept = list(rendered)
        return self._kept


@dataclass(kw_only=True)
class Job:
    """One net to train."""

    name: str
    model: nn.Module
    views: ViewDataset
    """Gives (row, input, target), or ((student's input, teacher's input)) where the labels need both."""
    indices: np.ndarray
    """Which samples of `views` to train on, int64 (M,)."""
    num_views: int | None
    """Epoch e uses view e mod this; None gives every epoch a view of its own."""
    labels: Labels | None
    loss: Loss
    config: TrainConfig
    seed: int
    validation: Evaluation | None
    test: Evaluation | None
    device: torch.device
    num_workers: int
    folder: Path
    identity: dict[str, Any]
    """What the run is, for its folder."""
    resolved: str
    """The whole pipeline as it was resolved, in YAML, to be left there."""
    rows_per_block: int | None = None
    window_blocks: int | None = None
    """Set where views are streamed: batches then stay within so many blocks."""
    first_view: int = 0
    """More than 0 where the cache is a copy of later views only."""

    def view_of(self, epoch: int) -> int:
        """The view that an epoch uses."""
        return epoch if self.num_views is None else self.first_view + epoch % self.num_views


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


def train(job: Job) -> dict[str, Any]:
    """Train a net to the end, from wherever its folder says; returns the run's result.

    Raises:
        UsageError: the folder holds a run of another configuration.
        InvalidLogits: the loss became NaN or infinite.
    """
    folder = RunFolder(job.folder, job.identity)
    finished = folder.result()
    if finished is not None:
        return finished
    folder.write(RESOLVED, job.resolved)
    with preserved_generators():
        return _Run(job, folder).to_the_end()


class _Run:
    """A job under way."""

    def __init__(self, job: Job, folder: RunFolder) -> None:
        self.job = job
        self.folder = folder
        config = job.config
        self.model = job.model.to(job.device)
        if config.channels_last:
            self.model = self.model.to(memory_format=torch.channels_last)
        self.optimizer = _optimizer(self.model, config)
        self.scaler = torch.amp.GradScaler(job.device.type, enabled=config.precision == "float16")
        self.steps_per_epoch = len(batches(np.arange(len(job.indices)), config.batch_size))
        self.total_steps = self.steps_per_epoch * config.epochs
        self.state = _State()
        self.pending: list[Tensor] = []
        seed_generators(run_seed(job.seed))
        if job.device.type == "cuda":
            torch.cuda.manual_seed_all(run_seed(job.seed))
        saved = folder.checkpoint()
        if saved is not None:
            self._restore(saved)
        folder.start_log(self.state.step)

    def to_the_end(self) -> dict[str, Any]:
        job = self.job
        first_epoch, skipped = divmod(self.state.step, self.steps_per_epoch)
        loader = rendered_batches(
            job.views,
            self._batches(first_epoch, skipped),
            num_workers=job.num_workers,
            pin_memory=job.device.type == "cuda",
        )
        with track(f"training {job.name}, seed {job.seed}", self.total_steps, unit="steps") as meter:
            meter.advance(self.state.step)
            for epoch in range(first_epoch, job.config.epochs):
                self._epoch(epoch, skipped, loader, meter)
                skipped = 0
        return self._finish()

    def _epoch(self, epoch: int, skipped: int, loader: Iterator[Any], meter: Any) -> None:
        job, state = self.job, self.state
        self.model.train()
        start = time.perf_counter()
        if job.labels is not None and self._needs_teacher(epoch):
            following = job.view_of(epoch + 1) if self._needs_teacher(epoch + 1) else None
            job.labels.start_view(job.view_of(epoch), following)
        aside = 0.0
        for _ in range(skipped, self.steps_per_epoch):
            self.pending.append(self._step(*next(loader)))
            state.step += 1
            meter.advance()
            if len(self.pending) == LOG_STEPS:
                self._log_losses()
            if job.config.checkpoint_steps and state.step % job.config.checkpoint_steps == 0:
                saving = time.perf_counter()
                if state.step % self.steps_per_epoch:  # the end of an epoch saves anyway
                    self._log_losses()
                    self._checkpoint()
                aside += time.perf_counter() - saving
        if job.device.type == "cuda":
            torch.cuda.synchronize(job.device)
        seconds = time.perf_counter() - start - aside
        if not skipped:
            state.epoch_seconds.append(seconds)
        self._log_losses()
        metrics = {"epoch": epoch + 1, "loss": float(np.average(state.epoch_losses, weights=state.epoch_counts))}
        state.epoch_losses, state.epoch_counts = [], []
        metrics |= {"lr": self._lr(state.step - 1), "epoch_seconds": seconds}
        accuracy = None
        if job.validation is not None:
            accuracy = metrics["validation_accuracy"] = job.validation.accuracy(self.model, job.device)
        if accuracy is None or accuracy > state.best:
            state.best = state.best if accuracy is None else accuracy
            self.folder.save_weights(self.model, "best")
        self.folder.log(state.step, metrics)
        shown = f"loss {metrics['loss']:.3f}" + ("" if accuracy is None else f", validation {accuracy:.1%}")
        meter.advance(0, note=shown)
        if epoch + 1 < job.config.epochs:
            self._checkpoint()

    def _step(self, rows: Tensor, inputs: Any, targets: Any) -> Tensor:
        job, config = self.job, self.job.config
        teacher_inputs = inputs
        if job.labels is not None and job.labels.needs_teacher_inputs:
            inputs, teacher_inputs = inputs
        inputs = to_device(inputs, job.device, channels_last=config.channels_last)
        targets = to_device(targets, job.device)
        loss_now = job.loss.at(self.state.step / self.total_steps)
        teacher_BC = None
        if job.labels is not None and loss_now.needs_teacher:
            teacher_BC = job.labels.logits(rows, teacher_inputs)
        with autocast(job.device, config.precision):
            student_BC = self.model(inputs)
        loss = loss_now(student_BC, teacher_BC, targets).mean()
        for group in self.optimizer.param_groups:
            group["lr"] = self._lr(self.state.step)
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return loss.detach()

    def _batches(self, first_epoch: int, skipped: int) -> Iterator[list[tuple[int, int]]]:
        """(view, index) of each batch of every epoch to come, so that workers render across the ends of epochs."""
        job = self.job
        rows = job.indices if job.views.rows is None else job.views.rows[job.indices]
        for epoch in range(first_epoch, job.config.epochs):
            order = epoch_order(
                rows,
                seed=job.seed,
                epoch=epoch,
                rows_per_block=job.rows_per_block,
                window_blocks=job.window_blocks,
            )
            view = job.view_of(epoch)
            for batch in batches(order, job.config.batch_size)[skipped:]:
                yield [(view, int(index)) for index in job.indices[batch]]
            skipped = 0

    def _needs_teacher(self, epoch: int) -> bool:
        """Whether any step of an epoch that is to come takes the teacher's logits."""
        if epoch >= self.job.config.epochs:
            return False
        first_step = epoch * self.steps_per_epoch
        start, end = first_step / self.total_steps, (first_step + self.steps_per_epoch) / self.total_steps
        return self.job.loss.needs_teacher_during(start, end)

    def _lr(self, step: int) -> float:
        return learning_rate(self.job.config, step, self.steps_per_epoch)

    def _log_losses(self) -> None:
        if not self.pending:
            return
        loss = float(torch.stack(self.pending).cpu().double().mean())
        if not math.isfinite(loss):
            raise InvalidLogits(
                f"the loss of {self.job.name} (seed {self.job.seed}) became {loss} around step {self.state.step}; "
                "lower `train.lr`, or use a wider precision than float16"
            )
        self.state.epoch_losses.append(loss)
        self.state.epoch_counts.append(len(self.pending))
        self.pending = []
        self.folder.log(self.state.step, {"train_loss": loss})

    def _finish(self) -> dict[str, Any]:
        job, state = self.job, self.state
        self.folder.save_weights(self.model, "last")
        result = {
            "name": job.name,
            "seed": job.seed,
            "accuracy": None if job.test is None else job.test.accuracy(self.model, job.device),
            "validation_accuracy": None if job.validation is None else job.validation.accuracy(self.model, job.device),
            "epoch_seconds": statistics.median(state.epoch_seconds) if state.epoch_seconds else None,
            "epochs": job.config.epochs,
            "samples": len(job.indices),
            "parameters": sum(parameter.numel() for parameter in self.model.parameters()),
        }
        self.folder.finish(result)
        return result

    def _checkpoint(self) -> None:
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "cpu_generator": torch.get_rng_state(),
            "cuda_generator": torch.cuda.get_rng_state(self.job.device) if self.job.device.type == "cuda" else None,
            "state": vars(self.state),
        }
        self.folder.save_checkpoint(state)

    def _restore(self, saved: dict[str, Any]) -> None:
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.scaler.load_state_dict(saved["scaler"])
        torch.set_rng_state(saved["cpu_generator"])
        if saved["cuda_generator"] is not None:
            torch.cuda.set_rng_state(saved["cuda_generator"], self.job.device)
        self.state = _State(**saved["state"])


def learning_rate(config: TrainConfig, step: int, steps_per_epoch: int) -> float:
    """The learning rate of a step: linear warm-up, then constant, or a cosine down to zero at the end."""
    warmup = round(config.warmup_epochs * steps_per_epoch)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    if config.schedule == "constant":
        return config.lr
    progress = (step - warmup) / max(config.epochs * steps_per_epoch - warmup, 1)
    return config.lr * 0.5 * (1.0 + math.cos(math.pi * min(progress, 1.0)))


def _optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if config.optimizer == "sgd":
        return torch.optim.SGD(
            parameters,
            lr=config.lr,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
            nesterov=config.momentum > 0,
        )
    kind = torch.optim.AdamW if config.optimizer == "adamw" else torch.optim.Adam
    return kind(parameters, lr=config.lr, weight_decay=config.weight_decay)
