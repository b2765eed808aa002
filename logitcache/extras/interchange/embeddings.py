"""Embeddings of images and texts, as DataCompDR stores them. A cache holds them as outputs, without classes."""

from __future__ import annotations

import base64
import io
import json
import re
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np
import torch

from logitcache.cache.outputs import Output
from logitcache.encodings import Values
from logitcache.errors import InvalidSource, UsageError
from logitcache.extras.interchange.files import (
    ARRAYS,
    MAX_PICKLE_BYTES,
    inflate,
    load_torch,
    matching,
    read_bytes,
    reading,
    unpickle,
)
from logitcache.extras.interchange.hidden_states import GZIP
from logitcache.extras.interchange.protocol import NO_IDENTITY, DenseRows, Importer

# N samples, V views, D values of an embedding

PER_VIEW, PER_SAMPLE = "image_emb", ("text_emb", "syn_text_emb")
"""Embeddings of each augmentation of an image, and of its captions."""
CLASSES = 2
"""Of the constant logits, which a cache without classes has."""
SAMPLES_AT_ONCE = 256


class _Place(NamedTuple):
    """Where the embeddings of one sample are."""

    file: Path
    start: int
    size: int
    form: str
    """Extension of the member of a .tar file, or "jsonl"."""


class DataCompDR(Importer):
    """DataCompDR's shards: `{8 digits}.tar` or `.jsonl`, with embeddings of each image, its text and its captions.

    Each augmentation of an image is a view. The text's embeddings are stored with each of them. There are no logits:
    those of the cache are constant, for two classes.
    """

    name: ClassVar[str] = "data_comp_dr"
    tool: ClassVar[str] = "DataCompDR"

    def __init__(self, source: Path, *, num_classes: int | None = None) -> None:
        super().__init__(source, num_classes=num_classes)
        if num_classes not in (None, CLASSES):
            raise UsageError("DataCompDR stores embeddings, without classes; leave out --num-classes (num_classes=)")
        self.num_classes = CLASSES
        self.files = [path for _, path in matching(source, r"\d{8}\.(tar|jsonl)")]
        if not self.files:
            raise UsageError(f"{source} has no shards such as 00000000.tar or 00000000.jsonl")
        self._places: list[_Place] = []
        keys: list[str] = []
        without = 0
        for file in self.files:
            with reading(file):
                for key, place in _in_tar(file) if file.suffix == ".tar" else _in_lines(file):
                    if place is None:
                        without += 1
                        continue
                    keys.append(key)
                    self._places.append(place)
        if not self._places:
            raise InvalidSource(f"{source} has no sample with embeddings")
        self.keys = keys
        self.num_samples = len(keys)
        first = self._read(self._places[0])
        self._shapes = {name: values.shape for name, values in first.items()}
        self.num_views = len(first[PER_VIEW])
        rounded = all(place.form == "pth.gz" for place in self._places)
        encoding = Values(dtype="float16" if rounded else "float32")
        self.outputs = {
            name: Output(shape=shape[1:] if name == PER_VIEW or shape[0] == 1 else shape, encoding=encoding)
            for name, shape in self._shapes.items()
        }
        self.missing = {
            "logits": f"not stored; the cache has embeddings as outputs, and constant logits of {CLASSES} classes",
            "view": "the published generator stores no parameters of its augmentations; if there are any, `--details` "
            "writes them to a file",
            "identity": NO_IDENTITY,
            "scale": "the teachers' logit scales, which turn similarities into probabilities, are not stored",
        }
        self.notes = {"augmentations": self.num_views, "samples_without_embeddings": without}

    def select(self, order: np.ndarray) -> None:
        assert self.keys is not None
        self._places = [self._places[number] for number in order]
        self.keys = [self.keys[number] for number in order]
        self.num_samples = len(order)

    def batches(self) -> Iterator[DenseRows]:
        for start in range(0, self.num_samples, SAMPLES_AT_ONCE):
            places = self._places[start : start + SAMPLES_AT_ONCE]
            found = [self._read(place) for place in places]
            constant = np.zeros((len(places), CLASSES), dtype=np.float32)
            for view in range(self.num_views):
                outputs = {
                    name: np.stack([each[name][view] if name == PER_VIEW else each[name] for each in found])
                    for name in self.outputs
                }
                shaped = {
                    name: values.reshape(len(places), *self.outputs[name].shape) for name, values in outputs.items()
                }
                yield DenseRows(view, start, constant, places[0].file, outputs=shaped)

    def details(self) -> dict[str, np.ndarray]:
        """The parameters of the augmentations as JSON, one for each sample, where a shard has them."""
        stored: dict[str, str] = {}
        for file in self.files:
            if file.suffix == ".tar":
                with reading(file), tarfile.open(file, "r:") as shard:
                    for member in shard:
                        key, _, extension = member.name.partition(".")
                        if extension == "paug.json":
                            data = _part(file, member.offset_data, member.size)
                            stored[key] = json.dumps(json.loads(data)["param_aug"])
        if not stored:
            return {}
        return {"parameters": np.array([stored.get(key, "null") for key in self.keys or ()])}

    def _read(self, place: _Place) -> dict[str, np.ndarray]:
        """The embeddings of a sample by name, float32 (V, D), or (captions, D) of texts.

        Raises:
            InvalidSource: damaged, or of other shapes than those of the first sample.
        """
        with reading(place.file):
            found = _READERS[place.form](_part(place.file, place.start, place.size))
            named = {name: found[name] for name in (PER_VIEW, *PER_SAMPLE) if name in found}
            shapes = {name: values.shape for name, values in named.items()}
            expected = getattr(self, "_shapes", shapes)
            if PER_VIEW not in named or shapes != expected or any(len(shape) != 2 for shape in shapes.values()):
                raise InvalidSource(
                    f"{place.file} has a sample with embeddings {shapes}; expected {expected or PER_VIEW}, (rows, "
                    "values) each, as those of the first sample"
                )
            return {name: np.ascontiguousarray(values, dtype=np.float32) for name, values in named.items()}


