"""A student trained in Lightning from a cache: the right view and row in each step, also after a resume."""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader
from torchvision.transforms import v2

import logitcache
from logitcache.errors import IdentityMismatch, UsageError
from logitcache.train.labels import CachedLabels
from tests.models import Pictures
from tests.needs import need_package

need_package("lightning", "lightning")

from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer  # noqa: E402
from lightning.pytorch.callbacks import ModelCheckpoint  # noqa: E402

from logitcache.integrations.lightning import DistillFromCache  # noqa: E402

# Lightning advises more workers, and uses what torch deprecates.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")

SAMPLES, VIEWS, BATCH, EPOCHS = 56, 3, 16, 5
STEPS = 4
"""Batches of an epoch; the last one is smaller."""
CHECKOUT = Path(__file__).parents[2]


def digits(count: int = SAMPLES) -> list[tuple[torch.Tensor, int]]:
    """Images of scikit-learn, and their classes."""
    from sklearn.datasets import load_digits

    pixels, classes = load_digits(return_X_y=True)
    images = torch.tensor(pixels[:count] / 16, dtype=torch.float32).reshape(-1, 1, 8, 8)
    return list(zip(images, classes[:count].tolist(), strict=True))


def plan(degrees: float = 45) -> logitcache.ViewPlan:
    return logitcache.ViewPlan(transform=v2.RandomAffine(degrees=degrees), seed=0)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))


