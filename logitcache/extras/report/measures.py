"""Metrics of a teacher's logits: accuracy, calibration, entropy, confusion, and divergence between views."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from logitcache.cache.ground_truth import NO_TARGET
from logitcache.errors import InvalidLogits

# B batch, C classes, M rows, S samples


@dataclass(frozen=True)
class Predictions:
    """A few numbers for each of M rows of teacher logits."""

    targets: np.ndarray
    """int64 (M,); `NO_TARGET` where the row is not scored."""
    predicted: np.ndarray
    """int64 (M,): the most probable class."""
    confidence: np.ndarray
    """float32 (M,): its probability."""
    entropy: np.ndarray
    """float32 (M,), in nats."""
    nll: np.ndarray
    """float32 (M,): negative log-likelihood of the true class, in nats; NaN where the row is not scored."""
    in_top5: np.ndarray
    """bool (M,): at most four classes are more probable than the true one."""
    mixed: np.ndarray
    """bool (M,): the row mixes two samples."""

    def __len__(self) -> int:
        return len(self.targets)

    @property
    def scored(self) -> np.ndarray:
        """bool (M,): the rows with a true class."""
        return np.asarray(self.targets != NO_TARGET)

    @property
    def correct(self) -> np.ndarray:
        """bool (M,): the most probable class is the true one."""
        return np.asarray(self.targets == self.predicted)

    def where(self, chosen: np.ndarray) -> Predictions:
        """Some of the rows."""
        return Predictions(*(getattr(self, field.name)[chosen] for field in fields(self)))


def log_softmax(logits_BC: Tensor) -> Tensor:
    """Log-probabilities, float32 (B, C).

    Raises:
        InvalidLogits: a row does not define a distribution.
    """
    log_p_BC = torch.log_softmax(logits_BC.float(), dim=1)
    if log_p_BC.isnan().any():
        raise InvalidLogits(
            "the cache contains NaN, +inf or a row of -inf only, which is not a distribution; "
            "run `logitcache verify --deep` on it"
        )
    return log_p_BC


def entropies(p_BC: Tensor) -> Tensor:
    """Shannon entropy of each distribution, (B,), in nats."""
    entropies_B: Tensor = torch.special.entr(p_BC).sum(dim=1)
    return entropies_B


def jensen_shannon(mean_p_SC: Tensor, mean_entropy_S: Tensor) -> np.ndarray:
    """Generalised Jensen-Shannon divergence of each sample's views, (S,), in nats.

    The entropy of the mean distribution minus the mean entropy, all views weighted equally (Lin 1991, section IV):
    0 where all views agree, at most the log of their number.
    """
    return (entropies(mean_p_SC) - mean_entropy_S).clamp(min=0).numpy()


def predictions_of(logits_BC: Tensor, targets_B: np.ndarray, mixed_B: np.ndarray) -> Predictions:
    """The statistics of some rows.

    Args:
        logits_BC: float32 (B, C).
        targets_B: int64 (B,), in [0, C) or `NO_TARGET`.
        mixed_B: bool (B,).

    Raises:
        InvalidLogits: a row does not define a distribution.
    """
    log_p_BC = log_softmax(logits_BC)
    top_B, predicted_B = log_p_BC.max(dim=1)
    scored_B = targets_B != NO_TARGET
    true_B = log_p_BC.gather(1, torch.from_numpy(np.where(scored_B, targets_B, 0))[:, None])
    return Predictions(
        targets=targets_B,
        predicted=predicted_B.numpy(),
        confidence=top_B.exp().numpy(),
        entropy=entropies(log_p_BC.exp()).numpy(),
        nll=np.where(scored_B, -true_B[:, 0].numpy(), np.float32(np.nan)),
        in_top5=scored_B & ((log_p_BC > true_B).sum(dim=1) < 5).numpy(),
        mixed=mixed_B,
    )


def concatenate(parts: Sequence[Predictions]) -> Predictions:
    """The rows of all parts."""
    names = [field.name for field in fields(Predictions)]
    return Predictions(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))


def confusion(targets_M: np.ndarray, predicted_M: np.ndarray, num_classes: int) -> np.ndarray:
    """How often each true class (first axis) was predicted as each class, int64 (C, C)."""
    pairs = np.bincount(targets_M * num_classes + predicted_M, minlength=num_classes**2)
    return pairs.reshape(num_classes, num_classes)


def confused_pairs(targets_M: np.ndarray, predicted_M: np.ndarray, limit: int) -> list[tuple[int, int, int]]:
    """(true class, predicted class, rows) of the wrong rows, most frequent first."""
    wrong = targets_M != predicted_M
    pairs, counts = np.unique(np.stack([targets_M[wrong], predicted_M[wrong]]), axis=1, return_counts=True)
    order = np.argsort(-counts, kind="stable")[:limit]
    return [(int(pairs[0, place]), int(pairs[1, place]), int(counts[place])) for place in order]
