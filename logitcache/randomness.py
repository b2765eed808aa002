"""Counter-based randomness: every stream is a pure function of integers, never of what ran before.

Stable for ever: a cache built today must render the same views in ten years, so these functions rest on
BLAKE2 and on 64-bit integer arithmetic, not on a library's generator.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np


def counter_seed(purpose: str, *counters: int) -> int:
    """A 64-bit seed for one purpose and one tuple of counters, such as (view seed, view, row)."""
    message = purpose + ":" + ",".join(map(str, counters))
    return int.from_bytes(hashlib.blake2b(message.encode(), digest_size=8).digest(), "little")


def keyed_permutation(length: int, purpose: str, *counters: int) -> np.ndarray:
    """A permutation of range(length), int64 (length,): the order of keyed hashes."""
    return np.argsort(_keyed_hashes(range(length), purpose, *counters), kind="stable")


def keyed_uniform(rows: range, purpose: str, *counters: int) -> np.ndarray:
    """A number in [0, 1) for each row, float64 (len(rows),), whatever other rows are asked for with it."""
    return (_keyed_hashes(rows, purpose, *counters) >> np.uint64(11)).astype(np.float64) / 2.0**53


def _keyed_hashes(rows: range, purpose: str, *counters: int) -> np.ndarray:
    """A 64-bit hash of each row number under a key, uint64: SplitMix64 (Steele, Lea and Flood 2014)."""
    with np.errstate(over="ignore"):
        z = np.arange(rows.start + 1, rows.stop + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        z += np.uint64(counter_seed(purpose, *counters))
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def seed_generators(seed: int) -> None:
    """Set the global CPU generators of torch, `random` and NumPy from one 64-bit seed."""
    import torch

    # torch.manual_seed would also visit every accelerator, at a hundred times the cost.
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)


@contextmanager
def preserved_generators() -> Iterator[None]:
    """Leave the global CPU generators as they were found, whatever happens inside."""
    import torch

    states = torch.get_rng_state(), random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        random.setstate(states[1])
        np.random.set_state(states[2])
