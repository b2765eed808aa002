"""Integer coefficients over a low-rank basis of the teacher's logits, chosen by rate-distortion optimization.

decoded = mean + coefficients @ basis, plus corrections of k classes. Rounding each coefficient to the nearest integer
would spread the error evenly over all classes. Instead the coefficients are chosen to minimize the KL divergence, which
puts the error on improbable classes, with a price for every bit as in video coding.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from logitcache.arrays import ArraySpec
from logitcache.encodings.basis import centred, principal_components
from logitcache.encodings.fitted import FittedEncoding, PerDevice, check_arrays
from logitcache.encodings.packing import LARGEST, MixedRadix
from logitcache.encodings.protocol import float_tensor, full_precision, smallest_id_dtype
from logitcache.encodings.rate_distortion import best_of_each_group, bit_costs_of, costs_of_steps, limits_of
from logitcache.errors import UsageError
from logitcache.targets import FactoredTargets, factored_logits

# B batch, C classes, R rank, K corrected classes, M most probable classes of a row, J coefficients changed in a round

FURTHEST_CORRECTION = 127
CORRECTION_STEP = 0.25
TOP_CLASSES = 8
"""M: the most probable classes of a row; the initial estimate and the interactions of changes use only these."""
SQUARED_ERROR = 0.2
"""Weight of a row's mean squared error, which matters at high temperatures, relative to its KL at T = 1 in nats."""
ROWS_AT_ONCE, DEVICE_ROWS_AT_ONCE = 512, 4096
"""Rows that are searched together, on a CPU and on other devices."""
LARGEST_INTEGER, LARGEST_INTEGER_RANK = 127, 1024
"""Of an int8 basis; larger ranks could exceed what float32 sums exactly."""
FIT_ROWS = 2048
"""Rows on which the frequencies of coefficients are counted."""


