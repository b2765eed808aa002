"""Initialisations of a student by name, for `students[].init`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

from torch import Tensor, nn

from logitcache.errors import UsageError
from logitcache.registry import Registry


class Report(Protocol):
    """Lists where each parameter comes from."""

    def as_json(self) -> str: ...

    def as_table(self) -> str: ...


class Initialisation(Protocol):
    """A method to initialise a student's weights."""

    def config(self, value: Any) -> dict[str, Any]:
        """A pipeline's `init` in its normal form, validated.

        Raises:
            UsageError: unknown key or invalid value.
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
        """Initialise a student's weights in place.

        Args:
            student, teacher: the models, the teacher with its weights.
            value: a pipeline's `init`.
            seed: of the run.
            inputs: a batch, preprocessed for the student.
            batches: called with a number of samples, yields (teacher's inputs, targets) on the teacher's device.

        Raises:
            UsageError: weights don't fit; names the parameter and both shapes.
        """


INITIALISATIONS: Registry[Initialisation] = Registry("initialisation", {})


def initialisation_of(value: Any) -> Initialisation:
    """The initialisation that a pipeline's `init` names: a name, or a mapping with `from`.

    Raises:
        UsageError: unknown name.
    """
    name = value.get("from") if isinstance(value, Mapping) else value
    if not isinstance(name, str) or name not in INITIALISATIONS:
        raise UsageError(INITIALISATIONS.unknown(name))
    return INITIALISATIONS.get(name)
