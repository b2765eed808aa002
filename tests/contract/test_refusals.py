"""What makes no sense is refused by an error of ours: when a cache is created, and when somebody else's is read."""

from __future__ import annotations

import io
import json
import os
import shutil
import sys
import warnings
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import logitcache
from logitcache.cache import creation
from logitcache.cache.card import render_card
from logitcache.cache.manifest import SEALING_BYTES, read_manifest, read_receipts
from logitcache.cache.records import Records
from logitcache.cache.summary import Summary, Unreadable, find_caches, summarise
from logitcache.cli.application import main
from logitcache.cli.printing import cache_summary, print_caches, print_mapping
from logitcache.data.samples import SampleTable, sample_table
from logitcache.data.views import ViewPlan
from logitcache.encodings import Encoding, LowRank
from logitcache.errors import CorruptCache, LogitCacheError, UsageError
from logitcache.storage import open_storage
from logitcache.verify.audit import verify
from tests.durability.test_trust import rewrite_manifest

SAMPLES, CLASSES = 20, 6


def labels() -> Tensor:
    return torch.randn(SAMPLES, CLASSES, generator=torch.Generator().manual_seed(0)) * 3


def table(**changes: Any) -> SampleTable:
    parts: dict[str, Any] = {
        "num_samples": SAMPLES,
        "keys": [f"{row}.png" for row in range(SAMPLES)],
        "targets": np.arange(SAMPLES, dtype=np.int64) % CLASSES,
        "contents": np.zeros((SAMPLES, 16), dtype=np.uint8),
    }
    return SampleTable(**(parts | changes))


def build(path: Path, logits: Tensor | None = None, **changes: Any) -> Path:
    settings: dict[str, Any] = {"encoding": logitcache.Dense(), "teacher": "net@1", "num_samples": SAMPLES}
    settings |= {"num_classes": CLASSES, "rows_per_block": 8} | changes
    if "samples" not in settings:
        settings["dataset"] = "pictures"
    with logitcache.create(path, **settings) as writer:
        writer.write(view=0, start=0, logits=labels() if logits is None else logits)
    return path


