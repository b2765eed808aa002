"""Random crops, flips and colors of images that run on a whole batch, with parameters for each sample.

The parameters of a sample are drawn from the global `random` generator, which `ViewDataset` seeds for each view and
row. So a view of an image is a pure function of its pixels, the view seed, the view and the row, and does not depend on
the batch. With `views.on_device`, the workers send bytes and parameters, and the device computes the pixels; otherwise
each worker computes them, with the same operations on one image.

Only operations on single elements are used, none of which adds up many numbers or fuses two steps. So the pixels are
equal to the last bit for any batch on one kind of device. Another kind may differ by at most `TOLERANCE`.
"""

from __future__ import annotations

import math
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from logitcache.errors import UsageError

# B batch, C channels, H height, W width, P parameters

TOLERANCE = 2.0**-13
"""Limit on the difference of a pixel in [0, 1] between two kinds of devices, for images of up to 1024 pixels a side, if
one of them fuses a multiplication and an addition: a place in the image then moves by at most 2^-14 pixels."""
GREY = (0.299, 0.587, 0.114)
"""Weights of red, green and blue in the brightness of a pixel (ITU-R BT.601), as in torchvision."""


class BatchedStep(ABC):
    """A step of `views.transform` that runs on a batch."""

    num_parameters: ClassVar[int]
    """P, of one sample."""

    @abstractmethod
    def draw(self, height: int, width: int) -> list[float]:
        """Draw the parameters for an image of this size from the global generator of `random`."""

    @abstractmethod
    def apply(self, images_BCHW: Tensor, parameters_BP: Tensor) -> Tensor:
        """The images (B, C, H, W) after the step; float32 in [0, 1], on any device.

        Args:
            images_BCHW: float32 in [0, 1].
            parameters_BP: float32, from `draw`, on the same device.
        """

    def size_after(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of an image after the step."""
        return height, width

    def __call__(self, value: Any) -> Tensor:
        """One image: PIL, uint8 (H, W), (H, W, C) or tensor (C, H, W), or float32 (C, H, W) of a step before."""
        is_float = isinstance(value, Tensor) and value.is_floating_point()
        given = f"{type(self).__name__} was given"
        image_CHW = value if is_float else as_floats(image_bytes(value, given=given))
        parameters_P = draw_all([self], image_CHW.shape[-2], image_CHW.shape[-1])
        return apply_all([self], image_CHW[None], parameters_P[None])[0]


class BatchedCrop(BatchedStep):
    """A random part of the image, resized to one size, and flipped by chance.

    Bilinear, without antialiasing. The part is chosen like that of torchvision's `RandomResizedCrop`, except that a
    part that does not fit is cut off, and that parts need not begin at a whole pixel.

    Args:
        size: height and width of the result, or one number for both.
        scale: least and largest area of the part, as a fraction of the image.
        ratio: least and largest width divided by height of the part.
        flip: probability that left and right are exchanged.
    """

    num_parameters = 5

    def __init__(
        self,
        *,
        size: int | Sequence[int],
        scale: Sequence[float] = (0.08, 1.0),
        ratio: Sequence[float] = (3 / 4, 4 / 3),
        flip: float = 0.5,
    ) -> None:
        sizes = [size, size] if isinstance(size, int) else list(size)
        if len(sizes) != 2 or not all(isinstance(each, int) and each > 0 for each in sizes):
            raise UsageError(f"batched_crop: size is {size!r}; expected one number of pixels, or height and width")
        if len(scale) != 2 or not 0 < scale[0] <= scale[1] <= 1:
            raise UsageError(f"batched_crop: scale is {scale!r}; expected two fractions in (0, 1], the smaller first")
        if len(ratio) != 2 or not 0 < ratio[0] <= ratio[1]:
            raise UsageError(f"batched_crop: ratio is {ratio!r}; expected two numbers above 0, the smaller first")
        if not 0 <= flip <= 1:
            raise UsageError(f"batched_crop: flip is {flip!r}; expected a probability in [0, 1]")
        self.size = (int(sizes[0]), int(sizes[1]))
        self.scale = (float(scale[0]), float(scale[1]))
        self.ratio = (float(ratio[0]), float(ratio[1]))
        self.flip = float(flip)

    def draw(self, height: int, width: int) -> list[float]:
        area = height * width * random.uniform(*self.scale)
        ratio = math.exp(random.uniform(*map(math.log, self.ratio)))
        of_height, of_width = min(math.sqrt(area / ratio), height), min(math.sqrt(area * ratio), width)
        top, left = random.random() * (height - of_height), random.random() * (width - of_width)
        return [top, left, of_height, of_width, float(random.random() < self.flip)]

    def size_after(self, height: int, width: int) -> tuple[int, int]:
        return self.size

    def apply(self, images_BCHW: Tensor, parameters_BP: Tensor) -> Tensor:
        top_B, left_B, height_B, width_B, flip_B = parameters_BP.unbind(dim=1)
        numbers_B1 = torch.arange(len(images_BCHW), device=images_BCHW.device)[:, None]
        rows = _positions(top_B, height_B, self.size[0], images_BCHW.shape[2])
        columns = _positions(left_B, width_B, self.size[1], images_BCHW.shape[3], flip_B)
        above, below = (images_BCHW[numbers_B1, :, row] for row in rows[:2])  # (B, out H, C, W)
        resized = _between(above, below, rows[2][:, :, None, None])
        left, right = (resized[numbers_B1, :, :, column] for column in columns[:2])  # (B, out W, out H, C)
        return _between(left, right, columns[2][:, :, None, None]).permute(0, 3, 2, 1).contiguous()


class BatchedFlip(BatchedStep):
    """Random mirror images. The pixels are those of torchvision's flips, to the last bit on any device.

    Args:
        horizontal: probability that left and right are exchanged.
        vertical: probability that top and bottom are exchanged.
    """

    num_parameters = 2

    def __init__(self, *, horizontal: float = 0.5, vertical: float = 0.0) -> None:
        for name, probability in {"horizontal": horizontal, "vertical": vertical}.items():
            if not 0 <= probability <= 1:
                raise UsageError(f"batched_flip: {name} is {probability!r}; expected a probability in [0, 1]")
        self.horizontal, self.vertical = float(horizontal), float(vertical)

    def draw(self, height: int, width: int) -> list[float]:
        return [float(random.random() < probability) for probability in (self.horizontal, self.vertical)]

    def apply(self, images_BCHW: Tensor, parameters_BP: Tensor) -> Tensor:
        horizontal, vertical = (each.view(-1, 1, 1, 1) > 0 for each in parameters_BP.unbind(dim=1))
        images_BCHW = torch.where(horizontal, images_BCHW.flip(3), images_BCHW)
        return torch.where(vertical, images_BCHW.flip(2), images_BCHW)


class BatchedColor(BatchedStep):
    """Random brightness, contrast and saturation, in this order.

    Contrast is changed around a fixed grey of 0.5, not around the mean of the image as in torchvision: a mean would
    depend on the order of the additions.

    Args:
        brightness, contrast, saturation: each factor is drawn from [max(0, 1 - x), 1 + x]; 0 leaves it at 1.
    """

    num_parameters = 3

    def __init__(self, *, brightness: float = 0.0, contrast: float = 0.0, saturation: float = 0.0) -> None:
        strengths = {"brightness": brightness, "contrast": contrast, "saturation": saturation}
        for name, strength in strengths.items():
            if not 0 <= strength < math.inf:
                raise UsageError(f"batched_color: {name} is {strength!r}; expected 0 or more")
        self.brightness, self.contrast, self.saturation = map(float, strengths.values())

    def draw(self, height: int, width: int) -> list[float]:
        strengths = (self.brightness, self.contrast, self.saturation)
        return [random.uniform(max(0.0, 1 - strength), 1 + strength) for strength in strengths]

    def apply(self, images_BCHW: Tensor, parameters_BP: Tensor) -> Tensor:
        brightness, contrast, saturation = (each.view(-1, 1, 1, 1) for each in parameters_BP.unbind(dim=1))
        images_BCHW = (images_BCHW * brightness).clamp_(0, 1)
        images_BCHW = ((images_BCHW - 0.5) * contrast + 0.5).clamp_(0, 1)
        if images_BCHW.shape[1] != 3:
            return images_BCHW
        red, green, blue = (channel * weight for channel, weight in zip(images_BCHW.chunk(3, 1), GREY, strict=True))
        return _between(red + green + blue, images_BCHW, saturation).clamp_(0, 1)


IMAGE_VIEWS: dict[str, Callable[..., Callable[[Any], Any]]] = {
    "batched_crop": BatchedCrop,
    "batched_flip": BatchedFlip,
    "batched_color": BatchedColor,
}


def draw_all(steps: Sequence[BatchedStep], height: int, width: int) -> Tensor:
    """The parameters of one sample in all steps, float32 (P,)."""
    drawn: list[float] = []
    for step in steps:
        drawn += step.draw(height, width)
        height, width = step.size_after(height, width)
    return torch.tensor(drawn, dtype=torch.float32)


def size_after(steps: Sequence[BatchedStep], height: int, width: int) -> tuple[int, int]:
    """Height and width of an image after all steps."""
    for step in steps:
        height, width = step.size_after(height, width)
    return height, width


def apply_all(steps: Sequence[BatchedStep], images_BCHW: Tensor, parameters_BP: Tensor) -> Tensor:
    """The images after all steps, with the parameters of `draw_all`."""
    first = 0
    for step in steps:
        images_BCHW = step.apply(images_BCHW, parameters_BP[:, first : first + step.num_parameters])
        first += step.num_parameters
    return images_BCHW


def image_bytes(value: Any, *, given: str) -> Tensor:
    """A PIL image, or a uint8 array (H, W), (H, W, C) or tensor (C, H, W), as uint8 (C, H, W).

    Args:
        value: the image.
        given: the beginning of the error message.

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
    raise UsageError(f"{given} {found}; expected PIL images, or uint8 arrays (H, W, C) or tensors (C, H, W)")


def as_floats(bytes_CHW: Tensor) -> Tensor:
    """Images (..., C, H, W) of bytes as float32 in [0, 1]."""
    # By a tensor: torch multiplies by the inverse of a number on some devices, which rounds differently.
    return bytes_CHW.float().div_(torch.full((), 255.0, device=bytes_CHW.device))


def _positions(
    start_B: Tensor, length_B: Tensor, count: int, limit: int, flip_B: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The pixels before and after `count` evenly spaced points, int64 (B, count), and the weight of those after.

    Args:
        start_B, length_B: of the part, in pixels.
        count: of points.
        limit: pixels in the image; points lie inside.
        flip_B: 1 where the order of the points is reversed.
    """
    device = start_B.device
    middles = torch.arange(count, device=device, dtype=torch.float32) + 0.5
    step_B = length_B / torch.full((), float(count), device=device)
    points = (start_B[:, None] + middles * step_B[:, None] - 0.5).clamp_(0, limit - 1)
    if flip_B is not None:
        points = torch.where(flip_B[:, None] > 0, points.flip(1), points)
    before = points.floor()
    return before.long(), (before + 1).clamp_(max=limit - 1).long(), points - before


def _between(first: Tensor, second: Tensor, weight: Tensor) -> Tensor:
    # Not torch.lerp: it may fuse the multiplication and the addition.
    return first + (second - first) * weight
