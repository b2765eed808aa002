"""Old public names that work for one more release, with a `DeprecationWarning` that gives the new name."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any


def warn_renamed(old: str, new: str, *, stacklevel: int = 3) -> None:
    """Warn that a name has changed; `stacklevel` 3 points at the caller of the function that warns."""
    warnings.warn(
        f"`{old}` is renamed to `{new}`; the old name is removed in the next release",
        DeprecationWarning,
        stacklevel=stacklevel,
    )


class RenamedAttribute:
    """A class attribute that forwards an old attribute or method name to the new one."""

    def __init__(self, new: str) -> None:
        self._new = new

    def __set_name__(self, owner: type, name: str) -> None:
        self._old = f"{owner.__name__}.{name}"
        self._owner = owner.__name__

    def __get__(self, instance: Any, owner: type) -> Any:
        if instance is None:
            return self
        warn_renamed(self._old, f"{self._owner}.{self._new}")
        return getattr(instance, self._new)


def renamed_keyword(function: str, old: str, new: str, keywords: Mapping[str, Any], value: Any) -> Any:
    """The value of a renamed keyword argument: from `**keywords` if the caller used the old name, else `value`.

    Args:
        function: name of the function or class that is called, for the messages.
        old, new: the names.
        keywords: the caller's unknown keyword arguments.
        value: what the caller passed under the new name, or its default.

    Raises:
        TypeError: a keyword argument that the function does not have.
    """
    unknown = sorted(keywords.keys() - {old})
    if unknown:
        raise TypeError(f"{function}() got an unexpected keyword argument {unknown[0]!r}")
    if old not in keywords:
        return value
    warn_renamed(f"{function}({old}=)", f"{function}({new}=)", stacklevel=4)
    return keywords[old]
