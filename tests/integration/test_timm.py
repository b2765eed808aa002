"""A student trained in timm's structure from a cache: the right view and row in each step, or a clear refusal."""

from __future__ import annotations

import argparse
import functools
import gc
import json
import os
import re
import runpy
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import logitcache
from logitcache.data.samples import SampleTable
from logitcache.data.transforms import build_transform
from logitcache.errors import IdentityMismatch, UsageError
from tests.needs import need_package

need_package("timm", "timm")

from timm import create_model  # noqa: E402
from timm.data import FastCollateMixup, Mixup, create_loader  # noqa: E402
from timm.loss import SoftTargetCrossEntropy  # noqa: E402
from timm.optim import create_optimizer_v2  # noqa: E402
from timm.scheduler import create_scheduler_v2  # noqa: E402
from timm.task import resume_task_checkpoint  # noqa: E402
from timm.utils import CheckpointSaver  # noqa: E402

from logitcache.integrations.timm import (  # noqa: E402
    CachedLoader,
    CachedLogitDistillationTask,
    create_cached_loader,
    mixing,
    view_plan,
)

CHECKOUT = Path(__file__).parents[2]
SAMPLES, VIEWS, BATCH, EPOCHS = 50, 3, 16, 4
STEPS = SAMPLES // BATCH
SIZE: dict[str, Any] = {"input_size": (1, 16, 16), "mean": (0.3,), "std": (0.35,)}
AUGMENTATION: dict[str, Any] = {
    "scale": (0.6, 1.0),
    "hflip": 0.5,
    "color_jitter": None,
    "auto_augment": "rand-m5-n1",
    "interpolation": "random",
}
OPTIONS: dict[str, Any] = {"batch_size": BATCH, "is_training": True, "num_workers": 0, "device": torch.device("cpu")}
MIXUP: dict[str, Any] = {
    "mixup_alpha": 0.4,
    "cutmix_alpha": 1.0,
    "mode": "elem",
    "label_smoothing": 0.1,
    "num_classes": 10,
}
"""As train.py makes them from --mixup, --cutmix, --mixup-mode and --smoothing."""


class Digits(torch.utils.data.Dataset[tuple[Any, int]]):
    """Images and classes, as `timm.data.create_dataset` gives them."""

    def __init__(self) -> None:
        from sklearn.datasets import load_digits

        pixels, classes = load_digits(return_X_y=True)
        self.images = (pixels[:SAMPLES] * 15).astype(np.uint8).reshape(-1, 8, 8)
        self.classes = classes[:SAMPLES].tolist()
        self.transform: Any = None

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image = Image.fromarray(self.images[index])
        return image if self.transform is None else self.transform(image), self.classes[index]


def student() -> torch.nn.Module:
    torch.manual_seed(0)
    model: torch.nn.Module = create_model(
        "test_vit", img_size=16, patch_size=8, in_chans=1, num_classes=10, depth=1, embed_dim=16, num_heads=2
    )
    return model


def write_cache(path: Path, plan: logitcache.ViewPlan) -> Path:
    """Views of the digits, of a teacher that is another student."""
    views, teacher = logitcache.ViewDataset(Digits(), plan), student().eval()
    with logitcache.create(
        path, num_samples=SAMPLES, num_classes=10, num_views=VIEWS, teacher="vit", dataset="digits", view_plan=plan
    ) as writer:
        for view in range(VIEWS):
            inputs = views.batch([(view, sample) for sample in range(SAMPLES)])
            writer.write(view=view, start=0, logits=9 * teacher(inputs).detach(), inputs=inputs)
    return path


