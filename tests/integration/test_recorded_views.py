"""Students render the crop boxes, flips and seeds that other tools stored, as the tools' own code does."""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms import functional as F
from torchvision.transforms.autoaugment import _apply_op

import logitcache
from logitcache import ViewDataset
from logitcache.cache.ground_truth import MixingOfCache
from logitcache.cache.outputs import Output
from logitcache.config.schema import Pipeline
from logitcache.data.recorded import (
    OPERATIONS,
    PARAMETERS,
    CropAndFlip,
    DatasetReinforcement,
    RecordedTransform,
)
from logitcache.digest import array_digest
from logitcache.errors import CorruptCache, IdentityMismatch, InvalidSource, LogitCacheError, UntrustedCode, UsageError
from logitcache.extras.interchange import import_cache
from logitcache.extras.merge import merge
from logitcache.share.transfer import pull
from tests.commands import logitcache as run
from tests.commands import refused, run_json
from tests.conftest import PICTURES
from tests.integration.test_importers import CLASSES, peers, saved, some_probabilities, tinyvit
from tests.models import Pictures

Make = Callable[..., Pipeline]


class Photos:
    """Images whose pixels tell where they come from, of one size or of several, as (PIL image, label)."""

    def __init__(self, count: int, size: tuple[int, int] | None = None) -> None:
        self._count, self._size = count, size

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        if not 0 <= index < self._count:
            raise IndexError(index)
        width, height = self._size or (50 + 7 * (index % 5), 40 + 3 * (index % 7))
        pixels = np.random.default_rng(index).integers(0, 256, (height, width, 3), dtype=np.uint8)
        return Image.fromarray(pixels), index % 20


# The tools' own code, as far as it makes a view from what they stored.


def fkd_view(image: Image.Image, coords: np.ndarray, flip: bool, size: int | None) -> Image.Image:
    """`RandomResizedCrop_FKD` and `RandomHorizontalFlip_FKD`; without size, only the crop of the former."""
    i, j = coords[0].item() * image.size[1], coords[1].item() * image.size[0]
    h, w = coords[2].item() * image.size[1], coords[3].item() * image.size[0]
    crop = F.crop(image, i, j, h, w) if size is None else F.resized_crop(image, i, j, h, w, [size, size])
    return F.hflip(crop) if flip else crop


NORMALIZE = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}


def ml_dr_view(dataset: Photos, index: int, stored: list[Any], mixing: bool, size: int) -> Tensor:
    """`Compose.reapply` with the transforms of ImageNet-1k+, on parameters as `Compose.compress` writes them."""
    stored = list(stored)
    partner = stored.pop(0) if mixing else None
    crop, flip, operations, erase, *mixes = stored
    images = []
    for place, number in enumerate([index] if partner is None else [index, partner]):
        box, flipped, ops, erased = (
            each if partner is None else each[place] for each in (crop, flip, operations, erase)
        )
        image = F.resized_crop(dataset[number][0], *box, [size, size], InterpolationMode.BILINEAR)
        image = F.hflip(image) if flipped else image
        for operation, magnitude in ops or ():
            image = _apply_op(image, OPERATIONS[operation], magnitude, InterpolationMode.NEAREST, None)
        pixels = F.to_tensor(image)
        if erased is not None and erased[0] != -1:
            x, y, h, w = erased
            pixels[:, x : x + h, y : y + w] = 0
        images.append(F.normalize(pixels, **NORMALIZE))
    if mixing and mixes[0] is not None:
        images[0] = mixes[0] * images[0] + (1 - mixes[0]) * images[1]
    if mixing and mixes[1] is not None:
        _, x1, y1, x2, y2 = mixes[1]
        images[0] = images[0].clone()
        images[0][:, x1:x2, y1:y2] = images[1][:, x1:x2, y1:y2]
    return images[0]


# Files that the tests write, in the tools' formats.


