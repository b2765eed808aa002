"""Nothing silently wrong, and nobody let in: damage, faults and hostile caches."""

from __future__ import annotations

import errno
import io
import json
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from numcodecs.zstd import Zstd
from torch import Tensor

import logitcache
from logitcache.cache.manifest import Identity, Manifest, read_manifest, read_receipts
from logitcache.cache.stored_records import check_encoding
from logitcache.config.schema import load_pipeline
from logitcache.digest import canonical_json, json_digest, sha256_hex
from logitcache.errors import CorruptCache, CorruptRun, LogitCacheError, NotACache, StorageError, UsageError
from logitcache.storage import LocalStorage
from logitcache.strict_json import parse_json
from logitcache.train.runs import CHECKPOINT, RESUME_HEADER, RunFolder
from logitcache.verify.audit import verify
from tests.golden.__main__ import decoded_file

VIEWS, SAMPLES, CLASSES = 2, 20, 6


def labels() -> Tensor:
    return torch.randn(VIEWS, SAMPLES, CLASSES, generator=torch.Generator().manual_seed(0)) * 3


def build(path: Path, **changes: Any) -> logitcache.LogitCache:
    settings: dict[str, Any] = {"encoding": logitcache.TopK(k=2), "teacher": "net@1", "dataset": "pictures"}
    shape = {"num_samples": SAMPLES, "num_classes": CLASSES, "num_views": VIEWS, "rows_per_block": 8}
    with logitcache.create(path, **(settings | shape | changes)) as writer:
        for view in range(VIEWS):
            writer.write(view=view, start=0, logits=labels()[view])
    return logitcache.open(path)


def read_all(path: Path) -> Tensor:
    cache = logitcache.open(path)
    return torch.stack([cache.view(view).logits(range(cache.num_rows)) for view in range(cache.num_views)])


def files(path: Path) -> list[Path]:
    """All but the card, which is for people, and theirs to edit."""
    return sorted(file for file in path.rglob("*") if file.is_file() and file.name != "README.md")


def reads_right_or_refuses(path: Path, right: Tensor) -> bool:
    """Whether it was refused; other numbers fail the test."""
    try:
        found = read_all(path)
    except LogitCacheError:
        return True
    assert torch.equal(right, found), "silently other numbers"
    return False


def test_no_flipped_byte_passes(tmp_path: Path) -> None:
    """One bit of every third byte of every file: reading never gives other numbers, and verify --deep names it."""
    path = tmp_path / "a"
    build(path)
    right = read_all(path)
    draw = random.Random(0)
    flips = 0
    for file in files(path):
        original = file.read_bytes()
        for place in range(draw.randrange(3), len(original), 3):
            damaged = bytearray(original)
            damaged[place] ^= 1 << draw.randrange(8)
            file.write_bytes(damaged)
            reads_right_or_refuses(path, right)
            if draw.random() < 0.1:  # the costlier half
                assert finds_a_problem(path, file), f"{file}: byte {place}"
            flips += 1
        file.write_bytes(original)

    assert flips > 1700
    assert [] == verify(str(path), deep=True)


def finds_a_problem(path: Path, damaged: Path) -> bool:
    """Whether verify names the damaged file, or refuses the cache for its manifest."""
    try:
        problems = verify(str(path), deep=True)
    except LogitCacheError:
        return damaged.name == "manifest.json"
    return damaged.relative_to(path).as_posix() in {problem.path for problem in problems}


def test_no_truncation_or_deletion_passes(tmp_path: Path) -> None:
    path = tmp_path / "a"
    build(path)
    right = read_all(path)
    for file in files(path):
        original = file.read_bytes()
        for length in range(0, len(original), 3 if "zarr/" in str(file) else 17):
            file.write_bytes(original[:length])
            reads_right_or_refuses(path, right)
        file.write_bytes(original[:-1])  # a byte less, be it the last newline
        assert finds_a_problem(path, file), file
        file.unlink()
        reads_right_or_refuses(path, right)
        assert finds_a_problem(path, file), file
        file.write_bytes(original)


