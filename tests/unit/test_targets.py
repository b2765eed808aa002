"""Targets: what a distribution of few entries stands for."""

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from logitcache import DenseTargets, SparseTargets
from logitcache.errors import ShapeError
from logitcache.targets import FactoredTargets, Targets

# B rows, C classes, K entries

CLASSES = 7


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def sparse(rows: int = 5, entries: int = 3, seed: int = 0, *, shaped: bool = False) -> SparseTargets:
    """Random rows with an unused entry, one without a tail, one with an entry of probability 0."""
    ids = torch.stack([random(CLASSES, seed=seed + row).argsort()[:entries] for row in range(rows)])
    log_probs, tail = random(rows, entries, seed=seed + 50), random(rows, seed=seed + 60)
    ids[0, 1], log_probs[0, 1] = -1, -math.inf
    tail[1] = -math.inf
    log_probs[2, 0] = -math.inf
    return SparseTargets(ids, log_probs, tail, CLASSES, random(CLASSES, seed=seed + 70) if shaped else None)


def by_hand(targets: SparseTargets) -> Tensor:
    """Probabilities, class by class."""
    p = torch.zeros(len(targets), CLASSES, dtype=torch.float64)
    for row in range(len(targets)):
        entries = {
            int(i): float(v.exp()) for i, v in zip(targets.ids[row], targets.log_probs[row], strict=True) if i >= 0
        }
        others = [c for c in range(CLASSES) if c not in entries]
        shape = [1.0 if targets.tail_shape is None else float(targets.tail_shape[c].exp()) for c in others]
        for c, part in zip(others, shape, strict=True):
            p[row, c] = targets.tail[row].exp() * part / sum(shape)
        for c, mass in entries.items():
            p[row, c] = mass
    return p / p.sum(dim=1, keepdim=True)


@pytest.mark.parametrize("shaped", [False, True])
@pytest.mark.parametrize("entries", [1, 3, CLASSES - 1, CLASSES])
def test_the_tail_is_spread_over_the_classes_without_an_entry(shaped: bool, entries: int) -> None:
    targets = sparse(entries=max(entries, 2), shaped=shaped)
    if entries == 1:
        targets = SparseTargets(targets.ids[:, :1], targets.log_probs[:, :1], targets.tail, CLASSES, targets.tail_shape)
        targets.log_probs[2, 0] = 0.0
    if entries == CLASSES:
        targets.tail[1:] = -math.inf  # only row 0 has a class without an entry

    torch.testing.assert_close(targets.dense().softmax(dim=1), by_hand(targets))


@pytest.mark.parametrize("shaped", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0, 0.5])
def test_softened_targets_are_the_softened_distribution(shaped: bool, temperature: float) -> None:
    targets = sparse(shaped=shaped)
    softened = targets.softened(temperature)

    torch.testing.assert_close(softened.dense(), (targets.dense() / temperature).log_softmax(dim=1))
    torch.testing.assert_close(softened.dense().exp().sum(dim=1), torch.ones(5, dtype=torch.float64))