def write_fkd(
    folder: Path,
    names: list[str],
    boxes: np.ndarray,
    flips: np.ndarray,
    dtype: Any = np.float32,
    classes: int = 20,
) -> None:
    """Boxes (N, V, 4) and flips (N, V)."""
    ids, probs = some_probabilities(flips.size, 4)
    ids = (ids[:, :1] + np.arange(4)) % classes if classes < 20 else ids
    ids, probs = ids.reshape(*flips.shape, 4), probs.reshape(*flips.shape, 4)
    for number, name in enumerate(names):
        path = folder / f"{name}.tar"
        path.parent.mkdir(parents=True, exist_ok=True)
        labels = np.stack([ids[number], probs[number]], axis=1).astype(dtype)
        path.write_bytes(saved([boxes[number].astype(dtype), flips[number], labels]))


def some_boxes(count: int, views: int) -> tuple[np.ndarray, np.ndarray]:
    """Boxes as FKD draws them: of whole pixels, in fractions of images of 60 x 80 pixels."""
    generator = np.random.default_rng(1)
    height, width = generator.integers(8, 60, (count, views)), generator.integers(8, 80, (count, views))
    top, left = generator.integers(0, 61 - height), generator.integers(0, 81 - width)
    boxes = np.stack([top / 60, left / 80, height / 60, width / 80], axis=-1)
    return boxes, generator.integers(0, 2, (count, views)).astype(bool)


def fkd_cache(folder: Path, count: int = 5, views: int = 2, **settings: Any) -> logitcache.LogitCache:
    write_fkd(folder / "labels", [f"n01/{number}" for number in range(count)], *some_boxes(count, views))
    settings = {"teacher": "net@1", "dataset": "photos", "num_classes": 20} | settings
    import_cache("fkd", folder / "labels", folder / "fkd.cache", **settings)
    return logitcache.open(folder / "fkd.cache")


CROP, PARTNER_CROP = (3, 5, 30, 40), (0, 1, 25, 33)
OPS, PARTNER_OPS = [(7, -0.25), (3, 4.0)], [(0, 0.0), (12, 0.0)]
REINFORCED = [
    [
        [None, CROP, True, OPS, (2, 3, 5, 6), None, None],
        [2, [CROP, PARTNER_CROP], [True, False], [OPS, PARTNER_OPS], [None, (1, 1, 4, 4)], 0.3, [0.4, 2, 0, 9, 12]],
    ],
    [
        [2, [CROP, PARTNER_CROP], [False, True], [None, OPS], [(-1, 0, 0, 0), None], None, [0.4, 2, 0, 9, 12]],
        [0, [CROP, PARTNER_CROP], [False, True], [OPS, None], [None, None], 0.45, None],
    ],
    [
        [None, PARTNER_CROP, False, None, None, None, None],
        [1, [CROP, PARTNER_CROP], [False, True], [OPS, None], [None, None], None, None],
    ],
]
"""Parameters of three samples in two views, as ml-dr compresses them."""
AUGMENTATION: dict[str, dict[str, Any]] = {
    "cutmix": {"alpha": 1.0, "p": 0.5},
    "mixup": {"alpha": 1.0, "div_by": 2.0, "p": 0.5},
    "normalize": NORMALIZE,
    "rand_augment": {"enable": True, "p": 1.0},
    "random_erase": {"enable": True, "p": 0.25},
    "random_horizontal_flip": {"enable": True, "p": 0.5},
    "random_resized_crop": {"enable": True, "size": 16},
    "resize": {"enable": False, "size": 20},
    "to_tensor": {"enable": True},
    "uint8": {"enable": True},
}


def write_ml_dr(folder: Path, stored: list[list[Any]] = REINFORCED, augmentation: Any = AUGMENTATION) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    ids, probs = some_probabilities(len(stored) * 2, 4)
    for number, views in enumerate(stored):
        rows = (2 * number, 2 * number + 1)
        value = (
            number,
            [
                {"params": view, "prob": (probs[row].tolist(), ids[row].tolist())}
                for view, row in zip(views, rows, strict=True)
            ],
        )
        (folder / f"{number}.pth.tar").write_bytes(saved(value, protocol=4))
    config = {"reinforce": {"image_augmentation": augmentation, "num_samples": 2}}
    (folder / "config.pth.tar").write_bytes(saved(config))


