"""Samples whose label is probably wrong, found by confident learning on a cache's logits.

Source: Northcutt, Jiang and Chuang 2021 (arXiv:1911.00068). The threshold t_j is the mean probability of class j over
the samples labelled j. The confident joint counts samples by their label i and the class j whose probability reaches
t_j; scaled to the label counts, it estimates how many samples with label i belong to class j. For each pair, that many
samples with the largest margin of j over i are suspects ("prune by noise rate").
"""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from logitcache.cache.ground_truth import NO_TARGET, targets_of
from logitcache.cache.mean_probabilities import MeanProbabilities, SampleProbabilities
from logitcache.cache.reader import open_sealed
from logitcache.errors import UsageError
from logitcache.storage import LocalStorage

# B batch, C classes, N samples

MAX_CLASSES = 8192
"""Of the confident joint, which has C x C numbers."""
CAUTION = (
    "A teacher that was trained on these samples and labels has learned some of the wrong labels, and the list is then "
    "too short. Use a good teacher that was not trained on them. Errors of the teacher appear as suspects too."
)
"""Shown with every list."""
_TOLERANCE = 1e-6
"""Of the thresholds, because probabilities are float32."""


@dataclass(frozen=True)
class Suspect:
    """A sample whose label is probably wrong."""

    rank: int
    """1 is the most suspicious."""
    row: int
    key: str
    given: int
    """Its label."""
    given_probability: float
    """The teacher's probability of the label, averaged over the sample's unmixed views."""
    teacher: int
    """The teacher's most probable class."""
    probability: float
    """Its probability. Suspects are ranked by the margin `probability - given_probability`."""


@dataclass(frozen=True)
class LabelNoise:
    """The result of confident learning on a cache."""

    suspects: list[Suspect]
    """The most suspicious first."""
    joint: np.ndarray
    """float64 (C, C): the estimated number of samples with label i (rows) that belong to class j (columns)."""
    thresholds: np.ndarray
    """float64 (C,): the mean probability of each class over the samples labelled with it; inf where there are none."""
    num_judged: int
    """Samples with a label and at least one unmixed view."""
    num_samples: int
    class_names: list[str] | None

    @property
    def noise_rate(self) -> float:
        """The estimated share of wrong labels among the judged samples."""
        return 1.0 - float(np.trace(self.joint)) / self.num_judged

    def name(self, number: int) -> str:
        """The name of a class, or its number where the cache has no names."""
        names = self.class_names or []
        return names[number] if number < len(names) else str(number)


def find_suspects(location: str) -> LabelNoise:
    """Find labels of a sealed cache that its logits contradict.

    Reads the blocks up to three times. Memory is bounded by one block's probabilities, the joint, and a few numbers per
    sample.

    Args:
        location: a cache with a sample table.

    Raises:
        UsageError: no targets, more than 8192 classes, or mixup or CutMix in every view of every sample.
        IncompleteCache: the cache is not sealed.
        CorruptCache: labels or sample table are damaged.
    """
    cache = open_sealed(location)
    cache.check_has_logits("suspects")
    if not cache.row_map.one_each:
        raise UsageError(f"{location} has several rows per sample; suspects needs one, with the sample's class")
    targets_N = targets_of(cache)
    if targets_N is None or cache.samples is None:
        raise UsageError(
            f"{location} has no targets, so there are no labels to check; create it with a sample table (`samples=`)"
        )
    if cache.num_classes > MAX_CLASSES:
        raise UsageError(f"{location} has {cache.num_classes:,} classes; suspects needs {MAX_CLASSES:,} or fewer")
    probabilities = MeanProbabilities(cache)
    thresholds_C, counts_C = confident_thresholds(probabilities, targets_N, cache.num_classes)
    num_judged = int(counts_C.sum())
    if not num_judged:
        raise UsageError(f"{location} has no sample with both a label and an unmixed view")
    joint_CC = calibrated(confident_joint(probabilities, targets_N, thresholds_C), counts_C)
    found = sorted(_pruned(probabilities, targets_N, joint_CC))
    suspects = [
        Suspect(rank, row, cache.samples.key(row), int(targets_N[row]), given_probability, label, probability)
        for rank, (_, row, given_probability, label, probability) in enumerate(found, 1)
    ]
    names = cache.manifest.identity.class_names
    return LabelNoise(suspects, joint_CC, thresholds_C, num_judged, cache.num_samples, names or None)


def confident_thresholds(
    probabilities: MeanProbabilities, targets_N: np.ndarray, num_classes: int
) -> tuple[np.ndarray, np.ndarray]:
    """(thresholds float64 (C,), inf for a class without samples; judged samples of each label, int64 (C,))."""
    sums_C, counts_C = np.zeros(num_classes), np.zeros(num_classes, dtype=np.int64)
    for piece in probabilities:
        given_B, p_BC, _ = _judged(piece, targets_N)
        np.add.at(sums_C, given_B, p_BC[np.arange(len(given_B)), given_B])
        counts_C += np.bincount(given_B, minlength=num_classes)
    thresholds_C = np.where(counts_C > 0, sums_C / np.maximum(counts_C, 1), np.inf)
    return thresholds_C, counts_C


