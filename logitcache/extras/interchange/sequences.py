"""Sequences of token ids: their identity, and the rows of a cache as other tools store them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from logitcache.cache.labelview import View
from logitcache.cache.layout import parse_views
from logitcache.cache.reader import LogitCache
from logitcache.data.samples import DIGEST_BYTES, bytes_digest
from logitcache.data.tokens import CAUSAL, TokenDataset, content_of_ids
from logitcache.encodings import TopK
from logitcache.errors import SampleMismatch, UsageError
from logitcache.extras.interchange.parquet import PIECE_LOGITS, check_top
from logitcache.extras.interchange.parts import ExportResult, Part, metadata, write_parts
from logitcache.targets import SparseTargets

# B rows, K kept classes, N samples

ROWS_AT_ONCE = 4096
"""Rows of a row group, unless a sequence is longer."""


def content_digests(sequences: Sequence[np.ndarray]) -> np.ndarray:
    """The digest of each sequence's token ids as `TokenDataset` has it, uint8 (N, 16).

    Raises:
        ValueError: an id that is no token id.
    """
    digests = np.empty((len(sequences), DIGEST_BYTES), dtype=np.uint8)
    for number, ids in enumerate(sequences):
        if len(ids) and (ids.dtype.kind not in "iu" or int(ids.min()) < 0 or int(ids.max()) >= 2**31):
            raise ValueError("token ids that are no numbers from 0 to 2**31 - 1")
        digests[number] = np.frombuffer(bytes_digest(content_of_ids(ids)), np.uint8)
    return digests


@dataclass(frozen=True)
class Sequences:
    """One view of a cache of sequences whose rows are consecutive positions, each with its k most probable classes.

    Samples without rows, such as texts of one token, are left out.
    """

    cache: LogitCache
    view: int
    k: int
    tokens: TokenDataset | Sequence[Any] | None
    """The token ids of each sample, in the cache's order."""

    def samples(self, block: int) -> np.ndarray:
        """The samples of a block that have rows, int64 (N,)."""
        return self._with_rows(self.cache.row_map.block_samples(block))

    def _with_rows(self, samples: range) -> np.ndarray:
        has_rows = np.diff(self.cache.row_offsets[samples.start : samples.stop + 1]) > 0
        return np.arange(samples.start, samples.stop)[has_rows]

    def groups(self, block: int) -> Iterator[np.ndarray]:
        """The samples of a block that have rows, some at a time."""
        offsets = self.cache.row_offsets
        samples = self.cache.row_map.block_samples(block)
        start = samples.start
        while start < samples.stop:
            stop = int(np.searchsorted(offsets, offsets[start] + ROWS_AT_ONCE, side="right")) - 1
            stop = min(max(stop, start + 1), samples.stop)
            group = self._with_rows(range(start, stop))
            if len(group):
                yield group
            start = stop

    def write(
        self,
        folder: Path,
        name: str,
        tables: Callable[[int], Iterator[Any]],
        *,
        also: Sequence[str] = (),
        **more: Any,
    ) -> ExportResult:
        """Write one file per block.

        Args:
            folder, also: as for `write_parts`.
            name: of the file of a block, such as "data-{:05d}.parquet".
            tables: the row groups of a block.
            more: metadata of every file.
        """
        parts = {}
        for block in range(self.cache.layout.blocks_per_view):
            samples = self.samples(block)
            about = metadata(self.cache, self.view, self.k, block=block, **more)
            rows = int(self.lengths(samples).sum())
            part = Part(name.format(block), about, len(samples), rows, partial(tables, block))
            parts[part.name] = part
        return write_parts(folder, list(parts.values()), parts.get, also=also)

    def labels(self) -> View:
        """The view, with one or two blocks in memory."""
        return self.cache.view(self.view, memory_budget=1)

    def lengths(self, samples: np.ndarray) -> np.ndarray:
        """Rows of each sample, int64 (N,)."""
        lengths: np.ndarray = self.cache.row_offsets[samples + 1] - self.cache.row_offsets[samples]
        return lengths

    def entries(self, labels: View, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Classes, int64, and log-probabilities, float32, of all rows of some samples, (B, K), largest first.

        Raises:
            UsageError: a row has fewer classes with a probability above 0.
        """
        first, stop = (int(self.cache.row_offsets[sample]) for sample in (samples[0], samples[-1] + 1))
        size = max(1, PIECE_LOGITS // self.cache.num_classes)
        parts = []
        for start in range(first, stop, size):
            rows = range(start, min(start + size, stop))
            targets = labels.targets(rows)
            if isinstance(targets, SparseTargets) and targets.ids.shape[1] == self.k and bool((targets.ids >= 0).all()):
                all_ids_BK, all_BK = targets.ids, targets.softened().log_probs
            else:
                all_BK = targets.dense().double().log_softmax(dim=1)
                all_ids_BK = torch.arange(self.cache.num_classes).expand_as(all_BK)
            log_probs_BK, places_BK = all_BK.topk(self.k, dim=1)
            if not bool(log_probs_BK.isfinite().all()):
                row = rows.start + int((~log_probs_BK.isfinite()).any(dim=1).nonzero()[0])
                count = int(all_BK[row - rows.start].isfinite().sum())
                raise UsageError(
                    f"row {row} has {count} classes with a probability above 0, fewer than {self.k}; choose a smaller "
                    "--top, or --to parquet"
                )
            parts.append((all_ids_BK.gather(1, places_BK).numpy(), log_probs_BK.float().numpy()))
        ids, log_probs = zip(*parts, strict=True)
        return np.concatenate(ids), np.concatenate(log_probs)

    def ids(self, sample: int) -> np.ndarray:
        """The token ids of a sample, int64 (L,), compared with the cache.

        Raises:
            SampleMismatch: they are not those that the teacher was given.
        """
        assert self.tokens is not None
        given = self.tokens.ids(sample) if isinstance(self.tokens, TokenDataset) else self.tokens[sample]
        try:
            ids = np.asarray(given, dtype=np.int64).reshape(-1)
            [content] = content_digests([ids])
        except (TypeError, ValueError):
            raise UsageError(
                f"sample {sample} of the dataset is not a list of token ids; use the cache's own"
            ) from None
        table = self.cache.samples
        [rows] = self.lengths(np.array([sample]))
        same = table is None or table.contents is None or (content == table.contents[sample]).all()
        if not same or len(ids) < rows:
            raise SampleMismatch(
                f"sample {sample} has {rows} rows in the cache, which do not belong to these {len(ids)} token ids. Use "
                "the dataset of the cache, with the same tokenizer, truncation and order"
            )
        return ids


def exported_sequences(
    cache: LogitCache, *, tool: str, views: str | None, top: int | None, tokens: TokenDataset | Sequence[Any] | None
) -> Sequences:
    """The sequences of a cache, if a format of consecutive positions and one view can store them.

    Raises:
        UsageError: the format can't store them: the message names what it lacks.
        SampleMismatch: the token ids are not those of the cache.
    """
    instead = "Export to parquet or huggingface, which store every cache"
    if cache.row_map.one_each:
        raise UsageError(f"{tool} stores sequences of tokens, and this cache has one row per sample. {instead}")
    task = (cache.manifest.identity.tokenization or {}).get("task", CAUSAL)
    if task != CAUSAL:
        raise UsageError(f"{tool} stores rows of causal models, and this cache is of a {task} model. {instead}")
    numbers = parse_views(views, cache.views)
    if len(numbers) != 1:
        raise UsageError(f"{tool} has no views, and {len(numbers)} are to be exported: choose one with --views")
    rows = np.arange(cache.num_rows)
    gaps = np.flatnonzero(cache.row_map.positions_of(rows) != rows - cache.row_offsets[cache.row_map.samples_of(rows)])
    if len(gaps):
        sample = int(cache.row_map.samples_of(gaps[:1])[0])
        raise UsageError(f"{tool} stores a row for each position, and sample {sample} lacks some. {instead}")
    if top is None and not isinstance(cache.encoding, TopK):
        raise UsageError(f"{tool} stores the largest classes of each row; choose how many with --top")
    check_top(cache, top)
    k = top if top is not None else cache.encoding.k  # type: ignore[attr-defined]
    if tokens is not None and len(tokens) != cache.num_samples:
        raise SampleMismatch(f"the cache has {cache.num_samples} samples, the dataset has {len(tokens)}")
    sequences = Sequences(cache, numbers[0], k, tokens)
    if tokens is not None:
        for sample in range(cache.num_samples):
            sequences.ids(sample)  # before long work
    return sequences


def nested_lists(values: Any, offsets: np.ndarray) -> Any:
    """The rows of each sequence as an Arrow array of lists.

    Args:
        values: an Arrow array with one element per row.
        offsets: first row of each sequence, and the number of rows at the end.
    """
    import pyarrow as pa

    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), values)


def ragged_lists(sequences: Sequence[np.ndarray], dtype: Any) -> Any:
    """Lists of numbers as an Arrow array."""
    import pyarrow as pa

    offsets = np.concatenate([[0], np.cumsum([len(each) for each in sequences])])
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(np.concatenate(sequences), dtype))
