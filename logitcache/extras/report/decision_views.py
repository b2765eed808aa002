"""The decisions of teacher and students on the same samples, side by side, with attribution maps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import torch
from torch import Tensor, nn

from logitcache.cache.ground_truth import NO_TARGET, MixingOfCache, targets_of
from logitcache.cache.reader import LogitCache
from logitcache.config.build import RANDOM, input_part, resolve_teacher, teacher_weights
from logitcache.config.schema import ModelConfig
from logitcache.data.transforms import adapt_transform
from logitcache.errors import LogitCacheError, UsageError
from logitcache.extras.report.attribution import Attribution, attributions
from logitcache.extras.report.figures import Section
from logitcache.extras.report.formatting import count, counted, decimal, percent, plain_text
from logitcache.extras.report.matched_data import MatchedData
from logitcache.extras.report.pictures import signed_map_uri, strongest_region
from logitcache.extras.report.samples import rendered_pictures, sample_name
from logitcache.extras.report.students import ComparedStudent, RunsFound
from logitcache.progress import track

SHOWN = 3
"""Samples on which students and teacher agree, and the same number on which they disagree."""
MAX_STUDENTS = 4
"""Students shown for each sample, best first."""
SEED = 0
"""Of the samples on which all agree, which are drawn at random."""


@dataclass(frozen=True)
class ChosenSample:
    """A sample that is shown."""

    row: int
    key: str
    target: int
    """Its true class, or `NO_TARGET`: unknown, or the row is mixed."""
    num_disagreeing: int
    """Students whose most probable class differs from the teacher's."""
    picture: str | None
    """A data URI; None without the data, or where the input is not an image."""


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
    """The map in words."""


@dataclass(frozen=True)
class ShownDecisions:
    """A sample with the decision of each model."""

    sample: ChosenSample
    decisions: list[Decision] = field(default_factory=list)


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
    teacher = [found.teacher_predictions[row] for row in rows.tolist()]
    label, confidence = np.array([each[0] for each in teacher]), np.array([each[1] for each in teacher])
    predicted = np.stack([each.predicted[0, np.searchsorted(each.rows, rows)] for _, each in found.compared()])
    disagreeing = (predicted != label).sum(axis=0)
    disputed = np.lexsort((-confidence, -disagreeing))[: min(SHOWN, int((disagreeing > 0).sum()))]
    agreed = np.random.default_rng(SEED).permutation(np.flatnonzero(disagreeing == 0))[:SHOWN]
    chosen = [*disputed.tolist(), *agreed.tolist()]
    targets = None if mixed.all() else targets_of(cache)
    pictures = rendered_pictures(matched, {int(rows[place]): [found.view] for place in chosen})
    return [
        ChosenSample(
            row=(row := int(rows[place])),
            key=sample_name(cache, row),
            target=NO_TARGET if targets is None else int(targets[row]),
            num_disagreeing=int(disagreeing[place]),
            picture=pictures.get((found.view, row)),
        )
        for place in chosen
    ]


def decision_section(found: RunsFound, chosen: Sequence[ChosenSample], matched: MatchedData | None) -> Section:
    """The decisions of the teacher and the best students on some samples.

    Args:
        matched: the local data, and the pipeline that names the teacher.
    """
    section = Section("decisions", "Decisions side by side")
    if not chosen:
        section.lead.append("No student could be compared with the teacher, so there are no decisions to show.")
        return section
    if matched is None:
        section.lead.append("To show decisions with images, pass the pipeline that names the data: --data PIPELINE.")
        return section
    shown, largest_gap, without_map = _decide(found, chosen, matched)
    section.lead.append(
        f"Predictions of the teacher and of {counted(len(found.compared()[:MAX_STUDENTS]), 'student')} (at most "
        f"{MAX_STUDENTS}, best first; first seed) on training samples of one cached view, rendered as the teacher saw "
        f"them and chosen from {count(len(found.common_rows()))} rows: those on which most students disagree with the "
        "teacher, and random ones on which all agree. Rows that mix two samples are used only if there are no "
        "others."
    )
    if any(decision.picture for each in shown for decision in each.decisions):
        section.lead.append(
            "Maps show integrated gradients (Sundararajan et al. 2017, computed by captum) of the log-probability of "
            "each model's own prediction, with a black image as the baseline. Orange pixels increase it, blue pixels "
            "decrease it. The values of a map add up to the log-probability minus that of the black image, here to "
            f"within {decimal(largest_gap)} nats. Each map has its own colour scale."
        )
    if without_map:
        section.lead.append(f"Without maps: {plain_text('; '.join(without_map), 600)}.")
    groups = [
        ("Students and teacher disagree", [each for each in shown if each.sample.num_disagreeing]),
        ("All agree", [each for each in shown if not each.sample.num_disagreeing]),
    ]
    section.decisions = [(title, samples) for title, samples in groups if samples]
    return section


