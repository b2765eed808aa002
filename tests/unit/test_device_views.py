"""Views that are finished on the device: the same pixels, in a batch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.transforms import v2

import logitcache
from logitcache.data.device_views import device_steps
from logitcache.data.transforms import build_transform
from logitcache.data.views import Mixing, ViewDataset, ViewPlan
from logitcache.errors import ShapeError, UsageError

SAMPLES = 24
NORMALIZE = [{"Normalize": {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.25]}}]
CROPS = v2.RandomResizedCrop(16, scale=(0.3, 1.0))


class Images:
    """Images of one kind: PIL, colour or grey, or bytes as arrays (H, W, C) or tensors (C, H, W)."""

    def __init__(self, kind: str) -> None:
        shape = (SAMPLES, 20, 24) if kind == "grey" else (SAMPLES, 20, 24, 3)
        self.images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
        self.kind = kind

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image = self.images[index]
        if self.kind == "tensor":
            return torch.from_numpy(image).permute(2, 0, 1), index % 5
        return (image if self.kind == "array" else Image.fromarray(image)), index % 5


MIXINGS = [Mixing(), Mixing(mixup=0.8), Mixing(cutmix=1.0), Mixing(mixup=0.5, cutmix=1.0, probability=0.7)]


@pytest.mark.parametrize("mixing", MIXINGS, ids=["plain", "mixup", "cutmix", "some of both"])
@pytest.mark.parametrize("kind", ["image", "grey", "array", "tensor"])
def test_pixels_are_those_of_the_workers(kind: str, mixing: Mixing) -> None:
    normalize = None if kind == "grey" else build_transform(NORMALIZE)
    crops = None if kind == "array" else CROPS
    plan = ViewPlan(transform=crops, seed=7, mixing=mixing, num_classes=5, preprocess=normalize)
    there, here = ViewDataset(Images(kind), plan, on_device=True), ViewDataset(Images(kind), plan)
    batches = [
        list(DataLoader(views, batch_size=10, sampler=[(view, index) for view in (0, 3) for index in range(SAMPLES)]))
        for views in (here, there)
    ]

    for (index, expected, targets), (other_index, inputs, other_targets) in zip(*batches, strict=True):
        found = there.finish(inputs)
        assert torch.equal(index, other_index)
        assert torch.equal(targets, other_targets)
        assert (expected.dtype, torch.float32) == (found.dtype, found.dtype)
        assert torch.equal(expected, found)
        sent = sum(each.nbytes for each in inputs.values()) if mixing.active else inputs.nbytes
        assert sent < expected.nbytes * (0.55 if mixing.active else 0.26)


@pytest.mark.parametrize("mixing", MIXINGS[:3], ids=["plain", "mixup", "cutmix"])
def test_proofs_are_those_of_the_workers(mixing: Mixing) -> None:
    plan = ViewPlan(transform=CROPS, seed=7, mixing=mixing, num_classes=5, preprocess=build_transform(NORMALIZE))

    expected = ViewDataset(Images("image"), plan).input_digests(2)
    assert expected == ViewDataset(Images("image"), plan, on_device=True).input_digests(2)


def test_inputs_of_other_views_stay_as_they_are() -> None:
    views = ViewDataset(Images("image"), ViewPlan(transform=CROPS))
    inputs = views.batch([(0, 1)])

    assert inputs is views.finish(inputs)


def test_only_normalize_runs_on_the_device() -> None:
    steps = device_steps(v2.Compose([v2.Compose([v2.Normalize([0.5], [0.5])])]))

    assert ["Normalize"] == [type(step).__name__ for step in steps]
    with pytest.raises(UsageError, match="views.on_device: Resize runs on single samples, before they are a batch"):
        device_steps(build_transform([{"Resize": {"size": 8}}, *NORMALIZE]))


@pytest.mark.parametrize("value", [torch.zeros(3, 4, 4), np.zeros(5), "text"], ids=["floats", "numbers", "text"])
def test_samples_that_are_no_bytes_are_refused(value: Any) -> None:
    class Others(Images):
        def __getitem__(self, index: int) -> tuple[Any, int]:
            return value, 0

    with pytest.raises(UsageError, match="views.on_device sends images as bytes, and views.transform gives"):
        ViewDataset(Others("image"), ViewPlan(), on_device=True)[(0, 0)]


def test_images_of_different_sizes_are_not_mixed() -> None:
    class Sizes(Images):
        def __getitem__(self, index: int) -> tuple[Any, int]:
            return Image.fromarray(self.images[index][: 10 + index]), 0

    plan = ViewPlan(mixing=Mixing(mixup=1.0), num_classes=5)
    with pytest.raises(ShapeError, match="mixup and CutMix need views of one size"):
        ViewDataset(Sizes("image"), plan, on_device=True)[(0, 0)]


def test_a_cache_checks_batches_of_bytes(tmp_path: Any) -> None:
    plan = ViewPlan(transform=CROPS, seed=7, preprocess=build_transform(NORMALIZE))
    views = ViewDataset(Images("image"), plan, on_device=True)
    with logitcache.create(
        tmp_path / "a", num_samples=SAMPLES, num_classes=5, teacher="t", dataset="d", view_plan=plan
    ) as writer:
        logits = torch.randn(SAMPLES, 5, generator=torch.Generator().manual_seed(0))
        writer.write(view=0, start=0, logits=logits, input_digests=views.input_digests(0))
    cache = logitcache.open(tmp_path / "a")
    cache.check_plan(plan)
    index, inputs, _ = next(iter(DataLoader(views, batch_size=8)))

    assert 2 == cache.check_batch(index, inputs, views=views)
    assert torch.uint8 == inputs.dtype
