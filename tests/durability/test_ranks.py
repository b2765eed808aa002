"""Several processes that train one net or fill one cache, started by `torchrun` as a user does; gloo on the CPU.

Where many starts are needed they are forked, with the environment that `torchrun` gives. SIGKILL in every step, of the
first process and of the second, under `torchrun` itself (some minutes):

    python -m tests.durability.test_ranks
"""

from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from multiprocessing.connection import wait
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

import pytest
import torch

import logitcache
from logitcache import progress
from logitcache.config.overrides import override
from logitcache.config.schema import Pipeline, parse_pipeline
from logitcache.stages.cache_teacher import cache_teacher
from logitcache.stages.train_student import train_students
from logitcache.stages.train_teacher import train_teacher
from logitcache.verify.audit import verify
from tests.conftest import TINY
from tests.dying import die_at_put, die_in_step
from tests.integration.test_stages import log, same, weights
from tests.integration.test_train import EVERYTHING, result
from tests.servers import free_port

Make = Callable[..., Pipeline]

SMALL = [
    "students.small.samples=0.207",
    "train.optimizer=sgd",
    "train.lr=0.1",
    "train.epochs=3",
    "train.checkpoint_steps=1",
]
"""67 samples in batches of 16: three are left over. A checkpoint at each step writes each step's loss to the log."""


