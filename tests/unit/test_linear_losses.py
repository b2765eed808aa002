"""Losses through a linear head, chunk by chunk: those of the logits that never exist as a whole."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from logitcache import DenseTargets, Sampled, TopK
from logitcache.errors import ShapeError, UsageError
from logitcache.losses import cross_entropy, kl_divergence, linear_cross_entropy, linear_kl_divergence
from logitcache.targets import FactoredTargets, Targets
from logitcache.testing import teacher_like
from tests.largest import largest_tensor
from tests.unit.test_targets import CLASSES, factored, random, sparse

# N rows, D hidden size, C classes

ROWS, WIDTH = 5, 3
TARGETS: dict[str, Any] = {
    "even tail": sparse(),
    "shaped tail": sparse(shaped=True),
    "one class without an entry": sparse(entries=CLASSES - 1),
    "factored": factored(),
    "dense": DenseTargets(random(ROWS, CLASSES, seed=5)),
    "tensor": random(ROWS, CLASSES, seed=5),
}
LABELS = torch.tensor([0, 3, -100, 6, 1])
MASK = torch.tensor([True, False, True, True, True])


def head(dtype: torch.dtype = torch.float64, rows: int = ROWS) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states (N, D), weight (C, D) and bias (C,)."""
    parts = random(rows, WIDTH), random(CLASSES, WIDTH, seed=1), random(CLASSES, seed=2)
    return tuple(part.to(dtype).requires_grad_() for part in parts)  # type: ignore[return-value]


def unchunked(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Any, temperature: float, labels: Tensor | None
) -> Tensor:
    """(N,), by way of all logits."""
    logits = F.linear(hidden, weight, bias)
    loss = kl_divergence(logits, targets.dense() if isinstance(targets, Targets) else targets, temperature=temperature)
    return loss if labels is None else loss + 0.3 * F.cross_entropy(logits, labels, reduction="none")


