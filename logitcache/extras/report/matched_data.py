"""Local data that was checked against a cache; the report renders pictures and measures students with it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from logitcache.cache.reader import LogitCache
from logitcache.catalog.datasets import Data
from logitcache.config.build import (
    has_teacher,
    input_part,
    resolve_data,
    resolve_plan,
    resolve_teacher,
    teacher_identity,
)
from logitcache.config.schema import ModelConfig, Pipeline
from logitcache.data.views import ViewDataset, ViewPlan
from logitcache.verify.fit import open_fitting_cache


@dataclass(frozen=True)
class MatchedData:
    """A pipeline's data and views, which are those of a cache."""

    cache: LogitCache
    pipeline: Pipeline
    data: Data
    plan: ViewPlan
    rows: np.ndarray | None
    """The cache row of each local sample, int64 (M,); None where both have the same samples in the same order."""
    trust: bool

    @cached_property
    def index_of_row(self) -> dict[int, int]:
        """The local index of each cache row."""
        rows = range(self.cache.num_samples) if self.rows is None else self.rows.tolist()
        return {row: index for index, row in enumerate(rows)}

    def views(self, model: ModelConfig | None = None) -> ViewDataset:
        """The views as the input of a model, by default of the teacher."""
        preprocess = None if model is None else input_part(model, trust=self.trust)
        return ViewDataset(self.data.train, self.plan, preprocess=preprocess, rows=self.rows)

    def shared_views(self) -> ViewDataset:
        """The views before the input transform of any model."""
        return ViewDataset(self.data.train, replace(self.plan, preprocess=None), rows=self.rows)


def match_data(cache: LogitCache, location: str, pipeline: Pipeline, *, trust: bool) -> MatchedData:
    """Load a pipeline's data and check samples, views, teacher and some rendered pixels against a cache.

    Args:
        location: of the cache; it replaces the one in the pipeline.

    Raises:
        IdentityMismatch: names what differs.
        LogitCacheError: the data is missing, or needs code that is not trusted.
    """
    here: dict[str, Any] = {
        "cache": pipeline.cache.model_copy(update={"path": location}),
        "views": pipeline.views.model_copy(update={"count": len(cache.views)}),
    }
    pipeline = pipeline.model_copy(update=here)
    data = resolve_data(pipeline, trust=trust)
    plan = resolve_plan(pipeline, data, trust=trust)
    fingerprint = resolve_teacher(pipeline, data, plan, trust=trust)[1] if has_teacher(pipeline) else None
    _, rows = open_fitting_cache(
        location,
        data,
        plan,
        teacher_identity(pipeline, fingerprint),
        num_views=len(cache.views),
        subset=pipeline.data.subset,
        trust=trust,
    )
    contents = None if cache.samples is None else cache.samples.contents
    plan = replace(plan, num_samples=cache.num_samples, contents=contents)
    matched = MatchedData(cache, pipeline, data, plan, rows, trust)
    cache.verify_inputs(matched.views(), 0)
    return matched
