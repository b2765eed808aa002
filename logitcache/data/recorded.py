"""Recorded views: augmentations that another tool chose and stored, rendered from what it stored.

A view stays a pure function of (sample, view). Its parameters, such as a crop box, are read from an array with a row
for each sample of each view, instead of being drawn from the view's seed.
"""

from __future__ import annotations

import functools
import re
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, TypeAlias

import numpy as np
import torch
from torch import Tensor

from logitcache.digest import array_digest
from logitcache.errors import CorruptCache, UsageError
from logitcache.registry import Registry, parameters

# N samples, D columns, H height, W width

PARAMETERS = "view_parameters"
"""Name of the output in which a cache stores the parameters, float32 (D,) for each sample of each view."""
RECORDED = "recorded"
"""Name of the transform in specifications."""
NO_PARTNER = -1.0
MAX_COLUMNS = 256
VIEWS_KEPT = 8
"""Views whose parameters are kept in memory."""
ROUNDING = 1e-3
"""By how much a box in float16 fractions may reach beyond the image."""
Parameters: TypeAlias = Mapping[str, float]
"""What is stored of one sample of one view, by column. `seed_high` and `seed_low` arrive as one integer, `seed`."""
Columns: TypeAlias = Mapping[str, np.ndarray]
"""The same for many samples, float32 (N,)."""


class Replay(ABC):
    """Renders a sample of a view from its stored parameters.

    A frozen dataclass whose fields survive JSON. A function of (sample, parameters) can replay views too.
    """

    name: ClassVar[str]
    columns: ClassVar[tuple[str, ...]]
    """The parameters that it reads."""
    mixes: ClassVar[bool] = False
    """Whether samples may have a partner."""

    @abstractmethod
    def __call__(self, sample: Any, parameters: Parameters) -> Any:
        """The sample of the view, before it is mixed with a partner."""

    def invalid(self, columns: Columns, num_samples: int) -> dict[str, np.ndarray]:
        """Which of some samples have parameters that no tool stores, bool (N,), by the reason.

        Args:
            columns: of these samples.
            num_samples: of the whole cache.
        """
        del columns, num_samples
        return {}

    def config(self) -> dict[str, Any]:
        """Name and the parameters that differ from their defaults, as a step of a specification."""
        given = {name: getattr(self, name) for name in parameters(type(self))}
        defaults = {each.name: each.default for each in fields(self)}  # type: ignore[arg-type]
        return {self.name: {name: value for name, value in given.items() if value != defaults[name]}}


@dataclass(frozen=True, kw_only=True)
class CropAndFlip(Replay):
    """A crop box in fractions of the image, and a horizontal flip, as FKD stores them.

    Edges are rounded to whole pixels as in Pillow's `Image.crop`, which FKD uses.
    """

    name: ClassVar[str] = "crop_and_flip"
    columns: ClassVar[tuple[str, ...]] = ("top", "left", "height", "width", "flip")

    size: int | Sequence[int] | None = None
    """Resize the crop to this height and width; None leaves it to `preprocess`."""
    interpolation: str = "bilinear"

    def __post_init__(self) -> None:
        if self.size is not None:
            object.__setattr__(self, "size", _size(self.size))
        _interpolation(self.interpolation)

    def __call__(self, sample: Any, parameters: Parameters) -> Any:
        from torchvision.transforms import functional as F

        image = _image(sample)
        height, width = F.get_image_size(image)[::-1]
        top, left = parameters["top"] * height, parameters["left"] * width
        bottom, right = round(top + parameters["height"] * height), round(left + parameters["width"] * width)
        top, left = round(top), round(left)
        if bottom <= top or right <= left:
            raise ValueError(f"the stored crop box has no pixel of this image of {width} x {height} pixels")
        image = F.crop(image, top, left, bottom - top, right - left)
        if self.size is not None:
            image = F.resize(image, list(_size(self.size)), _interpolation(self.interpolation))
        return F.hflip(image) if parameters["flip"] else image

    def invalid(self, columns: Columns, num_samples: int) -> dict[str, np.ndarray]:
        del num_samples
        return {
            "a crop box outside of the image, or without area": ~_is_box(columns, most=1.0 + ROUNDING),
            "a flip that is neither 0 nor 1": ~np.isin(columns["flip"], (0.0, 1.0)),
        }


