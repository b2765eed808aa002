"""A run's folder is not trusted blindly: what is damaged, foreign or stale is refused, with the file and the remedy."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from logitcache.catalog.models import build_model, load_weights
from logitcache.checksums import CHECKSUMS
from logitcache.config.schema import Pipeline
from logitcache.errors import CorruptRun, UsageError
from logitcache.stages.cache_teacher import cache_teacher
from logitcache.stages.train_student import Experiment, train_students
from logitcache.stages.train_teacher import train_teacher
from logitcache.train.finished import read_run
from logitcache.train.optimizer import OptimizerStep
from logitcache.train.runs import CHECKPOINT, CONFIG, METRICS, RESULT, RunFolder
from tests.integration.test_stages import log, same, weights

Make = Callable[..., Pipeline]

SHORT = [
    "students.small.samples=0.207",
    "train.epochs=3",
    "train.checkpoint_steps=1",
    "train.early_stopping=3",
    "train.seeds=[0, 1]",
]
"""Two seeds of 3 epochs of 5 steps."""


class Interrupted(Exception):
    """Comes where a kill would."""


@pytest.fixture
def stop(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Trains seed 0 (and seed 1 before it, where asked) of `small`, and stops in a step; its folder."""

    def interrupt(pipeline: Pipeline, step: int, seed: int = 0) -> Path:
        apply = OptimizerStep.apply

        def stopping(updates: OptimizerStep, at: int) -> None:
            if at == step:
                raise Interrupted
            apply(updates, at)

        only = pipeline.model_copy(update={"train": pipeline.train.model_copy(update={"seeds": [seed]})})
        with monkeypatch.context() as patched, pytest.raises(Interrupted):
            patched.setattr(OptimizerStep, "apply", stopping)
            train_students(only, ["small"])
        return Path(pipeline.runs.path) / "small" / f"seed-{seed}"

    return interrupt


def folder_of(pipeline: Pipeline, seed: int = 0) -> RunFolder:
    job = Experiment(pipeline).job(pipeline.student("small"), seed)
    return RunFolder(job.folder, job.identity)


def refused(pipeline: Pipeline, file: Path, *parts: str) -> None:
    """Training is refused by one error of ours, which names the file and what to delete."""
    with pytest.raises(CorruptRun, match="(?s)" + ".*".join(map(re.escape, (str(file), *parts)))) as caught:
        train_students(pipeline, ["small"])
    assert "delete" in str(caught.value)
    assert 1 == caught.value.exit_code


def test_a_checkpoint_with_a_flipped_bit_is_refused(tiny: Make, stop: Callable[..., Path]) -> None:
    """In every byte of the header, and in every seventh of what follows."""
    cache_teacher(tiny())
    pipeline = tiny(*SHORT)
    path = stop(pipeline, 7) / CHECKPOINT
    folder = folder_of(pipeline)
    assert folder.checkpoint() is not None
    whole = path.read_bytes()
    for position in (*range(100), *range(100, len(whole), 7)):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(damaged)
        with pytest.raises(CorruptRun, match=re.escape(str(path))):
            folder.checkpoint()


