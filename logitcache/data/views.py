"""Views: deterministic augmentations of a whole dataset.

Row i of view v is a pure function of (sample, transform, view seed, v, i). The shared random transform runs first,
then mixing with a partner, then the deterministic preprocessing of each model, so that a teacher can see 384 px and
its student 224 px of the same crop.
"""

from __future__ import annotations

import copy
import functools
import itertools
import operator
import random
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import default_collate

from logitcache.data.batching import Batch, Collate, InputPerModel, as_tensors, collate
from logitcache.data.device_views import ByteImage, byte_image, device_steps, finished, mixed_bytes, split_batched
from logitcache.data.index import NO_ROW, join_index
from logitcache.data.recorded import RecordedTransform
from logitcache.data.rows import MAX_ROWS, RowMap
from logitcache.data.samples import (
    Dataset,
    SeenContents,
    content_digest,
    input_digest,
    load_sample,
    same_content,
    sample_key,
)
from logitcache.data.streamed import fetch_in_order, refuse_stream
from logitcache.data.text_views import SELECTED
from logitcache.data.transforms import adapt_transform, describe_transform
from logitcache.data.workers import end_with_parent
from logitcache.deprecation import RenamedAttribute, renamed_keyword
from logitcache.errors import IndexBeyondEnd, LogitCacheError, SampleMismatch, ShapeError, UsageError
from logitcache.randomness import counter_seed, keyed_permutation, preserved_generators, seed_generators

# C classes, H height, W width

PROOF_ROWS = 8
"""Rows of each view whose input digests are stored, to verify views against."""
MAX_ALPHA = 1e6
"""Limit on α of mixup and CutMix: drawing from a Beta distribution with a much larger α may not terminate."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Mixing:
    """Mixup and CutMix with a partner from the whole dataset, not from the batch.

    If both are on, each sample gets one of the two with equal probability. Sources: Zhang et al. 2018
    (arXiv:1710.09412), Yun et al. 2019 (arXiv:1905.04899).
    """

    mixup: float = 0.0
    """α of mixup's Beta(α, α) distribution; 0 turns mixup off."""
    cutmix: float = 0.0
    """α of CutMix's Beta(α, α) distribution; 0 turns CutMix off."""
    probability: float = 1.0
    """Probability that a sample is mixed."""

    def __post_init__(self) -> None:
        in_range = 0 <= self.mixup <= MAX_ALPHA and 0 <= self.cutmix <= MAX_ALPHA and 0 <= self.probability <= 1
        if not in_range:  # also true for NaN
            raise UsageError(
                f"mixup and cutmix lie in [0, {MAX_ALPHA:g}] and the probability in [0, 1]; found {self.config()}"
            )

    @property
    def active(self) -> bool:
        """Whether any sample is mixed."""
        return (self.mixup > 0 or self.cutmix > 0) and self.probability > 0

    def config(self) -> dict[str, float]:
        """The settings as JSON."""
        return {"mixup": float(self.mixup), "cutmix": float(self.cutmix), "probability": float(self.probability)}


