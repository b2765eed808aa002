"""The processes that work together as `torchrun` starts them: who they are, and what they tell each other.

Of a net, each renders and computes its share of every batch, and gradients are averaged between them by torch's
`DistributedDataParallel`; the first one alone writes files and evaluates. Of a cache, each has its share of the blocks.
"""

from __future__ import annotations

import datetime
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from logitcache.errors import UsageError
from logitcache.progress import silence

T = TypeVar("T")

PATIENCE = datetime.timedelta(hours=6)
"""How long the others wait for the first one's evaluation before they take it for dead."""


@dataclass(frozen=True)
class Ranks:
    """One process among those that `torchrun` started; alone by default."""

    rank: int = 0
    size: int = 1

    def share(self, batch: np.ndarray) -> np.ndarray:
        """This process's part of a batch (B,): equal parts but for one sample, none where there are fewer samples."""
        return np.array_split(batch, self.size)[self.rank]

    def largest_share(self, batch_size: int) -> int:
        """Samples that a process has of a full batch, at most."""
        return math.ceil(batch_size / self.size)

    def from_first(self, make: Callable[[], T]) -> T:
        """What the first process makes, in every process; the others wait."""
        if self.size == 1:
            return make()
        box = [make() if self.rank == 0 else None]
        dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        return box[0]  # type: ignore[return-value]

    def wait(self) -> None:
        """Until every process has come here."""
        self.sum(torch.zeros(1))

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all processes of each value, in every process."""
        if self.size > 1:
            values = values.clone()
            dist.all_reduce(values)
        return values

    def wrap(self, model: nn.Module, device: torch.device, *, sync_batchnorm: bool) -> nn.Module:
        """A model whose gradients are averaged over all processes, from the first one's weights and buffers.

        Raises:
            UsageError: synchronised batch norm anywhere but on CUDA, where alone torch has it.
        """
        if self.size == 1:
            return model
        if sync_batchnorm:
            if device.type != "cuda":
                raise UsageError(
                    f"train.sync_batchnorm needs CUDA, and this run is on {device.type}; leave it out, or choose a net "
                    "without batch norm"
                )
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]
        wrapped: nn.Module = nn.parallel.DistributedDataParallel(
            model, device_ids=[device] if device.type == "cuda" else None
        )
        return wrapped


ALONE = Ranks()


def launched() -> bool:
    """Whether `torchrun` started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def is_first_process() -> bool:
    """Whether this process speaks for all that `torchrun` started."""
    return not launched() or os.environ["RANK"] == "0"


@contextmanager
def joined(device: torch.device) -> Iterator[Ranks]:
    """The processes that `torchrun` started, ready to talk: gloo on the CPU, NCCL between GPUs; else this one alone."""
    if dist.is_available() and dist.is_initialized():
        yield Ranks(dist.get_rank(), dist.get_world_size())
        return
    if not launched():
        yield ALONE
        return
    options: dict[str, Any] = {"backend": "gloo"}
    if device.type == "cuda":
        # Results and checkpoints travel as objects in main memory, whatever carries the gradients.
        options = {"backend": "cpu:gloo,cuda:nccl"}
        torch.cuda.set_device(device)
    dist.init_process_group(**options, timeout=PATIENCE)
    ranks = Ranks(dist.get_rank(), dist.get_world_size())
    if ranks.rank:
        silence()
    yield ranks
    # Not after an error: the others may wait in the middle of an exchange, and torchrun ends them.
    dist.destroy_process_group()
