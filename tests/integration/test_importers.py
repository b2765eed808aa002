"""Caches of other tools arrive with the values that the tool's own reader gives."""

from __future__ import annotations

import ast
import gzip
import io
import itertools
import json
import os
import pickle
import re
import tarfile
import zlib
from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor

import logitcache
from logitcache.config.build import pipeline_data
from logitcache.config.schema import Pipeline
from logitcache.data.samples import SampleTable
from logitcache.data.tokens import TokenDataset
from logitcache.errors import InvalidLogits, InvalidSource, LogitCacheError, SampleMismatch, UsageError
from logitcache.extras.interchange import FORMATS, IMPORTERS, DenseRows, Importer, import_cache
from logitcache.targets import SparseTargets
from tests.commands import logitcache as run
from tests.commands import refused, run_json
from tests.conftest import PICTURES, TINY
from tests.needs import need_package

Make = Callable[..., Pipeline]
PEERS = Path(__file__).parents[2].parent / "shared" / "peers"
VOCABULARY, CLASSES = 49_152, 1000


def imported(path: Path, format: str, source: Path, **settings: Any) -> logitcache.LogitCache:
    settings = {"teacher": "net@1", "dataset": "pictures"} | settings
    import_cache(format, source, path, **settings)
    return logitcache.open(path)


def entries(cache: logitcache.LogitCache, view: int = 0) -> SparseTargets:
    targets = cache.view(view).targets(range(cache.num_rows))
    assert isinstance(targets, SparseTargets)
    return targets


def log_probs_at(cache: logitcache.LogitCache, ids_RK: Any, view: int = 0) -> np.ndarray:
    """Log-probabilities of some classes of every row, float64 (R, K)."""
    ids_RK = torch.as_tensor(np.asarray(ids_RK).astype(np.int64))
    parts = []
    for start in range(0, len(ids_RK), 32):
        rows = range(start, min(start + 32, len(ids_RK)))
        logits = cache.view(view).logits(rows).double().log_softmax(dim=1)
        parts.append(logits.gather(1, ids_RK[start : start + 32]))
    return torch.cat(parts).numpy()


def token_dataset(sequences: Any) -> TokenDataset:
    ids = [np.asarray(each, dtype=np.int32) for each in sequences]
    return TokenDataset(
        ids,
        keys=[str(number) for number in range(len(ids))],
        task="causal",
        tokenization={"task": "causal"},
        vocab_size=VOCABULARY,
    )


def about(cache: logitcache.LogitCache) -> dict[str, Any]:
    return cache.manifest.provenance["imported"]


# Files that the tests write, in the tools' formats.


