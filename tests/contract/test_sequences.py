"""Caches of sequences: any number of rows per sample, in blocks of whole samples."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import logitcache
from logitcache.cache.fidelity import fidelity_kl
from logitcache.cache.manifest import MANIFEST, dump_manifest, read_manifest
from logitcache.data.index import join_index
from logitcache.digest import json_digest
from logitcache.errors import CorruptCache, IdentityMismatch, IncompleteCache, InvalidLogits, ShapeError, UsageError
from logitcache.share.transfer import pull
from logitcache.verify.audit import verify
from logitcache.verify.repair import repair
from tests.contract.conftest import Stranger

COUNTS = [3, 0, 5, 1, 7, 2, 0, 4]
ROWS, CLASSES, BLOCK, VIEWS = sum(COUNTS), 30, 8, 2
ENCODINGS = [
    logitcache.Dense(dtype="float32"),
    logitcache.Dense(dtype="uint8"),
    logitcache.TopK(k=5),
    logitcache.Sampled(draws=50),
    logitcache.PackedTopK(k=5, most=9, prior=True),
    logitcache.LowRank(rank=8, k=4),
]


def some_logits(seed: int = 0, rows: int = ROWS) -> Tensor:
    return torch.randn(VIEWS, rows, CLASSES, generator=torch.Generator().manual_seed(seed)) * 3


def writer(path: Path, **changes: Any) -> logitcache.CacheWriter:
    options: dict[str, Any] = {
        "num_samples": len(COUNTS),
        "num_classes": CLASSES,
        "num_views": VIEWS,
        "encoding": ENCODINGS[0],
        "calibration": some_logits(9).flatten(0, 1),
        "teacher": "net",
        "dataset": "texts",
        "rows_per_sample": COUNTS,
        "rows_per_block": BLOCK,
    }
    return logitcache.create(path, **(options | changes))


def build(path: Path, logits: Tensor | None = None, **changes: Any) -> logitcache.LogitCache:
    with writer(path, **changes) as cache:
        for view, of_view in enumerate(some_logits() if logits is None else logits):
            cache.write(view=view, start=0, logits=of_view)
    return logitcache.open(path)


@pytest.mark.parametrize("encoding", ENCODINGS, ids=repr)
def test_rows_are_the_same_as_in_a_cache_with_one_row_per_sample(tmp_path: Path, encoding: Any) -> None:
    sequences = build(tmp_path / "sequences", encoding=encoding)
    flat = build(tmp_path / "flat", encoding=encoding, num_samples=ROWS, rows_per_sample=None)
    order = torch.randperm(ROWS, generator=torch.Generator().manual_seed(1))

    assert [] == verify(str(tmp_path / "sequences"), deep=True)
    assert (ROWS, 3) == (sequences.num_rows, sequences.layout.blocks_per_view)
    assert [0, 3, 3, 8, 9, 16, 18, 18, 22] == sequences.row_offsets.tolist()
    for view in sequences.views:
        expected = flat.view(view).logits(order)
        assert torch.equal(expected, sequences.view(view).logits(order))
        assert torch.equal(expected, sequences.view(view, memory_budget=1).logits(order)), "streamed"
        assert torch.equal(expected, sequences.logits([join_index(view, row) for row in order]))


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    counts=st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(any),
    rows_per_block=st.integers(9, 20),
    order=st.randoms(use_true_random=False),
)
def test_samples_in_any_order_give_the_same_digest(
    tmp_path_factory: pytest.TempPathFactory, counts: list[int], rows_per_block: int, order: Any
) -> None:
    folder = tmp_path_factory.mktemp("caches")
    options = {"num_samples": len(counts), "rows_per_sample": counts, "rows_per_block": rows_per_block, "num_views": 1}
    logits = some_logits(rows=sum(counts))[:1]
    expected = build(folder / "at once", logits, **options)
    samples = list(range(len(counts)))
    order.shuffle(samples)
    with writer(folder / "shuffled", **options) as cache:
        for sample in samples:
            rows = cache.row_map.sample_rows(sample)
            cache.write(view=0, start=rows.start, logits=logits[0, rows.start : rows.stop])

    assert expected.digest == logitcache.open(folder / "shuffled").digest
    assert torch.equal(logits[0], expected.view(0).logits(range(sum(counts))))


@pytest.mark.parametrize("reader", ["zarr", "tensorstore"])
@pytest.mark.parametrize("encoding", ENCODINGS, ids=repr)
def test_a_stranger_reads_the_rows(tmp_path: Path, stranger: Stranger, encoding: Any, reader: str) -> None:
    cache = build(tmp_path / "a", encoding=encoding)
    found = stranger(tmp_path / "a", reader)
    decoded = torch.from_numpy(found["decoded"]).float()

    assert cache.digest == str(found["digest"])
    for view in cache.views:
        expected = cache.view(view).logits(range(ROWS))
        assert torch.allclose(expected.softmax(dim=1), decoded[view].softmax(dim=1), atol=1e-5)


def test_caches_with_one_row_per_sample_have_no_row_map(tmp_path: Path) -> None:
    cache = build(tmp_path / "a", num_samples=ROWS, rows_per_sample=None)
    manifest = json.loads((tmp_path / "a" / MANIFEST).read_text())

    assert {} == manifest["layout"]["fixed"]
    assert not {"rows", "tokenization"} & manifest["identity"].keys()
    assert not {"sequence_rows", "sequence_blocks"} & manifest["layout"].keys()
    assert list(range(ROWS + 1)) == cache.row_offsets.tolist()


def test_one_row_each_as_sequences_is_another_cache(tmp_path: Path) -> None:
    """A causal language model's row t belongs to token t + 1: the map is part of the identity."""
    flat = build(tmp_path / "flat", num_samples=ROWS, rows_per_sample=None)
    mapped = build(tmp_path / "mapped", num_samples=ROWS, rows_per_sample=[1] * ROWS)

    assert flat.id != mapped.id
    assert torch.equal(flat.view(1).logits(range(ROWS)), mapped.view(1).logits(range(ROWS)))


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        pytest.param(
            {"rows_per_sample": [3, 0, 5, 1, 7, 3, 0, 3]}, "rows \\(hash of the rows of all samples\\): ", id="rows"
        ),
        pytest.param({"row_positions": np.arange(ROWS)}, "rows ", id="positions"),
        pytest.param({"tokenization": {"tokenizer": "b", "max_length": 8}}, "tokenization.tokenizer: ", id="tokenizer"),
        pytest.param({"tokenization": {"tokenizer": "a", "max_length": 9}}, "tokenization.max_length: ", id="length"),
        pytest.param({"rows_per_block": 9}, "rows_per_block: 8 in the cache, 9 here", id="block"),
    ],
)
def test_another_row_map_or_tokenization_is_refused_by_name(tmp_path: Path, changes: Any, field: str) -> None:
    tokenization = {"tokenizer": "a", "max_length": 8}
    build(tmp_path / "a", tokenization=tokenization)

    with pytest.raises(IdentityMismatch, match=field):
        writer(tmp_path / "a", **({"tokenization": tokenization} | changes))


