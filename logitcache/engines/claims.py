"""Workers that come and go, such as spot machines: each claims a block, computes it, and claims the next.

The workers share nothing but the store of the cache. The claims of a worker that was killed expire.
"""

from __future__ import annotations

import posixpath
import zlib
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import ClassVar

from logitcache.cache.layout import Block, receipt_key
from logitcache.engines.protocol import CacheResult, Engine, Job, Worker
from logitcache.errors import UsageError
from logitcache.storage.claims import CLAIM_SECONDS, Claims

CREATION = "creation"
SEALING = "sealing"
"""Claims of what one worker does for all."""


@dataclass(frozen=True, kw_only=True)
class Claiming(Engine):
    """Any number of these run at a time, on any machines, and may be started and killed at any moment."""

    name: ClassVar[str] = "claims"
    seconds: float = CLAIM_SECONDS
    """After which the claims of a worker that does not renew them expire, and others take its blocks."""

    def __post_init__(self) -> None:
        if not isinstance(self.seconds, int | float) or not self.seconds > 0:
            raise UsageError(f"seconds is {self.seconds!r}; expected a number above 0")

    def run(self, job: Job) -> CacheResult:
        with closing(job.load()) as worker, Claims(worker.storage, seconds=self.seconds) as claims:
            open_once(worker, claims)
            computed: list[Block] = []
            missing = worker.missing_blocks()
            while missing:
                computed += _work_through(worker, claims, missing)
                missing = worker.missing_blocks(refresh=True)  # reads every receipt, so not more often
            return seal_if_complete(worker, claims, computed, missing)


def _work_through(worker: Worker, claims: Claims, missing: list[Block]) -> list[Block]:
    """Compute what this worker can claim, and wait until others have committed the rest; returns what it computed."""
    computed: list[Block] = []
    while missing:
        of_others: list[Block] = []
        free = _claimed(worker, claims, _from_own_place(missing, claims.owner, worker.together), of_others)
        done = []
        for block in worker.compute_each(free, drawn_from=missing):
            claims.release(block.name)
            done.append(block)
        computed += done
        missing = [block for block in of_others if not worker.is_committed(block)]
        if missing and not done:
            claims.pause()
    return computed


def _claimed(worker: Worker, claims: Claims, blocks: Iterable[Block], of_others: list[Block]) -> Iterator[Block]:
    """Claim one block after the other; adds those that others have claimed to `of_others`."""
    committed: set[str] = set()
    for block in blocks:
        if receipt_key(block.name) in committed:
            continue
        if worker.is_committed(block):
            # Others have been here: one listing in place of a look at each of their blocks.
            listed = set(worker.storage.list_keys(posixpath.dirname(receipt_key(block.name))))
            if not listed:
                return  # sealed meanwhile
            committed |= listed
        elif not claims.take(block.name):
            of_others.append(block)
        # Its owner may have committed it and removed its claim after the first look.
        elif worker.is_committed(block):
            claims.release(block.name)
        else:
            yield block


def _from_own_place(blocks: list[Block], owner: str, together: int) -> list[Block]:
    """The blocks from another place for each worker, so that workers rarely meet, even where claims do not work."""
    start = zlib.crc32(owner.encode()) % len(blocks)
    start -= start % together  # so that no other worker has begun the same samples
    return blocks[start:] + blocks[:start]


def open_once(worker: Worker, claims: Claims) -> None:
    """Open the cache. One worker creates it, and the others wait: it hashes the data, and fits the encoding.

    A second fit may differ in its last bits, and its arrays must not be mixed with those of the first.
    """
    with claims.wait_for(CREATION, done=worker.is_created):
        worker.open()


def seal_if_complete(worker: Worker, claims: Claims, computed: list[Block], missing: list[Block]) -> CacheResult:
    """Seal the cache if no block is missing by now, one worker at a time."""
    if not missing:
        with claims.wait_for(SEALING, done=lambda: worker.manifest.state == "sealed"):
            worker.seal()
    return CacheResult(worker.manifest, computed, len(worker.all_blocks()), missing)
