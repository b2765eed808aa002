"""Offline knowledge distillation: run the teacher once, keep its logits, train any number of students.

Names come in when they are first asked for: a command that needs no torch, such as `logitcache info`, loads none.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from logitcache import losses as losses
    from logitcache.creation import create as create
    from logitcache.encodings import Auto as Auto
    from logitcache.encodings import Dense as Dense
    from logitcache.encodings import LowRank as LowRank
    from logitcache.encodings import Sampled as Sampled
    from logitcache.encodings import TopK as TopK
    from logitcache.fidelity import Calibration as Calibration
    from logitcache.reader import LogitCache as LogitCache
    from logitcache.reader import open_cache as open
    from logitcache.samples import sample_table as sample_table
    from logitcache.views import Mixing as Mixing
    from logitcache.views import ViewDataset as ViewDataset
    from logitcache.views import ViewPlan as ViewPlan
    from logitcache.writer import CacheWriter as CacheWriter

__all__ = [
    "Auto",
    "CacheWriter",
    "Calibration",
    "Dense",
    "LogitCache",
    "LowRank",
    "Mixing",
    "Sampled",
    "TopK",
    "ViewDataset",
    "ViewPlan",
    "create",
    "losses",
    "open",
    "sample_table",
]

_HOMES = {
    "Auto": "encodings:Auto",
    "CacheWriter": "writer:CacheWriter",
    "Calibration": "fidelity:Calibration",
    "Dense": "encodings:Dense",
    "LogitCache": "reader:LogitCache",
    "LowRank": "encodings:LowRank",
    "Mixing": "views:Mixing",
    "Sampled": "encodings:Sampled",
    "TopK": "encodings:TopK",
    "ViewDataset": "views:ViewDataset",
    "ViewPlan": "views:ViewPlan",
    "create": "creation:create",
    "losses": "losses",
    "open": "reader:open_cache",
    "sample_table": "samples:sample_table",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'logitcache' has no attribute {name!r}")
    module, _, attribute = _HOMES[name].partition(":")
    home = importlib.import_module(f"logitcache.{module}")
    return getattr(home, attribute) if attribute else home


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