def ml_dr_cache(folder: Path, source: Path | None = None, **settings: Any) -> logitcache.LogitCache:
    if source is None:
        write_ml_dr(folder / "data")
    settings = {"teacher": "net@1", "dataset": "photos", "num_classes": 20} | settings
    import_cache("ml_dr", source or folder / "data", folder / "ml_dr.cache", **settings)
    return logitcache.open(folder / "ml_dr.cache")


def rendered(cache: logitcache.LogitCache, dataset: Any, replay: Any = None) -> ViewDataset:
    return ViewDataset(dataset, cache.view_plan_with(replay))


# FKD


@pytest.mark.parametrize("size", [None, 24], ids=["crop", "resized"])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_crops_and_flips_of_fkd_are_those_of_its_own_code(tmp_path: Path, dtype: Any, size: int | None) -> None:
    (boxes, flips), photos = some_boxes(5, 3), Photos(5)
    write_fkd(tmp_path / "labels", [f"n01/{number}" for number in range(5)], boxes, flips, dtype)
    settings = {"teacher": "net@1", "dataset": "photos", "num_classes": 20}
    import_cache("fkd", tmp_path / "labels", tmp_path / "a", **settings)
    cache = logitcache.open(tmp_path / "a")
    views = rendered(cache, photos, CropAndFlip(size=size) if size else None)

    for view in range(3):
        for number in range(5):
            coords = boxes[number, view].astype(dtype)
            expected = F.to_tensor(fkd_view(photos[number][0], coords, flips[number, view], size))
            index, pixels, target = views[(view, number)]
            assert torch.equal(expected, pixels)
            assert ((view, number), number % 20) == (
                tuple(int(part) for part in logitcache.split_index([index])),
                target,
            )


@pytest.mark.parametrize("which", ["k5_fp32", "k10_fp16"])
def test_crops_of_files_that_fkd_wrote(tmp_path: Path, which: str) -> None:
    folder, expected = peers("fkd")
    import_cache("fkd", folder / which, tmp_path / "a", teacher="net", dataset="photos", num_classes=CLASSES)
    cache = logitcache.open(tmp_path / "a")
    coords, flips = expected[f"{which}__coords"], expected[f"{which}__flip"]
    order = np.argsort([key.removesuffix(".png") + ".tar" for key in expected[f"{which}__keys"]])
    photos = Photos(cache.num_samples, (60, 45))
    views = rendered(cache, photos)

    for number in range(cache.num_samples):
        for view in range(cache.num_views):
            place = order[number], view
            crop = fkd_view(photos[number][0], coords[place], flips[place], None)
            assert torch.equal(F.to_tensor(crop), views[(view, number)][1])


def test_arrays_and_tensors_are_cropped_like_pil_images(tmp_path: Path) -> None:
    cache, photos = fkd_cache(tmp_path), Photos(5)
    arrays = [(np.asarray(image), label) for image, label in photos]  # type: ignore[attr-defined]
    tensors = [(F.pil_to_tensor(image), label) for image, label in photos]  # type: ignore[attr-defined]
    expected = [views[1] for views in map(rendered(cache, photos).__getitem__, [(1, number) for number in range(5)])]

    for dataset in (arrays, tensors):
        views = rendered(cache, dataset)
        for number in range(5):
            assert torch.equal(expected[number], views[(1, number)][1])


def test_a_view_depends_on_nothing_but_sample_and_view(tmp_path: Path) -> None:
    cache, photos = fkd_cache(tmp_path), Photos(5)
    views = rendered(cache, photos)
    expected = views[(1, 3)][1]
    sent: ViewDataset = pickle.loads(pickle.dumps(views))

    assert torch.equal(expected, sent[(1, 3)][1])
    assert torch.equal(expected, logitcache.render(cache.view_plan, 1, 3, photos[3])[1])
    loader = torch.utils.data.DataLoader(
        ViewDataset(photos, cache.view_plan, preprocess=v2.Resize((8, 8))),
        batch_size=5,
        sampler=logitcache.ViewSampler(views, cycle=[1], shuffle=False),
        num_workers=1,
    )
    index, inputs, _ = next(iter(loader))
    assert torch.equal(v2.Resize((8, 8))(expected), inputs[3])
    assert torch.equal(cache.view(1).logits(range(5)), cache.logits(index))
    assert 2 == cache.check_batch(index, inputs)


