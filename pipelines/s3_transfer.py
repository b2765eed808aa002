"""S3's teachers: frozen features of a net trained on ImageNet, and a new head."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

# B batch


class FrozenFeatures(nn.Module):
    """Frozen features, batch-norm statistics included, and a trainable head.

    Args:
        features: gives (B, F, H, W) or (B, F).
        num_features: F.
        hidden: units of the head's hidden layer.
        num_classes: C.
    """

    def __init__(self, features: nn.Module, num_features: int, hidden: int, num_classes: int) -> None:
        super().__init__()
        self.features = features.requires_grad_(False)
        self.head = nn.Sequential(nn.Linear(num_features, hidden), nn.ReLU(), nn.Linear(hidden, num_classes))

    def train(self, mode: bool = True) -> FrozenFeatures:
        """Set the mode of the head; the features stay in evaluation mode."""
        super().train(mode)
        self.features.eval()
        return self

    def forward(self, inputs: Tensor) -> Tensor:
        with torch.no_grad():
            features = self.features(inputs)
        logits: Tensor = self.head(features.mean(dim=(2, 3)) if features.ndim == 4 else features)
        return logits


def vgg16(num_classes: int, hidden: int = 1024) -> FrozenFeatures:
    """VGG-16's convolutions with torchvision's ImageNet weights; takes 224 px, with torchvision's normalisation."""
    from torchvision.models import VGG16_Weights
    from torchvision.models import vgg16 as build

    return FrozenFeatures(build(weights=VGG16_Weights.IMAGENET1K_V1).features, 512, hidden, num_classes)


def efficientnet_lite0(num_classes: int, hidden: int = 1024) -> FrozenFeatures:
    """EfficientNet-Lite0's features with the ImageNet weights of an installed package; takes RGB in [-1, 1]."""
    from pipelines.foolbox20 import efficientnet_lite0 as build

    return FrozenFeatures(_ExtractedFeatures(build()), 1280, hidden, num_classes)


class _ExtractedFeatures(nn.Module):
    def __init__(self, net: Any) -> None:
        super().__init__()
        self.net = net

    def forward(self, inputs: Tensor) -> Tensor:
        features: Tensor = self.net.extract_features(inputs)
        return features
