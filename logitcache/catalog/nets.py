"""Small models: MLP, CNN, and the CIFAR ResNets of He et al. 2016 (arXiv:1512.03385, section 4.2)."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from logitcache.errors import UsageError


class MLP(nn.Module):
    """Fully connected layers with ReLU between them, on flattened inputs."""

    def __init__(self, input_shape: Sequence[int], num_classes: int, hidden: Sequence[int] = (256,)) -> None:
        super().__init__()
        inputs = 1
        for side in input_shape:
            inputs *= side
        layers: list[nn.Module] = []
        for width in hidden:
            layers += [nn.Linear(inputs, width), nn.ReLU()]
            inputs = width
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(inputs, num_classes)

    def forward(self, inputs: Tensor) -> Tensor:
        logits: Tensor = self.head(self.body(inputs.flatten(1)))
        return logits


class CNN(nn.Module):
    """Blocks of convolution, batch norm, ReLU and 2x2 max pooling, then global average pooling."""

    def __init__(self, input_shape: Sequence[int], num_classes: int, widths: Sequence[int] = (32, 64, 128)) -> None:
        super().__init__()
        channels = _channels(input_shape, "cnn")
        blocks: list[nn.Module] = []
        for width in widths:
            blocks += [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            blocks += [nn.MaxPool2d(2)]
            channels = width
        self.body = nn.Sequential(*blocks)
        self.head = nn.Linear(channels, num_classes)

    def forward(self, inputs: Tensor) -> Tensor:
        logits: Tensor = self.head(self.body(inputs).mean(dim=(2, 3)))
        return logits


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with a shortcut, which is strided and zero-padded where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.stride = stride
        self.padding = outputs - inputs

    def forward(self, inputs: Tensor) -> Tensor:
        out = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(inputs)))))
        shortcut = inputs[:, :, :: self.stride, :: self.stride]
        return F.relu(out + F.pad(shortcut, (0, 0, 0, 0, 0, self.padding)))


class CIFARResNet(nn.Module):
    """A ResNet of 6n + 2 layers for small images: three stages of n blocks with w, 2w and 4w channels."""

    def __init__(self, input_shape: Sequence[int], num_classes: int, depth: int = 20, width: int = 16) -> None:
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            raise UsageError(f"a CIFAR ResNet has 6n + 2 layers (8, 14, 20, 32, 44, 56, 110), not {depth}")
        self.stem = nn.Conv2d(_channels(input_shape, "cifar_resnet"), width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        blocks: list[nn.Module] = []
        channels = width
        for stage in range(3):
            for number in range((depth - 2) // 6):
                stride = 2 if stage > 0 and number == 0 else 1
                blocks.append(BasicBlock(channels, width * 2**stage, stride))
                channels = width * 2**stage
        self.body = nn.Sequential(*blocks)
        self.head = nn.Linear(channels, num_classes)

    def forward(self, inputs: Tensor) -> Tensor:
        features = self.body(F.relu(self.norm(self.stem(inputs))))
        logits: Tensor = self.head(features.mean(dim=(2, 3)))
        return logits


def _channels(input_shape: Sequence[int], name: str) -> int:
    if len(input_shape) != 3:
        raise UsageError(
            f"model {name!r} expects images (channels, height, width), not inputs of shape {tuple(input_shape)}"
        )
    return int(input_shape[0])
