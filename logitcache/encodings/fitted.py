"""Encodings whose arrays are fitted, and what these become on a device."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import ClassVar, Generic, Self, TypeVar

import numpy as np
import torch

from logitcache.encodings.protocol import Encoding
from logitcache.errors import UsageError

Arrays = TypeVar("Arrays")
Tensors = TypeVar("Tensors")


@dataclass(frozen=True, kw_only=True)
class FittedEncoding(Encoding, Generic[Arrays]):
    """An encoding whose `fit` determines an object with an attribute for each of `fitted_arrays`."""

    how_to_fit: ClassVar[str] = "pass `calibration=` logits (M, C), or call .fit(logits)"
    """For messages."""

    fitted: Arrays | None = field(default=None, repr=False, compare=False)

    @property
    def is_fitted(self) -> bool:
        return self.fitted is not None or not self.fitted_arrays

    def fitted_values(self) -> dict[str, np.ndarray]:
        return {name: getattr(self._fitted(), name) for name in self.fitted_arrays}

    def with_fitted(self, arrays: Mapping[str, np.ndarray]) -> Self:
        if not self.fitted_arrays:
            return self
        return self._with(self._from_arrays(**{name: arrays[name] for name in self.fitted_arrays}))

    @abstractmethod
    def _from_arrays(self, **arrays: np.ndarray) -> Arrays:
        """The object of arrays that were read from a cache.

        Raises:
            ValueError: they don't agree, or contain NaN or infinity.
        """

    def _with(self, fitted: Arrays) -> Self:
        return replace(self, fitted=fitted)

    def _fitted(self) -> Arrays:
        if self.fitted is None:
            raise UsageError(f"{type(self).__name__} is not fitted yet: {self.how_to_fit}")
        return self.fitted


def check_arrays(fitted: object, expected: Mapping[str, tuple[str, tuple[int, ...]]]) -> None:
    """Check fitted arrays that may come from an untrusted cache.

    Args:
        fitted: an object with an attribute for each array.
        expected: dtype and shape of each array, by name.

    Raises:
        ValueError: another dtype or shape, an empty array, or NaN or infinity.
    """
    arrays: dict[str, np.ndarray] = {name: getattr(fitted, name) for name in expected}
    for name, (dtype, _) in expected.items():
        if arrays[name].dtype != dtype:
            raise ValueError(f"{name} is {arrays[name].dtype.name}; expected {dtype}")
    for name, (_, shape) in expected.items():
        values = arrays[name]
        if values.shape != shape or not values.size:
            raise ValueError(f"the arrays don't agree: {name} has shape {values.shape}; expected {shape}")
        if values.dtype.kind == "f" and not np.isfinite(values).all():
            raise ValueError(f"{name} contains NaN or infinity")


class PerDevice(ABC, Generic[Tensors]):
    """Fitted arrays of an encoding, with the tensors that are derived from them once for each device."""

    @abstractmethod
    def _derive(self, device: torch.device) -> Tensors:
        """The arrays as tensors on a device, and what follows from them."""

    @cached_property
    def _by_device(self) -> dict[torch.device, Tensors]:
        return {}

    def on(self, device: torch.device) -> Tensors:
        """The arrays as tensors on a device; kept for the next call."""
        if device not in self._by_device:
            self._by_device[device] = self._derive(device)
        return self._by_device[device]