@pytest.mark.parametrize(
    ("damage", "found"),
    [
        (lambda data: data[:-1], "is damaged: its content does not match the SHA-256"),
        (lambda data: data[: len(data) // 2], "is damaged: its content does not match the SHA-256"),
        (lambda data: b"", "is damaged, or from a version of logitcache without SHA-256"),
        (lambda data: data[85:], "is damaged, or from a version of logitcache without SHA-256"),
    ],
    ids=["a byte short", "half", "empty", "as earlier versions wrote it"],
)
def test_a_checkpoint_that_is_not_whole_is_refused_and_without_it_training_starts_again(
    tiny: Make, tmp_path: Path, stop: Callable[..., Path], damage: Callable[[bytes], bytes], found: str
) -> None:
    """What the message says to delete is enough: the run ends with the weights of one that was left alone."""
    cache_teacher(tiny())
    pipeline = tiny(*SHORT)
    folder = stop(pipeline, 7)
    path = folder / CHECKPOINT
    path.write_bytes(damage(path.read_bytes()))
    refused(pipeline, path, found, "delete it to train from the start")
    path.unlink()
    train_students(pipeline, ["small"])
    train_students(tiny(*SHORT, f"runs.path={tmp_path}/whole"), ["small"])

    assert same(weights(tmp_path / "whole/small/seed-0"), weights(folder))
    assert log(tmp_path / "whole/small/seed-0") == log(folder)


def test_a_pipe_in_the_place_of_a_checkpoint_is_refused(tiny: Make, stop: Callable[..., Path]) -> None:
    """A reader of it would wait for ever."""
    cache_teacher(tiny())
    pipeline = tiny(*SHORT)
    path = stop(pipeline, 7) / CHECKPOINT
    path.unlink()
    os.mkfifo(path)

    refused(pipeline, path, "is not a regular file", "delete it")


def test_a_checkpoint_of_another_run_of_the_same_net_is_refused(tiny: Make, stop: Callable[..., Path]) -> None:
    """Another seed's: whole, and of the same shapes."""
    cache_teacher(tiny())
    pipeline = tiny(*SHORT)
    folders = [stop(pipeline, 7, seed) for seed in (0, 1)]
    for name in (CHECKPOINT, METRICS, "best.safetensors"):
        shutil.copy(folders[1] / name, folders[0] / name)

    refused(pipeline, folders[0] / CHECKPOINT, "is of another run: expected run ", ", found ", "delete it")


def other_shapes(saved: dict[str, Any]) -> None:
    name = next(name for name in saved["model"] if name.endswith("weight"))
    saved["model"][name] = saved["model"][name][:-1]


def other_moments(saved: dict[str, Any]) -> None:
    moments = saved["updates"]["optimizer"]["state"]
    moments[0], moments[1] = moments[1], moments[0]


def other_settings(saved: dict[str, Any]) -> None:
    saved["updates"]["optimizer"]["param_groups"][0]["weight_decay"] = 0.5


def other_number_of_parameters(saved: dict[str, Any]) -> None:
    saved["updates"]["optimizer"]["param_groups"][0]["params"].pop()


def other_steps(saved: dict[str, Any]) -> None:
    saved["steps"] = [4, 12]


def other_state(saved: dict[str, Any]) -> None:
    saved["state"]["epochs_since"] = saved["state"].pop("stale_epochs")


def no_model(saved: dict[str, Any]) -> None:
    del saved["model"]


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (other_shapes, "size mismatch"),
        (other_moments, "of the optimizer has shape"),
        (other_settings, "the optimizer has other settings"),
        (other_number_of_parameters, "doesn't match the size"),
        (other_steps, "expected [5, 15] steps per epoch and in total, found [4, 12]"),
        (other_state, "epochs_since"),
        (no_model, "'model'"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_whole_checkpoint_that_does_not_fit_the_run_is_refused(
    tiny: Make, stop: Callable[..., Path], change: Callable[[dict[str, Any]], None], found: str
) -> None:
    """As where the code of a net or the number of samples has changed since."""
    cache_teacher(tiny())
    pipeline = tiny(*SHORT)
    path = stop(pipeline, 7) / CHECKPOINT
    folder = folder_of(pipeline)
    saved = folder.checkpoint()
    assert saved is not None
    folder.start_log(saved["state"]["step"])
    change(saved)
    folder.save_checkpoint(saved)

    refused(pipeline, path, "does not fit this run", found, "delete it")


def test_a_log_that_is_ahead_of_the_checkpoint_is_cut(tiny: Make, tmp_path: Path, stop: Callable[..., Path]) -> None:
    cache_teacher(tiny())
    pipeline = tiny(*SHORT)
    folder = stop(pipeline, 7)
    with (folder / METRICS).open("a") as file:
        file.write('{"step": 8, "train_loss": 1.0}\n{"step": 9, "tra')
    train_students(pipeline, ["small"])
    train_students(tiny(*SHORT, f"runs.path={tmp_path}/whole"), ["small"])

    assert log(tmp_path / "whole/small/seed-0") == log(folder)


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[: data.rindex(b"{")],
        lambda data: data.replace(b'"step": 1', b'"step": 2', 1),
        lambda data: b"",
    ],
    ids=["behind", "changed", "empty"],
)
def test_a_log_that_is_not_the_checkpoints_is_refused(
    tiny: Make, stop: Callable[..., Path], damage: Callable[[bytes], bytes]
) -> None:
    cache_teacher(tiny())
    pipeline = tiny(*SHORT)
    path = stop(pipeline, 7) / METRICS
    path.write_bytes(damage(path.read_bytes()))

    refused(pipeline, path, f"does not match the checkpoint {path.parent / CHECKPOINT}: expected ", ", found ")


@pytest.mark.parametrize(
    ("text", "found"),
    [(b"", "expected a mapping"), (b"- 1\n", "expected a mapping"), (b"a: [", "while parsing"), (b"\xff", "utf-8")],
    ids=["empty", "a list", "cut short", "no text"],
)
def test_a_damaged_description_of_a_run_is_refused(tiny: Make, text: bytes, found: str) -> None:
    cache_teacher(tiny())
    pipeline = tiny(*SHORT)
    train_students(pipeline, ["small"])
    path = Path(pipeline.runs.path) / "small/seed-0" / CONFIG
    path.write_bytes(text)

    refused(pipeline, path, "is damaged: ", found, f"delete {path.parent}")


def test_a_finished_run_is_the_one_that_was_left(tiny: Make) -> None:
    """Its `SHA256SUMS` are those that `sha256sum` finds; every file that they list is checked where it is read."""
    cache_teacher(tiny())
    pipeline = tiny(*SHORT)
    train_students(pipeline, ["small"])
    folder = Path(pipeline.runs.path) / "small/seed-0"
    listed = dict(reversed(line.split("  ")) for line in (folder / CHECKSUMS).read_text().splitlines())  # type: ignore[arg-type]

    assert {CONFIG, METRICS, "best.safetensors", "last.safetensors", RESULT} == listed.keys()
    assert listed == {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in listed}
    for name in (CONFIG, RESULT, METRICS):
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data + b"\n")
        with pytest.raises(CorruptRun, match=f"{name} is not the file that its run left: expected SHA-256 "):
            read_run(folder)
        (folder / name).write_bytes(data)
    assert read_run(folder).result.seed == 0


