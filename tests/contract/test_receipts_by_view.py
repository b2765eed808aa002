"""Receipts of a large cache are stored by view and read when the view is; nothing else changes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import logitcache
from logitcache.cache import creation, receipts, written_receipts
from logitcache.cache.manifest import Manifest, ReceiptIndex, dump_manifest
from logitcache.cache.receipts import ReceiptsByView
from logitcache.digest import canonical_json, sha256_hex
from logitcache.errors import CorruptCache, IdentityMismatch, IncompleteCache, LogitCacheError
from logitcache.extras.merge import merge
from logitcache.share.transfer import pull, push
from logitcache.storage.local import LocalStorage
from logitcache.verify.audit import verify
from logitcache.verify.repair import repair
from tests.commands import run_json

VIEWS, SAMPLES, CLASSES, BLOCKS = 3, 40, 6, 3
SETTINGS: dict[str, Any] = {
    "num_samples": SAMPLES, "num_classes": CLASSES, "rows_per_block": 16, "encoding": logitcache.TopK(k=2),
    "teacher": "net@1", "dataset": "pictures",
}  # fmt: skip


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """From 7 receipts on they are stored by view: two views of three blocks are not enough for one file."""
    monkeypatch.setattr(receipts, "GATHERED_RECEIPTS", 6)
    monkeypatch.setattr(written_receipts, "KEPT_RECEIPTS", 2)


def labels() -> Tensor:
    return torch.randn(VIEWS + 2, SAMPLES, CLASSES, generator=torch.Generator().manual_seed(0)) * 3


def build(path: Path, num_views: int = VIEWS, **changes: Any) -> logitcache.LogitCache:
    with logitcache.create(path, num_views=num_views, **(SETTINGS | changes)) as opened:
        for view in range(num_views):
            opened.write(view=view, start=0, logits=labels()[view])
    return logitcache.open(path)


@pytest.fixture
def whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> logitcache.LogitCache:
    """The same cache with all receipts in one file."""
    with monkeypatch.context() as patch:
        patch.setattr(receipts, "GATHERED_RECEIPTS", 2**20)
        return build(tmp_path / "whole.cache")


@pytest.fixture
def split(tmp_path: Path) -> logitcache.LogitCache:
    """A cache with receipts by view."""
    return build(tmp_path / "split.cache")


def objects_of_views(path: Path) -> list[Path]:
    return sorted((path / "receipts").glob("v*/*.json"))


def test_a_cache_with_receipts_by_view_is_the_same_cache(
    whole: logitcache.LogitCache, split: logitcache.LogitCache, tmp_path: Path
) -> None:
    assert (whole.id, whole.digest, whole.pin) == (split.id, split.digest, split.pin)
    assert not whole.manifest.receipts_by_view
    assert split.manifest.receipts_by_view
    assert dict(whole.receipts) == dict(split.receipts)
    expected, found = whole.contents.model_dump(), split.contents.model_dump()
    assert expected.pop("kl_at") == pytest.approx(found.pop("kl_at"))
    assert expected == pytest.approx(found)
    assert VIEWS == len(objects_of_views(tmp_path / "split.cache"))
    assert not (tmp_path / "whole.cache/receipts").exists() or not objects_of_views(tmp_path / "whole.cache")
    for view in range(VIEWS):
        assert torch.equal(whole.view(view).logits(range(SAMPLES)), split.view(view).logits(range(SAMPLES)))
    assert [] == verify(str(tmp_path / "split.cache"), deep=True)


def test_a_manifest_of_a_small_cache_has_no_new_key(whole: logitcache.LogitCache, tmp_path: Path) -> None:
    """So the records of small caches keep their bytes."""
    assert "receipts_by_view" not in json.loads((tmp_path / "whole.cache/manifest.json").read_text())


def test_opening_reads_the_index_and_a_view_reads_its_own_receipts(
    split: logitcache.LogitCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys: list[str] = []
    get_view, get = LocalStorage.get_view, LocalStorage.get

    def counted(reads: Callable[..., Any]) -> Callable[..., Any]:
        def read(self: LocalStorage, key: str, **limits: Any) -> Any:
            keys.append(key)
            return reads(self, key, **limits)

        return read

    monkeypatch.setattr(LocalStorage, "get_view", counted(get_view))
    monkeypatch.setattr(LocalStorage, "get", counted(get))
    cache = logitcache.open(tmp_path / "split.cache")
    assert ["manifest.json", "receipts.json"] == keys
    assert (split.contents, split.digest) == (cache.contents, cache.records.content_digest())
    assert ["manifest.json", "receipts.json"] == keys

    cache.view(1)
    assert {"v00001"} == {key.split("/")[1] for key in keys if key.startswith("receipts/")}


def test_receipts_of_few_views_stay_in_memory(split: logitcache.LogitCache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(receipts, "KEPT_RECEIPTS", 0)
    assert isinstance(split.receipts, ReceiptsByView)
    names = list(split.receipts)

    assert 1 + VIEWS * BLOCKS == len(names) == len(split.receipts)
    assert receipts.KEPT_VIEWS == len(split.receipts._kept)
    assert "v00000/b00000" in split.receipts
    assert not {"v00000/b00003", "v00009/b00000", "stray"} & set(split.receipts)
    for unknown in ("v00000/b00003", "v00009/b00000", "stray"):
        assert unknown not in split.receipts


def test_format_1_keeps_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its digest needs all hashes at once."""
    monkeypatch.setattr(creation, "FORMAT_VERSION", 1)

    cache = build(tmp_path / "a.cache")
    assert (1, False) == (cache.manifest.identity.format_version, cache.manifest.receipts_by_view)
    assert [] == objects_of_views(tmp_path / "a.cache")


