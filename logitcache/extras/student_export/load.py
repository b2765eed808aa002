"""An exported student, in memory again."""

from __future__ import annotations

import functools
import math
import os
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
from logitcache.extras.student_export.facts import FACTS, SAFETENSORS, Product, file_facts, read_product


@dataclass(frozen=True)
class LoadedStudent:
    """A student that is ready to be asked."""

    model: nn.Module
    """In evaluation mode, on the CPU: float32 (B, *input shape) -> logits (B, C)."""
    preprocess: Callable[[Any], Tensor]
    """A PIL image or uint8 (H, W, C) array -> float32 input, (C, H, W)."""
    class_names: list[str] | None
    product: Product


def load_student(folder: str | os.PathLike[str], *, trust: bool = False) -> LoadedStudent:
    """Load a student that was exported to safetensors.

    Args:
        trust: run `package.module:function` code from outside the working folder.

    Raises:
        UsageError: no exported student, none with safetensors, or one that this version can't build.
        CorruptCache: the weights are not those that were exported.
        UntrustedCode: its net or its preprocessing is somebody's function.
    """
    path = Path(folder)
    product = read_product(path)
    if SAFETENSORS not in product.files or not (path / SAFETENSORS).is_file():
        raise UsageError(f"{path} holds no {SAFETENSORS}; export the run with --to safetensors")
    if file_facts(path / SAFETENSORS) != product.files[SAFETENSORS]:
        raise CorruptCache(f"{path / SAFETENSORS} is not the file that was exported; get it again")
    build = functools.partial(
        build_model,
        product.model.name,
        num_classes=product.model.num_classes,
        input_shape=product.preprocessing.shape,
        args=product.model.args,
        trust=trust,
    )
    if not is_entry_point(product.model.name):
        with torch.device("meta"):
            _hold_to_file(build(), path / SAFETENSORS)
    model = build(weights=str(path / SAFETENSORS))
    own_part = build_transform(product.preprocessing.steps, trust=trust)

    def preprocess(image: Any) -> Tensor:
        return torch.as_tensor(own_part(to_float_image(image)))

    return LoadedStudent(model.eval(), preprocess, product.model.class_names, product)


def _hold_to_file(skeleton: nn.Module, path: Path) -> None:
    """Refuse a description that asks for more memory than the weights take, before any is allocated.

    Raises:
        UsageError: they differ in how many values they hold.
    """
    try:
        with safetensors.safe_open(path, "pt") as file:
            there = sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise UsageError(f"{path} is no safetensors file: {error}") from error
    here = sum(value.numel() for value in skeleton.state_dict().values())
    if here != there:
        raise UsageError(f"{path} does not fit the model that {FACTS} describes: {there:,} values, not {here:,}")
