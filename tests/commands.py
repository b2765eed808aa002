"""The command line, run by tests."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from typing import Any

import pytest

from logitcache.cli import main


@dataclass(frozen=True)
class Ended:
    """The exit code and the output of a command."""

    returncode: int
    stdout: str
    stderr: str


def logitcache(*arguments: object, limit_file_bytes: int | None = None) -> Ended:
    """Run a command in this process, or in a process of its own where file sizes are limited."""
    if limit_file_bytes is not None:
        command = ["prlimit", f"--fsize={limit_file_bytes}", sys.executable, "-m", "logitcache.cli"]
        ended = subprocess.run(
            [*command, *map(str, arguments)], capture_output=True, text=True, check=False, timeout=240
        )
        return Ended(ended.returncode, ended.stdout, ended.stderr)
    out, err, before = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = ["logitcache", *map(str, arguments)]
    try:
        with redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as ended_with:
            main()
    finally:
        sys.argv = before
    return Ended(int(ended_with.value.code or 0), out.getvalue(), err.getvalue())


def refused(result: Ended, exit_code: int, *messages: str) -> None:
    """Check that a command failed with these messages and printed nothing to stdout."""
    assert "Traceback" not in result.stderr
    for message in messages:
        assert message in result.stderr
    assert exit_code == result.returncode
    assert "" == result.stdout


def run_json(*arguments: object) -> dict[str, Any]:
    """Run a command with `--json`; the object that it prints."""
    ended = logitcache(*arguments, "--json")
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout)
