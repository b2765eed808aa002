"""Plain logits in .npy and .npz files."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import numpy as np

from logitcache.errors import UsageError
from logitcache.extras.interchange.files import matching, reading
from logitcache.extras.interchange.protocol import NO_IDENTITY, NO_VIEW, ROWS_AT_ONCE, DenseRows, Importer

LOGITS_NAME = "logits"


class NumpyArrays(Importer):
    """`.npy` files (N, C) or (V, N, C), or `.npz` files with an array `logits` and optionally `keys`.

    A folder has one file per view, in the order of their names.
    """

    name: ClassVar[str] = "numpy"
    tool: ClassVar[str] = "NumPy"

    def __init__(self, source: Path, *, num_classes: int | None = None) -> None:
        super().__init__(source, num_classes=num_classes)
        self.files = [source] if source.is_file() else [path for _, path in matching(source, r".+\.np[yz]")]
        if not self.files:
            raise UsageError(f"{source} has no .npy or .npz files")
        arrays = [self._open(file) for file in self.files]
        self._arrays = [part for array in arrays for part in (array if array.ndim == 3 else array[None])]
        first = self._arrays[0]
        for file, array in zip(self.files, arrays, strict=True):
            if array.shape[-2:] != first.shape or array.ndim not in (2, 3):
                raise UsageError(f"{file} has logits {array.shape}; expected (N, C) or (V, N, C), as in all files")
        if num_classes is not None and num_classes != first.shape[1]:
            raise UsageError(f"{source} has {first.shape[1]} classes, not {num_classes}")
        self.num_samples, self.num_classes = first.shape
        self.num_views = len(self._arrays)
        self.dtype = "float16" if first.dtype == np.float16 else "float32"
        self.missing = {"view": NO_VIEW, "identity": NO_IDENTITY}
        self.notes = {"dtype": first.dtype.name}

    def _open(self, file: Path) -> np.ndarray:
        with reading(file):
            array = self._from_npz(file) if zipfile.is_zipfile(file) else np.load(file, mmap_mode="r")
            if array.dtype.kind != "f":
                raise UsageError(f"{file} has {array.dtype} values; expected floats, the output before softmax")
            return array

    def _from_npz(self, file: Path) -> np.ndarray:
        with np.load(file, allow_pickle=False) as arrays:
            names = [name for name in arrays.files if name != "keys"]
            name = LOGITS_NAME if LOGITS_NAME in names else names[0] if len(names) == 1 else None
            if name is None:
                raise UsageError(f"{file} has the arrays {', '.join(names)}; expected one named {LOGITS_NAME!r}")
            if "keys" in arrays.files:
                keys = [str(key) for key in arrays["keys"]]
                if self.keys is not None and self.keys != keys:
                    raise UsageError(f"{file} has other keys than the files before it")
                self.keys = keys
            array: np.ndarray = arrays[name]
            return array

    def select(self, order: np.ndarray) -> None:
        self._arrays = [array[order] for array in self._arrays]
        self.num_samples = len(order)

    def batches(self) -> Iterator[DenseRows]:
        per_view = max(1, self.num_views // len(self.files))
        for view, array in enumerate(self._arrays):
            file = self.files[min(view // per_view, len(self.files) - 1)]
            for start in range(0, self.num_samples, ROWS_AT_ONCE):
                yield DenseRows(view, start, np.array(array[start : start + ROWS_AT_ONCE]), file)