def test_selected_positions_are_stored(tmp_path: Path) -> None:
    positions = np.concatenate([np.arange(1, 1 + 2 * count, 2) for count in COUNTS])
    build(tmp_path / "a", row_positions=positions)
    cache = logitcache.open(tmp_path / "a")

    assert positions.tolist() == cache.row_map.positions_of(np.arange(ROWS)).tolist()
    assert [] == verify(str(tmp_path / "a"), deep=True)


def test_mixing_needs_one_row_per_sample(tmp_path: Path) -> None:
    plan = logitcache.ViewPlan(mixing=logitcache.Mixing(mixup=0.5), num_classes=CLASSES)

    with pytest.raises(UsageError, match="mixup and CutMix"):
        writer(tmp_path / "a", view_plan=plan)


def test_rows_beyond_the_last_sequence_are_refused(tmp_path: Path) -> None:
    with writer(tmp_path / "a", num_views=1) as cache:
        with pytest.raises(ShapeError, match=r"rows 18 to 22 .* has the rows 0 to 21 of 1 view "):
            cache.write(view=0, start=18, logits=some_logits()[0, :5])
        cache.write(view=0, start=0, logits=some_logits()[0])


def test_a_row_too_many_for_each_sequence_is_refused_with_the_likely_cause(tmp_path: Path) -> None:
    """Logits of all L tokens of a causal model, where a sequence has L - 1 rows."""
    longer = [torch.cat([some_logits()[0, :count], torch.zeros(1, CLASSES)]) for count in COUNTS]
    cause = "a sequence of L tokens has L - 1 rows, `logits\\[:-1\\]`"
    with pytest.raises(IdentityMismatch, match=rf"(?s)row 3 of view 0 was written before .*{cause}"):
        with writer(tmp_path / "a", num_views=1) as cache:
            for sample, logits in enumerate(longer):
                cache.write(view=0, start=cache.row_map.sample_rows(sample).start, logits=logits)
    with pytest.raises(ShapeError, match=f"(?s)lie outside the cache.*{cause}"), writer(tmp_path / "b") as cache:
        cache.write(view=0, start=ROWS - COUNTS[-1], logits=longer[-1])
    with pytest.raises(IdentityMismatch) as again, writer(tmp_path / "c") as cache:
        cache.write(view=0, start=9, logits=some_logits()[0, 9:12])
        cache.write(view=0, start=10, logits=some_logits(1)[0, 10:12])
    with pytest.raises(ShapeError) as elsewhere, writer(tmp_path / "d") as cache:
        cache.write(view=VIEWS, start=0, logits=some_logits()[0, :3])

    assert not any("causal" in str(error.value) for error in (again, elsewhere))


