"""Processes that end as an administrator would end them: SIGKILL in a chosen step, or at a chosen object.

    torchrun --nproc-per-node 2 -m tests.dying RANK STEP train-student PIPELINE

is `logitcache train-student PIPELINE` with two processes, of which one dies in a step. With `node` in place of a rank
it is the process of whatever rank that dies, and its `torchrun` with it.
"""

from __future__ import annotations

import os
import re
import signal
import sys

from logitcache.storage import LocalStorage
from logitcache.train.optimizer import OptimizerStep


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_in_step(kill_at: int, *, with_parent: bool = False) -> None:
    """Between the gradients of a step and what becomes of them."""
    apply = OptimizerStep.apply

    def dying(updates: OptimizerStep, step: int) -> None:
        if step == kill_at:
            if with_parent:
                os.kill(os.getppid(), signal.SIGKILL)
            die()
        apply(updates, step)

    OptimizerStep.apply = dying  # type: ignore[method-assign]


def die_at_put(pattern: str) -> None:
    """Where an object would be stored whose path matches."""
    put = LocalStorage.put

    def dying(storage: LocalStorage, key: str, data: bytes, *, durable: bool = True) -> None:
        if re.search(pattern, f"{storage.url}/{key}"):
            die()
        put(storage, key, data, durable=durable)

    LocalStorage.put = dying  # type: ignore[method-assign]


if __name__ == "__main__":
    victim, step, *sys.argv[1:] = sys.argv[1:]
    if victim in ("node", os.environ["RANK"]):
        die_in_step(int(step), with_parent=victim == "node")
    from logitcache.cli import main

    main()
