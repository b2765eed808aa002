"""Summaries and listings of caches, from small reads: without torch, receipts or labels."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from logitcache.cache.manifest import MANIFEST, MAX_MANIFEST_BYTES, RECEIPTS, Contents, Manifest, read_manifest
from logitcache.cache.names import CacheNames, names_of
from logitcache.cache.packages import missing_packages, recorded_packages
from logitcache.errors import CorruptCache, NotACache, StorageError, UnsupportedFormat, UsageError
from logitcache.registry import offered
from logitcache.storage import LocalStorage, Storage, open_storage

if TYPE_CHECKING:
    from logitcache.cache.build_progress import BuildProgress

MAX_DEPTH = 5
"""Depth to which `find_caches` looks below a location."""
MAX_REMOTE_FOLDERS = 10_000
MAX_REMOTE_SECONDS = 600.0
"""Limits of `find_caches` on a store: a hostile server may list new folders forever."""


@dataclass(frozen=True)
class Summary:
    """What `info` and `ls` show of a cache."""

    url: str
    manifest: Manifest
    contents: Contents | None
    """None if the manifest alone does not tell, as for an open cache in `ls`."""
    progress: BuildProgress | None = None
    """Of the build of an open cache; None of a sealed one, and in `ls`."""

    @property
    def names(self) -> CacheNames:
        """Readable names of teacher and dataset."""
        return names_of(self.manifest)

    @property
    def bytes_per_sample(self) -> float | None:
        """Bytes of the labels of one sample in one view."""
        each, layout = self.bytes_per_row, self.manifest.layout
        return None if each is None else each * layout.num_rows / layout.num_samples

    @property
    def bytes_per_row(self) -> float | None:
        """Bytes of the labels of one row: of a sample, or of a token in a cache of sequences."""
        return self.contents.label_bytes / self.contents.rows if self.contents and self.contents.rows else None

    @property
    def encoding(self) -> str:
        """The encoding as a Python expression, such as `TopK(k=20)`."""
        return _spelled(self.manifest.identity.encoding)

    @property
    def packages(self) -> dict[str, dict[str, str]]:
        """Name and version of the package that each encoding comes from, unless it is built in."""
        return {name: asdict(package) for name, package in recorded_packages(self.manifest).items()}

    @property
    def missing_packages(self) -> str | None:
        """Which of these is not installed, and how to install it."""
        if not self.packages:
            return None
        return missing_packages(self.manifest, {*SPELLINGS, *offered("logitcache.encodings")})

    @property
    def outputs(self) -> dict[str, dict[str, Any]]:
        """Shape of a sample, encoding, and bytes of all rows, of each output other than the logits."""
        identity = self.manifest.identity
        sizes = {} if self.contents is None else self.contents.output_bytes
        return {
            name: {"shape": identity.outputs.get(name), "encoding": _spelled(encoding), "bytes": sizes.get(name)}
            for name, encoding in sorted(identity.output_encodings.items())
        }


@dataclass(frozen=True)
class Unreadable:
    """A cache that was found and can't be read."""

    url: str
    kind: str
    """Name of the error class, such as "CorruptCache"."""
    error: str


def _spelled(encoding: Mapping[str, Any]) -> str:
    config = dict(encoding)
    name = str(config.pop("name", ""))
    spelled, order = SPELLINGS.get(name, (name, ()))
    keys = [*(key for key in order if key in config), *(key for key in config if key not in order)]
    return f"{spelled}({', '.join(f'{key}={config[key]!r}' for key in keys)})"


SPELLINGS = {
    "dense": ("Dense", ("dtype",)),
    "topk": ("TopK", ("k", "dtype")),
    "packedtopk": ("PackedTopK", ("k", "most", "prior", "step")),
    "lowrank": ("LowRank", ("rank", "k", "step", "bit_price", "search")),
    "toplowrank": ("TopLowRank", ("rank", "k", "bit_price", "soft_weight", "search")),
    "trellislowrank": ("TrellisLowRank", ("rank", "bit_price", "soft_weight")),
    "sampled": ("Sampled", ("draws", "seed", "packed")),
    "values": ("Values", ("dtype",)),
    "components": ("Components", ("error",)),
    "nologits": ("NoLogits", ()),
}
"""Class and parameter order of each encoding, to spell it without importing torch; a test compares with the classes."""


