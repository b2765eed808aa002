"""A file that people write, and keys laid over it: `cache.encoding.k=20`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from logitcache.encodings import encoding_or_auto
from logitcache.errors import UsageError


def read_raw(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """A file's mapping, named after the file where it has no name, with overrides on top.

    Raises:
        UsageError: no such file, no YAML, or an override that can't be laid over it.
    """
    path = Path(path)
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"there is no pipeline file {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"can't read the pipeline file {path}: {error}") from error
    except (yaml.YAMLError, RecursionError) as error:
        raise UsageError(f"{path} is no YAML: {error}") from error
    if not isinstance(raw, dict):
        raise UsageError(
            f"{path} holds {type(raw).__name__}; expected a mapping with data, views, teacher, cache, students"
        )
    raw.setdefault("name", path.stem)
    for text in overrides:
        override(raw, text)
    return raw


def override(raw: dict[str, Any], text: str) -> None:
    """Lay `a.b.c=value` over nested mappings; list items go by number, or by their `name`."""
    dotted, separator, value_text = text.partition("=")
    keys = dotted.split(".")
    if not separator or not all(keys):
        raise UsageError(f"{text!r} is no override; expected for example cache.encoding.k=20")
    try:
        value = yaml.safe_load(value_text)
    except yaml.YAMLError as error:
        raise UsageError(f"the value of {text!r} is no YAML: {error}") from error
    node: Any = raw
    for depth, key in enumerate(keys[:-1]):
        node = _descend(node, key, ".".join(keys[: depth + 1]))
    node[_position(node, keys[-1], dotted) if isinstance(node, list) else keys[-1]] = value


def _descend(node: Any, key: str, dotted: str) -> Any:
    place: Any = _position(node, key, dotted) if isinstance(node, list) else key
    child = node[place] if isinstance(node, list) else node.get(place)
    if isinstance(child, str) and key == "encoding":
        child = encoding_or_auto(child).config()
    if child is None:
        child = {}
    if not isinstance(child, dict | list):
        raise UsageError(f"{dotted} is {child!r}, which has no keys below it to override")
    node[place] = child
    return child


def _position(items: list[Any], key: str, dotted: str) -> int:
    names = [item.get("name") if isinstance(item, dict) else None for item in items]
    if key in names:
        return names.index(key)
    if key.isdecimal() and int(key) < len(items):
        return int(key)
    raise UsageError(f"{dotted}: no item {key!r}; expected a number below {len(items)} or one of {names}")
