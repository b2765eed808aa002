"""Measures a model on a split: top-1 accuracy, and with torchmetrics top-5 accuracy and calibration error."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from logitcache.catalog.calling import model_logits
from logitcache.data.batching import num_bytes
from logitcache.data.loading import rendered_batches
from logitcache.data.order import batches
from logitcache.data.views import ViewDataset
from logitcache.devices import to_device

# C classes

KEPT_BYTES = 256 * 2**20
"""A rendered split of at most this size stays in memory."""
TOP_FIVE_CLASSES = 10
"""Smallest number of classes for which top-5 accuracy is measured."""
CALIBRATION_BINS = 15
"""Bins of confidence (Guo et al. 2017, arXiv:1706.04599)."""


class Evaluation:
    """A split on which models are measured; a small split is rendered once and kept in memory.

    Args:
        views: the split without augmentation, preprocessed for the model.
        batch_size: of evaluation; it does not change the result.
        num_workers: DataLoader workers, for a split that is too large to keep.
    """

    def __init__(self, views: ViewDataset, *, batch_size: int, num_workers: int) -> None:
        self._views = views
        self._places = [
            [(0, index) for index in batch.tolist()] for batch in batches(np.arange(len(views)), batch_size)
        ]
        self._num_workers = num_workers
        self._kept: list[tuple[Any, Tensor]] | None = None
        self._small: bool | None = None

    def measure(self, model: nn.Module, device: torch.device) -> dict[str, float]:
        """Metrics by name: `accuracy` is top-1 accuracy.

        With torchmetrics (extra `train`) also `calibration_error`, the expected calibration error over 15 bins, and
        `top5_accuracy` for ten or more classes.
        """
        was_training = model.training
        model.eval()
        correct = 0
        metrics: dict[str, Any] | None = None
        with torch.inference_mode():
            for inputs, targets in self._batches():
                logits_BC = model_logits(model, to_device(inputs, device)).float().cpu()
                correct += int((logits_BC.argmax(dim=1) == targets).sum())
                if metrics is None:
                    metrics = _torchmetrics(logits_BC.shape[1])
                probabilities_BC = logits_BC.softmax(dim=1)
                for metric in metrics.values():
                    metric.update(probabilities_BC, targets)
        model.train(was_training)
        measured = {name: float(metric.compute()) for name, metric in (metrics or {}).items()}
        return {"accuracy": correct / len(self._views), **measured}

    def _batches(self) -> Iterable[tuple[Any, Tensor]]:
        if self._kept is not None:
            return self._kept
        if self._small is None:
            sample_bytes = num_bytes(self._views[0][1])
            self._small = sample_bytes is not None and sample_bytes * len(self._views) <= KEPT_BYTES
        # Starting workers takes longer than rendering a small split.
        workers = 0 if self._small else self._num_workers
        rendered = (
            (inputs, targets) for _, inputs, targets in rendered_batches(self._views, self._places, num_workers=workers)
        )
        if not self._small:
            return rendered
        self._kept = list(rendered)
        return self._kept


def _torchmetrics(num_classes: int) -> dict[str, Any]:
    """New metrics for a number of classes; none without torchmetrics."""
    try:
        from torchmetrics.classification import MulticlassAccuracy, MulticlassCalibrationError
    except ImportError:  # extra `train` is not installed
        return {}
    # Only the first of several training processes evaluates: torchmetrics would wait for the others.
    local = {"sync_on_compute": False}
    metrics: dict[str, Any] = {
        "calibration_error": MulticlassCalibrationError(num_classes, n_bins=CALIBRATION_BINS, norm="l1", **local)
    }
    if num_classes >= TOP_FIVE_CLASSES:
        metrics["top5_accuracy"] = MulticlassAccuracy(num_classes, top_k=5, average="micro", **local)
    return metrics
