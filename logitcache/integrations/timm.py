"""timm: a distillation task that takes the teacher's logits from a cache, and the training loader of its views.

`train.py` of timm needs a few changed lines; docs/integrations.md shows them.
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from logitcache.cache.reader import RESIDENT_BYTES, LogitCache, open_cache
from logitcache.data.sampler import ViewSampler
from logitcache.data.samples import Dataset, SampleTable
from logitcache.data.transforms import SpecifiedTransform, build_transform, describe_transform
from logitcache.data.views import Mixing, ViewDataset, ViewPlan
from logitcache.devices import to_device
from logitcache.errors import IdentityMismatch, UsageError
from logitcache.integrations.labels import CheckedLabels
from logitcache.losses import kl_divergence
from logitcache.verify.fit import matched_views

try:
    from timm.data import create_loader, create_transform
    from timm.task import ClassificationTask
except ImportError as error:
    raise ImportError(
        f"logitcache.integrations.timm needs timm 1.0.27 or later: pip install 'logitcache[timm]' ({error})"
    ) from error

# B batch, C classes

_NEUTRAL: Mapping[str, tuple[Any, str]] = {
    "is_training": (True, "for validation, use timm's own `create_loader`"),
    "re_prob": (0.0, "random erasing would change the images after the teacher saw them: --reprob 0"),
    "re_split": (False, "--resplit belongs to random erasing"),
    "num_aug_repeats": (0, "a cached view has each image once: --aug-repeats 0"),
    "num_aug_splits": (0, "a cached view has each image once: --aug-splits 0"),
    "collate_fn": (None, "timm would mix the images of a batch after the teacher saw them: pass `mixup_args` instead"),
    "use_multi_epochs_loader": (False, "workers persist without it, and it starts an epoch before its view is known"),
    "tf_preprocessing": (False, "it is for evaluation only"),
    "fp16": (False, "use img_dtype"),
    "input_size_choices": (None, "a cached view has one size: leave out --train-img-sizes"),
    "batch_size_choices": (None, "leave out --train-batch-sizes"),
    "num_batches": (None, "an epoch is one view of all images: leave out --train-batches-per-epoch"),
}
"""The value that each option of timm's `create_loader` must have here, and why or what to do."""


def view_plan(
    input_size: int | tuple[int, ...],
    *,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    seed: int = 0,
    num_classes: int | None = None,
    mixup_args: Mapping[str, Any] | None = None,
    **augmentation: Any,
) -> ViewPlan:
    """The views that timm's training transform makes, for `logitcache.create` and `ViewDataset`.

    A cache records this plan, so `cache.view_plan` makes it again.

    Args:
        input_size: as for `timm.data.create_transform`.
        mean, std: normalization of the teacher; a student may have its own.
        seed: of the views.
        num_classes: required with `mixup_args`.
        mixup_args: arguments of `timm.data.Mixup`; empty or None mixes nothing. See `mixing`.
        augmentation: other arguments of `timm.data.create_transform`, such as `auto_augment` or `hflip`.

    Raises:
        UsageError: an argument that timm does not have, or that views can't have.
    """
    return ViewPlan(
        transform=_transform({"input_size": input_size, "mean": mean, **augmentation}),
        seed=seed,
        mixing=mixing(mixup_args),
        preprocess=_normalize(mean, std),
        num_classes=num_classes,
    )


