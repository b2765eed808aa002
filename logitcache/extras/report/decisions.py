"""Teacher and students on the same samples: what each decided, and where in the image it found its reasons."""

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
from logitcache.config.schema import ModelConfig, Pipeline
from logitcache.data.transforms import adapt_transform
from logitcache.errors import LogitCacheError, UsageError
from logitcache.extras.report.attribution import Attribution, attributions, signed_picture, strongest
from logitcache.extras.report.fitted import FittedData
from logitcache.extras.report.samples import rendered_pictures
from logitcache.extras.report.students import Compared, RunsFound
from logitcache.extras.report.words import percent
from logitcache.progress import track

SHOWN = 3
"""Samples on which students and teacher agree, and as many on which they don't."""
MAX_STUDENTS = 4
"""Students shown for each, the best ones."""
SEED = 0
"""Of the samples on which all agree, which are drawn at random."""


@dataclass(frozen=True)
class ChosenSample:
    """A sample that is shown."""

    row: int
    key: str
    target: int
    """Its true class, or `NO_TARGET`: unknown, or the row is mixed."""
    dissenters: int
    """Students whose first class is not the teacher's."""
    picture: str | None
    """A data URI; None without the data, or where the input is no image."""


@dataclass(frozen=True)
class Decision:
    """What one net says of a sample."""

    who: str
    label: int
    probability: float
    agrees: bool
    """With the teacher."""
    picture: str | None = None
    """The map of its reasons, a data URI."""
    reasons: str = ""
    """The map in words."""


@dataclass
class Decisions:
    """The samples, and what each net says of them."""

    samples: list[tuple[ChosenSample, list[Decision]]]
    students: list[str]
    largest_gap: float = 0.0
    """What the maps' sums miss at most, in nats."""
    without_map: list[str] = field(default_factory=list)
    """Why some net has no maps."""


def choose_samples(found: RunsFound, cache: LogitCache, fitted: FittedData | None) -> list[ChosenSample]:
    """Some samples of the compared view on which students and teacher disagree, and some on which they agree.

    First those whose teacher most students contradict, and among these the surest teacher; then some, drawn at
    random, on which all agree. Rows in which two samples are mixed are taken only where there are no others.
    """
    rows = found.common_rows()
    if not len(rows):
        return []
    mixed = MixingOfCache(cache).of_rows(found.view, rows)[0]
    rows = rows if mixed.all() else rows[~mixed]
    label = np.array([found.teacher_answers[row][0] for row in rows.tolist()])
    confidence = np.array([found.teacher_answers[row][1] for row in rows.tolist()])
    dissenters = sum(
        (compared.predicted[0, np.searchsorted(compared.rows, rows)] != label).astype(np.int64)
        for _, compared in found.compared()
    )
    assert isinstance(dissenters, np.ndarray)
    disputed = np.lexsort((-confidence, -dissenters))[: min(SHOWN, int((dissenters > 0).sum()))]
    agreed = np.random.default_rng(SEED).permutation(np.flatnonzero(dissenters == 0))[:SHOWN]
    chosen = [*disputed.tolist(), *agreed.tolist()]
    targets, samples = targets_of(cache), cache.samples
    pictures = {} if fitted is None else rendered_pictures(fitted, {int(rows[place]): [found.view] for place in chosen})
    return [
        ChosenSample(
            row=(row := int(rows[place])),
            key=str(row) if samples is None else samples.key(row),
            target=NO_TARGET if targets is None or mixed.all() else int(targets[row]),
            dissenters=int(dissenters[place]),
            picture=pictures.get((found.view, row)),
        )
        for place in chosen
    ]


def decide(found: RunsFound, chosen: Sequence[ChosenSample], fitted: FittedData) -> Decisions:
    """What the teacher and the best students say of chosen samples, with the maps of their reasons.

    Args:
        fitted: the data at hand, and the pipeline that names the teacher.
    """
    rows = [sample.row for sample in chosen]
    students = found.compared()[:MAX_STUDENTS]
    teacher_said = [found.teacher_answers[row] for row in rows]
    nets: list[tuple[str, list[tuple[int, float]], Compared | None]] = [("teacher", teacher_said, None)]
    nets += [(student.name, _said(compared, rows), compared) for student, compared in students]
    decisions = Decisions([(sample, []) for sample in chosen], [student.name for student, _ in students])
    with track("attributing decisions", len(nets), unit="nets") as meter:
        for who, said, compared in nets:
            maps: Sequence[Attribution | None] = [None] * len(rows)
            try:
                maps = _maps(fitted, found.view, rows, said, compared)
            except LogitCacheError as error:
                decisions.without_map.append(f"{who}: {str(error).splitlines()[0]}")
            for (_, here), (label, probability), (right, _), found_map in zip(
                decisions.samples, said, teacher_said, maps, strict=True
            ):
                here.append(_decision(who, label, probability, label == right, found_map))
                if found_map is not None:
                    decisions.largest_gap = max(decisions.largest_gap, abs(found_map.gap))
            meter.advance()
    return decisions


