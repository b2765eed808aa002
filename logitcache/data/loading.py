"""Rendered batches from DataLoader workers, which touch pixels only: no Zarr object ever crosses a fork."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from logitcache.data.views import ViewDataset
from logitcache.data.workers import end_with_parent
from logitcache.errors import LogitCacheError, ShapeError

# B batch

PIPE_BYTES = 2**20
"""A tensor no larger than this crosses from a worker through its pipe, a larger one in shared memory."""

Batch = tuple[Tensor, Any, Any]
"""(indices int64 (B,) that carry view and row, inputs, targets)."""


def rendered_batches(
    views: ViewDataset, batches: Iterable[list[tuple[int, int]]], *, num_workers: int, pin_memory: bool = False
) -> Iterator[Batch]:
    """Render batches of (view, index) in order, ahead of the reader; workers start at once.

    Raises:
        LogitCacheError: what a worker met, as it was raised there: an unreadable or changed sample.
    """
    loader: DataLoader[Any] = DataLoader(
        _Rendering(views, pipe=not pin_memory),
        batch_sampler=batches,
        num_workers=num_workers,
        worker_init_fn=end_with_parent,
        collate_fn=_as_rendered,
        pin_memory=pin_memory,
        prefetch_factor=4 if num_workers else None,
        # Its own, since DataLoader draws a number at every start: from the global one, a resumed run would differ.
        generator=torch.Generator(),
    )
    # Workers are forked here and now, before the caller starts threads of its own.
    return _checked(iter(loader))


def _checked(loader: Iterator[Any]) -> Iterator[Batch]:
    try:
        for batch in loader:
            if isinstance(batch, LogitCacheError):
                raise batch
            yield _from_pipe(batch)
    except RuntimeError as error:
        if "DataLoader worker" in str(error) and not isinstance(error, LogitCacheError):
            raise LogitCacheError(
                f"a DataLoader worker died ({error}); memory may be short: try fewer with num_workers=0"
            ) from error
        raise


class _Rendering(Dataset[Any]):
    """Whole batches at a time; an error travels as a value, since DataLoader would rewrite its message."""

    def __init__(self, views: ViewDataset, *, pipe: bool) -> None:
        self._views = views
        self._pipe = pipe

    def __len__(self) -> int:
        return len(self._views)

    def __getitems__(self, items: list[tuple[int, int]]) -> Batch | LogitCacheError:
        try:
            batch = collate(self._views.__getitems__(items))
            return cast("Batch", _for_pipe(batch)) if self._pipe else batch
        except LogitCacheError as error:
            return error


def collate(samples: list[tuple[int, Any, Any]]) -> Batch:
    """Samples of a `ViewDataset` as one batch.

    Raises:
        ShapeError: inputs of different sizes.
    """
    index, inputs, targets = zip(*samples, strict=True)
    try:
        return torch.tensor(index), default_collate(list(inputs)), default_collate(list(targets))
    except (RuntimeError, TypeError) as error:
        shapes = {str(tuple(getattr(value, "shape", ())) or type(value).__name__) for value in inputs}
        raise ShapeError(
            f"these samples make no batch; their inputs are {', '.join(sorted(shapes))}: end the model's `input` "
            f"with a resize or crop to a fixed size ({str(error).splitlines()[0]})"
        ) from error


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
    if isinstance(value, list | tuple):
        return type(value)(map(_for_pipe, value))
    return value


def _from_pipe(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value)
    if isinstance(value, list | tuple):
        return type(value)(map(_from_pipe, value))
    return value


def _as_rendered(batch: Any) -> Any:
    return batch
