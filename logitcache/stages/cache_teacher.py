"""Stage 1: computes the missing blocks of a cache, and seals it. An engine distributes the blocks over processes.

pipeline -> identity -> missing blocks -> for each batch: workers render the view -> teacher -> writer.
"""

from __future__ import annotations

import itertools
import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from logitcache.cache.creation import create, is_created
from logitcache.cache.cut_classes import CUT_CLASSES
from logitcache.cache.destination import check_destination
from logitcache.cache.layout import Block, all_blocks
from logitcache.cache.manifest import LOGITS, MANIFEST, Manifest
from logitcache.cache.reader import LogitCache
from logitcache.cache.writer import CacheWriter
from logitcache.catalog.models import check_model_name
from logitcache.catalog.outputs import declared_outputs, sources_of, taps_of
from logitcache.config.build import build_context, build_runner, resolve_data, resolve_plan, resolve_teacher
from logitcache.config.schema import Pipeline, as_pipeline
from logitcache.data.rows import RowMap
from logitcache.data.samples import Dataset, SampleTable, SeenContents, compare_samples, sample_table
from logitcache.data.tokens import length_batches
from logitcache.data.views import ViewDataset
from logitcache.engines import CacheResult, Engine, Job, Local, Shard, Torchrun, Worker
from logitcache.engines.claims import open_once
from logitcache.errors import IdentityMismatch, UsageError
from logitcache.progress import track
from logitcache.stages.conflicts import check_cache, existing_cache
from logitcache.storage import open_storage
from logitcache.storage.claims import Claims
from logitcache.train.inference import TeacherRunner, calibrate, measure_cut_classes, output_shapes
from logitcache.train.ranks import in_group
from logitcache.verify.fit import identity_differences


def cache_teacher(pipeline: Pipeline, *, engine: Engine | None = None, trust: bool = False) -> CacheResult:
    """Compute the missing blocks of a pipeline's cache, and seal it.

    Safe to interrupt: run it again to resume.

    Args:
        pipeline: names data, views, teacher and cache.
        engine: distributes the blocks over processes; by default over those that `torchrun` started, or none.
        trust: allow code from outside the working directory.

    Raises:
        LogitCacheError: data, teacher or an existing cache don't fit the pipeline; before the teacher runs.
        UsageError: `torchrun` started this process, and another engine was chosen; or the other way around.
    """
    if engine is None:
        engine = Torchrun() if in_group() else Local()
    elif in_group() != isinstance(engine, Torchrun):
        raise UsageError(
            f"the engine is {engine.name!r}, but torchrun started this process; start it without torchrun"
            if in_group()
            else "the engine 'torchrun' needs processes that torchrun started: "
            "torchrun --nproc-per-node N -m logitcache.cli cache-teacher PIPELINE"
        )
    return engine.run(TeacherJob(pipeline, trust))


def plan_blocks(
    pipeline: Pipeline | str | os.PathLike[str], *, shard: str | None = None, trust: bool = False
) -> list[Block]:
    """The blocks of a pipeline's cache that are missing. The cache is created if it does not exist.

    They are in the order of computation: view by view, or with `views.per_decode` blocks of the same samples in a row.
    A block is a view and a range of its rows: the unit of work. Give each process some of the blocks, and
    `compute_blocks` them there; when all are committed, `logitcache.seal` the cache.

    Args:
        pipeline: a pipeline, or the path of its file.
        shard: such as "0/4": only the blocks of the first of four parts. A block belongs to the same part whatever is
            missing, so each process can plan its own part.
        trust: allow code from outside the working directory.

    Raises:
        LogitCacheError: data, teacher or an existing cache don't fit the pipeline.
    """
    part = Shard(index=0, count=1) if shard is None else Shard.parse(shard)
    with closing(TeacherWorker(as_pipeline(pipeline), trust=trust)) as worker, Claims(worker.storage) as claims:
        open_once(worker, claims)
        missing = set(worker.missing_blocks())
        return [block for block in part.share(worker.all_blocks(), together=worker.together) if block in missing]


def compute_blocks(
    pipeline: Pipeline | str | os.PathLike[str], blocks: Iterable[Block], *, trust: bool = False
) -> list[Block]:
    """Run the teacher over blocks of a pipeline's cache, and commit them; blocks that are committed are left out.

    Each call loads data and teacher, so pass many blocks at a time. Several processes may compute the same block: it
    has the same values. The cache is not sealed: call `logitcache.seal`.

    Args:
        pipeline: a pipeline, or the path of its file.
        blocks: from `plan_blocks`.
        trust: allow code from outside the working directory.

    Returns:
        The blocks that were computed.

    Raises:
        UsageError: a block is not one of the cache.
        LogitCacheError: data, teacher or the cache don't fit the pipeline.
    """
    requested = list(blocks)
    with closing(TeacherWorker(as_pipeline(pipeline), trust=trust)) as worker, Claims(worker.storage) as claims:
        open_once(worker, claims)
        unknown = set(requested) - set(worker.all_blocks())
        if unknown:
            raise UsageError(
                f"the cache has no block {min(unknown).name}; expected blocks of plan_blocks, of "
                f"{worker.manifest.layout.num_views} views with {worker.manifest.layout.blocks_per_view} blocks each"
            )
        missing = set(worker.missing_blocks())
        return worker.compute([block for block in dict.fromkeys(requested) if block in missing])