def summarise(location: str) -> Summary:
    """A summary of one cache: one small read if it is sealed, all receipts if it is open.

    Raises:
        NotACache, UnsupportedFormat, CorruptCache: as `manifest.read_manifest`.
        StorageError: the store refuses access or can't be reached.
    """
    storage = open_storage(location)
    manifest = _manifest(storage)
    if manifest.contents is not None:
        return Summary(storage.url, manifest, manifest.contents)
    from logitcache.cache.build_progress import build_progress
    from logitcache.cache.stored_records import read_records

    records = read_records(storage)
    progress = build_progress(storage, records) if records.manifest.state == "open" else None
    return Summary(storage.url, records.manifest, records.contents(), progress)


def missing_packages_of(location: str) -> str | None:
    """Which package a cache's encodings need that is not installed, and how to install it; reads the manifest only."""
    storage = open_storage(location)
    return Summary(storage.url, _manifest(storage), None).missing_packages


def find_caches(location: str) -> list[Summary | Unreadable]:
    """The caches at a location and in the folders below it, sorted by URL; one read for each folder.

    Raises:
        UsageError: there is no such local folder.
        StorageError: the location can't be listed, or there are more folders below it than `MAX_REMOTE_FOLDERS`.
    """
    storage = open_storage(location)
    if isinstance(storage, LocalStorage) and not storage.root.is_dir():
        raise UsageError(f"{location}: there is no such folder")
    found: list[Summary | Unreadable] = []
    until = time.monotonic() + MAX_REMOTE_SECONDS

    def look(folder: str) -> Manifest | CorruptCache | UnsupportedFormat | None:
        if storage.is_remote and time.monotonic() > until:
            raise _too_much(location, f"it has more folders than can be listed in {MAX_REMOTE_SECONDS:.0f} s")
        return _manifest_if_any(storage, folder)

    with ThreadPoolExecutor(storage.concurrency) as threads:
        level, looked = [""], 0
        for _ in range(MAX_DEPTH + 1):
            looked += len(level)
            if storage.is_remote and looked > MAX_REMOTE_FOLDERS:
                raise _too_much(location, f"it has more than {MAX_REMOTE_FOLDERS} folders")
            manifests = list(threads.map(look, level))
            for folder, manifest in zip(level, manifests, strict=True):
                url = f"{storage.url}/{folder}".rstrip("/")
                if isinstance(manifest, Manifest):
                    found.append(Summary(url, manifest, manifest.contents))
                elif manifest is not None:
                    found.append(Unreadable(url, type(manifest).__name__, str(manifest)))
            unknown = [folder for folder, manifest in zip(level, manifests, strict=True) if manifest is None]
            below = threads.map(lambda folder: list(_below(storage, folder)), unknown)
            level = [folder for folders in below for folder in folders]
            if not level:
                break
    return sorted(found, key=lambda each: each.url)


def _too_much(location: str, what: str) -> StorageError:
    return StorageError(f"can't list all of {location}: {what}; name a folder that is closer to the caches")


def _below(storage: Storage, folder: str) -> Iterator[str]:
    for name in storage.folders(folder):
        if not name.startswith(".") and not name.endswith(".zarr"):
            yield f"{folder}/{name}" if folder else name


def _manifest(storage: Storage) -> Manifest:
    return read_manifest(storage.get(MANIFEST, limit=MAX_MANIFEST_BYTES), url=storage.url)


def _manifest_if_any(storage: Storage, folder: str) -> Manifest | CorruptCache | UnsupportedFormat | None:
    """A folder's manifest, or the error if it can't be read; None if the folder is not a cache."""
    prefix = f"{folder}/" if folder else ""
    url = f"{storage.url}/{folder}".rstrip("/")
    data = storage.get(prefix + MANIFEST, limit=MAX_MANIFEST_BYTES)
    if data is None:
        return None
    try:
        return read_manifest(data, url=url)
    except (CorruptCache, UnsupportedFormat) as error:
        return error
    except NotACache:
        # Other programs have a manifest.json too; only a cache has receipts beside it.
        if storage.size(prefix + RECEIPTS) is None:
            return None
        return CorruptCache(f"{url}: {MANIFEST} is damaged: it can't be read as JSON of a cache")
