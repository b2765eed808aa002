"""Processes that end as an administrator would end them: SIGKILL in a chosen step, or at a chosen object.

    torchrun --nproc-per-node 2 -m tests.dying RANK STEP train-student PIPELINE

is `logitcache train-student PIPELINE` with two processes, of which one dies in a step.
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


def die_in_step(kill_at: int) -> None:
    """Between the gradients of a step and what becomes of them."""
    apply = OptimizerStep.apply

    def dying(updates: OptimizerStep, step: int) -> None:
        if step == kill_at:
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
    if os.environ["RANK"] == victim:
        die_in_step(int(step))
    from logitcache.cli import main

    main()
