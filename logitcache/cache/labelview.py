"""One view's labels in memory, whole or a few blocks at a time: row numbers in, logits out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from logitcache.cache.manifest import Layout
from logitcache.encodings import Encoding

# B batch, C classes


class View(ABC):
    """One view's labels: `logits(index)` gives float32 (B, C) for row numbers (B,)."""

    number: int
    num_classes: int

    @abstractmethod
    def logits(self, index: Any) -> Tensor:
        """The teacher's logits of the given rows, float32 (B, C), on the view's device.

        Args:
            index: int (B,) row numbers: a tensor, array or list.

        Raises:
            IndexError: a row beyond the cache.
        """


class ResidentView(View):
    """A whole view in memory, encoded; gathers and decodes on its device."""

    def __init__(self, number: int, encoding: Encoding, arrays: Mapping[str, Tensor], num_classes: int) -> None:
        self.number = number
        self.num_classes = num_classes
        self._encoding = encoding
        self._arrays = arrays
        self._device = next(iter(arrays.values())).device

    def logits(self, index: Any) -> Tensor:
        index_B = torch.as_tensor(index, dtype=torch.int64, device=self._device)
        gathered = {name: _rows(values, index_B) for name, values in self._arrays.items()}
        return self._encoding.decode(gathered, self.num_classes)


class StreamedView(View):
    """A view of which only some blocks are in memory, the most recently used ones.

    Fast when consecutive batches stay within `max_blocks` blocks, as `order.epoch_order` makes them; right in any
    order.
    """

    def __init__(
        self,
        number: int,
        encoding: Encoding,
        read_blocks: Callable[[Sequence[int]], dict[str, np.ndarray]],
        layout: Layout,
        device: torch.device,
        *,
        max_blocks: int,
    ) -> None:
        self.number = number
        self.num_classes = layout.num_classes
        self.max_blocks = max_blocks
        self.blocks_read = 0
        self._encoding = encoding
        self._read_blocks = read_blocks
        self._layout = layout
        self._device = device
        self._blocks: OrderedDict[int, dict[str, Tensor]] = OrderedDict()

    def logits(self, index: Any) -> Tensor:
        rows_B = np.asarray(torch.as_tensor(index, dtype=torch.int64).cpu())
        if len(rows_B) and not (rows_B.min() >= 0 and rows_B.max() < self._layout.num_samples):
            raise IndexError(f"rows {rows_B.min()} to {rows_B.max()} of a view of {self._layout.num_samples}")
        logits_BC = torch.empty((len(rows_B), self.num_classes), device=self._device)
        rows_per_block = self._layout.rows_per_block
        numbers_B = rows_B // rows_per_block
        for number in np.unique(numbers_B):
            places = np.flatnonzero(numbers_B == number)
            within = torch.from_numpy(rows_B[places] - number * rows_per_block).to(self._device)
            block = self._block(int(number))
            gathered = {name: _rows(values, within) for name, values in block.items()}
            decoded = self._encoding.decode(gathered, self.num_classes)
            logits_BC[torch.from_numpy(places).to(self._device)] = decoded
        return logits_BC

    def _block(self, number: int) -> dict[str, Tensor]:
        block = self._blocks.get(number)
        if block is None:
            arrays = self._read_blocks([number])
            block = {name: torch.from_numpy(values).to(self._device) for name, values in arrays.items()}
            self.blocks_read += 1
            self._blocks[number] = block
            while len(self._blocks) > self.max_blocks:
                self._blocks.popitem(last=False)
        self._blocks.move_to_end(number)
        return block


_SIGNED = {torch.uint16: torch.int16, torch.uint32: torch.int32}


def _rows(values: Tensor, index: Tensor) -> Tensor:
    """Some rows of an array; torch gathers its wider unsigned integers only on some devices, so they pass as signed."""
    signed = _SIGNED.get(values.dtype)
    if signed is None:
        return values.index_select(0, index)
    return values.view(signed).index_select(0, index).view(values.dtype)
