"""Several processes at work on one folder: whoever comes first or last, what is left is a sound cache."""

from __future__ import annotations

from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import pytest
import torch

import logitcache
from logitcache.errors import IncompleteCache, UsageError
from logitcache.progress import silence
from logitcache.sharing.transfer import pull
from logitcache.trust.audit import verify

VIEWS, SAMPLES, CLASSES = 4, 40, 6
RACES = 10
GAP = 3
"""Exit code of a pull that would leave a gap."""
INCOMPLETE = 4
"""Exit code of a builder whose blocks another one took back."""


def build(path: Path | str, num_views: int = VIEWS) -> str:
    shape = {"num_samples": SAMPLES, "num_classes": CLASSES, "num_views": num_views, "rows_per_block": 16}
    labels = torch.randn(VIEWS, SAMPLES, CLASSES, generator=torch.Generator().manual_seed(0))
    with logitcache.create(path, **shape, encoding=logitcache.TopK(k=2), teacher="net", dataset="pictures") as writer:
        for view in range(num_views):
            writer.write(view=view, start=0, logits=labels[view])
    return str(logitcache.open(path).digest)


def pull_at_once(start: Barrier, source: Path, target: Path, views: str) -> None:
    silence()
    start.wait()
    try:
        pull(str(source), str(target), views=views)
    except UsageError as error:
        if "gap" not in str(error):
            raise
        raise SystemExit(GAP) from None


def build_at_once(start: Barrier, path: Path, num_views: int) -> None:
    silence()
    start.wait()
    try:
        build(path, num_views)
    except IncompleteCache:
        raise SystemExit(INCOMPLETE) from None


def race(forks: Any, work: Any, each: list[tuple[Any, ...]]) -> list[int]:
    """Run the same work with other arguments, in a process each, at the same moment; their exit codes."""
    start = forks.Barrier(len(each))
    children = [forks.Process(target=work, args=(start, *arguments)) for arguments in each]
    for child in children:
        child.start()
    for child in children:
        child.join()
    return [child.exitcode for child in children]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("source") / "whole.cache"
    build(path)
    return path


def files(path: Path) -> list[str]:
    return sorted(file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file())


def test_pulls_of_different_views_into_one_folder_join(whole: Path, tmp_path: Path, forks: Any) -> None:
    for attempt in range(RACES):
        path = tmp_path / f"{attempt}.cache"

        assert [0, 0] == race(forks, pull_at_once, [(whole, path, "0:2"), (whole, path, "2:4")])
        assert logitcache.open(whole).digest == logitcache.open(path).digest
        assert [] == verify(str(path), deep=True)
        assert files(whole) == files(path)


def test_pulls_that_would_leave_a_gap_leave_the_cache_of_one_of_them(whole: Path, tmp_path: Path, forks: Any) -> None:
    for attempt in range(RACES):
        path = tmp_path / f"{attempt}.cache"

        assert [0, GAP] == sorted(race(forks, pull_at_once, [(whole, path, "0:1"), (whole, path, "2:4")]))
        assert logitcache.open(path).views in (range(1), range(2, 4))
        assert [] == verify(str(path), deep=True)


def test_builders_of_different_numbers_of_views_leave_a_sound_cache(whole: Path, tmp_path: Path, forks: Any) -> None:
    """A builder that asks for fewer views may take back blocks of one that asks for more: that one is told so."""
    for attempt in range(RACES):
        path = tmp_path / f"{attempt}.cache"

        codes = race(forks, build_at_once, [(path, 1), (path, 2), (path, VIEWS)])
        assert set(codes) <= {0, INCOMPLETE}, codes
        assert 0 in codes
        cache = logitcache.open(path)
        assert cache.sealed
        assert [0, INCOMPLETE][cache.num_views < VIEWS] == codes[2], codes
        assert {"stray"} >= {problem.kind for problem in verify(str(path), deep=True)}
        assert logitcache.open(whole).digest == build(path)
        assert [] == verify(str(path), deep=True)
        assert files(whole) == files(path)