@pytest.fixture(scope="module")
def location(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_cache(tmp_path_factory.mktemp("timm") / "a.cache", view_plan(**SIZE, **AUGMENTATION))


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    plan = view_plan(**SIZE, **AUGMENTATION, mixup_args=MIXUP, num_classes=10)
    return write_cache(tmp_path_factory.mktemp("timm") / "mixed.cache", plan)


def loader_of(location: Path, **options: Any) -> CachedLoader:
    return create_cached_loader(logitcache.open(location), Digits(), **SIZE | AUGMENTATION | OPTIONS | options)


def weights(model: torch.nn.Module) -> dict[str, Any]:
    return {name: values.tolist() for name, values in model.state_dict().items()}


def recipe() -> list[str]:
    """The changed lines of train.py in the guide, with their signs."""
    guide = (Path(__file__).parents[2] / "docs" / "integrations.md").read_text()
    [diff] = re.findall(r"^```diff\n(.*?)^```", guide.partition("## timm")[2], re.MULTILINE | re.DOTALL)
    return [line for line in diff.splitlines() if line.startswith(("+", "-"))]


def test_the_recipe_changes_few_lines() -> None:
    assert len(recipe()) <= 15


def added_lines(first: str, *, before: str) -> str:
    """Lines that the recipe adds, from one to before another."""
    added = [line[1:] for line in recipe() if line.startswith("+")]
    stripped = [line.strip() for line in added]
    start = next(number for number, line in enumerate(stripped) if line.startswith(first))
    stop = next(number for number, line in enumerate(stripped) if number > start and line.startswith(before))
    return textwrap.dedent("\n".join(added[start:stop]))


def train_script(
    location: Path, folder: Path, *, resume: str = "", prefetcher: bool = True, mixup_args: dict[str, Any] | None = None
) -> tuple[dict[str, Any], list[list[int]]]:
    """The structure of timm's train.py with the changes of the guide; weights, and view and row of each step."""
    device = torch.device("cpu")
    model = student()
    here: dict[str, Any] = {
        "args": argparse.Namespace(
            kd_cache=str(location),
            seed=0,
            distill_loss_weight=None,
            task_loss_weight=0.3,
            kd_temperature=2.0,
            mixup_off_epoch=0,
        ),
        "mixup_args": mixup_args or {},
        "train_loss_fn": SoftTargetCrossEntropy() if mixup_args else torch.nn.CrossEntropyLoss(),
        "model": model,
        "device": device,
        "model_dtype": None,
        "partial": functools.partial,
        "create_cached_loader": create_cached_loader,
        "CachedLogitDistillationTask": CachedLogitDistillationTask,
    }
    exec(added_lines("cached_loader =", before="loader_train ="), here)
    loader_train = here["cached_loader"](Digits(), **SIZE, **AUGMENTATION, **OPTIONS, use_prefetcher=prefetcher)
    here["loader_train"] = loader_train
    exec(added_lines("if args.kd_cache:", before="elif args.kd_model_name"), here)
    task = here["task"]
    if torch.distributed.is_initialized():
        task.prepare_distributed()
    optimizer = create_optimizer_v2(task.get_trainable_module(), opt="adamw", lr=1e-2)
    resume_epoch = resume_task_checkpoint(task, resume, optimizer=optimizer, log_info=False) if resume else 0
    saver = CheckpointSaver(
        model,
        optimizer,
        args=argparse.Namespace(model="test_vit"),
        checkpoint_dir=str(folder),
        max_history=9,
        task=task,
    )
    lr_scheduler, num_epochs = create_scheduler_v2(optimizer, num_epochs=EPOCHS, updates_per_epoch=len(loader_train))
    assert resume_epoch is not None
    lr_scheduler.step(resume_epoch)
    steps = []
    for epoch in range(resume_epoch, num_epochs):
        set_loader_epoch(loader_train, epoch)
        task.get_trainable_module().train()
        for batch_input, batch_target in loader_train:
            input, target = batch_input, batch_target
            if not prefetcher:
                input, target = input.to(device=device, dtype=None), target.to(device=device)
            optimizer.zero_grad()
            task(input, target)["loss"].backward()
            optimizer.step()
            steps.append(target.index.tolist())
        saver.save_checkpoint(epoch, metric=epoch)
        lr_scheduler.step(epoch + 1, None)
    return weights(model), steps


def set_loader_epoch(loader: Any, epoch: int) -> None:
    """As in train.py."""
    if hasattr(loader.dataset, "set_epoch"):
        loader.dataset.set_epoch(epoch)
    if hasattr(loader.batch_sampler, "set_epoch"):
        loader.batch_sampler.set_epoch(epoch)
    elif hasattr(loader.sampler, "set_epoch"):
        loader.sampler.set_epoch(epoch)


def plain_loop(location: Path, mixup_args: dict[str, Any] | None) -> tuple[dict[str, Any], list[list[int]]]:
    """The loop of the README, with the cross-entropy of true labels beside."""
    cache = logitcache.open(location)
    views = logitcache.ViewDataset(Digits(), cache.view_plan)
    sampler = logitcache.ViewSampler(views)
    model = student().train()
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-2)
    scheduler, _ = create_scheduler_v2(optimizer, num_epochs=EPOCHS, updates_per_epoch=STEPS)
    scheduler.step(0)
    steps = []
    for epoch in range(EPOCHS):
        sampler.set_epoch(epoch)
        for index, inputs, targets in torch.utils.data.DataLoader(views, BATCH, sampler=sampler, drop_last=True):
            steps.append(index.tolist())
            logits = model(inputs)
            kl = logitcache.losses.kl_divergence(logits, cache.logits(index), temperature=2.0).mean()
            if mixup_args:
                smooth = targets * 0.9 + 0.1 / 10
                loss = 0.3 * SoftTargetCrossEntropy()(logits, smooth) + 0.7 * kl
            else:
                loss = 0.3 * torch.nn.functional.cross_entropy(logits, targets) + 0.7 * kl
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        scheduler.step(epoch + 1, None)
    return weights(model), steps


