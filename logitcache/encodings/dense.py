"""Every logit, with 32, 16 or 8 bits."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from logitcache.arrays import ArraySpec
from logitcache.encodings.protocol import Encoding
from logitcache.errors import UsageError

# B batch, C classes

MASKED = 0
"""Code of -inf in uint8, in rows whose step is negative; codes 1 to 255 span the row's finite logits."""
STEPS = 254
DEEPEST = 64.0
"""Distance below the row's largest logit at which uint8 saturates."""


@dataclass(frozen=True, kw_only=True)
class Dense(Encoding):
    """All C logits of a row.

    float32 is exact. float16 stores distances from the row's largest logit. uint8 is affine with one step per row; the
    error is at most half a step.
    """

    name: ClassVar[str] = "dense"
    masked_arrays: ClassVar[tuple[str, ...]] = ("logits",)

    dtype: str = "float16"
    """"float32", "float16" or "uint8"."""

    def __post_init__(self) -> None:
        if self.dtype not in ("float32", "float16", "uint8"):
            raise UsageError(f"dtype is 'float32', 'float16' or 'uint8', not {self.dtype!r}")

    def arrays(self, num_classes: int) -> dict[str, ArraySpec]:
        arrays = {"logits": ArraySpec(dtype=self.dtype, row_shape=(num_classes,))}
        if self.dtype == "uint8":
            arrays["step"] = ArraySpec(dtype="float32", row_shape=())
        return arrays

    def encode(self, logits_BC: Tensor, *, view: int = 0, start: int = 0) -> dict[str, Tensor]:
        del view, start
        if self.dtype == "float32":
            return {"logits": logits_BC}
        # float16 is finest near 0, so this is most precise for the most probable classes; and it can't overflow.
        below_max_BC = logits_BC - logits_BC.amax(dim=1, keepdim=True)
        if self.dtype == "float16":
            return {"logits": below_max_BC.to(torch.float16)}
        masked_BC = below_max_BC == -math.inf
        # One extremely improbable class must not make the steps of all others coarse.
        below_max_BC = below_max_BC.clamp(min=-DEEPEST)
        lowest_B = below_max_BC.masked_fill(masked_BC, 0.0).amin(dim=1)
        step_B = torch.where(lowest_B < 0, -lowest_B / STEPS, 1.0)
        codes_BC = (below_max_BC / step_B[:, None]).round_().add_(STEPS + 1).masked_fill_(masked_BC, MASKED)
        return {"logits": codes_BC.to(torch.uint8), "step": torch.where(masked_BC.any(dim=1), -step_B, step_B)}

    def decode(self, encoded: Mapping[str, Tensor], num_classes: int) -> Tensor:
        if self.dtype != "uint8":
            return encoded["logits"].float()
        codes_BC, step_B = encoded["logits"], encoded["step"]
        decoded_BC = codes_BC.float().mul_(step_B.abs()[:, None])
        # Searching all codes for masks is slow, so the sign of a row's step marks them; on a GPU the check would sync.
        if codes_BC.device.type == "cpu" and not bool((step_B < 0).any()):
            return decoded_BC
        return decoded_BC.masked_fill_(codes_BC == MASKED, -math.inf)