def some_probabilities(rows: int, k: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Classes (rows, k), and their probabilities, which lack something of 1."""
    generator = np.random.default_rng(seed)
    ids = np.stack([generator.permutation(20)[:k] for _ in range(rows)])
    probs = np.sort(generator.dirichlet(np.ones(k + 3), size=rows)[:, :k], axis=1)[:, ::-1]
    return ids, probs


def tinyvit(folder: Path, keys: list[str], epochs: int = 2, k: int = 4) -> dict[str, Any]:
    expected = {}
    for epoch in range(epochs):
        at = folder / f"logits_top{k}_epoch{epoch}"
        at.mkdir(parents=True)
        ids, probs = some_probabilities(len(keys), k, seed=epoch)
        order = np.random.default_rng(epoch).permutation(len(keys))
        record = np.dtype([("seed", "<i4"), ("ids", "<i2", (k,)), ("probs", "<f2", (k,))])
        values = np.zeros(len(keys), dtype=record)
        values["seed"], values["ids"], values["probs"] = order + 100 * epoch, ids[order], probs[order]
        (at / "rank0-keys.txt").write_text("".join(f"{keys[number]}\n" for number in order))
        values.tofile(at / "rank0-values.bin")
        expected[epoch] = ids, probs.astype(np.float16)
    return expected


def saved(value: Any, protocol: int = 2) -> bytes:
    data = io.BytesIO()
    torch.save(value, data, pickle_protocol=protocol)
    return data.getvalue()


def fkd(folder: Path, names: list[str], crops: int = 2, k: int = 4, dtype: Any = np.float32) -> Any:
    ids, probs = some_probabilities(len(names) * crops, k)
    ids, probs = ids.reshape(len(names), crops, k), probs.reshape(len(names), crops, k)
    for number, name in enumerate(names):
        path = folder / f"{name}.tar"
        path.parent.mkdir(parents=True, exist_ok=True)
        boxes = np.full((crops, 4), (number + 1) / 10, dtype=dtype)
        labels = np.stack([ids[number], probs[number]], axis=1).astype(dtype)
        path.write_bytes(saved([boxes, np.arange(crops) % 2 == 0, labels]))
    return ids, probs


def ml_dr(folder: Path, count: int, packed: bool = False) -> Any:
    folder.mkdir(parents=True, exist_ok=True)
    ids, probs = some_probabilities(2 * count, 4)
    for number in range(count):
        views = [
            {"params": [None, (1, 2, 3, np.int64(view))], "prob": (probs[row].tolist(), ids[row].tolist())}
            for view, row in enumerate((2 * number, 2 * number + 1))
        ]
        value = number, views
        data = zlib.compress(pickle.dumps(value, protocol=4)) if packed else saved(value, protocol=4)
        (folder / f"{number}.pth.tar").write_bytes(data)
    return ids.reshape(count, 2, 4), probs.reshape(count, 2, 4)


def megatron(folder: Path, iterations: int = 2, microbatches: int = 2, positions: int = 5, batch: int = 2) -> Any:
    from numcodecs.zstd import Zstd

    folder.mkdir(parents=True, exist_ok=True)
    k = 4
    with tarfile.open(folder / f"cp0_dp0__{iterations - 1}.tar", "w") as archive:

        def add(name: str, data: bytes) -> None:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))

        add("_meta.json", json.dumps({"hash": "0", "identifiers": {"seed": 1}, "saver": {"k": k}}).encode())
        expected = []
        for iteration in range(iterations):
            stored: dict[str, list[Tensor]] = {"values": [], "indices_low": [], "bit_17": []}
            for microbatch in range(microbatches):
                ids, probs = some_probabilities(positions * batch, k, seed=2 * iteration + microbatch)
                ids = ids + 65_536 * (ids % 2)
                values = np.log(probs).reshape(positions, batch, k)
                values[0, 0, -1] = -1000.0
                ids = ids.reshape(positions, batch, k)
                stored["values"].append(torch.tensor(values, dtype=torch.float16))
                stored["indices_low"].append(torch.tensor(ids % 65_536, dtype=torch.int32).to(torch.uint16))
                stored["bit_17"].append(torch.tensor(ids >= 65_536))
                expected.append((ids, values))
            add(f"{iteration}.pt.zst", bytes(Zstd(level=3).encode(saved(stored))))
    return expected


def axolotl_records(count: int = 3, k: int = 4) -> list[dict[str, Any]]:
    records = []
    for number in range(count):
        ids, probs = some_probabilities(4 + number, k, seed=number)
        entries = [
            [
                {"token": f"token_id:{token}", "logprob": float(np.log(p)), "bytes": None}
                for token, p in zip(*row, strict=True)
            ]
            for row in zip(ids, probs, strict=True)
        ]
        entries[0] = entries[0][:2]  # K may differ
        records.append({"input_ids": list(range(5 + number)), "logprobs": entries})
    return records


def distillkit(folder: Path, lengths: tuple[int, ...] = (3, 5)) -> tuple[np.ndarray, np.ndarray]:
    """All k values exact, and a residual of a bit, so that the expected values are simple."""
    import pyarrow as pa
    from pyarrow import parquet

    folder.mkdir(parents=True, exist_ok=True)
    config = "d: 21\nk: 5\nexact_k: 4\nexact_dtype: float32\npolynomial_terms: [0, 1]\nterm_dtype: float32\n"
    config += "residual_bins:\n- {scale_dtype: float16, element_bits: 1, num_elements: 1}\ndelta_encoding: false\n"
    (folder / "compression_config.yaml").write_text(config)
    ids, probs = some_probabilities(sum(lengths), 5)
    values = np.log(probs).astype(np.float32)
    rows: dict[str, list[Any]] = {"input_ids": [], "compressed_logprobs": [], "bytepacked_indices": []}
    start = 0
    for length in lengths:
        part = slice(start, start + length)
        bits = ((ids[part, :, None] >> np.arange(4, -1, -1)) & 1).reshape(length, -1).astype(np.uint8)
        rows["bytepacked_indices"].append(np.packbits(bits, axis=1).tolist())
        # The last value is coefficient 0, plus or minus the scale of 0.25: here with the bit 1, plus.
        tail = np.stack([values[part, 4] - 0.25, np.zeros(length, np.float32)], axis=1)
        data = [values[part, :4].copy().view(np.uint8), tail.view(np.uint8)]
        data += [np.full((length, 1), 0.25, np.float16).view(np.uint8), np.full((length, 1), 0x80, np.uint8)]
        rows["compressed_logprobs"].append(np.concatenate(data, axis=1).tolist())
        rows["input_ids"].append(list(range(length + 1)))
        start += length
    byte_lists, tokens = pa.list_(pa.list_(pa.uint8())), pa.list_(pa.uint64())
    schema = pa.schema(
        {"input_ids": tokens, "compressed_logprobs": byte_lists, "bytepacked_indices": byte_lists}.items()
    )
    parquet.write_table(pa.table(rows, schema=schema), folder / "data_0.parquet")
    return ids, values


def varint(number: int) -> bytes:
    data = b""
    while number > 127:
        data, number = data + bytes([number & 127 | 128]), number >> 7
    return data + bytes([number])


def message(number: int, data: bytes) -> bytes:
    """A field of a protocol buffer."""
    return bytes([number << 3 | 2]) + varint(len(data)) + data


def maxtext(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    need_package("array_record", "maxtext")
    from array_record.python.array_record_module import ArrayRecordWriter

    folder.mkdir()
    ids = some_probabilities(8, 4)[0]
    ids[0, 0] = 60_000
    logits = np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32) * 10
    writer = ArrayRecordWriter(str(folder / "teacher_top_k_part_00000_host_000.array_record"), "group_size:1")
    for rows in (slice(0, 3), slice(3, 8)):
        numbers = {"inputs": list(range(rows.stop - rows.start)), "top_k_indices": ids[rows].ravel().tolist()}
        lists = {name: message(3, message(1, b"".join(map(varint, values)))) for name, values in numbers.items()}
        lists["top_k_logits"] = message(2, message(1, logits[rows].tobytes()))
        features = [message(1, message(1, name.encode()) + message(2, data)) for name, data in lists.items()]
        writer.write(message(1, b"".join(features)))
    writer.close()
    return ids, logits


def test_maxtext_rows_are_normalised_over_their_classes_and_say_so(tmp_path: Path) -> None:
    ids, logits = maxtext(tmp_path / "in")
    cache = imported(tmp_path / "a.cache", "maxtext", tmp_path / "in", num_classes=70_000, dataset=None)

    assert [0, 3, 8] == cache.row_offsets.tolist()
    expected = torch.tensor(logits).double().log_softmax(dim=1).numpy()
    assert np.allclose(log_probs_at(cache, ids), expected, atol=1e-5)
    assert "overstate the teacher's confidence" in about(cache)["missing"]["normaliser"]
    assert "overstate the teacher" in (tmp_path / "a.cache/README.md").read_text()


def test_every_format_is_listed_by_the_command() -> None:
    shown = run("import", "--help").stdout

    assert list(FORMATS) == list(IMPORTERS)
    for name in FORMATS:
        assert f"{name}: " in shown


def test_tinyvit_epochs_are_views_and_rows_are_positions(tmp_path: Path) -> None:
    expected = tinyvit(tmp_path / "logits", [str(number) for number in range(7)])
    details = tmp_path / "seeds.npz"
    cache = imported(tmp_path / "a.cache", "tinyvit", tmp_path / "logits", num_classes=20, details=details)

    assert (7, 2, 20) == (cache.num_samples, cache.num_views, cache.num_classes)
    for view, (ids, probs) in expected.items():
        assert np.allclose(np.exp(log_probs_at(cache, ids, view)), probs, atol=1e-6)
        rest = 1 - np.exp(log_probs_at(cache, np.arange(20)[None].repeat(7, 0), view)).sum(axis=1)
        assert np.allclose(rest, 0, atol=1e-6)
    seeds = np.load(details)["seeds"]
    assert (np.arange(7) == seeds[0]).all()
    assert (np.arange(7) + 100 == seeds[1]).all()
    with pytest.raises(UsageError, match="is not stored, only its seeds"):
        _ = cache.view_plan
    assert "the transform is not stored" in about(cache)["missing"]["view"]


def test_rows_get_the_order_of_the_users_dataset(tmp_path: Path) -> None:
    keys = ["n01_a", "n01_b", "n02_c"]
    expected = tinyvit(tmp_path / "logits", keys, epochs=1)[0]
    table = SampleTable(
        2, ["n02/n02_c.JPEG", "n01/n01_a.JPEG"], np.array([1, 0]), np.arange(32, dtype=np.uint8).reshape(2, 16)
    )
    cache = imported(tmp_path / "a.cache", "tinyvit", tmp_path / "logits", num_classes=20, samples=table, dataset=None)

    assert table.fingerprint() == cache.manifest.identity.dataset
    assert [1] == cache.rows(["n01/n01_a.JPEG"]).tolist()
    assert np.allclose(np.exp(log_probs_at(cache, expected[0][[2, 0]])), expected[1][[2, 0]], atol=1e-6)
    other = SampleTable(1, ["n03/x.JPEG"], np.array([0]), np.zeros((1, 16), np.uint8))
    with pytest.raises(SampleMismatch, match=r"no labels of sample 0 \(n03/x.JPEG\)"):
        imported(tmp_path / "b.cache", "tinyvit", tmp_path / "logits", num_classes=20, samples=other, dataset=None)


def test_the_command_matches_rows_with_the_samples_of_a_pipeline(tiny: Make, tmp_path: Path) -> None:
    train = pipeline_data(tiny(*PICTURES)).train
    stems = [Path(key).stem for key in train.keys]
    expected = tinyvit(tmp_path / "logits", stems, epochs=1)[0]
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    options = ["--data", tmp_path / "tiny.yaml", "--num-classes", 20, "--teacher", "net"]
    found = run_json("import", "tinyvit", tmp_path / "logits", tmp_path / "a.cache", *PICTURES, *options)
    cache = logitcache.open(tmp_path / "a.cache")

    assert logitcache.sample_table(train, contents=True).fingerprint() == found["dataset"]
    assert list(range(5)) == cache.rows(train.keys[:5]).tolist()
    assert np.allclose(np.exp(log_probs_at(cache, expected[0])), expected[1], atol=1e-6)


def test_fkd_crops_are_views_and_boxes_go_to_a_file(tmp_path: Path) -> None:
    ids, probs = fkd(tmp_path / "train", ["n01/n01_1", "n02/n02_1"])
    details = tmp_path / "boxes.npz"
    cache = imported(tmp_path / "a.cache", "fkd", tmp_path / "train", num_classes=20, details=details)

    for view in range(2):
        assert np.allclose(np.exp(log_probs_at(cache, ids[:, view], view)), probs[:, view], atol=1e-6)
    boxes = np.load(details)
    assert ["n01/n01_1", "n02/n02_1"] == boxes["keys"].tolist()
    assert (2, 2, 4) == boxes["boxes"].shape
    assert [[True, True], [False, False]] == boxes["flips"].tolist()


@pytest.mark.parametrize("packed", [False, True], ids=["torch", "joblib"])
def test_ml_dr_views_arrive_with_their_parameters(tmp_path: Path, packed: bool) -> None:
    ids, probs = ml_dr(tmp_path / "data", 3, packed)
    details = tmp_path / "parameters.npz"
    cache = imported(tmp_path / "a.cache", "ml_dr", tmp_path / "data", num_classes=20, details=details)

    for view in range(2):
        assert np.allclose(np.exp(log_probs_at(cache, ids[:, view], view)), probs[:, view], atol=1e-6)
    assert [None, [1, 2, 3, 1]] == json.loads(np.load(details)["parameters"][1, 0])


def test_megatron_sequences_are_in_the_order_of_the_loader(tmp_path: Path) -> None:
    expected = megatron(tmp_path / "logits")
    cache = imported(tmp_path / "a.cache", "megatron", tmp_path / "logits", num_classes=70_000)

    assert (8, 40) == (cache.num_samples, cache.num_rows)
    ids = np.concatenate([ids[:, place] for ids, _ in expected for place in range(2)])
    values = np.concatenate([values[:, place] for _, values in expected for place in range(2)])
    there = values > -1000
    found = log_probs_at(cache, ids)
    assert np.allclose(found[there], values.astype(np.float16)[there], atol=2e-3)
    assert (found[~there] < -9).all()  # of the tail, spread over 70 000 classes
    assert {"seed": 1} == about(cache)["notes"]["meta"]["identifiers"]


def test_axolotl_lines_arrive_with_the_identity_of_their_tokens(tmp_path: Path) -> None:
    records = axolotl_records()
    (tmp_path / "kd.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    cache = imported(tmp_path / "a.cache", "axolotl", tmp_path / "kd.jsonl", num_classes=20)
    tokens = token_dataset([record["input_ids"] for record in records])

    assert [0, 4, 9, 15] == cache.row_offsets.tolist()
    flat = [row for record in records for row in record["logprobs"]]
    ids = np.array([[int(each["token"][9:]) for each in row] + [0] * (4 - len(row)) for row in flat])
    logs = np.array([[each["logprob"] for each in row] + [np.nan] * (4 - len(row)) for row in flat])
    found = log_probs_at(cache, ids)
    assert np.allclose(found[~np.isnan(logs)], logs[~np.isnan(logs)], atol=1e-5)
    assert cache.samples is not None
    assert (logitcache.sample_table(tokens, contents=True).contents == cache.samples.contents).all()
    assert "not stored" in about(cache)["missing"]["alignment"]


def test_distillkit_bytes_are_decoded(tmp_path: Path) -> None:
    need_package("pyarrow", "parquet")
    ids, values = distillkit(tmp_path / "kit")
    cache = imported(tmp_path / "a.cache", "distillkit", tmp_path / "kit", num_classes=20, dataset=None)

    assert [0, 3, 8] == cache.row_offsets.tolist()
    assert np.allclose(log_probs_at(cache, ids), values, atol=1e-5)
    (tmp_path / "kit/compression_config.yaml").unlink()
    with pytest.raises(UsageError, match=r"no compression_config.yaml, without which the bytes can't be decoded"):
        imported(tmp_path / "b.cache", "distillkit", tmp_path / "kit", num_classes=20)


def some_logits() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(2, 9, 6)).astype(np.float32)


def npy_per_view(folder: Path) -> Path:
    folder.mkdir()
    for view in range(2):
        np.save(folder / f"view{view}.npy", some_logits()[view])
    return folder


def npz(folder: Path) -> Path:
    folder.mkdir()
    np.savez(folder / "a.npz", logits=some_logits(), keys=np.array(list("abcdefghi")))
    return folder / "a.npz"


@pytest.mark.parametrize("write", [npy_per_view, npz])
def test_plain_arrays_are_imported_exactly(tmp_path: Path, write: Callable[[Path], Path]) -> None:
    cache = imported(tmp_path / "a.cache", "numpy", write(tmp_path / "in"))

    for view in range(2):
        found = cache.view(view).logits(range(9)).log_softmax(dim=1)
        assert torch.allclose(torch.tensor(some_logits()[view]).log_softmax(dim=1), found, atol=1e-6)


def test_dense_logits_take_any_encoding(tmp_path: Path) -> None:
    cache = imported(tmp_path / "a.cache", "numpy", npy_per_view(tmp_path / "in"), encoding="LowRank(rank=2, k=1)")

    assert "lowrank" == cache.encoding.name


@pytest.mark.parametrize("top", [None, 3])
def test_an_export_to_parquet_comes_back(tmp_path: Path, top: int | None) -> None:
    need_package("pyarrow", "parquet")
    from logitcache.extras.interchange.parquet import export_parquet

    first = imported(tmp_path / "a.cache", "numpy", npy_per_view(tmp_path / "in"))
    export_parquet(str(tmp_path / "a.cache"), tmp_path / "out", top=top)
    cache = imported(tmp_path / "b.cache", "parquet", tmp_path / "out", num_classes=6)

    for view in range(2):
        here, there = (each.view(view).logits(range(9)).log_softmax(dim=1) for each in (first, cache))
        kept = here if top is None else here.topk(top).values
        found = there if top is None else there.topk(top).values
        assert torch.allclose(kept, found, atol=1e-5)


def test_an_import_run_again_reads_no_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tinyvit(tmp_path / "logits", ["0", "1"])
    first = imported(tmp_path / "a.cache", "tinyvit", tmp_path / "logits", num_classes=20)
    monkeypatch.setattr(IMPORTERS["tinyvit"], "batches", lambda self: pytest.fail("rows were read again"))

    assert first.digest == imported(tmp_path / "a.cache", "tinyvit", tmp_path / "logits", num_classes=20).digest


def test_an_interrupted_import_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Committed rows are compared with the source, and the result is that of an import at once."""
    tinyvit(tmp_path / "logits", ["0", "1"])
    batches = IMPORTERS["tinyvit"].batches

    def stops(self: Importer) -> Iterator[Any]:
        yield next(iter(batches(self)))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(IMPORTERS["tinyvit"], "batches", stops)
        with pytest.raises(KeyboardInterrupt):
            imported(tmp_path / "a.cache", "tinyvit", tmp_path / "logits", num_classes=20)
    assert (tmp_path / "a.cache/receipts/v00000/b00000.json").is_file()
    assert not logitcache.open(tmp_path / "a.cache").sealed

    resumed = imported(tmp_path / "a.cache", "tinyvit", tmp_path / "logits", num_classes=20)
    assert resumed.digest == imported(tmp_path / "b.cache", "tinyvit", tmp_path / "logits", num_classes=20).digest


def test_the_command_shows_bytes_before_and_after_and_what_is_missing(tmp_path: Path) -> None:
    tinyvit(tmp_path / "logits", ["0", "1"])
    options = ["--num-classes", 20, "--teacher", "net", "--dataset", "pictures"]
    found = run_json("import", "tinyvit", tmp_path / "logits", tmp_path / "a.cache", *options)

    assert sum(path.stat().st_size for path in (tmp_path / "logits").rglob("*.*")) == found["source_bytes"]
    assert {"view", "identity", "tail"} == set(found["missing"])
    assert found["sealed"]
    shown = run("import", "tinyvit", tmp_path / "logits", tmp_path / "b.cache", *options).stdout
    assert "4 files" in shown
    assert "Not in the source: view: the transform is not stored" in shown
    assert "What they lack" in (tmp_path / "a.cache" / "README.md").read_text()


class Lines(Importer):
    """A plugin's format: a text file with a row of logits on each line."""

    name = "lines"
    tool = "Lines"

    def __init__(self, source: Path, *, num_classes: int | None = None) -> None:
        super().__init__(source, num_classes=num_classes)
        self.files = [source]
        self.rows = np.loadtxt(source, dtype=np.float32)
        self.num_samples, self.num_classes = self.rows.shape
        self.missing = {"view": "unknown"}

    def batches(self) -> Iterator[DenseRows]:
        yield DenseRows(0, 0, self.rows, self.source)


def test_a_package_adds_a_format_by_an_entry_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = EntryPoint("lines", f"{__name__}:Lines", IMPORTERS.group)
    monkeypatch.setattr("logitcache.registry.offered", lambda group: {"lines": [entry]})
    (tmp_path / "a.txt").write_text("1 2 3\n0 0 5\n")
    cache = imported(tmp_path / "a.cache", "lines", tmp_path / "a.txt")

    assert "logitcache.importers" == IMPORTERS.group
    assert [2, 2] == cache.view(0).logits([0, 1]).argmax(dim=1).tolist()
    assert {"view": "unknown"} == about(cache)["missing"]


# Hidden states.


HIDDEN, HEAD_CLASSES = 6, 11


def specforge(folder: Path, lengths: tuple[int, ...] = (5, 1, 4)) -> list[tuple[np.ndarray, Tensor]]:
    """Token ids and states of sequences; every second file is compressed."""
    (folder / "rows_0-2000").mkdir(parents=True)
    found = []
    for number, length in enumerate(lengths):
        generator = torch.Generator().manual_seed(number)
        ids = torch.randint(0, HEAD_CLASSES, (length,), generator=generator)
        states = torch.randn(1, length, HIDDEN, generator=generator).bfloat16()
        stored = {"input_ids": ids, "loss_mask": torch.ones_like(ids), "hidden_state": states}
        data = saved(stored | {"aux_hidden_state": states.repeat(1, 1, 3)})
        path = folder / f"rows_0-2000/data_{number}.ckpt"
        _ = path.write_bytes(data) if number % 2 == 0 else Path(f"{path}.gz").write_bytes(gzip.compress(data))
        found.append((ids.numpy(), states[0].float()))
    return found


def speculators(folder: Path) -> list[tuple[np.ndarray, Tensor]]:
    (folder / "hidden_states").mkdir(parents=True)
    found = []
    for number, length in enumerate((4, 6)):
        generator = torch.Generator().manual_seed(number)
        ids = torch.randint(0, HEAD_CLASSES, (length,), generator=generator)
        states = torch.randn(length, 3, HIDDEN, generator=generator).bfloat16()
        save_file({"token_ids": ids, "hidden_states": states}, folder / f"hidden_states/hs_{number}.safetensors")
        found.append((ids.numpy(), states[:, -1].float()))
    return found


def a_head(size: int = HIDDEN) -> Tensor:
    return torch.randn(HEAD_CLASSES, size, generator=torch.Generator().manual_seed(9))


@pytest.mark.parametrize("write", [specforge, speculators])
def test_hidden_states_become_logits_by_the_head(tmp_path: Path, write: Any) -> None:
    expected, head = write(tmp_path / "in"), a_head()
    settings: dict[str, Any] = {"encoding": "Dense(dtype='float32')", "dataset": None}
    cache = imported(tmp_path / "a", write.__name__, tmp_path / "in", head=head, **settings)
    states = torch.cat([each[:-1] for _, each in expected])

    assert [max(0, len(ids) - 1) for ids, _ in expected] == np.diff(cache.row_offsets).tolist()
    rows = range(cache.num_rows)
    assert torch.equal(states, cache.view(0).output("hidden_state", rows))
    torch.testing.assert_close((states @ head.T), cache.view(0).logits(rows))
    tokens = token_dataset([ids for ids, _ in expected])
    assert cache.samples is not None
    assert (logitcache.sample_table(tokens, contents=True).contents == cache.samples.contents).all()
    other = imported(tmp_path / "b", write.__name__, tmp_path / "in", head=lambda found: found @ head.T, **settings)
    assert torch.equal(cache.view(0).logits(rows), other.view(0).logits(rows))


def test_the_command_takes_the_head_from_a_file_of_weights(tmp_path: Path) -> None:
    specforge(tmp_path / "in")
    save_file({"lm_head.weight": a_head(), "model.norm.weight": torch.ones(HIDDEN)}, tmp_path / "model.safetensors")
    arguments = ["import", "specforge", tmp_path / "in", tmp_path / "a", "--teacher", "net"]
    found = run_json(*arguments, "--head", tmp_path / "model.safetensors", "--encoding", "TopK(k=4)")

    assert HEAD_CLASSES == found["num_classes"]
    assert ["hidden_state"] == list(found["outputs"])
    refused(run(*arguments), 2, "Add --head FILE")
    save_file({"a": a_head(), "b": a_head()}, tmp_path / "other.safetensors")
    refused(run(*arguments, "--head", tmp_path / "other.safetensors"), 2, "has none of the tensors lm_head.weight")


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (torch.randn(HEAD_CLASSES, HIDDEN + 1), r"expected floats \(C, 6\)"),
        (lambda states: states[:, None], "1 states; expected|the head makes logits"),
    ],
    ids=["size", "function"],
)
def test_heads_of_other_models_are_refused(tmp_path: Path, head: Any, message: str) -> None:
    specforge(tmp_path / "in")
    with pytest.raises(UsageError, match=message):
        imported(tmp_path / "a", "specforge", tmp_path / "in", head=head, num_classes=HEAD_CLASSES, dataset=None)
    tinyvit(tmp_path / "logits", ["0", "1"])
    with pytest.raises(UsageError, match="leave out the head"):
        imported(tmp_path / "a", "tinyvit", tmp_path / "logits", head=head, num_classes=20)