def test_swapped_and_replayed_blocks_are_found(tmp_path: Path) -> None:
    """Every chunk in the place of every other of its array, and that of an older build with other labels."""
    path = tmp_path / "a"
    build(path)
    right = read_all(path)
    older = build_with(tmp_path / "older", labels().flip(1))
    chunks = [file for file in files(path / "labels.zarr") if file.name != "zarr.json"]
    for file in chunks:
        original = file.read_bytes()
        array = file.relative_to(path / "labels.zarr").parts[0]
        others = [other for other in chunks if other.relative_to(path / "labels.zarr").parts[0] == array]
        for other in [*others, older / file.relative_to(path)]:
            if other.read_bytes() == original:
                continue
            file.write_bytes(other.read_bytes())
            assert reads_right_or_refuses(path, right)
            (problem,) = verify(str(path), deep=True)
            assert problem.path == file.relative_to(path).as_posix()
        file.write_bytes(original)


def build_with(path: Path, logits: Tensor) -> Path:
    shape = {"num_samples": SAMPLES, "num_classes": CLASSES, "num_views": VIEWS, "rows_per_block": 8}
    with logitcache.create(path, **shape, encoding=logitcache.TopK(k=2), teacher="t", dataset="d") as writer:
        for view in range(VIEWS):
            writer.write(view=view, start=0, logits=logits[view])
    return path


@pytest.mark.parametrize("encoding", [logitcache.TopK(k=2), logitcache.LowRank(rank=3)], ids=repr)
def test_builders_of_one_cache_do_not_harm_each_other(tmp_path: Path, encoding: logitcache.TopK, forks: Any) -> None:
    calibration = labels().flatten(0, 1)
    alone = build(tmp_path / "alone", encoding=encoding, calibration=calibration)
    for attempt in range(4):
        path = tmp_path / f"together-{attempt}"
        # Not forks of this process: torch's threads, which ran here, can't be started again in them.
        settings = {"encoding": encoding, "calibration": calibration.numpy()}
        children = [forks.Process(target=build, args=(path,), kwargs=settings) for _ in range(3)]
        for child in children:
            child.start()
        for child in children:
            child.join()
        assert [0, 0, 0] == [child.exitcode for child in children]
        assert alone.digest == logitcache.open(path).digest
        assert [] == verify(str(path), deep=True)


class Faulty(LocalStorage):
    """Fails once, at the n-th call."""

    def __init__(self, root: Path, fail_at: int, error: OSError) -> None:
        super().__init__(root)
        self.calls, self.fail_at, self.error = 0, fail_at, error

    def _count(self) -> None:
        self.calls += 1
        if self.calls == self.fail_at:
            raise StorageError(f"can't reach {self.root}: {self.error}") from self.error

    def get(self, key: str, *, limit: int | None = None) -> bytes | None:
        self._count()
        return super().get(key, limit=limit)

    def put(self, key: str, data: bytes, *, durable: bool = True) -> None:
        self._count()
        super().put(key, data, durable=durable)

    def create(self, key: str, data: bytes) -> bool:
        self._count()
        return super().create(key, data)

    def size(self, key: str) -> int | None:
        self._count()
        return super().size(key)

    def delete(self, key: str) -> None:
        self._count()
        super().delete(key)

    def list_keys(self, prefix: str = "") -> Iterator[str]:
        self._count()
        return super().list_keys(prefix)


@pytest.mark.parametrize(
    ("code", "calls"),
    [(errno.EIO, range(1, 200)), (errno.ENOSPC, range(2, 200, 4)), (errno.ETIMEDOUT, range(3, 200, 4))],
    ids=["EIO", "ENOSPC", "ETIMEDOUT"],
)
def test_a_storage_that_fails_once_at_any_call_ends_in_an_error_or_the_right_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, calls: range
) -> None:
    whole = build(tmp_path / "whole")
    right = read_all(tmp_path / "whole")
    failed = 0
    for fail_at in calls:
        path = tmp_path / f"at-{fail_at}"
        storage = Faulty(path, fail_at, OSError(code, os.strerror(code)))
        with monkeypatch.context() as patched:
            patched.setattr("logitcache.cache.creation.open_storage", lambda _, storage=storage: storage)
            try:
                build(path)
                done = True
            except StorageError:
                failed, done = failed + 1, False
        if not done and path.exists():
            reads_right_or_refuses(path, right)
        assert whole.digest == build(path).digest
        shutil.rmtree(path)
        if storage.calls < fail_at:
            break

    assert failed > 20 / calls.step