def test_a_damaged_or_foreign_result_is_refused(tiny: Make) -> None:
    """A changed digit, another seed's, and one cut short; without `SHA256SUMS` too, as earlier versions left it."""
    cache_teacher(tiny())
    pipeline = tiny(*SHORT)
    rows = train_students(pipeline, ["small"])
    folders = [Path(pipeline.runs.path) / f"small/seed-{seed}" for seed in (0, 1)]
    path, whole = folders[0] / RESULT, (folders[0] / RESULT).read_text()
    changed = whole.replace('"parameters": ', '"parameters": 1')
    assert changed != whole
    for text in (changed, (folders[1] / RESULT).read_text(), whole[:50], ""):
        path.write_text(text)
        refused(pipeline, path, "expected SHA-256", f"delete {folders[0]}")
    (folders[0] / CHECKSUMS).unlink()
    for text, found in (
        ((folders[1] / RESULT).read_text(), "expected the result of small, seed 0; found small, seed 1"),
        (whole[:50], "is not the result of this run"),
        ("", "is not the result of this run"),
        ("[]", "is not the result of this run"),
        (json.dumps(json.loads(whole) | {"accuracy": 7}), "accuracy: "),
    ):
        path.write_text(text)
        refused(pipeline, path, found, f"delete {folders[0]}")
    path.write_text(whole)

    assert rows == train_students(pipeline, ["small"])


def test_a_result_of_another_configuration_is_refused_even_with_its_checksums(tiny: Make, tmp_path: Path) -> None:
    """The same student and seed, with another learning rate; `run.yaml` kept or gone."""
    pipeline = tiny("train.epochs=1")
    other = tiny("train.epochs=1", "train.lr=0.0001", f"runs.path={tmp_path / 'other'}")
    cache_teacher(pipeline)
    for each in (pipeline, other):
        train_students(each, ["small"])
    folder, foreign = (Path(each.runs.path) / "small/seed-0" for each in (pipeline, other))
    for name in (RESULT, CHECKSUMS):
        shutil.copy(foreign / name, folder)

    refused(pipeline, folder / CONFIG, "expected SHA-256")
    (folder / CONFIG).unlink()
    refused(pipeline, folder / CONFIG, "expected SHA-256")


