"""Parts of a training split that have no sample in common: one public, the others of one party each."""

from __future__ import annotations

from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from logitcache.errors import UsageError
from logitcache.randomness import counter_seed, keyed_permutation

# N samples, P parts


class PartConfig(BaseModel):
    """Which part of a training split: the public one, or one of several private ones.

    Two parts of the same `public`, `of`, `alpha`, `seed` and `classes` are the same, or have no sample in common.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    public: float = Field(default=0.0, ge=0, lt=1)
    """Fraction of each class that is public, and so in no private part."""
    of: int = Field(default=1, ge=1, le=100_000)
    """Private parts that the others are divided into."""
    index: int | None = Field(default=None, ge=0)
    """Which private part, from 0; none for the public one."""
    alpha: float | None = Field(default=None, ge=0.01, le=1e6)
    """How alike the private parts are: of each class they get shares drawn from a Dirichlet distribution of this
    concentration; equal shares by default."""
    classes: list[int] | None = Field(default=None, min_length=1)
    """The private parts are made of these classes only."""
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
            raise ValueError("a part is a private one (`index`, from 0), or the public one (`public`, a fraction)")
        if self.index is not None and self.index >= self.of:
            raise ValueError(f"index is {self.index}, of {self.of} parts; expected 0 to {self.of - 1}")
        return self


def samples_of_part(targets: np.ndarray, part: PartConfig, num_classes: int) -> np.ndarray:
    """Positions of the samples of a part, sorted, int64: a pure function of the targets and the configuration.

    With `alpha`, the shares that the parts get of one class are drawn from Dirichlet(alpha, ..., alpha), class by class
    (Yurochkin et al. 2019, section 4; a variant of Hsu et al. 2019, section 3, that leaves no sample over).

    Args:
        targets: int64 (N,).
        part: which.
        num_classes: C; the draw for a class does not depend on which others occur.

    Raises:
        UsageError: a class that there is none of, or a part that gets no sample.
    """
    strange = [label for label in part.classes or [] if not 0 <= label < num_classes]
    if strange:
        raise UsageError(f"data.part.classes names class {strange[0]}; expected 0 to {num_classes - 1}")
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
            "ask for fewer parts or a larger `alpha`, or choose another `seed`"
        )
    return positions


def _shares(part: PartConfig, label: int) -> np.ndarray:
    """What each private part gets of a class, float64 (P,), of sum 1."""
    if part.alpha is None:
        return np.full(part.of, 1 / part.of)
    # Of NumPy's generators this is the one whose draws are promised to stay as they are.
    generator = np.random.RandomState(counter_seed("shares", part.seed, label) & 0xFFFFFFFF)
    return generator.dirichlet(np.full(part.of, part.alpha))
