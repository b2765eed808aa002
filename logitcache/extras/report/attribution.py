"""Which pixels a model's decision depends on: integrated gradients, by captum.

Integrated gradients (Sundararajan et al. 2017, arXiv:1703.01365) need only gradients with respect to the input, so they
work for any student and teacher. They add up to the log-probability of the decision minus that of a black image.
GradCAM needs convolutions, and gradient times input has no such sum.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from logitcache.catalog.calling import model_logits
from logitcache.errors import UsageError

# B batch, C classes, H height, W width

STEPS = 50
"""Nodes of the Gauss-Legendre rule between black and the image."""
PASS_SIZE = 16
"""Inputs per forward pass, which bounds the memory that large teachers need."""


@dataclass(frozen=True)
class Attribution:
    """The contribution of each pixel to a decision."""

    values: np.ndarray
    """float32 (H, W), in nats, summed over channels."""
    gap: float
    """Difference between the sum of values and the change in log-probability, in nats."""


def attributions(model: nn.Module, inputs: Tensor, black: Tensor, classes: Tensor) -> list[Attribution]:
    """Integrated gradients of the log-probability of one class for each input.

    The log-probability is used because logits are defined up to a constant per row, which differs between models.

    Args:
        model: in evaluation mode, on the CPU.
        inputs: images after the model's input transform, float32 (B, channels, H, W).
        black: black images after the same transform.
        classes: int64 (B,).

    Raises:
        UsageError: the model has no gradient with respect to its input.
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
        reason = str(error).splitlines()[0][:120]
        raise UsageError(f"the model has no gradient with respect to its input ({reason})") from error
    maps_BHW = found.detach().float().sum(dim=1).numpy()
    if not np.isfinite(maps_BHW).all():
        raise UsageError("gradients with respect to the input are not finite")
    return [Attribution(values_HW, float(gap)) for values_HW, gap in zip(maps_BHW, gaps.tolist(), strict=True)]