def _decide(
    found: RunsFound, chosen: Sequence[ChosenSample], matched: MatchedData
) -> tuple[list[ShownDecisions], float, list[str]]:
    """(the decisions, the largest gap of a map in nats, why some models have no maps)."""
    rows = [sample.row for sample in chosen]
    teacher = [found.teacher_predictions[row] for row in rows]
    models: list[tuple[str, list[tuple[int, float]], ComparedStudent | None]] = [("teacher", teacher, None)]
    for student, each in found.compared()[:MAX_STUDENTS]:
        places = np.searchsorted(each.rows, rows)
        predicted = zip(each.predicted[0, places].tolist(), each.confidence[places].tolist(), strict=True)
        models.append((student.name, list(predicted), each))
    shown = [ShownDecisions(sample) for sample in chosen]
    largest_gap, without_map = 0.0, []
    with track("attributing decisions", len(models), unit="models") as meter:
        for name, predictions, compared in models:
            maps: Sequence[Attribution | None] = [None] * len(rows)
            try:
                maps = _maps(matched, found.view, rows, [label for label, _ in predictions], compared)
            except LogitCacheError as error:
                without_map.append(f"{name}: {str(error).splitlines()[0]}")
            for view, (label, probability), (expected, _), found_map in zip(
                shown, predictions, teacher, maps, strict=True
            ):
                parts = () if found_map is None else (signed_map_uri(found_map.values), _description(found_map.values))
                view.decisions.append(Decision(name, label, probability, label == expected, *parts))
                largest_gap = max(largest_gap, 0.0 if found_map is None else abs(found_map.gap))
            meter.advance()
    return shown, largest_gap, without_map


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
        UsageError: maps are not possible; says why.
    """
    model = _load_teacher(matched) if student is None else student.load()
    config = matched.pipeline.teacher if student is None else student.config
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
    """Black images of the same sizes after the model's input transform, which may normalise black to another value.

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


def _load_teacher(matched: MatchedData) -> nn.Module:
    """The teacher that the cache was made with.

    Raises:
        UsageError: its weights are not available locally, or the cache has several teachers.
    """
    if not _is_local(matched):
        raise UsageError("the weights are not available locally")
    teacher, fingerprint = resolve_teacher(matched.pipeline, matched.data, matched.plan, trust=matched.trust)
    if fingerprint != matched.cache.manifest.identity.teacher:
        raise UsageError("the cache was not made by the pipeline's teacher alone")
    return teacher


def _is_local(matched: MatchedData) -> bool:
    """Whether the teacher's weights are on this machine: a report downloads nothing."""
    weights = teacher_weights(matched.pipeline)
    if weights in (None, RANDOM):
        return True
    if str(weights).endswith(".safetensors"):
        return Path(str(weights)).is_file()
    import torchvision

    try:
        named = torchvision.models.get_model_weights(matched.pipeline.teacher.model)[str(weights)]
    except (ValueError, KeyError):
        return False
    return (Path(torch.hub.get_dir()) / "checkpoints" / Path(urlsplit(named.url).path).name).is_file()
