"""Identity of the samples of a dataset: keys, targets and content digests.

A dataset is map-style: `dataset[i]` returns (input, target). Optional attributes are `keys` (one string per sample;
default: the position), `targets` (default: read sample by sample; for samples with several rows, no class) and
`content(i) -> bytes` (the bytes that a sample's digest is computed from; default: the loaded input).
"""

from __future__ import annotations

import functools
import hashlib
import mmap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader

from logitcache.data.packing import is_packed, packed_sequence
from logitcache.data.streamed import StreamDataset
from logitcache.data.tokens import NO_CLASS
from logitcache.data.workers import end_with_parent
from logitcache.digest import PENDING, array_digest, json_digest
from logitcache.errors import IdentityMismatch, LogitCacheError, SampleMismatch, UnreadableSample, UsageError

# N samples

DIGEST_BYTES = 16
"""Bytes of SHA-256 stored per sample: enough to detect accidental changes; 20 MB for ImageNet."""


class Dataset(Protocol):
    """A map-style dataset, as `torch.utils.data.Dataset` has it."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> tuple[Any, Any]: ...


_TARGET_DTYPES = ("int64", "int8", "uint8", "uint16", "uint32")
"""Hand-made tables may have the narrower ones."""


@dataclass(frozen=True)
class SampleTable:
    """The samples of a dataset, in order.

    Raises:
        UsageError: keys that repeat, are not one string per sample, or contain a line break; arrays of another shape
            or dtype.
    """

    num_samples: int
    keys: Sequence[str] | None
    """One unique key per sample; None if the key is the position."""
    targets: np.ndarray
    """int64 (N,)."""
    contents: np.ndarray | None
    """Digest of each sample's content, uint8 (N, 16); None if not computed yet."""

    def __post_init__(self) -> None:
        _check_array("targets", self.targets, (self.num_samples,), _TARGET_DTYPES)
        if self.contents is not None:
            _check_array("contents", self.contents, (self.num_samples, DIGEST_BYTES), ("uint8",))
        if self.keys is not None:
            _check_keys(self.keys, self.num_samples)

    def pending_fingerprint(self) -> str:
        """The identity of the dataset while its contents are still being read: the SHA-256 of keys and targets."""
        return f"{PENDING}{json_digest([self.num_samples, self._keys_hash(), array_digest(self.targets)])}"

    def _keys_hash(self) -> str | None:
        return None if self.keys is None else hashlib.sha256("\n".join(self.keys).encode()).hexdigest()

    def fingerprint(self) -> str:
        """SHA-256 of keys, targets and contents in order: the identity of the dataset.

        Raises:
            UsageError: the content digests are not computed.
        """
        if self.contents is None:
            raise UsageError(
                "the sample table has no content digests, which the identity of the dataset needs; set "
                "contents=content_table(dataset) of logitcache.data.samples"
            )
        return json_digest(
            [self.num_samples, self._keys_hash(), array_digest(self.targets), array_digest(self.contents)]
        )

    @functools.cached_property
    def _row_of_key(self) -> dict[str, int]:
        """Made at the first use, because it takes about 70 bytes per sample."""
        return {} if self.keys is None else {key: row for row, key in enumerate(self.keys)}

    def key(self, row: int) -> str:
        """The key of a row."""
        return str(row) if self.keys is None else self.keys[row]

    def rows(self, keys: Sequence[str]) -> np.ndarray:
        """Row numbers of the given keys, int64 (len(keys),).

        Raises:
            SampleMismatch: a key that is not in the table.
        """
        if self.keys is None:
            rows = np.array([int(key) if key.isdecimal() else -1 for key in keys], dtype=np.int64)
            known = (rows >= 0) & (rows < self.num_samples)
        else:
            rows = np.array([self._row_of_key.get(key, -1) for key in keys], dtype=np.int64)
            known = rows >= 0
        if not known.all():
            unknown = np.flatnonzero(~known)
            raise SampleMismatch(
                f"sample {keys[unknown[0]]!r} is not in the cache, which has {self.num_samples} samples "
                f"({len(unknown)} of {len(keys)} samples here are missing in it).\n"
                "Select the samples that are in the cache (`cache.samples.keys`), or build a cache of this dataset."
            )
        return rows


