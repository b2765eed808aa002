"""Several processes at work on one folder: whoever comes first or last, what is left is a sound cache."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import pytest
import torch

import logitcache
from logitcache.cache.layout import group_metadata
from logitcache.errors import CorruptCache, IdentityMismatch, IncompleteCache, UsageError
from logitcache.progress import silence
from logitcache.share import transfer
from logitcache.share.transfer import pull
from logitcache.storage import open_storage
from logitcache.verify.audit import verify
from logitcache.verify.repair import repair

VIEWS, SAMPLES, CLASSES = 4, 40, 6
RACES = 10
GAP = 3
"""Exit code of a pull that would leave a gap."""
INCOMPLETE = 4
"""Exit code of a builder whose blocks another one took back."""


def build(path: Path | str, num_views: int = VIEWS, teacher: str = "net") -> str:
    shape = {"num_samples": SAMPLES, "num_classes": CLASSES, "num_views": num_views, "rows_per_block": 16}
    labels = torch.randn(VIEWS, SAMPLES, CLASSES, generator=torch.Generator().manual_seed(0))
    with logitcache.create(path, **shape, encoding=logitcache.TopK(k=2), teacher=teacher, dataset="pictures") as writer:
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


def in_between(monkeypatch: pytest.MonkeyPatch, act: Callable[[], None]) -> None:
    """Do something at the moment when the next copy has its objects and is about to publish."""
    really_copy = transfer._copy_objects

    def copy(*arguments: Any, **options: Any) -> None:
        really_copy(*arguments, **options)
        monkeypatch.setattr(transfer, "_copy_objects", really_copy)
        act()

    monkeypatch.setattr(transfer, "_copy_objects", copy)


PLACES = ["a folder", "an object store"]


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "b.cache") if request.param == PLACES[0] else f"memory://{tmp_path.name}/b.cache"


@pytest.mark.parametrize("views", [("0:2", "2:4"), ("2:4", "0:2"), ("0:3", "1:4"), ("0:4", "1:2"), ("1:2", "0:4")])
def test_a_pull_joins_what_was_pulled_while_it_copied(
    views: tuple[str, str], place: str, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Object stores have no lock: there, what was published meanwhile is looked at again."""
    in_between(monkeypatch, lambda: pull(str(whole), place, views=views[1]))
    pulled = pull(str(whole), place, views=views[0])

    assert ("0:4", logitcache.open(whole).digest) == (pulled.views, pulled.digest)
    assert pulled.digest == logitcache.open(place).digest
    assert [] == verify(place, deep=True)
    assert files(whole) == sorted(open_storage(place).list_keys())


