"""A cache that does not fit stops the student before its first step, and says why."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import logitcache
from logitcache.cache.labelview import ResidentView
from logitcache.config.schema import Pipeline
from logitcache.errors import IdentityMismatch, IncompleteCache, UsageError
from logitcache.stages.cache_teacher import cache_teacher
from logitcache.stages.train_student import Experiment, train_students
from logitcache.stages.verify_match import verify_match
from tests.conftest import PICTURES

Make = Callable[..., Pipeline]


def never(*arguments: object) -> None:
    raise AssertionError("a training step was taken")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(
            ("views.transform.0.RandomAffine.degrees=11",),
            r"transform.shared\[0\].RandomAffine.degrees: 10 in the cache, 11 here",
            id="a parameter of the transform",
        ),
        pytest.param(("views.seed=4",), "view_seed: 3 in the cache, 4 here", id="view seed"),
        pytest.param(("views.mixup=0.1",), "transform.mixing: null in the cache", id="mixup"),
        pytest.param(
            ("teacher.input=[{Normalize: {mean: [0.5], std: [0.5]}}]",),
            "transform.teacher_input .*of a pipeline.: ",
            id="the teacher's own part",
        ),
        pytest.param(("teacher.args.hidden=[17]",), "teacher: mlp@.* in the cache, mlp@.* here", id="another teacher"),
        pytest.param(
            ("teacher.model=cnn", "teacher.args={widths: [4]}"), "teacher: mlp@.* in the cache, cnn", id="another net"
        ),
        pytest.param(
            ("data.args={order: [0, 1, 2, 3, 4, 6, 7]}",),
            r"First difference: sample 5 \(scan/0005.png\) is missing here",
            id="samples missing",
        ),
        pytest.param(("data.args={count: 41}",), "sample 'scan/0040.png' is not in the cache", id="samples unknown"),
        pytest.param(
            ("data.args={relabel: 12}",), r"sample 12 \(scan/0012.png\) has the target 3 here, but 2", id="a label"
        ),
        pytest.param(
            ("data.args={repaint: 12}",), r"sample 12 \(scan/0012.png\) is not what the teacher saw", id="a picture"
        ),
    ],
)
def test_what_differs_is_named_before_the_first_step(
    tiny: Make, monkeypatch: pytest.MonkeyPatch, change: tuple[str, ...], message: str
) -> None:
    cache_teacher(tiny(*PICTURES))
    other = tiny(*PICTURES, *change)
    if "repaint" not in change[0]:  # a changed content is noticed when that image is first loaded
        monkeypatch.setattr("logitcache.train.loop.Run.train_step", never)

    with pytest.raises(IdentityMismatch, match=message):
        train_students(other, ["small"])


def test_another_library_that_renders_otherwise_is_noticed_by_its_pixels(
    tiny: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Data, transform and seed agree; only the proof digests can tell."""
    cache_teacher(tiny(*PICTURES))
    monkeypatch.setattr("logitcache.train.loop.Run.train_step", never)
    monkeypatch.setattr(
        "logitcache.data.views.to_float_image",
        lambda image: torch.from_numpy(np.asarray(image)[None] / np.float32(256)),
    )

    with pytest.raises(
        IdentityMismatch, match=r"(?s)is not what the teacher saw.*The cache was built with torchvision"
    ):
        train_students(tiny(*PICTURES), ["small"])


def test_another_order_is_mapped_by_key_and_trains(tiny: Make) -> None:
    cache_teacher(tiny(*PICTURES))
    backwards = tiny(*PICTURES, f"data.args={{order: {list(range(39, -1, -1))}}}")
    _, rows = Experiment(backwards).cache()
    (row,) = train_students(backwards, ["small"])

    assert list(range(39, -1, -1)) == rows.tolist()  # type: ignore[union-attr]
    assert row.samples == 40
    assert [] == verify_match(tiny(*PICTURES))


