"""Quantised principal components of values other than logits, such as features and hidden states."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from logitcache.arrays import ArraySpec
from logitcache.encodings.fitted import FittedEncoding, PerDevice, check_arrays
from logitcache.encodings.packing import LARGEST as LARGEST_LIMIT
from logitcache.encodings.packing import MixedRadix
from logitcache.encodings.protocol import float_tensor
from logitcache.errors import UsageError

# B batch, D values of a row, R components, M rows that are fitted to

LARGEST = 2.0**60
"""Largest magnitude of a value."""
FIT_ROWS = 8192
"""Rows that are fitted to, drawn from the calibration rows."""
HELD_OUT = 4
"""Of the rows that are fitted to, one in so many determines the step and not the basis."""
FEWEST_ROWS = 32
ROUNDING = 0.4
"""Added before rounding down a magnitude: below 0.5 it saves bits for little error, as in video encoders."""
FEW_STEPS, HEADROOM = 3, 1.3
"""Coefficients of more than a few steps may be larger in other rows than in the fitted ones, by this factor."""
CUT_OFF = 1
"""Steps by which a coefficient may be cut off before its row gets a larger step."""
LARGEST_EXPONENT = 100


@dataclass(frozen=True, kw_only=True)
class Components(FittedEncoding["Fitted"]):
    """Principal components of a row, as whole numbers of one quantization step.

    One step for all components minimizes the bits at a given squared error: components that vary less than the step
    cost nearly nothing (reverse water-filling; Cover and Thomas, "Elements of Information Theory", 10.3.3). The step is
    fitted so that calibration rows that the basis has not seen have the wanted error. Larger rows than these get a
    larger step, a power of two times the fitted one.
    """

    name: ClassVar[str] = "components"
    fitted_arrays: ClassVar[Mapping[str, int]] = {"basis": 2, "mean": 1, "limits": 1, "step": 1}
    holds_masks: ClassVar[bool] = False
    keeps_constants: ClassVar[bool] = True
    largest: ClassVar[float] = LARGEST
    how_to_fit: ClassVar[str] = "call .fit(rows) with a sample of the output, (M, *shape)"

    error: float = 0.1
    """Root mean square error of the values, relative to their deviation from the mean row: 0.1 explains 99 % of their
    variance."""

    def __post_init__(self) -> None:
        if not isinstance(self.error, int | float) or not 0.005 <= self.error <= 0.9:
            raise UsageError(f"error is a relative error between 0.005 and 0.9, not {self.error!r}")

    def arrays(self, num_classes: int) -> dict[str, ArraySpec]:
        if self.fitted is not None and len(self.fitted.mean) != num_classes:
            raise UsageError(f"this Components was fitted to {len(self.fitted.mean)} values, not {num_classes}")
        num_bytes = num_classes if self.fitted is None else self.fitted.radix.num_bytes
        return {
            "coefficients": ArraySpec(dtype="uint8", row_shape=(num_bytes,), level=19),
            "exponent": ArraySpec(dtype="int8", row_shape=()),
        }

    def fit(self, calibration: Any) -> Components:
        num_rows = len(calibration)
        if num_rows < FEWEST_ROWS:
            raise UsageError(f"Components needs at least {FEWEST_ROWS} calibration rows, not {num_rows}")
        sample = np.sort(np.random.default_rng(0).permutation(num_rows)[:FIT_ROWS])
        rows_MD = float_tensor(calibration[sample]).flatten(1)
        if bool(self.refused(rows_MD).any()):
            raise UsageError(f"the calibration rows contain NaN, or values beyond {LARGEST:.2g}")
        is_held_out_M = torch.arange(len(rows_MD)) % HELD_OUT == 0
        mean_D = rows_MD[~is_held_out_M].mean(dim=0)
        basis_RD = _principal_components(rows_MD[~is_held_out_M] - mean_D).half().float()
        unseen_MD = rows_MD[is_held_out_M] - mean_D
        coefficients_MR = unseen_MD @ basis_RD.T
        size = float(unseen_MD.double().square().sum())
        # What the basis leaves out, as far as it is orthonormal.
        outside = max(0.0, size - float(coefficients_MR.double().square().sum()))
        allowed = self.error**2 * size - outside
        if not size > 0 or allowed <= 0:
            left = f"their components leave an error of {(outside / size) ** 0.5:.2f}" if size > 0 else "all are equal"
            raise UsageError(
                f"Components(error={self.error}) can't be fitted to {num_rows} rows of {rows_MD.shape[1]} values: "
                f"{left}. Give more and different calibration rows, or allow a larger error"
            )
        step = _step_for(coefficients_MR, allowed)
        all_MR = _rounded((rows_MD - mean_D) @ basis_RD.T / step).abs()
        limits_R = all_MR.amax(dim=0)
        limits_R = torch.where(limits_R > FEW_STEPS, (HEADROOM * limits_R).ceil(), limits_R)
        is_used_R = limits_R > 0
        if not bool(is_used_R.any()):
            is_used_R[0] = True
        fitted = Fitted(
            basis_RD[is_used_R].half().numpy(),
            mean_D.numpy(),
            limits_R[is_used_R].clamp(1, LARGEST_LIMIT).numpy().astype(np.uint16),
            np.array([step], dtype=np.float32),
        )
        return self._with(fitted)

    def _from_arrays(self, **arrays: np.ndarray) -> Fitted:
        return Fitted(**arrays)

    def encode(self, logits_BC: Tensor, *, view: int = 0, start: int = 0) -> dict[str, Tensor]:
        del view, start
        on = self._fitted().on(logits_BC.device)
        with torch.autocast(logits_BC.device.type, enabled=False):
            steps_BR = (logits_BC - on.mean_D) @ on.basis_DR / on.step
        excess_B = ((steps_BR.abs() - CUT_OFF) / (on.limit_R + 0.5)).amax(dim=1)
        exponent_B = torch.frexp(excess_B).exponent.clamp(0, LARGEST_EXPONENT)
        steps_BR = _rounded(torch.ldexp(steps_BR, -exponent_B[:, None])).clamp(-on.limit_R, on.limit_R)
        return {"coefficients": on.radix.pack(steps_BR), "exponent": exponent_B.to(torch.int8)}

    def decode(self, encoded: Mapping[str, Tensor], num_classes: int) -> Tensor:
        on = self._fitted().on(encoded["coefficients"].device)
        exponent_B1 = encoded["exponent"].to(torch.int32).clamp(0, LARGEST_EXPONENT)[:, None]
        with torch.autocast(exponent_B1.device.type, enabled=False):
            rows_BD = on.radix.unpack(encoded["coefficients"]) @ on.basis_DR.T
        # The product of step and power is finite, whatever an untrusted cache holds.
        scale_B1 = (on.step * torch.ldexp(torch.ones_like(rows_BD[:, :1]), exponent_B1)).clamp(
            max=2.0**LARGEST_EXPONENT
        )
        return (rows_BD * scale_B1 + on.mean_D).clamp(-(2.0**126), 2.0**126)

    def refused(self, logits_BC: Tensor) -> Tensor:
        # Comparisons with NaN are false, so this also finds NaN.
        return ~(logits_BC.abs().amax(dim=1) <= LARGEST)


class Fitted(PerDevice["_OnDevice"]):
    """The arrays that `Components.fit` determines; a cache stores them once for each output."""

    def __init__(self, basis: np.ndarray, mean: np.ndarray, limits: np.ndarray, step: np.ndarray) -> None:
        self.basis = basis
        """float16 (R, D): orthonormal rows."""
        self.mean = mean
        """float32 (D,)."""
        self.limits = limits
        """uint16 (R,): the largest magnitude of each coefficient, in steps."""
        self.step = step
        """float32 (1,): the quantization step of all components."""
        expected = {
            "basis": ("float16", (limits.size, mean.size)),
            "mean": ("float32", (mean.size,)),
            "limits": ("uint16", (limits.size,)),
            "step": ("float32", (1,)),
        }
        check_arrays(self, expected)
        if not float(step[0]) > 0:
            raise ValueError(f"step is {step[0]}, which is not positive")
        self.radix = MixedRadix(limits.tolist())

    def _derive(self, device: torch.device) -> _OnDevice:
        return _OnDevice(self, device)


class _OnDevice:
    """Fitted arrays as float32 tensors."""

    def __init__(self, fitted: Fitted, device: torch.device) -> None:
        self.radix = fitted.radix.to(device)
        self.mean_D = torch.from_numpy(fitted.mean).to(device)
        self.basis_DR = torch.from_numpy(fitted.basis).to(device).float().T.contiguous()
        self.limit_R = torch.from_numpy(fitted.limits.astype(np.float32)).to(device)
        self.step = torch.from_numpy(fitted.step).to(device)


def _principal_components(centred_MD: Tensor) -> Tensor:
    """Orthonormal principal components, float32 (R, D), from the smaller of covariance and Gram matrix."""
    num_rows, num_values = centred_MD.shape
    scaled_MD = centred_MD / centred_MD.abs().max().clamp(min=1e-30)
    if num_values <= num_rows:
        basis_RD = torch.linalg.eigh(scaled_MD.T @ scaled_MD)[1].flip(1).T
    else:
        values_M, vectors_MM = torch.linalg.eigh(scaled_MD @ scaled_MD.T)
        is_there_M = values_M > 1e-6 * values_M.max()
        basis_RD = (vectors_MM[:, is_there_M].T @ scaled_MD).flip(0)
        basis_RD = torch.linalg.qr(basis_RD.T)[0].T
    largest_R1 = basis_RD.gather(1, basis_RD.abs().argmax(dim=1, keepdim=True))
    components_RD: Tensor = (basis_RD * largest_R1.sign()).contiguous()
    return components_RD


def _rounded(steps: Tensor) -> Tensor:
    return (steps.abs() + ROUNDING).floor_() * steps.sign()


def _step_for(coefficients_MR: Tensor, allowed: float) -> float:
    """The largest step whose rounding has at most this sum of squared errors, to 1 %."""
    largest = float(coefficients_MR.abs().max())
    low, high = largest / LARGEST_LIMIT, 2 * largest
    while high > 1.01 * low:
        step = (low * high) ** 0.5
        error = (_rounded(coefficients_MR / step) * step - coefficients_MR).double().square().sum()
        low, high = (step, high) if float(error) <= allowed else (low, step)
    return low
