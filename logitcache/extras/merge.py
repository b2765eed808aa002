"""The mean of several caches over the same views as one cache: an ensemble at the cost of one teacher's labels.

Sources are read block by block, and the mean is written like any teacher's logits. An interrupted merge resumes at the
first missing block and has the same digest.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import torch
from torch import Tensor

from logitcache.cache.averaging import (
    check_same_pixels,
    check_same_views,
    mean_of_logits,
    mean_of_probabilities,
    normalised_weights,
    refuse_sampled,
    teacher_input,
)
from logitcache.cache.creation import Origin, open_writer
from logitcache.cache.ensemble import MERGED, Part, merged_name
from logitcache.cache.fidelity import Calibration
from logitcache.cache.labelview import View
from logitcache.cache.layout import Block, num_blocks
from logitcache.cache.manifest import Manifest
from logitcache.cache.names import recorded_names
from logitcache.cache.reader import LogitCache, open_cache, open_sealed
from logitcache.cache.writer import CacheWriter
from logitcache.data.samples import SampleTable
from logitcache.encodings import Auto, Encoding, encoding_from_config
from logitcache.errors import (
    CorruptCache,
    IncompleteCache,
    InvalidLogits,
    NotACache,
    UsageError,
)
from logitcache.progress import track
from logitcache.randomness import keyed_permutation

# B batch, C classes

MEANS = ("logits", "probabilities")
PIECE_LOGITS = 2**20
"""Logits of each source averaged at once (4 MB)."""
CALIBRATION_ROWS = 10_000
CALIBRATION_BLOCKS = 64
"""Blocks that the calibration rows are drawn from, at most: each must be read and decoded."""


@dataclass(frozen=True)
class MergeResult:
    """The result of a merge."""

    manifest: Manifest
    parts: list[Part]
    """The sources, in the given order."""
    computed_blocks: list[Block]
    total_blocks: int
    left_out: dict[str, int]
    """Number of views that a source has beyond those that all have, by location."""
    left_out_outputs: dict[str, list[str]]
    """Outputs of a source other than logits, by location: only logits are averaged."""


def merge(
    locations: Sequence[str],
    out: str | os.PathLike[str],
    *,
    mean: str = "logits",
    weights: Sequence[float] | None = None,
    encoding: Encoding | Auto | str | Mapping[str, Any] | None = None,
) -> MergeResult:
    """Average the logits of sealed caches over the same views into a new cache, and seal it.

    Idempotent; safe to interrupt. The result has the views that all sources have. Its transform, proof digests, rows
    per block and default encoding come from the first source; all else is independent of the order of sources.

    Args:
        locations: two or more caches.
        out: the merged cache.
        mean: "logits", the geometric mean of the distributions at any temperature; or "probabilities", the arithmetic
            mean at T = 1.
        weights: a positive number for each cache; equal by default.
        encoding: as in `create`; fitted to the merged logits if it needs calibration.

    Raises:
        UsageError: fewer than two caches, the same one twice, `out` among them, or invalid weights.
        IncompleteCache: a source is not sealed.
        IdentityMismatch: the sources have different views, or `out` is another cache; names the field.
        CorruptCache: a source is damaged.
    """
    if mean not in MEANS:
        raise UsageError(f"mean must be one of {', '.join(MEANS)}, not {mean!r}")
    if len(locations) < 2:
        raise UsageError(f"merge needs two or more caches, not {len(locations)}")
    shares = normalised_weights(weights, len(locations))
    sources = [_open_sealed(location) for location in locations]
    _check_distinct(locations, sources, out)
    for location, source in zip(locations[1:], sources[1:], strict=True):
        check_same_views(locations[0], sources[0], location, source)
    num_views = min(source.num_views for source in sources)
    check_same_pixels(locations, sources, num_views)
    if mean == "logits":
        refuse_sampled(locations, sources)
    samples = _common_samples(locations, sources)

    parts = [
        Part(
            id=source.id,
            digest=str(source.digest),
            teacher=source.manifest.identity.teacher,
            precision=source.manifest.identity.precision,
            teacher_input=teacher_input(source),
            weight=share,
            location=location,
        )
        for location, source, share in zip(locations, sources, shares, strict=True)
    ]
    average = _Average(sources, shares, mean)
    first = sources[0]
    identity = first.manifest.identity
    precisions = {part.precision for part in parts}
    writer = open_writer(
        out,
        Origin(
            dataset=identity.dataset,
            teacher=merged_name(parts, mean),
            precision=precisions.pop() if len(precisions) == 1 else "mixed",
            transform=identity.transform,
            view_seed=identity.view_seed,
            class_names=identity.class_names,
            tokenization=identity.tokenization,
        ),
        rows=first.row_map,
        num_classes=first.num_classes,
        num_views=num_views,
        encoding=encoding_from_config(identity.encoding) if encoding is None else encoding,
        calibration=lambda: calibration_sample(average, first, num_views),
        samples=samples,
        names={"dataset": recorded_names(first.manifest).get("dataset")},
        notes={MERGED: {"mean": mean, "parts": [part.model_dump() for part in parts]}},
    )
    with writer:
        missing = writer.missing_blocks()
        if missing:
            _merge_blocks(writer, missing, average, sources)
        manifest = writer.seal()
    by_location = dict(zip(locations, sources, strict=True))
    return MergeResult(
        manifest=manifest,
        parts=parts,
        computed_blocks=sorted(writer.committed_blocks),
        total_blocks=num_blocks(writer.layout),
        left_out={place: more for place, each in by_location.items() if (more := each.num_views - num_views)},
        left_out_outputs={place: list(each.extra_outputs) for place, each in by_location.items() if each.extra_outputs},
    )


class _Average:
    """The mean of several caches' logits, with one or two blocks of each in memory."""

    def __init__(self, caches: Sequence[LogitCache], weights: Sequence[float], mean: str) -> None:
        # Sorted, so that rounding does not depend on the given order.
        order = sorted(range(len(caches)), key=lambda number: caches[number].id)
        self._caches = [caches[number] for number in order]
        self._weights = [weights[number] for number in order]
        self._mean = mean_of_logits if mean == "logits" else mean_of_probabilities
        self._views: list[View] = []
        self._number = -1

    def logits(self, view: int, rows: Any) -> Tensor:
        """float32 (B, C) of some rows of a view; fast if the rows are close to each other.

        Raises:
            InvalidLogits: a row in which no class is finite in all sources.
        """
        if view != self._number:
            self._views = [cache.view(view, memory_budget=1) for cache in self._caches]
            self._number = view
        mean_BC = self._mean((each.logits(rows) for each in self._views), self._weights)
        empty = torch.nonzero(mean_BC.amax(dim=1) == -torch.inf).flatten()
        if len(empty):
            raise InvalidLogits(
                f"view {view}, row {rows[int(empty[0])]}: every class is masked in at least one of the caches, so the "
                "mean of logits masks all classes; use --mean probabilities"
            )
        return mean_BC


