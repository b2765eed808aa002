"""Labels meet the pixels that they were computed from: the view travels with the sample, and batches are checked."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader
from torchvision.transforms import v2

import logitcache
from logitcache.config.schema import Pipeline
from logitcache.data.index import join_index, split_index
from logitcache.data.views import Mixing, ViewDataset, ViewPlan
from logitcache.errors import IdentityMismatch, ShapeError, UsageError
from logitcache.stages.cache_teacher import cache_teacher
from logitcache.stages.train_student import train_students
from tests.conftest import FEW_DIGITS, PICTURES, tiny_pipeline
from tests.models import Pictures

Make = Callable[..., Pipeline]
CLASSES = 10


@pytest.fixture(scope="module")
def location(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Of a cache that tests only read: three views of forty pictures, by a real teacher."""
    pipeline = tiny_pipeline(tmp_path_factory.mktemp("pictures"), *PICTURES, "views.count=3")
    cache_teacher(pipeline, trust=True)
    return pipeline.cache.path


@pytest.fixture
def cache(location: str) -> logitcache.LogitCache:
    return logitcache.open(location, trust=True)


@pytest.fixture
def views(cache: logitcache.LogitCache) -> ViewDataset:
    return ViewDataset(Pictures(), cache.view_plan)


@pytest.mark.parametrize("view", [0, 1, 2**20 - 1])
@pytest.mark.parametrize("row", [0, 1, 2**40 - 1])
def test_an_index_gives_view_and_row_back(view: int, row: int) -> None:
    views_B, rows_B = split_index([join_index(view, row)])

    assert ([view], [row]) == (views_B.tolist(), rows_B.tolist())


def test_a_plain_row_number_has_no_view() -> None:
    assert [-1, -1] == split_index(range(2))[0].tolist()


def test_a_sample_carries_the_view_that_it_shows(views: ViewDataset) -> None:
    views.set_view(2)

    assert [join_index(2, 7), join_index(1, 7)] == [views[7][0], views[(1, 7)][0]]


def test_a_batch_loaded_before_the_view_was_set_is_refused(cache: logitcache.LogitCache, views: ViewDataset) -> None:
    """What a Lightning resume did: workers prefetch, then a hook sets the epoch's view."""
    loader = iter(DataLoader(views, batch_size=8, num_workers=1, persistent_workers=True))
    index, inputs, _ = next(loader)
    view = cache.view(views.set_view(1))

    with pytest.raises(UsageError, match=r"these labels are of view 1, but the batch has indices of view 0"):
        view.logits(index)
    assert 2 == cache.check_batch(index, inputs)
    assert torch.equal(cache.view(0).logits(range(8)), cache.logits(index))


@pytest.mark.parametrize("budget", [None, 1], ids=["resident", "streamed"])
def test_a_view_takes_row_numbers_and_indices_of_its_own(cache: logitcache.LogitCache, budget: int | None) -> None:
    view = cache.view(1, memory_budget=budget)
    rows = [3, 39, 0]

    assert torch.equal(view.logits(rows), view.logits([join_index(1, row) for row in rows]))