@dataclass(frozen=True)
class TeacherJob(Job):
    """Stage 1 of a pipeline, for an engine."""

    pipeline: Pipeline
    trust: bool

    def load(self) -> TeacherWorker:
        return TeacherWorker(self.pipeline, trust=self.trust)


class TeacherWorker(Worker):
    """The data and the teacher of a pipeline, and the writer of its cache.

    Raises:
        LogitCacheError: data or teacher are not available, or no cache can be written there.
    """

    def __init__(self, pipeline: Pipeline, *, trust: bool) -> None:
        self.storage = open_storage(pipeline.cache.path)
        if self.storage.size(MANIFEST) is None:
            check_destination(self.storage)
        check_model_name(pipeline.teacher.model, trust=trust)
        self._existing = existing_cache(pipeline)
        if self._existing is not None:
            check_cache(self._existing, pipeline, None, trust=trust)
        self._pipeline = pipeline
        self.together = pipeline.views.per_decode
        self._data = resolve_data(pipeline, trust=trust)
        self._plan = resolve_plan(pipeline, self._data, trust=trust)
        self._context = build_context(pipeline, trust=trust)
        self.device = self._context.device
        self._teacher, self._fingerprint = resolve_teacher(pipeline, self._data, self._plan, trust=trust)
        taps = taps_of(pipeline.cache.outputs)
        shapes = output_shapes(self._teacher, ViewDataset(self._data.train, self._plan), taps)
        self._outputs = declared_outputs(pipeline.cache.outputs, shapes)
        self._opened: tuple[CacheWriter, ViewDataset] | None = None
        self._runner: TeacherRunner | None = None

    def is_created(self) -> bool:
        return is_created(self.storage)

    def open(self) -> None:
        pipeline, data, plan = self._pipeline, self._data, self._plan
        samples = identify_samples(data.train, self._existing or existing_cache(pipeline))
        contents = SeenContents(samples.num_samples) if samples.contents is None else samples.contents
        plan = replace(plan, contents=contents)
        views = ViewDataset(data.train, plan, on_device=pipeline.views.on_device)
        writer = create(
            pipeline.cache.path,
            num_samples=len(data.train),
            num_classes=data.num_classes,
            num_views=pipeline.views.count,
            encoding=pipeline.cache.encoding,
            outputs=self._outputs,
            logits_source=sources_of(pipeline.cache.outputs).get(LOGITS),
            calibration=lambda: calibrate(
                build_runner(
                    pipeline,
                    self._teacher,
                    self._context,
                    [name for name, output in self._outputs.items() if not output.encoding.is_fitted],
                ),
                views,
                num_views=pipeline.views.count,
                count=pipeline.cache.calibration,
            ),
            teacher=self._fingerprint,
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
            notes=None if self.is_created() else self._cut_classes(views),
        )
        self._opened = writer, views

    def _cut_classes(self, views: ViewDataset) -> dict[str, Any] | None:
        """What the teacher's head was cut by, for the provenance of a new cache."""
        found = measure_cut_classes(self._teacher, self._pipeline.teacher, self._context, views)
        return None if found is None else {CUT_CLASSES: found.model_dump()}

    @property
    def manifest(self) -> Manifest:
        return self._writer.manifest

    def all_blocks(self) -> list[Block]:
        return self._in_order(all_blocks(self._writer.layout))

    def missing_blocks(self, *, refresh: bool = False) -> list[Block]:
        return self._in_order(self._writer.missing_blocks(refresh=refresh))

    def _in_order(self, blocks: Iterable[Block]) -> list[Block]:
        """View by view; with `views.per_decode`, the blocks of the same samples in that many views in a row."""
        if self.together == 1:
            return list(blocks)
        return sorted(blocks, key=lambda block: (block.view // self.together, block.number, block.view))

    def is_committed(self, block: Block) -> bool:
        return self._writer.is_committed(block, refresh=True)

    def compute(self, blocks: Iterable[Block]) -> list[Block]:
        blocks = list(blocks)
        return list(self.compute_each(blocks, drawn_from=blocks))

    def compute_each(self, blocks: Iterable[Block], *, drawn_from: Sequence[Block]) -> Iterator[Block]:
        writer, views = self._open_cache()
        upcoming = iter(blocks)
        first = next(upcoming, None)
        if first is None:
            return  # no worker processes are started for nothing
        if self._runner is None:
            self._runner = build_runner(self._pipeline, self._teacher, self._context, list(writer.outputs))
        waiting: deque[Block] = deque()

        def drawn() -> Iterator[Block]:
            for block in itertools.chain([first], upcoming):
                waiting.append(block)
                samples = writer.row_map.covered_samples(block.number)
                if not writer.row_map.one_each:  # the teacher never sees samples without rows
                    views.take_digests(sample for sample in samples if not writer.row_map.sample_rows(sample))
                yield block

        def committed() -> Iterator[Block]:
            while waiting and writer.is_committed(waiting[0]):
                yield waiting.popleft()

        total = sum(len(writer.row_map.block_rows(block.number)) for block in drawn_from)
        for _ in run_blocks(self._runner, writer, drawn(), views, num_rows=total, together=self.together):
            yield from committed()
        writer.flush()
        yield from committed()

    def seal(self) -> Manifest:
        return self._writer.seal()

    def close(self) -> None:
        if self._opened is not None:
            self._writer.close()

    @property
    def _writer(self) -> CacheWriter:
        return self._open_cache()[0]

    def _open_cache(self) -> tuple[CacheWriter, ViewDataset]:
        if self._opened is None:
            raise UsageError("the cache is not open; call open() first")
        return self._opened


def run_blocks(
    runner: TeacherRunner,
    writer: CacheWriter,
    blocks: Iterable[Block],
    views: ViewDataset,
    *,
    num_rows: int,
    together: int,
) -> Iterator[int]:
    """Run the teacher over blocks, and write its output; yields the number of rows of each batch when it is written.

    Args:
        runner, writer, views: the teacher, the cache, and the teacher's inputs.
        blocks: read a few batches ahead of the teacher.
        num_rows: in all blocks, for the progress.
        together: consecutive blocks of the same samples, in different views, whose samples are loaded once.
    """
    rows, num_views = writer.row_map, writer.layout.num_views
    groups, ahead = itertools.tee(grouped_batches(rows, blocks, runner.config.batch_size, together=together))
    batches = itertools.chain.from_iterable(groups)
    places = ([[(view, sample) for sample in samples] for view, samples in group] for group in ahead)
    with track("caching the teacher", num_rows, unit="rows") as meter:
        for (view, samples), output in zip(batches, runner.run_groups(views, places, per_group=together), strict=True):
            start = 0
            for consecutive in _consecutive(rows, samples):
                parts = output.rows(start, start + len(consecutive))
                logits = parts.pop(LOGITS)
                writer.write(
                    view=view,
                    start=consecutive.start,
                    logits=logits if writer.has_logits else None,
                    outputs=parts,
                    input_digests=output.input_digests,
                )
                start += len(consecutive)
            meter.advance(start, note=f"view {view + 1}/{num_views}")
            yield start


def grouped_batches(
    rows: RowMap, blocks: Iterable[Block], batch_size: int, *, together: int
) -> Iterator[list[tuple[int, Sequence[int]]]]:
    """The batches of `teacher_batches`, grouped: those of the same samples in up to `together` consecutive blocks.

    The batches are the same with any grouping, so the labels have the same bits.
    """

    def batches_of(group: list[Block]) -> Iterator[list[tuple[int, Sequence[int]]]]:
        of_blocks = [teacher_batches(rows, [block], batch_size) for block in group]
        return map(list, zip(*of_blocks, strict=True))

    group: list[Block] = []
    for block in blocks:
        if group and block.number != group[0].number:
            yield from batches_of(group)
            group = []
        group.append(block)
        if len(group) == together:  # not later: the iterator may claim blocks
            yield from batches_of(group)
            group = []
    yield from batches_of(group)


def teacher_batches(rows: RowMap, blocks: Iterable[Block], batch_size: int) -> Iterator[tuple[int, Sequence[int]]]:
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


def identify_samples(dataset: Dataset, existing: LogitCache | None) -> SampleTable:
    """Keys and targets of a dataset, and its content digests if they are in the existing cache.

    Samples with a digest are compared with it when the teacher loads them; for the others it is computed then. So a
    build needs no pass over the data before the teacher's.

    Raises:
        IdentityMismatch: the existing cache has other samples; names the first difference.
    """
    current = sample_table(dataset)
    cached = None if existing is None else existing.samples
    if existing is not None and cached is not None:
        # Another tokenization first: it may be the cause of other samples.
        differences = identity_differences(existing, {"tokenization": getattr(dataset, "tokenization", None) or {}})
        differences += compare_samples(cached, current)
        if differences or cached.keys != current.keys:
            first = differences[0] if differences else "the order of the samples"
            identity = cached.pending_fingerprint() if cached.contents is None else cached.fingerprint()
            raise IdentityMismatch(
                f"{existing.storage.url} was built from dataset {identity[:12]}… ({cached.num_samples} samples); "
                f"this one has {current.num_samples} samples.\nFirst difference: {first}.\n"
                "Run `logitcache verify CACHE --data PIPELINE` for the whole list, or choose another `cache.path`."
            )
        return cached
    return current
