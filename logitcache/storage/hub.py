"""Dataset repositories of the Hugging Face Hub: hf://datasets/OWNER/NAME[@REVISION][/PATH], through its own client.

Reading sends one request per object. Writing makes commits, so only a whole copy is written (`logitcache push`): its
files are uploaded while it runs and appear when it is complete. Token and endpoint come from the client's settings
(`hf auth login`, `HF_TOKEN`, `HF_ENDPOINT`).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from threading import RLock
from typing import Any
from urllib.parse import unquote

from logitcache.errors import StorageError, UsageError
from logitcache.storage.protocol import Arrived, Storage

try:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )
    from huggingface_hub.hf_api import RepoFile, RepoFolder
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_stream_backoff, validate_repo_id
except ImportError as error:
    raise UsageError("hf:// needs the extra `hub`: pip install 'logitcache[hub]'") from error

CONCURRENCY = 8
BODY_ATTEMPTS = 4
"""Requests for a response that is cut off; the client itself repeats refused requests."""
UPLOAD_FILES, UPLOAD_BYTES = 256, 2**27
"""Files that are uploaded at once, before the commit that adds them: at most so many, or so many bytes and one file."""
COMMIT_FILES = 1000
"""Files of one commit; the Hub's commits slow down beyond."""
HUB_FILES = (".gitattributes",)
"""Files that the Hub adds to a repository."""
EXAMPLE = "hf://datasets/OWNER/NAME, with @REVISION after the name, or a folder /PATH, if needed"
_URL = re.compile(
    r"hf://datasets/(?P<repo>[^/@]+/[^/@]+)(?:@(?P<revision>refs/(?:pr|convert)/[^/]+|[^/]+))?(?:/(?P<path>.*))?"
)


def open_hub(url: str) -> HubStorage:
    """The store behind a URL; no request is sent.

    Raises:
        UsageError: not the URL of a dataset repository.
    """
    found = _URL.fullmatch(url.rstrip("/"))
    if found is None:
        raise UsageError(f"{url} is not a dataset repository; expected {EXAMPLE}")
    path = found["path"] or ""
    if {"", ".", ".."} & set(path.split("/")) and path:
        raise UsageError(f"{url} has an empty part, . or .. in its path")
    try:
        validate_repo_id(found["repo"])
    except HFValidationError as error:
        raise UsageError(f"{url}: {error}") from None
    return HubStorage(url.rstrip("/"), found["repo"], unquote(found["revision"] or "main"), path)


