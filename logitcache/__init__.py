"""Offline knowledge distillation: run the teacher once, store its logits, train any number of students.

Names are imported on first use, so that commands such as `logitcache info` start without torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from logitcache import losses as losses
    from logitcache.cache.creation import create as create
    from logitcache.cache.fidelity import Calibration as Calibration
    from logitcache.cache.layout import Block as Block
    from logitcache.cache.outputs import Output as Output
    from logitcache.cache.reader import LogitCache as LogitCache
    from logitcache.cache.reader import open_cache as open
    from logitcache.cache.sealing import seal as seal
    from logitcache.cache.streams import StreamSummary as StreamSummary
    from logitcache.cache.streams import StreamViews as StreamViews
    from logitcache.cache.writer import CacheWriter as CacheWriter
    from logitcache.config.build import pipeline_data as pipeline_data
    from logitcache.data.index import join_index as join_index
    from logitcache.data.index import split_index as split_index
    from logitcache.data.sampler import ViewSampler as ViewSampler
    from logitcache.data.samples import SeenContents as SeenContents
    from logitcache.data.samples import sample_table as sample_table
    from logitcache.data.sequences import position_index as position_index
    from logitcache.data.shards import TarShards as TarShards
    from logitcache.data.shards import decode_image as decode_image
    from logitcache.data.streamed import StreamDataset as StreamDataset
    from logitcache.data.views import Mixing as Mixing
    from logitcache.data.views import ViewDataset as ViewDataset
    from logitcache.data.views import ViewPlan as ViewPlan
    from logitcache.data.views import render as render
    from logitcache.encodings import ArraySpec as ArraySpec
    from logitcache.encodings import Auto as Auto
    from logitcache.encodings import Components as Components
    from logitcache.encodings import Dense as Dense
    from logitcache.encodings import Encoding as Encoding
    from logitcache.encodings import LowRank as LowRank
    from logitcache.encodings import NoLogits as NoLogits
    from logitcache.encodings import PackedTopK as PackedTopK
    from logitcache.encodings import Sampled as Sampled
    from logitcache.encodings import TopK as TopK
    from logitcache.encodings import TopLowRank as TopLowRank
    from logitcache.encodings import TrellisLowRank as TrellisLowRank
    from logitcache.encodings import Values as Values
    from logitcache.stages.cache_teacher import compute_blocks as compute_blocks
    from logitcache.stages.cache_teacher import plan_blocks as plan_blocks
    from logitcache.targets import DenseTargets as DenseTargets
    from logitcache.targets import SparseTargets as SparseTargets

__all__ = [
    "ArraySpec",
    "Auto",
    "Block",
    "CacheWriter",
    "Calibration",
    "Components",
    "Dense",
    "DenseTargets",
    "Encoding",
    "LogitCache",
    "LowRank",
    "Mixing",
    "NoLogits",
    "Output",
    "PackedTopK",
    "Sampled",
    "SeenContents",
    "SparseTargets",
    "StreamDataset",
    "StreamSummary",
    "StreamViews",
    "TarShards",
    "TopK",
    "TopLowRank",
    "TrellisLowRank",
    "Values",
    "ViewDataset",
    "ViewPlan",
    "ViewSampler",
    "compute_blocks",
    "create",
    "decode_image",
    "join_index",
    "losses",
    "open",
    "pipeline_data",
    "plan_blocks",
    "position_index",
    "render",
    "sample_table",
    "seal",
    "split_index",
]

_HOMES = {
    "ArraySpec": "encodings:ArraySpec",
    "Auto": "encodings:Auto",
    "Block": "cache.layout:Block",
    "CacheWriter": "cache.writer:CacheWriter",
    "Calibration": "cache.fidelity:Calibration",
    "Components": "encodings:Components",
    "Dense": "encodings:Dense",
    "DenseTargets": "targets:DenseTargets",
    "Encoding": "encodings:Encoding",
    "LogitCache": "cache.reader:LogitCache",
    "LowRank": "encodings:LowRank",
    "Mixing": "data.views:Mixing",
    "NoLogits": "encodings:NoLogits",
    "Output": "cache.outputs:Output",
    "PackedTopK": "encodings:PackedTopK",
    "Sampled": "encodings:Sampled",
    "SeenContents": "data.samples:SeenContents",
    "SparseTargets": "targets:SparseTargets",
    "StreamDataset": "data.streamed:StreamDataset",
    "StreamSummary": "cache.streams:StreamSummary",
    "StreamViews": "cache.streams:StreamViews",
    "TarShards": "data.shards:TarShards",
    "TopK": "encodings:TopK",
    "TopLowRank": "encodings:TopLowRank",
    "TrellisLowRank": "encodings:TrellisLowRank",
    "Values": "encodings:Values",
    "ViewDataset": "data.views:ViewDataset",
    "ViewPlan": "data.views:ViewPlan",
    "ViewSampler": "data.sampler:ViewSampler",
    "compute_blocks": "stages.cache_teacher:compute_blocks",
    "create": "cache.creation:create",
    "decode_image": "data.shards:decode_image",
    "join_index": "data.index:join_index",
    "losses": "losses",
    "open": "cache.reader:open_cache",
    "pipeline_data": "config.build:pipeline_data",
    "plan_blocks": "stages.cache_teacher:plan_blocks",
    "position_index": "data.sequences:position_index",
    "render": "data.views:render",
    "sample_table": "data.samples:sample_table",
    "seal": "cache.sealing:seal",
    "split_index": "data.index:split_index",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'logitcache' has no attribute {name!r}")
    module, _, attribute = _HOMES[name].partition(":")
    home = importlib.import_module(f"logitcache.{module}")
    return getattr(home, attribute) if attribute else home


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
