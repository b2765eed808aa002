"""S1's data: 100 random rows of 10 features in two classes, and rows of the same shape whose class follows a rule."""

from __future__ import annotations

import torch
from torch import Tensor

# N samples, F features

ROWS, FEATURES = 100, 10


class FeatureRows:
    """Rows of features with their classes."""

    in_memory = True
    num_classes = 2

    def __init__(self, features_NF: Tensor, targets: Tensor) -> None:
        self.features_NF = features_NF
        self.targets = targets.numpy()

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.features_NF[index], int(self.targets[index])

    def content(self, index: int) -> bytes:
        """The row's bytes."""
        return self.features_NF[index].numpy().tobytes()


def random_rows(seed: int = 0) -> dict[str, FeatureRows]:
    """100 rows of noise with random classes, and 1 000 test rows of other noise."""
    generator = torch.Generator().manual_seed(seed)

    def split(num_rows: int) -> FeatureRows:
        features_NF = torch.randn(num_rows, FEATURES, generator=generator)
        return FeatureRows(features_NF, torch.randint(2, (num_rows,), generator=generator))

    return {"train": split(ROWS), "test": split(1000)}


def rule_rows(seed: int = 0, noise: float = 0.2) -> dict[str, FeatureRows]:
    """100 rows whose class depends on three features; a fifth have the wrong class. Test rows have no label noise."""
    generator = torch.Generator().manual_seed(seed)

    def split(num_rows: int, share: float) -> FeatureRows:
        features_NF = torch.randn(num_rows, FEATURES, generator=generator)
        targets = (features_NF[:, 0] + features_NF[:, 1] * features_NF[:, 2] > 0).long()
        flipped = torch.rand(num_rows, generator=generator) < share
        return FeatureRows(features_NF, torch.where(flipped, 1 - targets, targets))

    return {"train": split(ROWS, noise), "test": split(2000, 0.0)}