@pytest.mark.parametrize(("place", "value"), [("view", "0"), ("start", 0.0)])
def test_a_place_that_is_no_number_is_refused(tmp_path: Path, place: str, value: Any) -> None:
    with pytest.raises(UsageError, match=f"{place} is {value!r}; expected a whole number"):
        with writer(tmp_path / "a") as cache:
            cache.write(**{"view": 0, "start": 0} | {place: value}, logits=some_logits()[0])


def test_the_inputs_of_a_sequence_are_a_batch(tmp_path: Path) -> None:
    with pytest.raises(
        ShapeError, match=r"4 inputs for rows in which 1 samples start; expected a batch .* `ids\[None\]`"
    ):
        with writer(tmp_path / "a") as cache:
            cache.write(view=0, start=0, logits=some_logits()[0, :3], inputs=torch.arange(4))


def test_nan_in_one_position_is_refused_and_may_be_written_again(tmp_path: Path) -> None:
    damaged = some_logits()[0].clone()
    damaged[9, 4] = torch.nan
    with writer(tmp_path / "a", num_views=1) as cache:
        with pytest.raises(InvalidLogits, match="view 0, row 9"):
            cache.write(view=0, start=0, logits=damaged)
        cache.write(view=0, start=0, logits=some_logits()[0])

    assert torch.equal(some_logits()[0], logitcache.open(tmp_path / "a").view(0).logits(range(ROWS)))


def test_other_logits_for_a_committed_sequence_are_refused(tmp_path: Path) -> None:
    build(tmp_path / "a")

    with pytest.raises(IdentityMismatch, match="row 9 of view 0 differs"):
        with writer(tmp_path / "a") as cache:
            cache.write(view=0, start=9, logits=some_logits(1)[0, 9:16])


def test_a_missing_sequence_is_named(tmp_path: Path) -> None:
    with pytest.raises(IncompleteCache, match="view 0: 1 rows from 8 to 8"):
        with writer(tmp_path / "a", num_views=1) as cache:
            cache.write(view=0, start=0, logits=some_logits()[0, :8])
            cache.write(view=0, start=9, logits=some_logits()[0, 9:])


def test_a_build_resumes_at_the_missing_blocks(tmp_path: Path) -> None:
    with pytest.raises(IncompleteCache):
        with writer(tmp_path / "a", num_views=1) as cache:
            cache.write(view=0, start=0, logits=some_logits()[0, :8])
    with writer(tmp_path / "a", num_views=1) as cache:
        assert [1, 2] == [block.number for block in cache.missing_blocks()]
        assert [range(3, 5), range(5, 8)] == [cache.row_map.block_samples(number) for number in (1, 2)]
        cache.write(view=0, start=8, logits=some_logits()[0, 8:])

    assert build(tmp_path / "b", some_logits()[:1], num_views=1).digest == logitcache.open(tmp_path / "a").digest


def test_views_can_be_added_and_copied(tmp_path: Path) -> None:
    build(tmp_path / "a", some_logits()[:1], num_views=1)
    grown = build(tmp_path / "a")
    pull(str(tmp_path / "a"), str(tmp_path / "part"), views="1")
    part = logitcache.open(tmp_path / "part")

    assert [1] == list(part.views)
    assert torch.equal(grown.view(1).logits(range(ROWS)), part.view(1).logits(range(ROWS)))
    assert [] == verify(str(tmp_path / "part"), deep=True)


