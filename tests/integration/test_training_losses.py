"""Losses in real trainings: each of them trains, schedules and stages follow the steps, and a kill does not show."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from logitcache.config.schema import Pipeline
from logitcache.data.views import ViewDataset
from logitcache.errors import UsageError
from logitcache.losses import Loss
from logitcache.stages.cache_teacher import cache_teacher
from logitcache.stages.train_student import Experiment, train_students
from logitcache.train.labels import Labels
from logitcache.train.loop import train
from tests.conftest import ALL_DIGITS

# B batch, C classes

Make = Callable[..., Pipeline]

KL_THEN_TRUTH = "{stages: [{until: 0.5, loss: {name: kl, temperature: {from: 4, to: 1}}}, {loss: cross_entropy}]}"


def with_loss(loss: str) -> str:
    return f"students.small.loss={loss}"


def weights(folder: Path) -> dict[str, Tensor]:
    return safetensors.torch.load_file(folder / "small/seed-0/last.safetensors")


def same(one: Path, other: Path) -> bool:
    first, second = weights(one), weights(other)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    "loss",
    [
        "{name: kl, standardise: true, temperature: {from: 4, to: 1, shape: cosine}}",
        "dkd",
        "js",
        "logit_mse",
        "{name: weighted, parts: [{loss: cross_entropy}, {loss: dist, weight: {from: 0, to: 2}}]}",
        "{name: weighted, parts: [{loss: kl}, {loss: rkd, weight: 0.5}]}",
    ],
    ids=["kl", "dkd", "js", "logit_mse", "dist", "rkd"],
)
def test_each_loss_falls_in_training_on_mixed_images(tiny: Make, tmp_path: Path, loss: str) -> None:
    """A schedule changes what is measured, so the student's distance to the teacher is the judge where there is one."""
    pipeline = tiny(*ALL_DIGITS, "views.mixup=0.4", "train.epochs=4", with_loss(loss))
    cache_teacher(pipeline)
    experiment = Experiment(pipeline)
    before = distance_to_teacher(experiment, trained=False)
    train_students(pipeline, ["small"])

    assert distance_to_teacher(experiment, trained=True, folder=tmp_path / "runs/small/seed-0") < before


def distance_to_teacher(experiment: Experiment, *, trained: bool, folder: Path | None = None) -> float:
    """Share of the first view's samples on which the student's first class is not the teacher's."""
    job = experiment.job(experiment.pipeline.student("small"), 0)
    if trained:
        assert folder is not None
        job.model.load_state_dict(safetensors.torch.load_file(folder / "last.safetensors"))
    assert job.labels is not None
    job.labels.start_views([0], [])
    places = range(400)
    inputs = torch.stack([job.views[(0, index)][1] for index in places])
    with torch.no_grad():
        student = job.model.eval()(inputs).argmax(dim=1)
    teacher = job.labels.logits(torch.tensor(places), None, torch.zeros(len(places))).argmax(dim=1)
    return float((student != teacher).float().mean())


@pytest.mark.parametrize(
    "loss",
    [
        "{name: kl, temperature: {from: 2, to: 2}}",
        "{stages: [{until: 0.3, loss: {name: kl, temperature: 2}}, {loss: {name: kl, temperature: 2}}]}",
        "{name: weighted, parts: [{loss: {name: kl, temperature: 2}}]}",
    ],
    ids=["schedule", "stages", "sum"],
)
def test_a_change_that_changes_nothing_leaves_no_trace(tiny: Make, tmp_path: Path, loss: str) -> None:
    cache_teacher(tiny())
    train_students(tiny(), ["small"])
    train_students(tiny(with_loss(loss), f"runs.path={tmp_path}/changing"), ["small"])

    assert same(tmp_path / "runs", tmp_path / "changing")


class Counted(Labels):
    """Labels that say what was asked of them, and when."""

    def __init__(self, labels: Labels) -> None:
        self.labels = labels
        self.needs_teacher_inputs = labels.needs_teacher_inputs
        self.views: list[tuple[int, int | None]] = []
        self.gathers = 0

    def start_views(self, views: Sequence[int], following: Sequence[int]) -> None:
        self.views.append((views[0], following[0] if following else None))
        self.labels.start_views(views, following)

    def check_batch(self, index: Tensor, inputs: Any, views: ViewDataset) -> None:
        self.labels.check_batch(index, inputs, views)

    def outputs(self, names: Sequence[str], index: Tensor, teacher_inputs: Any, targets: Tensor) -> dict[str, Tensor]:
        self.gathers += 1
        return self.labels.outputs(names, index, teacher_inputs, targets)