OPERATIONS = (
    "Identity",
    "ShearX",
    "ShearY",
    "TranslateX",
    "TranslateY",
    "Rotate",
    "Brightness",
    "Color",
    "Contrast",
    "Sharpness",
    "Posterize",
    "Solarize",
    "AutoContrast",
    "Equalize",
)
"""torchvision's RandAugment operations, in the order in which ml-dr numbers them."""
NUM_OPERATIONS = 2
ONE_IMAGE = (
    *("top", "left", "height", "width", "flip"),
    *(f"{what}_{number}" for number in range(NUM_OPERATIONS) for what in ("operation", "magnitude")),
    *("erase_top", "erase_left", "erase_height", "erase_width"),
)
"""What is stored of the sample, and of its partner. A negative operation or `erase_top` means none."""


@dataclass(frozen=True, kw_only=True)
class CropAndOperations(Replay):
    """Crop, flip, RandAugment and erasing, as Apple's ml-dr and DataCompDR store them.

    Crop boxes are in pixels, so that images must have the size that they had in the tool. The steps are those of
    `Compose.reapply` (Faghri et al. 2023, arXiv:2303.08983), except `Normalize`, which is part of the preprocessing.
    """

    name: ClassVar[str] = "crop_and_operations"
    columns: ClassVar[tuple[str, ...]] = ONE_IMAGE

    size: int | Sequence[int]
    interpolation: str = "bilinear"

    def __post_init__(self) -> None:
        object.__setattr__(self, "size", _size(self.size))
        _interpolation(self.interpolation)

    def __call__(self, sample: Any, parameters: Parameters) -> Tensor:
        return self._rendered(sample, parameters, "")

    def _rendered(self, sample: Any, parameters: Parameters, prefix: str) -> Tensor:
        from torchvision.transforms import InterpolationMode
        from torchvision.transforms import functional as F
        from torchvision.transforms.autoaugment import _apply_op  # which ml-dr calls

        image = _image(sample)
        image = F.to_pil_image(image) if isinstance(image, Tensor) else image
        top, left, height, width = (int(parameters[f"{prefix}{side}"]) for side in ("top", "left", "height", "width"))
        if top + height > image.height or left + width > image.width:
            raise ValueError(
                f"the stored crop box ends at row {top + height} and column {left + width} of an image of "
                f"{image.width} x {image.height} pixels: the tool had a larger image, or another one"
            )
        size, interpolation = list(_size(self.size)), _interpolation(self.interpolation)
        image = F.resized_crop(image, top, left, height, width, size, interpolation)
        image = F.hflip(image) if parameters[f"{prefix}flip"] else image
        for number in range(NUM_OPERATIONS):
            operation = int(parameters[f"{prefix}operation_{number}"])
            if operation >= 0:
                magnitude = parameters[f"{prefix}magnitude_{number}"]
                image = _apply_op(image, OPERATIONS[operation], magnitude, InterpolationMode.NEAREST, None)
        pixels: Tensor = F.to_tensor(image)
        if parameters[f"{prefix}erase_top"] >= 0:
            top, left, height, width = (int(parameters[f"{prefix}erase_{side}"]) for side in _SIDES)
            pixels[:, top : top + height, left : left + width] = 0
        return pixels

    def invalid(self, columns: Columns, num_samples: int) -> dict[str, np.ndarray]:
        del num_samples
        height, width = _size(self.size)
        erased = {side: columns[f"erase_{side}"] for side in _SIDES}
        inside = _is_box(erased, most=(height, width)) & _all_whole(*erased.values())
        operations = [columns[f"operation_{number}"] for number in range(NUM_OPERATIONS)]
        magnitudes = [columns[f"magnitude_{number}"] for number in range(NUM_OPERATIONS)]
        whole = _all_whole(*(columns[side] for side in _SIDES))
        return {
            "a crop box that starts outside of the image, or has no area": ~(_is_box(columns) & whole),
            "a flip that is neither 0 nor 1": ~np.isin(columns["flip"], (0.0, 1.0)),
            "an unknown operation": ~np.all([_is_whole(each, -1, len(OPERATIONS) - 1) for each in operations], axis=0),
            "a magnitude that is no number": ~np.all(np.isfinite(magnitudes), axis=0),
            "an erased box outside of the view": ~(inside | (erased["top"] == -1)),
        }