def forge_manifest(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Somebody who knows the format, digest and all."""
    rewrite_manifest(path, change)
    with suppress(ValueError):  # records that no digest can be taken of
        manifest = read_manifest((path / "manifest.json").read_bytes(), url="")
        receipts = read_receipts((path / "receipts.json").read_bytes(), url="")
        if manifest.digest is not None:
            rewrite_manifest(path, lambda raw: raw.update(digest=Records(manifest, receipts).content_digest()))


# Sample tables

TABLES: dict[str, tuple[dict[str, Any], str]] = {
    "a key with a line break": ({"keys": ["a\nb", *map(str, range(19))]}, "contains a line break"),
    "a key twice": ({"keys": ["a", "b", "a", *map(str, range(17))]}, "1 sample keys repeat, the first being 'a'"),
    "19 keys of 20": ({"keys": [str(row) for row in range(19)]}, "20 samples has as many keys; found 19"),
    "21 keys of 20": ({"keys": [str(row) for row in range(21)]}, "20 samples has as many keys; found 21"),
    "targets too short": ({"targets": np.zeros(19, dtype=np.int64)}, r"targets .* int64 \(20,\); found int64 \(19,\)"),
    "targets of two ranks": ({"targets": np.zeros((20, 1), dtype=np.int64)}, r"found int64 \(20, 1\)"),
    "targets as fractions": ({"targets": np.zeros(20, dtype=np.float32)}, r"found float32 \(20,\)"),
    "contents too short": ({"contents": np.zeros((20, 15), dtype=np.uint8)}, r"contents .* found uint8 \(20, 15\)"),
    "contents of one rank": ({"contents": np.zeros(20, dtype=np.uint8)}, r"found uint8 \(20,\)"),
    "contents of another dtype": ({"contents": np.zeros((20, 16), dtype=np.int8)}, r"found int8 \(20, 16\)"),
}


@pytest.mark.parametrize(("changes", "message"), TABLES.values(), ids=TABLES.keys())
def test_a_sample_table_that_makes_no_sense_is_refused_when_it_is_made(changes: dict[str, Any], message: str) -> None:
    """By hand too, as for `create`."""
    with pytest.raises(UsageError, match=message):
        table(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"keys": [1, *map(str, range(19))]}, "a sample key is a string, not 1"),
        ({"keys": "abcdefghijklmnopqrst"}, "found one string"),
        ({"keys": ["\udcff.png", *map(str, range(19))]}, r"sample key '\\udcff.png' can't be written as UTF-8"),
        ({"targets": [0] * 20}, "found a list"),
    ],
    ids=["a number as key", "one string", "bytes that are no UTF-8", "a list of targets"],
)
def test_a_sample_table_of_other_types_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        table(**changes)


def test_a_sample_table_without_digests_says_what_is_missing(tmp_path: Path) -> None:
    class Pictures:
        targets = np.zeros(SAMPLES, dtype=np.int64)

        def __len__(self) -> int:
            return SAMPLES

        def __getitem__(self, index: int) -> tuple[int, int]:
            return index, 0

    with pytest.raises(UsageError, match="has no content digests"):
        build(tmp_path / "a", samples=sample_table(Pictures()))


@pytest.mark.parametrize("changes", [case[0] for case in TABLES.values()], ids=TABLES.keys())
def test_a_sample_table_that_makes_no_sense_is_refused_when_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    """As somebody else's program may have written it, with receipts that fit; `verify --deep` names it."""
    with monkeypatch.context() as patched:
        patched.setattr(SampleTable, "__post_init__", lambda self: None)
        patched.setattr("logitcache.cache.creation.write_card", lambda cache: None)
        path = build(tmp_path / "a", samples=table(**changes))
    assert_table_is_refused(path)


def assert_table_is_refused(path: Path) -> None:
    cache = logitcache.open(path)
    with pytest.raises(CorruptCache, match="its sample table is invalid"):
        _ = cache.samples
    with pytest.raises(CorruptCache, match="its sample table is invalid"):
        cache.rows(["3.png"])
    assert [("fixed", "damaged")] == [(problem.block, problem.kind) for problem in verify(str(path), deep=True)]


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda arrays: arrays.update(sample_keys=np.full(60, 255, dtype=np.uint8)), id="no UTF-8"),
        pytest.param(lambda arrays: arrays.pop("sample_contents"), id="no contents"),
        pytest.param(lambda arrays: arrays.pop("sample_targets"), id="no targets"),
    ],
)
def test_parts_of_a_sample_table_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[dict[str, Any]], object]
) -> None:
    def changed(samples: SampleTable | None) -> dict[str, np.ndarray]:
        arrays = stored(samples)
        change(arrays)
        return arrays

    stored = creation._sample_arrays
    with monkeypatch.context() as patched:
        patched.setattr(creation, "_sample_arrays", changed)
        patched.setattr("logitcache.cache.creation.write_card", lambda cache: None)
        path = build(tmp_path / "a", samples=table())
    assert_table_is_refused(path)


# Names of classes, and what is too long


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a"] * 5, "5 class_names for 6 classes"),
        (["a"] * 7, "7 class_names for 6 classes"),
        ("abcdef", "class_names is a list of strings"),
        ([1, 2, 3, 4, 5, 6], "class_names is a list of strings"),
        (["\ud800"] * 6, "can't be written as JSON: .*surrogates not allowed"),
    ],
    ids=["too few", "too many", "one string", "numbers", "no Unicode"],
)
def test_class_names_that_are_not_one_for_each_class_are_refused(tmp_path: Path, names: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build(tmp_path / "a", class_names=names)

    assert not (tmp_path / "a").exists()


def test_class_names_of_another_number_are_refused_when_they_are_read(tmp_path: Path) -> None:
    build(tmp_path / "a", class_names=list("abcdef"))
    forge_manifest(tmp_path / "a", lambda raw: raw["identity"].update(class_names=list("abcde")))
    for read in (logitcache.open, lambda path: summarise(str(path)), lambda path: verify(str(path))):
        with pytest.raises(CorruptCache, match="5 class names for 6 classes"):
            read(tmp_path / "a")


def test_two_classes_may_have_one_name(tmp_path: Path) -> None:
    """ImageNet has two cranes."""
    build(tmp_path / "a", class_names=["crane"] * CLASSES)

    assert ["crane"] * CLASSES == logitcache.open(tmp_path / "a").manifest.identity.class_names


def test_the_names_of_imagenet_22k_fit(tmp_path: Path) -> None:
    names = [f"n{number:08d} some animal, or a plant, with several names, {number}" for number in range(21_841)]
    logits = torch.zeros(2, len(names))
    build(tmp_path / "a", logits, num_samples=2, num_classes=len(names), class_names=names)

    assert names == logitcache.open(tmp_path / "a").manifest.identity.class_names


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param(
            {
                "class_names": ["a name that is long enough, and still not longer than names of classes are"] * 400_000,
                "num_classes": 400_000,
            },
            id="many",
        ),
        pytest.param({"class_names": ["x" * 3_000_000] * CLASSES}, id="long"),
        pytest.param({"card": {"description": "x" * 2**24}}, id="card"),
        pytest.param({"teacher": "x" * 2**24}, id="teacher"),
    ],
)
def test_a_manifest_that_nobody_could_read_is_never_begun(tmp_path: Path, changes: dict[str, Any]) -> None:
    """It is refused before anything is computed or written, not when the cache is read."""

    def calibrate() -> np.ndarray:
        raise AssertionError("computed before it was refused")

    settings = {"encoding": "auto", "calibration": calibrate} if "card" not in changes else {}
    with pytest.raises(UsageError, match=r"manifest\.json would have [\d,]+ bytes; the limit is 16,711,680"):
        build(tmp_path / "a", **settings, **changes)

    assert not (tmp_path / "a").exists()


