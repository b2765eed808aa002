"""Writing a cache and reading it again."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from torch import Tensor

import logitcache
from logitcache.cache.layout import encode_block
from logitcache.data.samples import SampleTable, content_table, sample_table
from logitcache.digest import sha256_hex
from logitcache.errors import (
    CorruptCache,
    IdentityMismatch,
    IncompleteCache,
    InvalidLogits,
    NotACache,
    ShapeError,
    UnsupportedFormat,
    UsageError,
)
from logitcache.verify.audit import verify
from tests.models import Pictures

VIEWS, SAMPLES, CLASSES = 2, 100, 30
ENCODINGS = [logitcache.Dense(dtype="float32"), logitcache.TopK(k=5)]


def some_logits(seed: int = 0) -> Tensor:
    return torch.randn(VIEWS, SAMPLES, CLASSES, generator=torch.Generator().manual_seed(seed)) * 3


def writer(path: Path, **changes: object) -> logitcache.CacheWriter:
    settings = {
        "num_samples": SAMPLES,
        "num_classes": CLASSES,
        "num_views": VIEWS,
        "encoding": ENCODINGS[0],
        "teacher": "net@1",
        "dataset": "pictures",
        "rows_per_block": 32,
    }
    return logitcache.create(path, **(settings | changes))  # type: ignore[arg-type]


def built(path: Path, **changes: object) -> logitcache.LogitCache:
    with writer(path, **changes) as cache:
        for view, logits in enumerate(some_logits()[: cache.layout.num_views]):
            cache.write(view=view, start=0, logits=logits)
    return logitcache.open(path)


@pytest.mark.parametrize("encoding", ENCODINGS, ids=repr)
def test_rows_written_in_any_order_read_back(tmp_path: Path, encoding: logitcache.Dense | logitcache.TopK) -> None:
    logits = some_logits()
    with writer(tmp_path / "a", encoding=encoding) as cache:
        cache.write(view=1, start=70, logits=logits[1, 70:].numpy())
        cache.write(view=0, start=0, logits=logits[0].double())
        cache.write(view=1, start=0, logits=logits[1, :70])
    index = torch.randperm(SAMPLES)[:17]
    for view in range(VIEWS):
        expected = encoding.decode(encoding.encode(logits[view, index]), CLASSES)
        assert torch.equal(expected, logitcache.open(tmp_path / "a").view(view).logits(index))


@pytest.mark.parametrize(
    "index", [[3, 99, 0], np.array([3, 99, 0]), torch.tensor([3, 99, 0], dtype=torch.int32)], ids=type
)
def test_an_index_is_a_list_an_array_or_a_tensor(tmp_path: Path, index: object) -> None:
    assert torch.equal(some_logits()[0, [3, 99, 0]], built(tmp_path / "a").view(0).logits(index))


def test_how_rows_were_batched_does_not_show_in_the_digest(tmp_path: Path) -> None:
    logits = some_logits()
    with writer(tmp_path / "b") as cache:
        for view in (1, 0):
            for start in (90, 0, 40, 80, 20, 60):
                stop = {90: 100, 80: 90}.get(start, start + 20)
                cache.write(view=view, start=start, logits=logits[view, start:stop])

    assert built(tmp_path / "a").digest == logitcache.open(tmp_path / "b").digest


def test_a_view_beyond_the_memory_budget_streams_the_same_logits(tmp_path: Path) -> None:
    cache = built(tmp_path / "a")
    streamed = cache.view(1, memory_budget=cache.view_bytes // 2)
    index = torch.randperm(SAMPLES)

    assert type(streamed) is not type(cache.view(1))
    assert torch.equal(cache.view(1).logits(index), streamed.logits(index))


def test_a_prefetched_view_is_the_view(tmp_path: Path) -> None:
    cache = built(tmp_path / "a")
    cache.prefetch(1)

    assert torch.equal(some_logits()[1], cache.view(1).logits(range(SAMPLES)))


def test_leaving_with_rows_missing_says_which(tmp_path: Path) -> None:
    with pytest.raises(IncompleteCache, match=r"5 of 8 blocks are missing.\n  view 0: 14 rows from 50 to 63") as caught:
        with writer(tmp_path / "a") as cache:
            cache.write(view=0, start=0, logits=some_logits()[0, :50])
            cache.write(view=1, start=0, logits=some_logits()[1, :70])

    assert "view 0: rows 64 to 95" in str(caught.value)
    assert not logitcache.open(tmp_path / "a").sealed


def test_a_writer_goes_on_where_another_stopped(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), writer(tmp_path / "a") as cache:
        cache.write(view=0, start=0, logits=some_logits()[0, :40])
        raise KeyboardInterrupt
    with writer(tmp_path / "a") as cache:
        missing = cache.missing_blocks()
        for view in range(VIEWS):
            cache.write(view=view, start=0, logits=some_logits()[view])

    assert 7 == len(missing) == len(cache.committed_blocks)
    assert built(tmp_path / "b").digest == logitcache.open(tmp_path / "a").digest


def test_views_can_be_added_to_a_sealed_cache(tmp_path: Path) -> None:
    one = built(tmp_path / "a", num_views=1)
    with writer(tmp_path / "a", num_views=2) as cache:
        assert [(1, number) for number in range(4)] == [(block.view, block.number) for block in cache.missing_blocks()]
        cache.write(view=1, start=0, logits=some_logits()[1])
    two = logitcache.open(tmp_path / "a")

    assert one.id == two.id
    assert built(tmp_path / "b").digest == two.digest
    assert [] == verify(str(tmp_path / "a"), deep=True)
    assert torch.equal(some_logits()[1], two.view(1).logits(range(SAMPLES)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param({"teacher": "net@2"}, "teacher: net@1 in the cache, net@2 here", id="teacher"),
        pytest.param({"dataset": "photos"}, "dataset: pictures in the cache, photos here", id="dataset"),
        pytest.param({"encoding": "TopK(k=3)"}, r"encoding\.", id="encoding"),
        pytest.param({"num_samples": 99}, "num_samples: 100 in the cache, 99 here", id="samples"),
        pytest.param({"rows_per_block": 16}, "rows_per_block: 32 in the cache, 16 here", id="blocks"),
        pytest.param({"num_classes": 31}, r"outputs.logits\[0\]: 30 in the cache, 31 here", id="classes"),
        pytest.param({"precision": "bfloat16"}, "precision: float32 in the cache, bfloat16 here", id="precision"),
    ],
)
def test_another_cache_under_the_same_name_is_refused(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    before = built(tmp_path / "a").digest
    with pytest.raises(IdentityMismatch, match=message):
        writer(tmp_path / "a", **changes)

    assert before == logitcache.open(tmp_path / "a").digest


@pytest.mark.parametrize(
    "bad",
    [
        pytest.param([float("nan")] + [0.0] * 29, id="NaN"),
        pytest.param([float("inf")] + [0.0] * 29, id="+inf"),
        pytest.param([float("-inf")] * 30, id="all masked"),
    ],
)
def test_logits_that_are_no_distribution_are_refused_by_row(tmp_path: Path, bad: list[float]) -> None:
    logits = some_logits()[0]
    logits[41] = torch.tensor(bad)
    with (
        pytest.raises(InvalidLogits, match="view 0, row 41: the teacher's logits hold NaN"),
        writer(tmp_path / "a") as cache,
    ):
        cache.write(view=0, start=0, logits=logits)

    assert {"fixed", "v00000/b00000"} >= logitcache.open(tmp_path / "a").receipts.keys()


@pytest.mark.parametrize(
    ("place", "shape"), [((0, 0), (4, 29)), ((0, 98), (4, 30)), ((2, 0), (4, 30)), ((0, -1), (4, 30)), ((0, 0), (30,))]
)
def test_rows_that_do_not_fit_are_refused(tmp_path: Path, place: tuple[int, int], shape: tuple[int, ...]) -> None:
    cache = writer(tmp_path / "a")
    with pytest.raises(ShapeError):
        cache.write(view=place[0], start=place[1], logits=torch.zeros(shape))
    cache.close()


def test_receipts_carry_the_fidelity_of_their_block(tmp_path: Path) -> None:
    cache = built(tmp_path / "a", encoding=ENCODINGS[1])
    receipt = cache.receipts["v00001/b00003"]
    decoded = cache.view(1).logits(range(96, 100))
    expected = logitcache.losses.kl_divergence(decoded, some_logits()[1, 96:])

    assert 4 == receipt.rows
    assert receipt.kl_mean == pytest.approx(float(expected.mean()), rel=1e-5)
    assert receipt.kl_max == pytest.approx(float(expected.max()), rel=1e-5)


def test_plain_zarr_reads_the_labels(tmp_path: Path) -> None:
    cache = built(tmp_path / "a", encoding=ENCODINGS[1])
    group = zarr.open_group(tmp_path / "a" / "labels.zarr", mode="r")

    assert (VIEWS, SAMPLES, 5) == group["ids"].shape
    ids = torch.from_numpy(np.asarray(group["ids"][1]).astype(np.int64))
    assert torch.equal(some_logits()[1].topk(5).indices, ids)
    assert cache.encoding == ENCODINGS[1]


@pytest.mark.parametrize("encoding", [*ENCODINGS, logitcache.LowRank(rank=5, k=1)], ids=repr)
def test_a_chunk_is_what_zarr_makes_of_the_same_values(tmp_path: Path, encoding: logitcache.Dense) -> None:
    cache = built(tmp_path / "a", encoding=encoding, calibration=some_logits(1).flatten(0, 1))
    labels = zarr.open_group(tmp_path / "a" / "labels.zarr", mode="r")
    again = zarr.create_group(tmp_path / "b", zarr_format=3)
    for name in cache.layout.arrays:
        written = again.create_array(name=name, data=np.asarray(labels[name]), **_codecs(labels[name]))
        for path in sorted((tmp_path / "a" / "labels.zarr" / name / "c").rglob("*")):
            if path.is_file():
                theirs = tmp_path / "b" / written.path / path.relative_to(tmp_path / "a" / "labels.zarr" / name)
                assert path.read_bytes() == theirs.read_bytes(), path


def _codecs(array: zarr.Array) -> dict[str, object]:
    return {
        "chunks": array.chunks,
        "filters": array.filters,
        "serializer": array.serializer,
        "compressors": array.compressors,
        "config": {"write_empty_chunks": True},
    }


@pytest.mark.parametrize("encoding", ENCODINGS, ids=repr)
def test_any_flipped_bit_of_a_label_is_noticed(tmp_path: Path, encoding: logitcache.Dense) -> None:
    built(tmp_path / "a", encoding=encoding)
    victim = sorted((tmp_path / "a" / "labels.zarr").rglob("c/1/2*"))[0]
    victim = victim if victim.is_file() else victim / "0"
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data)

    with pytest.raises(CorruptCache, match="differs from its receipt"):
        logitcache.open(tmp_path / "a").view(1)
    assert [] == verify(str(tmp_path / "a"))
    (problem,) = verify(str(tmp_path / "a"), deep=True)
    assert ("v00001/b00002", "wrong bytes") == (problem.block, problem.kind)


def test_a_block_that_says_something_else_is_noticed_though_its_bytes_have_a_receipt(tmp_path: Path) -> None:
    """Somebody rewrote a block and its receipt; the digest of the cache still covers the values."""
    cache = built(tmp_path / "a")
    zeros = encode_block(cache.layout.arrays["logits"], np.zeros((32, CLASSES), np.float32), 32)
    (tmp_path / "a" / "labels.zarr/logits/c/0/1/0").write_bytes(zeros)
    stored = cache.receipts["v00000/b00001"].objects["logits"]
    receipts = (tmp_path / "a" / "receipts.json").read_text()
    receipts = receipts.replace(stored.sha256, sha256_hex(zeros)).replace(
        f'"bytes":{stored.bytes}', f'"bytes":{len(zeros)}'
    )
    (tmp_path / "a" / "receipts.json").write_text(receipts)

    found = {(problem.block, problem.kind) for problem in verify(str(tmp_path / "a"), deep=True)}
    assert ("v00000/b00001", "wrong values") in found


@pytest.mark.parametrize("name", ["sample_targets", "sample_contents"])
def test_the_sample_table_is_held_to_its_values(tmp_path: Path, name: str) -> None:
    built(tmp_path / "a", samples=pictures_table(), dataset=None)
    chunk = next(path for path in sorted((tmp_path / "a/labels.zarr" / name / "c").rglob("*")) if path.is_file())
    chunk.write_bytes(chunk.read_bytes()[:-1] + b"?")

    with pytest.raises(CorruptCache, match=f"{name}/c/0.* differs from its receipt"):
        assert logitcache.open(tmp_path / "a").samples


def test_views_that_were_asked_for_by_mistake_can_be_taken_back(tmp_path: Path) -> None:
    digest = built(tmp_path / "a").digest
    with pytest.raises(KeyboardInterrupt), writer(tmp_path / "a", num_views=80) as cache:
        cache.write(view=17, start=0, logits=some_logits()[0])
        raise KeyboardInterrupt
    with writer(tmp_path / "a", num_views=1) as cache:
        assert [] == cache.missing_blocks()

    assert (2, digest) == (logitcache.open(tmp_path / "a").num_views, logitcache.open(tmp_path / "a").digest)
    assert [] == verify(str(tmp_path / "a"), deep=True)


def test_verify_names_what_is_missing_cut_short_and_strange(tmp_path: Path) -> None:
    built(tmp_path / "a")
    labels = tmp_path / "a" / "labels.zarr" / "logits" / "c"
    (labels / "0" / "1" / "0").unlink()
    (labels / "1" / "0" / "0").write_bytes(b"short")
    (labels / "1" / "stray").write_bytes(b"")

    found = {(problem.block, problem.kind) for problem in verify(str(tmp_path / "a"))}
    assert {("v00000/b00001", "missing"), ("v00001/b00000", "wrong size"), ("", "stray")} == found


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "thesis.tex").write_text("dear")
    with pytest.raises(NotACache, match=r"holds thesis.tex"):
        writer(tmp_path / "a")
    with pytest.raises(NotACache, match="`logitcache cache-teacher` builds a cache"):
        logitcache.open(tmp_path / "a")

    assert ["thesis.tex"] == [path.name for path in (tmp_path / "a").iterdir()]


def test_a_newer_format_is_named_and_not_touched(tmp_path: Path) -> None:
    built(tmp_path / "a")
    manifest = tmp_path / "a" / "manifest.json"
    raw = json.loads(manifest.read_text())
    raw["identity"]["format_version"] = 3
    raw["a new field"] = True
    manifest.write_text(json.dumps(raw) + "\n")
    with pytest.raises(UnsupportedFormat, match="format version 3; this logitcache reads up to 2: upgrade"):
        logitcache.open(tmp_path / "a")
    with pytest.raises(UnsupportedFormat):
        writer(tmp_path / "a")


def test_an_edited_manifest_is_noticed(tmp_path: Path) -> None:
    built(tmp_path / "a")
    manifest = tmp_path / "a" / "manifest.json"
    manifest.write_text(manifest.read_text().replace("net@1", "net@9"))

    with pytest.raises(CorruptCache, match="its identity hashes to"):
        logitcache.open(tmp_path / "a")


def pictures_table() -> SampleTable:
    return replace(sample_table(Pictures(SAMPLES)), contents=content_table(Pictures(SAMPLES)))


def test_samples_are_found_by_key(tmp_path: Path) -> None:
    cache = built(tmp_path / "a", samples=pictures_table(), dataset=None)

    assert [7, 0, 99] == cache.rows(["scan/0007.png", "scan/0000.png", "scan/0099.png"]).tolist()
    with pytest.raises(IdentityMismatch, match="sample 'scan/0100.png' is not in the cache"):
        cache.rows(["scan/0100.png"])


class CountedKeys(list[str]):
    """Counts how often all keys are read."""

    readings = 0

    def __iter__(self) -> Iterator[str]:
        self.readings += 1
        return super().__iter__()


def test_finding_one_key_after_another_reads_the_keys_once() -> None:
    """As a loop over a stream does, with `cache.rows([key])` for each sample."""
    keys = CountedKeys(f"scan/{number}" for number in range(50))
    table = SampleTable(num_samples=50, keys=keys, targets=np.zeros(50, dtype=np.int64), contents=None)
    before = keys.readings
    rows = [int(table.rows([f"scan/{number}"])[0]) for number in range(50)]

    assert list(range(50)) == rows
    assert 1 == keys.readings - before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param({"num_classes": 1}, "at least 1 sample, 1 view and 2 classes", id="one class"),
        pytest.param({"encoding": "TopK(k=30)"}, "keeps every one of 30 classes", id="k is C"),
        pytest.param({"dataset": None}, "create needs the identity of the dataset", id="no dataset"),
        pytest.param({"rows_per_block": 0}, "rows_per_block is at least 1", id="no rows"),
    ],
)
def test_a_cache_that_can_not_be_is_refused_before_a_folder_is_made(
    tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        writer(tmp_path / "a", **changes)

    assert not (tmp_path / "a").exists()


def calibration(seed: int = 7) -> Tensor:
    return torch.randn(300, CLASSES, generator=torch.Generator().manual_seed(seed)) * 3


def test_a_fitted_encoding_is_fitted_once(tmp_path: Path) -> None:
    """A build that goes on, or grows, takes the basis that is stored, whatever it is calibrated with."""
    encoding = logitcache.LowRank(rank=6, k=2)
    whole = built(tmp_path / "whole", encoding=encoding, calibration=calibration())

    def never() -> Tensor:
        raise AssertionError("asked for calibration though the basis is stored")

    first = writer(tmp_path / "parts", encoding=encoding, calibration=calibration, num_views=1)
    first.write(view=0, start=0, logits=some_logits()[0, :50])
    first.flush()
    first.close()
    with writer(tmp_path / "parts", encoding=encoding, calibration=never) as second:
        for view in range(VIEWS):
            second.write(view=view, start=0, logits=some_logits()[view])
    parts = logitcache.open(tmp_path / "parts")

    assert (whole.id, whole.digest) == (parts.id, parts.digest)
    assert torch.equal(whole.view(1).logits(range(SAMPLES)), parts.view(1).logits(range(SAMPLES)))
    assert [] == verify(str(tmp_path / "parts"), deep=True)


def test_a_build_cut_off_before_its_basis_was_stored_begins_again(tmp_path: Path) -> None:
    encoding = logitcache.LowRank(rank=6, k=2)
    begun = writer(tmp_path / "a", encoding=encoding, calibration=calibration())
    begun.close()
    (tmp_path / "a/receipts/fixed.json").unlink()
    cache = built(tmp_path / "a", encoding=encoding, calibration=calibration(8))

    assert cache.digest == built(tmp_path / "b", encoding=encoding, calibration=calibration(8)).digest


def test_rows_are_encoded_together_as_the_encoding_states(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the batches, but never rows of two sequences."""
    together: list[int] = []
    encode = logitcache.Dense.encode

    def watched(self: logitcache.Dense, logits_BC: Tensor, **where: int) -> dict[str, Tensor]:
        together.append(len(logits_BC))
        return encode(self, logits_BC, **where)

    monkeypatch.setattr(logitcache.Dense, "rows_at_once", lambda encoding, num_classes: 40)
    monkeypatch.setattr(logitcache.Dense, "encode", watched)
    with writer(tmp_path / "a", num_views=1, rows_per_block=100) as cache:
        for start in range(0, SAMPLES, 10):
            cache.write(view=0, start=start, logits=some_logits()[0, start : start + 10])
    sequences = {"num_samples": 2, "rows_per_sample": [50, 50]}
    built(tmp_path / "b", num_views=1, rows_per_block=100, **sequences)

    assert [40, 40, 20] + [40, 10, 40, 10] == together


