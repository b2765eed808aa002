"""How an array is described, in an encoding and in a manifest."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ArraySpec:
    """One array of an encoding: what is stored for a row."""

    dtype: str
    """NumPy name, such as "float16" or "uint16"."""
    row_shape: tuple[int, ...]
    """Shape of a single row's entry; () for one number a row."""
    level: int = 3
    """Of zstd."""
    by_row: bool = False
    """Whether a chunk is stored row by row. By default it is column by column; by row is smaller where rows end with
    different numbers of zeros."""
