"""Losses against numbers that were worked out elsewhere, and what every loss owes."""

import inspect
import math
from typing import Any

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch
from torch import Tensor

from logitcache import losses
from logitcache.errors import ShapeError, UsageError
from logitcache.losses import (
    LOSSES,
    Loss,
    Schedule,
    decoupled_kd,
    dist,
    jensen_shannon,
    kl_divergence,
    logit_mse,
    loss_from_config,
    rkd,
    soft_cross_entropy,
    standardised,
)
from logitcache.losses.hard import STANDARDISABLE

# B batch, C classes

STUDENT = torch.tensor([[1.0, 2.0, 0.5], [0.0, 0.0, 0.0]])
TEACHER = torch.tensor([[2.0, 1.0, 0.0], [1.0, 1.0, 1.0]])
TARGET = torch.tensor([1, 2])

CASES: dict[str, Any] = {
    "kl": {"name": "kl", "temperature": 2.0},
    "kl-standardised": {"name": "kl", "temperature": 2.0, "standardise": True},
    "soft_cross_entropy": {"name": "soft_cross_entropy", "temperature": 3.0},
    "soft_cross_entropy-standardised": {"name": "soft_cross_entropy", "standardise": True},
    "js": {"name": "js", "temperature": 2.0},
    "logit_mse": "logit_mse",
    "dkd": "dkd",
    "dkd-as-kd": {"name": "dkd", "beta": "kd", "temperature": 2.0},
    "dkd-standardised": {"name": "dkd", "standardise": True},
    "dist": {"name": "dist", "temperature": 2.0},
    "rkd": "rkd",
    "teacher_argmax": "teacher_argmax",
    "cross_entropy": {"name": "cross_entropy", "label_smoothing": 0.1},
    "hard_plus_soft": "hard_plus_soft",
    "blend": {"name": "blend", "hard": "teacher_argmax"},
    "weighted": {"name": "weighted", "parts": [{"loss": "cross_entropy"}, {"loss": "dist", "weight": 2.0}]},
    "stages": {"stages": [{"until": 0.5, "loss": "kl"}, {"loss": "cross_entropy"}]},
}
DIVERGENCES = ["kl", "kl-standardised", "js", "logit_mse", "dkd", "dkd-as-kd", "dkd-standardised", "dist", "rkd"]
"""Those that are 0 where student and teacher agree."""


def some(name: str) -> Loss:
    return loss_from_config(CASES[name]).at(0.25)


def logits(seed: int, shape: tuple[int, int] = (6, 5), dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed)) * 2


def labels(num_rows: int = 6, num_classes: int = 5) -> Tensor:
    return torch.arange(num_rows) * 3 % num_classes


def test_every_loss_is_among_the_cases() -> None:
    named = {config if isinstance(config, str) else config.get("name", "stages") for config in CASES.values()}

    assert set(LOSSES) == named


