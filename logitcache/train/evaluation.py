"""Measures a model on a split: accuracy, calibration, agreement with a teacher; of sequences the log-likelihood."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from logitcache.cache.manifest import LOGITS
from logitcache.catalog.calling import model_logits
from logitcache.data.batching import NO_TARGET, num_bytes
from logitcache.data.loading import rendered_batches
from logitcache.data.order import batches
from logitcache.data.rows import RowMap
from logitcache.data.sequences import batch_rows, lengths, sequence_rows
from logitcache.data.tokens import length_batches
from logitcache.data.views import ViewDataset
from logitcache.devices import to_device
from logitcache.losses import kl_divergence
from logitcache.targets import Targets, row_slices
from logitcache.train.labels import Labels
from logitcache.train.reliability import reliability

# B batch, R rows of a batch, C classes

KEPT_BYTES = 256 * 2**20
"""A rendered split of at most this size stays in memory."""
LOGITS_AT_ONCE = 2**26
"""Logits of a batch of sequences (256 MiB), padding included; one sequence may have more."""
TOP_FIVE_CLASSES = 10
"""Smallest number of classes for which top-5 accuracy is measured."""
MAX_EXPONENT = 700.0
"""Largest exponent of the perplexity that a float holds."""


class Evaluation:
    """A split on which models are measured; a small split is rendered once and kept in memory.

    Args:
        views: the split without augmentation, preprocessed for the model.
        batch_size: the most samples of a batch; it does not change the result.
        num_workers: DataLoader workers, for a split that is too large to keep.
        labels: the teacher's, for the same samples; a model is then compared with the teacher as well.
    """

    def __init__(self, views: ViewDataset, *, batch_size: int, num_workers: int, labels: Labels | None = None) -> None:
        self._views = views
        self._labels = labels
        rows = sequence_rows(views)
        if rows is None:
            chosen = batches(np.arange(len(views)), batch_size)
        else:
            chosen = self._batches_by_length(rows, batch_size)
        self._places = [[(0, index) for index in batch.tolist()] for batch in chosen]
        self._num_workers = num_workers
        self._kept: list[tuple[Tensor, Any, Any]] | None = None
        self._small: bool | None = None

    def _batches_by_length(self, rows: RowMap, batch_size: int) -> list[np.ndarray]:
        """Batches of sequences with rows, of similar length; the labels of each lie in the same few blocks."""
        samples = np.arange(len(self._views)) if self._views.rows is None else self._views.rows
        length_N, counts_N = lengths(rows)[samples], np.diff(rows.offsets)[samples]
        self._num_rows = int(counts_N.sum())
        with_rows = np.flatnonzero(counts_N)
        groups = [with_rows]
        window = getattr(self._labels, "window_blocks", None)
        if window is not None:
            window_M = self._views.blocks_of(with_rows) // window
            groups = [with_rows[window_M == each] for each in np.unique(window_M)]
        # The logits of a live teacher are as many as the model's.
        models = 2 if self._labels is not None else 1
        num_classes = getattr(self._views.dataset, "num_classes", 1)
        max_positions = max(1, LOGITS_AT_ONCE // (models * num_classes))
        return [
            group[batch] for group in groups for batch in length_batches(length_N[group], batch_size, max_positions)
        ]

    def measure(self, model: nn.Module, device: torch.device) -> dict[str, float]:
        """Metrics by name: `accuracy` is top-1 accuracy.

        Also `calibration_error`, the expected calibration error over 15 bins, and `top5_accuracy` for ten or more
        classes. With labels of a teacher also `teacher_kl`, the mean of
        KL(teacher ‖ model) at T = 1 in nats, and `teacher_agreement`, how often both have the same most probable class.
        """
        was_training = model.training
        model.eval()
        if self._labels is not None:
            self._labels.expect([LOGITS], [])
            self._labels.start_views([0], [])
        measure = self._measure_samples if sequence_rows(self._views) is None else self._measure_sequences
        with torch.inference_mode():
            measured = measure(model, device)
        model.train(was_training)
        return measured

    def _measure_samples(self, model: nn.Module, device: torch.device) -> dict[str, float]:
        compared = _Comparison()
        confidences, correct, in_top5 = [], [], []
        num_classes = 0
        for index, inputs, targets in self._batches():
            inputs, teacher_inputs = self._inputs(inputs, device)
            output_BC = model_logits(model, inputs)
            if self._labels is not None:
                compared.add(output_BC, self._labels.targets(index, teacher_inputs, targets))
            logits_BC = output_BC.float().cpu()
            num_classes = logits_BC.shape[1]
            confidences.append(logits_BC.softmax(dim=1).amax(dim=1))
            correct.append(logits_BC.argmax(dim=1) == targets)
            in_top5.append((logits_BC > logits_BC.gather(1, targets[:, None])).sum(dim=1) < 5)
        correct_M = torch.cat(correct).numpy()
        measured = {
            "accuracy": float(correct_M.mean()),
            "calibration_error": reliability(torch.cat(confidences).numpy(), correct_M).ece,
        }
        if num_classes >= TOP_FIVE_CLASSES:
            measured["top5_accuracy"] = float(torch.cat(in_top5).float().mean())
        return measured | compared.mean()

    def _measure_sequences(self, model: nn.Module, device: torch.device) -> dict[str, float]:
        """Means over rows with a class: `nll` in nats, `perplexity`, `accuracy`; and `bits_per_byte` of all rows."""
        rows = sequence_rows(self._views)
        assert rows is not None
        nll, correct, num_rows = 0.0, 0, 0
        compared = _Comparison()
        for index, inputs, targets in self._batches():
            inputs, teacher_inputs = self._inputs(inputs, device)
            output = model_logits(model, inputs)
            of_batch = batch_rows(index, rows, inputs, output)
            logits_RC, targets_R = of_batch.of_output(output), of_batch.of_targets(targets).to(device)
            counts_R = targets_R != NO_TARGET
            of_teacher = None
            if self._labels is not None:
                of_teacher = self._labels.targets(of_batch.index, teacher_inputs, targets_R)
            for chunk in row_slices(len(logits_RC), logits_RC.shape[1], logits_RC.device):
                chunk_RC, chunk_R = logits_RC[chunk][counts_R[chunk]], targets_R[chunk][counts_R[chunk]]
                nll += float(cross_entropy(chunk_RC.float(), chunk_R, reduction="sum"))
                correct += int((chunk_RC.argmax(dim=1) == chunk_R).sum())
                num_rows += len(chunk_R)
                if of_teacher is not None:
                    compared.add(chunk_RC, of_teacher[chunk][counts_R[chunk]])
        mean = nll / max(num_rows, 1)
        measured = {
            "nll": mean,
            "perplexity": math.exp(min(mean, MAX_EXPONENT)),
            "accuracy": correct / max(num_rows, 1),
        }
        num_bytes = getattr(self._views.dataset, "num_bytes", None)
        if num_bytes and num_rows == self._num_rows:
            measured["bits_per_byte"] = nll / math.log(2) / num_bytes
        return measured | compared.mean()

    def _inputs(self, inputs: Any, device: torch.device) -> tuple[Any, Any]:
        """The model's input on the device, and the teacher's."""
        teacher_inputs = inputs
        if self._labels is not None and self._labels.needs_teacher_inputs:
            inputs, teacher_inputs = inputs
        return to_device(inputs, device), teacher_inputs

    def _batches(self) -> Iterable[tuple[Tensor, Any, Any]]:
        if self._kept is not None:
            return self._kept
        if self._small is None:
            sample_bytes = num_bytes(self._views[self._places[0][0]][1])  # the longest sequence
            self._small = sample_bytes is not None and sample_bytes * len(self._views) <= KEPT_BYTES
        # Starting workers takes longer than rendering a small split.
        workers = 0 if self._small else self._num_workers
        rendered = rendered_batches(self._views, self._places, num_workers=workers)
        if not self._small:
            return rendered
        self._kept = list(rendered)
        return self._kept


class _Comparison:
    """Sums of what a model is compared with its teacher by."""

    def __init__(self) -> None:
        self._kl, self._agreeing, self._num_rows = 0.0, 0, 0

    def add(self, logits_RC: Tensor, teacher: Targets) -> None:
        """Compare some rows of a model's output with the teacher's distributions."""
        teacher = teacher.of_first_classes(logits_RC.shape[1]).to(logits_RC.device)  # see StudentConfig.vocab_size
        self._kl += float(kl_divergence(logits_RC.float(), teacher, reduction="sum"))
        self._agreeing += int((logits_RC.argmax(dim=1) == teacher.argmax()).sum())
        self._num_rows += len(logits_RC)

    def mean(self) -> dict[str, float]:
        """Metrics by name; none if nothing was compared."""
        if not self._num_rows:
            return {}
        return {"teacher_kl": self._kl / self._num_rows, "teacher_agreement": self._agreeing / self._num_rows}
