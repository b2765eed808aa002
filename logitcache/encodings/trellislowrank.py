"""A low-rank approximation of logits in few bytes, for low divergences at several temperatures.

As in `LowRank`, a row is a vector of whole numbers over a fitted basis. Three things need fewer bytes for the same
divergence: the search minimizes the divergence in the metric of each row, numbers are trellis-coded, and a range coder
writes them in as many bits as their probabilities are worth.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping
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
from logitcache.encodings.protocol import full_precision
from logitcache.encodings.rangecoder import TOTAL, RangeDecoder, range_encoded
from logitcache.encodings.trellis import DECAY, UNIT, Frequencies, best_path, next_activity, next_state, value
from logitcache.errors import InvalidLogits, UsageError
from logitcache.targets import FactoredTargets

# B rows, C classes, R rank, M candidates, X candidates and the rest, T temperatures, K largest magnitude
# N calibration rows, D values of a hidden state, G tables, L activity levels

TEMPERATURES = (1.0, 2.0, 4.0)
CANDIDATES = 384
"""M: the most probable classes of a row, whose probabilities its metric knows; all others have their mean ones."""
RIDGE = 0.01
"""Share of the mean metric that is added to the metric of each row. Where the teacher is certain, a row's metric is
nearly zero, but holds for small errors only."""
STEP_PER_ROOT_PRICE = 2.2
"""At the best step size, a finer step costs as many bits as it is worth: it grows with the root of the price."""
SCALES_PER_OCTAVE = 4
RATIOS = tuple(2.0 ** (level / SCALES_PER_OCTAVE) for level in (-3.5, -2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 3.5))
"""Activity, relative to the expected one, above which numbers use the tables of the next larger scale."""
ORDINARY = 4
"""The threshold of which activity starts: the level of expected activity."""
BORROWED = 0.02
"""Share of the counts of a scale that those next to it count as well."""
OWN_MAGNITUDES = 4
"""Magnitudes below this have frequencies of their own; those above, of a geometric distribution."""
SPARE = 1.5
"""Magnitudes and bytes may be larger in other rows than in the fitted ones, by this factor."""
MOST_MAGNITUDE = 2000
HIGHEST_PRICE = 1e12
"""Of a bit, in nats: above it, only the bits of a row count."""
FITS = 3
VALUES_AT_ONCE, DEVICE_VALUES_AT_ONCE = 2**25, 2**27
"""Values of the metrics, and of the candidates' components, of rows that are encoded together."""
ROWS_AT_ONCE = 512
SELDOM = 0.002
"""Share of rows with a value other than 0 below which the least important components are left out."""


