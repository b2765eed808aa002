"""Stage 1: runs the teacher over the missing blocks of a cache, then seals it.

pipeline -> identity -> missing blocks -> for each batch: workers render the view -> teacher -> writer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

import numpy as np

from logitcache.cache.creation import create
from logitcache.cache.destination import check_destination
from logitcache.cache.layout import Block, all_blocks
from logitcache.cache.manifest import LOGITS, MANIFEST, Manifest
from logitcache.cache.reader import open_cache
from logitcache.cache.writer import CacheWriter
from logitcache.catalog.outputs import declared_outputs, sources_of, taps_of
from logitcache.config.build import build_context, build_runner, resolve_data, resolve_plan, resolve_teacher
from logitcache.config.schema import Pipeline
from logitcache.data.rows import RowMap
from logitcache.data.samples import Dataset, SampleTable, compare_samples, content_table, sample_table
from logitcache.data.tokens import length_batches
from logitcache.data.views import ViewDataset
from logitcache.errors import IdentityMismatch, NotACache
from logitcache.progress import track
from logitcache.storage import open_storage
from logitcache.train.inference import TeacherRunner, calibrate, output_shapes
from logitcache.train.ranks import joined


@dataclass(frozen=True)
class CacheResult:
    """The cache, and the blocks that this run computed."""

    manifest: Manifest
    computed_blocks: list[Block]
    total_blocks: int


def cache_teacher(pipeline: Pipeline, *, trust: bool = False) -> CacheResult:
    """Compute the missing blocks of a pipeline's cache, and seal it.

    Safe to interrupt: run it again to resume. Under `torchrun` the first process creates and seals the cache, and
    each process computes its share of the missing blocks.

    Raises:
        LogitCacheError: data, teacher or an existing cache don't fit the pipeline; before the teacher runs.
    """
    place = open_storage(pipeline.cache.path)
    if place.size(MANIFEST) is None:
        check_destination(place)
    data = resolve_data(pipeline, trust=trust)
    plan = resolve_plan(pipeline, data, trust=trust)
    context = build_context(pipeline, trust=trust)
    teacher, fingerprint = resolve_teacher(pipeline, data, plan, trust=trust)
    outputs = pipeline.cache.outputs
    declared = declared_outputs(outputs, output_shapes(teacher, ViewDataset(data.train, plan), taps_of(outputs)))
    with joined(context.device) as ranks:
        if ranks.rank:
            ranks.wait()  # until the first process has created the cache, with its per-cache arrays
        samples = identify_samples(data.train, pipeline.cache.path, num_workers=pipeline.num_workers)
        views = ViewDataset(data.train, replace(plan, contents=samples.contents))
        writer = create(
            pipeline.cache.path,
            num_samples=len(data.train),
            num_classes=data.num_classes,
            num_views=pipeline.views.count,
            encoding=pipeline.cache.encoding,
            outputs=declared,
            logits_source=sources_of(outputs).get(LOGITS),
            calibration=lambda: calibrate(
                build_runner(pipeline, teacher, context),
                views,
                num_views=pipeline.views.count,
                count=pipeline.cache.calibration,
            ),
            teacher=fingerprint,
            teacher_name=pipeline.teacher_name,
            dataset_name=pipeline.dataset_name,
            samples=samples,
            view_plan=plan,
            precision=pipeline.teacher.precision,
            class_names=data.class_names,
            rows_per_sample=getattr(data.train, "rows_per_sample", None),
            row_positions=getattr(data.train, "row_positions", None),
            tokenization=getattr(data.train, "tokenization", None),
            rows_per_block=pipeline.cache.rows_per_block,
            card=pipeline.cache.card if pipeline.cache.card.stated() else None,
        )
        try:
            if not ranks.rank:
                ranks.wait()
            missing = ranks.from_first(writer.missing_blocks)
            ours = missing[ranks.rank :: ranks.size]
            if ours:
                run_blocks(build_runner(pipeline, teacher, context, list(writer.outputs)), writer, ours, views)
            writer.flush()
            ranks.wait()  # until all blocks are written
            manifest = ranks.from_first(writer.seal)
        finally:
            writer.close()
    return CacheResult(manifest, sorted(missing), total_blocks=sum(1 for _ in all_blocks(writer.layout)))


def run_blocks(runner: TeacherRunner, writer: CacheWriter, blocks: list[Block], views: ViewDataset) -> None:
    """Run the teacher over the given blocks, and write its output."""
    rows, num_views = writer.row_map, writer.layout.num_views
    batches = list(teacher_batches(rows, blocks, runner.config.batch_size))
    places = ([(view, sample) for sample in samples] for view, samples in batches)
    total = sum(len(rows.block_rows(block.number)) for block in blocks)
    with track("caching the teacher", total, unit="samples" if rows.one_each else "rows") as meter:
        for (view, samples), output in zip(batches, runner.run(views, places), strict=True):
            start = 0
            for consecutive in _consecutive(rows, samples):
                parts = output.rows(start, start + len(consecutive))
                writer.write(
                    view=view,
                    start=consecutive.start,
                    logits=parts.pop(LOGITS),
                    outputs=parts,
                    input_digests=output.input_digests,
                )
                start += len(consecutive)
            meter.advance(start, note=f"view {view + 1}/{num_views}")


def teacher_batches(rows: RowMap, blocks: list[Block], batch_size: int) -> Iterator[tuple[int, Sequence[int]]]:
    """(view, samples) of each batch. A block is always split the same way, so that recomputing it gives the same bits.

    The sequences of a batch have similar lengths, so that it has little padding.
    """
    for block in blocks:
        samples = rows.block_samples(block.number)
        if not rows.one_each:
            counts = np.diff(rows.offsets[samples[0] : samples[-1] + 2])
            with_rows = np.flatnonzero(counts)
            for batch in length_batches(counts[with_rows], batch_size):
                yield block.view, (samples[0] + with_rows[batch]).tolist()
            continue
        for start in range(0, len(samples), batch_size):
            yield block.view, samples[start : start + batch_size]


def _consecutive(rows: RowMap, samples: Sequence[int]) -> list[range]:
    """The rows of a batch's samples, as ranges of consecutive rows."""
    if rows.one_each:
        return [range(samples[0], samples[-1] + 1)]
    return [rows.sample_rows(sample) for sample in samples]


def identify_samples(dataset: Dataset, location: str, *, num_workers: int) -> SampleTable:
    """Keys, targets and content digests of a dataset, from the cache where it exists.

    Known samples are checked against their digests when they are loaded, so resuming or growing a cache needs no
    second pass over the data.

    Raises:
        IdentityMismatch: the cache at this location has other samples; names the first difference.
    """
    current = sample_table(dataset)
    cached = None
    with suppress(NotACache):
        cached = open_cache(location).samples
    if cached is not None:
        differences = compare_samples(cached, current)
        if differences or cached.keys != current.keys:
            first = differences[0] if differences else "the order of the samples"
            raise IdentityMismatch(
                f"{location} was built from dataset {cached.fingerprint()[:12]}… ({cached.num_samples} samples); this "
                f"one has {current.num_samples} samples.\nFirst difference: {first}.\n"
                "Run `logitcache verify CACHE --data PIPELINE` for the whole list, or choose another `cache.path`."
            )
        return cached
    with track("fingerprinting the data", current.num_samples, unit="samples") as meter:
        return replace(current, contents=content_table(dataset, num_workers=num_workers, advance=meter.advance))
