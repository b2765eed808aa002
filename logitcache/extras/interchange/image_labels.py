"""Soft labels of images, one small pickle for each image: FKD and Apple ml-dr."""

from __future__ import annotations

import itertools
import json
from abc import abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from logitcache.data.recorded import NUM_OPERATIONS, CropAndFlip, CropAndOperations, DatasetReinforcement
from logitcache.errors import InvalidSource, UsageError
from logitcache.extras.interchange.files import (
    ARRAYS,
    MAX_PICKLE_BYTES,
    inflate,
    load_torch,
    matching,
    read_bytes,
    reading,
    unpickle,
)
from logitcache.extras.interchange.protocol import (
    NO_IDENTITY,
    TAIL_KNOWN,
    Importer,
    RecordedViews,
    SparseRows,
    ViewParameters,
)

# N samples, V views, K entries

FILES_AT_ONCE = 1024
OPEN_ENTRIES = 2**26
"""Entries of all views that the writer holds at once, about."""


class _ImageLabels(Importer):
    """One file for each image, with the labels of all its views."""

    def _set_shape(self) -> None:
        """Number of samples, views and entries, by the first file."""
        self.num_samples = len(self._images)
        ids, _ = self._read(self._images[0])[:2]
        self.num_views, self.k = ids.shape
        self.rows_per_block = int(max(64, min(16_384, OPEN_ENTRIES // (self.num_views * self.k))))

    _images: list[Path]

    @abstractmethod
    def _read(self, file: Path) -> tuple[np.ndarray, np.ndarray, Any]:
        """Classes and probabilities, (V, K), and the parameters of the views: float (V, D) if there is `recorded`."""

    def batches(self) -> Iterator[SparseRows]:
        for start in range(0, self.num_samples, FILES_AT_ONCE):
            part = self._images[start : start + FILES_AT_ONCE]
            labels = [self._checked(file) for file in part]
            with np.errstate(divide="ignore", invalid="ignore"):
                log_probs = np.log(np.stack([probs for _, probs, _ in labels]))
            ids = np.stack([each for each, _, _ in labels])
            for view in range(self.num_views):
                parameters = None if self.recorded is None else np.stack([each[view] for _, _, each in labels])
                yield SparseRows(view, start, ids[:, view], log_probs[:, view], part, parameters)

    def parameters(self) -> Iterator[ViewParameters]:
        for start in range(0, self.num_samples, FILES_AT_ONCE):
            part = self._images[start : start + FILES_AT_ONCE]
            values_NVD = np.stack([self._checked(file)[2] for file in part])
            for view in range(self.num_views):
                yield ViewParameters(view, start, values_NVD[:, view], part)

    def _checked(self, file: Path) -> tuple[np.ndarray, np.ndarray, Any]:
        ids, probs, parameters = self._read(file)
        if ids.shape != (self.num_views, self.k) or probs.shape != ids.shape:
            raise InvalidSource(
                f"{file} has labels {ids.shape}; expected ({self.num_views}, {self.k}) as in {self._images[0]}"
            )
        if (ids < 0).any() or (ids >= self.num_classes).any():
            raise InvalidSource(f"{file} has a class outside 0 to {self.num_classes - 1}")
        return ids, probs, parameters


class FKD(_ImageLabels):
    """FKD's soft labels: a folder with a file for each image, at any depth. Views are the stored crops, in order."""

    name: ClassVar[str] = "fkd"
    tool: ClassVar[str] = "FKD"

    def __init__(self, source: Path, *, num_classes: int | None = None) -> None:
        super().__init__(source, num_classes=num_classes)
        self.require_classes()
        if not source.is_dir():
            raise UsageError(f"{source} is not a folder")
        self._images = sorted(source.rglob("*.tar"), key=lambda path: path.relative_to(source).as_posix())
        if not self._images:
            raise UsageError(f"{source} has no .tar files, one for each image")
        self.files = self._images
        self.keys = [f"{path.parent.name}/{path.stem}" for path in self._images]
        self._set_shape()
        self.missing = {
            "view": "crop box and flip are stored, and not the size and interpolation of the output: these belong to "
            "the preprocessing",
            "identity": NO_IDENTITY,
            "tail": TAIL_KNOWN,
            "temperature": "not stored; probabilities are taken as those at T = 1",
        }
        self.recorded = RecordedViews(CropAndFlip.columns, CropAndFlip().config())
        self.notes = {"k": self.k, "crops": self.num_views}

    def select(self, order: np.ndarray) -> None:
        self._images = [self._images[number] for number in order]
        self.num_samples = len(order)

    def _read(self, file: Path) -> tuple[np.ndarray, np.ndarray, Any]:
        with reading(file):
            coords, flips, labels = (each.values for each in load_torch(read_bytes(file, MAX_PICKLE_BYTES), ARRAYS))
            if labels.ndim != 3 or labels.shape[1] != 2:
                raise InvalidSource(
                    f"{file} has labels of shape {labels.shape}; expected (crops, 2, k): the label types "
                    "marginal_smoothing and marginal_renorm"
                )
            if coords.shape != (len(labels), 4) or flips.shape != (len(labels),):
                raise InvalidSource(f"{file} has boxes {coords.shape} and flips {flips.shape} for {len(labels)} crops")
            ids = labels[:, 0].astype(np.float64)
            if not (ids == np.floor(ids)).all():
                raise InvalidSource(f"{file} has classes that are no whole numbers")
            if labels.dtype == np.float16 and self.num_classes > 2048:
                raise UsageError(f"{file} has classes as float16, which is exact only up to 2048 classes")
            parameters = np.concatenate([coords, flips[:, None]], axis=1, dtype=np.float32)
            return ids.astype(np.int64), labels[:, 1].astype(np.float32), parameters

    def details(self) -> dict[str, np.ndarray]:
        found = np.stack([self._checked(file)[2] for file in self._images]).swapaxes(0, 1)
        return {"boxes": found[..., :4], "flips": found[..., 4] != 0}


class MlDr(_ImageLabels):
    """Apple ml-dr's metadata: `{index}.pth.tar`, the index being the position in the training folder."""

    name: ClassVar[str] = "ml_dr"
    tool: ClassVar[str] = "Apple ml-dr"

    def __init__(self, source: Path, *, num_classes: int | None = None) -> None:
        super().__init__(source, num_classes=num_classes)
        self.require_classes()
        self._transforms: dict[str, dict[str, Any]] = {}
        numbered = {int(match[1]): path for match, path in matching(source, r"(\d{1,9})\.pth\.tar")}
        if sorted(numbered) != list(range(len(numbered))) or not numbered:
            lost = next((number for number in itertools.count() if number not in numbered), 0)
            raise UsageError(f"{source} has {len(numbered)} numbered files and lacks {lost}.pth.tar; expected 0, 1, …")
        self._images = [numbered[number] for number in range(len(numbered))]
        self.files = list(self._images)
        config = source / "config.pth.tar"
        if config.is_file():
            self.files.append(config)
            with reading(config):
                stated = self._load(config)["reinforce"]
                # The rest of the configuration has local paths.
                self.notes["image_augmentation"] = json.loads(json.dumps(stated["image_augmentation"]))
                self._transforms = enabled_transforms(self.notes["image_augmentation"])
        self._set_shape()
        reason = self._unsupported()
        if reason is None:
            self.recorded = recorded_views(self._transforms, DatasetReinforcement)
        self.missing = {
            "view": "images must have the sizes that they had in the tool, because crop boxes are in pixels"
            if reason is None
            else f"the parameters of each transform are stored, but {reason}; the cache has no view plan. `--details` "
            "writes the parameters to a file",
            "identity": NO_IDENTITY,
            "tail": TAIL_KNOWN,
        }
        self.notes |= {"k": self.k, "keys": "position in the training folder"}

    def _load(self, file: Path) -> Any:
        data = read_bytes(file, MAX_PICKLE_BYTES)
        return load_torch(data, ARRAYS) if data[:2] == b"PK" else unpickle(inflate(data), ARRAYS)

    def _read(self, file: Path) -> tuple[np.ndarray, np.ndarray, Any]:
        with reading(file):
            index, views = self._load(file)
            if file.name != f"{index}.pth.tar":
                raise InvalidSource(f"{file} is of sample {index!r:.20}")
            probs, ids = zip(*(view["prob"] for view in views), strict=True)
            classes = np.array(ids)
            if classes.dtype.kind not in "iu":
                raise InvalidSource(f"{file} has classes that are no whole numbers")
            stored: Any = [view["params"] for view in views]
            if self.recorded is not None:
                stored = np.stack([view_parameters(each, list(self._transforms)) for each in stored])
            return classes.astype(np.int64), np.array(probs, dtype=np.float64), stored

    def details(self) -> dict[str, np.ndarray]:
        parameters = []
        for file in self._images:
            with reading(file):
                parameters.append([json.dumps(view["params"]) for view in self._load(file)[1]])
        return {"parameters": np.array(parameters).T}

    def _unsupported(self) -> str | None:
        """Why the views can't be rendered here; None if they can."""
        if not self._transforms:
            return "config.pth.tar is missing, which names the transforms"
        reason = unsupported(self._transforms)
        if reason is not None:
            return reason
        if self.num_samples > MAX_PARTNERS:
            return f"there are more than {MAX_PARTNERS:,} samples, whose numbers float32 can't hold"
        return None


MAX_PARTNERS = 2**24
_OPTIONS = {
    "uint8": set[str](),
    "to_rgb": set[str](),
    "random_resized_crop": {"size", "scale", "ratio", "interpolation"},
    "random_horizontal_flip": {"p"},
    "rand_augment": {"p", "num_ops", "magnitude", "num_magnitude_bins"},
    "to_tensor": set[str](),
    "random_erase": {"p", "scale", "ratio"},
    "normalize": {"mean", "std"},
    "mixup": {"alpha", "p", "div_by"},
    "cutmix": {"alpha", "p"},
}
"""The transforms that can be rendered, in the order in which ml-dr applies them, and their options."""
_MIXING = ("mixup", "cutmix")
_WITHOUT_PARAMETERS = ("uint8", "to_rgb", "to_tensor", "normalize")


def enabled_transforms(augmentation: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The enabled transforms in the order in which they are applied, with their options; unknown ones are last."""
    found = {
        name: {key: value for key, value in options.items() if key != "enable"}
        for name, options in augmentation.items()
        if options.get("enable", True)
    }
    return {name: found[name] for name in [*_OPTIONS, *found] if name in found}


def unsupported(transforms: dict[str, dict[str, Any]]) -> str | None:
    """Why views of these transforms can't be rendered here; None if they can."""
    others = [name for name in transforms if name not in _OPTIONS]
    if others or "random_resized_crop" not in transforms:
        return f"the transforms are {', '.join(transforms)}, which is not the recipe of ImageNet-1k+"
    for name, options in _OPTIONS.items():
        unknown = transforms.get(name, {}).keys() - options
        if unknown:
            return f"{name} has the option {min(unknown)}"
    if transforms.get("rand_augment", {}).get("num_ops", NUM_OPERATIONS) > NUM_OPERATIONS:
        return f"rand_augment has more than {NUM_OPERATIONS} operations"
    return None


def recorded_views(transforms: dict[str, dict[str, Any]], replay: type[CropAndOperations]) -> RecordedViews:
    """The views of these transforms, from the columns of a replay."""
    crop, normalize = transforms["random_resized_crop"], transforms.get("normalize")
    options = {name: crop[name] for name in ("size", "interpolation") if name in crop}
    preprocess = None if normalize is None else [{"Normalize": normalize}]
    return RecordedViews(replay.columns, replay(**options).config(), preprocess)


def view_parameters(stored: Any, transforms: list[str]) -> np.ndarray:
    """The compressed parameters of one view in the columns of `DatasetReinforcement`, float32 (D,).

    Raises:
        ValueError: not the form that ml-dr writes, or a number that float32 does not hold.
    """
    found: dict[str, float] = dict.fromkeys(DatasetReinforcement.columns, 0.0)
    nothing = ("erase_top", *(f"operation_{number}" for number in range(NUM_OPERATIONS)))
    found |= dict.fromkeys((*nothing, *(f"partner_{name}" for name in nothing), "partner", "patch_top"), -1.0)
    found["weight"] = 1.0
    stored, names = list(stored), [name for name in transforms if name not in _WITHOUT_PARAMETERS]
    partner = stored.pop(0) if any(name in _MIXING for name in names) else None
    if len(stored) != len(names):
        raise ValueError(f"a view has parameters of {len(stored)} transforms; expected {', '.join(names)}")
    if partner is not None:
        found["partner"] = partner
    for name, value in zip(names, stored, strict=True):
        if name == "mixup" and value is not None:
            # Both as ml-dr's arithmetic rounds them.
            found |= {"weight": float(np.float32(value)), "partner_weight": float(np.float32(1 - value))}
        elif name == "cutmix" and value is not None:
            _, top, left, bottom, right = value
            found |= {"patch_top": top, "patch_left": left, "patch_bottom": bottom, "patch_right": right}
        elif name not in _MIXING:
            for prefix, own in (("", value),) if partner is None else (("", value[0]), ("partner_", value[1])):
                found |= {f"{prefix}{column}": number for column, number in _of_transform(name, own).items()}
    unknown = [name for name in found if name not in DatasetReinforcement.columns]
    if unknown:
        raise ValueError(f"a view has the parameter {unknown[0]}, more than the transforms have")
    exact = np.array([found[name] for name in DatasetReinforcement.columns], dtype=np.float64)
    values = exact.astype(np.float32)
    if not np.array_equal(values, exact, equal_nan=True):
        raise ValueError("a parameter that float32 does not hold")
    return values


def _of_transform(name: str, value: Any) -> dict[str, float]:
    """The parameters of one transform of one image, by column."""
    if name == "random_horizontal_flip":
        return {"flip": float(bool(value))}
    if name == "rand_augment":
        operations: dict[str, float] = {}
        for number, (operation, magnitude) in enumerate(value or ()):
            operations |= {f"operation_{number}": operation, f"magnitude_{number}": magnitude}
        return operations
    sides = ("top", "left", "height", "width")
    if name == "random_erase":
        # -1 is a box that ml-dr did not find.
        erased = (-1, 0, 0, 0) if value is None or value[0] == -1 else value
        return {f"erase_{side}": number for side, number in zip(sides, erased, strict=True)}
    return dict(zip(sides, value, strict=True))