def confident_joint(probabilities: MeanProbabilities, targets_N: np.ndarray, thresholds_C: np.ndarray) -> np.ndarray:
    """Samples by label and by the most probable class that reaches its threshold, int64 (C, C).

    Samples without such a class are not counted.
    """
    joint_CC = np.zeros((len(thresholds_C), len(thresholds_C)), dtype=np.int64)
    for piece in probabilities:
        given_B, p_BC, _ = _judged(piece, targets_N)
        confident_BC = np.where(p_BC >= thresholds_C - _TOLERANCE, p_BC, -1.0)
        found_B = confident_BC.argmax(axis=1)
        counted = confident_BC[np.arange(len(found_B)), found_B] >= 0
        np.add.at(joint_CC, (given_B[counted], found_B[counted]), 1)
    return joint_CC


def calibrated(joint_CC: np.ndarray, counts_C: np.ndarray) -> np.ndarray:
    """A confident joint scaled so that each row adds up to the judged samples with that label, float64 (C, C)."""
    scaled_CC = joint_CC.astype(np.float64)
    # A class that never reaches its threshold keeps its samples: there is no evidence against their labels.
    np.fill_diagonal(scaled_CC, np.where(counts_C > 0, np.maximum(scaled_CC.diagonal(), 1.0), 0.0))
    totals_C = scaled_CC.sum(axis=1)
    return np.asarray(scaled_CC * (counts_C / np.maximum(totals_C, 1.0))[:, None])


def _pruned(
    probabilities: MeanProbabilities, targets_N: np.ndarray, joint_CC: np.ndarray
) -> list[tuple[float, int, float, int, float]]:
    """(negative margin, row, probability of the label, most probable class, its probability) of each suspect.

    For label i and class j, these are the samples with the largest p_j - p_i, as many as the joint estimates, except
    those whose label is the most probable class.
    """
    quotas_CC = np.rint(joint_CC).astype(np.int64)
    np.fill_diagonal(quotas_CC, 0)
    pairs = np.argwhere(quotas_CC).tolist()
    best = {(i, j): (np.empty(0), np.empty(0, dtype=np.int64)) for i, j in pairs}
    disputed: dict[int, tuple[float, int, float, int, float]] = {}
    for piece in probabilities:
        given_B, p_BC, rows_B = _judged(piece, targets_N)
        top_B, own_B = p_BC.argmax(axis=1), p_BC[np.arange(len(given_B)), given_B]
        places_of = {given: np.flatnonzero(given_B == given) for given in {i for i, _ in pairs}}
        for i, j in pairs:
            margins, rows = best[i, j]
            margins = np.concatenate([margins, p_BC[places_of[i], j] - own_B[places_of[i]]])
            rows = np.concatenate([rows, rows_B[places_of[i]]])
            kept = np.argsort(-margins, kind="stable")[: quotas_CC[i, j]]
            best[i, j] = margins[kept], rows[kept]
        for place in np.flatnonzero(top_B != given_B).tolist():
            label, own, row = int(top_B[place]), float(own_B[place]), int(rows_B[place])
            probability = float(p_BC[place, label])
            disputed[row] = (own - probability, row, own, label, probability)
    chosen = {row for _, rows in best.values() for row in rows.tolist()}
    return [disputed[row] for row in chosen & disputed.keys()]


def _judged(piece: SampleProbabilities, targets_N: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(labels (B,), probabilities (B, C), rows (B,)) of the samples of a piece with a label and an unmixed view."""
    given_B = targets_N[piece.rows.start : piece.rows.stop]
    judged = np.flatnonzero((given_B != NO_TARGET) & (piece.num_views > 0))
    return given_B[judged], piece.probabilities[judged], piece.rows.start + judged


def write_suspects(noise: LabelNoise, path: Path, *, top: int | None = None) -> int:
    """Write suspects as CSV, atomically; returns their number.

    Text that a spreadsheet would run as a formula is prefixed with an apostrophe; `row` identifies the sample anyway.

    Raises:
        StorageError: the file can't be written.
    """
    chosen = noise.suspects[:top]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["rank", "row", "key", "given", "given_probability", "teacher", "teacher_probability"])
    for each in chosen:
        key, given, teacher = map(_without_formula, (each.key, noise.name(each.given), noise.name(each.teacher)))
        writer.writerow(
            [each.rank, each.row, key, given, f"{each.given_probability:.6f}", teacher, f"{each.probability:.6f}"]
        )
    LocalStorage(path.parent).put(path.name, text.getvalue().encode())
    return len(chosen)


def _without_formula(text: str) -> str:
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text
