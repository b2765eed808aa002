"""A pipeline's data, checked against a cache: renders the cache's views again, and builds models for them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import torch
from torch import nn

from logitcache.cache.reader import LogitCache
from logitcache.catalog.datasets import Data
from logitcache.config.build import (
    RANDOM,
    has_teacher,
    input_part,
    recorded_pipeline,
    resolve_data,
    resolve_model,
    resolve_plan,
    resolve_teacher,
    teacher_identity,
    teacher_weights,
)
from logitcache.config.schema import ModelConfig, Pipeline
from logitcache.data.views import ViewDataset, ViewPlan
from logitcache.errors import LogitCacheError, UsageError
from logitcache.verify.fit import open_fitting_cache


@dataclass(frozen=True)
class MatchedData:
    """Data and views that are those of a cache."""

    cache: LogitCache
    data: Data
    plan: ViewPlan
    rows: np.ndarray | None
    """The cache row of each local sample, int64 (M,); None where both have the same samples in the same order."""
    teacher: ModelConfig
    load_teacher: Callable[[], nn.Module]
    """Returns the cache's teacher, or raises `UsageError` with the reason why it is not available."""
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

    def model(self, config: ModelConfig, weights: str) -> nn.Module:
        """A model with the weights of a file, in evaluation mode on the CPU."""
        return resolve_model(config, self.data, self.plan, weights=weights, seed=0, trust=self.trust).eval()


def match_data(location: str, pipeline: Pipeline, *, trust: bool = False) -> MatchedData:
    """Load a pipeline's data and check samples, views, teacher and some rendered pixels against a cache.

    Args:
        location: of the cache; the pipeline's own is not used.
        pipeline: names data, views and teacher.
        trust: allow entry points from outside the working directory.

    Raises:
        IdentityMismatch: names what differs.
        LogitCacheError: the data is missing, or needs code that is not trusted.
    """
    data = resolve_data(pipeline, trust=trust)
    plan = resolve_plan(pipeline, data, trust=trust)
    fingerprint = resolve_teacher(pipeline, data, plan, trust=trust)[1] if has_teacher(pipeline) else None
    teacher = teacher_identity(pipeline, fingerprint)
    subset = pipeline.data.subset
    cache, rows = open_fitting_cache(location, data, plan, teacher, num_views=1, subset=subset, trust=trust)
    contents = None if cache.samples is None else cache.samples.contents
    plan = replace(plan, num_samples=cache.num_samples, contents=contents)

    def load_teacher() -> nn.Module:
        if not _has_local_teacher(pipeline):
            raise UsageError("the weights are not available locally")
        teacher, fingerprint = resolve_teacher(pipeline, data, plan, trust=trust)
        if fingerprint != cache.manifest.identity.teacher:
            raise UsageError("the cache was not made by the pipeline's teacher alone")
        return teacher

    matched = MatchedData(cache, data, plan, rows, pipeline.teacher, load_teacher, trust)
    cache.verify_inputs(matched.views(), 0)
    return matched


class RecordedData:
    """The data of the pipelines that runs recorded, checked against a cache; runs of the same data share it.

    Args:
        location: of the cache.
        trust: allow entry points from outside the working directory.
    """

    def __init__(self, location: str, *, trust: bool = False) -> None:
        self._location, self._trust = location, trust
        self._matched: dict[str, MatchedData | LogitCacheError] = {}

    def of_run(self, folder: Path) -> MatchedData:
        """The data of the run in a folder; raises as `match_data` does."""
        pipeline = recorded_pipeline(folder)
        key = json.dumps([pipeline.data.model_dump(), pipeline.views.model_dump(), pipeline.teacher.model_dump()])
        if key not in self._matched:
            try:
                self._matched[key] = match_data(self._location, pipeline, trust=self._trust)
            except LogitCacheError as error:
                self._matched[key] = error
        matched = self._matched[key]
        if isinstance(matched, LogitCacheError):
            raise matched
        return matched


def _has_local_teacher(pipeline: Pipeline) -> bool:
    """Whether the teacher's weights are on this machine, so that loading it downloads nothing."""
    weights = teacher_weights(pipeline)
    if weights in (None, RANDOM):
        return True
    if str(weights).endswith(".safetensors"):
        return Path(str(weights)).is_file()
    import torchvision

    try:
        named = torchvision.models.get_model_weights(pipeline.teacher.model)[str(weights)]
    except (ValueError, KeyError):
        return False
    return (Path(torch.hub.get_dir()) / "checkpoints" / Path(urlsplit(named.url).path).name).is_file()