def test_a_manifest_of_any_length_that_is_begun_can_be_read_when_it_is_sealed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sealing adds to it; that much is left free."""
    limit = 2**19
    monkeypatch.setattr("logitcache.cache.manifest.MAX_MANIFEST_BYTES", limit)
    build(tmp_path / "a", class_names=["x" * ((limit - SEALING_BYTES - 4000) // CLASSES)] * CLASSES)

    assert logitcache.open(tmp_path / "a").sealed
    assert (tmp_path / "a" / "manifest.json").stat().st_size > limit - 2**17
    with pytest.raises(UsageError, match=f"the limit is {limit - SEALING_BYTES:,}"):
        build(tmp_path / "b", class_names=["x" * (limit // CLASSES)] * CLASSES)


def test_a_card_that_would_make_the_manifest_too_long_leaves_the_cache_as_it_is(tmp_path: Path) -> None:
    build(tmp_path / "a")
    with pytest.raises(UsageError, match=r"manifest\.json would have"):
        build(tmp_path / "a", card={"description": "x" * 2**24})

    assert [] == verify(str(tmp_path / "a"), deep=True)


# Views

TRANSFORMS: dict[str, Any] = {
    "a name": "RandomCrop",
    "a list": [1, 2],
    "no parts": {},
    "a part too few": {"shared": None, "mixing": None},
    "a part too many": {"shared": None, "mixing": None, "teacher_input": None, "more": 1},
    "mixing as a list": {"shared": None, "mixing": [1], "teacher_input": None},
    "mixing of other names": {"shared": None, "mixing": {"beta": 1.0}, "teacher_input": None},
    "mixing as text": {"shared": None, "mixing": {"mixup": "1", "cutmix": 0, "probability": 1}, "teacher_input": None},
    "mixing as truth": {
        "shared": None,
        "mixing": {"mixup": True, "cutmix": 0, "probability": 1},
        "teacher_input": None,
    },
    "mixing below 0": {"shared": None, "mixing": {"mixup": -1, "cutmix": 0, "probability": 1}, "teacher_input": None},
    "mixing for ever": {
        "shared": None,
        "mixing": {"mixup": 1e300, "cutmix": 0, "probability": 1},
        "teacher_input": None,
    },
    "mixing too often": {"shared": None, "mixing": {"mixup": 1, "cutmix": 0, "probability": 2}, "teacher_input": None},
    "a number as step": {"shared": [1], "mixing": None, "teacher_input": None},
    "a transform that is none": {"shared": [{"os": {}}], "mixing": None, "teacher_input": None},
    "parameters as a list": {"shared": [{"RandomCrop": [1]}], "mixing": None, "teacher_input": None},
    "two names in a step": {"shared": [{"RandomCrop": {}, "Resize": {}}], "mixing": None, "teacher_input": None},
    "steps as a number": {"shared": [{"RandomApply": {"transforms": 3}}], "mixing": None, "teacher_input": None},
    "steps within steps": {"shared": None, "mixing": None, "teacher_input": [{"Compose": {"transforms": [[1]]}}]},
    "a digest of nothing": {"shared": ["tests.models:shift@"], "mixing": None, "teacher_input": None},
    "an object": {"shared": {"class": "x.Y"}, "mixing": None, "teacher_input": None},
}


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS.keys())
def test_a_description_of_views_that_makes_no_sense_is_an_error_of_ours(tmp_path: Path, transform: Any) -> None:
    build(tmp_path / "a", view_plan=ViewPlan(), samples=table())
    forge_manifest(tmp_path / "a", lambda raw: raw["identity"].update(transform=transform))
    refused = used(tmp_path / "a")

    assert refused & {"open", "view_plan"}
    assert refused <= {"open", "info", "verify", "view_plan", "check_plan", "output"}


def test_a_transform_of_very_many_layers_is_an_error_of_ours(tmp_path: Path) -> None:
    """As deep as JSON that is read at all may be."""
    build(tmp_path / "a", view_plan=ViewPlan())
    for depth in (50, 150, 240, 300, 400):
        spec: Any = ["RandomHorizontalFlip"]
        for _ in range(depth):
            spec = [{"Compose": {"transforms": spec}}]
        path = shutil.copytree(tmp_path / "a", tmp_path / str(depth))
        with suppress(RecursionError):  # JSON that nobody can write
            forge_manifest(path, lambda raw, spec=spec: raw["identity"]["transform"].update(shared=spec))
        used(path)


def used(path: Path) -> set[str]:
    """Which uses of a cache end in an error of ours; any other error fails the test."""
    refused = set()

    def use(name: str, do: Callable[[], object]) -> None:
        try:
            do()
        except LogitCacheError:
            refused.add(name)

    def printed() -> None:
        caches = [
            {"url": each.url} | cache_summary(each) for each in find_caches(str(path)) if isinstance(each, Summary)
        ]
        print_caches(str(path), caches, [])

    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        use("ls", printed)
        use("info", lambda: print_mapping(str(path), cache_summary(summarise(str(path)))))
        use("verify", lambda: verify(str(path), deep=True))
        try:
            cache = logitcache.open(path, trust=True)
        except LogitCacheError:
            return refused | {"open"}
        use("view_plan", lambda: cache.view_plan)
        use("check_plan", lambda: cache.check_plan(ViewPlan(seed=3)))
        use("samples", lambda: cache.samples)
        use("rows", lambda: cache.rows(["3.png"]))
        use("digests", lambda: cache.input_digests(0))
        use("logits", lambda: cache.view(0).logits([0, 3, SAMPLES - 1]))
        use("streamed", lambda: cache.view(0, memory_budget=1).logits([0, 3, SAMPLES - 1]))
        use("output", lambda: cache.view(0).output("features", [0, 3]))
        use("card", lambda: render_card(cache))
    return refused


# Labels


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize(
    "kind", [logitcache.Dense, logitcache.TopK, logitcache.encodings.Values], ids=lambda kind: kind.name
)
def test_labels_that_are_not_finite_are_found_by_verify(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Any, value: float, dtype: str
) -> None:
    """As an older version, or somebody else's program, may have stored them; the receipts fit."""
    logits = labels()
    logits[9, 2] = value
    settings: dict[str, Any] = {"encoding": kind(dtype=dtype, **({"k": 2} if kind is logitcache.TopK else {}))}
    with monkeypatch.context() as patched:
        for each in (Encoding, logitcache.encodings.Values):
            patched.setattr(each, "refused", lambda self, logits_BC: torch.zeros(len(logits_BC), dtype=torch.bool))
        path = build(tmp_path / "a", logits, **settings)

    assert [] == verify(str(path))
    assert {("v00000/b00001", "not finite")} == {(each.block, each.kind) for each in verify(str(path), deep=True)}


