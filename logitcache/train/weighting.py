"""Sample weights: by class size, by teacher confidence, or by the teacher's agreement with the true label."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from logitcache.cache.ground_truth import NO_TARGET, targets_of
from logitcache.cache.mean_probabilities import MeanProbabilities
from logitcache.cache.reader import LogitCache
from logitcache.errors import UsageError
from logitcache.registry import configured, unknown_name

# C classes, M samples of a run, N samples of a cache

NONE, CLASS_BALANCED, CONFIDENCE, AGREEMENT = "none", "class_balanced", "teacher_confidence", "teacher_agreement"
KINDS = (NONE, CLASS_BALANCED, CONFIDENCE, AGREEMENT)


@dataclass(frozen=True, kw_only=True)
class SampleWeights:
    """How a student's samples are weighted; the weights of a run have mean 1."""

    name: str = NONE
    """One of `KINDS`."""
    beta: float = 0.999
    """For `class_balanced`: 0 gives equal weights; near 1, weights are inversely proportional to class size."""

    def __post_init__(self) -> None:
        if self.name not in KINDS:
            raise UsageError(unknown_name("kind", self.name, KINDS))
        if not isinstance(self.beta, int | float) or isinstance(self.beta, bool) or not 0 <= self.beta < 1:
            raise UsageError(f"beta of class_balanced must be in [0, 1), not {self.beta!r}")

    @property
    def needs_teacher(self) -> bool:
        """Whether the weights depend on the labels of a cache."""
        return self.name in (CONFIDENCE, AGREEMENT)


def weights_from_config(value: Any) -> SampleWeights:
    """Sample weights from a name, or from a mapping with `name` and optionally `beta`.

    Raises:
        UsageError: unknown name or parameter.
    """
    given = {"name": value} if isinstance(value, str) else value
    if not isinstance(given, Mapping):
        raise UsageError(f"sample_weights must be one of {', '.join(KINDS)}, or a mapping with `name`, not {value!r}")
    weights = configured("sample_weights", SampleWeights, given)
    if "beta" in given and weights.name != CLASS_BALANCED:
        raise UsageError(f"beta is a parameter of class_balanced only, not of {weights.name}")
    return weights


def weights_config(weights: SampleWeights) -> dict[str, Any]:
    """As plain data, for `weights_from_config`."""
    return asdict(weights) if weights.name == CLASS_BALANCED else {"name": weights.name}


def class_balanced_weights(targets: np.ndarray, *, beta: float) -> np.ndarray:
    """A weight for each sample by the effective number of samples of its class, float64 (M,), with mean 1.

    A class of n samples has weight (1 - β) / (1 - βⁿ).

    Source: Cui et al. 2019, "Class-Balanced Loss Based on Effective Number of Samples" (arXiv:1901.05555).
    """
    sizes_C = np.bincount(targets)
    # -expm1(n log β) is 1 - βⁿ without the cancellation near β = 1.
    effective_C = -np.expm1(sizes_C * np.log(beta)) if beta > 0 else np.minimum(sizes_C, 1.0)
    return of_mean_one((1.0 - beta) / effective_C[targets])


def teacher_weights(cache: LogitCache, name: str, views: range) -> np.ndarray:
    """The teacher's confidence or agreement for each sample, float64 (N,); NaN where every view of it is mixed.

    The teacher's probabilities at T = 1 are averaged over the views in which the sample is not mixed.
    `teacher_confidence` is the largest mean probability, of sequences its mean over the sample's rows;
    `teacher_agreement` is the mean probability of the sample's true label.

    Raises:
        UsageError: every sample is mixed in every view, or the cache lacks true labels that are needed.
        CorruptCache: labels or sample table are damaged.
    """
    targets_N = targets_of(cache) if name == AGREEMENT else None
    if name == AGREEMENT and (targets_N is None or (targets_N == NO_TARGET).any()):
        raise UsageError(
            f"{cache.storage.url} has no target for some samples; {AGREEMENT} needs a target for every sample"
        )
    totals_N, counts_N = np.zeros(cache.num_samples), np.zeros(cache.num_samples, dtype=np.int64)
    for piece in MeanProbabilities(cache, views):
        rows = np.arange(piece.rows.start, piece.rows.stop)
        p_B = (
            piece.probabilities.max(axis=1)
            if targets_N is None
            else piece.probabilities[np.arange(len(rows)), targets_N[rows]]
        )
        samples_B, is_known_B = cache.row_map.samples_of(rows), piece.num_views > 0
        np.add.at(totals_N, samples_B, np.where(is_known_B, p_B, 0.0))
        np.add.at(counts_N, samples_B, is_known_B)
    return np.where(counts_N > 0, totals_N / np.maximum(counts_N, 1), np.nan)


def of_mean_one(weights: np.ndarray) -> np.ndarray:
    """Weights scaled to mean 1, float64 (M,); NaN (unknown) becomes 1.

    Raises:
        UsageError: all weights are 0 or unknown.
    """
    known = ~np.isnan(weights)
    mean = float(weights[known].mean()) if known.any() else 0.0
    if mean <= 0:
        raise UsageError("all sample weights are 0 or unknown; choose other `sample_weights`")
    return np.where(known, weights / mean, 1.0)