@dataclass(frozen=True, slots=True)
class Mixture:
    """How one sample of one view is mixed: `weight` for the sample itself, the rest for its partner."""

    partner: int
    weight: float
    box: tuple[float, float] | None = None
    """Centre (row, column) of the CutMix patch, in [0, 1]; None for mixup."""

    def patch(self, height: int, width: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """(top, bottom), (left, right) of CutMix's patch in an image of this size, cut off where the image ends."""
        assert self.box is not None
        side = (1.0 - self.weight) ** 0.5
        return _span(self.box[0], side, height), _span(self.box[1], side, width)

    def weight_in(self, height: int, width: int) -> float:
        """The weight that the sample itself keeps in an image of this size: CutMix loses what lies outside."""
        if self.box is None:
            return self.weight
        (top, bottom), (left, right) = self.patch(height, width)
        return 1.0 - (bottom - top) * (right - left) / (height * width)


@dataclass(frozen=True, kw_only=True)
class ViewPlan:
    """How the views of a dataset are made: everything that teacher and student must share."""

    transform: Callable[[Any], Any] | None = None
    """The random transform: torchvision v2, timm, albumentations or any callable; None leaves samples unchanged."""
    seed: int = 0
    """Seed of the views."""
    mixing: Mixing = field(default_factory=Mixing)
    preprocess: Callable[[Any], Any] | None = None
    """The teacher's deterministic preprocessing, such as size and normalization; a student may have its own."""
    num_classes: int | None = None
    """Required with mixing, where targets become distributions (C,)."""
    num_samples: int | None = None
    """Length of the whole dataset, if views are made of a subset; None takes the length of the dataset."""
    contents: np.ndarray | SeenContents | None = field(default=None, repr=False)
    """Content digests, uint8 (N, 16), that samples are checked against when first loaded; None checks nothing.
    `SeenContents` records them instead, to create a cache in one pass."""
    collate: Collate | None = None
    """Builds a batch from a list of inputs, in order: `data.batching.pad` or your own; None stacks them. It is not part
    of the identity of the views, because a sample must not depend on its batch."""
    rows: RowMap | None = field(default=None, repr=False)
    """Rows of each sample in the cache, for the index of samples with several rows; None is one row per sample."""
    views: range | None = None
    """View numbers that may be rendered, such as those that a cache has labels for; None is no limit."""
    datasets: weakref.WeakSet[Any] = field(default_factory=weakref.WeakSet, init=False, repr=False, compare=False)
    """The live `ViewDataset`s and `StreamViews` of this plan object, for `cache.check_batch`."""

    model_input = RenamedAttribute("preprocess")

    @property
    def mixes_samples(self) -> bool:
        """Whether samples may have a partner, drawn by `mixing` or recorded."""
        return self.mixing.active or (isinstance(self.transform, RecordedTransform) and self.transform.mixes)

    def check_view(self, view: int) -> int:
        """The view number, checked.

        Raises:
            UsageError: there is no such view.
        """
        if view < 0 or (self.views is not None and view not in self.views):
            known = self.views
            expected = "at least 0" if known is None else f"{known.start} to {known.stop - 1}, those of the cache"
            raise UsageError(f"there is no view {view}; expected {expected}")
        return view

    @functools.cached_property
    def renderer(self) -> Renderer:
        """Renders samples with the plan's own preprocessing."""
        return Renderer(self)

    def limit_views(self, views: range) -> None:
        """Refuse other views from now on, unless a limit is set already; `cache.check_plan` calls it."""
        if self.views is None:
            object.__setattr__(self, "views", views)

    def extend_limit(self, views: range) -> None:
        """Allow these views too, where there is a limit; `create` calls it, which may add views to a cache."""
        if self.views is not None:
            both = range(min(self.views.start, views.start), max(self.views.stop, views.stop))
            object.__setattr__(self, "views", both)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("datasets", "renderer")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, datasets=weakref.WeakSet())

    def describe(self) -> dict[str, Any]:
        """The plan without its seed as JSON that is the same on every machine, for the identity of a cache.

        Raises:
            UsageError: a transform that can't be described unambiguously.
        """
        return {
            "shared": describe_transform(self.transform) or None,
            "mixing": self.mixing.config() if self.mixing.active else None,
            "teacher_input": describe_transform(self.preprocess) or None,
        }

    def mixes(self, view: int, row: int, num_samples: int) -> bool:
        """Whether a sample of a view is mixed; faster than `mixture`, because it does not compute the partner."""
        if not self.mixing.active or num_samples < 2:
            return False
        return random.Random(counter_seed("mixing", self.seed, view, row)).random() < self.mixing.probability

    def mixture(self, view: int, row: int, num_samples: int) -> Mixture | None:
        """Partner and weight of a sample of a view; None if it is not mixed."""
        if not self.mixing.active or num_samples < 2:
            return None
        draw = random.Random(counter_seed("mixing", self.seed, view, row))
        if draw.random() >= self.mixing.probability:
            return None
        cut = self.mixing.cutmix > 0 and (self.mixing.mixup == 0 or draw.random() < 0.5)
        alpha = self.mixing.cutmix if cut else self.mixing.mixup
        weight = draw.betavariate(alpha, alpha)
        box = (draw.random(), draw.random()) if cut else None
        return Mixture(int(_partners(num_samples, self.seed, view)[row]), weight, box)


ViewPlan.__init__ = renamed_keyword("model_input", "preprocess")(ViewPlan.__init__)  # type: ignore[method-assign]


