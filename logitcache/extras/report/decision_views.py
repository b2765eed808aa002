"""The decisions of teacher and students on the same samples, side by side, with attribution maps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from logitcache.cache.ground_truth import NO_TARGET, MixingOfCache, targets_of
from logitcache.cache.reader import LogitCache
from logitcache.config.build import input_part
from logitcache.config.schema import ModelConfig
from logitcache.data.transforms import adapt_transform
from logitcache.errors import LogitCacheError, UsageError
from logitcache.extras.report.attribution import Attribution, attributions
from logitcache.extras.report.formatting import percent
from logitcache.extras.report.pictures import signed_map_uri, strongest_region
from logitcache.extras.report.samples import ChosenSample, rendered_pictures, sample_name
from logitcache.extras.report.students import ComparedStudent, RunsFound
from logitcache.extras.report.trees import TreeDrawing, drawn_nodes, most_probable_paths
from logitcache.extras.soft_tree import SoftTree
from logitcache.progress import track
from logitcache.stages.matched_data import MatchedData

SHOWN = 3
"""Samples on which students and teacher agree, and the same number on which they disagree."""
MAX_STUDENTS = 4
"""Students shown for each sample, best first."""
MAX_TREES = 4
"""Soft trees drawn, best first."""
SEED = 0
"""Of the samples on which all agree, which are drawn at random."""


@dataclass(frozen=True)
class Decision:
    """The prediction of one model on a sample."""

    model: str
    label: int
    probability: float
    agrees: bool
    """With the teacher."""
    picture: str | None = None
    """The attribution map, a data URI."""
    description: str = ""
    """Of the map."""


@dataclass
class Decisions:
    """The decisions of each model on each sample."""

    samples: list[tuple[ChosenSample, list[Decision]]]
    without_map: list[str] = field(default_factory=list)
    """Models without maps, and why."""
    largest_gap: float = 0.0
    """Largest gap of a map, in nats; see `Attribution`."""

    @property
    def has_maps(self) -> bool:
        """Whether there is a map for any decision."""
        return any(decision.picture for _, decisions in self.samples for decision in decisions)


def choose_samples(found: RunsFound, cache: LogitCache, matched: MatchedData | None) -> list[ChosenSample]:
    """Samples of the compared view on which students and teacher disagree, then some on which they agree.

    The former are ordered by the number of students that disagree, then by the teacher's confidence; the latter are
    drawn at random. Mixed rows are used only where there are no others.
    """
    rows = found.common_rows()
    if not len(rows):
        return []
    mixed = MixingOfCache(cache).of_rows(found.view, rows)[0]
    rows = rows if mixed.all() else rows[~mixed]
    label, confidence = map(np.array, zip(*(found.teacher_predictions[row] for row in rows.tolist()), strict=True))
    predicted = np.stack([each.predicted[0, np.searchsorted(each.rows, rows)] for _, each in found.compared()])
    disagreeing = (predicted != label).sum(axis=0)
    disputed = np.lexsort((-confidence, -disagreeing))[: min(SHOWN, int((disagreeing > 0).sum()))]
    agreed = np.random.default_rng(SEED).permutation(np.flatnonzero(disagreeing == 0))[:SHOWN]
    chosen = [(int(rows[place]), int(disagreeing[place])) for place in (*disputed, *agreed)]
    targets = None if mixed.all() else targets_of(cache)
    pictures = rendered_pictures(matched, {row: [found.view] for row, _ in chosen})
    return [
        ChosenSample(
            row=row,
            key=sample_name(cache, row),
            target=NO_TARGET if targets is None else int(targets[row]),
            num_disagreeing=num_disagreeing,
            picture=pictures.get((found.view, row)),
        )
        for row, num_disagreeing in chosen
    ]


def decide(found: RunsFound, chosen: Sequence[ChosenSample], matched: MatchedData) -> Decisions:
    """The decisions of the teacher and the best students on some samples.

    Args:
        found: after the measurements.
        chosen: the samples.
        matched: the local data, and the teacher.
    """
    rows = [sample.row for sample in chosen]
    teacher = [found.teacher_predictions[row] for row in rows]
    models: list[tuple[str, list[tuple[int, float]], ComparedStudent | None]] = [("teacher", teacher, None)]
    for student, each in found.compared()[:MAX_STUDENTS]:
        places = np.searchsorted(each.rows, rows)
        predicted = zip(each.predicted[0, places].tolist(), each.confidence[places].tolist(), strict=True)
        models.append((student.name, list(predicted), each))
    result = Decisions([(sample, []) for sample in chosen])
    with track("attributing decisions", len(models), unit="models") as meter:
        for name, predictions, compared in models:
            maps: Sequence[Attribution | None] = [None] * len(rows)
            try:
                maps = _maps(matched, found.view, rows, [label for label, _ in predictions], compared)
            except LogitCacheError as error:
                result.without_map.append(f"{name}: {str(error).splitlines()[0]}")
            for (_, decisions), (label, probability), (expected, _), found_map in zip(
                result.samples, predictions, teacher, maps, strict=True
            ):
                parts = () if found_map is None else (signed_map_uri(found_map.values), _description(found_map.values))
                decisions.append(Decision(name, label, probability, label == expected, *parts))
                result.largest_gap = max(result.largest_gap, 0.0 if found_map is None else abs(found_map.gap))
            meter.advance()
    return result


def draw_trees(found: RunsFound, chosen: Sequence[ChosenSample]) -> list[TreeDrawing]:
    """The best of the students that are soft trees, with the most probable paths of some samples."""
    drawings: list[TreeDrawing] = []
    for student, compared in found.compared():
        if compared.node_use is not None and len(drawings) < MAX_TREES:
            tree = compared.load()
            assert isinstance(tree, SoftTree)
            inputs = inputs_of(compared.matched, compared.config, found.view, [sample.row for sample in chosen])
            paths = list(zip(chosen, most_probable_paths(tree, inputs), strict=True))
            drawings.append(TreeDrawing(student.name, tree, drawn_nodes(tree, compared.node_use), paths))
    return drawings


def _description(values_HW: np.ndarray) -> str:
    parts = []
    for word, sign in (("for", 1), ("against", -1)):
        region = strongest_region(values_HW, sign=sign)
        where = "nothing" if region is None else f"mostly {region.name} ({percent(region.share, 0)})"
        parts.append(f"evidence {word}: {where}")
    return "; ".join(parts)


def _maps(
    matched: MatchedData, view: int, rows: Sequence[int], labels: Sequence[int], student: ComparedStudent | None
) -> list[Attribution]:
    """A map for each row, of a student or (None) of the teacher.

    Raises:
        UsageError: maps are not possible; gives the reason.
    """
    model = matched.load_teacher() if student is None else student.load()
    config = matched.teacher if student is None else student.config
    inputs = inputs_of(matched, config, view, rows)
    if inputs.ndim != 4:
        raise UsageError("the input is not an image")
    return attributions(model, inputs, _black_inputs(matched, config, view, rows), torch.tensor(labels))


def inputs_of(matched: MatchedData, config: ModelConfig, view: int, rows: Sequence[int]) -> Tensor:
    """Rows of a view as the input of a model, float32 (B, ...).

    Raises:
        UsageError: inputs are not tensors.
    """
    inputs = matched.views(config).batch([(view, matched.index_of_row[row]) for row in rows])
    if not isinstance(inputs, Tensor):
        raise UsageError(f"inputs are {type(inputs).__name__}s, not tensors")
    return inputs


def _black_inputs(matched: MatchedData, config: ModelConfig, view: int, rows: Sequence[int]) -> Tensor:
    """Black images of the same sizes after the model's input transform, which may normalize black to another value.

    Raises:
        UsageError: the views are not images.
    """
    shared = matched.shared_views()
    model_input = adapt_transform(input_part(config, trust=matched.trust))
    assert model_input is not None
    images = [shared[(view, matched.index_of_row[row])][1] for row in rows]
    if not all(isinstance(image, Tensor) for image in images):
        raise UsageError("the views are not images")
    return torch.stack([model_input(torch.zeros_like(image)) for image in images])
