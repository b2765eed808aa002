"""The largest logits of a row, and what is left as one number."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from logitcache.arrays import ArraySpec
from logitcache.encodings.entries import distinct_entries
from logitcache.encodings.largest import MANY_CLASSES, largest
from logitcache.encodings.protocol import Encoding, smallest_id_dtype
from logitcache.errors import UsageError
from logitcache.targets import SparseTargets

# B batch, C classes, K kept classes

DEEPEST = 64.0
"""Distance below the row's largest logit at which uint8 saturates."""
MASKED = 255
"""Code of -inf."""
THREAD_LOGITS = 2**17
"""Logits of which each thread of a CPU takes the exponentials at once (512 kB)."""
LOWEST = -1e30
"""In place of -inf where it would be multiplied with 0."""
BITS_PER_NAT = math.log2(math.e)
CODES_PER_E = 254 / math.log1p(DEEPEST)


@dataclass(frozen=True, kw_only=True)
class TopK(Encoding):
    """The k largest logits of a row and the exact log-sum-exp of the rest, which decoding spreads evenly.

    With the tail's mass the kept probabilities are unbiased at T = 1, unlike those of renormalized top-k (RS-KD,
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

    def rows_at_once(self, num_classes: int) -> int:
        # Of many classes, the passes over all of them take fewer rows at a time: see `_sums_of_rest`.
        return super().rows_at_once(num_classes) * (1 if num_classes < MANY_CLASSES else 4)

    def encode(self, logits_BC: Tensor, *, view: int = 0, start: int = 0) -> dict[str, Tensor]:
        return self.encode_with_kl(logits_BC, view=view, start=start)[0]

    def encode_with_kl(
        self, logits_BC: Tensor, *, view: int = 0, start: int = 0
    ) -> tuple[dict[str, Tensor], Tensor | None]:
        del view, start
        num_classes = logits_BC.shape[1]
        if logits_BC.device.type == "cpu" and num_classes < MANY_CLASSES:
            values_BK, ids_BK = largest(logits_BC, self.k)
            distances_BC, distances_BK = logits_BC - values_BK[:, :1], values_BK - values_BK[:, :1]
            tail_B = torch.logsumexp(distances_BC.scatter_(1, ids_BK, -math.inf), dim=1)
            return self._stored(ids_BK, distances_BK, tail_B, num_classes), None
        values_BK, ids_BK = largest(logits_BC, self.k + 1)
        max_B1, next_B1 = values_BK[:, :1], values_BK[:, -1:].clamp(min=LOWEST)
        ids_BK, distances_BK = ids_BK[:, :-1], values_BK[:, :-1] - max_B1
        rest_B, mean_B = _sums_of_rest(logits_BC, ids_BK, next_B1)
        # From here on relative to the largest logit.
        next_B = (next_B1 - max_B1)[:, 0]
        tail_B = rest_B.log() + next_B
        encoded = self._stored(ids_BK, distances_BK, tail_B, num_classes)
        log_probs_BK, log_tail_B = self._log_probs(encoded)
        exp_BK, factor_B = distances_BK.exp(), next_B.exp()
        rest_B, mean_B = rest_B * factor_B, (mean_B + rest_B * next_B) * factor_B
        gain_BK = torch.where(exp_BK == 0, 0.0, exp_BK * (distances_BK - log_probs_BK))
        log_each_B = log_tail_B - math.log(num_classes - self.k)
        of_rest_B = torch.where(rest_B == 0, 0.0, mean_B - rest_B * log_each_B)
        total_B = exp_BK.sum(dim=1) + rest_B
        kl_B = (gain_BK.sum(dim=1) + of_rest_B) / total_B - total_B.log()
        return encoded, kl_B.clamp_(min=0.0)

    def encode_sparse(
        self, ids_BK: Tensor, log_probs_BK: Tensor, num_classes: int, *, start: int = 0
    ) -> dict[str, Tensor]:
        """Encode entries of a serving engine: any number per row, in any order.

        The k most probable entries are kept. The mass of all other entries, and what the entries lack of a mass of 1,
        become the tail. If a row has fewer than k entries, classes of the tail take the unused places, each with its
        part of the tail's mass, so that the row decodes to the same distribution.

        Args:
            ids_BK: int (B, K): classes; -1 marks an unused entry. A class can appear twice with the same value.
            log_probs_BK: float (B, K): their log-probabilities at T = 1; -inf for a class of probability 0.
            num_classes: all classes.
            start: the first row's number, for messages.

        Raises:
            ShapeError: the shapes differ.
            InvalidLogits: NaN; a positive log-probability; a sum of probabilities above 1; a class outside 0 to C - 1;
                a class with two values; a row without entries. The message names the row.
        """
        self.arrays(num_classes)
        ids_BK, log_probs_BK = distinct_entries(ids_BK, log_probs_BK, num_classes, start=start)
        p_BK = log_probs_BK.exp()
        lacking_B = (1.0 - p_BK.sum(dim=1)).clamp_(min=0.0)
        lacking_B.masked_fill_((ids_BK >= 0).sum(dim=1) == num_classes, 0.0)  # no class is left: it is rounding
        tail_B = (lacking_B + p_BK[:, self.k :].sum(dim=1)).log_()
        num_unused = max(0, self.k - ids_BK.shape[1])
        ids_BK = F.pad(ids_BK, (0, num_unused), value=-1)[:, : self.k]
        log_probs_BK = F.pad(log_probs_BK, (0, num_unused), value=-math.inf)[:, : self.k]
        unused_BK = ids_BK < 0
        num_others_B = num_classes - self.k + unused_BK.sum(dim=1)
        each_B1 = (tail_B - num_others_B.double().log_())[:, None]
        log_probs_BK = torch.where(unused_BK, each_B1, log_probs_BK)
        ids_BK = torch.where(unused_BK, _classes_without_entry(ids_BK), ids_BK)
        # The tail's classes can be more probable than an entry, if the entries lack the most probable class.
        log_probs_BK, order_BK = log_probs_BK.sort(dim=1, descending=True, stable=True)
        max_B1 = log_probs_BK[:, :1]
        tail_B = (each_B1 - max_B1)[:, 0] + math.log(num_classes - self.k)
        return self._stored(ids_BK.gather(1, order_BK), log_probs_BK - max_B1, tail_B, num_classes)

    def _stored(self, ids_BK: Tensor, values_BK: Tensor, tail_B: Tensor, num_classes: int) -> dict[str, Tensor]:
        """The arrays from the kept classes, their distances from the row's largest logit, and the tail's."""
        specs = self.arrays(num_classes)
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
        return SparseTargets(encoded["ids"].to(torch.int64), *self._log_probs(encoded), num_classes)

    def _log_probs(self, encoded: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Log-probabilities of the kept classes, float32 (B, K), and of all others together, (B,)."""
        values_BK, tail_B = self._values(encoded["values"]), encoded["tail"].float()
        total_B1 = torch.cat([values_BK, tail_B[:, None]], dim=1).logsumexp(dim=1, keepdim=True)
        return values_BK - total_B1, tail_B - total_B1[:, 0]

    def _values(self, stored_BK: Tensor) -> Tensor:
        """Distances of the kept logits from the row's largest, float32 (B, K), each at most 0."""
        if self.dtype != "uint8":
            return stored_BK.float()
        values_BK = -torch.expm1(stored_BK.float() / CODES_PER_E)
        return values_BK.masked_fill_(stored_BK == MASKED, -math.inf)