@functools.lru_cache(maxsize=256)
def proof_rows(seed: int, view: int, num_samples: int) -> tuple[int, ...]:
    """The rows of a view whose input digests the cache stores, sorted."""
    if num_samples <= PROOF_ROWS:
        return tuple(range(num_samples))
    draws = (counter_seed("proof", seed, view, number) % num_samples for number in itertools.count())
    rows: set[int] = set()
    while len(rows) < PROOF_ROWS:
        rows.add(next(draws))
    return tuple(sorted(rows))


Load = Callable[[int], tuple[Any, Any]]
"""Returns (input, target) of a sample, by its number in the cache."""


class Renderer:
    """Renders samples as a plan describes; uses the global generators, which the caller preserves.

    Args:
        plan: how the views are made.
        preprocess: the model's deterministic preprocessing; by default the plan's.
        on_device: leave the last steps to `ViewDataset.finish`.

    Raises:
        UsageError: a plan that mixes samples without `num_classes`, or samples with several rows.
    """

    def __init__(
        self, plan: ViewPlan, preprocess: Callable[[Any], Any] | None = None, *, on_device: bool = False
    ) -> None:
        if plan.mixes_samples and plan.num_classes is None:
            raise UsageError("views with mixup or CutMix give targets as distributions: set ViewPlan(num_classes=...)")
        if plan.mixes_samples and plan.rows is not None and not plan.rows.one_each:
            raise UsageError(
                "mixup and CutMix need one row per sample, and these samples have several; set views.mixup=0 and "
                "views.cutmix=0"
            )
        self.plan = plan
        self.preprocess = plan.preprocess if preprocess is None else preprocess
        self._recorded = plan.transform if isinstance(plan.transform, RecordedTransform) else None
        if self._recorded is not None and plan.mixing.active:
            raise UsageError("recorded views have no mixup and CutMix but their own; set views.mixup=0, views.cutmix=0")
        if self._recorded is not None and self._recorded.mixes and on_device:
            raise UsageError("recorded views with partners are not rendered on the device; set views.on_device=false")
        shared, self.batched = split_batched(plan.transform) if on_device else (plan.transform, [])
        self._shared = adapt_transform(shared)
        self._preprocess = adapt_transform(self.preprocess)
        self._on_device = on_device

    def item(
        self,
        view: int,
        number: int,
        sample: tuple[Any, Any],
        load: Load | None,
        key: Callable[[int], str],
        target_of_view: Callable[[Any, Any], Any] | None = None,
    ) -> tuple[int, Any, Any]:
        """(index, input, target) of one sample of a view.

        Args:
            view: a view of the plan.
            number: of the sample in the cache.
            sample: its (input, target).
            load: loads the partner; required where the plan mixes samples.
            key: key of a sample by its number, for messages.
            target_of_view: makes the target of the dataset's target and the positions that the transform selected.
        """
        value, target = sample
        pixels, selected = self._augmented(view, number, value, key)
        if selected is not None and target_of_view is not None:
            target = target_of_view(target, selected)
        if self.plan.mixes_samples:
            mix = self._mixed if self._recorded is None else self._mixed_as_recorded
            pixels, target = mix(view, number, pixels, int(target), load, key)
        if isinstance(pixels, ByteImage):
            pixels = pixels.sent()
        if self._preprocess is not None and not self._on_device:
            pixels = self._run(self._preprocess, pixels, number, "input", key)
        return self._index(view, number), pixels, target

    def _index(self, view: int, number: int) -> int:
        """The index of a sample's first row; -1 if it has no rows."""
        if self.plan.rows is None:
            return join_index(view, number)
        rows = self.plan.rows.sample_rows(number)
        return join_index(view, rows.start) if rows else NO_ROW

    def _augmented(self, view: int, number: int, value: Any, key: Callable[[int], str]) -> tuple[Any, Any]:
        """The sample after the shared transform, and the positions that the transform selected, else None."""
        shared = self._shared
        if self._recorded is not None:
            shared = functools.partial(self._recorded.rendered, view, number)
        if shared is not None or self.batched:
            seed_generators(counter_seed("view", self.plan.seed, view, number))
        if shared is not None:
            value = self._run(shared, value, number, "views.transform", key)
        selected = None
        if isinstance(value, dict) and SELECTED in value:
            value = dict(value)
            selected = value.pop(SELECTED)
        return byte_image(value, self.batched) if self._on_device else to_float_image(value), selected

    def _run(
        self, transform: Callable[[Any], Any], value: Any, number: int, name: str, key: Callable[[int], str]
    ) -> Any:
        try:
            return transform(value)
        except LogitCacheError:
            raise
        except Exception as error:
            size = value.shape if hasattr(value, "shape") else getattr(value, "size", None)
            raise UsageError(
                f"the transform of `{name}` fails on sample {key(number)!r} "
                f"({type(value).__name__} of size {size and tuple(size)}): {type(error).__name__}: {error}"
            ) from error

    def _mixed(
        self, view: int, number: int, pixels: Any, target: int, load: Load | None, key: Callable[[int], str]
    ) -> tuple[Any, Tensor]:
        assert load is not None
        assert self.plan.num_classes is not None
        assert self.plan.num_samples is not None
        pixels = pixels if self._on_device else _mixable(pixels)
        distribution = np.zeros(self.plan.num_classes, dtype=np.float32)
        mixture = self.plan.mixture(view, number, self.plan.num_samples)
        weight = 1.0
        if mixture is None and self._on_device:
            pixels = mixed_bytes(pixels, None, weight, None)
        if mixture is not None:
            value, other_target = load(mixture.partner)
            other, _ = self._augmented(view, mixture.partner, value, key)
            pixels, weight = (
                _mix_later(pixels, other, mixture) if self._on_device else _mix(pixels, _mixable(other), mixture)
            )
            distribution[self._class(mixture.partner, other_target, key)] += 1.0 - weight
        distribution[self._class(number, target, key)] += weight
        return pixels, torch.from_numpy(distribution)

    def _class(self, number: int, target: Any, key: Callable[[int], str]) -> int:
        """The class of a sample that is mixed, checked."""
        num_classes = self.plan.num_classes
        assert num_classes is not None
        if not 0 <= int(target) < num_classes:
            raise UsageError(
                f"sample {key(number)!r} has the class {int(target)}, but the view plan has num_classes={num_classes}; "
                "set it to the number of classes of the dataset"
            )
        return int(target)

    def _mixed_as_recorded(
        self, view: int, number: int, pixels: Any, target: int, load: Load | None, key: Callable[[int], str]
    ) -> tuple[Any, Tensor]:
        assert load is not None
        assert self.plan.num_classes is not None
        assert self._recorded is not None
        distribution = np.zeros(self.plan.num_classes, dtype=np.float32)
        partner, weight = self._recorded.partner(view, number), 1.0
        if partner is not None:
            other, other_target = load(partner)
            mix = functools.partial(self._recorded.mixed, view, number, pixels)
            pixels, weight = self._run(mix, other, partner, "views.transform", key)
            distribution[self._class(partner, other_target, key)] += 1.0 - weight
        distribution[self._class(number, target, key)] += weight
        return pixels, torch.from_numpy(distribution)


