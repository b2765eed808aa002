"""The federation file: a public dataset, parties with private data, and the number of rounds."""

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
    """The samples that all parties have, and the views that logits are exchanged on."""

    data: DataConfig
    views: ViewsConfig = ViewsConfig()
    """Each round uses other views: the round's number is added to their seed."""


class PublishedConfig(Section):
    """How published logits are stored."""

    encoding: EncodingConfig = Field(default={"name": "dense", "dtype": "float16"})
    rows_per_block: int = Field(default=16_384, ge=1)


class ConsensusConfig(Section):
    """How parties combine the logits of all parties."""

    combine: Literal["logits", "probabilities"] = "probabilities"
    """The mean of logits (FedMD) or of probabilities, where the influence of a single party is bounded."""
    loss: LossConfig = Field(default={"name": "kl"})
    train: dict[str, Any] = Field(default_factory=dict)
    """Overrides of the federation's `train` for the training on the public set."""


class PartyConfig(Section):
    """One party. For a party that runs elsewhere, the name is enough."""

    name: str = Field(pattern=r"^\w[\w.-]*$")
    net: ModelConfig | None = None
    """Any architecture; `weights` are the initial weights."""
    data: DataConfig | None = None
    """Its private data."""
    views: ViewsConfig | None = None
    """Augmentation of its private data, a new view each epoch; that of the public set by default."""
    weight: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """Weight of its logits in the consensus."""
    train: dict[str, Any] = Field(default_factory=dict)
    """Overrides of the federation's `train` for the training on its private data."""


class Federation(Section):
    """A federation file with all defaults."""

    name: str = Field(pattern=r"^\w[\w.-]*$")
    shared: str
    """A directory or URL for published caches: `SHARED/round-001/PARTY.cache`."""
    path: str
    """A directory for each party's own files: `PATH/PARTY/round-001/`."""
    rounds: int = Field(ge=1, le=999)
    public: PublicConfig
    parties: list[PartyConfig] = Field(min_length=2)
    published: PublishedConfig = PublishedConfig()
    consensus: ConsensusConfig = ConsensusConfig()
    train: TrainConfig = TrainConfig()
    """Training on private data, in each round."""
    seed: int = 0
    """Of initial weights and of the order of samples; they differ between parties and rounds."""
    device: str = "auto"
    num_workers: int = Field(default=2, ge=0)
    threads: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _consistent(self) -> Federation:
        refuse_namesakes("parties", [party.name for party in self.parties])
        overrides = (self.consensus.train, *(each.train for each in self.parties))
        if self.train.seeds != TrainConfig().seeds or any("seeds" in each for each in overrides):
            raise ValueError(
                "a federation has one `seed`; for more seeds, run it again with other values of seed, shared and path"
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
    """Read a federation file and apply overrides such as `rounds=5`.

    Raises:
        UsageError: the file is missing or not YAML, a key is unknown (names the nearest known one), or a value is bad.
    """
    raw = read_raw(path, Federation, overrides)
    if "students" in raw and "parties" not in raw:
        raise UsageError(f"{path} has students, so it is a pipeline file: run `logitcache train-student` on it")
    return parse(Federation, raw, source=str(path))
