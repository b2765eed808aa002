"""The training loop: schedules, parts of batches, averages, early stopping, logs, and runs that take turns."""

from __future__ import annotations

import csv
import json
import os
import signal
from collections.abc import Callable
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from logitcache.config.schema import Pipeline, TrainConfig
from logitcache.data.loading import rendered_batches
from logitcache.data.views import ViewDataset, ViewPlan
from logitcache.errors import UntrustedCode, UsageError
from logitcache.stages.cache_teacher import cache_teacher
from logitcache.stages.train_student import Experiment, train_students
from logitcache.train.evaluation import Evaluation
from logitcache.train.loop import Run
from logitcache.train.optimizer import OptimizerStep, learning_rate, weight_average
from logitcache.train.ranks import Ranks
from logitcache.train.runs import RunFolder
from tests.integration.test_stages import log, same, weights

Make = Callable[..., Pipeline]

EVERYTHING = [
    "students.small.model=tests.models:dropout_norm_mlp",
    "students.small.args={}",
    "students.small.samples=0.2",
    "train.epochs=4",
    "train.optimizer=sgd",
    "train.lr=0.1",
    "train.schedule=one_cycle",
    "train.accumulate=3",
    "train.clip_norm=0.5",
    "train.ema=0.9",
    "train.early_stopping=3",
    "train.precision=bfloat16",
    "train.checkpoint_steps=2",
]
"""All that a run may carry from step to step, and 4 epochs of 4 steps."""


def result(folder: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return {name: value for name, value in values.items() if name != "epoch_seconds"}


@pytest.mark.parametrize("epochs", [1, 7])
def test_one_cycle_is_torchs(epochs: int) -> None:
    config = TrainConfig(epochs=epochs, lr=0.3, schedule="one_cycle")
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.3, total_steps=11 * epochs, cycle_momentum=False)
    expected = []
    for _ in range(11 * epochs):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if len(expected) < 11 * epochs:
            schedule.step()

    assert [learning_rate(config, step, 11) for step in range(11 * epochs)] == pytest.approx(expected, rel=1e-9)


def test_one_cycle_rises_for_as_long_as_warmup_epochs_says() -> None:
    config = TrainConfig(epochs=10, lr=0.3, schedule="one_cycle", warmup_epochs=4)
    rates = [learning_rate(config, step, 5) for step in range(50)]

    assert 19 == int(np.argmax(rates))
    assert 0.3 == pytest.approx(rates[19])
    assert rates[:20] == sorted(rates[:20])


@pytest.mark.parametrize("key", ["warmup_epochs=4", "warmup_epochs=9", "epochs=1"])
@pytest.mark.parametrize("schedule", ["constant", "cosine", "one_cycle"])
def test_a_learning_rate_is_never_negative_or_above_the_largest(schedule: str, key: str) -> None:
    config = TrainConfig.model_validate({"epochs": 3, "lr": 0.3, "schedule": schedule} | dict([key.split("=")]))

    for steps_per_epoch in (1, 2, 3, 50):
        rates = [learning_rate(config, step, steps_per_epoch) for step in range(config.epochs * steps_per_epoch)]
        assert all(0 <= rate <= 0.3 + 1e-12 for rate in rates)


def test_a_batch_in_parts_gives_the_gradients_of_the_whole_batch(tiny: Make, tmp_path: Path) -> None:
    cache_teacher(tiny())
    logs = {}
    for parts in (1, 3, 64):
        train_students(
            tiny("train.batch_size=64", f"train.accumulate={parts}", f"runs.path={tmp_path}/{parts}"), ["small"]
        )
        logs[parts] = [line["train_loss"] for line in log(tmp_path / f"{parts}/small/seed-0") if "train_loss" in line]

    assert logs[1] == pytest.approx(logs[3], rel=1e-4)
    assert logs[1] == pytest.approx(logs[64], rel=1e-4)


