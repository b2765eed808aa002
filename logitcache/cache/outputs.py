"""The outputs of a teacher in a cache: its logits, and extra outputs of any shape with their own encodings."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np

from logitcache.arrays import ArraySpec
from logitcache.cache.manifest import LOGITS, Identity, output_of
from logitcache.encodings import Encoding, NoLogits, Values, encoding_from_config
from logitcache.errors import UsageError

MAX_OUTPUTS = 32
MAX_DIMENSIONS = 6
MAX_VALUES = 2**28
"""Values of one row of an output."""
T = TypeVar("T")
_NAME = re.compile(r"[a-z][a-z_]{0,19}")


@dataclass(frozen=True, kw_only=True)
class Output:
    """An extra output of the teacher: its shape for one sample, its encoding, and where in the teacher it comes from.

    Raises:
        UsageError: an unsupported shape or encoding.
    """

    shape: tuple[int, ...]
    encoding: Encoding = field(default_factory=Values)
    """`Values` or `Components` for features; for the logits of another head, any encoding that needs no fitting."""
    source: Any = None
    """The module that it comes from, as JSON; part of the cache's identity where it is known."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(self.shape))
        object.__setattr__(self, "encoding", encoding_from_config(self.encoding))
        whole = all(isinstance(side, int) and 1 <= side <= MAX_VALUES for side in self.shape)
        if not whole or not 1 <= len(self.shape) <= MAX_DIMENSIONS or self.num_values > MAX_VALUES:
            raise UsageError(
                f"the shape of an output must have 1 to {MAX_DIMENSIONS} positive dimensions and at most {MAX_VALUES} "
                f"values, not {self.shape}"
            )
        refuse_fitted(self.encoding)
        if isinstance(self.encoding, NoLogits):
            raise UsageError("NoLogits stores nothing; use Values or Components for other outputs than the logits")
        if len(self.shape) > 1 and not self.encoding.keeps_constants:
            raise UsageError(
                f"{self.encoding!r} stores a row of logits up to a constant; an output of shape {self.shape} needs the "
                "encoding Values"
            )
        self.arrays()

    @property
    def num_values(self) -> int:
        """Of one sample."""
        return math.prod(self.shape)

    def arrays(self) -> dict[str, ArraySpec]:
        """Its arrays, as its encoding names them."""
        return self.encoding.arrays(self.num_values)


def checked_outputs(outputs: Mapping[str, Output | Mapping[str, Any]]) -> dict[str, Output]:
    """Outputs by name, from `Output` objects or mappings of their fields.

    Raises:
        UsageError: an invalid name or output; names it.
    """
    check_output_names(outputs)
    checked = {}
    for name, output in outputs.items():
        try:
            checked[name] = output if isinstance(output, Output) else Output(**output)
        except (UsageError, TypeError) as error:
            raise UsageError(f"output {name!r}: {error}") from None
    return checked


def refuse_fitted(encoding: Encoding) -> None:
    """Refuse encodings that must be fitted to logits.

    Raises:
        UsageError: the encoding is one of them.
    """
    if encoding.fitted_arrays and not encoding.keeps_constants:
        raise UsageError(
            f"{encoding.name!r} must be fitted to logits; use Values, Components, Dense, TopK or Sampled for other "
            "outputs"
        )


def check_output_names(names: Iterable[str]) -> None:
    """Refuse names that are no prefix for the names of arrays.

    Raises:
        UsageError: an invalid name, or too many of them.
    """
    names = list(names)
    if len(names) > MAX_OUTPUTS:
        raise UsageError(f"{len(names)} extra outputs; a cache can store at most {MAX_OUTPUTS}")
    for name in names:
        if not isinstance(name, str) or not _NAME.fullmatch(name) or name.endswith("_") or name == LOGITS:
            raise UsageError(
                f"invalid output name {name!r}; expected at most 20 lower-case letters with _ between them, other than "
                f"{LOGITS!r}"
            )


def outputs_of(identity: Identity) -> dict[str, Output]:
    """The extra outputs of a cache, in the order of their names.

    Raises:
        UsageError: they are invalid, in a damaged or hostile manifest.
    """
    shapes = {name: shape for name, shape in identity.outputs.items() if name != LOGITS}
    if shapes.keys() != identity.output_encodings.keys():
        raise UsageError("identity.outputs and identity.output_encodings have different names")
    if identity.output_sources.keys() - identity.outputs.keys():
        raise UsageError("identity.output_sources has a name that identity.outputs lacks")
    return checked_outputs(
        {
            name: {
                "shape": shapes[name],
                "encoding": identity.output_encodings[name],
                "source": identity.output_sources.get(name),
            }
            for name in sorted(shapes)
        }
    )


@dataclass(frozen=True)
class OutputLayout:
    """How a cache stores one output of the teacher, the logits or another."""

    name: str
    shape: tuple[int, ...]
    """Of one sample."""
    encoding: Encoding

    @property
    def num_values(self) -> int:
        """Of one sample."""
        return math.prod(self.shape)

    @property
    def prefix(self) -> str:
        """Of the names of its arrays in the cache: the logits' have none."""
        return "" if self.name == LOGITS else f"{self.name}_"

    @property
    def measures_kl(self) -> bool:
        """Whether receipts state how much the encoding loses of it."""
        return self.name == LOGITS and not isinstance(self.encoding, NoLogits)

    def stored_name(self, array: str) -> str:
        """The name in the cache of one of the encoding's arrays."""
        return f"{self.prefix}{array}"

    def specs(self) -> dict[str, ArraySpec]:
        """Its arrays, by their names in the cache."""
        return {self.stored_name(array): spec for array, spec in self.encoding.arrays(self.num_values).items()}

    def fixed_names(self) -> dict[str, str]:
        """The arrays that its encoding is fitted to: their names in the cache, and the encoding's."""
        return {self.stored_name(array): array for array in self.encoding.fitted_arrays}

    def stored(self, arrays: Mapping[str, T]) -> dict[str, T]:
        """Those of a cache's arrays that belong to this output, by their names in the cache."""
        return {name: values for name, values in arrays.items() if output_of(name) == self.name}

    def encoded(self, arrays: Mapping[str, T]) -> dict[str, T]:
        """Those of a cache's arrays that belong to this output, by the encoding's names."""
        return {name.removeprefix(self.prefix): values for name, values in self.stored(arrays).items()}

    def has_unknown_class(self, array: str, values: np.ndarray) -> bool:
        """Whether an array, by its name in the cache, holds the id of a class that does not exist."""
        return array.endswith("ids") and bool(values.size) and int(values.max()) >= self.num_values


def output_layouts(
    encoding: Encoding, num_classes: int, outputs: Mapping[str, Output] | None = None
) -> dict[str, OutputLayout]:
    """How each output is stored, by name: the logits, which `encoding` is of, and the others."""
    logits = OutputLayout(LOGITS, (num_classes,), encoding)
    others = {name: OutputLayout(name, output.shape, output.encoding) for name, output in (outputs or {}).items()}
    return {LOGITS: logits} | others


def row_arrays(outputs: Mapping[str, OutputLayout]) -> dict[str, ArraySpec]:
    """The arrays of all outputs, by their names in the cache."""
    return {name: spec for output in outputs.values() for name, spec in output.specs().items()}
