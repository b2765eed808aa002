"""What every encoding owes: the shapes it writes, and a way there and back."""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from logitcache.arrays import ArraySpec

# B batch, C classes, M calibration rows


class Encoding(ABC):
    """A frozen configuration that turns (B, C) logits into named arrays and back.

    Implementations are dataclasses whose fields survive JSON. Rows are encoded independently of each other. Where a
    matrix product's rounding might depend on how many rows it has, the writer sees to it that it never shows: it
    always encodes the same rows together.
    """

    name: ClassVar[str]
    """Its name in manifests and pipelines."""
    fitted_arrays: ClassVar[Mapping[str, int]] = {}
    """Arrays that fitting makes, which a cache stores once: name -> number of dimensions."""
    holds_masks: ClassVar[bool] = True
    """Whether a logit may be -inf."""
    masked_arrays: ClassVar[tuple[str, ...]] = ()
    """Arrays of floats in which -inf may stand for a class that is masked or left out; all others are finite."""
    keeps_constants: ClassVar[bool] = False
    """Whether a constant per row survives, which logits don't need and other outputs do."""

    @abstractmethod
    def arrays(self, num_classes: int) -> dict[str, ArraySpec]:
        """The arrays that `encode` returns for this many classes; no name has an underscore.

        Raises:
            UsageError: the encoding can't hold this many classes.
        """

    @abstractmethod
    def encode(self, logits_BC: Tensor, *, view: int = 0, start: int = 0) -> dict[str, Tensor]:
        """Encode float32 (B, C) logits on their own device; -inf stands for a masked class.

        Each returned tensor is (B, *row_shape) of the dtype that `arrays` names.

        Args:
            logits_BC: rows of one view, in their order.
            view: which view, and
            start: which row comes first, for encodings that draw random numbers.
        """

    @abstractmethod
    def decode(self, encoded: Mapping[str, Tensor], num_classes: int) -> Tensor:
        """Float32 (B, C) logits, right up to a constant per row, on the arrays' device."""

    def refused(self, logits_BC: Tensor) -> Tensor:
        """The rows of which no distribution can be made, or which it can't hold, bool (B,)."""
        # A row's largest logit is NaN, +inf or -inf exactly where no distribution can be made of it.
        refused_B = ~torch.isfinite(logits_BC.amax(dim=1))
        return refused_B if self.holds_masks else refused_B | ~torch.isfinite(logits_BC.amin(dim=1))

    def accepts(self, name: str, values: Tensor) -> bool:
        """Whether an array of stored rows, (rows, *row_shape), gives logits without NaN, +inf or rows of -inf only."""
        if not values.is_floating_point() or not values.numel():
            return True
        # NaN is both the largest and the smallest of its row; `isfinite` on every value would take ten times as long.
        if name not in self.masked_arrays:
            return all(map(math.isfinite, map(float, values.aminmax())))
        if values.ndim == 1:  # one number for several classes, which may all be masked
            return float(values.amax()) < math.inf
        return bool(torch.isfinite(values.amax(dim=1)).all())

    def fit(self, calibration: Any) -> Encoding:
        """The same encoding, fitted to a sample of the teacher's logits where it needs that.

        Args:
            calibration: (M, C) floats that can be sliced by rows: a tensor, an array or a memory map.

        Raises:
            UsageError: too few rows.
        """
        del calibration
        return self

    @property
    def is_fitted(self) -> bool:
        """Whether it can encode and decode as it is."""
        return True

    def fitted_values(self) -> dict[str, np.ndarray]:
        """The arrays that `fitted_arrays` names."""
        return {}

    def with_fitted(self, arrays: Mapping[str, np.ndarray]) -> Encoding:
        """The same encoding, with what a cache stored of its fit."""
        del arrays
        return self

    def config(self) -> dict[str, Any]:
        """The JSON object that `encoding_from_config` reads back."""
        return {"name": self.name, **{name: getattr(self, name) for name in parameters(type(self))}}


def parameters(kind: type) -> list[str]:
    """Names of an encoding's parameters; what fitting found is none."""
    return [field.name for field in dataclasses.fields(kind) if field.compare]


def smallest_id_dtype(num_classes: int) -> str:
    """The smallest unsigned integer that holds every class id."""
    return "uint8" if num_classes <= 2**8 else "uint16" if num_classes <= 2**16 else "uint32"


def float_tensor(logits: Any) -> Tensor:
    """A tensor, an array or a part of a memory map as a float32 tensor on the CPU."""
    if isinstance(logits, Tensor):
        return logits.detach().float().cpu()
    return torch.from_numpy(np.array(logits, dtype=np.float32))  # a copy: a memory map may be read-only
