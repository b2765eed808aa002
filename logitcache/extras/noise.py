"""Samples whose label is probably wrong, by confident learning on a cache's own logits.

Source: Northcutt, Jiang and Chuang 2021 (arXiv:1911.00068). The teacher is confident of class j on a sample where its
probability of j reaches t_j, the mean probability of j over the samples that are labelled j. Counting samples by the
label that they have and the class that the teacher is confident of gives the confident joint; scaled to the labels'
own counts, it says how many samples of label i are truly of class j. So many of label i are suspects: those with the
largest margin of j over i ("prune by noise rate").

A teacher that was trained on these very samples and labels has learned some of the mistakes, and then finds too few; a
poor teacher's own mistakes look like wrong labels.
"""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from logitcache.cache.ground_truth import NO_TARGET, targets_of
from logitcache.cache.mean_probabilities import MeanProbabilities, SampleProbabilities
from logitcache.cache.reader import LogitCache, open_cache
from logitcache.errors import UsageError, unsealed
from logitcache.storage import LocalStorage

# B batch, C classes, K columns, N samples

MAX_CLASSES = 8192
"""Of a confident joint, which takes C x C numbers."""
CAUTION = (
    "A teacher that was trained on these samples with these labels has learned some of their mistakes; then the list "
    "is too short. Best is a good teacher that never saw them: where a teacher errs, a right label may be listed too."
)
"""What everybody who reads the list should know."""
_TOLERANCE = 1e-6
"""Below a threshold that still counts as reaching it: probabilities are float32."""


@dataclass(frozen=True)
class Suspect:
    """A sample whose label is probably wrong."""

    rank: int
    """1 is the most suspicious."""
    row: int
    key: str
    given: int
    """The label that it has."""
    given_probability: float
    """The teacher's, averaged over the sample's unmixed views."""
    teacher: int
    """The teacher's most probable class."""
    probability: float
    """The teacher's, of that class; less `given_probability` it is the margin that suspects are ranked by."""


@dataclass(frozen=True)
class LabelNoise:
    """What confident learning finds in a cache."""

    suspects: list[Suspect]
    """The most suspicious first."""
    joint: np.ndarray
    """float64 (C, C): how many samples with label i (rows) are truly of class j (columns), estimated."""
    thresholds: np.ndarray
    """float64 (C,): the mean probability of each class over the samples that have it; inf where none has."""
    num_judged: int
    """Samples with a label and at least one unmixed view."""
    num_samples: int
    class_names: list[str] | None

    @property
    def noise_rate(self) -> float:
        """Share of the judged samples whose label is wrong, estimated."""
        return 1.0 - float(np.trace(self.joint)) / self.num_judged

    def name(self, number: int) -> str:
        """A class by name, or by number where the cache has no names."""
        names = self.class_names or []
        return names[number] if number < len(names) else str(number)


def find_suspects(location: str) -> LabelNoise:
    """Hold a sealed cache's targets against its logits.

    Takes up to three passes over the blocks; memory is bounded by one block's probabilities, the joint, and a few
    numbers a sample.

    Args:
        location: the cache, made with a sample table.

    Raises:
        UsageError: no targets, more than 8192 classes, or mixup or CutMix in every view of every sample.
        IncompleteCache: the cache is not sealed.
        CorruptCache: labels or sample table are damaged.
    """
    cache = open_cache(location)
    if not cache.sealed:
        raise unsealed(location)
    targets_N = targets_of(cache)
    if targets_N is None:
        raise UsageError(
            f"{location} holds no targets, so there is no label that the teacher could doubt; "
            "create it with a sample table (`samples=`)"
        )
    if cache.num_classes > MAX_CLASSES:
        raise UsageError(
            f"{location} has {cache.num_classes:,} classes; a confident joint is made for {MAX_CLASSES:,} at most"
        )
    opinions = MeanProbabilities(cache)
    thresholds_C, counts_C = confident_thresholds(opinions, targets_N, cache.num_classes)
    num_judged = int(counts_C.sum())
    if not num_judged:
        raise UsageError(f"{location} has no sample with both a label and an unmixed view")
    joint_CC = calibrated(confident_joint(opinions, targets_N, thresholds_C), counts_C)
    suspects = _named(cache, _pruned(opinions, targets_N, joint_CC), targets_N)
    names = cache.manifest.identity.class_names
    return LabelNoise(suspects, joint_CC, thresholds_C, num_judged, cache.num_samples, names or None)


def confident_thresholds(
    opinions: MeanProbabilities, targets_N: np.ndarray, num_classes: int
) -> tuple[np.ndarray, np.ndarray]:
    """(thresholds float64 (C,), inf for a class that no sample has; judged samples of each label, int64 (C,))."""
    sums_C, counts_C = np.zeros(num_classes), np.zeros(num_classes, dtype=np.int64)
    for piece in opinions:
        given_B, p_BC, _ = _judged(piece, targets_N)
        np.add.at(sums_C, given_B, p_BC[np.arange(len(given_B)), given_B])
        counts_C += np.bincount(given_B, minlength=num_classes)
    thresholds_C = np.where(counts_C > 0, sums_C / np.maximum(counts_C, 1), np.inf)
    return thresholds_C, counts_C


