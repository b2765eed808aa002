"""Several teachers at once: labels from caches over the same views, put together for each batch."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import logitcache
from logitcache.cache.averaging import best_by_label, combination
from logitcache.config.schema import Pipeline
from logitcache.errors import IdentityMismatch, IncompleteCache, LogitCacheError, UsageError
from logitcache.extras.merge import merge
from logitcache.stages.cache_teacher import cache_teacher
from logitcache.stages.train_student import Experiment, train_students
from logitcache.train.labels import EnsembleLabels

Tiny = Callable[..., Pipeline]


@pytest.fixture
def teachers(tiny: Tiny, tmp_path: Path) -> list[str]:
    """Caches of two teachers over the same two mixed views."""
    paths = []
    for hidden in (16, 12):
        paths.append(str(tmp_path / f"teacher-{hidden}.cache"))
        cache_teacher(tiny(f"cache.path={paths[-1]}", f"teacher.args.hidden=[{hidden}]", "views.mixup=0.4"))
    return paths


def student_of(tiny: Tiny, paths: list[str], combine: str, *overrides: str) -> Pipeline:
    labels = f"students.small.labels={{caches: [{', '.join(paths)}], combine: {combine}}}"
    return tiny("cache.path=nowhere", "views.mixup=0.4", labels, *overrides)


@pytest.mark.parametrize("combine", ["logits", "probabilities"])
def test_a_mean_made_for_each_batch_is_that_of_the_merged_cache(
    combine: str, tiny: Tiny, teachers: list[str], tmp_path: Path
) -> None:
    merge(teachers, tmp_path / "merged.cache", mean=combine, weights=[1, 3])
    pipeline = student_of(tiny, teachers, combine, "students.small.labels.weights=[1, 3]")
    job = Experiment(pipeline).job(pipeline.student("small"), seed=0)
    assert isinstance(job.labels, EnsembleLabels)
    rows = torch.arange(100)
    for view in range(2):
        job.labels.start_views([view], [])
        found = job.labels.logits(rows, None, torch.zeros(100, dtype=torch.int64))
        expected = logitcache.open(tmp_path / "merged.cache").view(view).logits(rows)
        torch.testing.assert_close(found.log_softmax(1), expected.log_softmax(1), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("combine", ["logits", "probabilities", "best"])
def test_students_learn_from_several_teachers(combine: str, tiny: Tiny, teachers: list[str], tmp_path: Path) -> None:
    [row] = train_students(student_of(tiny, teachers, combine), ["small"])
    assert row.accuracy_mean is not None

    copies = [shutil.copytree(path, tmp_path / "moved" / Path(path).name) for path in teachers]
    [again] = train_students(student_of(tiny, [str(path) for path in copies], combine), ["small"])
    assert row == again  # the same run: caches are known by what they are, not by where
    with pytest.raises(UsageError, match="another configuration"):
        train_students(student_of(tiny, teachers[::-1], combine), ["small"])


def test_views_larger_than_memory_stream_from_each_teacher(tiny: Tiny, teachers: list[str]) -> None:
    [row] = train_students(student_of(tiny, teachers, "logits", "cache.memory_budget_mb=0.05"), ["small"])

    assert row.accuracy_mean is not None


def test_the_best_teacher_of_a_sample_is_the_one_that_gives_its_label_the_most() -> None:
    logits = [torch.tensor([[2.0, 0, 0], [0, 0, 3], [1, 1, 0]]), torch.tensor([[0.0, 1, 0], [0, 4, 0], [1, 1, 0]])]
    expected = torch.stack([logits[0][0], logits[1][1], logits[0][2]])

    assert torch.equal(expected, best_by_label(logits, torch.tensor([0, 1, 2])))


def test_the_best_teacher_of_a_mixed_sample_has_the_least_cross_entropy_to_both_labels() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = [torch.randn(200, 5, generator=generator) * 3 for _ in range(3)]
    targets = torch.randn(200, 5, generator=generator).softmax(1)
    costs = np.stack([-(targets.numpy() * each.log_softmax(1).numpy()).sum(1) for each in logits])

    found = best_by_label(logits, targets)

    assert all(torch.equal(found[row], logits[best][row]) for row, best in enumerate(costs.argmin(0)))


def test_a_teacher_that_masks_the_true_class_is_never_the_best() -> None:
    masks = torch.tensor([[5.0, -torch.inf, 0.0]])

    assert torch.equal(torch.zeros(1, 3), best_by_label([masks, torch.zeros(1, 3)], torch.tensor([1])))
    assert torch.equal(masks, best_by_label([masks, torch.zeros(1, 3)], torch.tensor([0])))


def test_teachers_of_other_views_are_refused_before_the_first_step(
    tiny: Tiny, teachers: list[str], tmp_path: Path
) -> None:
    cache_teacher(tiny(f"cache.path={tmp_path / 'other.cache'}", "views.mixup=0.4", "views.seed=4"))
    with pytest.raises(IdentityMismatch, match=r"other\.cache is not of the same views.*\n.*view_seed: 3"):
        train_students(student_of(tiny, [teachers[0], str(tmp_path / "other.cache")], "logits"), ["small"])
    with pytest.raises(IdentityMismatch, match="view_seed"):
        train_students(student_of(tiny, [str(tmp_path / "other.cache"), teachers[0]], "logits"), ["small"])
    with pytest.raises(IncompleteCache, match=r"needs 3 views.*has 2"):
        train_students(student_of(tiny, teachers, "logits", "views.count=3"), ["small"])
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ("{caches: []}", "expected at least one path or URL"),
        ("{caches: [a, b], weights: [1]}", "1 weights for 2 caches"),
        ("{caches: [a, b], combine: best, weights: [1, 2]}", "no weights"),
        ("{caches: [a, b], wieghts: [1, 2]}", "did you mean 'weights'"),
        ("dead", "expected 'cache', 'live', or a mapping"),
    ],
)
def test_labels_that_make_no_sense_are_refused(labels: str, message: str, tiny: Tiny) -> None:
    with pytest.raises(LogitCacheError, match=message):
        tiny(f"students.small.labels={labels}")


def test_weights_are_positive() -> None:
    with pytest.raises(UsageError, match="positive"):
        combination("logits", [1.0, -1.0], 2)
