"""Parses untrusted JSON. Whatever two parsers might read differently is an error."""

from __future__ import annotations

import json
import math
from typing import Any


def parse_json(data: bytes, *, max_bytes: int) -> Any:
    """A JSON value.

    Raises:
        ValueError: too long, too deep, no UTF-8, no JSON, a key twice in one object, NaN or an infinite number.
    """
    if len(data) > max_bytes:
        raise ValueError(f"{len(data)} bytes long; at most {max_bytes} are read")
    try:
        text = data.decode("utf-8")
        value = json.loads(text, object_pairs_hook=_no_key_twice, parse_constant=_refuse, parse_float=_finite)
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode("utf-8")  # half a surrogate pair is no character
        return value
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} appears twice")
    return found


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is no number")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is too large")
    return number
