"""An exported student, in memory again."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from logitcache.catalog.models import build_model
from logitcache.errors import CorruptCache, UsageError
from logitcache.product.facts import SAFETENSORS, Product, file_facts, read_product
from logitcache.transforms import build_transform
from logitcache.views import to_float_image


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
    model = build_model(
        product.model.name,
        num_classes=product.model.num_classes,
        input_shape=product.preprocessing.shape,
        weights=str(path / SAFETENSORS),
        args=product.model.args,
        trust=trust,
    )
    own_part = build_transform(product.preprocessing.steps, trust=trust)

    def preprocess(image: Any) -> Tensor:
        return torch.as_tensor(own_part(to_float_image(image)))

    return LoadedStudent(model.eval(), preprocess, product.model.class_names, product)
