"""One of n independent jobs, such as those of a job array, computes every n-th block."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import ClassVar

from logitcache.cache.layout import Block
from logitcache.engines.claims import open_once, seal_if_complete
from logitcache.engines.protocol import CacheResult, Engine, Job, share
from logitcache.errors import UsageError
from logitcache.storage.claims import Claims


@dataclass(frozen=True, kw_only=True)
class Shard(Engine):
    """Blocks `index`, `index + count`, … of all blocks of the cache (see `share`), whether they are written or not.

    So the division is the same in every job and at every restart, and the jobs do not communicate. The one that finds
    the cache complete seals it.
    """

    name: ClassVar[str] = "shard"
    index: int
    """Of this shard, from 0."""
    count: int
    """Of shards."""

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise UsageError(
                f"there is no shard {self.index} of {self.count}; shards are numbered from 0: "
                f"0/{self.count} to {self.count - 1}/{self.count}"
            )

    @classmethod
    def parse(cls, text: str) -> Shard:
        """From a text such as "0/4", the first of four shards.

        Raises:
            UsageError: another form, or no such shard.
        """
        found = re.fullmatch(r"([0-9]{1,9})/([1-9][0-9]{0,8})", text.strip())
        if found is None:
            raise UsageError(f"{text!r} is not a shard; expected INDEX/COUNT, such as 0/4 for the first of four")
        return cls(index=int(found[1]), count=int(found[2]))

    def share(self, blocks: Sequence[Block], *, together: int = 1) -> list[Block]:
        """The part of all blocks of a cache that belongs to this shard."""
        return share(blocks, self.index, self.count, together=together)

    def run(self, job: Job) -> CacheResult:
        with closing(job.load()) as worker, Claims(worker.storage) as claims:
            open_once(worker, claims)
            missing = set(worker.missing_blocks())
            own = self.share(worker.all_blocks(), together=worker.together)
            computed = worker.compute([block for block in own if block in missing])
            return seal_if_complete(worker, claims, computed, worker.missing_blocks(refresh=True))
