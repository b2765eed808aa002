"""Columns of Parquet files, which need pyarrow."""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from logitcache.errors import InvalidSource, UsageError
from logitcache.extras.interchange.files import reading

TABLE_ROWS = 256
"""Rows of a table that are read at once."""


def check_pyarrow() -> None:
    """Raise UsageError if pyarrow is missing."""
    if importlib.util.find_spec("pyarrow") is None:
        raise UsageError("Parquet needs pyarrow: pip install 'logitcache[parquet]'")


def open_parquet(file: Path) -> Any:
    """A Parquet file, opened for reading.

    Raises:
        UsageError: pyarrow is missing.
        InvalidSource: no Parquet file.
    """
    check_pyarrow()
    from pyarrow import parquet

    with reading(file):
        opened = parquet.ParquetFile(file)
        if opened.metadata.num_rows == 0:
            raise UsageError(f"{file} has no rows")
        return opened


def columns(reader: Any) -> list[str]:
    """The names of the top-level columns."""
    return list(reader.schema_arrow.names)


def check_table(file: Path, reader: Any, expected: Sequence[str]) -> None:
    """Refuse a table without the columns of a format.

    Raises:
        UsageError: names the missing column, and those that there are.
    """
    found = columns(reader)
    for name in expected:
        if name not in found:
            raise UsageError(f"{file} has no column {name!r}; it has: {', '.join(found)}")


def record_batches(file: Path, reader: Any, names: Sequence[str]) -> Iterator[Any]:
    """Some columns of a file, some rows at a time.

    Raises:
        InvalidSource: the file is damaged.
    """
    with reading(file):
        yield from reader.iter_batches(batch_size=TABLE_ROWS, columns=list(names))


def list_shape(file: Path, reader: Any, name: str) -> int:
    """The length of the first list of a column.

    Raises:
        InvalidSource: the column has no lists.
    """
    first = next(record_batches(file, reader, [name]))[name]
    with reading(file):
        return len(ragged(first)[0])


def ragged(column: Any) -> list[np.ndarray]:
    """The lists of a column of numbers, as views of one array.

    Raises:
        ValueError: no lists of numbers, or a missing one.
    """
    import pyarrow as pa

    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    if pa.types.is_fixed_size_list(column.type):
        column = column.cast(pa.list_(column.type.value_type))
    if not (pa.types.is_list(column.type) or pa.types.is_large_list(column.type)):
        raise ValueError(f"a column of type {column.type}; expected lists")
    if column.null_count:
        raise ValueError("a missing list")
    values, offsets = column.values, column.offsets.to_numpy()
    if values.null_count:
        raise ValueError("a missing number")
    if not (pa.types.is_integer(values.type) or pa.types.is_floating(values.type)):
        raise ValueError(f"lists of {values.type}; expected numbers")
    flat = values.to_numpy(zero_copy_only=False)
    return [flat[start:stop] for start, stop in itertools.pairwise(offsets)]


def nested(column: Any) -> list[list[np.ndarray]]:
    """The lists of lists of a column of numbers.

    Raises:
        ValueError: no such column, or a missing list.
    """
    import pyarrow as pa

    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    if not (pa.types.is_list(column.type) or pa.types.is_large_list(column.type)) or column.null_count:
        raise ValueError(f"a column of type {column.type}; expected lists of lists, none missing")
    inner, offsets = ragged(column.values), column.offsets.to_numpy()
    return [inner[start:stop] for start, stop in itertools.pairwise(offsets)]


def matrix(lists: Sequence[np.ndarray], width: int, file: Path, name: str) -> np.ndarray:
    """Lists of equal length as one array (B, width).

    Raises:
        InvalidSource: a list of another length.
    """
    for values in lists:
        if len(values) != width:
            raise InvalidSource(f"{file} has {len(values)} numbers in {name!r}; expected {width}")
    return np.stack(lists) if len(lists) else np.empty((0, width))


def strings(column: Any) -> list[str]:
    """A column of strings.

    Raises:
        ValueError: something else.
    """
    values: list[str] = column.to_pylist()
    if not all(isinstance(value, str) for value in values):
        raise ValueError("a key that is no string")
    return values