def test_a_copy_of_one_view_has_its_parameters(tmp_path: Path) -> None:
    cache, photos = fkd_cache(tmp_path), Photos(5)
    pull(str(tmp_path / "fkd.cache"), str(tmp_path / "part"), views="1:2")
    part = logitcache.open(tmp_path / "part")

    assert cache.id == part.id
    assert torch.equal(rendered(cache, photos)[(1, 2)][1], rendered(part, photos)[(1, 2)][1])
    with pytest.raises(UsageError, match="there is no view 0"):
        rendered(part, photos)[(0, 2)]


def test_any_zarr_reader_gets_the_parameters(tmp_path: Path) -> None:
    cache = fkd_cache(tmp_path)
    boxes, flips = some_boxes(5, 2)
    stored = zarr.open_group(tmp_path / "fkd.cache" / "labels.zarr", mode="r")["view_parameters_values"]
    assert isinstance(stored, zarr.Array)
    values = np.asarray(stored)
    step = cache.manifest.identity.transform["shared"][0]["recorded"]

    assert (boxes.swapaxes(0, 1).astype(np.float32) == values[..., :4]).all()
    assert (flips.T == values[..., 4]).all()
    assert ["top", "left", "height", "width", "flip"] == step["columns"]
    header = json.dumps(["<f4", [5, 5]], separators=(",", ":")).encode()
    hashes = [hashlib.sha256(header + view.astype("<f4").tobytes()).hexdigest() for view in values]
    assert hashes == step["views"]


def test_a_merged_cache_takes_the_view_plan_of_its_parts(tmp_path: Path) -> None:
    parts = [fkd_cache(tmp_path / name, teacher=name) for name in ("a", "b")]
    merge([str(tmp_path / name / "fkd.cache") for name in ("a", "b")], tmp_path / "mean", encoding="dense")
    cache = logitcache.open(tmp_path / "mean")

    with pytest.raises(UsageError, match=r"cache\.check_plan\(imported\.view_plan\)"):
        _ = cache.view_plan
    plan = parts[0].view_plan
    cache.check_plan(plan)
    assert 5 == len(ViewDataset(Photos(5), plan))


def test_the_identity_of_a_cache_has_the_boxes(tmp_path: Path) -> None:
    cache = fkd_cache(tmp_path / "a")
    again = fkd_cache(tmp_path / "b", dataset="photos")
    boxes, flips = some_boxes(5, 2)
    boxes[4, 1, 0] /= 2
    write_fkd(tmp_path / "c", [f"n01/{number}" for number in range(5)], boxes, flips)
    import_cache("fkd", tmp_path / "c", tmp_path / "other", teacher="net@1", dataset="photos", num_classes=20)
    other = logitcache.open(tmp_path / "other")

    assert (cache.id, cache.digest) == (again.id, again.digest)
    assert "'views.transform={recorded: {cache: mine.cache}}'" in (tmp_path / "a/fkd.cache/README.md").read_text()
    assert cache.id != other.id
    cache.check_plan(again.view_plan)
    cache.check_plan(again.view_plan_with(CropAndFlip(size=9)))
    with pytest.raises(IdentityMismatch, match=r"transform.shared"):
        cache.check_plan(other.view_plan)


# Apple ml-dr


def test_views_of_ml_dr_are_those_of_its_own_code(tmp_path: Path) -> None:
    cache, photos = ml_dr_cache(tmp_path), Photos(3)
    views = rendered(cache, photos)

    for number, stored in enumerate(REINFORCED):
        for view in range(2):
            expected = ml_dr_view(photos, number, stored[view], mixing=True, size=16)
            torch.testing.assert_close(views[(view, number)][1], expected, rtol=0, atol=2e-6)
    assert {"Normalize"} == set(cache.manifest.identity.transform["teacher_input"][0])


