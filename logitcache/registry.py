"""Things by name: built in, or from an installed package's entry points."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from functools import cached_property
from importlib.metadata import EntryPoint, entry_points
from typing import Generic, TypeVar, cast

from logitcache.errors import UsageError

T = TypeVar("T")


class Registry(Generic[T]):
    """Everything of one kind that a pipeline, a cache or a command may name.

    A package adds a thing by an entry point in the group `logitcache.<kind>s`, for instance

        [project.entry-points."logitcache.losses"]
        focal_kl = "my_package.losses:FocalKL"

    Its module is imported when the name is used. A built-in name can't be replaced.

    Args:
        kind: what these are, in the singular, for messages.
        built_in: by name.
        plural: of `kind`, where it is not formed by an s.
    """

    def __init__(self, kind: str, built_in: Mapping[str, T], *, plural: str | None = None) -> None:
        self.kind = kind
        self.group = f"logitcache.{plural or kind + 's'}"
        self._built_in = dict(built_in)

    @cached_property
    def _installed(self) -> dict[str, EntryPoint]:
        return {entry.name: entry for entry in entry_points(group=self.group)}

    def __contains__(self, name: object) -> bool:
        return name in self._built_in or name in self._installed

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys([*self._built_in, *self._installed]))

    def get(self, name: str) -> T:
        """What has a name.

        Raises:
            UsageError: nothing has it, or the package that offers it can't be imported.
        """
        if name in self._built_in:
            return self._built_in[name]
        if name not in self._installed:
            raise UsageError(self.unknown(name))
        entry = self._installed[name]
        try:
            return cast("T", entry.load())
        except Exception as error:
            package = "" if entry.dist is None else f" of the package {entry.dist.name} {entry.dist.version}"
            raise UsageError(
                f"{self.kind} {name!r}{package} can't be imported from {entry.value}: {type(error).__name__}: {error}"
            ) from error

    def unknown(self, name: object) -> str:
        """What to say of a name that nothing has: the nearest one, and all."""
        near = difflib.get_close_matches(str(name), list(self), n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        return f"unknown {self.kind} {name!r}{hint} Expected one of: {', '.join(self)}"
