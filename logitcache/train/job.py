"""One net to train: everything that a run of the training loop is given."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from logitcache.config.schema import TrainConfig
from logitcache.data.views import ViewDataset
from logitcache.digest import json_digest
from logitcache.errors import UsageError
from logitcache.losses import Loss
from logitcache.train.evaluation import Evaluation
from logitcache.train.hints import Hints
from logitcache.train.labels import Labels, OutputLabels
from logitcache.train.tracking import Tracker


@dataclass(kw_only=True)
class Job:
    """One net to train."""

    name: str
    model: nn.Module
    views: ViewDataset
    """Gives (index, input, target), or ((student's input, teacher's input)) where the labels need both."""
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
    views_key: str = ""
    """What `views` renders, but for the model's own part; the same text for the same pixels."""
    input_key: str = ""
    """The model's own part, likewise."""
    rows_per_block: int | None = None
    window_blocks: int | None = None
    """Set where views are streamed: batches then stay within so many blocks."""
    sample_weights: Tensor | None = None
    """What each sample's loss is multiplied by, float32 (N,) by row number, of mean 1 over `indices`; None for 1."""
    classes: np.ndarray | None = None
    """The class of each of `indices`, int64 (M,), where every epoch is to have all classes equally often."""
    documents: dict[str, str] = field(default_factory=dict)
    """Further files to leave in the folder: text by name."""
    first_view: int = 0
    """More than 0 where the cache is a copy of later views only."""
    tracker: Callable[[], Tracker] | None = None
    """Makes what else the metrics go to."""
    hints: Hints | None = None
    """What the student learns beside the logits."""

    def __post_init__(self) -> None:
        if self.config.early_stopping is not None and self.validation is None:
            raise UsageError(
                f"train.early_stopping of {self.name} needs a validation split, and there is none; set data.validation "
                "to a fraction such as 0.1"
            )
        if self.hints is not None and not isinstance(self.labels, OutputLabels):
            raise UsageError(
                f"the hints of {self.name} ask for more than logits, and its labels have no more; name one cache"
            )

    def view_of(self, epoch: int) -> int:
        """The view that an epoch uses."""
        return epoch if self.num_views is None else self.first_view + epoch % self.num_views

    def description(self) -> dict[str, Any]:
        """What a tracker is told of the run: what its folder says it is, and an `id` that outlasts interruptions."""
        config: dict[str, Any] = json.loads(json.dumps(self.identity))
        about = {"id": json_digest(config)[:16], "name": self.name, "seed": self.seed, "folder": str(self.folder)}
        return about | config