@pytest.mark.parametrize("which", ["randaug_mixing", "randaug_joblib"])
def test_views_of_files_that_ml_dr_wrote(tmp_path: Path, which: str) -> None:
    folder, _ = peers("ml_dr")
    cache = ml_dr_cache(tmp_path, folder / which / "reinforced_data", num_classes=CLASSES, details=tmp_path / "d.npz")
    stored = np.load(tmp_path / "d.npz")["parameters"]
    photos = Photos(cache.num_samples, (120, 110))
    views = rendered(cache, photos)

    for number in range(cache.num_samples):
        for view in range(cache.num_views):
            parameters = json.loads(stored[view, number])
            expected = ml_dr_view(photos, number, parameters, mixing=which == "randaug_mixing", size=32)
            torch.testing.assert_close(views[(view, number)][1], expected, rtol=0, atol=2e-6)


def test_true_labels_of_recorded_mixtures_are_distributions(tmp_path: Path) -> None:
    cache, photos = ml_dr_cache(tmp_path), Photos(3)
    views, patch = rendered(cache, photos), 7 * 12 / 16**2

    for place, weights in {
        (0, 0): {0: 1.0},
        (1, 0): {0: 0.3 * (1 - patch), 2: 1 - 0.3 * (1 - patch)},
        (0, 1): {1: 1 - patch, 2: patch},
        (1, 1): {1: 0.45, 0: 0.55},
        (1, 2): {2: 1.0},
    }.items():
        expected = torch.zeros(20)
        for label, weight in weights.items():
            expected[label] = weight
        torch.testing.assert_close(views[place][2], expected)
    mixing = MixingOfCache(cache)
    assert [[False, True, False], [True, True, True]] == [mixing.mixed(view, range(3)).tolist() for view in range(2)]
    assert [2, 0, 2] == mixing.of_rows(1, np.arange(3))[1].tolist()


def test_mixtures_need_their_partners(tmp_path: Path) -> None:
    cache, photos = ml_dr_cache(tmp_path), Photos(3)

    with pytest.raises(UsageError, match="need another sample of the dataset"):
        logitcache.render(cache.view_plan, 1, 0, photos[0])
    with pytest.raises(UsageError, match="draw partners from all 3 samples"):
        ViewDataset([photos[0]], cache.view_plan, rows=np.array([0]))
    with pytest.raises(UsageError, match="are not rendered on the device"):
        ViewDataset(photos, cache.view_plan, on_device=True)
    with pytest.raises(UsageError, match=r"ends at row 33 and column 45 of an image of 20 x 20 pixels"):
        rendered(cache, Photos(3, (20, 20)))[(0, 0)]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"resize": {"size": 20}}, "not the recipe of ImageNet-1k"),
        ({"rand_augment": {"num_ops": 3}}, "rand_augment has more than 2 operations"),
        ({"random_erase": {"value": "random"}}, "random_erase has the option value"),
    ],
)
def test_other_recipes_of_ml_dr_arrive_without_views(tmp_path: Path, change: Any, reason: str) -> None:
    write_ml_dr(tmp_path / "data", augmentation=AUGMENTATION | change)
    cache = ml_dr_cache(tmp_path, tmp_path / "data", details=tmp_path / "d.npz")

    assert reason in cache.manifest.provenance["imported"]["missing"]["view"]
    assert (2, 3) == np.load(tmp_path / "d.npz")["parameters"].shape
    with pytest.raises(UsageError, match="created without `view_plan`"):
        _ = cache.view_plan


# TinyViT


def tinyvit_view(image: Image.Image, parameters: Mapping[str, float]) -> Image.Image:
    """`RandomResizedCropAndInterpolation` and `RandomHorizontalFlip`, drawn as TinyViT's `aug_random` draws."""
    draw = np.random.Generator(np.random.PCG64(int(parameters["seed"])))

    def uniform(low: float, high: float) -> float:
        return float(draw.random() * (high - low) + low)

    def integer(low: int, high: int) -> int:
        return min(int(draw.random() * (high - low + 1)) + low, high)

    for _ in range(10):
        target = uniform(0.08, 1.0) * image.size[0] * image.size[1]
        ratio = float(np.exp(uniform(np.log(3 / 4), np.log(4 / 3))))
        width, height = round((target * ratio) ** 0.5), round((target / ratio) ** 0.5)
        if width <= image.size[0] and height <= image.size[1]:
            top, left = integer(0, image.size[1] - height), integer(0, image.size[0] - width)
            break
    else:
        top, left, height, width = 0, 0, image.size[1], image.size[0]
    image = F.resized_crop(image, top, left, height, width, [16, 16], InterpolationMode.BICUBIC)
    return F.hflip(image) if draw.random() < 0.5 else image


