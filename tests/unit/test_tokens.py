"""Token sequences: their rows, their batches, and the index of each position."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from logitcache.data.batching import collate, pad
from logitcache.data.index import join_index
from logitcache.data.packing import is_packed, pack, packed_sequence, packing_order
from logitcache.data.rows import RowMap, rows_of_dataset
from logitcache.data.samples import batch_item, content_digest, sample_table
from logitcache.data.sequences import packed_index, position_index
from logitcache.data.tokens import TokenDataset, length_batches
from logitcache.data.views import ViewDataset, ViewPlan
from logitcache.errors import ShapeError, UsageError


def tokens(lengths: Sequence[int], task: str = "causal", **options: Any) -> TokenDataset:
    """Sequences of the given lengths; ids count on over all of them."""
    starts = np.cumsum([0, *lengths])
    return TokenDataset(
        [np.arange(start, start + length) for start, length in zip(starts, lengths, strict=False)],
        keys=[f"text#{number}" for number in range(len(lengths))],
        task=task,
        vocab_size=options.pop("vocab_size", 1 + int(sum(lengths))),
        tokenization={"task": task},
        **options,
    )


def row_map(dataset: TokenDataset) -> RowMap:
    return rows_of_dataset(dataset)


def first_indices(dataset: TokenDataset, samples: Sequence[int], view: int = 0) -> torch.Tensor:
    """The index that a `ViewDataset` gives with each sample."""
    assert dataset.rows_per_sample is not None
    offsets = row_map(dataset).offsets
    return torch.tensor(
        [join_index(view, int(offsets[i])) if dataset.rows_per_sample[i] else -1 for i in samples], dtype=torch.int64
    )


def test_a_causal_sequence_has_a_row_for_each_token_but_the_first() -> None:
    dataset = tokens([4, 1, 3])

    assert ([3, 0, 2], None) == (dataset.rows_per_sample.tolist(), dataset.row_positions)  # type: ignore[union-attr]
    assert [1, 2, 3, 6, 7] == dataset.row_targets(np.arange(5)).tolist()


def test_a_masked_sequence_has_a_row_for_each_token_that_is_not_special() -> None:
    dataset = tokens([4, 3], "masked", predicted=[np.array([0, 1, 1, 0]), np.array([0, 1, 0])])

    assert [2, 1] == dataset.rows_per_sample.tolist()  # type: ignore[union-attr]
    assert [1, 2, 1] == dataset.row_positions.tolist()  # type: ignore[union-attr]
    assert [1, 2, 5] == dataset.row_targets([0, 1, 2]).tolist()


def test_only_the_tokens_after_a_prompt_have_rows() -> None:
    dataset = tokens([5, 2], predicted=[np.array([0, 0, 0, 1, 1]), np.array([0, 0])])

    assert [2, 0] == dataset.rows_per_sample.tolist()  # type: ignore[union-attr]
    assert [2, 3] == dataset.row_positions.tolist()  # type: ignore[union-attr]
    assert [3, 4] == dataset.row_targets([0, 1]).tolist()


def test_a_selection_keeps_ids_keys_rows_and_contents() -> None:
    dataset = tokens([5, 2, 3], predicted=[np.array([0, 0, 1, 0, 1]), np.array([0, 1]), np.ones(3)])

    selected = dataset.select(np.array([2, 0]))

    assert ["text#2", "text#0"] == selected.keys
    assert ([2, 2], [0, 1, 1, 3]) == (selected.rows_per_sample.tolist(), selected.row_positions.tolist())  # type: ignore[union-attr]
    assert [8, 9, 2, 4] == selected.row_targets(np.arange(4)).tolist()
    assert content_digest(dataset, 2) == content_digest(selected, 0)


def test_a_changed_token_changes_the_identity_of_the_dataset() -> None:
    dataset, other = tokens([3, 2]), tokens([3, 2])
    other._ids[4] = 0

    first, second = (sample_table(each, contents=True).fingerprint() for each in (dataset, other))

    assert first != second
    assert [-1, -1] == dataset.targets.tolist()


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([[1, 2], []], r"sample 'text#1' has no tokens; remove it"),
        ([[1, 2], [3, 9]], r"sample 'text#1' has the token id 9, beyond a vocabulary of 9 \(0 to 8\)"),
        ([[-1]], r"sample 'text#0' has the token id -1, beyond a vocabulary of 9"),
        ([], "the dataset has no text; expected at least one sequence of tokens"),
    ],
    ids=["no tokens", "beyond", "negative", "no text"],
)
def test_sequences_that_have_no_meaning_are_refused(ids: list[list[int]], message: str) -> None:
    keys = [f"text#{number}" for number in range(len(ids))]

    with pytest.raises(UsageError, match=message):
        TokenDataset([np.array(each, int) for each in ids], keys=keys, task="causal", vocab_size=9, tokenization={})


def test_classes_have_one_row_each_and_no_tokens_to_predict() -> None:
    dataset = tokens([3, 2], "classification", targets=np.array([1, 0]), class_names=["bad", "good"])

    assert (None, 2, 1) == (dataset.rows_per_sample, dataset.num_classes, dataset[0][1])
    with pytest.raises(UsageError, match="have targets, not tokens to predict"):
        dataset.row_targets([0])


def test_batches_hold_sequences_of_similar_length_longest_first() -> None:
    lengths = np.array([3, 9, 4, 9, 1])

    assert [[1, 3], [2, 0], [4]] == [batch.tolist() for batch in length_batches(lengths, 2)]
    assert [[1], [3], [2, 0], [4]] == [batch.tolist() for batch in length_batches(lengths, 2, max_tokens=10)]


def test_each_position_of_a_padded_batch_has_its_own_index() -> None:
    dataset = tokens([4, 1, 3])

    index = position_index(first_indices(dataset, [2, 1, 0], view=5), row_map(dataset), 4)

    first = join_index(5, 0)
    assert [[first + 3, first + 4, -1, -1], [-1] * 4, [first, first + 1, first + 2, -1]] == index.tolist()


def test_selected_positions_are_found_in_a_batch() -> None:
    dataset = tokens([5, 2], predicted=[np.array([0, 0, 0, 1, 1]), np.array([0, 1])])

    index = position_index(first_indices(dataset, [0, 1]), row_map(dataset), 5)

    first = join_index(0, 0)
    assert [[-1, -1, first, first + 1, -1], [first + 2, -1, -1, -1, -1]] == index.tolist()


def test_a_sequence_that_was_cut_and_an_index_in_the_middle_are_refused() -> None:
    dataset = tokens([4, 3])

    with pytest.raises(ShapeError, match="a row lies at position 2 of its sample, and the batch has 2 positions"):
        position_index(first_indices(dataset, [0]), row_map(dataset), 2)
    with pytest.raises(UsageError, match="row 1 is not the first one of a sample"):
        position_index(torch.tensor([join_index(0, 1)]), row_map(dataset), 4)


def test_sequences_are_packed_into_rows_as_long_as_the_longest() -> None:
    inputs = [{"input_ids": torch.arange(1, length + 1)} for length in (3, 4, 1)]
    order = packing_order([3, 4, 1])

    batch = pack([inputs[number] for number in order])

    assert [1, 0, 2] == order
    assert [[1, 2, 3, 4], [1, 2, 3, 1]] == batch["input_ids"].tolist()
    assert [[0, 1, 2, 3], [0, 1, 2, 0]] == batch["position_ids"].tolist()


def test_what_can_not_be_packed_is_named() -> None:
    with pytest.raises(UsageError, match=r"expected a mapping of .*, found Tensor; use data.collate=pad"):
        pack([torch.ones(2)])  # type: ignore[list-item]
    with pytest.raises(UsageError, match="zeros in `attention_mask` can't be packed"):
        pack([{"input_ids": [1, 2], "attention_mask": [1, 0]}])


@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=9),
    seed=st.integers(0, 2**16),
    view=st.integers(0, 3),
)
@settings(max_examples=60, deadline=None)
def test_padding_and_packing_lead_to_the_same_rows(lengths: list[int], seed: int, view: int) -> None:
    """Every row occurs once, at a position whose next token is the row's target, in any order of the samples."""
    draw = np.random.default_rng(seed)
    dataset = tokens(lengths, predicted=[draw.random(length) < 0.7 for length in lengths])
    assume(any(dataset.rows_per_sample))  # type: ignore[arg-type]
    order = draw.permutation(len(lengths)).tolist()
    samples = [
        (int(first), dataset[i][0], -1) for first, i in zip(first_indices(dataset, order, view), order, strict=True)
    ]

    padded_index, padded, _ = collate(samples, pad)
    packed_samples, packed, _ = collate(samples, pack)
    padded_BL = position_index(padded_index, row_map(dataset), padded["input_ids"].shape[1])
    packed_PL = packed_index(packed_samples, row_map(dataset), packed["position_ids"])

    expected = {join_index(view, row): int(dataset.row_targets(row)) for row in range(row_map(dataset).offsets[-1])}
    for index, ids in ((padded_BL, padded["input_ids"]), (packed_PL, packed["input_ids"])):
        next_ids = torch.cat([ids[:, 1:], ids[:, :1]], dim=1)
        found = dict(zip(index[index >= 0].tolist(), next_ids[index >= 0].tolist(), strict=True))
        assert expected == found
        assert len(expected) == int((index >= 0).sum())
    assert is_packed(packed)
    assert packed["input_ids"].shape[0] <= padded["input_ids"].shape[0]


def test_one_sequence_of_a_packed_batch_is_found_again() -> None:
    samples = [
        (number, {"input_ids": torch.arange(length), "attention_mask": torch.ones(length)}, 0)
        for number, length in enumerate((2, 5, 3))
    ]

    index, batch, _ = collate(samples, pack)

    for place, number in enumerate(index.tolist()):
        length = len(samples[number][1]["input_ids"])
        assert list(range(length)) == batch_item(batch, place)["input_ids"][:length].tolist()
    with pytest.raises(IndexError, match="there is no sequence 3 of 3"):
        packed_sequence(batch, 3)


def test_views_render_token_ids() -> None:
    views = ViewDataset(tokens([3, 2], "classification", targets=np.array([0, 1])), ViewPlan(collate=pad))

    index, inputs, targets = views.collate(views.__getitems__([(0, 0), (0, 1)]))

    assert [[0, 1, 2], [3, 4, 0]] == inputs["input_ids"].tolist()
    assert [[1, 1, 1], [1, 1, 0]] == inputs["attention_mask"].tolist()
    assert ([join_index(0, 0), join_index(0, 1)], [0, 1]) == (index.tolist(), targets.tolist())
