"""What a content digest pins: every value at its place, and what it is said to be."""

from __future__ import annotations

import json
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import logitcache
from logitcache.arrays import ArraySpec
from logitcache.cache import creation
from logitcache.cache.layout import PER_CACHE, Block
from logitcache.cache.manifest import Identity, Layout, Manifest, Receipt, StoredObject, dump_manifest
from logitcache.cache.records import Records
from logitcache.digest import array_digest, canonical_json, sha256_hex
from logitcache.encodings import encoding_from_config
from logitcache.errors import CorruptCache, IdentityMismatch, LogitCacheError
from logitcache.extras.merge import merge
from logitcache.share.transfer import pull, push
from logitcache.verify.audit import verify
from logitcache.verify.repair import repair
from tests.commands import logitcache as run_command
from tests.commands import run_json

VIEWS, SAMPLES, CLASSES = 2, 40, 6
SETTINGS: dict[str, Any] = {
    "num_samples": SAMPLES, "num_classes": CLASSES, "rows_per_block": 16, "encoding": logitcache.TopK(k=2),
    "teacher": "net@1", "dataset": "pictures", "class_names": ["ant", "bee", "cat", "dog", "eel", "fox"],
}  # fmt: skip


def labels() -> Tensor:
    return torch.randn(VIEWS + 1, SAMPLES, CLASSES, generator=torch.Generator().manual_seed(0)) * 3


def build(path: Path, num_views: int = VIEWS, **changes: Any) -> logitcache.LogitCache:
    with logitcache.create(path, num_views=num_views, **(SETTINGS | changes)) as writer:
        for view in range(num_views):
            writer.write(view=view, start=0, logits=labels()[view])
    return logitcache.open(path)


@pytest.fixture(params=[1, 2], ids=["format 1", "format 2"])
def cache(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> logitcache.LogitCache:
    """A sealed cache of either format."""
    with monkeypatch.context() as patch:
        patch.setattr(creation, "FORMAT_VERSION", request.param)
        return build(tmp_path / "a.cache")


def reseal(path: Path, manifest: dict[str, Any], receipts: dict[str, Any]) -> None:
    """Write records of one's own making, every hash in them as the format wants it."""
    gathered = canonical_json(receipts)
    (path / "receipts.json").write_bytes(gathered)
    identity = Identity.model_validate(manifest["identity"])
    changes = {"id": identity.cache_id, "receipts": sha256_hex(gathered), "checksum": None}
    (path / "manifest.json").write_bytes(dump_manifest(Manifest.model_validate(manifest | changes)))


def swap_blocks(path: Path, manifest: dict[str, Any], receipts: dict[str, Any]) -> None:
    """Two blocks of one view change places, objects and receipts."""
    one, other = "v00000/b00000", "v00000/b00001"
    receipts[one], receipts[other] = receipts[other], receipts[one]
    swap_files(path, "0/0", "0/1")


def swap_views(path: Path, manifest: dict[str, Any], receipts: dict[str, Any]) -> None:
    """Two views change places, objects and receipts."""
    for block in range(3):
        one, other = f"v00000/b{block:05d}", f"v00001/b{block:05d}"
        receipts[one], receipts[other] = receipts[other], receipts[one]
        swap_files(path, f"0/{block}", f"1/{block}")


def swap_files(path: Path, one: str, other: str) -> None:
    for array in (path / "labels.zarr").glob("*/c"):
        for file in sorted(file for file in (array / one).rglob("*") if file.is_file()) or [array / one]:
            twin = array / other / file.relative_to(array / one)
            first, second = file.read_bytes(), twin.read_bytes()
            file.write_bytes(second)
            twin.write_bytes(first)


def swap_arrays(path: Path, manifest: dict[str, Any], receipts: dict[str, Any]) -> None:
    """In one block the value hashes of two arrays change places."""
    objects = receipts["v00001/b00002"]["objects"]
    objects["ids"], objects["values"] = objects["values"], objects["ids"]


def reverse_class_names(path: Path, manifest: dict[str, Any], receipts: dict[str, Any]) -> None:
    manifest["identity"]["class_names"].reverse()


def name_another_teacher(path: Path, manifest: dict[str, Any], receipts: dict[str, Any]) -> None:
    manifest["identity"]["teacher"] = "net@2"


def leave_out_a_sample(path: Path, manifest: dict[str, Any], receipts: dict[str, Any]) -> None:
    manifest["layout"]["num_samples"] -= 1
    receipts[PER_CACHE]["rows"] -= 1
    for view in range(VIEWS):
        receipts[f"v{view:05d}/b00002"]["rows"] -= 1


ATTACKS = [swap_blocks, swap_views, swap_arrays, reverse_class_names, name_another_teacher, leave_out_a_sample]


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.__name__)
def test_a_pin_refuses_whatever_was_moved_or_renamed_under_it(
    attack: Callable[..., None], cache: logitcache.LogitCache, tmp_path: Path
) -> None:
    """Every hash in the records is made right again: only the pin that somebody kept tells."""
    pin, path = cache.pin, tmp_path / "a.cache"
    manifest, receipts = records(path)
    attack(path, manifest, receipts)
    reseal(path, manifest, receipts)

    assert pin is not None
    if cache.manifest.identity.format_version == 2:
        with pytest.raises(CorruptCache, match="digest"):
            logitcache.open(path)
        resealed = Manifest.model_validate(json.loads((path / "manifest.json").read_text()) | {"checksum": None})
        by_name = {name: Receipt.model_validate(receipt) for name, receipt in receipts.items()}
        manifest["digest"] = Records(resealed, by_name).content_digest()
        reseal(path, manifest, receipts)  # with the digest that fits, as somebody would who knows the format
    for expected in (pin, pin[:12]):
        with pytest.raises(LogitCacheError, match="expected"):
            pull(str(path), str(tmp_path / "b.cache"), expect=expected)
    assert not (tmp_path / "b.cache/manifest.json").exists()


