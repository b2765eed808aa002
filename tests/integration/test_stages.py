"""Stage 1 and stage 2 from a pipeline: the same labels as the teacher's own, and results that nothing disturbs."""

from __future__ import annotations

import json
import random
import re
import time
from collections.abc import Callable, Sequence
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import yaml
from torch import Tensor

import logitcache
import logitcache.config.build
from logitcache.cache.layout import all_blocks
from logitcache.config.build import build_context, build_runner, resolve_data, resolve_plan, resolve_teacher
from logitcache.config.schema import Pipeline
from logitcache.data.batching import collate
from logitcache.data.index import split_index
from logitcache.data.views import ViewDataset
from logitcache.errors import IdentityMismatch, IncompleteCache, UsageError
from logitcache.stages.cache_teacher import cache_teacher, teacher_batches
from logitcache.stages.dry_run import plan_run
from logitcache.stages.run import run_pipeline
from logitcache.stages.train_student import Experiment, train_students
from logitcache.stages.train_teacher import train_teacher
from logitcache.train.labels import Labels
from logitcache.train.loop import train
from logitcache.verify.audit import verify
from tests.conftest import ALL_DIGITS, FEW_DIGITS

Make = Callable[..., Pipeline]


def weights(folder: Path, name: str = "last") -> dict[str, Tensor]:
    return safetensors.torch.load_file(folder / f"{name}.safetensors")


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def log(folder: Path) -> list[dict[str, Any]]:
    """The metrics of a run, without what is measured by a clock."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "epoch_seconds"} for line in lines]


class LiveOnTheCachesBatches(Labels):
    """The teacher itself, run on the very batches that stage 1 gave it."""

    def __init__(self, pipeline: Pipeline) -> None:
        data = resolve_data(pipeline, trust=False)
        plan = resolve_plan(pipeline, data, trust=False)
        self.teacher, _ = resolve_teacher(pipeline, data, plan, trust=False)
        self.views = ViewDataset(data.train, plan)
        self.cache = logitcache.open(pipeline.cache.path)
        self.batch_size = pipeline.teacher.batch_size
        self.current = torch.empty(0)

    def start_view(self, view: int, following: int | None) -> None:
        blocks = [block for block in all_blocks(self.cache.layout) if block.view == view]
        with torch.inference_mode():
            logits = [
                self.teacher(collate(self.views.__getitems__([(view, row) for row in rows]))[1])
                for _, rows in teacher_batches(self.cache.row_map, blocks, self.batch_size)
            ]
        self.current = torch.cat(logits).clone()

    def outputs(self, names: Sequence[str], index: Tensor, teacher_inputs: Any, targets: Tensor) -> dict[str, Tensor]:
        return {"logits": self.current[split_index(index)[1]]}


SETTINGS = {
    "epochs": 2,
    "batch_size": 64,
    "optimizer": "adamw",
    "lr": 0.01,
    "weight_decay": 0.0,
    "momentum": 0.9,
    "schedule": "cosine",
    "warmup_epochs": 0.0,
    "accumulate": 1,
    "clip_norm": None,
    "ema": None,
    "early_stopping": None,
    "compile": False,
    "sync_batchnorm": False,
    "precision": "float32",
    "channels_last": False,
    "checkpoint_steps": 0,
    "seed": 0,
}
COMMON = {
    "train": SETTINGS,
    "data": {"name": "digits", "validation": 0.1, "args": {}, "subset": False},
    "views": {
        "seed": 3,
        "transform": [{"RandomAffine": {"degrees": 10, "translate": [0.1, 0.1]}}],
        "mixup": 0.0,
        "cutmix": 0.0,
        "mix_probability": 1.0,
    },
}
MLP = {"model": "mlp", "args": {"hidden": [8]}, "input": None, "weights": None, "samples": 1.0}
KL = {"name": "kl", "temperature": 2.0}
HINT = {"output": "features", "module": "body.1", "loss": {"name": "hint"}, "weight": 1.0}
VALUES = {"module": "body.1", "encoding": {"name": "values", "dtype": "float16"}}
CACHED = {**MLP, "name": "small", "loss": KL, "labels": "cache"}
FEATURES = "cache.outputs={features: body.1}"
IDENTITIES: dict[str, tuple[list[str], str, dict[str, Any]]] = {
    "cached": (
        [],
        "small",
        {"student": CACHED, **COMMON, "labels": {"cache": "CACHE", "window_blocks": None}, "num_views": 2},
    ),
    "fresh": (
        [],
        "labels",
        {
            "student": {**MLP, "name": "labels", "loss": {"name": "true_label"}, "labels": "cache"},
            **COMMON,
            "num_views": None,
        },
    ),
    "live": (
        [
            FEATURES,
            "students.small.labels=live",
            "students.small.hints=[{output: features, module: body.1, loss: hint}]",
        ],
        "small",
        {
            "student": {**CACHED, "labels": "live", "hints": [HINT]},
            **COMMON,
            "labels": {"teacher": "TEACHER", "outputs": {"features": VALUES}},
            "num_views": 2,
        },
    ),
    "streamed": (
        ["cache.memory_budget_mb=0.02", "students.small.sample_weights=teacher_confidence"],
        "small",
        {
            "student": {**CACHED, "sample_weights": {"name": "teacher_confidence"}},
            **COMMON,
            "weighed_by": {"cache": "CACHE"},
            "labels": {"cache": "CACHE", "window_blocks": 1},
            "num_views": 2,
        },
    ),
}


@pytest.mark.parametrize("name", IDENTITIES)
def test_the_identity_of_a_run_does_not_change(tiny: Make, name: str) -> None:
    """Else finished runs of earlier versions would be refused."""
    overrides, student, expected = IDENTITIES[name]
    pipeline = tiny(*ALL_DIGITS, *overrides)
    manifest = cache_teacher(pipeline).manifest
    identity = Experiment(pipeline).job(pipeline.student(student), 0).identity

    stated = json.dumps(identity).replace(manifest.id, "CACHE").replace(manifest.identity.teacher, "TEACHER")
    assert json.loads(stated) == expected


def test_the_identity_of_a_trained_teacher_does_not_change(tiny: Make, tmp_path: Path) -> None:
    train_teacher(tiny(*ALL_DIGITS, "teacher.weights=trained"))
    teacher = {
        "model": "mlp",
        "args": {"hidden": [16]},
        "input": None,
        "weights": "trained",
        "start_from": None,
        "train": {},
    }

    assert yaml.safe_load((tmp_path / "runs/teacher/run.yaml").read_text()) == {"teacher": teacher, **COMMON}


def test_the_check_before_training_builds_no_model_twice(tiny: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = tiny("train.seeds=[0,1]")
    cache_teacher(pipeline)
    built: list[Any] = []
    build = logitcache.config.build.build_model
    monkeypatch.setattr(
        logitcache.config.build,
        "build_model",
        lambda name, **options: built.append(options["args"]["hidden"]) or build(name, **options),
    )
    train_students(pipeline)

    assert [[8]] * 4 == [hidden for hidden in built if hidden != [16]]


@pytest.mark.parametrize("net", ["mlp", "cnn"])
def test_a_student_of_the_cache_is_bit_for_bit_the_student_of_the_live_teacher(
    tiny: Make, tmp_path: Path, net: str
) -> None:
    overrides = ["views.mixup=0.4", f"teacher.model={net}", f"students.small.model={net}", "train.batch_size=60"]
    if net == "cnn":
        overrides += ["teacher.args={widths: [8, 8]}", "students.small.args={widths: [4, 4]}"]
    pipeline = tiny(*overrides)
    cache_teacher(pipeline)
    train_students(pipeline, ["small"])
    experiment = Experiment(tiny(*overrides, f"runs.path={tmp_path}/live"))
    student = experiment.pipeline.student("small")
    train(experiment.job(student, 0, labels=LiveOnTheCachesBatches(pipeline)))

    cached, live = tmp_path / "runs/small/seed-0", tmp_path / "live/small/seed-0"
    assert log(cached) == log(live)
    assert same(weights(cached), weights(live))


@pytest.mark.parametrize("net", ["mlp", "cnn", "resnet20"])
def test_cached_and_live_logits_differ_by_rounding_only(tiny: Make, net: str) -> None:
    """The student's batches are not the teacher's, so the last bits of a product may differ; `pytest -s` shows them."""
    pipeline = tiny("views.mixup=0.4", f"teacher.model={net}", "teacher.args={}")
    cache_teacher(pipeline)
    experiment = Experiment(pipeline)
    teacher, _ = resolve_teacher(pipeline, experiment.data, experiment.plan, trust=False)
    views = ViewDataset(experiment.data.train, experiment.plan)
    cached = logitcache.open(pipeline.cache.path).view(1)
    largest, largest_logit = 0.0, float(cached.logits(range(len(views))).abs().max())
    for batch in np.array_split(np.random.default_rng(0).permutation(len(views)), 23):
        rows, inputs, _ = collate(views.__getitems__([(1, int(index)) for index in batch]))
        with torch.inference_mode():
            largest = max(largest, float((cached.logits(rows) - teacher(inputs)).abs().max()))

    print(f"{net}: the largest difference of a logit is {largest:.1e}, of logits up to {largest_logit:.1f}")
    assert largest < 1e-5 * largest_logit


def test_the_number_of_workers_does_not_show(tiny: Make, tmp_path: Path) -> None:
    digests = []
    for workers in (0, 2):
        pipeline = tiny(
            f"num_workers={workers}", f"cache.path={tmp_path}/{workers}.cache", f"runs.path={tmp_path}/{workers}"
        )
        digests.append(cache_teacher(pipeline).manifest.digest)
        train_students(pipeline)

    assert digests[0] == digests[1]
    for student in ("small", "labels"):
        assert same(weights(tmp_path / f"0/{student}/seed-0"), weights(tmp_path / f"2/{student}/seed-0"))


def test_a_sealed_cache_is_left_alone(tiny: Make) -> None:
    first, second = cache_teacher(tiny()), cache_teacher(tiny())

    assert (len(first.computed_blocks), second.computed_blocks) == (12, [])
    assert first.manifest == second.manifest


def test_another_encoding_is_refused_before_data_and_teacher_are_loaded(tiny: Make) -> None:
    cache_teacher(tiny())
    with pytest.raises(IdentityMismatch, match=r"holds another cache[^\n]*\n  encoding"):
        cache_teacher(tiny("cache.encoding=TopK(k=3)", "data.name=tests.models:absent"))


def test_asking_for_more_views_computes_only_those(tiny: Make) -> None:
    cache_teacher(tiny())
    grown = cache_teacher(tiny("views.count=3"))

    assert {2} == {block.view for block in grown.computed_blocks}
    assert verify(tiny().cache.path, deep=True) == []


def test_a_build_killed_at_thirty_instants_is_the_build_never_killed(
    tiny: Make, tmp_path: Path, forks: BaseContext
) -> None:
    """SIGKILL; committed blocks are never computed again, and the content digest comes out the same."""
    few_rows = [*FEW_DIGITS, "views.count=3"]
    undisturbed = tiny(*few_rows, f"cache.path={tmp_path}/undisturbed.cache")
    run_for(forks, int)  # the server of processes imports torch once
    seconds = run_for(forks, cache_teacher, undisturbed)
    digest = cache_teacher(undisturbed).manifest.digest
    instants = random.Random(20261121)
    killed = 0
    for number in range(90):
        if killed == 30:
            break
        pipeline = tiny(*few_rows, f"cache.path={tmp_path}/{number}.cache")
        killed += run_for(forks, cache_teacher, pipeline, kill_after=instants.uniform(0.0, seconds)) < 0
        committed = committed_blocks(pipeline.cache.path)
        resumed = cache_teacher(pipeline)

        assert digest == resumed.manifest.digest
        assert set() == committed & {block.name for block in resumed.computed_blocks}
        assert resumed.total_blocks == len(committed) + len(resumed.computed_blocks)
        assert verify(pipeline.cache.path, deep=True) == []
        assert list(Path(pipeline.cache.path).rglob("*.partial")) == []
    assert killed == 30


def run_for(forks: BaseContext, work: Callable[..., Any], *arguments: Any, kill_after: float | None = None) -> float:
    """Run something in a process of its own; the seconds that it took, or -1 where it had to be killed (SIGKILL)."""
    process = forks.Process(target=work, args=arguments)  # type: ignore[attr-defined]
    start = time.perf_counter()
    process.start()
    process.join(timeout=kill_after)
    alive = process.is_alive()
    process.kill()
    process.join()
    return -1.0 if alive else time.perf_counter() - start


def committed_blocks(path: str) -> set[str]:
    if not (Path(path) / "manifest.json").is_file():
        return set()
    return set(logitcache.open(path).receipts) - {"fixed"}


@pytest.mark.parametrize("checkpoint_steps", [0, 3])
def test_a_training_killed_at_any_step_ends_with_the_same_weights(
    tiny: Make, tmp_path: Path, forks: BaseContext, checkpoint_steps: int
) -> None:
    """With dropout, whose generator must resume as well."""
    overrides = [
        "students.small.model=tests.models:dropout_mlp",
        "students.small.args={}",
        f"train.checkpoint_steps={checkpoint_steps}",
        "train.epochs=6",
    ]
    cache_teacher(tiny())
    train_students(tiny(*overrides), ["small"])
    run_for(forks, int)
    instants = random.Random(7)
    disturbed = tiny(*overrides, f"runs.path={tmp_path}/disturbed")
    kills = 0
    for _ in range(6):
        kills += run_for(forks, train_students, disturbed, ["small"], kill_after=instants.uniform(0.3, 1.5)) < 0
    train_students(disturbed, ["small"])

    whole, pieces = tmp_path / "runs/small/seed-0", tmp_path / "disturbed/small/seed-0"
    assert kills > 0
    assert same(weights(whole), weights(pieces))
    assert same(weights(whole, "best"), weights(pieces, "best"))
    assert log(whole) == log(pieces)


def test_a_run_leaves_its_yaml_log_events_and_weights(tiny: Make, tmp_path: Path) -> None:
    cache_teacher(tiny())
    (row,) = train_students(tiny(), ["small"])
    folder = tmp_path / "runs/small/seed-0"

    assert {"run.yaml", "pipeline.yaml", "metrics.jsonl", "result.json", "best.safetensors", "last.safetensors"} < {
        path.name for path in folder.iterdir()
    }
    assert len(list(folder.glob("events.out.tfevents.*"))) == 1
    assert len([line for line in log(folder) if "epoch" in line]) == 2
    assert row.accuracy_mean is not None


def test_a_finished_run_is_not_repeated_and_another_configuration_is_refused(tiny: Make) -> None:
    cache_teacher(tiny())
    first = train_students(tiny(), ["small"])

    assert first == train_students(tiny(), ["small"])
    with pytest.raises(
        UsageError, match=r"(?s)another configuration \(differs in train.lr\).*Give the student another"
    ):
        train_students(tiny("train.lr=0.5"), ["small"])


def test_a_cache_that_gets_more_views_keeps_the_results_of_its_students(tiny: Make) -> None:
    """The message's override trains another student beside the finished one."""
    cache_teacher(tiny())
    [before] = train_students(tiny(), ["small"])
    assert 6 == len(cache_teacher(tiny("views.count=3")).computed_blocks)
    with pytest.raises(UsageError, match="Its result is of 2 views, and stays valid; this run has 3") as error:
        train_students(tiny("views.count=3"), ["small"])
    [renamed] = re.findall(r"students\.\S+=\S+(?=\.)", str(error.value))

    [after] = train_students(tiny("views.count=3", renamed), ["small-3-views"])

    assert before == train_students(tiny("views.count=2"), ["small"])[0]
    assert ("small", "small-3-views") == (before.name, after.name)


