"""Untrusted text as Markdown that shows the text itself: no HTML, link, image or front matter."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping

LONGEST_NAME = 200
"""Characters of a name that are shown."""


def table(rows: Mapping[str, str]) -> str:
    """Two columns without a heading; names and values are Markdown already."""
    lines = [f"| {name} | {value} |" for name, value in rows.items()]
    return "\n".join(["| | |", "|---|---|", *lines]) + "\n"


def one_line(text: str, longest: int) -> str:
    """Text without line breaks, control characters and marks that turn the writing direction, cut where it is long."""
    visible = "".join(" " if unicodedata.category(character)[0] in "CZ" else character for character in text)
    visible = " ".join(visible.split())
    return visible if len(visible) <= longest else f"{visible[: longest - 1]}…"


def code(text: str) -> str:
    """A code span that holds just this text, whatever it is."""
    text = one_line(text, LONGEST_NAME)
    fence = "`" * (1 + _longest_run(text, "`"))
    return f"{fence} {text} {fence}" if "`" in text or not text else f"{fence}{text}{fence}"


def escaped(line: str) -> str:
    """One line of plain text as Markdown that shows just that, with no link, image or HTML in it."""
    line = re.sub(r"([\\`*_{}\[\]<>()#!|~&$@:])", r"\\\1", line)
    line = re.sub(r"www\.", r"www\\.", line, flags=re.IGNORECASE)  # which some renderers make a link of
    return re.sub(r"^([-+=]|\d+(?=\.))", _as_entities, line)


def fenced(text: str, language: str) -> str:
    """A block of code that nothing in the text ends; line breaks stay."""
    fence = "`" * max(3, 1 + _longest_run(text, "`"))
    return f"{fence}{language}\n{text}\n{fence}\n"


def _as_entities(found: re.Match[str]) -> str:
    return "".join(f"&#{ord(character)};" for character in found[0])


def _longest_run(text: str, character: str) -> int:
    return max((len(run) for run in re.findall(f"{re.escape(character)}+", text)), default=0)
