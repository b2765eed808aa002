"""axolotl's columns for distillation, JSON lines or Parquet.

`logprobs` is a list over positions: of lists of objects {"token": "token_id:<id>", "logprob": x}, or of lists of
numbers with the ids in `target_token_ids`.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from logitcache.cache.reader import LogitCache
from logitcache.data.tokens import TokenDataset
from logitcache.errors import InvalidSource, UsageError
from logitcache.extras.interchange.files import reading
from logitcache.extras.interchange.parts import ExportResult, lists, table
from logitcache.extras.interchange.protocol import NO_IDENTITY, Importer, SparseRows
from logitcache.extras.interchange.sequences import (
    Sequences,
    content_digests,
    exported_sequences,
    nested_lists,
    ragged_lists,
)
from logitcache.extras.interchange.tables import check_table, columns, open_parquet, record_batches
from logitcache.strict_json import parse_json

LOGPROBS, IDS, INPUT = "logprobs", "target_token_ids", "input_ids"
MAX_LINE_BYTES = 2**28
_TOKEN = re.compile(r"token_id:(\d{1,9})")


class Axolotl(Importer):
    """A `.jsonl` or `.parquet` file, or a folder of `.parquet` files; a line or row is a sequence."""

    name: ClassVar[str] = "axolotl"
    tool: ClassVar[str] = "axolotl"

    def __init__(self, source: Path, *, num_classes: int | None = None) -> None:
        super().__init__(source, num_classes=num_classes)
        self.require_classes()
        self.files = sorted(source.glob("*.parquet")) + sorted(source.glob("*.jsonl")) if source.is_dir() else [source]
        if not self.files:
            raise UsageError(f"{source} has no .jsonl or .parquet files")
        lengths, digests, entries, fewest = [], [], 0, 2**31
        for file, number, record in self._records():
            with reading(file):
                ids, _ = _entries(record)
                lengths.append(len(ids))
                entries = max([entries, *map(len, ids)])
                fewest = min([fewest, *map(len, ids)])
                given = record.get(INPUT)
                if given is not None:
                    digests.append(content_digests([np.asarray(given)]))
                if not ids or (given is not None and len(ids) > len(given)):
                    raise InvalidSource(
                        f"{file}: record {number} has {len(ids)} positions"
                        + ("" if given is None else f" for {len(given)} tokens")
                    )
        if digests and len(digests) != len(lengths):
            raise UsageError(f"{source}: some records have {INPUT}, others don't")
        if not entries:
            raise UsageError(f"{source} has no log-probabilities")
        self.k = entries
        self.num_samples = len(lengths)
        self.rows_per_sample = np.array(lengths, dtype=np.int64)
        self.contents = np.concatenate(digests) if digests else None
        self.missing = {
            "identity": f"{NO_IDENTITY}; the tokenizer is not stored",
            "alignment": "which token a row predicts is not stored; rows are in the order of the list. A list that is "
            "one shorter than the tokens has row t for token t + 1, as vLLM's log-probabilities of a prompt",
            "tail": "not stored; it is what the stored probabilities lack of 1. axolotl itself drops it: its reader "
            "normalises over the stored classes",
            "temperature": "not stored; taken as 1",
        }
        self.notes = {"entries_per_row": [fewest, entries]}

    def _records(self) -> Iterator[tuple[Path, int, Any]]:
        number = 0
        for file in self.files:
            for record in _lines(file) if file.suffix == ".jsonl" else _rows(file):
                yield file, number, record
                number += 1
        if not number:
            raise UsageError(f"{self.source} has no records")

    def batches(self) -> Iterator[SparseRows]:
        start = 0
        assert self.k is not None
        for file, _, record in self._records():
            with reading(file):
                lists, values = _entries(record)
                ids = np.full((len(lists), self.k), -1, dtype=np.int64)
                log_probs = np.full((len(lists), self.k), -np.inf, dtype=np.float64)
                for row, (classes, logs) in enumerate(zip(lists, values, strict=True)):
                    if min(classes, default=0) < 0:
                        raise InvalidSource(f"{file} has the token id {min(classes)}")
                    ids[row, : len(classes)], log_probs[row, : len(logs)] = classes, logs
            yield SparseRows(0, start, ids, log_probs, file)
            start += len(ids)


def _lines(file: Path) -> Iterator[dict[str, Any]]:
    with reading(file), file.open("rb") as lines:
        while line := lines.readline(MAX_LINE_BYTES + 1):
            if line.strip():
                record = parse_json(line, max_bytes=MAX_LINE_BYTES)
                if not isinstance(record, dict) or LOGPROBS not in record:
                    raise InvalidSource(f"{file} has a line without {LOGPROBS!r}")
                yield record


def _rows(file: Path) -> Iterator[dict[str, Any]]:
    reader = open_parquet(file)
    check_table(file, reader, [LOGPROBS])
    names = [name for name in (LOGPROBS, IDS, INPUT) if name in columns(reader)]
    for batch in record_batches(file, reader, names):
        with reading(file):
            yield from batch.to_pylist()


def _entries(record: dict[str, Any]) -> tuple[list[list[int]], list[list[float]]]:
    """Classes and log-probabilities of each position.

    Raises:
        ValueError, TypeError, LookupError: another form.
    """
    positions = record[LOGPROBS]
    if IDS in record:
        ids = record[IDS]
        if [len(each) for each in ids] != [len(each) for each in positions]:
            raise ValueError(f"{IDS} and {LOGPROBS} differ in length")
        return ids, positions
    classes = []
    for entries in positions:
        matches = [_TOKEN.fullmatch(entry["token"]) for entry in entries]
        if not all(matches):
            raise ValueError("a token that is not of the form token_id:<number>")
        classes.append([int(match[1]) for match in matches if match])
    return classes, [[float(entry["logprob"]) for entry in entries] for entries in positions]


def export_axolotl(
    cache: LogitCache,
    folder: Path,
    *,
    views: str | None,
    top: int | None,
    tokens: TokenDataset | Sequence[Any] | None,
) -> ExportResult:
    """Write one view as `data-00000.parquet` and so on, one file per block, in the form with `target_token_ids`.

    Raises:
        UsageError: axolotl can't store this cache.
        SampleMismatch: the token ids are not those of the cache.
    """
    sequences = exported_sequences(cache, tool=Axolotl.tool, views=views, top=top, tokens=tokens)
    tables = functools.partial(_tables, sequences)
    return sequences.write(folder, "data-{:05d}.parquet", tables, input_ids=tokens is not None)


def _tables(sequences: Sequences, block: int) -> Iterator[Any]:
    import pyarrow as pa

    labels = sequences.labels()
    for samples in sequences.groups(block):
        ids_PK, log_probs_PK = sequences.entries(labels, samples)
        offsets = np.concatenate([[0], np.cumsum(sequences.lengths(samples))])
        columns = {}
        keys = None if sequences.cache.samples is None else sequences.cache.samples.keys
        if keys is not None:
            columns["key"] = pa.array([keys[sample] for sample in samples], pa.string())
        if sequences.tokens is not None:
            columns[INPUT] = ragged_lists([sequences.ids(sample) for sample in samples], pa.int64())
        columns[LOGPROBS] = nested_lists(lists(log_probs_PK.astype(np.float64)), offsets)
        columns[IDS] = nested_lists(lists(ids_PK), offsets)
        yield table(columns)
