"""Objects by name: built in, from an installed package, or from trusted code of the user."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import reprlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib.metadata import EntryPoint, entry_points
from typing import Any, TypeVar, cast

from logitcache.entry_points import is_entry_point, load_entry_point
from logitcache.errors import LogitCacheError, UsageError

T = TypeVar("T")

OWN_PACKAGE = "logitcache"


@dataclasses.dataclass(frozen=True)
class Package:
    """An installed distribution, as pip names it."""

    name: str
    version: str

    def __str__(self) -> str:
        return f"{self.name} {self.version}"


class Registry(Mapping[str, T]):
    """All objects of one kind that a pipeline, a cache or a URL can name.

    An installed package adds an object with an entry point in the group `logitcache.<kind>s`:

        [project.entry-points."logitcache.losses"]
        focal_kl = "my_package.losses:FocalKL"

    Its module is imported when the name is used. A built-in name can't be replaced: the built-in object is used.

    Args:
        kind: the kind in the singular, for messages.
        built_in: the objects of logitcache itself.
        plural: the group's last part, if it is not the kind with an s.
        base: the class that every object must be a subclass of. Such a class has the attribute `name`, which must be
            its entry point's name.
        allows_code: whether `resolve` also takes `package.module:function`.
    """

    def __init__(
        self,
        kind: str,
        built_in: Mapping[str, T],
        *,
        plural: str | None = None,
        base: type | None = None,
        allows_code: bool = False,
    ) -> None:
        self.kind = kind
        self.group = f"{OWN_PACKAGE}.{plural or kind + 's'}"
        self._built_in = dict(built_in)
        self._base = base
        self._allows_code = allows_code

    def __contains__(self, name: object) -> bool:
        return name in self._built_in or name in offered(self.group)

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys([*self._built_in, *sorted(offered(self.group))]))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __getitem__(self, name: str) -> T:
        """The object of a name.

        Raises:
            UsageError: the name is unknown, two packages offer it, or its package can't be imported.
        """
        if name in self._built_in:
            return self._built_in[name]
        if name not in self:
            raise UsageError(self.unknown(name))
        entry = self._entry(name)
        where = f"{self.kind} {name!r} of the package {self.package_of(name) or OWN_PACKAGE}"
        try:
            found = entry.load()
        except Exception as error:
            raise UsageError(
                f"{where} can't be imported from {entry.value}: {type(error).__name__}: {error}"
            ) from error
        if self._base is not None:
            if not isinstance(found, type) or not issubclass(found, self._base):
                raise UsageError(f"{where}: {entry.value} is not a subclass of {self._base.__name__}")
            if getattr(found, "name", None) != name:
                raise UsageError(f"{where}: the attribute `name` of {entry.value} must be {name!r}")
        return cast("T", found)

    def resolve(self, name: str, *, trust: bool) -> T:
        """The object of a name or of `package.module:function`, which is loaded as `load_entry_point` describes.

        Raises:
            UsageError: as `[name]` and `load_entry_point`.
            UntrustedCode: the code is not the user's own, and `trust` is False.
        """
        if self._allows_code and is_entry_point(name):
            return cast("T", load_entry_point(name, trust=trust))
        return self[name]

    def package_of(self, name: str) -> Package | None:
        """The package that offers a name; None for the names of logitcache itself.

        Raises:
            UsageError: the name is unknown, or two packages offer it.
        """
        if name in self._built_in:
            return None
        if name not in self:
            raise UsageError(self.unknown(name))
        dist = self._entry(name).dist
        return None if dist is None or dist.name == OWN_PACKAGE else Package(dist.name, dist.version)

    def _entry(self, name: str) -> EntryPoint:
        entries = offered(self.group)[name]
        if len(entries) > 1:
            packages = " and ".join(
                sorted(f"{entry.dist.name} {entry.dist.version}" for entry in entries if entry.dist)
            )
            raise UsageError(
                f"{self.kind} {name!r} is offered by several installed packages: {packages}. Uninstall all but one"
            )
        return entries[0]

    def unknown(self, name: object, also: Sequence[str] = ()) -> str:
        """The message for an unknown name: the nearest known name, and all of them.

        Args:
            name: the unknown name.
            also: names beside those of the registry.
        """
        known = [*self, *also]
        choices = ["package.module:function"] if self._allows_code else []
        choices += [f"one of: {', '.join(known)}"] if known else []
        return unknown_name(self.kind, name, known, " or ".join(choices))


@functools.cache
def offered(group: str) -> dict[str, list[EntryPoint]]:
    """The entry points of the installed packages in a group, by name; several where packages offer the same name."""
    found: dict[str, list[EntryPoint]] = {}
    for entry in entry_points(group=group):
        found.setdefault(entry.name, []).append(entry)
    for name, entries in found.items():
        own = [entry for entry in entries if entry.dist is not None and entry.dist.name == OWN_PACKAGE]
        found[name] = own or entries
    return found


def nearest(word: object, known: Iterable[str]) -> str:
    """The most similar known word as a question, `; did you mean 'kl'?`; "" if none is similar."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5) if isinstance(word, str) else []
    return f"; did you mean {near[0]!r}?" if near else ""


