"""Loading an exported student."""

from __future__ import annotations

import functools
import math
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor, nn

from logitcache.catalog.models import build_model
from logitcache.data.transforms import build_transform
from logitcache.data.views import to_float_image
from logitcache.entry_points import is_entry_point
from logitcache.errors import CorruptCache, UsageError
from logitcache.extras.student_export.metadata import (
    METADATA,
    SAFETENSORS,
    StudentMetadata,
    read_metadata,
    record_file,
)


@dataclass(frozen=True)
class LoadedStudent:
    """A student that is ready for inference."""

    model: nn.Module
    """In evaluation mode, on the CPU: float32 (B, *input shape) -> logits (B, C)."""
    preprocess: Callable[[Any], Tensor]
    """A PIL image or uint8 (H, W, C) array -> float32 input, (C, H, W)."""
    class_names: list[str] | None
    metadata: StudentMetadata

    @property
    def product(self) -> StudentMetadata:
        """Deprecated name of `metadata`."""
        warnings.warn("LoadedStudent.product is deprecated; use metadata", DeprecationWarning, stacklevel=2)
        return self.metadata


def load_student(folder: str | os.PathLike[str], *, trust: bool = False) -> LoadedStudent:
    """Load a student that was exported to safetensors.

    Args:
        trust: run `package.module:function` code from outside the working directory.

    Raises:
        UsageError: the folder has no exported student or no safetensors, or this version can't build the model.
        CorruptCache: the weights differ from those that were exported.
        UntrustedCode: the model or its preprocessing needs code that is not trusted.
    """
    path = Path(folder)
    metadata = read_metadata(path)
    weights = path / SAFETENSORS
    if SAFETENSORS not in metadata.files or not weights.is_file():
        raise UsageError(f"{path} contains no {SAFETENSORS}; export the run with --to safetensors")
    if record_file(weights) != metadata.files[SAFETENSORS]:
        raise CorruptCache(f"{weights} is not the file that was exported; download or copy it again")
    build = functools.partial(
        build_model,
        metadata.model.name,
        num_classes=metadata.model.num_classes,
        input_shape=metadata.preprocessing.shape,
        args=metadata.model.args,
        trust=trust,
    )
    if not is_entry_point(metadata.model.name):
        with torch.device("meta"):
            _check_size(build(), weights)
    model = build(weights=str(weights))
    model_input = build_transform(metadata.preprocessing.steps, trust=trust)

    def preprocess(image: Any) -> Tensor:
        return torch.as_tensor(model_input(to_float_image(image)))

    return LoadedStudent(model.eval(), preprocess, metadata.model.class_names, metadata)


def _check_size(skeleton: nn.Module, path: Path) -> None:
    """Refuse metadata that describes a larger model than the weights, before its memory is allocated.

    Raises:
        UsageError: the numbers of values differ.
    """
    try:
        with safetensors.safe_open(path, "pt") as file:
            there = sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise UsageError(f"{path} is not a safetensors file: {error}") from error
    here = sum(value.numel() for value in skeleton.state_dict().values())
    if here != there:
        raise UsageError(f"{path} does not fit the model that {METADATA} describes: {there:,} values, not {here:,}")
