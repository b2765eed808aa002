"""Classes sampled from the teacher's distribution: an unbiased estimate, unlike the k largest classes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from logitcache.arrays import ArraySpec
from logitcache.encodings.classsets import entry_spec, pack_sets, set_specs, unpack_sets
from logitcache.encodings.protocol import Encoding, smallest_id_dtype
from logitcache.errors import UsageError
from logitcache.randomness import keyed_uniform
from logitcache.targets import SparseTargets

# B batch, C classes, D draws


@dataclass(frozen=True, kw_only=True)
class Sampled(Encoding):
    """Classes drawn in proportion to their probability at T = 1; decoded to the logarithm of their shares.

    The expected share of a class is its probability, so the expected gradient of KL or soft cross-entropy at T = 1 is
    that of the full distribution (RS-KD, arXiv:2503.16870, section 3.2). A decoded row has few classes, and -inf for
    all others, so KL(teacher ‖ decoded) of a row is infinite: use it for training at T = 1, where rows average out.
    Draws are systematic: evenly spaced points of the cumulative distribution with one random offset per row. They have
    the same expectation as independent draws and less variance: a class with probability p is drawn pD times, rounded
    up or down.
    """

    name: ClassVar[str] = "sampled"

    draws: int = 50
    """Draws per row; a class can be drawn more than once."""
    seed: int = 0
    """Determines the offsets, together with view and row."""
    packed: bool = False
    """Whether to store the different classes as a sorted set, each with the number of its draws: about half the bytes.
    """

    def __post_init__(self) -> None:
        for name, least in (("draws", 1), ("seed", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise UsageError(f"{name} is a whole number, at least {least}, not {value!r}")
        if not isinstance(self.packed, bool):
            raise UsageError(f"packed is true or false, not {self.packed!r}")

    def config(self) -> dict[str, Any]:
        config = super().config()
        if not self.packed:  # caches that were written before there was a choice keep their ids
            del config["packed"]
        return config

    def arrays(self, num_classes: int) -> dict[str, ArraySpec]:
        if self.packed:
            draws = entry_spec(self.draws, smallest_id_dtype(self.draws + 1))
            return set_specs(num_classes, self.draws) | {"draws": draws}
        return {"ids": ArraySpec(dtype=smallest_id_dtype(num_classes), row_shape=(self.draws,))}

    def encode(self, logits_BC: Tensor, *, view: int = 0, start: int = 0) -> dict[str, Tensor]:
        rows = range(start, start + len(logits_BC))
        offsets_B = torch.from_numpy(keyed_uniform(rows, "sampled", self.seed, view)).to(logits_BC.device)
        # MPS has no float64; elsewhere it makes the sum of many small probabilities precise.
        wide = torch.float32 if logits_BC.device.type == "mps" else torch.float64
        cumulated_BC = logits_BC.softmax(dim=1).to(wide).cumsum(dim=1)
        points_BD = torch.arange(self.draws, device=logits_BC.device, dtype=wide) + offsets_B.to(wide)[:, None]
        points_BD *= cumulated_BC[:, -1:] / self.draws
        ids_BD = torch.searchsorted(cumulated_BC, points_BD, right=True)
        # Rounding can move a point to the end: it belongs to the last class with a probability above 0.
        ids_BD = torch.minimum(ids_BD, torch.searchsorted(cumulated_BC, cumulated_BC[:, -1:].contiguous()))
        if self.packed:
            return self._packed(ids_BD, logits_BC.shape[1])
        return {"ids": ids_BD.to(getattr(torch, smallest_id_dtype(logits_BC.shape[1])))}

    def _packed(self, ids_BD: Tensor, num_classes: int) -> dict[str, Tensor]:
        merged_BD, draws_BD = _merged(ids_BD)
        specs = self.arrays(num_classes)
        count_B = (merged_BD >= 0).sum(dim=1)
        return pack_sets(merged_BD, count_B, num_classes) | {"draws": draws_BD.to(getattr(torch, specs["draws"].dtype))}

    def decode(self, encoded: Mapping[str, Tensor], num_classes: int) -> Tensor:
        if self.packed:
            return self.targets(encoded, num_classes).dense()
        ids_BD = encoded["ids"].to(torch.int64)
        shares_BC = torch.zeros(len(ids_BD), num_classes, device=ids_BD.device)
        shares_BC.scatter_add_(1, ids_BD, torch.full(ids_BD.shape, 1.0 / self.draws, device=ids_BD.device))
        return shares_BC.log_()

    def targets(self, encoded: Mapping[str, Tensor], num_classes: int) -> SparseTargets:
        if self.packed:
            merged_BD = unpack_sets(encoded, num_classes)
            draws_BD = encoded["draws"].to(torch.int64).clamp(min=1).masked_fill(merged_BD < 0, 0)
        else:
            merged_BD, draws_BD = _merged(encoded["ids"].to(torch.int64))
        tail_B = torch.full((len(merged_BD),), -math.inf, device=merged_BD.device)
        shares_BD = draws_BD / draws_BD.sum(dim=1, keepdim=True)
        return SparseTargets(merged_BD, shares_BD.log(), tail_B, num_classes)


def _merged(ids_BD: Tensor) -> tuple[Tensor, Tensor]:
    """The different classes of each row, sorted, then -1; and how often each was drawn. Both int64 (B, D)."""
    ids_BD = ids_BD.sort(dim=1).values
    repeats_BD = torch.zeros_like(ids_BD, dtype=torch.bool)
    repeats_BD[:, 1:] = ids_BD[:, 1:] == ids_BD[:, :-1]
    # Equal draws are neighbours: each adds to the count at the first of them.
    first_BD = (~repeats_BD).cumsum(dim=1) - 1
    draws_BD = torch.zeros_like(ids_BD).scatter_add_(1, first_BD, torch.ones_like(ids_BD))
    return torch.full_like(ids_BD, -1).scatter_(1, first_BD, ids_BD), draws_BD