def mixing(mixup_args: Mapping[str, Any] | None) -> Mixing:
    """The mixup and CutMix of a view plan, from arguments of `timm.data.Mixup`.

    As in timm's mode "elem", each image has a weight of its own. Its partner comes from the whole dataset instead of
    the batch, because a view does not depend on batches. `label_smoothing` applies to true labels and is no part of it.

    Raises:
        UsageError: a mode or option that views can't have.
    """
    given = dict(mixup_args or {})
    if not given:
        return Mixing()
    mixup, cutmix = given.get("mixup_alpha", 1.0), given.get("cutmix_alpha", 0.0)
    if given.get("mode", "batch") != "elem":
        raise UsageError(
            f"mode {given.get('mode', 'batch')!r} of timm's mixup depends on the batch, and a view does not; use the "
            "mode 'elem' (--mixup-mode elem), in which each image has a weight of its own"
        )
    if given.get("cutmix_minmax") is not None:
        raise UsageError("views have no cutmix_minmax; use cutmix_alpha (--cutmix)")
    if mixup > 0 and cutmix > 0 and given.get("switch_prob", 0.5) != 0.5:
        raise UsageError(
            f"with mixup and CutMix, views use each with a probability of 0.5; found switch_prob={given['switch_prob']}"
        )
    return Mixing(mixup=mixup, cutmix=cutmix, probability=given.get("prob", 1.0))


def _transform(arguments: Mapping[str, Any]) -> SpecifiedTransform:
    """timm's training transform without normalization, described by the arguments that are not timm's defaults."""
    known = inspect.signature(create_transform).parameters
    unknown = [name for name in arguments if name not in known]
    if unknown:
        raise UsageError(f"timm.data.create_transform has no argument {unknown[0]!r}; it has: {', '.join(known)}")
    fixed = {"is_training": True, "normalize": False, "use_prefetcher": False, "separate": False}
    wrong = [name for name, value in fixed.items() if arguments.get(name, value) != value]
    if wrong:
        raise UsageError(f"{wrong[0]} must be {fixed[wrong[0]]} for views, or left out")
    if arguments.get("re_prob"):
        raise UsageError(
            "timm erases after the normalization, which teacher and student may not share; set re_prob=0, or add "
            "torchvision's RandomErasing to `ViewPlan(transform=...)`"
        )
    given = {**arguments, **fixed}
    if not given.get("auto_augment"):
        given.pop("mean", None)  # fills what AutoAugment moves in; other transforms do not use it
    for unused in ("std", "re_prob", "re_mode", "re_count", "re_num_splits", "tf_preprocessing"):
        given.pop(unused, None)
    spec = {name: _as_json(value) for name, value in given.items() if value != known[name].default}
    return build_transform({"timm": spec})


