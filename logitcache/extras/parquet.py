"""A cache's labels as Parquet files, for those who want a table: pandas, polars, Hugging Face datasets, any SQL engine.

One file for each view; rows are decoded and written some at a time. A file appears under its name when it is whole.
"""

from __future__ import annotations

import importlib.util
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
from logitcache.cache.layout import Block, block_rows, blocks_per_view, parse_views
from logitcache.cache.reader import LogitCache, open_cache
from logitcache.errors import StorageError, UsageError, unsealed
from logitcache.progress import track
from logitcache.storage import local_path
from logitcache.storage.local import is_alive

# B batch, C classes, K kept classes

METADATA = "logitcache"
"""Key of a file's metadata: a JSON object that says which cache, view and columns it holds."""
PIECE_LOGITS = 2**22
"""Logits of one row group (16 MB), unless a block has fewer."""
_VIEW_FILE = re.compile(r"view-\d{5}\.parquet")
_PARTIAL = re.compile(r"\.view-\d{5}\.parquet\.(?P<pid>\d+)\.partial")


@dataclass(frozen=True)
class ExportResult:
    """What an export did."""

    files: list[str]
    """Of the views that were asked for, in their order."""
    written: list[str]
    """Those of them that were not there yet."""
    rows: int
    """In all these files together."""
    bytes: int


