"""The files of an export: Parquet tables that appear atomically and are not written twice."""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from logitcache.cache.reader import LogitCache, open_sealed
from logitcache.errors import StorageError, UsageError
from logitcache.extras.interchange.tables import check_pyarrow
from logitcache.progress import track
from logitcache.storage.local import is_alive

METADATA = "logitcache"
"""Key of the file metadata: a JSON object with the identity of cache, view and columns."""
_PARTIAL = re.compile(r"\.(?P<name>.+)\.(?P<pid>\d+)\.partial")


@dataclass(frozen=True)
class ExportResult:
    """The result of an export."""

    files: list[str]
    """Of the requested views, in their order."""
    written: list[str]
    """The files that did not exist before."""
    rows: int
    """Rows of the cache in all files together."""
    bytes: int


@dataclass(frozen=True)
class Part:
    """One file of an export."""

    name: str
    metadata: Mapping[str, Any]
    """Stored in the file, to recognize it in a later run."""
    num_rows: int
    """Rows of the table."""
    cache_rows: int
    """Rows of the cache in it."""
    tables: Callable[[], Iterator[Any]]
    """Its row groups, as Arrow tables."""


def open_exported(location: str) -> LogitCache:
    """The cache to export, and the check that pyarrow is there.

    Raises:
        UsageError: pyarrow is missing.
        IncompleteCache: the cache is not sealed.
    """
    check_pyarrow()
    cache = open_sealed(location)
    cache.check_has_logits("export")
    return cache


def metadata(cache: LogitCache, view: int, top: int | None, **more: Any) -> dict[str, Any]:
    """Of one file; what differs between two files shows that they are of different exports."""
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
        **more,
    }


def write_parts(
    folder: Path, parts: Sequence[Part], part_of: Callable[[str], Part | None], *, also: Sequence[str] = ()
) -> ExportResult:
    """Write the files of an export that are missing in a folder, which is created if needed.

    Args:
        folder: holds only this export.
        parts: the requested files.
        part_of: the file of a name, requested or not; None for a name that is not of this export.
        also: names of other files of this export.

    Raises:
        UsageError: the folder has other files, or files of another export. Nothing is written.
        StorageError: a file can't be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        existing = _existing(folder, part_of, also)
        missing = [part for part in parts if part.name not in existing]
        with track("exporting", sum(part.num_rows for part in missing), unit="rows") as meter:
            for part in missing:
                for num_rows in _write(folder / part.name, part):
                    meter.advance(num_rows, note=part.name)
        return ExportResult(
            files=[str(folder / part.name) for part in parts],
            written=[str(folder / part.name) for part in missing],
            rows=sum(part.cache_rows for part in parts),
            bytes=sum((folder / part.name).stat().st_size for part in parts),
        )
    except StorageError:
        raise
    except OSError as error:
        raise StorageError(
            f"can't write to {folder}: {error.strerror or error}; run the command again to resume, complete files stay"
        ) from error


def lists(values_BK: np.ndarray) -> Any:
    """Rows of equal length as an Arrow array of lists."""
    # Variable-size lists: pandas, polars and datasets all read them, but not all read fixed-size lists.
    import pyarrow as pa

    offsets = np.arange(0, values_BK.size + 1, values_BK.shape[1], dtype=np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(np.ascontiguousarray(values_BK).reshape(-1)))


def table(columns: Mapping[str, Any]) -> Any:
    """An Arrow table without missing values."""
    import pyarrow as pa

    schema = pa.schema([pa.field(name, array.type, nullable=False) for name, array in columns.items()])
    return pa.Table.from_arrays(list(columns.values()), schema=schema)


def _existing(folder: Path, part_of: Callable[[str], Part | None], also: Sequence[str]) -> set[str]:
    """The files that were exported before. Partial files of killed exports are removed.

    Raises:
        UsageError: the folder has other files, or an export of another cache or with other columns.
    """
    existing = set()
    for path in sorted(folder.iterdir()):
        partial, part = _PARTIAL.fullmatch(path.name), part_of(path.name)
        if partial and part_of(partial["name"]):
            if not is_alive(int(partial["pid"])):
                path.unlink(missing_ok=True)
        elif part is not None and path.is_file():
            _check_file(path, part)
            existing.add(path.name)
        elif path.name not in also:
            raise UsageError(
                f"{folder} contains other files ({path.name!r}); an export needs a folder of its own, so that "
                "`*.parquet` matches only this cache's views"
            )
    return existing


def _check_file(path: Path, part: Part) -> None:
    from pyarrow import ArrowException, parquet

    try:
        footer = parquet.read_metadata(path)
        found = json.loads((footer.metadata or {})[METADATA.encode()])
        found = found if isinstance(found, dict) else {}
    except (ArrowException, OSError, KeyError, ValueError):
        raise UsageError(f"{path} is not an export of a cache; choose another folder, or move that file away") from None
    for name, value in part.metadata.items():
        if found.get(name) != value:
            raise UsageError(
                f"{path} is another export: its {name} is {found.get(name)!r}, expected {value!r}; choose another "
                "folder"
            )
    if footer.num_rows != part.num_rows:
        raise UsageError(f"{path} has {footer.num_rows} rows, expected {part.num_rows}; delete it and export again")


def _write(path: Path, part: Part) -> Iterator[int]:
    """Write one file atomically; yields the number of rows of each row group."""
    from pyarrow import parquet

    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    about = {METADATA: json.dumps(part.metadata, ensure_ascii=False)}
    tables = part.tables()
    first = next(tables)
    try:
        with partial.open("wb") as file:
            with parquet.ParquetWriter(file, first.schema.with_metadata(about), compression="zstd") as writer:
                for group in itertools.chain([first], tables):
                    writer.write_table(group, row_group_size=len(group))
                    yield len(group)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