def test_damaged_hidden_states_are_refused(tmp_path: Path) -> None:
    specforge(tmp_path / "in")
    path = tmp_path / "in/rows_0-2000/data_0.ckpt"
    good = path.read_bytes()
    for value, message in (
        ({"input_ids": torch.arange(5)}, "lacks its token ids or hidden states"),
        ({"input_ids": torch.arange(5), "hidden_state": torch.zeros(1, 4, HIDDEN)}, r"expected \(S,\) and floats"),
        ({"input_ids": torch.arange(5), "hidden_state": torch.zeros(1, 5, 7)}, "states of 6, 7 values"),
        ([Bomb()], "names .*system.*nothing was run"),
    ):
        path.write_bytes(saved(value))
        with pytest.raises(InvalidSource, match=message):
            imported(tmp_path / "a", "specforge", tmp_path / "in", head=a_head(), dataset=None)
    path.write_bytes(good)
    (tmp_path / "in/data_0.ckpt").write_bytes(good)
    with pytest.raises(InvalidSource, match="have the same number"):
        imported(tmp_path / "a", "specforge", tmp_path / "in", head=a_head(), dataset=None)


# Hostile and wrong files.


class Bomb:
    """Runs a command when it is unpickled without restriction."""

    def __reduce__(self) -> Any:
        return os.system, ("touch exploded",)


