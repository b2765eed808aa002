"""MaxText's top-k teacher logits: ArrayRecord files of `tf.train.Example`.

The logits have no normalizer, so the tail is unknown. As MaxText's loss does, rows are normalized over the k classes.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from logitcache.errors import InvalidSource, UsageError
from logitcache.extras.interchange.files import matching, reading
from logitcache.extras.interchange.protocol import NO_IDENTITY, Importer, SparseRows
from logitcache.extras.interchange.sequences import content_digests

FIELDS = ("inputs", "top_k_indices", "top_k_logits")
MAX_RECORD_BYTES = 2**30
VARINT, FIXED64, LENGTH, FIXED32 = 0, 1, 2, 5
FLOATS, INTEGERS = 2, 3
"""Field numbers of lists of numbers in a feature."""


class MaxText(Importer):
    """`teacher_top_k_part_{part}_host_{host}.array_record`; a record is a sequence."""

    name: ClassVar[str] = "maxtext"
    tool: ClassVar[str] = "MaxText"

    def __init__(self, source: Path, *, num_classes: int | None = None) -> None:
        super().__init__(source, num_classes=num_classes)
        if importlib.util.find_spec("array_record") is None:
            raise UsageError("MaxText's files need array_record: pip install 'logitcache[maxtext]'")
        self.require_classes(", padding of the vocabulary included")
        found = matching(source, r"teacher_top_k_part_(\d+)_host_(\d+)\.array_record")
        if not found:
            raise UsageError(f"{source} has no file teacher_top_k_part_00000_host_000.array_record")
        self.files = [path for _, path in sorted(found, key=lambda pair: (int(pair[0][1]), int(pair[0][2])))]
        lengths, ks, digests = [], set(), []
        for file, record in self._records():
            with reading(file):
                ids, logits = _entries(record)
                digests.append(content_digests([record["inputs"]]))
                lengths.append(len(ids))
                ks.add(logits.shape[1])
        if len(ks) != 1:
            raise UsageError(f"{source} has records with different k: {sorted(ks)}")
        self.k = ks.pop()
        self.num_samples = len(lengths)
        self.rows_per_sample = np.array(lengths, dtype=np.int64)
        self.contents = np.concatenate(digests)
        self.missing = {
            "normaliser": "raw logits without their log-sum-exp are stored, so the probability of the other classes is "
            "unknown. Rows are normalized over the k classes, as MaxText's loss does: they overstate the teacher's "
            "confidence, and the other classes have probability 0",
            "identity": f"{NO_IDENTITY}; the tokenizer is not stored",
        }
        self.notes = {"k": self.k, "alignment": "row t predicts token t + 1", "order": "by part, host and step"}

    def _records(self) -> Iterator[tuple[Path, dict[str, np.ndarray]]]:
        from array_record.python.array_record_module import ArrayRecordReader

        for file in self.files:
            with reading(file):
                reader = ArrayRecordReader(str(file))
                try:
                    count = reader.num_records()
                    if not reader.ok() or not count:
                        raise InvalidSource(f"{file} is damaged, has no records, or is no ArrayRecord file")
                    for number in range(count):
                        [data] = reader.read([number])
                        yield file, _features(data)
                finally:
                    reader.close()

    def batches(self) -> Iterator[SparseRows]:
        start = 0
        for file, record in self._records():
            with reading(file):
                ids, logits = _entries(record)
            log_probs = logits.astype(np.float64)
            log_probs -= np.logaddexp.reduce(log_probs, axis=1, keepdims=True)
            yield SparseRows(0, start, ids, log_probs, file)
            start += len(ids)


def _entries(record: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Classes and logits (S, K) of a record."""
    for name in FIELDS:
        if name not in record:
            raise InvalidSource(f"a record without {name!r}; it has: {', '.join(sorted(record))[:200]}")
    tokens, ids, logits = (record[name] for name in FIELDS)
    if not len(tokens) or len(ids) % len(tokens) or len(ids) != len(logits) or not len(ids):
        raise InvalidSource(f"a record with {len(tokens)} tokens, {len(ids)} classes and {len(logits)} logits")
    if (ids < 0).any():
        raise InvalidSource(f"a record with the class {ids.min()}")
    return ids.reshape(len(tokens), -1), logits.reshape(len(tokens), -1)


def _features(data: bytes) -> dict[str, np.ndarray]:
    """The features of a `tf.train.Example` that are lists of numbers.

    Raises:
        ValueError, IndexError: no such message.
    """
    if len(data) > MAX_RECORD_BYTES:
        raise ValueError(f"a record of {len(data):,} bytes")
    features = {}
    for _, features_message in _fields(memoryview(data)):
        for _, entry in _fields(features_message):
            parts = dict(_fields(entry))
            for kind, values in _fields(parts[2]):
                if kind in (FLOATS, INTEGERS):
                    features[bytes(parts[1]).decode()] = _numbers(values, kind)
    return features


def _numbers(message: memoryview, kind: int) -> np.ndarray:
    """The repeated numbers of a list, packed or not."""
    values: list[Any] = [value for _, value in _fields(message)]
    packed = b"".join(value for value in values if isinstance(value, memoryview))
    if kind == FLOATS:
        return np.frombuffer(packed, dtype="<f4")
    single = [value for value in values if isinstance(value, int)]
    return np.array(single, dtype=np.uint64).astype(np.int64) if single else _varints(packed)


def _fields(message: Any) -> Iterator[tuple[int, Any]]:
    """Number and value of each field of a message: an int for varints, else a memoryview."""
    if not isinstance(message, memoryview):
        raise ValueError("a number in place of a message")
    place = 0
    while place < len(message):
        tag, place = _varint(message, place)
        number, wire = tag >> 3, tag & 7
        if wire == VARINT:
            value, place = _varint(message, place)
            yield number, value
            continue
        if wire == LENGTH:
            size, place = _varint(message, place)
        elif wire in (FIXED32, FIXED64):
            size = 4 if wire == FIXED32 else 8
        else:
            raise ValueError(f"wire type {wire}")
        if place + size > len(message):
            raise ValueError("a field beyond the end of its message")
        yield number, message[place : place + size]
        place += size


def _varint(message: memoryview, place: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[place]
        value |= (byte & 127) << shift
        place, shift = place + 1, shift + 7
        if byte < 128:
            return value, place
        if shift > 63:
            raise ValueError("a number of more than 64 bits")


def _varints(data: bytes) -> np.ndarray:
    """Packed numbers of up to 64 bits, int64."""
    octets = np.frombuffer(data, dtype=np.uint8)
    if not len(octets):
        return np.empty(0, dtype=np.int64)
    if octets[-1] >= 128:
        raise ValueError("a truncated number")
    starts = np.concatenate([[0], np.flatnonzero(octets < 128)[:-1] + 1])
    lengths = np.diff(np.append(starts, len(octets)))
    if lengths.max() > 10:
        raise ValueError("a number of more than 64 bits")
    shifts = 7 * (np.arange(len(octets)) - np.repeat(starts, lengths))
    numbers: np.ndarray = np.add.reduceat((octets & 127).astype(np.uint64) << shifts.astype(np.uint64), starts)
    return numbers.astype(np.int64)
