"""Fixtures of several contract tests."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.needs import need_package

Stranger = Callable[[Path, str], dict[str, np.ndarray]]


@pytest.fixture(scope="session")
def stranger() -> Iterator[Stranger]:
    """Reads a cache by zarr or tensorstore in a process that has never imported logitcache: `stranger(path, "zarr")`.

    A test is skipped where the reader is not installed. A reader that ends in an error fails its own test only.
    """
    command = [sys.executable, str(Path(__file__).parents[1] / "independent_reader.py")]
    started: list[subprocess.Popen[str]] = []

    def read(path: Path, reader: str) -> dict[str, np.ndarray]:
        need_package(reader, "test")
        if not started or started[-1].poll() is not None:
            started.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
        process = started[-1]
        assert process.stdin is not None
        assert process.stdout is not None
        out = path.with_suffix(".npz")
        print(json.dumps([str(path), reader, str(out)]), file=process.stdin, flush=True)
        answer = process.stdout.readline()
        if not answer:
            pytest.fail(f"the independent reader ended with exit code {process.wait()}; its error is above")
        assert answer == "[]\n", "the independent reader must not import logitcache"
        with np.load(out) as found:
            return dict(found)

    yield read
    for process in started:
        process.communicate()
