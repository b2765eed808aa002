"""How a student's weights are initialized: the names that `students[].init` takes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from logitcache.errors import UsageError
from logitcache.registry import Registry

if TYPE_CHECKING:
    from torch import Tensor, nn


class Report(Protocol):
    """The source of each parameter."""

    def as_json(self) -> str: ...

    def as_table(self) -> str: ...


class Initialisation(Protocol):
    """A method that sets a student's initial weights."""

    def config(self, value: Any) -> dict[str, Any]:
        """A pipeline's `init`, checked and in its normal form.

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
        """Set a student's initial weights, in place.

        Args:
            student: the student.
            teacher: the teacher with its weights.
            value: a pipeline's `init`.
            seed: the run's seed.
            inputs: a batch of the student's inputs.
            batches: gives (teacher's inputs, targets) of a number of the student's training samples, on the teacher's
                device.

        Raises:
            UsageError: the nets don't match; names the parameter and both shapes.
        """


INITIALISATIONS: Registry[Initialisation] = Registry("initialisation", {})
"""A package adds one in the entry point group `logitcache.initialisations`."""


def initialisation_of(value: Any) -> Initialisation:
    """The initialization that a pipeline's `init` names: a name, or a mapping with `from`.

    Raises:
        UsageError: an unknown name.
    """
    name = value.get("from") if isinstance(value, Mapping) else value
    if not isinstance(name, str) or name not in INITIALISATIONS:
        raise UsageError(INITIALISATIONS.unknown(name))
    return INITIALISATIONS[name]
