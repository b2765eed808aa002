"""The rounds of a federation: a party learns from its own data, says what it thinks of the public set, and listens.

Federated distillation as in FedMD (Li & Wang 2019, arXiv:1910.03581): no data and no weights leave a party, so that
each may have a net of its own. Each part of a round is a stage that exists without it: `train-teacher` on the party's
data, `cache-teacher` over the public views, `push`, and `train-student` on what all parties' caches say together.
Stages that are done are not repeated and those that were cut off go on, so a federation ends in the same weights
however often it was interrupted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from logitcache.cache.reader import open_cache
from logitcache.config.build import TRAINED, resolve_data, teacher_folder
from logitcache.config.schema import (
    CacheConfig,
    ModelConfig,
    Pipeline,
    RunsConfig,
    StudentConfig,
    TeacherConfig,
    TeachersConfig,
    TrainConfig,
    overridden,
)
from logitcache.data.samples import Dataset, input_digest, load_sample, sample_key
from logitcache.errors import UsageError
from logitcache.extras.federation.configuration import Federation, PartyConfig
from logitcache.extras.federation.exchange import is_there, publish, published_at, receive, wait_for
from logitcache.randomness import counter_seed
from logitcache.stages.cache_teacher import cache_teacher
from logitcache.stages.train_student import train_students
from logitcache.stages.train_teacher import train_teacher
from logitcache.train.ranks import launched
from logitcache.train.runs import RESULT


@dataclass(frozen=True)
class Outcome:
    """What a round was to one party: accuracies on test and validation split, None where there is none."""

    party: str
    round: int
    private_accuracy: float | None
    """After learning from its own data."""
    accuracy: float | None
    """After listening to the others."""
    private_validation_accuracy: float | None
    validation_accuracy: float | None
    private_samples: int
    parameters: int
    weights: str
    """The file of its weights at the end of the round."""


def federate(
    federation: Federation, *, party: str | None = None, wait: float = 0.0, trust: bool = False
) -> list[Outcome]:
    """Play a federation to its end, from wherever it was left.

    Args:
        federation: its public set, its parties and its rounds.
        party: whose work to do; that of all parties in turn if None.
        wait: seconds to wait for the others' caches in each round, where one party's work is done; 0 looks once.
        trust: run entry points from outside the working folder.

    Raises:
        UsageError: no such party, one whose data and net are somewhere else, or private samples in the public set.
        PartyMissing: names the parties whose caches of a round are not there.
        LogitCacheError: a cache of another party that is not to be trusted; names it.
    """
    if launched():
        raise UsageError("`federate` takes turns in one process; start it without torchrun")
    players = federation.parties if party is None else [federation.party(party)]
    for player in players:
        check_party(federation, player, trust=trust)
    outcomes = []
    for number in range(1, federation.rounds + 1):
        turns = [Turn(federation, player, number) for player in players]
        learned = [turn.speak(trust=trust) for turn in turns]
        seconds = 0.0 if party is None else wait
        outcomes += [turn.listen(each, wait=seconds, trust=trust) for turn, each in zip(turns, learned, strict=True)]
    return outcomes


def check_party(federation: Federation, party: PartyConfig, *, trust: bool) -> None:
    """Refuse a party whose work can't be done here, or whose own samples others would see.

    Raises:
        UsageError: says what is missing, or names the first of its samples that is in the public set.
    """
    if party.net is None or party.data is None:
        raise UsageError(
            f"party {party.name!r} has no {'net' if party.net is None else 'data'} in this file, so its work is done "
            "somewhere else; name the party that is here with --party"
        )
    turn = Turn(federation, party, 1)
    public, private = (resolve_data(pipeline, trust=trust) for pipeline in (turn.sharing, turn.learning))
    if (public.num_classes, public.class_names) != (private.num_classes, private.class_names):
        raise UsageError(
            f"party {party.name!r} has {private.num_classes} classes ({private.class_names}), the public set has "
            f"{public.num_classes} ({public.class_names}); give both the same, in the same order"
        )
    same_source = party.data.source() == federation.public.data.source()
    identities = [_identities(split, by_key=same_source) for split in (public.train, private.train)]
    in_public = set(identities[0])
    both = [index for index, identity in enumerate(identities[1]) if identity in in_public]
    if both:
        raise UsageError(
            f"{len(both)} of the {len(private.train)} samples of party {party.name!r} are in the public set, the first "
            f"is {sample_key(private.train, both[0])!r}; public and private data must have no sample in common"
        )


def _identities(dataset: Dataset, *, by_key: bool) -> list[str | bytes]:
    """What tells the samples of a dataset from each other: their keys, or what they hold."""
    if by_key:
        return [sample_key(dataset, index) for index in range(len(dataset))]
    # Not by `content`: a file's bytes and the same picture in an array would be two samples.
    return [input_digest(load_sample(dataset, index)[0]) for index in range(len(dataset))]


@dataclass(frozen=True)
class Turn:
    """One party's part of one round."""

    federation: Federation
    party: PartyConfig
    number: int
    """From 1."""

    @property
    def folder(self) -> Path:
        """What the party keeps of the round for itself."""
        return Path(self.federation.path) / self.party.name / f"round-{self.number:03d}"

    @property
    def seed(self) -> int:
        """Of everything random in this turn but the public views."""
        return counter_seed(f"federation: {self.party.name}", self.federation.seed, self.number) & 0x7FFFFFFF

    @property
    def weights(self) -> Path:
        """The party's weights at the end of the round."""
        return self._digestion / "last.safetensors"

    @property
    def _digestion(self) -> Path:
        return self.folder / "digested" / self.party.name / f"seed-{self.seed}"

    def cache(self, party: str) -> str:
        """Where this party keeps the cache of a party: its own, or its copy of another's."""
        return str(self.folder / f"{party}.cache")

    def url(self, party: str) -> str:
        """Where a party's cache of this round is shared."""
        return published_at(self.federation.shared, self.number, party)

    @property
    def _net(self) -> ModelConfig:
        assert self.party.net is not None
        return self.party.net

    def _teacher(self, *, weights: str, start_from: str | None = None) -> TeacherConfig:
        net = self._net
        return TeacherConfig(model=net.model, args=net.args, input=net.input, weights=weights, start_from=start_from)

    def _settings(self, overrides: Mapping[str, Any]) -> TrainConfig:
        return overridden(self.federation.train, {**overrides, "seeds": [self.seed]})

    @cached_property
    def learning(self) -> Pipeline:
        """The pipeline whose teacher is the party, on its own data, going on from its last weights."""
        federation, party, net = self.federation, self.party, self._net
        before = net.weights if self.number == 1 else str(Turn(federation, party, self.number - 1).weights)
        assert party.data is not None
        views = federation.public.views if party.views is None else party.views
        return Pipeline(
            name=federation.name,
            data=party.data,
            views=views.model_copy(update={"seed": self.seed}),
            teacher=self._teacher(weights=TRAINED, start_from=before),
            cache=CacheConfig(path=self.cache(party.name)),
            train=self._settings(party.train),
            runs=RunsConfig(path=str(self.folder / "private")),
            device=federation.device,
            num_workers=federation.num_workers,
            threads=federation.threads,
        )

    @cached_property
    def sharing(self) -> Pipeline:
        """The pipeline over the public set: the party is its teacher, and the student of all parties together."""
        federation, party, net = self.federation, self.party, self._net
        public = federation.public
        others = [each for each in federation.parties if each is not party]
        learned = str(teacher_folder(self.learning) / "last.safetensors")
        student = StudentConfig(
            name=party.name,
            model=net.model,
            args=net.args,
            input=net.input,
            weights=learned,
            loss=federation.consensus.loss,
            labels=TeachersConfig(
                caches=[self.cache(each.name) for each in (party, *others)],
                combine=federation.consensus.combine,
                weights=[each.weight for each in (party, *others)],
            ),
        )
        return Pipeline(
            name=federation.name,
            data=public.data,
            views=public.views.model_copy(update={"seed": public.views.seed + self.number}),
            teacher=self._teacher(weights=learned),
            cache=CacheConfig(path=self.cache(party.name), **federation.published.model_dump()),
            train=self._settings(federation.consensus.train),
            students=[student],
            runs=RunsConfig(path=str(self.folder / "digested")),
            device=federation.device,
            num_workers=federation.num_workers,
            threads=federation.threads,
        )

    def speak(self, *, trust: bool) -> dict[str, Any]:
        """Learn from the party's own data, and publish what it then thinks of the public views.

        Returns:
            The result of the run on its own data.
        """
        learned = train_teacher(self.learning, trust=trust)
        cache_teacher(self.sharing, trust=trust)
        publish(self.cache(self.party.name), self.url(self.party.name))
        return learned

    def listen(self, learned: Mapping[str, Any], *, wait: float, trust: bool) -> Outcome:
        """Take the other parties' caches of this round, and learn from what all of them say together.

        Args:
            learned: what `speak` returned.
            wait: seconds, at most.
            trust: run entry points from outside the working folder.

        Raises:
            PartyMissing: some are not there after `wait` seconds.
            LogitCacheError: one that is refused; names its party.
        """
        own_path = self.cache(self.party.name)
        if not (self._digestion / RESULT).is_file():
            urls = {each.name: self.url(each.name) for each in self.federation.parties if each is not self.party}
            # Those that were brought before may be gone from the shared place.
            lacking = {name: url for name, url in urls.items() if not is_there(self.cache(name))}
            wait_for(lacking, self.number, seconds=wait)
            own = open_cache(own_path, trust=trust)
            for name, url in urls.items():
                receive(name, url, self.cache(name), own, own_path=own_path, combine=self.federation.consensus.combine)
        [row] = train_students(self.sharing, trust=trust)
        return Outcome(
            party=self.party.name,
            round=self.number,
            private_accuracy=learned["accuracy"],
            accuracy=row.accuracy_mean,
            private_validation_accuracy=learned["validation_accuracy"],
            validation_accuracy=row.validation_accuracy_mean,
            private_samples=learned["samples"],
            parameters=row.parameters,
            weights=str(self.weights),
        )
