"""A run's metrics in somebody's experiment tracker: any function that gives an object with `log` and `finish`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, Protocol

from logitcache.entry_points import load_entry_point


class Handle(Protocol):
    """What a tracker gives for a run; `wandb.init(...)` returns one."""

    def log(self, values: dict[str, float], *, step: int) -> Any:
        """Take the metrics of a step."""

    def finish(self) -> Any:
        """The run is over."""


class Tracker:
    """A tracker as the pipeline's `runs.tracker` names it: whatever it raises is said once, and the run goes on.

    Args:
        name: `package.module:function`.
        start: that function; called once for each run, with what the run is.
    """

    def __init__(self, name: str, start: Callable[[dict[str, Any]], Handle]) -> None:
        self._name = name
        self._start = start
        self._handle: Handle | None = None
        self._complained = False

    def start(self, config: dict[str, Any]) -> None:
        """Begin a run, or go on with it after an interruption."""
        self._guarded("at its start", lambda: setattr(self, "_handle", self._start(config)))

    def log(self, values: dict[str, float], step: int) -> None:
        """Pass on the metrics of a step."""
        handle = self._handle
        if handle is not None:
            self._guarded(f"at step {step}", lambda: handle.log(values, step=step))

    def finish(self) -> None:
        """The run is over."""
        handle = self._handle
        if handle is not None:
            self._guarded("at its end", handle.finish)

    def _guarded(self, when: str, call: Callable[[], Any]) -> None:
        try:
            call()
        except Exception as error:
            if not self._complained:
                print(
                    f"runs.tracker {self._name} failed {when} ({type(error).__name__}: {error}); the run goes on, and "
                    "metrics.jsonl holds what it logs",
                    file=sys.stderr,
                )
            self._complained = True


def load_tracker(name: str, *, trust: bool) -> Callable[[], Tracker]:
    """What makes a tracker for each run.

    Raises:
        UntrustedCode: the function lies outside the working folder, and `trust` is False.
        UsageError: there is no such function.
    """
    start = load_entry_point(name, trust=trust)
    return lambda: Tracker(name, start)
