"""Several views are made from a sample each time it is loaded: the same pixels, labels and digests, fewer loads."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.transforms import v2

import logitcache
from logitcache.cache.layout import Block
from logitcache.cache.manifest import LOGITS
from logitcache.config.schema import Pipeline
from logitcache.data import views as views_module
from logitcache.data.index import join_index
from logitcache.data.loading import rendered_batches
from logitcache.data.order import epoch_order, pairs_of_epoch
from logitcache.data.rows import OneRowEach
from logitcache.data.samples import load_sample
from logitcache.data.views import Mixing, ViewDataset, ViewPlan
from logitcache.engines import Claiming, Engine, Local, Shard
from logitcache.engines.protocol import share
from logitcache.errors import UsageError
from logitcache.stages.cache_teacher import TeacherJob, cache_teacher, grouped_batches, teacher_batches
from logitcache.stages.train_student import Experiment
from logitcache.train.labels import CachedLabels
from logitcache.train.loop import Run, train
from logitcache.train.runs import NullRunFolder, RunFolder
from tests.conftest import FEW_DIGITS

SAMPLES, VIEWS, CLASSES = 12, 4, 3


class Counted:
    """Images that count how often each is loaded."""

    def __init__(self, kind: str = "image") -> None:
        self.images = np.random.default_rng(0).integers(0, 256, (SAMPLES, 16, 16, 3), dtype=np.uint8)
        self.kind = kind
        self.loads: Counter[int] = Counter()

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> tuple[Any, int]:
        self.loads[index] += 1
        image = self.images[index].copy()
        made = {"image": Image.fromarray, "array": lambda image: image, "tensor": lambda image: torch.from_numpy(image)}
        return made[self.kind](image), index % CLASSES


class InPlace:
    """A random transform that changes its input."""

    def __call__(self, value: Any) -> Any:
        offset = int(torch.randint(0, 256, ()))
        if isinstance(value, Image.Image):
            value.putpixel((0, 0), (offset, offset, offset))
        else:
            value[0, 0] = offset
        return value


CROPS = v2.RandomResizedCrop(8, scale=(0.3, 1.0))


@pytest.mark.parametrize("mixing", [Mixing(), Mixing(mixup=0.4, cutmix=1.0)], ids=["plain", "mixed"])
@pytest.mark.parametrize(
    ("transform", "kind"),
    [(CROPS, "image"), (InPlace(), "image"), (InPlace(), "array"), (InPlace(), "tensor")],
    ids=["crops", "image in place", "array in place", "tensor in place"],
)
def test_views_of_one_batch_have_the_pixels_of_views_that_are_rendered_alone(
    transform: Any, kind: str, mixing: Mixing
) -> None:
    plan = ViewPlan(transform=transform, seed=3, mixing=mixing, num_classes=CLASSES)
    dataset = Counted(kind)
    views = ViewDataset(dataset, plan)
    places = [(view, index) for index in (5, 0, 7) for view in range(VIEWS)]
    together = views.__getitems__(places)
    loads = dataset.loads.copy()
    alone = [ViewDataset(Counted(kind), plan)[place] for place in places]

    for found, expected in zip(together, alone, strict=True):
        assert expected[0] == found[0]
        assert torch.equal(torch.as_tensor(expected[1]), torch.as_tensor(found[1]))
        assert torch.equal(torch.as_tensor(expected[2]), torch.as_tensor(found[2]))
    if not mixing.active:
        assert {5: 1, 0: 1, 7: 1} == loads


def test_files_that_are_read_later_are_opened_again(tmp_path: Path) -> None:
    """A transform may read such a file in its own way, at a smaller size for example."""
    Image.fromarray(Counted().images[0]).save(tmp_path / "a.png")

    class Files(Counted):
        def __getitem__(self, index: int) -> tuple[Any, int]:
            self.loads[index] += 1
            return Image.open(tmp_path / "a.png"), 0

    dataset = Files()
    ViewDataset(dataset, ViewPlan(transform=CROPS)).__getitems__([(0, 1), (1, 1)])
    assert {1: 2} == dataset.loads


def test_batches_of_stage_1_are_the_same_in_groups() -> None:
    rows = OneRowEach(10, 4)
    blocks = [Block(view, number) for number in range(3) for view in range(3)]
    groups = list(grouped_batches(rows, blocks, 3, together=3))

    alone = sorted((view, list(samples)) for view, samples in teacher_batches(rows, blocks, 3))
    assert alone == sorted((view, list(samples)) for group in groups for view, samples in group)
    assert [[0, 1, 2]] * 5 == [[view for view, _ in group] for group in groups]
    assert all(len({tuple(samples) for _, samples in group}) == 1 for group in groups)


def test_blocks_are_not_drawn_before_they_are_needed() -> None:
    """An engine claims a block when it is drawn."""
    drawn: list[Block] = []

    def claimed() -> Any:
        for number in range(3):
            drawn.append(Block(0, number))
            yield drawn[-1]

    next(grouped_batches(OneRowEach(12, 4), claimed(), 4, together=1))
    assert [Block(0, 0)] == drawn


def test_processes_share_blocks_by_groups() -> None:
    blocks = [Block(view, number) for number in range(3) for view in range(2)]

    assert blocks[:2] + blocks[4:] == share(blocks, 0, 2, together=2)
    assert blocks[2:4] == share(blocks, 1, 2, together=2)
    assert blocks[1::2] == share(blocks, 1, 2, together=1)


Make = Callable[..., Pipeline]
FOUR_VIEWS = ("views.count=4", "teacher.weights=random")


@pytest.fixture
def tiny(tiny: Make) -> Make:
    """The tiny pipeline with few samples."""
    return lambda *overrides: tiny(*FEW_DIGITS, *overrides)


@pytest.mark.parametrize(("per_decode", "workers"), [(3, 2), (4, 0)])
def test_a_cache_has_the_same_digest_with_any_number_of_views_per_decode(
    per_decode: int, workers: int, tiny: Make, tmp_path: Path
) -> None:
    plain = cache_teacher(tiny(*FOUR_VIEWS, f"cache.path={tmp_path}/a"))
    grouped = cache_teacher(
        tiny(*FOUR_VIEWS, f"cache.path={tmp_path}/b", f"views.per_decode={per_decode}", f"num_workers={workers}")
    )

    assert plain.manifest.id == grouped.manifest.id
    assert plain.manifest.digest == grouped.manifest.digest
    assert sorted(plain.computed_blocks) == sorted(grouped.computed_blocks)
    assert set(range(per_decode)) == {block.view for block in grouped.computed_blocks[:per_decode]}
    assert logitcache.open(tmp_path / "a").input_digests(1) == logitcache.open(tmp_path / "b").input_digests(1)


@pytest.mark.parametrize(
    "engines",
    [[Local()], [Shard(index=0, count=2), Shard(index=1, count=2)], [Claiming()]],
    ids=lambda each: each[0].name,
)
def test_engines_load_a_sample_once_for_several_views(
    engines: list[Engine], tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = cache_teacher(tiny(*FOUR_VIEWS, f"cache.path={tmp_path}/a"))
    loads: Counter[int] = Counter()

    def counting(dataset: Any, index: int) -> tuple[Any, Any]:
        loads[index] += 1
        return load_sample(dataset, index)

    with closing(TeacherJob(tiny(*FOUR_VIEWS), trust=False).load()) as worker:  # creation loads a few samples, too
        worker.open()
    monkeypatch.setattr(views_module, "load_sample", counting)
    for engine in engines:
        result = cache_teacher(tiny(*FOUR_VIEWS, "views.per_decode=2"), engine=engine)

    assert plain.manifest.digest == result.manifest.digest
    assert {2: 95} == Counter(loads[index] for index in range(1, 96)), "views 0 and 1 together, then views 2 and 3"


def test_students_with_several_views_per_decode_resume_exactly(tiny: Make) -> None:
    """Epochs come in groups; the last group is smaller here."""
    settings = (*FOUR_VIEWS, "views.per_decode=2", "train.epochs=3", "train.checkpoint_steps=2")
    pipeline = tiny(*settings)
    cache_teacher(pipeline)
    experiment = Experiment(pipeline, trust=False)
    student = next(each for each in pipeline.students if each.labels == "cache")
    whole = train(experiment.job(student, seed=0))
    job = replace(experiment.job(student, seed=0), folder=Path(pipeline.runs.path) / "again")
    run = Run(job, RunFolder(job.folder, job.identity))
    places = list(run.places())
    run.begin_epoch()
    for batch, _ in zip(rendered_batches(job.views, places, num_workers=0), range(3), strict=False):
        run.train_step(*batch)
    again = train(replace(experiment.job(student, seed=0), folder=job.folder))

    assert [{0, 1}, {2}] == [{view for view, _ in batch} for batch in (places[0], places[-1])]
    for name in ("accuracy", "epochs", "samples"):
        assert whole[name] == again[name]


@pytest.mark.parametrize("mixup", [0, 0.5])
def test_stages_have_the_same_results_with_views_that_are_finished_on_the_device(mixup: float, tiny: Make) -> None:
    settings = ("views.count=2", f"views.mixup={mixup}", "teacher.input=[{Normalize: {mean: [0.5], std: [0.5]}}]")
    results = []
    for name in ("false", "true"):
        pipeline = tiny(*settings, f"views.on_device={name}", f"cache.path={tiny().cache.path}-{name}")
        digest = cache_teacher(pipeline).manifest.digest
        student = pipeline.students[0].model_copy(update={"input": pipeline.teacher.input})
        job = Experiment(pipeline, trust=False).job(student, seed=0)
        run = Run(job, NullRunFolder())
        run.begin_epoch()
        for batch, _ in zip(rendered_batches(job.views, run.places(), num_workers=0), range(4), strict=False):
            run.train_step(*batch)
        results.append((digest, job.views.on_device, [p.detach().clone() for p in run.model.parameters()]))

    (digest, on_device, weights), (other_digest, other_on_device, other_weights) = results
    assert (False, True) == (on_device, other_on_device)
    assert digest == other_digest
    assert all(map(torch.equal, weights, other_weights))


def test_more_views_per_decode_than_views_are_refused(tiny: Make) -> None:
    with pytest.raises(UsageError, match="per_decode is 5, and there are 4 views; expected at most 4"):
        tiny("views.count=4", "views.per_decode=5")


def test_a_run_with_one_view_per_decode_has_the_identity_that_it_had(tiny: Make) -> None:
    one, four = (tiny("views.count=4", f"views.per_decode={number}") for number in (1, 4))

    assert "per_decode" not in one.run_identity(one.students[0], 0)["views"]
    assert 4 == four.run_identity(four.students[0], 0)["views"]["per_decode"]
    assert one.run_identity(one.teacher, 0) == four.run_identity(four.teacher, 0)  # the teacher is trained as before


def test_a_group_of_epochs_has_every_sample_once_in_every_view() -> None:
    order = epoch_order(10, seed=0, epoch=0)
    epochs = [pairs_of_epoch(order, 4, turn) for turn in range(4)]

    assert all(len(order) == len(positions) for positions, _ in epochs)
    pairs = Counter((int(p), int(v)) for positions, views in epochs for p, v in zip(positions, views, strict=True))
    assert {(position, view): 1 for position in range(10) for view in range(4)} == pairs
    assert 3 == len(np.unique(epochs[0][0]))


def test_one_view_per_decode_keeps_the_order_of_an_epoch() -> None:
    order = epoch_order(10, seed=0, epoch=3)
    positions, views = pairs_of_epoch(order, 1, 0)

    assert order.tolist() == positions.tolist()
    assert [0] * 10 == views.tolist()


def labels() -> Tensor:
    return torch.randn(VIEWS, SAMPLES, CLASSES, generator=torch.Generator().manual_seed(1))


def build(path: Path, plan: ViewPlan, encoding: Any) -> logitcache.LogitCache:
    views = ViewDataset(Counted(), plan)
    with logitcache.create(
        path, num_samples=SAMPLES, num_classes=CLASSES, num_views=VIEWS, rows_per_block=5, encoding=encoding,
        outputs={"features": {"shape": [2, 2]}}, teacher="t", dataset="d", view_plan=plan, calibration=labels()[0],
    ) as writer:  # fmt: skip
        for view in range(VIEWS):
            features = torch.arange(SAMPLES * 4).reshape(SAMPLES, 2, 2) + 100.0 * view
            digests = views.input_digests(view)
            writer.write(
                view=view, start=0, logits=labels()[view], outputs={"features": features}, input_digests=digests
            )
    return logitcache.open(path)


@pytest.mark.parametrize("budget", [None, 1], ids=["resident", "streamed"])
@pytest.mark.parametrize("encoding", [logitcache.Dense(), logitcache.TopK(k=2)], ids=repr)
def test_labels_of_mixed_batches_are_those_of_each_view(tmp_path: Path, encoding: Any, budget: int | None) -> None:
    plan = ViewPlan(transform=CROPS, seed=3)
    cache = build(tmp_path / "a.cache", plan, encoding)
    views = ViewDataset(Counted(), plan)
    sampler = logitcache.ViewSampler(views, cycle=cache.views, per_decode=2, seed=5)
    found = CachedLabels(cache, views, torch.device("cpu"), memory_budget=budget, outputs=[LOGITS, "features"])
    seen: Counter[tuple[int, int]] = Counter()
    for epoch in range(4):
        sampler.set_epoch(epoch)
        group = [epoch // 2 * 2, epoch // 2 * 2 + 1]
        found.start_views(group, [])
        for index, inputs, targets in DataLoader(views, batch_size=4, sampler=sampler):
            cache.check_batch(index, inputs, views=views)
            numbers, rows = logitcache.split_index(index)
            assert set(numbers.tolist()) == set(group)
            expected = cache.logits(index)
            assert torch.equal(expected, found.logits(index, None, targets))
            features = found.outputs(["features"], index, None, targets)["features"]
            assert torch.equal(features[:, 0, 0], rows * 4 + 100.0 * numbers)
            of_targets = found.targets(index, None, targets)
            assert torch.allclose(of_targets.dense().softmax(dim=1), expected.softmax(dim=1), atol=1e-3)
            seen.update(zip(numbers.tolist(), rows.tolist(), strict=True))
    assert {(view, row): 1 for view in range(VIEWS) for row in range(SAMPLES)} == seen


def test_an_index_of_another_view_is_refused(tmp_path: Path) -> None:
    plan = ViewPlan(transform=CROPS, seed=3)
    cache = build(tmp_path / "a.cache", plan, "dense")
    found = CachedLabels(cache, ViewDataset(Counted(), plan), torch.device("cpu"))
    found.start_views([0, 1], [])

    with pytest.raises(UsageError, match="the batch has indices of view 2; expected those of views 0, 1"):
        found.logits(torch.tensor([join_index(2, 0)]), None, torch.zeros(1))


def test_a_sampler_refuses_more_views_per_decode_than_it_has() -> None:
    views = ViewDataset(Counted(), ViewPlan(views=range(2)))
    with pytest.raises(UsageError, match="per_decode is 3; expected 1 to 2, the number of views"):
        logitcache.ViewSampler(views, per_decode=3)
