"""How much the teacher's outputs differ between the views of a sample, and some samples to show."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from logitcache.cache.ground_truth import NO_TARGET, MixingOfCache, targets_of
from logitcache.cache.reader import LogitCache
from logitcache.extras.report.measures import entropies, jensen_shannon, log_softmax
from logitcache.extras.report.pictures import image_uri
from logitcache.extras.report.teacher import decoded_batches, select_rows
from logitcache.progress import track
from logitcache.stages.matched_data import MatchedData

# C classes, S samples, V views

MAX_SAMPLES = 2_000
"""Samples whose views are compared, at most."""
MAX_PROBABILITIES = 2**25
"""Probabilities held for the comparison, at most; lowers `MAX_SAMPLES` beyond about 16 000 classes."""
MAX_VIEWS = 16
"""Views compared, evenly spaced, at most."""
MAX_BLOCKS = 8
"""Blocks of each view that samples are taken from, unless all are."""
SHOWN = 8
"""Samples shown with the largest divergence; the same number is drawn at random."""
SHOWN_VIEWS = 4
"""Views shown of each sample."""
TOP = 3
"""Classes named for each picture."""
SEED = 0
"""Of the samples drawn at random."""


@dataclass(frozen=True)
class Disagreement:
    """The divergence between the views of each of S samples."""

    rows: np.ndarray
    """int64 (S,)."""
    divergence: np.ndarray
    """Jensen-Shannon divergence, float64 (S,), in nats."""
    views: list[int]
    """The views that were compared."""
    unmixed: bool
    """Only views in which the sample is not mixed were compared."""


@dataclass(frozen=True)
class ShownView:
    """One view of a sample with the teacher's output."""

    view: int
    top: list[tuple[int, float]]
    """(class, probability) of the most probable classes."""
    picture: str | None
    """A data URI; None without data, or where the input is not an image."""


@dataclass(frozen=True)
class ShownSample:
    """A sample with some of its views."""

    row: int
    key: str
    target: int
    """Its true class, or `NO_TARGET`."""
    divergence: float
    views: list[ShownView]


@dataclass(frozen=True)
class ChosenSample:
    """A sample of the compared view, on which decisions are shown."""

    row: int
    key: str
    target: int
    """Its true class, or `NO_TARGET`: unknown, or the row is mixed."""
    num_disagreeing: int
    """Students whose most probable class differs from the teacher's."""
    picture: str | None
    """A data URI; None without the data, or where the input is not an image."""