def test_a_teacher_in_train_mode_is_reported(tiny: Make) -> None:
    pipeline = tiny("teacher={model: 'tests.models:dropout_mlp', weights: random}")
    data = resolve_data(pipeline, trust=False)
    teacher, _ = resolve_teacher(pipeline, data, resolve_plan(pipeline, data, trust=False), trust=False)
    context = build_context(pipeline, trust=False)
    build_runner(pipeline, teacher, context)

    with pytest.warns(UserWarning, match=r"the teacher is in train mode .*call teacher.eval\(\) first"):
        build_runner(pipeline, teacher.train(), context)


def test_a_view_larger_than_the_memory_budget_streams_in_training(tiny: Make, tmp_path: Path) -> None:
    """The order differs, for it stays within windows of blocks; the labels are the same, and it learns."""
    learned = [
        *ALL_DIGITS,
        "cache.rows_per_block=128",
        f"teacher.weights={tmp_path}/runs/teacher/last.safetensors",
        "train.epochs=8",
    ]
    train_teacher(tiny(*ALL_DIGITS, "teacher.weights=trained", "teacher.train={epochs: 8}"))
    cache_teacher(tiny(*learned))
    (whole,) = train_students(tiny(*learned), ["small"])
    streaming = tiny(*learned, "cache.memory_budget_mb=0.02", f"runs.path={tmp_path}/streamed")
    job = Experiment(streaming).job(streaming.student("small"), 0)
    (streamed,) = train_students(streaming, ["small"])

    assert 2 == job.window_blocks
    assert whole.accuracy_mean is not None
    assert streamed.accuracy_mean is not None
    assert min(whole.accuracy_mean, streamed.accuracy_mean) > 0.7


