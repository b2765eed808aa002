"""A writer over what is there: the same labels pass, others are refused by name, and nothing is lost."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import logitcache
from logitcache.encodings import Encoding
from logitcache.errors import IdentityMismatch, IncompleteCache, InvalidLogits, NotACache, ShapeError
from logitcache.verify.audit import verify

SAMPLES, CLASSES, BLOCK = 100, 30, 32
ENCODINGS = [
    logitcache.Dense(dtype="float32"),
    logitcache.Dense(dtype="uint8"),
    logitcache.TopK(k=5),
    logitcache.Sampled(draws=50),
    logitcache.Sampled(draws=50, packed=True),
    logitcache.PackedTopK(k=5),
    logitcache.LowRank(rank=8, k=4),
]


def some_logits(seed: int = 0, rows: int = SAMPLES) -> Tensor:
    return torch.randn(rows, CLASSES, generator=torch.Generator().manual_seed(seed)) * 3


def writer(path: Path, encoding: Encoding = ENCODINGS[0], **changes: object) -> logitcache.CacheWriter:
    settings = {"teacher": "my-net", "dataset": "pictures", "rows_per_block": BLOCK, "calibration": some_logits(9)}
    return logitcache.create(
        path,
        num_samples=SAMPLES,
        num_classes=CLASSES,
        encoding=encoding,
        **(settings | changes),  # type: ignore[arg-type]
    )


def build(path: Path, encoding: Encoding = ENCODINGS[0], **changes: object) -> None:
    with writer(path, encoding, **changes) as cache:
        cache.write(view=0, start=0, logits=some_logits())


@pytest.mark.parametrize("encoding", ENCODINGS, ids=repr)
def test_other_logits_under_the_same_name_are_refused(tmp_path: Path, encoding: Encoding) -> None:
    build(tmp_path / "a", encoding)
    digest = logitcache.open(tmp_path / "a").digest

    with pytest.raises(
        IdentityMismatch,
        match=r"block v00000/b00000 of .* was written with other logits: row 0 of view 0 differs.*\n"
        r"Nothing was changed. Choose another path, give this teacher another name, or .*overwrite=True",
    ):
        with writer(tmp_path / "a", encoding) as cache:
            cache.write(view=0, start=0, logits=some_logits(seed=1))
    assert digest == logitcache.open(tmp_path / "a").digest


@pytest.mark.parametrize("encoding", ENCODINGS, ids=repr)
def test_the_same_logits_again_change_nothing_whatever_their_constant_or_rounding(
    tmp_path: Path, encoding: Encoding
) -> None:
    build(tmp_path / "a", encoding)
    digest = logitcache.open(tmp_path / "a").digest
    noise = 1e-5 * torch.randn(SAMPLES, CLASSES, generator=torch.Generator().manual_seed(5))
    with writer(tmp_path / "a", encoding) as cache:
        cache.write(view=0, start=0, logits=some_logits() + 7.0 + noise)

    assert [] == cache.committed_blocks
    assert digest == logitcache.open(tmp_path / "a").digest


def test_a_build_that_stopped_goes_on_only_with_the_same_logits(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), writer(tmp_path / "a") as cache:
        cache.write(view=0, start=0, logits=some_logits()[:40])
        raise KeyboardInterrupt
    with pytest.raises(IdentityMismatch, match="block v00000/b00000"), writer(tmp_path / "a") as cache:
        cache.write(view=0, start=0, logits=some_logits(seed=1))
    with writer(tmp_path / "a") as cache:
        cache.write(view=0, start=0, logits=some_logits())

    assert torch.equal(some_logits(), logitcache.open(tmp_path / "a").view(0).logits(range(SAMPLES)))


@pytest.mark.parametrize("first", [5, BLOCK, 50], ids=["a part of a block", "a block", "more than a block"])
@pytest.mark.parametrize("encoding", ENCODINGS, ids=repr)
def test_rows_that_come_twice_with_other_values_are_refused(tmp_path: Path, encoding: Encoding, first: int) -> None:
    with pytest.raises(IdentityMismatch, match="row 3 of view 0") as caught:
        with writer(tmp_path / "a", encoding) as cache:
            cache.write(view=0, start=0, logits=some_logits()[:first])
            cache.write(view=0, start=0, logits=some_logits()[:3])
            cache.write(view=0, start=3, logits=some_logits(seed=1)[3:4])

    assert "writ" in str(caught.value)


def test_another_output_that_differs_is_refused(tmp_path: Path) -> None:
    features = torch.randn(SAMPLES, 6, generator=torch.Generator().manual_seed(2))
    outputs = {"features": logitcache.Output(shape=(6,))}
    with writer(tmp_path / "a", outputs=outputs) as cache:
        cache.write(view=0, start=0, logits=some_logits(), outputs={"features": features})
    with writer(tmp_path / "a", outputs=outputs) as cache:
        cache.write(view=0, start=0, logits=some_logits(), outputs={"features": features})
        with pytest.raises(IdentityMismatch, match="row 0 of view 0 differs"):
            cache.write(view=0, start=0, logits=some_logits(), outputs={"features": features + 1})


def test_other_inputs_are_refused_even_where_the_logits_agree(tmp_path: Path) -> None:
    pixels = torch.rand(SAMPLES, 1, 4, 4)
    with writer(tmp_path / "a") as cache:
        cache.write(view=0, start=0, logits=some_logits(), inputs=pixels)
    with writer(tmp_path / "a") as cache:
        cache.write(view=0, start=0, logits=some_logits(), inputs=pixels)
        with pytest.raises(IdentityMismatch, match="was written from other inputs"):
            cache.write(view=0, start=0, logits=some_logits(), inputs=1 - pixels)


def test_overwriting_deletes_the_cache_that_is_there_and_nothing_else(tmp_path: Path) -> None:
    build(tmp_path / "a")
    (tmp_path / "a" / "notes.txt").write_text("mine")
    with pytest.raises(NotACache, match="holds notes.txt, which is no part of a cache; move it"):
        writer(tmp_path / "a", overwrite=True)
    assert logitcache.open(tmp_path / "a").sealed
    (tmp_path / "a" / "notes.txt").unlink()
    with writer(tmp_path / "a", overwrite=True, teacher="another", rows_per_block=50) as cache:
        cache.write(view=0, start=0, logits=some_logits(seed=1))

    assert torch.equal(some_logits(seed=1), logitcache.open(tmp_path / "a").view(0).logits(range(SAMPLES)))
    assert [] == verify(str(tmp_path / "a"), deep=True)


def test_overwriting_takes_a_damaged_cache_and_refuses_what_is_none(tmp_path: Path) -> None:
    build(tmp_path / "a")
    manifest = tmp_path / "a" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"my-net"', '"my-nut"'))
    build(tmp_path / "a", overwrite=True)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "manifest.json").write_text("{}")
    with pytest.raises(NotACache, match="was not written by logitcache"):
        writer(tmp_path / "b", overwrite=True)

    assert [] == verify(str(tmp_path / "a"), deep=True)
    assert "{}" == (tmp_path / "b" / "manifest.json").read_text()


@pytest.mark.parametrize(
    ("logits", "message"),
    [
        pytest.param(some_logits().softmax(dim=1), "these rows are probabilities: no value is negative", id="softmax"),
        pytest.param(torch.eye(CLASSES)[:20], "these rows are probabilities", id="one-hot"),
        pytest.param(
            torch.zeros(20, CLASSES, dtype=torch.int64), "logits are torch.int64; expected floats", id="integers"
        ),
        pytest.param(torch.zeros(20, CLASSES, dtype=torch.bool), "logits are torch.bool", id="booleans"),
        pytest.param(np.zeros((20, CLASSES), dtype=complex), "logits are torch.complex128", id="complex"),
    ],
)
def test_what_are_no_logits_is_refused(tmp_path: Path, logits: object, message: str) -> None:
    with pytest.raises(InvalidLogits, match=message), writer(tmp_path / "a") as cache:
        cache.write(view=0, start=0, logits=logits)


def test_log_probabilities_are_logits(tmp_path: Path) -> None:
    with writer(tmp_path / "a") as cache:
        cache.write(view=0, start=0, logits=some_logits().log_softmax(dim=1))

    assert logitcache.open(tmp_path / "a").sealed


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("row", [2, BLOCK - 1], ids=["within a block", "the last of a block"])
def test_a_row_that_was_refused_may_be_written_again(tmp_path: Path, bad: float, row: int) -> None:
    logits = some_logits()
    with writer(tmp_path / "a") as cache:
        cache.write(view=0, start=0, logits=logits[:row])
        with pytest.raises(InvalidLogits, match=f"view 0, row {row}"):
            cache.write(view=0, start=row, logits=torch.full((1, CLASSES), bad))
        cache.write(view=0, start=row, logits=logits[row:])

    assert torch.equal(logits, logitcache.open(tmp_path / "a").view(0).logits(range(SAMPLES)))


@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=["NaN", "infinite"])
@pytest.mark.parametrize("encoding", ENCODINGS, ids=repr)
def test_an_invalid_row_over_a_committed_one_is_refused(tmp_path: Path, encoding: Encoding, value: float) -> None:
    build(tmp_path / "a", encoding)
    invalid = some_logits()
    invalid[40, 3] = value

    with pytest.raises(IdentityMismatch, match="row 40 of view 0 differs"), writer(tmp_path / "a", encoding) as cache:
        cache.write(view=0, start=0, logits=invalid)


@pytest.fixture
def _threads_switch_often() -> Iterator[None]:
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


@pytest.mark.usefixtures("_threads_switch_often")
def test_four_threads_may_write_the_same_rows(tmp_path: Path) -> None:
    logits = some_logits()
    errors: list[BaseException] = []

    def write(cache: logitcache.CacheWriter) -> None:
        try:
            for row in range(0, SAMPLES, 5):
                cache.write(view=0, start=row, logits=logits[row : row + 5])
        except BaseException as error:
            errors.append(error)

    for number in range(3):
        with writer(tmp_path / str(number), rows_per_block=8) as cache:
            threads = [threading.Thread(target=write, args=(cache,)) for _ in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        assert torch.equal(logits, logitcache.open(tmp_path / str(number)).view(0).logits(range(SAMPLES)))
    assert [] == errors


@pytest.mark.usefixtures("_threads_switch_often")
def test_four_threads_in_one_writer_write_what_one_would(tmp_path: Path) -> None:
    logits = some_logits()
    build(tmp_path / "one")
    errors: list[BaseException] = []

    def write(cache: logitcache.CacheWriter, first: int) -> None:
        try:
            for row in range(first, SAMPLES, 4):
                cache.write(view=0, start=row, logits=logits[row : row + 1])
        except BaseException as error:
            errors.append(error)

    with writer(tmp_path / "four") as cache:
        threads = [threading.Thread(target=write, args=(cache, first)) for first in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    assert [] == errors
    assert logitcache.open(tmp_path / "one").digest == logitcache.open(tmp_path / "four").digest


def test_a_refused_batch_leaves_the_cache_open(tmp_path: Path) -> None:
    with pytest.raises(IncompleteCache, match="blocks are missing"), writer(tmp_path / "a") as cache:
        with pytest.raises(InvalidLogits):
            cache.write(view=0, start=0, logits=some_logits().softmax(dim=1))

    assert not logitcache.open(tmp_path / "a").sealed


def test_a_writer_that_was_opened_earlier_leaves_a_sealed_cache_as_it_is(tmp_path: Path) -> None:
    early = writer(tmp_path / "a")
    build(tmp_path / "a")
    digest = logitcache.open(tmp_path / "a").digest

    with pytest.raises(IdentityMismatch, match="was written with other logits by another writer: row 0 of view 0"):
        with early:
            early.write(view=0, start=0, logits=some_logits(seed=1))
    assert digest == logitcache.open(tmp_path / "a").digest
    assert [] == verify(str(tmp_path / "a"), deep=True)


@pytest.mark.parametrize("encoding", ENCODINGS, ids=repr)
def test_two_writers_of_other_logits_never_mix(tmp_path: Path, encoding: Encoding) -> None:
    """Block by block, in turns: each block has one writer's rows, and neither seals both."""
    first, second = writer(tmp_path / "a", encoding), writer(tmp_path / "a", encoding)
    first.write(view=0, start=0, logits=some_logits()[:BLOCK])
    second.write(view=0, start=BLOCK, logits=some_logits(seed=1)[BLOCK : 2 * BLOCK])
    first.flush()
    second.flush()
    for each, seed in ((first, 0), (second, 1)):
        with pytest.raises(IdentityMismatch, match="was written with other logits"):
            each.write(view=0, start=0, logits=some_logits(seed=seed))
            each.seal()
        each.close()

    assert not logitcache.open(tmp_path / "a").sealed


def test_two_writers_of_the_same_logits_share_the_work(tmp_path: Path) -> None:
    build(tmp_path / "one")
    first, second = writer(tmp_path / "a"), writer(tmp_path / "a")
    first.write(view=0, start=0, logits=some_logits()[:BLOCK])
    first.flush()
    second.write(view=0, start=0, logits=some_logits())
    second.seal()
    first.write(view=0, start=BLOCK, logits=some_logits()[BLOCK:])
    first.seal()
    first.close()
    second.close()

    assert logitcache.open(tmp_path / "one").digest == logitcache.open(tmp_path / "a").digest


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_probabilities_are_refused_in_any_precision(tmp_path: Path, dtype: torch.dtype) -> None:
    probabilities = some_logits().to(dtype).softmax(dim=1)
    with pytest.raises(InvalidLogits, match="these rows are probabilities"), writer(tmp_path / "a") as cache:
        cache.write(view=0, start=0, logits=probabilities)


def test_inputs_of_another_number_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ShapeError, match="99 inputs for 100 rows of logits"), writer(tmp_path / "a") as cache:
        cache.write(view=0, start=0, logits=some_logits(), inputs=torch.zeros(99, 1, 4, 4))
