"""Every logit, in a float of 16 or 32 bits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from logitcache.encodings.protocol import ArraySpec, Encoding
from logitcache.errors import UsageError

# B batch, C classes


@dataclass(frozen=True, kw_only=True)
class Dense(Encoding):
    """All C logits of a row: exact in float32; in float16 stored as distances from the row's largest."""

    name: ClassVar[str] = "dense"

    dtype: str = "float16"
    """"float16" or "float32"."""

    def __post_init__(self) -> None:
        if self.dtype not in ("float16", "float32"):
            raise UsageError(f"Dense: dtype is 'float16' or 'float32', not {self.dtype!r}")

    def arrays(self, num_classes: int) -> dict[str, ArraySpec]:
        return {"logits": ArraySpec(dtype=self.dtype, row_shape=(num_classes,))}

    def encode(self, logits_BC: Tensor) -> dict[str, Tensor]:
        if self.dtype == "float32":
            return {"logits": logits_BC}
        # Distances from the maximum put float16's finest steps where the probability is, and keep a row of
        # large logits from overflowing.
        below_max_BC = logits_BC - logits_BC.amax(dim=1, keepdim=True)
        return {"logits": below_max_BC.to(torch.float16)}

    def decode(self, encoded: Mapping[str, Tensor], num_classes: int) -> Tensor:
        return encoded["logits"].float()