def disagreement(cache: LogitCache, views: Sequence[int]) -> Disagreement | None:
    """Compare the views of some samples; None where there is only one view.

    Mixup and CutMix give each view another partner, so mixed rows are left out if enough samples have two unmixed ones.
    """
    if len(views) < 2:
        return None
    num_views = min(MAX_VIEWS, len(views))
    views = [views[place * len(views) // num_views] for place in range(num_views)]
    max_rows = min(MAX_SAMPLES, max(SHOWN, MAX_PROBABILITIES // cache.num_classes))
    (rows_S,) = select_rows(cache, [0], max_rows=max_rows, max_blocks=MAX_BLOCKS).values()
    mixing = MixingOfCache(cache)
    used_VS = ~np.stack([mixing.of_rows(view, rows_S)[0] for view in views])
    compared_S = used_VS.sum(axis=0) >= 2
    unmixed = not used_VS.all() and int(compared_S.sum()) >= 2 * SHOWN
    if not unmixed:
        used_VS, compared_S = np.ones_like(used_VS), np.ones(len(rows_S), dtype=np.bool_)
    sums_SC = torch.zeros(len(rows_S), cache.num_classes, dtype=torch.float64)
    entropies_S = torch.zeros(len(rows_S), dtype=torch.float64)
    with track("comparing views", len(views) * len(rows_S), unit="rows") as meter:
        for view, used_S in zip(views, used_VS, strict=True):
            for rows, logits_BC in decoded_batches(cache, view, rows_S[compared_S & used_S]):
                places, p_BC = np.searchsorted(rows_S, rows), log_softmax(logits_BC).double().exp()
                sums_SC[places] += p_BC
                entropies_S[places] += entropies(p_BC)
            meter.advance(len(rows_S))
    compared = torch.from_numpy(compared_S)
    counts_S = torch.from_numpy(used_VS.sum(axis=0))[compared]
    divergence_S = jensen_shannon(sums_SC[compared] / counts_S[:, None], entropies_S[compared] / counts_S)
    return Disagreement(rows_S[compared_S], divergence_S, list(views), unmixed)


def shown_rows(found: Disagreement) -> tuple[list[int], list[int]]:
    """(rows with the largest divergence, others drawn at random), as positions in `found`."""
    order = np.argsort(-found.divergence, kind="stable")
    drawn = np.random.default_rng(SEED).permutation(order[SHOWN:])[:SHOWN]
    return order[:SHOWN].tolist(), drawn.tolist()


def shown_samples(
    cache: LogitCache, found: Disagreement, places: Sequence[int], matched: MatchedData | None
) -> list[ShownSample]:
    """Samples, each with the view closest to the mean distribution and those farthest from it."""
    mixing = MixingOfCache(cache)
    by_row: dict[int, list[tuple[int, np.ndarray]]] = {int(found.rows[place]): [] for place in places}
    rows = np.array(sorted(by_row))
    for view in found.views:
        mixed = mixing.of_rows(view, rows)[0] if found.unmixed else np.zeros(len(rows), dtype=np.bool_)
        for batch, logits_BC in decoded_batches(cache, view, rows[~mixed]):
            for row, p_C in zip(batch.tolist(), log_softmax(logits_BC).exp().numpy(), strict=True):
                by_row[row].append((view, p_C))
    chosen = {row: _nearest_and_farthest(outputs) for row, outputs in by_row.items()}
    pictures = rendered_pictures(matched, {row: [view for view, _ in outputs] for row, outputs in chosen.items()})
    targets = targets_of(cache)
    shown = []
    for place in places:
        row = int(found.rows[place])
        views = [ShownView(view, top_classes(p_C, TOP), pictures.get((view, row))) for view, p_C in chosen[row]]
        target = NO_TARGET if targets is None else int(targets[row])
        shown.append(ShownSample(row, sample_name(cache, row), target, float(found.divergence[place]), views))
    return shown


def _nearest_and_farthest(outputs: list[tuple[int, np.ndarray]]) -> list[tuple[int, np.ndarray]]:
    if len(outputs) <= SHOWN_VIEWS:
        return outputs
    mean_C = np.mean([p_C for _, p_C in outputs], axis=0)
    distances = [float(np.abs(p_C - mean_C).sum()) for _, p_C in outputs]
    order = np.argsort(distances, kind="stable").tolist()
    return [outputs[place] for place in sorted([order[0], *order[1 - SHOWN_VIEWS :]])]


def sample_name(cache: LogitCache, row: int) -> str:
    """The key of a row's sample, or its number where the cache has no sample table; of sequences with the position."""
    sample = int(cache.row_map.samples_of(row))
    name = str(sample) if cache.samples is None else cache.samples.key(sample)
    return name if cache.row_map.one_each else f"{name}, position {int(cache.row_map.positions_of(row))}"


def top_classes(p_C: np.ndarray, limit: int) -> list[tuple[int, float]]:
    """(class, probability) of the most probable classes, largest first."""
    return [(int(each), float(p_C[each])) for each in np.argsort(-p_C, kind="stable")[:limit]]


def rendered_pictures(
    matched: MatchedData | None, views_of_row: dict[int, list[int]]
) -> dict[tuple[int, int], str | None]:
    """A data URI for each (view, row) whose sample is in the local data; none for rows of sequences."""
    if matched is None or not matched.cache.row_map.one_each:
        return {}
    as_teacher, shared = matched.views(), matched.shared_views()
    pictures = {}
    with track("rendering samples", sum(map(len, views_of_row.values())), unit="pictures") as meter:
        for row, views in views_of_row.items():
            for view in views:
                if row in matched.index_of_row:
                    item = (view, matched.index_of_row[row])
                    pictures[view, row] = image_uri(as_teacher[item][1]) or image_uri(shared[item][1])
                meter.advance()
    return pictures