@pytest.mark.parametrize("name", CASES)
class TestEveryLoss:
    """The contract."""

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
    def test_gives_one_float32_a_sample_and_computes_halves_in_float32(self, name: str, dtype: torch.dtype) -> None:
        student, teacher = logits(1).to(dtype), logits(2).to(dtype)
        found = some(name)(student, teacher.float(), labels())

        assert (torch.float32, (6,)) == (found.dtype, found.shape)
        expected = some(name)(student.double(), teacher.double(), labels())
        torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=1e-5)

    def test_gradients_agree_with_finite_differences(self, name: str) -> None:
        loss, teacher = some(name), logits(2)
        student = logits(1).requires_grad_()

        assert torch.autograd.gradcheck(lambda student_BC: loss(student_BC, teacher, labels()), (student,))

    def test_gradients_of_a_mixed_target_agree_with_finite_differences(self, name: str) -> None:
        loss, teacher = some(name), logits(2)
        student, mixed = logits(1).requires_grad_(), logits(3).softmax(dim=1)

        assert torch.autograd.gradcheck(lambda student_BC: loss(student_BC, teacher, mixed), (student,))

    def test_a_constant_added_to_a_row_does_not_show(self, name: str) -> None:
        """Cached logits are right only up to that."""
        student, teacher = logits(1), logits(2)
        of_student, of_teacher = logits(3)[:, :1] * 5, logits(4)[:, :1] * 5

        expected = some(name)(student, teacher, labels())
        torch.testing.assert_close(some(name)(student + of_student, teacher + of_teacher, labels()), expected)

    @pytest.mark.parametrize("start", ["zero", "the teacher"])
    def test_gradients_are_bounded_where_a_student_starts(self, name: str, start: str) -> None:
        """A head of zeros gives constant rows; a copy of the teacher sits where distances are not smooth."""
        teacher = logits(2, dtype=torch.float32)
        student = (torch.zeros_like(teacher) if start == "zero" else teacher.clone()).requires_grad_()
        loss = some(name)(student, teacher, labels())
        loss.mean().backward()

        assert torch.isfinite(loss).all()
        assert student.grad is not None
        assert float(student.grad.abs().max()) < 2000

    def test_extreme_logits_give_finite_numbers(self, name: str) -> None:
        student = (logits(1, dtype=torch.float32) * 1e4).requires_grad_()
        loss = some(name)(student, logits(2, dtype=torch.float32) * 1e4, labels())
        loss.mean().backward()

        assert torch.isfinite(loss).all()
        assert student.grad is not None
        assert torch.isfinite(student.grad).all()

    def test_one_sample_is_a_batch(self, name: str) -> None:
        student = logits(1, (1, 5)).requires_grad_()
        loss = some(name)(student, logits(2, (1, 5)), labels(1))
        loss.sum().backward()

        assert (1,) == loss.shape
        assert torch.isfinite(loss).all()
        assert student.grad is not None
        assert torch.isfinite(student.grad).all()

    def test_a_class_that_the_teacher_masks_gives_no_nan(self, name: str) -> None:
        """Among them the true one, and all but one: `Sampled` stores such rows."""
        student = logits(1).requires_grad_()
        teacher = logits(2)
        teacher[0, 1] = teacher[1, labels()[1]] = teacher[2, :4] = teacher[3, 1:] = -math.inf
        if name == "rkd":
            with pytest.raises(UsageError, match=r"the teacher masks some classes by -inf.*use Dense, LowRank or TopK"):
                some(name)(student, teacher, labels())
            return
        loss = some(name)(student, teacher, labels())
        loss.sum().backward()

        assert torch.isfinite(loss).all()
        assert student.grad is not None
        assert torch.isfinite(student.grad).all()

    def test_a_loss_that_takes_a_teacher_says_that_it_has_none(self, name: str) -> None:
        loss = some(name)
        if not loss.needs_teacher:
            assert torch.isfinite(loss(logits(1), None, labels())).all()
            return
        with pytest.raises(UsageError, match="needs the teacher's logits"):
            loss(logits(1), None, labels())

    def test_logits_of_different_shapes_are_refused(self, name: str) -> None:
        if not some(name).needs_teacher:
            return
        with pytest.raises(ShapeError, match=r"student's logits are \(6, 5\), the teacher's \(6, 4\)"):
            some(name)(logits(1), logits(2)[:, :4], labels())


@pytest.mark.parametrize("name", DIVERGENCES)
def test_a_divergence_is_0_where_student_and_teacher_agree_and_above_0_elsewhere(name: str) -> None:
    teacher = logits(2)

    assert some(name)(teacher, teacher, labels()).abs().max() < 1e-12
    assert some(name)(logits(1), teacher, labels()).mean() > 1e-3


@pytest.mark.parametrize("name", [name for name in DIVERGENCES if name != "rkd"])
def test_divergences_of_masked_rows_are_0_where_the_student_agrees(name: str) -> None:
    """A student can't be at -inf, but so far below that it has no probability, where that is what is compared."""
    teacher = logits(2)
    teacher[:, 1] = -math.inf
    student = teacher.masked_fill(teacher == -math.inf, -1e4)
    if "standardised" in name:
        with_mask = standardised(teacher)
        torch.testing.assert_close(with_mask[:, [0, 2, 3, 4]], standardised(teacher[:, [0, 2, 3, 4]]))
        return

    assert some(name)(student, teacher, torch.tensor([0, 2, 3, 4, 0, 2])).abs().max() < 1e-6


# References: the papers' formulas, written out in NumPy.


def softmax(logits_BC: Tensor, temperature: float) -> np.ndarray:
    return np.asarray(scipy.special.softmax(logits_BC.numpy() / temperature, axis=1))


def divergence(p_BC: np.ndarray, q_BC: np.ndarray) -> np.ndarray:
    return np.asarray(scipy.special.rel_entr(p_BC, q_BC).sum(axis=1))


