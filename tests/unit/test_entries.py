"""Entries of a serving engine become rows of `TopK` and `PackedTopK`."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from logitcache import Dense, LowRank, PackedTopK, TopK
from logitcache.errors import InvalidLogits, ShapeError, UsageError
from logitcache.testing import teacher_like

# B rows, C classes, K entries

CLASSES = 12


def row(*entries: tuple[int, float]) -> tuple[Tensor, Tensor]:
    """Ids and log-probabilities of one row, from (id, probability)."""
    return (
        torch.tensor([[i for i, _ in entries]]),
        torch.tensor([[p if not p > 0 else math.log(p) for _, p in entries]], dtype=torch.float64),
    )


def decoded(encoding: TopK | PackedTopK, ids: Tensor, log_probs: Tensor, classes: int = CLASSES) -> Tensor:
    """Probabilities."""
    encoded = encoding.encode_sparse(ids, log_probs, classes)
    for name, spec in encoding.arrays(classes).items():
        assert (getattr(torch, spec.dtype), (len(ids), *spec.row_shape)) == (
            encoded[name].dtype,
            tuple(encoded[name].shape),
        )
        assert encoding.accepts(name, encoded[name])
    p = encoding.decode(encoded, classes).softmax(dim=1)
    torch.testing.assert_close(encoding.targets(encoded, classes).dense().softmax(dim=1), p)
    return p


def expected(entries: dict[int, float], k: int) -> Tensor:
    """The k most probable entries; the rest of a mass of 1 is spread evenly."""
    kept = dict(sorted(entries.items(), key=lambda each: -each[1])[:k])
    p = torch.full((1, CLASSES), max(0.0, 1 - sum(kept.values())) / (CLASSES - len(kept)))
    for i, mass in kept.items():
        p[0, i] = mass
    return p / p.sum()


@pytest.mark.parametrize("dtype", ["float32", "float16", "uint8"])
@pytest.mark.parametrize("k", [1, 3, 4, 7, CLASSES - 1])
@pytest.mark.parametrize(
    "entries",
    [
        pytest.param([(4, 0.5), (2, 0.2), (9, 0.1)], id="K entries"),
        pytest.param([(4, 0.5), (2, 0.2), (9, 0.1), (0, 0.001)], id="K + 1 entries"),
        pytest.param([(2, 0.1), (9, 0.2), (4, 0.6)], id="unordered"),
        pytest.param([(4, 0.5), (2, 0.2), (4, 0.5), (9, 0.1)], id="an entry twice"),
        pytest.param([(-1, math.nan), (4, 0.5), (-1, 0.3), (2, 0.2)], id="unused entries"),
        pytest.param([(4, 0.7), (2, 0.3)], id="no mass is missing"),
        pytest.param([(4, 0.7), (2, 0.3004)], id="a sum of 1 but for rounding"),
        pytest.param([(4, 0.7), (2, -math.inf)], id="a class of probability 0"),
        pytest.param([(0, 0.01)], id="the most probable class is missing"),
        pytest.param([(c, 1 / CLASSES) for c in range(CLASSES)], id="all classes"),
        pytest.param([(5, 1.0)], id="certain"),
    ],
)
def test_the_mass_that_entries_lack_becomes_the_tail(entries: list[tuple[int, float]], k: int, dtype: str) -> None:
    masses = {i: max(p, 0.0) for i, p in entries if i >= 0}
    exact = dtype == "float32"

    found = decoded(TopK(k=k, dtype=dtype), *row(*entries))
    torch.testing.assert_close(found, expected(masses, k), atol=1e-6 if exact else 5e-3, rtol=1e-3 if exact else 6e-2)
    packed = decoded(PackedTopK(k=k, step=0.1), *row(*entries))
    torch.testing.assert_close(packed, expected(masses, k), atol=5e-3, rtol=0.1)


@given(
    st.lists(st.lists(st.integers(-1, CLASSES - 1), min_size=5, max_size=5), min_size=1, max_size=4),
    st.integers(1, CLASSES - 1),
    st.integers(0, 2**32 - 1),
)
def test_any_entries_decode_to_their_distribution(ids: list[list[int]], k: int, seed: int) -> None:
    p = torch.rand(CLASSES, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) ** 4
    p /= p.sum()
    ids = [each if max(each) >= 0 else [0, *each[1:]] for each in ids]
    log_probs = torch.tensor(ids).clamp(min=0).double().apply_(lambda i: math.log(p[int(i)]))
    found = decoded(TopK(k=k, dtype="float32"), torch.tensor(ids), log_probs)

    wanted = torch.cat([expected({i: float(p[i]) for i in each if i >= 0}, k) for each in ids])
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-3)
    packed = decoded(PackedTopK(k=k, step=0.1), torch.tensor(ids), log_probs)
    torch.testing.assert_close(packed, wanted, atol=1e-2, rtol=0.1)


@pytest.mark.parametrize("dtype", ["float32", "float16", "uint8"])
def test_the_entries_of_a_teacher_are_its_logits(dtype: str) -> None:
    logits = teacher_like(64, 100)
    encoding = TopK(k=8, dtype=dtype)
    shuffled = torch.randperm(100)
    ids = shuffled.expand(64, -1)
    sparse = encoding.encode_sparse(ids, logits.log_softmax(dim=1)[:, shuffled], 100)
    dense = encoding.encode(logits)

    assert torch.equal(dense["ids"], sparse["ids"])
    torch.testing.assert_close(encoding.decode(sparse, 100), encoding.decode(dense, 100), atol=2e-2, rtol=1e-2)


@pytest.mark.parametrize(
    ("ids", "log_probs", "message"),
    [
        pytest.param(
            [[1, 2], [3, 12]], [[-1.0, -2.0], [-1.0, -2.0]], "row 41 has class 12; expected 0 to 11, or -1", id="class"
        ),
        pytest.param([[1, -2]], [[-1.0, -2.0]], "row 40 has class -2;", id="negative class"),
        pytest.param([[1, 2]], [[-1.0, math.nan]], "row 40 has NaN as the log-probability of class 2", id="NaN"),
        pytest.param(
            [[1, 2]], [[0.5, -2.0]], "row 40 has log-probability 0.5 of class 1; expected at most 0", id="positive"
        ),
        pytest.param([[1, 2]], [[math.inf, -2.0]], "row 40 has log-probability inf of class 1", id="infinite"),
        pytest.param([[1, 2]], [[-0.1, -0.2]], "row 40 has probabilities with a sum of 1.7235", id="sum"),
        pytest.param(
            [[1, 2, 1]], [[-1.0, -2.0, -1.5]], "row 40 has two different log-probabilities of class 1", id="two values"
        ),
        pytest.param(
            [[1, 2], [-1, -1]], [[-1.0, -2.0]] * 2, "row 41 has no entry with a probability above 0", id="none"
        ),
        pytest.param([[1, 2]], [[-math.inf] * 2], "row 40 has no entry", id="all zero"),
        pytest.param([[1, 2]], [[-1, -2]], "log-probabilities torch.int64; expected integers and floats", id="dtype"),
        pytest.param([[1.0, 2.0]], [[-1.0, -2.0]], "ids are torch.float32", id="float ids"),
    ],
)
def test_entries_of_no_distribution_are_refused(ids: list, log_probs: list, message: str) -> None:
    with pytest.raises(InvalidLogits, match=message):
        TopK(k=3).encode_sparse(torch.tensor(ids), torch.tensor(log_probs), CLASSES, start=40)


def test_shapes_that_differ_are_refused() -> None:
    with pytest.raises(ShapeError, match=r"ids are \(2, 3\) and log-probabilities \(2, 2\); expected \(B, K\) twice"):
        TopK(k=3).encode_sparse(torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 2), CLASSES)


def test_the_rounding_of_half_precision_is_accepted() -> None:
    p = teacher_like(200, 12).softmax(dim=1).log().to(torch.bfloat16)
    found = decoded(TopK(k=5, dtype="float32"), torch.arange(12).expand(200, -1), p)

    torch.testing.assert_close(
        found.topk(5).values.sum(dim=1), p.float().exp().topk(5).values.sum(dim=1), atol=0.02, rtol=0.02
    )


def test_no_rows_are_encoded_to_no_rows() -> None:
    encoded = TopK(k=3).encode_sparse(torch.zeros(0, 5, dtype=torch.int64), torch.zeros(0, 5), CLASSES)

    assert {"ids": (0, 3), "values": (0, 3), "tail": (0,)} == {
        name: tuple(each.shape) for name, each in encoded.items()
    }
    packed = PackedTopK(k=3).encode_sparse(torch.zeros(0, 5, dtype=torch.int64), torch.zeros(0, 5), CLASSES)
    assert (0, CLASSES) == tuple(PackedTopK(k=3).decode(packed, CLASSES).shape)


@pytest.mark.parametrize("encoding", [Dense(), LowRank(rank=3)], ids=lambda each: each.name)
def test_other_encodings_need_all_logits(encoding: Dense | LowRank) -> None:
    with pytest.raises(
        UsageError,
        match="needs the logits of all classes; entries of some classes can be stored with TopK or PackedTopK",
    ):
        encoding.encode_sparse(*row((1, 0.5)), CLASSES)
