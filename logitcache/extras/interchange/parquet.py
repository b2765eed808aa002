"""Plain logits in Parquet files, for pandas, polars, Hugging Face datasets and SQL engines; read and written.

An export has one file per view. Rows are decoded and written in groups, and files appear atomically.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from logitcache.cache.labelview import View
from logitcache.cache.layout import parse_views
from logitcache.cache.reader import LogitCache
from logitcache.errors import InvalidSource, UsageError
from logitcache.extras.interchange.arrays import LOGITS_NAME
from logitcache.extras.interchange.files import matching
from logitcache.extras.interchange.parts import ExportResult, Part, lists, metadata, open_exported, table, write_parts
from logitcache.extras.interchange.protocol import NO_IDENTITY, NO_VIEW, DenseRows, Importer, SparseRows
from logitcache.extras.interchange.tables import (
    check_table,
    columns,
    list_shape,
    open_parquet,
    ragged,
    record_batches,
    strings,
)
from logitcache.storage import local_path

# B batch, C classes, K kept classes

PIECE_LOGITS = 2**22
"""Logits of one row group (16 MB), unless a block is smaller."""
_VIEW_FILE = re.compile(r"view-(\d{5})\.parquet")


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


def export_parquet(
    location: str, out: str | os.PathLike[str], *, views: str | None = None, top: int | None = None
) -> ExportResult:
    """Write a sealed cache's decoded logits to `OUT/view-00000.parquet` and so on.

    Columns: view (int32), row (int64), key (string) and target (int64) if the cache has them, and logits (list of C
    float32). With `top`, the k largest logits instead: classes (list of int32) and logits (list of float32), largest
    first, and tail (float32), the log-sum-exp of the other logits. Idempotent: existing files are not written again.

    Args:
        location: the cache.
        out: a folder without other files; created if it is missing.
        views: such as "0:2" or "3"; all by default.
        top: classes kept of each row, 1 <= top < C.

    Raises:
        UsageError: pyarrow is missing, a view does not exist, or the folder has other files. Nothing is written.
        IncompleteCache: the cache is not sealed.
        CorruptCache: labels are damaged.
    """
    return write_views(open_exported(location), local_path(out), views=views, top=top)


def write_views(cache: LogitCache, folder: Path, *, views: str | None, top: int | None) -> ExportResult:
    """As `export_parquet`, of an open cache."""
    check_top(cache, top)

    def part(view: int) -> Part:
        about = metadata(cache, view, top)
        return Part(
            f"view-{view:05d}.parquet", about, cache.num_rows, cache.num_rows, lambda: _tables(cache, view, top)
        )

    def part_of(name: str) -> Part | None:
        found = _VIEW_FILE.fullmatch(name)
        return part(int(found[1])) if found else None

    return write_parts(folder, [part(view) for view in parse_views(views, cache.views)], part_of)


def check_top(cache: LogitCache, top: int | None) -> None:
    """Refuse a number of classes that leaves no tail.

    Raises:
        UsageError: not 1 to C - 1.
    """
    if top is not None and not 1 <= top < cache.num_classes:
        raise UsageError(f"--top keeps 1 to {cache.num_classes - 1} of {cache.num_classes} classes, not {top}")


def _tables(cache: LogitCache, view: int, top: int | None) -> Iterator[Any]:
    labels = cache.view(view, memory_budget=1)  # one or two blocks in memory, not the view
    return (_table(cache, labels, rows, top) for rows in _row_groups(cache))


def _row_groups(cache: LogitCache) -> Iterator[range]:
    """The rows of a view, block by block; large blocks are split."""
    size = max(1, PIECE_LOGITS // cache.num_classes)
    for number in range(cache.layout.blocks_per_view):
        rows = cache.row_map.block_rows(number)
        yield from (rows[start : start + size] for start in range(0, len(rows), size))


def _table(cache: LogitCache, labels: View, rows: range, top: int | None) -> Any:
    """Some rows of a view as an Arrow table."""
    import pyarrow as pa

    logits_BC = labels.logits(rows)
    numbers = np.arange(rows.start, rows.stop)
    samples = cache.row_map.samples_of(numbers)
    columns = {"view": pa.array(np.full(len(rows), labels.number), pa.int32()), "row": pa.array(numbers, pa.int64())}
    if not cache.row_map.one_each:
        columns["sample"] = pa.array(samples, pa.int64())
        columns["position"] = pa.array(cache.row_map.positions_of(numbers), pa.int32())
    if cache.samples is not None:
        if cache.samples.keys is not None:
            columns["key"] = pa.array([cache.samples.keys[sample] for sample in samples], pa.string())
        columns["target"] = pa.array(cache.samples.targets[samples], pa.int64())
    if top is None:
        columns["logits"] = lists(logits_BC.numpy())
    else:
        kept_BK, ids_BK = logits_BC.topk(top, dim=1)
        columns["classes"] = lists(ids_BK.to(torch.int32).numpy())
        columns["logits"] = lists(kept_BK.numpy())
        columns["tail"] = pa.array(torch.logsumexp(logits_BC.scatter(1, ids_BK, -torch.inf), dim=1).numpy())
    return table(columns)
