"""What fitted arrays become on a device."""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import cached_property
from typing import Generic, TypeVar

import torch

Tensors = TypeVar("Tensors")


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
