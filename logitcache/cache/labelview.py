"""The labels of one view in memory, whole or a few blocks at a time."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from logitcache.cache.manifest import LOGITS
from logitcache.data.index import index_tensor, rows_of_view, split_index
from logitcache.data.rows import RowMap
from logitcache.encodings import Encoding
from logitcache.errors import UsageError
from logitcache.targets import Targets

# B batch, C classes


class View(ABC):
    """The labels of one view: as logits, float32 (B, C), or as targets of losses; and the teacher's other outputs."""

    number: int
    """The view number in the cache."""
    num_classes: int
    num_rows: int

    def logits(self, index: Any) -> Tensor:
        """The teacher's logits of the given rows, float32 (B, C), on the view's device.

        Logits are stored up to a constant per row: softmax, losses and argmax are the teacher's; raw values may differ
        by one number that is the same for all classes of a row.

        Args:
            index: int (B,): row numbers, or indices from `ViewDataset` of this view. Keep tensors on the CPU; on
                another device the check waits for that device.

        Raises:
            UsageError: indices of another view, booleans or floats.
            IndexError: a row number beyond the cache.
        """
        return self._decoded(rows_of_view(index, self.number, self.num_rows))

    def targets(self, index: Any) -> Targets:
        """The teacher's distributions of the given rows as losses consume them, on the view's device.

        For all encodings except `Dense`, no (B, C) tensor is made.

        Args:
            index: as for `logits`.

        Raises:
            UsageError: indices of another view, booleans or floats.
            IndexError: a row number beyond the cache.
        """
        return self._targets(rows_of_view(index, self.number, self.num_rows))

    @abstractmethod
    def _decoded(self, rows_B: Tensor) -> Tensor:
        """Logits of rows, float32 (B, C); the row numbers are checked already."""

    @abstractmethod
    def _targets(self, rows_B: Tensor) -> Targets:
        """Targets of rows; the row numbers are checked already."""

    def _encoded_logits(self) -> EncodedView:
        """The encoded logits."""
        assert isinstance(self, EncodedView)
        return self

    def output(self, name: str, index: Any) -> Tensor:
        """One of the teacher's outputs for the given rows, float32 (B, *shape), on the view's device.

        Args:
            name: "logits", or another name in `cache.outputs`.
            index: as for `logits`.

        Raises:
            UsageError: no such output; indices of another view, booleans or floats.
            IndexError: a row number beyond the cache.
        """
        if name != LOGITS:
            raise no_output(name, [LOGITS])
        return self.logits(index)


def no_output(name: str, known: Iterable[str]) -> UsageError:
    """The error for an output that the cache does not have."""
    have = ", ".join(known)
    if name == LOGITS:
        return UsageError(
            f"the cache has no logits, only other outputs: {have}. Train on them with hints, or with "
            "`view.output(name, index)` and a loss of your own"
        )
    return UsageError(f"the cache has no output {name!r}; it has: {have}")


class ViewOfOutputs(View):
    """A view with several outputs, each read on first use or by `read`.

    Args:
        number: the view number.
        num_rows: rows of the view.
        shapes: shape of one sample, by output.
        num_classes: of the logits.
        read: reads an output by name, as a view whose `logits` are its flattened values (B, values of a sample).
    """

    def __init__(
        self,
        number: int,
        num_rows: int,
        shapes: Mapping[str, tuple[int, ...]],
        num_classes: int,
        read: Callable[[str], View],
    ) -> None:
        self.number = number
        self.num_rows = num_rows
        self.num_classes = num_classes
        self._shapes = shapes
        self._read = read
        self._parts: dict[str, View] = {}

    def read(self, names: Iterable[str]) -> None:
        """Read some outputs now.

        Raises:
            UsageError: the cache has no such output.
        """
        for name in names:
            if name not in self._shapes:
                raise no_output(name, self._shapes)
            if name not in self._parts:
                self._parts[name] = self._read(name)

    def _encoded_logits(self) -> EncodedView:
        self.read([LOGITS])
        return self._parts[LOGITS]._encoded_logits()

    def _decoded(self, rows_B: Tensor) -> Tensor:
        return self.output(LOGITS, rows_B)

    def _targets(self, rows_B: Tensor) -> Targets:
        self.read([LOGITS])
        return self._parts[LOGITS].targets(rows_B)

    def output(self, name: str, index: Any) -> Tensor:
        self.read([name])
        rows_BD = self._parts[name].logits(index)
        return rows_BD.reshape(len(rows_BD), *self._shapes[name])


class EncodedView(View):
    """A view whose rows are decoded when they are asked for."""

    _encoding: Encoding

    @abstractmethod
    def _gathered(self, rows_B: Tensor) -> dict[str, Tensor]:
        """The encoded rows, by array, on the view's device."""

    def _decoded(self, rows_B: Tensor) -> Tensor:
        return self._encoding.decode(self._gathered(rows_B), self.num_classes)

    def _targets(self, rows_B: Tensor) -> Targets:
        return self._encoding.targets(self._gathered(rows_B), self.num_classes)


