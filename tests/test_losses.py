"""Losses against numbers that were worked out elsewhere."""

import math

import pytest
import torch

from logitcache.errors import ShapeError, UsageError
from logitcache.losses import LOSSES, Loss, kl_divergence, loss_from_config, soft_cross_entropy

STUDENT = torch.tensor([[1.0, 2.0, 0.5], [0.0, 0.0, 0.0]])
TEACHER = torch.tensor([[2.0, 1.0, 0.0], [1.0, 1.0, 1.0]])
TARGET = torch.tensor([1, 2])


def softmax(row: list[float], temperature: float) -> list[float]:
    powers = [math.exp(value / temperature) for value in row]
    return [power / sum(powers) for power in powers]


def reference_kl(student: list[float], teacher: list[float], temperature: float) -> float:
    p, q = softmax(teacher, temperature), softmax(student, temperature)
    return temperature**2 * sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
def test_kl_is_teacher_against_student_times_the_temperature_squared(temperature: float) -> None:
    pairs = zip(STUDENT.tolist(), TEACHER.tolist(), strict=True)
    expected = [reference_kl(student, teacher, temperature) for student, teacher in pairs]

    torch.testing.assert_close(kl_divergence(STUDENT, TEACHER, temperature=temperature), torch.tensor(expected))


def test_the_temperature_squared_keeps_the_size_of_the_gradient() -> None:
    """Without it the gradient would shrink by T²: here by 10 000."""

    def gradient(temperature: float) -> float:
        student = STUDENT[:1].clone().requires_grad_()
        kl_divergence(student, TEACHER[:1], temperature=temperature).sum().backward()
        assert student.grad is not None
        return float(student.grad.norm())

    assert 0.3 < gradient(100.0) / gradient(1.0) < 3.0


def test_soft_cross_entropy_exceeds_kl_by_the_teachers_entropy() -> None:
    p = (TEACHER / 2).softmax(dim=1)
    entropy = -(p * p.log()).sum(dim=1)

    expected = kl_divergence(STUDENT, TEACHER, temperature=2) + 4 * entropy
    torch.testing.assert_close(soft_cross_entropy(STUDENT, TEACHER, temperature=2), expected)


def test_hard_labels_of_the_teacher_and_true_labels_are_different_things() -> None:
    by_teacher = LOSSES["teacher_label"]()(STUDENT, TEACHER, TARGET)
    by_truth = LOSSES["true_label"]()(STUDENT, TEACHER, TARGET)

    assert -math.log(softmax([1.0, 2.0, 0.5], 1)[0]) == pytest.approx(float(by_teacher[0]), rel=1e-6)
    assert -math.log(softmax([1.0, 2.0, 0.5], 1)[1]) == pytest.approx(float(by_truth[0]), rel=1e-6)


def test_the_two_blends_are_those_of_the_sources() -> None:
    kl = kl_divergence(STUDENT, TEACHER, temperature=3)
    truth = LOSSES["true_label"]()(STUDENT, TEACHER, TARGET)
    plus = loss_from_config({"name": "hard_plus_soft", "weight": 0.5, "temperature": 3})
    blend = loss_from_config({"name": "blend", "alpha": 0.9, "temperature": 3})

    torch.testing.assert_close(plus(STUDENT, TEACHER, TARGET), truth + 0.5 * kl)
    torch.testing.assert_close(blend(STUDENT, TEACHER, TARGET), 0.9 * kl + 0.1 * truth)


def test_a_mixed_target_is_a_mixture_of_losses() -> None:
    loss = LOSSES["true_label"]()
    mixed = loss(STUDENT[:1], None, torch.tensor([[0.3, 0.7, 0.0]]))

    parts = [loss(STUDENT[:1], None, torch.tensor([label])) for label in (0, 1)]
    torch.testing.assert_close(mixed, 0.3 * parts[0] + 0.7 * parts[1])


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_agree_with_finite_differences(name: str) -> None:
    loss = LOSSES[name]()
    student = torch.randn(3, 5, dtype=torch.float32, generator=torch.Generator().manual_seed(1))
    teacher = torch.randn(3, 5, generator=torch.Generator().manual_seed(2))
    target = torch.tensor([0, 3, 4])
    student.requires_grad_()
    (analytic,) = torch.autograd.grad(loss(student, teacher, target).sum(), student)
    step = 1e-2
    for place in [(0, 0), (1, 3), (2, 4)]:
        bump = torch.zeros_like(student)
        bump[place] = step
        with torch.no_grad():
            rise = loss(student + bump, teacher, target).sum() - loss(student - bump, teacher, target).sum()
        assert float(rise) / (2 * step) == pytest.approx(float(analytic[place]), abs=2e-3)


@pytest.mark.parametrize("name", ["kl", "soft_cross_entropy"])
def test_a_class_that_the_teacher_masks_gives_no_nan(name: str) -> None:
    masked = torch.tensor([[2.0, 1.0, -math.inf]])
    student = STUDENT[:1].clone().requires_grad_()
    loss = LOSSES[name]()(student, masked, TARGET[:1])
    loss.sum().backward()

    assert torch.isfinite(loss).all()
    assert student.grad is not None
    assert torch.isfinite(student.grad).all()


def test_a_teacher_learns_nothing_from_itself() -> None:
    assert kl_divergence(TEACHER, TEACHER, temperature=3).abs().max() < 1e-6


def test_logits_of_different_shapes_are_refused() -> None:
    with pytest.raises(ShapeError, match=r"student's logits are \(2, 3\), the teacher's \(2, 2\)"):
        kl_divergence(STUDENT, TEACHER[:, :2])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        pytest.param("mse", "unknown loss 'mse'; expected one of: kl", id="unknown"),
        pytest.param({"name": "kl", "T": 2}, "no parameter 'T'; it has: temperature", id="parameter"),
        pytest.param({"name": "kl", "temperature": 0}, "a temperature is positive", id="temperature"),
        pytest.param({"name": "blend", "alpha": 2}, "alpha lies between 0 and 1", id="alpha"),
    ],
)
def test_a_wrong_loss_says_what_is_wrong(config: object, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        loss_from_config(config)  # type: ignore[arg-type]


def test_a_loss_without_its_teacher_says_so() -> None:
    loss: Loss = LOSSES["kl"]()
    with pytest.raises(UsageError, match="needs the teacher's logits"):
        loss(STUDENT, None, TARGET)
