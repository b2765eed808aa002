"""Old public names that work for one more release, with a `DeprecationWarning` that gives the new name."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


def warn_renamed(old: str, new: str) -> None:
    """Warn the caller of the function that calls this one."""
    remedy = "it becomes internal" if new.rpartition(".")[2].startswith("_") else f"use `{new}`"
    warnings.warn(f"`{old}` is removed in the next release: {remedy}", DeprecationWarning, stacklevel=3)


class RenamedAttribute:
    """A class attribute that forwards the old name of an attribute or method to the new one."""

    def __init__(self, new: str) -> None:
        self._new = new

    def __set_name__(self, owner: type, name: str) -> None:
        self._owner, self._old = owner.__name__, name

    def __get__(self, instance: Any, owner: type) -> Any:
        if instance is None:
            return self
        warn_renamed(f"{self._owner}.{self._old}", f"{self._owner}.{self._new}")
        return getattr(instance, self._new)


def renamed_keyword(old: str, new: str) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Decorate a function so that it also takes a keyword argument under its old name."""

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        name = function.__qualname__.removesuffix(".__init__")

        @functools.wraps(function)
        def accept(*args: P.args, **kwargs: P.kwargs) -> T:
            if old in kwargs:
                warn_renamed(f"{name}({old}=)", f"{name}({new}=)")
                kwargs[new] = kwargs.pop(old)
            return function(*args, **kwargs)

        return accept

    return decorate
