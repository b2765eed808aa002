"""The most probable classes of each row, and a low-rank approximation of all others, for large vocabularies.

A language model's logits are a linear function of a hidden state, so a basis as large as the hidden state holds them
all. A low-rank basis describes the many small probabilities well, and the few large ones badly. So the k largest are
stored separately, and the coefficients of the basis are chosen for the rest, the tail.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from logitcache.arrays import ArraySpec
from logitcache.encodings.basis import DEEPEST, least_squares
from logitcache.encodings.fitted import PerDevice, check_arrays
from logitcache.encodings.headfitted import HeadFittedEncoding
from logitcache.encodings.largest import largest
from logitcache.encodings.packing import LARGEST, MixedRadix
from logitcache.encodings.protocol import full_precision
from logitcache.encodings.rate_distortion import best_of_each_group, bit_costs_of, costs_of_steps, limits_of
from logitcache.errors import UsageError
from logitcache.targets import FactoredTargets

# B rows, C classes, R rank, K most probable classes, M candidates, J coefficients changed in a round
# N calibration rows, D values of a hidden state

CANDIDATES = 56
"""M: the classes after the k most probable ones whose errors the search knows; all others count by their variance."""
SOFT_TEMPERATURES = (2.0, 4.0)
"""Temperatures above 1 whose divergences count too."""
START = 0.35
"""Coefficients start at the next whole number if less is missing; half a step would cost more bits than it is worth."""
STEP_PER_ROOT_PRICE = 10.0
VALUE_STEP_PER_ROOT_PRICE = 18.0
"""At the best step size, a finer step costs as many bits as it is worth. Both steps grow with the root of the price."""
BASE_STEP = 0.25
LARGEST_BASE, LARGEST_LEVEL = 127, 255
ORDER = 1 / 64
"""Steps between two of the k largest logits that are stored as equal, so that their order stays."""
LEAST_MASS = 1e-6
"""Least probability of the tail."""
SELDOM = 0.002
"""Share of rows with a coefficient other than 0 below which the last components are left out."""
VALUES_AT_ONCE, DEVICE_VALUES_AT_ONCE = 2**22, 2**26
ROWS_AT_ONCE = 1024
"""Rows and values of a (B, C) tensor that are encoded together."""


@dataclass(frozen=True, kw_only=True)
class TopLowRank(HeadFittedEncoding["Fitted"]):
    """The k most probable classes, and quantized coefficients over a fitted basis for all others.

    The basis is the principal components of the calibration logits, with each class weighted by its mean probability in
    the tail. Coefficients are rounded, and then changed one step at a time while this lowers the divergence of the
    tail, with a price for each bit. The step sizes and the number of components follow from the same price. Decoding is
    one matrix product and a scatter.

    Fit it with calibration logits, or faster with `fit_head`, from a language model's head and hidden states.

    Sources: those of `LowRank`; Yang et al. 2018, "Breaking the Softmax Bottleneck", arXiv:1711.03953, for the rank of
    a language model's logits.
    """

    name: ClassVar[str] = "toplowrank"
    fitted_arrays: ClassVar[Mapping[str, int]] = {
        "basis": 2,
        "mean": 1,
        "limits": 1,
        "classes": 1,
        "weights": 1,
        "bit_costs": 2,
    }
    holds_masks: ClassVar[bool] = False
    fit_rows: ClassVar[int] = 1024
    enough_rows: ClassVar[str] = "some thousands"

    rank: int = 192
    """The most components of the basis; 1 <= rank < C."""
    k: int = 8
    """Most probable classes of each row that are stored separately; 1 <= k < C."""
    bit_price: float = 0.0014
    """Divergence, in nats, that is accepted to save one bit. A lower price gives more bytes and a lower divergence."""
    soft_weight: float = 0.25
    """Weight of the divergences at T = 2 and T = 4, each times T², relative to that at T = 1."""
    search: int = 8
    """Rounds of the search. Each can change eight coefficients."""

    def __post_init__(self) -> None:
        for name, least in (("rank", 1), ("k", 1), ("search", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise UsageError(f"{name} is a whole number, at least {least}, not {value!r}")
        if not 0 < self.bit_price < math.inf or not 0 <= self.soft_weight < math.inf:
            raise UsageError(
                f"bit_price is a positive number of nats and soft_weight at least 0, not {self.bit_price!r} and "
                f"{self.soft_weight!r}"
            )

    def rows_at_once(self, num_classes: int) -> int:
        # The basis is larger than the processor's cache: it is read once for all rows that are encoded together.
        return max(1, 2**24 // num_classes)

    def arrays(self, num_classes: int) -> dict[str, ArraySpec]:
        if max(self.rank, self.k) >= num_classes:
            raise UsageError(
                f"TopLowRank(rank={self.rank}, k={self.k}) needs more than {max(self.rank, self.k)} classes, not "
                f"{num_classes}; use Dense, or a smaller rank"
            )
        if self.fitted is not None and len(self.fitted.mean) != num_classes:
            raise UsageError(f"this TopLowRank was fitted to {len(self.fitted.mean)} classes, not {num_classes}")
        if self.fitted is not None and len(self.fitted.limits) > self.rank:
            raise UsageError(f"this TopLowRank was fitted with rank {len(self.fitted.limits)}, not {self.rank}")
        num_bytes = self.rank if self.fitted is None else self.fitted.radix.num_bytes
        specs = {
            "coefficients": ArraySpec(dtype="uint8", row_shape=(num_bytes,), level=19),
            "lowids": ArraySpec(dtype="uint8", row_shape=(self.k,)),
            "highids": ArraySpec(dtype="uint8" if num_classes <= 2**16 else "uint16", row_shape=(self.k,), level=19),
            "drops": ArraySpec(dtype="uint8", row_shape=(self.k,), level=19),
            "base": ArraySpec(dtype="int8", row_shape=()),
        }
        return specs

    def _fit(
        self, span_CD: Tensor, bias_C: Tensor | None, hidden_ND: Tensor, logits_of: Callable[[slice], Tensor]
    ) -> TopLowRank:
        num_classes, device = len(span_CD), span_CD.device
        slices = list(_slices(min(self.fit_rows, len(hidden_ND)), num_classes, device))
        weights_C = torch.zeros(num_classes, device=device)
        of_means_DD = torch.zeros(span_CD.shape[1], span_CD.shape[1], device=device)
        for rows in slices:
            for p_BC, mass_B1, weight in self._softened(logits_of(rows).to(device)):
                mean_BD = p_BC @ span_CD
                of_means_DD += weight * (mean_BD / mass_B1).T @ mean_BD
                weights_C += weight * p_BC.sum(dim=0)
        of_means_DD /= weights_C.sum()
        weights_C /= weights_C.sum()
        basis_RC, mean_C = self._basis(span_CD, bias_C, hidden_ND, weights_C, of_means_DD, self._step)
        rank = len(basis_RC)
        fitted = Fitted(
            basis=basis_RC.cpu().numpy(),
            mean=mean_C.cpu().numpy(),
            limits=np.full(rank, LARGEST, dtype=np.uint16),
            classes=np.argsort(-weights_C.cpu().numpy(), kind="stable").astype(np.uint32),
            weights=weights_C.cpu().numpy(),
            bit_costs=np.zeros((2, rank), dtype=np.float32),
        )
        analysed = [self._with(fitted)._analysed(logits_of(each).to(device))[1] for each in slices]
        for _ in range(3):  # the bit costs and the chosen coefficients depend on each other
            encoding = self._with(fitted)
            steps_BR = torch.cat([encoding._coefficients(each) for each in analysed]).cpu()
            if float(steps_BR.abs().max()) >= LARGEST:
                raise UsageError(f"TopLowRank: bit_price={self.bit_price} is too low: more than {LARGEST} steps")
            fitted = replace(fitted, bit_costs=bit_costs_of(steps_BR))
        used_R = (steps_BR != 0).float().mean(dim=0) > SELDOM
        rank = max(1, int(used_R.nonzero().amax()) + 1 if bool(used_R.any()) else 1)
        return self._with(
            replace(
                fitted,
                basis=fitted.basis[:rank],
                limits=limits_of(steps_BR)[:rank],
                bit_costs=np.ascontiguousarray(fitted.bit_costs[:, :rank]),
            )
        )

    def _softened(self, logits_BC: Tensor) -> Iterator[tuple[Tensor, Tensor, float]]:
        """The distributions that decoded logits should resemble: (B, C), their mass (B, 1), and a weight for each."""
        below_BC = logits_BC - logits_BC.amax(dim=1, keepdim=True)
        for temperature in SOFT_TEMPERATURES:
            p_BC = (below_BC / temperature).softmax(dim=1)
            yield p_BC, torch.ones_like(p_BC[:, :1]), self.soft_weight
        tail_BC = below_BC.softmax(dim=1).scatter_(1, largest(below_BC, self.k)[1], 0.0)
        yield tail_BC, tail_BC.sum(dim=1, keepdim=True).clamp_(min=LEAST_MASS), 1.0

    def _from_arrays(self, **arrays: np.ndarray) -> Fitted:
        return Fitted(**arrays)

    def encode(self, logits_BC: Tensor, *, view: int = 0, start: int = 0) -> dict[str, Tensor]:
        return self.encode_with_kl(logits_BC, view=view, start=start)[0]

    @full_precision
    def encode_with_kl(
        self, logits_BC: Tensor, *, view: int = 0, start: int = 0
    ) -> tuple[dict[str, Tensor], Tensor | None]:
        del view, start
        parts: dict[str, list[Tensor]] = {}
        divergences = []
        for rows in _slices(len(logits_BC), logits_BC.shape[1], logits_BC.device):
            encoded, kl_B = self._encoded(logits_BC[rows])
            divergences.append(kl_B)
            for name, values in encoded.items():
                parts.setdefault(name, []).append(values)
        return {name: torch.cat(values) for name, values in parts.items()}, torch.cat(divergences)

    def decode(self, encoded: Mapping[str, Tensor], num_classes: int) -> Tensor:
        return self.targets(encoded, num_classes).dense()

    @full_precision
    def targets(self, encoded: Mapping[str, Tensor], num_classes: int) -> FactoredTargets:
        on = self._fitted().on(encoded["base"].device)
        steps_BR = on.radix.unpack(encoded["coefficients"])
        places_BK = encoded["lowids"].long() + 256 * encoded["highids"].long()
        ids_BK = on.classes_C[places_BK.clamp_(max=num_classes - 1)]
        values_BK = self._values(encoded["base"].float(), encoded["drops"].float().cumsum(dim=1))
        # A value replaces what the basis gives for its class.
        replaced_BK = torch.bmm(on.basis_CR[ids_BK], steps_BR[:, :, None])[:, :, 0] + on.mean_C[ids_BK]
        return FactoredTargets(steps_BR, on.basis_CR.T, on.mean_C, ids_BK, values_BK - replaced_BK)

    @property
    def _step(self) -> float:
        """Of the coefficients: the root mean square change of the logits."""
        return STEP_PER_ROOT_PRICE * math.sqrt(self.bit_price)

    @property
    def _value_step(self) -> float:
        """Of the k largest logits, in nats; so coarse at least that the deepest logit has a level."""
        return max(VALUE_STEP_PER_ROOT_PRICE * math.sqrt(self.bit_price), DEEPEST / LARGEST_LEVEL)

    def _values(self, base_B: Tensor, levels_BK: Tensor) -> Tensor:
        """The k largest logits, (B, K)."""
        order_K = torch.arange(levels_BK.shape[1], device=levels_BK.device) * ORDER
        return base_B[:, None] * BASE_STEP - (levels_BK + order_K) * self._value_step

    def _analysed(self, logits_BC: Tensor) -> tuple[Tensor, _Rows]:
        """Logits below the largest, clamped, (B, C); and what the search needs of them."""
        encoder = self._fitted().on(logits_BC.device).encoder
        below_BC = (logits_BC - logits_BC.amax(dim=1, keepdim=True)).clamp_(min=-DEEPEST)
        top_BM, ids_BM = largest(below_BC, min(self.k + CANDIDATES, logits_BC.shape[1]))
        log_total_B1 = below_BC.logsumexp(dim=1, keepdim=True)
        plain_BR = (below_BC @ encoder.projection_CR).sub_(encoder.projected_mean_R)
        return below_BC, _Rows(ids_BM, top_BM, log_total_B1, plain_BR, (below_BC @ encoder.weights_C)[:, None])

    def _encoded(self, logits_BC: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        on = self._fitted().on(logits_BC.device)
        below_BC, rows = self._analysed(logits_BC)
        steps_BR = self._coefficients(rows)
        ids_BK, log_p_BK = rows.ids[:, : self.k], rows.top[:, : self.k] - rows.log_total
        decoded_BC = torch.addmm(on.mean_C, steps_BR, on.basis_CR.T)
        # The tail alone: a class of probability 0 on both sides adds nothing.
        decoded_BC.scatter_(1, ids_BK, -math.inf)
        log_tail_B = decoded_BC.logsumexp(dim=1)
        p_BC = below_BC.sub(rows.log_total).exp_().scatter_(1, ids_BK, 0.0)
        mass_B = p_BC.sum(dim=1)
        decoded_BC.scatter_(1, ids_BK, 0.0)
        lost_B = _row_products(p_BC, below_BC.sub_(decoded_BC)) - mass_B * rows.log_total[:, 0]
        base_B = ((log_tail_B - mass_B.clamp(min=LEAST_MASS).log()) / BASE_STEP).round_()
        base_B.clamp_(-LARGEST_BASE, LARGEST_BASE)
        levels_BK = (-log_p_BK / self._value_step).round_().clamp_(0, LARGEST_LEVEL)
        values_BK = self._values(base_B, levels_BK)
        # KL = sum over all classes of p (log p - decoded) + the decoded logits' log-sum-exp
        lost_B += (log_p_BK.exp() * (log_p_BK - values_BK)).sum(dim=1)
        kl_B = lost_B + torch.cat([values_BK, log_tail_B[:, None]], dim=1).logsumexp(dim=1)
        places_BK = on.encoder.places_C[ids_BK]
        drops_BK = levels_BK.diff(dim=1, prepend=torch.zeros_like(levels_BK[:, :1]))
        high_dtype = torch.uint8 if logits_BC.shape[1] <= 2**16 else torch.uint16
        encoded = {
            "coefficients": on.radix.pack(steps_BR),
            "lowids": (places_BK % 256).to(torch.uint8),
            "highids": (places_BK // 256).to(high_dtype),
            "drops": drops_BK.to(torch.uint8),
            "base": base_B.to(torch.int8),
        }
        return encoded, kl_B.clamp_(min=0.0)

    def _coefficients(self, rows: _Rows) -> Tensor:
        """Coefficients as whole numbers of steps, float32 (B, R), at the least divergence of the tail and its bits.

        To second order, the divergence of the tail is half the variance of its logits' errors, times its mass. The
        errors of the candidates are known; of all other classes, only their expected square.
        """
        on = self._fitted().on(rows.ids.device)
        encoder = on.encoder
        steps_BR = (rows.plain.abs() + START).floor_() * rows.plain.sign()
        steps_BR.clamp_(-encoder.limit_R, encoder.limit_R)
        if not self.search:
            return steps_BR
        p_BK, p_BM = (rows.top - rows.log_total).exp().tensor_split([self.k], dim=1)
        mass_B1 = (1.0 - p_BK.sum(dim=1, keepdim=True)).clamp_(min=LEAST_MASS)
        others_B1 = (mass_B1 - p_BM.sum(dim=1, keepdim=True)).clamp_(min=0.0)
        of_others_B1 = (others_B1 + self.soft_weight * len(SOFT_TEMPERATURES)) * self._step**2
        ids_BM = rows.ids[:, self.k :]
        basis_BMR = on.basis_CR[ids_BM]
        wanted_BM = rows.top[:, self.k :] - rows.gauge - on.mean_C[ids_BM]
        error_BM = torch.bmm(basis_BMR, steps_BR[:, :, None])[:, :, 0] - wanted_BM
        mean_BR = torch.bmm(p_BM[:, None], basis_BMR)[:, 0]
        curvature_BR = torch.bmm(p_BM[:, None], basis_BMR.square())[:, 0] - mean_BR.square() / mass_B1 + of_others_B1
        for _ in range(self.search):
            mean_error_B1 = (p_BM * error_BM).sum(dim=1, keepdim=True) / mass_B1
            gradient_BR = torch.bmm((p_BM * (error_BM - mean_error_B1))[:, None], basis_BMR)[:, 0]
            gradient_BR += of_others_B1 * (steps_BR - rows.plain)
            up_BR, down_BR = costs_of_steps(steps_BR, encoder.bit_costs_2R, encoder.limit_R, self.bit_price)
            rising_BR, falling_BR = up_BR + gradient_BR, down_BR - gradient_BR
            change_BJ, which_BJ = best_of_each_group(torch.minimum(rising_BR, falling_BR).add_(curvature_BR, alpha=0.5))
            sign_BJ = (rising_BR.gather(1, which_BJ) < falling_BR.gather(1, which_BJ)).float().mul_(2).sub_(1)
            moved_BMJ = basis_BMR.gather(2, which_BJ[:, None].expand(-1, ids_BM.shape[1], -1)) * sign_BJ[:, None]
            felt_BMJ = moved_BMJ * p_BM[:, :, None]
            felt_BJ = felt_BMJ.sum(dim=1)
            together_BJJ = torch.bmm(felt_BMJ.transpose(1, 2), moved_BMJ)
            together_BJJ -= felt_BJ[:, :, None] * felt_BJ[:, None] / mass_B1[:, :, None]
            taken_BJ = torch.zeros_like(change_BJ)
            for j in range(change_BJ.shape[1]):  # best first; the later ones count what the earlier ones changed
                taken_BJ[:, j] = change_BJ[:, j] + (together_BJJ[:, j] * taken_BJ).sum(dim=1) < 0
            steps_BR.scatter_add_(1, which_BJ, taken_BJ * sign_BJ)
            error_BM += torch.bmm(moved_BMJ, taken_BJ[:, :, None])[:, :, 0]
        return steps_BR


class _Rows(NamedTuple):
    """What the search needs of some rows."""

    ids: Tensor
    """int64 (B, K + M): the most probable classes, largest first."""
    top: Tensor
    """(B, K + M): their logits below the row's largest."""
    log_total: Tensor
    """(B, 1): log-sum-exp of all logits below the row's largest."""
    plain: Tensor
    """(B, R): the least-squares coefficients in steps, not rounded."""
    gauge: Tensor
    """(B, 1): the weighted mean of the logits below the row's largest; that of the decoded ones is 0."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Fitted(PerDevice["_OnDevice"]):
    """The arrays that a fit determines; a cache stores them once.

    Raises:
        ValueError: they don't agree, or contain NaN or infinity.
    """

    basis: np.ndarray
    """float16 (R, C): the change of the logits for one step of each coefficient."""
    mean: np.ndarray
    """float32 (C,): the logits if all coefficients are 0."""
    limits: np.ndarray
    """uint16 (R,): the largest magnitude of each coefficient, in steps."""
    classes: np.ndarray
    """uint32 (C,): all classes, those first that are expected in most tails."""
    weights: np.ndarray
    """float32 (C,): how much an error in the logit of each class matters, of sum 1; the decoder ignores it."""
    bit_costs: np.ndarray
    """float32 (2, R): bits for each step away from zero, and extra bits for the first; the decoder ignores them."""

    def __post_init__(self) -> None:
        rank, num_classes = self.limits.size, self.mean.size
        expected = {
            "basis": ("float16", (rank, num_classes)),
            "mean": ("float32", (num_classes,)),
            "limits": ("uint16", (rank,)),
            "classes": ("uint32", (num_classes,)),
            "weights": ("float32", (num_classes,)),
            "bit_costs": ("float32", (2, rank)),
        }
        check_arrays(self, expected)
        if not np.array_equal(np.sort(self.classes), np.arange(num_classes)):
            raise ValueError("classes are not all the classes, each once")
        self.radix  # noqa: B018  # it checks the limits

    @functools.cached_property
    def radix(self) -> MixedRadix:
        """The packing of the coefficients."""
        return MixedRadix(self.limits.tolist())

    def _derive(self, device: torch.device) -> _OnDevice:
        return _OnDevice(self, device)


class _OnDevice:
    """Fitted arrays as float32 tensors on a device, for decoding."""

    def __init__(self, fitted: Fitted, device: torch.device) -> None:
        self.radix = fitted.radix.to(device)
        self.mean_C = torch.from_numpy(fitted.mean).to(device)
        self.basis_CR = torch.from_numpy(fitted.basis.T.copy()).to(device).float()
        self.classes_C = torch.from_numpy(fitted.classes.astype(np.int64)).to(device)
        self._fitted = fitted

    @functools.cached_property
    def encoder(self) -> _ForEncoding:
        """What only encoding needs; it takes as much memory as the basis."""
        return _ForEncoding(self._fitted, self)


class _ForEncoding:
    """Tensors for encoding, derived from the fitted arrays."""

    def __init__(self, fitted: Fitted, on: _OnDevice) -> None:
        device = on.mean_C.device
        self.weights_C = torch.from_numpy(fitted.weights).to(device)
        self.places_C = on.classes_C.argsort()
        """The place of each class in `classes`."""
        self.limit_R = torch.from_numpy(fitted.limits.astype(np.float32)).to(device)
        self.bit_costs_2R = torch.from_numpy(fitted.bit_costs).to(device)
        self.projection_CR = least_squares(on.basis_CR, self.weights_C)
        self.projected_mean_R = on.mean_C @ self.projection_CR


def _row_products(first_BC: Tensor, second_BC: Tensor) -> Tensor:
    """The sum of products in each row, (B,); unlike `vecdot`, without a tensor of all products."""
    products_B: Tensor = torch.bmm(first_BC[:, None], second_BC[:, :, None])[:, 0, 0]
    return products_B


def _slices(num_rows: int, num_classes: int, device: torch.device) -> Iterable[slice]:
    values = VALUES_AT_ONCE if device.type == "cpu" else DEVICE_VALUES_AT_ONCE
    size = min(ROWS_AT_ONCE, max(1, values // num_classes))
    # Of equal length, as far as possible: a few rows take nearly as long as many.
    size = max(1, math.ceil(num_rows / max(1, math.ceil(num_rows / size))))
    return (slice(start, min(start + size, num_rows)) for start in range(0, num_rows, size))
