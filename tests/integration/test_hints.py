"""Students that learn of more than logits: losses of features, the regressors beside a student, and what disturbs neither."""

from __future__ import annotations

import copy
import json
import math
import os
import signal
from collections.abc import Callable, Sequence
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import logitcache
from logitcache.cache.layout import all_blocks
from logitcache.config.build import build_context, build_runner, resolve_data, resolve_plan, resolve_teacher
from logitcache.config.overrides import override
from logitcache.config.schema import Pipeline, parse_pipeline
from logitcache.data.batching import collate
from logitcache.data.index import split_index
from logitcache.data.views import ViewDataset
from logitcache.errors import LogitCacheError, UsageError
from logitcache.losses import (
    FEATURE_LOSSES,
    FeatureLoss,
    Schedule,
    attention_transfer,
    feature_mse,
    feature_rkd,
    hint_loss_from_config,
    loss_from_config,
    rkd,
)
from logitcache.losses.schedules import is_zero_during
from logitcache.progress import silence
from logitcache.stages.cache_teacher import cache_teacher, teacher_batches
from logitcache.stages.train_student import Experiment, train_students
from logitcache.train.hint_config import hint_from_config
from logitcache.train.hints import Regressor
from logitcache.train.labels import CachedLabels, Labels
from logitcache.train.loop import Run, train
from logitcache.train.runs import RunFolder
from tests.conftest import TINY
from tests.durability.test_ranks import torchrun
from tests.integration.test_stages import log, same, weights
from tests.integration.test_train import result

Make = Callable[..., Pipeline]

TEACHER = [
    "teacher.model=cnn",
    "teacher.args={widths: [6, 8]}",
    "cache.outputs={maps: {module: body.3, encoding: Values(dtype='float32')}, "
    "pooled: {module: body, pool: 1, encoding: Values(dtype='float32')}, "
    "head: {module: head, encoding: Dense(dtype='float32')}}",
]
STUDENT = ["students.small.model=cnn", "students.small.args={widths: [4]}", "students.small.samples=0.2"]
HINTS = {
    "hint": "{output: maps, module: body, loss: hint}",
    "attention": "{output: maps, module: body, loss: attention, weight: 5}",
    "relational": "{output: pooled, module: body, loss: relational}",
    "head": "{output: head, module: head, loss: {name: kl, temperature: 2}}",
}
ALL = f"students.small.hints=[{', '.join(HINTS.values())}]"
EVERYTHING = [
    "train.epochs=3",
    "train.optimizer=sgd",
    "train.lr=0.1",
    "train.accumulate=2",
    "train.clip_norm=0.5",
    "train.ema=0.9",
    "train.precision=bfloat16",
    "train.checkpoint_steps=2",
]
FITNETS = [
    "students.small.loss={name: weighted, parts: [{loss: kl, weight: {from: 0, to: 1, over: 0.5, shape: step}}]}",
    "students.small.hints=[{output: maps, module: body, loss: hint, weight: {from: 1, to: 0, over: 0.5, shape: step}}]",
]
"""The hint first, and then the logits alone."""