def sample_table(dataset: Dataset, *, contents: bool = False, num_workers: int = 0) -> SampleTable:
    """Keys and targets of a dataset; reads samples only if the dataset has no `targets`.

    Args:
        dataset: map-style.
        contents: also take the digest of each sample's content, in one pass over the data; `create(samples=)` needs it.
        num_workers: DataLoader workers of that pass.

    Raises:
        UsageError: invalid keys, or targets that are not class numbers.
    """
    num_samples = len(dataset)
    if num_samples == 0:
        raise UsageError("the dataset is empty; expected at least one sample")
    keys = getattr(dataset, "keys", None)
    keys = None if keys is None or callable(keys) else list(keys)
    targets = getattr(dataset, "targets", None)
    if targets is None and getattr(dataset, "rows_per_sample", None) is not None:
        targets = np.full(num_samples, NO_CLASS)
    if targets is None:
        targets = [load_sample(dataset, index)[1] for index in range(num_samples)]
    try:
        targets = np.asarray(targets).astype(np.int64, casting="same_kind", copy=False).reshape(num_samples)
    except (TypeError, ValueError) as error:
        _refuse_names(targets)
        raise UsageError(f"targets must be {num_samples} integer class numbers: {error}") from error
    digests = content_table(dataset, num_workers=num_workers) if contents else None
    return SampleTable(num_samples=num_samples, keys=keys, targets=targets, contents=digests)


def _refuse_names(targets: Any) -> None:
    """Raise a helpful error if targets are class names instead of class numbers."""
    try:
        first = targets[0]
    except (TypeError, LookupError):
        return
    if isinstance(first, str | bytes):
        raise UsageError(
            f"the targets are names, the first one {first!r}; expected class numbers from 0. Number them in one order "
            "for all splits: `class_names = sorted(set(targets))`, `targets = [class_names.index(name) for name in "
            "targets]`, and give the dataset `class_names` too"
        )


def _check_array(name: str, values: Any, shape: tuple[int, ...], dtypes: Sequence[str]) -> None:
    if not isinstance(values, np.ndarray) or values.shape != shape or values.dtype.name not in dtypes:
        found = (
            f"{values.dtype.name} {values.shape}" if isinstance(values, np.ndarray) else f"a {type(values).__name__}"
        )
        raise UsageError(f"the {name} of a sample table are an array {dtypes[0]} {shape}; found {found}")