@pytest.mark.parametrize("budget", [None, 1], ids=["resident", "streamed"])
@pytest.mark.parametrize(
    ("index", "error", "message"),
    [
        pytest.param(
            [join_index(2, 0)], UsageError, "of view 1, but the batch has indices of view 2", id="another view"
        ),
        pytest.param([join_index(1, 0), 3], UsageError, "but the batch has plain row numbers", id="mixed"),
        pytest.param([join_index(1, 0), join_index(0, 0)], UsageError, "has indices of view 0", id="two views"),
        pytest.param([40], IndexError, "row 40 is beyond the view, which has rows 0 to 39", id="beyond"),
        pytest.param([join_index(1, 40)], IndexError, "row 40 is beyond", id="beyond, with a view"),
        pytest.param([-1], IndexError, "row -1 is negative", id="negative"),
        pytest.param([True, False], UsageError, r"found torch.bool; for a mask, pass mask.nonzero\(\)", id="booleans"),
        pytest.param(np.array([False]), UsageError, "found torch.bool", id="an array of booleans"),
        pytest.param(
            [0.0, 1.0], UsageError, "expected integer row numbers or indices, found torch.float32", id="floats"
        ),
        pytest.param(
            [[0, 1]], ShapeError, r"expected row numbers or indices of shape \(B,\), found \(1, 2\)", id="2-d"
        ),
        pytest.param(["0"], UsageError, "expected integer row numbers or indices", id="text"),
    ],
)
def test_other_indices_are_refused(
    cache: logitcache.LogitCache, budget: int | None, index: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        cache.view(1, memory_budget=budget).logits(index)


def test_no_rows_give_no_logits(cache: logitcache.LogitCache) -> None:
    assert (0, CLASSES) == tuple(cache.view(1).logits([]).shape)


def test_a_batch_of_any_views_has_its_own_labels(cache: logitcache.LogitCache, views: ViewDataset) -> None:
    items = [(2, 5), (0, 5), (1, 39), (2, 0)]
    index = torch.tensor([views[item][0] for item in items])
    expected = torch.cat([cache.view(view).logits([row]) for view, row in items])

    assert torch.equal(expected, cache.logits(index))
    assert torch.equal(expected, cache.logits(index, memory_budget=1))


def test_plain_rows_name_no_view_to_a_cache(cache: logitcache.LogitCache) -> None:
    with pytest.raises(UsageError, match="plain row numbers name no view"):
        cache.logits([0, 1])


@pytest.mark.parametrize("view", [-1, 3])
def test_a_view_beyond_the_plan_is_refused(cache: logitcache.LogitCache, views: ViewDataset, view: int) -> None:
    with pytest.raises(UsageError, match=rf"there is no view {view}; expected 0 to 2, those of the cache"):
        views.set_view(view)
    with pytest.raises(UsageError, match="there is no view"):
        views[(view, 0)]
    with pytest.raises(UsageError, match=rf"no view {view}: the cache has views 0 to 2"):
        cache.verify_inputs(views, view)


def test_a_dataset_ends_where_it_ends(views: ViewDataset) -> None:
    assert 40 == len(list(views))


def test_a_batch_that_arrived_whole_passes(cache: logitcache.LogitCache, views: ViewDataset) -> None:
    index, inputs, _ = next(iter(DataLoader(views, batch_size=8, shuffle=True)))

    assert 2 == cache.check_batch(index, inputs)
    assert 2 == cache.check_batch(index, inputs.to(memory_format=torch.channels_last).bfloat16())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(
            lambda inputs: (inputs * 255).to(torch.uint8), "torch.uint8 arrived, expected torch.float32", id="cast"
        ),
        pytest.param(lambda inputs: inputs.mul(13).floor().div(13), "of 64 values differ, by .* at most", id="rounded"),
        pytest.param(lambda inputs: (inputs - 0.5) / 0.5, "values differ", id="normalised"),
        pytest.param(lambda inputs: inputs.roll(1, 0), "values differ", id="rolled"),
        pytest.param(lambda inputs: inputs[..., 1:], r"shape \(1, 8, 7\) arrived, expected \(1, 8, 8\)", id="cropped"),
    ],
)
def test_a_batch_that_was_changed_on_the_way_is_refused(
    cache: logitcache.LogitCache, views: ViewDataset, change: Callable[[torch.Tensor], torch.Tensor], message: str
) -> None:
    index, inputs, _ = next(iter(DataLoader(views, batch_size=8)))

    assert 8 == cache.verify_inputs(views, 0)  # which renders rows itself
    with pytest.raises(IdentityMismatch, match=rf"of this batch is not view 0 as it is rendered here: .*{message}"):
        cache.check_batch(index, change(inputs))


def test_timms_loader_that_casts_to_uint8_is_found_out(cache: logitcache.LogitCache, views: ViewDataset) -> None:
    pytest.importorskip("timm")
    from timm.data.loader import fast_collate

    samples = [views[index] for index in range(4)]
    inputs, index = fast_collate([(pixels, index) for index, pixels, _ in samples])

    assert torch.uint8 == inputs.dtype
    with pytest.raises(IdentityMismatch, match=r"torch\.uint8 arrived"):
        cache.check_batch(index, inputs)