def test_a_subset_that_is_meant_is_mapped_by_key_and_trains(tiny: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    cache_teacher(tiny(*PICTURES))
    seen: list[int] = []
    original = ResidentView._decoded
    monkeypatch.setattr(
        "logitcache.cache.labelview.ResidentView._decoded",
        lambda self, rows_B: (seen.extend(rows_B.tolist()), original(self, rows_B))[1],
    )
    train_students(tiny(*PICTURES, "data.args={order: [31, 4, 15, 9, 26]}", "data.subset=true"), ["small"])

    assert {31, 4, 15, 9, 26} == set(seen)


def test_a_subset_of_mixed_views_says_that_partners_are_missing(tiny: Make) -> None:
    cache_teacher(tiny(*PICTURES, "views.mixup=0.2"))
    with pytest.raises(UsageError, match="draw partners from all 40 samples"):
        train_students(tiny(*PICTURES, "views.mixup=0.2", "data.args={order: [3, 1]}", "data.subset=true"), ["small"])


def test_a_part_of_the_samples_trains_under_mixing_with_the_whole_at_hand(tiny: Make) -> None:
    cache_teacher(tiny("views.mixup=0.2"))
    (row,) = train_students(tiny("views.mixup=0.2", "students.small.samples=0.1"), ["small"])

    assert 25 < row.samples < 40


def test_more_views_than_there_are_says_to_add_them(tiny: Make) -> None:
    cache_teacher(tiny(*PICTURES))
    with pytest.raises(IncompleteCache, match="needs 5 views; .* has 2"):
        train_students(tiny(*PICTURES, "views.count=5"), ["small"])


def test_stage_one_refuses_to_mix_two_datasets_in_one_cache(tiny: Make) -> None:
    cache_teacher(tiny(*PICTURES))
    with pytest.raises(IdentityMismatch, match=r"First difference: sample 3 \(scan/0003.png\) has the target"):
        cache_teacher(tiny(*PICTURES, "data.args={relabel: 3}"))


def test_all_differences_are_listed(tiny: Make) -> None:
    cache_teacher(tiny(*PICTURES))
    problems = verify_match(tiny(*PICTURES, "views.seed=9", "data.args={relabel: 3, repaint: 5}"))
    found = [problem.path for problem in problems]

    assert [
        found[0],
        *(line[:9] for line in found[1:]),
    ] == ["view_seed: 3 in the cache, 9 here", "sample 3 ", "sample 5 "]


def test_a_team_without_the_teachers_weights_trains_on_its_cache(tiny: Make, tmp_path: Path) -> None:
    trained = ["teacher.weights=trained", "teacher.train={epochs: 1}"]
    from logitcache.stages.train_teacher import train_teacher

    train_teacher(tiny(*trained))
    cache_teacher(tiny(*trained))
    elsewhere = tiny(*trained, f"runs.path={tmp_path}/elsewhere")

    assert train_students(elsewhere, ["small"])[0].accuracy_mean is not None


def test_the_plan_of_a_cache_is_the_plan_that_it_was_built_with(tiny: Make) -> None:
    cache_teacher(tiny(*PICTURES, "views.mixup=0.2"))
    experiment = Experiment(tiny(*PICTURES, "views.mixup=0.2"))
    cache, _ = experiment.cache()
    views = logitcache.ViewDataset(experiment.data.train, cache.view_plan)

    assert [cache.verify_inputs(views, view) for view in range(2)] == [8, 8]
    cache.check_plan(experiment.plan)
    with pytest.raises(IdentityMismatch, match=r"transform.mixing"):
        cache.check_plan(Experiment(tiny(*PICTURES)).plan)


def test_inputs_are_checked_as_the_teacher_had_them_whatever_the_student_takes(tiny: Make) -> None:
    normalised = "teacher.input=[{Normalize: {mean: [0.5], std: [0.5]}}]"
    cache_teacher(tiny(*PICTURES, normalised))
    experiment = Experiment(tiny(*PICTURES, normalised))
    cache, _ = experiment.cache()
    views = logitcache.ViewDataset(experiment.data.train, cache.view_plan, preprocess=lambda pixels: pixels[..., :4])

    assert 8 == cache.verify_inputs(views, 1)


def test_targets_beyond_the_classes_are_named(tiny: Make) -> None:
    with pytest.raises(UsageError, match=r"sample 'scan/0007.png' has the target 10; expected 0 to 9, for 10 classes"):
        cache_teacher(tiny(*PICTURES, "data.args={beyond: 7}"))
