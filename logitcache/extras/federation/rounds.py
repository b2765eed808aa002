"""The rounds of a federation, for one party or for all parties in turn.

Federated distillation as in FedMD (Li & Wang 2019, arXiv:1910.03581): neither data nor weights leave a party, so each
may use its own architecture. Each part of a round is an existing stage: `train-teacher` on the private data,
`cache-teacher` over the public views, `push`, and `train-student` on the consensus of all caches. Completed stages are
not repeated and interrupted ones resume, so the final weights do not depend on interruptions.
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
from logitcache.extras.federation.exchange import is_published, receive, wait_for
from logitcache.randomness import counter_seed
from logitcache.share.transfer import push
from logitcache.stages.cache_teacher import cache_teacher
from logitcache.stages.train_student import train_students
from logitcache.stages.train_teacher import train_teacher
from logitcache.train.ranks import launched
from logitcache.train.runs import RESULT


@dataclass(frozen=True)
class RoundResult:
    """The result of a round for one party: accuracies on the test and validation split, None without a split."""

    party: str
    round: int
    private_accuracy: float | None
    """After training on its private data."""
    accuracy: float | None
    """After training on the consensus."""
    private_validation_accuracy: float | None
    validation_accuracy: float | None
    private_samples: int
    parameters: int
    weights: str
    """The file of its weights at the end of the round."""


def federate(
    federation: Federation, *, party: str | None = None, wait: float = 0.0, trust: bool = False
) -> list[RoundResult]:
    """Run all rounds of a federation. Safe to interrupt: completed stages are not repeated.

    Args:
        federation: its public set, parties and rounds.
        party: run the stages of this party only; of all parties in turn if None.
        wait: seconds to wait for the other parties' caches in each round, if `party` is given; 0 checks once.
        trust: run entry points from outside the working directory.

    Raises:
        UsageError: an unknown party, a party without data or net in the file, or private samples in the public set.
        PartyMissing: names the parties whose caches of a round are missing.
        LogitCacheError: a cache of another party is rejected; names the party.
    """
    if launched():
        raise UsageError("`federate` runs in one process; start it without torchrun")
    parties = federation.parties if party is None else [federation.party(party)]
    for each in parties:
        check_party(federation, each, trust=trust)
    results = []
    for number in range(1, federation.rounds + 1):
        rounds = [PartyRound(federation, each, number) for each in parties]
        private = [each.train_and_publish(trust=trust) for each in rounds]
        seconds = 0.0 if party is None else wait
        results += [
            each.train_on_consensus(result, wait=seconds, trust=trust)
            for each, result in zip(rounds, private, strict=True)
        ]
    return results


def check_party(federation: Federation, party: PartyConfig, *, trust: bool) -> None:
    """Refuse a party that can't run here, or whose private samples are in the public set.

    Raises:
        UsageError: names what is missing, or the first shared sample.
    """
    if party.net is None or party.data is None:
        raise UsageError(
            f"party {party.name!r} has no {'net' if party.net is None else 'data'} in this file, so it runs elsewhere; "
            "name the party to run here with --party"
        )
    first = PartyRound(federation, party, 1)
    public = resolve_data(Pipeline(**first.public_settings), trust=trust)
    private = resolve_data(Pipeline(**first.private_settings), trust=trust)
    if (public.num_classes, public.class_names) != (private.num_classes, private.class_names):
        raise UsageError(
            f"party {party.name!r} has {private.num_classes} classes ({private.class_names}), the public set has "
            f"{public.num_classes} ({public.class_names}); both need the same classes in the same order"
        )
    same_source = party.data.source() == federation.public.data.source()
    known = set(_identities(public.train, by_key=same_source))
    both = [index for index, each in enumerate(_identities(private.train, by_key=same_source)) if each in known]
    if both:
        raise UsageError(
            f"{len(both)} of the {len(private.train)} samples of party {party.name!r} are in the public set, the first "
            f"is {sample_key(private.train, both[0])!r}; public and private data must not share samples"
        )


def _identities(dataset: Dataset, *, by_key: bool) -> list[str | bytes]:
    """The identity of each sample: its key, or a digest of its input."""
    if by_key:
        return [sample_key(dataset, index) for index in range(len(dataset))]
    # Not `content`: the bytes of a file and the same picture in an array would be two samples.
    return [input_digest(load_sample(dataset, index)[0]) for index in range(len(dataset))]


@dataclass(frozen=True)
class PartyRound:
    """One round of one party."""

    federation: Federation
    party: PartyConfig
    number: int
    """From 1."""

    @property
    def folder(self) -> Path:
        """The party's own files of the round."""
        return Path(self.federation.path) / self.party.name / f"round-{self.number:03d}"

    @property
    def seed(self) -> int:
        """Of everything random in this round except the public views."""
        return counter_seed(f"federation: {self.party.name}", self.federation.seed, self.number) & 0x7FFFFFFF

    @property
    def weights(self) -> Path:
        """The party's weights at the end of the round."""
        return self._consensus_run / "last.safetensors"

    @property
    def _consensus_run(self) -> Path:
        return self.folder / "digested" / self.party.name / f"seed-{self.seed}"

    def cache(self, party: str) -> str:
        """This party's copy of a party's cache."""
        return str(self.folder / f"{party}.cache")

    def url(self, party: str) -> str:
        """The published cache of a party in this round."""
        return f"{self.federation.shared.rstrip('/')}/round-{self.number:03d}/{party}.cache"

    @property
    def _net(self) -> ModelConfig:
        assert self.party.net is not None
        return self.party.net

    def _settings(self, *, weights: str, start_from: str | None, runs: str, **sections: Any) -> dict[str, Any]:
        """The sections of a pipeline whose teacher is the party's net."""
        federation, net = self.federation, self._net
        return {
            "name": federation.name,
            "teacher": TeacherConfig(
                model=net.model, args=net.args, input=net.input, weights=weights, start_from=start_from
            ),
            "runs": RunsConfig(path=str(self.folder / runs)),
            "device": federation.device,
            "num_workers": federation.num_workers,
            "threads": federation.threads,
            **sections,
        }

    def _train(self, overrides: Mapping[str, Any]) -> TrainConfig:
        return overridden(self.federation.train, {**overrides, "seeds": [self.seed]})

    @cached_property
    def private_settings(self) -> dict[str, Any]:
        """A pipeline that trains the party's net on its private data, from the weights of the previous round."""
        federation, party = self.federation, self.party
        assert party.data is not None
        previous = str(PartyRound(federation, party, self.number - 1).weights) if self.number > 1 else self._net.weights
        views = federation.public.views if party.views is None else party.views
        return self._settings(
            weights=TRAINED,
            start_from=previous,
            runs="private",
            data=party.data,
            views=views.model_copy(update={"seed": self.seed}),
            cache=CacheConfig(path=self.cache(party.name)),
            train=self._train(party.train),
        )

    @cached_property
    def public_settings(self) -> dict[str, Any]:
        """A pipeline that caches the party's logits over the public set, and trains its net on those of all parties."""
        federation, party, net, public = self.federation, self.party, self._net, self.federation.public
        parties = [party, *(each for each in federation.parties if each is not party)]
        trained = str(teacher_folder(Pipeline(**self.private_settings)) / "last.safetensors")
        labels = TeachersConfig(
            caches=[self.cache(each.name) for each in parties],
            combine=federation.consensus.combine,
            weights=[each.weight for each in parties],
        )
        student = StudentConfig(
            name=party.name,
            model=net.model,
            args=net.args,
            input=net.input,
            weights=trained,
            loss=federation.consensus.loss,
            labels=labels,
        )
        return self._settings(
            weights=trained,
            start_from=None,
            runs="digested",
            data=public.data,
            views=public.views.model_copy(update={"seed": public.views.seed + self.number}),
            cache=CacheConfig(path=self.cache(party.name), **federation.published.model_dump()),
            train=self._train(federation.consensus.train),
            students=[student],
        )

    def train_and_publish(self, *, trust: bool) -> dict[str, Any]:
        """Train on the private data, and publish a cache of logits over the public views.

        Returns:
            The result of the private run.
        """
        result = train_teacher(Pipeline(**self.private_settings), trust=trust)
        cache_teacher(Pipeline(**self.public_settings), trust=trust)
        # Without machine name, command and paths.
        push(self.cache(self.party.name), self.url(self.party.name), anonymous=True)
        return result

    def train_on_consensus(self, private: Mapping[str, Any], *, wait: float, trust: bool) -> RoundResult:
        """Copy the other parties' caches of this round, and train on the combined labels of all parties.

        Args:
            private: the result of `train_and_publish`.
            wait: seconds, at most.
            trust: run entry points from outside the working directory.

        Raises:
            PartyMissing: caches are missing after `wait` seconds.
            LogitCacheError: a cache is rejected; names its party.
        """
        own_path = self.cache(self.party.name)
        if not (self._consensus_run / RESULT).is_file():
            urls = {each.name: self.url(each.name) for each in self.federation.parties if each is not self.party}
            # A cache that was copied before may no longer be published.
            missing = {name: url for name, url in urls.items() if not is_published(self.cache(name))}
            wait_for(missing, self.number, seconds=wait)
            own = open_cache(own_path, trust=trust)
            for name, url in urls.items():
                receive(name, url, self.cache(name), own, own_path=own_path, combine=self.federation.consensus.combine)
        [row] = train_students(Pipeline(**self.public_settings), trust=trust)
        return RoundResult(
            party=self.party.name,
            round=self.number,
            private_accuracy=private["accuracy"],
            accuracy=row.accuracy_mean,
            private_validation_accuracy=private["validation_accuracy"],
            validation_accuracy=row.validation_accuracy_mean,
            private_samples=private["samples"],
            parameters=row.parameters,
            weights=str(self.weights),
        )
