"""Reading untrusted files: bounded sizes, and pickles without code."""

from __future__ import annotations

import functools
import io
import math
import pickle
import pickletools
import re
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from logitcache.cache.layout import declared_size
from logitcache.errors import InvalidSource, LogitCacheError, UsageError

MAX_PICKLE_BYTES = 2**24
"""Of one pickle, without the storages of tensors."""
MAX_FILE_BYTES = 2**31
"""Of a file that is read whole, decompressed."""


@contextmanager
def reading(file: Path | str) -> Iterator[None]:
    """Turn the errors of damaged or hostile files into one that names the file.

    Raises:
        InvalidSource: any error in the block other than one of logitcache's.
    """
    try:
        yield
    except LogitCacheError:
        raise
    except FileNotFoundError:
        raise UsageError(f"{file} does not exist") from None
    except Exception as error:  # parsers of hostile files raise anything
        raise InvalidSource(f"{file} can't be read: {type(error).__name__}: {error}") from error


def read_bytes(file: Path, limit: int = MAX_FILE_BYTES) -> bytes:
    """The content of a regular file.

    Raises:
        InvalidSource: it is larger than the limit, or no regular file.
    """
    if not file.is_file():
        raise InvalidSource(f"{file} is not a regular file")
    if file.stat().st_size > limit:
        raise InvalidSource(f"{file} has {file.stat().st_size:,} bytes; at most {limit:,} are read")
    return file.read_bytes()


def matching(folder: Path, pattern: str) -> list[tuple[re.Match[str], Path]]:
    """The regular files or folders directly in a folder whose whole name matches.

    Raises:
        UsageError: the folder does not exist.
    """
    if not folder.is_dir():
        raise UsageError(f"{folder} is not a folder")
    return [(match, path) for path in sorted(folder.iterdir()) if (match := re.fullmatch(pattern, path.name))]


def decompress_zstd(data: bytes, limit: int = MAX_FILE_BYTES) -> bytes:
    """One zstd frame, which must state its size.

    Raises:
        ValueError: no such frame, or a size above the limit.
    """
    from numcodecs.zstd import Zstd

    size = declared_size(data, checksum=False)
    if size is None:
        raise ValueError("not a zstd frame that states its content size and needs no dictionary")
    if size > limit:
        raise ValueError(f"a zstd frame of {size:,} bytes; at most {limit:,} are read")
    out = np.empty(size, dtype=np.uint8)
    Zstd().decode(data, out=out)
    return out.tobytes()


def inflate(data: bytes, limit: int = MAX_PICKLE_BYTES, window: int = zlib.MAX_WBITS) -> bytes:
    """A zlib stream, or with zlib's window bits of 31 a gzip stream.

    Raises:
        ValueError: truncated, or longer than the limit.
    """
    stream = zlib.decompressobj(window)
    content = stream.decompress(data, limit)
    if not stream.eof:
        raise ValueError(f"a zlib stream that is truncated or longer than {limit:,} bytes")
    return content


# Pickles. What a pickle names is looked up here and nowhere else; the classes below take the place of numpy's and
# torch's own, so that a pickle can make arrays of numbers and nothing else.


class _DType:
    """In place of `numpy.dtype`."""

    def __init__(self, spec: str, align: bool = False, copy: bool = False) -> None:
        if not isinstance(spec, str) or not re.fullmatch(r"[biuf][1248]", spec):
            raise pickle.UnpicklingError(f"an array of type {spec!r:.40}; expected numbers")
        self.dtype = np.dtype(spec)

    def __setstate__(self, state: tuple) -> None:
        if state[1] == ">":
            self.dtype = self.dtype.newbyteorder(">")


class _Array:
    """In place of `numpy.ndarray`: holds the array as `values`."""

    values: np.ndarray

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, fortran, data = state
        if not isinstance(dtype, _DType) or not isinstance(data, bytes):
            raise pickle.UnpicklingError("an array without numbers")
        values = np.frombuffer(data, dtype.dtype)
        self.values = values.reshape(shape, order="F" if fortran else "C")


def _reconstruct(kind: type, shape: tuple, typecode: bytes) -> _Array:
    if kind is not _Array:
        raise pickle.UnpicklingError("an array of another class than numpy.ndarray")
    return _Array()


def _frombuffer(data: bytes | bytearray, dtype: _DType, shape: tuple, order: str) -> _Array:
    """In place of numpy's function for arrays of pickle protocol 5."""
    if not isinstance(dtype, _DType) or not isinstance(data, bytes | bytearray):
        raise pickle.UnpicklingError("an array without numbers")
    array = _Array()
    array.values = np.frombuffer(data, dtype.dtype).reshape(shape, order="F" if order == "F" else "C")
    return array


def _scalar(dtype: _DType, data: bytes) -> int | float | bool:
    if not isinstance(dtype, _DType) or not isinstance(data, bytes):
        raise pickle.UnpicklingError("a numpy scalar that is no number")
    value: int | float | bool = np.frombuffer(data, dtype.dtype, count=1)[0].item()
    return value