@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
def test_kl_is_teacher_against_student_times_the_temperature_squared(temperature: float) -> None:
    expected = temperature**2 * divergence(softmax(TEACHER, temperature), softmax(STUDENT, temperature))

    found = kl_divergence(STUDENT, TEACHER, temperature=temperature)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5, atol=1e-7)


def test_kl_of_two_classes_is_what_one_gets_by_hand() -> None:
    """A teacher of (3/4, 1/4), a student of (1/2, 1/2): 3/4 ln(3/2) + 1/4 ln(1/2)."""
    teacher = torch.tensor([[math.log(3.0), 0.0]], dtype=torch.float64)

    expected = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert expected == pytest.approx(float(kl_divergence(torch.zeros_like(teacher), teacher)), rel=1e-12)


def test_the_temperature_squared_keeps_the_size_of_the_gradient() -> None:
    """Without it the gradient would shrink by T²: here by 10 000."""

    def gradient(temperature: float) -> float:
        student = STUDENT[:1].clone().requires_grad_()
        kl_divergence(student, TEACHER[:1], temperature=temperature).sum().backward()
        assert student.grad is not None
        return float(student.grad.norm())

    assert 0.3 < gradient(100.0) / gradient(1.0) < 3.0


def test_soft_cross_entropy_exceeds_kl_by_the_teachers_entropy() -> None:
    entropy = scipy.stats.entropy(softmax(TEACHER, 2.0), axis=1)

    expected = kl_divergence(STUDENT, TEACHER, temperature=2).numpy() + 4 * entropy
    np.testing.assert_allclose(soft_cross_entropy(STUDENT, TEACHER, temperature=2).numpy(), expected, rtol=1e-5)


def test_jensen_shannon_is_the_mean_divergence_to_the_average() -> None:
    p, q = softmax(logits(2), 3.0), softmax(logits(1), 3.0)

    expected = 9 * 0.5 * (divergence(p, (p + q) / 2) + divergence(q, (p + q) / 2))
    np.testing.assert_allclose(jensen_shannon(logits(1), logits(2), temperature=3.0).numpy(), expected, rtol=1e-10)


def test_jensen_shannon_is_symmetric_and_at_most_the_logarithm_of_2() -> None:
    student, teacher = logits(1) * 1000, logits(2) * 1000
    found = jensen_shannon(student, teacher)

    torch.testing.assert_close(found, jensen_shannon(teacher, student))
    assert float(found.max()) == pytest.approx(math.log(2.0), abs=1e-9)


def test_logit_mse_is_of_rows_with_mean_0() -> None:
    student, teacher = logits(1).numpy(), logits(2).numpy()
    gap = (student - student.mean(axis=1, keepdims=True)) - (teacher - teacher.mean(axis=1, keepdims=True))

    np.testing.assert_allclose(logit_mse(logits(1), logits(2)).numpy(), (gap**2).mean(axis=1), rtol=1e-12)


def test_kl_at_a_high_temperature_is_half_of_logit_mse() -> None:
    """Hinton et al. 2015, equation 4, in this library's units: T² KL -> variance of the difference / 2."""
    expected = logit_mse(logits(1), logits(2)) / 2

    torch.testing.assert_close(kl_divergence(logits(1), logits(2), temperature=1e4), expected, rtol=1e-3, atol=1e-4)


def test_standardised_rows_are_z_scores() -> None:
    np.testing.assert_allclose(standardised(logits(1)).numpy(), scipy.stats.zscore(logits(1).numpy(), axis=1))


@pytest.mark.parametrize("name", ["kl-standardised", "soft_cross_entropy-standardised", "dkd-standardised"])
def test_the_size_of_standardised_logits_does_not_show(name: str) -> None:
    """Sun et al. 2024: any positive scale of any row, on either side."""
    scale = logits(3)[:, :1].exp()

    expected = some(name)(logits(1), logits(2), labels())
    torch.testing.assert_close(some(name)(logits(1) * scale, logits(2) / scale, labels()), expected)


def test_kl_of_standardised_logits_is_kl_of_z_scores() -> None:
    student, teacher = (torch.from_numpy(scipy.stats.zscore(logits(seed).numpy(), axis=1)) for seed in (1, 2))

    expected = 4 * divergence(softmax(teacher, 2.0), softmax(student, 2.0))
    np.testing.assert_allclose(some("kl-standardised")(logits(1), logits(2), labels()).numpy(), expected, rtol=1e-9)


