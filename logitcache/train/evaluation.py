"""How good a net is on a split: top-1, and by torchmetrics top-5 and the expected calibration error."""

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
"""A rendered split no larger than this stays in memory."""
TOP_FIVE_CLASSES = 10
"""Classes from which on top-5 accuracy says something."""
CALIBRATION_BINS = 15
"""Of confidence (Guo et al. 2017, arXiv:1706.04599)."""


class Evaluation:
    """A split held ready to measure nets on: rendered once and kept, where it is small.

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

    def measure(self, model: nn.Module, device: torch.device) -> dict[str, float]:
        """`accuracy`: the share of samples whose target is the model's most probable class.

        With torchmetrics (extra `train`) also `calibration_error`, expected over 15 bins of confidence, and from ten
        classes on `top5_accuracy`.
        """
        was_training = model.training
        model.eval()
        right = 0
        others: dict[str, Any] | None = None
        with torch.inference_mode():
            for inputs, targets in self._batches():
                logits_BC = model_logits(model, to_device(inputs, device)).float().cpu()
                right += int((logits_BC.argmax(dim=1) == targets).sum())
                if others is None:
                    others = _torchmetrics(logits_BC.shape[1])
                probabilities_BC = logits_BC.softmax(dim=1)
                for metric in others.values():
                    metric.update(probabilities_BC, targets)
        model.train(was_training)
        measured = {name: float(metric.compute()) for name, metric in (others or {}).items()}
        return {"accuracy": right / len(self._views), **measured}

    def _batches(self) -> Iterable[tuple[Any, Tensor]]:
        if self._kept is not None:
            return self._kept
        if self._small is None:
            sample_bytes = num_bytes(self._views[0][1])
            self._small = sample_bytes is not None and sample_bytes * len(self._views) <= KEPT_BYTES
        # Starting workers takes longer than rendering what is small enough to keep.
        workers = 0 if self._small else self._num_workers
        rendered = (
            (inputs, targets) for _, inputs, targets in rendered_batches(self._views, self._places, num_workers=workers)
        )
        if not self._small:
            return rendered
        self._kept = list(rendered)
        return self._kept


def _torchmetrics(num_classes: int) -> dict[str, Any]:
    """Fresh metrics for so many classes; none without torchmetrics."""
    try:
        from torchmetrics.classification import MulticlassAccuracy, MulticlassCalibrationError
    except ImportError:  # the extra `train` is not installed: top-1 is counted without it
        return {}
    # Where several processes train one net, one alone evaluates: torchmetrics would wait for the others.
    alone = {"sync_on_compute": False}
    metrics: dict[str, Any] = {
        "calibration_error": MulticlassCalibrationError(num_classes, n_bins=CALIBRATION_BINS, norm="l1", **alone)
    }
    if num_classes >= TOP_FIVE_CLASSES:
        metrics["top5_accuracy"] = MulticlassAccuracy(num_classes, top_k=5, average="micro", **alone)
    return metrics