def test_batches_never_show_in_a_fitted_encoding(tmp_path: Path) -> None:
    digests = set()
    for number, size in enumerate((1, 7, 32, 100)):
        encoding = logitcache.LowRank(rank=6, k=2)
        with writer(tmp_path / str(number), encoding=encoding, calibration=calibration()) as cache:
            for view in range(VIEWS):
                for start in range(0, SAMPLES, size):
                    cache.write(view=view, start=start, logits=some_logits()[view, start : start + size])
        digests.add(logitcache.open(tmp_path / str(number)).digest)

    assert 1 == len(digests)


def test_a_damaged_basis_is_noticed(tmp_path: Path) -> None:
    cache = built(tmp_path / "a", encoding=logitcache.LowRank(rank=6), calibration=calibration())
    (tmp_path / "a/labels.zarr/basis/c/0/0").write_bytes(b"nothing")

    with pytest.raises(CorruptCache, match="basis/c/0/0 differs from its receipt"):
        cache.view(0)
    assert {("fixed", "wrong size")} == {(problem.block, problem.kind) for problem in verify(str(tmp_path / "a"))}


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        pytest.param({}, UsageError, "needs a sample of the teacher's logits", id="none"),
        pytest.param({"calibration": np.zeros((300, 7))}, UsageError, r"\(300, 7\); expected \(M, 30\)", id="classes"),
        pytest.param(
            {"calibration": np.full((300, 30), np.nan)}, InvalidLogits, "calibration logits contain NaN", id="NaN"
        ),
        pytest.param({"calibration": np.zeros((4, 30))}, UsageError, "more rows than the rank", id="few rows"),
    ],
)
def test_calibration_that_will_not_do_is_refused(
    tmp_path: Path, settings: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        writer(tmp_path / "a", encoding=logitcache.LowRank(rank=6), **settings)
    assert [] == list(tmp_path.iterdir())


def test_masked_classes_are_refused_where_they_can_not_be_held(tmp_path: Path) -> None:
    cache = writer(tmp_path / "a", encoding=logitcache.LowRank(rank=6), calibration=calibration())
    logits = some_logits()[0]
    logits[40, 3] = -torch.inf
    with pytest.raises(InvalidLogits, match=r"row 40: .*(?s:.*)lowrank can't store masked classes: use Dense"):
        cache.write(view=0, start=0, logits=logits)


def test_auto_takes_the_cheapest_encoding_within_its_limit(tmp_path: Path) -> None:
    strict = built(tmp_path / "strict", encoding="auto", calibration=calibration())
    loose = built(tmp_path / "loose", encoding={"name": "auto", "max_kl": 0.5}, calibration=calibration())

    assert logitcache.Dense(dtype="uint8") == strict.encoding
    assert strict.kl_mean is not None
    assert strict.kl_mean < 0.01
    assert loose.target_bytes < strict.target_bytes
    assert {"name": "auto", "max_kl": 0.01} == strict.manifest.provenance["encoding"]["chosen_by"]
    # It goes on with what was chosen, and only for the same limit.
    writer(tmp_path / "strict", encoding="auto").close()
    with pytest.raises(IdentityMismatch, match="chosen by"):
        writer(tmp_path / "strict", encoding=logitcache.Auto(max_kl=0.5))


def test_auto_takes_the_most_accurate_encoding_within_its_bytes(tmp_path: Path) -> None:
    auto = logitcache.Auto(max_bytes=30, temperature=2)
    cache = built(tmp_path / "a", encoding=auto, calibration=calibration())
    choice = cache.manifest.provenance["encoding"]

    assert {"name": "auto", "max_bytes": 30.0, "temperature": 2.0} == choice["chosen_by"]
    assert 0 < choice["bytes_per_row"] <= 30
    writer(tmp_path / "a", encoding=auto).close()
    with pytest.raises(IdentityMismatch, match="chosen by"):
        writer(tmp_path / "a", encoding="auto")


def test_limits_that_no_encoding_keeps_are_refused_before_a_file_is_written(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"within 1 bytes per row; the smallest, .* takes .* bytes and loses"):
        writer(tmp_path / "a", encoding=logitcache.Auto(max_bytes=1), calibration=calibration())
    assert [] == list(tmp_path.iterdir())


def test_sampled_labels_have_no_divergence_to_state(tmp_path: Path) -> None:
    cache = built(tmp_path / "a", encoding=logitcache.Sampled(draws=20))

    assert cache.kl_mean is None
    shares = cache.view(1).logits(range(SAMPLES)).exp()
    torch.testing.assert_close(shares.sum(dim=1), torch.ones(SAMPLES))
    again = built(tmp_path / "b", encoding=logitcache.Sampled(draws=20))
    assert cache.digest == again.digest


def test_blocks_in_the_terms_of_a_lost_basis_are_computed_again(tmp_path: Path) -> None:
    encoding = logitcache.LowRank(rank=6)
    begun = writer(tmp_path / "a", encoding=encoding, calibration=calibration())
    begun.write(view=0, start=0, logits=some_logits()[0, :40])
    begun.flush()
    begun.close()
    (tmp_path / "a/receipts/fixed.json").write_text("{")
    with pytest.raises(IncompleteCache):
        logitcache.open(tmp_path / "a").view(0)
    cache = built(tmp_path / "a", encoding=encoding, calibration=calibration(8))

    assert cache.digest == built(tmp_path / "b", encoding=encoding, calibration=calibration(8)).digest


def test_a_block_that_is_written_twice_is_stored_once(tmp_path: Path) -> None:
    for number in range(10):
        with writer(tmp_path / str(number), num_views=1) as cache:
            cache.write(view=0, start=0, logits=some_logits()[0])
            cache.write(view=0, start=0, logits=some_logits()[0])
        assert [] == verify(str(tmp_path / str(number)), deep=True)
        assert torch.equal(some_logits()[0], logitcache.open(tmp_path / str(number)).view(0).logits(range(SAMPLES)))


def test_an_encoding_that_is_fitted_already_needs_no_calibration(tmp_path: Path) -> None:
    encoding = logitcache.LowRank(rank=6)
    fitted = built(tmp_path / "a", encoding=encoding.fit(calibration()))
    other = built(tmp_path / "b", encoding=encoding, calibration=calibration())

    assert (other.id, other.digest) == (fitted.id, fitted.digest)


def test_a_shape_that_can_not_be_stored_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="can't have this shape.*rows_per_block"):
        writer(tmp_path / "a", num_samples=2**20, num_classes=2_000_000, rows_per_block=2**20)
    with pytest.raises(UsageError, match="blocks of 1 rows; expected at most .* Use a larger rows_per_block"):
        writer(tmp_path / "a", num_samples=2**21, rows_per_block=1)
    assert not (tmp_path / "a").exists()


def test_a_sample_table_with_contents_makes_a_cache_that_knows_its_samples(tmp_path: Path) -> None:
    table = sample_table(Pictures(), contents=True)
    with writer(tmp_path / "a", num_samples=40, num_views=1, dataset=None, samples=table) as cache:
        cache.write(view=0, start=0, logits=some_logits()[0, :40])

    stored = logitcache.open(tmp_path / "a").samples
    assert stored is not None
    assert table.fingerprint() == stored.fingerprint()
