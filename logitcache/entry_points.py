"""Code that a pipeline or a cache names as `package.module:function`, and when it is trusted."""

from __future__ import annotations

import functools
import importlib
import re
import sys
import sysconfig
from collections.abc import Mapping
from importlib.machinery import FrozenImporter, PathFinder
from pathlib import Path
from typing import Any

from logitcache.errors import LogitCacheError, UntrustedCode, UsageError
from logitcache.strict_json import parse_json

_MANIFEST_BYTES = 2**24
"""A longer file is read as no manifest of a cache."""
_ENTRY_POINT = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


def is_entry_point(name: str) -> bool:
    """Whether a name has the form `package.module:function`."""
    return _ENTRY_POINT.fullmatch(name) is not None


def load_entry_point(name: str, *, trust: bool) -> Any:
    """The object that `package.module:function` names.

    Pipelines and caches are shared files, so importing what they name may run code of other people. The code is
    imported only with `trust`, or where module and function are the user's own: in the working directory, and not in
    Python's library, a Python environment or a cache.

    Raises:
        UntrustedCode: the code is not the user's own, and `trust` is False.
        UsageError: the module or function does not exist, or the import fails.
    """
    module_name, function = name.split(":")
    folder = Path.cwd().resolve()
    own = _is_own_module(module_name, folder)
    if not own and not trust:
        raise UntrustedCode(
            f"{name} would run code from outside the working directory, or from a Python environment or a cache that "
            "is in that folder; review it and re-run with --trust (in Python: trust=True), or copy the module into the "
            "working directory"
        )
    if own and sys.path[:1] != [str(folder)]:
        sys.path.insert(0, str(folder))
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise UsageError(f"can't import {module_name!r} for {name}: {type(error).__name__}: {error}") from error
    try:
        found = getattr(module, function)
    except AttributeError:
        raise UsageError(f"{name}: module {module_name!r} has no {function!r}") from None
    if not trust:
        _check_is_own(found, name, folder)
    return found


def _check_is_own(found: Any, name: str, folder: Path) -> None:
    """Refuse what a user's module only imports, such as `subprocess.run`: an untrusted pipeline may name it there.

    Raises:
        UntrustedCode: a function, method or class from elsewhere.
    """
    while isinstance(found, functools.partial):
        found = found.func
    if not hasattr(found, "__qualname__") and not hasattr(found, "__name__"):
        return  # an object that the user's module made, such as a composed transform
    home = getattr(found, "__module__", None)
    if not isinstance(home, str) or not _is_own_module(home, folder):
        qualified = getattr(found, "__qualname__", found.__name__)
        raise UntrustedCode(
            f"{name} is {home}.{qualified}, from outside the working directory; call it in a function of your own and "
            "name that one, or review it and re-run with --trust (in Python: trust=True)"
        )


def call_entry_point(function: Any, name: str, arguments: Mapping[str, Any]) -> Any:
    """Call an imported function with a pipeline's arguments.

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


def _is_own_module(name: str, folder: Path) -> bool:
    """Whether importing a module would run the user's own code only; imports nothing.

    Follows the import system, not the file system: a package of the same name elsewhere may come first.
    """
    parts = name.split(".")
    # Python's own modules of these names come before those in the working directory, or are loaded already.
    if parts[0] in {*sys.stdlib_module_names, *sys.builtin_module_names} or FrozenImporter.find_spec(parts[0]):
        return False
    search: list[str] | None = [str(folder), *sys.path]
    origin: str | None = None
    for depth in range(len(parts)):
        package = ".".join(parts[: depth + 1])
        if package in sys.modules:
            module = sys.modules[package]
            origin, inside = getattr(module, "__file__", None), getattr(module, "__path__", None)
        # Only the last part: for a whole name, the finder expects that its parent packages were imported.
        elif search is not None and (spec := PathFinder.find_spec(parts[depth], search)) is not None:
            origin, inside = spec.origin, spec.submodule_search_locations
        else:
            return False
        if origin is not None and not _is_own(origin, folder):
            return False
        search = None if inside is None else list(inside)
    return origin is not None


def _is_own(origin: str | None, folder: Path) -> bool:
    """Whether a file is the user's own: in the working directory, and neither installed nor part of a cache there."""
    if origin is None or folder == Path(folder.anchor):  # the root folder contains code of others
        return False
    path = Path(origin).resolve()
    if not path.is_relative_to(folder) or {"site-packages", "dist-packages"} & set(path.parts):
        return False
    if any(path.is_relative_to(installed) for installed in _python_folders()):
        return False
    if any(_is_environment(parent) for parent in path.parents if parent.is_relative_to(folder)):
        return False
    return not any(map(_is_cache, path.parents))  # the working directory may itself lie in a cache


def _python_folders() -> set[Path]:
    """The folders of this Python and its packages."""
    prefixes = {sys.prefix, sys.exec_prefix, sys.base_prefix, sys.base_exec_prefix}
    return {Path(folder).resolve() for folder in prefixes | set(sysconfig.get_paths().values())}


def _is_environment(folder: Path) -> bool:
    """Whether a folder is a Python environment, of this Python or another."""
    return (folder / "pyvenv.cfg").is_file() or (folder / "conda-meta").is_dir()


def _is_cache(folder: Path) -> bool:
    """Whether a folder holds a cache, or a manifest that can't be read."""
    manifest = folder / "manifest.json"
    try:
        if not manifest.is_file():  # opening a pipe would block
            return False
        with manifest.open("rb") as file:
            found = parse_json(file.read(_MANIFEST_BYTES + 1), max_bytes=_MANIFEST_BYTES)
    except (OSError, ValueError):
        return True
    return isinstance(found, dict) and found.get("format") == "logitcache"