def render(
    plan: ViewPlan,
    view: int,
    index: int,
    sample: tuple[Any, Any],
    *,
    preprocess: Callable[[Any], Any] | None = None,
    partner: Load | None = None,
) -> tuple[int, Any, Any]:
    """One sample of a view, as `ViewDataset` gives it: (index, input, target), bit for bit.

    For samples that don't come from a map-style dataset. `StreamViews` does it for a whole stream. The sample's content
    is not compared with the cache.

    Args:
        plan: how the views are made, such as `cache.view_plan`.
        view: the view number.
        index: the sample's number in the cache, such as one of `cache.rows(keys)`.
        sample: (input, target), as the teacher's dataset returns it, without augmentation.
        preprocess: the model's deterministic preprocessing; by default the plan's, which is the teacher's.
        partner: returns (input, target) of another sample by its number; required where the plan mixes samples.

    Raises:
        UsageError: no such view or sample; a plan that mixes samples, and no `partner`.
    """
    plan.check_view(view)
    index = operator.index(index)
    num_samples = MAX_ROWS if plan.num_samples is None else plan.num_samples
    if not 0 <= index < num_samples:
        raise UsageError(f"there is no sample {index}; expected 0 to {num_samples - 1}")
    if plan.mixes_samples and (partner is None or plan.num_samples is None):
        raise no_partner()
    renderer = plan.renderer if preprocess is None else Renderer(plan, preprocess)
    with preserved_generators():
        return renderer.item(view, index, sample, partner, str)


def no_partner() -> UsageError:
    """The error for a plan that mixes samples where no other sample can be loaded."""
    return UsageError(
        "views with mixup or CutMix need another sample of the dataset for each one: pass "
        "partner=(function from a sample's number to its (input, target)), and a plan with num_samples"
    )


