"""A training job: all inputs of one run of the training loop."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from logitcache.cache.outputs import Output
from logitcache.catalog.language_models import check_head
from logitcache.config.schema import TrainConfig
from logitcache.data.order import epochs_of_group
from logitcache.data.packing import pack
from logitcache.data.sequences import sequence_rows
from logitcache.data.views import ViewDataset
from logitcache.devices import to_device
from logitcache.digest import json_digest
from logitcache.errors import UsageError
from logitcache.losses import Loss, Stage, Stages
from logitcache.train.evaluation import Evaluation
from logitcache.train.hints import Hints
from logitcache.train.labels import Labels
from logitcache.train.tracking import Tracker


@dataclass(kw_only=True)
class TrainingData:
    """The views that a model is trained on, and the teacher's labels for them."""

    views: ViewDataset
    """Yields (index, input, target); input is (student's, teacher's) where the labels need both."""
    indices: np.ndarray
    """Samples of `views` to train on, int64 (M,)."""
    labels: Labels | None = None
    num_views: int | None = None
    """Epoch e uses view e mod this; None gives each epoch a new view."""
    first_view: int = 0
    """View of epoch 0; not 0 where the cache is a partial copy without the first views."""
    window_blocks: int | None = None
    """Set where views are streamed: each batch then stays within this many blocks."""
    per_decode: int = 1
    """Views of a sample in each batch; the epochs then come in groups of as many, see `data.order.pairs_of_epoch`."""
    extra_outputs: Mapping[str, Output] = field(default_factory=dict)
    """The teacher's outputs beside the logits, which hints may use."""
    views_key: str = ""
    """Equal where the views are the same before the model's own preprocessing."""
    identity_of_labels: dict[str, Any] = field(default_factory=dict)
    """The labels' part of a run's identity."""

    def view_of(self, epoch: int) -> int:
        """The view that an epoch uses."""
        return epoch if self.num_views is None else self.first_view + epoch % self.num_views


@dataclass(kw_only=True)
class Job(TrainingData):
    """A model to train on data, with its loss and settings."""

    name: str
    model: nn.Module
    loss: Loss
    config: TrainConfig
    seed: int
    validation: Evaluation | None
    test: Evaluation | None
    device: torch.device
    num_workers: int
    folder: Path
    identity: dict[str, Any]
    """What the run computes; a run folder of another identity is refused."""
    resolved: str
    """The resolved pipeline in YAML, written to the run folder."""
    input_key: str = ""
    """Equal for two jobs with the same preprocessing."""
    sample_weights: Tensor | None = None
    """Factor of each sample's loss, float32 (N,) by row number, with mean 1 over `indices`; None for 1."""
    classes: np.ndarray | None = None
    """The class of each of `indices`, int64 (M,); each epoch then samples all classes equally often."""
    documents: dict[str, str] = field(default_factory=dict)
    """Further files of the run folder: text by name."""
    tracker: Callable[[], Tracker] | None = None
    """Starts an experiment tracker, which also gets the metrics."""
    hints: Hints | None = None
    """Losses of other teacher outputs than the logits."""

    def __post_init__(self) -> None:
        if self.config.early_stopping is not None and self.validation is None:
            raise UsageError(
                f"train.early_stopping of {self.name} needs a validation split; set data.validation to a fraction such "
                "as 0.1"
            )
        if sequence_rows(self.views) is not None:
            self._check_sequences()
        if self.config.chunked_head:
            self._check_chunked_head()

    def views_of(self, epoch: int) -> list[int]:
        """The views that are in the batches of an epoch."""
        group = epochs_of_group(epoch // self.per_decode, per_decode=self.per_decode, num_epochs=self.config.epochs)
        return [self.view_of(each) for each in group]

    def _check_sequences(self) -> None:
        if self.hints is not None:
            raise UsageError(f"the hints of {self.name} need one row per sample; sequences have logits only")
        if self.views.plan.collate is pack and self.config.accumulate > 1:
            raise UsageError(
                f"{self.name}: a packed batch can't be split; set train.accumulate to 1, or data.collate to pad"
            )

    def _check_chunked_head(self) -> None:
        """Check that loss and model can be computed by chunks of rows."""
        if self.hints is not None or self.views.plan.mixes_samples:
            raise UsageError(f"{self.name}: train.chunked_head works without hints, mixup and CutMix only")
        stages = self.loss.stages if isinstance(self.loss, Stages) else (Stage(loss=self.loss),)
        for stage in stages:
            for progress in (0.0, 1.0):  # schedules are monotonic
                stage.loss.at(progress).terms()
        inputs = self.views.batch([(self.first_view, int(self.indices[0]))])
        if self.labels is not None and self.labels.needs_teacher_inputs:
            inputs = inputs[0]
        device = next((parameter.device for parameter in self.model.parameters()), self.device)
        check_head(self.model, to_device(inputs, device))

    def description(self) -> dict[str, Any]:
        """The run's description for a tracker: its identity, and an `id` that is the same after an interruption."""
        config: dict[str, Any] = json.loads(json.dumps(self.identity))
        about = {"id": json_digest(config)[:16], "name": self.name, "seed": self.seed, "folder": str(self.folder)}
        return about | config
