"""Small PNG pictures for the page: samples as the teacher saw them, and signed maps such as attributions or filters."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

# H height, W width

MAX_SIDE = 112
"""Pixels of a sample's longer side on the page."""
MAP_SIDE = 56
"""Pixels of a map's longer side on the page."""
LEVELS = 15
"""Shades per sign of a map."""
POSITIVE, NEGATIVE = (217, 95, 2), (31, 111, 180)
"""Orange and blue: distinguishable with any color vision, and visible on light and dark pages."""
REGIONS = (
    ("the upper left", "the top", "the upper right"),
    ("the left", "the centre", "the right"),
    ("the lower left", "the bottom", "the lower right"),
)  # fmt: skip


def image_uri(image: Any) -> str | None:
    """An image tensor (1 or 3, H, W) as a PNG data URI; None for anything else.

    Values outside [0, 1], which normalization produces, are rescaled to it by their minimum and maximum.
    """
    from PIL import Image

    if not isinstance(image, torch.Tensor) or image.ndim != 3 or image.shape[0] not in (1, 3) or not image.numel():
        return None
    pixels_CHW = image.detach().float().numpy()
    low, high = float(pixels_CHW.min()), float(pixels_CHW.max())
    if not np.isfinite([low, high]).all():
        return None
    if low < 0 or high > 1:
        pixels_CHW = (pixels_CHW - low) / max(high - low, 1e-12)
    pixels_HWC = np.round(pixels_CHW.transpose(1, 2, 0) * 255).astype(np.uint8)
    picture = Image.fromarray(pixels_HWC[:, :, 0] if pixels_HWC.shape[2] == 1 else pixels_HWC)
    picture.thumbnail((MAX_SIDE, MAX_SIDE))
    return _png_uri(picture)


def signed_map_uri(values_HW: np.ndarray) -> str:
    """Signed values as a PNG data URI: orange where positive, blue where negative, transparent where zero."""
    from PIL import Image

    values = torch.from_numpy(_finite(values_HW))[None, None].float()
    longest = max(values.shape[2:])
    if longest > MAP_SIDE:
        height, width = (max(1, round(side * MAP_SIDE / longest)) for side in values.shape[2:])
        values = nn.functional.adaptive_avg_pool2d(values, (height, width))
    scale = max(float(values.abs().max()), 1e-12)
    levels_HW = np.round(values[0, 0].numpy() / scale * LEVELS).astype(np.int64) + LEVELS
    picture = Image.fromarray(levels_HW.astype(np.uint8), mode="P")
    colours = [NEGATIVE if level < LEVELS else POSITIVE for level in range(2 * LEVELS + 1)]
    picture.putpalette([part for colour in colours for part in colour])
    opacity = bytes(round(255 * abs(level - LEVELS) / LEVELS) for level in range(2 * LEVELS + 1))
    return _png_uri(picture, transparency=opacity)


def _png_uri(picture: Any, **options: Any) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True, **options)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


@dataclass(frozen=True)
class Region:
    """One ninth of an image."""

    row: int
    column: int
    share: float
    """Of all values of one sign."""

    @property
    def name(self) -> str:
        """Such as "the upper left"."""
        return REGIONS[self.row][self.column]


def strongest_region(values_HW: np.ndarray, *, sign: int) -> Region | None:
    """The ninth of an image with the largest sum of values of one sign (1 or -1); None where there are none."""
    of_sign_HW = np.maximum(sign * _finite(values_HW), 0.0)
    total = float(of_sign_HW.sum())
    if total <= 0:
        return None
    tops, lefts = (np.linspace(0, side, 4).round().astype(int) for side in of_sign_HW.shape)
    sums = [
        [of_sign_HW[tops[row] : tops[row + 1], lefts[column] : lefts[column + 1]].sum() for column in range(3)]
        for row in range(3)
    ]
    row, column = divmod(int(np.argmax(sums)), 3)
    return Region(row, column, float(sums[row][column]) / total)


def _finite(values_HW: np.ndarray) -> np.ndarray:
    """float64, with 0 for NaN and infinity, which untrusted weights may contain."""
    return np.nan_to_num(values_HW.astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0)