class ResidentView(EncodedView):
    """A whole view in memory, encoded. Gathers and decodes rows on its device."""

    def __init__(self, number: int, encoding: Encoding, arrays: Mapping[str, Tensor], num_classes: int) -> None:
        self.number = number
        self.num_classes = num_classes
        self.num_rows = len(next(iter(arrays.values())))
        self._encoding = encoding
        self._arrays = arrays
        self._device = next(iter(arrays.values())).device

    def _gathered(self, rows_B: Tensor) -> dict[str, Tensor]:
        rows_B = rows_B.to(self._device)
        return {name: _rows(values, rows_B) for name, values in self._arrays.items()}


class StreamedView(EncodedView):
    """A view with only its most recently used blocks in memory.

    Works in any order of rows; fast if consecutive batches stay within `max_blocks` blocks, as in the windowed order
    of `data.order.epoch_order`.
    """

    def __init__(
        self,
        number: int,
        encoding: Encoding,
        read_blocks: Callable[[Sequence[int]], dict[str, np.ndarray]],
        rows: RowMap,
        device: torch.device,
        *,
        max_blocks: int,
        num_values: int,
    ) -> None:
        self.number = number
        self.num_classes = num_values
        self.num_rows = rows.num_rows
        self._max_blocks = max_blocks
        self._encoding = encoding
        self._read_blocks = read_blocks
        self._row_map = rows
        self._device = device
        self._blocks: OrderedDict[int, dict[str, Tensor]] = OrderedDict()

    def _gathered(self, rows_B: Tensor) -> dict[str, Tensor]:
        numbered_B = rows_B.cpu().numpy()
        numbers_B = self._row_map.blocks_of(numbered_B)
        order = torch.from_numpy(np.argsort(numbers_B, kind="stable")).to(self._device)
        parts: dict[str, list[Tensor]] = {}
        for number in np.unique(numbers_B) if len(rows_B) else [0]:
            first = self._row_map.block_rows(int(number)).start
            within = torch.from_numpy(numbered_B[numbers_B == number] - first).to(self._device)
            for name, values in self._block(int(number)).items():
                parts.setdefault(name, []).append(_rows(values, within))
        return {name: _rows(torch.cat(of_blocks), order.argsort()) for name, of_blocks in parts.items()}

    def _block(self, number: int) -> dict[str, Tensor]:
        block = self._blocks.get(number)
        if block is None:
            arrays = self._read_blocks([number])
            block = {name: torch.from_numpy(values).to(self._device) for name, values in arrays.items()}
            self._blocks[number] = block
            while len(self._blocks) > self._max_blocks:
                self._blocks.popitem(last=False)
        self._blocks.move_to_end(number)
        return block


class MixedViews(EncodedView):
    """Several views of one cache, for batches that have samples of any of them; the index names the view.

    Args:
        views: by number.
    """

    def __init__(self, views: Mapping[int, View]) -> None:
        first = next(iter(views.values()))
        self.number, self.num_classes, self.num_rows = -1, first.num_classes, first.num_rows
        self._views = views

    @property
    def _encoding(self) -> Encoding:  # type: ignore[override]
        return next(iter(self._views.values()))._encoded_logits()._encoding

    def logits(self, index: Any) -> Tensor:
        return self._decoded(index_tensor(index))

    def targets(self, index: Any) -> Targets:
        return self._targets(index_tensor(index))

    def output(self, name: str, index: Any) -> Tensor:
        if name == LOGITS:
            return self.logits(index)
        return self._joined(index_tensor(index), lambda view, index_B: {name: view.output(name, index_B)})[name]

    def _gathered(self, rows_B: Tensor) -> dict[str, Tensor]:
        def gathered(view: View, index_B: Tensor) -> dict[str, Tensor]:
            encoded = view._encoded_logits()
            return encoded._gathered(rows_of_view(index_B, encoded.number, encoded.num_rows))

        return self._joined(rows_B, gathered)

    def _joined(self, index_B: Tensor, part_of: Callable[[View, Tensor], Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """What each view gives for its rows of a batch, in the order of the batch, by array or output."""
        views_B = split_index(index_B)[0]
        order = views_B.argsort(stable=True)
        parts: dict[str, list[Tensor]] = {}
        for number in sorted(set(views_B.tolist())):
            if number not in self._views:
                known = ", ".join(map(str, self._views))
                raise UsageError(f"the batch has indices of view {number}; expected those of views {known}")
            for name, values in part_of(self._views[number], index_B[views_B == number]).items():
                parts.setdefault(name, []).append(values)
        return {name: _rows(torch.cat(each), order.argsort().to(each[0].device)) for name, each in parts.items()}


_SIGNED = {torch.uint16: torch.int16, torch.uint32: torch.int32}


def _rows(values: Tensor, index: Tensor) -> Tensor:
    """Some rows of an array. Wider unsigned integers are viewed as signed: torch gathers them only on some devices."""
    signed = _SIGNED.get(values.dtype)
    if signed is None:
        return values.index_select(0, index)
    return values.view(signed).index_select(0, index).view(values.dtype)