def test_seeds_of_tinyvit_reach_its_own_transform(tmp_path: Path) -> None:
    tinyvit(tmp_path / "logits", [str(number) for number in range(7)])
    import_cache("tinyvit", tmp_path / "logits", tmp_path / "a", teacher="net", dataset="photos", num_classes=20)
    cache, photos = logitcache.open(tmp_path / "a"), Photos(7)
    views = rendered(cache, photos, tinyvit_view)

    for view in range(2):
        for number in range(7):
            expected = F.to_tensor(tinyvit_view(photos[number][0], {"seed": number + 100 * view}))
            assert torch.equal(expected, views[(view, number)][1])
    cache.check_plan(views.plan)
    with pytest.raises(UsageError, match=r"not stored, only its seeds.*PCG64.*partners.*cache\.view_plan_with"):
        _ = cache.view_plan
    assert "cache.view_plan_with(function)" in (tmp_path / "a" / "README.md").read_text()


@pytest.mark.parametrize("which", ["k10_index_keys", "k100_name_keys"])
def test_generators_of_files_that_tinyvit_wrote(tmp_path: Path, which: str) -> None:
    folder, expected = peers("tinyvit")
    import_cache("tinyvit", folder / which, tmp_path / "a", teacher="net", dataset="d", num_classes=CLASSES)
    cache = logitcache.open(tmp_path / "a")
    plan = cache.view_plan_with(
        lambda sample, found: torch.from_numpy(np.random.Generator(np.random.PCG64(found["seed"])).random(4))
    )
    keys = expected[f"{which}__keys"].tolist()
    order = sorted(range(64), key=lambda number: keys[number]) if which.endswith("name_keys") else range(64)

    for view in range(2):
        for row, number in enumerate(order):
            draws = logitcache.render(plan, view, row, (torch.zeros(1), 0))[1]
            assert expected[f"{which}__first_uniforms_of_view"][view, number].tolist() == draws.tolist()


# Pipelines


def test_a_pipeline_trains_on_recorded_views(tmp_path: Path, tiny: Make) -> None:
    keys = [key.removesuffix(".png") for key in Pictures(40).keys]
    boxes = np.random.default_rng(0).integers(0, 5, (40, 2, 4)) / 8
    boxes[..., 2:] = 0.5
    write_fkd(tmp_path / "labels", keys, boxes, np.tile([True, False], (40, 1)), classes=10)
    at = tmp_path / "fkd.cache"
    pipeline = tiny(
        *PICTURES,
        f"views.transform={{recorded: {{cache: {at}, replay: {{crop_and_flip: {{size: 8}}}}}}}}",
        "views.seed=0",
        f"students=[{{name: small, model: mlp, args: {{hidden: [8]}}, labels: {{caches: [{at}]}}}}]",
    )
    path = tmp_path / "pipeline.json"
    path.write_text(json.dumps(pipeline.model_dump(mode="json", exclude_unset=True)))
    run_json("import", "fkd", tmp_path / "labels", at, "--num-classes", 10, "--teacher", "net", "--data", path)

    assert ["small"] == [row["name"] for row in run_json("train-student", path)["rows"]]
    refused(
        run("train-student", path, f"views.transform={{recorded: {{from: {at}}}}}"), 2, "parameters cache and replay"
    )
    flipped = run("train-student", path, "views.transform=RandomHorizontalFlip")
    refused(flipped, 1, "transform.shared")
    computed = run("cache-teacher", path, "views.transform=[recorded, RandomHorizontalFlip]")
    refused(computed, 2, "is the only step")


# Invalid parameters


BOXES, FLIPS = some_boxes(3, 2)


def changed(place: tuple[int, ...], value: float) -> np.ndarray:
    boxes = BOXES.copy()
    boxes[place] = value
    return boxes