@dataclass(frozen=True, kw_only=True)
class DatasetReinforcement(CropAndOperations):
    """The transforms of Apple's ml-dr: those of `CropAndOperations`, then mixup and CutMix with a partner."""

    name: ClassVar[str] = "dataset_reinforcement"
    columns: ClassVar[tuple[str, ...]] = (
        *ONE_IMAGE,
        "partner",
        *(f"partner_{column}" for column in ONE_IMAGE),
        *("weight", "partner_weight"),
        *("patch_top", "patch_left", "patch_bottom", "patch_right"),
    )
    mixes: ClassVar[bool] = True

    def partner(self, sample: Any, parameters: Parameters) -> Tensor:
        """The view of the partner, whose parameters are stored with the sample that it is mixed into."""
        return self._rendered(sample, parameters, "partner_")

    def mixed(self, pixels: Tensor, other: Tensor, parameters: Parameters) -> tuple[Tensor, float]:
        """The mixed image, and the weight that the sample itself keeps."""
        weight = parameters["weight"]
        if weight < 1.0:
            pixels = weight * pixels + parameters["partner_weight"] * other
        if parameters["patch_top"] >= 0:
            top, left, bottom, right = (int(parameters[f"patch_{side}"]) for side in ("top", "left", "bottom", "right"))
            pixels = pixels.clone()
            pixels[:, top:bottom, left:right] = other[:, top:bottom, left:right]
            weight *= 1.0 - (bottom - top) * (right - left) / (pixels.shape[-1] * pixels.shape[-2])
        return pixels, weight

    def invalid(self, columns: Columns, num_samples: int) -> dict[str, np.ndarray]:
        with_partner = columns["partner"] != NO_PARTNER
        reasons = super().invalid(columns, num_samples)
        of_partner = {name: columns[f"partner_{name}"] for name in ONE_IMAGE}
        for reason, wrong in super().invalid(of_partner, num_samples).items():
            reasons[reason] |= wrong & with_partner
        height, width = _size(self.size)
        top, left, bottom, right = (columns[f"patch_{side}"] for side in ("top", "left", "bottom", "right"))
        inside = (top >= 0) & (top <= bottom) & (bottom <= height) & (left >= 0) & (left <= right) & (right <= width)
        weights = columns["weight"], columns["partner_weight"]
        return reasons | {
            "a partner that is no sample": ~_is_whole(columns["partner"], NO_PARTNER, num_samples - 1),
            "a weight outside of 0 to 1": ~np.all([(each >= 0) & (each <= 1) for each in weights], axis=0),
            "a CutMix patch outside of the view": ~((inside & _all_whole(top, left, bottom, right)) | (top == -1)),
            "a mixture without partner": ~with_partner & ((columns["weight"] != 1) | (top != -1)),
        }


_SIDES = ("top", "left", "height", "width")
REPLAYS: Registry[Callable[..., Callable[[Any, Parameters], Any]]] = Registry(
    "replay", {each.name: each for each in (CropAndFlip, CropAndOperations, DatasetReinforcement)}, allows_code=True
)
"""Called with the parameters of a step; each returns a callable of (sample, stored parameters)."""