def test_a_storage_that_fails_while_reading_gives_an_error_or_the_right_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(tmp_path / "a")
    right = read_all(tmp_path / "a")
    for fail_at in range(1, 100):
        storage = Faulty(tmp_path / "a", fail_at, OSError(errno.EIO, "I/O error"))
        monkeypatch.setattr("logitcache.cache.reader.open_storage", lambda _, storage=storage: storage)
        refused = reads_right_or_refuses(tmp_path / "a", right)
        if storage.calls < fail_at:
            break
        assert refused


def rewrite_manifest(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Somebody who knows the format: the identity's hash is made to fit."""
    raw = json.loads((path / "manifest.json").read_text())
    change(raw)
    raw["id"] = json_digest(raw["identity"])
    del raw["checksum"]
    raw["checksum"] = json_digest(raw)
    (path / "manifest.json").write_text(json.dumps(raw) + "\n")


HOSTILE_MANIFESTS: dict[str, Callable[[dict[str, Any]], object]] = {
    "giant number of samples": lambda raw: raw["layout"].update(num_samples=2**50),
    "giant number of views": lambda raw: raw["layout"].update(num_views=2**40),
    "giant chunks": lambda raw: (
        raw["layout"].update(rows_per_block=2**31 - 1, num_samples=2**31),
        raw["layout"]["arrays"]["values"].update(row_shape=[8]),
    ),
    "giant rows": lambda raw: raw["layout"]["arrays"]["ids"].update(row_shape=[2**40]),
    "negative rows": lambda raw: raw["layout"]["arrays"]["ids"].update(row_shape=[-1]),
    "object dtype": lambda raw: raw["layout"]["arrays"]["ids"].update(dtype="object"),
    "another dtype": lambda raw: raw["layout"]["arrays"]["ids"].update(dtype="uint32"),
    "array beside the store": lambda raw: raw["layout"]["arrays"].update(
        {"../../x": raw["layout"]["arrays"].pop("ids")}
    ),
    "absolute array": lambda raw: raw["layout"]["arrays"].update({"/etc/passwd": raw["layout"]["arrays"].pop("ids")}),
    "another array": lambda raw: raw["layout"]["arrays"].update(extra=raw["layout"]["arrays"]["ids"]),
    "giant fixed array": lambda raw: raw["layout"]["fixed"].update(basis={"dtype": "float32", "shape": [2**40, 2**20]}),
    "unknown encoding": lambda raw: raw["identity"]["encoding"].update(name="pickle"),
    "auto": lambda raw: raw["identity"].update(encoding={"name": "auto", "max_kl": 1.0}),
    "more classes kept than there are": lambda raw: raw["identity"]["encoding"].update(k=10_000),
    "code for a number": lambda raw: raw["identity"]["encoding"].update(k="__import__('os').system('true')"),
    "unknown key": lambda raw: raw.update(run="rm -rf /"),
    "digest of another form": lambda raw: raw.update(digest="../../../etc/passwd"),
}


@pytest.mark.parametrize("change", HOSTILE_MANIFESTS.values(), ids=HOSTILE_MANIFESTS.keys())
def test_a_hostile_manifest_is_refused(tmp_path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    build(tmp_path / "a")
    rewrite_manifest(tmp_path / "a", change)
    with executes_nothing(), pytest.raises(CorruptCache, match=r"manifest\.json is damaged"):
        read_all(tmp_path / "a")


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("[" * 100_000, id="deep"),
        pytest.param('{"format": "logitcache", "format": "logitcache"}', id="a key twice"),
        pytest.param('{"format": "logitcache", "x": NaN}', id="NaN"),
        pytest.param('{"format": "logitcache", "x": 1e999}', id="infinite"),
        pytest.param('{"x": ' + "9" * 10_000 + "}", id="long number"),
        pytest.param("\ud800".encode("utf-16", "surrogatepass").decode("latin1"), id="no UTF-8"),
        pytest.param(" " * (2**24 + 1), id="long"),
        pytest.param("", id="empty"),
    ],
)
def test_json_that_two_parsers_might_read_differently_is_refused(tmp_path: Path, text: str) -> None:
    build(tmp_path / "a")
    for name, error in (("manifest.json", NotACache), ("receipts.json", CorruptCache)):
        original = (tmp_path / "a" / name).read_text()
        (tmp_path / "a" / name).write_text(text, encoding="latin1")
        with pytest.raises(error):
            logitcache.open(tmp_path / "a")
        (tmp_path / "a" / name).write_text(original)


