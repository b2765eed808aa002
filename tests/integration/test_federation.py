"""Parties that learn from each other's logits: the same weights however they take turns, and nothing private leaves."""

from __future__ import annotations

import copy
import json
import platform
import signal
import sys
from collections.abc import Callable
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from logitcache.cache.ensemble import merged_parts
from logitcache.cache.reader import open_cache
from logitcache.cache.writer import CacheWriter
from logitcache.catalog.datasets import load_data
from logitcache.catalog.parts import PartConfig, samples_of_part
from logitcache.config.build import resolve_data
from logitcache.config.overrides import override, parse
from logitcache.config.schema import DataConfig, Pipeline, load_pipeline
from logitcache.data.samples import sample_table
from logitcache.errors import IdentityMismatch, InvalidLogits, PartyMissing, UsageError
from logitcache.extras.commands import federate_command
from logitcache.extras.federation.configuration import Federation, load_federation
from logitcache.extras.federation.rounds import PartyRound, federate
from logitcache.extras.merge import merge
from logitcache.share.transfer import push
from logitcache.stages.cache_teacher import cache_teacher
from logitcache.targets import Targets
from logitcache.verify.audit import verify
from tests.dying import die_at_put
from tests.integration.test_stages import same, weights

SPLIT = {"public": 0.5, "of": 2, "alpha": 0.3}
PICTURES = {"name": "tests.models:pictures", "args": {"count": 200}}
TWO: dict[str, Any] = {
    "name": "two",
    "rounds": 2,
    "public": {
        "data": {**PICTURES, "part": SPLIT},
        "views": {"count": 2, "transform": [{"RandomRotation": {"degrees": 9}}]},
    },
    "parties": [
        {
            "name": "a",
            "net": {"model": "mlp", "args": {"hidden": [8]}},
            "data": {**PICTURES, "part": {**SPLIT, "index": 0}},
        },
        {
            "name": "b",
            "net": {"model": "tests.models:dropout_norm_mlp", "input": [{"Normalize": {"mean": [0.5], "std": [0.5]}}]},
            "data": {**PICTURES, "part": {**SPLIT, "index": 1}},
            "weight": 2,
        },
    ],
    "published": {"encoding": "Dense(dtype='float32')", "rows_per_block": 32},
    "consensus": {"train": {"epochs": 2}},
    "train": {"epochs": 1, "batch_size": 16, "lr": 0.01},
    "num_workers": 0,
    "threads": 1,
}
"""Pictures with keys; one party's net has randomness and running statistics of its own."""

Make = Callable[..., Federation]


@pytest.fixture
def two(tmp_path: Path) -> Make:
    """The federation of two with overrides, in the test's own folder."""

    def make(*overrides: str, folder: str = "all") -> Federation:
        raw = copy.deepcopy(TWO)
        raw |= {"path": str(tmp_path / folder), "shared": str(tmp_path / folder / "shared")}
        for text in overrides:
            override(raw, text)
        return parse(Federation, raw, source="two")

    return make


def ends(federation: Federation) -> list[dict[str, torch.Tensor]]:
    """The weights of each party after the last round."""
    return [weights(PartyRound(federation, party, federation.rounds).weights.parent) for party in federation.parties]


def test_parties_that_take_turns_end_as_parties_on_their_own_do_and_nobody_repeats_what_is_done(two: Make) -> None:
    """Bit for bit, whoever waits for whom; the names of those that are waited for are said."""
    together, apart = two(), two(folder="apart")
    turns = federate(together)
    with pytest.raises(
        PartyMissing, match=r"round 1 waits for b: after 0 s there is no complete cache at .*round-001/b.cache"
    ):
        federate(apart, party="a", wait=0)
    with pytest.raises(PartyMissing, match="round 2 waits for a"):
        federate(apart, party="b", wait=0)
    first_round = {file: file.stat().st_mtime_ns for file in Path(apart.path, "b", "round-001").rglob("*.safetensors")}
    assert 4 == len(first_round)
    a = federate(apart, party="a", wait=0)
    b = federate(apart, party="b", wait=0)

    assert first_round == {file: file.stat().st_mtime_ns for file in first_round}
    assert [("a", 1), ("b", 1), ("a", 2), ("b", 2)] == [(turn.party, turn.round) for turn in turns]
    for one, other in zip(ends(together), ends(apart), strict=True):
        assert same(one, other)
    assert [turn.accuracy for turn in turns] == [each.accuracy for pair in zip(a, b, strict=True) for each in pair]