def evil_fkd(folder: Path) -> None:
    fkd(folder, ["n01/a"])
    (folder / "n01/a.tar").write_bytes(saved([Bomb(), Bomb(), Bomb()]))


def evil_ml_dr(folder: Path) -> None:
    folder.mkdir()
    (folder / "0.pth.tar").write_bytes(zlib.compress(pickle.dumps((0, [Bomb()]))))


def object_array(folder: Path) -> None:
    fkd(folder, ["n01/a"])
    (folder / "n01/a.tar").write_bytes(saved([np.array([Bomb()], dtype=object)] * 3))


def huge_memo(folder: Path) -> None:
    folder.mkdir()
    data = b"\x80\x04]r\xff\xff\xff\x7f."
    (folder / "0.pth.tar").write_bytes(zlib.compress(data))


def zlib_bomb(folder: Path) -> None:
    folder.mkdir()
    (folder / "0.pth.tar").write_bytes(zlib.compress(bytes(2**25)))


def cut_values(folder: Path) -> None:
    tinyvit(folder, ["0", "1"])
    path = folder / "logits_top4_epoch1/rank0-values.bin"
    path.write_bytes(path.read_bytes()[:-3])


def cut_fkd(folder: Path) -> None:
    fkd(folder, ["n01/a"])
    path = folder / "n01/a.tar"
    path.write_bytes(path.read_bytes()[:200])