INVALID = {
    "a box that ends below the image": (changed((1, 1, 2), 1.5), FLIPS, "1.tar: view 1 of sample 1 has a crop box"),
    "a box that starts above the image": (changed((2, 0, 0), -0.25), FLIPS, "2.tar: view 0 of sample 2 has a crop box"),
    "a box without area": (changed((0, 0, 3), 0), FLIPS, "without area"),
    "NaN": (changed((0, 1, 1), np.nan), FLIPS, "a parameter that is no number"),
    "infinity": (changed((0, 1, 3), np.inf), FLIPS, "a parameter that is no number"),
    "boxes of three numbers": (BOXES[..., :3], FLIPS, r"has boxes \(2, 3\)"),
    "a flip for another number of crops": (BOXES, FLIPS[:, :1].repeat(3, 1), "for 3 crops"),
    "flips that are no flags": (BOXES, FLIPS + 1, "a flip that is neither 0 nor 1"),
}


@pytest.mark.parametrize("case", INVALID)
def test_boxes_that_fkd_never_writes_are_refused(tmp_path: Path, case: str) -> None:
    boxes, flips, message = INVALID[case]
    write_fkd(tmp_path / "labels", [f"n01/{number}" for number in range(3)], boxes, flips)

    with pytest.raises(InvalidSource, match=message):
        import_cache("fkd", tmp_path / "labels", tmp_path / "a", teacher="net", dataset="d", num_classes=20)
    assert not (tmp_path / "a").exists()


def reinforced(view: Any) -> list[list[Any]]:
    return [[REINFORCED[0][0], view], *REINFORCED[1:]]


INVALID_PARAMETERS = {
    "too few": (REINFORCED[0][0][:5], "parameters of 4 transforms; expected random_resized_crop"),
    "a crop of three numbers": ([None, (1, 2, 3), True, None, None, None, None], "0.pth.tar can't be read"),
    "an empty crop": ([None, (1, 2, 0, 4), True, None, None, None, None], "has no area"),
    "an unknown operation": ([None, CROP, True, [(14, 0.0), (0, 0.0)], None, None, None], "an unknown operation"),
    "an unknown partner": ([3, *REINFORCED[0][1][1:]], "a partner that is no sample"),
    "a weight above 1": ([*REINFORCED[0][1][:5], 1.5, None], "a weight outside of 0 to 1"),
    "a patch beyond the view": ([*REINFORCED[0][1][:6], [0.5, 0, 0, 17, 9]], "a CutMix patch outside"),
    "an erased box beyond the view": ([None, CROP, True, None, (9, 9, 9, 9), None, None], "an erased box outside"),
    "NaN": ([None, CROP, True, [(1, float("nan")), (0, 0.0)], None, None, None], "is no number"),
    "a number that float32 rounds": ([None, CROP, True, [(1, 0.1), (0, 0.0)], None, None, None], "float32"),
    "a third operation": ([None, CROP, True, [(1, 0.5)] * 3, None, None, None], "operation_2"),
}


@pytest.mark.parametrize("case", INVALID_PARAMETERS)
def test_parameters_that_ml_dr_never_writes_are_refused(tmp_path: Path, case: str) -> None:
    view, message = INVALID_PARAMETERS[case]
    write_ml_dr(tmp_path / "data", reinforced(view))

    with pytest.raises(InvalidSource, match=message):
        ml_dr_cache(tmp_path, tmp_path / "data")
    assert not (tmp_path / "ml_dr.cache").exists()


def hostile_cache(
    path: Path,
    values: np.ndarray,
    *,
    columns: tuple[str, ...] = CropAndFlip.columns,
    digests: list[str] | None = None,
    replay: Any = None,
    stored: bool = True,
) -> logitcache.LogitCache:
    """A cache that claims recorded views with some values, float32 (V, N, D)."""
    digests = [array_digest(view) for view in values] if digests is None else digests
    step = CropAndFlip().config() if replay is None else replay
    about = {"num_samples": values.shape[1], "num_classes": 3, "num_views": len(values), "teacher": "t", "dataset": "d"}
    outputs = {PARAMETERS: Output(shape=values.shape[2:], encoding={"name": "values", "dtype": "float32"})}  # type: ignore[arg-type]
    plan = logitcache.ViewPlan(transform=RecordedTransform(columns, digests, replay_step=step))
    with logitcache.create(path, view_plan=plan, outputs=outputs if stored else None, **about) as writer:  # type: ignore[arg-type]
        for view, rows in enumerate(values):
            logits = torch.zeros(len(rows), 3)
            writer.write(view=view, start=0, logits=logits, outputs={PARAMETERS: rows} if stored else None)
    return logitcache.open(path)


