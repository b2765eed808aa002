"""Progress of long work: a bar with rate and time left on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.filesize import decimal
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.text import Text

BYTES = "bytes"
"""The unit that is shown as kB, MB and so on."""
PLAIN_SECONDS = 10.0
"""Between two plain lines."""

_quiet = False


def silence(quiet: bool = True) -> None:
    """Show no progress from here on, or show it again."""
    global _quiet
    _quiet = quiet


class Meter:
    """Counts finished work; `note` is shown behind the rate."""

    def advance(self, count: int = 1, *, note: str = "") -> None:
        """Count finished items."""


@contextmanager
def track(description: str, total: int, *, unit: str) -> Iterator[Meter]:
    """Show progress on standard error while the block runs."""
    if _quiet:
        yield Meter()
    elif sys.stderr.isatty():
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn() if unit == BYTES else MofNCompleteColumn(),
            TransferSpeedColumn() if unit == BYTES else _Rate(unit),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        with Progress(*columns, console=Console(stderr=True)) as bar:
            yield _BarMeter(bar, bar.add_task(description, total=total, note=""))
    else:
        meter = _LineMeter(description, total, unit)
        yield meter
        meter.finish()


class _BarMeter(Meter):
    def __init__(self, bar: Progress, task: object) -> None:
        self._bar = bar
        self._task = task

    def advance(self, count: int = 1, *, note: str = "") -> None:
        self._bar.update(self._task, advance=count, **({"note": note} if note else {}))  # type: ignore[arg-type]


class _LineMeter(Meter):
    def __init__(self, description: str, total: int, unit: str) -> None:
        self._description, self._total, self._unit = description, total, unit
        self._done = 0
        self._note = ""
        self._start = self._shown = time.monotonic()

    def advance(self, count: int = 1, *, note: str = "") -> None:
        self._done += count
        self._note = note or self._note
        now = time.monotonic()
        if now - self._shown >= PLAIN_SECONDS:
            self._shown = now
            rate = self._done / (now - self._start)
            left = (self._total - self._done) / rate if rate else 0.0
            if self._unit == BYTES:
                amount = f"{decimal(self._done)} of {decimal(self._total)}, {decimal(int(rate))}/s"
            else:
                amount = f"{self._done}/{self._total} {self._unit}, {_per_second(rate)}"
            self._print(f"{amount}, {left:.0f} s left")

    def finish(self) -> None:
        seconds = time.monotonic() - self._start
        amount = decimal(self._done) if self._unit == BYTES else f"{self._done} {self._unit}"
        self._print(f"{amount} in {seconds:.1f} s")

    def _print(self, text: str) -> None:
        print(f"{self._description}: {text}{f', {self._note}' if self._note else ''}", file=sys.stderr, flush=True)


def _per_second(rate: float, unit: str = "") -> str:
    number = f"{rate:.0f}" if rate >= 10 else f"{rate:.2g}"
    return f"{number} {unit}/s" if unit else f"{number}/s"


class _Rate(ProgressColumn):
    """Items a second."""

    def __init__(self, unit: str) -> None:
        super().__init__()
        self._unit = unit

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else _per_second(speed, self._unit))