def test_a_pull_that_would_leave_a_gap_by_now_takes_nothing_away(
    place: str, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_between(monkeypatch, lambda: pull(str(whole), place, views="3:4"))
    with pytest.raises(UsageError, match="holds views 3:4; 0:1 would leave a gap"):
        pull(str(whole), place, views="0:1")

    assert range(3, 4) == logitcache.open(place).views
    assert [] == verify(place, deep=True)


def test_what_a_pull_has_brought_may_be_cleared_away_by_another_and_is_brought_again(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "b.cache"

    def clear_away() -> None:
        for file in path.glob("labels.zarr/*/c/1/**/*"):
            if file.is_file():
                file.unlink()

    in_between(monkeypatch, clear_away)
    pull(str(whole), str(path))

    assert [] == verify(str(path), deep=True)


def test_another_cache_that_came_meanwhile_is_not_published_over(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "b.cache"
    build(tmp_path / "other.cache", teacher="other")
    in_between(monkeypatch, lambda: pull(str(tmp_path / "other.cache"), str(path)))
    with pytest.raises(IdentityMismatch, match="holds another cache"):
        pull(str(whole), str(path))

    assert "other" == logitcache.open(path).manifest.identity.teacher
    assert [] == verify(str(path), deep=True)


def broken_by_a_race(whole: Path, path: Path) -> None:
    """What two pulls at once left before there was a lock."""
    pull(str(whole), str(path), views="0:2")
    pull(str(whole), str(path) + ".other", views="2:4")
    shutil.copyfile(Path(f"{path}.other") / "receipts.json", path / "receipts.json")
    shutil.copytree(Path(f"{path}.other") / "labels.zarr", path / "labels.zarr", dirs_exist_ok=True)
    with pytest.raises(CorruptCache):
        logitcache.open(path)


@pytest.mark.parametrize("views", ["0:2", "1:2", "2:4", None])
def test_a_folder_that_a_race_left_broken_is_mended_by_pulling_again(
    views: str | None, whole: Path, tmp_path: Path
) -> None:
    broken_by_a_race(whole, tmp_path / "b.cache")
    pull(str(whole), str(tmp_path / "b.cache"), views=views)

    assert {"0:2": 2, "1:2": 2, "2:4": 4, None: 4}[views] == len(logitcache.open(tmp_path / "b.cache").views)
    assert [] == verify(str(tmp_path / "b.cache"), deep=True)


def test_a_folder_that_a_race_left_broken_is_repaired_from_a_copy_with_more_views(whole: Path, tmp_path: Path) -> None:
    broken_by_a_race(whole, tmp_path / "b.cache")
    (tmp_path / "b.cache/labels.zarr/ids/c/1/0/0").write_bytes(b"damaged")
    result = repair(str(tmp_path / "b.cache"), source=str(whole))

    assert {"stray"} == {problem.kind for problem in result.remaining}  # the chunks of the other pull
    pulled = logitcache.open(tmp_path / "b.cache")
    assert (range(2), result.digest) == (pulled.views, pulled.digest)


def test_records_that_no_copy_can_vouch_for_are_not_guessed(whole: Path, tmp_path: Path) -> None:
    broken_by_a_race(whole, tmp_path / "b.cache")
    pull(str(whole), str(tmp_path / "part.cache"), views="1:4")
    with pytest.raises(CorruptCache, match="receipts.json"):
        pull(str(tmp_path / "part.cache"), str(tmp_path / "b.cache"))


@pytest.mark.parametrize("mend", ["build", "pull", "repair"])
def test_metadata_of_another_number_of_views_is_mended_by_asking_again(mend: str, whole: Path, tmp_path: Path) -> None:
    path = tmp_path / "b.cache"
    digest = build(path)
    layout = logitcache.open(path).layout
    for key, data in group_metadata(layout.model_copy(update={"num_views": 1})).items():
        (path / key).write_bytes(data)
    assert {"wrong bytes"} == {problem.kind for problem in verify(str(path))}
    if mend == "build":
        assert digest == build(path)
    elif mend == "pull":
        pull(str(whole), str(path))
    else:
        repair(str(path), source=str(whole))

    assert [] == verify(str(path), deep=True)


def test_a_builder_that_asked_for_more_views_goes_on_after_another_one_sealed(whole: Path, tmp_path: Path) -> None:
    """The sealed cache is read all the while, and grows when the other builder is done."""
    path = tmp_path / "b.cache"
    shape = {"num_samples": SAMPLES, "num_classes": CLASSES, "rows_per_block": 16, "encoding": logitcache.TopK(k=2)}
    more = logitcache.create(path, num_views=VIEWS, **shape, teacher="net", dataset="pictures")
    labels = torch.randn(VIEWS, SAMPLES, CLASSES, generator=torch.Generator().manual_seed(0))
    digest = build(path, 2)
    assert digest == logitcache.open(path).digest
    with more:
        for view in range(VIEWS):
            more.write(view=view, start=0, logits=labels[view])

    assert logitcache.open(whole).digest == logitcache.open(path).digest
    assert digest != logitcache.open(path).digest
    assert [] == verify(str(path), deep=True)
    assert files(whole) == files(path)


def test_a_builder_that_asked_for_fewer_views_leaves_a_larger_cache_as_it_is(whole: Path, tmp_path: Path) -> None:
    path = tmp_path / "b.cache"
    shape = {"num_samples": SAMPLES, "num_classes": CLASSES, "rows_per_block": 16, "encoding": logitcache.TopK(k=2)}
    fewer = logitcache.create(path, num_views=1, **shape, teacher="net", dataset="pictures")
    build(path)
    labels = torch.randn(VIEWS, SAMPLES, CLASSES, generator=torch.Generator().manual_seed(0))
    with fewer:
        fewer.write(view=0, start=0, logits=labels[0])

    assert VIEWS == fewer.manifest.layout.num_views
    assert logitcache.open(whole).digest == logitcache.open(path).digest
    assert [] == verify(str(path), deep=True)


def test_a_builder_whose_views_were_taken_back_is_told_and_may_ask_again(whole: Path, tmp_path: Path) -> None:
    path = tmp_path / "b.cache"
    shape = {"num_samples": SAMPLES, "num_classes": CLASSES, "rows_per_block": 16, "encoding": logitcache.TopK(k=2)}
    more = logitcache.create(path, num_views=VIEWS, **shape, teacher="net", dataset="pictures")
    labels = torch.randn(VIEWS, SAMPLES, CLASSES, generator=torch.Generator().manual_seed(0))
    for view in range(VIEWS):
        more.write(view=view, start=0, logits=labels[view])
    more.flush()
    build(path, 2)
    with pytest.raises(IncompleteCache, match="6 of 12 blocks are missing"), more:
        pass

    assert range(2) == logitcache.open(path).views
    assert [] == verify(str(path), deep=True)
    assert logitcache.open(whole).digest == build(path)


def test_a_builder_whose_labels_differ_from_those_that_another_sealed_says_so(tmp_path: Path) -> None:
    """And leaves the sealed cache as it is."""
    path = tmp_path / "b.cache"
    shape = {"num_samples": SAMPLES, "num_classes": CLASSES, "rows_per_block": 16, "encoding": logitcache.TopK(k=2)}
    late = logitcache.create(path, num_views=1, **shape, teacher="net", dataset="pictures")
    build(path, 1)
    labels = torch.randn(SAMPLES, CLASSES, generator=torch.Generator().manual_seed(1))
    with pytest.raises(IdentityMismatch, match="v00000/b0000. of .* was written with other logits by another"), late:
        late.write(view=0, start=0, logits=labels)
    assert [] == verify(str(path), deep=True)