@dataclass(frozen=True, kw_only=True)
class LowRank(FittedEncoding["Fitted"]):
    """Quantised coefficients over a fitted basis, and corrections of the k classes with the largest error.

    The basis is the principal components of the calibration logits, after each row's mean is subtracted. A row's
    coefficients start at the least-squares solution under the Fisher metric diag(p) - pp' of its most probable
    classes. They are rounded, and then changed one step at a time while this lowers
    KL(teacher ‖ decoded) + 0.2 · mean squared error + bit_price · bits. Decoding is one matrix product and a scatter.
    Each class's column of the basis is rounded to 8 bits times a power of two, so that CPUs with integer dot products
    (AVX-512 VNNI) compute it in a fraction of the time, exactly.

    Sources: Hinton et al. 2015 for the information in small logits; Sullivan and Wiegand 1998, "Rate-distortion
    optimization for video compression", for choosing quantized values by their rate. The combination is new.
    """

    name: ClassVar[str] = "lowrank"
    fitted_arrays: ClassVar[Mapping[str, int]] = {"basis": 2, "mean": 1, "limits": 1, "bit_costs": 2}
    holds_masks: ClassVar[bool] = False

    rank: int = 256
    """Components of the basis; 1 <= rank < C."""
    k: int = 1
    """Classes corrected in each row; 0 for none."""
    step: float = 0.075
    """Root mean square change of a class's logit for one step of one coefficient."""
    bit_price: float = 1e-4
    """Divergence, in nats, that is accepted to save one bit."""
    search: int = 4
    """Rounds of the search. Each can change eight coefficients; more rounds give a smaller divergence."""

    def __post_init__(self) -> None:
        for name, least in (("rank", 1), ("k", 0), ("search", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise UsageError(f"{name} is a whole number, at least {least}, not {value!r}")
        if not self.step > 0 or not self.bit_price >= 0:
            raise UsageError(f"step is positive and bit_price at least 0, not {self.step} and {self.bit_price}")

    def arrays(self, num_classes: int) -> dict[str, ArraySpec]:
        if self.rank >= num_classes or self.k > num_classes:
            raise UsageError(
                f"LowRank(rank={self.rank}, k={self.k}) needs more than {max(self.rank, self.k)} classes, not "
                f"{num_classes}; use Dense, or a smaller rank"
            )
        if self.fitted is not None and self.fitted.basis.shape != (self.rank, num_classes):
            raise UsageError(
                f"this LowRank was fitted to rank and classes {self.fitted.basis.shape}, not {(self.rank, num_classes)}"
            )
        num_bytes = self.rank if self.fitted is None else self.fitted.radix.num_bytes
        specs = {"coefficients": ArraySpec(dtype="uint8", row_shape=(num_bytes,), level=19)}
        if self.k:
            specs["ids"] = ArraySpec(dtype=smallest_id_dtype(num_classes), row_shape=(self.k,))
            specs["corrections"] = ArraySpec(dtype="int8", row_shape=(self.k,))
        return specs

    @full_precision
    def fit(self, calibration: Any) -> LowRank:
        num_rows, num_classes = calibration.shape
        self.arrays(num_classes)
        if num_rows <= self.rank:
            raise UsageError(
                f"LowRank(rank={self.rank}) can't be fitted on {num_rows} calibration rows; it needs more rows than "
                "the rank, preferably ten thousand or more: raise `cache.calibration`, or lower the rank"
            )
        mean_C, basis_RC = principal_components(calibration, self.rank)
        basis_RC *= self.step * math.sqrt(num_classes)
        # Rounded as it is stored: encoder and decoder must use the same basis.
        scale_C = _integer_scale(basis_RC)
        basis_RC = ((basis_RC / scale_C).round_() * scale_C).half().float()
        if not bool(torch.isfinite(basis_RC).all()):
            raise UsageError(f"LowRank: step={self.step} is too coarse: a step exceeds float16")
        limits_R = np.full(self.rank, LARGEST, dtype=np.uint16)
        fitted = Fitted(basis_RC.half().numpy(), mean_C.numpy(), limits_R, np.zeros((2, self.rank), dtype=np.float32))
        sample = np.random.default_rng(0).choice(num_rows, min(FIT_ROWS, num_rows), replace=False)
        logits_BC = float_tensor(calibration[np.sort(sample)])
        steps_BR = self._with(fitted)._coefficients(logits_BC)
        if float(steps_BR.abs().max()) >= LARGEST:
            raise UsageError(f"LowRank: step={self.step} is too fine: these logits are more than {LARGEST} steps apart")
        for _ in range(2):  # the bit costs and the chosen coefficients depend on each other
            fitted = Fitted(fitted.basis, fitted.mean, limits_R, bit_costs_of(steps_BR))
            steps_BR = self._with(fitted)._coefficients(logits_BC)
        return self._with(Fitted(fitted.basis, fitted.mean, limits_of(steps_BR), fitted.bit_costs))

    def _from_arrays(self, **arrays: np.ndarray) -> Fitted:
        return Fitted(**arrays)

    @full_precision
    def encode(self, logits_BC: Tensor, *, view: int = 0, start: int = 0) -> dict[str, Tensor]:
        del view, start
        fitted = self._fitted()
        on = fitted.on(logits_BC.device)
        parts: dict[str, list[Tensor]] = {}
        for piece_BC in torch.split(logits_BC, _rows_at_once(logits_BC)):
            steps_BR, decoded_BC, p_BC = self._search(centred(piece_BC), on)
            encoded = {"coefficients": on.radix.pack(steps_BR)}
            if self.k:
                encoded |= self._corrections(p_BC, decoded_BC.softmax(dim=1))
            for name, values in encoded.items():
                parts.setdefault(name, []).append(values)
        return {name: torch.cat(values) for name, values in parts.items()}

    def decode(self, encoded: Mapping[str, Tensor], num_classes: int) -> Tensor:
        return self.targets(encoded, num_classes).dense()

    def targets(self, encoded: Mapping[str, Tensor], num_classes: int) -> FactoredTargets:
        packed_BG = encoded["coefficients"]
        on = self._fitted().on(packed_BG.device)
        if self.k:
            ids_BK, corrections_BK = encoded["ids"].to(torch.int64), encoded["corrections"].float() * CORRECTION_STEP
        else:
            corrections_BK = on.mean_C.new_zeros(len(packed_BG), 0)
            ids_BK = corrections_BK.long()
        basis_RC, scale_C = on.decoding_basis
        coefficients_BR = on.radix.unpack(packed_BG) if scale_C is None else on.radix.unpack_int8(packed_BG)
        return FactoredTargets(coefficients_BR, basis_RC, on.mean_C, ids_BK, corrections_BK, scale_C)

    def _coefficients(self, logits_BC: Tensor) -> Tensor:
        """Coefficients as whole numbers of steps, float32 (B, R)."""
        on = self._fitted().on(logits_BC.device)
        pieces = torch.split(logits_BC, _rows_at_once(logits_BC))
        return torch.cat([self._search(centred(piece_BC), on)[0] for piece_BC in pieces])

    def _search(self, logits_BC: Tensor, on: _OnDevice) -> tuple[Tensor, Tensor, Tensor]:
        """Coefficients in whole steps (B, R), the decoded logits (B, C) and the teacher's probabilities (B, C).

        Only corrections need the decoded logits: if k is 0, they lack the changes of the last round.
        """
        num_classes = logits_BC.shape[1]
        error_weight = 2 * SQUARED_ERROR / num_classes * on.squared_norm
        p_BC = logits_BC.softmax(dim=1)
        top_BM, ids_BM = p_BC.topk(min(TOP_CLASSES, num_classes), dim=1)
        wanted_BC = logits_BC - on.mean_C
        plain_BR = (wanted_BC @ on.basis_CR).div_(on.squared_norm)
        # `index_select` takes a quarter of the time of indexing.
        basis_BMR = on.basis_CR.index_select(0, ids_BM.flatten()).view(*ids_BM.shape, -1)
        error_BM = wanted_BC.gather(1, ids_BM)
        steps_BR = plain_BR + _fisher_correction(error_BM, plain_BR, top_BM, basis_BMR, error_weight)
        steps_BR = steps_BR.round_().clamp_(-on.limit_R, on.limit_R)
        decoding_RC, scale_C = on.decoding_basis
        decoded_BC = factored_logits(steps_BR.to(decoding_RC.dtype), decoding_RC, on.mean_C, scale_C)
        if not self.search:
            return steps_BR, decoded_BC, p_BC
        # To second order, a step of a coefficient changes the cost by ±gradient + half the curvature.
        curvature_BR = _curvature(top_BM, basis_BMR, on.squared_norm / num_classes).add_(error_weight).mul_(0.5)
        up_BR, down_BR = (
            bits_BR.add_(curvature_BR)
            for bits_BR in costs_of_steps(steps_BR, on.bit_costs_2R, on.limit_R, self.bit_price)
        )
        for rounds_left in reversed(range(self.search)):
            q_BC = decoded_BC.softmax(dim=1)
            q_BM = q_BC.gather(1, ids_BM)
            # The basis is orthogonal, so the gradient of the squared error needs no matrix product.
            gradient_BR = q_BC.sub_(p_BC) @ on.basis_CR
            gradient_BR.add_(steps_BR, alpha=error_weight).sub_(plain_BR, alpha=error_weight)
            rising_BR, falling_BR = up_BR + gradient_BR, down_BR - gradient_BR
            change_BJ, which_BJ = best_of_each_group(torch.minimum(rising_BR, falling_BR))
            sign_BJ = (rising_BR.gather(1, which_BJ) == change_BJ).float().mul_(2).sub_(1)
            flips_BJ = _flips_that_help_together(change_BJ, which_BJ, sign_BJ, q_BM, basis_BMR)
            before_BJ = steps_BR.gather(1, which_BJ)
            after_BJ = before_BJ + flips_BJ
            steps_BR.scatter_(1, which_BJ, after_BJ)
            if not rounds_left and not self.k:
                break
            costs_2BJ, limit_BJ = on.bit_costs_2R[:, which_BJ], on.limit_R[which_BJ]
            for total_BR, old_BJ, new_BJ in zip(
                (up_BR, down_BR),
                costs_of_steps(before_BJ, costs_2BJ, limit_BJ, self.bit_price),
                costs_of_steps(after_BJ, costs_2BJ, limit_BJ, self.bit_price),
                strict=True,
            ):
                total_BR.scatter_add_(1, which_BJ, new_BJ.sub_(old_BJ))
            decoded_BC += F.embedding_bag(which_BJ, on.basis_RC, per_sample_weights=flips_BJ, mode="sum")
        return steps_BR, decoded_BC, p_BC

    def _corrections(self, p_BC: Tensor, q_BC: Tensor) -> dict[str, Tensor]:
        """Corrections, in steps, of the logits of the k classes with the largest error in probability."""
        num_classes = p_BC.shape[1]
        ids_BK = (p_BC - q_BC).abs_().topk(self.k, dim=1).indices
        # A constant per row is free: it gives the uncorrected classes the teacher's total probability for them.
        (p_BK, p_rest_B1), (q_BK, q_rest_B1) = (_kept_and_rest(x_BC.gather(1, ids_BK)) for x_BC in (p_BC, q_BC))
        wanted_BK = (p_BK / q_BK).log_() - (p_rest_B1 / q_rest_B1).log_()
        steps_BK = (wanted_BK / CORRECTION_STEP).round_().clamp_(-FURTHEST_CORRECTION, FURTHEST_CORRECTION)
        return {
            "ids": ids_BK.to(getattr(torch, smallest_id_dtype(num_classes))),
            "corrections": steps_BK.to(torch.int8),
        }


class Fitted(PerDevice["_OnDevice"]):
    """The arrays that `LowRank.fit` determines; a cache stores them once."""

    def __init__(self, basis: np.ndarray, mean: np.ndarray, limits: np.ndarray, bit_costs: np.ndarray) -> None:
        self.basis = basis
        """float16 (R, C): the change of the logits for one step of each coefficient."""
        self.mean = mean
        """float32 (C,): the mean of the logits."""
        self.limits = limits
        """uint16 (R,): the largest magnitude of each coefficient, in steps."""
        self.bit_costs = bit_costs
        """float32 (2, R): bits for each step away from zero, and extra bits for the first; the decoder ignores them."""
        expected = {
            "basis": ("float16", (limits.size, mean.size)),
            "mean": ("float32", (mean.size,)),
            "limits": ("uint16", (limits.size,)),
            "bit_costs": ("float32", (2, limits.size)),
        }
        check_arrays(self, expected)
        self.radix = MixedRadix(limits.tolist())

    def _derive(self, device: torch.device) -> _OnDevice:
        return _OnDevice(self, device)


class _OnDevice:
    """Fitted arrays as float32 tensors, with quantities derived from them for the search."""

    def __init__(self, fitted: Fitted, device: torch.device) -> None:
        self.radix = fitted.radix.to(device)
        self.mean_C = torch.from_numpy(fitted.mean).to(device)
        self.basis_RC = torch.from_numpy(fitted.basis).to(device).float()
        self.basis_CR = self.basis_RC.T.contiguous()
        self.squared_norm = float(self.basis_RC.square().sum(dim=1).mean())
        """Of each component; all have about the same norm."""
        self.limit_R = torch.from_numpy(fitted.limits.astype(np.float32)).to(device)
        self.bit_costs_2R = torch.from_numpy(fitted.bit_costs).to(device)
        self.decoding_basis: tuple[Tensor, Tensor | None] = self.basis_RC, None
        """The basis (R, C), and its scale (C,) where it is int8 because the device multiplies integers faster."""
        fast = device.type == "cpu" and _multiplies_integers() and len(fitted.limits) <= LARGEST_INTEGER_RANK
        if fast and int(fitted.limits.max()) <= LARGEST_INTEGER:
            scale_C = _integer_scale(self.basis_RC)
            integers_RC = self.basis_RC / scale_C
            if torch.equal(integers_RC, integers_RC.round()):  # older versions rounded the basis to float16 only
                self.decoding_basis = integers_RC.to(torch.int8), scale_C


@functools.cache
def _multiplies_integers() -> bool:
    """Whether this CPU has integer dot products, and torch reports it."""
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("avx512_vnni") or capabilities.get("amx_int8"))


def _integer_scale(basis_RC: Tensor) -> Tensor:
    """For each class, the smallest power of two of which the basis has at most 127, float32 (C,)."""
    largest_C = basis_RC.abs().amax(dim=0)
    # Not below the smallest float16.
    return torch.exp2(torch.log2(largest_C / LARGEST_INTEGER).ceil_().clamp_(min=-24))


def _rows_at_once(logits_BC: Tensor) -> int:
    return ROWS_AT_ONCE if logits_BC.device.type == "cpu" else DEVICE_ROWS_AT_ONCE


def _kept_and_rest(p_BK: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities of some classes, and the total of all others; both clamped above 0."""
    return p_BK.clamp(min=1e-12), (1.0 - p_BK.sum(dim=1, keepdim=True)).clamp_(min=1e-6)


def _fisher_correction(
    wanted_BM: Tensor, plain_BR: Tensor, p_BM: Tensor, basis_BMR: Tensor, error_weight: float
) -> Tensor:
    """The difference, in steps, between the solution under the Fisher metric and the least-squares coefficients.

    The solution minimizes ½ e'(diag(p) - pp')e over each row's most probable classes plus the weighted squared error
    of all classes. With the Woodbury identity the linear system has M unknowns instead of R.
    """
    error_BM1 = wanted_BM.unsqueeze(2) - torch.bmm(basis_BMR, plain_BR.unsqueeze(2))
    rest_B = (1.0 - p_BM.sum(dim=1)).clamp_(min=1e-4)
    # The inverse of diag(p) - pp' is diag(1/p) + 1/(1 - sum p), by Sherman and Morrison.
    system_BMM = torch.bmm(basis_BMR, basis_BMR.transpose(1, 2)).add_((error_weight / rest_B)[:, None, None])
    system_BMM.diagonal(dim1=1, dim2=2).add_(error_weight / p_BM.clamp(min=1e-6))
    solution_BM1 = torch.cholesky_solve(error_BM1, torch.linalg.cholesky_ex(system_BMM)[0])
    return torch.bmm(solution_BM1.transpose(1, 2), basis_BMR).squeeze(1)


def _curvature(p_BM: Tensor, basis_BMR: Tensor, mean_square: float) -> Tensor:
    """Second derivative of the KL with respect to each coefficient: the variance of its component under p, (B, R).

    It is exact for the most probable classes; for all others the component is assumed to have mean zero and its average
    square.
    """
    rest_B1 = 1.0 - p_BM.sum(dim=1, keepdim=True)
    mean_BR = torch.bmm(p_BM.unsqueeze(1), basis_BMR).squeeze(1)
    mean_square_BR = (rest_B1 * mean_square).repeat(1, mean_BR.shape[1])
    for p_B, basis_BR in zip(p_BM.unbind(1), basis_BMR.unbind(1), strict=True):  # all squares at once need fresh memory
        mean_square_BR.addcmul_(basis_BR, basis_BR * p_B[:, None])
    return mean_square_BR.sub_(mean_BR.square_())


def _flips_that_help_together(
    change_BJ: Tensor, which_BJ: Tensor, sign_BJ: Tensor, q_BM: Tensor, basis_BMR: Tensor
) -> Tensor:
    """The steps, best first, that lower the cost in combination with the steps taken before them, (B, J)."""
    moved_BMJ = basis_BMR.gather(2, which_BJ.unsqueeze(1).expand(-1, basis_BMR.shape[1], -1))
    moved_BJM = moved_BMJ.transpose(1, 2) * sign_BJ.unsqueeze(2)
    felt_BJM = moved_BJM * q_BM.unsqueeze(1)
    mean_BJ1 = felt_BJM.sum(dim=2, keepdim=True)
    together_BJJ = torch.bmm(felt_BJM, moved_BJM.transpose(1, 2)).sub_(mean_BJ1 * mean_BJ1.transpose(1, 2))
    taken_BJ = torch.zeros_like(change_BJ)
    for j in range(change_BJ.shape[1]):
        in_all_B = change_BJ[:, j] + (together_BJJ[:, j] * taken_BJ).sum(dim=1)
        taken_BJ[:, j] = in_all_B < 0
    return taken_BJ * sign_BJ
