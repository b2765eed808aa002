"""Stage 1: run the teacher over the blocks that have no receipt, then seal.

pipeline -> identity -> missing blocks -> for each batch: workers render the view -> teacher -> writer.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace

import torch
from torch import nn

from logitcache.cache.creation import create
from logitcache.cache.destination import check_destination
from logitcache.cache.layout import Block, all_blocks, block_rows
from logitcache.cache.manifest import LOGITS, MANIFEST, Layout, Manifest
from logitcache.cache.reader import open_cache
from logitcache.cache.writer import CacheWriter
from logitcache.catalog.outputs import declared_outputs, sources_of
from logitcache.config.build import resolve_data, resolve_plan, resolve_teacher
from logitcache.config.schema import Pipeline
from logitcache.data.samples import Dataset, SampleTable, compare_samples, content_table, sample_table
from logitcache.data.views import ViewDataset
from logitcache.devices import pick_device
from logitcache.errors import IdentityMismatch, NotACache
from logitcache.progress import track
from logitcache.storage import open_storage
from logitcache.train.inference import calibrate, output_shapes, teacher_outputs
from logitcache.train.ranks import joined


@dataclass(frozen=True)
class CacheResult:
    """What a run of stage 1 did."""

    manifest: Manifest
    computed_blocks: list[Block]
    total_blocks: int


def cache_teacher(pipeline: Pipeline, *, trust: bool = False) -> CacheResult:
    """Compute the blocks of a pipeline's cache that are not there yet, and seal it.

    Idempotent: interrupted, it is run again and goes on at the first missing block. Of several processes that
    `torchrun` started the first begins the cache and seals it, and each computes its share of the missing blocks.

    Raises:
        LogitCacheError: before any teacher work, where data, teacher or an existing cache don't fit the pipeline.
    """
    place = open_storage(pipeline.cache.path)
    if place.size(MANIFEST) is None:
        check_destination(place)
    data = resolve_data(pipeline, trust=trust)
    plan = resolve_plan(pipeline, data, trust=trust)
    device = pick_device(pipeline.device, threads=pipeline.threads)
    teacher, fingerprint = resolve_teacher(pipeline, data, plan, trust=trust)
    outputs = pipeline.cache.outputs
    declared = declared_outputs(outputs, output_shapes(pipeline, teacher, ViewDataset(data.train, plan)))
    with joined(device) as ranks:
        if ranks.rank:
            ranks.wait()  # until the first one has begun the cache, with all that is stored once
        samples = identify_samples(data.train, pipeline.cache.path, num_workers=pipeline.num_workers)
        views = ViewDataset(data.train, replace(plan, contents=samples.contents))
        writer = create(
            pipeline.cache.path,
            num_samples=len(data.train),
            num_classes=data.num_classes,
            num_views=pipeline.views.count,
            encoding=pipeline.encoding(),
            outputs=declared,
            logits_source=sources_of(outputs).get(LOGITS),
            calibration=lambda: calibrate(pipeline, teacher, views, device),
            teacher=fingerprint,
            samples=samples,
            view_plan=plan,
            precision=pipeline.teacher.precision,
            class_names=data.class_names,
            rows_per_block=pipeline.cache.rows_per_block,
            card=pipeline.cache.card if pipeline.cache.card.stated() else None,
        )
        try:
            if not ranks.rank:
                ranks.wait()
            missing = ranks.from_first(writer.missing_blocks)
            ours = missing[ranks.rank :: ranks.size]
            if ours:
                run_blocks(pipeline, writer, ours, teacher, views, device)
            writer.flush()
            ranks.wait()  # until all blocks are there
            manifest = ranks.from_first(writer.seal)
        finally:
            writer.close()
    return CacheResult(manifest, sorted(missing), total_blocks=sum(1 for _ in all_blocks(writer.layout)))


def run_blocks(
    pipeline: Pipeline,
    writer: CacheWriter,
    blocks: list[Block],
    teacher: nn.Module,
    views: ViewDataset,
    device: torch.device,
) -> None:
    """Run the teacher over the given blocks and hand what it says to the writer."""
    layout = writer.layout
    batches = list(teacher_batches(layout, blocks, pipeline.teacher.batch_size))
    places = ([(view, row) for row in rows] for view, rows in batches)
    answers = teacher_outputs(pipeline, teacher, views, places, device, list(writer.outputs))
    total = sum(len(block_rows(layout, block)) for block in blocks)
    with track("caching the teacher", total, unit="samples") as meter:
        for (view, rows), said in zip(batches, answers, strict=True):
            writer.write(
                view=view, start=rows.start, logits=said.logits, outputs=said.outputs, input_digests=said.digests
            )
            meter.advance(len(rows), note=f"view {view + 1}/{layout.num_views}")


def teacher_batches(layout: Layout, blocks: list[Block], batch_size: int) -> Iterator[tuple[int, range]]:
    """(view, rows) of each batch: a block is always cut alike, so a block computed again is the same block."""
    for block in blocks:
        rows = block_rows(layout, block)
        for start in range(rows.start, rows.stop, batch_size):
            yield block.view, range(start, min(start + batch_size, rows.stop))


def identify_samples(dataset: Dataset, location: str, *, num_workers: int) -> SampleTable:
    """Keys, targets and contents of a dataset; contents come from the cache where one is there already.

    Samples that the cache knows are held to its digests as they are loaded, so a cache that is resumed or grows
    needs no second pass over the data.

    Raises:
        IdentityMismatch: the cache at this location is of other samples; names the first difference.
    """
    here = sample_table(dataset)
    cached = None
    with suppress(NotACache):
        cache = open_cache(location)
        cached = cache.samples
    if cached is not None:
        differences = compare_samples(cached, here)
        if differences or cached.keys != here.keys:
            first = differences[0] if differences else "the samples are in another order"
            raise IdentityMismatch(
                f"{location} was built from dataset {cached.fingerprint()[:12]}… ({cached.num_samples} samples); this "
                f"one has {here.num_samples} samples.\nFirst difference: {first}.\n"
                "Run `logitcache verify CACHE --data PIPELINE` for the whole list, or choose another `cache.path`."
            )
        return cached
    with track("fingerprinting the data", here.num_samples, unit="samples") as meter:
        return replace(here, contents=content_table(dataset, num_workers=num_workers, advance=meter.advance))