def test_a_party_waits_for_the_others(two: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here the other one is done by the time that it looks again."""
    federation = two("rounds=1")
    other = PartyRound(federation, federation.party("b"), 1)
    waited = []

    def meanwhile(seconds: float) -> None:
        waited.append(seconds)
        other.train_and_publish(trust=False)

    monkeypatch.setattr("logitcache.extras.federation.exchange.time.sleep", meanwhile)

    assert 1 == len(federate(federation, party="a", wait=60))
    assert [2.0] == waited


def test_a_round_teaches_a_party_what_it_has_no_sample_of(two: Make) -> None:
    """Digits 5 to 9 are the other party's alone; only its logits on the public set can tell of them."""
    digits = {"name": "digits", "validation": 0.2}
    federation = two(
        "rounds=2", "train.epochs=3", "consensus.train.epochs=6", "public.views.transform=clean", "published.rows_per_block=1000",
        "parties.a.net.args.hidden=[64]", "parties.b.net={model: mlp, args: {hidden: [48]}}",
        f"public.data={digits | {'part': {'public': 0.5}}}",
        f"parties.a.data={digits | {'part': {'public': 0.5, 'classes': [0, 1, 2, 3, 4]}}}",
        f"parties.b.data={digits | {'part': {'public': 0.5, 'classes': [5, 6, 7, 8, 9]}}}",
    )  # fmt: skip
    data = resolve_data(Pipeline(**PartyRound(federation, federation.parties[0], 1).public_settings), trust=False)
    assert data.validation is not None
    rates = [turn.validation_accuracy for turn in federate(federation) if turn.party == "a"]

    assert rates[-1] is not None
    assert rates[-1] > np.isin(sample_table(data.validation).targets, range(5)).mean() + 0.1


def test_nothing_but_logits_of_the_public_set_leaves(two: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["private-command"])
    federation = two("parties.a.net.weights=null")
    federate(federation)
    shared = Path(federation.shared)
    public = resolve_data(
        Pipeline(**PartyRound(federation, federation.parties[0], 1).public_settings), trust=False
    ).train
    caches = sorted(path.relative_to(shared).as_posix() for path in shared.glob("*/*"))
    assert ["round-001/a.cache", "round-001/b.cache", "round-002/a.cache", "round-002/b.cache"] == caches
    private_words = (str(shared.parent), platform.node(), "private-command", "safetensors")
    for path in shared.glob("*/*"):
        cache = open_cache(str(path))
        files = {file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()}
        assert {name for name in files if not name.startswith("labels.zarr/")} == {
            "README.md",
            "manifest.json",
            "receipts.json",
        }
        assert {"labels", "logits", "sample_targets", "sample_contents", "sample_keys", "zarr.json"} >= {
            name.split("/")[1] for name in files if name.startswith("labels.zarr/")
        }
        assert [] == verify(str(path), deep=True)
        assert cache.samples is not None
        assert list(public.keys) == list(cache.samples.keys or [])  # type: ignore[attr-defined]
        assert {"created", "python", "versions", "names"} == set(cache.manifest.provenance)
        for name in files:
            text = (path / name).read_bytes()
            assert [] == [word for word in private_words if word.encode() in text], name


def test_an_anonymous_push_takes_back_what_an_earlier_one_said(tiny: Callable[..., Pipeline], tmp_path: Path) -> None:
    """Of a merged cache, too, whose parts it still names, but not where they lay."""
    for seed in (1, 2):
        cache_teacher(tiny(f"teacher.args.hidden=[{seed}]", f"cache.path={tmp_path}/{seed}.cache"))
    merge([f"{tmp_path}/1.cache", f"{tmp_path}/2.cache"], tmp_path / "mean.cache")
    there = str(tmp_path / "there.cache")
    push(f"{tmp_path}/mean.cache", there)
    assert str(tmp_path) in (tmp_path / "there.cache/manifest.json").read_text()
    first, second = push(f"{tmp_path}/mean.cache", there, anonymous=True), open_cache(there)

    assert str(tmp_path) not in (tmp_path / "there.cache/manifest.json").read_text()
    assert {"created", "python", "versions", "merged", "names"} == set(second.manifest.provenance)
    assert ["", ""] == [part.location for part in merged_parts(second.manifest)]
    assert (first.digest, []) == (second.digest, verify(there, deep=True))
    assert "host" in open_cache(f"{tmp_path}/mean.cache").manifest.provenance


STAGES = {
    "caching": r"/a/round-001/a\.cache/.*/c/1/0",
    "publishing": r"shared/round-001/b\.cache/receipts\.json",
    "taking another's cache": r"/a/round-001/b\.cache/receipts\.json",
    "listening": r"digested/a/.*/metrics\.csv",
}
"""What is about to be stored when a player is killed."""


def play_until(federation: Federation, pattern: str) -> None:
    die_at_put(pattern)
    federate(federation)


def test_a_federation_that_is_killed_goes_on_to_the_same_weights(two: Make, forks: BaseContext) -> None:
    whole, pieces = two("rounds=1"), two("rounds=1", folder="pieces")
    federate(whole)
    for stage, pattern in STAGES.items():
        process = forks.Process(target=play_until, args=(pieces, pattern))  # type: ignore[attr-defined]
        process.start()
        process.join()
        assert -signal.SIGKILL == process.exitcode, stage
    federate(pieces)

    for one, other in zip(ends(whole), ends(pieces), strict=True):
        assert same(one, other)


def test_the_shared_place_may_be_a_store(two: Make) -> None:
    local, remote = two("rounds=1"), two("rounds=1", "shared=memory://federation/two", folder="remote")
    federate(local)
    federate(remote)

    for one, other in zip(ends(local), ends(remote), strict=True):
        assert same(one, other)


OTHERS = {
    "another public set": ("public.data.part.seed=1", "dataset: "),
    "fewer samples": ("public.data.part.public=0.4", "num_samples is [0-9]+ there and [0-9]+ in "),
    "other views": ("public.views.transform=clean", "transform"),
    "the views of another round": ("public.views.seed=1", "view_seed: 1 in .*, 2 in "),
    "fewer views": ("public.views.count=1", r"views is range\(0, 1\) there"),
    "other blocks": ("published.rows_per_block=16", "rows_per_block is 16 there and 32 in "),
}


@pytest.mark.parametrize(("change", "message"), OTHERS.values(), ids=OTHERS)
def test_the_cache_of_a_mistaken_party_is_refused_by_name(two: Make, change: str, message: str) -> None:
    mistaken = two("rounds=1", change)
    PartyRound(mistaken, mistaken.party("b"), 1).train_and_publish(trust=False)

    with pytest.raises(IdentityMismatch, match=f"(?s)the cache of party 'b' at .*b.cache is rejected: .*{message}"):
        federate(two("rounds=1"), party="a", wait=0)


def _no_divergence(targets: Targets, teacher_BC: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    return torch.zeros(len(teacher_BC))


@pytest.mark.parametrize(
    ("bad", "combine", "refused"),
    [(float("nan"), "probabilities", True), (float("-inf"), "logits", True), (float("-inf"), "probabilities", False)],
)
def test_logits_that_no_honest_writer_stores_are_refused_and_not_kept(
    two: Make, monkeypatch: pytest.MonkeyPatch, bad: float, combine: str, refused: bool
) -> None:
    """A class that one party masks would be masked for all of them in a mean of logits."""
    federation = two("rounds=1", f"consensus.combine={combine}")
    honest = CacheWriter.write

    def lying(self: CacheWriter, *, logits: Any, **kwargs: Any) -> None:
        logits = logits.clone()
        logits[3, 2] = bad
        honest(self, logits=logits, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(CacheWriter, "write", lying)
        patched.setattr("logitcache.cache.openblock._OpenRows.check", lambda self: None)
        patched.setattr("logitcache.cache.openblock.targets_kl", _no_divergence)
        PartyRound(federation, federation.party("b"), 1).train_and_publish(trust=False)
    if not refused:
        assert 1 == len(federate(federation, party="a", wait=0))
        return
    with pytest.raises(InvalidLogits, match="the cache of party 'b' at .* is rejected: view 0, row 3 contains NaN"):
        federate(federation, party="a", wait=0)
    assert not Path(federation.path, "a/round-001/b.cache").exists()


def test_samples_of_ones_own_in_the_public_set_are_refused_before_anything_is_done(two: Make) -> None:
    """By key where both come from one source, by what they hold where they don't."""
    for change in ("parties.a.data.part=null", "parties.a.data={name: tests.models:pictures, args: {count: 150}}"):
        federation = two(change)
        with pytest.raises(
            UsageError, match=r"of the \d+ samples of party 'a' are in the public set, the first is 'scan/"
        ):
            federate(federation)
        assert not Path(federation.path).exists()


def test_a_party_that_is_somewhere_else_is_only_a_name_here(two: Make) -> None:
    federation = two("parties.b={name: b}")
    with pytest.raises(UsageError, match="party 'b' has no net in this file, .* with --party"):
        federate(federation)
    with pytest.raises(PartyMissing, match="round 1 waits for b"):
        federate(federation, party="a", wait=0)
    with pytest.raises(UsageError, match="no party 'c' in federation two; it has: a, b"):
        federate(federation, party="c")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(
            "public.data.part.indx=1", "unknown key 'public.data.part.indx'; did you mean 'index'?", id="part"
        ),
        pytest.param("parties.a.net.modle=mlp", "unknown key 'parties.0.net.modle'; did you mean 'model'?", id="net"),
        pytest.param("parties.a.train.lrr=1", "unknown key 'train.lrr'; did you mean 'lr'?", id="train"),
        pytest.param("train.seeds=[1]", "a federation has one `seed`", id="seeds"),
        pytest.param("parties.a.name=b", "two parties are named 'b'", id="names"),
        pytest.param("parties.a.name='../b'", "parties.0.name", id="path"),
        pytest.param("consensus.combine=best", "consensus.combine", id="combine"),
        pytest.param("public.data.part={of: 2, index: 2}", "index is 2, of 2 parts; expected 0 to 1", id="index"),
        pytest.param("public.data.part={of: 2}", r"or `public` \(a fraction\) for the public part", id="nothing"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(two: Make, change: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        two(change)


def test_a_file_of_another_kind_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"has students, so it is a pipeline file: run `logitcache train-student`"):
        load_federation(Path(__file__).parents[2] / "pipelines/mnist5k.yaml")
    (tmp_path / "list.yaml").write_text("- a")
    with pytest.raises(UsageError, match="contains a list; expected a federation: a mapping with .*parties"):
        load_federation(tmp_path / "list.yaml")


def test_the_command_plays_a_file(two: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "two.yaml"
    file.write_text(yaml.safe_dump(two("rounds=1").model_dump()))
    federate_command(file, ["train.epochs=2"], as_json=True)
    told = json.loads(capsys.readouterr().out)
    assert ["a", "b"] == [turn["party"] for turn in told["turns"]]
    federate_command(file, ["train.epochs=2"])

    assert str(Path(told["turns"][1]["weights"])) in capsys.readouterr().out


def test_the_example_is_a_federation() -> None:
    file = Path(__file__).parents[2] / "pipelines/federated_mnist.yaml"
    federation = load_federation(file)

    assert federation == Federation.model_validate(yaml.safe_load(yaml.safe_dump(federation.model_dump())))
    with pytest.raises(UsageError, match="describes a federation: run `logitcache federate"):
        load_pipeline(file)
    assert 3 <= len({party.net.model + str(party.net.args) for party in federation.parties if party.net})


PARTS = {
    "equal shares": {"of": 3},
    "label skew": {"of": 4, "alpha": 0.3},
    "after a public part": {"public": 0.3, "of": 2, "alpha": 1.0, "seed": 5},
}


@pytest.mark.parametrize("part", PARTS.values(), ids=PARTS)
@pytest.mark.parametrize("name", ["digits", "tests.models:pictures"])
def test_parts_have_no_sample_in_common_and_none_is_left_over(name: str, part: dict[str, Any]) -> None:
    args = {"count": 300} if ":" in name else None

    def keys(**place: Any) -> list[str]:
        return list(load_data(name, args=args, part=PartConfig(**part | place)).train.keys)  # type: ignore[attr-defined]

    parts = [keys(index=index) for index in range(part["of"])] + ([keys(index=None)] if "public" in part else [])
    whole = load_data(name, args=args).train.keys  # type: ignore[attr-defined]

    assert sorted(whole) == sorted(key for each in parts for key in each)


def test_parts_of_named_classes_hold_these_and_are_divided_like_others() -> None:
    targets = np.arange(1000) % 10
    odd = [samples_of_part(targets, PartConfig(classes=[1, 3], of=2, index=index), 10) for index in (0, 1)]

    assert {1, 3} == set(targets[odd[0]]) == set(targets[odd[1]])
    assert 200 == len(set(odd[0]) | set(odd[1]))
    assert np.array_equal(np.flatnonzero(targets == 7), samples_of_part(targets, PartConfig(classes=[7]), 10))
    with pytest.raises(UsageError, match="names class 10; expected 0 to 9"):
        samples_of_part(targets, PartConfig(classes=[10]), 10)
    with pytest.raises(UsageError, match="this part of 2 samples is empty"):
        samples_of_part(targets[:2], PartConfig(of=50, index=3), 10)


def test_parts_never_change_and_their_skew_is_dirichlets() -> None:
    """Of each class a part gets a Beta(α, 2α) distributed share; 4 σ of its mean over 400 seeds and 10 classes."""
    targets = np.arange(2000) % 10
    part = samples_of_part(targets, PartConfig(of=3, index=1, alpha=0.5), 10)
    assert [0, 4, 6] == part[:3].tolist()
    shares = [
        np.bincount(
            targets[samples_of_part(targets, PartConfig(of=3, index=1, alpha=0.5, seed=seed), 10)], minlength=10
        )
        / 200
        for seed in range(400)
    ]
    variance = (1 / 3) * (2 / 3) / (3 * 0.5 + 1)

    assert abs(np.mean(shares) - 1 / 3) < 4 * (variance / 4000) ** 0.5
    assert np.var(shares) == pytest.approx(variance, rel=0.1)


def test_a_run_on_whole_data_has_the_identity_that_it_had_before_there_were_parts() -> None:
    assert {"name": "digits", "validation": 0.0, "args": {}, "subset": False} == DataConfig(name="digits").identity()
    assert "part" in DataConfig(name="digits", part=PartConfig(index=0)).identity()
