"""The last steps of a view on the device: a batch of bytes becomes floats, is mixed, and is normalised there.

A quarter of the bytes then cross from the workers to the device, half with mixing. The pixels are the same: each step
is the arithmetic of `data.views` on a batch. On the CPU they are equal to the last bit; another kind of device may
contract the multiplication and the addition of mixup, which moves a pixel by at most 2^-23.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from logitcache.data.transforms import SpecifiedTransform, TorchvisionTransform
from logitcache.errors import UsageError

# B batch, C channels, H height, W width

PIXELS, PARTNER, WEIGHT, PATCH = "pixels", "partner", "weight", "patch"
"""Entries of a mixed sample: its image and its partner's, uint8 (C, H, W); the weight of mixup, float32; the patch of
CutMix as top, bottom, left, right, int64 (4,)."""


def device_steps(preprocess: Callable[[Any], Any] | None) -> list[Callable[[Tensor], Tensor]]:
    """The steps of a model's preprocessing, all of which can run on a batch on any device.

    Raises:
        UsageError: there are others; names the first.
    """
    if preprocess is None:
        return []
    if isinstance(preprocess, SpecifiedTransform):
        return [step for part in preprocess.steps for step in device_steps(part)]
    if isinstance(preprocess, TorchvisionTransform):
        return device_steps(preprocess.transform)
    if type(preprocess).__module__.startswith("torchvision.transforms.v2."):
        if type(preprocess).__name__ == "Compose":
            parts: Any = preprocess
            return [step for part in parts.transforms for step in device_steps(part)]
        if type(preprocess).__name__ == "Normalize":
            return [preprocess]
    name = getattr(preprocess, "__name__", type(preprocess).__name__)
    raise UsageError(
        f"views.on_device: {name} runs on single samples, before they are a batch; only torchvision's Normalize can "
        "run on the device. Set views.on_device=false, or move this step into views.transform"
    )


def byte_image(value: Any) -> Tensor:
    """A PIL image, or a uint8 array (H, W), (H, W, C) or tensor (C, H, W), as uint8 (C, H, W).

    Raises:
        UsageError: another value.
    """
    if hasattr(value, "mode") and hasattr(value, "tobytes"):
        value = np.asarray(value)
    if isinstance(value, np.ndarray) and value.dtype == np.uint8 and value.ndim in (2, 3):
        channels_last = value[:, :, None] if value.ndim == 2 else value
        return torch.from_numpy(np.array(channels_last.transpose(2, 0, 1), order="C"))
    if isinstance(value, Tensor) and value.dtype == torch.uint8 and value.ndim == 3:
        return value.as_subclass(Tensor)
    found = f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor | np.ndarray) else type(value).__name__
    raise UsageError(
        f"views.on_device sends images as bytes, and views.transform gives {found}; expected PIL images, or uint8 "
        "tensors (C, H, W). Set views.on_device=false, or leave out the step that makes floats: the device makes them"
    )


def mixed_bytes(
    pixels: Tensor, partner: Tensor | None, weight: float, patch: tuple[tuple[int, int], tuple[int, int]] | None
) -> dict[str, Tensor]:
    """A sample and what it is mixed with, for `finished`; without a partner it stays as it is."""
    (top, bottom), (left, right) = ((0, 0), (0, 0)) if patch is None else patch
    return {
        PIXELS: pixels,
        PARTNER: torch.zeros_like(pixels) if partner is None else partner,
        WEIGHT: torch.tensor(weight, dtype=torch.float32),
        PATCH: torch.tensor([top, bottom, left, right]),
    }


def finished(inputs: Any, steps: list[Callable[[Tensor], Tensor]]) -> Tensor:
    """Float images (B, C, H, W) of a batch of bytes, mixed and normalised, on its device.

    Args:
        inputs: uint8 (B, C, H, W), or batched entries of `mixed_bytes`.
        steps: from `device_steps`.
    """
    images = _mixed(inputs) if isinstance(inputs, Mapping) else _floats(inputs)
    for step in steps:
        images = step(images)
    return images


def _floats(bytes_BCHW: Tensor) -> Tensor:
    # By a tensor: torch multiplies by the inverse of a number on some devices, which rounds differently.
    return bytes_BCHW.float().div_(torch.full((), 255.0, device=bytes_BCHW.device))


def _mixed(entries: Mapping[str, Tensor]) -> Tensor:
    pixels_BCHW, partner_BCHW = _floats(entries[PIXELS]), _floats(entries[PARTNER])
    mixed = torch.lerp(partner_BCHW, pixels_BCHW, entries[WEIGHT].view(-1, 1, 1, 1))
    height, width = mixed.shape[-2:]
    top, bottom, left, right = (side.view(-1, 1, 1, 1) for side in entries[PATCH].unbind(dim=1))
    rows = torch.arange(height, device=mixed.device).view(1, 1, -1, 1)
    columns = torch.arange(width, device=mixed.device).view(1, 1, 1, -1)
    inside = (rows >= top) & (rows < bottom) & (columns >= left) & (columns < right)
    return torch.where(inside, partner_BCHW, mixed)