class RecordedTransform:
    """The shared transform of recorded views: what it does to a sample is stored for each view.

    Args:
        columns: names of the D parameters.
        digests: the value hash of the parameters, float32 (N, D), of each view.
        read: reads the parameters of a view; None only describes the views.
        replay: renders a sample from its parameters; None only describes the views.
        replay_step: the specification of the replay, if the cache records it.

    Raises:
        UsageError: `replay` needs columns that are not stored.
    """

    def __init__(
        self,
        columns: Sequence[str],
        digests: Sequence[str],
        *,
        read: Callable[[int], np.ndarray] | None = None,
        replay: Callable[[Any, Parameters], Any] | None = None,
        replay_step: Mapping[str, Any] | None = None,
    ) -> None:
        self.columns = tuple(columns)
        self.digests = tuple(digests)
        self.replay = replay
        self.spec = [
            {
                RECORDED: {
                    "columns": list(columns),
                    "views": list(digests),
                    "replay": None if replay_step is None else dict(replay_step),
                }
            }
        ]
        """What identifies the views: the parameters, and the replay if it is recorded."""
        self._read = read
        self._views: OrderedDict[int, np.ndarray] = OrderedDict()
        missing = [name for name in getattr(replay, "columns", ()) if name not in self.columns]
        if missing:
            raise UsageError(
                f"{type(replay).__name__} needs the parameters {', '.join(missing)}; stored are "
                f"{', '.join(self.columns)}"
            )

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_views": OrderedDict()}

    @property
    def mixes(self) -> bool:
        """Whether samples may be mixed with a partner."""
        return bool(getattr(self.replay, "mixes", False))

    def __call__(self, value: Any) -> Any:
        raise UsageError(
            "recorded views differ by sample and view; render them with `ViewDataset`, `StreamViews` or "
            "`logitcache.render`, which know both"
        )

    def parameters(self, view: int, number: int) -> dict[str, float]:
        """What is stored of a sample of a view, by column.

        Raises:
            CorruptCache: the array is not the one that the cache describes, or has values that no tool stores.
            UsageError: there is no such view or sample.
        """
        values_ND = self._of_view(view)
        if not 0 <= number < len(values_ND):
            raise UsageError(f"no parameters of sample {number} are stored; expected 0 to {len(values_ND) - 1}")
        found = dict(zip(self.columns, values_ND[number].tolist(), strict=True))
        if "seed_high" in found:
            found["seed"] = (int(found.pop("seed_high")) << 16) + int(found.pop("seed_low"))
        return found

    def rendered(self, view: int, number: int, sample: Any) -> Any:
        """A sample of a view, before mixing."""
        return self._replay()(sample, self.parameters(view, number))

    def partner(self, view: int, number: int) -> int | None:
        """The number of the sample that a sample of a view is mixed with."""
        partner = self.parameters(view, number).get("partner", NO_PARTNER)
        return None if partner == NO_PARTNER else int(partner)

    def mixed(self, view: int, number: int, pixels: Tensor, partner: Any) -> tuple[Tensor, float]:
        """A rendered sample, mixed with a partner as the dataset returns it, and the weight that the sample keeps."""
        replay, found = self._replay(), self.parameters(view, number)
        assert isinstance(replay, DatasetReinforcement)
        return replay.mixed(pixels, replay.partner(partner, found), found)

    def _replay(self) -> Callable[[Any, Parameters], Any]:
        if self.replay is None:
            raise UsageError("these recorded views have no replay: pass a function to `cache.view_plan_with`")
        return self.replay

    def _of_view(self, view: int) -> np.ndarray:
        """The checked parameters of a view, float32 (N, D)."""
        if view not in self._views:
            if self._read is None:
                raise UsageError("these recorded views only describe a cache; render those of `cache.view_plan`")
            if not 0 <= view < len(self.digests):
                raise UsageError(f"view {view} is not recorded; expected 0 to {len(self.digests) - 1}")
            values_ND = np.ascontiguousarray(self._read(view), dtype="<f4")
            if values_ND.ndim != 2 or values_ND.shape[1] != len(self.columns):
                raise CorruptCache(
                    f"the parameters of view {view} are {values_ND.shape}; expected (N, {len(self.columns)}): "
                    f"{', '.join(self.columns)}"
                )
            if array_digest(values_ND) != self.digests[view]:
                raise CorruptCache(
                    f"the parameters of view {view} are not those that the cache's identity names: their hash is "
                    f"{array_digest(values_ND)}, expected {self.digests[view]}. Import the cache again"
                )
            invalid = first_invalid(self.columns, values_ND, self.replay, len(values_ND))
            if invalid is not None:
                raise CorruptCache(f"view {view} of sample {invalid[0]} has {invalid[1]}")
            self._views[view] = values_ND
            while len(self._views) > VIEWS_KEPT:
                self._views.popitem(last=False)
        return self._views[view]