def unpacked_frame(folder: Path) -> None:
    megatron(folder)
    path = next(folder.iterdir())
    data = path.read_bytes()
    at = data.index(b"\x28\xb5\x2f\xfd")
    path.write_bytes(data[: at + 6] + b"\xff" * 3 + data[at + 9 :])


def wrong_class(folder: Path) -> None:
    tinyvit(folder, ["0", "1"])
    path = folder / "logits_top4_epoch0/rank0-values.bin"
    data = bytearray(path.read_bytes())
    data[4:6] = (999).to_bytes(2, "little")
    path.write_bytes(data)


def negative_class(folder: Path) -> None:
    wrong_class(folder)
    path = folder / "logits_top4_epoch0/rank0-values.bin"
    path.write_bytes(path.read_bytes()[:4] + b"\xff\xff" + path.read_bytes()[6:])


def lost_key(folder: Path) -> None:
    tinyvit(folder, ["a", "b"])
    path = folder / "logits_top4_epoch1/rank0-keys.txt"
    path.write_text(path.read_text().replace("a", "c"))


def nan(folder: Path) -> None:
    tinyvit(folder, ["0", "1"])
    path = folder / "logits_top4_epoch0/rank0-values.bin"
    path.write_bytes(path.read_bytes()[:12] + b"\x00\x7e" + path.read_bytes()[14:])


