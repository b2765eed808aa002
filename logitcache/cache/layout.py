"""Keys of the objects in a cache, and the bytes of one object.

The labels are a Zarr v3 store with standard codecs only: transpose (each stored column is contiguous, which compresses
most arrays better), bytes, and zstd with checksum. One chunk is one block, so every object is written whole by one
writer and read whole.

A receipt lists the objects of one block, or those of the per-cache arrays. Functions that take a receipt's name treat
both alike.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import zarr
from numcodecs.zstd import Zstd
from zarr.codecs import BytesCodec, TransposeCodec, ZstdCodec
from zarr.storage import MemoryStore

from logitcache.arrays import ArraySpec
from logitcache.cache.manifest import ROW_OFFSETS, ROW_POSITIONS, SAMPLE_CONTENTS, Layout, PerCacheSpec
from logitcache.errors import UsageError

# V views, N samples

GROUP = "labels.zarr"
PER_CACHE = "fixed"
"""Name of the receipt of the per-cache arrays: sample table, row map, and what the encoding was fitted to."""
SAMPLE_ARRAYS = ("sample_keys", "sample_targets", SAMPLE_CONTENTS)
"""The per-cache arrays of the sample table."""
ROW_ARRAYS = (ROW_OFFSETS, ROW_POSITIONS)
"""The per-cache arrays of the row map; all others belong to the encoding."""


@dataclasses.dataclass(frozen=True, order=True, slots=True)
class Block:
    """A view and a range of its rows: the unit of work, commit, hashing, transfer and repair."""

    view: int
    number: int

    @property
    def name(self) -> str:
        return f"{view_name(self.view)}/b{self.number:05d}"

    @classmethod
    def from_name(cls, name: str) -> Block:
        view, number = name.split("/")
        return cls(view_number(view), int(number[1:]))


def num_blocks(layout: Layout) -> int:
    """Blocks of the cache; a manifest may claim millions, so they are counted before they are listed."""
    return len(layout.views) * layout.blocks_per_view


def all_blocks(layout: Layout) -> Iterator[Block]:
    """Every block of a complete cache, view by view."""
    for view in layout.views:
        yield from view_blocks(layout, view)


def view_blocks(layout: Layout, view: int) -> Iterator[Block]:
    """Every block of one view."""
    for number in range(layout.blocks_per_view):
        yield Block(view, number)


def receipt_names(layout: Layout) -> Iterator[str]:
    """The receipts of a complete cache: that of the per-cache arrays, then one for each block."""
    yield PER_CACHE
    for block in all_blocks(layout):
        yield block.name


def is_receipt_name(layout: Layout, name: str) -> bool:
    """Whether a complete cache has a receipt of this name."""
    if name == PER_CACHE:
        return True
    if not re.fullmatch(r"v[0-9]{5,8}/b[0-9]{5,8}", name):
        return False
    block = Block.from_name(name)
    return block.name == name and block.view in layout.views and block.number < layout.blocks_per_view


def receipt_key(name: str) -> str:
    """Key of a receipt while the cache is open."""
    return f"receipts/{name}.json"


def view_name(view: int) -> str:
    """Name of a view in keys and in the index of receipts."""
    return f"v{view:05d}"


def view_number(name: str) -> int:
    """The view of a name from `view_name`."""
    return int(name[1:])


def view_receipts_key(view: int, sha256: str) -> str:
    """Key of the object with all receipts of a view. It contains the hash, so that an object is never replaced."""
    return f"receipts/{view_name(view)}/{sha256}.json"


def has_right_rows(layout: Layout, name: str, num_rows: int) -> bool:
    """Whether a receipt may state this number of rows; of sequences, the row map has the exact number."""
    if name == PER_CACHE:
        return num_rows == layout.num_samples
    if layout.sequence_rows is not None:
        return 1 <= num_rows <= layout.rows_per_block
    start = Block.from_name(name).number * layout.rows_per_block
    return num_rows == min(layout.rows_per_block, layout.num_samples - start)


def array_specs(layout: Layout, name: str) -> Mapping[str, ArraySpec | PerCacheSpec]:
    """The arrays that a receipt must list, by name."""
    return layout.fixed if name == PER_CACHE else layout.arrays


def object_key(layout: Layout, name: str, array: str) -> str:
    """Key of the object that holds one array of a receipt."""
    if name == PER_CACHE:
        chunk: Sequence[int] = [0] * len(layout.fixed[array].shape)
    else:
        block = Block.from_name(name)
        chunk = [block.view, block.number, *[0] * len(layout.arrays[array].row_shape)]
    return "/".join([GROUP, array, "c", *map(str, chunk)])


def object_limits(layout: Layout) -> dict[str, int]:
    """The most bytes that an object may take, by array; no more is read, whatever a receipt states."""
    rows = {
        name: chunk_limit(spec.dtype, (layout.rows_per_block, *spec.row_shape)) for name, spec in layout.arrays.items()
    }
    return rows | {name: chunk_limit(spec.dtype, spec.shape) for name, spec in layout.fixed.items()}


def chunk_limit(dtype: str, shape: Sequence[int]) -> int:
    """The most bytes that a stored chunk may take: the size of incompressible values after zstd."""
    num_bytes = math.prod(shape) * np.dtype(dtype).itemsize
    return num_bytes + num_bytes // 256 + 1024


def parse_views(text: str | None, held: range) -> range:
    """The views that "3", "0:2", ":2" or "2:" selects; all held views for None.

    Raises:
        UsageError: the cache doesn't hold these views.
    """
    if text is None:
        return held
    found = re.fullmatch(r"([0-9]{0,9})(:?)([0-9]{0,9})", text.strip())
    if found and (found[1] or found[2]):
        start = int(found[1] or held.start)
        stop = int(found[3] or held.stop) if found[2] else start + 1
        if held.start <= start < stop <= held.stop:
            return range(start, stop)
    raise UsageError(
        f"no views {text!r}: the cache holds {held.start}:{held.stop} (the last not included); expected for example "
        f"--views {held.start}:{held.stop}"
    )


def group_metadata(layout: Layout) -> dict[str, bytes]:
    """The `zarr.json` of the group and of each array, by key."""
    objects: dict[str, Any] = {}
    store = MemoryStore(objects)
    zarr.create_group(store, zarr_format=3)

    def create(
        name: str, dtype: str, shape: Sequence[int], chunks: Sequence[int], level: int, *, by_column: bool = False
    ) -> None:
        zarr.create_array(
            store,
            name=name,
            shape=tuple(shape),
            chunks=tuple(chunks),
            dtype=dtype,
            filters=[TransposeCodec(order=(0, 2, 1))] if by_column else [],
            serializer=BytesCodec(endian="little" if np.dtype(dtype).itemsize > 1 else None),
            compressors=[ZstdCodec(level=level, checksum=True)],
            fill_value=0,
            zarr_format=3,
            # A block of zeros must be an object too: its receipt has a hash of it.
            config={"write_empty_chunks": True},
        )

    for name, spec in layout.arrays.items():
        shape = (layout.num_views, layout.stored_rows, *spec.row_shape)
        chunks = (1, layout.rows_per_block, *spec.row_shape)
        create(name, spec.dtype, shape, chunks, spec.level, by_column=_is_by_column(spec))
    for name, once in layout.fixed.items():
        create(name, once.dtype, once.shape, [max(length, 1) for length in once.shape], PER_CACHE_LEVEL)
    return {f"{GROUP}/{key}": value.to_bytes() for key, value in objects.items()}


PER_CACHE_LEVEL = 3
"""zstd level of the per-cache arrays."""


def _is_by_column(spec: ArraySpec) -> bool:
    """Whether a chunk is stored column by column: most columns compress better than rows."""
    return len(spec.row_shape) == 1 and not spec.by_row


def encode_block(spec: ArraySpec, values: np.ndarray, rows_per_block: int) -> bytes:
    """The stored chunk of one array in one block, from its values (rows, *row_shape).

    The result is what the codecs in its `zarr.json` produce, without zarr's overhead; a test compares the two. A chunk
    always has `rows_per_block` rows: those after the end of the block are zeros.
    """
    chunk = np.zeros((rows_per_block, *spec.row_shape), dtype=spec.dtype)
    chunk[: len(values)] = values
    return _compress(chunk.T if _is_by_column(spec) else chunk, spec.level)


def encode_per_cache(values: np.ndarray) -> bytes:
    """The stored chunk of a per-cache array."""
    return _compress(values, PER_CACHE_LEVEL)


def encode_object(layout: Layout, name: str, array: str, values: np.ndarray) -> bytes:
    """The stored object of one array of a receipt."""
    if name == PER_CACHE:
        return encode_per_cache(values)
    return encode_block(layout.arrays[array], values, layout.rows_per_block)


def decode_rows(
    spec: ArraySpec, chunks: Sequence[bytes | memoryview], counts: Sequence[int], rows_per_block: int
) -> np.ndarray:
    """The rows (sum(counts), *row_shape) of several blocks, from their stored chunks.

    Args:
        spec: of the array.
        chunks: one for each block.
        counts: rows of each block.
        rows_per_block: rows of a chunk.

    Raises:
        ValueError: the bytes are no such chunk.
    """
    shape = (rows_per_block, *spec.row_shape)
    if max(counts, default=0) > rows_per_block:
        raise ValueError(f"{max(counts)} rows in a block of at most {rows_per_block}")
    for data in chunks:  # before memory is allocated for the rows
        _check_size(data, np.dtype(spec.dtype), shape)
    values = np.empty((sum(counts), *spec.row_shape), dtype=spec.dtype)
    by_column = _is_by_column(spec)
    if by_column:
        shape = shape[::-1]
    start = 0
    for data, count in zip(chunks, counts, strict=True):
        stored = _decompress(data, np.dtype(spec.dtype), shape)
        values[start : start + count] = (stored.T if by_column else stored)[:count]
        start += count
    return values


def decode_object(layout: Layout, name: str, array: str, data: bytes | memoryview, *, num_rows: int) -> np.ndarray:
    """The values of one array of a receipt, from its stored object; `num_rows` is what the receipt states.

    Raises:
        ValueError: the bytes are no such chunk.
    """
    if name == PER_CACHE:
        return _decompress(data, np.dtype(layout.fixed[array].dtype), tuple(layout.fixed[array].shape))
    return decode_rows(layout.arrays[array], [data], [num_rows], layout.rows_per_block)


def _compress(values: np.ndarray, level: int) -> bytes:
    little_endian = values.astype(values.dtype.newbyteorder("<"), copy=False)
    return bytes(Zstd(level=level, checksum=True).encode(np.ascontiguousarray(little_endian)))


def _decompress(data: bytes | memoryview, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    """The values of one zstd frame, which must have a checksum and decompress to this size.

    Raises:
        ValueError: another size, or a damaged frame.
    """
    _check_size(data, dtype, shape)
    values = np.empty(shape, dtype=dtype.newbyteorder("<"))
    if values.nbytes:
        try:
            Zstd().decode(data, out=values.reshape(-1).view(np.uint8))
        except RuntimeError as error:
            raise ValueError(str(error)) from None
    return values


def _check_size(data: bytes | memoryview, dtype: np.dtype, shape: tuple[int, ...]) -> None:
    declared, expected = declared_size(data, checksum=True), math.prod(shape) * dtype.itemsize
    if declared != expected:
        raise ValueError(f"a chunk of {declared} bytes; expected {expected}")


def declared_size(data: bytes | memoryview, *, checksum: bool) -> int | None:
    """The content size in the header of a zstd frame without a dictionary (RFC 8878, 3.1.1); None if it has none.

    Args:
        data: the frame.
        checksum: whether it must have a checksum; else it may.
    """
    if data[:4] != b"\x28\xb5\x2f\xfd" or len(data) < 14:
        return None
    descriptor = data[4]
    size_flag, single_segment = descriptor >> 6, descriptor >> 5 & 1
    has_checksum, dictionary = descriptor >> 2 & 1, descriptor & 3
    if dictionary or (checksum and not has_checksum):
        return None
    start = 5 if single_segment else 6
    length = (1 if single_segment else 0) if size_flag == 0 else 1 << size_flag
    size = int.from_bytes(data[start : start + length], "little") if length else None
    return size + 256 if size is not None and size_flag == 1 else size