def forge_chunk(path: Path, name: str, data: bytes) -> None:
    """Put bytes in the place of a chunk, with receipts and digest made to fit: a liar's cache is consistent."""
    chunk = next(file for file in files(path / "labels.zarr" / name) if file.name != "zarr.json")
    view, number = chunk.relative_to(path / "labels.zarr" / name / "c").parts[:2]
    block = f"v{int(view):05d}/b{int(number):05d}"
    chunk.write_bytes(data)
    receipts = json.loads((path / "receipts.json").read_text())
    receipts[block]["objects"][name] |= {"bytes": len(data), "sha256": sha256_hex(data)}
    (path / "receipts.json").write_bytes(canonical_json(receipts))
    rewrite_manifest(path, lambda raw: raw.update(receipts=sha256_hex(canonical_json(receipts))))


def test_a_decompression_bomb_is_never_inflated(tmp_path: Path) -> None:
    import resource

    build(tmp_path / "a", encoding=logitcache.Dense())
    bomb = Zstd(level=19, checksum=True).encode(bytes(2**29))
    lying = bytearray(bomb)
    size_flag = bomb[4] >> 6
    place = 5 if bomb[4] >> 5 & 1 else 6
    lying[place : place + (1 << size_flag)] = (8 * CLASSES * 2).to_bytes(1 << size_flag, "little")
    for data in (bytes(bomb), bytes(lying), bytes(bomb) * 2, b"", b"\x28\xb5\x2f\xfd"):
        forge_chunk(tmp_path / "a", "logits", data)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with pytest.raises(CorruptCache, match="can't be decoded|a chunk of it takes"):
            read_all(tmp_path / "a")
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 1024


def test_links_and_pipes_are_not_followed(tmp_path: Path) -> None:
    build(tmp_path / "a")
    secret = tmp_path / "secret"
    secret.write_text("{}")
    chunk = next(file for file in files(tmp_path / "a" / "labels.zarr" / "tail") if file.name != "zarr.json")
    for victim in (tmp_path / "a/receipts.json", chunk):
        original = victim.read_bytes()
        victim.unlink()
        victim.symlink_to(secret)
        with pytest.raises(CorruptCache, match="link to outside the cache"):
            read_all(tmp_path / "a")
        victim.unlink()
        os.mkfifo(victim)
        with pytest.raises(CorruptCache, match="not a regular file"):
            read_all(tmp_path / "a")
        victim.unlink()
        victim.write_bytes(original)
    read_all(tmp_path / "a")


def test_a_folder_that_leads_out_of_the_cache_is_not_written_to(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "labels.zarr").symlink_to(outside)
    with pytest.raises((CorruptCache, NotACache)):
        build(tmp_path / "a")
    assert [] == list(outside.iterdir())


def test_metadata_of_zarr_is_never_read(tmp_path: Path) -> None:
    """What a reader of ours decodes is said by the manifest; a pickle filter in zarr's metadata does nothing."""
    build(tmp_path / "a")
    right = read_all(tmp_path / "a")
    hostile = {"zarr_format": 2, "filters": [{"id": "pickle"}], "shape": [2**50], "chunks": [1], "dtype": "|O"}
    for file in (tmp_path / "a" / "labels.zarr").rglob("zarr.json"):
        file.write_text(json.dumps(hostile))
    with executes_nothing():
        assert torch.equal(right, read_all(tmp_path / "a"))
    assert {"wrong bytes"} == {problem.kind for problem in verify(str(tmp_path / "a"))}


class Payload:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


def test_a_checkpoint_with_a_payload_is_refused(tmp_path: Path) -> None:
    """With no SHA-256, and with one that its author made."""
    folder = RunFolder(tmp_path / "run", {"name": "x"})
    content = io.BytesIO()
    torch.save({"state": Payload(tmp_path / "executed")}, content)
    signed = RESUME_HEADER + f"{sha256_hex(content.getvalue())}\n".encode()
    for header, message in ((b"", "without SHA-256 in checkpoints"), (signed, "can't be read")):
        (tmp_path / "run" / CHECKPOINT).write_bytes(header + content.getvalue())
        with pytest.raises(CorruptRun, match=rf"{message}.*delete it to train from the start"):
            folder.checkpoint()
    assert not (tmp_path / "executed").exists()


def test_a_pipeline_that_would_run_something_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "p.yaml"
    for text in (
        f"name: !!python/object/apply:os.mkdir ['{tmp_path}/executed']",
        f"data: !!python/object/new:os.mkdir ['{tmp_path}/executed']",
        "a: &a [*a]",
        "{" * 50_000,
    ):
        file.write_text(text)
        with executes_nothing(), pytest.raises(UsageError):
            load_pipeline(file)
    assert not (tmp_path / "executed").exists()


