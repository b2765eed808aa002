"""The job scripts, run by Slurm itself on one node."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import logitcache
from logitcache.config.schema import Pipeline
from logitcache.stages.cache_teacher import cache_teacher
from tests import servers
from tests.conftest import ALL_DIGITS

SCRIPTS = Path(__file__).parents[2] / "pipelines/slurm"


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    with servers.slurm(tmp_path_factory.mktemp("slurm")) as environment:
        yield environment


def submit(slurm: dict[str, str], folder: Path, *arguments: str) -> tuple[bool, dict[str, str]]:
    """Run a job to its end; whether it succeeded, and the text of each log."""
    environment = {
        **os.environ,
        **slurm,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(Path.cwd()),
        "OMP_NUM_THREADS": "1",
    }

    def run(*command: str) -> str:
        ended = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=240)
        assert 0 == ended.returncode, ended.stderr
        return ended.stdout

    job = run("sbatch", "--parsable", *arguments).strip()
    run("srun", "--quiet", f"--dependency=afterany:{job}", "true")  # `sbatch --wait` looks every half minute
    states = re.findall(r"JobState=(\w+)", run("scontrol", "show", "job", job))
    return {"COMPLETED"} == set(states), {log.name: log.read_text() for log in folder.glob("*.log")}


@pytest.fixture
def digest(tiny: Callable[..., Pipeline], tmp_path: Path) -> str:
    """Of the cache that a single process builds; jobs build it in `tiny.yaml`."""
    (tmp_path / "tiny.yaml").write_text(tiny(*ALL_DIGITS).as_yaml())
    return str(cache_teacher(tiny(*ALL_DIGITS, f"cache.path={tmp_path}/single.cache")).manifest.digest)


def test_a_job_array_builds_the_cache_and_a_shard_that_was_left_out_is_added(
    slurm: dict[str, str], digest: str, tmp_path: Path
) -> None:
    command = ["--export=ALL,SHARDS=2", str(SCRIPTS / "shards.sh"), "tiny.yaml"]
    succeeded, logs = submit(slurm, tmp_path, "--array=0", *command)
    assert succeeded, logs
    assert not logitcache.open(tmp_path / "tiny.cache").sealed
    assert "6 of 12 blocks are missing" in "".join(logs.values())

    succeeded, logs = submit(slurm, tmp_path, "--array=1", *command)
    assert succeeded, logs
    assert digest == logitcache.open(tmp_path / "tiny.cache").digest


def test_two_tasks_of_an_array_that_run_at_once_build_the_cache(
    slurm: dict[str, str], digest: str, tmp_path: Path
) -> None:
    command = ["--export=ALL,SHARDS=2", str(SCRIPTS / "shards.sh"), "tiny.yaml"]
    succeeded, logs = submit(slurm, tmp_path, "--array=0-1", *command)

    assert succeeded, logs
    assert 2 == len(logs)
    assert digest == logitcache.open(tmp_path / "tiny.cache").digest


def test_a_job_of_torchrun_with_two_processes_on_a_node_builds_the_cache(
    slurm: dict[str, str], digest: str, tmp_path: Path
) -> None:
    settings = f"--export=ALL,PROCESSES=2,RENDEZVOUS=127.0.0.1:{servers.free_port()}"
    command = [settings, str(SCRIPTS / "torchrun.sh"), "cache-teacher", "tiny.yaml"]
    succeeded, logs = submit(slurm, tmp_path, "--nodes=1", *command)

    assert succeeded, logs
    assert digest == logitcache.open(tmp_path / "tiny.cache").digest


def test_a_job_with_claims_builds_the_cache(slurm: dict[str, str], digest: str, tmp_path: Path) -> None:
    succeeded, logs = submit(slurm, tmp_path, "--array=0", str(SCRIPTS / "claims.sh"), "tiny.yaml")

    assert succeeded, logs
    assert digest == logitcache.open(tmp_path / "tiny.cache").digest
