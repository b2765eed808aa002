"""Sealing a cache that its writers left open."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import logitcache
from logitcache.errors import IncompleteCache, NotACache
from tests.commands import logitcache as command

LOGITS = torch.randn(2, 10, 5, generator=torch.Generator().manual_seed(0))


def written(path: Path, *, views: int = 2, **changes: object) -> Path:
    """A cache in which only the first views were written, by a writer that was closed."""
    settings = {"num_samples": 10, "num_classes": 5, "num_views": 2, "rows_per_block": 4}
    writer = logitcache.create(path, teacher="net", dataset="pictures", **(settings | changes))  # type: ignore[arg-type]
    for view in range(views):
        writer.write(view=view, start=0, logits=LOGITS[view])
    writer.close()
    return path


@pytest.mark.parametrize("encoding", ["dense", "LowRank(rank=2, k=2)"])
def test_a_cache_whose_blocks_are_all_written_is_sealed(tmp_path: Path, encoding: str) -> None:
    path = written(tmp_path / "a.cache", encoding=encoding, calibration=LOGITS.flatten(0, 1))
    assert not logitcache.open(path).sealed
    cache = logitcache.seal(path)

    assert cache.sealed
    assert (path / "README.md").is_file()
    assert not (path / "receipts").exists() or not any((path / "receipts").rglob("*.json"))


def test_a_cache_of_sequences_is_sealed(tmp_path: Path) -> None:
    path = written(tmp_path / "a.cache", num_samples=4, rows_per_sample=[3, 1, 2, 4])

    assert [0, 3, 4, 6, 10] == logitcache.seal(path).row_offsets.tolist()


def test_it_has_the_digest_that_its_writer_would_have_given_it(tmp_path: Path) -> None:
    with logitcache.create(
        tmp_path / "b.cache",
        num_samples=10,
        num_classes=5,
        num_views=2,
        rows_per_block=4,
        teacher="net",
        dataset="pictures",
    ) as writer:
        for view in range(2):
            writer.write(view=view, start=0, logits=LOGITS[view])

    assert logitcache.open(tmp_path / "b.cache").digest == logitcache.seal(written(tmp_path / "a.cache")).digest


def test_missing_blocks_are_named_and_nothing_changes(tmp_path: Path) -> None:
    path = written(tmp_path / "a.cache", views=1)
    before = {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}
    with pytest.raises(
        IncompleteCache, match=r"3 of 6 blocks are missing \(v00001/b00000, .*b00002\); re-run the build"
    ):
        logitcache.seal(path)

    assert before == {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}


def test_a_sealed_cache_stays_as_it_is(tmp_path: Path) -> None:
    path = written(tmp_path / "a.cache")
    logitcache.seal(path)
    manifest = (path / "manifest.json").read_bytes()
    logitcache.seal(path)

    assert manifest == (path / "manifest.json").read_bytes()


def test_a_folder_without_a_cache_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NotACache):
        logitcache.seal(tmp_path)
    assert [] == list(tmp_path.iterdir())


def test_the_command_prints_the_keys_of_info_and_exits_with_1_while_blocks_are_missing(tmp_path: Path) -> None:
    complete, partial = written(tmp_path / "a.cache"), written(tmp_path / "b.cache", views=1)
    sealed = command("seal", complete, "--json")
    refused = command("seal", partial)

    assert json.loads(sealed.stdout)["sealed"] is True
    assert json.loads(sealed.stdout) == json.loads(command("info", complete, "--json").stdout)
    assert (1, True) == (refused.returncode, "v00001/b00000" in refused.stderr)