GOOD = np.tile(np.array([0.1, 0.2, 0.5, 0.5, 1.0], dtype=np.float32), (2, 4, 1))
BAD = GOOD.copy()
BAD[1, 2, 0] = 0.75
HOSTILE: dict[str, tuple[dict[str, Any], type[LogitCacheError], str]] = {
    "a box outside of the image": ({"values": BAD}, CorruptCache, "view 1 of sample 2 has a crop box outside"),
    "other values than the identity names": (
        {"values": BAD, "digests": [array_digest(GOOD[0])] * 2},
        CorruptCache,
        "are not those that the cache's identity names",
    ),
    "too few columns": ({"values": GOOD[..., :4].copy()}, CorruptCache, r"is \[4\].*expected \[5\]"),
    "no values": ({"values": GOOD, "stored": False}, UsageError, "without their parameters, as merged caches do"),
    "a view without hash": ({"values": GOOD, "digests": ["0" * 64]}, CorruptCache, "1 views have a hash"),
    "no hash": ({"values": GOOD, "digests": ["x"] * 2}, UsageError, "a list of hashes"),
    "a repeated column": (
        {"values": GOOD, "columns": ("top", "top", "height", "width", "flip")},
        UsageError,
        "different names",
    ),
    "a column that the replay lacks": (
        {"values": GOOD, "columns": ("top", "left", "height", "width", "turn")},
        UsageError,
        "needs the parameters flip",
    ),
    "an unknown replay": (
        {"values": GOOD, "replay": {"crop_and_flop": {}}},
        UsageError,
        "did you mean 'crop_and_flip'",
    ),
    "an unknown parameter": ({"values": GOOD, "replay": {"crop_and_flip": {"siz": 3}}}, UsageError, "siz"),
    "a size of nothing": ({"values": GOOD, "replay": {"crop_and_flip": {"size": 0}}}, UsageError, "size is one number"),
    "code": ({"values": GOOD, "replay": {"os:system": {}}}, UntrustedCode, "os:system"),
    "no step": ({"values": GOOD, "replay": {"a": {}, "b": {}}}, UsageError, "{name: parameters} or null"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_cache_with_invalid_views_opens_and_is_refused_when_they_are_rendered(tmp_path: Path, case: str) -> None:
    settings, kind, message = HOSTILE[case]
    cache = hostile_cache(tmp_path / "a", **settings)

    assert (4, 3) == cache.view(0).logits(range(4)).shape
    with pytest.raises(kind, match=message):
        _ = ViewDataset(Photos(4), cache.view_plan)[(1, 0)]


def test_recorded_views_are_rendered_by_what_knows_the_view(tmp_path: Path) -> None:
    cache, photos = fkd_cache(tmp_path), Photos(5)

    with pytest.raises(UsageError, match="differ by sample and view"):
        cache.view_plan.transform(photos[0][0])  # type: ignore[misc]
    with pytest.raises(UsageError, match="have no mixup and CutMix but their own"):
        ViewDataset(
            photos,
            logitcache.ViewPlan(
                transform=cache.view_plan.transform, mixing=logitcache.Mixing(mixup=1.0), num_classes=20
            ),
        )
    with pytest.raises(UsageError, match="recorded crop boxes are of images; the dataset gives str"):
        rendered(cache, [("a text", 0)] * 5)[(0, 0)]


def test_the_parameters_of_a_replay_survive_the_identity() -> None:
    assert {"crop_and_flip": {}} == CropAndFlip().config()
    assert {"crop_and_flip": {"size": (7, 7)}} == CropAndFlip(size=7).config()
    assert {"dataset_reinforcement": {"size": (8, 9), "interpolation": "bicubic"}} == DatasetReinforcement(
        size=[8, 9], interpolation="bicubic"
    ).config()
    with pytest.raises(UsageError, match="interpolation is one of bicubic, bilinear"):
        CropAndFlip(interpolation="cubic")
