"""The sampler gives every epoch a view and an order, to every worker and every replica."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader
from torchvision.transforms import v2

import logitcache
from logitcache.data.samples import content_table
from logitcache.data.transforms import build_transform
from logitcache.errors import UsageError
from logitcache.share.transfer import pull
from tests.models import Pictures

SAMPLES, CLASSES, VIEWS = 40, 10, 4


@pytest.fixture(scope="module")
def location(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four views of forty pictures."""
    path = tmp_path_factory.mktemp("sampler") / "a.cache"
    plan = logitcache.ViewPlan(transform=build_transform({"RandomCrop": {"size": 6}}))
    samples = replace(logitcache.sample_table(Pictures()), contents=content_table(Pictures()))
    settings: dict[str, Any] = {"teacher": "net", "samples": samples, "view_plan": plan, "num_views": VIEWS}
    with logitcache.create(path, num_samples=SAMPLES, num_classes=CLASSES, **settings) as writer:
        for view in range(VIEWS):
            writer.write(view=view, start=0, logits=torch.randn(SAMPLES, CLASSES))
    return path


@pytest.fixture
def views() -> logitcache.ViewDataset:
    """Views without a cache."""
    return logitcache.ViewDataset(Pictures(), logitcache.ViewPlan(transform=v2.RandomCrop(6), views=range(VIEWS)))


def epoch_of(sampler: logitcache.ViewSampler, epoch: int) -> list[tuple[int, int]]:
    sampler.set_epoch(epoch)
    return list(sampler)


def test_each_epoch_visits_every_sample_of_its_view_once(views: logitcache.ViewDataset) -> None:
    sampler = logitcache.ViewSampler(views)
    for epoch in range(2 * VIEWS):
        assert [(epoch % VIEWS, index) for index in range(SAMPLES)] == sorted(epoch_of(sampler, epoch))
        assert epoch % VIEWS == sampler.view
    assert SAMPLES == len(sampler)


def test_the_order_depends_on_seed_and_epoch_alone(views: logitcache.ViewDataset) -> None:
    once = [epoch_of(logitcache.ViewSampler(views, seed=seed), epoch) for seed in (0, 1) for epoch in (0, VIEWS)]
    again = [epoch_of(logitcache.ViewSampler(views, seed=seed), epoch) for seed in (0, 1) for epoch in (0, VIEWS)]

    assert once == again
    assert 4 == len({tuple(order) for order in once})
    assert [(0, index) for index in range(SAMPLES)] == list(logitcache.ViewSampler(views, shuffle=False))


def test_a_cycle_and_indices_are_the_callers_choice(views: logitcache.ViewDataset) -> None:
    sampler = logitcache.ViewSampler(views, cycle=[3, 1], indices=[5, 7, 9])

    assert [3, 1, 3] == [epoch_of(sampler, epoch)[0][0] for epoch in range(3)]
    assert {5, 7, 9} == {index for _, index in sampler}
    with pytest.raises(UsageError, match="there is no view 4; expected 0 to 3"):
        logitcache.ViewSampler(views, cycle=[4])


def test_a_plan_without_a_limit_has_a_new_view_each_epoch() -> None:
    views = logitcache.ViewDataset(Pictures(), logitcache.ViewPlan())

    assert [0, 17] == [epoch_of(logitcache.ViewSampler(views), epoch)[0][0] for epoch in (0, 17)]


