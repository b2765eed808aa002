"""Several processes that train one net, started by `torchrun` as a user starts them; gloo on the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from logitcache.cache_teacher import cache_teacher
from logitcache.pipeline import Pipeline
from logitcache.train_student import train_students
from tests.test_stages import log, same, weights
from tests.test_train import EVERYTHING, result

Make = Callable[..., Pipeline]

SMALL = [
    "students.small.samples=0.2",
    "train.optimizer=sgd",
    "train.lr=0.1",
    "train.epochs=3",
    "train.checkpoint_steps=1",
]
"""259 samples in batches of 64: three are left over. A checkpoint at each step writes each step's loss to the log."""


def torchrun(processes: int, pipeline: Pipeline, command: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    file = Path(pipeline.runs.path).parent / f"{Path(pipeline.runs.path).name}.yaml"
    file.write_text(pipeline.as_yaml())
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return subprocess.run(
        [sys.executable, *launcher, "-m", "logitcache.cli", command, str(file), *arguments],
        capture_output=True,
        text=True,
        timeout=90,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path.cwd())},
    )


@pytest.mark.parametrize("processes", [2, 4])
def test_several_processes_have_the_losses_of_one(tiny: Make, tmp_path: Path, processes: int) -> None:
    """Uneven shares, and with four processes one that has none of the last batch: each step's loss is the same but for
    rounding, and so are accuracies and weights."""
    cache_teacher(tiny())
    alone = tiny(*SMALL)
    train_students(alone, ["small"])
    done = torchrun(
        processes, tiny(*SMALL, f"runs.path={tmp_path}/shared"), "train-student", "--student=small", "--json"
    )
    assert 0 == done.returncode, done.stderr
    folders = [tmp_path / f"{name}/small/seed-0" for name in ("runs", "shared")]
    losses = [[line["train_loss"] for line in log(folder) if "train_loss" in line] for folder in folders]

    assert 15 == len(losses[0])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert result(folders[0]) == pytest.approx(result(folders[1]), abs=1e-5)
    ours, theirs = weights(folders[0]), weights(folders[1])
    assert all(float((ours[name] - theirs[name]).abs().max()) < 1e-4 for name in ours)
    assert ["small"] == [row["name"] for row in json.loads(done.stdout)["rows"]], "one process speaks"


def test_several_processes_of_which_one_is_killed_go_on_to_the_same_weights(tiny: Make, tmp_path: Path) -> None:
    """SIGKILL in the first process; dropout, batch norm, averaging and parts of batches, bit for bit."""
    cache_teacher(tiny())
    whole, pieces = (tiny(*EVERYTHING, f"runs.path={tmp_path}/{name}") for name in ("whole", "pieces"))
    killed = tiny(*EVERYTHING, f"runs.path={tmp_path}/pieces", "runs.tracker=tests.tracker:deadly")
    for pipeline, good in ((whole, True), (killed, False), (pieces, True)):
        done = torchrun(2, pipeline, "train-student", "--student=small")
        assert good == (done.returncode == 0), done.stderr
        if not good:
            assert "SIGKILL" in done.stderr
            assert (tmp_path / "pieces/small/seed-0/resume.pt").is_file()
    folders = [tmp_path / f"{name}/small/seed-0" for name in ("whole", "pieces")]

    assert log(folders[0]) == log(folders[1])
    assert result(folders[0]) == result(folders[1])
    assert same(weights(folders[0]), weights(folders[1]))
    assert same(weights(folders[0], "best"), weights(folders[1], "best"))


def test_run_builds_a_cache_and_so_is_for_one_process(tiny: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    from logitcache.errors import UsageError
    from logitcache.run import run_pipeline

    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    with pytest.raises(UsageError, match="run `logitcache cache-teacher` alone"):
        run_pipeline(tiny())
