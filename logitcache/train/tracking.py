"""Sends a run's metrics to an experiment tracker: any function that returns an object with `log` and `finish`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, Protocol

from logitcache.entry_points import load_entry_point


class Handle(Protocol):
    """A run in a tracker, such as the result of `wandb.init(...)`."""

    def log(self, values: dict[str, float], *, step: int) -> Any:
        """Log the metrics of a step."""

    def finish(self) -> Any:
        """The run is over."""


class Tracker:
    """The tracker of `runs.tracker`. Its first exception is printed, and training continues.

    Args:
        name: `package.module:function`.
        start: the function; called once per run with the run's description.
    """

    def __init__(self, name: str, start: Callable[[dict[str, Any]], Handle]) -> None:
        self._name = name
        self._start = start
        self._handle: Handle | None = None
        self._failed = False

    def start(self, config: dict[str, Any]) -> None:
        """Start a run, or resume it after an interruption."""
        self._guarded("when the run started", lambda: setattr(self, "_handle", self._start(config)))

    def log(self, values: dict[str, float], step: int) -> None:
        """Log the metrics of a step."""
        handle = self._handle
        if handle is not None:
            self._guarded(f"at step {step}", lambda: handle.log(values, step=step))

    def finish(self) -> None:
        """The run is over."""
        handle = self._handle
        if handle is not None:
            self._guarded("when the run finished", handle.finish)

    def _guarded(self, when: str, call: Callable[[], Any]) -> None:
        try:
            call()
        except Exception as error:
            if not self._failed:
                print(
                    f"runs.tracker {self._name} failed {when} ({type(error).__name__}: {error}); training continues, "
                    "and metrics.jsonl has all metrics",
                    file=sys.stderr,
                )
            self._failed = True


def load_tracker(name: str, *, trust: bool) -> Callable[[], Tracker]:
    """A function that makes the tracker of one run.

    Raises:
        UntrustedCode: the function is outside the working folder, and `trust` is False.
        UsageError: the function does not exist.
    """
    start = load_entry_point(name, trust=trust)
    return lambda: Tracker(name, start)