def export_parquet(
    location: str, out: str | os.PathLike[str], *, views: str | None = None, top: int | None = None
) -> ExportResult:
    """Write a sealed cache's decoded logits to `OUT/view-00000.parquet` and so on.

    Columns: view (int32), row (int64), key (string) and target (int64) where the cache has them, and logits
    (list of C float32); with `top`, the k largest instead: classes (list of int32) and logits (list of float32),
    largest first, and tail (float32), the log-sum-exp of the others. Idempotent: a file that is there is not written
    again.

    Args:
        location: the cache.
        out: a folder that holds nothing else; created where it is not there.
        views: such as "0:2" or "3"; all by default.
        top: classes kept of each row, 1 <= top < C.

    Raises:
        UsageError: pyarrow is missing, no such view, or the folder holds something else; before anything is written.
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
    numbers = parse_views(views, cache.views)
    folder = local_path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        there = _files_there(folder, cache, top)
        missing = [number for number in numbers if number not in there]
        with track("exporting", len(missing) * cache.num_samples, unit="rows") as meter:
            for number in missing:
                for count in _write_view(cache, number, folder / _name(number), top):
                    meter.advance(count, note=f"view {number}")
        files = [folder / _name(number) for number in numbers]
        return ExportResult(
            files=[str(file) for file in files],
            written=[str(folder / _name(number)) for number in missing],
            rows=len(numbers) * cache.num_samples,
            bytes=sum(file.stat().st_size for file in files),
        )
    except StorageError:
        raise
    except OSError as error:
        raise StorageError(
            f"can't write to {folder}: {error.strerror or error}; run it again, whole files stay"
        ) from error


def _name(view: int) -> str:
    return f"view-{view:05d}.parquet"


def _files_there(folder: Path, cache: LogitCache, top: int | None) -> set[int]:
    """The views whose files are there; those that a killed export left half written are removed.

    Raises:
        UsageError: something else lies there, or an export of another cache or with other columns.
    """
    there = set()
    for path in sorted(folder.iterdir()):
        partial = _PARTIAL.fullmatch(path.name)
        if partial:
            if not is_alive(int(partial["pid"])):
                path.unlink(missing_ok=True)
        elif not _VIEW_FILE.fullmatch(path.name) or not path.is_file():
            raise UsageError(
                f"{folder} holds something else ({path.name!r}); an export needs a folder of its own, so that "
                "`*.parquet` is this cache's views and nothing more"
            )
        else:
            view = int(path.name[5:10])
            _check_file(path, _about(cache, view, top), cache.num_samples)
            there.add(view)
    return there


def _check_file(path: Path, expected: dict[str, Any], num_rows: int) -> None:
    from pyarrow import ArrowException, parquet

    try:
        footer = parquet.read_metadata(path)
        found = json.loads((footer.metadata or {})[METADATA.encode()])
        found = found if isinstance(found, dict) else {}
    except (ArrowException, OSError, KeyError, ValueError):
        raise UsageError(f"{path} is no export of a cache; choose another folder, or move that file away") from None
    for name, value in expected.items():
        if found.get(name) != value:
            raise UsageError(
                f"{path} is another export: its {name} is {found.get(name)!r}, here {value!r}; choose another folder"
            )
    if footer.num_rows != num_rows:
        raise UsageError(f"{path} has {footer.num_rows} rows, not {num_rows}; delete it and export again")


def _about(cache: LogitCache, view: int, top: int | None) -> dict[str, Any]:
    """What a file says of itself."""
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
    """Write one file, and say of each row group how many rows it has; nothing is left under its name but all of it."""
    from pyarrow import parquet

    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    schema = _schema(cache, view, top)
    labels = cache.view(view, memory_budget=1)  # a block or two in memory, however long the view is
    try:
        with partial.open("wb") as file:
            with parquet.ParquetWriter(file, schema, compression="zstd") as writer:
                for rows in _pieces(cache):
                    table = _table(cache, schema, labels, rows, top)
                    writer.write_table(table, row_group_size=len(rows))
                    yield len(rows)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _pieces(cache: LogitCache) -> Iterator[range]:
    """The rows of a view, block by block, large blocks in parts."""
    size = max(1, PIECE_LOGITS // cache.num_classes)
    for number in range(blocks_per_view(cache.layout)):
        rows = block_rows(cache.layout, Block(0, number))
        for start in range(rows.start, rows.stop, size):
            yield range(start, min(start + size, rows.stop))


def _schema(cache: LogitCache, view: int, top: int | None) -> Any:
    import pyarrow as pa

    samples = cache.samples
    columns = [("view", pa.int32()), ("row", pa.int64())]
    if samples is not None and samples.keys is not None:
        columns.append(("key", pa.string()))
    if samples is not None:
        columns.append(("target", pa.int64()))
    # Plain lists, though each is C long: pandas, polars and datasets all read them, and not all do fixed-size ones.
    if top is None:
        columns.append(("logits", pa.list_(pa.float32())))
    else:
        columns += [("classes", pa.list_(pa.int32())), ("logits", pa.list_(pa.float32())), ("tail", pa.float32())]
    about = json.dumps(_about(cache, view, top), ensure_ascii=False)
    return pa.schema([pa.field(name, kind, nullable=False) for name, kind in columns], metadata={METADATA: about})


def _table(cache: LogitCache, schema: Any, labels: View, rows: range, top: int | None) -> Any:
    import pyarrow as pa

    logits_BC = labels.logits(rows)
    samples = cache.samples
    within = slice(rows.start, rows.stop)
    columns: dict[str, Any] = {
        "view": np.full(len(rows), labels.number, dtype=np.int32),
        "row": np.arange(rows.start, rows.stop, dtype=np.int64),
    }
    if samples is not None:
        columns["target"] = samples.targets[within]
        if samples.keys is not None:
            columns["key"] = list(samples.keys[within])
    if top is None:
        columns["logits"] = _lists(logits_BC, pa.float32())
    else:
        kept_BK, ids_BK = logits_BC.topk(top, dim=1)
        rest_BC = logits_BC.scatter(1, ids_BK, -torch.inf)
        columns["classes"] = _lists(ids_BK.to(torch.int32), pa.int32())
        columns["logits"] = _lists(kept_BK, pa.float32())
        columns["tail"] = torch.logsumexp(rest_BC, dim=1).numpy()
    arrays = [pa.array(columns[field.name], type=field.type) for field in schema]
    return pa.Table.from_arrays(arrays, schema=schema)


def _lists(values_BK: Tensor, kind: Any) -> Any:
    """Rows as lists of one length."""
    import pyarrow as pa

    num_rows, length = values_BK.shape
    offsets = np.arange(0, num_rows * length + 1, length, dtype=np.int32)
    flat = pa.array(values_BK.contiguous().numpy().reshape(-1), type=kind)
    return pa.ListArray.from_arrays(pa.array(offsets), flat)
