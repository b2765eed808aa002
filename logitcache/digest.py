"""Canonical JSON and SHA-256: the two things that every identity in logitcache is made of."""

from __future__ import annotations

import hashlib
import json
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
    header = canonical_json([array.dtype.newbyteorder("<").str, list(array.shape)])
    values = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
    digest = hashlib.sha256(header)
    digest.update(values.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()
