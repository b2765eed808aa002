"""A few classes drawn from the teacher's own distribution: unbiased, where the largest few are not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from logitcache.arrays import ArraySpec
from logitcache.encodings.protocol import Encoding, smallest_id_dtype
from logitcache.errors import UsageError
from logitcache.randomness import keyed_uniform

# B batch, C classes, D draws


@dataclass(frozen=True, kw_only=True)
class Sampled(Encoding):
    """Classes drawn in proportion to their probability at T = 1; decoded to the logarithm of their shares.

    The expected share of a class is its probability, so the expected gradient of KL or soft cross-entropy at T = 1
    is that of the full distribution (RS-KD, arXiv:2503.16870, section 3.2). One row has few classes, and all others
    are -inf: it is for training at T = 1, where many rows average out, and KL(teacher ‖ decoded) of one is infinite.
    Draws are systematic (one random offset a row, evenly spaced points of the cumulated distribution), which has the
    same expectation as independent ones and less variance: a class with probability p comes up pD times, rounded up
    or down.
    """

    name: ClassVar[str] = "sampled"

    draws: int = 50
    """Draws for each row; a class may come up more than once."""
    seed: int = 0
    """With view and row it fixes the offset, so that a build can be repeated."""

    def __post_init__(self) -> None:
        for name, least in (("draws", 1), ("seed", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise UsageError(f"{name} is a whole number, at least {least}, not {value!r}")

    def arrays(self, num_classes: int) -> dict[str, ArraySpec]:
        return {"ids": ArraySpec(dtype=smallest_id_dtype(num_classes), row_shape=(self.draws,))}

    def encode(self, logits_BC: Tensor, *, view: int = 0, start: int = 0) -> dict[str, Tensor]:
        rows = range(start, start + len(logits_BC))
        offsets_B = torch.from_numpy(keyed_uniform(rows, "sampled", self.seed, view)).to(logits_BC.device)
        # MPS has no float64; elsewhere the sum of many small probabilities is worth it.
        wide = torch.float32 if logits_BC.device.type == "mps" else torch.float64
        cumulated_BC = logits_BC.softmax(dim=1).to(wide).cumsum(dim=1)
        points_BD = torch.arange(self.draws, device=logits_BC.device, dtype=wide) + offsets_B.to(wide)[:, None]
        points_BD *= cumulated_BC[:, -1:] / self.draws
        ids_BD = torch.searchsorted(cumulated_BC, points_BD, right=True)
        # A point that rounding moved to the very end belongs to the last class that has any probability.
        ids_BD = torch.minimum(ids_BD, torch.searchsorted(cumulated_BC, cumulated_BC[:, -1:].contiguous()))
        return {"ids": ids_BD.to(getattr(torch, smallest_id_dtype(logits_BC.shape[1])))}

    def decode(self, encoded: Mapping[str, Tensor], num_classes: int) -> Tensor:
        ids_BD = encoded["ids"].to(torch.int64)
        shares_BC = torch.zeros(len(ids_BD), num_classes, device=ids_BD.device)
        shares_BC.scatter_add_(1, ids_BD, torch.full(ids_BD.shape, 1.0 / self.draws, device=ids_BD.device))
        return shares_BC.log_()
