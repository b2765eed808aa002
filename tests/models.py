"""Models and data that tests name as `tests.models:function`."""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn


def dropout_mlp(num_classes: int, inputs: int = 64) -> nn.Module:
    """A net with randomness of its own."""
    return nn.Sequential(nn.Flatten(), nn.Linear(inputs, 32), nn.ReLU(), nn.Dropout(0.5), nn.Linear(32, num_classes))


def dropout_norm_mlp(num_classes: int, inputs: int = 64) -> nn.Module:
    """A net with randomness and running statistics of its own."""
    layers = [nn.Linear(inputs, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.5), nn.Linear(32, num_classes)]
    return nn.Sequential(nn.Flatten(), *layers)


def nan_mlp(num_classes: int, inputs: int = 64) -> nn.Module:
    """A net that gives NaN."""
    net = dropout_mlp(num_classes, inputs)
    nn.init.constant_(net[1].bias, float("nan"))  # type: ignore[arg-type]
    return net


def embedding_net(num_classes: int) -> nn.Module:
    """A net that gives embeddings of six values, and no logits."""
    del num_classes
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 6))


class FileTracker:
    """A tracker that writes a line of the file `$TRACKED` for each call."""

    def __init__(self, config: dict[str, Any]) -> None:
        self._write({"name": config["name"], "seed": config["seed"]})

    def log(self, values: dict[str, float], *, step: int) -> None:
        self._write({"step": step, **values})

    def finish(self) -> None:
        self._write({"finished": True})

    def _write(self, line: dict[str, Any]) -> None:
        with Path(os.environ["TRACKED"]).open("a") as file:
            file.write(json.dumps(line) + "\n")


def file_tracker(config: dict[str, Any]) -> FileTracker:
    return FileTracker(config)


class Pictures:
    """Real digits with keys of their own, from which tests take away, reorder, relabel and change."""

    num_classes = 10

    def __init__(
        self,
        count: int = 40,
        order: Sequence[int] | None = None,
        relabel: int | None = None,
        repaint: int | None = None,
        unreadable: int | None = None,
        beyond: int | None = None,
    ) -> None:
        from sklearn.datasets import load_digits

        bunch = load_digits()
        images = np.round(bunch.images[:count] * (255 / 16)).astype(np.uint8)
        targets = bunch.target[:count].copy()
        if relabel is not None:
            targets[relabel] = (targets[relabel] + 1) % 10
        if beyond is not None:
            targets[beyond] = 10
        if repaint is not None:
            images[repaint, 0, 0] ^= 255
        chosen = list(range(count)) if order is None else list(order)
        self.images, self.targets = images[chosen], targets[chosen]
        self.keys = [f"scan/{index:04d}.png" for index in chosen]
        self.unreadable = unreadable

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        if self.unreadable == index:
            raise OSError("image file is truncated (17 bytes not processed)")
        return Image.fromarray(self.images[index]), int(self.targets[index])


def pictures(**kwargs: object) -> Pictures:
    return Pictures(**kwargs)  # type: ignore[arg-type]


def digits() -> dict[str, Pictures]:
    """A quarter of the catalog's digits: 360 for training and validation and 90 for the test."""
    return {"train": Pictures(450, order=range(360)), "test": Pictures(450, order=range(360, 450))}


def few_digits() -> dict[str, Pictures]:
    """96 digits for training and 32 for the test."""
    return {"train": Pictures(128, order=range(96)), "test": Pictures(128, order=range(96, 128))}


def shift(by: int) -> Callable[[Image.Image], Image.Image]:
    """A transform of the user's own, made by a function."""
    return lambda image: image.transform(image.size, Image.Transform.AFFINE, (1, 0, by, 0, 1, 0))


class Distances(nn.Module):
    """Nearest centre by squared distance: no matrix product, no convolution."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.centres = nn.Parameter(torch.randn(num_classes))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return -((inputs.flatten(1).amax(dim=1, keepdim=True) - self.centres).abs())


class Noisy(nn.Module):
    """A net that draws random numbers even when it is only asked."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.head = nn.Linear(64, num_classes)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        logits = self.head(inputs.flatten(1))
        return logits + 0.01 * torch.rand_like(logits)


class Branching(nn.Module):
    """A net whose path depends on the values that it is given."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.head = nn.Linear(64, num_classes)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(inputs.flatten(1))
        return logits * 2 if float(inputs.mean()) > 0.3 else logits


class TwoHeads(nn.Module):
    """A teacher of two tasks, with a trunk that features are taken from; gives both heads' logits."""

    def __init__(self, num_classes: int, width: int = 6) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(inplace=True))
        self.digit = nn.Linear(width, num_classes)
        self.parity = nn.Linear(width, 2)

    def forward(self, inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        pooled = self.trunk(inputs).mean(dim=(2, 3))
        return {"digit": self.digit(pooled), "parity": self.parity(pooled)}


class TwoHeadedStudent(nn.Module):
    """A student of two tasks, whose own logits are those of the first."""

    def __init__(self, num_classes: int, width: int = 4) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Conv2d(1, width, 3, stride=2, padding=1), nn.ReLU())
        self.digit = nn.Linear(width, num_classes)
        self.parity = nn.Linear(width, 2)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        pooled = self.trunk(inputs).mean(dim=(2, 3))
        self.parity(pooled)
        logits: torch.Tensor = self.digit(pooled)
        return logits


def plain_cnn(num_classes: int, width: int = 4) -> nn.Module:
    """A net of maps without batch norm, whose every parameter counts."""
    maps = [nn.Conv2d(1, width, 3, stride=2, padding=1), nn.ReLU()]
    return nn.Sequential(*maps, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, num_classes))


class Headed(nn.Module):
    """A net whose last layer is named `head`."""

    def __init__(self, num_classes: int, width: int = 8) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.ReLU())
        self.head = nn.Linear(width, num_classes, bias=False)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(self.layers(inputs))
        return logits


class NextToken(nn.Module):
    """A causal language model of a few thousand parameters: an embedding, a recurrent layer and a head."""

    def __init__(self, num_classes: int, width: int = 16, seed: int = 0) -> None:
        super().__init__()
        self.embedding = nn.Embedding(num_classes, width)
        self.layer = nn.GRU(width, width, batch_first=True)
        self.head = nn.Linear(width, num_classes)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        hidden, _ = self.layer(self.embedding(input_ids))
        logits: torch.Tensor = self.head(hidden)
        return logits
