"""TinyViT's saved teacher logits (microsoft/Cream): fixed records, one folder per epoch.

Although named logits, values are float16 probabilities at T = 1. An epoch is a view: its transform drew from the
stored seed of each sample.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import numpy as np

from logitcache.errors import InvalidSource, UsageError
from logitcache.extras.interchange.files import matching, read_bytes, reading
from logitcache.extras.interchange.protocol import (
    NO_IDENTITY,
    ROWS_AT_ONCE,
    TAIL_KNOWN,
    Importer,
    RecordedViews,
    SparseRows,
    ViewParameters,
)

# K entries, N samples

LAST_CLASS = 2**15
"""Classes are int16 in the files."""
_FILES = r"rank\d{1,6}-(keys\.txt|values\.bin)"


class TinyViT(Importer):
    """`logits_top{K}_epoch{E}/rank{R}-keys.txt` and `rank{R}-values.bin`.

    A key that several ranks have (padding of the distributed sampler) is taken from the lowest rank.
    """

    name: ClassVar[str] = "tinyvit"
    tool: ClassVar[str] = "TinyViT"

    def __init__(self, source: Path, *, num_classes: int | None = None) -> None:
        super().__init__(source, num_classes=num_classes)
        self.require_classes()
        if self.num_classes > LAST_CLASS:
            raise UsageError(f"TinyViT stores classes as int16: {self.num_classes} classes are more than {LAST_CLASS}")
        found = matching(source, r"logits_top(\d{1,6})_epoch(\d{1,6})")
        folders = {int(match[2]): (int(match[1]), path) for match, path in found if path.is_dir()}
        if not folders:
            raise UsageError(f"{source} has no folder logits_top{{K}}_epoch{{E}}")
        ks = {k for k, _ in folders.values()}
        if sorted(folders) != list(range(len(folders))) or len(ks) != 1 or len(folders) != len(found):
            raise UsageError(
                f"{source} has the folders {', '.join(path.name for _, path in found)}; expected epochs 0, 1, … with "
                "one K: views are numbered by epoch"
            )
        self.k = ks.pop()
        self.num_views = len(folders)
        self._record = np.dtype([("seed", "<i4"), ("ids", "<i2", (self.k,)), ("probs", "<f2", (self.k,))])
        self._folders = [folders[epoch][1] for epoch in range(self.num_views)]
        self.files = [path for folder in self._folders for _, path in matching(folder, _FILES)]
        keys = list(self._numbered_keys(self._folders[0]))
        # Image folders have positions as keys: then rows are positions.
        by_position = set(keys) == {str(number) for number in range(len(keys))}
        self._order = sorted(keys, key=int) if by_position else sorted(keys)
        self.num_samples = len(keys)
        self.keys = None if by_position else self._order
        records = [self._num_records(folder) for folder in self._folders]
        for folder, count in zip(self._folders, records, strict=True):
            if count < self.num_samples:
                raise UsageError(f"{folder} has {count} records; expected one for each of {self.num_samples} samples")
        self.missing = {
            "view": "the transform is not stored, only its seed for each sample and epoch: pass the transform to "
            "`cache.view_plan_with`. With mixup or CutMix the partner is not stored either, so such views can't be "
            "rendered",
            "identity": NO_IDENTITY,
            "tail": TAIL_KNOWN,
        }
        self.recorded = RecordedViews(("seed_high", "seed_low"), None)
        self.notes = {
            "k": self.k,
            "keys": "position" if by_position else "name",
            "repeated_keys": sum(records) - len(records) * self.num_samples,
        }

    def _ranks(self, folder: Path) -> list[tuple[Path, Path]]:
        """The files of keys and of values of each rank."""
        found = sorted((int(match[1]), path) for match, path in matching(folder, r"rank(\d{1,6})-keys\.txt"))
        if not found:
            raise UsageError(f"{folder} has no rank0-keys.txt")
        return [(path, folder / f"rank{rank}-values.bin") for rank, path in found]

    def _num_records(self, folder: Path) -> int:
        """Records of an epoch, by the size of its files."""
        count = 0
        for _, values in self._ranks(folder):
            with reading(values):
                size = values.stat().st_size
            if size % self._record.itemsize:
                raise InvalidSource(
                    f"{values} has {size:,} bytes, no whole number of records of {self._record.itemsize} bytes "
                    f"({self.k} classes each)"
                )
            count += size // self._record.itemsize
        return count

    def _numbered_keys(self, folder: Path) -> dict[str, int]:
        """The number of each key's record in an epoch, counted over all ranks; the first one of a repeated key."""
        numbers: dict[str, int] = {}
        first = 0
        for path, values in self._ranks(folder):
            with reading(path):
                keys = read_bytes(path).decode().splitlines()
            with reading(values):
                size = values.stat().st_size
            if size != len(keys) * self._record.itemsize:
                raise InvalidSource(
                    f"{values} has {size:,} bytes; expected {len(keys) * self._record.itemsize:,}, {len(keys)} records "
                    f"of {self.k} classes"
                )
            for number, key in enumerate(keys, first):
                numbers.setdefault(key, number)
            first += len(keys)
        return numbers

    def _numbers(self, folder: Path) -> np.ndarray:
        """The number of the record of each row in an epoch, int64 (N,)."""
        numbers = self._numbered_keys(folder)
        for key in self._order:
            if key not in numbers:
                raise InvalidSource(f"{folder} lacks the key {key!r}, which {self._folders[0]} has")
        return np.array([numbers[key] for key in self._order], dtype=np.int64)

    def _records(self, folder: Path, numbers: np.ndarray) -> np.ndarray:
        """Some records of an epoch."""
        records = np.empty(len(numbers), dtype=self._record)
        first = 0
        for _, values in self._ranks(folder):
            with reading(values):
                stored = np.memmap(values, dtype=self._record, mode="r")
                here = (numbers >= first) & (numbers < first + len(stored))
                records[here] = stored[numbers[here] - first]
                first += len(stored)
        return records

    def select(self, order: np.ndarray) -> None:
        self._order = [self._order[number] for number in order]
        self.num_samples = len(order)

    def batches(self) -> Iterator[SparseRows]:
        for view, folder in enumerate(self._folders):
            numbers = self._numbers(folder)
            for start in range(0, self.num_samples, ROWS_AT_ONCE):
                records = self._records(folder, numbers[start : start + ROWS_AT_ONCE])
                if (records["ids"] < 0).any():
                    raise InvalidSource(
                        f"{folder} has the class {records['ids'].min()}: the files hold classes as int16, which wraps "
                        f"above {LAST_CLASS - 1}"
                    )
                with np.errstate(divide="ignore", invalid="ignore"):
                    log_probs = np.log(records["probs"].astype(np.float32))
                ids = records["ids"].astype(np.int64)
                yield SparseRows(view, start, ids, log_probs, folder, _halves(records["seed"]))

    def parameters(self) -> Iterator[ViewParameters]:
        for view, folder in enumerate(self._folders):
            values = _halves(self._records(folder, self._numbers(folder))["seed"])
            yield ViewParameters(view, 0, values, [folder] * len(values))

    def details(self) -> dict[str, np.ndarray]:
        return {"seeds": np.stack([self._records(each, self._numbers(each))["seed"] for each in self._folders])}


def _halves(seeds: np.ndarray) -> np.ndarray:
    """The upper and the lower 16 bits of seeds, float32 (B, 2)."""
    unsigned = seeds.astype(np.uint32)
    return np.stack([unsigned >> 16, unsigned & 0xFFFF], axis=1).astype(np.float32)
