"""The processes that `torchrun` starts, and their communication.

In training, each process renders and computes its share of every batch, torch's `DistributedDataParallel` averages the
gradients, and only the first process writes files and evaluates. In stage 1, each process computes its share of blocks.
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
"""How long other processes wait for the first one's evaluation before they fail."""


@dataclass(frozen=True)
class Ranks:
    """This process among those that `torchrun` started; a single one by default."""

    rank: int = 0
    size: int = 1

    def share(self, batch: np.ndarray) -> np.ndarray:
        """This process's part of a batch (B,). Sizes differ by at most one sample, and may be 0."""
        return np.array_split(batch, self.size)[self.rank]

    def largest_share(self, batch_size: int) -> int:
        """The largest number of samples that one process gets of a full batch."""
        return math.ceil(batch_size / self.size)

    def from_first(self, make: Callable[[], T]) -> T:
        """Call `make` in the first process, and return its result in all processes."""
        if self.size == 1:
            return make()
        box = [make() if self.rank == 0 else None]
        dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        return box[0]  # type: ignore[return-value]

    def wait(self) -> None:
        """Block until every process has called this."""
        self.sum(torch.zeros(1))

    def sum(self, values: Tensor) -> Tensor:
        """The elementwise sum over all processes, in every process."""
        if self.size > 1:
            values = values.clone()
            dist.all_reduce(values)
        return values

    def wrap(self, model: nn.Module, device: torch.device, *, sync_batchnorm: bool) -> nn.Module:
        """A model whose gradients are averaged over all processes; starts from the first one's weights and buffers.

        Raises:
            UsageError: synchronized batch norm on another device than CUDA, which torch does not support.
        """
        if self.size == 1:
            return model
        if sync_batchnorm:
            if device.type != "cuda":
                raise UsageError(
                    f"train.sync_batchnorm needs CUDA, and this run is on {device.type}; remove it, or choose a model "
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


def in_group() -> bool:
    """Whether this process is one of several that are connected, or that `torchrun` started to be connected."""
    return launched() or (dist.is_available() and dist.is_initialized())


def is_first_process() -> bool:
    """Whether this process is the first, or the only one; only this one prints."""
    return not launched() or os.environ["RANK"] == "0"


@contextmanager
def joined(device: torch.device) -> Iterator[Ranks]:
    """Connect the processes that `torchrun` started, with gloo on the CPU and NCCL on GPUs."""
    if dist.is_available() and dist.is_initialized():
        yield Ranks(dist.get_rank(), dist.get_world_size())
        return
    if not launched():
        yield ALONE
        return
    options: dict[str, Any] = {"backend": "gloo"}
    if device.type == "cuda":
        # gloo as well: results and checkpoints are broadcast as objects on the CPU.
        options = {"backend": "cpu:gloo,cuda:nccl"}
        torch.cuda.set_device(device)
    dist.init_process_group(**options, timeout=PATIENCE)
    ranks = Ranks(dist.get_rank(), dist.get_world_size())
    if ranks.rank:
        silence()
    yield ranks
    # Not after an error: other processes may wait in an exchange; torchrun stops them.
    dist.destroy_process_group()
