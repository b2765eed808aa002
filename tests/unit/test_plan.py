"""Choosing an encoding before the run."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from logitcache.cache import fidelity
from logitcache.cache.fidelity import (
    Calibration,
    Fidelity,
    candidates,
    choose,
    compare,
    fidelity_kl,
    measure,
    targets_kl,
)
from logitcache.cache.layout import encode_block
from logitcache.cache.reader import open_cache
from logitcache.cli.printing import plan_summary
from logitcache.config.schema import Pipeline
from logitcache.encodings import (
    Auto,
    Dense,
    Encoding,
    LowRank,
    PackedTopK,
    Sampled,
    TopK,
    TopLowRank,
    TrellisLowRank,
    encoding_or_auto,
)
from logitcache.errors import InvalidLogits, LogitCacheError, UsageError
from logitcache.extras.plan_plot import pareto_front, plot
from logitcache.stages.cache_teacher import cache_teacher
from logitcache.stages.plan import live_passes, plan_logits, plan_no_logits, plan_pipeline, read_logits
from tests.conftest import FEW_DIGITS
from tests.needs import need_package


def logits(rows: int = 400, classes: int = 60) -> np.ndarray:
    """Of low rank and some noise, as a teacher's are."""
    generator = np.random.default_rng(0)
    return (
        generator.normal(size=(rows, 6)) @ generator.normal(size=(6, classes))
        + generator.normal(size=(rows, classes)) / 4
    )


def test_no_group_is_on_both_sides_of_the_split() -> None:
    groups = np.repeat(np.arange(40), 10)
    fitted, measured = Calibration(logits(), groups).split()

    assert set() == set(groups[fitted]) & set(groups[measured])
    assert (320, 80) == (len(fitted), len(measured))


def test_measured_bytes_are_those_of_a_block_on_disk() -> None:
    rows = torch.from_numpy(logits()).float()
    found = measure(TopK(k=5), rows)
    encoded, specs = TopK(k=5).encode(rows), TopK(k=5).arrays(60)
    stored = sum(len(encode_block(specs[name], values.numpy(), 400)) for name, values in encoded.items())

    assert stored / 400 == found.bytes_per_row
    assert 0 == found.fixed_bytes
    assert 1.0 == found.top1_agreement


def test_a_fitted_encoding_counts_what_is_stored_once_apart() -> None:
    found = measure(LowRank(rank=6).fit(logits()), logits()[:100])

    assert found.fixed_bytes > 6 * 60
    assert found.bytes_per_row < 20


def test_the_divergence_does_not_depend_on_the_loss_and_its_factor() -> None:
    rows = torch.from_numpy(logits()).float()
    decoded = TopK(k=5).decode(TopK(k=5).encode(rows), 60)
    p = (rows / 4).log_softmax(dim=1)
    by_hand = (p.exp() * (p - (decoded / 4).log_softmax(dim=1))).sum(dim=1).mean()

    assert measure(TopK(k=5), rows).kl[4.0] == pytest.approx(float(by_hand), rel=1e-4)


def measured(num_bytes: float, kl: float) -> Fidelity:
    return Fidelity(Dense(), num_bytes, 0, {1.0: kl}, kl, 1.0, 1.0, 1.0)


