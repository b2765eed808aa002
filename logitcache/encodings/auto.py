"""The request to choose an encoding on a sample of the teacher's logits."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from logitcache.errors import UsageError

TEMPERATURES = (1.0, 2.0, 4.0)
"""At which the loss of each encoding is measured."""
MAX_KL = 0.01
"""In nats: the limit where none is stated."""


@dataclass(frozen=True, kw_only=True)
class Auto:
    """The smallest encoding with a mean KL(teacher ‖ decoded) of `max_kl`, or the most accurate of `max_bytes`.

    Both are upper limits. With both, it is the most accurate encoding within both. `TrellisLowRank` is slow to encode:
    it is only chosen where the best of all others has more than twice its bytes, or with `max_bytes` more than twice
    its KL.

    Raises:
        UsageError: a limit is not positive, or no KL is measured at this temperature.
    """

    name: ClassVar[str] = "auto"

    max_kl: float | None = None
    """In nats, without the factor T² of the loss; 0.01 if no limit is given."""
    max_bytes: float | None = None
    """Mean bytes per row, not counting arrays that are stored once per cache."""
    temperature: float = 1.0
    """T of the KL: 1, 2 or 4."""

    def __post_init__(self) -> None:
        if self.max_kl is None and self.max_bytes is None:
            object.__setattr__(self, "max_kl", MAX_KL)
        for name, unit in (("max_kl", "nats"), ("max_bytes", "bytes per row")):
            value = getattr(self, name)
            if value is not None and (not _is_number(value) or not 0 < value < math.inf):
                raise UsageError(f"{name} is a positive number of {unit}, not {value!r}")
        if not _is_number(self.temperature) or self.temperature not in TEMPERATURES:
            expected = ", ".join(f"{each:g}" for each in TEMPERATURES)
            raise UsageError(f"temperature is {self.temperature!r}; expected one of {expected}")

    def config(self) -> dict[str, Any]:
        """Name and parameters as a JSON object.

        Without parameters that are not used, so that caches of earlier versions keep what chose their encoding.
        """
        limits = {"max_kl": self.max_kl, "max_bytes": self.max_bytes}
        config: dict[str, Any] = {"name": self.name}
        config |= {name: float(value) for name, value in limits.items() if value is not None}
        return config if self.temperature == 1.0 else config | {"temperature": float(self.temperature)}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
