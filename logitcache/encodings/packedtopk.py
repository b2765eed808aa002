"""The most probable classes of a row as a sorted set, in few bytes, and the mass of the others as one number."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from logitcache.arrays import ArraySpec
from logitcache.encodings.classsets import LEVEL, entry_spec, is_used, pack_sets, set_specs, unpack_sets
from logitcache.encodings.entries import distinct_entries
from logitcache.encodings.fitted import FittedEncoding, PerDevice
from logitcache.encodings.largest import largest
from logitcache.encodings.protocol import float_tensor, smallest_id_dtype
from logitcache.errors import UsageError
from logitcache.targets import SparseTargets, row_slices

# B batch, C classes, K places for entries of a row

LARGEST_CODE = 255
FIT_ROWS = 4096
"""Rows that are fitted to, drawn from the calibration rows."""
EVEN_SHARE = 1e-3
"""Share of the fitted tail's mass that all classes get evenly: those that no fitted row gives a probability."""
CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class PackedTopK(FittedEncoding["Prior"]):
    """The most probable classes of a row and the log-sum-exp of the rest, in about half the bytes of `TopK`.

    The classes of a row are a sorted set, stored as gaps; their logits are whole steps above the smallest of them.

    With `most`, rows have different numbers of entries: all classes whose probability is at least a threshold, which is
    fitted so that calibration rows have k entries on average. With `prior`, the tail has the shape of the calibration
    rows' mean tail, and classes are numbered by how often they are entries, so that gaps are small.
    """

    name: ClassVar[str] = "packedtopk"
    masked_arrays: ClassVar[tuple[str, ...]] = ("tail",)

    k: int
    """Entries of a row; with `most`, their mean number over the calibration rows."""
    most: int | None = None
    """The most entries of a row, above k; None for k entries in every row. Memory grows with it, stored bytes do
    not."""
    prior: bool = False
    """Whether to fit the tail's shape and the order of the classes. `most` needs it."""
    step: float = 0.25
    """Quantization step of the entries' logits, at least 0.1: a row's entries span at most 255 steps, and smaller
    logits are raised to the lowest of these."""

    def __post_init__(self) -> None:
        whole = isinstance(self.k, int) and not isinstance(self.k, bool)
        if not whole or self.k < 1:
            raise UsageError(f"k is a whole number of classes, at least 1, not {self.k!r}")
        if self.most is not None and (not isinstance(self.most, int) or self.most <= self.k):
            raise UsageError(f"most is a whole number of classes above k={self.k}, or None, not {self.most!r}")
        if self.most is not None and not self.prior:
            raise UsageError("different numbers of entries need a fitted threshold: set prior=True, or leave out most")
        if not isinstance(self.step, int | float) or not 0.1 <= self.step <= 4:
            raise UsageError(f"step is between 0.1 and 4, not {self.step!r}")

    @property
    def fitted_arrays(self) -> Mapping[str, int]:  # type: ignore[override]
        return {"order": 1, "prior": 1, "least": 1} if self.prior else {}

    @property
    def places(self) -> int:
        """Places for entries of a row."""
        return self.k if self.most is None else self.most

    def arrays(self, num_classes: int) -> dict[str, ArraySpec]:
        if self.places >= num_classes:
            raise UsageError(
                f"{self!r} has places for {self.places} of {num_classes} classes; use Dense, or at most "
                f"{num_classes - 1} places"
            )
        if self.fitted is not None and len(self.fitted.order) != num_classes:
            raise UsageError(f"this PackedTopK was fitted to {len(self.fitted.order)} classes, not {num_classes}")
        return set_specs(num_classes, self.places) | {
            "values": entry_spec(self.places),
            "tail": ArraySpec(dtype="float16", row_shape=(), level=LEVEL),
        }

    def fit(self, calibration: Any) -> PackedTopK:
        if not self.prior:
            return self
        num_rows, num_classes = calibration.shape
        self.arrays(num_classes)
        sample = np.sort(np.random.default_rng(0).permutation(num_rows)[:FIT_ROWS])
        mean_C = torch.zeros(num_classes, dtype=torch.float64)
        parts = []
        for rows in row_slices(len(sample), num_classes, CPU):
            p_BC = float_tensor(calibration[sample[rows]]).softmax(dim=1)
            mean_C += p_BC.sum(dim=0, dtype=torch.float64)
            parts.append(largest(p_BC, self.places))
        p_BK, ids_BK = (torch.cat(part) for part in zip(*parts, strict=True))
        least = 0.0
        if self.most is not None:
            by_size = p_BK.flatten().sort(descending=True).values
            least = float(by_size[min(self.k * len(sample), len(by_size)) - 1])
        p_kept_BK = p_BK.masked_fill(p_BK < least, 0.0)
        kept = ids_BK[p_kept_BK > 0]
        # What the rounding of the sums leaves may be negative.
        tail_C = mean_C.index_add(0, ids_BK.flatten(), -p_kept_BK.flatten().double()).clamp_(min=0.0)
        share_C = tail_C / tail_C.sum().clamp(min=1e-30) * (1 - EVEN_SHARE) + EVEN_SHARE / num_classes
        often_C = torch.bincount(kept, minlength=num_classes) + share_C.clamp(max=0.5)
        order_C = often_C.argsort(descending=True, stable=True)
        fitted = Prior(
            order_C.numpy().astype(smallest_id_dtype(num_classes)),
            share_C.log()[order_C].numpy().astype(np.float16),
            np.array([least], dtype=np.float32),
        )
        return self._with(fitted)

    def _from_arrays(self, **arrays: np.ndarray) -> Prior:
        return Prior(**arrays)

    def encode(self, logits_BC: Tensor, *, view: int = 0, start: int = 0) -> dict[str, Tensor]:
        del view, start
        values_BK, ids_BK = largest(logits_BC, self.places)
        log_p_BK = values_BK - logits_BC.logsumexp(dim=1, keepdim=True)
        is_kept_BK = self._is_kept(log_p_BK) & (values_BK > -math.inf)
        rest_BC = logits_BC.scatter(1, ids_BK, values_BK.masked_fill(is_kept_BK, -math.inf))
        return self._stored(ids_BK, values_BK, is_kept_BK, rest_BC.logsumexp(dim=1), logits_BC.shape[1])

    def encode_sparse(
        self, ids_BK: Tensor, log_probs_BK: Tensor, num_classes: int, *, start: int = 0
    ) -> dict[str, Tensor]:
        """Encode entries of a serving engine, as `TopK.encode_sparse`; a row may have fewer entries than k."""
        self.arrays(num_classes)
        ids_BX, log_probs_BX = distinct_entries(ids_BK, log_probs_BK, num_classes, start=start)
        p_BX = log_probs_BX.exp()
        lacking_B = (1.0 - p_BX.sum(dim=1)).clamp_(min=0.0)
        lacking_B.masked_fill_((ids_BX >= 0).sum(dim=1) == num_classes, 0.0)  # no class is left: it is rounding
        places = min(self.places, ids_BX.shape[1])
        is_kept_BK = self._is_kept(log_probs_BX[:, :places]) & (ids_BX[:, :places] >= 0)
        p_BX[:, :places].masked_fill_(is_kept_BK, 0.0)
        tail_B = (lacking_B + p_BX.sum(dim=1)).log_()
        missing = (0, self.places - places)
        ids_BK = torch.nn.functional.pad(ids_BX[:, :places], missing, value=-1)
        values_BK = torch.nn.functional.pad(log_probs_BX[:, :places], missing, value=-math.inf)
        is_kept_BK = torch.nn.functional.pad(is_kept_BK, missing, value=False)
        return self._stored(ids_BK, values_BK, is_kept_BK, tail_B, num_classes)

    def _is_kept(self, log_probs_BK: Tensor) -> Tensor:
        """Which of the most probable classes of each row become entries, bool (B, K); always the first."""
        least = 0.0 if self.most is None else float(self._fitted().least[0])
        is_kept_BK = log_probs_BK >= (math.log(least) if least > 0 else -math.inf)
        is_kept_BK[:, 0] = True
        return is_kept_BK

    def _stored(
        self, ids_BK: Tensor, values_BK: Tensor, is_kept_BK: Tensor, tail_B: Tensor, num_classes: int
    ) -> dict[str, Tensor]:
        """The arrays, from classes with the largest logits first, which of them are entries, and the tail's logit."""
        count_B = is_kept_BK.sum(dim=1)
        lowest_B = values_BK.gather(1, count_B[:, None].clamp(min=1) - 1)[:, 0]
        lowest_B = torch.maximum(lowest_B, values_BK[:, 0] - LARGEST_CODE * self.step)
        codes_BK = ((values_BK - lowest_B[:, None]) / self.step).round_().clamp_(0, LARGEST_CODE)
        if self.places > 1:  # the most probable class stays the only one, if it was
            is_alone_B = (values_BK[:, 0] > values_BK[:, 1]) & (codes_BK[:, 0] == codes_BK[:, 1])
            codes_BK[:, 0] += is_alone_B & (codes_BK[:, 0] < LARGEST_CODE)
        numbers_BK = ids_BK
        if self.prior:
            numbers_BK = self._fitted().on(ids_BK.device).number_C[ids_BK.clamp(min=0)]
        numbers_BK, order_BK = numbers_BK.masked_fill(~is_kept_BK, num_classes).sort(dim=1, stable=True)
        codes_BK = codes_BK.gather(1, order_BK).masked_fill_(~is_used(count_B, self.places), 0.0)
        tail_B = (tail_B - lowest_B).clamp(max=torch.finfo(torch.float16).max)
        return pack_sets(numbers_BK, count_B, num_classes) | {
            "values": codes_BK.to(torch.uint8),
            "tail": tail_B.to(torch.float16),
        }

    def decode(self, encoded: Mapping[str, Tensor], num_classes: int) -> Tensor:
        return self.targets(encoded, num_classes).dense()

    def targets(self, encoded: Mapping[str, Tensor], num_classes: int) -> SparseTargets:
        ids_BK, shape_C = unpack_sets(encoded, num_classes), None
        values_BK = (encoded["values"].float() * self.step).masked_fill_(ids_BK < 0, -math.inf)
        if self.prior:
            on = self._fitted().on(ids_BK.device)
            ids_BK, shape_C = on.class_C[ids_BK], on.shape_C
        tail_B = encoded["tail"].float()
        total_B1 = torch.cat([values_BK, tail_B[:, None]], dim=1).logsumexp(dim=1, keepdim=True)
        return SparseTargets(ids_BK, values_BK - total_B1, tail_B - total_B1[:, 0], num_classes, shape_C)


