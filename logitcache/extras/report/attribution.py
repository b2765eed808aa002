"""Why a net decided as it did: integrated gradients of its decision, a number for each place of its input.

Integrated gradients (Sundararajan et al. 2017, arXiv:1703.01365) ask for nothing but gradients of the input, so any
student and any teacher has them, and they add up to what they explain: the log-probability of the decision less that
of a black image. GradCAM needs convolutions, and a gradient times its input has no such sum.
"""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from logitcache.catalog.calling import model_logits
from logitcache.errors import UsageError

# B batch, C classes, H height, W width

STEPS = 50
"""Gradients along the way from black to the image, at the nodes of a Gauss-Legendre rule."""
PASS_SIZE = 16
"""Inputs of one pass, so that large teachers fit into memory."""
MAP_SIDE = 56
"""Pixels of a map's longer side on the page."""
LEVELS = 15
"""Strengths of each sign that a map shows."""
POSITIVE, NEGATIVE = (217, 95, 2), (31, 111, 180)
"""Orange and blue: apart for every kind of colour vision, and visible on light and dark pages."""
PLACES = (
    ("the upper left", "the top", "the upper right"),
    ("the left", "the centre", "the right"),
    ("the lower left", "the bottom", "the lower right"),
)  # fmt: skip


@dataclass(frozen=True)
class Attribution:
    """What speaks for a decision and what against it, by place."""

    values: np.ndarray
    """float32 (H, W), in nats; channels are summed."""
    gap: float
    """What the sum misses of the difference that it should be, in nats."""


def attributions(model: nn.Module, inputs: Tensor, black: Tensor, classes: Tensor) -> list[Attribution]:
    """Integrated gradients of the log-probability of one class for each input.

    The log-probability rather than the logit: logits are right up to a constant a row, which differs between nets.

    Args:
        model: in evaluation mode, on the CPU.
        inputs: images as the model takes them, float32 (B, channels, H, W).
        black: black images as the model takes them, likewise.
        classes: int64 (B,).

    Raises:
        UsageError: the model has no gradient by its input.
    """
    from captum.attr import IntegratedGradients

    def log_p(images: Tensor) -> Tensor:
        return torch.log_softmax(model_logits(model, images).float(), dim=1)

    try:
        found, gaps = IntegratedGradients(log_p, multiply_by_inputs=True).attribute(
            inputs, black, target=classes, n_steps=STEPS, method="gausslegendre",
            internal_batch_size=PASS_SIZE, return_convergence_delta=True,
        )  # fmt: skip
    except RuntimeError as error:
        raise UsageError(f"has no gradient by its input ({str(error).splitlines()[0][:120]})") from error
    maps_BHW = found.detach().float().sum(dim=1).numpy()
    if not np.isfinite(maps_BHW).all():
        raise UsageError("its gradients by its input are not finite")
    return [Attribution(values_HW, float(gap)) for values_HW, gap in zip(maps_BHW, gaps.tolist(), strict=True)]


def signed_picture(values_HW: np.ndarray) -> str:
    """Signed values as a PNG inside a URI: orange where positive, blue where negative, clear where nothing is."""
    from PIL import Image

    values = torch.from_numpy(_finite(values_HW))[None, None].float()
    largest_side = max(values.shape[2:])
    if largest_side > MAP_SIDE:
        height, width = (max(1, round(side * MAP_SIDE / largest_side)) for side in values.shape[2:])
        values = nn.functional.adaptive_avg_pool2d(values, (height, width))
    scale = max(float(values.abs().max()), 1e-12)
    levels_HW = np.round(values[0, 0].numpy() / scale * LEVELS).astype(np.int64) + LEVELS
    picture = Image.fromarray(levels_HW.astype(np.uint8), mode="P")
    colours = [NEGATIVE if level < LEVELS else POSITIVE for level in range(2 * LEVELS + 1)]
    picture.putpalette([part for colour in colours for part in colour])
    opacity = bytes(round(255 * abs(level - LEVELS) / LEVELS) for level in range(2 * LEVELS + 1))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True, transparency=opacity)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


@dataclass(frozen=True)
class Strongest:
    """Where one sign of a map is strongest: a ninth of the image."""

    row: int
    column: int
    share: float
    """Of all that has this sign."""

    @property
    def place(self) -> str:
        """In words."""
        return PLACES[self.row][self.column]


def strongest(values_HW: np.ndarray, *, sign: int) -> Strongest | None:
    """The ninth of an image where the values of one sign (1 or -1) weigh most; None where there is none."""
    of_sign_HW = np.maximum(sign * _finite(values_HW), 0.0)
    total = float(of_sign_HW.sum())
    if total <= 0:
        return None
    thirds = [[int(place) for place in np.linspace(0, side, 4).round()] for side in of_sign_HW.shape]
    sums = [
        [
            float(of_sign_HW[thirds[0][row] : thirds[0][row + 1], thirds[1][column] : thirds[1][column + 1]].sum())
            for column in range(3)
        ]
        for row in range(3)
    ]
    row, column = divmod(int(np.argmax(sums)), 3)
    return Strongest(row, column, sums[row][column] / total)


def _finite(values_HW: np.ndarray) -> np.ndarray:
    """Values with 0 for NaN and infinity, float64: weights may be a stranger's."""
    return np.nan_to_num(values_HW.astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0)