def test_training_on_an_open_cache_says_to_finish_it(tiny: Make) -> None:
    pipeline = tiny()
    with pytest.raises(ZeroDivisionError):
        raise_while_building(pipeline)

    with pytest.raises(IncompleteCache, match="is not sealed yet; re-run the build"):
        train_students(pipeline, ["small"])


def raise_while_building(pipeline: Pipeline) -> None:
    cache_teacher(pipeline)
    with logitcache.create(
        pipeline.cache.path,
        **creation_arguments(pipeline, num_views=3),
    ):
        raise ZeroDivisionError


def creation_arguments(pipeline: Pipeline, **changes: Any) -> dict[str, Any]:
    """The arguments with which `cache_teacher` made a pipeline's cache."""
    cache = logitcache.open(pipeline.cache.path)
    return {
        "num_samples": cache.num_samples,
        "num_classes": cache.num_classes,
        "num_views": cache.num_views,
        "encoding": cache.encoding,
        "teacher": cache.manifest.identity.teacher,
        "samples": cache.samples,
        "view_plan": cache.view_plan,
        "class_names": cache.manifest.identity.class_names,
        "rows_per_block": cache.layout.rows_per_block,
    } | changes


def test_a_teacher_is_trained_where_none_is_ready(tiny: Make) -> None:
    overrides = [*ALL_DIGITS, "teacher.weights=trained", "teacher.train={epochs: 3}"]
    with pytest.raises(UsageError, match="run `logitcache train-teacher` first"):
        cache_teacher(tiny(*overrides))
    todo = [step.done for step in plan_run(tiny(*overrides)).steps]
    rows = run_pipeline(tiny(*overrides))

    assert todo == [False] * 4
    assert [step.done for step in plan_run(tiny(*overrides)).steps] == [True] * 4
    assert [row.name for row in rows] == ["small", "labels"]
    assert train_teacher(tiny(*overrides))["accuracy"] > 0.5
