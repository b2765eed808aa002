"""Plain logits in .npy, .npz and Parquet files."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from logitcache.errors import InvalidSource, UsageError
from logitcache.extras.importers.files import matching, reading
from logitcache.extras.importers.protocol import (
    NO_IDENTITY,
    NO_VIEW,
    ROWS_AT_ONCE,
    DenseRows,
    Importer,
    SparseRows,
)
from logitcache.extras.importers.tables import (
    check_table,
    columns,
    list_shape,
    open_parquet,
    ragged,
    record_batches,
    strings,
)

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


class ParquetLogits(Importer):
    """A Parquet file or a folder of them, in the form of `logitcache export --to parquet`.

    Columns: `logits`, a list of C numbers; or `classes` and `logits`, lists of equal length, with `tail` (the
    log-sum-exp of all other logits) unless the logits are log-probabilities. Optional: `view`, `row`, `key`.
    """

    name: ClassVar[str] = "parquet"
    tool: ClassVar[str] = "Parquet"

    def __init__(self, source: Path, *, num_classes: int | None = None) -> None:
        super().__init__(source, num_classes=num_classes)
        self.files = [source] if source.is_file() else [path for _, path in matching(source, r".+\.parquet")]
        if not self.files:
            raise UsageError(f"{source} has no .parquet files")
        readers = [open_parquet(file) for file in self.files]
        self._names = set(columns(readers[0]))
        check_table(self.files[0], readers[0], [LOGITS_NAME])
        sparse = "classes" in self._names
        width = list_shape(self.files[0], readers[0], LOGITS_NAME)
        if sparse:
            self.require_classes()
            self.k = width
        elif num_classes not in (None, width):
            raise UsageError(f"{self.files[0]} has lists of {width} logits, not {num_classes}")
        else:
            self.num_classes = width
        self._starts, count = [], 0
        by_view = "view" in self._names
        views: dict[int, int] = {}
        keys: list[str] = []
        for file, reader in zip(self.files, readers, strict=True):
            if set(columns(reader)) != self._names:
                raise UsageError(f"{file} has other columns than {self.files[0]}")
            self._starts.append(count)
            for batch in record_batches(file, reader, [name for name in ("view", "key") if name in self._names]):
                numbers = batch["view"].to_numpy() if by_view else np.zeros(batch.num_rows, dtype=np.int64)
                for view, number in zip(*np.unique(numbers, return_counts=True), strict=True):
                    views[int(view)] = views.get(int(view), 0) + int(number)
                if "key" in self._names:
                    keys += [key for key, view in zip(strings(batch["key"]), numbers, strict=True) if view == 0]
            count += reader.metadata.num_rows
        if sorted(views) != list(range(len(views))) or len(set(views.values())) != 1:
            raise UsageError(f"{source} has rows by view {views}; expected views 0, 1, … with equally many rows")
        self.num_views, self.num_samples = len(views), views[0]
        self.keys = keys or None
        self.missing = {"view": NO_VIEW, "identity": NO_IDENTITY}
        if sparse and "tail" not in self._names:
            self.missing["tail"] = "no column `tail`: the logits are taken as log-probabilities at T = 1"

    def batches(self) -> Iterator[DenseRows | SparseRows]:
        done = [0] * self.num_views
        wanted = [name for name in (LOGITS_NAME, "classes", "tail", "view") if name in self._names]
        for file in self.files:
            for batch in record_batches(file, open_parquet(file), wanted):
                rows = self._rows(file, batch)
                numbers = batch["view"].to_numpy() if "view" in self._names else np.zeros(batch.num_rows, dtype=int)
                for view in np.unique(numbers):
                    chosen = numbers == view
                    yield self._of_view(file, int(view), done[view], [values[chosen] for values in rows])
                    done[view] += int(chosen.sum())

    def _rows(self, file: Path, batch: Any) -> list[np.ndarray]:
        width = self.k if self.k is not None else self.num_classes
        logits = ragged(batch[LOGITS_NAME])
        if set(map(len, logits)) != {width}:
            raise InvalidSource(f"{file} has lists of other lengths than {width} in the column {LOGITS_NAME!r}")
        rows = [np.stack(logits).astype(np.float32)]
        if self.k is not None:
            classes = ragged(batch["classes"])
            if set(map(len, classes)) != {width}:
                raise InvalidSource(f"{file} has lists of other lengths than {width} in the column 'classes'")
            rows.append(np.stack(classes))
            rows.append(batch["tail"].to_numpy() if "tail" in self._names else np.zeros(batch.num_rows))
        return rows

    def _of_view(self, file: Path, view: int, start: int, rows: list[np.ndarray]) -> DenseRows | SparseRows:
        if self.k is None:
            return DenseRows(view, start, rows[0], file)
        logits, classes, tail = rows
        log_probs = logits.astype(np.float64)
        if "tail" in self._names:
            every = np.concatenate([log_probs, tail[:, None].astype(np.float64)], axis=1)
            log_probs -= np.logaddexp.reduce(every, axis=1, keepdims=True)
        return SparseRows(view, start, classes.astype(np.int64), log_probs, file)
