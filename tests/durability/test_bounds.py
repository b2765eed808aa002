"""Nobody is made to ask for more memory, bytes, requests or time than a cache can need."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

import logitcache
from logitcache.arrays import ArraySpec
from logitcache.cache import receipts as receipts_module
from logitcache.cache import stored_records, summary
from logitcache.cache.layout import PER_CACHE, all_blocks, decode_object, decode_rows
from logitcache.cache.manifest import (
    MANIFEST,
    RECEIPTS,
    Layout,
    Manifest,
    PerCacheSpec,
    Receipt,
    StoredObject,
    dump_manifest,
    read_manifest,
    receipts_limit,
)
from logitcache.cache.records import Records, dump_receipts
from logitcache.cache.summary import find_caches
from logitcache.data.rows import OneRowEach
from logitcache.errors import CorruptCache, IncompleteCache, NotACache, StorageError
from logitcache.storage import Storage, open_storage, remote
from logitcache.verify import audit
from logitcache.verify.audit import verify
from tests import servers

SAMPLES, CLASSES, VIEWS = 40, 4, 2


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    """A sealed cache of ten blocks, in a folder of its own."""
    path = tmp_path / "www/whole.cache"
    shape = {"num_samples": SAMPLES, "num_classes": CLASSES, "num_views": VIEWS, "rows_per_block": 8}
    with logitcache.create(path, **shape, encoding=logitcache.TopK(k=2), teacher="t", dataset="d") as writer:
        for view in range(VIEWS):
            logits = torch.randn(SAMPLES, CLASSES, generator=torch.Generator().manual_seed(view))
            writer.write(view=view, start=0, logits=logits)
    return path


def manifest_of(path: Path) -> Manifest:
    return read_manifest((path / MANIFEST).read_bytes(), url=str(path))


def claim(path: Path, *, state: str = "sealed", **shape: int) -> Manifest:
    """Let a cache's manifest claim another shape, consistently."""
    manifest = manifest_of(path)
    changes = {"layout": manifest.layout.model_copy(update=shape), "state": state}
    manifest = manifest.model_copy(update=changes)
    (path / MANIFEST).write_bytes(dump_manifest(manifest))
    return manifest


def seal(path: Path, receipts: dict[str, Receipt]) -> None:
    """Receipts as somebody who knows the format would put them there."""
    sealed, gathered = Records(manifest_of(path), receipts).sealed(put=open_storage(path).put)
    (path / RECEIPTS).write_bytes(gathered)
    (path / MANIFEST).write_bytes(dump_manifest(sealed.manifest))


def simulated(path: Path, **shape: int) -> None:
    """Receipts of every block that a layout has, with hashes of nothing."""
    claimed = claim(path, **shape).layout
    stored = StoredObject(bytes=20, sha256="0" * 64, values_sha256="1" * 64)
    receipts = {PER_CACHE: Receipt(rows=claimed.num_samples, objects={}, kl_mean=None, kl_max=None, inputs={})}
    for block in all_blocks(claimed):
        rows, objects = (
            len(OneRowEach(claimed.num_samples, claimed.rows_per_block).block_rows(block.number)),
            dict.fromkeys(claimed.arrays, stored),
        )
        receipts[block.name] = Receipt(rows=rows, objects=objects, kl_mean=0.01, kl_max=0.123, inputs={})
    seal(path, receipts)


def run_within(megabytes: int, program: str, *arguments: object) -> str:
    """What a program prints that may ask for so much more address space than the imports did."""
    limit = (
        "import resource, sys, logitcache\n"
        "from logitcache.cache import reader, summary\n"
        "from logitcache.verify import audit\n"
        "from logitcache.errors import LogitCacheError\n"
        "[size] = [int(line.split()[1]) for line in open('/proc/self/status') if line.startswith('VmSize')]\n"
        f"resource.setrlimit(resource.RLIMIT_AS, (size * 1024 + {megabytes} * 10**6,) * 2)\n"
    )
    command = [sys.executable, "-c", limit + program, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=240).stdout.strip()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("gathered", [2**20, 4096], ids=["in one file", "by view"])
