"""Values other than logits, such as features and attention maps, including a constant per row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from logitcache.arrays import ArraySpec
from logitcache.encodings.protocol import Encoding
from logitcache.errors import UsageError

# B batch, D values of a row

LARGEST = 2.0**126
"""Largest magnitude; the range of larger values would overflow float32."""
TOP_EXPONENT = 15
"""float16 rows are scaled so that their largest value is between 2^14 and 2^15, well below the limit of 65 504."""
LOWEST_EXPONENT = -112
STEPS = 255


@dataclass(frozen=True, kw_only=True)
class Values(Encoding):
    """All D values of a row.

    float32 is exact. float16 divides each row by a power of two, so that it can't overflow; the error is at most 2^-11
    of the value, or 2^-38 of the row's largest. uint8 is affine with 256 steps from the row's lowest value to its
    largest; the error is at most half a step.
    """

    name: ClassVar[str] = "values"
    holds_masks: ClassVar[bool] = False
    keeps_constants: ClassVar[bool] = True
    largest: ClassVar[float] = LARGEST

    dtype: str = "float16"
    """"float32", "float16" or "uint8"."""

    def __post_init__(self) -> None:
        if self.dtype not in ("float32", "float16", "uint8"):
            raise UsageError(f"dtype is 'float32', 'float16' or 'uint8', not {self.dtype!r}")

    def arrays(self, num_classes: int) -> dict[str, ArraySpec]:
        arrays = {"values": ArraySpec(dtype=self.dtype, row_shape=(num_classes,))}
        if self.dtype == "float16":
            arrays["exponent"] = ArraySpec(dtype="int8", row_shape=())
        if self.dtype == "uint8":
            arrays |= {name: ArraySpec(dtype="float32", row_shape=()) for name in ("lowest", "step")}
        return arrays

    def encode(self, logits_BC: Tensor, *, view: int = 0, start: int = 0) -> dict[str, Tensor]:
        del view, start
        values_BD = logits_BC
        if self.dtype == "float32":
            return {"values": values_BD}
        if self.dtype == "float16":
            exponent_B = torch.frexp(values_BD.abs().amax(dim=1)).exponent - TOP_EXPONENT
            exponent_B = exponent_B.clamp(LOWEST_EXPONENT, -LOWEST_EXPONENT)
            scaled_BD = values_BD * _power_of_two(-exponent_B)[:, None]
            return {"values": scaled_BD.to(torch.float16), "exponent": exponent_B.to(torch.int8)}
        lowest_B = values_BD.amin(dim=1)
        step_B = (values_BD.amax(dim=1) - lowest_B) / STEPS
        step_B = torch.where(step_B > 0, step_B, 1.0)
        codes_BD = ((values_BD - lowest_B[:, None]) / step_B[:, None]).round_().clamp_(0, STEPS)
        return {"values": codes_BD.to(torch.uint8), "lowest": lowest_B, "step": step_B}

    def decode(self, encoded: Mapping[str, Tensor], num_classes: int) -> Tensor:
        values_BD = encoded["values"].float()
        if self.dtype == "float16":
            exponent_B = encoded["exponent"].clamp(LOWEST_EXPONENT, -LOWEST_EXPONENT)
            values_BD = values_BD * _power_of_two(exponent_B)[:, None]
        elif self.dtype == "uint8":
            values_BD = values_BD * encoded["step"][:, None] + encoded["lowest"][:, None]
        return values_BD.clamp(-LARGEST, LARGEST)  # finite, whatever an untrusted cache holds

    def refused(self, logits_BC: Tensor) -> Tensor:
        # Comparisons with NaN are false, so this also finds NaN.
        return ~(logits_BC.abs().amax(dim=1) <= LARGEST)


def _power_of_two(exponent_B: Tensor) -> Tensor:
    """Exact powers of two, float32 (B,), for exponents from -126 to 127; `exp2` can be off by one bit."""
    return ((exponent_B.to(torch.int32) + 127) << 23).view(torch.float32)
