"""`package.module:function`: the user's own code, run only where it was consented to."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Mapping
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

from logitcache.errors import LogitCacheError, UntrustedCode, UsageError

_ENTRY_POINT = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


def is_entry_point(name: str) -> bool:
    """Whether a name has the form `package.module:function`."""
    return _ENTRY_POINT.fullmatch(name) is not None


def load_entry_point(name: str, *, trust: bool) -> Any:
    """The object that `package.module:function` names.

    A pipeline or a cache is a shared file, so importing what it names is running somebody's code: it is done when
    the module lies under the working folder, or when the user trusts the file.

    Raises:
        UntrustedCode: the module lies elsewhere, and `trust` is False.
        UsageError: no such module or function, or a module that fails when it is imported.
    """
    module_name, function = name.split(":")
    folder = Path.cwd().resolve()
    inside = _lies_under(module_name, folder)
    if not inside and not trust:
        raise UntrustedCode(
            f"{name} would run code from outside the working folder; look at it, then run again with --trust "
            "(in Python: trust=True), or copy the module under the working folder"
        )
    if inside and sys.path[0] != str(folder):
        sys.path.insert(0, str(folder))
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise UsageError(f"can't import {module_name!r} for {name}: {type(error).__name__}: {error}") from error
    try:
        return getattr(module, function)
    except AttributeError:
        raise UsageError(f"{name}: module {module_name!r} has no {function!r}") from None


def call_entry_point(function: Any, name: str, arguments: Mapping[str, Any]) -> Any:
    """Call what an entry point named, with a pipeline's arguments.

    Raises:
        UsageError: the function failed; names it and its error.
    """
    try:
        return function(**arguments)
    except LogitCacheError:
        raise
    except Exception as error:
        raise UsageError(
            f"{name} failed with the arguments {dict(arguments)}: {type(error).__name__}: {error}"
        ) from error


def _lies_under(module_name: str, folder: Path) -> bool:
    """Whether importing a module would run code of this folder only; found out without importing anything.

    The import system is asked, not the file system: a package of the same name elsewhere may come first.
    """
    if module_name in sys.modules:
        origin = getattr(sys.modules[module_name], "__file__", None)
        return origin is not None and _is_own(Path(origin), folder)
    search: list[str] | None = [str(folder), *sys.path]
    parts = module_name.split(".")
    spec = None
    for depth in range(len(parts)):
        spec = PathFinder.find_spec(".".join(parts[: depth + 1]), search)
        if spec is None or (spec.origin is not None and not _is_own(Path(spec.origin), folder)):
            return False
        search = None if spec.submodule_search_locations is None else list(spec.submodule_search_locations)
    return spec is not None and spec.origin is not None


def _is_own(path: Path, folder: Path) -> bool:
    """Whether a file is the user's own: in the working folder, and in no environment that was installed there."""
    path = path.resolve()
    if not path.is_relative_to(folder) or {"site-packages", "dist-packages"} & set(path.parts):
        return False
    return not any((parent / "pyvenv.cfg").is_file() for parent in path.parents if parent.is_relative_to(folder))