@torch.no_grad()
def _sums_of_rest(logits_BC: Tensor, ids_BK: Tensor, next_B1: Tensor) -> tuple[Tensor, Tensor]:
    """Sums over all classes but `ids_BK` of exp(d) and of d exp(d), (B,) each; d is a logit's distance from `next_B1`.

    One pass of exponentials serves the tail and the divergence. They are relative to the largest logit of the tail, so
    that they don't underflow. Powers of 2 are used, since `torch.exp2` takes less than half the time of `torch.exp` on
    CPUs.
    """
    on_cpu, (num_rows, num_classes) = logits_BC.device.type == "cpu", logits_BC.shape
    # On a CPU, all threads take equally many whole rows at a time, in buffers that stay in its cache: fresh memory
    # for all rows costs more than the arithmetic. A single row would be summed in another order by several threads.
    threads = torch.get_num_threads()
    at_once = max(2, threads * max(1, THREAD_LOGITS // num_classes)) if on_cpu else max(1, num_rows)
    stops = [*range(at_once, num_rows - 1, at_once), num_rows]
    below_PC, exp_PC = (logits_BC.new_empty(min(at_once + 1, num_rows), num_classes) for _ in range(2))
    rest_B, mean_B = logits_BC.new_empty(2, num_rows)
    offset_B1 = next_B1 * -BITS_PER_NAT
    for start, stop in itertools.pairwise([0, *stops]):
        rows = slice(start, stop)
        below_BC = torch.add(offset_B1[rows], logits_BC[rows], alpha=BITS_PER_NAT, out=below_PC[: stop - start])
        exp_BC = torch.exp2(below_BC, out=exp_PC[: stop - start]).scatter_(1, ids_BK[rows], 0.0)
        torch.sum(exp_BC, dim=1, out=rest_B[rows])
        if on_cpu:
            torch.sum(below_BC.mul_(exp_BC), dim=1, out=mean_B[rows])
        else:
            below_BC.clamp_(min=LOWEST)  # 0 * -inf is NaN; on a CPU masked rows are rare, and the caller finds them
            torch.bmm(exp_BC[:, None], below_BC[:, :, None], out=mean_B[rows, None, None])
    return rest_B, mean_B / BITS_PER_NAT


def _classes_without_entry(ids_BK: Tensor) -> Tensor:
    """A class for each unused place of a row, int64 (B, K): the first ones that have no entry, all different.

    Unused places, -1, come after all entries. Of the first K classes at least as many have no entry as there are
    unused places.
    """
    num_rows, k = ids_BK.shape
    places_BK = ids_BK.masked_fill((ids_BK < 0) | (ids_BK >= k), k)
    taken_BK = torch.zeros(num_rows, k + 1, dtype=torch.int8, device=ids_BK.device).scatter_(1, places_BK, 1)[:, :k]
    free_first_BK = taken_BK.argsort(dim=1, stable=True)
    num_entries_B1 = (ids_BK >= 0).sum(dim=1, keepdim=True)
    return free_first_BK.gather(1, (torch.arange(k, device=ids_BK.device) - num_entries_B1).clamp_(min=0))