def test_a_row_of_masked_classes_only_is_found_by_verify(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logits = labels()
    logits[9] = -torch.inf
    with monkeypatch.context() as patched:
        patched.setattr(Encoding, "refused", lambda self, logits_BC: torch.zeros(len(logits_BC), dtype=torch.bool))
        path = build(tmp_path / "a", logits, encoding=logitcache.Dense(dtype="float32"))

    assert ["not finite"] == [problem.kind for problem in verify(str(path), deep=True)]


@pytest.mark.parametrize(
    "encoding",
    [
        logitcache.Dense(dtype="float32"),
        logitcache.Dense(),
        logitcache.Dense(dtype="uint8"),
        logitcache.TopK(k=2),
        logitcache.PackedTopK(k=2),
        logitcache.Sampled(draws=9, packed=True),
    ],
    ids=repr,
)
def test_masked_classes_pass(tmp_path: Path, encoding: Encoding) -> None:
    logits = labels()
    logits[9, 2:] = -torch.inf
    logits[10, 1:] = -torch.inf

    assert [] == verify(str(build(tmp_path / "a", logits, encoding=encoding)), deep=True)


FITTED: dict[str, Callable[[dict[str, np.ndarray]], object]] = {
    "basis of another dtype": lambda fitted: fitted.update(basis=fitted["basis"].astype(np.float32)),
    "mean of another dtype": lambda fitted: fitted.update(mean=fitted["mean"].astype(np.float16)),
    "whole numbers as mean": lambda fitted: fitted.update(mean=fitted["mean"].astype(np.int64)),
    "limits of another dtype": lambda fitted: fitted.update(limits=fitted["limits"].astype(np.float32)),
    "costs of another dtype": lambda fitted: fitted.update(bit_costs=fitted["bit_costs"].astype(np.float16)),
    "mean of two ranks": lambda fitted: fitted.update(mean=fitted["mean"][:, None]),
    "limits of two ranks": lambda fitted: fitted.update(limits=fitted["limits"][:, None]),
    "basis too narrow": lambda fitted: fitted.update(basis=fitted["basis"][:, 1:].copy()),
    "basis of one rank": lambda fitted: fitted.update(basis=fitted["basis"][0]),
    "NaN in the basis": lambda fitted: fitted.update(basis=np.full_like(fitted["basis"], np.nan)),
    "an infinite mean": lambda fitted: fitted.update(mean=np.full_like(fitted["mean"], np.inf)),
    "limits of 0": lambda fitted: fitted.update(limits=np.zeros_like(fitted["limits"])),
    "wider limits": lambda fitted: fitted.update(limits=np.full_like(fitted["limits"], 32_767)),
}


@pytest.mark.parametrize("change", FITTED.values(), ids=FITTED.keys())
def test_fitted_arrays_that_make_no_sense_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[dict[str, np.ndarray]], object]
) -> None:
    def changed(encoding: LowRank) -> dict[str, np.ndarray]:
        fitted = values_of(encoding)
        change(fitted)
        return fitted

    values_of = LowRank.fitted_values
    with monkeypatch.context() as patched:
        patched.setattr(LowRank, "fitted_values", changed)
        path = build(tmp_path / "a", encoding=LowRank(rank=3), calibration=labels())
    with pytest.raises(CorruptCache, match="the fitted arrays of lowrank are invalid"):
        logitcache.open(path).view(0)

    assert [("fixed", "damaged")] == [(problem.block, problem.kind) for problem in verify(str(path), deep=True)]


