"""Runs the teacher over rendered batches: all of them for a cache, or a sample of them for calibration."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from logitcache.cache.cut_classes import CutClasses
from logitcache.cache.fidelity import Calibration
from logitcache.cache.manifest import LOGITS
from logitcache.catalog.calling import call_model, logits_of
from logitcache.catalog.capture import Capture, Tap, captured_shapes
from logitcache.catalog.language_models import check_head, head_of, num_cut_classes, watched_cut_classes
from logitcache.config.schema import TeacherConfig
from logitcache.context import Context
from logitcache.data.loading import proven_batches
from logitcache.data.order import batches as order_batches
from logitcache.data.sequences import batch_rows, every_position, places_of_rows, sequence_rows
from logitcache.data.views import ViewDataset
from logitcache.devices import autocast, to_device
from logitcache.errors import UsageError
from logitcache.progress import track
from logitcache.randomness import keyed_permutation

# B batch, C classes, M calibration rows

CUT_ROWS = 4_096
"""Rows on which the mass of cut classes is measured, about."""
CUT_MASS = 0.01
"""Mean probability of cut classes from which on there is a warning."""


@dataclass(frozen=True)
class TeacherOutput:
    """What the teacher computed for a batch: a row for each sample; of sequences, their rows one after the other."""

    input_digests: dict[int, str]
    """Digests of the inputs at proof rows, by row."""
    every: dict[str, Tensor]
    """Logits (P, C) and the other outputs (P, *shape) by name, at all P positions of the batch, on the device."""
    places: Tensor | None = None
    """The position of each row, int64 (R,), increasing; None if each position has one."""

    @property
    def logits(self) -> Tensor:
        """The logits of all rows, (R, C)."""
        return self.rows()[LOGITS]

    @property
    def outputs(self) -> dict[str, Tensor]:
        """The other outputs of all rows by name, (R, *shape)."""
        return {name: values for name, values in self.rows().items() if name != LOGITS}

    def rows(self, start: int = 0, stop: int | None = None) -> dict[str, Tensor]:
        """All outputs of some rows. Rows at consecutive positions, such as those of a sequence, are not copied."""
        if self.places is None:
            return {name: values[start:stop] for name, values in self.every.items()}
        places = self.places[start:stop]
        if len(places) and int(places[-1] - places[0]) == len(places) - 1:
            first = int(places[0])
            return {name: values[first : first + len(places)] for name, values in self.every.items()}
        return {name: values.index_select(0, places.to(values.device)) for name, values in self.every.items()}


class TeacherRunner:
    """The teacher on its device, with hooks that take further outputs.

    Args:
        teacher: in evaluation mode; moved to the device.
        config: precision, memory format, compilation and batch size.
        context: device and workers.
        taps: modules whose outputs are taken, by name; a tap named `logits` replaces the model's own output.
    """

    def __init__(
        self, teacher: nn.Module, config: TeacherConfig, context: Context, taps: Mapping[str, Tap] | None = None
    ) -> None:
        training = next((name or "itself" for name, module in teacher.named_modules() if module.training), None)
        if training is not None:
            warnings.warn(
                f"the teacher is in train mode (module {training}), so dropout and batch norm make its logits random; "
                "call teacher.eval() first",
                stacklevel=2,
            )
        self.config = config
        self._context = context
        self._teacher = teacher
        capture = Capture(teacher, taps or {})
        capture.hook()
        self._captures = bool(capture.taps)
        module: nn.Module = capture if self._captures else teacher
        module = module.to(context.device)
        if config.channels_last:
            module = module.to(memory_format=torch.channels_last)
        self._module = cast("nn.Module", torch.compile(module)) if config.compile else module

    def __call__(self, inputs: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits (B, C), and the other outputs by name, on the device."""
        device = self._context.device
        on_device = to_device(inputs, device, channels_last=self.config.channels_last)
        with autocast(device, self.config.precision):
            output = call_model(self._module, on_device, like=self._teacher)
        logits, extra_outputs = output if self._captures else (output, {})
        return logits_of(logits), extra_outputs

    def run(self, views: ViewDataset, batches: Iterable[list[tuple[int, int]]]) -> Iterator[TeacherOutput]:
        """The teacher's output for batches of (view, index), in order."""
        return self.run_groups(views, ([batch] for batch in batches), per_group=1)

    def run_groups(
        self, views: ViewDataset, groups: Iterable[list[list[tuple[int, int]]]], *, per_group: int
    ) -> Iterator[TeacherOutput]:
        """The teacher's output for the batches of groups, in order; the batches of a group share loaded samples.

        Args:
            views: the teacher's inputs.
            groups: lists of batches of (view, index).
            per_group: the most batches of a group.
        """
        context = self._context
        loader = proven_batches(
            views,
            groups,
            num_workers=context.num_workers,
            pin_memory=context.device.type == "cuda",
            per_group=per_group,
        )
        rows = sequence_rows(views)
        for (index, inputs, _), digests in loader:
            with torch.inference_mode():
                if views.on_device:
                    inputs = views.finish(to_device(inputs, context.device))
                logits, outputs = self(inputs)
                every, places = {LOGITS: logits, **outputs}, None
                if rows is not None:
                    at = batch_rows(index, rows, inputs, logits).index
                    every = {name: every_position(values, at) for name, values in every.items()}
                    places = places_of_rows(at)
            yield TeacherOutput(digests, every, places)


