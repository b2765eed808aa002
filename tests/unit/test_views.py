"""View v of sample i is the same pixels for everyone who asks."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from logitcache.catalog.datasets import Selection
from logitcache.data.samples import content_table, input_digest
from logitcache.data.transforms import build_transform, describe_transform
from logitcache.data.views import Mixing, ViewDataset, ViewPlan, render, to_float_image
from logitcache.errors import SampleMismatch, ShapeError, UnreadableSample, UntrustedCode, UsageError
from tests.models import Pictures


def noisy(image: Image.Image) -> np.ndarray:
    """Plain code that draws from every global generator."""
    pixels = np.asarray(image, dtype=np.float32) / 255
    return pixels + np.random.rand(*pixels.shape) + random.random() + torch.rand(1).item()


def timm_transform() -> Any:
    from timm.data import create_transform

    return create_transform(input_size=(1, 8, 8), is_training=True, auto_augment=None, mean=(0.5,), std=(0.5,))


def albumentations_transform() -> Any:
    import albumentations

    return albumentations.Compose([albumentations.Affine(rotate=(-20, 20), p=1.0), albumentations.GaussNoise(p=0.5)])


TRANSFORMS = {
    "torchvision": lambda: v2.Compose([v2.RandomAffine(20, translate=(0.2, 0.2)), v2.RandomHorizontalFlip()]),
    "timm": timm_transform,
    "albumentations": albumentations_transform,
    "plain callable": lambda: noisy,
    "clean": lambda: None,
}


@pytest.fixture(params=TRANSFORMS, ids=str)
def transform(request: pytest.FixtureRequest) -> Any:
    if request.param in ("timm", "albumentations"):
        pytest.importorskip(request.param)
    return TRANSFORMS[request.param]()


def pixels(views: ViewDataset, *items: tuple[int, int]) -> list[bytes]:
    return [input_digest(views[item][1]) for item in items]


REFUSED = {
    "negative": (-1, ViewPlan(), "there is no sample -1; expected 0 to 1099511627775"),
    "beyond the plan": (8, ViewPlan(num_samples=8), "there is no sample 8; expected 0 to 7"),
    "beyond an index": (2**40, ViewPlan(), "there is no sample 1099511627776; expected 0 to 1099511627775"),
    "mixed, without a partner": (0, ViewPlan(mixing=Mixing(mixup=1.0), num_classes=2, num_samples=8), "pass partner="),
}


@pytest.mark.parametrize(("number", "plan", "message"), REFUSED.values(), ids=REFUSED)
def test_a_sample_that_cannot_be_rendered_alone_is_refused(number: int, plan: ViewPlan, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        render(plan, 0, number, (torch.zeros(1, 2, 2), 0))


def test_a_view_does_not_depend_on_what_was_rendered_before(transform: Any) -> None:
    views = ViewDataset(Pictures(), ViewPlan(transform=transform, seed=7))
    items = [(view, index) for view in range(2) for index in range(10)]
    forwards = pixels(views, *items)
    torch.rand(3), random.random(), np.random.rand(4)

    assert forwards == pixels(views, *reversed(items))[::-1]
    assert forwards == pixels(ViewDataset(Pictures(), ViewPlan(transform=transform, seed=7)), *items)


@pytest.mark.parametrize("mixing", [Mixing(), Mixing(mixup=0.4, cutmix=1.0)], ids=["unmixed", "mixed"])
@pytest.mark.parametrize("preprocess", [None, lambda image: 2 * torch.as_tensor(image) - 1], ids=["same", "own input"])
def test_a_sample_rendered_alone_is_that_of_the_dataset(transform: Any, mixing: Mixing, preprocess: Any) -> None:
    """Index, input and target of each sample, in any view and order, bit for bit."""
    data = Pictures()
    plan = ViewPlan(transform=transform, seed=3, mixing=mixing, num_classes=10, num_samples=len(data))
    views = ViewDataset(data, plan, preprocess=preprocess)
    for view, number in [(4, 7), (0, 7), (1, 0), (0, len(data) - 1)]:
        expected = views[view, number]
        found = render(plan, view, number, data[number], preprocess=preprocess, partner=data.__getitem__)

        assert expected[0] == found[0]
        assert input_digest(expected[1]) == input_digest(found[1])
        assert torch.equal(*map(torch.as_tensor, (expected[2], found[2])))


def test_a_transform_that_fails_on_a_tensor_is_named_with_its_size() -> None:
    data = [(torch.rand(4, 5), 0)]
    views = ViewDataset(data, ViewPlan(transform=v2.Normalize((0.5,), (0.5,))))  # type: ignore[arg-type]

    with pytest.raises(UsageError, match=r"`views.transform` fails on sample '0' \(Tensor of size \(4, 5\)\)"):
        views[0]


def test_rendering_leaves_the_global_generators_alone(transform: Any) -> None:
    views = ViewDataset(Pictures(), ViewPlan(transform=transform))
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    views[(1, 3)]

    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1:] == (random.getstate(), np.random.get_state()[1].tolist())


def test_views_seeds_and_samples_differ_from_each_other() -> None:
    transform = TRANSFORMS["torchvision"]()
    digests = [
        pixels(ViewDataset(Pictures(), ViewPlan(transform=transform, seed=seed)), (view, index))[0]
        for seed in (1, 2)
        for view in (0, 1)
        for index in (4, 5)
    ]

    assert 8 == len(set(digests))


def test_clean_views_are_all_the_same_image() -> None:
    views = ViewDataset(Pictures(), ViewPlan())

    assert 1 == len(set(pixels(views, (0, 3), (1, 3), (17, 3))))


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_any_number_of_workers_renders_the_same(workers: int) -> None:
    views = ViewDataset(
        Pictures(), ViewPlan(transform=TRANSFORMS["torchvision"](), mixing=Mixing(mixup=0.4), num_classes=10)
    )
    views.set_view(2)
    batches = list(DataLoader(views, batch_size=8, num_workers=workers))
    here = torch.stack([views[(2, index)][1] for index in range(40)])

    assert torch.equal(here, torch.cat([inputs for _, inputs, _ in batches]))


def test_workers_that_persist_see_the_view_change() -> None:
    """The trap: a worker that holds its own copy would go on serving the first view."""
    views = ViewDataset(Pictures(), ViewPlan(transform=TRANSFORMS["torchvision"]()))
    loader = DataLoader(views, batch_size=40, num_workers=1, persistent_workers=True)
    for view in (0, 5):
        views.set_view(view)
        (batch,) = loader
        assert torch.equal(batch[1], torch.stack([views[(view, index)][1] for index in range(40)]))


def test_each_model_has_its_own_deterministic_part_of_one_crop() -> None:
    plan = ViewPlan(transform=v2.RandomCrop(6), preprocess=v2.Resize(12))
    teacher = ViewDataset(Pictures(), plan)[(1, 4)][1]
    student = ViewDataset(Pictures(), plan, preprocess=v2.Resize(3))[(1, 4)][1]
    crop = ViewDataset(Pictures(), ViewPlan(transform=v2.RandomCrop(6)))[(1, 4)][1]

    assert [(1, 12, 12), (1, 3, 3)] == [tuple(teacher.shape), tuple(student.shape)]
    assert torch.equal(v2.Resize(12)(crop), teacher)
    assert torch.equal(v2.Resize(3)(crop), student)


@pytest.mark.parametrize("mixing", [Mixing(mixup=0.4), Mixing(cutmix=1.0)], ids=["mixup", "cutmix"])
def test_mixed_samples_are_made_of_the_sample_and_its_keyed_partner(mixing: Mixing) -> None:
    dataset = Pictures()
    plan = ViewPlan(mixing=mixing, seed=5, num_classes=10)
    views = ViewDataset(dataset, plan)
    for index in range(20):
        _, mixed, target = views[(3, index)]
        mixture = plan.mixture(3, index, 40)
        assert mixture is not None
        own, other = (to_float_image(dataset[i][0]) for i in (index, mixture.partner))
        weight = float(target[dataset.targets[index]])
        assert 1.0 == pytest.approx(float(target.sum()), abs=1e-6)
        if mixing.mixup:
            torch.testing.assert_close(mixed, mixture.weight * own + (1 - mixture.weight) * other)
        elif dataset.targets[index] != dataset.targets[mixture.partner]:
            differs = own != other
            taken = (mixed == other) & differs
            assert torch.equal(mixed, torch.where(taken, other, own))
            assert int(taken.sum()) <= round((1 - weight) * own.numel())


def test_partners_are_a_permutation_without_a_fixed_point() -> None:
    plan = ViewPlan(mixing=Mixing(mixup=1.0), seed=9, num_classes=10)
    partners = [plan.mixture(4, row, 40).partner for row in range(40)]  # type: ignore[union-attr]

    assert list(range(40)) == sorted(partners)
    assert all(row != partner for row, partner in enumerate(partners))


def test_mixup_of_the_alpha_that_was_asked_for() -> None:
    """Beta(α, α) has mean 1/2 and variance 1 / (4 (2α + 1)); within 4 σ of 4 000 draws."""
    plan = ViewPlan(mixing=Mixing(mixup=0.4), num_classes=10)
    weights = np.array([plan.mixture(view, 0, 40).weight for view in range(4000)])  # type: ignore[union-attr]
    variance = 1 / (4 * (2 * 0.4 + 1))

    assert abs(weights.mean() - 0.5) < 4 * (variance / 4000) ** 0.5
    assert abs(weights.var() / variance - 1) < 0.1


def test_mixing_views_of_different_sizes_says_what_to_do() -> None:
    def uneven(image: Image.Image) -> torch.Tensor:
        return torch.zeros(1, random.choice([3, 4, 5, 6, 7, 8]), 8)

    views = ViewDataset(Pictures(), ViewPlan(transform=uneven, mixing=Mixing(mixup=1.0), num_classes=10))
    with pytest.raises(ShapeError, match="end the shared transform with a crop"):
        [views[(0, index)] for index in range(40)]


def test_a_class_beyond_those_of_the_plan_is_named() -> None:
    views = ViewDataset(Pictures(), ViewPlan(mixing=Mixing(mixup=1.0), num_classes=5))
    with pytest.raises(UsageError, match=r"has the class [5-9], but the view plan has num_classes=5; set it to"):
        [views[(0, index)] for index in range(40)]


def test_a_changed_sample_is_named_when_it_is_first_loaded() -> None:
    contents = content_table(Pictures())
    views = ViewDataset(Pictures(repaint=7), ViewPlan(contents=contents))
    views[(0, 6)]

    with pytest.raises(SampleMismatch, match=r"sample 7 \(scan/0007.png\) is not what the teacher saw"):
        views[(0, 7)]


def test_a_part_of_a_dataset_has_the_same_contents_as_its_pipeline_recorded() -> None:
    """A pipeline hashes the digests of a dataset without `content` again."""
    plain = [(torch.full((1, 2, 2), float(value)), 0) for value in range(6)]
    recorded = content_table(Selection(plain, np.array([4, 1, 3])))
    views = ViewDataset([plain[4], plain[1], plain[3]], ViewPlan(contents=recorded))
    swapped = ViewDataset([plain[4], plain[3], plain[1]], ViewPlan(contents=recorded))

    assert [0, 0, 0] == [views[(0, index)][2] for index in range(3)]
    with pytest.raises(SampleMismatch, match=r"sample 1 \(1\) is not what the teacher saw.* in row 1 of the cache"):
        swapped[(0, 1)]
    reverse = ViewDataset(Selection(plain, np.array([0, 2])), ViewPlan(contents=content_table([plain[0], plain[2]])))
    assert 2 == len([reverse[(0, index)] for index in range(2)])


def test_an_unreadable_sample_is_named() -> None:
    with pytest.raises(UnreadableSample, match=r"'scan/0003.png' \(number 3\) can't be read: OSError: image file is"):
        ViewDataset(Pictures(unreadable=3), ViewPlan())[(0, 3)]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        pytest.param(lambda: v2.RandomAffine(20), lambda: v2.RandomAffine(21), id="a parameter"),
        pytest.param(lambda: v2.RandomCrop(6), lambda: v2.RandomCrop(6, padding=1), id="an option"),
        pytest.param(lambda: noisy, lambda: to_float_image, id="a function"),
        pytest.param(
            lambda: v2.Compose([v2.RandomCrop(6), v2.RandomErasing()]),
            lambda: v2.Compose([v2.RandomCrop(6)]),
            id="steps",
        ),
    ],
)
def test_transforms_that_differ_are_described_differently(one: Callable[[], Any], other: Callable[[], Any]) -> None:
    assert describe_transform(one()) == describe_transform(one())
    assert describe_transform(one()) != describe_transform(other())


def test_a_specification_is_built_and_described_by_itself() -> None:
    spec = [{"RandomResizedCrop": {"size": 8, "interpolation": "bicubic"}}, "RandomHorizontalFlip"]
    transform = build_transform(spec)

    expected = [{"RandomResizedCrop": {"size": 8, "interpolation": "bicubic"}}, {"RandomHorizontalFlip": {}}]
    assert expected == describe_transform(transform)
    assert (8, 8) == transform(Image.new("L", (20, 20))).size


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        pytest.param("RandomAfine", UsageError, "did you mean 'RandomAffine'", id="misspelt"),
        pytest.param({"RandomCrop": {"sise": 3}}, UsageError, "transform RandomCrop: .*sise", id="parameter"),
        pytest.param("Lambda", UsageError, "can't be written in a file", id="lambda"),
        pytest.param("os:getcwd", UntrustedCode, "re-run with --trust", id="foreign code"),
        pytest.param("torch:load", UntrustedCode, "re-run with --trust", id="an environment in the working directory"),
        pytest.param({"ToDtype": {"dtype": "nn"}}, UsageError, "'nn' is no dtype", id="dtype"),
        pytest.param(
            {"Resize": {"size": 4, "interpolation": "cubic"}}, UsageError, "transform Resize", id="interpolation"
        ),
        pytest.param("tests.models:shift", UsageError, "missing 1 required positional argument", id="argument"),
        pytest.param([3], UsageError, "a transform is a name", id="no transform"),
    ],
)
def test_a_wrong_specification_says_what_is_wrong(spec: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        build_transform(spec)


def test_the_users_own_transform_is_known_by_its_source() -> None:
    (step,) = describe_transform(build_transform({"tests.models:shift": {"by": 1}}))
    (name,) = step

    assert name.startswith("tests.models:shift@")
    assert [step] == describe_transform(build_transform([step]))
    with pytest.raises(UsageError, match="is not the one that the cache was built with"):
        build_transform({"tests.models:shift@0123": {"by": 1}})
