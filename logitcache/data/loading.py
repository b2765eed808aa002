"""Rendered batches from DataLoader workers, which touch pixels only: no Zarr object ever crosses a fork."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from logitcache.data.batching import Batch
from logitcache.data.streamed import fetch_in_order
from logitcache.data.views import ViewDataset
from logitcache.data.workers import end_with_parent
from logitcache.errors import LogitCacheError

# B batch

AHEAD = 4
"""Batches that each worker renders ahead."""
PIPE_BYTES = 2**20
"""A tensor no larger than this crosses from a worker through its pipe, a larger one in shared memory."""


def rendered_batches(
    views: ViewDataset, batches: Iterable[list[tuple[int, int]]], *, num_workers: int, pin_memory: bool = False
) -> Iterator[Batch]:
    """Render batches of (view, index) in order, ahead of the reader; workers start at once.

    Raises:
        LogitCacheError: what a worker met, as it was raised there: an unreadable or changed sample.
    """
    groups = ([batch] for batch in batches)
    loader = _loader(_Rendering(views, pipe=not pin_memory, prove=False), groups, num_workers, pin_memory)
    return (rendered.batch for rendered in loader)


def proven_batches(
    views: ViewDataset,
    groups: Iterable[list[list[tuple[int, int]]]],
    *,
    num_workers: int,
    pin_memory: bool = False,
    per_group: int = 1,
) -> Iterator[Rendered]:
    """As `rendered_batches`, with the digest of each proof row's input: of the sample alone, before any padding.

    Args:
        views: to render.
        groups: batches that one worker renders together, so that each sample in them is loaded once.
        num_workers, pin_memory: of the loader.
        per_group: the most batches of a group; as many samples are rendered ahead as without groups.
    """
    rendering = _Rendering(views, pipe=not pin_memory, prove=True)
    return _loader(rendering, groups, num_workers, pin_memory, ahead=max(1, AHEAD // per_group))


class Rendered(NamedTuple):
    """A batch, and the digests of the inputs of the proof rows in it, by row."""

    batch: Batch
    digests: dict[int, str]


def _loader(
    rendering: _Rendering,
    groups: Iterable[list[list[tuple[int, int]]]],
    num_workers: int,
    pin_memory: bool,
    *,
    ahead: int = AHEAD,
) -> Iterator[Rendered]:
    loader: DataLoader[Any] = DataLoader(
        rendering,
        batch_sampler=_fetched(rendering.dataset, groups),
        num_workers=num_workers,
        worker_init_fn=end_with_parent,
        collate_fn=_as_rendered,
        pin_memory=pin_memory,
        prefetch_factor=ahead if num_workers else None,
        # Its own, since DataLoader draws a number at every start: from the global one, a resumed run would differ.
        generator=torch.Generator(),
    )
    # Workers are forked here and now, before the caller starts threads of its own.
    return _checked(iter(loader))


def _checked(loader: Iterator[Any]) -> Iterator[Rendered]:
    try:
        for group in loader:
            if isinstance(group, LogitCacheError):
                raise group
            for rendered in group:
                yield Rendered(_from_pipe(rendered.batch), rendered.digests)
    except RuntimeError as error:
        if "DataLoader worker" in str(error) and not isinstance(error, LogitCacheError):
            raise LogitCacheError(
                f"a DataLoader worker died ({error}); memory may be short: try fewer with num_workers=0"
            ) from error
        raise


def _fetched(dataset: Any, groups: Iterable[list[list[tuple[int, int]]]]) -> Iterator[list[Any]]:
    """Groups of batches; with each its samples, if the dataset is a stream, which the workers can't read."""
    for group in groups:
        yield [group, fetch_in_order(dataset, [place for batch in group for place in batch])]


class _Rendering(Dataset[Any]):
    """Groups of whole batches at a time; an error travels as a value, since DataLoader would rewrite its message."""

    def __init__(self, views: ViewDataset, *, pipe: bool, prove: bool) -> None:
        self._views = views
        self.dataset: Any = views.dataset
        self._pipe = pipe
        self._prove = prove

    def __len__(self) -> int:
        return len(self._views)

    def __getitems__(self, fetched: list[Any]) -> list[Rendered] | LogitCacheError:
        group, samples = fetched
        if samples is not None:
            self.dataset.hold(samples)
        try:
            rendered = iter(self._views.__getitems__(itertools.chain.from_iterable(group)))
            return [self._rendered(items, list(itertools.islice(rendered, len(items)))) for items in group]
        except LogitCacheError as error:
            return error

    def _rendered(self, items: list[tuple[int, int]], samples: list[tuple[int, Any, Any]]) -> Rendered:
        digests = self._views.proofs(items, samples) if self._prove else {}
        batch = self._views.collate(samples)
        return Rendered(_for_pipe(batch) if self._pipe else batch, digests)


def part_of(value: Any, start: int, stop: int) -> Any:
    """Some samples of a batch of tensors, or of a nest of them."""
    if isinstance(value, Tensor):
        return value[start:stop]
    if isinstance(value, dict):
        return {name: part_of(part, start, stop) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(part_of(part, start, stop) for part in value)
    return value


def _for_pipe(value: Any) -> Any:
    """Small tensors as arrays: torch would open a socket for each, which costs more than rendering a small batch."""
    if isinstance(value, Tensor) and value.nbytes <= PIPE_BYTES:
        return value.numpy()
    if isinstance(value, dict):
        return {name: _for_pipe(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(_for_pipe, value))
    return value


def _from_pipe(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value)
    if isinstance(value, dict):
        return {name: _from_pipe(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(_from_pipe, value))
    return value


def _as_rendered(batch: Any) -> Any:
    return batch