class ViewDataset(torch.utils.data.Dataset[tuple[int, Any, Any]]):
    """A dataset as the teacher saw it: item i of the current view is (index, input, target).

    `index` is an integer that contains the view and the sample's row in the cache, for `cache.logits(index)` and
    `view.logits(index)`. A batch that a worker loaded before `set_view` was called therefore never gets the labels of
    the new view. `logitcache.split_index` returns the two numbers. The target is the dataset's, or a distribution,
    float32 (C,), if the plan mixes samples.

    Items are `views[i]`, of the view chosen by `set_view` (at first the first one), or `views[(view, i)]`, as
    `ViewSampler` chooses them. DataLoader workers end when the process that started them ends.

    A sample that occurs several times in one batch, in several views, is loaded once; `ViewSampler(per_decode=4)` makes
    such batches.

    Args:
        dataset: map-style; `dataset[i]` returns (input, target).
        plan: how the views are made, such as `cache.view_plan`.
        preprocess: the model's deterministic preprocessing; by default the plan's, which is the teacher's.
        rows: the number in the cache of each sample, for a subset or another order: `cache.rows(keys)`, or
            `cache.samples.rows(keys)` where samples have several rows.
        on_device: leave the last steps to `finish`: items are images as bytes, uint8 (C, H, W), so that fewer bytes
            cross to the device; with mixing, a mapping of what is mixed. Needs a transform that gives PIL images or
            bytes, and a `preprocess` of nothing but torchvision's `Normalize`.

    Raises:
        UsageError: the dataset's length does not fit the plan, or a partner for mixing is not in the subset.
        SampleMismatch: a sample's content differs from what the teacher saw; raised when it is first loaded.
    """

    model_input = RenamedAttribute("preprocess")

    @renamed_keyword("model_input", "preprocess")
    def __init__(
        self,
        dataset: Dataset,
        plan: ViewPlan,
        *,
        preprocess: Callable[[Any], Any] | None = None,
        rows: np.ndarray | None = None,
        on_device: bool = False,
    ) -> None:
        if plan.mixes_samples:
            refuse_stream(dataset, "views with mixup or CutMix combine each sample with any other one")
        self.dataset = dataset
        self.plan = plan
        self.num_samples = len(dataset) if plan.num_samples is None else plan.num_samples
        self.rows = rows
        sized = plan if plan.num_samples is not None else replace(plan, num_samples=self.num_samples)
        self._renderer = Renderer(sized, preprocess, on_device=on_device)
        self.preprocess = self._renderer.preprocess
        self._index_of_row: dict[int, int] | None = None
        if rows is None and len(dataset) != self.num_samples:
            raise UsageError(
                f"the dataset has {len(dataset)} samples, the cache {self.num_samples}. The dataset of a pipeline's "
                "cache is `logitcache.pipeline_data(PIPELINE).train`: validation samples are not in it. If you use "
                "another dataset, keep only the samples whose keys are in the cache (`cache.samples.keys`), and pass "
                "rows=cache.rows(keys)"
            )
        if rows is not None:
            if len(rows) != len(dataset):
                raise UsageError(f"{len(rows)} rows for a dataset of {len(dataset)} samples; expected one each")
            if plan.mixes_samples:
                self._index_of_row = {int(row): index for index, row in enumerate(rows)}
                if len(self._index_of_row) != self.num_samples:
                    raise UsageError(
                        f"views with mixup or CutMix draw partners from all {self.num_samples} samples; this dataset "
                        f"has {len(self._index_of_row)} of them.\nKeep the whole dataset at hand and choose what to "
                        "train on by index (`samples` in a pipeline), or build the cache without mixing."
                    )
        self.on_device = on_device
        """Whether batches need `finish`."""
        self._device_steps = device_steps(self.preprocess) if on_device else []
        # In shared memory, so that persistent DataLoader workers see a new view, and share which samples are checked.
        first = torch.tensor([0 if plan.views is None else plan.views.start])
        self._view: Tensor = first.share_memory_()  # type: ignore[no-untyped-call]
        checked = torch.zeros(len(dataset), dtype=torch.bool)
        self._shared_checked: Tensor = checked.share_memory_()  # type: ignore[no-untyped-call]
        # Read for every sample: NumPy is thirty times as fast as torch here.
        self._checked = self._shared_checked.numpy()
        plan.datasets.add(self)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_checked"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._checked = self._shared_checked.numpy()  # still shared memory; a pickled array would be a copy

    def __len__(self) -> int:
        return len(self.dataset)

    def set_view(self, view: int) -> int:
        """Choose the view of plain indices `views[i]`, and return its number.

        Running workers follow too. Batches that they have loaded already keep the index of their view. Use
        `ViewSampler` to choose views by epoch.

        Raises:
            UsageError: the plan does not have this view.
        """
        self._view[0] = self.check_view(view)
        return view

    def __getitem__(self, item: int | tuple[int, int]) -> tuple[int, Any, Any]:
        return self.__getitems__([item])[0]

    def __getitems__(self, items: Iterable[int | tuple[int, int]]) -> list[tuple[int, Any, Any]]:
        end_with_parent()  # for loaders that the caller made
        current = int(self._view[0])
        places = [item if isinstance(item, tuple) else (current, item) for item in items]
        fetch_in_order(self.dataset, places)
        loaded = _LoadedOnce(self.dataset, [index for _, index in places])
        with preserved_generators():
            return [self._render(view, index, loaded) for view, index in places]

    def collate(self, samples: Sequence[tuple[int, Any, Any]]) -> Batch:
        """Build a batch from samples with the plan's `collate`, for `DataLoader(collate_fn=views.collate)`.

        Raises:
            ShapeError: inputs of different sizes, or a collate function that returns another number of rows.
            UsageError: the collate function failed.
        """
        return collate(samples, self.plan.collate)

    def batch(self, items: Iterable[tuple[int, int]]) -> Any:
        """The batched inputs of some (view, i), rendered as for training."""
        return self.collate(self.__getitems__(items))[1]

    def finish(self, inputs: Any) -> Any:
        """The inputs of a batch as the model takes them, where `on_device` has left steps to do; else unchanged.

        Args:
            inputs: of a batch from these views, on the device where the steps run.

        Returns:
            Images (B, C, H, W), float32, equal to those without `on_device`: exactly on the CPU, and up to 2^-23 in a
            mixed image on another kind of device.
        """
        return finished(inputs, self._device_steps, self._renderer.batched) if self.on_device else inputs

    def input_digests(self, view: int) -> dict[int, str]:
        """Digests of the inputs of a few rows of a view, by row, for `writer.write(input_digests=...)`.

        Needed with padded batches, from which `writer.write(inputs=...)` can't tell a sample from its padding.
        """
        proven = proof_rows(self.plan.seed, view, self.num_samples)
        indices = proven if self.rows is None else np.flatnonzero(np.isin(self.rows, proven)).tolist()
        items = [(view, index) for index in indices]
        return self.proofs(items, self.__getitems__(items))

    def proofs(self, items: Iterable[tuple[int, int]], samples: Iterable[tuple[int, Any, Any]]) -> dict[int, str]:
        """Input digests, by row, of those rendered (view, i) that the cache stores digests for."""

        def digest(value: Any) -> str:
            whole = self.finish(default_collate([value]))[0] if self.on_device else value
            return input_digest(whole).hex()

        return {
            row: digest(value)
            for (view, index), (_, value, _) in zip(items, samples, strict=True)
            if (row := self.row(index)) in proof_rows(self.plan.seed, view, self.num_samples)
        }

    def take_digests(self, indices: Iterable[int]) -> None:
        """Load samples only to record or check their content digests."""
        loaded = _LoadedOnce(self.dataset, [])
        for index in indices:
            self._load(loaded, index)

    def row(self, index: int) -> int:
        """The row in the cache of sample `index` of this dataset."""
        return index if self.rows is None else int(self.rows[index])

    def blocks_of(self, indices: np.ndarray) -> np.ndarray:
        """The block of the cache that holds the labels of each sample, int64 (B,)."""
        assert self.plan.rows is not None
        samples = indices if self.rows is None else self.rows[indices]
        rows = self.plan.rows
        return rows.blocks_of(samples if rows.one_each else rows.offsets[samples])

    def at_hand(self, numbers: Sequence[int]) -> Sequence[int]:
        """The places of those samples, of some by number, that `batch` may render: all."""
        return range(len(numbers))

    def index_of(self, row: int) -> int | None:
        """The index in this dataset of a row of the cache; None if a subset does not contain it."""
        if self.rows is None:
            return row if 0 <= row < len(self) else None
        found = np.flatnonzero(np.asarray(self.rows) == row)
        return int(found[0]) if len(found) else None

    def check_view(self, view: int) -> int:
        """The view number, checked.

        Raises:
            UsageError: the plan does not have this view.
        """
        return self.plan.check_view(view)

    def _render(self, view: int, index: int, loaded: _LoadedOnce) -> tuple[int, Any, Any]:
        self.check_view(view)
        index = operator.index(index)
        if not 0 <= index < len(self.dataset):
            raise IndexBeyondEnd(
                f"there is no sample {index}: the dataset has {len(self.dataset)} samples, 0 to "
                f"{len(self.dataset) - 1}. Make the sampler or the loader's batches of range(len(dataset))"
            )
        of_view = getattr(self.dataset, "target_of_view", None)
        return self._renderer.item(
            view,
            self.row(index),
            self._load(loaded, index),
            functools.partial(self._load_partner, loaded),
            self._key_of_row,
            None if of_view is None else functools.partial(of_view, index),
        )

    def _load(self, loaded: _LoadedOnce, index: int, *, as_partner: bool = False) -> tuple[Any, Any]:
        sample = loaded.take(index, as_partner=as_partner)
        if self.plan.contents is not None and not self._checked[index]:
            self._check_content(self.row(index), index, sample[0])
        return sample

    def _load_partner(self, loaded: _LoadedOnce, row: int) -> tuple[Any, Any]:
        index = row if self._index_of_row is None else self._index_of_row[row]
        return self._load(loaded, index, as_partner=True)

    def _key_of_row(self, row: int) -> str:
        index = self.index_of(row)
        return str(row) if index is None else sample_key(self.dataset, index)

    def _check_content(self, row: int, index: int, value: Any) -> None:
        known = self.plan.contents
        assert known is not None
        found = content_digest(self.dataset, index, value)
        expected = known.take(row, found) if isinstance(known, SeenContents) else known[row].tobytes()
        if not same_content(expected, found):
            raise SampleMismatch(
                f"sample {index} ({sample_key(self.dataset, index)}) is not what the teacher saw: its content has the "
                f"digest {found.hex()} here, {expected.hex()} in row {row} of the cache.\n"
                "Restore the sample; select the cache's samples in their order (`cache.samples.keys`), or pass "
                "rows=cache.rows(keys); or build a new cache from this data."
            )
        self._checked[index] = True


