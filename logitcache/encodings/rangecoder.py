"""Range coding: symbols in as many bits as their probabilities are worth, all rows of a batch at the same time.

Martin 1979, "Range encoding: an algorithm for removing redundancy from a digitized message". All arithmetic is in
whole numbers, so any device decodes the same symbols.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

# B rows, G bytes of a row, S symbols

TOTAL_BITS = 16
TOTAL = 2**TOTAL_BITS
"""Frequencies of a symbol's alternatives add up to this."""
LOW_BITS = 32
BYTES = LOW_BITS // 8 + 1
"""Bytes of the interval."""
SMALLEST, WHOLE = 2**LOW_BITS, 2 ** (LOW_BITS + 8)
"""The width of the interval is kept between these."""
MOST_BYTES = 2
"""Bytes that a symbol can take: it divides the width by at most `TOTAL`."""


def range_encoded(intervals: Iterable[tuple[Tensor, Tensor]], num_rows: int, device: torch.device) -> Tensor:
    """Bytes of each row, uint8 (B, G), with zeros after the end of shorter rows.

    Args:
        intervals: for each symbol, the sum of the frequencies of all smaller ones and its own frequency, int64 (B,).
    """
    low_B = torch.zeros(num_rows, dtype=torch.int64, device=device)
    width_B = torch.full_like(low_B, WHOLE - 1)
    place_B = torch.ones_like(low_B)
    intervals = list(intervals)
    # One byte in front, for a carry that never reaches it.
    bytes_BG = low_B.new_zeros(num_rows, 1 + MOST_BYTES * len(intervals) + BYTES)
    for start_B, size_B in intervals:
        unit_B = width_B >> TOTAL_BITS
        low_B = low_B + unit_B * start_B
        width_B = unit_B * size_B
        _carry(bytes_BG, place_B, low_B)
        low_B = low_B % WHOLE
        for _ in range(MOST_BYTES):
            bytes_BG.scatter_(1, place_B[:, None], (low_B >> LOW_BITS)[:, None])
            is_narrow_B = width_B < SMALLEST
            place_B = place_B + is_narrow_B
            low_B = torch.where(is_narrow_B, (low_B % SMALLEST) << 8, low_B)
            width_B = torch.where(is_narrow_B, width_B << 8, width_B)
    # Of the numbers in the interval, the one with the most zeros at its end.
    last_B = low_B
    for kept in reversed(range(BYTES)):
        unit = 2 ** (8 * (BYTES - kept))
        rounded_B = (low_B + unit - 1) // unit * unit
        last_B = torch.where(rounded_B < low_B + width_B, rounded_B, last_B)
    _carry(bytes_BG, place_B, last_B)
    for number in range(BYTES):
        byte_B = (last_B >> (LOW_BITS - 8 * number)) % 256
        bytes_BG.scatter_(1, (place_B + number)[:, None], byte_B[:, None])
    columns_GB = bytes_BG.T.contiguous()
    for column in range(len(columns_GB) - 1, 0, -1):
        columns_GB[column - 1] += columns_GB[column] >> 8
    return (columns_GB[1:] % 256).to(torch.uint8).T


def _carry(bytes_BG: Tensor, place_B: Tensor, low_B: Tensor) -> None:
    bytes_BG.scatter_add_(1, place_B[:, None] - 1, (low_B >= WHOLE).long()[:, None])


class RangeDecoder:
    """Reads one symbol of every row at a time. Any bytes give some symbols."""

    def __init__(self, bytes_BG: Tensor) -> None:
        self._bytes_BG = F.pad(bytes_BG.long(), (0, BYTES))
        self._code_B = self._bytes_BG.new_zeros(len(bytes_BG))
        for number in range(BYTES):
            self._code_B = (self._code_B << 8) + self._bytes_BG[:, number]
        self._width_B = torch.full_like(self._code_B, WHOLE - 1)
        self._place_B = torch.full_like(self._code_B, BYTES)

    def next(self, symbols: Tensor, starts: Tensor, table_B: Tensor) -> Tensor:
        """The next symbol of each row, int64 (B,).

        Args:
            symbols: (tables, TOTAL): the symbol at each number below the total.
            starts: int64 (tables, S + 1): sums of the frequencies of all smaller symbols.
            table_B: int64 (B,): which table of frequencies each row uses.
        """
        unit_B = self._width_B >> TOTAL_BITS
        symbol_B = symbols[table_B, (self._code_B // unit_B).clamp_(max=TOTAL - 1)].long()
        start_B = starts[table_B, symbol_B]
        code_B = self._code_B - unit_B * start_B
        width_B = unit_B * (starts[table_B, symbol_B + 1] - start_B)
        for _ in range(MOST_BYTES):
            is_narrow_B = width_B < SMALLEST
            byte_B = self._bytes_BG.gather(1, self._place_B[:, None])[:, 0]
            code_B = torch.where(is_narrow_B, (code_B << 8) + byte_B, code_B)
            width_B = torch.where(is_narrow_B, width_B << 8, width_B)
            self._place_B = (self._place_B + is_narrow_B).clamp_(max=self._bytes_BG.shape[1] - 1)
        # In damaged rows, the code can lie outside the interval.
        self._code_B, self._width_B = torch.minimum(code_B, width_B - 1), width_B
        return symbol_B
