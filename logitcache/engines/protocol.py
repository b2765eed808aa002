"""What an engine is, and the two objects that it works with: a job and its worker."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

import torch

from logitcache.cache.layout import Block
from logitcache.cache.manifest import Manifest
from logitcache.storage import Storage


@dataclass(frozen=True)
class CacheResult:
    """The cache, and the blocks that this run computed."""

    manifest: Manifest
    computed_blocks: list[Block]
    total_blocks: int
    """Of the whole cache."""
    missing_blocks: list[Block] = field(default_factory=list)
    """Left for others, such as the other shards; the cache is sealed if there are none."""


class Worker(Protocol):
    """A process that computes blocks of a cache, with the data and the teacher loaded. Close it at the end."""

    device: torch.device
    """Where the teacher runs."""
    storage: Storage
    """Of the cache."""
    together: int
    """Blocks in a row that are computed faster by the same worker, since they are of the same samples."""

    @property
    def manifest(self) -> Manifest:
        """Of the opened cache."""

    def is_created(self) -> bool:
        """Whether the cache exists with its per-cache arrays, so that `open` neither fits nor hashes anything."""

    def open(self) -> None:
        """Open the cache for writing; create it if it does not exist. Call it before any of the methods below."""

    def all_blocks(self) -> list[Block]:
        """Every block of the cache, in the order of computation, whether it is written or not."""

    def missing_blocks(self, *, refresh: bool = False) -> list[Block]:
        """The blocks that are not committed, in the order of computation.

        Args:
            refresh: read all receipts again, to see what other workers have committed since this one opened the cache.
        """

    def is_committed(self, block: Block) -> bool:
        """Whether a block is committed by now, by this worker or by another; reads the records of this block only."""

    def compute(self, blocks: Iterable[Block]) -> list[Block]:
        """Compute blocks, and return them once all are committed.

        Raises:
            LogitCacheError: a sample can't be read or has changed, or the store fails.
        """

    def compute_each(self, blocks: Iterable[Block], *, drawn_from: Sequence[Block]) -> Iterator[Block]:
        """Compute blocks, and yield each soon after it is committed.

        Args:
            blocks: read a few batches ahead of the teacher; an iterator must not wait.
            drawn_from: the blocks that an iterator chooses from, for the progress.

        Raises:
            LogitCacheError: as `compute`.
        """

    def seal(self) -> Manifest:
        """Seal the cache.

        Raises:
            IncompleteCache: blocks are missing.
        """

    def close(self) -> None:
        """Finish running commits, and stop the threads."""


def share(blocks: Sequence[Block], index: int, count: int, *, together: int) -> list[Block]:
    """The part of blocks that belongs to one of `count` processes: every `count`-th, or runs of `together` blocks.

    Args:
        blocks: in the order of computation.
        index: of the process, from 0.
        count: of processes.
        together: as a worker states it.
    """
    return [block for place, block in enumerate(blocks) if place // together % count == index]


class Job(Protocol):
    """Stage 1 of a pipeline: what to compute. It can be pickled, so that other processes can load a worker."""

    def load(self) -> Worker:
        """Load the data and the teacher, and check them; writes nothing.

        Raises:
            LogitCacheError: data, teacher or an existing cache don't fit the pipeline.
        """


class Engine(ABC):
    """Distributes the blocks of a job over processes and machines. A frozen dataclass: its fields are its options."""

    name: ClassVar[str]
    """Name in the registry and on the command line."""

    @abstractmethod
    def run(self, job: Job) -> CacheResult:
        """Compute the missing blocks of the job's cache, or a part of them, and seal the cache if it is complete.

        Raises:
            LogitCacheError: a check or a computation failed; what was committed is kept.
        """
