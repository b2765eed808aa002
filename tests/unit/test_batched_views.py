"""Random steps that run on a batch: each image has its own parameters, and the same pixels in any batch."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

import logitcache
from logitcache.config.schema import Pipeline
from logitcache.data.batched_views import TOLERANCE, BatchedColor, BatchedCrop, BatchedFlip, apply_all, draw_all
from logitcache.data.transforms import build_transform
from logitcache.data.views import Mixing, ViewDataset, ViewPlan
from logitcache.errors import UsageError
from logitcache.stages.cache_teacher import cache_teacher
from tests.conftest import FEW_DIGITS
from tests.unit.test_device_views import MIXINGS, NORMALIZE, SAMPLES, Images

STEPS = [
    {"CenterCrop": {"size": 18}},
    {"batched_crop": {"size": [16, 14], "scale": [0.2, 0.8]}},
    {"batched_color": {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4}},
    {"batched_flip": {"horizontal": 0.3, "vertical": 0.5}},
]
FEW_DRAWS = 2000


def plan_of(mixing: Mixing | None = None, steps: Any = STEPS, *, normalize: bool = True) -> ViewPlan:
    return ViewPlan(
        transform=build_transform(steps),
        seed=7,
        mixing=mixing or Mixing(),
        num_classes=5,
        preprocess=build_transform(NORMALIZE) if normalize else None,
    )


@pytest.mark.parametrize("mixing", MIXINGS, ids=["plain", "mixup", "cutmix", "some of both"])
@pytest.mark.parametrize("kind", ["image", "grey", "tensor"])
def test_pixels_on_the_device_are_those_of_the_workers(kind: str, mixing: Mixing) -> None:
    plan = plan_of(mixing, normalize=kind != "grey")
    there, here = ViewDataset(Images(kind), plan, on_device=True), ViewDataset(Images(kind), plan)
    places = [[(view, sample) for sample in range(start, start + 8)] for view in (0, 3) for start in (0, 8, 16)]

    for sent, whole in zip(
        DataLoader(there, batch_sampler=places, num_workers=1), DataLoader(here, batch_sampler=places), strict=True
    ):
        assert torch.equal(whole[0], sent[0])
        assert torch.equal(whole[2], sent[2])
        assert (8, 1 if kind == "grey" else 3, 16, 14) == tuple(whole[1].shape)
        assert torch.equal(whole[1], there.finish(sent[1]))


@pytest.mark.parametrize("mixing", [Mixing(), Mixing(mixup=0.5, cutmix=1.0)], ids=["plain", "mixed"])
def test_a_view_of_an_image_does_not_depend_on_its_batch(mixing: Mixing) -> None:
    views = ViewDataset(Images("image"), plan_of(mixing), on_device=True)
    alone = [views.finish(views.batch([(1, sample)]))[0] for sample in range(SAMPLES)]
    backwards = views.finish(views.batch([(1, sample) for sample in reversed(range(SAMPLES))]))

    assert torch.equal(torch.stack(alone), backwards.flip(0))


def test_every_image_and_every_view_has_its_own_parameters() -> None:
    views = ViewDataset(Images("image"), plan_of(), on_device=True)
    parameters = views.batch([(view, sample) for view in range(4) for sample in range(SAMPLES)])["parameters"]

    assert (4 * SAMPLES, 10) == tuple(parameters.shape)
    assert 4 * SAMPLES == len(parameters.unique(dim=0))


def test_proofs_are_those_of_the_workers_and_a_cache_checks_finished_batches(tmp_path: Path) -> None:
    plan = plan_of(Mixing(cutmix=1.0))
    views = ViewDataset(Images("image"), plan, on_device=True)
    digests = views.input_digests(0)
    assert ViewDataset(Images("image"), plan).input_digests(0) == digests
    with logitcache.create(
        tmp_path / "a", num_samples=SAMPLES, num_classes=5, teacher="t", dataset="d", view_plan=plan
    ) as writer:
        writer.write(view=0, start=0, logits=torch.randn(SAMPLES, 5), input_digests=digests)
    cache = logitcache.open(tmp_path / "a")
    cache.check_plan(plan)
    index, inputs, _ = next(iter(DataLoader(views, batch_size=8)))

    assert 2 == cache.check_batch(index, inputs, views=views)
    assert 2 == cache.check_batch(index, views.finish(inputs), views=views)


def test_caches_are_the_same_with_and_without_on_device(tiny: Callable[..., Pipeline], tmp_path: Path) -> None:
    steps = ["{batched_crop: {size: 8, scale: [0.5, 1.0]}}", "{batched_color: {contrast: 0.3}}", "{batched_flip: {}}"]
    transform = f"views.transform=[{', '.join(steps)}]"
    digests = [
        cache_teacher(
            tiny(*FEW_DIGITS, transform, f"views.on_device={name}", f"cache.path={tmp_path / name}")
        ).manifest.digest
        for name in ("true", "false")
    ]

    assert digests[0] == digests[1]


def test_the_whole_image_in_its_own_size_stays_as_it_is() -> None:
    images = torch.rand(3, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    crop = BatchedCrop(size=12, scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=0.0)
    color = BatchedColor()
    parameters = torch.stack([draw_all([crop, color], 12, 12) for _ in images])

    torch.testing.assert_close(images, apply_all([crop, color], images, parameters))


def test_a_crop_is_that_of_torchvision_without_antialiasing() -> None:
    images = torch.rand(2, 3, 20, 24, generator=torch.Generator().manual_seed(0))
    found = BatchedCrop(size=(9, 16)).apply(images, torch.tensor([[2.0, 3, 14, 12, 0], [0.0, 5, 20, 8, 1]]))
    for image, (top, left, height, width), flip, own in zip(
        images, [(2, 3, 14, 12), (0, 5, 20, 8)], [False, True], found, strict=True
    ):
        # torchvision repeats the pixels at the edge of the part; here, those of the image beyond it are used.
        expected = functional.resized_crop(image, top, left, height, width, [9, 16], antialias=False)
        expected = functional.horizontal_flip(expected) if flip else expected
        torch.testing.assert_close(expected[:, 1:-1, 1:-1], own[:, 1:-1, 1:-1], rtol=0, atol=1e-5)


def test_flips_are_those_of_torchvision_to_the_last_bit() -> None:
    images = torch.rand(4, 3, 6, 5, generator=torch.Generator().manual_seed(0))
    flips = [[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]
    found = BatchedFlip().apply(images, torch.tensor(flips))
    for image, (horizontal, vertical), own in zip(images, flips, found, strict=True):
        expected = functional.horizontal_flip(image) if horizontal else image
        expected = functional.vertical_flip(expected) if vertical else expected
        assert torch.equal(expected, own)


def test_a_flip_of_bytes_on_the_device_is_that_of_a_picture_on_a_worker() -> None:
    views = ViewDataset(Images("image"), ViewPlan(transform=BatchedFlip(horizontal=1.0)), on_device=True)
    flipped = ViewPlan(transform=v2.RandomHorizontalFlip(p=1.0))
    places = [(0, sample) for sample in range(SAMPLES)]

    assert torch.equal(ViewDataset(Images("image"), flipped).batch(places), views.finish(views.batch(places)))


def test_brightness_and_saturation_are_those_of_torchvision() -> None:
    images = torch.rand(2, 3, 6, 5, generator=torch.Generator().manual_seed(0))
    found = BatchedColor().apply(images, torch.tensor([[1.3, 1.0, 0.4], [0.7, 1.0, 1.5]]))
    for image, (brightness, saturation), own in zip(images, [(1.3, 0.4), (0.7, 1.5)], found, strict=True):
        expected = functional.adjust_saturation(functional.adjust_brightness(image, brightness), saturation)
        torch.testing.assert_close(expected, own, rtol=0, atol=2e-4)  # torchvision has GREY with four digits


def test_parts_and_flips_are_drawn_as_stated() -> None:
    random.seed(0)
    crop = BatchedCrop(size=8, scale=(0.25, 0.5), ratio=(1.0, 1.0), flip=0.25)
    top, left, height, width, flip = torch.tensor([crop.draw(16, 16) for _ in range(FEW_DRAWS)]).T

    assert torch.equal(height, width)
    assert bool(((height >= 8 - 1e-4) & (height <= 16 * 0.5**0.5 + 1e-4)).all())
    assert bool(((top >= 0) & (top + height <= 16 + 1e-4) & (left >= 0) & (left + width <= 16 + 1e-4)).all())
    assert abs(float(flip.mean()) - 0.25) < 4 * (0.25 * 0.75 / FEW_DRAWS) ** 0.5
    drawn = torch.tensor([BatchedFlip(horizontal=0.25, vertical=0.75).draw(16, 16) for _ in range(FEW_DRAWS)])
    for probability, mean in zip((0.25, 0.75), drawn.mean(dim=0).tolist(), strict=True):
        assert abs(mean - probability) < 4 * (0.25 * 0.75 / FEW_DRAWS) ** 0.5


def test_another_rounding_moves_a_pixel_by_less_than_the_stated_tolerance() -> None:
    """Arithmetic in double precision in the place of a device that fuses operations."""
    random.seed(0)
    steps = [BatchedCrop(size=64, scale=(0.1, 1.0)), BatchedColor(brightness=0.4, contrast=0.4, saturation=0.4)]
    images = torch.rand(16, 3, 256, 320, generator=torch.Generator().manual_seed(0))
    parameters = torch.stack([draw_all(steps, 256, 320) for _ in images])
    exact = apply_all(steps, images.double(), parameters.double())

    assert float((exact - apply_all(steps, images, parameters)).abs().max()) < TOLERANCE


def test_batched_steps_come_last() -> None:
    plan = ViewPlan(transform=v2.Compose([BatchedCrop(size=8), v2.GaussianBlur(3)]))
    with pytest.raises(UsageError, match="BatchedCrop runs on a batch, and the last step of views.transform on single"):
        ViewDataset(Images("image"), plan, on_device=True)
    assert (3, 8, 8) == tuple(ViewDataset(Images("image"), plan)[(0, 0)][1].shape)


def test_batched_steps_of_python_are_those_of_a_pipeline() -> None:
    python = v2.Compose([v2.CenterCrop(18), BatchedCrop(size=(16, 14), scale=(0.2, 0.8)), BatchedColor(contrast=0.5)])
    specified = build_transform([*STEPS[:2], {"batched_color": {"contrast": 0.5}}])
    batches = []
    for transform in (python, specified):
        views = ViewDataset(Images("image"), ViewPlan(transform=transform, seed=7), on_device=True)
        batches.append(views.finish(views.batch([(2, 5), (2, 6)])))

    assert torch.equal(*batches)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BatchedCrop(size=0), "size is 0; expected one number of pixels, or height and width"),
        (lambda: BatchedCrop(size=[8]), "size is"),
        (lambda: BatchedCrop(size=8, scale=(0.5, 0.2)), "scale is .*; expected two fractions in"),
        (lambda: BatchedCrop(size=8, ratio=(0.0, 1.0)), "ratio is .*; expected two numbers above 0"),
        (lambda: BatchedCrop(size=8, flip=1.5), "flip is 1.5; expected a probability"),
        (lambda: BatchedFlip(vertical=-0.5), "batched_flip: vertical is -0.5; expected a probability"),
        (lambda: BatchedColor(contrast=-1.0), "contrast is -1.0; expected 0 or more"),
        (
            lambda: BatchedCrop(size=8)("text"),
            r"BatchedCrop was given str; expected PIL images, or uint8 arrays \(H, W, C\)",
        ),
    ],
)
def test_what_does_not_fit_is_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make()