def _check_keys(keys: Sequence[str], num_samples: int) -> None:
    if isinstance(keys, str) or len(keys) != num_samples:
        found = "one string" if isinstance(keys, str) else len(keys)
        raise UsageError(f"a sample table of {num_samples} samples has as many keys; found {found}")
    try:
        text = "\n".join(keys)
    except TypeError:
        invalid = next(key for key in keys if not isinstance(key, str))
        raise UsageError(f"a sample key is a string, not {invalid!r}") from None
    if text.count("\n") != num_samples - 1:
        invalid = next(key for key in keys if "\n" in key)
        raise UsageError(f"the sample key {invalid!r} contains a line break; keys are single lines")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        invalid = keys[text.count("\n", 0, error.start)]
        raise UsageError(
            f"the sample key {invalid!r} can't be written as UTF-8; rename the file, or give the dataset other `keys`"
        ) from None
    if len(set(keys)) != num_samples:
        seen: set[str] = set()
        invalid = next(key for key in keys if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise UsageError(
            f"{num_samples - len(set(keys))} sample keys repeat, the first being {invalid!r}; each key must name one "
            "sample"
        )


def sample_key(dataset: Dataset, index: int) -> str:
    """The key of one sample of a dataset."""
    keys = getattr(dataset, "keys", None)
    return str(index) if keys is None or callable(keys) else str(keys[index])


def load_sample(dataset: Dataset, index: int) -> tuple[Any, Any]:
    """(input, target) of one sample.

    Raises:
        UnreadableSample: the dataset could not load the sample; names its key.
    """
    try:
        sample = dataset[index]
    except LogitCacheError:
        raise
    except Exception as error:
        if isinstance(error, IndexError):
            raise UnreadableSample(
                f"dataset[{index}] raises IndexError ({error}), but the dataset's length is {len(dataset)}: expected a "
                f"sample for each of 0 to {len(dataset) - 1}. Make `__len__` the number of samples that `__getitem__` "
                "has"
            ) from error
        raise UnreadableSample(
            f"sample {sample_key(dataset, index)!r} (number {index}) can't be read: {type(error).__name__}: {error}\n"
            "Repair or remove it; nothing was changed."
        ) from error
    if not isinstance(sample, tuple | list) or len(sample) < 2:
        found = f"a mapping of {', '.join(map(repr, sample))}" if isinstance(sample, Mapping) else type(sample).__name__
        raise UsageError(
            f"dataset[{index}] must give (input, target), not {found}; wrap the dataset in one whose `__getitem__` "
            "returns the model's input and the class number. An input may be a mapping"
        )
    return sample[0], sample[1]


def content_digest(dataset: Dataset, index: int, loaded: Any = None) -> bytes:
    """The first 16 bytes of SHA-256 of a sample's content.

    The content is `dataset.content(index)` (such as the bytes of a file) if the dataset has this method, else the
    loaded input.
    """
    content = getattr(dataset, "content", None)
    if content is not None:
        try:
            return bytes_digest(content(index))
        except OSError as error:
            raise UnreadableSample(
                f"sample {sample_key(dataset, index)!r} (number {index}) can't be read: {error}"
            ) from error
    if loaded is None:
        loaded = load_sample(dataset, index)[0]
    return input_digest(loaded)


def bytes_digest(content: bytes) -> bytes:
    """The first 16 bytes of SHA-256."""
    return hashlib.sha256(content).digest()[:DIGEST_BYTES]


def input_digest(value: Any) -> bytes:
    """The first 16 bytes of SHA-256 of an input's type, dtype, shape and values.

    Inputs are tensors, arrays, PIL images, strings, bytes, numbers, and mappings and sequences of these.
    """
    digest = hashlib.sha256()
    _feed(digest.update, value)
    return digest.digest()[:DIGEST_BYTES]


def _feed(update: Callable[[bytes], object], value: Any) -> None:
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu().numpy()
    if isinstance(value, np.ndarray):
        update(f"array {value.dtype.str} {value.shape}".encode())
        update(np.ascontiguousarray(value).tobytes())
    elif isinstance(value, str | bytes | int | float | bool) or value is None:
        update(f"{type(value).__name__} {value!r}".encode())
    elif hasattr(value, "tobytes") and hasattr(value, "mode"):
        update(f"image {value.mode} {value.size}".encode())
        update(value.tobytes())
    elif isinstance(value, Mapping):
        for name in sorted(value):
            update(f"key {name!r}".encode())
            _feed(update, value[name])
    elif isinstance(value, list | tuple):
        update(f"sequence {len(value)}".encode())
        for item in value:
            _feed(update, item)
    else:
        raise UsageError(
            f"an input of type {type(value).__name__} has no digest; expected tensors, arrays, PIL images or text, "
            "or give the dataset a method `content(i) -> bytes`"
        )


def batch_item(batch: Any, index: int) -> Any:
    """One sample of a batch of tensors, of nested mappings and sequences of tensors, or of a packed batch."""
    if is_packed(batch):
        return packed_sequence(batch, index)
    if isinstance(batch, Mapping):
        return {name: batch_item(part, index) for name, part in batch.items()}
    if isinstance(batch, tuple | list) and batch and not isinstance(batch[0], str | bytes):
        return [batch_item(part, index) for part in batch]  # default_collate makes lists of tuples
    return batch[index]


def differing_contents(recorded: np.ndarray, found: np.ndarray) -> np.ndarray:
    """Which content digests, uint8 (N, 16), are of different contents, bool (N,).

    A pipeline that selects a part of a dataset without `content` (as `data.validation` does) records the digest of each
    sample's digest. The recorded identity can't change, so both forms of a digest are equal here.
    """
    differing = (recorded != found).any(axis=1)
    for number in np.flatnonzero(differing):
        differing[number] = not same_content(recorded[number].tobytes(), found[number].tobytes())
    return np.asarray(differing)


def same_content(recorded: bytes, found: bytes) -> bool:
    """Whether two content digests are of the same content; see `differing_contents`."""
    return recorded == found or bytes_digest(found) == recorded or bytes_digest(recorded) == found


def content_table(
    dataset: Dataset, *, num_workers: int = 0, advance: Callable[[int], object] = lambda count: None
) -> np.ndarray:
    """The content digest of every sample, uint8 (N, 16), in one pass over the data by DataLoader workers."""
    contents = np.empty((len(dataset), DIGEST_BYTES), dtype=np.uint8)
    start = 0
    in_order = isinstance(dataset, StreamDataset)
    workers = 0 if in_order or getattr(dataset, "in_memory", False) else num_workers
    batches = DataLoader(
        _ContentDigests(dataset),
        batch_size=256,
        num_workers=workers,
        worker_init_fn=end_with_parent,
        collate_fn=_as_is,
    )
    for batch in batches:
        if isinstance(batch, LogitCacheError):
            raise batch
        stop = start + len(batch) // DIGEST_BYTES
        contents[start:stop] = np.frombuffer(batch, dtype=np.uint8).reshape(-1, DIGEST_BYTES)
        start = stop
        advance(len(batch) // DIGEST_BYTES)
    return contents


class _ContentDigests(torch.utils.data.Dataset[bytes]):
    """Content digests by batch. Errors are returned as values, because DataLoader would rewrite their messages."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, indices: list[int]) -> bytes | LogitCacheError:
        try:
            return b"".join(content_digest(self.dataset, index) for index in indices)
        except LogitCacheError as error:
            return error


def _as_is(batch: Any) -> Any:
    return batch


class SeenContents:
    """Content digests that `ViewDataset` takes when it first loads a sample, in memory that workers share.

    Later loads, also by other workers, are compared with them. Pass it as `ViewPlan(contents=...)`, to create a cache
    without a pass over the data in advance.
    """

    def __init__(self, num_samples: int) -> None:
        self._shared: torch.Tensor | None = None
        # Workers that are forked inherit it. It is limited neither by the size of /dev/shm nor by that of files.
        self._use(np.frombuffer(mmap.mmap(-1, max(1, num_samples) * (DIGEST_BYTES + 1)), dtype=np.uint8))

    def _use(self, memory: np.ndarray) -> None:
        """Keep digests, uint8 (N, 16), and whether they are taken, bool (N,), in memory of N * 17 bytes."""
        rows = memory.reshape(-1, DIGEST_BYTES + 1)
        self._digests, self._taken = rows[:, :DIGEST_BYTES], rows[:, DIGEST_BYTES]

    def __getstate__(self) -> torch.Tensor:
        """For a worker that is not forked: the memory moves once to where all processes find it."""
        if self._shared is None:
            shared = torch.zeros((len(self._taken), DIGEST_BYTES + 1), dtype=torch.uint8).share_memory_()  # type: ignore[no-untyped-call]
            shared[:, :DIGEST_BYTES] = torch.from_numpy(self._digests)
            shared[:, DIGEST_BYTES] = torch.from_numpy(self._taken)
            self.__setstate__(shared)
        assert self._shared is not None
        return self._shared

    def __setstate__(self, shared: torch.Tensor) -> None:
        self._shared = shared
        self._use(shared.numpy())

    def take(self, number: int, digest: bytes) -> bytes:
        """Record the digest of a sample if it has none, and return the recorded one."""
        if self._taken[number]:
            return bytes(self._digests[number])
        self._digests[number] = np.frombuffer(digest, dtype=np.uint8)
        self._taken[number] = 1
        return digest

    def add(self, samples: range, digests: np.ndarray) -> None:
        """Record the digests of consecutive samples, uint8 (M, 16)."""
        self._digests[samples.start : samples.stop] = digests
        self._taken[samples.start : samples.stop] = 1

    def of(self, samples: range) -> np.ndarray | None:
        """The digests of consecutive samples, uint8 (M, 16); None if some are not taken yet."""
        if not self._taken[samples.start : samples.stop].all():
            return None
        return self._digests[samples.start : samples.stop].copy()


def compare_samples(cached: SampleTable, here: SampleTable) -> list[str]:
    """All differences between two sample tables, one line each; contents only if both tables have them."""
    differences = []
    if (cached.keys is None) != (here.keys is None):
        differences.append(f"the cache's samples are identified by {_naming(cached)}, these by {_naming(here)}")
    if cached.keys is not None and here.keys is not None and cached.keys != here.keys:
        place = {key: row for row, key in enumerate(cached.keys)}
        ours = set(here.keys)
        differences += [f"sample {row} ({key}) is missing here" for key, row in place.items() if key not in ours]
        differences += [f"sample {key} is not in the cache" for key in here.keys if key not in place]
        pairs = [(place[key], index) for index, key in enumerate(here.keys) if key in place]
        rows, indices = np.array(pairs, dtype=np.int64).reshape(-1, 2).T
    else:
        if cached.num_samples != here.num_samples:
            differences.append(f"the cache has {cached.num_samples} samples, this dataset {here.num_samples}")
        rows = indices = np.arange(min(cached.num_samples, here.num_samples))
    for number in np.flatnonzero(cached.targets[rows] != here.targets[indices]):
        row, index = int(rows[number]), indices[number]
        found, expected = here.targets[index], cached.targets[row]
        differences.append(f"sample {row} ({cached.key(row)}) has the target {found} here, {expected} in the cache")
    if cached.contents is not None and here.contents is not None:
        for number in np.flatnonzero(differing_contents(cached.contents[rows], here.contents[indices])):
            row = int(rows[number])
            differences.append(f"sample {row} ({cached.key(row)}) differs in content from the cache")
    return differences


def match_rows(cached: SampleTable, here: SampleTable, *, cache_id: str, subset: bool = False) -> np.ndarray:
    """The row in the cache of each sample of a dataset, int64 (len(dataset),), matched by key.

    The order may differ. With `subset`, samples may be missing from the dataset.

    Raises:
        IdentityMismatch: a sample is missing, unknown or relabelled; names the first one.
    """
    if cached.keys is None and here.num_samples != cached.num_samples:
        raise IdentityMismatch(
            f"cache {cache_id[:12]}… was built from {cached.num_samples} samples; this dataset has "
            f"{here.num_samples}.\nWithout keys they can't be matched: use the same dataset, or give it `keys`."
        )
    rows = cached.rows([here.key(index) for index in range(here.num_samples)])
    if not subset and here.num_samples < cached.num_samples:
        missing = np.setdiff1d(np.arange(cached.num_samples), rows)
        raise SampleMismatch(
            f"cache {cache_id[:12]}… was built from {cached.num_samples} samples; this dataset has "
            f"{here.num_samples}.\nFirst difference: sample {missing[0]} ({cached.key(int(missing[0]))}) is missing "
            "here.\nRestore it; or set data.subset=true to train on a part of the samples."
        )
    check_targets(cached, here, rows, cache_id=cache_id)
    return rows


def check_targets(cached: SampleTable, here: SampleTable, rows: np.ndarray, *, cache_id: str) -> None:
    """Compare the targets of a dataset with those of the cache's rows, int64 (M,).

    Raises:
        SampleMismatch: a sample is relabelled; names the first one.
        UsageError: not one row of the cache for each sample.
    """
    if rows.shape != (here.num_samples,) or (len(rows) and not 0 <= rows.min() <= rows.max() < cached.num_samples):
        raise UsageError(
            f"the rows are {rows.shape}, for a dataset of {here.num_samples} samples and a cache of "
            f"{cached.num_samples}; expected one row of the cache for each sample"
        )
    relabelled = np.flatnonzero(cached.targets[rows] != here.targets)
    if len(relabelled):
        first = relabelled[0]
        raise SampleMismatch(
            f"sample {rows[first]} ({here.key(first)}) has the target {here.targets[first]} here, but "
            f"{cached.targets[rows[first]]} in cache {cache_id[:12]}… "
            f"({len(relabelled)} of {here.num_samples} samples are relabelled).\n"
            "Run `logitcache verify CACHE --data PIPELINE` for the whole list."
        )


def _naming(table: SampleTable) -> str:
    return "their position" if table.keys is None else f"keys such as {table.keys[0]!r}"
