"""Confident learning on cached logits: its numbers by hand, held to cleanlab's, and on labels flipped on purpose."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

import logitcache
from logitcache.cache import mean_probabilities as mean_probabilities_module
from logitcache.cache.ground_truth import MixingOfCache
from logitcache.cache.mean_probabilities import MeanProbabilities
from logitcache.catalog.datasets import load_data
from logitcache.cli import main
from logitcache.data.samples import SampleTable, sample_table
from logitcache.errors import UsageError
from logitcache.extras.noise import LabelNoise, calibrated, confident_joint, confident_thresholds, find_suspects


def cached(
    path: Path,
    probabilities_VNC: np.ndarray,
    labels_N: Sequence[int] | np.ndarray,
    *,
    keys: list[str] | None = None,
    names: list[str] | None = None,
    plan: logitcache.ViewPlan | None = None,
    rows_per_block: int = 64,
) -> str:
    """A cache of given probabilities over samples with given labels."""
    num_views, num_samples, num_classes = probabilities_VNC.shape
    table = SampleTable(
        num_samples, keys, np.asarray(labels_N, dtype=np.int64), np.zeros((num_samples, 16), dtype=np.uint8)
    )
    with logitcache.create(
        path,
        num_samples=num_samples,
        num_classes=num_classes,
        num_views=num_views,
        encoding=logitcache.Dense(dtype="float32"),
        teacher="by-hand",
        samples=table,
        class_names=names,
        view_plan=plan,
        rows_per_block=rows_per_block,
    ) as writer:
        for view in range(num_views):
            writer.write(view=view, start=0, logits=np.log(probabilities_VNC[view]).astype(np.float32))
    return str(path)


SIX = np.array([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3], [0.05, 0.95], [0.2, 0.8], [0.6, 0.4]])[None]
SIX_LABELS = [0, 0, 0, 0, 1, 1]
"""The fourth sample is labelled 0, and the teacher says 1; the sixth is doubtful only."""


def test_thresholds_and_joint_are_those_worked_out_by_hand(tmp_path: Path) -> None:
    """t_0 = (0.9 + 0.8 + 0.7 + 0.05) / 4 = 0.6125 and t_1 = (0.8 + 0.4) / 2 = 0.6, so the sixth counts nowhere."""
    cache = logitcache.open(cached(tmp_path / "six.cache", SIX, SIX_LABELS))
    opinions, labels = MeanProbabilities(cache), np.array(SIX_LABELS)
    thresholds, counts = confident_thresholds(opinions, labels, 2)
    joint = confident_joint(opinions, labels, thresholds)

    assert thresholds == pytest.approx([0.6125, 0.6])
    assert [[3, 1], [0, 1]] == joint.tolist()
    assert [[3.0, 1.0], [0.0, 2.0]] == calibrated(joint, counts).tolist()


def test_the_one_wrong_label_is_the_one_suspect(tmp_path: Path) -> None:
    noise = find_suspects(cached(tmp_path / "six.cache", SIX, SIX_LABELS, keys=list("abcdef"), names=["cat", "dog"]))
    (suspect,) = noise.suspects

    assert (1, 3, "d", 0, 1) == (suspect.rank, suspect.row, suspect.key, suspect.given, suspect.teacher)
    assert (suspect.given_probability, suspect.probability) == pytest.approx((0.05, 0.95))
    assert noise.noise_rate == pytest.approx(1 / 6)


def test_views_are_averaged_without_those_in_which_a_sample_is_mixed(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    probabilities = random.dirichlet([1.0] * 3, size=(4, 50))
    plan = logitcache.ViewPlan(seed=5, mixing=logitcache.Mixing(mixup=0.4, probability=0.5), num_classes=3)
    labels = random.integers(0, 3, 50)
    location = cached(tmp_path / "mixed.cache", probabilities, labels, plan=plan, rows_per_block=7)
    mixed_VN = np.array([[plan.mixture(view, row, 50) is not None for row in range(50)] for view in range(4)])
    pieces = list(MeanProbabilities(logitcache.open(location)))
    counts = np.concatenate([piece.num_views for piece in pieces])
    means = np.concatenate([piece.probabilities for piece in pieces])
    weights = (~mixed_VN)[:, :, None]
    expected = (probabilities * weights).sum(axis=0) / np.maximum(weights.sum(axis=0), 1)

    assert 8 == len(pieces)
    assert (~mixed_VN).sum(axis=0).tolist() == counts.tolist()
    assert 0 in counts
    assert np.abs(means - expected).max() < 1e-6
    assert int((counts > 0).sum()) == find_suspects(location).num_judged


def test_whether_a_row_is_mixed_is_known_without_its_partner(tmp_path: Path) -> None:
    plan = logitcache.ViewPlan(seed=5, mixing=logitcache.Mixing(mixup=0.4, cutmix=1.0, probability=0.3), num_classes=2)
    cache = logitcache.open(cached(tmp_path / "mixed.cache", np.full((2, 90, 2), 0.5), [0, 1] * 45, plan=plan))
    expected = [plan.mixture(1, row, 90) is not None for row in range(90)]

    assert expected == MixingOfCache(cache).mixed(1, range(90)).tolist()


def noisy(num_samples: int, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities (N, C) of a teacher that errs, and labels of which a tenth is wrong."""
    random = np.random.default_rng(7)
    truth = random.integers(0, num_classes, num_samples)
    logits = random.normal(size=(num_samples, num_classes)) + 3.0 * np.eye(num_classes)[truth]
    flipped = random.random(num_samples) < 0.1
    labels = np.where(flipped, (truth + random.integers(1, num_classes, num_samples)) % num_classes, truth)
    return torch.from_numpy(logits).softmax(dim=1).numpy(), labels


