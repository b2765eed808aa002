"""The largest logits of a row, and what is left as one number."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from logitcache.encodings.protocol import ArraySpec, Encoding
from logitcache.errors import UsageError

# B batch, C classes, K kept classes


@dataclass(frozen=True, kw_only=True)
class TopK(Encoding):
    """The k largest logits of a row, and the exact log-sum-exp of the rest, spread evenly when decoded.

    Keeping the tail's mass leaves the kept probabilities unbiased at T = 1, unlike renormalised top-k
    (RS-KD, arXiv:2503.16870, section 3); the even spread is TinyViT's (arXiv:2207.10666, section 3.1).
    """

    name: ClassVar[str] = "topk"

    k: int
    """Classes kept, largest first; 1 <= k < C."""
    dtype: str = "float16"
    """Of the kept logits, as distances from the row's largest: "float16" or "float32"."""

    def __post_init__(self) -> None:
        if not isinstance(self.k, int) or isinstance(self.k, bool) or self.k < 1:
            raise UsageError(f"TopK: k is a whole number of classes, at least 1, not {self.k!r}")
        if self.dtype not in ("float16", "float32"):
            raise UsageError(f"TopK: dtype is 'float16' or 'float32', not {self.dtype!r}")

    def arrays(self, num_classes: int) -> dict[str, ArraySpec]:
        if self.k >= num_classes:
            raise UsageError(
                f"TopK(k={self.k}) keeps every one of {num_classes} classes; use Dense, or k <= {num_classes - 1}"
            )
        return {
            "ids": ArraySpec(dtype=_id_dtype(num_classes), row_shape=(self.k,)),
            "values": ArraySpec(dtype=self.dtype, row_shape=(self.k,)),
            "tail": ArraySpec(dtype="float32", row_shape=()),
        }

    def encode(self, logits_BC: Tensor) -> dict[str, Tensor]:
        num_classes = logits_BC.shape[1]
        values_BK, ids_BK = logits_BC.topk(self.k, dim=1, sorted=True)
        max_B1 = values_BK[:, :1]
        rest_BC = logits_BC.scatter(1, ids_BK, -math.inf)
        tail_B = torch.logsumexp(rest_BC - max_B1, dim=1)
        return {
            "ids": ids_BK.to(getattr(torch, _id_dtype(num_classes))),
            "values": (values_BK - max_B1).to(getattr(torch, self.dtype)),
            "tail": tail_B,
        }

    def decode(self, encoded: Mapping[str, Tensor], num_classes: int) -> Tensor:
        each_B1 = (encoded["tail"] - math.log(num_classes - self.k))[:, None]
        logits_BC = each_B1.expand(-1, num_classes).contiguous()
        return logits_BC.scatter_(1, encoded["ids"].to(torch.int64), encoded["values"].float())


def _id_dtype(num_classes: int) -> str:
    """The smallest unsigned integer that holds every class id."""
    return "uint8" if num_classes <= 2**8 else "uint16" if num_classes <= 2**16 else "uint32"