def _encode(text: str, encoding: str) -> bytes:
    """In place of `_codecs.encode`, with which protocol 2 writes bytes."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"text in the encoding {encoding!r:.40}")
    return text.encode("latin1")


PLAIN: dict[str, Any] = {}
"""What pickles of lists, dicts, strings and numbers may name: nothing."""
ARRAYS: dict[str, Any] = {"_codecs.encode": _encode, "numpy.dtype": _DType, "numpy.ndarray": _Array} | {
    f"numpy.{core}.multiarray.{name}": stand_in
    for core in ("core", "_core")
    for name, stand_in in (("_reconstruct", _reconstruct), ("scalar", _scalar))
}
ARRAYS |= {f"numpy.{core}.numeric._frombuffer": _frombuffer for core in ("core", "_core")}
"""What pickles of numpy arrays and scalars may name, and what is used in its place."""
_DTYPES = {
    "Half": torch.float16,
    "BFloat16": torch.bfloat16,
    "Float": torch.float32,
    "Double": torch.float64,
    "Bool": torch.bool,
    "Byte": torch.uint8,
    "Char": torch.int8,
    "Short": torch.int16,
    "Int": torch.int32,
    "Long": torch.int64,
}


class _Unpickler(pickle.Unpickler):
    def __init__(self, data: bytes, names: dict[str, Any], storage: Callable[[Any], Any] | None) -> None:
        super().__init__(io.BytesIO(data))
        self._names, self._storage = names, storage

    def find_class(self, module: str, name: str, /) -> Any:
        try:
            return self._names[f"{module}.{name}"]
        except KeyError:
            raise pickle.UnpicklingError(
                f"the pickle names {module}.{name}, which is no part of this format and could run code; nothing was run"
            ) from None

    def persistent_load(self, pid: Any, /) -> Any:
        if self._storage is None:
            raise pickle.UnpicklingError("a reference to data outside of the pickle")
        return self._storage(pid)


def unpickle(data: bytes, names: dict[str, Any] = PLAIN, storage: Callable[[Any], Any] | None = None) -> Any:
    """A value from a pickle that names nothing but what is listed.

    Args:
        data: one pickle.
        names: what it may name, as "module.name", and what is used in its place.
        storage: the data of a tensor by its persistent id; None allows none.

    Raises:
        pickle.UnpicklingError, ValueError: it names something else, is too large, or is damaged.
    """
    if len(data) > MAX_PICKLE_BYTES:
        raise ValueError(f"a pickle of {len(data):,} bytes; at most {MAX_PICKLE_BYTES:,} are read")
    for code, argument, _ in pickletools.genops(data):
        # A memo is an array: a large index allocates memory.
        if code.name in ("PUT", "BINPUT", "LONG_BINPUT") and (argument is None or argument > len(data)):
            raise ValueError("a pickle with an invalid memo")
    return _Unpickler(data, names, storage).load()


def load_torch(data: bytes, names: dict[str, Any] = PLAIN) -> Any:
    """A value that `torch.save` wrote, with tensors on the CPU.

    Args:
        data: the content of the file, a zip archive.
        names: what its pickle may name, besides tensors.

    Raises:
        pickle.UnpicklingError, ValueError, zipfile.BadZipFile: as `unpickle`, or a damaged archive.
    """
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
            raise ValueError("a compressed archive; torch.save stores without compression")
        if sum(member.file_size for member in archive.infolist()) > len(data):
            raise ValueError("members overlap")
        pickles = [name for name in archive.namelist() if re.fullmatch(r"[^/]+/data\.pkl", name)]
        if len(pickles) != 1:
            raise ValueError("no archive of torch.save: it has no data.pkl")
        root = pickles[0].removesuffix("data.pkl")
        if f"{root}byteorder" in archive.namelist() and archive.read(f"{root}byteorder") != b"little":
            raise ValueError("big-endian tensors")

        @functools.cache
        def member(key: str) -> bytearray:
            return bytearray(archive.read(f"{root}data/{key}"))

        def storage(pid: Any) -> tuple[bytearray, torch.dtype | None]:
            kind, dtype, key, _, _ = pid
            if kind != "storage" or not isinstance(key, str) or not key.isdecimal():
                raise pickle.UnpicklingError("an unknown kind of storage")
            return member(key), dtype

        return unpickle(archive.read(pickles[0]), names | _TENSORS, storage)


def _tensor(storage: tuple, offset: int, shape: tuple, strides: tuple, *rest: Any) -> Tensor:
    """In place of `torch._utils._rebuild_tensor_v2` and `_v3`."""
    data, dtype = storage
    dtype = rest[2] if dtype is None and len(rest) > 2 else dtype
    if not isinstance(dtype, torch.dtype):
        raise pickle.UnpicklingError("a tensor of an unknown type")
    contiguous = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    if min(shape, default=1) < 1 or any(
        size > 1 and found != right for size, found, right in zip(shape, strides, contiguous, strict=True)
    ):
        raise pickle.UnpicklingError(f"a tensor of shape {shape} and strides {strides}; expected a contiguous one")
    count = math.prod(shape)
    if offset < 0 or (offset + count) * dtype.itemsize > len(data):
        raise pickle.UnpicklingError("a tensor beyond its storage")
    return torch.frombuffer(data, dtype=dtype, count=count, offset=offset * dtype.itemsize).reshape(shape)


_TENSORS: dict[str, Any] = (
    {f"torch.{name}Storage": dtype for name, dtype in _DTYPES.items()}
    | {"torch.storage.UntypedStorage": None, "torch.uint16": torch.uint16, "torch.uint32": torch.uint32}
    | {"torch._utils._rebuild_tensor_v2": _tensor, "torch._utils._rebuild_tensor_v3": _tensor}
    | {"collections.OrderedDict": dict}
)
