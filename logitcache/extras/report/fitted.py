"""Data at hand that was held to a cache: what pictures and students need."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from logitcache.cache.reader import LogitCache
from logitcache.catalog.datasets import Data
from logitcache.config.build import input_part, resolve_data, resolve_plan
from logitcache.config.schema import ModelConfig, Pipeline
from logitcache.data.views import ViewDataset, ViewPlan
from logitcache.verify.fit import open_fitting_cache


@dataclass(frozen=True)
class FittedData:
    """A pipeline's data and views, after they were found to be those of a cache."""

    cache: LogitCache
    pipeline: Pipeline
    data: Data
    plan: ViewPlan
    rows: np.ndarray | None
    """The cache's row of each sample, int64 (M,); None where they are the cache's own in its order."""
    trust: bool

    def index_of_row(self) -> dict[int, int]:
        """Where a row of the cache lies in the data at hand."""
        rows = range(self.cache.num_samples) if self.rows is None else self.rows.tolist()
        return {row: index for index, row in enumerate(rows)}

    def views(self, model: ModelConfig | None = None) -> ViewDataset:
        """The views as a model takes them, the teacher by default."""
        preprocess = None if model is None else input_part(model, trust=self.trust)
        return ViewDataset(self.data.train, self.plan, preprocess=preprocess, rows=self.rows)

    def shared_views(self) -> ViewDataset:
        """The views before any model's own part."""
        return ViewDataset(self.data.train, replace(self.plan, preprocess=None), rows=self.rows)


def fit_data(cache: LogitCache, location: str, pipeline: Pipeline, *, trust: bool) -> FittedData:
    """Load a pipeline's data and hold it to a cache: samples, views, teacher, and some rendered pixels.

    Args:
        location: where the cache lies, whatever place the pipeline names.

    Raises:
        IdentityMismatch: names what differs.
        LogitCacheError: data that is not to be had, or code that is not trusted.
    """
    here: dict[str, Any] = {
        "cache": pipeline.cache.model_copy(update={"path": location}),
        "views": pipeline.views.model_copy(update={"count": len(cache.views)}),
    }
    pipeline = pipeline.model_copy(update=here)
    data = resolve_data(pipeline, trust=trust)
    plan = resolve_plan(pipeline, data, trust=trust)
    _, rows = open_fitting_cache(pipeline, data, plan, trust=trust)
    samples = cache.samples
    plan = replace(plan, num_samples=cache.num_samples, contents=None if samples is None else samples.contents)
    fitted = FittedData(cache, pipeline, data, plan, rows, trust)
    cache.verify_inputs(fitted.views(), 0)
    return fitted
