"""Counters in, the same streams out, for ever."""

import random

import numpy as np
import pytest
import torch

from logitcache.data.order import batches, epoch_order
from logitcache.randomness import counter_seed, keyed_permutation, preserved_generators, seed_generators


def test_seeds_and_permutations_never_change() -> None:
    """Caches in the world rest on these very numbers."""
    assert 7217621338497803719 == counter_seed("view", 1, 2, 3)
    assert [2, 0, 1, 5, 7, 6, 4, 3] == keyed_permutation(8, "partner", 1, 0).tolist()


def test_different_counters_give_different_seeds() -> None:
    seeds = {counter_seed(purpose, a, b) for purpose in ("view", "mixing") for a in range(50) for b in range(50)}

    assert 2 * 50 * 50 == len(seeds)


def test_a_keyed_permutation_is_uniform() -> None:
    """Each value stands at each place equally often, within 4 σ."""
    draws, length = 4000, 5
    firsts = np.bincount([keyed_permutation(length, "test", draw)[0] for draw in range(draws)], minlength=length)
    sigma = (draws * (1 / length) * (1 - 1 / length)) ** 0.5

    assert (abs(firsts - draws / length) < 4 * sigma).all()


def test_preserved_generators_come_back_even_after_an_error() -> None:
    seed_generators(5)
    expected = torch.rand(3), random.random(), np.random.rand()
    seed_generators(5)
    with pytest.raises(KeyError), preserved_generators():
        seed_generators(99)
        torch.rand(7)
        raise KeyError
    found = torch.rand(3), random.random(), np.random.rand()

    assert torch.equal(expected[0], found[0])
    assert expected[1:] == found[1:]


def test_an_epoch_visits_every_sample_once() -> None:
    order = epoch_order(1000, seed=1, epoch=2)

    assert list(range(1000)) == sorted(order)
    assert not np.array_equal(order, epoch_order(1000, seed=1, epoch=3))


def test_a_windowed_order_reads_each_block_once_with_two_windows_in_memory() -> None:
    order = epoch_order(1000, seed=1, epoch=0, blocks=np.arange(1000) // 64, window_blocks=3)
    in_memory: list[int] = []
    reads = 0
    for batch in np.array_split(order, 40):
        for block in np.unique(batch // 64):
            reads += block not in in_memory
            in_memory = [kept for kept in in_memory if kept != block][-5:] + [block]

    assert list(range(1000)) == sorted(order)
    assert 16 == reads
    assert not np.array_equal(np.sort(order[:192]), order[:192])


def test_a_sample_left_over_joins_the_batch_before_it() -> None:
    assert [4, 5] == [len(batch) for batch in batches(np.arange(9), 4)]
    assert [4, 2] == [len(batch) for batch in batches(np.arange(6), 4)]
    assert [1] == [len(batch) for batch in batches(np.arange(1), 4)]