class executes_nothing:  # noqa: N801
    """While inside, no process is started, nothing is unpickled, compiled or connected to."""

    _watching = False
    _hooked = False
    seen: list[str] = []  # noqa: RUF012

    def __enter__(self) -> None:
        if not executes_nothing._hooked:
            sys.addaudithook(executes_nothing._hook)
            executes_nothing._hooked = True
        executes_nothing.seen, executes_nothing._watching = [], True

    def __exit__(self, *exception: object) -> None:
        executes_nothing._watching = False
        assert [] == executes_nothing.seen

    @staticmethod
    def _hook(event: str, arguments: tuple[Any, ...]) -> None:
        forbidden = ("subprocess.", "os.system", "os.exec", "os.posix_spawn", "pickle.", "socket.connect", "marshal.")
        if executes_nothing._watching and event.startswith(forbidden):
            executes_nothing.seen.append(event)


def fuzz(rounds: int, seed: int, folder: Path) -> int:
    """Feed damaged metadata to every parser; anything but a value or our own error escapes. Returns how many it fed."""
    identity = {
        "format_version": 1, "dataset": "d", "teacher": "t", "precision": "float32", "transform": None, "view_seed": 0,
        "encoding": {"name": "topk", "k": 2, "dtype": "float16"}, "outputs": {"logits": [6]}, "class_names": None,
    }  # fmt: skip
    manifest = {
        "format": "logitcache", "id": Identity.model_validate(identity).cache_id, "identity": identity,
        "layout": {"num_samples": 20, "num_views": 2, "num_classes": 6, "rows_per_block": 8, "fixed": {}, "arrays": {
            "ids": {"dtype": "uint8", "row_shape": [2], "level": 3},
            "values": {"dtype": "float16", "row_shape": [2], "level": 3},
            "tail": {"dtype": "float16", "row_shape": [], "level": 3},
        }},
        "state": "sealed", "digest": "0" * 64, "provenance": {}, "receipts": "0" * 64,
    }  # fmt: skip
    manifest["checksum"] = json_digest(manifest)
    stored = {"bytes": 3, "sha256": "0" * 64, "values_sha256": "0" * 64}
    receipt = {"rows": 8, "objects": {"ids": stored}, "kl_mean": 0.1, "kl_max": 0.2, "inputs": {"3": "ab"}}
    text = json.dumps(manifest).encode() + b"\n"
    assert isinstance(read_manifest(text, url="x"), Manifest)
    seeds = [text, json.dumps({"fixed": receipt, "v00000/b00000": receipt}).encode()]
    pipeline = Path(__file__).parents[2] / "pipelines" / "mnist5k.yaml"
    seeds.append(pipeline.read_bytes())
    fuzzed = folder / "fuzzed.yaml"

    def parse_pipeline(data: bytes) -> object:
        fuzzed.write_bytes(data)
        return load_pipeline(fuzzed)

    parsers: list[Callable[[bytes], object]] = [
        lambda data: check_encoding(read_manifest(data, url="x"), url="x"),
        lambda data: read_receipts(data, url="x"),
        parse_pipeline,
    ]
    draw = random.Random(seed)
    for _ in range(rounds):
        which = draw.choices(range(3), weights=[4, 4, 1])[0]
        if draw.random() < 0.5:
            data = damaged_bytes(seeds[which], draw)
        else:
            tree = yaml.safe_load(seeds[which]) if which == 2 else json.loads(seeds[which])
            tree = damaged_tree(tree, draw)
            if which == 0 and isinstance(tree, dict) and draw.random() < 0.5:  # by somebody who knows the format
                with suppress(ValueError):  # JSON that nobody can write
                    tree["checksum"] = json_digest({key: value for key, value in tree.items() if key != "checksum"})
            data = json.dumps(tree).encode() + b"\n"  # JSON is YAML
        try:
            parsers[which](data)
        except LogitCacheError:
            continue
    return rounds


TOKENS = [
    b"null",
    b"-1",
    b"1e400",
    b"[]",
    b"{}",
    b'"x"',
    b"NaN",
    b"9" * 5000,
    b"[" * 3000,
    b"\xff",
    b'"\\ud800"',
    b"true",
]
VALUES: list[Any] = [
    None,
    -1,
    0,
    2**70,
    1.5,
    -0.0,
    True,
    "",
    "x",
    "../..",
    "\ud800",
    "\x00",
    [],
    [[]],
    {},
    {"": {}},
    "9" * 5000,
]


