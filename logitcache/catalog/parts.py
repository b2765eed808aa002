"""Disjoint parts of a training split: a public part, and one private part per party."""

from __future__ import annotations

from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from logitcache.errors import UsageError
from logitcache.randomness import counter_seed, keyed_permutation

# N samples, P parts


class PartConfig(BaseModel):
    """The public part of a training split, or one of several private parts.

    Parts with the same `public`, `of`, `alpha`, `seed` and `classes` are either identical or disjoint.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    public: float = Field(default=0.0, ge=0, lt=1)
    """Fraction of each class that is public, and in no private part."""
    of: int = Field(default=1, ge=1, le=100_000)
    """Number of private parts."""
    index: int | None = Field(default=None, ge=0)
    """Which private part, from 0; null for the public part."""
    alpha: float | None = Field(default=None, ge=0.01, le=1e6)
    """Concentration of the Dirichlet distribution from which each class's shares are drawn; smaller values give less
    similar parts. Equal shares by default."""
    classes: list[int] | None = Field(default=None, min_length=1)
    """Restrict private parts to these classes."""
    seed: int = 0

    @model_validator(mode="before")
    @classmethod
    def _one_private_part(cls, value: Any) -> Any:
        if isinstance(value, dict) and "classes" in value and not value.keys() & {"of", "index"}:
            return {**value, "index": 0}
        return value

    @model_validator(mode="after")
    def _is_a_part(self) -> PartConfig:
        if self.index is None and self.public == 0:
            raise ValueError("set `index` (from 0) for a private part, or `public` (a fraction) for the public part")
        if self.index is not None and self.index >= self.of:
            raise ValueError(f"index is {self.index}, of {self.of} parts; expected 0 to {self.of - 1}")
        return self


def samples_of_part(targets: np.ndarray, part: PartConfig, num_classes: int) -> np.ndarray:
    """Positions of the samples of a part, sorted, int64; a pure function of targets and configuration.

    With `alpha`, the parts' shares of each class are drawn from Dirichlet(alpha, ..., alpha) (Yurochkin et al. 2019,
    section 4; a variant of Hsu et al. 2019, section 3, that assigns every sample).

    Args:
        targets: int64 (N,).
        part: which part.
        num_classes: C; the draw for one class does not depend on the other classes.

    Raises:
        UsageError: an invalid class number, or an empty part.
    """
    invalid = [label for label in part.classes or [] if not 0 <= label < num_classes]
    if invalid:
        raise UsageError(f"data.part.classes names class {invalid[0]}; expected 0 to {num_classes - 1}")
    order = keyed_permutation(len(targets), "parts", part.seed)
    chosen = []
    for label in range(num_classes):
        members = order[targets[order] == label]
        public = round(len(members) * part.public)
        if part.index is None:
            chosen.append(members[:public])
        elif part.classes is None or label in part.classes:
            private = members[public:]
            ends = np.round(np.cumsum(_shares(part, label)) * len(private)).astype(np.int64)
            ends[-1] = len(private)
            chosen.append(private[ends[part.index - 1] if part.index else 0 : ends[part.index]])
    positions = np.sort(np.concatenate(chosen))
    if len(positions) == 0:
        raise UsageError(
            f"data.part: this part of {len(targets)} samples is empty ({part.model_dump_json(exclude_defaults=True)}); "
            "use fewer parts, a larger `alpha` or another `seed`"
        )
    return positions


def _shares(part: PartConfig, label: int) -> np.ndarray:
    """Each private part's share of a class, float64 (P,), with sum 1."""
    if part.alpha is None:
        return np.full(part.of, 1 / part.of)
    # NumPy guarantees the stream of RandomState to stay the same, but not that of newer generators.
    generator = np.random.RandomState(counter_seed("shares", part.seed, label) & 0xFFFFFFFF)
    return generator.dirichlet(np.full(part.of, part.alpha))