@dataclass(frozen=True, kw_only=True)
class TrellisLowRank(HeadFittedEncoding["Fitted"]):
    """Trellis-coded coefficients over a fitted basis, in the fewest bytes at low divergences.

    The basis is the principal components of the calibration logits in the mean metric of the divergences at T = 1, 2
    and 4. The coefficients of a row are the path of least divergence and bits through a trellis of eight states, in
    the metric of this row. Each is range-coded with frequencies that follow from the coefficients before it.

    Encoding a row takes tens of milliseconds at a rank of 576.

    Fit it with calibration logits, or faster with `fit_head`, from a language model's head and hidden states; both with
    rows of as many different texts as possible.

    Sources: those of `TopLowRank`; Marcellin and Fischer 1990, "Trellis coded quantization of memoryless and
    Gauss-Markov sources"; Martin 1979, "Range encoding". The combination is new.
    """

    name: ClassVar[str] = "trellislowrank"
    fitted_arrays: ClassVar[Mapping[str, int]] = {
        "basis": 2,
        "mean": 1,
        "scales": 1,
        "thresholds": 2,
        "frequencies": 2,
        "longest": 1,
        "weights": 1,
        "rest": 2,
    }
    holds_masks: ClassVar[bool] = False
    fit_rows: ClassVar[int] = 512
    enough_rows: ClassVar[str] = "ten thousand or more"

    rank: int = 320
    """The most components of the basis; 1 <= rank < C. A language model's logits have no more than its hidden state has
    values."""
    bit_price: float = 0.0035
    """Divergence, in nats, that is accepted to save one bit. A lower price gives more bytes and a lower divergence."""
    soft_weight: float = 0.25
    """Weight of the divergences at T = 2 and T = 4, each times T², relative to that at T = 1."""

    def __post_init__(self) -> None:
        if not isinstance(self.rank, int) or isinstance(self.rank, bool) or self.rank < 1:
            raise UsageError(f"rank is a whole number, at least 1, not {self.rank!r}")
        if not 0 < self.bit_price < math.inf or not 0 <= self.soft_weight < math.inf:
            raise UsageError(
                f"bit_price is a positive number of nats and soft_weight at least 0, not {self.bit_price!r} and "
                f"{self.soft_weight!r}"
            )

    def rows_at_once(self, num_classes: int) -> int:
        return max(1, 2**24 // num_classes)

    def arrays(self, num_classes: int) -> dict[str, ArraySpec]:
        if self.rank >= num_classes:
            raise UsageError(
                f"TrellisLowRank(rank={self.rank}) needs more than {self.rank} classes, not {num_classes}; use Dense, "
                "or a smaller rank"
            )
        if self.fitted is not None and len(self.fitted.mean) != num_classes:
            raise UsageError(f"this TrellisLowRank was fitted to {len(self.fitted.mean)} classes, not {num_classes}")
        if self.fitted is not None and len(self.fitted.basis) > self.rank:
            raise UsageError(f"this TrellisLowRank was fitted with rank {len(self.fitted.basis)}, not {self.rank}")
        num_bytes = self.rank if self.fitted is None else int(self.fitted.longest[0])
        return {"coefficients": ArraySpec(dtype="uint8", row_shape=(num_bytes,), level=19, by_row=True)}

    def _fit(
        self, span_CD: Tensor, bias_C: Tensor | None, hidden_ND: Tensor, logits_of: Callable[[slice], Tensor]
    ) -> TrellisLowRank:
        num_classes, device = len(span_CD), span_CD.device
        slices = list(_slices(min(self.fit_rows, len(hidden_ND)), min(self.rank, span_CD.shape[1]), device))
        weights_C = torch.zeros(num_classes, device=device)
        rest_TC = torch.zeros(len(TEMPERATURES), num_classes, device=device)
        of_means_DD = torch.zeros(span_CD.shape[1], span_CD.shape[1], device=device)
        for rows in slices:
            below_BC = _below(logits_of(rows).to(device))
            ids_BM = largest(below_BC, min(CANDIDATES, num_classes))[1]
            for temperature, weight, rest_C in zip(TEMPERATURES, self._weights, rest_TC, strict=True):
                p_BC = (below_BC / temperature).softmax(dim=1)
                mean_BD = p_BC @ span_CD
                of_means_DD += weight * mean_BD.T @ mean_BD
                weights_C += weight * p_BC.sum(dim=0)
                rest_C += p_BC.scatter_(1, ids_BM, 0.0).sum(dim=0)
        of_means_DD /= weights_C.sum()
        weights_C /= weights_C.sum()
        rest_TC /= rest_TC.sum(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        basis_RC, mean_C = self._basis(span_CD, bias_C, hidden_ND, weights_C, of_means_DD, self._step)
        basis_RC = basis_RC.flip(0)
        fitted = Fitted(
            basis=basis_RC.cpu().numpy(),
            mean=mean_C.cpu().numpy(),
            weights=weights_C.cpu().numpy(),
            rest=rest_TC.cpu().numpy(),
            longest=np.ones(1, dtype=np.uint32),
            **_plain_frequencies(len(basis_RC)),
        )
        on = fitted.on(device)
        wanted = [self._with(fitted)._wanted(_below(logits_of(rows).to(device)), on) for rows in slices]
        plain_BR = torch.cat([each.values for each in wanted]).cpu()
        if float(plain_BR.abs().max()) > MOST_MAGNITUDE:
            raise UsageError(
                f"TrellisLowRank: bit_price={self.bit_price} is too low: values of more than {MOST_MAGNITUDE} steps"
            )
        # Without the trellis, half of the values are even, and half are odd.
        is_odd_BR = (torch.arange(len(plain_BR))[:, None] + torch.arange(plain_BR.shape[1])) % 2
        numbers_BR = ((plain_BR - is_odd_BR) / 2).round().long()
        for _ in range(FITS):  # the frequencies and the chosen numbers depend on each other
            fitted = replace(fitted, **_fitted_frequencies(numbers_BR, is_odd_BR))
            on = fitted.on(device)
            found = [self._path(each, on, self.bit_price) for each in wanted]
            numbers_BR, tables_BR = (torch.cat([each[index] for each in found]).cpu() for index in (0, 2))
            is_odd_BR = tables_BR % 2
        is_used_R = (2 * numbers_BR + is_odd_BR != 0).double().mean(dim=0) > SELDOM
        used = slice(int(is_used_R.int().argmax()) if bool(is_used_R.any()) else len(is_used_R) - 1, None)
        fitted = replace(
            fitted, basis=fitted.basis[used], **_fitted_frequencies(numbers_BR[:, used], is_odd_BR[:, used])
        )
        on = fitted.on(device)
        longest = max(
            _lengths(self._encoded(_below(logits_of(rows).to(device)), on)[0]).amax().item() for rows in slices
        )
        return self._with(replace(fitted, longest=np.array([math.ceil(SPARE * longest) + 8], dtype=np.uint32)))

    def _from_arrays(self, **arrays: np.ndarray) -> Fitted:
        return Fitted(**arrays)

    def encode(self, logits_BC: Tensor, *, view: int = 0, start: int = 0) -> dict[str, Tensor]:
        return self.encode_with_kl(logits_BC, view=view, start=start)[0]

    @full_precision
    def encode_with_kl(
        self, logits_BC: Tensor, *, view: int = 0, start: int = 0
    ) -> tuple[dict[str, Tensor], Tensor | None]:
        del view, start
        on, num_bytes = self._fitted().on(logits_BC.device), int(self._fitted().longest[0])
        parts, divergences = [], []
        for rows in _slices(len(logits_BC), on.basis_CR.shape[1], logits_BC.device):
            below_BC = _below(logits_BC[rows])
            packed_BG, values_BR = self._encoded(below_BC, on, num_bytes)
            parts.append(torch.nn.functional.pad(packed_BG, (0, num_bytes))[:, :num_bytes])
            decoded_BC = torch.addmm(on.mean_C, values_BR, on.basis_CR.T)
            log_p_BC = below_BC.log_softmax(dim=1)
            divergences.append((log_p_BC.exp() * (log_p_BC - decoded_BC.log_softmax(dim=1))).sum(dim=1))
        return {"coefficients": torch.cat(parts)}, torch.cat(divergences).clamp_(min=0.0)

    def decode(self, encoded: Mapping[str, Tensor], num_classes: int) -> Tensor:
        return self.targets(encoded, num_classes).dense()

    @full_precision
    def targets(self, encoded: Mapping[str, Tensor], num_classes: int) -> FactoredTargets:
        packed_BG = encoded["coefficients"]
        on = self._fitted().on(packed_BG.device)
        values_BR = _unpacked(packed_BG, on)
        none_B0 = values_BR.new_zeros(len(values_BR), 0)
        return FactoredTargets(values_BR, on.basis_CR.T, on.mean_C, none_B0.long(), none_B0)

    @property
    def _weights(self) -> tuple[float, ...]:
        """Of the metrics at each temperature."""
        return tuple(1.0 if temperature == 1.0 else self.soft_weight for temperature in TEMPERATURES)

    @property
    def _step(self) -> float:
        """Half the distance of two values of a quantizer: the root mean square change of the logits."""
        return STEP_PER_ROOT_PRICE * math.sqrt(self.bit_price / sum(self._weights))

    def _wanted(self, below_BC: Tensor, on: _OnDevice) -> _Wanted:
        """The metric of each row: what an error in each coefficient costs."""
        encoder = on.encoder
        top_BM, ids_BM = largest(below_BC, min(CANDIDATES, below_BC.shape[1]))
        basis_BMR = on.basis_CR[ids_BM]
        importance_BM = torch.zeros_like(top_BM)
        metric_BRR = basis_BMR.new_zeros(len(below_BC), basis_BMR.shape[2], basis_BMR.shape[2])
        plain_BR = (below_BC @ encoder.projection_CR).sub_(encoder.projected_mean_R)
        # What the components leave out of the candidates' logits, up to a constant per row.
        error_BM = top_BM - on.mean_C[ids_BM] - torch.bmm(basis_BMR, plain_BR[:, :, None])[:, :, 0]
        error_BM -= (below_BC @ encoder.weights_C)[:, None]
        gradient_BR = torch.zeros_like(plain_BR)
        for number, (temperature, weight) in enumerate(zip(TEMPERATURES, self._weights, strict=True)):
            p_BM = (top_BM / temperature - (below_BC / temperature).logsumexp(dim=1, keepdim=True)).exp_()
            left_B1 = (1.0 - p_BM.sum(dim=1, keepdim=True)).clamp_(min=0.0)
            mean_BR = torch.bmm(p_BM[:, None], basis_BMR)[:, 0] + left_B1 * encoder.rest_TR[number]
            metric_BRR.baddbmm_(mean_BR[:, :, None], mean_BR[:, None], alpha=-weight)
            metric_BRR.addcmul_(encoder.rest_TRR[number], weight * left_B1[:, :, None])
            importance_BM.add_(p_BM, alpha=weight)
            gradient_BR.addcmul_((p_BM * error_BM).sum(dim=1, keepdim=True), mean_BR, value=-weight)
        metric_BRR.baddbmm_((basis_BMR * importance_BM[:, :, None]).transpose(1, 2), basis_BMR)
        metric_BRR.diagonal(dim1=1, dim2=2).add_(RIDGE * sum(self._weights) * self._step**2)
        # The metric is U D U' with U upper triangular: a coefficient's best value depends on those before it.
        root_BRR = torch.linalg.cholesky(metric_BRR.flip(1, 2))
        scale_BR = root_BRR.diagonal(dim1=1, dim2=2)
        factor_BRR = (root_BRR / scale_BR[:, None]).flip(1, 2).transpose(1, 2).contiguous()
        gradient_BR += torch.bmm((importance_BM * error_BM)[:, None], basis_BMR)[:, 0]
        plain_BR += torch.cholesky_solve(gradient_BR.flip(1)[:, :, None], root_BRR)[:, :, 0].flip(1)
        return _Wanted(plain_BR, factor_BRR, 0.5 * scale_BR.flip(1).square())

    def _path(self, wanted: _Wanted, on: _OnDevice, price: float) -> tuple[Tensor, Tensor, Tensor]:
        return best_path(*wanted, price, on.frequencies, on.encoder.bits_GK)

    def _encoded(self, below_BC: Tensor, on: _OnDevice, num_bytes: int | None = None) -> tuple[Tensor, Tensor]:
        """Bytes, uint8 (B, G), and the values of the coefficients (B, R).

        Raises:
            InvalidLogits: a row needs more bytes than there are, at any price of a bit.
        """
        wanted, price = self._wanted(below_BC, on), self.bit_price
        numbers_BR, values_BR, tables_BR = self._path(wanted, on, price)
        packed_BG = _packed(numbers_BR, tables_BR, on)
        while num_bytes is not None and bool((too_long_B := _lengths(packed_BG) > num_bytes).any()):
            # Some rows are unlike the fitted ones.
            price *= 2
            if price > HIGHEST_PRICE:
                raise InvalidLogits(
                    f"TrellisLowRank: rows that are unlike the calibration logits need more than {num_bytes} bytes; "
                    "fit it to more and different rows"
                )
            some = _Wanted(*(each[too_long_B] for each in wanted))
            numbers_BR[too_long_B], values_BR[too_long_B], tables_BR[too_long_B] = self._path(some, on, price)
            packed_BG = _packed(numbers_BR, tables_BR, on)
        return packed_BG, values_BR


class _Wanted(NamedTuple):
    """What a row's coefficients should be, and what errors cost; see `best_path`."""

    values: Tensor
    """(B, R): the best coefficients in steps, not rounded."""
    factor: Tensor
    """(B, R, R)"""
    weight: Tensor
    """(B, R)"""


@dataclass(frozen=True, kw_only=True, eq=False)
class Fitted(PerDevice["_OnDevice"]):
    """The arrays that a fit determines; a cache stores them once.

    Raises:
        ValueError: they don't agree, or contain NaN or infinity.
    """

    basis: np.ndarray
    """float16 (R, C): the change of the logits for one step of each coefficient; the most important ones are last."""
    mean: np.ndarray
    """float32 (C,): the logits if all coefficients are 0."""
    scales: np.ndarray
    """uint8 (R,): how large each coefficient is: twice it is its first table of frequencies."""
    thresholds: np.ndarray
    """uint32 (R, L): the activity above which a coefficient is coded with the next tables."""
    frequencies: np.ndarray
    """uint16 (G, 2K + 1): how often each number from -K to K occurs, of 65 536; tables for even and odd values in
    turns."""
    longest: np.ndarray
    """uint32 (1,): the most bytes of a row."""
    weights: np.ndarray
    """float32 (C,): how much an error in the logit of each class matters, of sum 1; the decoder ignores it."""
    rest: np.ndarray
    """float32 (T, C): the mean probability of each class in rows where it is no candidate, at T = 1, 2 and 4, of sum 1;
    the decoder ignores it."""

    def __post_init__(self) -> None:
        rank, num_classes = self.scales.size, self.mean.size
        num_tables = 2 * (int(self.scales.max(initial=0)) + len(RATIOS) + 1)
        num_symbols = self.frequencies.size // num_tables
        expected = {
            "basis": ("float16", (rank, num_classes)),
            "mean": ("float32", (num_classes,)),
            "scales": ("uint8", (rank,)),
            "thresholds": ("uint32", (rank, len(RATIOS))),
            "frequencies": ("uint16", (num_tables, num_symbols)),
            "longest": ("uint32", (1,)),
            "weights": ("float32", (num_classes,)),
            "rest": ("float32", (len(TEMPERATURES), num_classes)),
        }
        check_arrays(self, expected)
        if num_symbols % 2 == 0:
            raise ValueError(f"frequencies are of {num_symbols} numbers; expected an odd number, from -K to K")
        if not (self.frequencies > 0).all() or not (self.frequencies.sum(axis=1, dtype=np.int64) == TOTAL).all():
            raise ValueError(f"frequencies are at least 1, and add up to {TOTAL} in each table")
        if not 1 <= int(self.longest[0]) <= 2**20:
            raise ValueError(f"longest is between 1 and {2**20}, not {int(self.longest[0])}")

    def _derive(self, device: torch.device) -> _OnDevice:
        return _OnDevice(self, device)


class _OnDevice:
    """Fitted arrays as tensors on a device, for decoding."""

    def __init__(self, fitted: Fitted, device: torch.device) -> None:
        self.mean_C = torch.from_numpy(fitted.mean).to(device)
        self.basis_CR = torch.from_numpy(fitted.basis.T.copy()).to(device).float()
        thresholds_RL = torch.from_numpy(fitted.thresholds.astype(np.int64)).to(device)
        self.frequencies = Frequencies(
            tables=torch.from_numpy(fitted.scales.astype(np.int64)).to(device),
            thresholds=thresholds_RL,
            start=int(fitted.thresholds[0, ORDINARY]),
        )
        frequencies_GK = fitted.frequencies.astype(np.int64)
        self.most = frequencies_GK.shape[1] // 2
        """K"""
        self.starts_GK = torch.from_numpy(np.pad(frequencies_GK.cumsum(axis=1), ((0, 0), (1, 0)))).to(device)
        """Sums of the frequencies of all smaller numbers."""
        self._fitted = fitted

    @functools.cached_property
    def symbols(self) -> Tensor:
        """int16 (G, TOTAL): the symbol at each number below the total."""
        frequencies_GK = self._fitted.frequencies
        symbols = np.arange(frequencies_GK.shape[1], dtype=np.int16)
        rows = [np.repeat(symbols, frequencies_K) for frequencies_K in frequencies_GK]
        return torch.from_numpy(np.stack(rows)).to(self.mean_C.device)

    @functools.cached_property
    def encoder(self) -> _ForEncoding:
        """What only encoding needs; it takes as much memory as the basis."""
        return _ForEncoding(self._fitted, self)


class _ForEncoding:
    """Tensors for encoding, derived from the fitted arrays."""

    def __init__(self, fitted: Fitted, on: _OnDevice) -> None:
        device = on.mean_C.device
        self.weights_C = torch.from_numpy(fitted.weights).to(device)
        self.projection_CR = least_squares(on.basis_CR, self.weights_C)
        self.projected_mean_R = on.mean_C @ self.projection_CR
        rest_TC = torch.from_numpy(fitted.rest).to(device)
        self.rest_TR = rest_TC @ on.basis_CR
        self.rest_TRR = torch.stack([(on.basis_CR.T * rest_C) @ on.basis_CR for rest_C in rest_TC])
        frequencies_GK = torch.from_numpy(fitted.frequencies.astype(np.float32)).to(device)
        self.bits_GK = math.log2(TOTAL) - frequencies_GK.log2()
        """Bits of the numbers from -K to K."""


def _packed(numbers_BR: Tensor, tables_BR: Tensor, on: _OnDevice) -> Tensor:
    symbols_BR = numbers_BR + on.most
    starts_BR = on.starts_GK[tables_BR, symbols_BR]
    sizes_BR = on.starts_GK[tables_BR, symbols_BR + 1] - starts_BR
    return range_encoded(zip(starts_BR.unbind(1), sizes_BR.unbind(1), strict=True), len(numbers_BR), numbers_BR.device)


def _unpacked(packed_BG: Tensor, on: _OnDevice) -> Tensor:
    """The values of the coefficients, float32 (B, R)."""
    decoder = RangeDecoder(packed_BG)
    state_B = torch.zeros(len(packed_BG), dtype=torch.int64, device=packed_BG.device)
    activity_B = torch.full_like(state_B, on.frequencies.start)
    values = []
    for place in range(len(on.frequencies.tables)):
        table_B = on.frequencies.table(place, activity_B, state_B)
        number_B = decoder.next(on.symbols, on.starts_GK, table_B) - on.most
        values.append(value(number_B, state_B))
        state_B, activity_B = next_state(state_B, number_B), next_activity(activity_B, values[-1])
    return torch.stack(values, dim=1).float()


def _lengths(packed_BG: Tensor) -> Tensor:
    """Bytes of each row without the zeros at its end, (B,)."""
    places_G = torch.arange(1, packed_BG.shape[1] + 1, device=packed_BG.device)
    return ((packed_BG != 0) * places_G).amax(dim=1)


def _plain_frequencies(rank: int) -> dict[str, np.ndarray]:
    """Valid ones, for no numbers in particular."""
    third = TOTAL // 3
    tables = np.tile(np.array([third, TOTAL - 2 * third, third], dtype=np.uint16), (2 * (len(RATIOS) + 1), 1))
    thresholds = np.ones((rank, len(RATIOS)), dtype=np.uint32)
    return {"scales": np.zeros(rank, dtype=np.uint8), "thresholds": thresholds, "frequencies": tables}


def _fitted_frequencies(numbers_BR: Tensor, is_odd_BR: Tensor) -> dict[str, np.ndarray]:
    """Scales, thresholds and frequencies of numbers like these."""
    num_rows, rank = numbers_BR.shape
    values_BR = 2 * numbers_BR + is_odd_BR
    expected_R = ((values_BR.abs().double().sum(dim=0) + 0.5) / (num_rows + 1)).numpy()
    octaves_R = np.log2(expected_R)
    scales_R = np.round((octaves_R - octaves_R.min()) * SCALES_PER_OCTAVE).astype(np.uint8)
    expected = UNIT * expected_R[0] * 2**DECAY
    thresholds_RL = np.empty((rank, len(RATIOS)), dtype=np.uint32)
    for place in range(rank):
        thresholds_RL[place] = np.round(np.array(RATIOS) * expected)
        expected += UNIT * expected_R[place] - expected / 2**DECAY
    frequencies = Frequencies(
        tables=torch.from_numpy(scales_R.astype(np.int64)),
        thresholds=torch.from_numpy(thresholds_RL.astype(np.int64)),
        start=int(thresholds_RL[0, ORDINARY]),
    )
    # Values of both signs are as frequent: the odd ones from 1 and from -1 on are counted together.
    magnitudes_BR = torch.where(numbers_BR < 0, -numbers_BR - is_odd_BR, numbers_BR)
    most = max(OWN_MAGNITUDES + 1, min(math.ceil(SPARE * int(numbers_BR.abs().max())), MOST_MAGNITUDE))
    counts_GK = torch.zeros(2 * (int(scales_R.max()) + len(RATIOS) + 1), most + 1)
    activity_B, one_B = torch.full((num_rows,), frequencies.start), torch.ones(num_rows)
    for place in range(rank):
        tables_B = frequencies.table(place, activity_B, is_odd_BR[:, place])
        counts_GK.index_put_((tables_B, magnitudes_BR[:, place]), one_B, accumulate=True)
        activity_B = next_activity(activity_B, values_BR[:, place])
    tables = [
        _smoothed(counts_K, is_odd=number % 2 == 1)
        for number, counts_K in enumerate(_with_neighbours(counts_GK.double().numpy()))
    ]
    return {"scales": scales_R, "thresholds": thresholds_RL, "frequencies": np.stack(tables)}


def _with_neighbours(counts_GK: np.ndarray) -> np.ndarray:
    """Counts with a few of those of the next smaller and larger scales, for tables that are seldom used."""
    few = BORROWED * counts_GK
    together_GK = counts_GK.copy()
    together_GK[2:] += few[:-2]
    together_GK[:-2] += few[2:]
    return together_GK


def _smoothed(counts_K: np.ndarray, *, is_odd: bool) -> np.ndarray:
    """Frequencies of the numbers from -K to K, uint16 (2K + 1), from counts of magnitudes."""
    reached_K = counts_K[::-1].cumsum()[::-1]
    stays_K = (counts_K[:OWN_MAGNITUDES] + 0.3) / (reached_K[:OWN_MAGNITUDES] + 0.6)
    p_K = np.empty(len(counts_K))
    p_K[:OWN_MAGNITUDES] = (stays_K * np.concatenate([[1.0], np.cumprod(1 - stays_K)[:-1]]))[: len(counts_K)]
    further = counts_K[OWN_MAGNITUDES:] @ np.arange(len(counts_K) - OWN_MAGNITUDES)
    ratio = min((further + 0.2) / (further + reached_K[OWN_MAGNITUDES] + 0.6), 0.98)
    p_K[OWN_MAGNITUDES:] = np.prod(1 - stays_K) * (1 - ratio) * ratio ** np.arange(len(counts_K) - OWN_MAGNITUDES)
    negative_K = p_K[-2::-1] if is_odd else p_K[:0:-1]
    symmetric = np.concatenate([negative_K / 2, p_K[:1] / (2 if is_odd else 1), p_K[1:] / 2])
    frequencies: np.ndarray = 1 + np.floor(symmetric / symmetric.sum() * (TOTAL - len(symmetric))).astype(np.int64)
    frequencies[len(p_K) - 1] += TOTAL - frequencies.sum()
    frequencies = frequencies.astype(np.uint16)
    return frequencies


def _below(logits_BC: Tensor) -> Tensor:
    """Logits below the row's largest, clamped."""
    return (logits_BC - logits_BC.amax(dim=1, keepdim=True)).clamp_(min=-DEEPEST)


def _slices(num_rows: int, rank: int, device: torch.device) -> Iterable[slice]:
    values = VALUES_AT_ONCE if device.type == "cpu" else DEVICE_VALUES_AT_ONCE
    size = min(ROWS_AT_ONCE, max(1, values // (rank * max(rank, CANDIDATES))))
    return (slice(start, min(start + size, num_rows)) for start in range(0, num_rows, size))