def test_small_pieces_and_several_passes_find_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory is bounded by pieces, and no number depends on them."""
    probabilities, labels = noisy(500, 5)
    location = cached(tmp_path / "noisy.cache", probabilities[None], labels)
    whole = find_suspects(location)
    monkeypatch.setattr(mean_probabilities_module, "PIECE_PROBABILITIES", 45)
    monkeypatch.setattr(mean_probabilities_module, "BATCH_LOGITS", 20)
    monkeypatch.setattr(mean_probabilities_module, "KEPT_PROBABILITIES", 0)

    assert whole.suspects == find_suspects(location).suspects
    assert len(whole.suspects) > 20


def test_it_agrees_with_cleanlab(tmp_path: Path) -> None:
    """Of several confident classes cleanlab counts the first class of all, and it rounds joints row by row."""
    from cleanlab import count
    from cleanlab.filter import find_label_issues

    probabilities, labels = noisy(3000, 6)
    probabilities = probabilities.astype(np.float32)
    ours = find_suspects(cached(tmp_path / "noisy.cache", probabilities[None], labels))
    theirs_joint = count.compute_confident_joint(labels, probabilities, calibrate=True)
    theirs = set(find_label_issues(labels, probabilities, filter_by="prune_by_noise_rate", n_jobs=1).nonzero()[0])
    found = {suspect.row for suspect in ours.suspects}

    assert np.abs(count.get_confident_thresholds(labels, probabilities) - ours.thresholds).max() < 1e-5
    assert np.abs(theirs_joint - ours.joint).max() <= 1.0
    assert len(found & theirs) >= 0.97 * len(found | theirs)


def flipped_digits(fraction: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pixels (N, 64) of digits, their labels with a seeded share of them flipped, and which were."""
    dataset = load_data("digits").train
    pixels = np.stack([np.asarray(dataset[index][0], dtype=np.float32).reshape(-1) for index in range(len(dataset))])
    truth = sample_table(dataset).targets
    random = np.random.default_rng(20261121)
    flipped = random.permutation(len(truth)) < fraction * len(truth)
    labels = np.where(flipped, (truth + random.integers(1, 10, len(truth))) % 10, truth)
    return pixels / 255, labels, flipped


def judged_by(pixels: np.ndarray, labels: np.ndarray, *, strength: float = 0.3, in_sample: bool = False) -> np.ndarray:
    """Probabilities by teachers that never saw the samples that they judge (or, `in_sample`, by one that did)."""
    from sklearn.linear_model import LogisticRegression

    def fitted(chosen: np.ndarray) -> LogisticRegression:
        return LogisticRegression(C=strength, max_iter=500).fit(pixels[chosen], labels[chosen])

    everything = np.arange(len(labels))
    if in_sample:
        return np.asarray(fitted(everything).predict_proba(pixels))
    probabilities = np.empty((len(labels), 10))
    for fold in range(4):
        held_out = everything % 4 == fold
        probabilities[held_out] = fitted(everything[~held_out]).predict_proba(pixels[held_out])
    return probabilities