# Places


def test_ls_lists_the_others_beside_a_damaged_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a", "b", "c", "d", "e"):
        build(tmp_path / "caches" / name)
    (tmp_path / "caches/e/manifest.json").write_text("{" * 700)
    (tmp_path / "caches/web").mkdir()
    (tmp_path / "caches/web/manifest.json").write_text("not ours")
    text = (tmp_path / "caches/b/manifest.json").read_text()
    (tmp_path / "caches/b/manifest.json").write_text(text.replace('"net@1"', '"net@2"'))
    (tmp_path / "caches/c/manifest.json").write_text(text.replace('"format_version": ', '"format_version": 9'))
    found = find_caches(str(tmp_path / "caches"))
    monkeypatch.setattr(sys, "argv", ["logitcache", "ls", str(tmp_path / "caches")])
    with pytest.raises(SystemExit) as left:
        main()
    shown = capsys.readouterr()
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--json"])
    with pytest.raises(SystemExit):
        main()
    listed = json.loads(capsys.readouterr().out)

    assert [Summary, Unreadable, Unreadable, Summary, Unreadable] == [type(each) for each in found]
    assert ["CorruptCache", "UnsupportedFormat", "CorruptCache"] == [
        each.kind for each in found if isinstance(each, Unreadable)
    ]
    assert 1 == left.value.code
    assert "caches/a" in shown.out
    assert "caches/b: manifest.json is damaged" in shown.err
    assert "caches/c has format version" in shown.err
    assert ["a", "d"] == [Path(each["url"]).name for each in listed["caches"]]
    assert ["b", "c", "e"] == [Path(each["url"]).name for each in listed["unreadable"]]


@pytest.mark.parametrize(
    "location",
    [
        "s3://[x/y",
        "https://[::1/a.cache",
        "http://host:99999/a.cache",
        "http://host:port/a.cache",
        "file://[/a.cache",
        "s3://\u2100/x",
        "file:///a%00b",
        "a\0b",
        "~nobody-of-this-name/a.cache",
        "\ud800",
        "s3://",
    ],
)
def test_a_location_that_is_none_is_an_error_of_ours(location: str) -> None:
    for use in (open_storage, logitcache.open, find_caches, lambda where: verify(where)):
        with pytest.raises(UsageError):
            use(location)


@pytest.mark.parametrize("name", ["a[b", "[x", "a:b", "a%zz", "a#b?c"])
def test_odd_names_of_folders_are_fine(tmp_path: Path, name: str) -> None:
    build(tmp_path / name)

    assert logitcache.open(os.fsencode(tmp_path / name).decode()).sealed
