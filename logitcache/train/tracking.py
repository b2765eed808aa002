"""Metrics of a run in an experiment tracker, which `runs.tracker` names.

A tracker is a function. It is called once for each run with a description of the run, and returns an object with `log`
and `finish`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from logitcache.registry import Registry


class Handle(Protocol):
    """What a tracker returns for a run; `wandb.init(...)` returns one."""

    def log(self, values: dict[str, float], *, step: int) -> Any:
        """Record the metrics of a step."""

    def finish(self) -> Any:
        """End the run."""


Start = Callable[[dict[str, Any]], Handle]

TRACKERS: Registry[Start] = Registry("tracker", {}, allows_code=True)
"""A package adds one in the entry point group `logitcache.trackers`."""


class Tracker:
    """A tracker whose errors don't stop the run: the first one is printed.

    Args:
        name: `runs.tracker` of the pipeline.
        start: the function of that name.
    """

    def __init__(self, name: str, start: Start) -> None:
        self._name = name
        self._start = start
        self._handle: Handle | None = None
        self._failed = False

    def start(self, config: dict[str, Any]) -> None:
        """Begin a run, or resume it."""
        with self._reported("when the run started"):
            self._handle = self._start(config)

    def log(self, values: dict[str, float], step: int) -> None:
        """Log the metrics of a step."""
        if self._handle is not None:
            with self._reported(f"at step {step}"):
                self._handle.log(values, step=step)

    def finish(self) -> None:
        """End the run."""
        if self._handle is not None:
            with self._reported("when the run finished"):
                self._handle.finish()

    @contextmanager
    def _reported(self, when: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if not self._failed:
                print(
                    f"runs.tracker {self._name} failed {when} ({type(error).__name__}: {error}); training continues, "
                    "and metrics.jsonl has all metrics",
                    file=sys.stderr,
                )
            self._failed = True


def load_tracker(name: str, *, trust: bool) -> Callable[[], Tracker]:
    """A function that makes a tracker for each run.

    Raises:
        UntrustedCode: the function is outside the working directory, and `trust` is False.
        UsageError: the name is unknown.
    """
    start = TRACKERS.resolve(name, trust=trust)
    return lambda: Tracker(name, start)