def first_invalid(names: Sequence[str], values_BD: np.ndarray, replay: Any, num_samples: int) -> tuple[int, str] | None:
    """The first of some samples whose parameters no tool stores, and what is wrong with them; None if there is none.

    Args:
        names: of the D columns.
        values_BD: float (B, D).
        replay: that reads them; a function checks nothing.
        num_samples: of the whole cache.
    """
    finite = np.isfinite(values_BD).all(axis=1)
    columns = {name: values_BD[:, place] for place, name in enumerate(names)}
    reasons = {"a parameter that is no number": ~finite}
    with np.errstate(invalid="ignore"):
        for name in ("seed_high", "seed_low"):
            if name in columns:
                reasons["a seed that is no whole number below 2^32"] = ~_is_whole(columns[name], 0, 2**16 - 1)
        reasons |= replay.invalid(columns, num_samples) if isinstance(replay, Replay) else {}
    for reason, wrong in reasons.items():
        if wrong.any():
            number = int(np.flatnonzero(wrong)[0])
            shown = ", ".join(f"{name} {values_BD[number, place]:g}" for place, name in enumerate(names[:5]))
            return number, f"{reason} ({shown})"
    return None


def recorded_step(spec: Any) -> Mapping[str, Any] | None:
    """The parameters of the step `recorded` in the specification of a shared transform; None if it has none.

    Raises:
        UsageError: it is not the form that `RecordedTransform.spec` has.
    """
    if not isinstance(spec, list) or not any(isinstance(step, Mapping) and RECORDED in step for step in spec):
        return None
    step = spec[0].get(RECORDED) if len(spec) == 1 and isinstance(spec[0], Mapping) and len(spec[0]) == 1 else None
    if not isinstance(step, Mapping) or step.keys() != {"columns", "views", "replay"}:
        raise UsageError("recorded views are one step with columns, views and replay")
    columns, views, replay = step["columns"], step["views"], step["replay"]
    if (
        not _are_texts(columns, r"[a-z][a-z0-9_]{0,39}")
        or len(set(columns)) != len(columns)
        or not 1 <= len(columns) <= MAX_COLUMNS
        or ("seed_high" in columns) != ("seed_low" in columns)
    ):
        raise UsageError(f"the columns of recorded views are 1 to {MAX_COLUMNS} different names")
    if not _are_texts(views, r"[0-9a-f]{64}"):
        raise UsageError("the views of recorded views are a list of hashes")
    if replay is not None and (not isinstance(replay, Mapping) or len(replay) != 1):
        raise UsageError(f"the replay of recorded views is {{name: parameters}} or null, not {replay!r:.80}")
    return step


def build_replay(step: Mapping[str, Any], *, trust: bool) -> Callable[[Any, Parameters], Any]:
    """A replay from its specification `{name: parameters}`.

    Raises:
        UsageError: an unknown name or parameter.
        UntrustedCode: an entry point from outside the working directory without `trust`.
    """
    name, given = next(iter(step.items()))
    try:
        return REPLAYS.resolve(name, trust=trust)(**(given or {}))
    except TypeError as error:
        raise UsageError(f"replay {name}: {error}") from None