class HubStorage(Storage):
    """A folder of a dataset repository at a revision, for reading.

    Args:
        url: as users write it.
        repo: owner and name.
        revision: a branch, tag or commit.
        path: the folder; empty for the whole repository.
    """

    is_remote = True
    concurrency = CONCURRENCY
    can_write = False
    can_list = True

    def __init__(self, url: str, repo: str, revision: str, path: str) -> None:
        self.url = url
        self.repo = repo
        self.revision = revision
        self.prefix = f"{path}/" if path else ""
        self.endpoint = os.environ.get("HF_ENDPOINT") or None
        self.api = HfApi(endpoint=self.endpoint, library_name="logitcache")

    def get(self, key: str, *, limit: int | None = None) -> bytes | None:
        view = self.get_view(key, limit=limit)
        return None if view is None else bytes(view)

    def get_view(self, key: str, *, limit: int | None = None, arrived: Arrived | None = None) -> memoryview | None:
        url = self._file_url(key)
        for attempt in range(BODY_ATTEMPTS):
            try:
                return self._read(url, limit, arrived)
            except HfHubHTTPError as error:
                if _is_missing(error):
                    return None
                raise self.error("read", error, key) from error
            except Exception as error:  # of the client's HTTP library, which depends on the client's version
                if attempt + 1 == BODY_ATTEMPTS:
                    raise self.error("read", error, key) from error
        raise AssertionError("the last attempt returns or raises")

    def _read(self, url: str, limit: int | None, arrived: Arrived | None) -> memoryview:
        data = bytearray()
        headers = build_hf_headers(library_name="logitcache") | {"Accept-Encoding": "identity"}
        with http_stream_backoff("GET", url, headers=headers, follow_redirects=True) as response:
            if response.status_code >= 400:
                response.read()
            hf_raise_for_status(response)
            for piece in response.iter_bytes():
                data += piece
                if arrived is not None:
                    arrived(len(data))
                if limit is not None and len(data) > limit:
                    break  # more than the limit is not read
        return memoryview(data)[: None if limit is None else limit + 1].toreadonly()

    def size(self, key: str) -> int | None:
        url = self._file_url(key)
        try:
            found: int | None = get_hf_file_metadata(url, endpoint=self.endpoint).size
            return found
        except HfHubHTTPError as error:
            if _is_missing(error):
                return None
            raise self.error("read", error, key) from error
        except Exception as error:
            raise self.error("read", error, key) from error

    def sizes(self, prefix: str = "") -> Iterator[tuple[str, int]]:
        for entry in self._tree(prefix, recursive=True):
            if isinstance(entry, RepoFile) and entry.path not in HUB_FILES:
                yield entry.path.removeprefix(self.prefix), entry.size

    def folders(self, prefix: str = "") -> list[str]:
        entries = self._tree(prefix, recursive=False)
        return sorted(entry.path.rsplit("/", 1)[-1] for entry in entries if isinstance(entry, RepoFolder))

    def _tree(self, prefix: str, *, recursive: bool) -> Iterator[RepoFile | RepoFolder]:
        folder = (self.prefix + prefix).rstrip("/") or None
        try:
            yield from self.api.list_repo_tree(
                self.repo, folder, recursive=recursive, revision=self.revision, repo_type="dataset"
            )
        except EntryNotFoundError:
            return
        except Exception as error:
            raise self.error("list", error, prefix) from error

    def put(self, key: str, data: bytes | memoryview, *, durable: bool = True) -> None:
        self._refuse()

    def create(self, key: str, data: bytes) -> bool:
        self._refuse()
        return False

    def delete(self, key: str) -> None:
        self._refuse()

    @contextmanager
    def transaction(self) -> Iterator[HubCommit]:
        """A store for a whole copy, which appears when the context ends without an error.

        Raises:
            StorageError: no access, or the repository has changed meanwhile.
            UsageError: the revision does not exist, or the Hub refuses the card.
        """
        staged = HubCommit(self)
        yield staged
        staged.commit()

    def in_repo(self, key: str) -> str:
        """The path of an object in the repository.

        Raises:
            UsageError: the key leads out of the folder.
        """
        if {"", ".", ".."} & set(key.split("/")):
            raise UsageError(f"{key!r} is not a key inside the cache")
        return self.prefix + key

    def _file_url(self, key: str) -> str:
        path = self.in_repo(key)
        url: str = hf_hub_url(self.repo, path, repo_type="dataset", revision=self.revision, endpoint=self.endpoint)
        return url

    def _refuse(self) -> None:
        raise UsageError(
            f"{self.url} is written as a whole, by `logitcache push CACHE {self.url}`; write to a directory, s3://, "
            "gs:// or az://, and push the sealed cache"
        )

    def error(self, action: str, error: Exception, key: str = "") -> StorageError:
        """A refusal of the Hub as an error that states what to do."""
        login = "check the name; for a private repository, log in with `hf auth login` or set HF_TOKEN"
        status = _status(error)
        if isinstance(error, GatedRepoError):
            remedy = "access must be requested on the repository's page"
        elif isinstance(error, RepositoryNotFoundError):
            remedy = f"there is no dataset repository {self.repo}, or no access to it: {login}"
        elif isinstance(error, RevisionNotFoundError):
            remedy = f"there is no revision {self.revision!r}: check its name, or create the branch first"
        elif status in (401, 403):
            remedy = f"access denied: {login}; writing needs a token with write access"
        elif status in (409, 412):
            remedy = "the repository was changed meanwhile: run the same command again"
        else:
            remedy = ""
        text = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        where = f"{self.url}/{key}" if key else self.url
        return StorageError(f"can't {action} {where}: {remedy}{'. ' if remedy else ''}{text[:300]}")


