"""Trains several students on each rendered batch, with the same results as alone; images are rendered only once.

This works because a run's batches are a pure function of its settings, each step seeds its own randomness, and runs
share only the inputs, of which each gets a copy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from logitcache.data.batching import InputPerModel
from logitcache.data.loading import rendered_batches
from logitcache.data.transforms import adapt_transform
from logitcache.data.views import ViewDataset
from logitcache.digest import array_digest, json_digest
from logitcache.progress import Meter, track
from logitcache.randomness import preserved_generators
from logitcache.train.job import Job
from logitcache.train.loop import Run, begin
from logitcache.train.ranks import ALONE, Ranks


@dataclass(frozen=True)
class EachInput:
    """The preprocessing of several models, applied to one rendered view."""

    parts: tuple[Callable[[Any], Any] | None, ...]

    def __call__(self, pixels: Any) -> InputPerModel:
        return InputPerModel(pixels if part is None else part(pixels) for part in self.parts)


def groups(jobs: Sequence[Job]) -> list[list[Job]]:
    """Jobs grouped such that all jobs of a group have the same samples and views in every batch."""
    found: dict[str, list[Job]] = {}
    for job in jobs:
        found.setdefault(_batches_of(job), []).append(job)
    return list(found.values())


def train_together(jobs: Sequence[Job], ranks: Ranks = ALONE) -> list[dict[str, Any]]:
    """Train the jobs of one group, batch by batch; returns the result of each.

    After an interruption each job resumes from its own checkpoint, and the ones ahead wait for the others.

    Raises:
        UsageError: a folder contains a run of another configuration.
        InvalidLogits: a loss became NaN or infinite.
    """
    results: dict[str, dict[str, Any]] = {}
    with preserved_generators():
        runs: list[Run] = []
        for job in jobs:
            begun = begin(job, ranks)
            if isinstance(begun, Run):
                runs.append(begun)
            else:
                results[str(job.folder)] = begun
        title = f"training {len(runs)} students, seed {jobs[0].seed}"
        total = sum(run.total_steps for run in runs)
        with ExitStack() as stack:
            meter = stack.enter_context(track(title, total, unit="steps")) if runs else Meter()
            meter.advance(sum(run.step for run in runs))
            while runs:
                _until_one_is_done(runs, meter)
                for run in [run for run in runs if run.done]:
                    results[str(run.job.folder)] = run.finish()
                    runs.remove(run)
    return [results[str(job.folder)] for job in jobs]


def _until_one_is_done(runs: Sequence[Run], meter: Meter) -> None:
    """Train until one run is done, starting at the step of the run that is furthest behind."""
    first = min(runs, key=lambda run: run.step)
    inputs = {run.job.input_key: run.job.views for run in runs}
    keys = list(inputs)
    views = first.job.views if len(keys) == 1 else _views_of(first.job.views, list(inputs.values()))
    loader = rendered_batches(
        views, first.places(), num_workers=first.job.num_workers, pin_memory=first.job.device.type == "cuda"
    )
    step = first.step
    for index, rendered, targets in loader:
        at_step = [run for run in runs if run.step == step]
        for position, run in enumerate(at_step):
            mine = rendered if len(keys) == 1 else rendered[keys.index(run.job.input_key)]
            if not run.in_epoch:
                run.begin_epoch()
            # A model may change its input in place, so all but the last one get a copy.
            run.train_step(index, mine if position + 1 == len(at_step) else _copied(mine), targets)
            meter.advance()
            if not run.in_epoch:
                meter.advance(0, note=f"{run.job.name}: {run.end_epoch()}")
        step += 1
        if any(run.done for run in runs):
            return


def _views_of(views: ViewDataset, inputs: Sequence[ViewDataset]) -> ViewDataset:
    """The same views, rendered for several models at once."""
    parts = tuple(adapt_transform(each.preprocess) for each in inputs)
    return ViewDataset(views.dataset, views.plan, preprocess=EachInput(parts), rows=views.rows)


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {name: _copied(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(_copied, value))
    return value


def _batches_of(job: Job) -> str:
    """A digest of everything that determines the samples and views of each batch."""
    return json_digest(
        {
            "views": job.views_key,
            "indices": array_digest(job.indices),
            "classes": None if job.classes is None else array_digest(job.classes),
            "num_views": job.num_views,
            "first_view": job.first_view,
            "seed": job.seed,
            "batch_size": job.config.batch_size,
            "window": job.window_blocks,
            "per_decode": job.per_decode,
        }
    )
