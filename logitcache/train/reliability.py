"""How well confidence matches accuracy: the reliability diagram and the expected calibration error."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

# M rows, K bins

NUM_BINS = 15
"""As in Guo et al. 2017, arXiv:1706.04599."""


@dataclass(frozen=True)
class Reliability:
    """Confidence and accuracy in K bins of equal width; NaN in an empty bin."""

    counts: np.ndarray
    confidence: np.ndarray
    accuracy: np.ndarray
    ece: float
    """Expected calibration error: the mean of |accuracy - confidence|, weighted by rows."""


def reliability(confidence_M: np.ndarray, correct_M: np.ndarray, *, num_bins: int = NUM_BINS) -> Reliability:
    """The reliability diagram and its expected calibration error (Guo et al. 2017, section 2; arXiv:1706.04599).

    Bins are (lower, upper], so a confidence of 1 is in the last bin.
    """
    bins_M = np.clip(np.ceil(confidence_M * num_bins).astype(np.int64) - 1, 0, num_bins - 1)
    confidence_K, counts_K = means_by(bins_M, confidence_M, num_bins)
    accuracy_K, _ = means_by(bins_M, correct_M, num_bins)
    ece = float(np.nansum(np.abs(accuracy_K - confidence_K) * counts_K) / max(counts_K.sum(), 1))
    return Reliability(counts_K, confidence_K, accuracy_K, ece)


def means_by(groups_M: np.ndarray, values_M: np.ndarray, num_groups: int) -> tuple[np.ndarray, np.ndarray]:
    """(mean float64, rows int64) of each group, such as a class; NaN for a group without rows."""
    counts = np.bincount(groups_M, minlength=num_groups)
    with np.errstate(invalid="ignore"):
        return np.bincount(groups_M, weights=values_M, minlength=num_groups) / counts, counts
