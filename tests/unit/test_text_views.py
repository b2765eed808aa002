"""Token dropout and masking: keyed views of texts."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from logitcache.data.rows import rows_of_dataset
from logitcache.data.text_views import complete_spec
from logitcache.data.transforms import build_transform, describe_transform, normalise_spec
from logitcache.data.views import ViewDataset, ViewPlan
from logitcache.errors import UsageError
from tests.unit.test_tokens import tokens

MASKING = {"token_masking": {"mask_id": 4, "vocab_size": 1000, "special_ids": [0, 1, 4]}}
DROPOUT = {"token_dropout": {"p": 0.3, "token_id": 4, "special_ids": [0, 1]}}


def views_of(spec: Any, seed: int = 7) -> ViewDataset:
    dataset = tokens([12, 1, 300], "classification", targets=np.zeros(3, int), vocab_size=1000)
    return ViewDataset(dataset, ViewPlan(transform=build_transform(spec), seed=seed))


def ids(views: ViewDataset, view: int, sample: int) -> list[int]:
    changed: list[int] = views[(view, sample)][1]["input_ids"].tolist()
    return changed


@pytest.mark.parametrize("spec", [DROPOUT, MASKING], ids=["dropout", "masking"])
def test_a_view_is_a_pure_function_of_seed_view_and_sample(spec: Any) -> None:
    views, others = views_of(spec), views_of(spec)
    first = [ids(views, view, sample) for view in range(3) for sample in range(3)]

    np.random.seed(1)
    again = [ids(others, view, sample) for view in reversed(range(3)) for sample in reversed(range(3))]

    assert first == again[::-1]
    assert len({tuple(ids(views, view, 2)) for view in range(3)}) == 3
    assert ids(views_of(spec, seed=8), 0, 2) != ids(views, 0, 2)


def test_masking_follows_its_shares() -> None:
    """Of 300 tokens and 40 views: within 4 standard deviations."""
    views = views_of(MASKING)
    original = np.asarray(ids(views_of([]), 0, 2))
    changed = np.array([ids(views, view, 2) for view in range(40)])
    draws = changed.size

    masked, altered = (changed == 4).mean(), ((changed != 4) & (changed != original)).mean()

    for share, expected in ((masked, 0.15 * 0.8), (altered, 0.15 * 0.1)):
        assert abs(share - expected) < 4 * (expected * (1 - expected) / draws) ** 0.5


def test_special_tokens_are_kept_and_the_length_too() -> None:
    views = views_of(
        {"token_masking": {"p": 1, "masked": 1, "random": 0, "mask_id": 4, "vocab_size": 1000, "special_ids": [0, 1]}}
    )

    assert [0, 1, *[4] * 10] == ids(views, 0, 0)
    assert [0, 1, *[9] * 10] == ids(views_of({"token_dropout": {"p": 1, "token_id": 9, "special_ids": [0, 1]}}), 0, 0)


def test_everything_else_in_an_input_is_kept() -> None:
    view = views_of(DROPOUT)[(0, 0)][1]

    assert {"input_ids", "attention_mask"} == set(view)
    assert torch.equal(torch.ones(12, dtype=torch.int64), view["attention_mask"])
    assert torch.int64 == view["input_ids"].dtype


def test_a_text_view_is_described_by_its_parameters_alone() -> None:
    assert [DROPOUT] == describe_transform(build_transform(DROPOUT))
    assert [MASKING] == describe_transform(build_transform([MASKING]))


def test_ids_that_are_left_out_come_from_the_tokenizer() -> None:
    dataset = SimpleNamespace(special_ids=(0, 1), mask_id=4, vocab_size=1000)
    spec = normalise_spec([{"token_masking": {"p": 0.2}}, {"token_dropout": {"p": 0.1, "token_id": 2}}])

    assert [
        {"token_masking": {"special_ids": [0, 1], "mask_id": 4, "vocab_size": 1000, "p": 0.2}},
        {"token_dropout": {"special_ids": [0, 1], "p": 0.1, "token_id": 2}},
    ] == complete_spec(spec, dataset)
    with pytest.raises(UsageError, match="token_masking: the tokenizer has no mask token; set `mask_id`"):
        complete_spec(spec, SimpleNamespace(special_ids=(), mask_id=None, vocab_size=9))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"token_dropout": {"p": 1.5, "token_id": 0}}, "p is 1.5; expected 0 to 1"),
        ({"token_masking": {"mask_id": 0, "vocab_size": 9, "masked": 0.8, "random": 0.3}}, r"masked \+ random is 1.1"),
        ({"token_masking": {"mask_id": 9, "vocab_size": 9}}, "mask_id is 9, beyond a vocabulary of 9"),
        ({"token_maskin": {}}, "unknown transform 'token_maskin'; did you mean 'token_masking'?"),
    ],
    ids=["probability", "shares", "mask", "name"],
)
def test_wrong_parameters_are_refused(spec: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build_transform(spec)


def test_an_image_has_no_tokens() -> None:
    with pytest.raises(UsageError, match="text views change a mapping with 'input_ids', not a Tensor"):
        build_transform(DROPOUT)(torch.ones(3))


def test_each_view_of_a_masked_model_has_targets_for_the_tokens_that_it_selects() -> None:
    """Also for those that a view selects and leaves as they are; all others are visible, and have none."""
    dataset = tokens([40], "masked", vocab_size=1000, predicted=[np.arange(40) > 1])
    masking = {"token_masking": {"p": 0.5, "masked": 0.6, "random": 0.2, "mask_id": 4, "vocab_size": 1000}}
    plan = ViewPlan(transform=build_transform([masking]), num_samples=1, rows=rows_of_dataset(dataset))
    views = ViewDataset(dataset, plan)
    original = dataset.ids(0)[2:]
    found = []
    for view in range(4):
        _, inputs, target = views[(view, 0)]
        changed = inputs["input_ids"].numpy()[2:] != original
        has_target = target.numpy() != -100
        found.append(tuple(has_target))

        assert {"input_ids", "attention_mask"} == set(inputs)
        assert has_target[changed].all()
        assert (original == target.numpy())[has_target].all()
        assert 0 < (has_target & ~changed).sum() < has_target.sum() < len(original)
    assert 4 == len(set(found))


def test_in_other_models_masking_leaves_the_targets() -> None:
    for task, target in {"classification": {"targets": np.zeros(1, int)}, "causal": {}}.items():
        dataset = tokens([40], task, vocab_size=1000, **target)
        masked = ViewDataset(dataset, ViewPlan(transform=build_transform(MASKING)))[(0, 0)]

        assert torch.equal(torch.as_tensor(dataset[0][1]), torch.as_tensor(masked[2]))
        assert {"input_ids", "attention_mask"} == set(masked[1])