def test_a_batch_is_checked_for_the_model_that_it_is_for(cache: logitcache.LogitCache) -> None:
    """A student with an input of its own: the batch is one that some dataset at hand renders."""
    as_teacher = ViewDataset(Pictures(), cache.view_plan)
    enlarged = ViewDataset(Pictures(), cache.view_plan, preprocess=v2.Resize(16))
    index, inputs, _ = next(iter(DataLoader(enlarged, batch_size=8)))

    assert 2 == cache.check_batch(index, inputs)
    with pytest.raises(IdentityMismatch, match="arrived, expected"):
        cache.check_batch(index, inputs, views=as_teacher)


def test_a_batch_of_a_subset_is_checked_by_its_rows(cache: logitcache.LogitCache) -> None:
    pictures = Pictures(order=[31, 4, 15])
    views = ViewDataset(pictures, cache.view_plan, rows=cache.rows(pictures.keys))
    index, inputs, _ = next(iter(DataLoader(views, batch_size=3)))

    assert 2 == cache.check_batch(index, inputs)
    with pytest.raises(UsageError, match="no ViewDataset of this cache has sample 30 of this batch"):
        cache.check_batch([join_index(0, 30)], inputs)


def test_a_batch_without_a_dataset_or_an_index_says_what_is_missing(cache: logitcache.LogitCache) -> None:
    with pytest.raises(UsageError, match="the same ViewPlan object that `check_plan` was called with"):
        cache.check_batch([join_index(0, 0)], torch.zeros(1, 1, 8, 8))
    views = ViewDataset(Pictures(), cache.view_plan)
    with pytest.raises(UsageError, match="the batch has plain row numbers, which name no view"):
        cache.check_batch([0], views[0][1][None])


@pytest.mark.parametrize("mixing", [Mixing(), Mixing(mixup=0.4, cutmix=1.0)], ids=["plain", "mixed"])
def test_a_plan_made_again_is_checked_too(tmp_path: Path, mixing: Mixing) -> None:
    plan = ViewPlan(transform=v2.RandomHorizontalFlip(), mixing=mixing, num_classes=CLASSES)
    logits = torch.randn(40, CLASSES)
    samples = copy.copy(logitcache.sample_table(Pictures()))
    object.__setattr__(samples, "contents", np.zeros((40, 16), dtype=np.uint8))
    with logitcache.create(
        tmp_path / "a", num_samples=40, num_classes=CLASSES, teacher="net", samples=samples, view_plan=plan
    ) as writer:
        writer.write(view=0, start=0, logits=logits)
    cache = logitcache.open(tmp_path / "a")
    views = ViewDataset(Pictures(), plan)
    cache.check_plan(plan)
    index, inputs, _ = next(iter(DataLoader(views, batch_size=8)))

    assert 2 == cache.check_batch(index, inputs)
    with pytest.raises(IdentityMismatch, match="values differ"):
        cache.check_batch(index, inputs.flip(0))


def test_a_plan_travels_to_workers_that_are_spawned(cache: logitcache.LogitCache, views: ViewDataset) -> None:
    again = pickle.loads(pickle.dumps(views))

    assert views[(2, 3)][0] == again[(2, 3)][0]
    assert [again] == list(again.plan.datasets) or [] == list(again.plan.datasets)


