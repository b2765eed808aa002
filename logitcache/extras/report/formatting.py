"""Numbers and names as the page shows them. Names come from untrusted files and are reduced to one visible line."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import yaml

from logitcache.markdown import one_line

MISSING = "–"


def plain_text(value: Any, limit: int = 80) -> str:
    """Any value on one line of at most `limit` visible characters.

    HTML needs no escaping here: the template escapes it. Line separators would end a string in a chart's expressions.
    """
    return one_line(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str), limit)


def as_yaml(value: Any, limit: int = 600) -> str:
    """A JSON value on one line, written as in a pipeline; "none" where it is empty."""
    return (
        plain_text(yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=math.inf), limit)
        if value
        else "none"
    )


class ClassNames:
    """A unique name for each class: its number where it has no name, name and number where a name is not unique."""

    def __init__(self, names: Sequence[str] | None) -> None:
        self._names = [plain_text(name, 40) for name in names or ()]
        self._uses = Counter(self._names)

    def __getitem__(self, number: int) -> str:
        if number >= len(self._names):
            return str(number)
        name = self._names[number]
        return name if name and self._uses[name] == 1 else f"{name} ({number})"


def percent(share: float | None, digits: int = 2) -> str:
    """A share as "97.60 %"."""
    return MISSING if share is None or not math.isfinite(share) else f"{100 * share:.{digits}f}\N{NO-BREAK SPACE}%"


def with_spread(mean: float | None, deviation: float | None) -> str:
    """A share with its standard deviation, "95.70 ± 0.26 %"."""
    if mean is None or deviation is None:
        return percent(mean)
    return f"{100 * mean:.2f} ± {100 * deviation:.2f}\N{NO-BREAK SPACE}%"


def count(number: int) -> str:
    """An integer with its digits in groups of three."""
    return f"{number:,}".replace(",", "\N{NARROW NO-BREAK SPACE}")


def counted(number: int, noun: str, plural: str | None = None) -> str:
    """A number with its noun, "1 row" or "3 rows"."""
    return f"{count(number)} {noun if number == 1 else plural or f'{noun}s'}"


def decimal(value: float | None, digits: int = 3) -> str:
    """A number to some significant digits, with a power of ten where it is very small or very large."""
    if value is None or math.isnan(value):
        return MISSING
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    if value != 0 and not 1e-3 <= abs(value) < 1e6:
        mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
        power = str(int(exponent)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
        return f"{mantissa}\N{NARROW NO-BREAK SPACE}×\N{NARROW NO-BREAK SPACE}10{power}"
    return f"{value:.{digits}g}" if abs(value) < 10**digits else count(round(value))


def number(value: float) -> str:
    """A count where the value is whole, else a decimal."""
    return count(int(value)) if float(value).is_integer() else decimal(value)