def _in_tar(file: Path) -> Iterator[tuple[str, _Place | None]]:
    """Key of each sample of a shard, and where its embeddings are, or None."""
    places: dict[str, _Place | None] = {}
    with tarfile.open(file, "r:") as shard:
        for member in shard:
            if not member.isreg():
                raise ValueError(f"{member.name!r:.60} is not a regular file")
            key, _, extension = member.name.partition(".")
            place = _Place(file, member.offset_data, member.size, extension)
            if extension in _READERS and places.get(key) is not None:
                raise ValueError(f"sample {key!r:.60} has embeddings twice")
            places[key] = place if extension in _READERS else places.get(key)
    yield from places.items()


def _in_lines(file: Path) -> Iterator[tuple[str, _Place | None]]:
    start = 0
    for line in read_bytes(file).splitlines(keepends=True):
        stored = json.loads(line)
        place = _Place(file, start, len(line), "jsonl") if PER_VIEW in stored else None
        yield str(stored["uid"]), place
        start += len(line)


def _part(file: Path, start: int, size: int) -> bytes:
    if size > MAX_PICKLE_BYTES:
        raise ValueError(f"a sample of {size:,} bytes; at most {MAX_PICKLE_BYTES:,} are read")
    with file.open("rb") as opened:
        opened.seek(start)
        return opened.read(size)


def _of_torch(data: bytes) -> dict[str, np.ndarray]:
    stored = load_torch(inflate(data, MAX_PICKLE_BYTES, GZIP))
    return {name: values.float().numpy() for name, values in stored.items() if isinstance(values, torch.Tensor)}


def _of_npz(data: bytes) -> dict[str, np.ndarray]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        size = sum(member.file_size for member in archive.infolist())
    if size > MAX_PICKLE_BYTES:
        raise ValueError(f"arrays of {size:,} bytes; at most {MAX_PICKLE_BYTES:,} are read")
    with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
        return {name: arrays[name] for name in arrays.files if re.fullmatch(r"\w+_emb", name)}


def _of_line(data: bytes) -> dict[str, np.ndarray]:
    stored = json.loads(data)
    return {
        name: unpickle(inflate(base64.b64decode(stored[name]), MAX_PICKLE_BYTES, GZIP), ARRAYS).values
        for name in (PER_VIEW, *PER_SAMPLE)
        if name in stored
    }


_READERS = {"pth.gz": _of_torch, "npz": _of_npz, "jsonl": _of_line}
