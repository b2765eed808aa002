"""Offline knowledge distillation: run the teacher once, keep its logits, train any number of students."""

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
