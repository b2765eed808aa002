"""Which rows belong to which sample, and how blocks take whole samples."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from logitcache.data.index import join_index
from logitcache.data.rows import RowMap, RowsOfSequences, make_row_map
from logitcache.data.sequences import position_index, rows_of_output
from logitcache.errors import ShapeError, UsageError

COUNTS = st.lists(st.integers(0, 9), min_size=1, max_size=30).filter(any)


def row_map(counts: list[int], rows_per_block: int | None = 10, positions: object = None) -> RowMap:
    return make_row_map(len(counts), counts, positions, rows_per_block=rows_per_block)  # type: ignore[arg-type]


@given(COUNTS, st.integers(9, 40))
def test_blocks_hold_whole_samples_as_many_as_fit(counts: list[int], rows_per_block: int) -> None:
    rows = row_map(counts, rows_per_block)
    blocks = [rows.block_rows(number) for number in range(rows.blocks_per_view)]

    assert list(range(sum(counts))) == [row for block in blocks for row in block]
    assert all(0 < len(block) <= rows_per_block for block in blocks)
    assert all(block.start in rows.offsets for block in blocks)
    for number, (block, following) in enumerate(itertools.pairwise(blocks)):
        first_of_next = rows.block_samples(number + 1)[0]
        assert len(block) + counts[first_of_next] > rows_per_block
        assert following.start == rows.offsets[first_of_next]


@given(COUNTS)
def test_every_row_has_its_sample_its_block_and_its_position(counts: list[int]) -> None:
    rows = row_map(counts)
    expected = [(sample, position) for sample, count in enumerate(counts) for position in range(count)]
    numbers = np.arange(sum(counts))

    assert expected == list(zip(rows.samples_of(numbers).tolist(), rows.positions_of(numbers).tolist(), strict=True))
    assert all(row in rows.block_rows(int(block)) for row, block in enumerate(rows.blocks_of(numbers)))
    assert all(sample in rows.block_samples(int(rows.blocks_of(row))) for row, (sample, _) in enumerate(expected))
    assert [range(*ends) for ends in zip(rows.offsets, rows.offsets[1:], strict=False)] == [
        rows.sample_rows(sample) for sample in range(len(counts))
    ]


@given(COUNTS, st.integers(0, 40), st.integers(0, 40))
def test_samples_that_start_in_a_range_of_rows(counts: list[int], start: int, length: int) -> None:
    rows = row_map(counts)

    assert [sample for sample in range(len(counts)) if start <= rows.offsets[sample] < start + length] == list(
        rows.samples_starting(start, start + length)
    )


@pytest.mark.parametrize(
    ("counts", "options", "message"),
    [
        pytest.param([1, 11], {}, "sample 1 has 11 rows, and a block at most 10", id="larger than a block"),
        pytest.param([3, -1], {}, "sample 1 has -1 rows", id="negative"),
        pytest.param([0, 0], {}, "0 rows in total", id="no rows"),
        pytest.param([1.5, 2], {}, "rows_per_sample must be integers, not float64", id="floats"),
        pytest.param([[1], [2]], {}, r"\(2, 1\); expected \(2,\)", id="two dimensions"),
        pytest.param([2, 1], {"positions": [[0, 1]]}, "one sequence for each sample", id="positions of one sample"),
        pytest.param([2, 1], {"positions": [[1, 0], [0]]}, "row 1, of sample 0, has position 0", id="decreasing"),
        pytest.param([2, 1], {"positions": [[3, 3], [0]]}, "row 1, of sample 0, has position 3", id="repeated"),
        pytest.param([2, 1], {"positions": [[-1, 0], [0]]}, "from -1 to 0", id="negative position"),
        pytest.param([2, 1], {"positions": np.array([0, 1])}, "one for each row", id="too few positions"),
    ],
)
def test_impossible_rows_are_refused(counts: list[int], options: dict[str, object], message: str) -> None:
    with pytest.raises((UsageError, ShapeError), match=message):
        row_map(counts, **options)


def test_positions_need_the_number_of_rows() -> None:
    with pytest.raises(UsageError, match="row_positions needs rows_per_sample"):
        make_row_map(2, None, [[0], [0]])


def test_a_default_block_holds_the_largest_sample() -> None:
    counts = [3, 20_000, 4]

    assert 20_000 == row_map(counts, rows_per_block=None).rows_per_block


def test_other_positions_have_another_fingerprint() -> None:
    offsets = np.array([0, 2, 3])
    positions = np.array([1, 4, 0], dtype=np.int32)
    prints = {RowsOfSequences(offsets, 10, each).fingerprint() for each in (None, positions, positions + 1)}

    assert 3 == len(prints)


def test_each_position_of_a_batch_has_the_index_of_its_row() -> None:
    rows = row_map([2, 0, 3])
    first, last = join_index(1, 0), join_index(1, 2)

    at_BL = position_index(torch.tensor([last, -1, first]), rows, 4)

    assert [[last, last + 1, last + 2, -1], [-1, -1, -1, -1], [first, first + 1, -1, -1]] == at_BL.tolist()


def test_selected_positions_leave_the_others_without_an_index() -> None:
    rows = row_map([2, 1], positions=[[1, 3], [2]])
    first, second = join_index(0, 0), join_index(0, 2)

    assert [[-1, first, -1, first + 1], [-1, -1, second, -1]] == position_index([first, second], rows, 4).tolist()


@pytest.mark.parametrize(
    ("index", "message"),
    [
        pytest.param([0], "plain row numbers name no view", id="plain"),
        pytest.param([join_index(0, 1)], "row 1 is not the first one of a sample", id="inside a sample"),
        pytest.param(
            [join_index(0, 0)], "a row lies at position 3 of its sample, and the batch has 3 positions", id="truncated"
        ),
    ],
)
def test_an_index_that_fits_no_sequence_is_refused(index: list[int], message: str) -> None:
    with pytest.raises((UsageError, ShapeError), match=message):
        position_index(index, row_map([4, 1]), 3)


@pytest.mark.parametrize("size", [(6,), (2, 3)], ids=["tokens", "pixels"])
def test_the_rows_of_an_output_are_in_the_order_of_their_indices(size: tuple[int, ...]) -> None:
    rows = row_map([5, 2])
    at_BL = position_index([join_index(0, 5), join_index(0, 0)], rows, 6)
    values = torch.arange(2 * 6 * 4).reshape(2, 6, 4)
    output = values if len(size) == 1 else values.transpose(1, 2).reshape(2, 4, *size)

    found = rows_of_output(output, at_BL)

    assert torch.equal(torch.cat([values[0, :2], values[1, :5]]), found)


def test_an_output_of_another_shape_is_refused() -> None:
    with pytest.raises(ShapeError, match=r"\(1, 10\); expected \(1, 5, 'C'\)"):
        rows_of_output(torch.zeros(1, 10), position_index([join_index(0, 0)], row_map([5]), 5))