class _LoadedOnce:
    """Samples of a dataset for one batch; one that occurs several times in it is loaded once, and copied.

    Args:
        dataset: map-style.
        indices: of all samples of the batch.
    """

    def __init__(self, dataset: Dataset, indices: Sequence[int]) -> None:
        self._dataset = dataset
        self._uses = {index: count for index, count in Counter(indices).items() if count > 1}
        self._kept: dict[int, tuple[Any, Any]] = {}

    def take(self, index: int, *, as_partner: bool = False) -> tuple[Any, Any]:
        """The input and target of a sample, which the caller may change.

        Args:
            index: in the dataset.
            as_partner: for another sample of the batch that is mixed with it; does not count as one of its uses.
        """
        left = self._uses.get(index, 0) - (not as_partner)
        if not as_partner and index in self._uses:
            self._uses[index] = left
        if index in self._kept:
            value, target = self._kept[index] if left > 0 else self._kept.pop(index)
            return _copied(value), copy.deepcopy(target)
        value, target = load_sample(self._dataset, index)
        if left > 0 and not as_partner and _can_be_copied(value):
            self._kept[index] = value, target
            return _copied(value), copy.deepcopy(target)
        return value, target


def _can_be_copied(value: Any) -> bool:
    """Whether a copy of a sample is as good as loading it again; not of files that are read later, or own classes."""
    if isinstance(value, Mapping):
        return all(map(_can_be_copied, value.values()))
    if isinstance(value, list | tuple):
        return all(map(_can_be_copied, value))
    is_image = type(value).__module__ == "PIL.Image" and type(value).__name__ == "Image"  # not one of an open file
    return is_image or isinstance(value, np.ndarray | Tensor | str | bytes | int | float | None)


