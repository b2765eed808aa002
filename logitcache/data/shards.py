"""Samples in tar files of the WebDataset form, read in any order and without unpacking."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import tarfile
import tempfile
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from logitcache.errors import DatasetUnavailable, LogitCacheError, UsageError

# N samples

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "bmp", "ppm")
OPEN_SHARDS = 256
"""Shards that a process keeps open; with more shards, each read opens its own."""
MAX_LABEL_BYTES = 2**20
_KEY_AND_SUFFIX = re.compile(r"((?:.*/|)[^./]+)[.]([^/]*)", re.DOTALL)
"""As WebDataset divides names: the key ends at the first dot of the file's name."""


def decode_image(data: bytes) -> Any:
    """An image file as an RGB image of PIL, as torchvision's `ImageFolder` loads it."""
    from PIL import Image

    with Image.open(io.BytesIO(data)) as image:
        return image.convert("RGB")


@dataclass(frozen=True)
class ShardIndex:
    """Where the samples of one tar file are."""

    path: Path
    num_bytes: int
    changed: int
    """Time of the last change, in nanoseconds."""
    keys: list[str]
    places: np.ndarray
    """Offset and size of each sample's image in the file, and its target, int64 (N, 3)."""


class TarShards:
    """A map-style dataset over the tar files of a WebDataset: items are (image, class number).

    Files with the same name up to the first dot are one sample, and this name is its key. Only headers and labels are
    read in advance. A sample is then one read at its offset, in any order and from any process.

    Args:
        paths: the tar files, uncompressed.
        image: suffix of a sample's image, or several of which each sample has one.
        label: suffix of the file that has the class number, such as "cls"; "json:label" takes an entry of a JSON file.
        index: folder for an index of each tar file, so that headers are read once; None keeps the index in memory.
        decode: makes an input of an image's bytes.
        class_names: one for each class.
        num_classes: by default the number of `class_names`, or the largest target and 1.

    Raises:
        DatasetUnavailable: no files, or one that is no complete tar file.
        UsageError: a sample without image or label, or keys that repeat; names the sample.
    """

    def __init__(
        self,
        paths: Sequence[str | os.PathLike[str]],
        *,
        image: str | Sequence[str] = IMAGE_SUFFIXES,
        label: str = "cls",
        index: str | os.PathLike[str] | None = None,
        decode: Callable[[bytes], Any] = decode_image,
        class_names: Sequence[str] | None = None,
        num_classes: int | None = None,
    ) -> None:
        if not paths:
            raise DatasetUnavailable("no tar files; expected at least one")
        images = [image] if isinstance(image, str) else list(image)
        self.shards = [read_index(Path(path), images, label, folder=index) for path in paths]
        self.keys = [key for shard in self.shards for key in shard.keys]
        self._shard_of = np.repeat(np.arange(len(self.shards)), [len(shard.keys) for shard in self.shards])
        self._offsets, self._sizes, targets = np.concatenate([shard.places for shard in self.shards]).T
        self.targets = np.ascontiguousarray(targets)
        if class_names is not None:
            self.class_names = list(class_names)
        if num_classes is not None:
            self.num_classes = num_classes
        self._decode = decode
        self._open: dict[int, int] = {}
        self._check_keys()

    def _check_keys(self) -> None:
        if len(set(self.keys)) == len(self.keys):
            return
        first: dict[str, int] = {}
        for number, key in enumerate(self.keys):
            other = first.setdefault(key, number)
            if other != number:
                here, there = (self.shards[self._shard_of[place]].path for place in (other, number))
                raise UsageError(
                    f"the key {key!r} is in {here} and in {there}; expected one sample for each key. Remove the copy, "
                    "or give the samples unique names"
                )

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self._decode(self.content(index)), int(self.targets[index])

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_open": {}}

    def content(self, index: int) -> bytes:
        """The bytes of the sample's image file."""
        number = int(self._shard_of[index])
        offset, size = int(self._offsets[index]), int(self._sizes[index])
        if len(self.shards) > OPEN_SHARDS:
            file = self._opened(number)
            try:
                data = _read_at(file, offset, size)
            finally:
                os.close(file)
        else:
            if number not in self._open:
                file = self._opened(number)
                if self._open.setdefault(number, file) == file:
                    weakref.finalize(self, os.close, file)
                else:  # another thread was faster
                    os.close(file)
            data = _read_at(self._open[number], offset, size)
        if len(data) != size:
            raise OSError(f"{self.shards[number].path} ends within the sample; it has changed since it was indexed")
        return data

    def _opened(self, number: int) -> int:
        shard = self.shards[number]
        file = os.open(shard.path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        found = os.fstat(file)
        if (found.st_size, found.st_mtime_ns) != (shard.num_bytes, shard.changed):
            os.close(file)
            raise OSError(f"{shard.path} has changed since it was indexed; start again")
        return file


def _read_at(file: int, offset: int, size: int) -> bytes:
    """Bytes of a file, by `pread`, which has no position that processes would share."""
    parts = []
    while size and (part := os.pread(file, size, offset)):
        parts.append(part)
        offset, size = offset + len(part), size - len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def read_index(
    path: Path, images: Sequence[str], label: str, *, folder: str | os.PathLike[str] | None = None
) -> ShardIndex:
    """The index of a tar file: from a folder of indexes if it is there and up to date, else from the headers.

    Raises:
        DatasetUnavailable: no complete tar file.
        UsageError: a sample without image or label.
    """
    try:
        state = path.stat()
    except OSError as error:
        raise DatasetUnavailable(f"{path} can't be read: {error.strerror}") from error
    header = json.dumps([1, state.st_size, state.st_mtime_ns, list(images), label])
    stored = None
    if folder is not None:
        stored = Path(folder) / f"{path.name}-{hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:16]}.npz"
        with suppress(Exception):  # missing, of another state of the file, or damaged: NumPy raises many types
            with stored.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
                is_current = arrays["header"].tobytes().decode() == header
                keys, places = arrays["keys"].tobytes().decode().split("\n"), arrays["places"]
            if is_current and places.dtype == np.int64 and places.shape == (len(keys), 3):
                return ShardIndex(path, state.st_size, state.st_mtime_ns, keys, places)
    found = list(_samples(path, state.st_size, images, label))
    if not found:
        raise UsageError(f"{path} has no samples; expected files such as KEY.{images[0]} and KEY.{label}")
    keys = [key for key, *_ in found]
    places = np.array([place for _, *place in found], dtype=np.int64)
    if stored is not None:
        _store_index(stored, header, keys, places)
    return ShardIndex(path, state.st_size, state.st_mtime_ns, keys, places)


def _store_index(path: Path, header: str, keys: list[str], places: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = {"header": header, "keys": "\n".join(keys)}
    arrays: dict[str, Any] = {name: np.frombuffer(value.encode(), dtype=np.uint8) for name, value in text.items()}
    # Several processes may index the same shard: each writes a file of its own, and the last one stays.
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.name, delete=False) as file:
        np.savez(file, **arrays, places=places)
    Path(file.name).replace(path)


def _samples(path: Path, num_bytes: int, images: Sequence[str], label: str) -> Iterator[tuple[str, int, int, int]]:
    """(key, offset, size, target) of each sample of a tar file, in order."""
    suffix, _, entry = label.partition(":")
    current: str | None = None
    image: tuple[int, int] | None = None
    target: int | None = None
    seen: set[str] = set()

    def complete() -> tuple[str, int, int, int]:
        assert current is not None
        if image is None:
            raise UsageError(f"sample {current!r} of {path} has no image; expected {current}.{' or .'.join(images)}")
        if target is None:
            raise UsageError(f"sample {current!r} of {path} has no label; expected {current}.{suffix}")
        return current, *image, target

    for member, data in _members(path, num_bytes, suffix):
        named = _KEY_AND_SUFFIX.fullmatch(member.name)
        if named is None or (member.name.startswith("__") and member.name.endswith("__")):
            continue
        key, kind = named[1], named[2].lower()
        if "\n" in key:
            raise UsageError(f"the key {key!r} of {path} contains a line break; rename the file")
        if key != current:
            if current is not None:
                yield complete()
            if key in seen:
                raise UsageError(f"the key {key!r} comes twice in {path}; expected the files of a sample one by one")
            seen.add(key)
            current, image, target = key, None, None
        if kind in images:
            if image is not None:
                raise UsageError(f"sample {key!r} of {path} has two images; name the suffix of one with `image`")
            image = member.offset_data, member.size
        elif kind == suffix:
            target = _target(data, entry, f"{member.name} of {path}")
    if current is not None:
        yield complete()


def _members(path: Path, num_bytes: int, label: str) -> Iterator[tuple[tarfile.TarInfo, bytes]]:
    """The regular files of a tar file, with the data of those that are labels."""
    end = 0
    try:
        with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as archive:
            while (member := archive.next()) is not None:
                archive.members = []  # type: ignore[attr-defined]  # tarfile would keep them all
                end = member.offset_data + member.size
                if member.size < 0 or member.sparse is not None or (member.isreg() and end > num_bytes):
                    raise DatasetUnavailable(
                        f"{path} is damaged: its file {member.name!r} has {member.size} bytes from "
                        f"{member.offset_data}, and the tar file has {num_bytes}. Copy it again"
                    )
                if not member.isreg():
                    continue
                data = b""
                if member.name.lower().endswith(f".{label}"):
                    if member.size > MAX_LABEL_BYTES:
                        raise UsageError(f"the label {member.name!r} of {path} has {member.size} bytes")
                    file.seek(member.offset_data)
                    data = file.read(member.size)
                yield member, data
            file.seek(archive.offset)
            rest = file.read(tarfile.BLOCKSIZE)
    except LogitCacheError:
        raise
    except Exception as error:  # tarfile raises many types for damaged headers
        with path.open("rb") as file:
            compressed = file.read(2) in (b"\x1f\x8b", b"BZ", b"\xfd7", b"\x28\xb5")
        hint = "it is compressed, and random access needs it uncompressed" if compressed else f"{error}. Copy it again"
        raise DatasetUnavailable(f"{path} is no complete tar file: {hint}") from error
    # tarfile also ends quietly at the end of the file, or at the first header that it can't read.
    if rest.strip(b"\0") or not rest:
        raise DatasetUnavailable(
            f"{path} is no complete tar file: expected its end at byte {archive.offset}, after {end} bytes of files; "
            "it is truncated or damaged. Copy it again"
        )


def _target(data: bytes, entry: str, place: str) -> int:
    try:
        value = json.loads(data)[entry] if entry else data.decode()
        if isinstance(value, bool):
            raise ValueError("a boolean")
        return int(value)
    except (ValueError, TypeError, KeyError, OverflowError) as error:
        wanted = f"a JSON object with a class number {entry!r}" if entry else "a class number"
        raise UsageError(f"the label {place} is {data[:40]!r}; expected {wanted}") from error
