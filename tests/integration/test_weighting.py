"""Sample weights in closed form, and epochs in which every class comes equally often."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import logitcache
from logitcache.config.schema import Pipeline
from logitcache.data.order import balanced_choice, epoch_order
from logitcache.errors import UsageError
from logitcache.losses import kl_divergence
from logitcache.stages.cache_teacher import cache_teacher
from logitcache.stages.train_student import Experiment, train_students
from logitcache.train.loop import train
from logitcache.train.weighting import class_balanced_weights, of_mean_one, teacher_weights, weights_from_config
from tests.integration.test_noise import cached
from tests.integration.test_stages import log, same, weights

Make = Callable[..., Pipeline]
LONG_TAILED = np.repeat([0, 1, 2, 3], [700, 200, 80, 20])


def test_class_balanced_weights_are_the_closed_form() -> None:
    """(1 - β) / (1 - βⁿ), scaled to the mean 1."""
    found = class_balanced_weights(LONG_TAILED, beta=0.99)
    sizes = np.array([700, 200, 80, 20])
    raw = (1 - 0.99) / (1 - 0.99**sizes)
    expected = raw / (raw * sizes).sum() * 1000

    assert found[[0, 700, 900, 980]] == pytest.approx(expected)
    assert found.mean() == pytest.approx(1)


@pytest.mark.parametrize(("beta", "ratio"), [(0.0, 1.0), (1 - 1e-12, 35.0)], ids=["0", "nearly 1"])
def test_the_ends_of_beta_are_equal_weights_and_inverse_frequency(beta: float, ratio: float) -> None:
    found = class_balanced_weights(LONG_TAILED, beta=beta)

    assert found[-1] / found[0] == pytest.approx(ratio, rel=1e-6)


def test_the_teachers_confidence_and_agreement_by_hand(tmp_path: Path) -> None:
    probabilities = np.array([[[0.9, 0.1], [0.4, 0.6], [0.2, 0.8]], [[0.7, 0.3], [0.8, 0.2], [0.4, 0.6]]])
    cache = logitcache.open(cached(tmp_path / "three.cache", probabilities, [0, 0, 0], rows_per_block=2))

    assert teacher_weights(cache, "teacher_confidence", cache.views) == pytest.approx([0.8, 0.6, 0.7])
    assert teacher_weights(cache, "teacher_agreement", cache.views) == pytest.approx([0.8, 0.6, 0.3])
    assert teacher_weights(cache, "teacher_agreement", range(1, 2)) == pytest.approx([0.7, 0.8, 0.4])


def test_what_nothing_is_known_of_weighs_one() -> None:
    assert of_mean_one(np.array([0.2, np.nan, 0.6])) == pytest.approx([0.5, 1.0, 1.5])
    with pytest.raises(UsageError, match="all sample weights are 0 or unknown"):
        of_mean_one(np.array([0.0, np.nan]))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("balanced", "sample_weights: unknown kind 'balanced'; did you mean 'class_balanced'"),
        ({"name": "class_balanced", "beta": 1.0}, r"beta of class_balanced must be in \[0, 1\), not 1\.0"),
        ({"name": "teacher_confidence", "beta": 0.5}, "beta is a parameter of class_balanced"),
        ({"name": "none", "gamma": 2}, "sample_weights has no parameter 'gamma'; it has: name, beta"),
    ],
)
def test_wrong_weights_say_what_is_expected(config: object, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        weights_from_config(config)


def test_every_class_comes_equally_often_and_every_sample_of_it_too() -> None:
    """Over 300 epochs each of the 700 is taken 250/700 of the time, within 4σ; each of the 20 12 or 13 times an epoch."""
    epochs = 300
    counts = np.zeros((epochs, 1000), dtype=np.int64)
    for epoch in range(epochs):
        chosen = balanced_choice(LONG_TAILED, seed=1, epoch=epoch)
        counts[epoch] = np.bincount(chosen, minlength=1000)
        assert [250] * 4 == np.bincount(LONG_TAILED[chosen]).tolist()
    share = 250 / 700
    sigma = (share * (1 - share) / epochs) ** 0.5
    taken = counts[:, :700].mean(axis=0)

    assert counts[:, :700].max() == 1
    assert {12, 13} == set(np.unique(counts[:, 980:]))
    assert np.mean(np.abs(taken - share) < 2 * sigma) > 0.9
    assert np.abs(taken - share).max() < 5 * sigma  # the largest of 700


def test_an_imbalanced_subset_is_drawn_evenly() -> None:
    """Classes that occur get the odd sample by turns: within 4σ none is favoured."""
    classes = np.repeat([0, 2, 5], [50, 20, 3])
    totals = np.zeros(6)
    for epoch in range(200):
        counts = np.bincount(classes[epoch_order(np.arange(73), seed=4, epoch=epoch, classes=classes)], minlength=6)
        assert set(counts[[0, 2, 5]]) <= {24, 25}
        totals += counts
    sigma = (200 * (1 / 3) * (2 / 3)) ** 0.5

    assert (np.abs(totals[[0, 2, 5]] - 200 * 73 / 3) < 4 * sigma).all()


def test_a_balanced_order_is_a_pure_function_of_seed_and_epoch() -> None:
    rows = np.arange(1000)
    one, again, other_epoch, other_seed = (
        epoch_order(rows, seed=seed, epoch=epoch, classes=LONG_TAILED)
        for seed, epoch in ((1, 2), (1, 2), (1, 3), (2, 2))
    )

    assert one.tolist() == again.tolist()
    assert one.tolist() != other_epoch.tolist()
    assert one.tolist() != other_seed.tolist()
    assert (np.diff(LONG_TAILED[one]) != 0).mean() > 0.5  # classes come in no order


def test_a_streamed_view_keeps_to_its_windows_when_balanced() -> None:
    rows = np.random.default_rng(0).permutation(1000)
    order = epoch_order(rows, seed=1, epoch=0, rows_per_block=100, window_blocks=2, classes=LONG_TAILED)
    blocks = rows[order] // 100
    changes = [number for number, block in enumerate(blocks[1:]) if block not in blocks[: number + 1]]

    assert [250] * 4 == np.bincount(LONG_TAILED[order]).tolist()
    for start in (0, 2, 4, 6, 8):  # the two blocks of a window are visited before any other
        window = list(dict.fromkeys(blocks.tolist()))[start : start + 2]
        places = np.flatnonzero(np.isin(blocks, window))
        assert places[-1] - places[0] == len(places) - 1
    assert len(changes) == 9


@pytest.mark.parametrize("name", ["teacher_confidence", "teacher_agreement", "{name: class_balanced, beta: 0.99}"])
@pytest.mark.parametrize("student", ["small", "labels"])
def test_a_step_is_the_weighted_mean_of_its_losses(tiny: Make, name: str, student: str) -> None:
    """Whether the student is given the cache's logits or true labels of a part of the samples."""
    overrides = [f"students.{student}.sample_weights={name}", "students.labels.samples=0.5"]
    cache_teacher(tiny("views.count=3"))  # of which the pipeline has two
    pipeline = tiny(*overrides)
    job = Experiment(pipeline).job(pipeline.student(student), 0)
    assert job.sample_weights is not None
    rows = torch.tensor([job.views.row(int(index)) for index in job.indices])
    cache = logitcache.open(pipeline.cache.path)
    mean = torch.stack([cache.view(view).logits(range(cache.num_samples)).softmax(dim=1) for view in range(2)]).mean(0)
    if student == "labels":
        mean = mean[torch.from_numpy(job.views.dataset.indices)]  # type: ignore[attr-defined]
    targets = torch.tensor(np.asarray(job.views.dataset.targets))  # type: ignore[attr-defined]
    if "class" in name:
        expected = torch.from_numpy(class_balanced_weights(targets.numpy(), beta=0.99)).float()
    else:
        expected = mean.max(dim=1).values if "confidence" in name else mean[torch.arange(len(mean)), targets]

    assert job.sample_weights[rows].mean() == pytest.approx(1, abs=1e-5)
    assert torch.allclose(job.sample_weights[rows], expected / expected.mean(), atol=1e-5)