def test_a_pin_refuses_objects_that_have_other_values_than_their_receipts_claim(
    cache: logitcache.LogitCache, tmp_path: Path
) -> None:
    """The hashes of stored bytes are no part of the digest; the values are compared where a pin is given."""
    path = tmp_path / "a.cache"
    manifest, receipts = records(path)
    for name in receipts["v00000/b00000"]["objects"]:
        one, other = receipts["v00000/b00000"]["objects"][name], receipts["v00000/b00001"]["objects"][name]
        for key in ("bytes", "sha256"):
            one[key], other[key] = other[key], one[key]
    swap_files(path, "0/0", "0/1")
    reseal(path, manifest, receipts)

    assert cache.pin == logitcache.open(path).pin
    for views in (None, "0:1"):
        with pytest.raises(CorruptCache, match=r"c/0/[01](/0)? does not hold the values"):
            pull(str(path), str(tmp_path / "b.cache"), expect=cache.pin, views=views)
    pull(str(path), str(tmp_path / "b.cache"), views="0:1")  # nobody pinned anything
    with pytest.raises(CorruptCache, match=r"c/0/[01](/0)? does not hold the values"):
        pull(str(path), str(tmp_path / "b.cache"), expect=cache.pin)


def records(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    return json.loads((path / "manifest.json").read_text()), json.loads((path / "receipts.json").read_text())


def test_a_digest_is_made_of_lines_that_anybody_can_write(cache: logitcache.LogitCache) -> None:
    """As the specification says; here in terms of nothing but the records."""
    lines = ["logitcache content 2", f"id {cache.id}", f"num_samples {SAMPLES}", "rows_per_block 16"]
    receipts = cache.receipts
    lines += [f"fixed {name} {stored.values_sha256}" for name, stored in sorted(receipts[PER_CACHE].objects.items())]
    for view in range(VIEWS):
        blocks = [
            f"{block} {name} {stored.values_sha256}\n"
            for block in range(3)
            for name, stored in sorted(receipts[f"v{view:05d}/b{block:05d}"].objects.items())
        ]
        lines.append(f"view {view} {sha256(''.join(blocks).encode()).hexdigest()}")
    expected = sha256("".join(f"{line}\n" for line in lines).encode()).hexdigest()

    assert expected == cache.pin
    assert (expected == cache.digest) == (cache.manifest.identity.format_version == 2)


def test_the_test_vector_of_the_specification() -> None:
    identity = Identity.model_validate({
        "format_version": 2, "dataset": "d", "teacher": "t", "precision": "float32", "transform": None, "view_seed": 0,
        "encoding": {"name": "dense", "dtype": "float16"}, "outputs": {"logits": [3]}, "class_names": None,
    })  # fmt: skip
    layout = Layout(
        num_samples=3, num_views=2, num_classes=3, rows_per_block=2, fixed={},
        arrays={"logits": ArraySpec(dtype="float16", row_shape=(3,))},
    )  # fmt: skip
    manifest = Manifest(
        id=identity.cache_id, identity=identity, layout=layout, state="open", digest=None, provenance={}
    )
    values = {
        (view, block): np.array([[view, block, row] for row in range(2 - block)], dtype=np.float16)
        for view in (0, 1)
        for block in (0, 1)
    }
    receipts = {PER_CACHE: Receipt(rows=3, objects={}, kl_mean=None, kl_max=None, inputs={})}
    for (view, block), rows in values.items():
        stored = StoredObject(bytes=1, sha256="0" * 64, values_sha256=array_digest(rows))
        receipt = Receipt(rows=len(rows), objects={"logits": stored}, kl_mean=None, kl_max=None, inputs={})
        receipts[Block(view, block).name] = receipt
    specified = (Path(__file__).parents[2] / "docs/format.md").read_text()

    assert 1 == specified.count(Records(manifest, receipts).content_digest())
    assert manifest.id in specified
    assert 1 == specified.count(receipts["v00001/b00001"].objects["logits"].values_sha256)


def test_the_digest_of_a_cache_in_format_1_is_what_it_was(tmp_path: Path) -> None:
    golden = logitcache.open(Path(__file__).parents[1] / "golden" / "format-1.cache")
    hashes = sorted(stored.values_sha256 for receipt in golden.receipts.values() for stored in receipt.objects.values())

    assert sha256_hex("\n".join(hashes).encode()) == golden.digest
    assert "0b341abd1ddded030fa4e221eeb0d8662f9441bd4feafeeda62c9f605743b3f9" == golden.digest
    assert golden.digest != golden.pin == golden.records.pin()


WHOLE = torch.arange(5 * 40).view(5, 40) * 37 % 41 - 20.0
"""Logits that are whole numbers, so that encoded rows have the same bits on every machine."""
PINNED = {
    "Dense(dtype='float32')": "490ff80fae5144cdf95a96d0978ef21af4481ed9699d0a3ce83c165061e22973",
    "Dense(dtype='float16')": "0369ffa31d7767a83d4afd225dbd70e5dcf844f1fd3d51cf1131973724b3a09b",
    "Dense(dtype='uint8')": "dbf4fb665eb1d4a9188fb60f898ef8f9dc56dea369b78e661c8550966dd82a48",
    "TopK(k=6, dtype='float32')": "b32fa1ecbacbcffe9841630b91d87fbb2fbf88231c58a2e59bdc12bece355e89",
    "TopK(k=6, dtype='float16')": "be35f1ada56a177f29c9f639cf5c554d0d7421000cd164fe8c4cf066165fb8d1",
    "TopK(k=6, dtype='uint8')": "1f31fe3f14f8521e9d0e553c02cabb907873daf4726da08fad2b389387536655",
    "Sampled(draws=20)": "401107f94bc42f81eca8afa6d6c1ae0254d1fed0e119aef3f7bd4e17c60707cb",
}


@pytest.mark.parametrize("encoding", PINNED)
def test_encoded_rows_are_what_they_were(encoding: str) -> None:
    encoded = encoding_from_config(encoding).encode(WHOLE, view=1, start=3)
    hashes = [f"{name} {array_digest(values.numpy())}" for name, values in sorted(encoded.items())]

    assert PINNED[encoding] == sha256_hex("\n".join(hashes).encode())


def test_new_caches_have_format_2_and_their_digest_is_their_pin(tmp_path: Path) -> None:
    cache = build(tmp_path / "a.cache")

    assert 2 == cache.manifest.identity.format_version
    assert cache.digest == cache.pin is not None
    logitcache.create(tmp_path / "open.cache", num_views=1, **SETTINGS).close()
    assert None is logitcache.open(tmp_path / "open.cache").pin


def test_a_cache_keeps_its_format_whatever_is_done_with_it(
    cache: logitcache.LogitCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Resumed, grown, repaired, pushed and pulled: id and digest are those of its own format."""
    path, version = tmp_path / "a.cache", cache.manifest.identity.format_version
    with monkeypatch.context() as patch:
        patch.setattr(creation, "FORMAT_VERSION", version)
        grown = build(tmp_path / "grown.cache", VIEWS + 1)
        with logitcache.create(tmp_path / "resumed.cache", num_views=VIEWS, **SETTINGS) as writer:
            writer.write(view=0, start=0, logits=labels()[0])
            writer.write(view=1, start=0, logits=labels()[1])
        logitcache.create(tmp_path / "begun.cache", num_views=VIEWS, **SETTINGS).close()
        for name in ("receipts", "labels.zarr"):  # cut off right after the manifest
            (tmp_path / "begun.cache" / name).rename(tmp_path / f"gone-{name}")

    assert [cache.id, cache.digest] == [(again := build(path)).id, again.digest]
    assert cache.digest == build(tmp_path / "begun.cache").digest
    assert [grown.id, grown.digest] == [(again := build(path, VIEWS + 1)).id, again.digest]
    pushed = push(str(path), str(tmp_path / "pushed.cache"))
    assert (grown.id, grown.digest, grown.pin) == (pushed.id, pushed.digest, pushed.pin)
    pull(str(path), str(tmp_path / "part.cache"), views="0:2", expect=grown.pin)
    part = logitcache.open(tmp_path / "part.cache")
    assert (cache.id, cache.digest, cache.pin) == (part.id, part.digest, part.pin)
    assert grown.digest == pull(str(path), str(tmp_path / "part.cache"), expect=grown.digest).digest
    (path / "labels.zarr/ids/c/1/0/0").write_bytes(b"damaged")
    assert grown.digest == repair(str(path), source=str(tmp_path / "pushed.cache")).digest
    assert [] == verify(str(path), deep=True)


def test_a_merge_is_a_new_cache_whatever_the_format_of_its_parts(cache: logitcache.LogitCache, tmp_path: Path) -> None:
    build(tmp_path / "b.cache", teacher="other")
    merged = merge([str(tmp_path / "a.cache"), str(tmp_path / "b.cache")], tmp_path / "m.cache", encoding="dense")

    assert 2 == merged.manifest.identity.format_version
    assert cache.digest in [part.digest for part in merged.parts]


def test_pull_says_what_a_digest_of_format_1_leaves_open(cache: logitcache.LogitCache, tmp_path: Path) -> None:
    """Both are accepted; push and pull print the stronger one."""
    path, is_old = tmp_path / "a.cache", cache.manifest.identity.format_version == 1
    assert f"--expect {cache.pin}" in run_command("push", path, tmp_path / "there.cache").stdout
    by_digest = run_command("pull", path, tmp_path / "by-digest.cache", "--expect", str(cache.digest)[:20]).stdout
    assert is_old == ("covers the logits but not their positions" in by_digest)
    assert f"--expect {cache.pin}" in by_digest
    by_pin = run_command("pull", path, tmp_path / "by-pin.cache", "--expect", cache.pin)
    assert (0, False) == (by_pin.returncode, "covers the logits but not their positions" in by_pin.stdout)
    told = run_json("pull", path, tmp_path / "json.cache", "--expect", cache.digest)
    assert (cache.pin, "digest" if is_old else "pin") == (told["pin"], told["matched"])
    with pytest.raises(IdentityMismatch, match="expected 0000"):
        pull(str(path), str(tmp_path / "never.cache"), expect="0" * 64)