@pytest.mark.parametrize("replicas", [1, 2, 4])
def test_replicas_share_an_epoch_and_each_sample_comes_once(views: logitcache.ViewDataset, replicas: int) -> None:
    shares = [epoch_of(logitcache.ViewSampler(views, num_replicas=replicas, rank=rank), 1) for rank in range(replicas)]

    assert {SAMPLES // replicas} == {len(share) for share in shares}
    assert [(1, index) for index in range(SAMPLES)] == sorted(item for share in shares for item in share)


@pytest.mark.parametrize(("drop_last", "length", "distinct"), [(False, 14, 40), (True, 13, 39)])
def test_replicas_have_equal_shares_as_in_distributed_sampler(
    views: logitcache.ViewDataset, drop_last: bool, length: int, distinct: int
) -> None:
    settings: dict[str, Any] = {"num_replicas": 3, "drop_last": drop_last}
    shares = [epoch_of(logitcache.ViewSampler(views, rank=rank, **settings), 2) for rank in range(3)]

    assert [length] * 3 == [len(share) for share in shares]
    assert distinct == len({item for share in shares for item in share})


def test_replicas_are_those_of_the_process_group(views: logitcache.ViewDataset, tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        assert SAMPLES == len(logitcache.ViewSampler(views))
    finally:
        dist.destroy_process_group()
    with pytest.raises(UsageError, match="rank is 2; expected 0 to 1"):
        logitcache.ViewSampler(views, num_replicas=2, rank=2)


def test_persistent_workers_render_the_view_of_the_epoch(location: Path) -> None:
    cache = logitcache.open(location)
    views = logitcache.ViewDataset(Pictures(), cache.view_plan)
    sampler = logitcache.ViewSampler(views)
    loader = DataLoader(views, batch_size=16, sampler=sampler, num_workers=2, persistent_workers=True)
    for epoch in (0, 3, 1):
        sampler.set_epoch(epoch)
        rows = []
        for index, inputs, _ in loader:
            shown, rows_B = logitcache.split_index(index)
            assert {epoch} == set(shown.tolist())
            assert 2 == cache.check_batch(index, inputs)
            assert torch.equal(cache.view(epoch).logits(rows_B), cache.logits(index))
            rows += rows_B.tolist()
        assert list(range(SAMPLES)) == sorted(rows)


def test_an_epoch_that_is_under_way_keeps_its_view_when_the_next_is_set(views: logitcache.ViewDataset) -> None:
    sampler = logitcache.ViewSampler(views)
    running = iter(sampler)
    next(running)
    sampler.set_epoch(1)

    assert {0} == {view for view, _ in running}
    assert {1} == {view for view, _ in sampler}


def test_an_epoch_is_resumed_where_it_was_left(views: logitcache.ViewDataset) -> None:
    whole = epoch_of(logitcache.ViewSampler(views), 5)
    resumed = logitcache.ViewSampler(views)
    resumed.set_epoch(5, start=2 * 16)

    assert whole[32:] == list(resumed)
    assert whole == list(resumed), "only the first iteration is shortened"


def test_a_state_is_epoch_and_position(views: logitcache.ViewDataset) -> None:
    sampler, resumed = logitcache.ViewSampler(views), logitcache.ViewSampler(views)
    sampler.set_epoch(2)
    running = iter(sampler)
    taken = [next(running) for _ in range(11)]
    state = json.loads(json.dumps(sampler.state_dict()))
    resumed.load_state_dict(state)
    resumed.set_epoch(2)  # as a loop does that begins at the epoch it had reached

    assert {"epoch": 2, "position": 11} == state
    assert epoch_of(logitcache.ViewSampler(views), 2) == taken + list(resumed)
    assert [*epoch_of(logitcache.ViewSampler(views), 3)] == epoch_of(resumed, 3)


def test_a_partial_copy_cycles_through_its_own_views(location: Path, tmp_path: Path) -> None:
    pull(str(location), str(tmp_path / "part"), views="2:4")
    whole, part = logitcache.open(location), logitcache.open(tmp_path / "part")
    views = logitcache.ViewDataset(Pictures(), part.view_plan)
    sampler = logitcache.ViewSampler(views)
    loader = DataLoader(views, batch_size=20, sampler=sampler)
    shown = []
    for epoch in range(part.num_views):
        sampler.set_epoch(epoch)
        for index, inputs, _ in loader:
            assert torch.equal(whole.logits(index), part.logits(index))
            assert 2 == part.check_batch(index, inputs)
        shown.append(sampler.view)

    assert [2, 3] == shown == list(part.views)
    assert part.num_views == len(part.views)
    assert 2 == logitcache.split_index([views[0][0]])[0].item(), "a plain index gives the first view that is there"
    for epoch in range(2 * part.num_views):
        view = part.view(views.set_view(part.views[epoch % part.num_views]))
        assert (SAMPLES, CLASSES) == view.logits([index for index, _, _ in views]).shape


def test_epochs_cycle_through_the_views_of_a_cache_that_is_compared_later(location: Path) -> None:
    plan = logitcache.ViewPlan(transform=build_transform({"RandomCrop": {"size": 6}}))
    sampler = logitcache.ViewSampler(logitcache.ViewDataset(Pictures(), plan))
    sampler.set_epoch(VIEWS + 1)
    assert VIEWS + 1 == sampler.view
    cache = logitcache.open(location)
    with pytest.raises(UsageError, match=r"no view 5: .* call `cache.check_plan\(plan\)` before training"):
        cache.logits(torch.tensor([logitcache.join_index(sampler.view, 0)]))

    cache.check_plan(plan)
    assert 1 == sampler.view
    assert {1} == {view for view, _ in sampler}
