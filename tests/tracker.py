"""Experiment trackers that tests name as `tests.tracker:function`."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any


class ToFile:
    """Writes all that it is told into a file."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.path = Path(config["folder"]) / "tracked.jsonl"
        self.write({"start": config})

    def log(self, values: dict[str, float], *, step: int) -> None:
        self.write({"step": step, **values})

    def finish(self) -> None:
        self.write({"finished": True})

    def write(self, line: dict[str, Any]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")


class Failing(ToFile):
    """Loses its connection after the first metrics."""

    def log(self, values: dict[str, float], *, step: int) -> None:
        if step > 1:
            raise ConnectionError("no route to the tracker")


def to_file(config: dict[str, Any]) -> ToFile:
    return ToFile(config)


def failing(config: dict[str, Any]) -> ToFile:
    return Failing(config)


def refusing(config: dict[str, Any]) -> ToFile:
    raise PermissionError("no such project")


class Deadly(ToFile):
    """Ends its process at step 6 as an administrator would."""

    def log(self, values: dict[str, float], *, step: int) -> None:
        if step >= 6:
            os.kill(os.getpid(), signal.SIGKILL)


def deadly(config: dict[str, Any]) -> ToFile:
    return Deadly(config)
