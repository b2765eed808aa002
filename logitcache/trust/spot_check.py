"""The teacher asked again about a few samples of a cache: are these still its labels?"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from logitcache.cache.ensemble import merged_parts
from logitcache.cache.fidelity import fidelity_kl
from logitcache.cache.layout import Block
from logitcache.cache.reader import LogitCache
from logitcache.data.views import ViewDataset
from logitcache.devices import pick_device
from logitcache.encodings import Sampled
from logitcache.errors import UsageError
from logitcache.inference import teacher_outputs
from logitcache.pipeline import Pipeline
from logitcache.progress import track
from logitcache.randomness import counter_seed
from logitcache.resolve import resolve_data, resolve_plan, resolve_teacher
from logitcache.trust.audit import Problem
from logitcache.trust.fit import open_fitting_cache

TOLERANCE = {"float32": 1e-3, "bfloat16": 2e-2, "float16": 5e-3}
"""Nats at T = 1 by which a teacher's distribution may differ between devices and batches, by its precision."""
DISTANCE = {"float32": 1e-3, "bfloat16": 5e-2, "float16": 1e-2}
"""Of other outputs, the distance by which they may differ likewise, in parts of the row's norm."""
SLACK = 1.5
"""Times what the encoding alone puts a row off: other roundings of nearly the same values."""
DIFFERENT_DRAWS = 0.05
"""Share of a `Sampled` row's draws that may come out otherwise; one draw always may."""

# B batch, C classes, D values of a row


def spot_check(pipeline: Pipeline, count: int, *, seed: int = 0, trust: bool = False) -> list[Problem]:
    """Run the teacher again on some seeded places, and hold its logits to the cache's.

    A row's divergence may exceed the largest of its block, as it was when the block was written, by `TOLERANCE`; with
    `Sampled` labels, whose divergence is infinite, the classes drawn again may differ in one draw of twenty. Other
    outputs may be as far off as their encoding puts what the teacher says now, and `DISTANCE` more.

    Args:
        pipeline: what the cache was made by.
        count: places, drawn over all views.
        seed: which places.
        trust: allow entry points from outside the working folder.

    Raises:
        IdentityMismatch: the pipeline is of another cache.
        UsageError: the cache is a mean, which no one teacher can be asked about.
    """
    data = resolve_data(pipeline, trust=trust)
    plan = resolve_plan(pipeline, data, trust=trust)
    cache, rows = open_fitting_cache(pipeline, data, plan, trust=trust)
    if merged_parts(cache.manifest):
        raise UsageError(
            f"{pipeline.cache.path} is the mean of several caches, and no one teacher can be asked again; check those "
            "that it was merged from"
        )
    device = pick_device(pipeline.device, threads=pipeline.threads)
    teacher, _ = resolve_teacher(pipeline, data, plan, trust=trust)
    samples = cache.samples
    plan = replace(plan, num_samples=cache.num_samples, contents=None if samples is None else samples.contents)
    views = ViewDataset(data.train, plan, rows=rows)
    total = len(views) * len(cache.views)
    draws = {counter_seed("spot check", seed, number) % total for number in range(min(count, total))}
    places = sorted((cache.views[draw // len(views)], draw % len(views)) for draw in draws)
    size = pipeline.teacher.batch_size
    batches = [places[start : start + size] for start in range(0, len(places), size)]
    asked = [name for name in cache.others if name in pipeline.cache.outputs]
    problems = []
    with track("asking the teacher again", len(places), unit="samples") as meter:
        answers = teacher_outputs(pipeline, teacher, views, batches, device, asked)
        for batch, said in zip(batches, answers, strict=True):
            for view in sorted({view for view, _ in batch}):
                within = [number for number, place in enumerate(batch) if place[0] == view]
                rows_B = np.array([views.row(batch[number][1]) for number in within])
                again_BC = said.logits[within].float().cpu()
                precision = pipeline.teacher.precision
                differing = _differing(cache, view, rows_B, again_BC, TOLERANCE[precision])
                problems += [Problem(_block(cache, view, row), f"row {row}", "other logits") for row in differing]
                for name in asked:
                    again_BD = said.outputs[name][within].float().cpu().flatten(1)
                    for row in _other_values(cache, name, view, rows_B, again_BD, precision):
                        problems.append(Problem(_block(cache, view, row), f"row {row}", f"other {name}"))
            meter.advance(len(batch))
    return problems


def _differing(cache: LogitCache, view: int, rows_B: np.ndarray, again_BC: Tensor, tolerance: float) -> list[int]:
    """The rows whose labels are further from the teacher than when they were written."""
    decoded_BC = cache.view(view).logits(rows_B)
    kl_B = fidelity_kl(decoded_BC, again_BC)
    differing = []
    for place, row in enumerate(rows_B.tolist()):
        largest = cache.receipts[_block(cache, view, row)].kl_max
        if largest is not None:
            wrong = float(kl_B[place]) > largest + tolerance
        else:
            encoded = cache.encoding.encode(again_BC[place : place + 1], view=view, start=row)
            shares_BC = cache.encoding.decode(encoded, cache.num_classes).exp()
            smallest = float(shares_BC[0][shares_BC[0] > 0].min())
            moved = float((shares_BC[0] - decoded_BC[place].exp()).abs().sum()) / 2
            wrong = moved > max(DIFFERENT_DRAWS, 1.01 * smallest)
        if wrong:
            differing.append(row)
    return differing


def _other_values(
    cache: LogitCache, output: str, view: int, rows_B: np.ndarray, again_BD: Tensor, precision: str
) -> list[int]:
    """The rows of an output that are further from the teacher than their encoding explains."""
    encoding = cache.others[output].encoding
    decoded_BD = cache.view(view, outputs=[output]).output(output, rows_B).flatten(1)
    pieces = enumerate(rows_B.tolist())  # one at a time: where classes are drawn, it is by row
    encoded = [encoding.encode(again_BD[place : place + 1], view=view, start=row) for place, row in pieces]
    lossy_BD = torch.cat([encoding.decode(each, again_BD.shape[1]) for each in encoded])
    if encoding.keeps_constants:
        size_B = again_BD.norm(dim=1)
        off_B, explained_B = (decoded_BD - again_BD).norm(dim=1), (lossy_BD - again_BD).norm(dim=1)
        wrong_B = off_B > SLACK * explained_B + DISTANCE[precision] * size_B
    elif isinstance(encoding, Sampled):
        moved_B = (lossy_BD.exp() - decoded_BD.exp()).abs().sum(dim=1) / 2
        wrong_B = moved_B > max(DIFFERENT_DRAWS, 1.01 / encoding.draws)
    else:
        wrong_B = fidelity_kl(decoded_BD, again_BD) > SLACK * fidelity_kl(lossy_BD, again_BD) + TOLERANCE[precision]
    return [row for row, wrong in zip(rows_B.tolist(), wrong_B.tolist(), strict=True) if wrong]


def _block(cache: LogitCache, view: int, row: int) -> str:
    return Block(view, row // cache.layout.rows_per_block).name