def test_an_interrupted_build_resumes_at_the_first_missing_block(whole: logitcache.LogitCache, tmp_path: Path) -> None:
    path = tmp_path / "a.cache"
    with pytest.raises(IncompleteCache, match=r"5 of 9 blocks are missing.\n  view 1: rows 16 to 31"):
        with logitcache.create(path, num_views=VIEWS, **SETTINGS) as opened:
            opened.write(view=0, start=0, logits=labels()[0])
            opened.write(view=1, start=0, logits=labels()[1][:16])
    (path / "receipts/v00000/b00001.json").write_text("{")  # damaged: its block is computed again
    with pytest.raises(IncompleteCache, match="2 blocks of view 1 are missing, v00001/b00001 first"):
        logitcache.open(path).view(1)

    with logitcache.create(path, num_views=VIEWS, **SETTINGS) as opened:
        missing = [block.name for block in opened.missing_blocks()]
        for view in range(VIEWS):
            opened.write(view=view, start=0, logits=labels()[view])
    assert ["v00000/b00001", *(f"v{v:05d}/b{b:05d}" for v in (1, 2) for b in range(3) if (v, b) != (1, 0))] == missing
    assert whole.digest == logitcache.open(path).digest
    assert [] == list((path / "receipts").glob("v*/b*.json"))


def test_rows_are_compared_with_blocks_whose_receipts_are_no_longer_in_memory(tmp_path: Path) -> None:
    with logitcache.create(tmp_path / "a.cache", num_views=VIEWS, **SETTINGS) as opened:
        for view in range(VIEWS):
            opened.write(view=view, start=0, logits=labels()[view])
        opened.flush()
        opened.write(view=0, start=0, logits=labels()[0])
        with pytest.raises(IdentityMismatch, match="was written with other logits"):
            opened.write(view=0, start=0, logits=labels()[1])


def test_two_writers_of_other_logits_never_mix(tmp_path: Path) -> None:
    first = logitcache.create(tmp_path / "a.cache", num_views=VIEWS, **SETTINGS)
    build(tmp_path / "a.cache")

    with pytest.raises(IdentityMismatch, match="was written with other logits by another writer"), first:
        first.write(view=0, start=0, logits=labels()[1])


def test_a_cache_that_is_open_for_more_views_is_read_and_verified(tmp_path: Path) -> None:
    build(tmp_path / "a.cache")
    logitcache.create(tmp_path / "a.cache", num_views=4, **SETTINGS).close()
    cache = logitcache.open(tmp_path / "a.cache")

    assert not cache.sealed
    assert logitcache.TopK(k=2) == cache.encoding
    assert (SAMPLES, CLASSES) == tuple(cache.view(2).logits(range(SAMPLES)).shape)
    problems = verify(str(tmp_path / "a.cache"), deep=True)
    assert [("missing", f"v00003/b{number:05d}") for number in range(3)] == [(p.kind, p.block) for p in problems]


def test_receipts_that_are_lost_before_sealing_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a.cache"
    opened = logitcache.create(path, num_views=VIEWS, **SETTINGS)
    for view in range(VIEWS):
        opened.write(view=view, start=0, logits=labels()[view])
    opened.flush()
    (path / "receipts/v00001/b00002.json").unlink()

    with pytest.raises(IncompleteCache, match=r"1 of 9 blocks are missing.\n  view 1: rows 32 to 39"):
        opened.seal()
    opened.close()
    assert VIEWS == build(path).num_views  # computed again