def _said(compared: Compared, rows: Sequence[int]) -> list[tuple[int, float]]:
    places = np.searchsorted(compared.rows, rows)
    return [(int(compared.predicted[0, place]), float(compared.confidence[place])) for place in places.tolist()]


def _maps(
    fitted: FittedData, view: int, rows: Sequence[int], said: Sequence[tuple[int, float]], student: Compared | None
) -> list[Attribution]:
    """A map for each row, of a student, or of the teacher.

    Raises:
        UsageError: there can be none; says why.
    """
    model = _teacher(fitted) if student is None else student.load()
    config = fitted.pipeline.teacher if student is None else student.config
    inputs = inputs_of(fitted, config, view, rows)
    if inputs.ndim != 4:
        raise UsageError("its input is no image")
    return attributions(model, inputs, _black(fitted, config, view, rows), torch.tensor([label for label, _ in said]))


def inputs_of(fitted: FittedData, config: ModelConfig, view: int, rows: Sequence[int]) -> Tensor:
    """Rows of a view as a model takes them, float32 (B, ...).

    Raises:
        UsageError: they are no tensors.
    """
    index_of_row = fitted.index_of_row()
    inputs = fitted.views(config).batch([(view, index_of_row[row]) for row in rows])
    if not isinstance(inputs, Tensor):
        raise UsageError(f"its inputs are {type(inputs).__name__}s, not tensors")
    return inputs


def _black(fitted: FittedData, config: ModelConfig, view: int, rows: Sequence[int]) -> Tensor:
    """Black images of the same sizes, as a model takes them: black is not 0 where inputs are normalised.

    Raises:
        UsageError: the views are no images.
    """
    index_of_row, shared = fitted.index_of_row(), fitted.shared_views()
    own_part = adapt_transform(input_part(config, trust=fitted.trust))
    assert own_part is not None
    images = [shared[(view, index_of_row[row])][1] for row in rows]
    if not all(isinstance(image, Tensor) for image in images):
        raise UsageError("its views are no images")
    return torch.stack([own_part(torch.zeros_like(image)) for image in images])


def _teacher(fitted: FittedData) -> nn.Module:
    """The very teacher of the cache.

    Raises:
        UsageError: its weights are not at hand, or the cache has no one teacher.
    """
    pipeline = fitted.pipeline
    if not _at_hand(pipeline):
        raise UsageError("its weights are not at hand")
    teacher, fingerprint = resolve_teacher(pipeline, fitted.data, fitted.plan, trust=fitted.trust)
    if fingerprint != fitted.cache.manifest.identity.teacher:
        raise UsageError("the cache is not the work of the pipeline's teacher alone")
    return teacher


def _at_hand(pipeline: Pipeline) -> bool:
    """Whether the teacher's weights lie on this machine: a report fetches nothing."""
    weights = teacher_weights(pipeline)
    if weights in (None, RANDOM):
        return True
    if str(weights).endswith(".safetensors"):
        return Path(str(weights)).is_file()
    import torchvision

    try:
        named = torchvision.models.get_model_weights(pipeline.teacher.model)[str(weights)]
    except (ValueError, KeyError):
        return False
    return (Path(torch.hub.get_dir()) / "checkpoints" / Path(urlsplit(named.url).path).name).is_file()


def _decision(who: str, label: int, probability: float, agrees: bool, found: Attribution | None) -> Decision:
    if found is None:
        return Decision(who, label, probability, agrees)
    parts = []
    for word, sign in (("for it", 1), ("against it", -1)):
        place = strongest(found.values, sign=sign)
        parts.append(
            f"{word}: " + ("nothing" if place is None else f"most in {place.place} ({percent(place.share, 0)})")
        )
    return Decision(who, label, probability, agrees, signed_picture(found.values), "; ".join(parts))