def torchrun(
    processes: int, pipeline: Pipeline, *command: str, module: tuple[str, ...] = ("logitcache.cli",)
) -> subprocess.CompletedProcess[str]:
    """Start a command on a pipeline: its name, and its arguments after the pipeline's file."""
    file = Path(pipeline.runs.path).parent / f"{Path(pipeline.runs.path).name}.yaml"
    file.write_text(pipeline.as_yaml())
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return subprocess.run(
        [sys.executable, *launcher, "-m", *module, command[0], str(file), *command[1:]],
        capture_output=True,
        text=True,
        timeout=300,
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

    assert_same_run(tmp_path / "whole/small/seed-0", tmp_path / "pieces/small/seed-0")


def as_rank(
    rank: int, port: int, victim: tuple[int, Callable[[Any], None], Any], work: Callable[..., Any], *args: Any
) -> None:
    """One of two processes, of which one may die: (its rank, how, when)."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "forked"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if rank == victim[0]:
        victim[1](victim[2])
    work(*args)


NOBODY = (-1, die_in_step, 0)


def two_processes(
    forks: BaseContext, work: Callable[..., Any], *args: Any, victim: tuple[int, Callable[[Any], None], Any] = NOBODY
) -> bool:
    """Run work in two processes; as `torchrun` does, end the other when one dies. Whether both ended well."""
    port = free_port()
    processes = [forks.Process(target=as_rank, args=(rank, port, victim, work, *args)) for rank in (0, 1)]  # type: ignore[attr-defined]
    for process in processes:
        process.start()
    while any(process.is_alive() for process in processes):
        wait([process.sentinel for process in processes if process.is_alive()])
        ended = [process.exitcode for process in processes]
        if any(ended):
            assert victim is NOBODY or ended[victim[0]] == -signal.SIGKILL
            for process in processes:
                process.kill()
    for process in processes:
        process.join()
    assert victim is NOBODY or any(process.exitcode for process in processes), "the victim lives"
    return not any(process.exitcode for process in processes)


def test_either_of_two_processes_killed_again_and_again_leaves_the_same_weights(
    tiny: Make, tmp_path: Path, forks: BaseContext
) -> None:
    """In the first step, between a checkpoint and the end of an epoch, right after either, and in the last step."""
    cache_teacher(tiny())
    whole, pieces = (tiny(*EVERYTHING, f"runs.path={tmp_path}/{name}") for name in ("whole", "pieces"))
    assert two_processes(forks, train_students, whole, ["small"])
    for rank, step in ((0, 0), (1, 3), (0, 6), (1, 8), (0, 15), (1, 15)):
        assert not two_processes(forks, train_students, pieces, ["small"], victim=(rank, die_in_step, step))
    assert two_processes(forks, train_students, pieces, ["small"])

    assert_same_run(tmp_path / "whole/small/seed-0", tmp_path / "pieces/small/seed-0")


def assert_same_run(one: Path, other: Path) -> None:
    assert log(one) == log(other)
    assert result(one) == result(other)
    assert same(weights(one), weights(other))
    assert same(weights(one, "best"), weights(other, "best"))


def test_a_cache_of_several_processes_is_the_cache_of_one(tiny: Make, tmp_path: Path) -> None:
    """Under `torchrun`, two processes for eleven blocks; the first one speaks."""
    blocks = ["views.count=1", "cache.rows_per_block=30", "cache.encoding=LowRank(rank=4, k=2)"]
    digest = cache_teacher(tiny(*blocks)).manifest.digest
    done = torchrun(2, tiny(*blocks, f"cache.path={tmp_path}/shared.cache"), "cache-teacher", "--json")
    assert 0 == done.returncode, done.stderr
    told = json.loads(done.stdout)

    assert (digest, 11, True) == (told["digest"], told["computed_blocks"], told["sealed"])
    assert [] == verify(str(tmp_path / "shared.cache"), deep=True)


def test_either_of_two_builders_killed_again_and_again_leaves_the_same_cache(
    tiny: Make, tmp_path: Path, forks: BaseContext
) -> None:
    """As the cache begins, in its blocks, and as it is sealed; views that are added are shared out as well."""
    encoding = "cache.encoding=LowRank(rank=4, k=2)"
    digests = [cache_teacher(tiny(encoding, f"views.count={count}")).manifest.digest for count in (1, 2)]
    path = tmp_path / "pieces.cache"
    grown = [
        tiny(encoding, f"cache.path={path}", "cache.rows_per_block=64", f"views.count={count}") for count in (1, 2)
    ]
    for rank, key in ((0, "zarr.json"), (1, "receipts/v"), (0, "/c/0/"), (0, "receipts.json"), (0, "README.md")):
        assert not two_processes(forks, cache_teacher, grown[0], victim=(rank, die_at_put, key))
    assert two_processes(forks, cache_teacher, grown[0])
    assert digests[0] == logitcache.open(path).digest
    assert not two_processes(forks, cache_teacher, grown[1], victim=(1, die_at_put, "/c/1/"))
    assert two_processes(forks, cache_teacher, grown[1])

    assert digests[1] == logitcache.open(path).digest
    assert [] == verify(str(path), deep=True)
    assert [] == list(path.rglob("*.partial"))


def test_a_teacher_of_two_processes_has_the_losses_of_one(tiny: Make, tmp_path: Path, forks: BaseContext) -> None:
    settings = ["teacher.weights=trained", "train.optimizer=sgd", "train.lr=0.1", "train.checkpoint_steps=5"]
    alone, shared = (tiny(*settings, f"runs.path={tmp_path}/{name}") for name in ("alone", "shared"))
    train_teacher(alone)
    assert two_processes(forks, train_teacher, shared)
    losses = [
        [line["train_loss"] for line in log(tmp_path / name / "teacher") if "train_loss" in line]
        for name in ("alone", "shared")
    ]

    assert 8 <= len(losses[0])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_run_takes_stages_in_one_process(tiny: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    from logitcache.errors import UsageError
    from logitcache.stages.run import run_pipeline

    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    with pytest.raises(UsageError, match="with torchrun, start each stage on its own"):
        run_pipeline(tiny())


def kill_in_every_step(folder: Path) -> None:
    """SIGKILL in each of 16 steps, of the first and of the second process, one after another in one run."""
    raw = copy.deepcopy(TINY) | {"cache": TINY["cache"] | {"path": str(folder / "tiny.cache")}}
    for text in EVERYTHING:
        override(raw, text)
    whole, pieces = (
        parse_pipeline(raw | {"runs": {"path": str(folder / name)}}, source="tiny") for name in ("whole", "pieces")
    )
    cache_teacher(whole)
    assert 0 == torchrun(2, whole, "train-student", "--student=small").returncode
    for step in range(16):
        for victim in ("0", "1"):
            done = torchrun(2, pieces, "train-student", "--student=small", module=("tests.dying", victim, str(step)))
            assert "SIGKILL" in done.stderr, done.stderr
            print(f"process {victim} killed in step {step}", flush=True)
    assert 0 == torchrun(2, pieces, "train-student", "--student=small").returncode
    assert_same_run(folder / "whole/small/seed-0", folder / "pieces/small/seed-0")


if __name__ == "__main__":
    torch.set_num_threads(1)
    progress.silence()
    with tempfile.TemporaryDirectory() as folder:
        kill_in_every_step(Path(folder))
        print("the same weights, log and result as undisturbed")
