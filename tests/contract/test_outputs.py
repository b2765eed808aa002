"""Outputs beside the logits: written and read by name, read only when asked for, and made by a teacher's modules."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor, nn
from typer.testing import CliRunner

import logitcache
from logitcache.cache.manifest import NO_LOGITS as NO_LOGITS_NAME
from logitcache.cache.manifest import dump_manifest, output_of, read_manifest
from logitcache.cache.objects import read_object
from logitcache.cache.summary import summarise
from logitcache.catalog.capture import Capture, Tap, captured_shapes
from logitcache.catalog.outputs import outputs_config
from logitcache.cli import app
from logitcache.config.build import resolve_data, resolve_plan, resolve_teacher
from logitcache.config.schema import Pipeline
from logitcache.encodings import (
    ENCODINGS,
    Components,
    Dense,
    LowRank,
    NoLogits,
    PackedTopK,
    Sampled,
    TopK,
    TopLowRank,
    TrellisLowRank,
    Values,
)
from logitcache.errors import (
    CorruptCache,
    IdentityMismatch,
    IncompleteCache,
    InvalidLogits,
    LogitCacheError,
    ShapeError,
    UsageError,
)
from logitcache.extras.merge import merge
from logitcache.share.transfer import pull, push
from logitcache.stages.cache_teacher import cache_teacher
from logitcache.stages.plan import plan_pipeline
from logitcache.stages.train_student import train_students
from logitcache.stages.verify_match import verify_match
from logitcache.train.hint_config import hints_config
from logitcache.verify.audit import verify
from logitcache.verify.repair import repair
from tests.conftest import FEW_DIGITS
from tests.needs import need_package

Make = Callable[..., Pipeline]
GUIDE = Path(__file__).parents[2] / "docs/losses.md"

SAMPLES, CLASSES, VIEWS = 40, 10, 2
SHAPES = {"features": (6, 3, 3), "parity": (4,)}
HEADS = [
    *FEW_DIGITS,
    "teacher.model=tests.models:TwoHeads",
    "teacher.args={}",
    "cache.outputs={logits: digit, features: {module: trunk, pool: 4}, "
    "parity: {module: parity, encoding: Dense(dtype='float32')}}",
]
NO_LOGITS = [
    *FEW_DIGITS,
    "teacher.model=tests.models:embedding_net",
    "teacher.args={}",
    "cache.encoding=NoLogits()",
    "cache.outputs={features: {module: '3'}}",
    "students.small.hints=[{output: features, module: body, loss: relational}]",
]


def said(view: int) -> dict[str, Tensor]:
    """What a teacher says of a view: logits, a map of features, and another head."""
    generator = torch.Generator().manual_seed(view)
    return {
        "logits": torch.randn(SAMPLES, CLASSES, generator=generator),
        **{name: 100 + 50 * torch.randn(SAMPLES, *shape, generator=generator) for name, shape in SHAPES.items()},
    }


def outputs(features: Any = None, parity: Any = None) -> dict[str, logitcache.Output]:
    return {
        "features": logitcache.Output(shape=SHAPES["features"], encoding=features or Values(dtype="float32")),
        "parity": logitcache.Output(shape=SHAPES["parity"], encoding=parity or Dense(dtype="float32")),
    }


def writer(path: Path, **changes: Any) -> logitcache.CacheWriter:
    shape = {"num_samples": SAMPLES, "num_classes": CLASSES, "num_views": VIEWS, "rows_per_block": 16}
    given = {"encoding": Dense(dtype="float32"), "teacher": "net", "dataset": "d", "outputs": outputs()}
    return logitcache.create(path, **shape | given | changes)


def built(path: Path, **changes: Any) -> logitcache.LogitCache:
    with writer(path, **changes) as cache:
        for view in range(VIEWS):
            for start in range(0, SAMPLES, 10):
                rows = {name: values[start : start + 10] for name, values in said(view).items()}
                logits = rows.pop("logits")
                cache.write(view=view, start=start, logits=logits, outputs={name: rows[name] for name in cache.outputs})
    return logitcache.open(path)


def opened(pipeline: Pipeline) -> logitcache.LogitCache:
    return logitcache.open(pipeline.cache.path)


@pytest.mark.parametrize("budget", [None, 1], ids=["resident", "streamed"])
def test_outputs_come_back_in_their_shapes(tmp_path: Path, budget: int | None) -> None:
    cache = built(tmp_path / "a")
    index = torch.randperm(SAMPLES)

    assert {"logits": (CLASSES,), **SHAPES} == cache.outputs
    for number in range(VIEWS):
        view = cache.view(number, memory_budget=budget)
        for name, values in said(number).items():
            assert torch.equal(values[index], view.output(name, index))
        assert torch.equal(said(number)["logits"][index], view.logits(index))


@pytest.mark.parametrize("budget", [None, 1], ids=["resident", "streamed"])
def test_only_what_is_asked_for_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, budget: int | None) -> None:
    """Neither read nor hashed: half of it may be gone."""
    cache = built(tmp_path / "a")
    read: list[str] = []
    monkeypatch.setattr(
        "logitcache.cache.objects.read_object",
        lambda storage, key, stored, why: (
            read.append(output_of(key.split("/")[1])) or read_object(storage, key, stored, why=why)
        ),
    )
    view = cache.view(0, memory_budget=budget)
    view.logits([0, 39])
    assert {"logits"} == set(read)
    read.clear()
    view.output("features", [0, 39])
    assert {"features"} == set(read)

    read.clear()
    alone = cache.view(0, outputs=["parity"], memory_budget=budget)
    alone.output("parity", [1])
    assert {"parity"} == set(read)


def test_prefetched_outputs_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = built(tmp_path / "a")
    read: list[str] = []
    whole = type(cache).read_blocks
    monkeypatch.setattr(type(cache), "read_blocks", lambda self, *asked: read.append(asked[2:]) or whole(self, *asked))
    for _ in range(2):
        cache.prefetch(1, outputs=["features", "logits"])
    view = cache.view(1, outputs=["logits", "features"])

    assert torch.equal(said(1)["features"], view.output("features", range(SAMPLES)))
    assert [("features",), ("logits",)] == read


def test_an_output_that_is_not_there_names_those_that_are(tmp_path: Path) -> None:
    cache = built(tmp_path / "a")
    for ask in (
        lambda: cache.view(0).output("hidden", [0]),
        lambda: cache.view(0, outputs=["hidden"]),
        lambda: cache.window_blocks(1, ["hidden"]),
    ):
        with pytest.raises(UsageError, match="no output 'hidden'; it has: logits, features, parity"):
            ask()
    plain = built(tmp_path / "plain", outputs={})
    with pytest.raises(UsageError, match="no output 'features'; it has: logits"):
        plain.view(0).output("features", [0])
    assert torch.equal(plain.view(0).logits([3]), plain.view(0).output("logits", [3]))


def test_batches_and_interruptions_do_not_show(tmp_path: Path) -> None:
    whole = built(tmp_path / "a")
    with pytest.raises(KeyboardInterrupt), writer(tmp_path / "b") as cache:
        rows = said(0)
        cache.write(view=0, start=0, logits=rows.pop("logits"), outputs=rows)
        cache.flush()
        raise KeyboardInterrupt
    with writer(tmp_path / "b") as cache:
        assert {1} == {block.view for block in cache.missing_blocks()}
        rows = said(1)
        cache.write(view=1, start=0, logits=rows.pop("logits"), outputs=rows)

    assert whole.digest == logitcache.open(tmp_path / "b").digest


@pytest.mark.parametrize("dtype", ["float32", "float16", "uint8"])
@pytest.mark.parametrize("size", [1e-30, 1e-3, 1.0, 1e6, 1e37])
def test_values_keep_a_row_of_any_size_and_its_constant(dtype: str, size: float) -> None:
    values = size * (3 + torch.randn(32, 50, generator=torch.Generator().manual_seed(0)))
    encoding = Values(dtype=dtype)
    encoded = encoding.encode(values)
    decoded = encoding.decode(encoded, 50)
    spread = values.amax(dim=1, keepdim=True) - values.amin(dim=1, keepdim=True)
    off = (decoded - values).abs()

    assert not encoding.refused(values).any()
    if dtype == "float16":
        assert bool((off <= values.abs() * 2**-11 + values.abs().amax(dim=1, keepdim=True) * 2**-38).all())
    else:
        assert bool((off <= spread / 255 * 0.501).all()) if dtype == "uint8" else torch.equal(values, decoded)
    for name, spec in encoding.arrays(50).items():
        assert (getattr(torch, spec.dtype), (32, *spec.row_shape)) == (encoded[name].dtype, tuple(encoded[name].shape))


@pytest.mark.parametrize("dtype", ["float32", "float16", "uint8"])
def test_values_keep_rows_of_one_number(dtype: str) -> None:
    rows = torch.tensor([[0.0] * 5, [7.0] * 5, [-2.5] * 5])
    encoding = Values(dtype=dtype)

    assert torch.equal(rows, encoding.decode(encoding.encode(rows), 5))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e38])
@pytest.mark.parametrize("dtype", ["float32", "float16", "uint8"])
def test_values_that_can_not_be_held_are_refused_by_row(tmp_path: Path, dtype: str, value: float) -> None:
    rows = said(0)
    rows["features"][21, 2, 1, 1] = value
    with pytest.raises(InvalidLogits, match=r"row 21: the teacher's features hold NaN, or values beyond 8\.5e37"):
        with writer(tmp_path / "a", outputs=outputs(Values(dtype=dtype))) as cache:
            cache.write(view=0, start=0, logits=rows.pop("logits"), outputs=rows)


def test_the_manifest_knows_the_encoding_of_no_logits() -> None:
    """Summaries read it without torch."""
    assert NO_LOGITS_NAME == NoLogits.name


def test_arrays_of_encodings_leave_room_for_the_names_of_outputs() -> None:
    """`<output>_<array>` is read back from the last underscore."""
    configured = [Dense(), TopK(k=3), LowRank(), Sampled(), Values(dtype="uint8"), Dense(dtype="uint8"), Values()]
    configured += [PackedTopK(k=3, most=5, prior=True), TopLowRank(), TrellisLowRank()]
    configured += [Sampled(packed=True), Components(), NoLogits()]

    assert {kind.name for kind in map(type, configured)} == set(ENCODINGS)
    assert not any("_" in name for encoding in configured for name in encoding.arrays(1000))
    assert ("logits", "features", "a_b") == (output_of("ids"), output_of("features_ids"), output_of("a_b_values"))


def few_directions(rows: int, seed: int) -> Tensor:
    """Features of a few directions."""
    directions = torch.randn(5, 54, generator=torch.Generator().manual_seed(0))
    return (torch.randn(rows, 5, generator=torch.Generator().manual_seed(seed)) @ directions).view(rows, 6, 3, 3)


@pytest.mark.parametrize("is_fitted", [True, False], ids=["fitted before", "with the calibration"])
def test_features_take_an_encoding_that_is_fitted_to_them(tmp_path: Path, is_fitted: bool) -> None:
    sample, rows = few_directions(200, seed=1), few_directions(SAMPLES, seed=2)
    encoding = Components(error=0.1)
    given: dict[str, Any] = {"calibration": logitcache.Calibration(said(0)["logits"], outputs={"features": sample})}
    if is_fitted:
        encoding, given = encoding.fit(sample), {}
    given["outputs"] = {"features": logitcache.Output(shape=SHAPES["features"], encoding=encoding)}
    for view in range(VIEWS):  # each by a writer of its own
        with contextlib.suppress(IncompleteCache), writer(tmp_path / "a", **given) as cache:
            cache.write(view=view, start=0, logits=said(view)["logits"], outputs={"features": rows * (1 + view)})
    cache = logitcache.open(tmp_path / "a")
    decoded = cache.view(1).output("features", range(SAMPLES))

    assert [] == verify(str(tmp_path / "a"), deep=True)
    assert (decoded - 2 * rows).norm() < 0.3 * rows.norm()
    assert {f"features_{name}" for name in Components.fitted_arrays} == set(cache.layout.fixed)
    assert cache.contents.output_bytes["features"] < SAMPLES * VIEWS * 15
    push(str(tmp_path / "a"), str(tmp_path / "b"))
    assert torch.equal(
        decoded, logitcache.open(tmp_path / "b").view(1, memory_budget=1).output("features", range(SAMPLES))
    )
    with pytest.raises(IdentityMismatch, match="differs from what is written now"):
        with writer(tmp_path / "a", **given) as again:
            again.write(view=0, start=0, logits=said(0)["logits"], outputs={"features": -rows})


def test_a_cache_can_store_other_outputs_without_logits(tmp_path: Path) -> None:
    """How a teacher without classes, such as an embedding model, is cached."""
    rows = few_directions(2000, seed=2)
    cache = without_logits(tmp_path / "a", rows)
    view = cache.view(0)
    number = cache.contents.output_bytes["logits"]

    assert number < 0.1 * len(rows)
    assert {"features": SHAPES["features"]} == cache.outputs
    assert (False, None) == (cache.has_logits, cache.kl_mean)
    torch.testing.assert_close(view.output("features", [3]), rows[3:4], atol=0, rtol=1e-3)
    assert [] == verify(tmp_path / "a", deep=True)
    for read in (view.logits, view.targets, lambda index: view.output("logits", index)):
        with pytest.raises(UsageError, match="the cache has no logits, only other outputs: features. Train on them"):
            read([3])
    with pytest.raises(UsageError, match="the cache has no logits"):
        cache.logits(logitcache.join_index(0, torch.tensor([3])))


def test_a_build_without_logits_goes_on_and_compares_what_is_written_again(tmp_path: Path) -> None:
    rows = few_directions(40, seed=2)
    expected = without_logits(tmp_path / "whole", rows, rows_per_block=16).digest
    given = {"outputs": {"features": logitcache.Output(shape=SHAPES["features"])}, "rows_per_block": 16}
    begun = logitcache.create(tmp_path / "a", **NO_CLASSES, num_samples=40, **given)
    begun.write(view=0, start=0, outputs={"features": rows[:20]})
    begun.write(view=0, start=10, outputs={"features": rows[10:20]})
    with pytest.raises(IdentityMismatch, match="written before"):
        begun.write(view=0, start=18, outputs={"features": -rows[18:20]})
    begun.close()
    with logitcache.create(tmp_path / "a", **NO_CLASSES, num_samples=40, **given) as again:
        again.write(view=0, start=0, outputs={"features": rows[:16]})
        again.write(view=0, start=16, outputs={"features": rows[16:]})

    assert expected == logitcache.open(tmp_path / "a").digest


NO_CLASSES: dict[str, Any] = {"num_classes": 0, "teacher": "t", "dataset": "d"}


def without_logits(path: Path, rows: Tensor, **given: Any) -> logitcache.LogitCache:
    outputs = {"features": logitcache.Output(shape=tuple(rows.shape[1:]))}
    with logitcache.create(path, num_samples=len(rows), outputs=outputs, **NO_CLASSES, **given) as cache:
        cache.write(view=0, start=0, outputs={"features": rows})
    return logitcache.open(path)


@pytest.mark.parametrize("reader", ["zarr", "tensorstore"])
def test_other_readers_find_the_outputs_of_a_cache_without_logits(
    tmp_path: Path, stranger: Callable[[Path, str], dict[str, np.ndarray]], reader: str
) -> None:
    rows = few_directions(40, seed=2)
    cache = without_logits(tmp_path / "a", rows, rows_per_block=16)
    found = stranger(tmp_path / "a", reader)

    assert cache.digest == found["digest"]
    assert (found["array_written"] == 1).all()
    np.testing.assert_array_equal(cache.view(0).output("features", range(40)).numpy(), found["output_features"][0])


def test_a_cache_without_logits_states_it_everywhere(tmp_path: Path) -> None:
    without_logits(tmp_path / "a", few_directions(40, seed=2))
    card = (tmp_path / "a/README.md").read_text()
    found = CliRunner().invoke(app, ["info", str(tmp_path / "a"), "--json"])
    summary = json.loads(found.stdout)

    assert (0, "NoLogits()") == (summary["num_classes"], summary["encoding"])
    assert "none: the cache has no logits" in card
    assert "Fidelity" not in card
    assert ".logits(" not in card
    assert 'output("features", [0])' in card


@pytest.mark.parametrize("command", [["report"], ["suspects"], ["export", "--to", "parquet"], ["merge"]], ids=" ".join)
def test_what_needs_logits_is_refused_for_a_cache_without(tmp_path: Path, command: list[str]) -> None:
    if command == ["report"]:
        need_package("matplotlib", "report")
    if "parquet" in command:
        need_package("pyarrow", "parquet")
    for name in "ab":
        without_logits(tmp_path / name, few_directions(40, seed=2))
    caches = [str(tmp_path / "a"), *([str(tmp_path / "b")] if command == ["merge"] else [])]
    out = [] if command == ["suspects"] else ["--output", str(tmp_path / "out.html")]
    found = CliRunner().invoke(app, [*command, *caches, *out])

    assert isinstance(found.exception, UsageError)
    assert f"{command[0]} needs logits, and" in str(found.exception)
    assert "was created without; it has the outputs: features" in str(found.exception)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        pytest.param({}, "without logits needs `outputs`", id="nothing to store"),
        pytest.param({"encoding": "topk(k=3)"}, "leave out encoding=TopK", id="encoding"),
        pytest.param({"class_names": ["a"]}, "leave out class_names", id="class names"),
        pytest.param(
            {"outputs": {"features": {"shape": (3,), "encoding": "nologits"}}},
            "NoLogits stores nothing",
            id="an output",
        ),
    ],
)
def test_impossible_caches_without_logits_are_refused(tmp_path: Path, given: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        logitcache.create(tmp_path / "a", num_samples=40, **NO_CLASSES, **given)
    assert not list(tmp_path.iterdir())


def test_logits_are_not_written_into_a_cache_without(tmp_path: Path) -> None:
    outputs = {"features": logitcache.Output(shape=(4,))}
    rows = {"features": torch.ones(2, 4)}
    cache = logitcache.create(tmp_path / "a", num_samples=40, outputs=outputs, **NO_CLASSES)
    with pytest.raises(UsageError, match="this cache has no logits; leave them out, and pass only outputs: features"):
        cache.write(view=0, start=0, logits=torch.ones(2, 2), outputs=rows)
    with pytest.raises(UsageError, match="no logits; use `write`"):
        cache.write_sparse(view=0, start=0, ids=torch.ones(2, 1).int(), log_probs=torch.ones(2, 1), outputs=rows)
    with pytest.raises(UsageError, match="the extra outputs are none; expected .*: features"):
        cache.write(view=0, start=0)
    cache.close()
    with_logits = writer(tmp_path / "b")
    with pytest.raises(UsageError, match="the logits are missing"):
        with_logits.write(view=0, start=0)
    with_logits.close()


def test_outputs_without_logits_are_fitted_to_a_calibration(tmp_path: Path) -> None:
    rows = few_directions(300, seed=2)
    outputs = {"features": logitcache.Output(shape=SHAPES["features"], encoding=Components(error=0.1))}
    calibration = logitcache.Calibration(outputs={"features": rows})
    with logitcache.create(
        tmp_path / "a", num_samples=300, outputs=outputs, calibration=calibration, **NO_CLASSES
    ) as cache:
        cache.write(view=0, start=0, outputs={"features": rows})
    decoded = logitcache.open(tmp_path / "a").view(0).output("features", range(300))

    assert 0.15 > (decoded - rows).norm() / (rows - rows.mean(dim=0)).norm()


def test_a_pipeline_without_logits_trains_students_by_hints_only(tiny: Make) -> None:
    pipeline = tiny(*NO_LOGITS, "students.small.loss=cross_entropy")
    planned = plan_pipeline(pipeline)
    cache_teacher(pipeline)
    cache = opened(pipeline)

    assert not cache.has_logits
    assert "the cache has no logits, only other outputs" == planned.criterion
    assert [] == verify_match(pipeline, recompute=20)
    assert [] == cache_teacher(pipeline).computed_blocks
    train_students(pipeline)
    with pytest.raises(UsageError, match="the loss of student 'small' needs logits, and .* was created without"):
        train_students(tiny(*NO_LOGITS, "students.small.loss=kl"))


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        pytest.param(None, "needs calibration rows of shape .'M', 6, 3, 3., and none are given", id="none"),
        pytest.param(torch.zeros(50, CLASSES), "and none are given: pass calibration=Calibration", id="logits only"),
        pytest.param(
            logitcache.Calibration(torch.zeros(50, CLASSES), outputs={"features": torch.zeros(50, 54)}),
            r"and they are \(50, 54\)",
            id="another shape",
        ),
        pytest.param(
            logitcache.Calibration(torch.zeros(50, CLASSES), outputs={"features": torch.zeros(50, 6, 3, 3)}),
            "all are equal",
            id="equal rows",
        ),
    ],
)
def test_an_encoding_of_features_needs_rows_to_be_fitted_to(tmp_path: Path, calibration: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        writer(tmp_path / "a", outputs=outputs(Components()), calibration=calibration)
    assert not list(tmp_path.iterdir())


def test_a_teachers_features_are_fitted_to_its_calibration_rows(tiny: Make) -> None:
    features = "cache.outputs={logits: digit, features: {module: trunk, pool: 4, encoding: Components(error=0.2)}}"
    pipeline = tiny(*HEADS[:-1], features, "cache.calibration=200")
    planned = plan_pipeline(pipeline)
    cache_teacher(pipeline)
    cache = opened(pipeline)

    assert [] == verify_match(pipeline, recompute=20)
    assert Components(error=0.2) == cache.extra_outputs["features"].encoding
    assert 0 < planned.output_bytes["features"] < 4 * np.prod(cache.outputs["features"])


@pytest.mark.parametrize("encoding", [TopK(k=2), Sampled(draws=8), Dense(dtype="uint8")], ids=repr)
def test_another_head_takes_an_encoding_of_logits(tmp_path: Path, encoding: Any) -> None:
    cache = built(tmp_path / "a", outputs=outputs(parity=encoding))
    alone = logitcache.create(
        tmp_path / "alone", num_samples=SAMPLES, num_classes=4, num_views=VIEWS, rows_per_block=16,
        encoding=encoding, teacher="t", dataset="d",
    )  # fmt: skip
    with alone:
        for view in range(VIEWS):
            alone.write(view=view, start=0, logits=said(view)["parity"])

    expected = logitcache.open(tmp_path / "alone").view(1).logits(range(SAMPLES))
    assert torch.equal(expected, cache.view(1).output("parity", range(SAMPLES)))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"Features": {"shape": (3,)}}, "invalid output name 'Features'"),
        ({"logits": {"shape": (3,)}}, "other than 'logits'"),
        ({"a_": {"shape": (3,)}}, "invalid output name 'a_'"),
        ({"f": {"shape": ()}}, "output 'f': the shape of an output must have 1 to 6 positive dimensions"),
        ({"f": {"shape": (0, 3)}}, r"not \(0, 3\)"),
        ({"f": {"shape": (2**20, 2**20)}}, "at most 268435456 values"),
        ({"f": {"shape": (3, 4), "encoding": "dense"}}, "needs the encoding Values"),
        ({"f": {"shape": (300,), "encoding": "lowrank"}}, "'lowrank' must be fitted"),
        ({"f": {"shape": (3,), "encoding": "TopK(k=3)"}}, "keeps every one of 3 classes"),
        ({"f": {"shape": (3,), "encoding": "auto"}}, "still to be chosen"),
        ({"f": {"sides": (3,)}}, "unexpected keyword argument 'sides'"),
        ({f"f{'a' * number}": {"shape": (3,)} for number in range(40)}, "at most 32"),
    ],
    ids=str,
)
def test_outputs_that_can_not_be_are_refused_before_anything_is_written(
    tmp_path: Path, given: Any, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        writer(tmp_path / "a", outputs=given)
    assert not list(tmp_path.iterdir())


def test_every_write_gives_every_output_in_its_shape(tmp_path: Path) -> None:
    rows = said(0)
    logits = rows.pop("logits")
    with pytest.raises(UsageError, match="are features; expected those of this cache, by name: features, parity"):
        writer(tmp_path / "a").write(view=0, start=0, logits=logits, outputs={"features": rows["features"]})
    with pytest.raises(ShapeError, match=r"'features' is \(40, 54\); expected \(40, 6, 3, 3\)"):
        flat = rows | {"features": rows["features"].flatten(1)}
        writer(tmp_path / "a").write(view=0, start=0, logits=logits, outputs=flat)
    with pytest.raises(ShapeError, match=r"expected \(40, 4\), one row for each row of logits"):
        writer(tmp_path / "a").write(view=0, start=0, logits=logits, outputs=rows | {"parity": rows["parity"][:7]})


def test_other_outputs_are_another_cache(tmp_path: Path) -> None:
    built(tmp_path / "a")
    for changed in ({}, outputs(Values()), {**outputs(), "more": logitcache.Output(shape=(1,))}):
        with pytest.raises(IdentityMismatch, match="output"):
            writer(tmp_path / "a", outputs=changed)


def test_a_cache_of_logits_only_is_what_it_was(tmp_path: Path) -> None:
    """Neither its id nor a byte of its manifest knows of outputs."""
    built(tmp_path / "a", outputs={})
    text = (tmp_path / "a" / "manifest.json").read_text()

    assert "output_" not in text
    assert text.encode() == dump_manifest(read_manifest(text.encode(), url="a"))


def test_info_says_what_is_held(tmp_path: Path) -> None:
    cache = built(tmp_path / "a", outputs=outputs(Values()))
    summary = summarise(str(tmp_path / "a"))
    shown = json.loads(CliRunner().invoke(app, ["info", str(tmp_path / "a"), "--json"]).stdout)

    assert summary.outputs == shown["outputs"]
    assert ["features", "parity"] == list(shown["outputs"])
    assert ([6, 3, 3], "Values(dtype='float16')") == tuple(
        shown["outputs"]["features"][key] for key in ("shape", "encoding")
    )
    sizes = {name: each["bytes"] for name, each in shown["outputs"].items()}
    assert cache.target_bytes == sum(sizes.values()) + cache.contents.output_bytes["logits"]
    table = CliRunner().invoke(app, ["info", str(tmp_path / "a")]).stdout
    assert "outputs: features" in table
    card = (tmp_path / "a" / "README.md").read_text()
    assert '.output("features", [0]))  # float32 (1, 6, 3, 3)' in card
    assert "| output parity | `(4,)` per sample, `Dense(dtype='float32')`" in card


@pytest.mark.parametrize("array", ["features_values", "parity_logits", "logits"])
def test_damage_of_an_output_is_found_and_mended_from_a_copy(tmp_path: Path, array: str) -> None:
    cache = built(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "copy")
    file = tmp_path / "a" / "labels.zarr" / array / "c" / "1" / "0" / "0"
    damaged = bytearray(file.read_bytes())
    damaged[-1] ^= 1
    file.write_bytes(bytes(damaged))

    assert [("v00001/b00000", "wrong bytes")] == [(p.block, p.kind) for p in verify(str(tmp_path / "a"), deep=True)]
    view = logitcache.open(tmp_path / "a").view(1, outputs=[])
    with pytest.raises(CorruptCache, match=array):
        view.output(output_of(array), [0])
    other = "features" if array != "features_values" else "parity"
    assert torch.equal(said(1)[other][:3], view.output(other, range(3)))
    result = repair(str(tmp_path / "a"), source=str(tmp_path / "copy"))
    assert (["v00001/b00000"], [], cache.digest) == (result.fetched, result.remaining, result.digest)


def test_outputs_are_shared_by_push_and_pull(tmp_path: Path) -> None:
    cache = built(tmp_path / "a")
    push(str(tmp_path / "a"), f"file://{tmp_path}/store/a.cache")
    pulled = pull(f"file://{tmp_path}/store/a.cache", str(tmp_path / "b"), expect=cache.digest)
    part = pull(f"file://{tmp_path}/store/a.cache", str(tmp_path / "part"), views="1:2")
    there = logitcache.open(tmp_path / "part")

    assert (cache.id, cache.digest) == (pulled.id, pulled.digest)
    assert "1:2" == part.views
    assert torch.equal(said(1)["features"], there.view(1).output("features", range(SAMPLES)))
    assert 2 * there.contents.output_bytes["features"] == pytest.approx(
        cache.contents.output_bytes["features"], rel=0.1
    )
    assert [] == verify(str(tmp_path / "part"), deep=True)


def test_only_logits_are_merged_and_that_is_said(tmp_path: Path) -> None:
    built(tmp_path / "a", teacher="one")
    built(tmp_path / "b", teacher="two", outputs={})
    paths = [str(tmp_path / "a"), str(tmp_path / "b")]
    result = merge(paths, tmp_path / "m")

    assert {paths[0]: ["features", "parity"]} == result.left_out_outputs
    assert {"logits": (CLASSES,)} == logitcache.open(tmp_path / "m").outputs
    printed = CliRunner().invoke(app, ["merge", *paths, "--output", str(tmp_path / "m")])
    assert "Only logits are merged; omitted from" in printed.stdout


HOSTILE: dict[str, Callable[[dict[str, Any]], Any]] = {
    "a shape of another size": lambda m: m["identity"]["outputs"].update(features=[7, 3, 3]),
    "no shape": lambda m: m["identity"]["outputs"].update(features=[]),
    "a giant": lambda m: m["identity"]["outputs"].update(features=[2**40, 2**40]),
    "negative": lambda m: m["identity"]["outputs"].update(features=[-6, -3, 3]),
    "a name that is a path": lambda m: m["identity"]["outputs"].update({"../x": [3]}),
    "an encoding too many": lambda m: m["identity"]["output_encodings"].update(more={"name": "values"}),
    "no encoding": lambda m: m["identity"].update(output_encodings={}),
    "an encoding that is fitted": lambda m: m["identity"]["output_encodings"].update(parity={"name": "lowrank"}),
    "a source of nothing": lambda m: m["identity"].update(output_sources={"more": {"module": "x"}}),
    "an array of nothing": lambda m: m["layout"]["arrays"].update(more_values=m["layout"]["arrays"]["logits"]),
    "a wider array": lambda m: m["layout"]["arrays"]["features_values"].update(row_shape=[55]),
    "another dtype": lambda m: m["layout"]["arrays"]["features_values"].update(dtype="float16"),
    "no logits": lambda m: m["identity"]["outputs"].pop("logits"),
}


@pytest.mark.parametrize("lie", HOSTILE)
def test_a_manifest_that_lies_about_outputs_is_refused(tmp_path: Path, lie: str) -> None:
    """Though id and checksum are those of the lie."""
    built(tmp_path / "a")
    file = tmp_path / "a" / "manifest.json"
    raw = json.loads(file.read_text())
    HOSTILE[lie](raw)
    del raw["checksum"]
    identity = read_manifest(file.read_bytes(), url="a").identity.model_validate(raw["identity"])
    manifest = read_manifest(file.read_bytes(), url="a").model_validate(raw | {"id": identity.cache_id})
    file.write_bytes(dump_manifest(manifest))

    with pytest.raises(CorruptCache, match="damaged"):
        logitcache.open(tmp_path / "a")


def teacher_says(pipeline: Pipeline, view: int) -> dict[str, Tensor]:
    """By plain forward passes, module by module."""
    data = resolve_data(pipeline, trust=False)
    plan = resolve_plan(pipeline, data, trust=False)
    teacher, _ = resolve_teacher(pipeline, data, plan, trust=False)
    views = logitcache.ViewDataset(data.train, plan)
    inputs = torch.stack([views[(view, row)][1] for row in range(len(views))])
    with torch.inference_mode():
        features = nn.functional.adaptive_avg_pool2d(teacher.trunk(inputs), 4)  # type: ignore[operator]
        both = teacher(inputs)
    return {"logits": both["digit"], "parity": both["parity"], "features": features}


def check_that_stage_1_keeps_what_modules_give(pipeline: Pipeline) -> None:
    cache_teacher(pipeline)
    cache = opened(pipeline)
    rows = range(cache.num_samples)

    assert {"logits": (10,), "features": (6, 4, 4), "parity": (2,)} == cache.outputs
    expected = teacher_says(pipeline, 0)
    for name in ("logits", "parity"):
        torch.testing.assert_close(cache.view(0).output(name, rows), expected[name], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(cache.view(0).output("features", rows), expected["features"], atol=1e-3, rtol=1e-3)
    assert {"module": "digit"} == cache.manifest.identity.output_sources["logits"]
    assert {"module": "trunk", "pool": 4} == cache.manifest.identity.output_sources["features"]


def test_stage_1_keeps_what_the_teachers_modules_give(tiny: Make) -> None:
    """A teacher whose forward gives two heads; a ReLU that works in place; a map that is pooled."""
    check_that_stage_1_keeps_what_modules_give(tiny(*HEADS, "views.count=1"))


def test_stage_1_in_bfloat16_and_channels_last(tiny: Make) -> None:
    pipeline = tiny(*HEADS, "views.count=1")
    cache_teacher(pipeline)
    half = tiny(
        *HEADS,
        "views.count=1",
        "teacher.precision=bfloat16",
        "teacher.channels_last=true",
        f"cache.path={pipeline.cache.path}2",
    )
    cache_teacher(half)
    rows = range(50)

    exact, rough = (opened(each).view(0).output("features", rows) for each in (pipeline, half))
    assert not torch.equal(exact, rough)
    torch.testing.assert_close(rough, exact, atol=0.05, rtol=0.05)


def test_what_the_teacher_made_is_checked_and_mended_by_it(tiny: Make) -> None:
    pipeline = tiny(*HEADS)
    digest = cache_teacher(pipeline).manifest.digest
    assert [] == verify_match(pipeline, recompute=60)
    file = Path(pipeline.cache.path) / "labels.zarr" / "features_values" / "c" / "1" / "2" / "0"
    file.unlink()
    result = repair(pipeline.cache.path, recompute=lambda: cache_teacher(pipeline).manifest.digest)

    assert (["v00001/b00002"], [], digest) == (result.recomputed, result.remaining, result.digest)


def test_features_that_the_teacher_would_not_give_again_are_found(tiny: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = tiny(*HEADS)
    take = Tap.take
    monkeypatch.setattr(Tap, "take", lambda self, given: take(self, given) * (1.01 if self.module == "trunk" else 1))
    cache_teacher(pipeline)
    monkeypatch.setattr(Tap, "take", take)

    assert {"other features"} == {problem.kind for problem in verify_match(pipeline, recompute=5)}


def test_plan_counts_the_outputs(tiny: Make) -> None:
    pipeline = tiny(*HEADS, "cache.calibration=200")
    plan = plan_pipeline(pipeline)
    cache_teacher(pipeline)
    cache = opened(pipeline)
    rows = cache.num_samples * cache.num_views

    assert {"features", "parity"} == plan.output_bytes.keys()
    assert plan.output_bytes["features"] == pytest.approx(cache.contents.output_bytes["features"] / rows, rel=0.2)
    [dense] = [each for each in plan.fidelities if each.encoding == Dense(dtype="float32")]
    total = dense.bytes_per_row + sum(plan.output_bytes.values())
    assert plan.total_bytes(dense) == pytest.approx(total * rows + dense.fixed_bytes)
    assert 0 == plan.output_fixed_bytes


def test_a_plan_counts_what_an_output_stores_once(tiny: Make) -> None:
    features = "features: {module: trunk, pool: 4, encoding: {name: components, error: 0.3}}"
    pipeline = tiny(*HEADS, f"cache.outputs={{logits: digit, {features}}}", "cache.calibration=200")
    plan = plan_pipeline(pipeline)
    cache_teacher(pipeline)
    labels = Path(pipeline.cache.path) / "labels.zarr"
    fixed = [file for name in Components.fitted_arrays for file in (labels / f"features_{name}" / "c").rglob("*")]

    assert plan.output_fixed_bytes == pytest.approx(
        sum(file.stat().st_size for file in fixed if file.is_file()), rel=0.05
    )
    [dense] = [each for each in plan.fidelities if each.encoding == Dense(dtype="float32")]
    by_row = (dense.bytes_per_row + plan.output_bytes["features"]) * plan.rows_per_view * plan.num_views
    assert plan.total_bytes(dense) == pytest.approx(by_row + plan.output_fixed_bytes)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("{features: trnk}", "TwoHeads has no module 'trnk'; nearest: trunk"),
        (
            "{features: {module: trunk, pool: 0}}",
            "cache.outputs: features: the output: `pool` of 'trunk' must be an integer",
        ),
        (
            "{features: {modul: trunk}}",
            "features: the output has no parameter 'modul'; did you mean 'module'",
        ),
        ("{features: {pool: 3}}", "the output lacks 'module'; its parameters are: module, key, pool"),
        ("{parity: {module: parity, pool: 2}}", "only .B, C, H, W. can be pooled"),
        ("{features: {module: trunk, key: out}}", "returns a tensor of float32, which has no 'out'"),
        ("{features: {module: trunk, encoding: dense}}", "needs the encoding Values"),
        ("{features: {module: trunk, encoding: TopK(q=1)}}", "has no parameter 'q'"),
        ("{logits: {module: digit, encoding: dense}}", "set their encoding as `cache.encoding`"),
        ("{logits: parity}", r"returns \(2,\) for one sample; expected \(10,\)"),
        ("{sample keys: trunk}", "invalid output name 'sample keys'"),
        ("[trunk]", "expected modules by name"),
    ],
)
def test_a_module_that_can_not_be_kept_is_refused_before_any_work(tiny: Make, given: str, message: str) -> None:
    with pytest.raises(LogitCacheError, match=message):
        outputs = given if "logits" in given or given[0] == "[" else f"{{logits: digit, {given[1:]}"
        cache_teacher(tiny(*HEADS[:-1], f"cache.outputs={outputs}"))


class Odd(nn.Module):
    """Modules that give a tuple, a mapping and integers, one that is called twice, and one that is never called."""

    class Parts(nn.Module):
        def forward(self, inputs: Tensor) -> Any:
            return {"both": (inputs, inputs + 1), "count": torch.ones(len(inputs), dtype=torch.int64)}

    def __init__(self) -> None:
        super().__init__()
        self.parts = self.Parts()
        self.relu = nn.ReLU()
        self.unused = nn.ReLU()
        self.flat = nn.Flatten(0)

    def forward(self, inputs: Tensor) -> Tensor:
        self.flat(inputs)
        one, two = self.parts(inputs)["both"]
        return self.relu(one) + self.relu(two)


@pytest.mark.parametrize(
    ("tap", "message"),
    [
        (Tap(module="parts"), "returns a mapping of 'both', 'count'; expected a floating-point tensor"),
        (Tap(module="parts", key="both"), "returns a tuple of 2"),
        (Tap(module="parts", key="count"), "returns a tensor of int64"),
        (Tap(module="relu"), "is called more than once"),
        (Tap(module="unused"), "was not called in the forward pass"),
        (Tap(module="flat"), r"returns \(6,\) for two samples; expected \(2, ...\)"),
        (Tap(module="nothing"), "Odd has no module 'nothing'"),
    ],
)
def test_what_a_module_gives_must_be_one_row_of_floats_for_each_sample(tap: Tap, message: str) -> None:
    with pytest.raises(LogitCacheError, match=message):
        captured_shapes(Odd(), {"x": tap}, torch.ones(2, 3))


def test_hooks_take_nothing_when_others_call_the_net() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True))
    capture = Capture(net, {"x": Tap(module="0")})
    handles = capture.hook()
    inputs = torch.randn(5, 3)
    logits, taken = capture(inputs)
    net(inputs), net(inputs)

    assert torch.equal(nn.functional.linear(inputs, net[0].weight, net[0].bias), taken["x"])
    assert torch.equal(taken["x"].relu(), logits)
    assert capture._captured is None
    for handle in handles:
        handle.remove()
    with pytest.raises(UsageError, match="was not called"):
        capture(inputs)


def test_a_student_of_logits_never_touches_the_features(tiny: Make) -> None:
    """They may even be gone."""
    pipeline = tiny(*HEADS)
    cache_teacher(pipeline)
    shutil.rmtree(Path(pipeline.cache.path) / "labels.zarr" / "features_values" / "c")
    [row] = train_students(pipeline, ["small"])

    assert row.accuracy_mean is not None


def test_a_pipeline_without_outputs_fits_a_cache_that_has_some_but_not_other_modules(tiny: Make) -> None:
    cache_teacher(tiny(*FEW_DIGITS, "cache.outputs={hidden: body.0}"))
    train_students(tiny(*FEW_DIGITS), ["small"])
    with pytest.raises(IdentityMismatch, match=r"output_sources.hidden.module"):
        train_students(tiny(*FEW_DIGITS, "cache.outputs={hidden: body.1}", "train.lr=0.02"), ["small"])
    with pytest.raises(IdentityMismatch, match=r"output_sources.logits"):
        train_students(tiny(*FEW_DIGITS, "cache.outputs={logits: head}", "train.lr=0.02"), ["small"])


def test_what_the_guide_says_of_outputs_is_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    section = GUIDE.read_text().split("## More than logits", 1)[1].split("\n## ", 1)[0]
    configured = yaml.safe_load(section.split("```yaml", 1)[1].split("```", 1)[0])
    monkeypatch.chdir(tmp_path)
    given = {"logits": torch.randn(50, 10), "features": torch.randn(50, 64, 7, 7)}
    exec(section.split("```python", 1)[1].split("```", 1)[0], {"logitcache": logitcache, **given})
    read = logitcache.open("caches/mine.cache").view(0).output("features", [7, 0, 42])
    embeddings = torch.randn(500, 4) @ torch.randn(4, 384)
    alone = {"some_embeddings": embeddings[:400], "embeddings": embeddings[400:]}
    exec(section.split("```python", 2)[2].split("```", 1)[0], {"logitcache": logitcache, "torch": torch, **alone})
    decoded = logitcache.open("embeddings.cache").view(0).output("features", range(100))

    assert ["features", "maps", "color"] == list(outputs_config(configured["cache"]["outputs"]))
    assert 3 == len(hints_config(configured["students"][0]["hints"]))
    torch.testing.assert_close(read, given["features"][[7, 0, 42]], atol=1e-2, rtol=1e-3)
    assert (decoded - embeddings[400:]).norm() < 0.2 * embeddings[400:].norm()


def test_a_memory_budget_streams_features_and_keeps_logits(tmp_path: Path) -> None:
    cache = built(tmp_path / "a")
    budget = cache.view_bytes

    assert cache.window_blocks(budget) is None
    assert cache.window_blocks(budget, ["logits", "features"]) == 1
    view = cache.view(0, memory_budget=budget, outputs=["logits", "features"])
    assert torch.equal(said(0)["features"], view.output("features", np.arange(SAMPLES)))


def test_entries_of_some_classes_may_come_with_outputs(tmp_path: Path) -> None:
    """In any batches; written again with other values they are refused."""
    logits, boxes = torch.randn(9, 6), torch.rand(9, 4)
    log_probs, ids = logits.log_softmax(dim=1).topk(3, dim=1)
    about: dict[str, Any] = {"num_samples": 9, "num_classes": 6, "rows_per_block": 4, "teacher": "t", "dataset": "d"}
    outputs = {"boxes": logitcache.Output(shape=(4,), encoding=Values(dtype="float32"))}
    with logitcache.create(tmp_path / "a", encoding=TopK(k=3), outputs=outputs, **about) as writer:
        for rows in (slice(0, 3), slice(3, 8), slice(8, 9)):
            entries: dict[str, Any] = {"ids": ids[rows], "log_probs": log_probs[rows]}
            writer.write_sparse(view=0, start=rows.start, outputs={"boxes": boxes[rows]}, **entries)
        again: dict[str, Any] = {"view": 0, "start": 2, "ids": ids[2:4], "log_probs": log_probs[2:4]}
        writer.write_sparse(outputs={"boxes": boxes[2:4]}, **again)
        with pytest.raises(IdentityMismatch, match="row 2 of view 0"):
            writer.write_sparse(outputs={"boxes": boxes[2:4] + 1}, **again)
        with pytest.raises(
            UsageError, match="the extra outputs are none; expected those of this cache, by name: boxes"
        ):
            writer.write_sparse(**again)
    cache = logitcache.open(tmp_path / "a")

    assert [] == verify(str(tmp_path / "a"), deep=True)
    assert torch.equal(boxes, cache.view(0).output("boxes", range(9)))
    torch.testing.assert_close(
        log_probs, cache.view(0).logits(range(9)).log_softmax(dim=1).gather(1, ids), atol=2e-3, rtol=1e-3
    )
