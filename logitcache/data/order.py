"""In which order an epoch visits its samples: a pure function of seed and epoch."""

from __future__ import annotations

import numpy as np

from logitcache.randomness import counter_seed, keyed_permutation

# M samples of this run


def epoch_order(
    rows: np.ndarray,
    *,
    seed: int,
    epoch: int,
    rows_per_block: int | None = None,
    window_blocks: int | None = None,
    classes: np.ndarray | None = None,
) -> np.ndarray:
    """Positions 0..M-1 in the order that an epoch visits them, int64 (M,).

    Without a window, a uniform shuffle. With one, the blocks that the rows lie in are shuffled, then rows within
    each `window_blocks` consecutive blocks of that order: so that a streamed view needs few blocks at a time.
    With `classes` some positions come several times and some not at all, so that each class comes equally often.

    Args:
        rows: the cache's row number of each position, int64 (M,).
        seed, epoch: what the order depends on.
        rows_per_block, window_blocks: for streamed views.
        classes: the class of each position, int64 (M,), to be balanced; None takes every position once.
    """
    shuffled = keyed_permutation(len(rows), "order", seed, epoch)
    if classes is not None:
        shuffled = balanced_choice(classes, seed=seed, epoch=epoch)[shuffled]
    if rows_per_block is None or window_blocks is None:
        return shuffled
    block_of = rows[shuffled] // rows_per_block
    num_blocks = int(block_of.max()) + 1
    rank_of_block = np.empty(num_blocks, dtype=np.int64)
    rank_of_block[keyed_permutation(num_blocks, "blocks", seed, epoch)] = np.arange(num_blocks)
    window = rank_of_block[block_of] // window_blocks
    return shuffled[np.argsort(window, kind="stable")]


def balanced_choice(classes: np.ndarray, *, seed: int, epoch: int) -> np.ndarray:
    """M of the positions 0..M-1, each class that occurs equally often (or once more), int64 (M,), class by class.

    A class with more samples than its share gives as many of them, others in each epoch; one with fewer gives all of
    them, again and again. A pure function of seed and epoch, so that it resumes, and is the same on every process.
    """
    kinds = np.unique(classes)
    share, left_over = divmod(len(classes), len(kinds))
    favoured = set(keyed_permutation(len(kinds), "favoured classes", seed, epoch)[:left_over].tolist())
    chosen = []
    for number, kind in enumerate(kinds):
        members = np.flatnonzero(classes == kind)
        wanted = share + (number in favoured)
        rounds = -(-wanted // len(members))
        shuffled = [
            members[keyed_permutation(len(members), "balanced", seed, epoch, number, turn)] for turn in range(rounds)
        ]
        chosen.append(np.concatenate(shuffled)[:wanted] if shuffled else members[:0])
    return np.concatenate(chosen)


def batches(order: np.ndarray, batch_size: int) -> list[np.ndarray]:
    """An order cut into batches; a single sample left over joins the batch before it, for batch norm's sake."""
    starts = list(range(0, len(order), batch_size))
    if not starts:
        return []
    if len(starts) > 1 and batch_size > 1 and len(order) - starts[-1] == 1:
        starts.pop()
    return [order[start:stop] for start, stop in zip(starts, [*starts[1:], len(order)], strict=True)]


def run_seed(seed: int) -> int:
    """The seed of a run's own generators (initial weights), a 63-bit number."""
    return counter_seed("run", seed) >> 1


def step_seed(seed: int, step: int, rank: int) -> int:
    """The seed of the net's own randomness (dropout) in one step and one process, a 63-bit number."""
    return counter_seed("step", seed, step, rank) >> 1