def test_a_shape_that_the_entries_nearly_exhaust_keeps_the_tail() -> None:
    """In float32 the rest of the shape's mass would be lost in the difference from 1."""
    shape = torch.tensor([0.0, -25.0, -26.0, -27.0, -28.0, -29.0, -30.0])
    targets = SparseTargets(torch.tensor([[0]]), torch.tensor([[-1.0]]), torch.tensor([-0.5]), CLASSES, shape)
    tail = shape[1:].double().log_softmax(dim=0) - 0.5

    torch.testing.assert_close(targets.dense()[0, 1:], tail.float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shaped", [False, True])
@pytest.mark.parametrize("case", ["as it comes", "tail above all entries", "ties", "no entries"])
def test_argmax_is_that_of_all_classes(shaped: bool, case: str) -> None:
    targets = sparse(rows=20, shaped=shaped)
    if case == "tail above all entries":
        targets.log_probs.sub_(10.0)
        targets.tail[1] = 0.0
    if case == "ties":
        targets = SparseTargets(
            targets.ids,
            torch.zeros_like(targets.log_probs),
            torch.full_like(targets.tail, math.log(CLASSES - 3)),
            CLASSES,
        )[2:]
    if case == "no entries":
        targets = SparseTargets(
            targets.ids[:, :0], targets.log_probs[:, :0], torch.zeros_like(targets.tail), CLASSES, targets.tail_shape
        )

    assert torch.equal(targets.dense().argmax(dim=1), targets.argmax())


def factored(rows: int = 5) -> FactoredTargets:
    ids = torch.stack(
        [torch.randperm(CLASSES, generator=torch.Generator().manual_seed(row))[:2] for row in range(rows)]
    )
    return FactoredTargets(
        random(rows, 3), random(3, CLASSES, seed=1), random(CLASSES, seed=2), ids, random(rows, 2, seed=3)
    )


def factored_integers(rows: int = 5) -> FactoredTargets:
    targets = factored(rows)
    coefficients, basis = ((10 * part).round().to(torch.int8) for part in (targets.coefficients, targets.basis))
    mean, corrections = targets.mean.float(), targets.corrections.float()
    scale = torch.exp2(random(CLASSES, seed=4).round()).float()
    return FactoredTargets(coefficients, basis, mean, targets.ids, corrections, scale)


def test_an_integer_basis_counts_in_its_unit() -> None:
    targets = factored_integers()
    floats = replace(
        targets,
        coefficients=targets.coefficients.float(),
        basis=targets.basis.float() * targets.scale,
        scale=None,
    )

    torch.testing.assert_close(targets.dense(), floats.dense())
    chosen = torch.tensor([5, 0, 2])
    torch.testing.assert_close(targets.of_classes(chosen).dense(), targets.dense()[:, chosen])


@pytest.mark.parametrize(
    "targets",
    [DenseTargets(random(5, CLASSES)), sparse(), sparse(shaped=True), factored(), factored_integers()],
)
@pytest.mark.parametrize("rows", [slice(1, 3), torch.tensor([4, 0]), torch.tensor([True, False, True, True, False])])
def test_rows_of_targets_are_the_rows_of_their_distribution(targets: Targets, rows: slice | Tensor) -> None:
    chosen = targets[rows].to("cpu")

    assert type(chosen) is type(targets)
    assert CLASSES == chosen.num_classes
    torch.testing.assert_close(chosen.dense(), targets.dense()[rows])
    assert torch.equal(chosen.argmax(), targets.argmax()[rows])
    assert targets.device == torch.device("cpu")


def test_targets_of_no_rows_have_no_classes_to_choose() -> None:
    for targets in (sparse()[:0], factored()[:0], factored_integers()[:0], DenseTargets(random(0, CLASSES))):
        assert (0, (0,), (0, CLASSES)) == (len(targets), tuple(targets.argmax().shape), tuple(targets.dense().shape))


def test_shapes_that_do_not_agree_are_refused() -> None:
    ids, log_probs, tail = torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 3), torch.zeros(2)
    with pytest.raises(ShapeError, match=r"\(2, 3\), \(2, 2\) and \(2,\); expected \(B, K\), \(B, K\) and \(B,\)"):
        SparseTargets(ids, log_probs[:, :2], tail, CLASSES)
    with pytest.raises(ShapeError, match=r"the shape of the tail is \(6,\); expected \(7,\)"):
        SparseTargets(ids, log_probs, tail, CLASSES, torch.zeros(6))
    with pytest.raises(ShapeError, match=r"logits are \(B, C\), not \(3,\)"):
        DenseTargets(torch.zeros(3))
    with pytest.raises(ShapeError, match=r"\(5, 3\), \(2, 7\) and \(7,\)"):
        FactoredTargets(random(5, 3), random(2, CLASSES), random(CLASSES), ids[:0], log_probs[:0])


@pytest.mark.parametrize("classes", [range(CLASSES - 2), [4, 0, 2], [1]], ids=["the first ones", "some", "one"])
@pytest.mark.parametrize("targets", [DenseTargets(random(5, CLASSES)), sparse(), sparse(shaped=True), factored()])
def test_targets_of_some_classes_are_the_distribution_given_these(targets: Targets, classes: Sequence[int]) -> None:
    """As for a student whose vocabulary is a part of the teacher's; a row without mass there has no distribution."""
    chosen = torch.tensor(list(classes))

    found = targets.of_classes(chosen)

    assert len(chosen) == found.num_classes
    assert torch.allclose(
        targets.dense()[:, chosen].log_softmax(dim=1), found.dense().log_softmax(dim=1), atol=1e-6, equal_nan=True
    )
    assert torch.equal(targets.dense()[:, chosen].argmax(dim=1), found.argmax())


def test_entries_that_a_student_lacks_and_the_tail_leave_the_right_mass() -> None:
    """Two of four entries are kept; the tail's three classes become one."""
    targets = SparseTargets(
        ids=torch.tensor([[0, 5, 2, -1]]),
        log_probs=torch.tensor([[0.4, 0.2, 0.1, 0.0]]).log(),
        tail=torch.tensor([0.3]).log(),
        num_classes=6,
    )

    found = targets.of_classes(torch.tensor([2, 0, 1]))

    assert [[1, -1, 0, -1]] == found.ids.tolist()
    assert torch.allclose(torch.tensor([0.1]), found.tail.exp())