FIDELITIES = [measured(10, 0.3), measured(20, math.inf), measured(30, 0.4), measured(40, 0.005), measured(90, 0.001)]


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        pytest.param({}, 40, id="a hundredth of a nat unless it is said"),
        pytest.param({"max_kl": 0.5}, 10, id="loose"),
        pytest.param({"max_kl": 0.002}, 90, id="strict"),
        pytest.param({"max_bytes": 50}, 40, id="bytes"),
        pytest.param({"max_bytes": 35, "max_kl": 0.35}, 10, id="both"),
    ],
)
def test_the_choice_keeps_its_limits(limits: dict[str, float], expected: float) -> None:
    assert expected == choose(FIDELITIES, Auto(**limits)).bytes_per_row


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        pytest.param(
            {"max_kl": 1e-9}, r"within 1e-09 nats at T = 1; the most accurate, .* 90.0 bytes .* 0.001", id="nats"
        ),
        pytest.param({"max_bytes": 5}, "the smallest, .* takes 10.0 bytes and loses 0.3 nats", id="bytes"),
        pytest.param(
            {"max_bytes": 35, "max_kl": 0.01},
            "0.01 nats at T = 1 and 35 bytes per row; the most accurate of this size, .* 10.0 bytes and loses 0.3",
            id="both",
        ),
    ],
)
def test_limits_that_nothing_keeps_are_told(limits: dict[str, float], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        choose(FIDELITIES, Auto(**limits))


@pytest.mark.parametrize(
    ("limits", "other", "is_slow"),
    [
        pytest.param({"max_kl": 0.5}, (41, 0.2), True, id="more than twice the bytes"),
        pytest.param({"max_kl": 0.5}, (39, 0.2), False, id="less than twice the bytes"),
        pytest.param({"max_kl": 0.15}, (20, 0.2), True, id="the other has a higher KL than the limit"),
        pytest.param({"max_bytes": 50}, (45, 0.3), True, id="more than twice the KL"),
        pytest.param({"max_bytes": 50}, (45, 0.19), False, id="less than twice the KL"),
        pytest.param({"max_bytes": 30}, (45, 0.01), True, id="the other has more bytes than the limit"),
    ],
)
def test_a_slow_encoding_is_chosen_only_for_half_the_bytes_or_nats(
    limits: dict[str, float], other: tuple[float, float], is_slow: bool
) -> None:
    slow = replace(measured(20, 0.1), encoding=TrellisLowRank())

    assert is_slow == (slow is choose([slow, measured(*other)], Auto(**limits)))


@pytest.mark.parametrize(
    ("stated", "message"),
    [
        pytest.param("Auto(max_bytes=0)", "max_bytes is a positive number of bytes per row, not 0", id="bytes"),
        pytest.param("Auto(max_kl='a')", "max_kl is a positive number of nats, not 'a'", id="nats"),
        pytest.param("Auto(temperature=True)", "temperature is True; expected one of 1, 2, 4", id="bool"),
    ],
)
def test_impossible_limits_of_auto_are_refused(stated: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        encoding_or_auto(stated)


def test_auto_states_only_the_limits_that_it_has() -> None:
    """The configuration of an earlier version is compared with the one that chose the encoding of a cache."""
    assert {"name": "auto", "max_kl": 0.01} == encoding_or_auto("auto").config()
    assert {"name": "auto", "max_kl": 0.5} == Auto(max_kl=0.5).config()
    assert {"name": "auto", "max_bytes": 60.0, "temperature": 2.0} == Auto(max_bytes=60, temperature=2).config()
    assert Auto(max_bytes=60, temperature=2) == encoding_or_auto(Auto(max_bytes=60, temperature=2).config())


def test_slow_encodings_are_measured_on_some_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fidelity, "SLOW_ROWS", 30)
    calibration, encoding = Calibration(logits(400)), TrellisLowRank(rank=4)
    [found] = compare(calibration, [encoding])
    fitted, measured = calibration.split()
    expected = measure(encoding.fit(calibration.logits[fitted]), calibration.logits[measured[::3]])

    assert (27, 80) == (len(measured[::3]), len(measured))
    assert (expected.bytes_per_row, expected.kl) == (found.bytes_per_row, found.kl)


def test_an_encoding_that_cannot_be_fitted_to_the_logits_is_left_out() -> None:
    """With huge logits and fewer directions than the rank, a step of `TopLowRank` would exceed float16."""
    generator = np.random.default_rng(0)
    too_large = Calibration(1000 * generator.normal(size=(100, 6)) @ generator.normal(size=(6, 60)))
    top_low_rank = TopLowRank(rank=40)

    assert [Dense()] == [each.encoding for each in compare(too_large, [top_low_rank, Dense()])]
    with pytest.raises(UsageError, match="a step exceeds float16: lower bit_price, or check the scale of the logits"):
        compare(too_large, [top_low_rank])


def test_the_choice_can_be_made_at_another_temperature() -> None:
    ranked = {1.0: 0.1, 2.0: 0.5, 4.0: 0.5}, {1.0: 0.5, 2.0: 0.1, 4.0: 0.5}
    results = [replace(FIDELITIES[0], bytes_per_row=10 + number, kl=kl) for number, kl in enumerate(ranked)]

    assert [10, 11] == [choose(results, Auto(max_bytes=20, temperature=each)).bytes_per_row for each in (1.0, 2.0)]
    with pytest.raises(UsageError, match="temperature is 3.0; expected one of 1, 2, 4"):
        Auto(max_bytes=20, temperature=3.0)


def test_the_pareto_front_leaves_out_what_is_beaten() -> None:
    assert [10, 40, 90] == [each.bytes_per_row for each in pareto_front(FIDELITIES)]


def test_few_classes_get_dense_candidates_and_many_get_all_kinds() -> None:
    assert {"dense"} == {each.name for each in candidates(10, 1000)}
    assert {"dense"} == {each.name for each in candidates(2, 1000)}
    assert {"dense", "lowrank", "topk", "sampled"} == {each.name for each in candidates(1000, 10_000)}
    assert all(each.rank <= 250 for each in candidates(1000, 1000) if isinstance(each, LowRank))


def test_a_vocabulary_is_planned_with_encodings_of_sorted_sets_and_of_a_tail() -> None:
    """Logits with a few large values and a low-rank rest, as those of a language model."""
    generator = np.random.default_rng(0)
    low = generator.normal(size=(200, 24)) @ generator.normal(size=(24, 9000)) * 0.8
    plan = plan_logits(Calibration(low.astype(np.float32)), Auto(max_kl=0.5))
    names = {each.encoding.name for each in plan.fidelities}

    assert {"dense", "toplowrank", "trellislowrank", "packedtopk", "sampled"} == names
    assert "toplowrank" == plan.recommended.encoding.name
    assert all(
        each.encoding.rank < 160 for each in plan.fidelities if isinstance(each.encoding, TopLowRank | TrellisLowRank)
    )


def test_a_plan_of_logits_recommends_and_plots(tmp_path: Path) -> None:
    need_package("matplotlib", "plot")
    plan = plan_logits(Calibration(logits(1000)), Auto())
    plot(plan, tmp_path / "plan.png")

    assert (1000, 60) == (plan.num_rows, plan.num_classes)
    assert plan.recommended.kl[1.0] <= 0.01
    assert plan.fidelities == sorted(plan.fidelities, key=lambda each: each.bytes_per_row)
    assert b"\x89PNG" == (tmp_path / "plan.png").read_bytes()[:4]


def test_the_classes_of_imagenet_21k_are_planned_from_a_memory_map(tmp_path: Path) -> None:
    """A memory map is read some rows at a time; the basis of so many classes is a randomised one."""
    generator = np.random.default_rng(0)
    low = generator.normal(size=(300, 12)) @ generator.normal(size=(12, 21_841))
    np.save(tmp_path / "a.npy", low.astype(np.float16))
    calibration = read_logits(tmp_path / "a.npy")
    encoding = LowRank(rank=16, k=4)
    found = measure(encoding.fit(calibration.logits[:250]), calibration.logits[250:])

    assert isinstance(calibration.logits, np.memmap)
    assert found.bytes_per_row < 60
    assert found.kl[1.0] < 0.05


@pytest.mark.parametrize("classes", [2, 10])
def test_few_classes_are_planned(classes: int) -> None:
    plan = plan_logits(Calibration(logits(300, classes)), Auto())

    assert "dense" == plan.recommended.encoding.name
    assert "the smallest with a KL of at most 0.01 nats at T = 1" == plan.criterion


def test_masked_classes_rule_out_what_can_not_hold_them() -> None:
    masked = logits(1000)
    masked[:, 7] = -np.inf
    plan = plan_logits(Calibration(masked), Auto())

    assert "lowrank" not in {each.encoding.name for each in plan.fidelities}
    assert plan.recommended.kl[1.0] <= 0.01


def test_sampling_is_shown_but_never_recommended() -> None:
    plan = plan_logits(Calibration(logits(300, 200)), Auto(max_kl=10.0))

    assert any(isinstance(each.encoding, Sampled) and math.isinf(each.kl[1.0]) for each in plan.fidelities)
    assert not isinstance(plan.recommended.encoding, Sampled)


def test_a_pipeline_is_planned_by_its_teacher(tiny: Callable[..., Pipeline]) -> None:
    plan = plan_pipeline(tiny("cache.calibration=500"))

    assert (500, 10, 2) == (plan.num_rows, plan.num_classes, plan.num_views)
    assert plan.hours is not None
    assert plan.hours > 0


def test_a_plan_counts_the_passes_of_a_live_teacher(tiny: Callable[..., Pipeline]) -> None:
    pipeline = tiny("train.epochs=10", "train.seeds=[0,1,2]", "students.small.samples=0.5")

    assert 15 == live_passes(pipeline, trust=False), "the other student learns from true labels"


def test_the_limits_of_a_pipeline_are_those_of_its_plan(tiny: Callable[..., Pipeline]) -> None:
    auto = "cache.encoding=Auto(max_bytes=30, temperature=4)"
    plan = plan_pipeline(tiny("cache.calibration=300", auto))

    assert "the lowest KL at T = 4 within 30 bytes per row" == plan.criterion
    assert (
        "the smallest with a KL of at most 0.5 nats at T = 2"
        == plan_pipeline(tiny("cache.calibration=300", auto), max_kl=0.5, temperature=2).criterion
    )


def test_auto_in_a_pipeline_chooses_builds_and_goes_on(tiny: Callable[..., Pipeline]) -> None:
    pipeline = tiny(*FEW_DIGITS, "cache.encoding=auto")
    built = cache_teacher(pipeline)
    cache = open_cache(pipeline.cache.path)

    assert Dense(dtype="uint8") == cache.encoding
    assert [] == cache_teacher(pipeline).computed_blocks
    grown = cache_teacher(tiny(*FEW_DIGITS, "cache.encoding=auto", "views.count=3"))
    assert {2} == {block.view for block in grown.computed_blocks}
    assert built.manifest.id == grown.manifest.id


@pytest.mark.parametrize("name", ["a.npy", "a.npz"])
def test_logits_are_read_from_files(tmp_path: Path, name: str) -> None:
    groups = np.arange(400) // 10
    np.save(tmp_path / "a.npy", logits())
    np.savez(tmp_path / "a.npz", logits=logits(), photo=groups)
    read = read_logits(tmp_path / name, "photo" if name == "a.npz" else None)

    np.testing.assert_array_equal(logits(), read.logits)
    assert name == "a.npy" or (read.groups == groups).all()


@pytest.mark.parametrize(
    ("arrays", "group", "error", "message"),
    [
        pytest.param({"x": logits()}, None, UsageError, "no array 'logits'; it has: x", id="no logits"),
        pytest.param({"logits": logits()}, "photo", UsageError, "no array 'photo'", id="no group"),
        pytest.param({"logits": logits()[0]}, None, UsageError, "expected floats", id="one row"),
        pytest.param(
            {"logits": logits(), "g": np.arange(3)}, "g", UsageError, "one for each of the 400", id="few groups"
        ),
        pytest.param({"logits": logits() * np.nan}, None, InvalidLogits, "NaN", id="NaN"),
        pytest.param({"logits": np.array([[object()]])}, None, LogitCacheError, "can't be read|pickle", id="pickle"),
    ],
)
def test_files_that_hold_something_else_are_refused(
    tmp_path: Path, arrays: dict[str, np.ndarray], group: str | None, error: type[Exception], message: str
) -> None:
    np.savez(tmp_path / "a.npz", **arrays)  # type: ignore[arg-type]
    with pytest.raises(error, match=message):
        read_logits(tmp_path / "a.npz", group)


def test_the_command_prints_one_json_object(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from logitcache.cli import app

    np.save(tmp_path / "a.npy", logits(1000))
    app(["plan", "--logits", str(tmp_path / "a.npy"), "--json"], standalone_mode=False)
    found = json.loads(capsys.readouterr().out)

    assert {"num_rows", "num_classes", "recommended", "encodings"} <= found.keys()
    assert {"encoding", "bytes_per_sample", "fixed_bytes", "kl", "top1_agreement"} <= found["encodings"][0].keys()
    assert {"1", "2", "4"} == found["encodings"][0]["kl"].keys()
    assert found["recommended"] in {each["encoding"] for each in found["encodings"]}


@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
@pytest.mark.parametrize(
    "encoding",
    [TopK(k=64, dtype="uint8"), PackedTopK(k=64), PackedTopK(k=30, most=90, prior=True), Sampled(draws=9)],
    ids=repr,
)
def test_the_divergence_of_sparse_rows_is_that_of_all_classes(encoding: Encoding, temperature: float) -> None:
    num_classes = 9000
    generator = torch.Generator().manual_seed(0)
    rows, sample = (torch.randn(count, num_classes, generator=generator) * 3 for count in (5, 40))
    rows[1, 5:50] = -torch.inf
    fitted = encoding.fit(sample)
    encoded = fitted.encode(rows)
    found = targets_kl(fitted.targets(encoded, num_classes), rows, temperature)

    expected = fidelity_kl(fitted.decode(encoded, num_classes), rows, temperature)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_the_plan_of_a_cache_without_logits_is_valid_json() -> None:
    plan = plan_no_logits(fidelity.Calibration(np.zeros((4, 2), dtype=np.float32)))

    assert None is json.loads(json.dumps(plan_summary(plan), allow_nan=False))["encodings"][0]["encode_rows_per_second"]
