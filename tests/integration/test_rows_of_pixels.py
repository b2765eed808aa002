"""Samples with a row for each pixel, and inputs of two kinds that are joined by key."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import logitcache
from logitcache.catalog.datasets import Selection, load_data
from logitcache.config.build import resolve_data, resolve_teacher
from logitcache.config.schema import Pipeline, load_pipeline
from logitcache.data.rows import rows_of_dataset
from logitcache.data.samples import sample_table
from logitcache.data.views import Mixing, ViewDataset, ViewPlan
from logitcache.errors import IdentityMismatch, ShapeError, UsageError
from logitcache.stages.cache_teacher import cache_teacher
from logitcache.stages.run import run_pipeline
from logitcache.stages.train_student import train_students
from logitcache.stages.verify_match import verify_match
from logitcache.verify.audit import verify
from pipelines import cross_modal, pixels
from tests.needs import need_package

TWINS = Path(__file__).parents[2] / "pipelines/twins"
GUIDE = (Path(__file__).parents[2] / "docs/pixels.md").read_text()
TINY_TRAINING = ["train.epochs=1", "train.seeds=[0]", "teacher.train.epochs=1"]


@pytest.fixture
def segmentation(tmp_path: Path) -> Pipeline:
    need_package("sklearn", "demo")
    return load_pipeline(
        TWINS / "pixels.yaml",
        [
            *TINY_TRAINING,
            "data.args={train: 12, validation: 4, test: 4}",
            "views.count=2",
            "cache.encoding={name: dense, dtype: float32}",
            "cache.rows_per_block=2304",
            f"cache.path={tmp_path}/pixels.cache",
            f"runs.path={tmp_path}/runs",
            "students.1.samples=0.5",
            "students.1.train.epochs=1",
        ],
    )


def test_students_learn_from_the_distributions_of_pixels(segmentation: Pipeline) -> None:
    rows = run_pipeline(segmentation)

    assert ["distilled", "a-tenth-of-the-labels", "true-labels"] == [row.name for row in rows]
    assert all(row.nll_mean is not None and np.isfinite(row.nll_mean) for row in rows)
    assert [12, 6, 12] == [row.samples for row in rows]
    assert [] == verify(segmentation.cache.path, deep=True)
    cache = logitcache.open(segmentation.cache.path)
    assert (12 * 576, 3 * 2) == (cache.num_rows, len(cache.views) * cache.row_map.blocks_per_view)

    data = resolve_data(segmentation, trust=False)
    teacher, _ = resolve_teacher(segmentation, data, cache.view_plan, trust=False)
    index, image, _ = ViewDataset(data.train, cache.view_plan)[(1, 5)]
    with torch.inference_mode():
        expected = teacher(image[None])[0].flatten(1).T.log_softmax(1)
    found = cache.logits(index + torch.arange(576)).log_softmax(1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_changed_mask_is_found(segmentation: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    random = segmentation.model_copy(update={"teacher": segmentation.teacher.model_copy(update={"weights": "random"})})
    cache_teacher(random)
    made = pixels.digits

    def changed(**args: int) -> dict[str, pixels.Canvases]:
        splits = made(**args)
        splits["train"].masks[7, 0, 0] = 3
        return splits

    monkeypatch.setattr(pixels, "digits", changed)

    with pytest.raises(IdentityMismatch, match="7"):
        train_students(random)


def test_the_dataset_of_the_guide_trains_students_and_shows_a_changed_mask(
    segmentation: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    [program] = re.findall(r"^```python\n(.*?)^```", GUIDE, flags=re.MULTILINE | re.DOTALL)
    names: dict[str, Any] = {}
    exec(program, names)
    made = {
        split: [torch.from_numpy(array) for array in (canvases.images[:, None] / np.float32(255), canvases.masks)]
        for split, canvases in pixels.digits(train=12, validation=4, test=4).items()
    }
    monkeypatch.setattr(
        pixels,
        "digits",
        lambda **_: {split: names["Canvases"](images, masks.long()) for split, (images, masks) in made.items()},
    )
    teacher = segmentation.teacher.model_copy(update={"weights": "random"})
    pipeline = segmentation.model_copy(update={"teacher": teacher})
    cache_teacher(pipeline)

    assert 12 * 576 == logitcache.open(pipeline.cache.path).num_rows
    assert all(row.nll_mean is not None and np.isfinite(row.nll_mean) for row in train_students(pipeline))
    made["train"][1][7, 0, 0] = 3
    differences = [problem.path for problem in verify_match(pipeline)]
    assert 1 == len(differences)
    assert "7" in differences[0]


def test_a_selection_keeps_the_rows_of_its_samples() -> None:
    class Sequences:
        rows_per_sample = np.array([2, 0, 3])
        row_positions = np.array([0, 4, 1, 2, 5], dtype=np.int32)
        num_classes = 4

        def __len__(self) -> int:
            return 3

        def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
            return torch.zeros(6), torch.arange(int(self.rows_per_sample[index]))

    rows = rows_of_dataset(Selection(Sequences(), np.array([2, 0])))

    assert [0, 3, 5] == rows.offsets.tolist()
    assert rows.positions is not None
    assert [1, 2, 5, 0, 4] == rows.positions.tolist()
    assert [-1, -1, -1] == sample_table(Sequences()).targets.tolist()


def test_mixing_and_unknown_classes_of_pixels_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    canvases = pixels.Canvases(np.zeros((3, 4, 4), np.uint8), np.zeros((3, 4, 4), np.uint8))
    plan = ViewPlan(mixing=Mixing(mixup=1.0), num_classes=11, rows=rows_of_dataset(canvases))
    with pytest.raises(UsageError, match="mixup and CutMix need one row per sample"):
        ViewDataset(canvases, plan)

    monkeypatch.setattr(pixels.Canvases, "class_names", None)
    monkeypatch.setattr(pixels, "digits", lambda: canvases)
    with pytest.raises(UsageError, match="give the dataset `num_classes`"):
        load_data("pipelines.pixels:digits")


def test_a_net_of_another_resolution_is_refused(segmentation: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    def halved(input_shape: tuple[int, ...], num_classes: int, **args: int) -> torch.nn.Module:
        return torch.nn.Conv2d(1, num_classes, 2, stride=2)

    monkeypatch.setattr(pixels, "UNet", halved)

    with pytest.raises(ShapeError, match="a row lies at position 575 of its sample, and the batch has 144 positions"):
        cache_teacher(
            segmentation.model_copy(update={"teacher": segmentation.teacher.model_copy(update={"weights": "random"})})
        )


def test_a_student_sees_other_inputs_than_its_teacher(tmp_path: Path) -> None:
    need_package("sklearn", "demo")
    pipeline = load_pipeline(
        TWINS / "cross_modal.yaml", [*TINY_TRAINING, f"cache.path={tmp_path}/a.cache", f"runs.path={tmp_path}/runs"]
    )

    rows = run_pipeline(pipeline)

    assert ["distilled", "true-labels"] == [row.name for row in rows]
    data = resolve_data(pipeline, trust=False)
    cache = logitcache.open(tmp_path / "a.cache", trust=True)
    teacher, _ = resolve_teacher(pipeline, data, cache.view_plan, trust=False)
    index, image, _ = ViewDataset(data.train, cache.view_plan)[3]
    assert (1, 8, 8) == tuple(image.shape)
    with torch.inference_mode():
        expected = teacher(image[None]).log_softmax(1)
    torch.testing.assert_close(cache.logits([index]).log_softmax(1), expected, rtol=1e-2, atol=1e-2)
    assert (16 * 64 + 64 + 64 * 10 + 10) == rows[0].parameters


def test_measurements_are_joined_by_key_in_any_order() -> None:
    images, keys = np.arange(3 * 4, dtype=np.uint8).reshape(3, 2, 2), ["a", "b", "c"]
    measurements = cross_modal.measured(images / 12, keys, noise=0.0, seed=1)

    paired = cross_modal.Paired(images, keys, np.zeros(3, int), measurements)

    for index in range(3):
        image, measurement = paired[index][0]["image"][0], paired[index][0]["measurement"]
        torch.testing.assert_close(torch.cat([image.mean(1), image.mean(0)]) * (255 / 12), measurement)
    del measurements["b"]
    with pytest.raises(UsageError, match="1 of 3 images have no measurement, the first is b"):
        cross_modal.Paired(images, keys, np.zeros(3, int), measurements)
