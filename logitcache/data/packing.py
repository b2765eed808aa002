"""Packing: several sequences in one row of a batch, without padding between them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from logitcache.errors import UsageError

# B sequences, P packed rows, L length

INPUT_IDS = "input_ids"
ATTENTION_MASK = "attention_mask"
POSITION_IDS = "position_ids"


def packing_order(lengths: Sequence[int]) -> list[int]:
    """The order of sequences in which `pack` fills its rows best, by first-fit decreasing.

    Rows are as long as the longest sequence. Equal lengths keep their order.
    """
    capacity = max(lengths)
    rows: list[list[int]] = []
    left: list[int] = []
    for number in np.argsort(-np.asarray(lengths), kind="stable").tolist():
        row = next((row for row, space in enumerate(left) if space >= lengths[number]), None)
        if row is None:
            row = len(rows)
            rows.append([])
            left.append(capacity)
        rows[row].append(number)
        left[row] -= lengths[number]
    return [number for row in rows for number in row]


def pack(inputs: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """Pack the token ids of several samples, in order, into rows as long as the longest one.

    A row takes sequences until the next one does not fit. A causal model from `transformers` attends within a sequence
    only, since `position_ids` starts at 0 for each; such a batch has no `attention_mask`. At the end of a row
    `position_ids` goes on over the padding, whose id is 0.

    Args:
        inputs: mappings with `input_ids` (L,), and optionally an `attention_mask` of ones.

    Returns:
        `input_ids` and `position_ids`, int64 (P, L).

    Raises:
        UsageError: other inputs, or an attention mask with zeros.
    """
    sequences = [_token_ids(each) for each in inputs]
    length = max(map(len, sequences))
    ids: list[Tensor] = []
    positions: list[Tensor] = []
    used = length
    for sequence in sequences:
        if used + len(sequence) > length:
            ids.append(torch.zeros(length, dtype=torch.int64))
            positions.append(torch.arange(length))
            used = 0
        ids[-1][used : used + len(sequence)] = sequence
        positions[-1][used:] = torch.arange(length - used)
        used += len(sequence)
    return {INPUT_IDS: torch.stack(ids), POSITION_IDS: torch.stack(positions)}


def is_packed(batch: Any) -> bool:
    """Whether a batch of inputs is one of `pack`."""
    return isinstance(batch, Mapping) and set(batch) == {INPUT_IDS, POSITION_IDS}


def packed_sequence(batch: Mapping[str, Tensor], number: int) -> dict[str, Tensor]:
    """One sequence of a packed batch, int64 (at least L,): the last one of a row has the padding of the row.

    Raises:
        IndexError: the batch has fewer sequences.
    """
    width = batch[POSITION_IDS].shape[1]
    starts = torch.nonzero(batch[POSITION_IDS].flatten() == 0).flatten()
    if number >= len(starts):
        raise IndexError(f"there is no sequence {number} of {len(starts)}")
    start = int(starts[number])
    stop = (start // width + 1) * width
    if number + 1 < len(starts):
        stop = min(stop, int(starts[number + 1]))
    ids = batch[INPUT_IDS].flatten()[start:stop]
    return {INPUT_IDS: ids, ATTENTION_MASK: torch.ones_like(ids)}


def _token_ids(value: Any) -> Tensor:
    known = {INPUT_IDS, ATTENTION_MASK}
    if not isinstance(value, Mapping) or INPUT_IDS not in value or set(value) - known:
        found = f"a mapping of {', '.join(map(repr, value))}" if isinstance(value, Mapping) else type(value).__name__
        raise UsageError(
            f"only token ids can be packed: expected a mapping of 'input_ids' and 'attention_mask', found {found}; use "
            "data.collate=pad"
        )
    mask = value.get(ATTENTION_MASK)
    if mask is not None and not bool((torch.as_tensor(mask) == 1).all()):
        raise UsageError("sequences with zeros in `attention_mask` can't be packed; use data.collate=pad")
    return torch.as_tensor(value[INPUT_IDS]).to(torch.int64)
