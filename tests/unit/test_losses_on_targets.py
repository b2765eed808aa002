"""Losses on targets: the values and gradients of the dense computation on what the targets stand for."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from logitcache import DenseTargets, Sampled, SparseTargets, TopK
from logitcache.errors import ShapeError, UsageError
from logitcache.losses import (
    Loss,
    cross_entropy,
    jensen_shannon,
    kl_divergence,
    linear_kl_divergence,
    loss_from_config,
    soft_cross_entropy,
    teacher_argmax_cross_entropy,
    teacher_for,
)
from logitcache.targets import Targets
from logitcache.testing import teacher_like
from tests.largest import largest_tensor
from tests.unit.test_targets import CLASSES, factored, random, sparse

# B rows, C classes

SOFT: dict[str, Callable[..., Tensor]] = {
    "kl": kl_divergence,
    "soft_cross_entropy": soft_cross_entropy,
    "js": jensen_shannon,
}


def no_tail() -> SparseTargets:
    targets = sparse()
    return SparseTargets(targets.ids, targets.log_probs, torch.full_like(targets.tail, -math.inf), CLASSES)


TARGETS: dict[str, Targets] = {
    "even tail": sparse(),
    "shaped tail": sparse(shaped=True),
    "no tail": no_tail(),
    "one class without an entry": sparse(entries=CLASSES - 1),
    "one class without an entry, shaped": sparse(entries=CLASSES - 1, shaped=True),
    "factored": factored(),
}


def student(rows: int = 5) -> Tensor:
    return (2 * random(rows, CLASSES, seed=9)).requires_grad_()


def with_gradient(loss: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    logits = student()
    value_B = loss(logits)
    (gradient,) = torch.autograd.grad((value_B * torch.arange(1.0, 1 + value_B.numel())).sum(), logits)
    return value_B.detach(), gradient


@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("name", SOFT)
class TestSoftLosses:
    def test_value_and_gradient_are_those_of_the_dense_distribution(
        self, name: str, targets: str, temperature: float
    ) -> None:
        loss, teacher = SOFT[name], TARGETS[targets]
        found = with_gradient(lambda logits: loss(logits, teacher, temperature=temperature))
        expected = with_gradient(lambda logits: loss(logits, teacher.dense(), temperature=temperature))

        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)

    def test_gradients_agree_with_finite_differences(self, name: str, targets: str, temperature: float) -> None:
        loss, teacher = SOFT[name], TARGETS[targets]

        assert torch.autograd.gradcheck(
            lambda logits: loss(logits, teacher, temperature=temperature), (student(),), fast_mode=True
        )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", SOFT)
def test_halves_are_computed_in_float32(name: str, dtype: torch.dtype) -> None:
    logits = student().detach().to(dtype).requires_grad_()
    targets = SparseTargets(*(each if each.dtype == torch.int64 else each.float() for each in parts(sparse())), CLASSES)
    loss = SOFT[name](logits, targets)
    loss.sum().backward()

    assert (torch.float32, dtype) == (loss.dtype, logits.grad.dtype)  # type: ignore[union-attr]
    expected = SOFT[name](logits.detach().double(), sparse())
    torch.testing.assert_close(loss, expected.float(), rtol=1e-5, atol=1e-5)


def parts(targets: SparseTargets) -> tuple[Tensor, Tensor, Tensor]:
    return targets.ids, targets.log_probs, targets.tail


@pytest.mark.parametrize("name", SOFT)
def test_many_classes_lose_no_precision(name: str) -> None:
    """A sum over 150 000 classes of the tail, in float32."""
    logits = teacher_like(4, 151_936)
    encoding = TopK(k=16, dtype="float32")
    targets = encoding.targets(encoding.encode(teacher_like(4, 151_936, seed=1)), 151_936)
    for temperature in (1.0, 4.0):
        found = SOFT[name](logits, targets, temperature=temperature)
        exact = SOFT[name](logits.double(), targets.dense().double(), temperature=temperature)

        torch.testing.assert_close(found, exact.float(), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", SOFT)
def test_sparse_targets_are_never_expanded(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the student, only its logits and their gradient have (rows, C) values; the rest is computed in chunks."""
    monkeypatch.setattr("logitcache.targets.VALUES_AT_ONCE", {"cpu": 2000})
    rows, classes = 40, 1000
    encoding = TopK(k=8)
    targets = encoding.targets(encoding.encode(teacher_like(rows, classes)), classes)
    logits = torch.zeros(rows, classes, requires_grad=True)

    assert largest_tensor(lambda: SOFT[name](logits, targets, temperature=2.0)) == 2000
    loss = SOFT[name](logits, targets, temperature=2.0).sum()
    assert largest_tensor(loss.backward) == rows * classes