def _as_json(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _normalize(mean: tuple[float, ...], std: tuple[float, ...]) -> SpecifiedTransform:
    return build_transform({"Normalize": {"mean": list(mean), "std": list(std)}})


def create_cached_loader(
    cache: LogitCache | str | os.PathLike[str],
    dataset: Dataset,
    *,
    mixup_args: Mapping[str, Any] | None = None,
    mixup_off_epoch: int = 0,
    plan: ViewPlan | None = None,
    seed: int = 0,
    memory_budget: int = RESIDENT_BYTES,
    **options: Any,
) -> CachedLoader:
    """The training loader of a cache's views: takes the options of timm's `create_loader`, and checks them.

    Epoch `e` has view `e % cache.num_views`, in an order that depends on `seed` and `e`; `train.py` sets the epoch.
    In distributed training each process gets its share.

    Args:
        cache: sealed; or its location, as for `logitcache.open`.
        dataset: of the training split, without a transform, as `timm.data.create_dataset` returns it.
        mixup_args: arguments of `timm.data.Mixup`, as `train.py` makes them.
        mixup_off_epoch: `args.mixup_off_epoch` of `train.py`; must be 0 where the views are mixed.
        plan: the views and the normalization, instead of those of the options: `cache.view_plan`, or the plan that the
            cache was written with.
        seed: of the order.
        memory_budget: bytes of encoded labels to keep in memory; larger views are streamed.
        options: of timm's `create_loader`.

    Raises:
        IdentityMismatch: the augmentation, the mixing or the dataset is not that of the cache.
        UsageError: an option that would change images after the teacher saw them; names it.
    """
    cache = cache if isinstance(cache, LogitCache) else open_cache(cache)
    bound = inspect.signature(create_loader).bind(dataset, **options)
    bound.apply_defaults()
    given = bound.arguments
    for name, (expected, reason) in _NEUTRAL.items():
        if given.get(name, expected) != expected:
            raise UsageError(f"a loader of cached views has no {name}={given[name]!r}: {reason}")
    if isinstance(dataset, torch.utils.data.IterableDataset):
        raise UsageError(
            "this dataset is a stream, in which a sample has no number; use a map-style dataset, or "
            "logitcache.StreamViews in a loop of your own"
        )
    if getattr(dataset, "transform", None) is not None:
        raise UsageError(
            "the dataset has a transform of its own, which would run before the views; set dataset.transform = None"
        )
    preprocess = None
    if plan is None:
        plan = _plan_of_options(cache, given, mixing(mixup_args))
        preprocess = _normalize(given["mean"], given["std"])
    if mixup_off_epoch and plan.mixes_samples:
        raise UsageError(
            f"--mixup-off-epoch {mixup_off_epoch}: the images of a cached view are mixed in every epoch; leave it out, "
            "or build a cache without mixing"
        )
    rows = None
    if cache.samples is not None:
        dataset = _Named(dataset, cache.samples)
        if not hasattr(dataset, "keys") and len(dataset) == cache.num_samples:
            rows = np.arange(len(dataset))  # files have other names: the order counts, and labels and contents
    prefetches = given["use_prefetcher"]
    views = matched_views(cache, dataset, plan, preprocess=preprocess, rows=rows)
    views, byte_views = _with_bytes(views, cache.views.start, needed=prefetches)
    labels = CheckedLabels(cache, views, memory_budget=memory_budget)
    sampler = ViewSampler(views, cycle=labels.cycle, seed=seed)
    persistent = given["persistent_workers"] and given["num_workers"] > 0
    batches: DataLoader[Any] = DataLoader(
        byte_views,
        batch_size=given["batch_size"],
        sampler=sampler,
        num_workers=given["num_workers"],
        collate_fn=views.collate if prefetches else functools.partial(_as_floats, byte_views),
        pin_memory=given["pin_memory"],
        drop_last=True,
        persistent_workers=persistent,
    )
    smoothing = (mixup_args or {}).get("label_smoothing", 0.0)
    on_device = (given["device"], given["img_dtype"]) if prefetches else None
    return CachedLoader(batches, labels, sampler, prefetch_to=on_device, label_smoothing=smoothing)


class _Named:
    """A dataset of timm with the names and classes that its reader knows, so that no image is loaded to compare them.

    Names are those of files below the folder of the split. They are keys only where the cache has such keys.
    """

    def __init__(self, dataset: Dataset, samples: SampleTable) -> None:
        self._dataset = dataset
        reader: Any = getattr(dataset, "reader", None)
        found = getattr(reader, "samples", None)
        if isinstance(found, list) and getattr(dataset, "target_transform", None) is None:
            self.targets = np.array([target for _, target in found], dtype=np.int64)
        if hasattr(reader, "filenames") and samples.keys is not None:
            names = [Path(name).as_posix() for name in reader.filenames()]
            if names and names[0] in set(samples.keys):
                self.keys = names

    def __getattr__(self, name: str) -> Any:
        if name == "_dataset":  # while it is unpickled
            raise AttributeError(name)
        return getattr(self._dataset, name)

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        return self._dataset[index]


def _plan_of_options(cache: LogitCache, given: Mapping[str, Any], mixed: Mixing) -> ViewPlan:
    """The cache's plan, with the transform and the mixing that the options of a loader mean."""
    names = inspect.signature(create_transform).parameters.keys() & given.keys() - {"use_prefetcher", "normalize"}
    transform = _transform({name: given[name] for name in names})
    recorded = cache.view_plan
    if recorded.transform is None or _steps(recorded.transform) != _steps(transform):
        raise IdentityMismatch(
            f"the augmentation of the loader is not that of cache {cache.id[:12]}…; it differs in\n  "
            + "\n  ".join(_differences(recorded.transform, transform))
            + "\nPass the values of the cache, or plan=cache.view_plan to use its augmentation and normalisation"
        )
    return replace(recorded, mixing=mixed)


def _steps(transform: Any) -> list[Any]:
    """What a transform does, whichever way it is written."""
    return [describe_transform(step) for step in getattr(transform, "steps", [transform])]


def _differences(recorded: Any, here: SpecifiedTransform) -> list[str]:
    """The arguments of timm's transform that differ, defaults included."""
    spec = getattr(recorded, "spec", None)
    if not isinstance(spec, list) or len(spec) != 1 or "timm" not in spec[0]:
        return [f"transform: {spec} in the cache, {here.spec} here"]
    defaults = {name: known.default for name, known in inspect.signature(create_transform).parameters.items()}
    there, given = (defaults | each for each in (spec[0]["timm"], here.spec[0]["timm"]))
    names = [name for name in given if (_as_json(there[name]) or None) != (_as_json(given[name]) or None)]
    return [f"{name}: {there[name]} in the cache, {given[name]} here" for name in names]


def _with_bytes(views: ViewDataset, view: int, *, needed: bool) -> tuple[ViewDataset, ViewDataset]:
    """The views of the batches as they arrive, and as the workers render them: as bytes, if they can be.

    The prefetcher moves bytes to the device and normalizes them there. Without it, workers make floats of a batch at
    once, which is faster than of each image.

    Raises:
        UsageError: they can't be bytes, and are needed.
    """
    try:
        found = ViewDataset(views.dataset, views.plan, preprocess=views.preprocess, rows=views.rows, on_device=True)
        found.batch([(view, 0)])
    except UsageError as error:
        if needed:
            raise UsageError(
                "the prefetcher moves images as bytes, and these views are not bytes before they are normalized; pass "
                f"use_prefetcher=False (--no-prefetcher) ({error})"
            ) from error
        return views, views
    return found if needed else views, found


def _as_floats(views: ViewDataset, samples: Sequence[tuple[int, Any, Any]]) -> tuple[Tensor, Any, Any]:
    """A batch whose images are floats."""
    index, inputs, targets = views.collate(samples)
    return index, views.finish(inputs), targets


@dataclass(frozen=True)
class CachedTarget:
    """The targets of a batch, and where its teacher's labels are; stands for timm's tensor of targets."""

    index: Tensor
    """int64 (B,), view and row; stays on the CPU."""
    target: Tensor
    """Classes int64 (B,), or distributions float32 (B, C) where views are mixed."""

    def to(self, *args: Any, **kwargs: Any) -> CachedTarget:
        """The same with `target` on another device."""
        return replace(self, target=self.target.to(*args, **kwargs))

    def long(self) -> Tensor:
        """Refuse timm's Mixup, which calls this.

        Raises:
            UsageError: always.
        """
        raise UsageError(
            "timm's Mixup would mix the images of a batch after the teacher saw them: leave it out, and pass "
            "`mixup_args` to create_cached_loader"
        )


class CachedLoader:
    """Batches (input, `CachedTarget`) for `CachedLogitDistillationTask`; made by `create_cached_loader`.

    Args:
        loader: of (index, inputs, targets).
        labels: of its views.
        sampler: of the loader.
        prefetch_to: device and dtype that batches are finished on; None leaves them as the workers made them.
        label_smoothing: of targets of mixed images.
    """

    def __init__(
        self,
        loader: DataLoader[Any],
        labels: CheckedLabels,
        sampler: ViewSampler,
        *,
        prefetch_to: tuple[torch.device, torch.dtype] | None,
        label_smoothing: float,
    ) -> None:
        self.loader = loader
        self.labels = labels
        self.sampler = sampler
        self.dataset = labels.views
        self.batch_sampler = loader.batch_sampler
        self._prefetch_to = prefetch_to
        self._label_smoothing = label_smoothing
        self._finished_epoch: int | None = None

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[tuple[Tensor, CachedTarget]]:
        epoch = self.sampler.state_dict()["epoch"]
        if epoch == self._finished_epoch:
            raise UsageError(
                f"epoch {epoch} is over: call `loader.sampler.set_epoch(epoch)` before each epoch, which chooses its "
                "view, also in training with one process"
            )
        for index, inputs, targets in self.loader:
            if self._prefetch_to is not None:
                device, dtype = self._prefetch_to
                inputs = self.dataset.finish(to_device(inputs, device)).to(dtype)
                targets = to_device(targets, device)
            if self._label_smoothing and targets.ndim == 2:
                targets = targets * (1.0 - self._label_smoothing) + self._label_smoothing / targets.shape[1]
            yield inputs, CachedTarget(index, targets)
        self._finished_epoch = epoch

    @property
    def mixup_enabled(self) -> bool:
        """Whether images are mixed, which is so in all epochs of a cache or in none."""
        return self.dataset.plan.mixes_samples

    @mixup_enabled.setter
    def mixup_enabled(self, enabled: bool) -> None:
        if enabled != self.mixup_enabled:
            raise UsageError("the images of a cached view are mixed or not; leave out --mixup-off-epoch")


class CachedLogitDistillationTask(ClassificationTask):  # type: ignore[misc]
    """`timm.task.LogitDistillationTask` with the teacher's logits from a cache instead of a model.

    Before the first step on each view, a few images of the view and of the batch are compared with the cache. The
    loss is `task_loss_weight` times the criterion plus `distill_loss_weight` times T² KL(teacher ‖ student), the mean
    over the batch. With a weight of 0 the criterion is not computed, and true labels are not needed.

    Args:
        student_model: the model to train.
        loader: from `create_cached_loader`.
        criterion: loss on true labels.
        distill_loss_weight: default 1, or 1 - `task_loss_weight` where only that is given.
        task_loss_weight: default 1.
        temperature: T.
        device, dtype, verbose: as for timm's tasks.

    Raises:
        UsageError: a loader that is not from `create_cached_loader`.
    """

    def __init__(
        self,
        student_model: nn.Module,
        loader: CachedLoader,
        criterion: nn.Module | Callable[[Tensor, Tensor], Tensor] | None = None,
        *,
        distill_loss_weight: float | None = None,
        task_loss_weight: float | None = None,
        temperature: float = 1.0,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        verbose: bool = True,
    ) -> None:
        if not isinstance(loader, CachedLoader):
            raise UsageError(f"expected the loader of create_cached_loader; found {type(loader).__name__}")
        super().__init__(student_model, criterion, device=device, dtype=dtype, verbose=verbose)
        self.temperature = temperature
        self.task_loss_weight = 1.0 if task_loss_weight is None else task_loss_weight
        if distill_loss_weight is None:
            distill_loss_weight = 1.0 if task_loss_weight is None else 1.0 - task_loss_weight
        self.distill_loss_weight = distill_loss_weight
        self._labels = loader.labels

    def forward(self, input: Tensor, target: CachedTarget) -> dict[str, Tensor]:
        """The loss of a batch of the loader.

        Returns:
            `loss`, `output` (logits (B, C)), `kd_loss`, and `task_loss` where its weight is not 0.

        Raises:
            IdentityMismatch: the images are not what the teacher saw.
            UsageError: targets that are not from `create_cached_loader`.
        """
        if not isinstance(target, CachedTarget):
            raise UsageError(
                f"expected the targets of create_cached_loader; found {type(target).__name__}. Train on its loader"
            )
        teacher = self._labels.targets(target.index, input.device)
        self._labels.check_batch(target.index, input)
        output = self.trainable_module(input)
        kd_loss = kl_divergence(output, teacher, temperature=self.temperature, reduction="mean")
        result = {"loss": self.distill_loss_weight * kd_loss, "output": output, "kd_loss": kd_loss}
        if self.task_loss_weight:
            result["task_loss"] = self.criterion(output, target.target)
            result["loss"] = self.task_loss_weight * result["task_loss"] + result["loss"]
        return result