def damaged_bytes(data: bytes, draw: random.Random) -> bytes:
    """With some bytes flipped, replaced, cut out or repeated."""
    damaged = bytearray(data)
    for _ in range(draw.randint(1, 4)):
        place, length = draw.randrange(len(damaged)), draw.randrange(12)
        kind = draw.randrange(4)
        if kind == 0:
            damaged[place] ^= 1 << draw.randrange(8)
        elif kind == 1:
            damaged[place : place + length] = draw.choice(TOKENS)
        elif kind == 2:
            del damaged[place : place + length]
        else:
            damaged[place:place] = damaged[draw.randrange(len(damaged)) :][:length]
    return bytes(damaged)


def damaged_tree(tree: Any, draw: random.Random, values: Sequence[Any] = VALUES) -> Any:
    """With one value somewhere inside replaced, removed or wrapped."""
    if isinstance(tree, dict | list) and tree and draw.random() < 0.85:
        key = draw.choice(list(tree) if isinstance(tree, dict) else range(len(tree)))
        if draw.random() < 0.1:
            del tree[key]
        else:
            tree[key] = damaged_tree(tree[key], draw, values)
        return tree
    return draw.choice([*values, [tree], {"x": tree}, str(tree)])


def test_damaged_metadata_meets_no_foreign_exception(tmp_path: Path) -> None:
    """`python -m tests.durability.test_trust 100000` for more."""
    assert 3000 == fuzz(3000, 0, tmp_path)


def test_strict_json_reads_what_json_reads() -> None:
    value = {"a": [1, 2.5, "ü", None, True], "b": {}}

    assert value == parse_json(json.dumps(value).encode(), max_bytes=100)


@pytest.mark.parametrize("context", ["fork", "forkserver", "spawn"])
@pytest.mark.parametrize("read_before", [False, True], ids=["unread", "read before"])
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_cache_in_dataloader_workers(tmp_path: Path, context: str, read_before: bool) -> None:
    """Not how we join labels, but nobody should hang who does."""
    cache = build(tmp_path / "a")
    if read_before:
        cache.view(0).logits([0])
    dataset = LabelDataset(tmp_path / "a", cache if context == "fork" else None)
    loader = torch.utils.data.DataLoader(dataset, batch_size=5, num_workers=2, multiprocessing_context=context)

    assert torch.equal(read_all(tmp_path / "a")[1], torch.cat(list(loader)))


class LabelDataset(torch.utils.data.Dataset[Tensor]):
    def __init__(self, path: Path, cache: logitcache.LogitCache | None) -> None:
        self.path, self.cache = path, cache

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> Tensor:
        self.cache = self.cache or logitcache.open(self.path)
        return self.cache.view(1).logits([index])[0]


GOLDEN = Path(__file__).parents[1] / "golden"
DIGESTS = {
    "format-1": "0b341abd1ddded030fa4e221eeb0d8662f9441bd4feafeeda62c9f605743b3f9",
    "format-2": "145b7eb8d9327ca237f007453c3d0fb190a45c1c8e98ff3818690b5ba0640371",
    "format-2-by-view": "145b7eb8d9327ca237f007453c3d0fb190a45c1c8e98ff3818690b5ba0640371",
    "format-2-outputs": "f0964d3e3417d95d1c1d943935d10da0910dcacb5389ad0ee9fc7dd36eac3990",
    "format-2-packedtopk": "7e6d2717debd6b69534bc8cecf6c7836a33a82eb38a762b2bec725b7b96a5c47",
    "format-2-sampled": "e20aa4970396ff5f0deaa292cac87e3ae09b793aded8aa724675ac10defb3f03",
    "format-2-toplowrank": "3b6c7c79d8ff9eda3458f92cc99085fb7fbb5732b1feb471e1dd84becbd0927d",
    "format-2-trellislowrank": "aef7f8d464207c3a747fee3aeb93ebcaa44c8134e86d0bb68cb45544b661a394",
    "format-2-sequences": "3ba4377d02e04583b1618b8c40ea860f82fb06b9f64e0f5d00fde018308b94de",
}


