"""Dataset repositories of the Hugging Face Hub.

olah, a server of others with the Hub's API for reading, serves git repositories; nginx serves the Hub's paths of files. No
server that can be installed takes commits: what a push would commit is applied to such a repository with git.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub import CommitOperationAdd, DatasetCard
from huggingface_hub.utils import parse_hf_uri

import logitcache
from logitcache.cache import objects
from logitcache.errors import IdentityMismatch, NotACache, StorageError, UsageError
from logitcache.share.transfer import _copy, pull, push
from logitcache.storage import LocalStorage, open_storage
from logitcache.storage.hub import HubCommit, HubStorage
from logitcache.verify.audit import verify
from tests import servers
from tests.commands import run_json
from tests.integration.test_exporters import sequences
from tests.integration.test_share import build, read

VIEWS = 2


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of a running server; `mirrors/datasets/OWNER/NAME` are its repositories."""
    folder = tmp_path_factory.mktemp("hub")
    whole = folder / "whole.cache"
    build(whole, num_views=VIEWS)
    repository(folder, "pictures", {"": whole})
    repository(folder, "several", {"a/one.cache": whole, "a/two.cache": whole})
    with servers.olah(folder) as url:
        (folder / "url").write_text(url)
        yield folder


@pytest.fixture(autouse=True)
def _endpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    monkeypatch.setenv("LOGITCACHE_CACHE_DIR", str(tmp_path / "nearby"))
    monkeypatch.setenv("HF_TOKEN", "hf_of_a_test")
    monkeypatch.setattr(objects, "PAUSE_SECONDS", 0.001)
    if "hub" in request.fixturenames:
        monkeypatch.setenv("HF_ENDPOINT", (request.getfixturevalue("hub") / "url").read_text())


def repository(hub: Path, name: str, caches: dict[str, Path]) -> Path:
    """A new repository with copies of caches, and the file that the Hub adds to each."""
    folder = hub / "mirrors/datasets/team" / name
    git(hub, "init", "--quiet", "--initial-branch=main", str(folder))
    (folder / ".gitattributes").write_text("*.bin filter=lfs\n")
    for place, cache in caches.items():
        shutil.copytree(cache, folder / place, dirs_exist_ok=True)
    commit(folder)
    return folder


def commit(folder: Path) -> str:
    """Commit all files of a repository; the commit."""
    git(folder, "add", "--all")
    git(folder, "-c", "user.name=team", "-c", "user.email=team@example.org", "commit", "--quiet", "-m", "files")
    return git(folder, "rev-parse", "HEAD")


def git(folder: Path, *arguments: str) -> str:
    return subprocess.check_output(["git", *arguments], cwd=folder, text=True).strip()


def staged(cache: Path, url: str) -> HubCommit:
    """A push, up to before its commit."""
    base = open_storage(url)
    assert isinstance(base, HubStorage)
    copy = HubCommit(base)
    _copy(open_storage(cache), copy, views=None, expect=None)
    return copy


def apply(copy: HubCommit, folder: Path) -> list[str]:
    """Commit what a push would commit; the paths that were written."""
    blocks, records = copy.operations()
    for operation in [*blocks, *records]:
        path = folder / operation.path_in_repo
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(operation, CommitOperationAdd):
            with operation.as_file() as file:
                path.write_bytes(file.read())
        else:
            path.unlink()
    commit(folder)
    return [operation.path_in_repo for operation in [*blocks, *records]]


@pytest.mark.parametrize(
    "url",
    [
        "hf://datasets/team/pictures",
        "hf://datasets/team/pictures/",
        "hf://datasets/team/pictures@v1.0",
        "hf://datasets/team/pictures/a/b.cache",
        "hf://datasets/team/pictures@refs/pr/3/a.cache",
        "hf://datasets/team/pictures@feature%2Fone/a.cache",
    ],
)
def test_urls_are_parsed_as_the_client_parses_them(url: str) -> None:
    store, expected = open_storage(url), parse_hf_uri(url.rstrip("/"))

    assert isinstance(store, HubStorage)
    assert (expected.id, expected.revision or "main", expected.path_in_repo) == (
        store.repo, store.revision, store.prefix.rstrip("/")
    )  # fmt: skip


