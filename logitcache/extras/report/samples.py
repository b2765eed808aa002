"""Samples: how far their views are from saying the same, and some of them as pictures."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from logitcache.cache.ground_truth import NO_TARGET, MixingOfCache, targets_of
from logitcache.cache.reader import LogitCache
from logitcache.extras.report.fitted import FittedData
from logitcache.extras.report.measures import entropies, jensen_shannon, log_softmax
from logitcache.extras.report.teacher import chosen_rows, decoded_batches
from logitcache.progress import track

# C classes, H height, W width, S samples, V views

MAX_SAMPLES = 2_000
"""Samples whose views are compared, at most."""
MAX_PROBABILITIES = 2**25
"""Probabilities held for that, at most; it lowers `MAX_SAMPLES` beyond some 16 000 classes."""
MAX_VIEWS = 16
"""Views compared, evenly chosen, at most."""
MAX_BLOCKS = 8
"""Blocks of each view that the samples are taken from, where not all are."""
SHOWN = 8
"""Samples shown whose views disagree most; as many are drawn at random."""
SHOWN_VIEWS = 4
"""Views shown of each."""
TOP = 3
"""Classes named for each picture."""
MAX_SIDE = 112
"""Pixels of a picture's longer side on the page."""
SEED = 0
"""Of the samples drawn at random."""


@dataclass(frozen=True)
class Disagreement:
    """How far the views of each of S samples are from saying the same."""

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
    """One view of a sample: what the teacher said, and what it saw."""

    view: int
    top: list[tuple[int, float]]
    """(class, probability) of the most probable classes."""
    picture: str | None
    """A data URI; None without data, or where the input is no image."""


@dataclass(frozen=True)
class ShownSample:
    """A sample with some of its views."""

    row: int
    key: str
    target: int
    """Its true class, or `NO_TARGET`."""
    divergence: float
    views: list[ShownView]


