"""What a student of a pipeline starts from, and how its samples are weighed and drawn."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from logitcache.cache.reader import LogitCache
from logitcache.catalog.datasets import Data
from logitcache.catalog.initialisations import Report, initialisation_of
from logitcache.config.build import clean_views
from logitcache.config.schema import Pipeline, StudentConfig
from logitcache.data.order import batches, run_seed
from logitcache.data.samples import sample_table
from logitcache.data.views import ViewDataset
from logitcache.devices import to_device
from logitcache.losses import recorded_loss
from logitcache.randomness import keyed_permutation
from logitcache.train.weighting import (
    CLASS_BALANCED,
    NONE,
    class_balanced_weights,
    of_mean_one,
    teacher_weights,
    weights_from_config,
)

# M samples of a run, N samples of a dataset

PROOF_SAMPLES = 4
"""Samples that a choice of channels is proven on."""
CALIBRATION_BATCH = 64
INIT_JSON, INIT_TABLE = "init.json", "init.txt"
"""Where a run says which of its parameters came from where."""


def student_identity(student: StudentConfig) -> dict[str, Any]:
    """A student as part of what its run is, without what differs between runs of its own or was not asked for."""
    unasked: dict[str, Any] = {"init": None, "sample_weights": {"name": NONE}, "sampler": NONE, "hints": []}
    stated = student.model_dump(exclude={"train"})
    stated |= {"loss": recorded_loss(student.loss), "hints": recorded_loss(student.hints)}
    return {key: value for key, value in stated.items() if key not in unasked or value != unasked[key]}


def start_from_teacher(
    model: nn.Module,
    teacher: nn.Module,
    student: StudentConfig,
    pipeline: Pipeline,
    data: Data,
    indices: np.ndarray,
    *,
    seed: int,
    trust: bool,
) -> Report:
    """Put the teacher's weights into a fresh student as `students[].init` says.

    Args:
        model: the student, in place.
        teacher: with its weights.
        student, pipeline, data: what these are of.
        indices: the samples that the student may see, int64 (M,); importance is measured on some of them.
        seed: of the run.
        trust: run entry points from outside the working folder.

    Raises:
        UsageError: what can't fit; names the parameter and both shapes.
    """
    seen = clean_views(data.train, student, pipeline, trust=trust)
    inputs = seen.batch([(0, int(index)) for index in indices[:PROOF_SAMPLES]])

    def of_teacher(count: int) -> Iterator[tuple[Any, Tensor]]:
        views = clean_views(data.train, pipeline.teacher, pipeline, trust=trust)
        drawn = indices[keyed_permutation(len(indices), "calibration", seed)[:count]]
        return _batches(views, drawn, next(teacher.parameters()).device)

    return initialisation_of(student.init).start(
        model, teacher, student.init, seed=run_seed(seed), inputs=inputs, batches=of_teacher
    )


def _batches(views: ViewDataset, chosen: np.ndarray, device: torch.device) -> Iterator[tuple[Any, Tensor]]:
    for batch in batches(chosen, CALIBRATION_BATCH):
        _, inputs, targets = views.collate(views.__getitems__([(0, int(index)) for index in batch]))
        yield to_device(inputs, device), to_device(targets, device)


def classes_to_balance(student: StudentConfig, data: Data, indices: np.ndarray) -> np.ndarray | None:
    """The class of each sample of a run whose epochs are to be balanced, int64 (M,); None where they are not."""
    return sample_table(data.train).targets[indices] if student.sampler == CLASS_BALANCED else None


def weights_of_samples(
    student: StudentConfig,
    data: Data,
    indices: np.ndarray,
    cached: tuple[LogitCache, np.ndarray | None] | None,
    *,
    num_views: int,
) -> np.ndarray | None:
    """What the loss of each sample of a run is multiplied by, float64 (M,), of mean 1; None where all weigh alike.

    Args:
        student, data: of the run.
        indices: its samples, int64 (M,).
        cached: the cache and the row of each of the data's samples, where the weights are the teacher's.
        num_views: how many of the cache's views the pipeline has; weights are taken over these.
    """
    weights = weights_from_config(student.sample_weights)
    if weights.name == NONE:
        return None
    if weights.name == CLASS_BALANCED:
        return class_balanced_weights(sample_table(data.train).targets[indices], beta=weights.beta)
    assert cached is not None
    cache, rows = cached
    weights_N = teacher_weights(cache, weights.name, cache.views[:num_views])
    return of_mean_one(weights_N[indices if rows is None else rows[indices]])


def by_row(weights: np.ndarray | None, rows: np.ndarray) -> Tensor | None:
    """Weights (M,) as a table that row numbers look up, float32; rows of no sample of the run weigh 1."""
    if weights is None:
        return None
    table = torch.ones(int(rows.max()) + 1)
    table[torch.from_numpy(rows)] = torch.from_numpy(weights).float()
    return table
