"""The order of the samples in an epoch: a pure function of seed and epoch."""

from __future__ import annotations

import numpy as np

from logitcache.randomness import counter_seed, keyed_permutation

# M samples of this run


def epoch_order(
    count: int,
    *,
    seed: int,
    epoch: int,
    blocks: np.ndarray | None = None,
    window_blocks: int | None = None,
    classes: np.ndarray | None = None,
) -> np.ndarray:
    """Positions 0..M-1 in the order of an epoch, int64 (M,).

    Without a window, a uniform shuffle. With a window, blocks are shuffled, then rows within each `window_blocks`
    consecutive blocks of that order, so that a streamed view needs few blocks at a time. With `classes`, some positions
    repeat and some are left out, so that all classes are equally frequent.

    Args:
        count: M.
        seed, epoch: determine the order.
        blocks, window_blocks: for streamed views: the block of each position, int64 (M,), and blocks of a window.
        classes: class of each position, int64 (M,), to balance; None takes every position once.
    """
    shuffled = keyed_permutation(count, "order", seed, epoch)
    if classes is not None:
        shuffled = balanced_choice(classes, seed=seed, epoch=epoch)[shuffled]
    if blocks is None or window_blocks is None:
        return shuffled
    block_of = blocks[shuffled]
    num_blocks = int(block_of.max()) + 1
    rank_of_block = np.empty(num_blocks, dtype=np.int64)
    rank_of_block[keyed_permutation(num_blocks, "blocks", seed, epoch)] = np.arange(num_blocks)
    window = rank_of_block[block_of] // window_blocks
    return shuffled[np.argsort(window, kind="stable")]


def epochs_of_group(group: int, *, per_decode: int, num_epochs: int | None = None) -> range:
    """The epochs of a group, each of which has samples in the views of all; the last group may have fewer.

    Args:
        group: of epochs, from 0.
        per_decode: epochs of a group.
        num_epochs: of the whole run; None is without end.
    """
    start = group * per_decode
    return range(start, start + per_decode if num_epochs is None else min(start + per_decode, num_epochs))


def pairs_of_epoch(order: np.ndarray, num_views: int, turn: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions in an order, int64 (M,), and numbers of views, int64 (M,), of one epoch of a group.

    The group's epochs together have every sample once in each of the group's views, and the views of a sample follow
    one another, so that a batch of B has about B / num_views samples (Shen and Xing 2022, arXiv:2112.01528).

    Args:
        order: the positions 0..M-1 in the order of the group.
        num_views: views, and epochs, of the group.
        turn: of the epoch in the group, from 0.
    """
    pairs = np.arange(turn * len(order), (turn + 1) * len(order))
    return order[pairs // num_views], pairs % num_views


def balanced_choice(classes: np.ndarray, *, seed: int, epoch: int) -> np.ndarray:
    """M of the positions 0..M-1 with all classes equally frequent (up to 1), int64 (M,), sorted by class.

    Large classes are subsampled, differently in each epoch; small ones are repeated. A pure function of seed and
    epoch, so that it is the same after a restart and on every process.
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
    """An order split into batches. A last batch of one sample is merged into the previous one, for batch norm."""
    starts = list(range(0, len(order), batch_size))
    if not starts:
        return []
    if len(starts) > 1 and batch_size > 1 and len(order) - starts[-1] == 1:
        starts.pop()
    return [order[start:stop] for start, stop in zip(starts, [*starts[1:], len(order)], strict=True)]


def run_seed(seed: int) -> int:
    """Seed of a run's initial weights, a 63-bit number."""
    return counter_seed("run", seed) >> 1


def step_seed(seed: int, step: int, rank: int) -> int:
    """Seed of a model's randomness (dropout) in one step of one process, a 63-bit number."""
    return counter_seed("step", seed, step, rank) >> 1