def disagreement(cache: LogitCache, views: Sequence[int]) -> Disagreement | None:
    """Compare the views of some samples; None where there is but one view.

    Mixup and CutMix give every view another partner, so mixed rows are left out where enough samples have two others.
    """
    if len(views) < 2:
        return None
    views = [views[place * len(views) // min(MAX_VIEWS, len(views))] for place in range(min(MAX_VIEWS, len(views)))]
    max_rows = min(MAX_SAMPLES, max(SHOWN, MAX_PROBABILITIES // cache.num_classes))
    (rows_S,) = chosen_rows(cache, [0], max_rows=max_rows, max_blocks=MAX_BLOCKS).values()
    mixing = MixingOfCache(cache)
    mixed_VS = np.stack([mixing.of_rows(view, rows_S)[0] for view in views])
    compared_S = (~mixed_VS).sum(axis=0) >= 2
    unmixed = bool(mixed_VS.any()) and int(compared_S.sum()) >= 2 * SHOWN
    if not unmixed:
        mixed_VS, compared_S = np.zeros_like(mixed_VS), np.ones(len(rows_S), dtype=np.bool_)
    sums_SC = np.zeros((len(rows_S), cache.num_classes))
    entropies_S = np.zeros(len(rows_S))
    with track("comparing views", len(views) * len(rows_S), unit="rows") as meter:
        for view, mixed_S in zip(views, mixed_VS, strict=True):
            counted = np.flatnonzero(compared_S & ~mixed_S)
            done = 0
            for rows, logits_BC in decoded_batches(cache, view, rows_S[counted]):
                log_p_BC = log_softmax(logits_BC)
                places = counted[done : done + len(rows)]
                sums_SC[places] += np.exp(log_p_BC)
                entropies_S[places] += entropies(log_p_BC)
                done += len(rows)
            meter.advance(len(rows_S))
    counts_S = (~mixed_VS).sum(axis=0)[compared_S]
    divergence_S = jensen_shannon(sums_SC[compared_S] / counts_S[:, None], entropies_S[compared_S] / counts_S)
    return Disagreement(rows_S[compared_S], divergence_S, list(views), unmixed)


def shown_rows(found: Disagreement) -> tuple[list[int], list[int]]:
    """(rows whose views disagree most, others drawn at random), as positions in `found`."""
    order = np.argsort(-found.divergence, kind="stable")
    most, rest = order[:SHOWN], order[SHOWN:]
    drawn = np.random.default_rng(SEED).permutation(rest)[:SHOWN]
    return most.tolist(), drawn.tolist()


def shown_samples(
    cache: LogitCache, found: Disagreement, places: Sequence[int], fitted: FittedData | None
) -> list[ShownSample]:
    """Samples with the views that say what is farthest from their mean, and the one that is nearest to it."""
    mixing = MixingOfCache(cache)
    by_row: dict[int, list[tuple[int, np.ndarray]]] = {int(found.rows[place]): [] for place in places}
    rows = np.array(sorted(by_row))
    for view in found.views:
        mixed = mixing.of_rows(view, rows)[0] if found.unmixed else np.zeros(len(rows), dtype=np.bool_)
        for batch, logits_BC in decoded_batches(cache, view, rows[~mixed]):
            for row, log_p_C in zip(batch.tolist(), log_softmax(logits_BC), strict=True):
                by_row[row].append((view, np.exp(log_p_C)))
    chosen = {row: _telling_views(said) for row, said in by_row.items()}
    pictures = (
        {}
        if fitted is None
        else rendered_pictures(fitted, {row: [view for view, _ in said] for row, said in chosen.items()})
    )
    targets, samples = targets_of(cache), cache.samples
    shown = []
    for place in places:
        row = int(found.rows[place])
        views = [ShownView(view, _top(p_C), pictures.get((view, row))) for view, p_C in chosen[row]]
        key = str(row) if samples is None else samples.key(row)
        target = NO_TARGET if targets is None else int(targets[row])
        shown.append(ShownSample(row, key, target, float(found.divergence[place]), views))
    return shown


def _telling_views(said: list[tuple[int, np.ndarray]]) -> list[tuple[int, np.ndarray]]:
    if len(said) <= SHOWN_VIEWS:
        return said
    mean_C = np.mean([p_C for _, p_C in said], axis=0)
    distances = [float(np.abs(p_C - mean_C).sum()) for _, p_C in said]
    order = np.argsort(distances, kind="stable").tolist()
    return [said[place] for place in sorted([order[0], *order[1 - SHOWN_VIEWS :]])]


def _top(p_C: np.ndarray) -> list[tuple[int, float]]:
    return [(int(each), float(p_C[each])) for each in np.argsort(-p_C, kind="stable")[:TOP]]


def rendered_pictures(fitted: FittedData, views_of_row: dict[int, list[int]]) -> dict[tuple[int, int], str | None]:
    """A data URI for each (view, row) whose sample is at hand."""
    index_of_row = fitted.index_of_row()
    as_teacher, shared = fitted.views(), fitted.shared_views()
    pictures = {}
    with track("rendering samples", sum(map(len, views_of_row.values())), unit="pictures") as meter:
        for row, views in views_of_row.items():
            for view in views:
                if row in index_of_row:
                    item = (view, index_of_row[row])
                    pictures[view, row] = data_uri(as_teacher[item][1]) or data_uri(shared[item][1])
                meter.advance()
    return pictures


def data_uri(image: Any) -> str | None:
    """An image tensor (1 or 3, H, W) as a small PNG inside a URI; None for anything else.

    Values beyond [0, 1], as normalisation leaves them, are stretched to it from the least to the largest.
    """
    from PIL import Image

    if not isinstance(image, torch.Tensor) or image.ndim != 3 or image.shape[0] not in (1, 3) or not image.numel():
        return None
    pixels_CHW = image.detach().float().numpy()
    low, high = float(pixels_CHW.min()), float(pixels_CHW.max())
    if not np.isfinite([low, high]).all():
        return None
    if low < 0 or high > 1:
        pixels_CHW = (pixels_CHW - low) / max(high - low, 1e-12)
    pixels_HWC = np.round(pixels_CHW.transpose(1, 2, 0) * 255).astype(np.uint8)
    picture = Image.fromarray(pixels_HWC[:, :, 0] if pixels_HWC.shape[2] == 1 else pixels_HWC)
    picture.thumbnail((MAX_SIDE, MAX_SIDE))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
