"""The teacher over rendered batches, in the order that they are asked for; and over a sample of them, to calibrate."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from logitcache.cache.fidelity import Calibration
from logitcache.data.loading import rendered_batches
from logitcache.data.views import ViewDataset
from logitcache.devices import autocast, to_device
from logitcache.pipeline import Pipeline
from logitcache.progress import track
from logitcache.randomness import keyed_permutation
from logitcache.resolve import place_teacher

# C classes, M calibration rows


def teacher_outputs(
    pipeline: Pipeline,
    teacher: nn.Module,
    views: ViewDataset,
    batches: Iterable[list[tuple[int, int]]],
    device: torch.device,
) -> Iterator[tuple[Any, Tensor]]:
    """What the teacher was given and what it said, (inputs, logits on the device), for batches of (view, index)."""
    config = pipeline.teacher
    teacher = place_teacher(teacher, device, config)
    loader = rendered_batches(views, batches, num_workers=pipeline.num_workers, pin_memory=device.type == "cuda")

    def logits(inputs: Any) -> Tensor:
        on_device = to_device(inputs, device, channels_last=config.channels_last)
        with torch.inference_mode(), autocast(device, config.precision):
            outputs: Tensor = teacher(on_device)
        return outputs

    return ((inputs, logits(inputs)) for _, inputs, _ in loader)


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
        for _, logits in teacher_outputs(pipeline, teacher, views, batches, device):
            parts.append(logits.float().cpu().numpy())
            meter.advance(len(parts[-1]))
    return Calibration(np.concatenate(parts), places[:, 1])