@pytest.mark.parametrize("prefetcher", [False, True], ids=["no prefetcher", "prefetcher"])
@pytest.mark.parametrize("mixup_args", [None, MIXUP], ids=["alone", "mixup and cutmix"])
def test_the_weights_are_those_of_the_plain_loop_also_after_a_resume(
    location: Path, mixed: Path, tmp_path: Path, mixup_args: dict[str, Any] | None, prefetcher: bool
) -> None:
    """The prefetcher moves bytes to the device and normalises them there; on the CPU the images are equal."""
    cache = mixed if mixup_args else location
    run = functools.partial(train_script, cache, tmp_path, prefetcher=prefetcher, mixup_args=mixup_args)
    expected, steps = plain_loop(cache, mixup_args)

    assert (expected, steps) == run()
    assert (expected, steps[2 * STEPS :]) == run(resume=str(tmp_path / "checkpoint-1.pth.tar"))
    views = [int(logitcache.split_index(step)[0][0]) for step in steps]
    assert [epoch % VIEWS for epoch in range(EPOCHS) for _ in range(STEPS)] == views


def test_the_example_distils(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # timm leaves the files of images to the garbage collector
        runpy.run_path(str(Path(__file__).parents[2] / "examples" / "timm_distillation.py"))
        gc.collect()
    [accuracy] = re.findall(r"^student: ([\d.]+) %$", capsys.readouterr().out, re.MULTILINE)

    assert float(accuracy) > 60


def test_a_pipeline_may_describe_the_same_views_in_another_way(tmp_path: Path) -> None:
    transform = build_transform({"timm": {"input_size": 16, "is_training": True, "normalize": False, "hflip": 0.5}})
    preprocess = build_transform({"Normalize": {"mean": [0.3], "std": [0.35]}})
    plan = logitcache.ViewPlan(transform=transform, preprocess=preprocess)
    path = write_cache(tmp_path / "a.cache", plan)

    loader = create_cached_loader(logitcache.open(path), Digits(), **SIZE, **OPTIONS, use_prefetcher=False)
    images, _ = next(iter(loader))

    assert (BATCH, 1, 16, 16) == images.shape


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hflip": 0.0}, "hflip: 0.5 in the cache, 0.0 here"),
        ({"auto_augment": "rand-m9-n1"}, "rand-m9-n1"),
        ({"no_aug": True}, "no_aug: False in the cache, True here"),
        ({"mixup_args": MIXUP}, "mixing"),
    ],
    ids=["transform", "auto_augment", "no augmentation", "mixing"],
)
def test_other_views_are_refused_before_training(location: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(IdentityMismatch, match=message):
        loader_of(location, **options)


def test_another_dataset_is_refused_before_training(location: Path) -> None:
    digits = Digits()
    digits.images = digits.images[::-1]
    with pytest.raises(IdentityMismatch, match="not what the teacher saw"):
        create_cached_loader(logitcache.open(location), digits, **SIZE, **AUGMENTATION, **OPTIONS)
    digits.transform = torch.nn.Identity()
    with pytest.raises(UsageError, match="transform of its own"):
        create_cached_loader(logitcache.open(location), digits, **SIZE, **AUGMENTATION, **OPTIONS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"re_prob": 0.25}, "--reprob 0"),
        ({"collate_fn": FastCollateMixup()}, "pass `mixup_args` instead"),
        ({"num_aug_splits": 3}, "--aug-splits 0"),
        ({"num_aug_repeats": 3}, "--aug-repeats 0"),
        ({"use_multi_epochs_loader": True}, "workers persist without it"),
        ({"input_size_choices": [16, 32]}, "--train-img-sizes"),
        ({"is_training": False}, "for validation"),
        ({"mixup_args": MIXUP | {"mode": "batch"}}, "--mixup-mode elem"),
        ({"mixup_args": MIXUP | {"cutmix_minmax": (0.2, 0.8)}}, "cutmix_minmax"),
        ({"mixup_args": MIXUP | {"switch_prob": 0.9}}, "probability of 0.5"),
        ({"mixup_off_epoch": 2}, "--mixup-off-epoch 2: .* mixed in every epoch"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_options_that_would_change_images_after_the_teacher_saw_them_are_refused(
    mixed: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        loader_of(mixed, **{"mixup_args": MIXUP} | options)


def test_the_prefetcher_refuses_views_that_are_not_bytes(tmp_path: Path) -> None:
    """timm's transform normalises in the workers, if it is left to itself."""
    transform = build_transform({"timm": {"input_size": 16, "is_training": True, "mean": [0.3], "std": [0.35]}})
    plan = logitcache.ViewPlan(transform=transform)
    path = write_cache(tmp_path / "a.cache", plan)
    expected = logitcache.ViewDataset(Digits(), plan)

    with pytest.raises(IdentityMismatch, match="normalize: True in the cache, False here"):
        loader_of(path)
    with pytest.raises(UsageError, match="--no-prefetcher"):
        loader_of(path, plan=plan)
    images, target = next(iter(loader_of(path, plan=plan, use_prefetcher=False)))
    places = torch.stack(logitcache.split_index(target.index), dim=1).tolist()
    assert torch.equal(expected.batch([(view, sample) for view, sample in places]), images)


def test_mixing_in_the_loop_and_other_loaders_are_refused(location: Path) -> None:
    loader = loader_of(location, use_prefetcher=False)
    task = CachedLogitDistillationTask(student(), loader, verbose=False)
    images, target = next(iter(loader))
    with pytest.raises(UsageError, match="timm's Mixup would mix"):
        Mixup(mixup_alpha=0.2, num_classes=10)(images.clone(), target)
    with pytest.raises(IdentityMismatch, match="is not view 0 as it is rendered here"):
        task(images.flip(3), target)
    rows = logitcache.split_index(target.index)[1].tolist()
    with pytest.raises(IdentityMismatch, match="is not view 0 as it is rendered here"):
        task(loader.dataset.batch([(1, row) for row in rows]), target)
    with pytest.raises(UsageError, match="expected the targets of create_cached_loader"):
        task(images, target.target)
    digits = Digits()
    with pytest.raises(UsageError, match="expected the loader of create_cached_loader"):
        CachedLogitDistillationTask(student(), create_loader(digits, **SIZE, **OPTIONS))
    assert loader.mixup_enabled is False
    with pytest.raises(UsageError, match="--mixup-off-epoch"):
        loader.mixup_enabled = True


def test_without_mixing_there_is_nothing_to_turn_off(location: Path) -> None:
    assert loader_of(location, mixup_off_epoch=2).mixup_enabled is False


class Files(Digits):
    """As `timm.data.ImageDataset`: its reader knows names and classes. No image can be loaded."""

    def __init__(self, names: list[str], classes: list[int]) -> None:
        self.transform: Any = None
        samples = list(zip(names, classes, strict=True))
        self.reader = argparse.Namespace(samples=samples, filenames=lambda: names)

    def __len__(self) -> int:
        return len(self.reader.samples)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        raise AssertionError("an image was loaded")


def test_names_and_classes_are_compared_before_an_image_is_loaded(tmp_path: Path) -> None:
    digits, plan = Digits(), view_plan(**SIZE, **AUGMENTATION)
    names = [f"{number % 2}/{number}.png" for number in range(SAMPLES)]
    contents = logitcache.sample_table(digits, contents=True).contents
    table = SampleTable(SAMPLES, names, np.array(digits.classes), contents)
    about: dict[str, Any] = {"num_samples": SAMPLES, "num_classes": 10, "teacher": "vit", "view_plan": plan}
    with logitcache.create(tmp_path / "a", samples=table, **about) as writer:
        writer.write(view=0, start=0, logits=torch.randn(SAMPLES, 10))
    relabelled = [9 - digits.classes[0], *digits.classes[1:]]

    with pytest.raises(IdentityMismatch, match=r"sample 0 \(0/0.png\) has the target 9 here"):
        create_cached_loader(tmp_path / "a", Files(names, relabelled), **SIZE, **AUGMENTATION, **OPTIONS)
    renamed = [*names[:-1], "0/other.png"]
    with pytest.raises(IdentityMismatch, match="'0/other.png' is not in the cache"):
        create_cached_loader(tmp_path / "a", Files(renamed, digits.classes), **SIZE, **AUGMENTATION, **OPTIONS)
    digits.classes[3] = 9 - digits.classes[3]
    with pytest.raises(IdentityMismatch, match="sample 3 .* has the target"):
        create_cached_loader(tmp_path / "a", digits, **SIZE, **AUGMENTATION, **OPTIONS)


def test_a_folder_in_another_order_has_the_rows_of_its_files(tmp_path: Path) -> None:
    digits, plan = Digits(), view_plan(**SIZE, **AUGMENTATION)
    table = logitcache.sample_table(digits, contents=True)
    names = [f"{number:02}.png" for number in range(SAMPLES)]
    table = SampleTable(SAMPLES, names, table.targets, table.contents)
    about: dict[str, Any] = {"num_samples": SAMPLES, "num_classes": 10, "teacher": "vit", "view_plan": plan}
    with logitcache.create(tmp_path / "a", samples=table, **about) as writer:
        writer.write(view=0, start=0, logits=torch.randn(SAMPLES, 10))
    expected = logitcache.ViewDataset(Digits(), plan)
    digits.images, digits.classes = digits.images[::-1].copy(), digits.classes[::-1]
    digits.reader = argparse.Namespace(filenames=lambda: names[::-1])  # type: ignore[attr-defined]

    loader = create_cached_loader(tmp_path / "a", digits, **SIZE, **AUGMENTATION, **OPTIONS, use_prefetcher=False)
    images, target = next(iter(loader))
    rows = logitcache.split_index(target.index)[1].tolist()
    assert torch.equal(expected.batch([(0, row) for row in rows]), images)
    assert [Digits().classes[row] for row in rows] == target.target.tolist()


def test_two_processes_share_each_view(location: Path, tmp_path: Path) -> None:
    """The recipe, started by torchrun with gloo, against one process on the batches of both."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    ended = subprocess.run(
        [*command, "tests.integration.test_timm", str(location), str(tmp_path)],
        cwd=CHECKOUT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(CHECKOUT)},
        capture_output=True,
        text=True,
    )
    assert 0 == ended.returncode, ended.stderr[-4000:]

    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    views = logitcache.ViewDataset(Digits(), logitcache.open(location).view_plan)
    for rank in range(2):
        sampler, expected = logitcache.ViewSampler(views, num_replicas=2, rank=rank), []
        for epoch in range(EPOCHS):
            sampler.set_epoch(epoch)
            expected.append([logitcache.join_index(*place) for place in sampler][:BATCH])
        assert expected == found[rank]["steps"]
    assert found[0]["weights"] == found[1]["weights"]
    together = [first + second for first, second in zip(*(each["steps"] for each in found), strict=True)]
    for name, values in on_batches(location, together).items():
        torch.testing.assert_close(torch.tensor(found[0]["weights"][name]), torch.tensor(values))


def on_batches(location: Path, steps: list[list[int]]) -> dict[str, Any]:
    """The weights of one process that trains on these batches, one in each epoch."""
    cache = logitcache.open(location)
    views, model = logitcache.ViewDataset(Digits(), cache.view_plan), student().train()
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-2)
    scheduler, _ = create_scheduler_v2(optimizer, num_epochs=EPOCHS, updates_per_epoch=1)
    scheduler.step(0)
    for epoch, index in enumerate(steps):
        places = torch.stack(logitcache.split_index(index), dim=1).tolist()
        _, inputs, targets = views.collate(views.__getitems__([(view, row) for view, row in places]))
        logits = model(inputs)
        kl = logitcache.losses.kl_divergence(logits, cache.logits(index), temperature=2.0).mean()
        optimizer.zero_grad()
        (0.3 * torch.nn.functional.cross_entropy(logits, targets) + 0.7 * kl).backward()
        optimizer.step()
        scheduler.step(epoch + 1, None)
    return weights(model)


def train_on_a_rank(location: Path, folder: Path) -> None:
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    (folder / f"checkpoints-{rank}").mkdir()
    found, steps = train_script(location, folder / f"checkpoints-{rank}")
    (folder / f"{rank}.json").write_text(json.dumps({"steps": steps, "weights": found}))
    torch.distributed.destroy_process_group()


def test_an_epoch_without_a_view_of_its_own_is_refused(location: Path) -> None:
    loader = loader_of(location)
    for _ in range(2):
        next(iter(loader))  # a look at the first batch
    assert STEPS == len(list(loader))
    with pytest.raises(UsageError, match=r"loader.sampler.set_epoch\(epoch\)"):
        next(iter(loader))


def test_arguments_that_a_view_can_not_have_are_refused() -> None:
    with pytest.raises(UsageError, match="no argument 'flip'"):
        view_plan(**SIZE, flip=0.5)
    with pytest.raises(UsageError, match="re_prob=0"):
        view_plan(**SIZE, re_prob=0.25)
    with pytest.raises(UsageError, match="normalize must be False"):
        view_plan(**SIZE, normalize=True)
    assert logitcache.Mixing() == mixing({})
    assert logitcache.Mixing(mixup=0.4, cutmix=1.0) == mixing(MIXUP)


if __name__ == "__main__":
    train_on_a_rank(Path(sys.argv[1]), Path(sys.argv[2]))
