"""Where and how work runs, apart from what is computed."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class Context:
    """The settings that functions below `config/` take beside built objects; results don't depend on them."""

    device: torch.device
    num_workers: int = 0
    """DataLoader workers; 0 renders in the main process."""
    trust: bool = False
    """Whether entry points outside the working directory may run."""
