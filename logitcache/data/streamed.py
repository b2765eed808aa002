"""A stream of samples as a dataset that is read in order, so that the teacher can see it."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import get_worker_info

from logitcache.errors import LogitCacheError, SampleMismatch, UnreadableSample, UsageError

# N samples

Fields = tuple[str | None, str, str | None]
"""Names of key, sample and target in a mapping."""
_END = object()


class StreamDataset:
    """A stream of samples as a dataset that is read in order, for stage 1: items are (input, target).

    A cache stores rows in a fixed order, under known keys. So keys and targets of all samples are collected first, in a
    pass that decodes nothing; pass `keys` and `targets` to leave it out. Then each view reads the stream once more, and
    only the samples of a few batches are in memory. `views.per_decode` renders several views in one reading.

    The process that runs the teacher reads the stream, and its DataLoader workers decode and augment what it has read.
    To resume, the samples of complete blocks are read and left out. Shuffled access, mixup and CutMix are refused,
    because they need any sample at any time; for students, use `StreamViews`.

    Args:
        stream: an iterable of (key, sample, target), or of mappings; often an `IterableDataset`. Each time it is
            iterated over, it must give the same samples in the same order: do not shuffle it.
        fields: names of key, sample and target in the stream's mappings, such as ("__key__", "jpg", "cls"). None as the
            first name takes the position as the key.
        decode: makes an input of a sample's bytes, such as `decode_image`. The bytes are then the sample's content. A
            mapping with `bytes`, as Hugging Face has for images, counts as these.
        keys, targets: of all samples, in the order of the stream, if they are known.
        class_names: one for each class.
        num_classes: by default the number of `class_names`, or the largest target and 1.

    Raises:
        UsageError: an item that is none of these, or without a class number; only one of `keys` and `targets`.
    """

    def __init__(
        self,
        stream: Iterable[Any],
        *,
        fields: Fields | None = None,
        decode: Callable[[bytes], Any] | None = None,
        keys: Sequence[str] | None = None,
        targets: Sequence[int] | np.ndarray | None = None,
        class_names: Sequence[str] | None = None,
        num_classes: int | None = None,
    ) -> None:
        self.stream = stream
        self._fields = fields
        self._decode = decode
        self._has_keys = fields is None or fields[0] is not None
        if targets is None:
            if keys is not None:
                raise UsageError("`keys` without `targets`; pass both, or neither")
            keys, targets = [], []
            for item in stream:
                key, target = self._parts(item)
                keys.append(key)
                targets.append(target)
        elif self._has_keys and keys is None:
            raise UsageError("`targets` without `keys`; pass both, or neither")
        self.keys = list(map(str, keys)) if self._has_keys and keys is not None else None
        self.targets = np.asarray(targets, dtype=np.int64)
        if self.keys is not None and len(self.keys) != len(self.targets):
            raise UsageError(
                f"{len(self.keys)} keys and {len(self.targets)} targets; expected one each for each sample"
            )
        if class_names is not None:
            self.class_names = list(class_names)
        if num_classes is not None:
            self.num_classes = num_classes
        if decode is not None:
            self.content = self._content
        self._items: Iterator[Any] | None = None
        self._position = 0
        self._held: dict[int, Any] = {}

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        self.fetch([index])
        value = self._held[index]
        if self._decode is not None:
            value = self._decode(value)
        return value, int(self.targets[index])

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_items": None}

    def _content(self, index: int) -> bytes:
        """The bytes of the sample."""
        self.fetch([index])
        content: bytes = self._held[index]
        return content

    def fetch(self, indices: Iterable[int]) -> dict[int, Any]:
        """Read some samples, and keep them in place of those of the last call; returns the samples by index.

        Raises:
            SampleMismatch: the stream gives other samples than before, or in another order.
            UnreadableSample: the stream fails.
            UsageError: in a DataLoader worker, to which `hold` did not give the samples.
        """
        wanted = sorted(index for index in set(indices) if 0 <= index < len(self))
        known = {index: self._held[index] for index in wanted if index in self._held}
        if len(known) == len(wanted):
            return known
        if get_worker_info() is not None:
            raise UsageError(
                "a stream is read in the main process, since each DataLoader worker would read a part of it: set "
                "num_workers=0, or run stage 1 from a pipeline, which gives its workers what it has read"
            )
        self._held = known  # a batch is released before the next one is read
        self._held = known | {index: self._read(index) for index in wanted if index not in known}
        return self._held

    def hold(self, samples: dict[int, Any]) -> None:
        """Take the samples that `fetch` returned in another process."""
        self._held = samples

    def _read(self, number: int) -> Any:
        """The sample at a position of the stream, from its beginning if that lies behind."""
        if self._items is None or number < self._position:
            self._items, self._position = iter(self.stream), 0
        while True:
            item = self._next()
            if item is _END:
                raise SampleMismatch(
                    f"the stream ends after {self._position} samples, and it has {len(self)}.\nIt must give the same "
                    "samples each time that it is iterated over"
                )
            position, self._position = self._position, self._position + 1
            key, target = self._parts(item)
            expected = None if self.keys is None else self.keys[position]
            if (self.keys is not None and key != expected) or target != self.targets[position]:
                raise SampleMismatch(
                    f"sample {position} of the stream is {key!r} with the target {target}; expected {expected!r} with "
                    f"the target {self.targets[position]}.\nIt must give the same samples in the same order each time "
                    "that it is iterated over: do not shuffle it, and do not divide it among processes"
                )
            if position == number:
                break
        if self._position == len(self) and self._next() is not _END:
            raise SampleMismatch(
                f"the stream has more samples than the {len(self)} that were counted; pass `keys` and `targets` of all"
            )
        value = stream_item(item, self._fields)[1]
        return value if self._decode is None else file_bytes(value, key)

    def _next(self) -> Any:
        assert self._items is not None
        try:
            item = next(self._items, _END)
        except LogitCacheError:
            raise
        except Exception as error:
            self._items = None
            raise UnreadableSample(
                f"the stream fails after {self._position} samples: {type(error).__name__}: {error}"
            ) from error
        if item is _END:
            self._items = None
        return item

    def _parts(self, item: Any) -> tuple[str, int]:
        """Key and target of an item of the stream."""
        key, _, target = stream_item(item, self._fields)
        try:
            return str(key), operator.index(target)
        except TypeError:
            raise UsageError(
                f"the target of sample {key!r} of the stream is {target!r}; expected a class number, as in "
                "(key, sample, target)"
            ) from None


def fetch_in_order(dataset: Any, places: Sequence[tuple[int, int]]) -> dict[int, Any] | None:
    """Read the samples of a batch of (view, index), if the dataset is a stream.

    Raises:
        UsageError: the order within a view is not that of the stream.
    """
    if not isinstance(dataset, StreamDataset):
        return None
    last: dict[int, int] = {}
    for view, index in places:
        if index < last.get(view, 0):
            raise UsageError(
                f"sample {index} is requested after sample {last[view]}, and a stream is read in order: remove "
                "shuffle=True or the sampler; for students, use `StreamViews`"
            )
        last[view] = index
    return dataset.fetch(index for _, index in places)


def refuse_stream(dataset: Any, why: str) -> None:
    """Raise an error if a dataset is a stream, where samples are needed in any order.

    Args:
        dataset: of any kind.
        why: what needs them.

    Raises:
        UsageError: it is one.
    """
    if isinstance(dataset, StreamDataset):
        raise UsageError(
            f"{why}, and a stream is read in order. Use a map-style dataset (`webdataset`, or `huggingface` and "
            "`parquet` without `streaming`); students learn from a stream in your own loop, with `StreamViews`"
        )


def stream_item(item: Any, fields: Fields | None) -> tuple[Any, Any, Any]:
    """Key, sample and target of an item of a stream; the target is a number where it can be one, or None.

    Raises:
        UsageError: neither a tuple nor a mapping with these fields, or the target is no class number.
    """
    if isinstance(item, Mapping):
        if fields is None:
            raise UsageError(
                f"the stream gives mappings with the keys {', '.join(map(repr, item))}; name those of key, sample "
                "and target with `fields`, such as fields=('__key__', 'jpg', 'cls')"
            )
        absent = [name for name in fields if name is not None and name not in item]
        if absent:
            raise UsageError(f"a sample of the stream lacks {absent[0]!r}; it has {', '.join(map(repr, item))}")
        key, value, target = (None if name is None else item[name] for name in fields)
    elif isinstance(item, tuple | list) and len(item) in (2, 3):
        key, value, target = (*item, None)[:3]
    else:
        raise UsageError(f"the stream gives a {type(item).__name__}; expected (key, sample, target), or a mapping")
    if isinstance(target, bytes | str):
        try:
            target = int(target)
        except ValueError:
            raise UsageError(f"the target of sample {key!r} is {target!r}; expected a class number") from None
    return key, value, target


def file_bytes(value: Any, key: str) -> bytes:
    """The bytes of a sample, also of a mapping as Hugging Face has for files.

    Raises:
        UsageError: no bytes.
    """
    if isinstance(value, Mapping) and "bytes" in value:
        value = value["bytes"] if value["bytes"] is not None else Path(value["path"]).read_bytes()
    if not isinstance(value, bytes):
        raise UsageError(
            f"sample {key!r} is a {type(value).__name__}, and `decode` takes bytes; leave out `decode`, or take the "
            "decoding out of the stream"
        )
    return value
