"""Where a student's labels come from: true labels only, a cache, or the live teacher.

Each source decides which views the student trains on, and adds its part to the run's identity.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import numpy as np

from logitcache.cache.outputs import Output
from logitcache.cache.reader import LogitCache
from logitcache.catalog.datasets import Selection
from logitcache.data.samples import Dataset
from logitcache.data.views import BothInputs, ViewDataset, ViewPlan
from logitcache.digest import array_digest, json_digest
from logitcache.train.inference import TeacherRunner
from logitcache.train.labels import CachedLabels, EnsembleLabels, Labels, LiveLabels

Preprocess = Callable[[Any], Any]


class LabelSource:
    """The views of one student, and the labels for them.

    Args:
        views: of the training split, as the student takes them.
        indices: the samples of `views` to train on, int64 (M,).
    """

    kind: str
    labels: Labels | None = None
    num_views: int | None = None
    """Views that epochs cycle through; None gives each epoch a view of its own."""
    first_view = 0
    rows_per_block: int | None = None
    extra_outputs: Mapping[str, Output] = MappingProxyType({})
    """The teacher's outputs beside the logits, which hints may use."""

    def __init__(self, views: ViewDataset, indices: np.ndarray) -> None:
        self.views = views
        self.indices = indices

    @property
    def window_blocks(self) -> int | None:
        """Blocks that each batch stays within, where views are streamed."""
        return None

    @property
    def views_key(self) -> str:
        """Equal for two sources that render the same pixels, before the model's own preprocessing."""
        rows = self.views.rows
        return json_digest([self.kind, None if rows is None else array_digest(rows)])

    def add_identity(self, identity: dict[str, Any]) -> None:
        """Add this source's part to a run's identity."""
        identity["num_views"] = self.num_views


class TrueLabels(LabelSource):
    """True labels only. The student sees and mixes only its own samples, and every epoch is a new view."""

    kind = "fresh"

    def __init__(self, dataset: Dataset, plan: ViewPlan, indices: np.ndarray, preprocess: Preprocess) -> None:
        chosen = dataset if len(indices) == len(dataset) else Selection(dataset, indices)
        views = ViewDataset(chosen, replace(plan, num_samples=len(chosen)), preprocess=preprocess)
        super().__init__(views, np.arange(len(chosen)))
        self._samples = indices

    @property
    def views_key(self) -> str:
        return json_digest([self.kind, array_digest(self._samples)])


class LiveTeacher(LabelSource):
    """The teacher, run on every batch.

    Args:
        runner: the teacher.
        fingerprint: of the teacher.
        dataset, plan, indices: what the student trains on.
        num_views: of the pipeline.
        preprocess: the student's; None where it is the teacher's.
        output_configs: configuration of each output that the student uses, for the identity.
        extra_outputs: their shapes and encodings.
    """

    kind = "live"

    def __init__(
        self,
        runner: TeacherRunner,
        fingerprint: str,
        dataset: Dataset,
        plan: ViewPlan,
        indices: np.ndarray,
        *,
        num_views: int,
        preprocess: Preprocess | None,
        output_configs: Mapping[str, Any],
        extra_outputs: Mapping[str, Output],
    ) -> None:
        both = None if preprocess is None else BothInputs(preprocess, plan.preprocess)
        super().__init__(ViewDataset(dataset, plan, preprocess=both), indices)
        self.labels = LiveLabels(runner, needs_teacher_inputs=both is not None)
        self.num_views = num_views
        self.extra_outputs = extra_outputs
        self._identity = {"teacher": fingerprint} | ({"outputs": dict(output_configs)} if output_configs else {})

    def add_identity(self, identity: dict[str, Any]) -> None:
        identity["labels"] = self._identity
        super().add_identity(identity)


class Cached(LabelSource):
    """One or several caches of the same views.

    Args:
        caches: the first one proves the pixels.
        rows: the caches' row of each sample, int64 (N,); None where row and sample number are the same.
        dataset, plan, indices: what the student trains on.
        num_views: of the pipeline.
        preprocess: the student's.
        make_labels: makes the labels for the views.
        given: labels to use instead, in an experiment.
        ensemble: how several caches are combined, for the identity.
    """

    kind = "cache"

    def __init__(
        self,
        caches: list[LogitCache],
        rows: np.ndarray | None,
        dataset: Dataset,
        plan: ViewPlan,
        indices: np.ndarray,
        *,
        num_views: int,
        preprocess: Preprocess,
        make_labels: Callable[[ViewDataset], CachedLabels | EnsembleLabels],
        given: Labels | None,
        ensemble: Mapping[str, Any] | None,
    ) -> None:
        cache = caches[0]
        contents = None if cache.samples is None else cache.samples.contents
        plan = replace(plan, num_samples=cache.num_samples, contents=contents)
        super().__init__(ViewDataset(dataset, plan, preprocess=preprocess, rows=rows), indices)
        self._cached_labels = make_labels(self.views) if given is None else None
        self.labels = self._cached_labels or given
        self.num_views = num_views
        self.first_view = cache.views.start
        self.extra_outputs = cache.extra_outputs
        self._caches = caches
        self._ensemble = ensemble
        self.rows_per_block = cache.layout.rows_per_block if given is None else None

    @property
    def window_blocks(self) -> int | None:
        return None if self._cached_labels is None else self._cached_labels.window_blocks

    def add_identity(self, identity: dict[str, Any]) -> None:
        labels: dict[str, Any] = {"cache": self._caches[0].id, "window_blocks": self.window_blocks}
        if self._cached_labels is None:
            labels["given"] = type(self.labels).__name__
        if self._ensemble is not None:
            # Ids, not locations: a run resumes with copies of the same caches.
            identity["student"]["labels"] = dict(self._ensemble)
            labels["caches"] = [cache.id for cache in self._caches]
        identity["labels"] = labels
        if self.first_view:
            identity["first_view"] = self.first_view
        super().add_identity(identity)