def test_a_damaged_block_is_repaired_from_a_copy(tmp_path: Path) -> None:
    digest = build(tmp_path / "a").digest
    pull(str(tmp_path / "a"), str(tmp_path / "copy"))
    chunk = tmp_path / "a/labels.zarr/logits/c/1/2/0"
    chunk.write_bytes(chunk.read_bytes()[:-1])

    assert digest == repair(str(tmp_path / "a"), source=str(tmp_path / "copy")).digest
    assert [] == verify(str(tmp_path / "a"), deep=True)


def forge(path: Path, **changes: Any) -> None:
    """Change the layout in a manifest, with the right checksum."""
    manifest = read_manifest((path / MANIFEST).read_bytes(), url="")
    layout = manifest.layout.model_copy(update=changes)
    (path / MANIFEST).write_bytes(dump_manifest(manifest.model_copy(update={"layout": layout})))


def forge_identity(path: Path, **changes: Any) -> None:
    manifest = read_manifest((path / MANIFEST).read_bytes(), url="")
    identity = manifest.identity.model_copy(update=changes)
    changed = manifest.model_copy(update={"identity": identity, "id": identity.cache_id})
    (path / MANIFEST).write_bytes(dump_manifest(changed))


@pytest.mark.parametrize(
    "changes",
    [
        {"sequence_rows": 21},
        {"sequence_blocks": 4},
        {"sequence_blocks": None},
        {"sequence_rows": None, "sequence_blocks": None},
        {"rows_per_block": 4},
        {"num_samples": 9},
        {"fixed": {}},
    ],
    ids=str,
)
def test_a_layout_that_contradicts_the_rows_is_refused(tmp_path: Path, changes: Any) -> None:
    build(tmp_path / "a")
    forge(tmp_path / "a", **changes)

    with pytest.raises(CorruptCache):
        logitcache.open(tmp_path / "a").view(0)


def test_a_row_map_that_contradicts_the_identity_is_refused(tmp_path: Path) -> None:
    build(tmp_path / "a")
    forge_identity(tmp_path / "a", rows=json_digest("other"))

    with pytest.raises(CorruptCache):
        logitcache.open(tmp_path / "a").view(0)


SPARSE = logitcache.TopK(k=4, dtype="float32")


