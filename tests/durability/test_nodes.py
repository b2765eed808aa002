"""Two nodes that train one net, as two `torchrun` processes that meet at a rendezvous; data and cache are on S3."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from multiprocessing.context import BaseContext
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch.utils.data import TensorDataset

from logitcache.config.schema import Pipeline
from logitcache.stages.cache_teacher import cache_teacher
from logitcache.stages.train_student import train_students
from logitcache.storage import open_storage
from tests.durability.test_ranks import assert_same_run, two_processes
from tests.integration.test_train import EVERYTHING
from tests.servers import free_port

Make = Callable[..., Pipeline]
On = Callable[[str], str]
DIES_IN_STEP = 7
"""Of 20: after a checkpoint, and before the next one."""
RESTARTS = "3"
UNSHARED_STORE = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
"""Without it, torch 2.15 does not tell a new node the address of the first one that is still there: the node waits in
vain for a minute."""
PATIENCE = 120


def node(file: Path, port: int, *module: str, is_host: bool) -> subprocess.Popen[str]:
    """One node's `torchrun`, with one process; nodes that are silent for five seconds are regarded as dead."""
    meeting = f"is_host={int(is_host)},keep_alive_interval=1,keep_alive_max_attempt=5"
    launcher = [
        *("--nnodes", "2", "--nproc-per-node", "1", "--max-restarts", RESTARTS, "--local-addr", "127.0.0.1"),
        *("--rdzv-backend", "c10d", "--rdzv-id", "students", "--rdzv-endpoint", f"127.0.0.1:{port}"),
        *("--rdzv-conf", meeting),
    ]
    return subprocess.Popen(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            *launcher,
            "-m",
            *module,
            "train-student",
            str(file),
            "--student=small",
        ],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path.cwd()), **UNSHARED_STORE},
    )


def images(url: str) -> dict[str, object]:
    """The data of a pipeline, `tests.durability.test_nodes:images`: arrays in a store."""
    data = open_storage(url).get("digits.npz")
    assert data is not None
    with np.load(io.BytesIO(data)) as arrays:
        return {"train": TensorDataset(torch.from_numpy(arrays["images"]), torch.from_numpy(arrays["labels"]))}


def train(environment: dict[str, str], pipeline: Pipeline) -> None:
    os.environ |= environment
    train_students(pipeline, ["small"])


def test_a_node_that_is_killed_and_replaced_leaves_the_weights_of_an_undisturbed_run(
    tiny: Make, tmp_path: Path, on: On, forks: BaseContext
) -> None:
    """SIGKILL of one node, process and launcher; a new one joins, and both go on from the checkpoint, bit for bit."""
    place, digits, packed = on("moto"), load_digits(), io.BytesIO()
    np.savez(packed, images=(digits.images[:640, None] / 16).astype(np.float32), labels=digits.target[:640])
    open_storage(f"{place}/data").put("digits.npz", packed.getvalue())
    settings = [
        *EVERYTHING,
        f"data={{name: 'tests.durability.test_nodes:images', args: {{url: '{place}/data'}}, validation: 0.1}}",
        f"cache.path={place}/tiny.cache",
        "students.small.samples=0.45",
    ]
    whole, pieces = (tiny(*settings, f"runs.path={tmp_path}/{name}") for name in ("whole", "pieces"))
    cache_teacher(whole)
    environment = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    assert two_processes(forks, train, environment, whole)
    file, port = tmp_path / "pieces.yaml", free_port()
    file.write_text(pieces.as_yaml())

    with node(file, port, "logitcache.cli", is_host=True) as first:
        with node(file, port, "tests.dying", "node", str(DIES_IN_STEP), is_host=False) as second:
            second.communicate(timeout=PATIENCE)
        assert -signal.SIGKILL == second.returncode
        assert (tmp_path / "pieces/small/seed-0/resume.pt").is_file()
        with node(file, port, "logitcache.cli", is_host=False) as third:
            _, errors = third.communicate(timeout=PATIENCE)
        assert 0 == third.returncode, errors
        _, errors = first.communicate(timeout=PATIENCE)
    assert 0 == first.returncode, errors
    assert_same_run(tmp_path / "whole/small/seed-0", tmp_path / "pieces/small/seed-0")