def calibration_sample(average: _Average, first: LogitCache, num_views: int) -> Calibration:
    """Up to 10 000 rows of merged logits from at most 64 blocks over all views, grouped by sample."""
    per_view = first.layout.blocks_per_view
    total = num_views * per_view
    rows_at_most = min(CALIBRATION_ROWS, first.num_rows * num_views)
    num_blocks = min(total, max(CALIBRATION_BLOCKS, -(-rows_at_most // first.layout.rows_per_block)))
    drawn = np.sort(keyed_permutation(total, "merge calibration")[:num_blocks])
    blocks = [Block(int(number) // per_view, int(number) % per_view) for number in drawn]
    share = min(1.0, rows_at_most / sum(len(first.row_map.block_rows(block.number)) for block in blocks))
    parts, groups = [], []
    with track("calibrating", len(blocks), unit="blocks") as meter:
        for block in blocks:
            rows = first.row_map.block_rows(block.number)
            order = keyed_permutation(len(rows), "merge calibration rows", block.view, block.number)
            chosen = rows.start + np.sort(order[: math.ceil(share * len(rows))])
            parts.append(average.logits(block.view, chosen).numpy())
            groups.append(first.row_map.samples_of(chosen))
            meter.advance()
    return Calibration(np.concatenate(parts), np.concatenate(groups))


def _merge_blocks(writer: CacheWriter, blocks: list[Block], average: _Average, sources: Sequence[LogitCache]) -> None:
    layout = writer.layout
    rows_at_once = max(1, PIECE_LOGITS // layout.num_classes)
    with track("merging", sum(len(writer.row_map.block_rows(block.number)) for block in blocks), unit="rows") as meter:
        for block in blocks:
            digests = _proof_digests(sources, block.view)
            rows_of_block = writer.row_map.block_rows(block.number)
            # A block is always split in the same way, so that computing it again gives the same bytes.
            for start in range(0, len(rows_of_block), rows_at_once):
                rows = rows_of_block[start : start + rows_at_once]
                writer.write(
                    view=block.view, start=rows.start, logits=average.logits(block.view, rows), input_digests=digests
                )
                meter.advance(len(rows), note=f"view {block.view + 1}/{layout.num_views}")


def _proof_digests(sources: Sequence[LogitCache], view: int) -> dict[int, str]:
    """Digests of the inputs of the first source's teacher, from it and from sources with the same input."""
    digests: dict[int, str] = {}
    for source in sources:
        if teacher_input(source) == teacher_input(sources[0]):
            digests = source.input_digests(view) | digests
    return digests


def _open_sealed(location: str) -> LogitCache:
    cache = open_sealed(location)
    cache.check_has_logits("merge")
    if cache.views.start > 0:
        raise IncompleteCache(
            f"{location} is a copy of views {cache.views.start}:{cache.views.stop} only; `logitcache pull` the views "
            "before them too"
        )
    return cache


def _check_distinct(locations: Sequence[str], sources: Sequence[LogitCache], out: str | os.PathLike[str]) -> None:
    for (location, source), (other_location, other) in combinations(zip(locations, sources, strict=True), 2):
        if source.id == other.id:
            raise UsageError(
                f"{location} and {other_location} are the same cache ({source.id[:12]}…); name each cache once and set "
                "its --weight"
            )
    with suppress(NotACache):
        there = open_cache(out).id
        for location, source in zip(locations, sources, strict=True):
            if source.id == there:
                raise UsageError(f"--output {os.fspath(out)} is the source {location}; choose another path")


def _common_samples(locations: Sequence[str], sources: Sequence[LogitCache]) -> SampleTable | None:
    """The sample table that the sources share, from the first that has one."""
    for location, source in zip(locations, sources, strict=True):
        if source.samples is not None:
            if source.samples.fingerprint() != source.manifest.identity.dataset:
                raise CorruptCache(f"{location}: the sample table does not belong to the dataset in its identity")
            return source.samples
    return None
