"""Engines distribute the blocks of stage 1 over processes and machines; one file for each.

To add an engine, subclass `Engine`. A package adds it in the entry point group `logitcache.engines`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from logitcache.engines.claims import Claiming as Claiming
from logitcache.engines.local import Local as Local
from logitcache.engines.protocol import CacheResult as CacheResult
from logitcache.engines.protocol import Engine as Engine
from logitcache.engines.protocol import Job as Job
from logitcache.engines.protocol import Worker as Worker
from logitcache.engines.ray import Ray as Ray
from logitcache.engines.shard import Shard as Shard
from logitcache.engines.torchrun import Torchrun as Torchrun
from logitcache.registry import Registry, configured

ENGINES: Registry[type[Engine]] = Registry(
    "engine", {engine.name: engine for engine in (Local, Torchrun, Shard, Claiming, Ray)}, base=Engine
)


def engine_from_name(name: str, options: Mapping[str, Any]) -> Engine:
    """An engine of the registry with options.

    Raises:
        UsageError: an unknown engine or option, or a value that the engine refuses.
    """
    return configured(f"engine {name!r}", ENGINES[name], options)
