"""Keys of a pipeline laid over its file: `cache.encoding.k=20`."""

from __future__ import annotations

from typing import Any

import yaml

from logitcache.encodings import encoding_or_auto
from logitcache.errors import UsageError


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
