"""The processes that `torchrun` starts divide the missing blocks."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass
from typing import ClassVar

from logitcache.engines.protocol import CacheResult, Engine, Job, share
from logitcache.train.ranks import joined


@dataclass(frozen=True, kw_only=True)
class Torchrun(Engine):
    """One process for each rank. The first creates and seals the cache; the division is fixed when the run starts."""

    name: ClassVar[str] = "torchrun"

    def run(self, job: Job) -> CacheResult:
        with closing(job.load()) as worker, joined(worker.device) as ranks:
            if ranks.rank:
                ranks.wait()  # until the first process has created the cache, with its per-cache arrays
            worker.open()
            if not ranks.rank:
                ranks.wait()
            missing = ranks.from_first(worker.missing_blocks)
            worker.compute(share(missing, ranks.rank, ranks.size, together=worker.together))
            ranks.wait()  # until all blocks are written
            return CacheResult(ranks.from_first(worker.seal), missing, len(worker.all_blocks()))