class HubCommit(Storage):
    """The files of a copy, on their way into a repository: uploaded in batches, added by commits at the end.

    Reads give what was put here, and otherwise what the repository has. A repository that does not exist is empty, and
    is created as a private one by the first upload. It has no lock: the parent of the commit is compared.

    Raises:
        StorageError: the repository can't be reached.
    """

    is_remote = True
    concurrency = CONCURRENCY
    can_write = True
    can_list = True

    def __init__(self, base: HubStorage) -> None:
        self.url = base.url
        self._base = base
        self._exists = True
        self._parent: str | None = None
        try:
            about = base.api.repo_info(base.repo, repo_type="dataset", revision=base.revision)
            self._parent = about.sha
        except GatedRepoError as error:
            raise base.error("write", error) from error
        except RepositoryNotFoundError:
            self._exists = False
        except Exception as error:
            raise base.error("write", error) from error
        self._before: dict[str, int] = dict(base.sizes()) if self._exists else {}
        self._objects: dict[str, CommitOperationAdd] = {}
        self._records: dict[str, bytes] = {}
        """Manifest, receipts and card: few, and read again before the commit."""
        self._deleted: set[str] = set()
        self._waiting: list[CommitOperationAdd] = []
        self._lock = RLock()

    def get(self, key: str, *, limit: int | None = None) -> bytes | None:
        with self._lock:
            if key in self._objects:  # only to describe views from two places on one card
                raise UsageError(
                    f"{self.url} holds other views of this cache than those that are pushed. Pull it into the folder "
                    "of the cache first, which joins them, and push that"
                )
            if key in self._records:
                return self._records[key][: None if limit is None else limit + 1]
            there = key in self._before and key not in self._deleted
        return self._base.get(key, limit=limit) if there else None

    def put(self, key: str, data: bytes | memoryview, *, durable: bool = True) -> None:
        with self._lock:
            self._deleted.discard(key)
            if durable:
                self._records[key] = bytes(data)
                return
            addition = CommitOperationAdd(self._base.in_repo(key), bytes(data))
            self._objects[key] = addition
            self._waiting.append(addition)
            size = sum(each.upload_info.size for each in self._waiting)
            if len(self._waiting) >= UPLOAD_FILES or size >= UPLOAD_BYTES:
                self._upload()

    def create(self, key: str, data: bytes) -> bool:
        with self._lock:
            if self.size(key) is not None:
                return False
            self.put(key, data)
            return True

    def size(self, key: str) -> int | None:
        with self._lock:
            return self._sizes().get(key)

    def sizes(self, prefix: str = "") -> Iterator[tuple[str, int]]:
        with self._lock:
            found = self._sizes()
        folder = f"{prefix.rstrip('/')}/" if prefix else ""
        return ((key, size) for key, size in found.items() if key.startswith(folder))

    def _sizes(self) -> dict[str, int]:
        kept = {key: size for key, size in self._before.items() if key not in self._deleted}
        objects = {key: each.upload_info.size for key, each in self._objects.items()}
        return kept | objects | {key: len(data) for key, data in self._records.items()}

    def folders(self, prefix: str = "") -> list[str]:
        start = len(f"{prefix.rstrip('/')}/") if prefix else 0
        return sorted({key[start:].split("/")[0] for key in self.list_keys(prefix) if "/" in key[start:]})

    def delete(self, key: str) -> None:
        with self._lock:
            self._objects.pop(key, None)
            self._records.pop(key, None)
            self._deleted.add(key)

    def operations(self) -> tuple[list[Any], list[Any]]:
        """What the commits will do: files that are added for the blocks; those of records, and deletions."""
        in_repo = self._base.in_repo
        records: list[Any] = [CommitOperationAdd(in_repo(key), data) for key, data in self._records.items()]
        records += [CommitOperationDelete(in_repo(key)) for key in sorted(self._deleted & self._before.keys())]
        return list(self._objects.values()), records

    def commit(self) -> None:
        """Add all files: those of the cache's blocks first, so that the cache is complete when it becomes visible.

        Raises:
            StorageError: no access, or the repository has changed meanwhile.
            UsageError: the Hub refuses the card.
        """
        self._upload()
        objects, records = self.operations()
        parts = [objects[start : start + COMMIT_FILES] for start in range(0, len(objects), COMMIT_FILES)] or [[]]
        parts[-1] += records
        where = f" in {self._base.prefix}" if self._base.prefix else ""
        for part in filter(None, parts):
            try:
                made = self._base.api.create_commit(
                    self._base.repo,
                    part,
                    commit_message=f"Add a logitcache cache{where}",
                    repo_type="dataset",
                    revision=self._base.revision,
                    parent_commit=self._parent,
                )
            except HfHubHTTPError as error:
                raise self._base.error("write", error) from error
            except ValueError as error:
                raise UsageError(
                    f"the Hub refuses the card of the cache: {error}. Change `cache.card`, such as its license, and "
                    "push again"
                ) from error
            except Exception as error:
                raise self._base.error("write", error) from error
            self._parent = made.oid

    def _upload(self) -> None:
        """Upload the waiting files, and free their memory where the Hub stores them apart from the commit."""
        base, waiting = self._base, self._waiting
        self._waiting = []
        try:
            if not self._exists:
                base.api.create_repo(base.repo, repo_type="dataset", private=True, exist_ok=True)
                self._exists = True
            if waiting:
                base.api.preupload_lfs_files(base.repo, waiting, repo_type="dataset", revision=base.revision)
        except Exception as error:
            raise base.error("write", error) from error


def _status(error: Exception) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _is_missing(error: HfHubHTTPError) -> bool:
    """Whether the repository has no such file; a server without the Hub's error codes says no more than 404."""
    refused = RepositoryNotFoundError | RevisionNotFoundError
    return isinstance(error, EntryNotFoundError) or (_status(error) == 404 and not isinstance(error, refused))