class Prior(PerDevice["_OnDevice"]):
    """The arrays that `PackedTopK.fit` determines; a cache stores them once."""

    def __init__(self, order: np.ndarray, prior: np.ndarray, least: np.ndarray) -> None:
        if (order.dtype.name, prior.dtype.name, least.dtype.name) != (
            smallest_id_dtype(order.size),
            "float16",
            "float32",
        ):
            raise ValueError(f"order, prior and least are {order.dtype}, {prior.dtype} and {least.dtype}")
        if order.ndim != 1 or prior.shape != order.shape or least.shape != (1,):
            raise ValueError(f"shapes {order.shape}, {prior.shape} and {least.shape} don't agree")
        if not np.array_equal(np.sort(order), np.arange(len(order))):
            raise ValueError("order does not have each class once")
        if not np.isfinite(prior).all() or not 0 <= float(least[0]) <= 1:
            raise ValueError("prior contains NaN or infinity, or least is no probability")
        self.order = order
        """uint8, uint16 or uint32 (C,): the class of each number."""
        self.prior = prior
        """float16 (C,): log-probability of the class of each number, given that it is in the tail."""
        self.least = least
        """float32 (1,): the least probability of an entry; the decoder ignores it."""

    def _derive(self, device: torch.device) -> _OnDevice:
        return _OnDevice(self, device)


class _OnDevice:
    """A prior as tensors, by class instead of by number."""

    def __init__(self, prior: Prior, device: torch.device) -> None:
        classes = torch.from_numpy(prior.order.astype(np.int64))
        numbers = torch.empty_like(classes)
        numbers[classes] = torch.arange(len(classes))
        self.number_C = numbers.to(device)
        self.shape_C = torch.from_numpy(prior.prior.astype(np.float32))[numbers].to(device)
        self.class_C = torch.cat([classes, torch.tensor([-1])]).to(device)
        """int64 (C + 1,): the class of each number, and -1 for unused places at the end, where -1 finds it."""
