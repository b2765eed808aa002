"""Build batches from samples: stacked, padded, or by the user's own function."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import default_collate

from logitcache.data.packing import INPUT_IDS, pack, packing_order
from logitcache.errors import LogitCacheError, ShapeError, UsageError
from logitcache.registry import Registry

# B batch

Batch = tuple[Tensor, Any, Any]
"""(indices int64 (B,) of view and row, inputs, targets)."""

Collate = Callable[[list[Any]], Any]
"""Builds a batch of B rows from the inputs of B samples, in order."""


class InputPerModel(tuple[Any, ...]):
    """The inputs of several models, rendered from one view of a sample; each is batched separately."""

    __slots__ = ()


def stack(inputs: Sequence[Any]) -> Any:
    """Stack inputs of one shape: tensors, NumPy arrays, numbers and lists of numbers, or mappings of these."""
    if not isinstance(inputs[0], Tensor):
        inputs = [as_tensors(each) for each in inputs]
    return default_collate(list(inputs))


def pad(inputs: Sequence[Any]) -> Any:
    """Stack inputs of different lengths, padding the shorter ones with zeros at the end.

    Tensors of a mapping are padded separately, so an `attention_mask` of ones becomes 0 at the padding.
    """
    return _padded([as_tensors(each) for each in inputs])


COLLATES: Registry[Collate] = Registry(
    "collate function", {"stack": stack, "pad": pad, "pack": pack}, plural="collates", allows_code=True
)
"""`pack` is for causal language models only. A package adds one in the entry point group `logitcache.collates`."""


def collate(samples: Sequence[tuple[int, Any, Any]], function: Collate | None = None) -> Batch:
    """Build a batch from samples of a `ViewDataset`, in their order; `pack` puts them in the order of `packing_order`.

    Args:
        samples: (index, input, target) of each.
        function: combines the inputs; default `stack`.

    Raises:
        ShapeError: inputs of different sizes, or a function that returns another number of rows.
        UsageError: the function failed.
    """
    if function is pack:
        samples = _for_packing(samples)
    index, inputs, targets = zip(*samples, strict=True)
    if isinstance(inputs[0], InputPerModel):
        batch: Any = InputPerModel(_batch(list(of_model), function) for of_model in zip(*inputs, strict=True))
    else:
        batch = _batch(list(inputs), function)
    return torch.tensor(index), batch, _targets(targets)


NO_TARGET = -100
"""Fills the targets of sequences with fewer rows than the longest one of a batch; losses ignore it."""


def _targets(targets: Sequence[Any]) -> Tensor:
    """Stack targets: classes, distributions, or the class of each row of sequences, padded to (B, rows)."""
    if not isinstance(targets[0], Tensor) or len({target.shape for target in targets}) == 1:
        stacked: Tensor = default_collate(list(targets))
        return stacked
    return torch.nn.utils.rnn.pad_sequence(list(targets), batch_first=True, padding_value=NO_TARGET)


def as_tensors(value: Any) -> Any:
    """Convert NumPy arrays and lists of numbers to tensors, also in mappings, lists and tuples; leave other values."""
    if isinstance(value, Tensor | str | bytes):
        return value
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        # torch warns about arrays that are not writable, because it would share their memory.
        return torch.from_numpy(np.ascontiguousarray(value) if value.flags.writeable else value.copy())
    if isinstance(value, Mapping):
        return {name: as_tensors(part) for name, part in value.items()}
    if isinstance(value, list) and _holds_numbers(value):
        try:
            return torch.tensor(value)
        except (ValueError, TypeError):  # lists of different lengths
            return value
    if isinstance(value, list | tuple) and not hasattr(value, "_fields"):
        return type(value)(map(as_tensors, value))
    return value


def num_bytes(value: Any) -> int | None:
    """Bytes of an input as tensors; None if it contains other values."""
    if isinstance(value, int | float):
        return 8
    if isinstance(value, list):
        value = as_tensors(value)
    if isinstance(value, Tensor | np.ndarray):
        return int(value.nbytes)
    if isinstance(value, Mapping):
        parts = [num_bytes(part) for part in value.values()]
        return None if None in parts else sum(part or 0 for part in parts)
    return None


def _for_packing(samples: Sequence[tuple[int, Any, Any]]) -> list[tuple[int, Any, Any]]:
    lengths = []
    for _, inputs, _ in samples:
        first = inputs[0] if isinstance(inputs, InputPerModel) else inputs
        lengths.append(len(first[INPUT_IDS]) if isinstance(first, Mapping) and INPUT_IDS in first else 1)
    return [samples[number] for number in packing_order(lengths)]


def _batch(inputs: list[Any], function: Collate | None) -> Any:
    if function is pack:
        return pack(inputs)
    if function in (None, stack, pad):
        try:
            return (function or stack)(inputs)
        except (RuntimeError, TypeError, KeyError, ValueError, AttributeError) as error:
            found = sorted({_shape(value) for value in inputs})
            raise ShapeError(
                f"these samples can't be stacked into a batch; their inputs are {', '.join(found)}: end the model's "
                "`input` with a resize or crop to a fixed size, or pad them with data.collate=pad or your own function "
                f"({_first_line(error)})"
            ) from error
    try:
        batch = as_tensors(function(inputs))  # Hugging Face's collators return mappings that are not dicts
    except LogitCacheError:
        raise
    except Exception as error:
        raise UsageError(
            f"the collate function {_name(function)} fails on {len(inputs)} inputs, the first of them "
            f"{_shape(inputs[0])}: {type(error).__name__}: {_first_line(error)}"
        ) from error
    strange = [rows for rows in _rows_of(batch) if rows != len(inputs)]
    if strange:
        raise ShapeError(
            f"the collate function {_name(function)} returns {strange[0]} rows for {len(inputs)} samples; expected one "
            "row for each sample, in their order"
        )
    return batch


def _padded(values: list[Any]) -> Any:
    first = values[0]
    if isinstance(first, Mapping):
        return {name: _padded([value[name] for value in values]) for name in first}
    if isinstance(first, tuple):
        return tuple(_padded(list(parts)) for parts in zip(*values, strict=True))
    if not isinstance(first, Tensor) or len({value.shape for value in values}) == 1:
        return default_collate(values)
    shape = [max(sides) for sides in zip(*(value.shape for value in values), strict=True)]
    batch = first.new_zeros((len(values), *shape))
    for row, value in zip(batch, values, strict=True):
        row[tuple(map(slice, value.shape))] = value
    return batch


def _holds_numbers(value: Any) -> bool:
    while isinstance(value, list) and value:
        value = value[0]
    return isinstance(value, bool | int | float | np.number | np.bool_)


def _rows_of(batch: Any) -> list[int]:
    """The first dimension of each tensor of a batch."""
    if isinstance(batch, Tensor):
        return [len(batch) if batch.ndim else 0]
    if isinstance(batch, Mapping):
        return [rows for part in batch.values() for rows in _rows_of(part)]
    if isinstance(batch, list | tuple):
        return [rows for part in batch for rows in _rows_of(part)]
    return []


def _shape(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{name}: {_shape(part)}' for name, part in value.items())}}}"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    return str(tuple(getattr(value, "shape", ())) or type(value).__name__)


def _name(function: Any) -> str:
    return getattr(function, "__qualname__", type(function).__name__)


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