def gradients(loss: Tensor, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return loss, *torch.autograd.grad((loss * torch.arange(1.0, 1 + loss.numel()).reshape(loss.shape)).sum(), inputs)


@pytest.mark.parametrize("labels", [None, LABELS], ids=["", "labels"])
@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
@pytest.mark.parametrize("targets", TARGETS)
class TestLinearKL:
    @pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
    @pytest.mark.parametrize("chunk_rows", [2, None])
    def test_values_and_gradients_are_those_of_all_logits(
        self, targets: str, temperature: float, labels: Tensor | None, reduction: Any, chunk_rows: int | None
    ) -> None:
        teacher, inputs = TARGETS[targets], head()
        found = linear_kl_divergence(
            inputs[0],
            inputs[1],
            teacher,
            bias=inputs[2],
            temperature=temperature,
            labels=labels,
            label_weight=0.3,
            chunk_rows=chunk_rows,
            reduction=reduction,
        )
        expected = unchunked(*inputs, teacher, temperature, labels)
        expected = {"mean": expected.mean(), "sum": expected.sum(), "none": expected}[reduction]

        torch.testing.assert_close(gradients(found, inputs), gradients(expected, inputs), rtol=1e-9, atol=1e-9)

    @pytest.mark.parametrize("reduction", ["mean", "none"])
    def test_gradients_agree_with_finite_differences(
        self, targets: str, temperature: float, labels: Tensor | None, reduction: Any
    ) -> None:
        def loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            return linear_kl_divergence(
                hidden,
                weight,
                TARGETS[targets],
                bias=bias,
                temperature=temperature,
                labels=labels,
                mask=MASK,
                chunk_rows=2,
                reduction=reduction,
            )

        assert torch.autograd.gradcheck(loss, head(), fast_mode=True)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("mask", [None, MASK], ids=["all", "mask"])
def test_cross_entropy_is_that_of_all_logits(mask: Tensor | None, reduction: Any) -> None:
    inputs = head()
    found = linear_cross_entropy(*inputs[:2], LABELS, bias=inputs[2], mask=mask, chunk_rows=2, reduction=reduction)
    expected = cross_entropy(F.linear(*inputs), LABELS, mask=mask, reduction=reduction)

    torch.testing.assert_close(gradients(found, inputs), gradients(expected, inputs), rtol=1e-9, atol=1e-9)
    assert torch.autograd.gradcheck(
        lambda *each: linear_cross_entropy(
            *each[:2], LABELS, bias=each[2], mask=mask, chunk_rows=2, reduction=reduction
        ),
        inputs,
        fast_mode=True,
    )


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_rows_that_do_not_count_are_left_out(reduction: Any) -> None:
    hidden, weight, _ = head()
    spoilt = hidden.detach().masked_fill(~MASK[:, None], math.nan).requires_grad_()
    loss = linear_kl_divergence(spoilt, weight, sparse(), mask=MASK, reduction=reduction)
    expected = kl_divergence(F.linear(hidden, weight), sparse(), mask=MASK, reduction=reduction)
    found, wanted = gradients(loss, (spoilt, weight)), gradients(expected, (hidden, weight))

    torch.testing.assert_close(found, wanted)
    assert torch.equal(torch.zeros(1, WIDTH, dtype=torch.float64), found[1][~MASK])


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_no_rows_give_0_and_no_gradient(reduction: Any) -> None:
    hidden, weight, _ = head()
    for loss in (
        linear_kl_divergence(hidden, weight, sparse(), mask=torch.zeros(ROWS, dtype=torch.bool), reduction=reduction),
        linear_cross_entropy(hidden, weight, torch.full((ROWS,), -100), reduction=reduction),
    ):
        assert all(not each.any() for each in gradients(loss, (hidden, weight)))


def test_what_needs_no_gradient_gets_none() -> None:
    hidden, weight, _ = head()
    linear_kl_divergence(hidden.detach(), weight, sparse()).backward()
    assert hidden.grad is None
    assert weight.grad is not None
    (only_hidden,) = torch.autograd.grad(linear_kl_divergence(hidden, weight.detach(), sparse()), [hidden])
    torch.testing.assert_close(only_hidden, gradients(linear_kl_divergence(hidden, weight, sparse()), (hidden,))[1])


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_without_gradients_none_are_computed(reduction: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def step(logits: Tensor, rows: slice, gradient: bool, overwrite: bool) -> tuple[Tensor, None]:
        asked.append(gradient)
        return logits.sum(dim=1), None

    monkeypatch.setattr("logitcache.losses.linear.step_for", lambda *arguments, **options: step)
    hidden, weight, _ = head()
    with torch.no_grad():
        assert not linear_kl_divergence(hidden, weight, sparse(), reduction=reduction).requires_grad

    assert [False] == asked


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_second_backward_pass_gives_the_same_gradients(reduction: Any) -> None:
    inputs = head()[:2]
    loss = linear_kl_divergence(*inputs, sparse(), reduction=reduction).sum()
    first, second = (torch.autograd.grad(3.0 * loss, inputs, retain_graph=True) for _ in range(2))

    torch.testing.assert_close(first, second)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("how", ["bfloat16", "autocast"])
def test_half_precision_is_accumulated_in_float32(how: str, reduction: Any) -> None:
    """2 000 chunks of one row: bfloat16 would stop growing after 256 equal additions."""
    rows = 2000
    hidden, weight = torch.ones(rows, 1), torch.zeros(4, 1)
    targets = DenseTargets(torch.tensor([[0.0, 0.0, 0.0, 1.0]]).expand(rows, -1))
    expected = gradients(kl_divergence(*[F.linear(hidden, weight.requires_grad_())], targets.logits).sum(), (weight,))[
        1
    ]
    if how == "bfloat16":
        hidden, weight = hidden.bfloat16(), weight.detach().bfloat16().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=how == "autocast"):
        loss = linear_kl_divergence(hidden, weight, targets, chunk_rows=1, reduction=reduction).sum()
    loss = loss * rows if reduction == "mean" else loss
    (found,) = torch.autograd.grad(loss, [weight])

    assert (torch.float32, weight.dtype) == (loss.dtype, found.dtype)
    torch.testing.assert_close(found.float(), expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("loss", ["kl", "kl and labels", "kl of sampled targets", "kl of factored targets", "labels"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_no_tensor_of_rows_and_classes_exists(loss: str, reduction: Any) -> None:
    """Neither of the student's logits nor of the teacher's, forward or backward, at the vocabulary of Qwen 2."""
    rows, width, classes, chunk_rows = 12, 4, 151_936, 3
    encoding = Sampled(draws=50) if "sampled" in loss else TopK(k=64)
    targets: Targets = encoding.targets(encoding.encode(teacher_like(rows, classes)), classes)
    if "factored" in loss:
        ids = torch.arange(rows)[:, None]
        targets = FactoredTargets(
            torch.ones(rows, 2), torch.randn(2, classes), torch.zeros(classes), ids, torch.ones(rows, 1)
        )
    hidden = torch.randn(rows, width, requires_grad=True)
    weight = torch.randn(classes, width, requires_grad=True)
    bias = torch.zeros(classes, requires_grad=True)
    labels = torch.arange(rows)

    def step() -> None:
        if loss == "labels":
            value = linear_cross_entropy(hidden, weight, labels, bias=bias, chunk_rows=chunk_rows, reduction=reduction)
        else:
            value = linear_kl_divergence(
                hidden,
                weight,
                targets,
                bias=bias,
                temperature=2.0,
                labels=labels if "labels" in loss else None,
                chunk_rows=chunk_rows,
                reduction=reduction,
            )
        value.sum().backward()

    assert weight.numel() == largest_tensor(step)
    assert weight.numel() < rows * classes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden": torch.zeros(5, 4)}, r"hidden and weight are \(5, 4\) and \(7, 3\); expected \(N, D\) and \(C, D\)"),
        ({"weight": torch.zeros(3)}, r"hidden and weight are \(5, 3\) and \(3,\)"),
        ({"bias": torch.zeros(6)}, r"the bias is \(6,\); expected \(7,\), one value for each class"),
        ({"labels": torch.zeros(4)}, r"labels are \(4,\); expected \(5,\), one for each row"),
        ({"targets": sparse(rows=4)}, r"the head gives logits of \(5, 7\), the teacher's are \(4, 7\)"),
        ({"targets": torch.zeros(5, 8)}, r"the head gives logits of \(5, 7\), the teacher's are \(5, 8\)"),
        ({"mask": torch.ones(4, dtype=torch.bool)}, r"the mask is \(4,\); expected \(5,\)"),
    ],
)
def test_shapes_that_do_not_agree_are_refused(changes: dict[str, Any], message: str) -> None:
    arguments = {
        "hidden": torch.zeros(ROWS, WIDTH),
        "weight": torch.zeros(CLASSES, WIDTH),
        "targets": sparse(),
        **changes,
    }
    with pytest.raises(ShapeError, match=message):
        linear_kl_divergence(**arguments)


@pytest.mark.parametrize("label", [-1, CLASSES])
def test_a_label_that_is_no_class_is_refused_unless_its_row_is_masked(label: int) -> None:
    hidden, weight, labels = torch.ones(ROWS, WIDTH), torch.ones(CLASSES, WIDTH), torch.tensor([0, -100, label, 1, 2])
    mask = torch.tensor([True, True, False, True, True])
    message = f"row 2 has the label {label}; expected 0 to 6, or -100 for a row without a label"

    with pytest.raises(UsageError, match=message):
        linear_kl_divergence(hidden, weight, sparse(), labels=labels)
    with pytest.raises(UsageError, match=message):
        linear_cross_entropy(hidden, weight, labels)
    assert linear_cross_entropy(hidden, weight, labels, mask=mask).isfinite()
    assert linear_kl_divergence(hidden, weight, sparse(), labels=labels, mask=mask).isfinite()


def test_a_chunk_of_no_rows_is_refused() -> None:
    with pytest.raises(UsageError, match="chunk_rows is at least 1, not 0"):
        linear_kl_divergence(torch.zeros(5, 3), torch.zeros(7, 3), sparse(), chunk_rows=0)


def test_an_unknown_reduction_is_refused() -> None:
    with pytest.raises(UsageError, match="reduction is 'none', 'mean' or 'sum', not 'average'"):
        linear_kl_divergence(torch.zeros(5, 3), torch.zeros(7, 3), sparse(), reduction="average")  # type: ignore[arg-type]
