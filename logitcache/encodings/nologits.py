"""No logits: for caches of a teacher's other outputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from logitcache.arrays import ArraySpec
from logitcache.encodings.protocol import Encoding

# B batch, C classes


@dataclass(frozen=True, kw_only=True)
class NoLogits(Encoding):
    """Nothing of the logits: the cache has only the teacher's other outputs.

    Every row has the same byte, which states that the row was written and is compressed to next to nothing.
    """

    name: ClassVar[str] = "nologits"

    def arrays(self, num_classes: int) -> dict[str, ArraySpec]:
        del num_classes
        return {"written": ArraySpec(dtype="uint8", row_shape=())}

    def encode(self, logits_BC: Tensor, *, view: int = 0, start: int = 0) -> dict[str, Tensor]:
        del view, start
        return {"written": torch.ones(len(logits_BC), dtype=torch.uint8, device=logits_BC.device)}

    def decode(self, encoded: Mapping[str, Tensor], num_classes: int) -> Tensor:
        """Zeros; a cache never returns them as logits."""
        written_B = encoded["written"]
        return torch.zeros(len(written_B), num_classes, device=written_B.device)

    def refused(self, logits_BC: Tensor) -> Tensor:
        return torch.zeros(len(logits_BC), dtype=torch.bool, device=logits_BC.device)