@pytest.mark.parametrize(
    "url",
    ["hf://team/pictures", "hf://models/team/net", "hf://datasets/pictures", "hf://datasets/team/a//b", "hf://datasets/team/a/../b",
     "hf://datasets/te am/a", "hf://"],
)  # fmt: skip
def test_what_is_no_dataset_repository_is_refused(url: str) -> None:
    with pytest.raises(UsageError, match="hf://"):
        open_storage(url)


def test_a_repository_is_read_as_a_cache(hub: Path, tmp_path: Path) -> None:
    url, whole = "hf://datasets/team/pictures", hub / "whole.cache"
    found, right = read(url), read(whole)

    assert all(torch.equal(found[view], right[view]) for view in range(VIEWS))
    assert VIEWS == run_json("info", url)["num_views"]
    assert [] == verify(url, deep=True)
    assert logitcache.open(whole).digest == pull(url, str(tmp_path / "here.cache")).digest
    assert "1:2" == pull(url, str(tmp_path / "part.cache"), views="1").views
    assert (whole / "README.md").read_bytes() == (tmp_path / "here.cache/README.md").read_bytes()


def test_a_repository_holds_several_caches_in_folders(hub: Path) -> None:
    store = open_storage("hf://datasets/team/several")
    keys = {
        f"a/{name}/{key}"
        for name in ("one.cache", "two.cache")
        for key in LocalStorage(hub / "whole.cache").list_keys()
    }

    assert (["a"], ["one.cache", "two.cache"]) == (store.folders(), store.folders("a"))
    assert keys == set(store.list_keys())
    assert logitcache.open(hub / "whole.cache").digest == logitcache.open(f"{store.url}/a/two.cache").digest


def test_a_revision_is_read_as_it_was(hub: Path, tmp_path: Path) -> None:
    build(tmp_path / "grown.cache", num_views=VIEWS + 1)
    folder = repository(hub, "growing", {"": hub / "whole.cache"})
    before = git(folder, "rev-parse", "HEAD")
    shutil.copytree(tmp_path / "grown.cache", folder, dirs_exist_ok=True)
    commit(folder)

    assert VIEWS + 1 == len(logitcache.open("hf://datasets/team/growing").views)
    assert VIEWS == len(logitcache.open(f"hf://datasets/team/growing@{before}").views)


def test_the_commit_of_a_push_is_the_cache_with_its_card_on_top(hub: Path, tmp_path: Path) -> None:
    folder = repository(hub, "pushed", {})
    copy = staged(hub / "whole.cache", "hf://datasets/team/pushed")
    paths = apply(copy, folder)
    card = DatasetCard.load(folder / "README.md")

    assert "push.json" not in paths
    assert "manifest.json" in paths
    assert {"knowledge-distillation", "logitcache"} <= set(card.data.tags)
    assert ["n<1K"] == card.data.size_categories
    assert logitcache.open(hub / "whole.cache").digest == pull("hf://datasets/team/pushed", str(tmp_path / "a")).digest
    assert [] == verify("hf://datasets/team/pushed", deep=True)
    assert (folder / ".gitattributes").read_text().startswith("*.bin")


def test_a_push_into_a_folder_leaves_the_rest_of_the_repository_alone(hub: Path, tmp_path: Path) -> None:
    folder = repository(hub, "mixed", {})
    (folder / "README.md").write_text("mine")
    (folder / "a.cache").mkdir()
    (folder / "a.cache/README.md").write_text("old")  # olah takes a missing folder for a missing repository
    commit(folder)
    paths = apply(staged(hub / "whole.cache", "hf://datasets/team/mixed/a.cache"), folder)

    assert all(path.startswith("a.cache/") for path in paths)
    assert "mine" == (folder / "README.md").read_text()
    assert [] == verify("hf://datasets/team/mixed/a.cache")


def test_a_cache_that_has_grown_is_pushed_again_without_the_blocks_that_are_there(hub: Path, tmp_path: Path) -> None:
    folder = repository(hub, "grown", {"": hub / "whole.cache"})
    build(tmp_path / "grown.cache", num_views=VIEWS + 1)
    copy = staged(tmp_path / "grown.cache", "hf://datasets/team/grown")
    blocks, _ = copy.operations()
    apply(copy, folder)

    new = len(logitcache.open(tmp_path / "grown.cache").layout.arrays) * logitcache.open(folder).layout.blocks_per_view
    assert new == len(blocks)
    assert VIEWS + 1 == len(logitcache.open("hf://datasets/team/grown").views)
    assert [] == verify("hf://datasets/team/grown", deep=True)