def reference_dkd(temperature: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """TCKD, NCKD and the teacher's 1 - p_t, row by row from probabilities."""
    p_BC, q_BC = softmax(logits(2), temperature), softmax(logits(1), temperature)
    tckd, nckd, rest = [], [], []
    for p, q, target in zip(p_BC, q_BC, labels().tolist(), strict=True):
        others = [label for label in range(5) if label != target]
        pt, qt = p[target], q[target]
        tckd.append(pt * math.log(pt / qt) + (1 - pt) * math.log((1 - pt) / (1 - qt)))
        nckd.append(sum(p[c] / (1 - pt) * math.log(p[c] / (1 - pt) * (1 - qt) / q[c]) for c in others))
        rest.append(1 - pt)
    return np.array(tckd), np.array(nckd), np.array(rest)


def test_dkd_weighs_the_target_and_the_other_classes_apart() -> None:
    tckd, nckd, _ = reference_dkd(3.0)

    found = decoupled_kd(logits(1), logits(2), labels(), alpha=1.5, beta=4.0, temperature=3.0)
    np.testing.assert_allclose(found.numpy(), 9 * (1.5 * tckd + 4.0 * nckd), rtol=1e-10)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_dkd_with_the_weights_of_kd_is_kd(temperature: float) -> None:
    """And its gradient; the reference's sum says the same, so that it is not two errors that agree."""
    student = logits(1).requires_grad_()
    found = decoupled_kd(student, logits(2), labels(), alpha=1.0, beta="kd", temperature=temperature)
    expected = kl_divergence(student, logits(2), temperature=temperature)
    tckd, nckd, rest = reference_dkd(temperature)

    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(found.detach().numpy(), temperature**2 * (tckd + rest * nckd), rtol=1e-10)
    (of_found,) = torch.autograd.grad(found.sum(), student)
    (of_expected,) = torch.autograd.grad(expected.sum(), student)
    torch.testing.assert_close(of_found, of_expected, rtol=1e-8, atol=1e-10)


def test_dkd_takes_the_dominant_class_of_a_mixed_target() -> None:
    mixed = torch.nn.functional.one_hot(labels(), 5) * 0.6 + 0.08

    torch.testing.assert_close(some("dkd")(logits(1), logits(2), mixed), some("dkd")(logits(1), logits(2), labels()))


def test_dkd_of_one_class_is_refused() -> None:
    with pytest.raises(ShapeError, match="expected at least two classes, found one"):
        decoupled_kd(STUDENT[:, :1], TEACHER[:, :1], torch.tensor([0, 0]))


def test_dist_is_pearsons_correlation_over_classes_and_over_the_batch() -> None:
    q, p = softmax(logits(1), 2.0), softmax(logits(2), 2.0)
    inter = np.array([1 - scipy.stats.pearsonr(q[row], p[row]).statistic for row in range(6)])
    intra = np.mean([1 - scipy.stats.pearsonr(q[:, label], p[:, label]).statistic for label in range(5)])

    found = dist(logits(1), logits(2), beta=1.5, gamma=0.5, temperature=2.0)
    np.testing.assert_allclose(found.numpy(), 4 * (1.5 * inter + 0.5 * intra), rtol=1e-10)


def test_dist_sees_no_linear_change_of_the_probabilities() -> None:
    """Huang et al. 2022, section 3: a relation is matched, not a value. A student less sure by half is as good."""
    teacher_p = logits(2).softmax(dim=1)
    student = (0.5 * teacher_p + 0.5 / 5).log()

    assert dist(student, logits(2)).abs().max() < 1e-12
    assert kl_divergence(student, logits(2)).mean() > 0.05


def test_dist_of_a_constant_teacher_says_nothing_and_of_a_constant_student_the_most() -> None:
    constant, other = torch.zeros(4, 5), logits(1, (4, 5), torch.float32)

    assert [0.0] * 4 == dist(other, constant).tolist()
    torch.testing.assert_close(dist(constant, other), torch.full((4,), 2.0))


def huber(gap: float) -> float:
    return 0.5 * gap**2 if abs(gap) < 1 else abs(gap) - 0.5


def reference_rkd(student: np.ndarray, teacher: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distance and angle parts of each sample, by loops over pairs and triplets."""
    rows = [values - values.mean(axis=1, keepdims=True) for values in (student, teacher)]
    num = len(student)
    distances = [np.linalg.norm(values[:, None] - values[None], axis=2) for values in rows]
    scaled = [values / values[values > 0].mean() for values in distances]

    def cosine(values: np.ndarray, vertex: int, one: int, other: int) -> float:
        first, second = values[one] - values[vertex], values[other] - values[vertex]
        size = float(np.linalg.norm(first) * np.linalg.norm(second))
        return float(first @ second) / size if size else 0.0

    by_pair = [np.mean([huber(scaled[0][i, j] - scaled[1][i, j]) for j in range(num)]) for i in range(num)]
    by_triplet = [
        np.mean([huber(cosine(rows[0], i, j, k) - cosine(rows[1], i, j, k)) for j in range(num) for k in range(num)])
        for i in range(num)
    ]
    return np.array(by_pair), np.array(by_triplet)


def test_rkd_is_hubers_loss_of_distances_and_angles() -> None:
    student, teacher = logits(1) * torch.arange(1, 7).unsqueeze(1), logits(2)
    by_pair, by_triplet = reference_rkd(student.numpy(), teacher.numpy())

    found = rkd(student, teacher, distance_weight=1.5, angle_weight=3.0)
    np.testing.assert_allclose(found.numpy(), 1.5 * by_pair + 3.0 * by_triplet, rtol=1e-9)


def test_rkd_sees_no_rotation_shift_or_scale_of_all_samples() -> None:
    """Park et al. 2019: relations, not places. The rotation keeps means of rows, which are taken away first."""
    basis, _ = np.linalg.qr(np.column_stack([np.ones(5), logits(3, (5, 4)).numpy()]))
    turn, _ = np.linalg.qr(logits(4, (4, 4)).numpy())
    rotation = torch.from_numpy(basis[:, 1:] @ turn @ basis[:, 1:].T)
    moved = logits(2) @ rotation * 3.0 + logits(5)[:1]

    assert rkd(moved, logits(2)).abs().max() < 1e-12


@pytest.mark.parametrize("num_samples", [1, 2, 3])
def test_rkd_of_fewer_than_three_samples_is_0(num_samples: int) -> None:
    """Of two, the one distance is its own mean, and there is no angle."""
    student, teacher = logits(1)[:num_samples], logits(2)[:num_samples]
    distance = rkd(student, teacher, angle_weight=0.0)
    angle = rkd(student, teacher, distance_weight=0.0)

    assert (distance.abs().max() > 1e-6) == (num_samples > 2)
    assert (angle.abs().max() > 1e-6) == (num_samples > 2)


def test_rkd_of_samples_at_one_place_is_finite() -> None:
    student = logits(1)[:1].expand(4, 5).clone().requires_grad_()
    rkd(student, logits(2)[:4]).sum().backward()

    assert student.grad is not None
    assert torch.isfinite(student.grad).all()


# Labels, blends


def test_hard_labels_of_the_teacher_and_true_labels_are_different_things() -> None:
    by_teacher = LOSSES["teacher_argmax"]()(STUDENT, TEACHER, TARGET)
    by_truth = LOSSES["cross_entropy"]()(STUDENT, TEACHER, TARGET)

    assert -math.log(softmax(STUDENT, 1)[0, 0]) == pytest.approx(float(by_teacher[0]), rel=1e-6)
    assert -math.log(softmax(STUDENT, 1)[0, 1]) == pytest.approx(float(by_truth[0]), rel=1e-6)


def test_the_two_blends_are_those_of_the_sources() -> None:
    kl = kl_divergence(STUDENT, TEACHER, temperature=3)
    truth = LOSSES["cross_entropy"]()(STUDENT, TEACHER, TARGET)
    plus = loss_from_config({"name": "hard_plus_soft", "weight": 0.5, "temperature": 3})
    blend = loss_from_config({"name": "blend", "alpha": 0.9, "temperature": 3})

    torch.testing.assert_close(plus(STUDENT, TEACHER, TARGET), truth + 0.5 * kl)
    torch.testing.assert_close(blend(STUDENT, TEACHER, TARGET), 0.9 * kl + 0.1 * truth)


def test_a_mixed_target_is_a_mixture_of_losses() -> None:
    loss = LOSSES["cross_entropy"]()
    mixed = loss(STUDENT[:1], None, torch.tensor([[0.3, 0.7, 0.0]]))

    parts = [loss(STUDENT[:1], None, torch.tensor([label])) for label in (0, 1)]
    torch.testing.assert_close(mixed, 0.3 * parts[0] + 0.7 * parts[1])


def test_a_weighted_sum_is_the_sum_of_its_weighted_parts() -> None:
    config = {"name": "weighted", "parts": [{"loss": "cross_entropy"}, {"loss": "dist", "weight": 2}, {"loss": "js"}]}
    found = loss_from_config(config)(logits(1), logits(2), labels())

    truth, relation, js = (LOSSES[name]() for name in ("cross_entropy", "dist", "js"))
    arguments = (logits(1), logits(2), labels())
    torch.testing.assert_close(found, truth(*arguments) + 2 * relation(*arguments) + js(*arguments))


# Configurations


@pytest.mark.parametrize(
    ("config", "message"),
    [
        pytest.param("huber", "unknown loss 'huber'; expected package.module:function or one of: kl", id="unknown"),
        pytest.param("logit_mes", "did you mean 'logit_mse'", id="nearly known"),
        pytest.param({"name": "kl", "T": 2}, "no parameter 'T'; it has: temperature", id="parameter"),
        pytest.param({"name": "kl", "temprature": 2}, "did you mean 'temperature'", id="nearly a parameter"),
        pytest.param({"name": "kl", 3: 2}, "no parameter 3", id="parameter that is no name"),
        pytest.param({"name": "kl", "temperature": 0}, "loss 'kl': a temperature is positive, not 0", id="temperature"),
        pytest.param({"name": "kl", "temperature": math.inf}, "a temperature is a number, not inf", id="infinite"),
        pytest.param({"name": "kl", "temperature": True}, "a temperature is a number, not True", id="boolean"),
        pytest.param({"name": "kl", "temperature": 10**400}, "a temperature is ", id="beyond floats"),
        pytest.param({"name": "kl", "standardise": "yes"}, "'standardise' is true or false", id="standardise"),
        pytest.param({"name": "blend", "alpha": 2}, "alpha lies between 0 and 1", id="alpha"),
        pytest.param({"name": "blend", "hard": "soft"}, "'hard' is 'cross_entropy' or 'teacher_argmax'", id="hard"),
        pytest.param({"name": "dkd", "beta": "kl"}, "beta is at least 0, or 'kd'", id="beta"),
        pytest.param({"name": "rkd", "angle_weight": -1}, "angle_weight is at least 0, not -1", id="weight"),
        pytest.param(["kl"], "a loss is a name or a mapping", id="list"),
        pytest.param({"name": "weighted"}, "'parts' is a list, not None", id="no parts"),
        pytest.param({"name": "weighted", "parts": []}, "has no parts", id="empty parts"),
        pytest.param({"name": "weighted", "parts": ["kl"]}, "a part is a mapping", id="bare part"),
        pytest.param({"name": "weighted", "parts": [{"weight": 1}]}, "a part has no loss", id="part without loss"),
        pytest.param(
            {"name": "weighted", "parts": [{"loss": "kl", "weigth": 1}]}, "did you mean 'weight'", id="part's key"
        ),
        pytest.param({"stages": []}, "'stages' is empty", id="no stages"),
        pytest.param({"stages": [{"until": 0.5}]}, "a stage has no loss", id="stage without loss"),
        pytest.param({"stages": [{"loss": "kl", "until": 0.5}]}, "the last stage ends at 0.5", id="unfinished stages"),
        pytest.param(
            {"stages": [{"loss": "kl", "until": 0.5}, {"loss": "js", "until": 0.5}, {"loss": "kl"}]},
            "stage 2 ends at 0.5 and the one before at 0.5",
            id="stages in no order",
        ),
        pytest.param({"stages": [{"loss": CASES["stages"]}]}, "can't stand within a stage", id="stages in stages"),
        pytest.param(
            {"name": "kl", "temperature": {"from": 4}}, "the schedule of 'temperature' lacks 'to'", id="half a schedule"
        ),
        pytest.param(
            {"name": "kl", "temperature": {"from": 4, "to": 0}}, "a temperature is positive, not 0", id="schedule's end"
        ),
        pytest.param({"name": "kl", "temperature": {"start": 4}}, "has no key 'start'", id="schedule's key"),
        pytest.param(
            {"name": "kl", "temperature": {"from": 4, "to": 1, "over": 0}}, "a share of training", id="schedule's over"
        ),
        pytest.param(
            {"name": "kl", "temperature": {"from": 4, "to": 1, "shape": "sawtooth"}},
            "one of: linear, cosine, step; not 'sawtooth'",
            id="schedule's shape",
        ),
    ],
)
def test_a_wrong_loss_says_what_is_wrong(config: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        loss_from_config(config)


def test_a_sum_that_holds_itself_is_refused() -> None:
    """YAML aliases can be written so."""
    config: dict[str, Any] = {"name": "weighted"}
    config["parts"] = [{"loss": config}]

    with pytest.raises(UsageError, match="can't stand within another"):
        loss_from_config(config)


def test_values_that_are_long_to_write_are_not_written_out() -> None:
    """A list of aliases to lists of aliases has 10**9 items."""
    bomb: list[Any] = ["x"]
    for _ in range(9):
        bomb = [bomb] * 10

    for config in (bomb, {"name": bomb}, {"name": "weighted", "parts": {"a": bomb}}):
        with pytest.raises(UsageError):
            loss_from_config(config)  # type: ignore[arg-type]
    for parameter in ("temperature", "standardise", "beta"):
        with pytest.raises(UsageError):
            loss_from_config({"name": "dkd", parameter: bomb})


# Schedules and stages


@pytest.mark.parametrize(
    ("shape", "expected"),
    [pytest.param("linear", [4.0, 3.25, 2.5, 1.0, 1.0], id="linear"), pytest.param("cosine", None, id="cosine")],
)
def test_a_schedule_goes_from_one_number_to_the_other_and_stays(shape: str, expected: list[float] | None) -> None:
    schedule = Schedule(start=4.0, end=1.0, over=0.5, shape=shape)
    expected = expected or [1.0 + 3.0 * (1 + math.cos(math.pi * share)) / 2 for share in (0, 0.25, 0.5, 1, 1)]

    assert expected == pytest.approx([schedule.at(progress) for progress in (0.0, 0.125, 0.25, 0.5, 1.0)])


def test_a_loss_follows_its_schedules() -> None:
    schedule = {"from": 4, "to": 1, "over": 0.5}
    soft = loss_from_config({"name": "kl", "temperature": schedule})
    total = loss_from_config({"name": "weighted", "parts": [{"loss": "js", "weight": {"from": 0, "to": 1}}]})

    assert loss_from_config({"name": "kl", "temperature": 2.5}) == soft.at(0.25)
    torch.testing.assert_close(total.at(0.25)(STUDENT, TEACHER, TARGET), 0.25 * jensen_shannon(STUDENT, TEACHER))


@pytest.mark.parametrize("name", [name for name in CASES if name != "stages"])
def test_a_loss_without_schedules_stays_itself(name: str) -> None:
    loss = loss_from_config(CASES[name])

    assert loss is loss.at(0.5)


def test_a_loss_that_changes_says_what_to_ask_for() -> None:
    changing = loss_from_config({"name": "kl", "temperature": {"from": 4, "to": 1}})

    for loss in (changing, loss_from_config(CASES["stages"])):
        with pytest.raises(UsageError, match=r"call `loss.at\(progress\)`"):
            loss(STUDENT, TEACHER, TARGET)


def test_stages_follow_each_other_and_their_schedules_run_within_them() -> None:
    changing = {"name": "kl", "temperature": {"from": 4, "to": 1}}
    loss = loss_from_config(
        {"stages": [{"until": 0.4, "loss": changing}, {"until": 0.8, "loss": "dist"}, {"loss": "cross_entropy"}]}
    )

    assert loss_from_config({"name": "kl", "temperature": 2.5}) == loss.at(0.2)
    assert ["kl", "dist", "dist", "cross_entropy", "cross_entropy"] == [
        loss.at(progress).name for progress in (0.39, 0.4, 0.79, 0.8, 1.0)
    ]
    assert loss.needs_teacher
    assert [True, True, False] == [loss.needs_teacher_during(*span) for span in ((0, 0.1), (0.7, 0.9), (0.8, 1.0))]


FUNCTIONS = {
    name: function
    for name, function in vars(losses).items()
    if inspect.isfunction(function) and "reduction" in inspect.signature(function).parameters
    if not name.startswith("linear_")  # of hidden states; tests/unit/test_linear_losses.py
}


def test_every_loss_function_takes_a_reduction() -> None:
    expected = {
        "attention_transfer", "cross_entropy", "decoupled_kd", "dist", "feature_mse", "feature_rkd", "jensen_shannon",
        "kl_divergence", "logit_mse", "rkd", "soft_cross_entropy", "teacher_argmax_cross_entropy",
    }  # fmt: skip

    assert expected == set(FUNCTIONS)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_reduction_is_the_mean_or_the_sum_of_the_losses_of_the_samples(name: str) -> None:
    student, teacher = torch.randn(2, 3, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    if name not in ("attention_transfer", "feature_mse", "feature_rkd"):
        student, teacher = student[:, :, 0, 0], teacher[:, :, 0, 0]
    second = torch.tensor([0, 3, 1]) if name == "cross_entropy" else teacher
    more = (torch.tensor([0, 3, 1]),) if name == "decoupled_kd" else ()
    function = FUNCTIONS[name]
    loss_B = function(student, second, *more)

    assert (3,) == loss_B.shape
    torch.testing.assert_close(loss_B, function(student, second, *more, reduction="none"))
    torch.testing.assert_close(loss_B.mean(), function(student, second, *more, reduction="mean"))
    torch.testing.assert_close(loss_B.sum(), function(student, second, *more, reduction="sum"))
    with pytest.raises(UsageError, match="reduction is 'none', 'mean' or 'sum', not 'batchmean'"):
        function(student, second, *more, reduction="batchmean")


FIRST_SPELLINGS = [
    ("true_label", "cross_entropy"),
    ("teacher_label", "teacher_argmax"),
    ({"name": "blend", "hard": "teacher_label"}, {"name": "blend", "hard": "teacher_argmax"}),
    ({"name": "hard_plus_soft", "hard": "true_label"}, "hard_plus_soft"),
    (
        {"stages": [{"until": 0.5, "loss": "kl"}, {"loss": {"name": "true_label", "label_smoothing": 0.1}}]},
        {"stages": [{"until": 0.5, "loss": "kl"}, {"loss": {"name": "cross_entropy", "label_smoothing": 0.1}}]},
    ),
]


def test_standardise_has_two_spellings_and_runs_are_recorded_under_the_first() -> None:
    takes_it = {name for name in losses.LOSSES if "standardise" in losses.LOSSES[name].__dataclass_fields__}
    first, second = (
        {"stages": [{"loss": {"name": "kl", spelling: True}}]} for spelling in ("standardise", "standardize")
    )

    assert set(STANDARDISABLE) == takes_it
    assert loss_from_config(first) == loss_from_config(second)
    assert first == losses.recorded_loss(first) == losses.recorded_loss(second)
    with pytest.raises(UsageError, match="two spellings of one parameter"):
        loss_from_config({"name": "kl", "standardise": True, "standardize": True})


@pytest.mark.parametrize(("first", "current"), FIRST_SPELLINGS)
def test_the_first_spelling_of_a_loss_stays_valid_and_means_the_same(first: Any, current: Any) -> None:
    old, new = (loss_from_config(config).at(0.75) for config in (first, current))

    assert type(old) is type(new)
    assert (old.needs_target, old.needs_teacher) == (new.needs_target, new.needs_teacher)
    torch.testing.assert_close(old(STUDENT, TEACHER, TARGET), new(STUDENT, TEACHER, TARGET))


def test_runs_are_recorded_under_the_first_spelling() -> None:
    """So that a renamed loss does not change the identity of runs that exist."""
    recorded = {"stages": [{"until": 0.5, "loss": {"name": "blend", "hard": "teacher_label"}}, {"loss": "true_label"}]}
    written = {
        "stages": [{"until": 0.5, "loss": {"name": "blend", "hard": "teacher_argmax"}}, {"loss": "cross_entropy"}]
    }

    assert recorded == losses.recorded_loss(written) == losses.recorded_loss(recorded)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("TrueLabel", "CrossEntropy"),
        ("TeacherLabel", "TeacherArgmax"),
        ("true_label_cross_entropy", "cross_entropy"),
        ("teacher_label_cross_entropy", "teacher_argmax_cross_entropy"),
    ],
)
def test_old_python_names_work_with_a_warning(old: str, new: str) -> None:
    with pytest.warns(
        DeprecationWarning,
        match=f"`logitcache.losses.{old}` is removed in the next release: use `logitcache.losses.{new}`",
    ):
        assert getattr(losses, old) is getattr(losses, new)