def measured(noise: LabelNoise, flipped: np.ndarray) -> tuple[float, float]:
    """(precision, recall)."""
    rows = [suspect.row for suspect in noise.suspects]
    return float(flipped[rows].mean()), float(flipped[rows].sum() / flipped.sum())


def test_flipped_labels_of_real_digits_are_found(tmp_path: Path) -> None:
    """A twentieth flipped; every digit is judged by a teacher that was trained on the others, noise and all."""
    pixels, labels, flipped = flipped_digits(0.05)
    out_of_sample = judged_by(pixels, labels)
    noise = find_suspects(cached(tmp_path / "digits.cache", out_of_sample[None], labels))
    precision, recall = measured(noise, flipped)
    first = [suspect.row for suspect in noise.suspects[: int(flipped.sum() / 2)]]

    print(f"precision {precision:.3f}, recall {recall:.3f}, estimated noise {noise.noise_rate:.3f}")
    assert precision > 0.7
    assert recall > 0.7
    assert 0.03 < noise.noise_rate < 0.08
    assert flipped[first].mean() > 0.95


def test_a_teacher_that_learned_the_wrong_labels_misses_many(tmp_path: Path) -> None:
    """Which is what the command warns of."""
    pixels, labels, flipped = flipped_digits(0.05)
    recalls = []
    for in_sample in (False, True):
        said = judged_by(pixels, labels, strength=3.0, in_sample=in_sample)
        recalls.append(measured(find_suspects(cached(tmp_path / f"{in_sample}.cache", said[None], labels)), flipped)[1])

    print(f"recall {recalls[0]:.3f} out of sample, {recalls[1]:.3f} in sample")
    assert recalls[1] < recalls[0] - 0.1


def test_clean_labels_have_few_suspects(tmp_path: Path) -> None:
    pixels, labels, _ = flipped_digits(0.0)
    noise = find_suspects(cached(tmp_path / "digits.cache", judged_by(pixels, labels)[None], labels))

    assert len(noise.suspects) < 0.04 * len(labels)


def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str) -> tuple[int, str, str]:
    monkeypatch.setattr("sys.argv", ["logitcache", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    out, err = capsys.readouterr()
    return int(ended.value.code or 0), out, err


def test_the_command_prints_json_and_writes_csv_that_runs_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = ["a", "b", "c", '=HYPERLINK("x",1)', "e", "f"]
    location = cached(tmp_path / "six.cache", SIX, SIX_LABELS, keys=keys, names=["[red]cat", "d\x1b[2Jog"])
    code, out, _ = run(capsys, monkeypatch, "suspects", location, "--json", "-o", str(tmp_path / "suspects.csv"))
    found = json.loads(out)
    with (tmp_path / "suspects.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)

    assert 0 == code
    assert (1, 6, keys[3]) == (found["num_suspects"], found["num_judged"], found["suspects"][0]["key"])
    assert ("3", f"'{keys[3]}", "[red]cat") == (row["row"], row["key"], row["given"])

    code, out, _ = run(capsys, monkeypatch, "suspects", location)
    assert 0 == code
    assert "[red]cat" in out
    assert "\x1b[2J" not in out
    assert "1 of 6 labels are probably wrong" in out
    assert "has learned some of the wrong labels" in out


def test_what_can_not_be_judged_is_refused(tmp_path: Path) -> None:
    always = logitcache.ViewPlan(seed=5, mixing=logitcache.Mixing(mixup=0.4), num_classes=2)
    with pytest.raises(UsageError, match=r"mixed every sample in every view.*views\.mix_probability below 1"):
        find_suspects(cached(tmp_path / "always.cache", SIX, SIX_LABELS, plan=always))
    with logitcache.create(tmp_path / "bare.cache", num_samples=2, num_classes=2, teacher="t", dataset="d") as writer:
        writer.write(view=0, start=0, logits=np.zeros((2, 2)))
    with pytest.raises(UsageError, match="has no targets"):
        find_suspects(str(tmp_path / "bare.cache"))