@pytest.fixture(scope="module", autouse=True)
def cached(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache that most tests share."""
    path = tmp_path_factory.mktemp("shared") / "tiny.cache"
    raw = copy.deepcopy(TINY)
    raw["runs"]["path"] = "nowhere"
    for text in (*TEACHER, f"cache.path={path}"):
        override(raw, text)
    cache_teacher(parse_pipeline(raw, source="shared"))
    TEACHER.append(f"cache.path={path}")
    return path


def features(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def small(tiny: Make, *overrides: str) -> Pipeline:
    return tiny(*TEACHER, *STUDENT, *overrides)


def numpy_pool(maps: np.ndarray, places: tuple[int, int]) -> np.ndarray:
    """Adaptive average pooling, cell by cell."""
    height, width = maps.shape[2:]
    pooled = np.empty((*maps.shape[:2], *places))
    for row in range(places[0]):
        for column in range(places[1]):
            rows = slice(row * height // places[0], math.ceil((row + 1) * height / places[0]))
            columns = slice(column * width // places[1], math.ceil((column + 1) * width / places[1]))
            pooled[:, :, row, column] = maps[:, :, rows, columns].mean(axis=(2, 3))
    return pooled


def test_the_hint_is_the_mean_squared_difference_at_the_smaller_places() -> None:
    student, teacher = features(3, 2, 5, 4), features(3, 2, 3, 6, seed=1)
    pooled = [numpy_pool(each.numpy(), (3, 4)) for each in (student, teacher)]

    expected = np.square(pooled[0] - pooled[1]).mean(axis=(1, 2, 3))
    np.testing.assert_allclose(feature_mse(student, teacher), expected, rtol=1e-12)
    rows = features(3, 7), features(3, 7, seed=1)
    expected = np.square(rows[0].numpy() - rows[1].numpy()).mean(axis=1)
    np.testing.assert_allclose(feature_mse(*rows), expected, rtol=1e-12)


def test_attention_is_the_squared_distance_of_maps_of_norm_1() -> None:
    student, teacher = features(3, 2, 4, 4), features(3, 5, 2, 2, seed=1)
    maps = [np.square(each.numpy()).sum(axis=1, keepdims=True) for each in (student, teacher)]
    flat = [numpy_pool(each, (2, 2)).reshape(3, -1) for each in maps]
    units = [each / np.linalg.norm(each, axis=1, keepdims=True) for each in flat]

    np.testing.assert_allclose(attention_transfer(student, teacher), np.square(units[0] - units[1]).sum(axis=1))
    assert bool((attention_transfer(torch.zeros(2, 3, 2, 2), teacher[:2]) <= 1.0).all()), "no map is no NaN"


def test_relations_are_distances_and_angles_of_whole_features() -> None:
    student, teacher = features(5, 2, 3, 3).numpy().reshape(5, -1), features(5, 11, seed=1).numpy()
    expected = np.zeros(5)
    scaled, angles = [], []
    for points in (student, teacher):
        distances = np.linalg.norm(points[:, None] - points[None], axis=2)
        scaled.append(distances / distances[distances > 0].mean())
        edges = points[None] - points[:, None]
        units = edges / np.where(distances > 0, distances, 1)[:, :, None]
        angles.append(np.einsum("ijd,ikd->ijk", units, units))
    huber = lambda gap: np.where(np.abs(gap) < 1, gap**2 / 2, np.abs(gap) - 0.5)  # noqa: E731
    expected = huber(scaled[0] - scaled[1]).mean(axis=1) + 2 * huber(angles[0] - angles[1]).mean(axis=(1, 2))

    np.testing.assert_allclose(feature_rkd(torch.tensor(student).reshape(5, 2, 3, 3), torch.tensor(teacher)), expected)


def test_relations_count_a_constant_per_row_that_logits_do_not() -> None:
    rows, moved = features(4, 6), features(4, 6) + torch.arange(4)[:, None]

    assert float(feature_rkd(rows, moved).mean()) > 0.01
    torch.testing.assert_close(rkd(rows, moved), torch.zeros(4, dtype=torch.float64), atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", list(FEATURE_LOSSES))
def test_a_loss_of_features_is_0_where_they_agree_and_has_the_gradient_that_differences_show(name: str) -> None:
    loss = hint_loss_from_config(name)
    assert isinstance(loss, FeatureLoss)
    teacher = features(4, 3, 4, 4)
    student = features(4, 3, 6, 2, seed=1).requires_grad_()

    torch.testing.assert_close(loss(teacher, teacher), torch.zeros(4, dtype=torch.float64), atol=1e-7, rtol=0)
    assert torch.autograd.gradcheck(lambda values: loss(values, teacher), [student])
    assert loss(student.float(), teacher.float()).dtype == torch.float32


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", list(FEATURE_LOSSES))
def test_halves_are_widened_first(name: str, half: torch.dtype) -> None:
    loss = hint_loss_from_config(name)
    assert isinstance(loss, FeatureLoss)
    student, teacher = 300 * features(3, 2, 4, 4).to(half), features(3, 2, 4, 4, seed=1).float()

    assert torch.equal(loss(student, teacher), loss(student.float(), teacher))


def test_a_step_changes_at_once_and_says_where_it_is_zero() -> None:
    rising = Schedule(start=0, end=2, over=0.5, shape="step")

    assert [0, 0, 2, 2] == [rising.at(share) for share in (0.0, 0.499, 0.5, 1.0)]
    assert is_zero_during(rising, 0, 0.499)
    assert not is_zero_during(rising, 0, 0.5)
    assert not is_zero_during(Schedule(start=1, end=0), 0.9, 1.0)


@pytest.mark.parametrize(
    ("hint", "message"),
    [
        ("{module: body, loss: hint}", "hint 1: a hint lacks 'output'; its parameters are: output, module, loss"),
        (
            "{output: maps, modul: body, loss: hint}",
            "a hint has no parameter 'modul'; did you mean 'module'",
        ),
        ("{output: maps, module: body, loss: hints}", "unknown loss 'hints'; did you mean 'hint'"),
        ("{output: maps, module: body, loss: {name: hint, scale: 2}}", "loss 'hint' has no parameter 'scale'"),
        ("{output: maps, module: body, loss: hint, weight: -1}", "weight is at least 0"),
        ("{output: maps, module: body, loss: hint, weight: {from: 1}}", "lacks 'to'"),
        ("{output: maps, module: 3, loss: hint}", "`module` must be the path of a module"),
        ("{output: [maps], module: body, loss: hint}", "the name of one of the cache's outputs"),
        ("{output: head, module: head, loss: cross_entropy}", "takes the true labels"),
        ("{output: head, module: head, loss: dkd}", "takes the true labels"),
        ("{output: head, module: head, loss: {stages: [{until: 0.5, loss: kl}, {loss: blend}]}}", "takes the true"),
        ("{output: head, module: head, loss: {name: relational, angle_weight: x}}", "angle_weight is a number"),
        ("maps", "expected a mapping such as"),
    ],
)
def test_a_hint_that_can_not_be_is_refused_with_the_pipeline(tiny: Make, hint: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        small(tiny, f"students.small.hints=[{hint}]")


@pytest.mark.parametrize(
    ("hint", "message"),
    [
        ("{output: map, module: body, loss: hint}", "the output 'map'; available: logits, head, maps, pooled"),
        ("{output: maps, module: bodi, loss: hint}", "CNN has no module 'bodi'; nearest: body"),
        ("{output: maps, module: head, loss: attention}", r"returns \(10,\), the teacher's output is \(6, 4, 4\)"),
        ("{output: maps, module: head, loss: hint}", r"no regressor from \(10,\) to \(6, 4, 4\)"),
        ("{output: maps, module: body, loss: kl}", "'kl' compares logits, one for each class"),
        ("{output: head, module: body, loss: relational}", "'head' is encoded as logits, up to a constant"),
        ("{output: logits, module: head, loss: hint}", "'logits' is encoded as logits"),
    ],
)
def test_a_hint_that_does_not_fit_is_refused_before_any_step(
    tiny: Make, tmp_path: Path, hint: str, message: str
) -> None:
    for labels in ("cache", "live"):
        pipeline = small(tiny, f"students.small.hints=[{hint}]", f"students.small.labels={labels}")
        with pytest.raises(LogitCacheError, match=message.replace("head, maps, pooled", ".*")):
            train_students(pipeline)
    assert not (tmp_path / "runs").exists()


def test_hints_of_several_teachers_are_refused(tiny: Make) -> None:
    with pytest.raises(UsageError, match="`hints` need the labels of one cache"):
        small(tiny, ALL, "students.small.labels={caches: [a.cache, b.cache]}")


@pytest.mark.parametrize(
    ("student", "teacher"), [((4, 8, 8), (6, 4, 4)), ((4, 2, 2), (6, 4, 4)), ((5,), (7,)), ((4, 3, 3), (6,)), ((5, 4), (5, 6))]
)  # fmt: skip
def test_a_regressor_leads_to_the_teachers_channels(student: tuple[int, ...], teacher: tuple[int, ...]) -> None:
    regressed = Regressor(student, teacher)(torch.randn(3, *student))

    assert feature_mse(regressed, torch.randn(3, *teacher)).shape == (3,)
    assert (teacher[-1] if len(teacher) == 2 else teacher[0]) == regressed.shape[2 if len(teacher) == 2 else 1]


def gap(pipeline: Pipeline, *, trained: Path | None) -> float:
    """The student's loss on its hint alone, over some samples of view 0, without the regressor's own training."""
    experiment = Experiment(pipeline)
    job = experiment.job(pipeline.student("small"), 0)
    assert job.hints is not None
    assert isinstance(job.labels, CachedLabels)
    if trained is not None:
        job.model.load_state_dict(weights(trained))
    hinted = job.hints.attach(job.model.eval())
    hinted.capture.hook()
    rows = torch.arange(200)
    job.labels.start_views([0], [])
    said = job.labels.outputs(sorted(job.hints.needed_at(0.0)), rows, None, rows)
    with torch.no_grad():
        _, felt = hinted(torch.stack([job.views[(0, int(row))][1] for row in rows]))
        return float(job.hints.losses(felt, said, 0.0).mean())


@pytest.mark.parametrize("name", ["attention", "relational", "head"])
def test_a_student_comes_closer_to_what_it_is_hinted_at(tiny: Make, tmp_path: Path, name: str) -> None:
    """By the hint alone, with a head that the logits' loss leaves alone."""
    quiet = "students.small.loss={name: weighted, parts: [{loss: kl, weight: 0}]}"
    pipeline = small(tiny, quiet, f"students.small.hints=[{HINTS[name]}]", "train.epochs=10", "train.lr=0.03")
    before = gap(pipeline, trained=None)
    train_students(pipeline, ["small"])

    assert gap(pipeline, trained=tmp_path / "runs/small/seed-0") < 0.95 * before


def test_regressors_are_trained_with_the_student_and_no_part_of_it(tiny: Make, tmp_path: Path) -> None:
    pipeline = small(tiny, ALL, "train.ema=0.9")
    job = Experiment(pipeline).job(pipeline.student("small"), 0)
    run = Run(job, RunFolder(job.folder, job.identity))
    assert run._hinted is not None
    before = {name: value.clone() for name, value in run._hinted.regressors.state_dict().items()}
    loader = iter([job.views.__getitems__(places) for places in run.places()])
    run.begin_epoch()
    for _ in range(3):
        run.train_step(*collate(next(loader)))
    after = run._hinted.regressors.state_dict()

    assert ["0.linear.weight", "0.linear.bias"] == list(before), "of the hint alone"
    assert all(not torch.equal(before[name], after[name]) for name in before)
    train_students(small(tiny, ALL, f"runs.path={tmp_path}/whole"))
    for name in ("last", "best"):
        assert job.model.state_dict().keys() == weights(tmp_path / "whole/small/seed-0", name).keys()
    parameters = sum(parameter.numel() for parameter in job.model.parameters())
    assert parameters == result(tmp_path / "whole/small/seed-0")["parameters"]


def test_hints_leave_the_students_own_start_alone(tiny: Make) -> None:
    states = []
    for overrides in ([], [ALL]):
        pipeline = small(tiny, *overrides)
        states.append(Experiment(pipeline).job(pipeline.student("small"), 0).model.state_dict())

    assert same(*states)


def test_a_hint_that_weighs_nothing_leaves_no_trace(tiny: Make, tmp_path: Path) -> None:
    train_students(small(tiny), ["small"])
    nothing = "students.small.hints=[{output: maps, module: body, loss: hint, weight: 0}]"
    train_students(small(tiny, nothing, f"runs.path={tmp_path}/hinted"), ["small"])

    assert same(weights(tmp_path / "runs/small/seed-0"), weights(tmp_path / "hinted/small/seed-0"))
    assert log(tmp_path / "runs/small/seed-0") == log(tmp_path / "hinted/small/seed-0")


def test_fitnets_reads_features_in_its_first_stage_and_logits_in_its_second(
    tiny: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    whole = logitcache.LogitCache.read_blocks
    monkeypatch.setattr(
        logitcache.LogitCache,
        "read_blocks",
        lambda self, view, numbers, output="logits": read.append(output) or whole(self, view, numbers, output),
    )
    stages = "students.small.loss={stages: [{until: 0.5, loss: cross_entropy}, {loss: kl}]}"
    train_students(small(tiny, stages, FITNETS[1], "train.epochs=4"), ["small"])

    assert ["maps", "maps", "logits", "logits"] == read


class LiveOnTheCachesBatches(Labels):
    """The teacher's hooked modules, run on the very batches that stage 1 gave it."""

    def __init__(self, pipeline: Pipeline) -> None:
        data = resolve_data(pipeline, trust=False)
        plan = resolve_plan(pipeline, data, trust=False)
        teacher, _ = resolve_teacher(pipeline, data, plan, trust=False)
        self.teacher = build_runner(pipeline, teacher, build_context(pipeline, trust=False), ["maps", "pooled", "head"])
        self.views = ViewDataset(data.train, plan)
        self.cache = logitcache.open(pipeline.cache.path)
        self.batch_size = pipeline.teacher.batch_size
        self.current: dict[str, Tensor] = {}

    def start_view(self, view: int, following: int | None) -> None:
        blocks = [block for block in all_blocks(self.cache.layout) if block.view == view]
        parts = []
        for _, rows in teacher_batches(self.cache.row_map, blocks, self.batch_size):
            with torch.no_grad():
                logits, others = self.teacher(collate(self.views.__getitems__([(view, row) for row in rows]))[1])
            parts.append({"logits": logits, **others})
        self.current = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def outputs(self, names: Sequence[str], index: Tensor, teacher_inputs: Any, targets: Tensor) -> dict[str, Tensor]:
        return {name: self.current[name][split_index(index)[1]] for name in names}


def test_hints_of_the_cache_are_bit_for_bit_those_of_the_live_teacher(tiny: Make, tmp_path: Path) -> None:
    settings = [ALL, "views.mixup=0.4", "train.batch_size=60", f"cache.path={tmp_path}/mixed.cache"]
    pipeline = small(tiny, *settings)
    cache_teacher(pipeline)
    train_students(pipeline, ["small"])
    experiment = Experiment(small(tiny, *settings, f"runs.path={tmp_path}/live"))
    train(experiment.job(experiment.pipeline.student("small"), 0, labels=LiveOnTheCachesBatches(pipeline)))

    cached, live = tmp_path / "runs/small/seed-0", tmp_path / "live/small/seed-0"
    assert log(cached) == log(live)
    assert same(weights(cached), weights(live))


def test_the_live_teacher_gives_hints_without_a_cache(tiny: Make, tmp_path: Path) -> None:
    """As the cached ones but for rounding: the student's batches are others than stage 1's."""
    train_students(small(tiny, ALL, "students.small.labels=live", f"runs.path={tmp_path}/live"), ["small"])
    train_students(small(tiny, ALL), ["small"])

    losses = [
        [line["train_loss"] for line in log(tmp_path / name / "small/seed-0") if "train_loss" in line]
        for name in ("runs", "live")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def train_until(pipeline: Pipeline, kill_at: int) -> None:
    silence()
    train_step, taken = Run.train_step, 0

    def dying_step(self: Run, *batch: Any) -> None:
        nonlocal taken
        train_step(self, *batch)
        taken += 1
        if taken == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    Run.train_step = dying_step  # type: ignore[method-assign]
    train_students(pipeline, ["small"])


@pytest.mark.parametrize(("hints", "kill_at"), [([ALL], 3), (FITNETS, 7)], ids=["all", "fitnets"])
def test_a_hinted_run_that_was_killed_ends_with_the_same_weights(
    tiny: Make, tmp_path: Path, forks: BaseContext, hints: list[str], kill_at: int
) -> None:
    """Regressors and their momentum are in the checkpoint."""
    train_students(small(tiny, *EVERYTHING, *hints), ["small"])
    disturbed = small(tiny, *EVERYTHING, *hints, f"runs.path={tmp_path}/pieces")
    process = forks.Process(target=train_until, args=(disturbed, kill_at))  # type: ignore[attr-defined]
    process.start()
    process.join()
    assert -signal.SIGKILL == process.exitcode
    train_students(disturbed, ["small"])
    whole, pieces = (tmp_path / f"{name}/small/seed-0" for name in ("runs", "pieces"))

    assert log(whole) == log(pieces)
    assert same(weights(whole), weights(pieces))


def test_hinted_students_that_take_turns_end_as_they_would_alone(tiny: Make, tmp_path: Path) -> None:
    students = f"""students=[
        {{name: hinted, model: cnn, args: {{widths: [4]}}, hints: [{HINTS["hint"]}]}},
        {{name: plain, model: cnn, args: {{widths: [4]}}}},
        {{name: attentive, model: cnn, args: {{widths: [6]}}, loss: cross_entropy, hints: [{HINTS["attention"]}]}}]"""
    train_students(tiny(*TEACHER, students))
    train_students(tiny(*TEACHER, students, "together=true", f"runs.path={tmp_path}/together"))

    for name in ("hinted", "plain", "attentive"):
        assert same(weights(tmp_path / f"runs/{name}/seed-0"), weights(tmp_path / f"together/{name}/seed-0"))


def test_two_processes_have_the_losses_of_one(tiny: Make, tmp_path: Path) -> None:
    """Relations are left out: they see a share of the batch. The last stage leaves the regressor without a loss."""
    hint = "{output: maps, module: '1', loss: hint, weight: {from: 1, to: 0, over: 0.5, shape: step}}"
    attention, head = "{output: maps, module: '1', loss: attention}", "{output: head, module: '4', loss: kl}"
    student = ["students.small.model=tests.models:plain_cnn", "students.small.args={}"]
    hints = f"students.small.hints=[{hint}, {attention}, {head}]"
    settings = [*student, hints, "train.optimizer=sgd", "train.lr=0.1", "train.checkpoint_steps=1"]
    train_students(small(tiny, *settings), ["small"])
    done = torchrun(2, small(tiny, *settings, f"runs.path={tmp_path}/shared"), "train-student", "--student=small")
    assert 0 == done.returncode, done.stderr
    folders = [tmp_path / f"{name}/small/seed-0" for name in ("runs", "shared")]
    losses = [[line["train_loss"] for line in log(folder) if "train_loss" in line] for folder in folders]

    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    ours, theirs = weights(folders[0]), weights(folders[1])
    assert all(float((ours[name] - theirs[name]).abs().max()) < 1e-4 for name in ours)


def test_a_compiled_student_learns_from_hints(tiny: Make, tmp_path: Path) -> None:
    hints = "{output: pooled, module: body, loss: relational}, {output: head, module: head, loss: kl}"
    settings = [
        f"students.small.hints=[{hints}]",
        "train.epochs=1",
        "train.batch_size=259",
        "students.small.samples=0.2",
    ]
    for compiled in (False, True):
        train_students(
            tiny(*TEACHER, *settings, f"train.compile={compiled}", f"runs.path={tmp_path}/{compiled}"), ["small"]
        )
    plain, compiled_too = (weights(tmp_path / f"{name}/small/seed-0") for name in (False, True))

    assert all(float((plain[name] - compiled_too[name]).abs().max()) < 1e-5 for name in plain)


def test_features_larger_than_memory_are_streamed(tiny: Make, tmp_path: Path) -> None:
    budget = "cache.memory_budget_mb=0.1"
    train_students(small(tiny, ALL, budget), ["small"])
    pipeline = small(tiny, ALL, budget, f"runs.path={tmp_path}/again")
    job = Experiment(pipeline).job(pipeline.student("small"), 0)
    assert job.window_blocks is not None
    train_students(pipeline, ["small"])

    assert same(weights(tmp_path / "runs/small/seed-0"), weights(tmp_path / "again/small/seed-0"))


def test_a_run_knows_its_hints(tiny: Make, tmp_path: Path) -> None:
    train_students(small(tiny), ["small"])
    assert "hints" not in (tmp_path / "runs/small/seed-0/run.yaml").read_text(), "as before there were any"
    with pytest.raises(UsageError, match="another configuration .differs in student.hints"):
        train_students(small(tiny, ALL), ["small"])
    stated = small(tiny, ALL).student("small").hints
    assert [hint_from_config(config).output for config in json.loads(json.dumps(stated))] == [
        "maps",
        "maps",
        "pooled",
        "head",
    ]


def test_a_head_of_another_task_is_learned_from_the_cache(tiny: Make, tmp_path: Path) -> None:
    teacher = [
        "teacher.model=tests.models:TwoHeads",
        "teacher.args={}",
        "cache.outputs={logits: digit, parity: {module: parity, encoding: Dense(dtype='float32')}}",
    ]
    student = [
        "students.small.model=tests.models:TwoHeadedStudent",
        "students.small.args={}",
        "students.small.hints=[{output: parity, module: parity, loss: kl, weight: 10}]",
        "train.epochs=4",
    ]
    cache_teacher(tiny(*teacher))
    pipeline = tiny(*teacher, *student)
    before = gap(pipeline, trained=None)
    train_students(pipeline, ["small"])

    assert gap(pipeline, trained=tmp_path / "runs/small/seed-0") < 0.5 * before


def test_losses_say_whether_they_take_the_true_label() -> None:
    takes = ["cross_entropy", "dkd", "hard_plus_soft", "blend", {"name": "weighted", "parts": [{"loss": "dkd"}]}]
    leaves = ["kl", "dist", "rkd", "teacher_argmax", {"name": "blend", "hard": "teacher_argmax"}]

    assert [True] * 5 + [False] * 5 == [loss_from_config(config).needs_target for config in [*takes, *leaves]]
