"""A cache's logits as Parquet files, for pandas, polars, Hugging Face datasets and SQL engines.

One file per view. Rows are decoded and written in groups, and files appear atomically.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from logitcache.cache.labelview import View
from logitcache.cache.layout import parse_views
from logitcache.cache.reader import LogitCache, open_cache
from logitcache.errors import StorageError, UsageError, unsealed
from logitcache.progress import track
from logitcache.storage import local_path
from logitcache.storage.local import is_alive

# B batch, C classes, K kept classes

METADATA = "logitcache"
"""Key of the file metadata: a JSON object with the identity of cache, view and columns."""
PIECE_LOGITS = 2**22
"""Logits of one row group (16 MB), unless a block is smaller."""
_VIEW_FILE = re.compile(r"view-(?P<view>\d{5})\.parquet")
_PARTIAL = re.compile(r"\.view-\d{5}\.parquet\.(?P<pid>\d+)\.partial")


@dataclass(frozen=True)
class ExportResult:
    """The result of an export."""

    files: list[str]
    """Of the requested views, in their order."""
    written: list[str]
    """The files that did not exist before."""
    rows: int
    """In all files together."""
    bytes: int


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
    if importlib.util.find_spec("pyarrow") is None:
        raise UsageError("Parquet needs pyarrow: pip install 'logitcache[parquet]'")
    cache = open_cache(location)
    if not cache.sealed:
        raise unsealed(location)
    if top is not None and not 1 <= top < cache.num_classes:
        raise UsageError(f"--top keeps 1 to {cache.num_classes - 1} of {cache.num_classes} classes, not {top}")
    folder = local_path(out)
    files = {number: folder / f"view-{number:05d}.parquet" for number in parse_views(views, cache.views)}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        existing = _existing_views(folder, cache, top)
        missing = {number: path for number, path in files.items() if number not in existing}
        with track("exporting", len(missing) * cache.num_rows, unit="rows") as meter:
            for number, path in missing.items():
                for num_rows in _write_view(cache, number, path, top):
                    meter.advance(num_rows, note=f"view {number}")
        return ExportResult(
            files=[str(path) for path in files.values()],
            written=[str(path) for path in missing.values()],
            rows=len(files) * cache.num_rows,
            bytes=sum(path.stat().st_size for path in files.values()),
        )
    except StorageError:
        raise
    except OSError as error:
        raise StorageError(
            f"can't write to {folder}: {error.strerror or error}; run the command again to resume, complete files stay"
        ) from error


def _existing_views(folder: Path, cache: LogitCache, top: int | None) -> set[int]:
    """The views that were exported before. Partial files of killed exports are removed.

    Raises:
        UsageError: the folder has other files, or an export of another cache or with other columns.
    """
    existing = set()
    for path in sorted(folder.iterdir()):
        partial, complete = _PARTIAL.fullmatch(path.name), _VIEW_FILE.fullmatch(path.name)
        if partial:
            if not is_alive(int(partial["pid"])):
                path.unlink(missing_ok=True)
        elif complete and path.is_file():
            view = int(complete["view"])
            _check_file(path, _metadata(cache, view, top), cache.num_rows)
            existing.add(view)
        else:
            raise UsageError(
                f"{folder} contains other files ({path.name!r}); an export needs a folder of its own, so that "
                "`*.parquet` matches only this cache's views"
            )
    return existing


def _check_file(path: Path, expected: dict[str, Any], num_rows: int) -> None:
    from pyarrow import ArrowException, parquet

    try:
        footer = parquet.read_metadata(path)
        found = json.loads((footer.metadata or {})[METADATA.encode()])
        found = found if isinstance(found, dict) else {}
    except (ArrowException, OSError, KeyError, ValueError):
        raise UsageError(f"{path} is not an export of a cache; choose another folder, or move that file away") from None
    for name, value in expected.items():
        if found.get(name) != value:
            raise UsageError(
                f"{path} is another export: its {name} is {found.get(name)!r}, expected {value!r}; choose another "
                "folder"
            )
    if footer.num_rows != num_rows:
        raise UsageError(f"{path} has {footer.num_rows} rows, expected {num_rows}; delete it and export again")


def _metadata(cache: LogitCache, view: int, top: int | None) -> dict[str, Any]:
    identity = cache.manifest.identity
    return {
        "id": cache.id,
        "digest": cache.digest,
        "view": view,
        "top": top,
        "num_classes": cache.num_classes,
        "teacher": identity.teacher,
        "dataset": identity.dataset,
        "encoding": identity.encoding,
        "class_names": identity.class_names,
    }


def _write_view(cache: LogitCache, view: int, path: Path, top: int | None) -> Iterator[int]:
    """Write one file atomically; yields the number of rows of each row group."""
    from pyarrow import parquet

    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    metadata = {METADATA: json.dumps(_metadata(cache, view, top), ensure_ascii=False)}
    labels = cache.view(view, memory_budget=1)  # one or two blocks in memory, not the view
    tables = (_table(cache, labels, rows, top) for rows in _row_groups(cache))
    first = next(tables)
    try:
        with partial.open("wb") as file:
            with parquet.ParquetWriter(file, first.schema.with_metadata(metadata), compression="zstd") as writer:
                for table in itertools.chain([first], tables):
                    writer.write_table(table, row_group_size=len(table))
                    yield len(table)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _row_groups(cache: LogitCache) -> Iterator[range]:
    """The rows of a view, block by block; large blocks are split."""
    size = max(1, PIECE_LOGITS // cache.num_classes)
    for number in range(cache.layout.blocks_per_view):
        rows = cache.row_map.block_rows(number)
        yield from (rows[start : start + size] for start in range(0, len(rows), size))


def _table(cache: LogitCache, labels: View, rows: range, top: int | None) -> Any:
    """Some rows of a view as an Arrow table."""
    import pyarrow as pa

    def lists(values_BK: Tensor) -> Any:
        # Variable-size lists: pandas, polars and datasets all read them, but not all read fixed-size lists.
        offsets = np.arange(0, values_BK.numel() + 1, values_BK.shape[1], dtype=np.int32)
        return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values_BK.contiguous().numpy().reshape(-1)))

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
        columns["logits"] = lists(logits_BC)
    else:
        kept_BK, ids_BK = logits_BC.topk(top, dim=1)
        columns["classes"] = lists(ids_BK.to(torch.int32))
        columns["logits"] = lists(kept_BK)
        columns["tail"] = pa.array(torch.logsumexp(logits_BC.scatter(1, ids_BK, -torch.inf), dim=1).numpy())
    schema = pa.schema([pa.field(name, array.type, nullable=False) for name, array in columns.items()])
    return pa.Table.from_arrays(list(columns.values()), schema=schema)
