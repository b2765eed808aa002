"""Fixtures of several contract tests."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

Stranger = Callable[[Path, str], dict[str, np.ndarray]]


@pytest.fixture(scope="session")
def stranger() -> Iterator[Stranger]:
    """Reads a cache by zarr or tensorstore in a process that has never imported logitcache: `stranger(path, "zarr")`."""
    program = Path(__file__).parents[1] / "independent_reader.py"
    with subprocess.Popen(
        [sys.executable, str(program)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        requests, answers = process.stdin, process.stdout

        def read(path: Path, reader: str) -> dict[str, np.ndarray]:
            out = path.with_suffix(".npz")
            print(json.dumps([str(path), reader, str(out)]), file=requests, flush=True)
            assert "[]\n" == answers.readline(), "the independent reader must not import logitcache"
            with np.load(out) as found:
                return dict(found)

        yield read
        requests.close()