class RecordedMixing:
    """Partners and weights of recorded views, from what is stored; renders nothing.

    Args:
        columns: names of the parameters.
        replay: of the views.
        read: as for `RecordedTransform`.
    """

    def __init__(self, columns: Sequence[str], replay: DatasetReinforcement, read: Callable[[int], np.ndarray]) -> None:
        self._columns = list(columns)
        self._replay = replay
        self._read = functools.lru_cache(maxsize=1)(read)

    @classmethod
    def of(cls, transform: Any, read: Callable[[int], np.ndarray]) -> RecordedMixing | None:
        """That of a cache's identity; None if no other tool mixed samples.

        Raises:
            UsageError: the identity is invalid.
        """
        step = recorded_step(transform.get("shared")) if isinstance(transform, Mapping) else None
        if step is None or step["replay"] is None or next(iter(step["replay"])) != DatasetReinforcement.name:
            return None
        replay = build_replay(step["replay"], trust=False)
        missing = [name for name in DatasetReinforcement.columns if name not in step["columns"]]
        if not isinstance(replay, DatasetReinforcement) or missing:
            raise UsageError(f"recorded views lack the parameters {', '.join(missing)}")
        return cls(step["columns"], replay, read)

    def of_view(self, view: int) -> tuple[np.ndarray, np.ndarray]:
        """The partner of each sample, int64 (N,), -1 for none, and the weight that the sample keeps, float32 (N,)."""
        values_ND = self._read(view)
        columns = {name: values_ND[:, place] for place, name in enumerate(self._columns)}
        height, width = _size(self._replay.size)
        top, left, bottom, right = (columns[f"patch_{side}"] for side in ("top", "left", "bottom", "right"))
        patch = np.where(top >= 0, (bottom - top) * (right - left), 0) / (height * width)
        return columns["partner"].astype(np.int64), columns["weight"] * (1 - patch)


def _are_texts(values: Any, pattern: str) -> bool:
    return isinstance(values, list) and all(isinstance(each, str) and re.fullmatch(pattern, each) for each in values)


def _size(size: int | Sequence[int]) -> tuple[int, int]:
    """Height and width.

    Raises:
        UsageError: neither one positive number nor two.
    """
    sides = (size, size) if isinstance(size, int) else tuple(size) if isinstance(size, list | tuple) else ()
    sides = sides * 2 if len(sides) == 1 else sides
    if len(sides) != 2 or not all(isinstance(side, int) and 1 <= side <= 2**14 for side in sides):
        raise UsageError(f"size is one number of pixels, or height and width, not {size!r:.40}")
    return int(sides[0]), int(sides[1])


def _interpolation(name: str) -> Any:
    from torchvision.transforms import InterpolationMode

    try:
        return InterpolationMode(name)
    except ValueError:
        known = ", ".join(sorted(mode.value for mode in InterpolationMode))
        raise UsageError(f"interpolation is one of {known}, not {name!r:.40}") from None


def _image(sample: Any) -> Any:
    """A sample as torchvision's functions take it: a PIL image, or a tensor (C, H, W).

    Raises:
        UsageError: it is no image.
    """
    if hasattr(sample, "mode") and hasattr(sample, "tobytes"):
        return sample
    if isinstance(sample, np.ndarray) and sample.dtype == np.uint8 and sample.ndim in (2, 3):
        channels_last = sample[:, :, None] if sample.ndim == 2 else sample
        return torch.from_numpy(np.ascontiguousarray(channels_last.transpose(2, 0, 1)))
    if isinstance(sample, Tensor) and sample.ndim == 3:
        return sample
    raise UsageError(
        f"recorded crop boxes are of images; the dataset gives {type(sample).__name__}. Expected PIL images, uint8 "
        "arrays (H, W, C) or tensors (C, H, W)"
    )


def _is_box(columns: Columns, most: float | tuple[int, int] = np.inf) -> np.ndarray:
    """Whether a box has an area, starts in the image, and ends before `most`, bool (N,)."""
    rows, across = most if isinstance(most, tuple) else (most, most)
    top, left, height, width = (columns[side] for side in _SIDES)
    inside: np.ndarray = (top >= 0) & (left >= 0) & (height > 0) & (width > 0)
    return inside & (top + height <= rows) & (left + width <= across)


def _is_whole(values: np.ndarray, least: float, most: float) -> np.ndarray:
    whole: np.ndarray = (values >= least) & (values <= most) & (values == np.floor(values))
    return whole


def _all_whole(*columns: np.ndarray) -> np.ndarray:
    whole: np.ndarray = np.all([values == np.floor(values) for values in columns], axis=0)
    return whole