class TestMask:
    @pytest.mark.parametrize(
        "teacher", [random(5, CLASSES, seed=3), sparse(), factored(), DenseTargets(random(5, CLASSES))]
    )
    @pytest.mark.parametrize("loss", [*SOFT.values(), teacher_argmax_cross_entropy])
    def test_rows_that_do_not_count_are_left_out(self, loss: Callable[..., Tensor], teacher: Tensor | Targets) -> None:
        mask = torch.tensor([True, False, True, True, False])
        logits = student()
        all_B = loss(logits, teacher).detach()
        spoilt = logits.detach().masked_fill(~mask[:, None], math.nan).requires_grad_()

        torch.testing.assert_close(loss(spoilt, teacher, mask=mask), all_B * mask)
        torch.testing.assert_close(loss(spoilt, teacher, mask=mask, reduction="sum"), all_B[mask].sum())
        mean = loss(spoilt, teacher, mask=mask, reduction="mean")
        torch.testing.assert_close(mean, all_B[mask].mean())
        mean.backward()
        assert spoilt.grad is not None
        assert torch.equal(spoilt.grad[~mask], torch.zeros(2, CLASSES, dtype=torch.float64))
        assert spoilt.grad[mask].abs().sum() > 0

    @pytest.mark.parametrize("loss", [*SOFT.values(), teacher_argmax_cross_entropy])
    def test_the_mean_of_no_rows_is_0(self, loss: Callable[..., Tensor]) -> None:
        logits = student()
        mean = loss(logits, sparse(), mask=torch.zeros(5, dtype=torch.bool), reduction="mean")
        mean.backward()

        assert float(mean.detach()) == 0.0
        assert torch.equal(logits.grad, torch.zeros_like(logits))  # type: ignore[arg-type]

    def test_labels_of_rows_that_do_not_count(self) -> None:
        logits, labels = student(), torch.tensor([0, -100, 2, 3, -100])
        mask = torch.tensor([True, True, False, True, True])
        loss_B = cross_entropy(logits, labels)

        assert torch.equal(torch.tensor([True, False, True, True, False]), loss_B > 0)
        torch.testing.assert_close(cross_entropy(logits, labels, reduction="mean"), loss_B.sum() / 3)
        found = cross_entropy(logits, labels, mask=mask, reduction="mean")
        torch.testing.assert_close(found, (loss_B[0] + loss_B[3]) / 2)

    def test_another_mask_is_refused(self) -> None:
        with pytest.raises(ShapeError, match=r"the mask is \(4,\); expected \(5,\)"):
            kl_divergence(student(), sparse(), mask=torch.ones(4, dtype=torch.bool))
        with pytest.raises(UsageError, match=r"the mask is torch\.int64; expected torch\.bool"):
            kl_divergence(student(), sparse(), mask=torch.ones(5, dtype=torch.int64))


def test_dense_targets_give_the_bits_of_their_logits() -> None:
    logits, teacher = student().float(), random(5, CLASSES, dtype=torch.float32)
    for loss in (*SOFT.values(), teacher_argmax_cross_entropy):
        assert torch.equal(loss(logits, teacher), loss(logits, DenseTargets(teacher)))


