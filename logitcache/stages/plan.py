"""Estimates before a run: size and fidelity of each encoding, and the time that the teacher takes."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from logitcache.cache.fidelity import TEMPERATURES, Calibration, Fidelity, candidates, choose, compare, fixed_bytes
from logitcache.cache.layout import encode_block
from logitcache.cache.outputs import Output
from logitcache.catalog.outputs import declared_outputs, taps_of
from logitcache.config.build import (
    build_context,
    build_runner,
    resolve_data,
    resolve_loss,
    resolve_plan,
    resolve_teacher,
)
from logitcache.config.schema import Pipeline
from logitcache.data.views import ViewDataset
from logitcache.encodings import Auto, NoLogits, encoding_or_auto
from logitcache.errors import InvalidLogits, UsageError
from logitcache.progress import track
from logitcache.randomness import keyed_permutation
from logitcache.train.inference import TeacherRunner, calibrate, output_shapes


@dataclass(frozen=True)
class Plan:
    """A table of encodings, smallest first, and the recommended one."""

    num_rows: int
    """Calibration rows that the table is measured on."""
    num_classes: int
    fidelities: list[Fidelity]
    recommended: Fidelity
    criterion: str = ""
    """What the recommended one was chosen by, in words."""
    num_samples: int | None = None
    """Samples per view of the whole cache; None where only logits were given."""
    rows_per_view: int | None = None
    """More than `num_samples` for sequences, which have a row for each token."""
    num_views: int | None = None
    rows_per_second: float | None = None
    """Speed of rendering and teacher together, measured on the calibration rows."""
    output_bytes: dict[str, float] = field(default_factory=dict)
    """Bytes per row of each output beside the logits, as encoded by the pipeline."""
    output_fixed_bytes: int = 0
    """Bytes that the cache stores once for these outputs."""
    live_passes: float | None = None
    """How often a live teacher would run over the data: the epochs of all students that learn from the cache, with each
    seed. The cache needs `num_views` passes."""

    @property
    def hours(self) -> float | None:
        """Estimated duration of `cache-teacher`."""
        if self.rows_per_second is None or self.rows_per_view is None or self.num_views is None:
            return None
        return self.rows_per_view * self.num_views / self.rows_per_second / 3600

    @property
    def rows_per_sample(self) -> float:
        """Mean number of rows of a sample."""
        return 1.0 if self.rows_per_view is None or self.num_samples is None else self.rows_per_view / self.num_samples

    def total_bytes(self, fidelity: Fidelity) -> float | None:
        """Size of the whole cache in one of the encodings, with all other outputs."""
        if self.rows_per_view is None or self.num_views is None:
            return None
        row = fidelity.bytes_per_row + sum(self.output_bytes.values())
        return row * self.rows_per_view * self.num_views + fidelity.fixed_bytes + self.output_fixed_bytes


def plan_pipeline(
    pipeline: Pipeline,
    *,
    max_kl: float | None = None,
    max_bytes: float | None = None,
    temperature: float | None = None,
    trust: bool = False,
) -> Plan:
    """Run the pipeline's teacher on its calibration samples, and compare encodings of its logits.

    Args:
        pipeline: names data, views, teacher and cache.
        max_kl, max_bytes, temperature: see `Auto`; by default those of the pipeline, if its encoding is `auto`.
        trust: allow code from outside the working directory.

    Raises:
        LogitCacheError: data or teacher are not available, or no encoding is within the limits.
    """
    requested = encoding_or_auto(pipeline.cache.encoding)
    stated = requested if isinstance(requested, Auto) else Auto()
    if max_kl is None and max_bytes is None:
        max_kl, max_bytes = stated.max_kl, stated.max_bytes
    limits = Auto(
        max_kl=max_kl, max_bytes=max_bytes, temperature=stated.temperature if temperature is None else temperature
    )
    data = resolve_data(pipeline, trust=trust)
    views = ViewDataset(data.train, resolve_plan(pipeline, data, trust=trust))
    context = build_context(pipeline, trust=trust)
    teacher, _ = resolve_teacher(pipeline, data, views.plan, trust=trust)
    configs = pipeline.cache.outputs
    outputs = declared_outputs(configs, output_shapes(teacher, views, taps_of(configs)))
    fitted = [name for name, output in outputs.items() if not output.encoding.is_fitted]
    runner = build_runner(pipeline, teacher, context, fitted)
    start = time.perf_counter()
    calibration = calibrate(runner, views, num_views=pipeline.views.count, count=pipeline.cache.calibration)
    rate = len(calibration.logits) / (time.perf_counter() - start)
    output_bytes = {}
    for name in fitted:
        encoding = outputs[name].encoding.fit(calibration.outputs[name])
        outputs[name] = replace(outputs[name], encoding=encoding)
    if outputs:
        output_bytes = measure_outputs(build_runner(pipeline, teacher, context, list(outputs)), views, outputs)
    plan = plan_no_logits(calibration) if isinstance(requested, NoLogits) else plan_logits(calibration, limits)
    return replace(
        plan,
        num_samples=len(views),
        rows_per_view=len(views) if views.plan.rows is None else views.plan.rows.num_rows,
        num_views=pipeline.views.count,
        rows_per_second=rate,
        output_bytes=output_bytes,
        output_fixed_bytes=sum(fixed_bytes(output.encoding) for output in outputs.values()),
        live_passes=live_passes(pipeline, trust=trust),
    )


def live_passes(pipeline: Pipeline, *, trust: bool) -> float:
    """How often a live teacher would run over the data for the students of a pipeline that learn from the cache."""
    passes = 0.0
    for student in pipeline.students:
        if student.labels == "cache" and (student.hints or resolve_loss(student, trust=trust).needs_teacher):
            config = pipeline.train_config(student)
            passes += student.samples * config.epochs * len(config.seeds)
    return passes


def measure_outputs(runner: TeacherRunner, views: ViewDataset, outputs: Mapping[str, Output]) -> dict[str, float]:
    """Compressed bytes per row of each output beside the logits, measured on one batch."""
    chosen = keyed_permutation(len(views), "outputs", views.plan.seed)[: runner.config.batch_size]
    batch = [(0, int(index)) for index in sorted(chosen)]
    [computed] = runner.run(views, [batch])
    measured = {}
    for name, output in outputs.items():
        specs = output.arrays()
        encoded = output.encoding.encode(computed.outputs[name].float().cpu().flatten(1))
        num_rows = len(computed.outputs[name])
        stored = sum(len(encode_block(specs[array], rows.numpy(), num_rows)) for array, rows in encoded.items())
        measured[name] = stored / num_rows
    return measured


def plan_no_logits(calibration: Calibration) -> Plan:
    """The plan of a cache without logits."""
    num_rows, num_classes = calibration.logits.shape
    nothing = Fidelity(NoLogits(), 0.0, 0, dict.fromkeys(TEMPERATURES, math.inf), math.inf, 0.0, math.inf, math.inf)
    return Plan(num_rows, num_classes, [nothing], nothing, "the cache has no logits, only other outputs")


def plan_logits(calibration: Calibration, limits: Auto) -> Plan:
    """Compare encodings of the given logits.

    Raises:
        UsageError: no encoding is within the limits, or there are too few rows.
    """
    num_rows, num_classes = calibration.logits.shape
    tried = candidates(num_classes, len(calibration.split()[0]))
    if bool(np.isneginf(np.asarray(calibration.logits)).any()):
        tried = [encoding for encoding in tried if encoding.holds_masks]
    with track("comparing encodings", len(tried), unit="encodings") as meter:
        fidelities = compare(calibration, tried, advance=meter.advance)
    recommended = choose(fidelities, limits)
    at = f"at T = {limits.temperature:g}"
    if limits.max_bytes is None:
        criterion = f"the smallest with a KL of at most {limits.max_kl:g} nats {at}"
    else:
        limit = "" if limits.max_kl is None else f" and {limits.max_kl:g} nats"
        criterion = f"the lowest KL {at} within {limits.max_bytes:g} bytes per row{limit}"
    return Plan(num_rows, num_classes, fidelities, recommended, criterion)


def read_logits(path: Path, group: str | None = None) -> Calibration:
    """Logits from a `.npy` file, or from the array `logits` of a `.npz` file.

    Args:
        path: the file.
        group: name of an array of group numbers in the `.npz` file; rows of one group are never split.

    Raises:
        UsageError: the file or an array is missing, or has the wrong shape.
        InvalidLogits: NaN, +inf, or a row of only -inf.
    """
    if path.suffix not in (".npy", ".npz") or not path.is_file():
        raise UsageError(f"{path}: expected a .npy file, or a .npz file that holds `logits`")
    wanted = ["logits", *([] if group is None else [group])]
    try:
        loaded = np.load(path, mmap_mode="r", allow_pickle=False)
        names = ["logits"] if isinstance(loaded, np.ndarray) else list(loaded)
        found = [loaded] if isinstance(loaded, np.ndarray) else [loaded[name] for name in wanted if name in names]
    except Exception as error:  # NumPy raises many types for invalid files
        raise UsageError(f"{path} can't be read: {error}") from error
    for name in wanted:
        if name not in names:
            raise UsageError(f"{path} has no array {name!r}; it has: {', '.join(names)}")
    logits, groups = found[0], None if group is None else found[1]
    if logits.ndim != 2 or logits.shape[1] < 2 or logits.dtype.kind != "f":
        raise UsageError(
            f"{path}: logits are {logits.dtype} {logits.shape}; expected floats (M, C) of two or more classes"
        )
    if groups is not None and groups.shape != (len(logits),):
        raise UsageError(f"{path}: {group} is {groups.shape}; expected one for each of the {len(logits)} rows")
    if not np.isfinite(np.max(logits, axis=1)).all():
        raise InvalidLogits(f"{path}: logits contain NaN or +inf, or a row of only -inf")
    return Calibration(logits, groups)