@pytest.mark.parametrize("name", DIGESTS)
def test_the_golden_cache_of_each_format_stays_readable(name: str) -> None:
    """Made once by `python -m tests.golden`; a reader of any later version gives the same numbers."""
    golden = GOLDEN / f"{name}.cache"

    assert [] == verify(str(golden), deep=True)
    cache = logitcache.open(golden)
    assert (int(name[7]), DIGESTS[name]) == (cache.manifest.identity.format_version, cache.digest)
    for output, values in read_outputs(golden).items():
        np.testing.assert_allclose(np.load(decoded_file(golden, output)), values.numpy(), atol=1e-5)


def read_outputs(path: Path) -> dict[str, Tensor]:
    """Every output of every row."""
    cache = logitcache.open(path)
    views = [cache.view(view, outputs=list(cache.outputs)) for view in range(cache.num_views)]
    return {name: torch.stack([view.output(name, range(cache.num_rows)) for view in views]) for name in cache.outputs}


WITH_OWN_ARRAYS = [f"format-2-{name}" for name in ("outputs", "packedtopk", "sampled", "toplowrank", "trellislowrank")]


def arrays_of(path: Path) -> dict[str, list[Path]]:
    """The files of each array, without its metadata."""
    folders = [folder for folder in (path / "labels.zarr").iterdir() if folder.is_dir()]
    return {folder.name: [file for file in files(folder) if file.name != "zarr.json"] for folder in sorted(folders)}


@pytest.mark.parametrize("name", WITH_OWN_ARRAYS)
def test_no_flipped_byte_of_an_encodings_arrays_passes(tmp_path: Path, name: str) -> None:
    """One bit of every seventh byte of the arrays of rows, and of those that are stored once."""
    path = tmp_path / "a"
    shutil.copytree(GOLDEN / f"{name}.cache", path)
    draw = random.Random(0)
    for file in [file for of_array in arrays_of(path).values() for file in of_array]:
        original = file.read_bytes()
        for place in range(draw.randrange(7), len(original), 7):
            damaged = bytearray(original)
            damaged[place] ^= 1 << draw.randrange(8)
            file.write_bytes(damaged)
            with pytest.raises(CorruptCache):
                read_outputs(path)
        assert finds_a_problem(path, file), file
        file.write_bytes(original)
    read_outputs(path)


@pytest.mark.parametrize("name", WITH_OWN_ARRAYS)
def test_a_manifest_that_lies_about_an_encodings_array_is_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / "a"
    shutil.copytree(GOLDEN / f"{name}.cache", path)
    original = (path / "manifest.json").read_bytes()
    layout = json.loads(original)["layout"]
    for kind, shape in (("arrays", "row_shape"), ("fixed", "shape")):
        for array, spec in layout[kind].items():
            for change in ({shape: [2**40] * max(1, len(spec[shape]))}, {shape: [1, 2, 3]}, {"dtype": "float64"}):
                rewrite_manifest(
                    path, lambda raw, at=(kind, array), change=change: raw["layout"][at[0]][at[1]].update(change)
                )
                with executes_nothing(), pytest.raises(CorruptCache):
                    read_outputs(path)
                (path / "manifest.json").write_bytes(original)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("name", WITH_OWN_ARRAYS)
def test_whatever_a_forger_puts_into_an_encodings_array_decodes_to_numbers_or_is_refused(
    tmp_path: Path, name: str, seed: int
) -> None:
    """Any integers, and the most extreme floats that `verify --deep` accepts, with receipts that fit."""
    path = tmp_path / "a"
    shutil.copytree(GOLDEN / f"{name}.cache", path)
    draw = np.random.default_rng(seed)
    for array, spec in json.loads((path / "manifest.json").read_text())["layout"]["arrays"].items():
        data = draw.bytes(len(Zstd().decode(arrays_of(path)[array][0].read_bytes())))
        if spec["dtype"].startswith("float"):
            most = float(np.finfo(spec["dtype"]).max)
            data = draw.choice([-most, 0.0, most], len(data) // np.dtype(spec["dtype"]).itemsize).astype(spec["dtype"])
        forge_chunk(path, array, Zstd(level=3, checksum=True).encode(data))
        with suppress(CorruptCache):
            for values in read_outputs(path).values():
                assert not bool(values.isnan().any() or (values == torch.inf).any()), array


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        print(f"{fuzz(int(sys.argv[1]), 1, Path(scratch))} damaged inputs, no foreign exception")
