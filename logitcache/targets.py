"""The teacher's distributions for a batch of rows, in the form that a loss consumes: dense, sparse or factored.

A distribution over a large vocabulary is stored as a few entries or coefficients. Losses take it in that form, so that
no (B, C) tensor of the teacher exists.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from logitcache.errors import ShapeError

# B rows, C classes, K entries of a row, R rank

VALUES_AT_ONCE = {"cpu": 2**24, "cuda": 2**26}
"""Values of a (rows, C) tensor that are decoded or computed at once, by type of device."""


class Targets(ABC):
    """The teacher's distributions for a batch of B rows over C classes, up to a constant per row in log space.

    Losses take no gradient with respect to them.
    """

    num_classes: int

    @abstractmethod
    def __len__(self) -> int:
        """B, the number of rows."""

    @property
    def shape(self) -> tuple[int, int]:
        """(B, C), the shape of the dense form."""
        return len(self), self.num_classes

    @abstractmethod
    def __getitem__(self, rows: slice | Tensor) -> Self:
        """Some of the rows: a slice, int64 row numbers, or a bool mask (B,)."""

    @abstractmethod
    def to(self, device: torch.device | str) -> Self:
        """The same targets on another device."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """The device of all tensors."""

    @abstractmethod
    def dense(self) -> Tensor:
        """Logits (B, C), correct up to a constant per row; -inf marks a class of probability 0."""

    @abstractmethod
    def of_classes(self, classes: Tensor) -> Self:
        """The distributions given that the class is one of some, for a student with a smaller vocabulary.

        Args:
            classes: int64 (S,): the teacher's class of each of the student's classes, all different. For a head that
                is padded beyond the tokenizer these are `torch.arange(vocab_size)`.
        """

    def of_first_classes(self, num_classes: int) -> Self:
        """The distributions over the first classes, or over all if there are no more, for a student with fewer."""
        return self if num_classes >= self.num_classes else self.of_classes(torch.arange(num_classes))

    def entropy(self) -> Tensor:
        """The entropy of each distribution at T = 1 in nats, float (B,)."""
        log_p_BC = self.dense().float().log_softmax(dim=1)
        entropy_B: Tensor = torch.special.entr(log_p_BC.exp()).sum(dim=1)
        return entropy_B

    def argmax(self) -> Tensor:
        """The most probable class of each row, int64 (B,); of several equal ones, the first."""
        classes = [self[rows].dense().argmax(dim=1) for rows in row_slices(len(self), self.num_classes, self.device)]
        return torch.cat(classes) if classes else torch.empty(0, dtype=torch.int64, device=self.device)


def _numbers_among(classes: Tensor, num_classes: int) -> Tensor:
    """The place of each class in `classes`, int64 (C + 1,), -1 for those that are not in it; -1 stays -1."""
    numbers = torch.full((num_classes + 1,), -1, dtype=torch.int64, device=classes.device)
    numbers[classes] = torch.arange(len(classes), device=classes.device)
    numbers[num_classes] = -1
    return numbers


def row_slices(num_rows: int, num_classes: int, device: torch.device, at_once: int | None = None) -> Iterator[slice]:
    """Consecutive slices of the rows of a (rows, C) tensor.

    Args:
        at_once: rows of a slice; None for as many as `VALUES_AT_ONCE` allows.
    """
    if at_once is None:
        at_once = max(1, VALUES_AT_ONCE.get(device.type, 2**24) // max(1, num_classes))
    return (slice(start, min(start + at_once, num_rows)) for start in range(0, num_rows, at_once))


def factored_logits(coefficients_BR: Tensor, basis_RC: Tensor, mean_C: Tensor, scale_C: Tensor | None) -> Tensor:
    """mean + scale * (coefficients @ basis), float32 (B, C).

    The product of int8 matrices is exact: up to a rank of 1040, all of its sums are below 2^24, so that float32 holds
    them. With float32 matrices the scale is None.
    """
    if scale_C is None:
        return torch.addmm(mean_C, coefficients_BR, basis_RC)
    if coefficients_BR.device.type == "cpu":
        product_BC = torch._int_mm(coefficients_BR, basis_RC).float()  # torch has no public product of integers
    else:
        product_BC = coefficients_BR.float() @ basis_RC.float()
    return product_BC.mul_(scale_C).add_(mean_C)


@dataclass(frozen=True, eq=False)
class DenseTargets(Targets):
    """The logits of every class.

    Raises:
        ShapeError: the logits are not (B, C).
    """

    logits: Tensor
    """Float (B, C)."""

    def __post_init__(self) -> None:
        if self.logits.ndim != 2:
            raise ShapeError(f"logits are (B, C), not {tuple(self.logits.shape)}")

    @property
    def num_classes(self) -> int:  # type: ignore[override]
        return self.logits.shape[1]

    def __len__(self) -> int:
        return len(self.logits)

    def __getitem__(self, rows: slice | Tensor) -> DenseTargets:
        return DenseTargets(self.logits[rows])

    def to(self, device: torch.device | str) -> DenseTargets:
        return DenseTargets(self.logits.to(device))

    @property
    def device(self) -> torch.device:
        return self.logits.device

    def dense(self) -> Tensor:
        return self.logits

    def of_classes(self, classes: Tensor) -> DenseTargets:
        return DenseTargets(self.logits[:, classes.to(self.device)])

    def argmax(self) -> Tensor:
        return self.logits.argmax(dim=1)


@dataclass(frozen=True, eq=False)
class SparseTargets(Targets):
    """The log-probabilities of a few classes, and the mass of all others together (the tail).

    The tail's mass is spread evenly over all classes that have no entry, or in proportion to `tail_shape`. The entries
    and the tail of a row need not be normalized.

    Raises:
        ShapeError: the shapes do not agree.
    """

    ids: Tensor
    """int64 (B, K): the class of each entry; distinct within a row, in any order. -1 marks an unused entry."""
    log_probs: Tensor
    """Float (B, K): log-probabilities; -inf for unused entries and for classes of probability 0."""
    tail: Tensor
    """Float (B,): the logarithm of the mass of all other classes; -inf for none."""
    num_classes: int
    tail_shape: Tensor | None = None
    """Float (C,): log-probabilities of all classes, such as their mean over a training set; None for an even tail."""

    def __post_init__(self) -> None:
        ids, tail, shape = self.ids, self.tail, self.tail_shape
        if ids.ndim != 2 or ids.shape != self.log_probs.shape or tail.shape != ids.shape[:1]:
            raise ShapeError(
                f"ids, log-probabilities and tail are {tuple(ids.shape)}, {tuple(self.log_probs.shape)} and "
                f"{tuple(tail.shape)}; expected (B, K), (B, K) and (B,)"
            )
        if shape is not None and shape.shape != (self.num_classes,):
            raise ShapeError(f"the shape of the tail is {tuple(shape.shape)}; expected ({self.num_classes},)")

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, rows: slice | Tensor) -> SparseTargets:
        return replace(self, ids=self.ids[rows], log_probs=self.log_probs[rows], tail=self.tail[rows])

    def to(self, device: torch.device | str) -> SparseTargets:
        shape = None if self.tail_shape is None else self.tail_shape.to(device)
        return replace(
            self,
            ids=self.ids.to(device),
            log_probs=self.log_probs.to(device),
            tail=self.tail.to(device),
            tail_shape=shape,
        )

    @property
    def device(self) -> torch.device:
        return self.ids.device

    def softened(self, temperature: float = 1.0) -> SparseTargets:
        """The distributions at temperature T, with all parts normalized.

        A row's entries and tail then sum to 1, and so do the probabilities of `tail_shape`.
        """
        wide = torch.float32 if self.device.type == "mps" else torch.float64  # MPS has no float64
        shape_C = None
        if self.tail_shape is not None:
            shape_C = (self.tail_shape.to(wide) / temperature).log_softmax(dim=0).to(self.tail_shape.dtype)
        at_one_B = self.tail - self._log_tail_size(self.tail_shape)
        tail_B = at_one_B / temperature + self._log_tail_size(shape_C)
        if shape_C is not None and self.tail_shape is not None:
            # What normalizes the shape at T belongs to the tail.
            tail_B = tail_B + (self.tail_shape.to(wide) / temperature).logsumexp(dim=0).to(tail_B.dtype)
        log_probs_BK = self.log_probs / temperature
        total_B1 = torch.cat([log_probs_BK, tail_B[:, None]], dim=1).logsumexp(dim=1, keepdim=True)
        tail_B = tail_B - total_B1[:, 0]
        return SparseTargets(self.ids, log_probs_BK - total_B1, tail_B, self.num_classes, shape_C)

    def entropy(self) -> Tensor:
        if self.tail_shape is not None:
            return super().entropy()
        at_one = self.softened()
        entries_B: Tensor = torch.special.entr(at_one.log_probs.exp()).sum(dim=1)
        tail_B = at_one.tail.exp() * -at_one.log_each()
        return entries_B + tail_B.nan_to_num(0.0)  # 0 * inf without a tail

    def log_each(self) -> Tensor:
        """The log-probability of each class of the tail, (B,); with a tail shape, less the class's own part of it."""
        return self.tail - self._log_tail_size(self.tail_shape)

    def _log_tail_size(self, shape_C: Tensor | None) -> Tensor:
        """Log of the number of classes without an entry, or of their mass under a shape, (B,); 0 if there are none."""
        used_BK = self.ids >= 0
        if shape_C is None:
            num_others_B = self.num_classes - used_BK.sum(dim=1)
            return num_others_B.clamp_min(1).to(self.tail.dtype).log()
        wide = torch.float32 if self.device.type == "mps" else torch.float64
        shape_C = shape_C.to(wide)
        total = shape_C.logsumexp(dim=0)
        entries_BK = (shape_C[self.ids.clamp_min(0)] - total).exp().masked_fill(~used_BK, 0.0)
        # The entries may hold nearly all of the shape's mass: a difference, which float32 would lose.
        others_B = (1.0 - entries_BK.sum(dim=1)).clamp_min(torch.finfo(wide).tiny)
        return (others_B.log() + total).to(self.tail.dtype)

    def dense(self) -> Tensor:
        each_B1 = self.log_each()[:, None]
        shape_C = torch.zeros((), device=self.device) if self.tail_shape is None else self.tail_shape
        logits_BC = (each_B1 + shape_C.to(each_B1.dtype)).expand(-1, self.num_classes).contiguous()
        rows, entries = (self.ids >= 0).nonzero(as_tuple=True)
        logits_BC[rows, self.ids[rows, entries]] = self.log_probs[rows, entries]
        return logits_BC

    def argmax(self) -> Tensor:
        best_B = self.log_probs.amax(dim=1) if self.ids.shape[1] else torch.full_like(self.tail, -math.inf)
        best_ids_BK = self.ids.masked_fill((self.log_probs < best_B[:, None]) | (self.ids < 0), self.num_classes)
        other_B, other_id_B = self._best_without_entry()
        entry_id_B = best_ids_BK.amin(dim=1) if self.ids.shape[1] else other_id_B
        entry_id_B = torch.where(other_B == best_B, torch.minimum(entry_id_B, other_id_B), entry_id_B)
        return torch.where(other_B > best_B, other_id_B, entry_id_B)

    def of_classes(self, classes: Tensor) -> SparseTargets:
        classes = classes.to(self.device)
        ids_BK = _numbers_among(classes, self.num_classes)[self.ids]
        is_kept_BK = ids_BK >= 0
        shape_C = None if self.tail_shape is None else self.tail_shape[classes]
        kept = replace(
            self,
            ids=ids_BK,
            log_probs=self.log_probs.masked_fill(~is_kept_BK, -math.inf),
            num_classes=len(classes),
            tail_shape=shape_C,
        )
        # Each class of the tail keeps its probability, so the mass of those that remain is smaller.
        tail_B = self.log_each() + kept._log_tail_size(shape_C)
        return replace(kept, tail=tail_B.masked_fill(is_kept_BK.sum(dim=1) == len(classes), -math.inf))

    def _best_without_entry(self) -> tuple[Tensor, Tensor]:
        """Log-probability and number of the most probable class of the tail, (B,) each; -inf and C if it is empty."""
        num_candidates = min(self.ids.shape[1] + 1, self.num_classes)  # at least one of them has no entry
        if self.tail_shape is None:
            ranked_M = torch.arange(num_candidates, device=self.device)
            shape_M = torch.zeros(num_candidates, dtype=self.tail.dtype, device=self.device)
        else:
            shape_M, ranked_M = (each[:num_candidates] for each in self.tail_shape.sort(descending=True, stable=True))
        taken_BM = torch.stack([(self.ids == candidate).any(dim=1) for candidate in ranked_M], dim=1)
        first_B1 = taken_BM.to(torch.int8).argmin(dim=1, keepdim=True)
        empty_B = taken_BM.gather(1, first_B1)[:, 0]
        value_B = (self.log_each() + shape_M[first_B1[:, 0]]).masked_fill(empty_B, -math.inf)
        return value_B, ranked_M[first_B1[:, 0]].masked_fill(empty_B, self.num_classes)


