"""The request to choose an encoding on a sample of the teacher's logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from logitcache.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Auto:
    """The cheapest encoding whose mean KL(teacher ‖ decoded) at T = 1 is at most `max_kl` nats."""

    name: ClassVar[str] = "auto"

    max_kl: float = 0.01

    def __post_init__(self) -> None:
        if not isinstance(self.max_kl, int | float) or not self.max_kl > 0:
            raise UsageError(f"max_kl is a positive number of nats, not {self.max_kl!r}")

    def config(self) -> dict[str, Any]:
        """Name and parameters as a JSON object."""
        return {"name": self.name, "max_kl": float(self.max_kl)}
