"""Experiment trackers, each with its real package and without a network: every metric arrives, and runs resume."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from logitcache.config.schema import Pipeline
from logitcache.errors import UsageError
from logitcache.stages.cache_teacher import cache_teacher
from logitcache.stages.train_student import train_students
from logitcache.train.tracking import load_tracker
from tests.needs import need_package

Make = Callable[..., Pipeline]
Steps = dict[int, dict[str, float]]

PAIR = ["together=true", "students.labels.loss=kl"]
"""Two students that train in turn, so that both runs are open at the same time."""


@pytest.fixture
def trained(tiny: Make, tmp_path: Path) -> Callable[..., dict[str, Steps]]:
    """Trains students; their names with the metrics of their own logs, by step."""

    def train(*overrides: str) -> dict[str, Steps]:
        cache_teacher(tiny())
        train_students(tiny(*overrides), ["small", "labels"])
        return {name: logged(tmp_path / f"runs/{name}/seed-0") for name in ("small", "labels")}

    return train


def logged(folder: Path) -> Steps:
    steps: Steps = {}
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        values = json.loads(line)
        steps.setdefault(values.pop("step"), {}).update(values)
    return steps


def test_wandb_offline_gets_every_metric_of_students_that_train_together(
    trained: Callable[..., dict[str, Steps]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    need_package("wandb", "wandb")
    import wandb

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    expected = trained("runs.tracker=wandb", *PAIR)
    wandb.teardown()  # its service writes the last records after a run has finished; at the latest as the process ends
    found = dict(wandb_run(file) for file in tmp_path.glob("wandb/offline-run-*/run-*.wandb"))

    assert {f"{name}-0": steps for name, steps in expected.items()} == found


def wandb_run(file: Path) -> tuple[str, Steps]:
    """Name and metrics of an offline run."""
    from wandb.proto import wandb_internal_pb2

    name, steps = "", {}
    for data in leveldb_records(file.read_bytes()[7:], start=7):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.HasField("run"):
            name = record.run.display_name
        elif record.HasField("history"):
            items = {".".join(item.nested_key) or item.key: item.value_json for item in record.history.item}
            values = {key: json.loads(value) for key, value in items.items() if not key.startswith("_")}
            steps.setdefault(record.history.step.num, {}).update(values)
    return name, steps


def leveldb_records(content: bytes, *, start: int) -> Iterator[bytes]:
    """The records of a log in LevelDB's format: pieces with checksum, length and type, in blocks of 32 KiB."""
    record, place = b"", start
    stream = bytes(start) + content
    while place < len(stream):
        left = 2**15 - place % 2**15
        if left < 7:
            place += left
            continue
        _, length, kind = struct.unpack_from("<IHB", stream, place)
        record += stream[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            yield record
            record = b""


def test_mlflow_in_a_local_store_gets_every_metric_and_the_configuration(
    trained: Callable[..., dict[str, Steps]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    need_package("mlflow", "mlflow")
    use_local_mlflow(tmp_path, monkeypatch)
    expected = trained("runs.tracker=mlflow", *PAIR)
    found = mlflow_runs()

    assert {f"{name}-0": steps for name, steps in expected.items()} == {
        name: run["steps"] for name, run in found.items()
    }
    assert ["FINISHED", "FINISHED"] == [run["status"] for run in found.values()]
    assert "kl" == found["small-0"]["params"]["student.loss.name"]


def test_an_mlflow_run_that_is_interrupted_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    need_package("mlflow", "mlflow")
    use_local_mlflow(tmp_path, monkeypatch)
    start = load_tracker("mlflow", trust=False)
    for step in (1, 2):
        tracker = start()
        tracker.start({"id": "0123456789abcdef", "name": "small", "seed": 0, "student": {"loss": {"k=": 1}}})
        tracker.log({"loss": 1.0 / step}, step)
    tracker.finish()

    assert {"small-0": {1: {"loss": 1.0}, 2: {"loss": 0.5}}} == {
        name: run["steps"] for name, run in mlflow_runs().items()
    }


def use_local_mlflow(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (folder / "mlruns").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")


def mlflow_runs() -> dict[str, dict[str, Any]]:
    """The runs of the experiment, by name."""
    from mlflow import MlflowClient

    client = MlflowClient()
    experiment = client.get_experiment_by_name("logitcache")
    runs = {}
    for run in client.search_runs([experiment.experiment_id]):
        steps: Steps = {}
        for metric in run.data.metrics:
            for point in client.get_metric_history(run.info.run_id, metric):
                steps.setdefault(point.step, {})[metric] = point.value
        runs[run.info.run_name] = {"steps": steps, "status": run.info.status, "params": run.data.params}
    return runs


def test_tensorboard_gets_every_metric_without_a_tracker(
    trained: Callable[..., dict[str, Steps]], tmp_path: Path
) -> None:
    need_package("tensorboard", "train")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for name, steps in trained().items():
        events = EventAccumulator(str(tmp_path / f"runs/{name}/seed-0"))
        events.Reload()
        found: Steps = {}
        for tag in events.Tags()["scalars"]:
            for event in events.Scalars(tag):
                found.setdefault(event.step, {})[tag] = event.value

        assert steps.keys() == found.keys()
        for step, values in steps.items():
            assert pytest.approx(values, rel=1e-6) == found[step]


def test_a_tracker_whose_package_is_missing_is_refused_before_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"runs\.tracker wandb needs .*pip install 'logitcache\[wandb\]'"):
        load_tracker("wandb", trust=False)