def too_probable(folder: Path) -> None:
    tinyvit(folder, ["0", "1"])
    path = folder / "logits_top4_epoch0/rank0-values.bin"
    path.write_bytes(path.read_bytes()[:12] + np.float16(3).tobytes() + path.read_bytes()[14:])


def nan_logits(folder: Path) -> None:
    folder.mkdir()
    np.save(folder / "a.npy", np.full((3, 4), np.nan, np.float32))


def pickled_array(folder: Path) -> None:
    folder.mkdir()
    np.save(folder / "a.npy", np.array([Bomb()], dtype=object))


def fraction(folder: Path) -> None:
    fkd(folder, ["n01/a"])
    labels = np.full((2, 2, 4), 0.5, np.float32)
    (folder / "n01/a.tar").write_bytes(saved([np.zeros((2, 4)), np.zeros(2, bool), labels]))


def one_of_many(folder: Path) -> None:
    fkd(folder, ["n01/a", "n01/b", "n01/c"])
    labels = np.tile(np.arange(4, dtype=np.float32), (2, 2, 1))
    labels[:, 1] = [[0.1] * 4, [0.9] * 4]
    (folder / "n01/b.tar").write_bytes(saved([np.full((2, 4), 0.1, np.float32), np.zeros(2, bool), labels]))


def cut_records(folder: Path) -> None:
    maxtext(folder)
    path = next(folder.iterdir())
    path.write_bytes(path.read_bytes()[:50])


def other_run(folder: Path) -> None:
    megatron(folder)
    megatron(folder, iterations=1)


def bad_line(folder: Path) -> None:
    folder.mkdir()
    (folder / "a.jsonl").write_text('{"input_ids": [1, 2], "logprobs": [[{"token": "dog", "logprob": -1}]]}\n')


