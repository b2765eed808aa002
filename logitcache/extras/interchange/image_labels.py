"""Soft labels of images, one small pickle for each image: FKD and Apple ml-dr."""

from __future__ import annotations

import itertools
import json
from abc import abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

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
from logitcache.extras.interchange.protocol import NO_IDENTITY, TAIL_KNOWN, Importer, SparseRows

# N samples, V views, K entries

FILES_AT_ONCE = 1024
OPEN_ENTRIES = 2**26
"""Entries of all views that the writer holds at once, about."""


class _ImageLabels(Importer):
    """One file for each image, with the labels of all its views."""

    def _set_shape(self) -> None:
        """Number of samples, views and entries, by the first file."""
        self.num_samples = len(self._images)
        ids, _ = self._read(self._images[0])[:2]
        self.num_views, self.k = ids.shape
        self.rows_per_block = int(max(64, min(16_384, OPEN_ENTRIES // (self.num_views * self.k))))

    _images: list[Path]

    @abstractmethod
    def _read(self, file: Path) -> tuple[np.ndarray, np.ndarray, Any]:
        """Classes and probabilities, (V, K), and the parameters of the views."""

    def batches(self) -> Iterator[SparseRows]:
        for start in range(0, self.num_samples, FILES_AT_ONCE):
            part = self._images[start : start + FILES_AT_ONCE]
            labels = [self._checked(file) for file in part]
            with np.errstate(divide="ignore", invalid="ignore"):
                log_probs = np.log(np.stack([probs for _, probs, _ in labels]))
            ids = np.stack([each for each, _, _ in labels])
            for view in range(self.num_views):
                yield SparseRows(view, start, ids[:, view], log_probs[:, view], part[0])

    def _checked(self, file: Path) -> tuple[np.ndarray, np.ndarray, Any]:
        ids, probs, parameters = self._read(file)
        if ids.shape != (self.num_views, self.k) or probs.shape != ids.shape:
            raise InvalidSource(
                f"{file} has labels {ids.shape}; expected ({self.num_views}, {self.k}) as in {self._images[0]}"
            )
        if (ids < 0).any() or (ids >= self.num_classes).any():
            raise InvalidSource(f"{file} has a class outside 0 to {self.num_classes - 1}")
        return ids, probs, parameters


class FKD(_ImageLabels):
    """FKD's soft labels: a folder with a file for each image, at any depth. Views are the stored crops, in order."""

    name: ClassVar[str] = "fkd"
    tool: ClassVar[str] = "FKD"

    def __init__(self, source: Path, *, num_classes: int | None = None) -> None:
        super().__init__(source, num_classes=num_classes)
        self.require_classes()
        if not source.is_dir():
            raise UsageError(f"{source} is not a folder")
        self._images = sorted(source.rglob("*.tar"), key=lambda path: path.relative_to(source).as_posix())
        if not self._images:
            raise UsageError(f"{source} has no .tar files, one for each image")
        self.files = self._images
        self.keys = [f"{path.parent.name}/{path.stem}" for path in self._images]
        self._set_shape()
        self.missing = {
            "view": "crop box and flip are stored, but not the output size and interpolation; the cache has no view "
            "plan. `--details` writes boxes and flips to a file",
            "identity": NO_IDENTITY,
            "tail": TAIL_KNOWN,
            "temperature": "not stored; probabilities are taken as those at T = 1",
        }
        self.notes = {"k": self.k, "crops": self.num_views}

    def select(self, order: np.ndarray) -> None:
        self._images = [self._images[number] for number in order]
        self.num_samples = len(order)

    def _read(self, file: Path) -> tuple[np.ndarray, np.ndarray, Any]:
        with reading(file):
            coords, flips, labels = (each.values for each in load_torch(read_bytes(file, MAX_PICKLE_BYTES), ARRAYS))
            if labels.ndim != 3 or labels.shape[1] != 2:
                raise InvalidSource(
                    f"{file} has labels of shape {labels.shape}; expected (crops, 2, k): the label types "
                    "marginal_smoothing and marginal_renorm"
                )
            if coords.shape != (len(labels), 4) or flips.shape != (len(labels),):
                raise InvalidSource(f"{file} has boxes {coords.shape} and flips {flips.shape} for {len(labels)} crops")
            ids = labels[:, 0].astype(np.float64)
            if not (ids == np.floor(ids)).all():
                raise InvalidSource(f"{file} has classes that are no whole numbers")
            if labels.dtype == np.float16 and self.num_classes > 2048:
                raise UsageError(f"{file} has classes as float16, which is exact only up to 2048 classes")
            return ids.astype(np.int64), labels[:, 1].astype(np.float32), (coords, flips)

    def details(self) -> dict[str, np.ndarray]:
        found = [self._checked(file)[2] for file in self._images]
        boxes, flips = (np.stack([each[part] for each in found]).swapaxes(0, 1) for part in (0, 1))
        return {"boxes": boxes, "flips": flips}


class MlDr(_ImageLabels):
    """Apple ml-dr's metadata: `{index}.pth.tar`, the index being the position in the training folder."""

    name: ClassVar[str] = "ml_dr"
    tool: ClassVar[str] = "Apple ml-dr"

    def __init__(self, source: Path, *, num_classes: int | None = None) -> None:
        super().__init__(source, num_classes=num_classes)
        self.require_classes()
        numbered = {int(match[1]): path for match, path in matching(source, r"(\d{1,9})\.pth\.tar")}
        if sorted(numbered) != list(range(len(numbered))) or not numbered:
            lost = next((number for number in itertools.count() if number not in numbered), 0)
            raise UsageError(f"{source} has {len(numbered)} numbered files and lacks {lost}.pth.tar; expected 0, 1, …")
        self._images = [numbered[number] for number in range(len(numbered))]
        self.files = list(self._images)
        config = source / "config.pth.tar"
        if config.is_file():
            self.files.append(config)
            with reading(config):
                stated = self._load(config)["reinforce"]
                # The rest of the configuration has local paths.
                self.notes["image_augmentation"] = json.loads(json.dumps(stated["image_augmentation"]))
        self._set_shape()
        self.missing = {
            "view": "the parameters of each transform are stored, mixing partners included, but need the tool's own "
            "transforms; the cache has no view plan. `--details` writes the parameters to a file",
            "identity": NO_IDENTITY,
            "tail": TAIL_KNOWN,
        }
        self.notes |= {"k": self.k, "keys": "position in the training folder"}

    def _load(self, file: Path) -> Any:
        data = read_bytes(file, MAX_PICKLE_BYTES)
        return load_torch(data, ARRAYS) if data[:2] == b"PK" else unpickle(inflate(data), ARRAYS)

    def _read(self, file: Path) -> tuple[np.ndarray, np.ndarray, Any]:
        with reading(file):
            index, views = self._load(file)
            if file.name != f"{index}.pth.tar":
                raise InvalidSource(f"{file} is of sample {index!r:.20}")
            probs, ids = zip(*(view["prob"] for view in views), strict=True)
            classes = np.array(ids)
            if classes.dtype.kind not in "iu":
                raise InvalidSource(f"{file} has classes that are no whole numbers")
            return classes.astype(np.int64), np.array(probs, dtype=np.float64), [view["params"] for view in views]

    def details(self) -> dict[str, np.ndarray]:
        parameters = [self._checked(file)[2] for file in self._images]
        return {"parameters": np.array([[json.dumps(each) for each in views] for views in parameters]).T}
