"""DataLoader workers end with the process that started them, however it ends."""

from __future__ import annotations

import contextlib
import os
import re
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from logitcache.config.schema import Pipeline

Make = Callable[..., Pipeline]

PATIENCE = 60
"""Seconds for what takes less than ten."""
SIGNALS = [signal.SIGTERM, signal.SIGKILL, signal.SIGINT]


class Program:
    """A program with two workers that hold its standard output open."""

    def __init__(self, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path.cwd())},
        )
        self.output = b""

    def read(self, enough: Callable[[bytes], bool] = lambda output: False) -> None:
        """Until the output is enough, or until nobody holds the pipe any more."""
        assert self.process.stdout is not None
        while not enough(self.output):
            ready, _, _ = select.select([self.process.stdout], [], [], PATIENCE)
            assert ready, f"nothing came for {PATIENCE} s after {self.output!r}"
            data = os.read(self.process.stdout.fileno(), 2**16)
            if not data:
                return
            self.output += data

    def workers(self) -> list[psutil.Process]:
        """The two workers, once both have loaded a sample."""
        self.read(lambda output: len(set(re.findall(rb"worker (\d+)\n", output))) >= 2)
        pids = sorted({int(pid) for pid in re.findall(rb"worker (\d+)\n", self.output)})
        return [psutil.Process(pid) for pid in pids]

    def errors(self) -> str:
        assert self.process.stderr is not None
        return self.process.stderr.read().decode()


@contextlib.contextmanager
def started(*arguments: str) -> Iterator[Program]:
    program = Program(*arguments)
    try:
        yield program
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(program.process.pid, signal.SIGKILL)
        program.process.communicate()


def end(program: Program, number: signal.Signals, *, group: bool = False) -> list[psutil.Process]:
    """Send a signal, to the whole group as a terminal does; the workers that are alive when nobody can be expected."""
    workers = program.workers()
    assert 2 == len(workers)
    (os.killpg if group else os.kill)(program.process.pid, number)
    program.process.wait(PATIENCE)
    return psutil.wait_procs(workers, timeout=PATIENCE / 6)[1]


def pipeline_file(pipeline: Pipeline, folder: Path) -> str:
    file = folder / "pipeline.yaml"
    file.write_text(pipeline.as_yaml())
    return str(file)


DATA = ["data.name=tests.workers:announcing", "data.validation=0", "num_workers=2", "views.transform=[]"]
COMMANDS = {
    "cache-teacher": ["views.count=4000"],
    "train-student": [
        "train.epochs=4000",
        "students=[{name: s, model: mlp, args: {hidden: [8]}, loss: cross_entropy}]",
    ],
}


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
@pytest.mark.parametrize("command", list(COMMANDS))
def test_workers_of_a_command_end_with_it(tiny: Make, tmp_path: Path, command: str, number: signal.Signals) -> None:
    """None is left of two, nobody holds the caller's pipe, and no worker prints a traceback."""
    file = pipeline_file(tiny(*DATA, *COMMANDS[command]), tmp_path)
    with started("-m", "logitcache.cli", command, file) as program:
        assert [] == end(program, number)
        program.read()
        returncode, errors = program.process.returncode, program.errors()

    assert {signal.SIGINT: 130}.get(number, -number) == returncode
    assert "Traceback" not in errors
    assert (number == signal.SIGINT) == ("interrupted; re-run the same command to resume" in errors)


@pytest.mark.parametrize("command", list(COMMANDS))
def test_ctrl_c_in_a_terminal_ends_a_command_and_its_workers(tiny: Make, tmp_path: Path, command: str) -> None:
    """Every process of the group gets the signal; one of them speaks."""
    file = pipeline_file(tiny(*DATA, *COMMANDS[command]), tmp_path)
    with started("-m", "logitcache.cli", command, file) as program:
        assert [] == end(program, signal.SIGINT, group=True)
        program.read()
        returncode, errors = program.process.returncode, program.errors()

    assert (130, 1) == (returncode, errors.count("error: interrupted"))
    assert "Traceback" not in errors


@pytest.mark.parametrize(
    ("start_method", "number"),
    [*(("fork", number) for number in SIGNALS), ("spawn", signal.SIGKILL), ("forkserver", signal.SIGKILL)],
)
def test_workers_of_a_users_own_loader_end_with_it(start_method: str, number: signal.Signals) -> None:
    """Over a `ViewDataset`, with workers that persist."""
    with started("-m", "tests.workers", start_method) as program:
        assert [] == end(program, number)
        program.read()


def test_workers_outlive_the_thread_that_started_them(tiny: Make) -> None:
    with started("-m", "tests.workers", "fork", "thread") as program:
        workers = program.workers()
        program.read(lambda output: b"under way" in output)
        assert [True, True] == [worker.is_running() for worker in workers]
        assert [] == end(program, signal.SIGKILL)


def test_workers_that_fingerprint_the_data_end_with_their_parent(tiny: Make, tmp_path: Path) -> None:
    """The pass over the data before the first block has workers of its own."""
    file = pipeline_file(tiny(*DATA, "data.args={count: 10000000, size: 8, in_memory: false}"), tmp_path)
    with started("-m", "logitcache.cli", "cache-teacher", file) as program:
        assert [] == end(program, signal.SIGKILL)
        program.read()
