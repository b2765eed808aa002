"""Several students on each rendered batch: as alone, to the last bit, for the price of one rendering."""

from __future__ import annotations

import json
import os
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from logitcache.config.schema import Pipeline
from logitcache.data.views import ViewDataset
from logitcache.progress import silence
from logitcache.stages.cache_teacher import cache_teacher
from logitcache.stages.train_student import Experiment, train_students
from logitcache.train.loop import Run
from logitcache.train.together import groups
from tests.conftest import FEW_DIGITS

Make = Callable[..., Pipeline]
STUDENTS = """[
  {name: soft, model: mlp, args: {hidden: [8]}, loss: {name: kl, temperature: 2.0}},
  {name: resized, model: cnn, args: {widths: [4]}, input: [{Resize: {size: [6, 6]}}], loss: {name: dkd, beta: 2.0}},
  {name: longer, model: mlp, args: {hidden: [12]}, loss: kl, train: {epochs: 3, ema: 0.9, clip_norm: 1.0}},
  {name: labels, model: mlp, args: {hidden: [8]}, loss: cross_entropy},
  {name: more-labels, model: mlp, args: {hidden: [16]}, loss: cross_entropy, train: {lr: 0.02}},
]"""
FROM_CACHE, FROM_LABELS = ["soft", "resized", "longer"], ["labels", "more-labels"]


@pytest.fixture
def five(tiny: Make, tmp_path: Path) -> Make:
    """A cached teacher and five students, three of which learn from it."""
    mixed = [*FEW_DIGITS, "data.validation=0.25", "views.mixup=0.4"]
    cache_teacher(tiny(*mixed))

    def make(folder: str, *overrides: str) -> Pipeline:
        common = [f"students={STUDENTS}", f"runs.path={tmp_path / folder}", "train.seeds=[0, 1]"]
        return tiny(*mixed, *common, *overrides)

    return make


def left_behind(folder: Path) -> dict[str, Any]:
    """Weights, and results but for the time they took, of every run."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix == ".safetensors":
            found[str(path.relative_to(folder))] = path.read_bytes()
        elif path.name == "result.json":
            found[str(path.relative_to(folder))] = json.loads(path.read_text()) | {"epoch_seconds": None}
    return found


def test_each_ends_as_it_would_alone(five: Make, tmp_path: Path) -> None:
    train_students(five("alone"))
    rows = train_students(five("together", "together=true"))

    alone, together = left_behind(tmp_path / "alone"), left_behind(tmp_path / "together")
    assert 5 * 2 * 3 == len(alone)
    assert alone == together
    assert ["soft", "resized", "longer", "labels", "more-labels"] == [row.name for row in rows]


def test_batches_are_rendered_once_for_all_that_share_them(five: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    rendered: Counter[int] = Counter()
    """By the length of the dataset."""
    really_render = ViewDataset._render

    def render(views: ViewDataset, view: int, index: int, *loaded: Any) -> Any:
        rendered[len(views)] += 1
        return really_render(views, view, index, *loaded)

    monkeypatch.setattr(ViewDataset, "_render", render)
    pipeline = five("together", "together=true", "train.seeds=[0]")
    samples = len(Experiment(pipeline).data.train)
    rendered.clear()
    train_students(pipeline, FROM_CACHE)
    # Two epochs for all three, and a third of the one that trains longer; alone they render seven. The rest is proofs.
    assert 3 * samples <= rendered[samples] < 4 * samples


def test_those_whose_batches_differ_are_not_together(five: Make) -> None:
    pipeline = five("any", "students.longer.train={batch_size: 32}", "students.more-labels.samples=0.5")
    experiment = Experiment(pipeline)
    jobs = [experiment.job(student, seed=0) for student in pipeline.students]

    assert [["soft", "resized"], ["longer"], ["labels"], ["more-labels"]] == [
        [job.name for job in group] for group in groups(jobs)
    ]


def die_after(steps: int, pipeline: Pipeline) -> None:
    """SIGKILL after so many steps of all students."""
    torch.set_num_threads(1)
    silence()
    taken = 0
    train_step = Run.train_step

    def dying_step(run: Run, *batch: Any) -> None:
        nonlocal taken
        train_step(run, *batch)
        taken += 1
        if taken == steps:
            os.kill(os.getpid(), signal.SIGKILL)

    Run.train_step = dying_step  # type: ignore[method-assign]
    train_students(pipeline, FROM_CACHE)


@pytest.mark.parametrize("steps", [1, 9, 14, 20])
def test_a_kill_loses_nothing(five: Make, tmp_path: Path, steps: int, forks: Any) -> None:
    """At any of their steps: some have a checkpoint of a later step than others."""
    train_students(five("alone", "train.seeds=[0]"), FROM_CACHE)
    pipeline = five("together", "together=true", "train.seeds=[0]", "train.checkpoint_steps=2")
    child = forks.Process(target=die_after, args=(steps, pipeline))
    child.start()
    child.join()
    assert -signal.SIGKILL == child.exitcode
    train_students(pipeline, FROM_CACHE)

    assert weights(tmp_path / "alone") == weights(tmp_path / "together")


def test_one_may_stop_early(five: Make, tmp_path: Path) -> None:
    settings = ["train.seeds=[0]", "train.epochs=4", "students.soft.train={early_stopping: 1, lr: 0.5}"]
    train_students(five("alone", *settings), FROM_CACHE)
    train_students(five("together", "together=true", *settings), FROM_CACHE)

    assert left_behind(tmp_path / "alone") == left_behind(tmp_path / "together")


def weights(folder: Path) -> dict[str, dict[str, bytes]]:
    """The bytes of each tensor of each run, whatever the files say of their origin."""
    return {
        str(path.relative_to(folder)): {
            name: value.numpy().tobytes() for name, value in safetensors.torch.load_file(path).items()
        }
        for path in sorted(folder.rglob("*.safetensors"))
    }