def test_a_cache_of_24_000_blocks_opens_in_little_address_space(
    whole: Path, gathered: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It took 3 GB for 15 MB of receipts: as much as they might at most have been."""
    monkeypatch.setattr(receipts_module, "GATHERED_RECEIPTS", gathered)
    simulated(whole, num_views=300, num_samples=640, rows_per_block=8)

    assert "24001" == run_within(300, "print(len(logitcache.open(sys.argv[1]).receipts))", whole)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("state", "programs", "expected"),
    [
        ("sealed", ["logitcache.open(path)", "audit.verify(path)"], ["CorruptCache", "nothing"]),
        ("open", ["logitcache.open(path).view(0)", "summary.summarise(path)"], ["IncompleteCache", "nothing"]),
    ],
    ids=["sealed", "open"],
)
@pytest.mark.parametrize("shape", [(2**20, 16), (1, 2**24)], ids=["many views", "long views"])
def test_a_manifest_that_claims_millions_of_blocks_costs_little(
    whole: Path, state: str, programs: list[str], expected: list[str], shape: tuple[int, int]
) -> None:
    """A kilobyte of it took 80 s and 1.6 GB: the names of all blocks."""
    claim(whole, state=state, num_views=shape[0], num_samples=shape[1], rows_per_block=1)
    attempts = [
        f"try:\n    {program}\n    print('nothing')\nexcept LogitCacheError as error:\n    print(type(error).__name__)\n"
        for program in programs
    ]

    assert expected == run_within(300, "path = sys.argv[1]\n" + "".join(attempts), whole).split()


def test_of_blocks_that_are_missing_verify_names_the_first(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    claim(whole, num_samples=2**20, rows_per_block=1)
    monkeypatch.setattr(audit, "MAX_MISSING", 100)

    missing = [problem.block for problem in verify(str(whole)) if problem.kind == "missing"]
    assert [f"v00000/b{number:05d}" for number in range(5, 105)] == missing


def test_the_blocks_that_a_view_lacks_are_counted(whole: Path) -> None:
    claim(whole, state="open", num_samples=48)

    with pytest.raises(IncompleteCache, match="1 blocks of view 1 are missing, v00001/b00005 first"):
        logitcache.open(whole).view(1)


def test_the_longest_receipts_that_are_written_may_be_read() -> None:
    """All proof rows in one block, names and numbers as long as they get."""
    arrays = {"a" * 39 + letter: ArraySpec(dtype="float32", row_shape=(1,)) for letter in "bcd"}
    claimed = Layout(num_samples=2**40, num_views=2**13, num_classes=2, rows_per_block=2**31, arrays={}, fixed={})
    claimed = claimed.model_copy(update={"arrays": arrays, "first_view": 2**13 - 1})
    objects = {name: StoredObject(bytes=2**33, sha256="0" * 64, values_sha256="1" * 64) for name in arrays}
    inputs = {str(2**40 - number): "0" * 32 for number in range(8)}
    one = Receipt(rows=2**31, objects=objects, kl_mean=1.2345678901234567e-100, kl_max=1 / 3, inputs=inputs)
    receipts = {block.name: one for block in all_blocks(claimed)}

    assert len(dump_receipts(receipts)) < receipts_limit(claimed)


@pytest.mark.parametrize("name", ["ids", "fixed"])
def test_a_receipt_that_states_more_bytes_than_a_chunk_can_have_is_refused(whole: Path, name: str) -> None:
    """An endless object would be read on and on."""
    receipts = dict(logitcache.open(whole).receipts)
    block = PER_CACHE if name == "fixed" else "v00001/b00002"
    if name == "fixed":
        (whole / MANIFEST).write_bytes(
            dump_manifest(manifest_of(whole).model_copy(update={"layout": with_fixed(manifest_of(whole).layout)}))
        )
    array = "basis" if name == "fixed" else name
    huge = StoredObject(bytes=2**50, sha256="0" * 64, values_sha256="1" * 64)
    receipts[block] = receipts[block].model_copy(update={"objects": receipts[block].objects | {array: huge}})
    seal(whole, receipts)

    with pytest.raises(CorruptCache, match=f"states {2**50} bytes for {array} of {block}; a chunk of it takes at most"):
        logitcache.open(whole)


def with_fixed(claimed: Layout) -> Layout:
    return claimed.model_copy(update={"fixed": {"basis": PerCacheSpec(dtype="float32", shape=[4, 2])}})


def test_a_chunk_of_another_size_is_refused_before_memory_is_asked_for() -> None:
    large = Layout(num_samples=1, num_views=1, num_classes=2, rows_per_block=1, arrays={}, fixed={})
    large = large.model_copy(
        update={"fixed": {"basis": PerCacheSpec.model_construct(dtype="float32", shape=[2**40, 2**10])}}
    )
    with pytest.raises(ValueError, match="a chunk of None bytes; expected"):
        decode_rows(ArraySpec(dtype="float32", row_shape=(2**20,)), [b"short"], [2**40], rows_per_block=2**40)
    with pytest.raises(ValueError, match="a chunk of None bytes; expected"):
        decode_object(large, PER_CACHE, "basis", b"short", num_rows=1)


@pytest.mark.parametrize("key", [MANIFEST, RECEIPTS])
def test_an_endless_record_is_cut_at_what_it_may_be(whole: Path, key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of receipts for 24 000 blocks, 3 GB were read."""
    monkeypatch.setattr(stored_records, "ATTEMPTS", 1)
    limit = receipts_limit(claim(whole, num_views=300, num_samples=640).layout) if key == RECEIPTS else 2**24
    with servers.misbehaving(whole.parent) as server:
        server.fault = lambda path, count: "endless" if path.endswith(f"/{key}") else None
        with pytest.raises(NotACache if key == MANIFEST else CorruptCache):
            logitcache.open(f"{server.url}/whole.cache")
        assert limit < server.sent < limit + 2**24  # what is on its way beside

    assert limit < 2**26


@pytest.mark.parametrize("key", [MANIFEST, RECEIPTS])
def test_a_record_that_trickles_is_given_up(whole: Path, key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "RECORD_SECONDS", 0.3)
    with servers.misbehaving(whole.parent) as server:
        server.fault = lambda path, count: "trickle" if path.endswith(f"/{key}") else None
        with pytest.raises(StorageError, match=rf"{key}: .* bytes arrived in .* s; the server is too slow"):
            logitcache.open(f"{server.url}/whole.cache")
        assert ["trickle"] == server.faults


def test_an_object_that_never_comes_whole_is_not_asked_for_again_and_again(
    whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "REQUEST_SECONDS", 0.5)
    monkeypatch.setitem(remote._RETRY, "max_retries", 0)
    with servers.misbehaving(whole.parent) as server:
        server.fault = lambda path, count: "trickling headers"
        with pytest.raises(StorageError, match=MANIFEST):
            logitcache.open(f"{server.url}/whole.cache")
        assert ["trickling headers"] == server.faults


@pytest.mark.parametrize("fault", ["trickle", "trickling headers"])
def test_an_index_page_that_trickles_is_given_up(
    whole: Path, fault: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(remote, "RECORD_SECONDS", 0.3)
    with servers.misbehaving(whole.parent) as server:
        (whole.parent / "index").write_bytes(b"<a href='x/'>" * 1000)
        server.fault = lambda path, count: fault
        with pytest.raises(StorageError, match=r"can't list .*index/: its page is incomplete after"):
            open_storage(f"{server.url}/index").folders()


@contextmanager
def answering(answer: Callable[[str], tuple[int, bytes]]) -> Iterator[tuple[str, list[str]]]:
    """A server that makes each answer up, and what it was asked for."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing."""

        def do_GET(self) -> None:
            asked.append(self.path)
            status, body = answer(self.path)
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        listening.daemon_threads = True
        thread = threading.Thread(target=listening.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listening.server_address[1]}", asked
        finally:
            listening.shutdown()
            thread.join()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("MAX_REMOTE_FOLDERS", 200, "it has more than 200 folders"),
        ("MAX_REMOTE_SECONDS", 0.0, "it has more folders than can be listed in 0 s"),
    ],
)
def test_a_server_whose_folders_never_end_is_given_up(
    name: str, value: float, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twenty folders in each folder, five deep, are three million."""
    monkeypatch.setattr(summary, name, value)
    page = b"".join(b"<a href='%d/'>" % number for number in range(20))
    with answering(lambda path: (200, page) if path.endswith("/") else (404, b"")) as (url, asked):
        with pytest.raises(StorageError, match=f"{message}; name a folder that is closer"):
            find_caches(url)
        assert len(asked) <= 2 * 200


def endless_listing(monkeypatch: pytest.MonkeyPatch, *, objects_per_page: int, read: Callable[[Storage], Any]) -> None:
    """A store that always says that there are more."""
    pages = iter(range(10**9))

    def answer(path: str) -> tuple[int, bytes]:
        start = next(pages) * objects_per_page
        objects = "".join(
            f"<Contents><Key>a.cache/receipts/{start + number:09d}</Key><Size>1</Size><ETag>x</ETag>"
            "<LastModified>2026-01-01T00:00:00.000Z</LastModified></Contents>"
            for number in range(objects_per_page)
        )
        text = f"<IsTruncated>true</IsTruncated><NextContinuationToken>{start}</NextContinuationToken>{objects}"
        return 200, f"<?xml version='1.0'?><ListBucketResult>{text}</ListBucketResult>".encode()

    with answering(answer) as (url, asked):
        for name, value in (servers.KEYS | {"AWS_ENDPOINT_URL": url}).items():
            monkeypatch.setenv(name, value)
        with pytest.raises(
            StorageError, match=r"can't list s3://team/a\.cache/receipts: (more than 5000 objects|it doesn't end)"
        ):
            read(open_storage("s3://team/a.cache"))
        assert asked


def test_a_listing_of_too_many_objects_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "MAX_LISTED", 5000)
    endless_listing(monkeypatch, objects_per_page=100, read=lambda storage: list(storage.list_keys("receipts")))


@pytest.mark.parametrize("objects_per_page", [0, 1])
def test_a_listing_that_takes_for_ever_is_given_up(monkeypatch: pytest.MonkeyPatch, objects_per_page: int) -> None:
    """Be its pages empty, of which the client shows none."""
    monkeypatch.setattr(remote, "LISTING_SECONDS", 0.5)
    endless_listing(
        monkeypatch, objects_per_page=objects_per_page, read=lambda storage: list(storage.list_keys("receipts"))
    )


@pytest.mark.parametrize("objects_per_page", [0, 100])
def test_a_listing_of_folders_that_takes_for_ever_is_given_up(
    monkeypatch: pytest.MonkeyPatch, objects_per_page: int
) -> None:
    monkeypatch.setattr(remote, "RECORD_SECONDS", 0.5)
    endless_listing(monkeypatch, objects_per_page=objects_per_page, read=lambda storage: storage.folders("receipts"))