def test_parts_of_a_batch_are_alike_in_size(tiny: Make) -> None:
    """So that batch norm meets no part of one sample, even where one sample joined the last batch."""
    cache_teacher(tiny())
    pipeline = tiny("train.batch_size=64", "train.accumulate=4")
    job = Experiment(pipeline).job(pipeline.student("small"), 0)
    run = Run(job, RunFolder(job.folder, job.identity))
    sizes = {size: [stop - start for start, stop in run._micro_batches(size)] for size in (64, 65, 18, 16, 1)}

    assert {64: [16] * 4, 65: [13] * 5, 18: [9, 9], 16: [16], 1: [1]} == sizes


def test_clipped_gradients_have_the_norm_asked_for() -> None:
    model = nn.Linear(5, 3)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    config = TrainConfig(optimizer="sgd", momentum=0.0, lr=1.0, schedule="constant", clip_norm=0.25)
    updates = OptimizerStep(model, config, torch.device("cpu"), steps_per_epoch=10)
    updates.backward((100 * model(torch.ones(4, 5))).square().mean())
    updates.apply(0)
    change = torch.cat([(now.detach() - then).flatten() for now, then in zip(model.parameters(), before, strict=True)])

    assert 0.25 == pytest.approx(float(change.norm()), rel=1e-4)


def test_averaged_weights_and_statistics_follow_the_models() -> None:
    """The reference is the recursion itself; batch norm's counter is the model's own."""
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    average = weight_average(model, decay=0.6)
    expected = {name: value.double().clone() for name, value in model.state_dict().items()}
    for update in range(12):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_()
        model(torch.randn(8, 3))
        average.update_parameters(model)
        decay = 0.0 if update == 0 else min(0.6, (1 + update) / (10 + update))
        for name, value in model.state_dict().items():
            expected[name] = decay * expected[name] + (1 - decay) * value
    averaged = average.module.state_dict()

    assert 12 == averaged["1.num_batches_tracked"]
    for name in ("0.weight", "1.weight", "1.running_mean", "1.running_var"):
        torch.testing.assert_close(averaged[name].double(), expected[name], rtol=1e-5, atol=1e-6)


def test_averaged_weights_are_the_runs_weights(tiny: Make, tmp_path: Path) -> None:
    cache_teacher(tiny())
    train_students(tiny(), ["small"])
    train_students(tiny("train.ema=0.99", f"runs.path={tmp_path}/ema"), ["small"])
    raw, averaged = tmp_path / "runs/small/seed-0", tmp_path / "ema/small/seed-0"
    losses = [[line for line in log(folder) if "train_loss" in line] for folder in (raw, averaged)]

    assert losses[0] == losses[1], "the average is looked at, not trained on"
    assert not same(weights(raw), weights(averaged))


def test_training_stops_when_validation_gets_no_better_and_measures_the_best(tiny: Make, tmp_path: Path) -> None:
    cache_teacher(tiny())
    pipeline = tiny("train.early_stopping=2", "train.epochs=40", "train.lr=1.0", "train.optimizer=sgd")
    train_students(pipeline, ["labels"])
    folder = tmp_path / "runs/labels/seed-0"
    accuracies = [line["validation_accuracy"] for line in log(folder) if "epoch" in line]
    best = int(np.argmax(accuracies))
    outcome = result(folder)

    assert best + 3 == len(accuracies) == outcome["epochs"]
    assert ("best", accuracies[best]) == (outcome["measured"], outcome["validation_accuracy"])
    assert not same(weights(folder), weights(folder, "best"))


def test_early_stopping_without_validation_is_refused(tiny: Make) -> None:
    whole = "data.validation=0"
    cache_teacher(tiny(whole))
    with pytest.raises(UsageError, match=r"early_stopping of small needs a validation split.*set data\.validation"):
        train_students(tiny("train.early_stopping=2", whole))


def test_keys_out_of_range_are_refused(tiny: Make) -> None:
    for override, message in (
        ("train.ema=1", "train.ema: Input should be less than 1"),
        ("train.accumulate=0", "train.accumulate: .*greater than or equal to 1"),
        ("train.clip_norm=0", "train.clip_norm: .*greater than 0"),
        ("train.early_stopping=0", "train.early_stopping: .*greater than or equal to 1"),
        ("train.schedule=linear", "train.schedule: .*'constant', 'cosine' or 'one_cycle'"),
        (
            "runs.tracker=comet",
            "runs.tracker: unknown tracker 'comet'; expected package.module:function or one of: wandb, mlflow",
        ),
    ):
        with pytest.raises(UsageError, match=message):
            tiny(override)