def test_another_cache_or_other_files_are_not_written_over(hub: Path, tmp_path: Path) -> None:
    build(tmp_path / "other.cache", num_views=VIEWS, teacher="another@1")
    with pytest.raises(IdentityMismatch, match="holds another cache"):
        push(str(tmp_path / "other.cache"), "hf://datasets/team/pictures")
    with pytest.raises(NotACache, match=r"a/one\.cache/.* is not part of this cache"):
        push(str(tmp_path / "other.cache"), "hf://datasets/team/several")


def test_views_are_added_to_those_that_are_there(hub: Path, tmp_path: Path) -> None:
    for view in ("0", "1"):
        pull(str(hub / "whole.cache"), str(tmp_path / view), views=view)
    folder = repository(hub, "part", {"": tmp_path / "0"})
    apply(staged(tmp_path / "1", "hf://datasets/team/part"), folder)

    assert logitcache.open(hub / "whole.cache").digest == logitcache.open("hf://datasets/team/part").digest


def test_views_whose_card_would_need_the_labels_that_are_pushed_are_joined_first(hub: Path, tmp_path: Path) -> None:
    # olah fails on binary files of the size of a pointer of Git LFS, 121 to 149 bytes.
    sequences(tmp_path / "texts.cache", rows_per_block=64, encoding="TopK(k=12, dtype='float32')")
    for view in ("0", "1"):
        pull(str(tmp_path / "texts.cache"), str(tmp_path / view), views=view)
    repository(hub, "later", {"": tmp_path / "1"})
    with pytest.raises(
        UsageError, match="holds other views of this cache .* Pull it into the folder of the cache first"
    ):
        push(str(tmp_path / "0"), "hf://datasets/team/later")


@pytest.mark.parametrize("name", ["readonly", "absent"])
def test_a_server_that_takes_no_commit_is_one_clear_error(hub: Path, name: str) -> None:
    if name == "readonly":
        repository(hub, name, {})
    with pytest.raises(StorageError, match=f"^can't write hf://datasets/team/{name}: "):
        push(str(hub / "whole.cache"), f"hf://datasets/team/{name}")


def test_only_a_push_writes_to_a_repository(hub: Path) -> None:
    url = "hf://datasets/team/pictures/new.cache"
    for write in (lambda: pull(str(hub / "whole.cache"), url), lambda: open_storage(url).put("a", b"")):
        with pytest.raises(UsageError, match="is written as a whole, by `logitcache push"):
            write()


def test_files_are_read_at_the_paths_that_the_hub_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    served = tmp_path / "www/datasets/team/pictures/resolve/main"
    digest = build(served / "a.cache")
    (tmp_path / "nginx").mkdir()
    with servers.nginx(tmp_path / "nginx", tmp_path / "www") as url:
        monkeypatch.setenv("HF_ENDPOINT", url)
        store = open_storage("hf://datasets/team/pictures/a.cache")

        assert digest == pull("hf://datasets/team/pictures/a.cache", str(tmp_path / "here.cache")).digest
        assert (served / "a.cache/manifest.json").stat().st_size == store.size("manifest.json")
        assert store.get("nothing") is store.size("nothing") is None
        assert (served / "a.cache/manifest.json").read_bytes()[:11] == store.get("manifest.json", limit=10)
        with pytest.raises(NotACache, match="is not a logit cache"):
            logitcache.open("hf://datasets/team/pictures/b.cache")
        with pytest.raises(UsageError, match="is written as a whole, by `logitcache push`"):
            build("hf://datasets/team/pictures/b.cache")
        with pytest.raises(UsageError, match="is not a key inside the cache"):
            store.get("../a.cache/manifest.json")


def test_without_the_client_the_message_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.delitem(sys.modules, "logitcache.storage.hub")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UsageError, match=r"pip install 'logitcache\[hub\]'"):
        open_storage("hf://datasets/team/pictures")
