"""Where a student's labels come from: true labels only, a cache, or the live teacher.

Each source decides which views the student is trained on, and adds its part to the run's identity.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import numpy as np

from logitcache.cache.outputs import Output
from logitcache.cache.reader import LogitCache
from logitcache.catalog.datasets import Selection
from logitcache.data.rows import rows_of_dataset
from logitcache.data.samples import Dataset
from logitcache.data.views import BothInputs, ViewDataset, ViewPlan
from logitcache.digest import array_digest, json_digest
from logitcache.train.inference import TeacherRunner
from logitcache.train.labels import CachedLabels, EnsembleLabels, Labels, LiveLabels


@dataclass(frozen=True)
class TrainingSet:
    """What a student is trained on."""

    dataset: Dataset
    plan: ViewPlan
    indices: np.ndarray
    """Samples of the dataset, int64 (M,)."""
    preprocess: Callable[[Any], Any]
    """The student's own deterministic transform."""


class LabelSource:
    """The views of one student, and the labels for them."""

    kind: str
    labels: Labels | None = None
    num_views: int | None = None
    """Views that epochs cycle through; None gives each epoch a new view."""
    first_view = 0
    extra_outputs: Mapping[str, Output] = MappingProxyType({})
    """The teacher's outputs beside the logits, which hints may use."""

    def __init__(self, views: ViewDataset, indices: np.ndarray) -> None:
        self.views = views
        self.indices = indices
        """Samples of `views` to train on, int64 (M,)."""

    @property
    def window_blocks(self) -> int | None:
        """Blocks that each batch stays within, where views are streamed."""
        return None

    @property
    def views_key(self) -> str:
        """Equal for two sources whose views are the same before the model's own preprocessing."""
        rows = self.views.rows
        return json_digest([self.kind, None if rows is None else array_digest(rows)])

    def add_identity(self, identity: dict[str, Any]) -> None:
        """Add this source's part to a run's identity."""
        identity["num_views"] = self.num_views


class TrueLabels(LabelSource):
    """True labels only. The student sees and mixes only its own samples, and every epoch is a new view."""

    kind = "fresh"

    def __init__(self, data: TrainingSet) -> None:
        everything = len(data.indices) == len(data.dataset)
        dataset = data.dataset if everything else Selection(data.dataset, data.indices)
        plan = replace(data.plan, num_samples=len(dataset), rows=rows_of_dataset(dataset))
        super().__init__(ViewDataset(dataset, plan, preprocess=data.preprocess), np.arange(len(dataset)))
        self._samples = data.indices

    @property
    def views_key(self) -> str:
        return json_digest([self.kind, array_digest(self._samples)])


class LiveTeacher(LabelSource):
    """The teacher, run on every batch.

    Args:
        data: what the student is trained on.
        num_views: of the pipeline.
        runner: the teacher.
        same_input: whether the student's preprocessing is the teacher's.
        identity: of the teacher and the outputs that the student uses.
        extra_outputs: shapes and encodings of these outputs.
    """

    kind = "live"

    def __init__(
        self,
        data: TrainingSet,
        num_views: int,
        runner: TeacherRunner,
        *,
        same_input: bool,
        identity: dict[str, Any],
        extra_outputs: Mapping[str, Output],
    ) -> None:
        preprocess = data.preprocess if same_input else BothInputs(data.preprocess, data.plan.preprocess)
        super().__init__(ViewDataset(data.dataset, data.plan, preprocess=preprocess), data.indices)
        self.labels = LiveLabels(runner, needs_teacher_inputs=not same_input)
        self.num_views = num_views
        self.extra_outputs = extra_outputs
        self._identity = identity

    def add_identity(self, identity: dict[str, Any]) -> None:
        identity["labels"] = self._identity
        super().add_identity(identity)


class Cached(LabelSource):
    """One or several caches of the same views.

    Args:
        data: what the student is trained on.
        num_views: of the pipeline.
        caches: inputs are verified against the first one.
        rows: the caches' row of each sample, int64 (N,); None where row and sample number are the same.
        make_labels: makes the labels for the views.
        given: labels to use instead, in an experiment.
        ensemble: how several caches are combined, for the identity.
    """

    kind = "cache"

    def __init__(
        self,
        data: TrainingSet,
        num_views: int,
        caches: list[LogitCache],
        rows: np.ndarray | None,
        *,
        make_labels: Callable[[ViewDataset], CachedLabels | EnsembleLabels],
        given: Labels | None,
        ensemble: dict[str, Any] | None,
    ) -> None:
        cache = caches[0]
        contents = None if cache.samples is None else cache.samples.contents
        plan = replace(data.plan, num_samples=cache.num_samples, contents=contents, rows=cache.row_map)
        super().__init__(ViewDataset(data.dataset, plan, preprocess=data.preprocess, rows=rows), data.indices)
        self._cached_labels = make_labels(self.views) if given is None else None
        self.labels = self._cached_labels or given
        self.num_views = num_views
        self.first_view = cache.views.start
        self.extra_outputs = cache.extra_outputs
        self._caches = caches
        self._ensemble = ensemble

    @property
    def window_blocks(self) -> int | None:
        return None if self._cached_labels is None else self._cached_labels.window_blocks

    def add_identity(self, identity: dict[str, Any]) -> None:
        labels: dict[str, Any] = {"cache": self._caches[0].id, "window_blocks": self.window_blocks}
        if self._cached_labels is None:
            labels["given"] = type(self.labels).__name__
        if self._ensemble is not None:
            # Ids, not locations: a run resumes with copies of the same caches.
            identity["student"]["labels"] = self._ensemble
            labels["caches"] = [cache.id for cache in self._caches]
        identity["labels"] = labels
        if self.first_view:
            identity["first_view"] = self.first_view
        super().add_identity(identity)
