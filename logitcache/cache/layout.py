"""Where things lie in a cache, and how one block's array becomes one Zarr object.

The store is Zarr v3 with standard codecs only: transpose (each stored column contiguous, which zstd likes),
bytes, zstd with checksum. One chunk is one block, so every object is written whole by one writer and read whole.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import zarr
from numcodecs.zstd import Zstd
from zarr.codecs import BytesCodec, TransposeCodec, ZstdCodec
from zarr.storage import MemoryStore

from logitcache.arrays import ArraySpec
from logitcache.cache.manifest import FixedSpec, Layout
from logitcache.errors import UsageError

# V views, N samples

GROUP = "labels.zarr"
FIXED = "fixed"
"""Name of the receipt of the arrays that are stored once: the sample table, and what an encoding was fitted to."""


@dataclasses.dataclass(frozen=True, order=True, slots=True)
class Block:
    """A view and a range of its rows: the unit of work, commit, hashing, transfer and repair."""

    view: int
    number: int

    @property
    def name(self) -> str:
        return f"v{self.view:05d}/b{self.number:05d}"

    @property
    def receipt_key(self) -> str:
        return f"receipts/{self.name}.json"

    @classmethod
    def from_name(cls, name: str) -> Block:
        view, number = name.split("/")
        return cls(int(view[1:]), int(number[1:]))


FIXED_RECEIPT_KEY = f"receipts/{FIXED}.json"


def all_blocks(layout: Layout) -> Iterator[Block]:
    """Every block that a cache is to hold, view by view."""
    for view in layout.views:
        for number in range(blocks_per_view(layout)):
            yield Block(view, number)


def num_blocks(layout: Layout) -> int:
    """How many these are; a stranger's manifest may claim millions, so they are counted before they are named."""
    return len(layout.views) * blocks_per_view(layout)


def is_block(layout: Layout, name: str) -> bool:
    """Whether a name is that of a block which a cache is to hold."""
    if not re.fullmatch(r"v[0-9]{5,8}/b[0-9]{5,8}", name):
        return False
    block = Block.from_name(name)
    return block.name == name and block.view in layout.views and block.number < blocks_per_view(layout)


def chunk_limit(dtype: str, shape: Sequence[int]) -> int:
    """Bytes that a chunk may take when it is stored: what zstd makes of values that can't be compressed."""
    num_bytes = math.prod(shape) * np.dtype(dtype).itemsize
    return num_bytes + num_bytes // 256 + 1024


def parse_views(text: str | None, held: range) -> range:
    """The views that "3", "0:2", ":2" or "2:" names, of those that are held; all of them for None.

    Raises:
        UsageError: no such views.
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


def blocks_per_view(layout: Layout) -> int:
    """Blocks in one view."""
    return -(-layout.num_samples // layout.rows_per_block)


def block_rows(layout: Layout, block: Block) -> range:
    """The rows that a block holds; the last block of a view may be shorter."""
    start = block.number * layout.rows_per_block
    return range(start, min(start + layout.rows_per_block, layout.num_samples))


def block_key(array: str, spec: ArraySpec, block: Block) -> str:
    """Key of the object that holds one block of an array."""
    return "/".join([GROUP, array, "c", str(block.view), str(block.number), *("0" for _ in spec.row_shape)])


SAMPLE_ARRAYS = ("sample_keys", "sample_targets", "sample_contents")
"""The arrays of the sample table; what an encoding was fitted to lies beside them."""


def fixed_spec(values: np.ndarray) -> FixedSpec:
    """How the manifest describes an array that is stored once."""
    return FixedSpec(dtype=values.dtype.name, shape=list(values.shape))


def fixed_array_key(array: str, spec: FixedSpec) -> str:
    """Key of the one object of a fixed array."""
    return "/".join([GROUP, array, "c", *["0"] * len(spec.shape)])


def group_metadata(layout: Layout) -> dict[str, bytes]:
    """The `zarr.json` of the group and of each array, by key."""
    objects = _Objects()
    zarr.create_group(objects.store, zarr_format=3)
    for name, spec in layout.arrays.items():
        objects.create_rows(name, spec, (layout.num_views, layout.num_samples), layout.rows_per_block)
    for name, fixed in layout.fixed.items():
        objects.create(name, fixed.dtype, tuple(fixed.shape), tuple(max(length, 1) for length in fixed.shape))
    return objects.dump()


def encode_block(spec: ArraySpec, values: np.ndarray, rows_per_block: int) -> bytes:
    """One block of one array, (rows, *row_shape), as the bytes of its chunk.

    What the codecs of its `zarr.json` would make of it, without the machinery; a test holds it to zarr. A chunk is
    always whole: a last block that is shorter is filled up with zeros.
    """
    chunk = np.zeros((rows_per_block, *spec.row_shape), dtype=spec.dtype)
    chunk[: len(values)] = values
    stored = chunk.T if chunk.ndim == COLUMNS_FIRST_NDIM else chunk
    return bytes(Zstd(level=spec.level, checksum=True).encode(np.ascontiguousarray(_little_endian(stored))))


def decode_rows(
    spec: ArraySpec, chunks: Sequence[bytes | memoryview], num_rows: int, rows_per_block: int
) -> np.ndarray:
    """The rows (num_rows, *row_shape) of consecutive blocks, from their chunks' bytes.

    Raises:
        ValueError, RuntimeError: bytes that are no such chunk.
    """
    shape = (rows_per_block, *spec.row_shape)
    for data in chunks:
        _check_declared_size(data, np.dtype(spec.dtype), shape)
    values = np.empty((num_rows, *spec.row_shape), dtype=spec.dtype)
    if len(shape) == COLUMNS_FIRST_NDIM:
        shape = shape[::-1]
    for number, data in enumerate(chunks):
        stored = _decompress(data, np.dtype(spec.dtype), shape)
        rows = values[number * rows_per_block : (number + 1) * rows_per_block]
        rows[...] = (stored.T if stored.ndim == COLUMNS_FIRST_NDIM else stored)[: len(rows)]
    return values


COLUMNS_FIRST_NDIM = 2
"""Dimensions, without the view's, of a chunk whose columns are stored one after the other.