@pytest.mark.parametrize("labels", ["cache", "live"])
@pytest.mark.parametrize(
    ("loss", "share", "views"),
    [
        pytest.param(KL_THEN_TRUTH, 0.5, [(0, 1), (1, None)], id="at the end of an epoch"),
        pytest.param(KL_THEN_TRUTH.replace("0.5", "0.6"), 0.6, [(0, 1), (1, 0), (0, None)], id="within an epoch"),
        pytest.param(
            "{stages: [{until: 0.5, loss: cross_entropy}, {loss: kl}]}", 0.5, [(0, 1), (1, None)], id="the other way"
        ),
    ],
)
def test_a_stage_without_a_teacher_reads_none_of_its_labels(
    tiny: Make, labels: str, loss: str, share: float, views: list[tuple[int, int | None]]
) -> None:
    pipeline = tiny("train.epochs=4", with_loss(loss), f"students.small.labels={labels}")
    cache_teacher(pipeline)
    job = Experiment(pipeline).job(pipeline.student("small"), 0)
    assert job.labels is not None
    counted = job.labels = Counted(job.labels)
    train(job)

    lines = [json.loads(line) for line in (job.folder / "metrics.jsonl").read_text().splitlines()]
    total = max(line["step"] for line in lines)
    assert counted.views == views
    assert counted.gathers == sum(step / total < share for step in range(total))


def test_a_student_of_stages_needs_the_cache_before_its_first_step(tiny: Make) -> None:
    with pytest.raises(UsageError, match="is not a logit cache"):
        train_students(tiny(with_loss("{stages: [{until: 0.5, loss: cross_entropy}, {loss: kl}]}")), ["small"])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Deadly(Loss):
    """A loss that kills the process when so much of training is done."""

    name = "deadly"
    loss: Loss
    ends: float

    def needs_teacher_during(self, start: float, end: float) -> bool:
        return self.loss.needs_teacher_during(start, end)

    def at(self, progress: float) -> Loss:
        if progress >= self.ends:
            os.kill(os.getpid(), signal.SIGKILL)
        return self.loss.at(progress)

    def __call__(self, student_BC: Tensor, teacher_BC: Tensor | None, target: Tensor) -> Tensor:
        return self.loss(student_BC, teacher_BC, target)


def train_and_die(pipeline: Pipeline, ends: float) -> None:
    job = Experiment(pipeline).job(pipeline.student("small"), 0)
    job.loss = Deadly(loss=job.loss, ends=ends)
    train(job)


def test_a_training_killed_in_every_stage_ends_with_the_same_weights(
    tiny: Make, tmp_path: Path, forks: multiprocessing.context.BaseContext
) -> None:
    """Before, at and after the change of stages, and amid a schedule."""
    overrides = [
        with_loss(KL_THEN_TRUTH),
        "train.epochs=4",
        "train.checkpoint_steps=5",
        "students.small.model=tests.models:dropout_mlp",
        "students.small.args={}",
    ]
    cache_teacher(tiny(*overrides))
    train_students(tiny(*overrides), ["small"])
    disturbed = tiny(*overrides, f"runs.path={tmp_path}/disturbed")
    for ends in (0.2, 0.47, 0.5, 0.55, 0.9):
        process = forks.Process(target=train_and_die, args=(disturbed, ends))  # type: ignore[attr-defined]
        process.start()
        process.join()
        assert -signal.SIGKILL == process.exitcode
    train_students(disturbed, ["small"])

    assert same(tmp_path / "runs", tmp_path / "disturbed")


def test_a_wrong_loss_is_refused_with_the_pipeline(tiny: Make) -> None:
    with pytest.raises(UsageError, match=r"loss 'kl' has no parameter 'temprature'; did you mean 'temperature'"):
        tiny(with_loss("{name: kl, temprature: 3}"))
    with pytest.raises(UsageError, match="a temperature is positive, not -1"):
        tiny(with_loss("{stages: [{loss: {name: dkd, temperature: {from: 3, to: -1}}}]}"))