def entries(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The most probable classes of each row and their log-probabilities, as a serving engine returns them."""
    log_probs, ids = logits.log_softmax(dim=-1).topk(count, dim=-1)
    return ids, log_probs


def test_receipts_and_card_state_the_loss_at_higher_temperatures(tmp_path: Path) -> None:
    """Of one row in 16; of entries of a serving engine, nothing is known."""
    cache = build(tmp_path / "a", encoding=SPARSE)
    found: dict[str, list[Tensor]] = {"2": [], "4": []}
    for view, logits in enumerate(some_logits()):
        for temperature, parts in found.items():
            parts.append(fidelity_kl(cache.view(view).logits([0, 16]), logits[[0, 16]], float(temperature)))
    expected = {temperature: float(torch.cat(parts).mean()) for temperature, parts in found.items()}

    measured = [receipt for receipt in cache.receipts.values() if receipt.kl_at]
    assert 2 * VIEWS == len(measured)
    means = {
        temperature: sum(receipt.kl_at[temperature] for receipt in measured) / len(measured) for temperature in found
    }
    assert expected == pytest.approx(means, rel=1e-4)
    assert found.keys() == cache.contents.kl_at.keys()
    assert f"{cache.contents.kl_at['4']:.2g} nats at T = 4" in (tmp_path / "a" / "README.md").read_text()
    with writer(tmp_path / "b", encoding=SPARSE, num_views=1) as other:
        other.write_sparse(
            view=0, start=0, ids=entries(some_logits()[0], 4)[0], log_probs=entries(some_logits()[0], 4)[1]
        )
    assert {} == logitcache.open(tmp_path / "b").contents.kl_at


PACKED = logitcache.PackedTopK(k=3, most=6, prior=True)


@pytest.mark.parametrize(
    ("encoding", "count"),
    [(SPARSE, 4), (SPARSE, 5), (PACKED, 6), (PACKED, 7)],
    ids=["K", "K + 1", "packed, K", "packed, K + 1"],
)
def test_entries_of_a_serving_engine_give_the_same_rows_as_all_logits(
    tmp_path: Path, encoding: logitcache.Encoding, count: int
) -> None:
    expected = build(tmp_path / "dense", encoding=encoding)
    with writer(tmp_path / "sparse", encoding=encoding) as cache:
        for view, logits in enumerate(some_logits()):
            ids, log_probs = entries(logits, count)
            cache.write_sparse(view=view, start=0, ids=ids.flip(1), log_probs=log_probs.flip(1))
    found = logitcache.open(tmp_path / "sparse")

    assert [] == verify(str(tmp_path / "sparse"), deep=True)
    assert found.kl_mean is None
    for view in found.views:
        p, q = (each.view(view).logits(range(ROWS)).softmax(dim=1) for each in (expected, found))
        torch.testing.assert_close(p, q, atol=1e-6 if encoding == SPARSE else 1e-3, rtol=1e-5)


def test_entries_of_different_numbers_are_filled_up(tmp_path: Path) -> None:
    with pytest.raises(ShapeError, match=r"ids is a list .* expected \(B, K\).* fill the unused places with the id -1"):
        with writer(tmp_path / "a", encoding=SPARSE) as cache:
            cache.write_sparse(view=0, start=0, ids=[[1], [1, 2]], log_probs=[[-1.0], [-1.0, -2.0]])


def test_entries_may_be_written_again_and_other_entries_are_refused(tmp_path: Path) -> None:
    ids, log_probs = entries(some_logits()[0], 4)
    with writer(tmp_path / "a", encoding=SPARSE, num_views=1) as cache:
        cache.write_sparse(view=0, start=0, ids=ids[:10], log_probs=log_probs[:10])
        cache.write_sparse(view=0, start=5, ids=ids[5:10], log_probs=log_probs[5:10])
        with pytest.raises(IdentityMismatch, match="row 8 of view 0 was written before"):
            cache.write_sparse(view=0, start=8, ids=ids[3:5], log_probs=log_probs[3:5])
        cache.write_sparse(view=0, start=10, ids=ids[10:], log_probs=log_probs[10:])
        with pytest.raises(IdentityMismatch, match="row 3 of view 0 differs"):
            cache.write_sparse(view=0, start=3, ids=ids[4:5], log_probs=log_probs[4:5])


def test_a_block_takes_either_logits_or_entries(tmp_path: Path) -> None:
    ids, log_probs = entries(some_logits()[0], 4)
    with pytest.raises(IncompleteCache), writer(tmp_path / "a", encoding=SPARSE, num_views=1) as cache:
        cache.write(view=0, start=0, logits=some_logits()[0, :2])
        with pytest.raises(UsageError, match="has rows from logits; write all rows of a block either"):
            cache.write_sparse(view=0, start=2, ids=ids[2:4], log_probs=log_probs[2:4])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        pytest.param(lambda ids, log_probs: ids.__setitem__((7, 1), CLASSES), InvalidLogits, "row 7.*30", id="class"),
        pytest.param(lambda ids, log_probs: log_probs.__setitem__((7, 1), torch.nan), InvalidLogits, "row 7", id="NaN"),
        pytest.param(lambda ids, log_probs: log_probs.__setitem__((7, 1), 0.5), InvalidLogits, "row 7", id="positive"),
    ],
)
def test_entries_that_are_no_distribution_are_refused(tmp_path: Path, change: Any, error: Any, message: str) -> None:
    ids, log_probs = entries(some_logits()[0], 4)
    with writer(tmp_path / "a", encoding=SPARSE, num_views=1) as cache:
        damaged = ids.clone(), log_probs.clone()
        change(*damaged)
        with pytest.raises(error, match=message):
            cache.write_sparse(view=0, start=0, ids=damaged[0], log_probs=damaged[1])
        cache.write_sparse(view=0, start=0, ids=ids, log_probs=log_probs)


def test_other_encodings_need_all_logits_and_outputs_their_values(tmp_path: Path) -> None:
    ids, log_probs = entries(some_logits()[0], 4)
    features = {"features": logitcache.Output(shape=(3,))}
    for name, changes in {"dense": {}, "outputs": {"outputs": features, "encoding": SPARSE}}.items():
        with pytest.raises(IncompleteCache), writer(tmp_path / name, **changes) as cache:
            with pytest.raises(
                UsageError, match="needs the logits of all classes|expected those of this cache, by name: features"
            ):
                cache.write_sparse(view=0, start=0, ids=ids, log_probs=log_probs)
