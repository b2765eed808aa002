"""Programs with DataLoader workers, which say who they are, to be killed by `tests/durability/test_workers.py`.

    python -m tests.workers START_METHOD [thread]

is a user's own loop over a `ViewDataset`; with `thread` the workers are started by a thread that has ended.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, get_worker_info

ANNOUNCED = b"worker "


class Announcing:
    """Pictures too large for a pipe to hold many, of which the first to be loaded in a worker tells its process id."""

    num_classes = 10

    def __init__(self, count: int, size: int, in_memory: bool = True) -> None:
        self.in_memory = in_memory
        """Whether its contents are hashed without workers."""
        self.targets = np.arange(count) % 10
        self._image = torch.zeros(3, size, size)
        self._told = 0

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        if get_worker_info() is not None and self._told != os.getpid():
            self._told = os.getpid()
            os.write(1, ANNOUNCED + b"%d\n" % self._told)
        return self._image, int(self.targets[index])


def announcing(count: int = 512, size: int = 32, in_memory: bool = True) -> Announcing:
    """The data of a pipeline: `data.name=tests.workers:announcing`."""
    return Announcing(count, size, in_memory)


def train(start_method: str, in_thread: bool) -> None:
    """Iterate for ever, as slowly as the reader of a full queue."""
    import logitcache

    views = logitcache.ViewDataset(Announcing(512, 32), logitcache.ViewPlan())
    loader: DataLoader[Any] = DataLoader(
        views, batch_size=16, num_workers=2, persistent_workers=True, multiprocessing_context=start_method
    )
    started: list[Iterator[Any]] = []
    if in_thread:
        thread = threading.Thread(target=lambda: started.append(iter(loader)))
        thread.start()
        thread.join()
    else:
        started.append(iter(loader))
    next(started[0])
    os.write(1, b"under way\n")
    threading.Event().wait()


if __name__ == "__main__":
    train(sys.argv[1], "thread" in sys.argv[2:])
