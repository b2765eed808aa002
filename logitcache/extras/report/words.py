"""Numbers and names as the page writes them; a stranger's names are made harmless to look at."""

from __future__ import annotations

import json
import math
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

MAX_NAME = 80
"""Characters of a stranger's name that are shown."""


def name_of(value: Any, limit: int = MAX_NAME) -> str:
    """Any value on one line: without control, direction or unassigned characters, and cut in the middle if long.

    Markup needs no care here: the template escapes it. Line and paragraph separators would end a string of a chart's
    expressions.
    """
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    text = "".join("\N{REPLACEMENT CHARACTER}" if _is_hidden(each) else each for each in text)
    half = (limit - 1) // 2
    return text if len(text) <= limit else f"{text[:half]}…{text[-half:]}"


def _is_hidden(character: str) -> bool:
    category = unicodedata.category(character)
    return category[0] == "C" or category in ("Zl", "Zp")


class ClassNames:
    """A name for each class, no two the same; its number where there is none."""

    def __init__(self, names: Sequence[str] | None) -> None:
        self._names = [name_of(name, 40) for name in names or ()]
        self._uses = Counter(self._names)

    def __getitem__(self, number: int) -> str:
        if number >= len(self._names):
            return str(number)
        name = self._names[number]
        return name if name and self._uses[name] == 1 else f"{name} ({number})"


def percent(share: float | None, digits: int = 2) -> str:
    """A share as "97.60 %"."""
    return "–" if share is None or not math.isfinite(share) else f"{100 * share:.{digits}f}\N{NO-BREAK SPACE}%"


def count(number: int) -> str:
    """A whole number in groups of three."""
    return f"{number:,}".replace(",", "\N{NARROW NO-BREAK SPACE}")


def decimal(value: float | None, digits: int = 3) -> str:
    """A number to some significant digits; "∞" beyond all of them."""
    if value is None or math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    if value != 0 and not 1e-3 <= abs(value) < 1e6:
        mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
        return f"{mantissa}\N{NARROW NO-BREAK SPACE}×\N{NARROW NO-BREAK SPACE}10{_superscript(int(exponent))}"
    return f"{value:.{digits}g}" if abs(value) < 10**digits else count(round(value))


def with_spread(mean: float | None, deviation: float | None) -> str:
    """A share with its standard deviation, "95.70 ± 0.26 %"."""
    if mean is None or deviation is None:
        return percent(mean)
    return f"{100 * mean:.2f} ± {100 * deviation:.2f}\N{NO-BREAK SPACE}%"


def size(num_bytes: float) -> str:
    """Bytes in the unit that suits, 1 kB being 1000."""
    power = min(max(int(math.log10(num_bytes)) // 3, 0), 4) if num_bytes else 0
    return f"{num_bytes / 1000**power:.4g}\N{NO-BREAK SPACE}{('B', 'kB', 'MB', 'GB', 'TB')[power]}"


def counted(number: int, one: str, many: str) -> str:
    """A number with its noun."""
    return f"{count(number)} {one if number == 1 else many}"


def transform_lines(transform: Any) -> list[tuple[str, str]]:
    """The identity's transform as (part, what it does), as one would write it in a pipeline."""
    if not isinstance(transform, Mapping):
        return [("views", "not stated: the cache was created without a view plan")]
    lines = []
    for part, label in (("shared", "shared transform"), ("mixing", "mixing"), ("teacher_input", "teacher's own input")):
        value = transform.get(part)
        if part == "mixing":
            text = "none" if not isinstance(value, Mapping) else ", ".join(f"{key} {value[key]}" for key in value)
        else:
            text = " → ".join(map(_step, value)) if isinstance(value, list) else json.dumps(value, ensure_ascii=False)
            text = "none" if value in (None, []) else text
        lines.append((label, name_of(text, 600)))
    return lines


def _step(step: Any) -> str:
    if not isinstance(step, Mapping) or len(step) != 1:
        return json.dumps(step, ensure_ascii=False)
    ((name, parameters),) = step.items()
    if not isinstance(parameters, Mapping):
        return f"{name}({json.dumps(parameters, ensure_ascii=False)})"
    return f"{name}({', '.join(f'{key}={json.dumps(value, ensure_ascii=False)}' for key, value in parameters.items())})"


def _superscript(number: int) -> str:
    return str(number).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