@pytest.mark.parametrize("before", [1, 3], ids=["from one file", "from an index"])
def test_views_are_added_and_the_receipts_of_earlier_ones_are_kept(
    before: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.cache"
    reader = build(path, num_views=before)
    kept = objects_of_views(path)
    grown = build(path, num_views=5)

    assert (before > 1, True) == (reader.manifest.receipts_by_view, grown.manifest.receipts_by_view)
    assert set(kept) <= set(objects_of_views(path))
    assert 5 == len(objects_of_views(path))
    assert torch.equal(reader.view(0).logits(range(SAMPLES)), grown.view(0).logits(range(SAMPLES)))  # opened before
    assert build(tmp_path / "b.cache", num_views=5).digest == grown.digest
    assert [] == verify(str(path), deep=True)


def test_copies_of_some_views_have_as_many_files_as_they_need(split: logitcache.LogitCache, tmp_path: Path) -> None:
    url, path = str(tmp_path / "split.cache"), tmp_path / "copy.cache"
    pull(url, str(path), views="1:2", expect=split.pin)
    assert not logitcache.open(path).manifest.receipts_by_view
    pull(url, str(path), views="0:1", expect=split.pin)
    pull(url, str(path), expect=split.pin)

    assert (split.digest, True) == (logitcache.open(path).digest, logitcache.open(path).manifest.receipts_by_view)
    assert [] == verify(str(path), deep=True)
    for name in (
        "receipts.json",
        *(str(file.relative_to(tmp_path / "split.cache")) for file in objects_of_views(tmp_path / "split.cache")),
    ):
        assert (tmp_path / "split.cache" / name).read_bytes() == (path / name).read_bytes()
    assert split.digest == push(str(path), str(tmp_path / "pushed.cache")).digest
    assert 0 == pull(url, str(path)).copied_objects


def test_a_copy_of_other_labels_is_refused(split: logitcache.LogitCache, tmp_path: Path) -> None:
    with logitcache.create(tmp_path / "other.cache", num_views=VIEWS, **SETTINGS) as opened:
        for view in range(VIEWS):
            opened.write(view=view, start=0, logits=labels()[view] * (2 if view == 1 else 1))

    with pytest.raises(IdentityMismatch, match="with other labels: v00001/b00000 differs"):
        push(str(tmp_path / "other.cache"), str(tmp_path / "split.cache"))


def test_commands_read_receipts_by_view(split: logitcache.LogitCache, tmp_path: Path) -> None:
    path = str(tmp_path / "split.cache")
    described = run_json("info", path)

    assert (split.digest, VIEWS, True) == (described["digest"], described["num_views"], described["sealed"])
    assert run_json("verify", path)["ok"]
    build(tmp_path / "twin.cache", teacher="net@2")
    merged = merge([path, str(tmp_path / "twin.cache")], tmp_path / "mean.cache")
    assert merged.manifest.receipts_by_view
    view = logitcache.open(tmp_path / "mean.cache").view(2)
    assert torch.allclose(split.view(2).logits(range(SAMPLES)), view.logits(range(SAMPLES)), atol=0.05)


def damage(path: Path, what: str) -> str:
    """Damage a cache's records; returns the path of the problem that is found first."""
    index = path / "receipts.json"
    victim = objects_of_views(path)[1] if "view" in what else index
    if "lost" in what:
        victim.unlink()
    else:
        victim.write_bytes(victim.read_bytes()[:-2] + b" }")
    return victim.relative_to(path).as_posix()


@pytest.mark.parametrize("what", ["lost view", "damaged view", "lost index", "damaged index"])
def test_damaged_receipts_are_named_and_repaired_from_a_copy(
    what: str, split: logitcache.LogitCache, tmp_path: Path
) -> None:
    path, copy = tmp_path / "split.cache", tmp_path / "copy.cache"
    shutil.copytree(path, copy)
    victim = damage(path, what)

    found = verify(str(path))
    assert victim == found[0].path
    with pytest.raises(CorruptCache, match=victim.rpartition("/")[2]):
        logitcache.open(path).view(1)
    assert [] == repair(str(path), source=str(copy)).remaining
    assert split.digest == logitcache.open(path).digest


def test_a_view_whose_receipts_are_lost_is_computed_again(split: logitcache.LogitCache, tmp_path: Path) -> None:
    path = tmp_path / "split.cache"
    untouched = objects_of_views(path)[0].name
    damage(path, "lost view")
    result = repair(str(path), recompute=lambda: build(path).digest)

    assert [f"v00001/b{number:05d}" for number in range(BLOCKS)] == result.recomputed
    assert (split.digest, []) == (result.digest, result.remaining)
    assert untouched in {file.name for file in objects_of_views(path)}


def reseal(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the index, with every hash in the records made right again."""
    index = json.loads((path / "receipts.json").read_text())
    change(index)
    data = canonical_json(index)
    (path / "receipts.json").write_bytes(data)
    manifest = json.loads((path / "manifest.json").read_text()) | {"receipts": sha256_hex(data), "checksum": None}
    (path / "manifest.json").write_bytes(dump_manifest(Manifest.model_validate(manifest)))


def claim_other_digest(index: dict[str, Any]) -> None:
    index["views"]["v00001"]["object"]["values_sha256"] = "0" * 64


def lack_a_view(index: dict[str, Any]) -> None:
    del index["views"]["v00001"]


def swap_views(index: dict[str, Any]) -> None:
    views = index["views"]
    views["v00000"], views["v00001"] = views["v00001"], views["v00000"]


def claim_many_bytes(index: dict[str, Any]) -> None:
    index["views"]["v00001"]["object"]["bytes"] = 2**40


def claim_other_rows(index: dict[str, Any]) -> None:
    index["views"]["v00001"]["rows"] += 1


def name_a_view_oddly(index: dict[str, Any]) -> None:
    index["views"]["../v1"] = index["views"]["v00001"]


def be_receipts(index: dict[str, Any]) -> None:
    del index["views"]


ATTACKS: list[tuple[Callable[[dict[str, Any]], None], str]] = [
    (claim_other_digest, "don't add up to the manifest's digest"),
    (lack_a_view, "lacks view 1"),
    (swap_views, "don't add up to the manifest's digest"),
    (claim_many_bytes, "states 1099511627776 bytes for the receipts of view 1; they take at most"),
    (claim_other_rows, "doesn't add up to what receipts.json states of view 1"),
    (name_a_view_oddly, "receipts.json is damaged: views"),
    (be_receipts, "describes it as an index of views, and it is the receipts"),
]


@pytest.mark.parametrize(("attack", "message"), ATTACKS, ids=lambda value: getattr(value, "__name__", ""))
def test_an_index_that_contradicts_the_cache_is_refused(
    attack: Callable[[dict[str, Any]], None], message: str, split: logitcache.LogitCache, tmp_path: Path
) -> None:
    path = tmp_path / "split.cache"
    reseal(path, attack)

    with pytest.raises(CorruptCache, match=message):
        logitcache.open(path).view(1)
    assert [] != verify(str(path))


def test_receipts_of_a_view_that_claim_other_values_are_refused(split: logitcache.LogitCache, tmp_path: Path) -> None:
    """Somebody who knows the format makes every hash right but the one that was pinned."""
    path = tmp_path / "split.cache"
    victim = objects_of_views(path)[1]
    of_view = json.loads(victim.read_text())
    of_view["v00001/b00000"]["objects"]["ids"]["values_sha256"] = "0" * 64
    data = canonical_json(of_view)
    (victim.parent / f"{sha256_hex(data)}.json").write_bytes(data)

    def name_them(index: dict[str, Any]) -> None:
        index["views"]["v00001"]["object"] |= {"bytes": len(data), "sha256": sha256_hex(data)}

    reseal(path, name_them)
    with pytest.raises(CorruptCache, match="doesn't add up"):
        logitcache.open(path).view(1)
    with pytest.raises(LogitCacheError, match="doesn't add up"):
        pull(str(path), str(tmp_path / "b.cache"), expect=split.pin)


def test_an_index_in_place_of_receipts_is_refused(
    whole: logitcache.LogitCache, split: logitcache.LogitCache, tmp_path: Path
) -> None:
    path = tmp_path / "whole.cache"
    data = (tmp_path / "split.cache/receipts.json").read_bytes()
    assert isinstance(ReceiptIndex.model_validate_json(data), ReceiptIndex)
    (path / "receipts.json").write_bytes(data)
    reseal(path, lambda index: None)

    with pytest.raises(CorruptCache, match="describes it as the receipts, and it is an index of views"):
        logitcache.open(path)