def train_until(pipeline: Pipeline, kill_at: int) -> None:
    """Train, and send SIGKILL to this very process in the middle of a step."""
    backward = OptimizerStep.apply

    def dying(updates: OptimizerStep, step: int) -> None:
        if step == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        backward(updates, step)

    OptimizerStep.apply = dying  # type: ignore[method-assign]
    train_students(pipeline, ["small"])


@pytest.mark.parametrize("also", [[], ["train.compile=true", "train.precision=float32"]], ids=["eager", "compiled"])
def test_a_run_with_everything_on_killed_at_any_step_ends_with_the_same_weights(
    tiny: Make, tmp_path: Path, forks: BaseContext, also: list[str]
) -> None:
    """SIGKILL in every step, or in one where each start compiles; last and best weights, log and result are the same."""
    cache_teacher(tiny())
    overrides = [*EVERYTHING, *also]
    train_students(tiny(*overrides), ["small"])
    whole = tmp_path / "runs/small/seed-0"
    for kill_at in range(16) if not also else (7,):
        disturbed = tiny(*overrides, f"runs.path={tmp_path}/{kill_at}")
        process = forks.Process(target=train_until, args=(disturbed, kill_at))  # type: ignore[attr-defined]
        process.start()
        process.join()
        assert -signal.SIGKILL == process.exitcode
        train_students(disturbed, ["small"])
        pieces = tmp_path / f"{kill_at}/small/seed-0"

        assert log(whole) == log(pieces)
        assert result(whole) == result(pieces)
        assert same(weights(whole), weights(pieces))
        assert same(weights(whole, "best"), weights(pieces, "best"))


def test_runs_that_take_turns_are_the_runs_alone(tiny: Make, tmp_path: Path) -> None:
    """Bit for bit, with dropout, and whatever somebody does to the global generators between two batches."""
    cache_teacher(tiny())
    train_students(tiny(*EVERYTHING, "train.seeds=[0, 1, 2]"), ["small"])
    pipeline = tiny(*EVERYTHING, f"runs.path={tmp_path}/turns")
    experiment = Experiment(pipeline)
    runs = []
    for seed in (0, 1, 2):
        job = experiment.job(pipeline.student("small"), seed)
        run = Run(job, RunFolder(job.folder, job.identity))
        runs.append((run, rendered_batches(job.views, run.places(), num_workers=0)))
    while not all(run.done for run, _ in runs):
        under_way = [(run, loader) for run, loader in runs if not run.done]
        for run, _ in under_way:
            run.begin_epoch()
        while any(run.in_epoch for run, _ in under_way):
            for run, loader in under_way:
                run.train_step(*next(loader))
                torch.rand(3)
        for run, _ in under_way:
            run.end_epoch()
    for run, _ in runs:
        run.finish()

    for seed in (0, 1, 2):
        alone, turns = tmp_path / f"runs/small/seed-{seed}", tmp_path / f"turns/small/seed-{seed}"
        assert log(alone) == log(turns)
        assert same(weights(alone), weights(turns))


class Fixed(nn.Module):
    """Gives the logits that it was made with."""

    def __init__(self, logits_NC: Tensor) -> None:
        super().__init__()
        self.logits_NC = logits_NC

    def forward(self, index_B: Tensor) -> Tensor:
        return self.logits_NC[index_B.long().flatten()]


class Numbers:
    """Samples that are their own index, with random targets."""

    def __init__(self, targets: np.ndarray) -> None:
        self.targets = targets

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.tensor([float(index)]), int(self.targets[index])


