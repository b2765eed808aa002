"""Canonical JSON and SHA-256: the two things that every identity in logitcache is made of."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

PENDING = "pending:"
"""Before the hash that identifies a dataset whose contents are still being read."""


def canonical_json(value: Any) -> bytes:
    """The one UTF-8 spelling of a JSON value: keys sorted, no spaces, no NaN.

    Raises:
        ValueError: the value holds NaN or infinity, which JSON can't say.
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def sha256_hex(data: bytes | memoryview) -> str:
    """SHA-256 of bytes, 64 hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def json_digest(value: Any) -> str:
    """SHA-256 of a value's canonical JSON."""
    return sha256_hex(canonical_json(value))


def array_digest(array: np.ndarray) -> str:
    """SHA-256 of what an array says: dtype, shape and little-endian row-major values."""
    digest = ArrayDigest(array.dtype.newbyteorder("<").str, array.shape)
    digest.update(array)
    return digest.hexdigest()


class ArrayDigest:
    """`array_digest` of an array that arrives in parts.

    Args:
        dtype: of the values, as NumPy spells it, little-endian.
        shape: of the whole array.
    """

    def __init__(self, dtype: str, shape: Sequence[int]) -> None:
        self._dtype = dtype
        self._digest = hashlib.sha256(canonical_json([dtype, list(shape)]))

    def update(self, rows: np.ndarray) -> None:
        """Add the next rows."""
        self._digest.update(np.ascontiguousarray(rows, dtype=self._dtype).reshape(-1).view(np.uint8).data)

    def hexdigest(self) -> str:
        """The SHA-256 of all rows."""
        return self._digest.hexdigest()
