"""The dataset of pipeline.yaml: images and labels from an .npz file."""

from __future__ import annotations

import numpy as np
from PIL import Image


class Images:
    """A map-style dataset: `dataset[i]` is an image and its class number."""

    def __init__(self, images: np.ndarray, labels: np.ndarray) -> None:
        self.images = images  # uint8 (N, H, W) or (N, H, W, 3)
        self.targets = labels  # class numbers from 0, (N,)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.images[index]), int(self.targets[index])


def load(file: str) -> dict[str, Images]:
    """The training images, and the test images if there are any.

    `file` has the arrays train_images and train_labels, and optionally test_images and test_labels:

        np.savez("images.npz", train_images=..., train_labels=..., test_images=..., test_labels=...)
    """
    with np.load(file) as arrays:
        for name in ("train_images", "train_labels"):
            if name not in arrays:
                raise ValueError(f"{file} has no array {name}; it has: {', '.join(arrays)}")
        splits = {"train": Images(arrays["train_images"], arrays["train_labels"])}
        if "test_images" in arrays:
            splits["test"] = Images(arrays["test_images"], arrays["test_labels"])
    return splits