@pytest.mark.parametrize("num_classes", [3, 10])
def test_accuracies_and_calibration_are_what_a_loop_over_samples_finds(num_classes: int) -> None:
    rng = np.random.default_rng(5)
    targets, count = rng.integers(0, num_classes, 301), 301
    logits_NC = torch.from_numpy(rng.normal(0, 3, (count, num_classes)).astype(np.float32))
    views = ViewDataset(Numbers(targets), ViewPlan(preprocess=lambda value: value))
    measured = Evaluation(views, batch_size=64, num_workers=0).measure(Fixed(logits_NC), torch.device("cpu"))
    probabilities_NC = logits_NC.double().softmax(dim=1).numpy()
    confidence_N, right_N = probabilities_NC.max(axis=1), probabilities_NC.argmax(axis=1) == targets
    bin_N = np.ceil(confidence_N * 15)
    gaps = [abs((right_N[bin_N == each] - confidence_N[bin_N == each]).sum()) for each in np.unique(bin_N)]
    expected = {"accuracy": right_N.mean(), "calibration_error": sum(gaps) / count}
    if num_classes >= 10:
        ranked_N5 = np.argsort(-probabilities_NC, axis=1)[:, :5]
        expected["top5_accuracy"] = np.mean([target in five for target, five in zip(targets, ranked_N5, strict=True)])

    assert measured == pytest.approx(expected, abs=1e-6)


def test_every_epoch_is_a_line_of_the_table(tiny: Make, tmp_path: Path) -> None:
    cache_teacher(tiny())
    train_students(tiny(), ["small"])
    folder = tmp_path / "runs/small/seed-0"
    with (folder / "metrics.csv").open() as file:
        table = list(csv.DictReader(file))
    epochs = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines() if '"epoch"' in line]

    assert [{name: str(value) for name, value in line.items()} for line in epochs] == table
    assert {"loss", "lr", "validation_accuracy", "validation_calibration_error", "validation_top5_accuracy"} < set(
        table[0]
    )
    assert {"accuracy", "calibration_error", "top5_accuracy"} < set(result(folder))


def test_a_tracker_is_told_the_configuration_and_every_metric(tiny: Make, tmp_path: Path) -> None:
    cache_teacher(tiny())
    train_students(tiny("runs.tracker=tests.tracker:to_file"), ["small"])
    folder = tmp_path / "runs/small/seed-0"
    first, *told, last = [json.loads(line) for line in (folder / "tracked.jsonl").read_text().splitlines()]

    assert ("small", 0, "kl") == (
        first["start"]["name"],
        first["start"]["seed"],
        first["start"]["student"]["loss"]["name"],
    )
    assert 16 == len(first["start"]["id"])
    assert [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()] == told
    assert {"finished": True} == last


@pytest.mark.parametrize(("tracker", "when"), [("failing", "at step"), ("refusing", "when the run started")])
def test_a_tracker_that_fails_is_said_once_and_loses_nothing(
    tiny: Make, tmp_path: Path, capfd: pytest.CaptureFixture[str], tracker: str, when: str
) -> None:
    cache_teacher(tiny())
    train_students(tiny(), ["small"])
    train_students(tiny(f"runs.path={tmp_path}/tracked", f"runs.tracker=tests.tracker:{tracker}"), ["small"])
    said = capfd.readouterr().err

    assert 1 == said.count(f"runs.tracker tests.tracker:{tracker} failed {when}")
    assert log(tmp_path / "runs/small/seed-0") == log(tmp_path / "tracked/small/seed-0")


def test_a_tracker_from_elsewhere_needs_trust(tiny: Make) -> None:
    cache_teacher(tiny())
    with pytest.raises(UntrustedCode, match="--trust"):
        train_students(tiny("runs.tracker=json:dumps"), ["small"])


@pytest.mark.parametrize("size", [2, 3, 5])
def test_shares_of_a_batch_are_the_batch(size: int) -> None:
    for batch_size in range(1, 12):
        shares = [Ranks(rank, size).share(np.arange(batch_size)) for rank in range(size)]

        assert list(range(batch_size)) == np.concatenate(shares).tolist()
        assert Ranks(0, size).largest_share(batch_size) == max(map(len, shares))


def test_synchronised_batch_norm_on_the_cpu_is_refused() -> None:
    with pytest.raises(UsageError, match="train.sync_batchnorm needs CUDA, and this run is on cpu"):
        Ranks(0, 2).wrap(nn.BatchNorm1d(2), torch.device("cpu"), sync_batchnorm=True)
