"""The largest logits of a row, and what is left as one number."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from logitcache.arrays import ArraySpec
from logitcache.encodings.protocol import Encoding, smallest_id_dtype
from logitcache.errors import UsageError
from logitcache.targets import SparseTargets

# B batch, C classes, K kept classes

DEEPEST = 64.0
"""Distance below the row's largest logit at which uint8 saturates."""
MASKED = 255
"""Code of -inf."""
CODES_PER_E = 254 / math.log1p(DEEPEST)


@dataclass(frozen=True, kw_only=True)
class TopK(Encoding):
    """The k largest logits of a row and the exact log-sum-exp of the rest, which decoding spreads evenly.

    With the tail's mass the kept probabilities are unbiased at T = 1, unlike those of renormalised top-k (RS-KD,
    arXiv:2503.16870, section 3). The even spread is TinyViT's (arXiv:2207.10666, section 3.1).
    """

    name: ClassVar[str] = "topk"
    masked_arrays: ClassVar[tuple[str, ...]] = ("values", "tail")

    k: int
    """Classes kept, largest first; 1 <= k < C."""
    dtype: str = "float16"
    """Type of the kept logits, stored as distances d from the row's largest: "float32", "float16", or "uint8" with
    logarithmic steps and an error of at most 0.8 % of 1 + d."""

    def __post_init__(self) -> None:
        if not isinstance(self.k, int) or isinstance(self.k, bool) or self.k < 1:
            raise UsageError(f"k is a whole number of classes, at least 1, not {self.k!r}")
        if self.dtype not in ("float32", "float16", "uint8"):
            raise UsageError(f"dtype is 'float32', 'float16' or 'uint8', not {self.dtype!r}")

    def arrays(self, num_classes: int) -> dict[str, ArraySpec]:
        if self.k >= num_classes:
            raise UsageError(
                f"TopK(k={self.k}) keeps every one of {num_classes} classes; use Dense, or k <= {num_classes - 1}"
            )
        return {
            "ids": ArraySpec(dtype=smallest_id_dtype(num_classes), row_shape=(self.k,)),
            "values": ArraySpec(dtype=self.dtype, row_shape=(self.k,)),
            "tail": ArraySpec(dtype="float32" if self.dtype == "float32" else "float16", row_shape=()),
        }

    def encode(self, logits_BC: Tensor, *, view: int = 0, start: int = 0) -> dict[str, Tensor]:
        del view, start
        specs = self.arrays(logits_BC.shape[1])
        values_BK, ids_BK = logits_BC.topk(self.k, dim=1, sorted=True)
        max_B1 = values_BK[:, :1]
        rest_BC = logits_BC.scatter(1, ids_BK, -math.inf)
        tail_B = torch.logsumexp(rest_BC - max_B1, dim=1)
        values_BK = values_BK - max_B1
        if self.dtype == "uint8":
            codes_BK = values_BK.neg().log1p_().mul_(CODES_PER_E).round_().clamp_(max=MASKED - 1)
            values_BK = codes_BK.masked_fill_(values_BK == -math.inf, MASKED)
        parts = {"ids": ids_BK, "values": values_BK, "tail": tail_B}
        return {name: part.to(getattr(torch, specs[name].dtype)) for name, part in parts.items()}

    def decode(self, encoded: Mapping[str, Tensor], num_classes: int) -> Tensor:
        each_B1 = (encoded["tail"].float() - math.log(num_classes - self.k))[:, None]
        logits_BC = each_B1.expand(-1, num_classes).contiguous()
        return logits_BC.scatter_(1, encoded["ids"].to(torch.int64), self._values(encoded["values"]))

    def targets(self, encoded: Mapping[str, Tensor], num_classes: int) -> SparseTargets:
        values_BK, tail_B = self._values(encoded["values"]), encoded["tail"].float()
        total_B1 = torch.cat([values_BK, tail_B[:, None]], dim=1).logsumexp(dim=1, keepdim=True)
        return SparseTargets(encoded["ids"].to(torch.int64), values_BK - total_B1, tail_B - total_B1[:, 0], num_classes)

    def _values(self, stored_BK: Tensor) -> Tensor:
        """Distances of the kept logits from the row's largest, float32 (B, K), each at most 0."""
        if self.dtype != "uint8":
            return stored_BK.float()
        values_BK = -torch.expm1(stored_BK.float() / CODES_PER_E)
        return values_BK.masked_fill_(stored_BK == MASKED, -math.inf)
