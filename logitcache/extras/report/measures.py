"""What is measured on a teacher's logits: accuracy, calibration, entropy, confusion, disagreement between views.

Arrays in, numbers out; nothing here knows of caches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

from logitcache.cache.ground_truth import NO_TARGET
from logitcache.errors import InvalidLogits

# B batch, C classes, M rows, K bins, S samples

NUM_BINS = 15
"""Of a reliability diagram, as in Guo et al. 2017."""


@dataclass(frozen=True)
class Answers:
    """What a teacher says of M rows, reduced to a few numbers for each."""

    targets: np.ndarray
    """int64 (M,); `NO_TARGET` where the row is not judged."""
    predicted: np.ndarray
    """int64 (M,): the most probable class."""
    confidence: np.ndarray
    """float32 (M,): its probability."""
    entropy: np.ndarray
    """float32 (M,), in nats."""
    nll: np.ndarray
    """float32 (M,): -log of the true class's probability, in nats; NaN where the row is not judged."""
    in_top5: np.ndarray
    """bool (M,): at most four classes are more probable than the true one."""
    mixed: np.ndarray
    """bool (M,): two samples were mixed in this row."""

    def __len__(self) -> int:
        return len(self.targets)

    @property
    def judged(self) -> np.ndarray:
        """bool (M,): the rows with a true class."""
        return np.asarray(self.targets != NO_TARGET)

    @property
    def right(self) -> np.ndarray:
        """bool (M,): the most probable class is the true one."""
        return np.asarray(self.targets == self.predicted)

    def where(self, chosen: np.ndarray) -> Answers:
        """Some of the rows."""
        return Answers(*(getattr(self, field.name)[chosen] for field in fields(self)))


def log_softmax(logits_BC: np.ndarray) -> np.ndarray:
    """Log-probabilities, float32 (B, C).

    Raises:
        InvalidLogits: a row of which no distribution can be made.
    """
    largest_B1 = logits_BC.max(axis=1, keepdims=True)
    if not np.isfinite(largest_B1).all():
        raise InvalidLogits(
            "the cache holds NaN, +inf or a row of nothing but -inf, of which no distribution can be made; "
            "run `logitcache verify --deep` on it"
        )
    shifted_BC = logits_BC - largest_B1
    sums_B1 = np.exp(shifted_BC).sum(axis=1, keepdims=True, dtype=np.float64)
    log_p_BC: np.ndarray = (shifted_BC - np.log(sums_B1)).astype(np.float32)
    return log_p_BC


def entropies(log_p_BC: np.ndarray) -> np.ndarray:
    """Shannon entropy of each row, float32 (B,), in nats; a class of no probability adds nothing."""
    finite_BC = np.where(np.isneginf(log_p_BC), np.float32(0), log_p_BC)
    return np.asarray(-np.einsum("bc,bc->b", np.exp(log_p_BC), finite_BC))


def answers_of(logits_BC: np.ndarray, targets_B: np.ndarray, mixed_B: np.ndarray) -> Answers:
    """What logits say about their rows.

    Args:
        logits_BC: float32 (B, C).
        targets_B: int64 (B,), in [0, C) or `NO_TARGET`.
        mixed_B: bool (B,).

    Raises:
        InvalidLogits: a row of which no distribution can be made.
    """
    log_p_BC = log_softmax(logits_BC)
    rows_B = np.arange(len(log_p_BC))
    predicted_B = log_p_BC.argmax(axis=1)
    judged_B = targets_B != NO_TARGET
    true_B = log_p_BC[rows_B, np.where(judged_B, targets_B, 0)]
    return Answers(
        targets=targets_B,
        predicted=predicted_B,
        confidence=np.exp(log_p_BC[rows_B, predicted_B]),
        entropy=entropies(log_p_BC),
        nll=np.where(judged_B, -true_B, np.float32(np.nan)),
        in_top5=judged_B & ((log_p_BC > true_B[:, None]).sum(axis=1) < 5),
        mixed=mixed_B,
    )


def concatenate(parts: Sequence[Answers]) -> Answers:
    """The rows of all parts."""
    return Answers(*(np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(Answers)))


@dataclass(frozen=True)
class Reliability:
    """Confidence against accuracy in K bins of equal width; a bin of no rows holds NaN."""

    counts: np.ndarray
    confidence: np.ndarray
    accuracy: np.ndarray
    ece: float
    """Expected calibration error: the mean of |accuracy - confidence|, weighted by rows."""


def reliability(confidence_M: np.ndarray, right_M: np.ndarray, *, num_bins: int = NUM_BINS) -> Reliability:
    """The reliability diagram and its expected calibration error (Guo et al. 2017, section 2; arXiv:1706.04599).

    Bins are (lower, upper], so a confidence of 1 lies in the last one.
    """
    bins_M = np.clip(np.ceil(confidence_M * num_bins).astype(np.int64) - 1, 0, num_bins - 1)
    counts_K = np.bincount(bins_M, minlength=num_bins)
    with np.errstate(invalid="ignore"):
        mean_confidence_K = np.bincount(bins_M, weights=confidence_M, minlength=num_bins) / counts_K
        accuracy_K = np.bincount(bins_M, weights=right_M, minlength=num_bins) / counts_K
    filled = counts_K > 0
    gaps = np.abs(accuracy_K - mean_confidence_K)[filled]
    ece = float((gaps * counts_K[filled]).sum() / max(counts_K.sum(), 1))
    return Reliability(counts_K, mean_confidence_K, accuracy_K, ece)


def confusion(targets_M: np.ndarray, predicted_M: np.ndarray, num_classes: int) -> np.ndarray:
    """How often each true class (first axis) was taken for each class, int64 (C, C)."""
    pairs = np.bincount(targets_M * num_classes + predicted_M, minlength=num_classes**2)
    return pairs.reshape(num_classes, num_classes)


def confused_pairs(targets_M: np.ndarray, predicted_M: np.ndarray, limit: int) -> list[tuple[int, int, int]]:
    """(true class, class it was taken for, how often) of the wrong rows, most often first."""
    wrong = targets_M != predicted_M
    pairs, counts = np.unique(np.stack([targets_M[wrong], predicted_M[wrong]]), axis=1, return_counts=True)
    order = np.argsort(-counts, kind="stable")[:limit]
    return [(int(pairs[0, place]), int(pairs[1, place]), int(counts[place])) for place in order]


def class_accuracy(targets_M: np.ndarray, right_M: np.ndarray, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """(accuracy float64 (C,), rows int64 (C,)) of each true class; NaN for a class without rows."""
    counts_C = np.bincount(targets_M, minlength=num_classes)
    with np.errstate(invalid="ignore"):
        return np.bincount(targets_M, weights=right_M, minlength=num_classes) / counts_C, counts_C


def jensen_shannon(mean_p_SC: np.ndarray, mean_entropy_S: np.ndarray) -> np.ndarray:
    """Generalised Jensen-Shannon divergence of each sample's views, float64 (S,), in nats.

    The entropy of the mean distribution less the mean of the entropies, all views weighing the same (Lin 1991,
    section IV): 0 where all views say the same, at most the log of their number.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        terms_SC = np.where(mean_p_SC > 0, mean_p_SC * np.log(mean_p_SC), 0.0)
    divergence_S: np.ndarray = np.maximum(-terms_SC.sum(axis=1) - mean_entropy_S, 0.0)
    return divergence_S