zstd finds more in a column of one kind than across a row.
"""


def _little_endian(values: np.ndarray) -> np.ndarray:
    return values.astype(values.dtype.newbyteorder("<"), copy=False)


def encode_fixed(values: np.ndarray) -> bytes:
    """A fixed array as the bytes of its single chunk."""
    return bytes(Zstd(level=3, checksum=True).encode(np.ascontiguousarray(_little_endian(values))))


def decode_fixed(spec: FixedSpec, data: bytes | memoryview) -> np.ndarray:
    """A fixed array from the bytes of its chunk.

    Raises:
        ValueError, RuntimeError: bytes that are no such chunk.
    """
    return _decompress(data, np.dtype(spec.dtype), tuple(spec.shape))


def decode_object(layout: Layout, name: str, array: str, data: bytes | memoryview) -> np.ndarray:
    """The values of one array in a block, or of a fixed array where the name is `FIXED`, from its object's bytes.

    Raises:
        ValueError, RuntimeError: bytes that are no such chunk.
    """
    if name == FIXED:
        return decode_fixed(layout.fixed[array], data)
    num_rows = len(block_rows(layout, Block.from_name(name)))
    return decode_rows(layout.arrays[array], [data], num_rows, layout.rows_per_block)


def _decompress(data: bytes | memoryview, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    """The values of one zstd frame, which must be of just this size and have a checksum.

    Raises:
        ValueError: another size; it is what the frame declares, so nothing is decompressed to find out.
        RuntimeError: a damaged frame.
    """
    _check_declared_size(data, dtype, shape)
    values = np.empty(shape, dtype=dtype.newbyteorder("<"))
    if values.nbytes:
        Zstd().decode(data, out=values.reshape(-1).view(np.uint8))
    return values


def _check_declared_size(data: bytes | memoryview, dtype: np.dtype, shape: tuple[int, ...]) -> None:
    """Before memory is asked for.

    Raises:
        ValueError: a frame of another size than a chunk of this shape.
    """
    declared, expected = _declared_size(data), math.prod(shape) * dtype.itemsize
    if declared != expected:
        raise ValueError(f"a chunk of {declared} bytes; expected {expected}")


def _declared_size(data: bytes | memoryview) -> int | None:
    """The content size that a zstd frame with a checksum and without a dictionary declares (RFC 8878, 3.1.1)."""
    if data[:4] != b"\x28\xb5\x2f\xfd" or len(data) < 14:
        return None
    descriptor = data[4]
    size_flag, single_segment, checksum, dictionary = (
        descriptor >> 6,
        descriptor >> 5 & 1,
        descriptor >> 2 & 1,
        descriptor & 3,
    )
    if not checksum or dictionary:
        return None
    start = 5 if single_segment else 6
    length = (1 if single_segment else 0) if size_flag == 0 else 1 << size_flag
    size = int.from_bytes(data[start : start + length], "little") if length else None
    return size + 256 if size is not None and size_flag == 1 else size


class _Objects:
    """The metadata of a Zarr store in memory: zarr writes it, and is never asked to read any."""

    def __init__(self) -> None:
        self._objects: dict[str, Any] = {}
        self.store = MemoryStore(self._objects)

    def create_rows(
        self, name: str, spec: ArraySpec, views_and_samples: tuple[int, int], rows_per_block: int
    ) -> zarr.Array[Any]:
        """An array with an entry for every row, a chunk for every block."""
        shape, chunks = (*views_and_samples, *spec.row_shape), (1, rows_per_block, *spec.row_shape)
        return self.create(name, spec.dtype, shape, chunks, level=spec.level)

    def create(
        self, name: str, dtype: str, shape: tuple[int, ...], chunks: tuple[int, ...], *, level: int = 3
    ) -> zarr.Array[Any]:
        ndim = len(shape)
        columns_first = [TransposeCodec(order=(0, 2, 1))] if ndim == 1 + COLUMNS_FIRST_NDIM else []
        return zarr.create_array(
            self.store,
            name=name,
            shape=shape,
            chunks=chunks,
            dtype=dtype,
            filters=columns_first,
            serializer=BytesCodec(endian="little" if np.dtype(dtype).itemsize > 1 else None),
            compressors=[ZstdCodec(level=level, checksum=True)],
            fill_value=0,
            zarr_format=3,
            # A block of nothing but zeros must be an object too, or its receipt would have nothing to hash.
            config={"write_empty_chunks": True},
        )

    def dump(self) -> dict[str, bytes]:
        return {f"{GROUP}/{key}": value.to_bytes() for key, value in self._objects.items()}
