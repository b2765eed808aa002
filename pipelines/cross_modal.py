"""Two kinds of inputs of the same samples, joined by key: images for the teacher, measurements for the student."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from logitcache.catalog.datasets import Data, Selection, stratified_split
from logitcache.errors import UsageError

# N samples, H height, W width, F features

IMAGE, MEASUREMENT = "image", "measurement"


class Paired:
    """Images with a second input from another source: item i is ({"image", "measurement"}, target).

    Args:
        images: uint8 (N, H, W).
        keys: one for each image.
        targets: classes, int64 (N,).
        measurements: float32 (F,) by key; their order does not matter.

    Raises:
        UsageError: an image without a measurement; names its key.
    """

    in_memory = True

    def __init__(
        self, images: np.ndarray, keys: list[str], targets: np.ndarray, measurements: Mapping[str, np.ndarray]
    ) -> None:
        missing = [key for key in keys if key not in measurements]
        if missing:
            raise UsageError(f"{len(missing)} of {len(keys)} images have no measurement, the first is {missing[0]}")
        self.images = images
        self.keys = keys
        self.targets = targets
        self.measurements = [measurements[key] for key in keys]

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int) -> tuple[dict[str, Tensor], int]:
        image = torch.from_numpy(self.images[index]).float()[None] / 255
        return {IMAGE: image, MEASUREMENT: torch.from_numpy(self.measurements[index])}, int(self.targets[index])

    def content(self, index: int) -> bytes:
        """Both inputs."""
        return self.images[index].tobytes() + self.measurements[index].tobytes()


def digits(noise: float = 0.05, seed: int = 0) -> Data:
    """scikit-learn's digits, and the noisy sums of their rows and columns, which lie in another order."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = np.round(bunch.images * (255 / 16)).astype(np.uint8)
    keys = [f"digit-{number:04d}" for number in range(len(images))]
    everything = Paired(images, keys, bunch.target.astype(np.int64), measured(bunch.images / 16, keys, noise, seed))
    train, test = stratified_split(everything.targets, 0.2, "test")
    return Data(train=Selection(everything, train), test=Selection(everything, test), num_classes=10)


def measured(images_NHW: np.ndarray, keys: list[str], noise: float, seed: int) -> dict[str, np.ndarray]:
    """The sums of the rows and columns of each image, by key, in random order."""
    generator = np.random.RandomState(seed)
    sums_NF = np.concatenate([images_NHW.mean(axis=2), images_NHW.mean(axis=1)], axis=1)
    sums_NF = (sums_NF + noise * generator.standard_normal(sums_NF.shape)).astype(np.float32)
    return {keys[number]: sums_NF[number] for number in generator.permutation(len(keys))}


def only(name: str) -> Callable[[Any], Any]:
    """A model's `input` that takes one of the inputs of a sample."""

    def take(value: Any) -> Any:
        return value[name]

    return take
