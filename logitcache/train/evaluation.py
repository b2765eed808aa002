"""Measures a model on a split: accuracy and calibration; of sequences the negative log-likelihood."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from logitcache.catalog.calling import model_logits
from logitcache.data.batching import NO_TARGET, num_bytes
from logitcache.data.loading import rendered_batches
from logitcache.data.order import batches
from logitcache.data.sequences import batch_rows, sequence_rows
from logitcache.data.views import ViewDataset
from logitcache.devices import to_device

# C classes

KEPT_BYTES = 256 * 2**20
"""A rendered split of at most this size stays in memory."""
LOGITS_AT_ONCE = 2**26
"""Logits of a batch of sequences (256 MiB); one sequence may have more."""
TOP_FIVE_CLASSES = 10
"""Smallest number of classes for which top-5 accuracy is measured."""
MAX_EXPONENT = 700.0
"""Largest exponent of the perplexity that a float holds."""
CALIBRATION_BINS = 15
"""Bins of confidence (Guo et al. 2017, arXiv:1706.04599)."""


class Evaluation:
    """A split on which models are measured; a small split is rendered once and kept in memory.

    Args:
        views: the split without augmentation, preprocessed for the model.
        batch_size: the most samples of a batch; it does not change the result.
        num_workers: DataLoader workers, for a split that is too large to keep.
    """

    def __init__(self, views: ViewDataset, *, batch_size: int, num_workers: int) -> None:
        self._views = views
        rows = sequence_rows(views)
        if rows is not None:
            values = int(np.diff(rows.offsets).max()) * getattr(views.dataset, "num_classes", 1)
            batch_size = max(1, min(batch_size, LOGITS_AT_ONCE // values))
        self._places = [
            [(0, index) for index in batch.tolist()] for batch in batches(np.arange(len(views)), batch_size)
        ]
        self._num_workers = num_workers
        self._kept: list[tuple[Tensor, Any, Tensor]] | None = None
        self._small: bool | None = None

    def measure(self, model: nn.Module, device: torch.device) -> dict[str, float]:
        """Metrics by name: `accuracy` is top-1 accuracy.

        With torchmetrics (extra `train`) also `calibration_error`, the expected calibration error over 15 bins, and
        `top5_accuracy` for ten or more classes.
        """
        was_training = model.training
        model.eval()
        if sequence_rows(self._views) is not None:
            measured = self._measure_sequences(model, device)
            model.train(was_training)
            return measured
        correct = 0
        metrics: dict[str, Any] | None = None
        with torch.inference_mode():
            for _, inputs, targets in self._batches():
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

    def _measure_sequences(self, model: nn.Module, device: torch.device) -> dict[str, float]:
        """Mean over rows: `nll` in nats, `perplexity`, `accuracy` of the most probable class, `bits_per_byte`."""
        rows = sequence_rows(self._views)
        assert rows is not None
        nll, correct, num_rows = 0.0, 0, 0
        with torch.inference_mode():
            for index, inputs, targets in self._batches():
                output = model_logits(model, to_device(inputs, device))
                of_batch = batch_rows(index, rows, inputs, output)
                logits_RC, targets_R = of_batch.of_output(output), of_batch.of_targets(targets).to(device)
                nll += float(cross_entropy(logits_RC.float(), targets_R, reduction="sum", ignore_index=NO_TARGET))
                correct += int((logits_RC.argmax(dim=1) == targets_R).sum())
                num_rows += int((targets_R != NO_TARGET).sum())
        mean = nll / max(num_rows, 1)
        measured = {
            "nll": mean,
            "perplexity": math.exp(min(mean, MAX_EXPONENT)),
            "accuracy": correct / max(num_rows, 1),
        }
        num_bytes = getattr(self._views.dataset, "num_bytes", None)
        if num_bytes:
            measured["bits_per_byte"] = nll / math.log(2) / num_bytes
        return measured

    def _batches(self) -> Iterable[tuple[Tensor, Any, Tensor]]:
        if self._kept is not None:
            return self._kept
        if self._small is None:
            sample_bytes = num_bytes(self._views[0][1])
            self._small = sample_bytes is not None and sample_bytes * len(self._views) <= KEPT_BYTES
        # Starting workers takes longer than rendering a small split.
        workers = 0 if self._small else self._num_workers
        rendered = rendered_batches(self._views, self._places, num_workers=workers)
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
