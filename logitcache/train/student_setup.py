"""Sets up a student's run: its initial weights, its sample weights, and its balanced classes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from logitcache.cache.reader import LogitCache
from logitcache.catalog.initialisations import Report, initialisation_of
from logitcache.data.order import batches, run_seed
from logitcache.data.views import ViewDataset
from logitcache.devices import to_device
from logitcache.randomness import keyed_permutation
from logitcache.train.weighting import (
    CLASS_BALANCED,
    SampleWeights,
    class_balanced_weights,
    of_mean_one,
    teacher_weights,
)

# M samples of a run, N samples of a dataset

PROOF_SAMPLES = 4
"""Samples on which a choice of channels is checked."""
CALIBRATION_BATCH = 64
INIT_JSON, INIT_TABLE = "init.json", "init.txt"
"""Files of a run folder that list where each initial parameter comes from."""


def start_from_teacher(
    model: nn.Module,
    teacher: nn.Module,
    init: Any,
    student_views: ViewDataset,
    teacher_views: ViewDataset,
    indices: np.ndarray,
    *,
    seed: int,
) -> Report:
    """Copy the teacher's weights into a fresh student.

    Args:
        model: the student, changed in place.
        teacher: with its weights.
        init: `students[].init` of a pipeline.
        student_views, teacher_views: the training split without augmentation, preprocessed for each model.
        indices: samples that the student may see, int64 (M,); channel importance is measured on some of them.
        seed: of the run.

    Raises:
        UsageError: the weights don't fit; names the parameter and both shapes.
    """
    inputs = student_views.batch([(0, int(index)) for index in indices[:PROOF_SAMPLES]])

    def teacher_batches(count: int) -> Iterator[tuple[Any, Tensor]]:
        drawn = indices[keyed_permutation(len(indices), "calibration", seed)[:count]]
        return _batches(teacher_views, drawn, next(teacher.parameters()).device)

    return initialisation_of(init).start(
        model, teacher, init, seed=run_seed(seed), inputs=inputs, batches=teacher_batches
    )


def _batches(views: ViewDataset, chosen: np.ndarray, device: torch.device) -> Iterator[tuple[Any, Tensor]]:
    for batch in batches(chosen, CALIBRATION_BATCH):
        _, inputs, targets = views.collate(views.__getitems__([(0, int(index)) for index in batch]))
        yield to_device(inputs, device), to_device(targets, device)


def weights_of_samples(
    weights: SampleWeights,
    targets: np.ndarray,
    indices: np.ndarray,
    cached: tuple[LogitCache, np.ndarray | None] | None,
    *,
    num_views: int,
) -> np.ndarray:
    """The factor of each sample's loss, float64 (M,), with mean 1.

    Args:
        weights: how samples are weighted; not "none".
        targets: true labels of the dataset, int64 (N,).
        indices: the run's samples, int64 (M,).
        cached: the cache, and the row of each sample of the dataset; needed where `weights.needs_teacher`.
        num_views: views of the cache that teacher weights are averaged over.
    """
    if weights.name == CLASS_BALANCED:
        return class_balanced_weights(targets[indices], beta=weights.beta)
    assert cached is not None
    cache, rows = cached
    weights_N = teacher_weights(cache, weights.name, cache.views[:num_views])
    return of_mean_one(weights_N[indices if rows is None else rows[indices]])


def by_row(weights: np.ndarray | None, rows: np.ndarray) -> Tensor | None:
    """Weights (M,) as a float32 table indexed by row number; rows outside the run weigh 1."""
    if weights is None:
        return None
    table = torch.ones(int(rows.max()) + 1)
    table[torch.from_numpy(rows)] = torch.from_numpy(weights).float()
    return table
