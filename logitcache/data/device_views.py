"""The last steps of a view on the device: a batch of bytes becomes floats, is mixed, and is normalized there.

A quarter of the bytes then cross from the workers to the device, half with mixing. The pixels are the same: each step
is the arithmetic of `data.views` on a batch. On the CPU they are equal to the last bit; another kind of device may
contract the multiplication and the addition of mixup, which moves a pixel by at most 2^-23. Random steps run on the
device if they are made for it (`data.batched_views`); the workers draw their parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from logitcache.data.batched_views import (
    BatchedStep,
    apply_all,
    as_floats,
    draw_all,
    image_bytes,
    size_after,
)
from logitcache.data.transforms import SpecifiedTransform, TorchvisionTransform, adapt_transform
from logitcache.errors import UsageError

# B batch, C channels, H height, W width

PIXELS, PARTNER, WEIGHT, PATCH = "pixels", "partner", "weight", "patch"
"""Entries of a mixed sample: its image and its partner's, uint8 (C, H, W); the weight of mixup, float32; the patch of
CutMix as top, bottom, left, right, int64 (4,)."""
PARAMETERS, OF_PARTNER = "parameters", "partner_parameters"
"""Entries where steps of the transform run on the device: their parameters, float32 (P,), for either image."""


class ByteImage(NamedTuple):
    """An image before the steps that run on the device."""

    pixels: Tensor
    """uint8 (C, H, W)."""
    parameters: Tensor
    """Of the batched steps, float32 (P,)."""
    size: tuple[int, int]
    """Height and width after these steps."""

    def sent(self) -> Tensor | dict[str, Tensor]:
        """What a worker sends of an image that is not mixed."""
        return {PIXELS: self.pixels, PARAMETERS: self.parameters} if len(self.parameters) else self.pixels


def split_batched(
    transform: Callable[[Any], Any] | None,
) -> tuple[Callable[[Any], Any] | None, list[BatchedStep]]:
    """The part of a transform that runs on the workers, and the batched steps at its end.

    Raises:
        UsageError: other steps follow a batched one.
    """
    if isinstance(transform, BatchedStep):
        return None, [transform]
    steps: list[Any] = []
    if isinstance(transform, SpecifiedTransform):
        steps = list(transform.steps)
    elif _is_torchvision(transform, "Compose"):
        parts: Any = transform
        steps = [adapt_transform(step) for step in parts.transforms]
    batched: list[BatchedStep] = []
    while steps and isinstance(steps[-1], BatchedStep):
        batched.insert(0, steps.pop())
    early = next((type(step).__name__ for step in steps if isinstance(step, BatchedStep)), None)
    if early is not None:
        raise UsageError(
            f"views.on_device: {early} runs on a batch, and the last step of views.transform on single samples; "
            "put batched steps at the end of views.transform, or set views.on_device=false"
        )
    if not batched:
        return transform, []
    return (SpecifiedTransform([], steps) if steps else None), batched


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
    if _is_torchvision(preprocess, "Compose"):
        parts: Any = preprocess
        return [step for part in parts.transforms for step in device_steps(part)]
    if _is_torchvision(preprocess, "Normalize"):
        return [preprocess]
    name = getattr(preprocess, "__name__", type(preprocess).__name__)
    raise UsageError(
        f"views.on_device: {name} runs on single samples, before they are a batch; only torchvision's Normalize can "
        "run on the device. Set views.on_device=false, or move this step into views.transform"
    )


def _is_torchvision(transform: Any, name: str) -> bool:
    kind = type(transform)
    return kind.__module__.startswith("torchvision.transforms.v2.") and kind.__name__ == name


def byte_image(value: Any, batched: Sequence[BatchedStep] = ()) -> ByteImage:
    """An image as bytes, and the parameters of the batched steps, drawn from the global generator of `random`.

    Raises:
        UsageError: no image of bytes (`image_bytes`).
    """
    try:
        pixels = image_bytes(value, given="views.on_device sends images as bytes, and views.transform gives")
    except UsageError as error:
        remedy = "Set views.on_device=false, or leave out the step that makes floats: the device makes them"
        raise UsageError(f"{error}. {remedy}") from None
    height, width = pixels.shape[-2:]
    return ByteImage(pixels, draw_all(batched, height, width), size_after(batched, height, width))


def mixed_bytes(
    image: ByteImage, partner: ByteImage | None, weight: float, patch: tuple[tuple[int, int], tuple[int, int]] | None
) -> dict[str, Tensor]:
    """A sample and what it is mixed with, for `finished`; without a partner it stays as it is."""
    (top, bottom), (left, right) = ((0, 0), (0, 0)) if patch is None else patch
    entries = {
        PIXELS: image.pixels,
        PARTNER: torch.zeros_like(image.pixels) if partner is None else partner.pixels,
        WEIGHT: torch.tensor(weight, dtype=torch.float32),
        PATCH: torch.tensor([top, bottom, left, right]),
    }
    if len(image.parameters):
        other = image if partner is None else partner
        entries |= {PARAMETERS: image.parameters, OF_PARTNER: other.parameters}
    return entries


def finished(inputs: Any, steps: list[Callable[[Tensor], Tensor]], batched: Sequence[BatchedStep] = ()) -> Tensor:
    """Float images (B, C, H, W) of a batch of bytes, after the batched steps, mixed and normalized, on its device.

    Args:
        inputs: uint8 (B, C, H, W), or batched entries of `ByteImage.sent` or `mixed_bytes`.
        steps: from `device_steps`.
        batched: from `split_batched`.
    """
    if not isinstance(inputs, Mapping):
        images = as_floats(inputs)
    else:
        images = _images(inputs, PIXELS, PARAMETERS, batched)
        if PARTNER in inputs:
            images = _mixed(images, _images(inputs, PARTNER, OF_PARTNER, batched), inputs[WEIGHT], inputs[PATCH])
    for step in steps:
        images = step(images)
    return images


def _images(entries: Mapping[str, Tensor], pixels: str, parameters: str, batched: Sequence[BatchedStep]) -> Tensor:
    images_BCHW = as_floats(entries[pixels])
    return apply_all(batched, images_BCHW, entries[parameters]) if batched else images_BCHW


def _mixed(images_BCHW: Tensor, partners_BCHW: Tensor, weight_B: Tensor, patch_B4: Tensor) -> Tensor:
    mixed = torch.lerp(partners_BCHW, images_BCHW, weight_B.view(-1, 1, 1, 1))
    height, width = mixed.shape[-2:]
    top, bottom, left, right = (side.view(-1, 1, 1, 1) for side in patch_B4.unbind(dim=1))
    rows = torch.arange(height, device=mixed.device).view(1, 1, -1, 1)
    columns = torch.arange(width, device=mixed.device).view(1, 1, 1, -1)
    inside = (rows >= top) & (rows < bottom) & (columns >= left) & (columns < right)
    return torch.where(inside, partners_BCHW, mixed)
