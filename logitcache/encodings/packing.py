"""Several small signed integers per byte, as digits of a mixed-radix number."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# B batch, R numbers, G bytes


LARGEST = 32_767
"""The largest limit; a number of this range takes two bytes."""


class MixedRadix:
    """Packs numbers in [-limit, limit]: adjacent numbers share a byte while the product of their ranges fits.

    An entropy coder spends at least one bit per symbol. Coefficients that are mostly zero carry less information than
    that, so several of them form one symbol. A number with more than 256 values takes two bytes, the low byte first.
    """

    def __init__(self, limits: Sequence[int]) -> None:
        byte, size = -1, 257
        bytes_R, divisors_R, bases_R, wide_W, high_W = [], [], [], [], []
        for number, limit in enumerate(limits):
            base = 2 * int(limit) + 1
            if not 1 <= limit <= LARGEST:
                raise ValueError(f"a limit is between 1 and {LARGEST}, not {limit}")
            if size * min(base, 256) > 256:
                byte, size = byte + 1, 1
            bytes_R.append(byte)
            divisors_R.append(size)
            bases_R.append(min(base, 256))
            size *= base
            if base > 256:
                byte, size = byte + 1, 257
                wide_W.append(number)
                high_W.append(byte)
        self.num_bytes = byte + 1
        self._byte_R = torch.tensor(bytes_R)
        self._divisor_R = torch.tensor(divisors_R, dtype=torch.float32)
        self._base_R = torch.tensor(bases_R, dtype=torch.float32)
        self._limit_R = torch.tensor([float(limit) for limit in limits])
        self._wide_W = torch.tensor(wide_W, dtype=torch.int64)
        self._high_W = torch.tensor(high_W, dtype=torch.int64)
        self._number_RV: Tensor | None = None
        """The number for each value of its byte, int8 (R, 256); None if a number takes two bytes."""
        if not wide_W:
            digits_RV = torch.arange(256.0).div(self._divisor_R[:, None]).floor_().remainder_(self._base_R[:, None])
            self._number_RV = digits_RV.sub_(self._limit_R[:, None]).to(torch.int8)

    def to(self, device: torch.device) -> MixedRadix:
        """The packing with its tensors on another device."""
        moved = object.__new__(MixedRadix)
        for name, value in vars(self).items():
            setattr(moved, name, value.to(device) if isinstance(value, Tensor) else value)
        return moved

    def pack(self, numbers_BR: Tensor) -> Tensor:
        """Pack whole float32 numbers within the limits, (B, R), into uint8 (B, G)."""
        packed_BG = numbers_BR.new_zeros(len(numbers_BR), self.num_bytes)
        digits_BR = numbers_BR + self._limit_R
        if len(self._wide_W):
            high_BW = (digits_BR[:, self._wide_W] / 256).floor_()
            digits_BR[:, self._wide_W] -= 256 * high_BW
            packed_BG[:, self._high_W] = high_BW
        # Every sum is a whole number below 256, exact in float32 in any order.
        packed_BG.index_add_(1, self._byte_R, digits_BR * self._divisor_R)
        return packed_BG.to(torch.uint8)

    def unpack(self, packed_BG: Tensor) -> Tensor:
        """Unpack bytes into float32 numbers (B, R)."""
        # Quotients of whole numbers below 256 are either whole or at least 1/256 away: floor is exact.
        digits_BR = packed_BG.float().index_select(1, self._byte_R).div_(self._divisor_R).floor_()
        digits_BR.sub_(digits_BR.div(self._base_R).floor_().mul_(self._base_R))
        if len(self._wide_W):
            digits_BR[:, self._wide_W] += 256 * packed_BG[:, self._high_W].float()
        return digits_BR.sub_(self._limit_R)

    def unpack_int8(self, packed_BG: Tensor) -> Tensor:
        """Unpack bytes into int8 numbers (B, R), if no limit is above 127; faster than `unpack` on a CPU.

        The numbers lie in memory as (R, B).
        """
        if self._number_RV is None:
            return self.unpack(packed_BG).to(torch.int8)
        bytes_RB = packed_BG.T.index_select(0, self._byte_R)
        return self._number_RV.gather(1, bytes_RB.long()).T