def unknown_name(kind: str, name: object, known: Sequence[str], expected: str | None = None, *, at: str = "") -> str:
    """The message for an unknown name.

    Args:
        kind: what the name is of, such as "loss" or "key".
        name: the unknown name.
        known: the names that there are.
        expected: what may be given, if that is not one of `known`.
        at: where the name stands, such as "views.": it is shown before the name.
    """
    complaint = f"unknown {kind} {_shown(at + name if isinstance(name, str) else name)}"
    listed = f"one of: {', '.join(known)}"
    return _with_choices(complaint, nearest(name, known), f"expected {expected or listed}")


def check_keys(complaint: str, fields: Mapping[Any, Any], known: Sequence[str]) -> None:
    """Refuse unknown keys.

    Raises:
        UsageError: the complaint, the key, the nearest known key, and all of them.
    """
    for key in fields:
        if key not in known:
            choices = f"it has: {', '.join(known)}" if known else "it has none"
            raise UsageError(_with_choices(f"{complaint} {_shown(key)}", nearest(key, known), choices))


def parameters(kind: type) -> list[str]:
    """The fields of a dataclass that a configuration sets: those that take part in comparisons."""
    return [field.name for field in dataclasses.fields(kind) if field.compare]


def configured(
    subject: str, kind: type[T], fields: Mapping[Any, Any], convert: Callable[[str, Any], Any] | None = None
) -> T:
    """A dataclass from a mapping of its fields.

    Args:
        subject: what is configured, for messages.
        kind: the dataclass.
        fields: its fields.
        convert: called with the name and the value of each field; gives the value that the class takes.

    Raises:
        UsageError: an unknown field, a missing one, or a value that the class refuses; names the subject.
    """
    if not dataclasses.is_dataclass(kind):
        raise UsageError(f"{subject}: {kind.__module__}.{kind.__qualname__} must be a dataclass")
    known = parameters(kind)
    check_keys(f"{subject} has no parameter", fields, known)
    for field in dataclasses.fields(kind):
        is_required = field.default is field.default_factory is dataclasses.MISSING
        if field.name in known and is_required and field.name not in fields:
            raise UsageError(f"{subject} lacks {field.name!r}; its parameters are: {', '.join(known)}")
    values = {name: value if convert is None else convert(name, value) for name, value in fields.items()}
    try:
        return kind(**values)
    except LogitCacheError as error:
        raise UsageError(f"{subject}: {error}") from error
    except (TypeError, ValueError) as error:
        raise UsageError(f"{subject}: {error}; its parameters are: {', '.join(known)}") from error


def _with_choices(complaint: str, question: str, choices: str) -> str:
    return f"{complaint}{question} {choices[0].upper()}{choices[1:]}" if question else f"{complaint}; {choices}"


def _shown(value: object) -> str:
    # Shortened: an alias in YAML can stand for more than can be written out.
    return repr(value) if isinstance(value, str) else reprlib.repr(value)
