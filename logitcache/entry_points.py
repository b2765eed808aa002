"""`package.module:function`: the user's own code, run only where it was consented to."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path
from typing import Any

from logitcache.errors import UntrustedCode, UsageError

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
        UsageError: no such module or function.
    """
    module_name, function = name.split(":")
    inside = _under_working_folder(module_name)
    if not inside and not trust:
        raise UntrustedCode(
            f"{name} would run code from outside the working folder; look at it, then run again with --trust "
            "(in Python: trust=True), or copy the module under the working folder"
        )
    if inside and (folder := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, folder)
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise UsageError(f"can't import {module_name!r} for {name}: {error}") from error
    try:
        return getattr(module, function)
    except AttributeError:
        raise UsageError(f"{name}: module {module_name!r} has no {function!r}") from None


def _under_working_folder(module_name: str) -> bool:
    path = Path.cwd().joinpath(*module_name.split("."))
    if not (path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()):
        return False
    loaded = sys.modules.get(module_name)
    origin = getattr(loaded, "__file__", None)
    return origin is None or Path(origin).resolve().is_relative_to(Path.cwd().resolve())
