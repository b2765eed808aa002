"""Reads configuration files, applies overrides such as `cache.encoding.k=20`, and validates against a schema."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from logitcache.errors import LogitCacheError, UsageError
from logitcache.registry import unknown_name


def read_raw(path: str | Path, schema: type[BaseModel], overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The mapping in a file, with overrides applied; `name` defaults to the file's name.

    Raises:
        UsageError: the file is missing or not YAML, or an override is invalid.
    """
    path, kind = Path(path), schema.__name__.lower()
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"{kind} file {path} does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"can't read the {kind} file {path}: {error}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a date or number that Python refuses
        raise UsageError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(raw, dict):
        needed = [name for name, field in schema.model_fields.items() if field.is_required()]
        raise UsageError(
            f"{path} contains a {type(raw).__name__}; expected a {kind}: a mapping with {', '.join(needed)}"
        )
    raw.setdefault("name", path.stem)
    for text in overrides:
        override(raw, text)
    return raw


def override(raw: dict[str, Any], text: str) -> None:
    """Set `a.b.c=value` in nested mappings; list items are addressed by position or by `name`."""
    dotted, separator, value_text = text.partition("=")
    keys = dotted.split(".")
    if not separator or not all(keys):
        raise UsageError(f"{text!r} is not a valid override (expected KEY=VALUE, such as cache.encoding.k=20)")
    try:
        value = yaml.safe_load(value_text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UsageError(f"the value of {text!r} is not valid YAML: {error}") from error
    node: Any = raw
    for depth, key in enumerate(keys[:-1]):
        node = _descend(node, key, ".".join(keys[: depth + 1]))
    node[_position(node, keys[-1], dotted) if isinstance(node, list) else keys[-1]] = value


def _descend(node: Any, key: str, dotted: str) -> Any:
    place: Any = _position(node, key, dotted) if isinstance(node, list) else key
    child = node[place] if isinstance(node, list) else node.get(place)
    if isinstance(child, str) and key == "encoding":
        from logitcache.encodings import encoding_or_auto  # needs torch, which most overrides don't

        child = encoding_or_auto(child).config()
    if child is None:
        child = {}
    if not isinstance(child, dict | list):
        raise UsageError(f"{dotted} is {child!r}, which has no keys to override")
    node[place] = child
    return child


def _position(items: list[Any], key: str, dotted: str) -> int:
    names = [item.get("name") if isinstance(item, dict) else None for item in items]
    if key in names:
        return names.index(key)
    if key.isdecimal() and int(key) < len(items):
        return int(key)
    known = [name for name in names if isinstance(name, str)]
    expected = f"a number from 0 to {len(items) - 1}" + (f", or one of: {', '.join(known)}" if known else "")
    raise UsageError(unknown_name("item", key, known, expected, at=dotted.removesuffix(key)))


def refuse_namesakes(kind: str, names: Sequence[str]) -> None:
    """Check that names are unique.

    Raises:
        ValueError: two are the same.
    """
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"two {kind} are named {name!r}; give each a unique name")


_S = TypeVar("_S", bound=BaseModel)


def parse(schema: type[_S], raw: Mapping[str, Any], *, source: str) -> _S:
    """Plain data validated against a schema.

    Raises:
        UsageError: lists every problem on a line of its own, with its key.
    """
    try:
        return schema.model_validate(raw)
    except ValidationError as error:
        lines = [_describe(problem, schema) for problem in error.errors()]
        raise UsageError(f"{source}: " + "\n".join(lines)) from None
    except LogitCacheError as error:
        raise UsageError(f"{source}: {error}") from None


def _describe(problem: Any, schema: type[BaseModel]) -> str:
    location = [str(part) for part in problem["loc"]]
    dotted = ".".join(location)
    if problem["type"] == "extra_forbidden":
        return unknown_key(dotted, location[-1], _known_keys(schema, location[:-1]))
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "missing":
        return f"{dotted} is missing"
    given = problem.get("input")
    shown = f" (found {given!r})" if isinstance(given, str | int | float | bool) else ""
    return f"{dotted}: {message}{shown}" if dotted else message


def unknown_key(dotted: str, key: str, known: list[str]) -> str:
    """The message for an unknown key."""
    section = dotted.removesuffix(key)
    message = unknown_name("key", key, known, at=section)
    if "args" in known:
        message += f". An argument of the dataset or model itself is written {section}args.{key}"
    return message


def _known_keys(schema: type[BaseModel], location: list[str]) -> list[str]:
    """The keys of the section at a location."""
    for part in location:
        if not part.isdecimal():
            schema = _section_in(schema.model_fields[part].annotation) or schema
    return list(schema.model_fields)


def _section_in(annotation: Any) -> type[BaseModel] | None:
    """The section in a field's annotation, which may be optional or a list."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((section for section in map(_section_in, get_args(annotation)) if section is not None), None)