def confident_joint(opinions: MeanProbabilities, targets_N: np.ndarray, thresholds_C: np.ndarray) -> np.ndarray:
    """Samples by label and by the class that the teacher is confident of, int64 (C, C).

    Of several such classes the most probable one counts; a sample without any is left out.
    """
    joint_CC = np.zeros((len(thresholds_C), len(thresholds_C)), dtype=np.int64)
    for piece in opinions:
        given_B, p_BC, _ = _judged(piece, targets_N)
        confident_BC = np.where(p_BC >= thresholds_C - _TOLERANCE, p_BC, -1.0)
        found_B = confident_BC.argmax(axis=1)
        counted = confident_BC[np.arange(len(found_B)), found_B] >= 0
        np.add.at(joint_CC, (given_B[counted], found_B[counted]), 1)
    return joint_CC


def calibrated(joint_CC: np.ndarray, counts_C: np.ndarray) -> np.ndarray:
    """A confident joint scaled so that each row adds up to the judged samples that have its label, float64 (C, C)."""
    scaled_CC = joint_CC.astype(np.float64)
    # A class that the teacher was never confident of keeps its samples: nothing speaks against their labels.
    np.fill_diagonal(scaled_CC, np.where(counts_C > 0, np.maximum(scaled_CC.diagonal(), 1.0), 0.0))
    totals_C = scaled_CC.sum(axis=1)
    return np.asarray(scaled_CC * (counts_C / np.maximum(totals_C, 1.0))[:, None])


def _pruned(opinions: MeanProbabilities, targets_N: np.ndarray, joint_CC: np.ndarray) -> dict[int, tuple[float, ...]]:
    """(margin, class, its probability, the label's) of each suspect, by row.

    For label i and class j these are the joint's number of samples with the largest p_j - p_i, but for those whose
    label is the teacher's first class.
    """
    quotas_CC = np.rint(joint_CC).astype(np.int64)
    np.fill_diagonal(quotas_CC, 0)
    doubted = {int(given): np.flatnonzero(quotas_CC[given]) for given in np.flatnonzero(quotas_CC.any(axis=1))}
    best: dict[tuple[int, int], tuple[np.ndarray, np.ndarray]] = {}
    found: dict[int, tuple[float, ...]] = {}
    for piece in opinions:
        given_B, p_BC, rows_B = _judged(piece, targets_N)
        first_B, own_B = p_BC.argmax(axis=1), p_BC[np.arange(len(given_B)), given_B]
        for given, classes in doubted.items():
            places = np.flatnonzero(given_B == given)
            for other in classes.tolist():
                margins, rows = best.get((given, other), (np.empty(0), np.empty(0, dtype=np.int64)))
                margins = np.concatenate([margins, p_BC[places, other] - own_B[places]])
                rows = np.concatenate([rows, rows_B[places]])
                kept = np.argsort(-margins, kind="stable")[: quotas_CC[given, other]]
                best[given, other] = margins[kept], rows[kept]
        for place in np.flatnonzero(first_B != given_B):
            top, own = float(p_BC[place, first_B[place]]), float(own_B[place])
            found[int(rows_B[place])] = (top - own, int(first_B[place]), top, own)
    chosen = {int(row) for _, rows in best.values() for row in rows}
    return {row: what for row, what in found.items() if row in chosen}


def _judged(piece: SampleProbabilities, targets_N: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(labels (B,), probabilities (B, C), rows (B,)) of the samples of a piece with a label and an unmixed view."""
    given_B = targets_N[piece.rows.start : piece.rows.stop]
    judged = np.flatnonzero((given_B != NO_TARGET) & (piece.num_views > 0))
    return given_B[judged], piece.probabilities[judged], piece.rows.start + judged


def _named(cache: LogitCache, found: dict[int, tuple[float, ...]], targets_N: np.ndarray) -> list[Suspect]:
    order = sorted(found, key=lambda row: (-found[row][0], row))
    samples = cache.samples
    assert samples is not None
    return [
        Suspect(
            rank=rank,
            row=row,
            key=samples.key(row),
            given=int(targets_N[row]),
            given_probability=found[row][3],
            teacher=int(found[row][1]),
            probability=found[row][2],
        )
        for rank, row in enumerate(order, 1)
    ]


def write_suspects(noise: LabelNoise, path: Path, *, top: int | None = None) -> int:
    """Write suspects as CSV, whole or not at all; returns how many.

    Text that a spreadsheet would run as a formula gets an apostrophe before it; `row` names the sample all the same.

    Raises:
        StorageError: the file can't be written.
    """
    chosen = noise.suspects[:top]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["rank", "row", "key", "given", "given_probability", "teacher", "teacher_probability"])
    for each in chosen:
        given, teacher = _inert(noise.name(each.given)), _inert(noise.name(each.teacher))
        numbers = f"{each.given_probability:.6f}", f"{each.probability:.6f}"
        writer.writerow([each.rank, each.row, _inert(each.key), given, numbers[0], teacher, numbers[1]])
    LocalStorage(path.parent).put(path.name, text.getvalue().encode())
    return len(chosen)


def _inert(text: str) -> str:
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text
