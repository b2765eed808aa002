"""The teacher over rendered batches, in the order that they are asked for; and over a sample of them, beforehand."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from logitcache.cache.fidelity import Calibration
from logitcache.cache.manifest import LOGITS
from logitcache.catalog.calling import call_model, logits_of
from logitcache.catalog.capture import Capture, captured_shapes
from logitcache.catalog.outputs import taps_of
from logitcache.config.build import place_teacher
from logitcache.config.schema import Pipeline
from logitcache.data.loading import proven_batches
from logitcache.data.views import ViewDataset
from logitcache.devices import autocast, to_device
from logitcache.progress import track
from logitcache.randomness import keyed_permutation

# C classes, M calibration rows


@dataclass(frozen=True)
class Said:
    """What the teacher said of a batch."""

    digests: dict[int, str]
    """Of its inputs that prove a view, by row."""
    logits: Tensor
    """(B, C), on the device."""
    outputs: dict[str, Tensor]
    """(B, *shape) of each other output that was asked for, likewise."""


def teacher_outputs(
    pipeline: Pipeline,
    teacher: nn.Module,
    views: ViewDataset,
    batches: Iterable[list[tuple[int, int]]],
    device: torch.device,
    outputs: Sequence[str] = (),
) -> Iterator[Said]:
    """What the teacher says of batches of (view, index): its logits, and the named ones of `cache.outputs`."""
    asked = AskedTeacher(pipeline, teacher, device, outputs)
    loader = proven_batches(views, batches, num_workers=pipeline.num_workers, pin_memory=device.type == "cuda")

    def said(inputs: Any, digests: dict[int, str]) -> Said:
        with torch.inference_mode():
            return Said(digests, *asked(inputs))

    return (said(inputs, digests) for (_, inputs, _), digests in loader)


class AskedTeacher:
    """The teacher on its device as `teacher` of the pipeline says, with hooks where `cache.outputs` says.

    Args:
        pipeline: of the teacher.
        teacher: in evaluation mode.
        device: where it goes.
        outputs: those of `cache.outputs` that are asked for; `logits` always are.
    """

    def __init__(
        self, pipeline: Pipeline, teacher: nn.Module, device: torch.device, outputs: Sequence[str] = ()
    ) -> None:
        self._config = pipeline.teacher
        self._device = device
        taps = taps_of(pipeline.cache.outputs)
        capture = Capture(teacher, {name: tap for name, tap in taps.items() if name == LOGITS or name in outputs})
        capture.hook()
        self._captures = bool(capture.taps)
        self._teacher = teacher
        self._net = place_teacher(capture if self._captures else teacher, device, self._config)

    def __call__(self, inputs: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits (B, C), and each other output by name, on the device."""
        on_device = to_device(inputs, self._device, channels_last=self._config.channels_last)
        with autocast(self._device, self._config.precision):
            given = call_model(self._net, on_device, like=self._teacher)
        logits, others = given if self._captures else (given, {})
        return logits_of(logits), others


def output_shapes(pipeline: Pipeline, teacher: nn.Module, views: ViewDataset) -> dict[str, tuple[int, ...]]:
    """The shape of each of `cache.outputs` for one sample, from one forward pass.

    Raises:
        UsageError, ShapeError: a module that is not there, is not called, or gives something else; names the output.
    """
    taps = taps_of(pipeline.cache.outputs)
    where = next((parameter.device for parameter in teacher.parameters()), torch.device("cpu"))
    return captured_shapes(teacher, taps, to_device(views.batch([(0, 0)] * 2), where)) if taps else {}


def calibrate(pipeline: Pipeline, teacher: nn.Module, views: ViewDataset, device: torch.device) -> Calibration:
    """The teacher's logits of `cache.calibration` places drawn from all views, each sample as seldom as possible.

    Rows of one sample make a group, so that no sample is both fitted to and measured on.
    """
    num_samples, num_views = len(views), pipeline.views.count
    count = min(pipeline.cache.calibration, num_samples * num_views)
    order = keyed_permutation(num_samples, "calibration", pipeline.views.seed)
    turns = np.arange(count) // num_samples
    samples = order[np.arange(count) % num_samples]
    places = np.stack([(samples + turns) % num_views, samples], axis=1)
    places = places[np.lexsort((places[:, 1], places[:, 0]))]
    size = pipeline.teacher.batch_size
    batches = [[(int(view), int(row)) for view, row in places[start : start + size]] for start in range(0, count, size)]
    parts = []
    with track("calibrating", count, unit="samples") as meter:
        for said in teacher_outputs(pipeline, teacher, views, batches, device):
            parts.append(said.logits.float().cpu().numpy())
            meter.advance(len(parts[-1]))
    return Calibration(np.concatenate(parts), places[:, 1])
