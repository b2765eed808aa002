"""The dataset of pipeline.yaml: a Hugging Face dataset of images."""

from __future__ import annotations

from typing import Any

from datasets import load_dataset


class Images:
    """A map-style dataset: `dataset[i]` is an image and its class number."""

    def __init__(self, split: Any, image: str, label: str) -> None:
        self.split, self.image = split, image
        self.targets = split[label][:]  # class numbers from 0
        self.class_names = split.features[label].names

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.split[index][self.image].convert("RGB"), self.targets[index]


def load(path: str, image: str, label: str) -> dict[str, Images]:
    """The training split, and the test split if there is one; downloads the dataset the first time."""
    splits = load_dataset(path)
    return {name: Images(splits[name], image, label) for name in ("train", "test") if name in splits}