HOSTILE: dict[str, tuple[str, Callable[[Path], None], type[LogitCacheError], str]] = {
    "a pickle that runs code, in a torch archive": ("fkd", evil_fkd, InvalidSource, "names .*system.*nothing was run"),
    "a pickle that runs code, compressed": ("ml_dr", evil_ml_dr, InvalidSource, "names .*system.*nothing was run"),
    "an array of objects": ("fkd", object_array, InvalidSource, "can't be read"),
    "a pickle with a huge memo": ("ml_dr", huge_memo, InvalidSource, "invalid memo"),
    "a zlib bomb": ("ml_dr", zlib_bomb, InvalidSource, "truncated or longer than 16,777,216 bytes"),
    "truncated records": ("tinyvit", cut_values, InvalidSource, "has 37 bytes, no whole number of records of 20 bytes"),
    "a key that an epoch lacks": ("tinyvit", lost_key, InvalidSource, "epoch1 lacks the key 'a'"),
    "a truncated archive": ("fkd", cut_fkd, InvalidSource, "a.tar can't be read"),
    "a zstd frame that claims to be huge": ("megatron", unpacked_frame, InvalidSource, "can't be read"),
    "truncated records of a sequence": ("maxtext", cut_records, InvalidSource, "array_record can't be read"),
    "an iteration twice": ("megatron", other_run, InvalidSource, "is also in"),
    "a class beyond the last": ("tinyvit", wrong_class, InvalidLogits, "epoch0, view 0: row . has class 999"),
    "a negative class": ("tinyvit", negative_class, InvalidSource, "has the class -1: .* int16"),
    "NaN": ("tinyvit", nan, InvalidLogits, "NaN as the log-probability"),
    "probabilities above 1": ("tinyvit", too_probable, InvalidLogits, "expected"),
    "one file of many": ("fkd", one_of_many, InvalidLogits, "b.tar, view 1: row 1 has probabilities with a sum of 3.6"),
    "NaN logits": ("numpy", nan_logits, InvalidLogits, "a.npy, view 0"),
    "a pickled array": ("numpy", pickled_array, InvalidSource, "can't be read"),
    "a class that is a fraction": ("fkd", fraction, InvalidSource, "no whole numbers"),
    "a token that is no id": ("axolotl", bad_line, InvalidSource, "not of the form token_id"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_files_are_refused_and_run_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    format, write, kind, message = HOSTILE[case]
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "in")

    with pytest.raises(kind, match=message):
        imported(tmp_path / "a.cache", format, tmp_path / "in", **({} if format == "numpy" else {"num_classes": 20}))
    assert not (tmp_path / "exploded").exists()


def test_what_a_format_lacks_must_be_given(tmp_path: Path) -> None:
    tinyvit(tmp_path / "logits", ["0", "1"])
    arguments = ["import", "tinyvit", tmp_path / "logits", tmp_path / "a.cache", "--teacher", "net"]

    refused(run(*arguments, "--dataset", "d"), 2, "do not state the number of classes; add --num-classes")
    refused(run(*arguments, "--num-classes", 20), 2, "do not record the dataset; add --dataset NAME")
    refused(run("import", "tinyvitt", *arguments[2:]), 2, "unknown format 'tinyvitt'; did you mean 'tinyvit'?")
    refused(run(*arguments, "--num-classes", 20, "--dataset", "d", "--encoding", "dense"), 2, "needs the encoding TopK")
    assert not (tmp_path / "a.cache").exists()


# Files that the tools themselves wrote.


def peers(name: str) -> tuple[Path, dict[str, np.ndarray]]:
    folder = PEERS / name
    if not folder.is_dir():
        pytest.skip(f"{folder} is not here: files that other tools wrote")
    need_package("pyarrow", "parquet")
    return folder, dict(np.load(folder / "expected.npz"))


@pytest.mark.parametrize("which", ["k10_index_keys", "k100_name_keys"])
def test_files_of_tinyvit(tmp_path: Path, which: str) -> None:
    folder, expected = peers("tinyvit")
    details = tmp_path / "seeds.npz"
    cache = imported(tmp_path / "a", "tinyvit", folder / which, num_classes=CLASSES, details=details)
    keys = expected[f"{which}__keys"].tolist()
    found = np.load(details)
    names = found["keys"].tolist() if "keys" in found else list(map(str, range(64)))
    order = [names.index(key) for key in keys]

    assert (expected[f"{which}__seeds"] == found["seeds"][:, order]).all()
    for view in range(2):
        ids, probs = expected[f"{which}__indices"][view], expected[f"{which}__probs_f16"][view].astype(float)
        logits = cache.view(view).logits(order).double().softmax(dim=1).numpy()
        assert np.allclose(np.take_along_axis(logits, ids.astype(int), 1), probs, atol=1e-6)
        np.put_along_axis(logits, ids.astype(int), -1.0, 1)
        tail = expected[f"{which}__tail_prob_per_class"][view]
        assert np.allclose(logits.max(axis=1), tail, atol=1e-6)


def test_repeated_keys_of_tinyvit_are_those_of_the_lowest_rank(tmp_path: Path) -> None:
    folder, expected = peers("tinyvit")
    which, details = "k10_index_keys_3ranks", tmp_path / "seeds.npz"
    cache = imported(tmp_path / "a", "tinyvit", folder / which, num_classes=CLASSES, details=details)
    seeds = np.load(details)["seeds"]

    assert 4 == about(cache)["notes"]["repeated_keys"]
    record = np.dtype([("seed", "<i4"), ("classes and probabilities", "V40")])
    for epoch in range(2):
        at = folder / which / f"logits_top10_epoch{epoch}"
        lowest: dict[str, int] = {}
        repeated = set()
        for rank in range(3):
            keys = (at / f"rank{rank}-keys.txt").read_text().split()
            records = np.fromfile(at / f"rank{rank}-values.bin", dtype=record)
            repeated |= lowest.keys() & set(keys)
            for key, seed in zip(keys, records["seed"].tolist(), strict=True):
                lowest.setdefault(key, seed)
        assert set(expected[f"{which}__epoch{epoch}_reader_rank0_duplicate_keys"].tolist()) == repeated
        assert [lowest[str(number)] for number in range(len(lowest))] == seeds[epoch].tolist()


KITS = ["recommended", "recommended_norm_t", "budget", "bins_delta", "legacy"]


@pytest.mark.parametrize("which", [*KITS, "open_instruct"])
def test_files_of_distillkit(tmp_path: Path, which: str) -> None:
    own = which == "open_instruct"
    folder, expected = peers("open_instruct" if own else "distillkit")
    format, at = ("open_instruct", "") if own else ("distillkit", f"{which}__")
    source = folder / ("default" if own else which)
    result = import_cache(format, source, tmp_path / "a", teacher="net", num_classes=VOCABULARY)
    cache = logitcache.open(tmp_path / "a")
    ids = expected[f"{at}indices"]
    values = expected[f"{at}values"].astype(float)
    rows, k = ids.shape[0] * ids.shape[1], ids.shape[2]
    total = np.exp(values).sum(axis=2).reshape(rows)
    found = log_probs_at(cache, ids.reshape(rows, k)).astype(float)

    assert [0, 63, 126] == cache.row_offsets.tolist()
    above = total > 1.0
    normalised = values.reshape(rows, k) - np.log(np.maximum(total, 1.0))[:, None]
    assert np.allclose(found, normalised, atol=2e-5)
    assert int((total > 1.001).sum()) == result.normalised_rows <= int(above.sum())
    tokens = token_dataset(expected[f"{at}input_ids"])
    assert cache.samples is not None
    assert (logitcache.sample_table(tokens, contents=True).contents == cache.samples.contents).all()


@pytest.mark.parametrize("which", ["legacy_v1.jsonl", "legacy_v1.parquet", "v2.parquet"])
def test_files_of_axolotl(tmp_path: Path, which: str) -> None:
    folder, expected = peers("axolotl")
    cache = imported(tmp_path / "a", "axolotl", folder / which, num_classes=VOCABULARY, dataset=None)
    assert [0, 63, 126] == cache.row_offsets.tolist()

    for sequence, temperature in itertools.product(range(2), (1, 2)):
        at = f"{which.partition('.')[0]}__T{temperature}__seq{sequence}__target_"
        here = expected[f"{at}mask"].astype(bool)
        here = here.any(axis=-1) if here.ndim > 1 else here
        ids, logs = expected[f"{at}token_ids"][here], expected[f"{at}logprobs"][here]
        rows = cache.row_map.sample_rows(sequence)
        stored = cache.view(0).logits(rows).double().log_softmax(dim=1)
        # Its reader normalises over the stored classes.
        scaled = stored.gather(1, torch.tensor(ids.astype(np.int64))) / temperature
        assert np.allclose(scaled.log_softmax(dim=1).numpy(), logs, atol=1e-5)


@pytest.mark.parametrize("which", ["k64_fp16", "k64_p095_bf16"])
def test_files_of_megatron(tmp_path: Path, which: str) -> None:
    folder, expected = peers("megatron")
    cache = imported(tmp_path / "a", "megatron", folder / which, num_classes=VOCABULARY)

    assert list(range(0, 129, 32)) == cache.row_offsets.tolist()
    for number, (iteration, microbatch) in enumerate(itertools.product(range(2), range(2))):
        at = f"{which}__it{iteration}_mb{microbatch}_"
        values, ids = expected[f"{at}values"], expected[f"{at}indices"]
        there = values > -1000
        logits = cache.view(0).logits(cache.row_map.sample_rows(number)).double().log_softmax(dim=1)
        found = logits.gather(1, torch.tensor(np.where(there, ids, 0).astype(np.int64))).numpy()
        # Probabilities in bfloat16 can exceed 1 by their rounding.
        total = np.where(there, np.exp(values.astype(float)), 0).sum(axis=1, keepdims=True)
        values = values - np.log(np.maximum(total, 1))
        assert np.allclose(found[there], values[there], atol=2e-5)


@pytest.mark.parametrize("which", ["k5_fp32", "k10_fp16"])
def test_files_of_fkd(tmp_path: Path, which: str) -> None:
    folder, expected = peers("fkd")
    details = tmp_path / "boxes.npz"
    cache = imported(tmp_path / "a", "fkd", folder / which, num_classes=CLASSES, details=details)
    found = np.load(details)
    names = [key.removeprefix("train/").removesuffix(".png") for key in expected[f"{which}__keys"]]
    order = [found["keys"].tolist().index(name) for name in names]

    assert (expected[f"{which}__coords"] == found["boxes"][:, order].swapaxes(0, 1)).all()
    assert (expected[f"{which}__flip"] == found["flips"][:, order].T).all()
    for view in range(cache.num_views):
        probs = cache.view(view).logits(order).double().softmax(dim=1).numpy()
        ids = expected[f"{which}__indices"][:, view].astype(int)
        assert np.allclose(np.take_along_axis(probs, ids, 1), expected[f"{which}__probs"][:, view], atol=1e-6)
        np.put_along_axis(probs, ids, -1.0, 1)
        assert np.allclose(probs.max(axis=1), expected[f"{which}__tail_prob_per_class"][:, view], atol=1e-6)


@pytest.mark.parametrize(
    ("which", "unpacked"), [("randaug_mixing", False), ("randaug_joblib", False), ("randaug_joblib", True)]
)
def test_files_of_ml_dr(tmp_path: Path, which: str, unpacked: bool) -> None:
    """Also from the archive in which the tool publishes a folder."""
    folder, expected = peers("ml_dr")
    details = tmp_path / "parameters.npz"
    source = folder / which / "reinforced_data"
    if unpacked:
        with tarfile.open(f"{source}.tar.gz") as archive:
            archive.extractall(tmp_path, filter="data")
        source = tmp_path / "reinforced_data"
    cache = imported(tmp_path / "a", "ml_dr", source, num_classes=CLASSES, details=details)
    parameters = np.load(details)["parameters"]

    for view in range(cache.num_views):
        probs = cache.view(view).logits(range(cache.num_samples)).double().softmax(dim=1).numpy()
        ids = expected[f"{which}__indices"][:, view].astype(int)
        assert np.allclose(np.take_along_axis(probs, ids, 1), expected[f"{which}__probs"][:, view], atol=1e-6)
        np.put_along_axis(probs, ids, -1.0, 1)
        assert np.allclose(probs.max(axis=1), expected[f"{which}__tail_prob_smooth"][:, view], atol=1e-6)
        for sample in range(cache.num_samples):
            stated = re.sub(r"np\.int64\((-?\d+)\)", r"\1", expected[f"{which}__params_repr"][sample, view])
            assert json.loads(json.dumps(ast.literal_eval(stated))) == json.loads(parameters[view, sample])


def test_files_of_specforge(tmp_path: Path) -> None:
    folder, expected = peers("specforge")
    head = a_head(576)
    cache = imported(tmp_path / "a", "specforge", folder, head=head, encoding="Dense(dtype='float32')", dataset=None)
    states = [torch.from_numpy(expected[f"data_{name}__hidden_f32_of_bf16"][:-1]) for name in ("0.ckpt", "1.ckpt.gz")]

    assert [0, 31, 62] == cache.row_offsets.tolist()
    torch.testing.assert_close(
        torch.cat(states), cache.view(0).output("hidden_state", range(62)), rtol=2**-9, atol=1e-6
    )
    torch.testing.assert_close(torch.cat(states) @ head.T, cache.view(0).logits(range(62)), rtol=1e-4, atol=1e-4)
    tokens = token_dataset([expected[f"data_{name}__input_ids"] for name in ("0.ckpt", "1.ckpt.gz")])
    assert cache.samples is not None
    assert (logitcache.sample_table(tokens, contents=True).contents == cache.samples.contents).all()


def test_files_of_speculators(tmp_path: Path) -> None:
    folder, expected = peers("speculators")
    head = a_head(576)
    cache = imported(tmp_path / "a", "speculators", folder, head=head, encoding="Dense(dtype='float32')", dataset=None)
    states = torch.cat([torch.from_numpy(expected[f"{n}__verifier_last_hidden_states"][:-1]) for n in range(2)])

    torch.testing.assert_close(states, cache.view(0).output("hidden_state", range(62)), rtol=2**-9, atol=1e-6)
    torch.testing.assert_close(states @ head.T, cache.view(0).logits(range(62)), rtol=1e-4, atol=1e-4)
    tokens = token_dataset([expected[f"{number}__input_ids"] for number in range(2)])
    assert cache.samples is not None
    assert (logitcache.sample_table(tokens, contents=True).contents == cache.samples.contents).all()


def test_files_of_maxtext(tmp_path: Path) -> None:
    folder, expected = peers("maxtext")
    need_package("array_record", "maxtext")
    cache = imported(tmp_path / "a", "maxtext", folder, num_classes=VOCABULARY, dataset=None)
    ids, logits = (expected[name].reshape(128, 32) for name in ("indices", "logits"))

    assert [0, 64, 128] == cache.row_offsets.tolist()
    assert np.allclose(log_probs_at(cache, ids), torch.tensor(logits).double().log_softmax(dim=1), atol=1e-5)
    assert cache.samples is not None
    table = logitcache.sample_table(token_dataset(expected["input_ids"]), contents=True)
    assert (table.contents == cache.samples.contents).all()
