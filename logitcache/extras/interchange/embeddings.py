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
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch

from logitcache.cache.outputs import Output
from logitcache.data.recorded import CropAndOperations
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
from logitcache.extras.interchange.image_labels import (
    enabled_transforms,
    recorded_views,
    unsupported,
    view_parameters,
)
from logitcache.extras.interchange.protocol import NO_IDENTITY, DenseRows, Importer, ViewParameters

# N samples, V views, D values of an embedding

PER_VIEW, PER_SAMPLE = "image_emb", ("text_emb", "syn_text_emb")
"""Embeddings of each augmentation of an image, and of its captions."""
SAMPLES_AT_ONCE = 256


class _Place(NamedTuple):
    """Where the embeddings of one sample are, or the parameters of its augmentations."""

    file: Path
    start: int
    size: int
    form: str
    """Extension of the member of a .tar file, or "jsonl"."""


class _Sample(NamedTuple):
    """What a shard has of one sample."""

    key: str
    embeddings: _Place | None
    parameters: _Place | None
    """Of its augmentations."""


class DataCompDR(Importer):
    """DataCompDR's shards: `{8 digits}.tar` or `.jsonl`, with embeddings of each image, its text and its captions.

    Each augmentation of an image is a view. The text's embeddings are stored with each of them. There are no logits.
    """

    name: ClassVar[str] = "data_comp_dr"
    tool: ClassVar[str] = "DataCompDR"

    def __init__(self, source: Path, *, num_classes: int | None = None) -> None:
        super().__init__(source, num_classes=num_classes)
        if num_classes not in (None, 0):
            raise UsageError("DataCompDR stores embeddings, without classes; leave out --num-classes (num_classes=)")
        self.num_classes = 0
        self.files = [path for _, path in matching(source, r"\d{8}\.(tar|jsonl)")]
        if not self.files:
            raise UsageError(f"{source} has no shards such as 00000000.tar or 00000000.jsonl")
        samples: list[_Sample] = []
        for file in self.files:
            with reading(file):
                samples += _in_tar(file) if file.suffix == ".tar" else _in_lines(file)
        found = [(each.key, each.embeddings, each.parameters) for each in samples if each.embeddings is not None]
        if not found:
            raise InvalidSource(f"{source} has no sample with embeddings")
        self.keys, self._places = [key for key, _, _ in found], [place for _, place, _ in found]
        self._augmented = [place for _, _, place in found if place is not None]
        self.num_samples = len(found)
        first = self._read(self._places[0])
        self._shapes = {name: values.shape for name, values in first.items()}
        self.num_views = len(first[PER_VIEW])
        rounded = all(place.form == "pth.gz" for place in self._places)
        encoding = Values(dtype="float16" if rounded else "float32")
        self.outputs = {
            name: Output(shape=shape[1:] if name == PER_VIEW or shape[0] == 1 else shape, encoding=encoding)
            for name, shape in self._shapes.items()
        }
        self._transforms = self._read_transforms(source / "config.json")
        reason = self._no_views()
        if reason is None:
            self.recorded = recorded_views(self._transforms, CropAndOperations)
        self.missing = {
            "logits": "not stored; the cache has embeddings as outputs, and no logits",
            "view": "images must have the sizes that they had in the tool, because crop boxes are in pixels"
            if reason is None
            else f"{reason}; the cache has no view plan",
            "identity": NO_IDENTITY,
            "scale": "the teachers' logit scales, which turn similarities into probabilities, are not stored",
        }
        self.notes = {"augmentations": self.num_views, "samples_without_embeddings": len(samples) - len(found)}

    def _read_transforms(self, config: Path) -> dict[str, dict[str, Any]]:
        if not config.is_file():
            return {}
        self.files = [*self.files, config]
        with reading(config):
            return enabled_transforms(json.loads(read_bytes(config, MAX_PICKLE_BYTES)))

    def _no_views(self) -> str | None:
        """Why the views can't be rendered; None if they can."""
        if len(self._augmented) < self.num_samples:
            return "the parameters of the augmentations are not stored, as the published generator leaves them out"
        if not self._transforms:
            return "config.json is missing, which names the transforms"
        return unsupported(self._transforms)

    def select(self, order: np.ndarray) -> None:
        assert self.keys is not None
        self._places = [self._places[number] for number in order]
        self.keys = [self.keys[number] for number in order]
        if self.recorded is not None:
            self._augmented = [self._augmented[number] for number in order]
        self.num_samples = len(order)

    def batches(self) -> Iterator[DenseRows]:
        for start in range(0, self.num_samples, SAMPLES_AT_ONCE):
            places = self._places[start : start + SAMPLES_AT_ONCE]
            found = [self._read(place) for place in places]
            no_logits = np.zeros((len(places), 0), dtype=np.float32)
            files = [place.file for place in places]
            stored = None if self.recorded is None else self._parameters(start, start + len(places))
            for view in range(self.num_views):
                outputs = {
                    name: np.stack([each[name][view] if name == PER_VIEW else each[name] for each in found])
                    for name in self.outputs
                }
                shaped = {
                    name: values.reshape(len(places), *self.outputs[name].shape) for name, values in outputs.items()
                }
                parameters = None if stored is None else stored[:, view]
                yield DenseRows(view, start, no_logits, files, parameters, shaped)

    def parameters(self) -> Iterator[ViewParameters]:
        for start in range(0, self.num_samples, SAMPLES_AT_ONCE):
            values_NVD = self._parameters(start, min(start + SAMPLES_AT_ONCE, self.num_samples))
            files = [place.file for place in self._augmented[start : start + SAMPLES_AT_ONCE]]
            for view in range(self.num_views):
                yield ViewParameters(view, start, values_NVD[:, view], files)

    def _parameters(self, start: int, stop: int) -> np.ndarray:
        """The columns of `CropAndOperations` of some samples and all views, float32 (N, V, D)."""
        return np.stack([self._parameters_of(place) for place in self._augmented[start:stop]])

    def _parameters_of(self, place: _Place) -> np.ndarray:
        with reading(place.file):
            stored = json.loads(_part(place.file, place.start, place.size))["param_aug"]
            if len(stored) != self.num_views:
                raise ValueError(f"parameters of {len(stored)} augmentations; expected {self.num_views}")
            values = np.stack([view_parameters(each, list(self._transforms)) for each in stored])
            return values[:, : len(CropAndOperations.columns)]

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


def _in_tar(file: Path) -> list[_Sample]:
    samples: dict[str, _Sample] = {}
    with tarfile.open(file, "r:") as shard:
        for member in shard:
            if not member.isreg():
                raise ValueError(f"{member.name!r:.60} is not a regular file")
            key, _, extension = member.name.partition(".")
            sample = samples.get(key, _Sample(key, None, None))
            place = _Place(file, member.offset_data, member.size, extension)
            if extension in _READERS and sample.embeddings is not None:
                raise ValueError(f"sample {key!r:.60} has embeddings twice")
            if extension in _READERS:
                sample = sample._replace(embeddings=place)
            elif extension == "paug.json":
                sample = sample._replace(parameters=place)
            samples[key] = sample
    return list(samples.values())


def _in_lines(file: Path) -> list[_Sample]:
    samples, start = [], 0
    for line in read_bytes(file).splitlines(keepends=True):
        stored = json.loads(line)
        place = _Place(file, start, len(line), "jsonl") if PER_VIEW in stored else None
        samples.append(_Sample(str(stored["uid"]), place, None))
        start += len(line)
    return samples


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