def test_the_expected_gradient_of_sampled_targets_is_that_of_the_full_distribution() -> None:
    """RS-KD: cross-entropy to the draws; within 4σ."""
    builds, classes = 4000, 30
    logits = random(1, classes, dtype=torch.float32).expand(builds, -1)
    encoding = Sampled(draws=10)
    targets = encoding.targets(encoding.encode(logits), classes)
    of_student = random(1, classes, seed=1, dtype=torch.float32).expand(builds, -1).clone().requires_grad_()
    soft_cross_entropy(of_student, targets).sum().backward()
    assert of_student.grad is not None
    full = of_student.detach()[0].softmax(dim=0) - logits[0].softmax(dim=0)
    sigma = of_student.grad.std(dim=0) / builds**0.5

    assert ((of_student.grad.mean(dim=0) - full).abs() <= 4 * sigma + 1e-6).all()


def test_the_arg_max_of_sparse_targets() -> None:
    targets, logits = sparse(shaped=True), student()
    expected = teacher_argmax_cross_entropy(logits, targets.dense())

    torch.testing.assert_close(teacher_argmax_cross_entropy(logits, targets), expected)


def test_standardised_losses_expand_targets() -> None:
    for loss in (kl_divergence, soft_cross_entropy):
        expected = loss(student(), sparse(shaped=True).dense(), standardise=True)
        torch.testing.assert_close(loss(student(), sparse(shaped=True), standardise=True), expected)


@pytest.mark.parametrize(
    ("config", "takes"),
    [
        ("kl", True),
        ("soft_cross_entropy", True),
        ("js", True),
        ("teacher_argmax", True),
        ("cross_entropy", True),
        ("hard_plus_soft", True),
        ({"name": "blend", "hard": "teacher_argmax"}, True),
        ({"name": "weighted", "parts": [{"loss": "kl"}, {"loss": "logit_mse"}]}, True),
        ({"stages": [{"until": 0.5, "loss": "kl"}, {"loss": "cross_entropy"}]}, True),
        ({"stages": [{"until": 0.5, "loss": "kl"}, {"loss": "dist"}]}, False),
        ("logit_mse", False),
        ("dkd", False),
        ("dist", False),
        ("rkd", False),
        ({"name": "weighted", "parts": [{"loss": "dist"}, {"loss": "logit_mse"}]}, False),
    ],
    ids=str,
)
def test_a_configured_loss_on_targets_is_that_on_their_logits(config: Any, takes: bool) -> None:
    loss: Loss = loss_from_config(config)
    labels = torch.tensor([0, 3, 6, 2, 2])
    targets = sparse(shaped=True)
    targets.tail[1], targets.log_probs[2, 0] = -1.0, -2.0  # `rkd` takes no masked classes
    targets.ids[0, 1] = next(c for c in range(CLASSES) if c not in targets.ids[0])
    targets.log_probs[0, 1] = -1.0
    now = loss.at(0.25)

    assert takes == loss.takes_targets
    found = now(student(), teacher_for(now, targets), labels)
    torch.testing.assert_close(found, now(student(), targets.dense(), labels))


@pytest.mark.parametrize("temperature", [0, -1.0, math.nan, math.inf])
@pytest.mark.parametrize("loss", [kl_divergence, soft_cross_entropy, jensen_shannon])
def test_a_temperature_that_is_not_positive_is_refused(loss: Callable[..., Tensor], temperature: float) -> None:
    for targets in (sparse(), sparse().dense()):
        with pytest.raises(UsageError, match=f"a temperature is positive and finite, not {temperature}"):
            loss(student(), targets, temperature=temperature)
    with pytest.raises(UsageError, match="a temperature is positive and finite"):
        linear_kl_divergence(torch.zeros(5, 3), torch.zeros(7, 3), sparse(), temperature=temperature)


def test_shapes_that_differ_are_refused() -> None:
    with pytest.raises(ShapeError, match=r"student's logits are \(5, 7\), the teacher's \(4, 7\)"):
        kl_divergence(student(), sparse(rows=4))