@pytest.fixture(scope="module")
def location(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of three views of some digits."""
    path = tmp_path_factory.mktemp("lightning") / "a.cache"
    write_cache(path)
    return path


def write_cache(path: Path) -> None:
    views = logitcache.ViewDataset(digits(), plan())
    teacher = network()
    with logitcache.create(
        path, num_samples=SAMPLES, num_classes=10, num_views=VIEWS, teacher="net", dataset="digits", view_plan=plan()
    ) as writer:
        for view in range(VIEWS):
            inputs = views.batch([(view, sample) for sample in range(SAMPLES)])
            writer.write(view=view, start=0, logits=3 * teacher(inputs).detach(), inputs=inputs)


class Student(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = network()

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        inputs, _, teacher = batch
        return logitcache.losses.kl_divergence(self.net(inputs), teacher, temperature=2.0, reduction="mean")

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Gives the trainer a validation loop, which counts batches too."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.01)


class Record(Callback):
    """View and row of each sample of each step."""

    def __init__(self, distill: DistillFromCache) -> None:
        self._distill = distill
        self.steps: list[list[int]] = []

    def on_train_batch_start(self, *arguments: Any) -> None:
        loader = self._distill._loader
        assert loader is not None
        assert loader.index is not None
        self.steps.append(loader.index.tolist())


def trainer(*callbacks: Callback, **options: Any) -> Trainer:
    settings: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    settings |= {"accelerator": "cpu", "max_epochs": EPOCHS, "enable_checkpointing": False}
    return Trainer(callbacks=list(callbacks), **settings | options)


def fit(
    location: Path,
    *callbacks: Callback,
    resume: Path | None = None,
    loader: dict[str, Any] | None = None,
    **options: Any,
) -> tuple[Student, list[list[int]]]:
    """Train a student; returns it and the samples of its steps."""
    distill = DistillFromCache(logitcache.open(location), plan())
    record, student = Record(distill), Student()
    batches = distill.loader(digits(), **{"batch_size": BATCH} | (loader or {}))
    validation = DataLoader([torch.zeros(1)], batch_size=1)
    trainer(distill, record, *callbacks, **options).fit(
        student, batches, validation, ckpt_path=resume, weights_only=False
    )
    return student, record.steps


def weights(student: Student) -> dict[str, Any]:
    return {name: values.tolist() for name, values in student.net.state_dict().items()}


def plain_loop(location: Path) -> tuple[dict[str, Any], list[list[int]]]:
    """Weights and samples of the loop of the README."""
    cache = logitcache.open(location)
    cache.check_plan(here := plan())
    views = logitcache.ViewDataset(digits(), here)
    sampler = logitcache.ViewSampler(views, cycle=cache.views)
    student = Student()
    optimizer = torch.optim.Adam(student.parameters(), lr=0.01)
    steps = []
    for epoch in range(EPOCHS):
        sampler.set_epoch(epoch)
        for index, inputs, _ in DataLoader(views, batch_size=BATCH, sampler=sampler):
            steps.append(index.tolist())
            loss = logitcache.losses.kl_divergence(student.net(inputs), cache.logits(index), temperature=2.0).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return weights(student), steps


def test_the_example_distils(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(CHECKOUT / "examples" / "lightning_distillation.py"))
    [accuracy] = re.findall(r"^student: ([\d.]+)%$", capsys.readouterr().out, re.MULTILINE)

    assert float(accuracy) > 75


@pytest.mark.parametrize("workers", [0, 2], ids=["no worker", "persistent workers"])
def test_the_weights_are_those_of_the_plain_loop(location: Path, workers: int) -> None:
    options = {"num_workers": workers, "persistent_workers": workers > 0}
    student, steps = fit(location, loader=options)

    assert plain_loop(location) == (weights(student), steps)
    assert [epoch % VIEWS for epoch in range(EPOCHS) for _ in range(STEPS)] == [
        int(logitcache.split_index(step)[0][0]) for step in steps
    ]


@pytest.fixture(scope="module")
def interrupted(
    location: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any], list[list[int]]]:
    """A checkpoint of each step and of the end of each epoch; the weights and the samples of the steps."""
    folder = tmp_path_factory.mktemp("checkpoints")
    each_step = ModelCheckpoint(folder, filename="{step}", save_top_k=-1, every_n_train_steps=1)
    each_epoch = ModelCheckpoint(
        folder, filename="end-{epoch}", save_top_k=-1, every_n_epochs=1, save_on_train_epoch_end=True
    )
    student, steps = fit(location, each_step, each_epoch, enable_checkpointing=True)
    return folder, weights(student), steps


@pytest.mark.parametrize("workers", [0, 1], ids=["no worker", "a persistent worker"])
@pytest.mark.parametrize(
    ("checkpoint", "done"), [("step=2", 2), ("step=7", 7), ("step=12", 12), ("end-epoch=0", 4), ("end-epoch=3", 16)]
)
def test_a_resumed_run_goes_on_with_the_next_batch(
    location: Path, interrupted: tuple[Path, dict[str, Any], list[list[int]]], checkpoint: str, done: int, workers: int
) -> None:
    """In the middle of an epoch, after its last step, and at its end."""
    folder, trained, steps = interrupted
    options = {"num_workers": workers, "persistent_workers": workers > 0}
    student, resumed = fit(location, resume=folder / f"{checkpoint}.ckpt", loader=options)

    assert steps[done:] == resumed
    assert trained == weights(student)


def test_the_next_view_is_loaded_during_an_epoch(location: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[tuple[list[int], list[int]]] = []
    start_views = CachedLabels.start_views

    def record(self: CachedLabels, numbers: list[int], following: list[int]) -> None:
        started.append((numbers, following))
        start_views(self, numbers, following)

    monkeypatch.setattr(CachedLabels, "start_views", record)
    fit(location)

    assert [([epoch % VIEWS], [(epoch + 1) % VIEWS]) for epoch in range(EPOCHS)] == started


def test_a_data_module_returns_the_loader(location: Path) -> None:
    distill = DistillFromCache(logitcache.open(location), plan())
    record, student = Record(distill), Student()

    class Digits(LightningDataModule):  # type: ignore[misc]
        def train_dataloader(self) -> Any:
            return distill.loader(digits(), batch_size=BATCH)

        def val_dataloader(self) -> Any:
            return DataLoader([torch.zeros(1)], batch_size=1)

    trainer(distill, record).fit(student, datamodule=Digits())

    assert plain_loop(location) == (weights(student), record.steps)


def test_another_batch_size_can_not_go_on_within_an_epoch(
    location: Path, interrupted: tuple[Path, dict[str, Any], list[list[int]]]
) -> None:
    with pytest.raises(IdentityMismatch, match="batch_size: 16 there, 8 here"):
        fit(location, resume=interrupted[0] / "step=2.ckpt", loader={"batch_size": 8})


def test_with_max_steps_a_resumed_run_leaves_out_no_view(
    location: Path, interrupted: tuple[Path, dict[str, Any], list[list[int]]]
) -> None:
    """Lightning 2.6 leaves out the epoch after a checkpoint from the end of an epoch."""
    folder, trained, steps = interrupted
    with pytest.raises(UsageError, match="set max_epochs instead"):
        fit(location, resume=folder / "end-epoch=0.ckpt", max_steps=EPOCHS * STEPS)
    student, resumed = fit(location, resume=folder / "step=7.ckpt", max_steps=EPOCHS * STEPS)

    assert (trained, steps[7:]) == (weights(student), resumed)


def test_another_plan_or_dataset_is_refused_before_training(location: Path) -> None:
    cache = logitcache.open(location)
    with pytest.raises(IdentityMismatch, match="degrees"):
        DistillFromCache(cache, plan(degrees=20))
    with pytest.raises(UsageError, match="check_plan"):
        DistillFromCache(cache)  # the cache has no record of a Python object
    distill = DistillFromCache(cache, plan())
    with pytest.raises(IdentityMismatch, match="not what the teacher saw"):
        distill.loader(digits()[::-1], batch_size=BATCH)
    with pytest.raises(IdentityMismatch, match="has 56 samples; this dataset has 10"):
        distill.loader(digits(10), batch_size=BATCH)
    with pytest.raises(UsageError, match="sets sampler itself"):
        distill.loader(digits(), batch_size=BATCH, sampler=range(3))


def test_keys_and_labels_are_compared_before_training(tmp_path: Path) -> None:
    pictures = Pictures(12)
    about: dict[str, Any] = {"num_samples": 12, "num_classes": 10, "num_views": 2, "teacher": "net"}
    table = logitcache.sample_table(pictures, contents=True)
    with logitcache.create(tmp_path / "a", samples=table, view_plan=plan(), **about) as writer:
        for view in range(2):
            writer.write(view=view, start=0, logits=torch.randn(12, 10))
    distill = DistillFromCache(logitcache.open(tmp_path / "a"), plan())

    with pytest.raises(IdentityMismatch, match=r"sample 3 \(scan/0003.png\) has the target"):
        distill.loader(Pictures(12, relabel=3), batch_size=4)
    with pytest.raises(IdentityMismatch, match=r"'scan/0012.png' is not in the cache"):
        distill.loader(Pictures(13), batch_size=4)
    unnamed = [Pictures(12, relabel=3)[number] for number in range(12)]
    with pytest.raises(IdentityMismatch, match="sample 3 .* has the target"):
        distill.loader(unnamed, rows=np.arange(12), batch_size=4)
    with pytest.raises(IdentityMismatch, match="sample '0' is not in the cache"):
        distill.loader(unnamed, batch_size=4)
    rows = np.array([5, 2, 9])
    of_rows = distill.loader([pictures[row] for row in rows], rows=rows, batch_size=4).labels.views
    by_key = distill.loader(Pictures(12, order=[5, 2, 9]), batch_size=4).labels.views
    assert [5, 2, 9] == of_rows.rows.tolist() == by_key.rows.tolist()
    with pytest.raises(UsageError, match="expected one row of the cache for each sample"):
        distill.loader([pictures[row] for row in rows], rows=np.array([5, 2, 12]), batch_size=4)


@pytest.mark.parametrize("kind", ["normalised", "another view"])
def test_inputs_that_a_hook_changes_are_refused_before_the_first_step(location: Path, kind: str) -> None:
    distill = DistillFromCache(logitcache.open(location), plan())
    loader = distill.loader(digits(), batch_size=BATCH)

    class Changed(Student):
        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            if kind == "normalised":
                return (batch[0] * 2 - 1, *batch[1:])
            rows = logitcache.split_index(loader.index)[1].tolist()
            return (loader.labels.views.batch([(1, row) for row in rows]), *batch[1:])

    student = Changed()
    before = weights(student)

    with pytest.raises(IdentityMismatch, match="is not view 0 as it is rendered here"):
        trainer(distill).fit(student, loader)
    assert before == weights(student)


def test_a_trainer_that_would_lose_the_views_is_refused(location: Path) -> None:
    distill = DistillFromCache(logitcache.open(location), plan())
    loader = distill.loader(digits(), batch_size=BATCH)
    with pytest.raises(UsageError, match=r"callbacks=\[distill\]"):
        trainer().fit(Student(), loader)
    with pytest.raises(UsageError, match="overfit_batches replaces the sampler"):
        trainer(distill, overfit_batches=2).fit(Student(), loader)
    other = DistillFromCache(logitcache.open(location), plan())
    with pytest.raises(UsageError, match="are not from its `loader`"):
        trainer(other).fit(Student(), DataLoader(digits(), batch_size=BATCH))


def test_two_processes_share_each_view_also_after_a_resume(location: Path, tmp_path: Path) -> None:
    """Started by torchrun, with gloo; the loader is made before the processes know of each other."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    ended = subprocess.run(
        [*command, "tests.integration.test_lightning", str(location), str(tmp_path)],
        cwd=CHECKOUT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(CHECKOUT)},
        capture_output=True,
        text=True,
    )
    assert 0 == ended.returncode, ended.stderr[-4000:]

    whole, resumed, ended_epoch = (
        [json.loads((tmp_path / f"{run}-{rank}.json").read_text()) for rank in range(2)] for run in RUNS_OF_A_RANK
    )
    views = logitcache.ViewDataset(digits(), plan())
    for rank in range(2):
        sampler = logitcache.ViewSampler(views, cycle=range(VIEWS), num_replicas=2, rank=rank)
        expected = []
        for epoch in range(2):
            sampler.set_epoch(epoch)
            order = [logitcache.join_index(*place) for place in sampler]
            expected += [order[start : start + BATCH] for start in range(0, len(order), BATCH)]
        assert expected == whole[rank]["steps"]
        assert expected[1:] == resumed[rank]["steps"]
        assert expected[len(expected) // 2 :] == ended_epoch[rank]["steps"]
    assert whole[0]["weights"] == whole[1]["weights"] == resumed[0]["weights"] == ended_epoch[0]["weights"]


RUNS_OF_A_RANK = {"whole": None, "resumed": "step=1.ckpt", "ended": "end-epoch=0.ckpt"}


def train_on_a_rank(location: Path, folder: Path) -> None:
    """Two epochs; then, with a persistent worker, the rest from checkpoints after the first step and the first epoch."""
    each_step = ModelCheckpoint(folder, filename="{step}", save_top_k=-1, every_n_train_steps=1)
    each_epoch = ModelCheckpoint(
        folder, filename="end-{epoch}", save_top_k=-1, every_n_epochs=1, save_on_train_epoch_end=True
    )
    for run, checkpoint in RUNS_OF_A_RANK.items():
        options: dict[str, Any] = {"devices": 2, "strategy": "ddp", "max_epochs": 2}
        if checkpoint is None:
            student, steps = fit(location, each_step, each_epoch, enable_checkpointing=True, **options)
        else:
            workers = {"num_workers": 1, "persistent_workers": True}
            student, steps = fit(location, resume=folder / checkpoint, loader=workers, **options)
        result = json.dumps({"steps": steps, "weights": weights(student)})
        (folder / f"{run}-{os.environ['RANK']}.json").write_text(result)


if __name__ == "__main__":
    train_on_a_rank(Path(sys.argv[1]), Path(sys.argv[2]))