def _copied(value: Any) -> Any:
    """A copy that shares no memory with the value."""
    if isinstance(value, Tensor):
        return value.clone()
    return value.copy() if hasattr(value, "mode") or isinstance(value, np.ndarray) else copy.deepcopy(value)


@dataclass(frozen=True)
class BothInputs:
    """The preprocessing of student and teacher on one rendered view: (student's input, teacher's input)."""

    student: Callable[[Any], Any] | None
    teacher: Callable[[Any], Any] | None

    def __call__(self, pixels: Any) -> InputPerModel:
        return InputPerModel(
            (
                pixels if self.student is None else self.student(pixels),
                pixels if self.teacher is None else self.teacher(pixels),
            )
        )


def to_float_image(value: Any) -> Any:
    """A PIL image or uint8 (H, W), (H, W, C) array or (C, H, W) tensor as float32 (C, H, W) in [0, 1].

    Other values (float tensors, text) are returned unchanged. Arrays are (H, W, C), as in OpenCV and albumentations;
    tensors are (C, H, W), as in torch.
    """
    if hasattr(value, "mode") and hasattr(value, "tobytes"):
        value = np.asarray(value)
    if isinstance(value, np.ndarray) and value.dtype == np.uint8 and value.ndim in (2, 3):
        # One NumPy division: for a small image three torch calls would cost more than the rendering.
        scaled = np.divide(value, np.float32(255), dtype=np.float32)
        channels_last = scaled[:, :, None] if scaled.ndim == 2 else scaled
        return torch.from_numpy(np.ascontiguousarray(channels_last.transpose(2, 0, 1)))
    if isinstance(value, Tensor) and value.dtype == torch.uint8:
        return value.as_subclass(Tensor).float().div_(255.0)
    return value.as_subclass(Tensor) if type(value) is not Tensor and isinstance(value, Tensor) else value