@dataclass(frozen=True, eq=False)
class FactoredTargets(Targets):
    """Logits as coefficients over a basis that all rows share, and corrections of some classes.

    logits = mean + scale * (coefficients @ basis), and the corrections are added to the logits of their classes.

    Raises:
        ShapeError: the shapes do not agree.
    """

    coefficients: Tensor
    """Float32 (B, R), or int8 with an int8 basis."""
    basis: Tensor
    """Float32 or int8 (R, C)."""
    mean: Tensor
    """Float32 (C,)."""
    ids: Tensor
    """int64 (B, K): the corrected classes of each row."""
    corrections: Tensor
    """Float32 (B, K): what is added to their logits."""
    scale: Tensor | None = None
    """Float32 (C,): the unit of an int8 basis; None where the basis is float32."""

    def __post_init__(self) -> None:
        rows, rank = self.coefficients.shape
        if (
            self.basis.shape != (rank, len(self.mean))
            or self.ids.shape != self.corrections.shape
            or len(self.ids) != rows
        ):
            raise ShapeError(
                f"coefficients, basis and mean are {tuple(self.coefficients.shape)}, {tuple(self.basis.shape)} and "
                f"{tuple(self.mean.shape)}, corrections {tuple(self.ids.shape)} and {tuple(self.corrections.shape)}; "
                "expected (B, R), (R, C), (C,), and (B, K) twice"
            )

    @property
    def num_classes(self) -> int:  # type: ignore[override]
        return len(self.mean)

    def __len__(self) -> int:
        return len(self.coefficients)

    def __getitem__(self, rows: slice | Tensor) -> FactoredTargets:
        return replace(
            self, coefficients=self.coefficients[rows], ids=self.ids[rows], corrections=self.corrections[rows]
        )

    def to(self, device: torch.device | str) -> FactoredTargets:
        parts = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return replace(self, **{name: part.to(device) for name, part in parts.items() if part is not None})

    @property
    def device(self) -> torch.device:
        return self.coefficients.device

    def of_classes(self, classes: Tensor) -> FactoredTargets:
        classes = classes.to(self.device)
        ids_BK = _numbers_among(classes, self.num_classes)[self.ids]
        return replace(
            self,
            basis=self.basis[:, classes],
            mean=self.mean[classes],
            ids=ids_BK.clamp_min(0),
            corrections=self.corrections.masked_fill(ids_BK < 0, 0.0),
            scale=None if self.scale is None else self.scale[classes],
        )

    def dense(self) -> Tensor:
        # A product in half precision would change the logits.
        with torch.autocast(self.device.type, enabled=False):
            logits_BC = factored_logits(self.coefficients, self.basis, self.mean, self.scale)
        return logits_BC.scatter_add_(1, self.ids, self.corrections)
