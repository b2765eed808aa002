"""Segmentation with a row for each pixel: digits on a canvas, a U-Net as the teacher, a small net as the student."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

# N samples, B batch, C channels or classes, H height, W width

CANVAS, DIGIT = 24, 8
CLASS_NAMES = ["background", *map(str, range(10))]


class Canvases:
    """Images with a class for each pixel: item i is (float32 (1, H, W), int64 (H * W,)).

    Args:
        images: uint8 (N, H, W).
        masks: the class of each pixel, uint8 (N, H, W).
    """

    in_memory = True
    class_names = CLASS_NAMES

    def __init__(self, images: np.ndarray, masks: np.ndarray) -> None:
        self.images = images
        self.masks = masks
        self.rows_per_sample = np.full(len(images), images[0].size)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image = torch.from_numpy(self.images[index]).float() / 255
        return image[None], torch.from_numpy(self.masks[index]).long().flatten()

    def content(self, index: int) -> bytes:
        """Pixels and classes."""
        return self.images[index].tobytes() + self.masks[index].tobytes()


def digits(train: int = 500, validation: int = 100, test: int = 300, seed: int = 0) -> dict[str, Canvases]:
    """Three of scikit-learn's digits on each canvas, with stripes in the background; splits have different digits."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    generator = np.random.RandomState(seed)
    order = generator.permutation(len(bunch.target))
    sources = {"train": order[:1200], "validation": order[1200:1400], "test": order[1400:]}
    sizes = {"train": train, "validation": validation, "test": test}
    return {
        split: _canvases(bunch.images[chosen], bunch.target[chosen], sizes[split], generator)
        for split, chosen in sources.items()
    }


def _canvases(images: np.ndarray, targets: np.ndarray, count: int, generator: np.random.RandomState) -> Canvases:
    canvases = np.zeros((count, CANVAS, CANVAS))
    masks = np.zeros((count, CANVAS, CANVAS), dtype=np.uint8)
    for canvas, mask in zip(canvases, masks, strict=True):
        canvas[generator.randint(CANVAS, size=3)] = generator.uniform(0.2, 0.6)
        canvas[:, generator.randint(CANVAS, size=3)] = generator.uniform(0.2, 0.6)
        for number in generator.randint(len(images), size=3):
            top, left = generator.randint(CANVAS - DIGIT + 1, size=2)
            place = slice(top, top + DIGIT), slice(left, left + DIGIT)
            ink = images[number] / 16
            canvas[place] = np.maximum(canvas[place], ink)
            mask[place][ink > 0.4] = targets[number] + 1
    return Canvases(np.round(canvases * 255).astype(np.uint8), masks)


class UNet(nn.Module):
    """Three scales with skip connections (Ronneberger et al. 2015, arXiv:1505.04597): logits (B, C, H, W)."""

    def __init__(self, input_shape: Sequence[int], num_classes: int, width: int = 16) -> None:
        super().__init__()
        self.down = nn.ModuleList([_block(input_shape[0], width), _block(width, 2 * width)])
        self.bottom = _block(2 * width, 4 * width)
        self.up = nn.ModuleList([_block(6 * width, 2 * width), _block(3 * width, width)])
        self.head = nn.Conv2d(width, num_classes, 1)

    def forward(self, images: Tensor) -> Tensor:
        skipped, features = [], images
        for block in self.down:
            skipped.append(block(features))
            features = nn.functional.max_pool2d(skipped[-1], 2)
        features = self.bottom(features)
        for block in self.up:
            features = nn.functional.interpolate(features, scale_factor=2.0)
            features = block(torch.cat([features, skipped.pop()], dim=1))
        logits: Tensor = self.head(features)
        return logits


def small_net(input_shape: Sequence[int], num_classes: int, width: int = 12) -> nn.Sequential:
    """Dilated convolutions at full resolution."""
    layers: list[nn.Module] = []
    channels = input_shape[0]
    for dilation in (1, 2, 4):
        layers += [nn.Conv2d(channels, width, 3, padding=dilation, dilation=dilation, bias=False)]
        layers += [nn.BatchNorm2d(width), nn.ReLU()]
        channels = width
    return nn.Sequential(*layers, nn.Conv2d(width, num_classes, 1))


def _block(inputs: int, outputs: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for channels in (inputs, outputs):
        layers += [nn.Conv2d(channels, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers)
