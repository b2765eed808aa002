"""Parts of the search for quantized coefficients by their divergence and their bits."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from logitcache.encodings.packing import LARGEST

# B batch, R rank, J coefficients changed in a round

FLIPS = 8
"""Coefficients that can change in one round of the search."""
FORBIDDEN = 64.0
"""Cost of a step beyond the limit, in nats."""


def costs_of_steps(steps: Tensor, bit_costs: Tensor, limit: Tensor, bit_price: float) -> tuple[Tensor, Tensor]:
    """The cost of the bits of a step up and of a step down, in nats; prohibitive beyond the limit.

    Args:
        steps: whole numbers (B, R), or of some components (B, J).
        bit_costs: as `bit_costs_of` gives them, of these components.
        limit: largest magnitudes of these components.
        bit_price: nats for a bit.
    """
    away, nonzero = bit_price * bit_costs
    magnitude = steps.abs()
    grown = away + nonzero * (magnitude == 0) + FORBIDDEN * (magnitude >= limit)
    shrunk = -away - nonzero * (magnitude == 1)
    return torch.where(steps >= 0, grown, shrunk), torch.where(steps <= 0, grown, shrunk)


def best_of_each_group(change_BR: Tensor) -> tuple[Tensor, Tensor]:
    """The smallest entry and its column in each of `FLIPS` groups of columns, smallest first; both (B, J)."""
    num_groups = min(FLIPS, change_BR.shape[1])
    padded_BR = F.pad(change_BR, (0, -change_BR.shape[1] % num_groups), value=math.inf)
    # Adjacent columns are in different groups. Selecting the J smallest of all columns takes ten times as long.
    change_BJ, place_BJ = padded_BR.view(len(padded_BR), -1, num_groups).min(dim=1)
    change_BJ, order_BJ = change_BJ.sort(dim=1)
    return change_BJ, (place_BJ * num_groups + torch.arange(num_groups, device=place_BJ.device)).gather(1, order_BJ)


def bit_costs_of(steps_BR: Tensor) -> np.ndarray:
    """Bits for each step away from zero and extra bits for the first, float32 (2, R), for geometric magnitudes."""
    num_rows = len(steps_BR)
    nonzero_R = (steps_BR != 0).float().sum(dim=0) + 0.5
    further_R = 1.0 - nonzero_R / (steps_BR.abs().sum(dim=0) + 1.0)
    away_R = -further_R.clamp(1e-3, 0.999).log2()
    p_nonzero_R = (nonzero_R / (num_rows + 1)).clamp(max=0.999)
    one_R = -(0.5 * p_nonzero_R * (1.0 - further_R)).log2()
    return torch.stack([away_R, one_R + (1.0 - p_nonzero_R).log2() - away_R]).numpy().astype(np.float32)


def limits_of(steps_BR: Tensor) -> np.ndarray:
    """The largest magnitude of each coefficient, uint16 (R,); rare large values of small coefficients are cut off."""
    magnitudes_BR = steps_BR.abs()
    common_R = torch.quantile(magnitudes_BR, 0.98, dim=0).ceil()
    limits_R = torch.where(common_R <= 3, common_R, magnitudes_BR.amax(dim=0))
    return limits_R.clamp(1, LARGEST).numpy().astype(np.uint16)