def test_weights_reach_the_loss_of_training(tiny: Make, tmp_path: Path) -> None:
    """The first logged loss of one full batch is the weighted mean, worked out here."""
    pipeline = tiny("students.small.sample_weights=teacher_confidence", "train.epochs=1", "train.batch_size=5000")
    cache_teacher(pipeline)
    job = Experiment(pipeline).job(pipeline.student("small"), 0)
    rows = range(len(job.views))
    inputs = torch.stack([job.views[(0, row)][1] for row in rows])
    with torch.no_grad():
        teacher_BC = logitcache.open(pipeline.cache.path).view(0).logits(rows)
        losses_B = kl_divergence(job.model(inputs), teacher_BC, temperature=2.0)
    assert job.sample_weights is not None
    weighted, plain = float((losses_B * job.sample_weights).mean()), float(losses_B.mean())
    train(job)

    assert log(tmp_path / "runs/small/seed-0")[0]["train_loss"] == pytest.approx(weighted, rel=1e-5)
    assert abs(weighted - plain) > 1e-4 * plain


def test_a_balanced_epoch_is_trained_on(tiny: Make, tmp_path: Path) -> None:
    pipeline = tiny("students.labels.sampler=class_balanced", "students.labels.samples=0.3")
    experiment = Experiment(pipeline)
    job = experiment.job(pipeline.student("labels"), 0)
    (row,) = train_students(pipeline, ["labels"])

    assert job.classes is not None
    assert len(job.classes) == len(job.indices) == row.samples
    assert np.asarray(job.views.dataset.targets).tolist() == job.classes.tolist()  # type: ignore[attr-defined]


def test_what_is_not_asked_for_is_no_part_of_a_run(tiny: Make, tmp_path: Path) -> None:
    """Runs that were there before these keys were stay what they are; weights make another run."""
    cache_teacher(tiny())
    train_students(tiny(), ["small"])
    told = (tmp_path / "runs/small/seed-0/run.yaml").read_text()

    assert not any(word in told for word in ("sample_weights", "sampler", "init", "weighed_by"))
    with pytest.raises(UsageError, match=r"differs in student\.sample_weights, weighed_by"):
        train_students(tiny("students.small.sample_weights=teacher_confidence"), ["small"])


def test_equal_weights_change_nothing(tiny: Make, tmp_path: Path) -> None:
    cache_teacher(tiny())
    train_students(tiny(), ["small"])
    train_students(
        tiny("students.small.sample_weights={name: class_balanced, beta: 0}", f"runs.path={tmp_path}/equal"), ["small"]
    )

    assert same(weights(tmp_path / "runs/small/seed-0"), weights(tmp_path / "equal/small/seed-0"))