def test_our_loop_checks_the_first_batch_of_each_view(tiny: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    cache_teacher(tiny(*FEW_DIGITS))
    checked: list[tuple[int, int]] = []
    original = logitcache.LogitCache.check_batch

    def check(self: logitcache.LogitCache, index: Any, inputs: Any, **options: Any) -> int:
        checked.append((int(split_index(index)[0][0]), original(self, index, inputs, **options)))
        return checked[-1][1]

    monkeypatch.setattr(logitcache.LogitCache, "check_batch", check)
    train_students(tiny(*FEW_DIGITS, "train.epochs=3"), ["small"])

    assert [(0, 2), (1, 2)] == checked


def test_our_loop_stops_where_a_batch_is_not_what_was_rendered(tiny: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    from logitcache.train import loop

    cache_teacher(tiny(*FEW_DIGITS))
    original = loop.rendered_batches

    def darker(*args: Any, **options: Any) -> Any:
        return ((index, inputs * 0.5, targets) for index, inputs, targets in original(*args, **options))

    monkeypatch.setattr(loop, "rendered_batches", darker)
    with pytest.raises(IdentityMismatch, match="of this batch is not view 0 as it is rendered here"):
        train_students(tiny(*FEW_DIGITS), ["small"])


def own_cache(
    path: Path, plan: ViewPlan, dataset: Any, *, shuffled: bool = False, view: int = 0
) -> logitcache.LogitCache:
    """Two views by a loop of one's own, as in the README, with its mistakes."""
    views = ViewDataset(dataset, plan)
    settings: dict[str, Any] = {"teacher": "net", "dataset": "pictures", "view_plan": plan}
    with logitcache.create(path, num_samples=40, num_classes=CLASSES, num_views=2, **settings) as writer:
        for number in range(2):
            views.set_view(number if view == 0 else 0)
            order = torch.randperm(40, generator=torch.Generator().manual_seed(1)) if shuffled else torch.arange(40)
            inputs = torch.stack([views[int(index)][1] for index in order])
            writer.write(view=number, start=0, logits=inputs.flatten(1)[:, :CLASSES], inputs=inputs)
    cache = logitcache.open(path)
    cache.check_plan(plan)
    return cache


class Reversed:
    """The same pictures from the last to the first, without keys."""

    def __init__(self) -> None:
        self.pictures = Pictures()

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> Any:
        return self.pictures[39 - index]


@pytest.mark.parametrize(
    ("mistake", "data"),
    [({}, Reversed), ({"shuffled": True}, Pictures), ({"view": 1}, Pictures)],
    ids=["another order", "stage 1 shuffled", "stage 1 without set_view"],
)
def test_checking_a_batch_compares_its_dataset_with_the_cache(tmp_path: Path, mistake: Any, data: Any) -> None:
    """The batch is what the dataset renders; the dataset is not what the teacher saw."""
    plan = ViewPlan(transform=v2.RandomAffine(degrees=20), seed=3)
    cache = own_cache(tmp_path / "a", plan, Pictures(), **mistake)
    views = ViewDataset(data(), plan)
    views.set_view(1)
    index, inputs, _ = next(iter(DataLoader(views, batch_size=8)))

    with pytest.raises(IdentityMismatch, match=r"is not what the teacher saw(.|\n)*Possible causes: other data or"):
        cache.check_batch(index, inputs)


def test_a_batch_of_the_right_data_passes_in_a_loop_of_ones_own(tmp_path: Path) -> None:
    plan = ViewPlan(transform=v2.RandomAffine(degrees=20), seed=3)
    cache = own_cache(tmp_path / "a", plan, Pictures())
    views = ViewDataset(Pictures(), plan)
    for view in cache.views:
        views.set_view(view)
        index, inputs, _ = next(iter(DataLoader(views, batch_size=8)))
        assert 2 == cache.check_batch(index, inputs)


def test_checking_a_batch_of_an_unknown_plan_says_what_to_call_first(tmp_path: Path) -> None:
    cache = own_cache(tmp_path / "a", ViewPlan(transform=v2.RandomAffine(degrees=20), seed=3), Pictures())
    views = ViewDataset(Pictures(), ViewPlan(transform=v2.RandomAffine(degrees=20), seed=3))
    index, inputs, _ = next(iter(DataLoader(views, batch_size=8)))
    cache = logitcache.open(cache.storage.url)

    with pytest.raises(UsageError, match=r"pass it as `views=`, or call `cache.check_plan\(plan\)` first"):
        cache.check_batch(index, inputs)
    assert 2 == cache.check_batch(index, inputs, views=views)
    cache.check_plan(views.plan)
    assert 2 == cache.check_batch(index, inputs)


def test_a_plan_of_ones_own_knows_the_cache_s_views_once_it_was_checked(tmp_path: Path) -> None:
    plan = ViewPlan(seed=3)
    own_cache(tmp_path / "a", plan, Pictures())

    with pytest.raises(UsageError, match="there is no view 2; expected 0 to 1, those of the cache"):
        ViewDataset(Pictures(), plan).set_view(2)


def test_fewer_inputs_than_indices_are_refused(cache: logitcache.LogitCache, views: ViewDataset) -> None:
    index, inputs, _ = next(iter(DataLoader(views, batch_size=8)))

    with pytest.raises(ShapeError, match="the batch has 8 indices, but fewer inputs"):
        cache.check_batch(index, inputs[:5])
