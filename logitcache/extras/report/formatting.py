"""Numbers and names as the page shows them. Names come from untrusted files and are reduced to one visible line."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from logitcache.markdown import one_line

MISSING = "–"


def plain_text(value: Any, limit: int = 80) -> str:
    """Any value on one line of at most `limit` visible characters.

    HTML needs no escaping here: the template escapes it. Line separators would end a string in a chart's expressions.
    """
    return one_line(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str), limit)


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


def transform_lines(transform: Any) -> list[tuple[str, str]]:
    """The transform of a cache's identity as (part, steps), written as in a pipeline."""
    if not isinstance(transform, Mapping):
        return [("views", "not stated: the cache was created without a view plan")]
    lines = []
    for part, label in (("shared", "shared transform"), ("mixing", "mixing"), ("teacher_input", "teacher input")):
        value = transform.get(part)
        if isinstance(value, Mapping) and part == "mixing":
            text = ", ".join(f"{key} {value[key]}" for key in value)
        elif isinstance(value, list) and value:
            text = " → ".join(map(_step, value))
        else:
            text = json.dumps(value, ensure_ascii=False) if value else "none"
        lines.append((label, plain_text(text, 600)))
    return lines


def _step(step: Any) -> str:
    if not isinstance(step, Mapping) or len(step) != 1:
        return json.dumps(step, ensure_ascii=False)
    ((name, parameters),) = step.items()
    if not isinstance(parameters, Mapping):
        return f"{name}({json.dumps(parameters, ensure_ascii=False)})"
    return f"{name}({', '.join(f'{key}={json.dumps(value, ensure_ascii=False)}' for key, value in parameters.items())})"
