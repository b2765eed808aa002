"""Scheduled parameters: pure functions of the share of training that is done."""

from __future__ import annotations

import math
import reprlib
import sys
from dataclasses import dataclass, replace
from typing import TypeVar

from logitcache.errors import UsageError

shown = reprlib.repr
"""A value for a message, shortened: YAML aliases can make a value too large to print."""
SHAPES = ("linear", "cosine", "step")


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """A number that goes from `start` to `end` over the first part of training and stays there.

    In a pipeline: `{from: 4, to: 1, over: 0.5, shape: cosine}` in place of a number. Within a stage of `Stages` the
    schedule runs over the stage.

    Raises:
        UsageError: `over` outside (0, 1], or an unknown shape.
    """

    start: float
    end: float
    over: float = 1.0
    """Share of training after which `end` is reached; 0 < over <= 1."""
    shape: str = "linear"
    """"linear"; "cosine", half a cosine wave; or "step", `start` until `over` and `end` afterwards."""

    def __post_init__(self) -> None:
        check_number("a schedule's `from`", self.start)
        check_number("a schedule's `to`", self.end)
        check_number("a schedule's `over`", self.over)
        if not 0.0 < self.over <= 1.0:
            raise UsageError(f"a schedule's `over` is a share of training, above 0 and at most 1, not {self.over!r}")
        if self.shape not in SHAPES:
            raise UsageError(f"a schedule's `shape` is one of: {', '.join(SHAPES)}; not {shown(self.shape)}")

    def at(self, progress: float) -> float:
        """The number at this share of training, 0 to 1."""
        share = min(progress / self.over, 1.0)
        if self.shape == "step":
            return self.end if share == 1.0 else self.start
        if self.shape == "cosine":
            share = 0.5 - 0.5 * math.cos(math.pi * share)
        return (1.0 - share) * self.start + share * self.end


Scheduled = float | Schedule
"""A number, or a schedule of one."""


def is_zero_during(value: Scheduled, start: float, end: float) -> bool:
    """Whether a number stays 0 between two shares of training; schedules are monotonic."""
    return value_at(value, start) == 0 == value_at(value, end)


def value_at(value: Scheduled, progress: float) -> float:
    """The number at this share of training, 0 to 1."""
    return value.at(progress) if isinstance(value, Schedule) else value


def fixed(value: Scheduled) -> float:
    """A parameter of a loss that is called, checked not to be a schedule.

    Raises:
        UsageError: it is a schedule.
    """
    if isinstance(value, Schedule):
        raise UsageError("the loss is scheduled: call `loss.at(progress)` first, with progress from 0 to 1")
    return value


T = TypeVar("T")


def settled(config: T, progress: float) -> T:
    """A configuration at this share of training, 0 to 1, with its schedules replaced by numbers."""
    changing = {name: value.at(progress) for name, value in vars(config).items() if isinstance(value, Schedule)}
    return replace(config, **changing) if changing else config  # type: ignore[type-var]


def check_number(name: str, value: object) -> None:
    """Check that a value is a finite number.

    Raises:
        UsageError: it is not; names the parameter.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= sys.float_info.max:
        raise UsageError(f"{name} is a number, not {shown(value)}")


def check_parameter(name: str, value: object, *, least: float = -math.inf, most: float = math.inf) -> None:
    """Check that a parameter, or both ends of its schedule, lies in [least, most].

    Raises:
        UsageError: it does not; names the parameter and its range.
    """
    for number in (value.start, value.end) if isinstance(value, Schedule) else (value,):
        check_number(name, number)
        assert isinstance(number, int | float)
        if not least <= number <= most:
            range_of = f"is at least {least:g}" if most == math.inf else f"lies between {least:g} and {most:g}"
            raise UsageError(f"{name} {range_of}, not {shown(number)}")


def check_used_temperature(temperature: float) -> None:
    """Check the temperature of a loss function, which may be any kind of number.

    Raises:
        UsageError: it is not positive and finite.
    """
    if not 0 < temperature < math.inf:
        raise UsageError(f"a temperature is positive and finite, not {shown(temperature)}")


def check_temperature(value: object) -> None:
    """Check that a temperature, or both ends of its schedule, is positive.

    Raises:
        UsageError: it is not.
    """
    for number in (value.start, value.end) if isinstance(value, Schedule) else (value,):
        check_number("a temperature", number)
        assert isinstance(number, int | float)
        if not number > 0:
            raise UsageError(f"a temperature is positive, not {shown(number)}")
