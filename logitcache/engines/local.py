"""One process computes every missing block."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass
from typing import ClassVar

from logitcache.engines.protocol import CacheResult, Engine, Job


@dataclass(frozen=True, kw_only=True)
class Local(Engine):
    """This process alone."""

    name: ClassVar[str] = "local"

    def run(self, job: Job) -> CacheResult:
        with closing(job.load()) as worker:
            worker.open()
            computed = worker.compute(worker.missing_blocks())
            return CacheResult(worker.seal(), computed, len(worker.all_blocks()))