def _mixable(value: Any) -> Any:
    """A float tensor that mixup or CutMix can be applied to.

    Raises:
        UsageError: integers, such as token ids, or a mapping of inputs.
    """
    if isinstance(value, np.ndarray):
        value = as_tensors(value)
    if isinstance(value, Tensor) and value.is_floating_point():
        return value
    found = f"integers ({value.dtype})" if isinstance(value, Tensor) else f"a {type(value).__name__}"
    raise UsageError(
        f"mixup and CutMix average pixels, and the samples are {found}; expected float images (C, H, W). Set "
        "views.mixup=0 and views.cutmix=0, or end the shared transform with one that gives floats"
    )


def _check_sizes(pixels: Any, other: Any) -> None:
    """Refuse views of different sizes.

    Raises:
        ShapeError: they can't be mixed.
    """
    if not isinstance(pixels, Tensor) or not isinstance(other, Tensor) or pixels.shape != other.shape:
        shapes = [tuple(getattr(value, "shape", ())) or type(value).__name__ for value in (pixels, other)]
        raise ShapeError(
            f"mixup and CutMix need views of one size, found {shapes[0]} and {shapes[1]}; "
            "end the shared transform with a crop or a resize to a fixed size"
        )


def _mix_later(image: ByteImage, other: ByteImage, mixture: Mixture) -> tuple[dict[str, Tensor], float]:
    """What `finish` mixes, and the weight of the sample itself in it."""
    _check_sizes(image.pixels, other.pixels)
    if mixture.box is None:
        return mixed_bytes(image, other, mixture.weight, None), mixture.weight
    return mixed_bytes(image, other, 1.0, mixture.patch(*image.size)), mixture.weight_in(*image.size)


def _mix(pixels: Any, other: Any, mixture: Mixture) -> tuple[Tensor, float]:
    """The mixed image, and the weight of the sample itself in it."""
    _check_sizes(pixels, other)
    if mixture.box is None:
        return torch.lerp(other, pixels, mixture.weight), mixture.weight
    height, width = pixels.shape[-2:]
    (top, bottom), (left, right) = mixture.patch(height, width)
    pixels = pixels.clone()
    pixels[..., top:bottom, left:right] = other[..., top:bottom, left:right]
    return pixels, mixture.weight_in(height, width)


def _span(centre: float, side: float, length: int) -> tuple[int, int]:
    start = round((centre - side / 2) * length)
    return max(start, 0), min(max(start + round(side * length), 0), length)


@functools.lru_cache(maxsize=2)
def _partners(num_samples: int, seed: int, view: int) -> np.ndarray:
    """Partner of each row, int64 (N,): its successor in a keyed cycle through all rows, never itself."""
    cycle = keyed_permutation(num_samples, "partner", seed, view)
    partners = np.empty_like(cycle)
    partners[cycle] = np.roll(cycle, -1)
    return partners
