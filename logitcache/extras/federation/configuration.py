"""The federation file: a public set, parties with data of their own, and how often they exchange what they know."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from logitcache.config.overrides import parse, read_raw, refuse_namesakes
from logitcache.config.schema import (
    DataConfig,
    EncodingConfig,
    LossConfig,
    ModelConfig,
    Section,
    TrainConfig,
    ViewsConfig,
    overridden,
)
from logitcache.errors import UsageError


class PublicConfig(Section):
    """The samples that all parties have, and the views of them that logits are exchanged on."""

    data: DataConfig
    views: ViewsConfig = ViewsConfig()
    """Each round has views of its own: the round's number is added to their seed."""


class PublishedConfig(Section):
    """How the logits that a party publishes are kept."""

    encoding: EncodingConfig = Field(default={"name": "dense", "dtype": "float16"})
    rows_per_block: int = Field(default=16_384, ge=1)


class ConsensusConfig(Section):
    """What parties make of each other's logits."""

    combine: Literal["logits", "probabilities"] = "probabilities"
    """The mean of the logits (FedMD) or of the probabilities, which no single party can push without bound."""
    loss: LossConfig = Field(default={"name": "kl"})
    train: dict[str, Any] = Field(default_factory=dict)
    """Overrides of the federation's `train` for this part of a round."""


class PartyConfig(Section):
    """One party; where it is somewhere else, its name is enough."""

    name: str = Field(pattern=r"^\w[\w.-]*$")
    net: ModelConfig | None = None
    """Any architecture; `weights` are those that it begins with."""
    data: DataConfig | None = None
    """What it has for itself."""
    views: ViewsConfig | None = None
    """How its own data are augmented, a fresh view each epoch; as the public set is, by default."""
    weight: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """How much its logits count in the consensus."""
    train: dict[str, Any] = Field(default_factory=dict)
    """Overrides of the federation's `train` for its own data."""


class Federation(Section):
    """A whole federation, as it was resolved."""

    name: str = Field(pattern=r"^\w[\w.-]*$")
    shared: str
    """A directory or URL, where parties find each other's caches: `SHARED/round-001/PARTY.cache`."""
    path: str
    """Where each party keeps what is its own: `PATH/PARTY/round-001/`."""
    rounds: int = Field(ge=1, le=999)
    public: PublicConfig
    parties: list[PartyConfig] = Field(min_length=2)
    published: PublishedConfig = PublishedConfig()
    consensus: ConsensusConfig = ConsensusConfig()
    train: TrainConfig = TrainConfig()
    """Of each round, on a party's own data."""
    seed: int = 0
    """Of initial weights and of the order of samples, other ones for each party and round."""
    device: str = "auto"
    num_workers: int = Field(default=2, ge=0)
    threads: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _consistent(self) -> Federation:
        refuse_namesakes("parties", [party.name for party in self.parties])
        overrides = (self.consensus.train, *(each.train for each in self.parties))
        if self.train.seeds != TrainConfig().seeds or any("seeds" in each for each in overrides):
            raise ValueError(
                "a federation has one `seed`; for several, run it with other values of seed, shared and path"
            )
        for each in overrides:
            overridden(self.train, each)
        return self

    def party(self, name: str) -> PartyConfig:
        """A party by name.

        Raises:
            UsageError: no such party.
        """
        for party in self.parties:
            if party.name == name:
                return party
        raise UsageError(
            f"no party {name!r} in federation {self.name}; it has: {', '.join(party.name for party in self.parties)}"
        )


def load_federation(path: str | Path, overrides: Sequence[str] = ()) -> Federation:
    """Read a federation file and lay overrides such as `rounds=5` on top.

    Raises:
        UsageError: no such file, no YAML, an unknown key (the message names the nearest known one) or a bad value.
    """
    raw = read_raw(path, Federation, overrides)
    if "students" in raw and "parties" not in raw:
        raise UsageError(f"{path} has students, so it is a pipeline's file: run `logitcache train-student` on it")
    return parse(Federation, raw, source=str(path))