def test_damaged_or_foreign_weights_of_a_finished_run_are_refused(tiny: Make) -> None:
    """Where a trained teacher's are read; weights that were copied elsewhere carry a SHA-256 of their own."""
    trained = ["teacher.weights=trained", "teacher.train={epochs: 1}"]
    pipeline = tiny(*trained)
    train_teacher(pipeline)
    path = Path(pipeline.runs.path) / "teacher/last.safetensors"
    whole = path.read_bytes()
    model = build_model("mlp", num_classes=10, input_shape=(1, 8, 8), args={"hidden": [16]})
    load_weights(model, path)
    flipped = bytearray(whole)
    flipped[-3] ^= 4
    foreign = safetensors.torch.save({name: value + 1 for name, value in model.state_dict().items()})
    for data in (bytes(flipped), foreign):
        path.write_bytes(data)
        with pytest.raises(CorruptRun, match=r"last\.safetensors is not the file that its run left: expected SHA-256"):
            cache_teacher(pipeline)
    copied = path.with_name("copied.safetensors")
    copied.write_bytes(flipped)
    with pytest.raises(CorruptRun, match=r"copied\.safetensors is damaged: its tensors don.t match the SHA-256"):
        load_weights(model, copied)
    copied.write_bytes(whole)
    load_weights(model, copied)
    path.write_bytes(whole)
    load_weights(model, path)
    with pytest.raises(UsageError, match="does not fit the model"):
        load_weights(build_model("mlp", num_classes=10, input_shape=(1, 8, 8), args={"hidden": [8]}), path)


def test_best_weights_that_an_interrupted_run_did_not_write_are_refused_before_it_goes_on(
    tiny: Make, stop: Callable[..., Path]
) -> None:
    """Of another seed, of an earlier epoch, damaged, without an origin, or gone."""
    cache_teacher(tiny())
    pipeline = tiny(*SHORT)
    folder = stop(pipeline, 12)
    path = folder / "best.safetensors"
    whole = path.read_bytes()
    saved = folder_of(pipeline).checkpoint()
    assert saved is not None
    best = (2 - saved["state"]["stale_epochs"]) * 5
    other = folder_of(pipeline, seed=1)
    model = build_model("mlp", num_classes=10, input_shape=(1, 8, 8), args={"hidden": [8]})
    other.save_weights(model, "best", best)
    foreign = (other.path / "best.safetensors").read_bytes()
    folder_of(pipeline).save_weights(model, "best", best - 5)
    earlier = path.read_bytes()
    damaged = bytearray(whole)
    damaged[-1] ^= 1
    plain = safetensors.torch.save(model.state_dict())
    for data in (foreign, earlier, bytes(damaged), plain, whole[:100]):
        path.write_bytes(data)
        refused(pipeline, path, "was not written by this run", f"delete {folder}")
    path.unlink()
    refused(pipeline, path, "was not written by this run", f"delete {folder}")
    path.write_bytes(whole)
    train_students(pipeline, ["small"])

    assert (folder / RESULT).is_file()


def test_equal_runs_leave_equal_weights_files(tiny: Make, tmp_path: Path) -> None:
    """What the files say of their origin is the run's identity and step, and nothing of the moment."""
    cache_teacher(tiny())
    for name in ("one", "other"):
        train_students(tiny(f"runs.path={tmp_path}/{name}"), ["small"])
    files = [(tmp_path / name / "small/seed-0/last.safetensors").read_bytes() for name in ("one", "other")]

    assert files[0] == files[1]


def test_saving_a_checkpoint_takes_what_torch_saves(tmp_path: Path) -> None:
    """Tensors of any dtype, and views, come back as they were."""
    folder = RunFolder(tmp_path / "run", {"name": "x"})
    folder.start_log(0)
    state = {"half": torch.arange(7).bfloat16(), "part": torch.arange(12.0).view(3, 4)[:, 1:], "none": None}
    folder.save_checkpoint(state)
    saved = RunFolder(tmp_path / "run", {"name": "x"}).checkpoint()
    assert saved is not None

    assert state.keys() == saved.keys()
    assert torch.equal(state["half"], saved["half"])  # type: ignore[arg-type]
    assert torch.equal(state["part"], saved["part"])  # type: ignore[arg-type]