def output_shapes(teacher: nn.Module, views: ViewDataset, taps: Mapping[str, Tap]) -> dict[str, tuple[int, ...]]:
    """The shape of each tapped output for one sample, from one forward pass.

    Raises:
        UsageError, ShapeError: a module is missing, is not called, or returns no tensor; names the output.
    """
    device = next((parameter.device for parameter in teacher.parameters()), torch.device("cpu"))
    return captured_shapes(teacher, taps, to_device(views.batch([(0, 0)] * 2), device)) if taps else {}


def measure_cut_classes(
    teacher: nn.Module, config: TeacherConfig, context: Context, views: ViewDataset
) -> CutClasses | None:
    """The probability of the classes that the teacher's head was cut by, on some rows of view 0.

    Args:
        teacher, config, context: as for `TeacherRunner`; the teacher is not compiled.
        views: of the training split.

    Returns:
        For the provenance of a cache; None where the head was not cut, or where the model changes the logits after it.
    """
    rows = sequence_rows(views)
    if rows is None or not num_cut_classes(teacher):
        return None
    runner = TeacherRunner(teacher, config.model_copy(update={"compile": False}), context)
    counts_N = np.diff(rows.offsets)
    order = keyed_permutation(len(views), "cut classes", views.plan.seed)
    order = order[counts_N[order] > 0]
    samples = order[: int(np.searchsorted(counts_N[order].cumsum(), CUT_ROWS)) + 1]
    batches = [[(0, int(sample)) for sample in part] for part in order_batches(samples, runner.config.batch_size)]
    try:
        check_head(teacher, to_device(views.batch(batches[0][:1]), next(teacher.parameters()).device))
    except UsageError:
        return None
    masses = []
    with watched_cut_classes(teacher) as watched, track("measuring cut classes", len(samples), unit="samples") as meter:
        for batch, output in zip(batches, runner.run(views, batches), strict=True):
            mass_P = watched.pop().flatten().cpu()
            masses.append(mass_P if output.places is None else mass_P[output.places.cpu()])
            meter.advance(len(batch))
    mass_R = torch.cat(masses).double()
    found = CutClasses(
        classes=num_cut_classes(teacher),
        rows=len(mass_R),
        mass_mean=float(mass_R.mean()),
        mass_max=float(mass_R.max()),
    )
    if found.mass_mean > CUT_MASS:
        warnings.warn(
            f"the teacher's head was cut to the {len(head_of(teacher).weight)} token ids of the data; the "
            f"{found.classes} others have {found.mass_mean:.1%} of its probability on average: use the "
            "tokenizer of the model, or set vocab_size in data.args to the size of the head",
            stacklevel=2,
        )
    return found


def calibrate(runner: TeacherRunner, views: ViewDataset, *, num_views: int, count: int) -> Calibration:
    """The teacher's outputs of (view, sample) pairs drawn from all views, with as few repeated samples as possible.

    Rows of one sample form a group, so that no sample is used both to fit an encoding and to measure it. Of sequences,
    rows are counted rather than samples.

    Args:
        runner: the teacher, with the outputs to draw beside the logits.
        views: of the training split.
        num_views: views to draw from, starting at 0.
        count: rows to draw, at most all of them.
    """
    num_samples = len(views)
    rows = views.plan.rows
    order = keyed_permutation(num_samples, "calibration", views.plan.seed)
    rows_of = np.ones(num_samples, dtype=np.int64) if rows is None else np.diff(rows.offsets)
    order = order[rows_of[order] > 0]
    drawn = np.concatenate([rows_of[order]] * num_views).cumsum()
    number = min(int(np.searchsorted(drawn, count)) + 1, len(drawn))
    turns = np.arange(number) // len(order)
    samples = order[np.arange(number) % len(order)]
    places = np.stack([(samples + turns) % num_views, samples], axis=1)
    places = places[np.lexsort((places[:, 1], places[:, 0]))]
    size = runner.config.batch_size
    batches = [
        [(int(view), int(row)) for view, row in places[start : start + size]] for start in range(0, number, size)
    ]
    parts: dict[str, list[np.ndarray]] = {}
    with track("calibrating", number, unit="inputs") as meter:
        for batch, output in zip(batches, runner.run(views, batches), strict=True):
            for name, values in output.rows().items():
                parts.setdefault(name, []).append(values.float().cpu().numpy())
            meter.advance(len(batch))
    whole = {name: np.concatenate(part) for name, part in parts.items()}
    return Calibration(whole.pop(LOGITS), np.repeat(places[:, 1], rows_of[places[:, 1]]), whole)
