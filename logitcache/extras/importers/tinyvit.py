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
from logitcache.extras.importers.files import matching, read_bytes, reading
from logitcache.extras.importers.protocol import NO_IDENTITY, ROWS_AT_ONCE, TAIL_KNOWN, Importer, SparseRows

# K entries, N samples

LAST_CLASS = 2**15
"""Classes are int16 in the files."""


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
        self.files = [
            path for folder in self._folders for _, path in matching(folder, r"rank\d+-(keys\.txt|values\.bin)")
        ]
        places = [self._places(folder) for folder in self._folders]
        names = set(places[0])
        for folder, place in zip(self._folders, places, strict=True):
            if set(place) != names:
                odd = min(names ^ set(place))
                raise UsageError(
                    f"{folder} and {self._folders[0]} have other keys, such as {odd!r}; a view has all samples"
                )
        # Image folders have positions as keys: then rows are positions.
        self.num_samples = len(names)
        by_position = names == {str(number) for number in range(self.num_samples)}
        order = [str(number) for number in range(self.num_samples)] if by_position else sorted(names)
        self.keys = None if by_position else order
        self._places_of = [[place[key] for key in order] for place in places]
        self.missing = {
            "view": "the transform is not stored, only its seed for each sample and epoch; the cache has no view plan. "
            "With mixup or CutMix the partner is not stored either",
            "identity": NO_IDENTITY,
            "tail": TAIL_KNOWN,
        }
        self.notes = {"k": self.k, "keys": "position" if by_position else "name", "repeated_keys": self._repeated}

    _repeated = 0

    def _places(self, folder: Path) -> dict[str, tuple[Path, int]]:
        """File and record number of each key."""
        places: dict[str, tuple[Path, int]] = {}
        ranks = sorted((int(match[1]), path) for match, path in matching(folder, r"rank(\d{1,6})-keys\.txt"))
        if not ranks:
            raise UsageError(f"{folder} has no rank0-keys.txt")
        for rank, path in ranks:
            values = folder / f"rank{rank}-values.bin"
            with reading(path):
                keys = read_bytes(path).decode().splitlines()
            with reading(values):
                found = values.stat().st_size
            expected = len(keys) * self._record.itemsize
            if found != expected:
                raise InvalidSource(
                    f"{values} has {found:,} bytes; expected {expected:,}, {len(keys)} records of {self.k} classes"
                )
            for number, key in enumerate(keys):
                self._repeated += key in places
                places.setdefault(key, (values, number))
        return places

    def select(self, order: np.ndarray) -> None:
        self._places_of = [[places[number] for number in order] for places in self._places_of]
        self.num_samples = len(order)

    def batches(self) -> Iterator[SparseRows]:
        for view, places in enumerate(self._places_of):
            for start in range(0, self.num_samples, ROWS_AT_ONCE):
                part = places[start : start + ROWS_AT_ONCE]
                records = self._records(part)
                with np.errstate(divide="ignore", invalid="ignore"):
                    log_probs = np.log(records["probs"].astype(np.float32))
                # A negative id is class -32768 to -1 of int16, not an unused entry.
                ids = np.where(records["ids"] < 0, LAST_CLASS, records["ids"].astype(np.int64))
                yield SparseRows(view, start, ids, log_probs, part[0][0])

    def _records(self, places: list[tuple[Path, int]]) -> np.ndarray:
        records = np.empty(len(places), dtype=self._record)
        by_file: dict[Path, list[tuple[int, int]]] = {}
        for number, (file, record) in enumerate(places):
            by_file.setdefault(file, []).append((number, record))
        for file, pairs in by_file.items():
            with reading(file):
                here, there = np.array(pairs).T
                records[here] = np.memmap(file, dtype=self._record, mode="r")[there]
        return records

    def details(self) -> dict[str, np.ndarray]:
        seeds = np.stack([self._records(places)["seed"] for places in self._places_of])
        return {"seeds": seeds}
