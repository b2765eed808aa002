"""Where a student's first weights may come from: ways by name, which `students[].init` takes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

from torch import Tensor, nn

from logitcache.errors import UsageError
from logitcache.registry import Registry


class Report(Protocol):
    """Which parameters came from where."""

    def as_json(self) -> str: ...

    def as_table(self) -> str: ...


class Initialisation(Protocol):
    """A way to give a student its first weights."""

    def config(self, value: Any) -> dict[str, Any]:
        """A pipeline's `init` in its one form, checked.

        Raises:
            UsageError: an unknown key or value.
        """

    def start(
        self,
        student: nn.Module,
        teacher: nn.Module,
        value: Any,
        *,
        seed: int,
        inputs: Any,
        batches: Callable[[int], Iterable[tuple[Any, Tensor]]],
    ) -> Report:
        """Give a student its first weights, in place.

        Args:
            student, teacher: the nets, the teacher with its weights.
            value: a pipeline's `init`.
            seed: of the run.
            inputs: a batch as the student takes it.
            batches: (teacher's inputs, targets) of so many samples that the student may see, on the teacher's device.

        Raises:
            UsageError: what can't fit; names the parameter and both shapes.
        """


INITIALISATIONS: Registry[Initialisation] = Registry("initialisation", {})


def initialisation_of(value: Any) -> Initialisation:
    """The way that a pipeline's `init` names: a name, or a mapping with `from`.

    Raises:
        UsageError: an unknown one.
    """
    name = value.get("from") if isinstance(value, Mapping) else value
    if not isinstance(name, str) or name not in INITIALISATIONS:
        raise UsageError(INITIALISATIONS.unknown(name))
    return INITIALISATIONS.get(name)
