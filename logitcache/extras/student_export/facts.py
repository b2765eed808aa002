"""`product.json`: everything that is known of an exported student, in the form that its card and the report read."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from logitcache.errors import UsageError
from logitcache.train.finished import Positive, Share, read_text

FACTS, CARD = "product.json", "README.md"
SAFETENSORS, ONNX, INT8 = "model.safetensors", "model.onnx", "model-int8.onnx"
MODEL_FILES = (SAFETENSORS, ONNX, INT8)
FORMAT: Literal[1] = 1


Count = Annotated[int, Field(ge=0, lt=2**63)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)


class ModelFacts(_Part):
    """How to build the net again."""

    name: str
    args: dict[str, Any]
    num_classes: Annotated[int, Field(ge=1, lt=2**31)]
    class_names: list[str] | None


class Preprocessing(_Part):
    """What an input is."""

    shape: list[Count]
    """Of one sample: (channels, height, width) of images."""
    dtype: str
    steps: list[dict[str, Any]]
    """The student's own `input` transforms, in their order, after an image became float32 (C, H, W) in [0, 1]."""


class CacheFacts(_Part):
    """The cache that the student was trained from."""

    id: str
    digest: str | None
    """None where the cache was not at hand."""


class Training(_Part):
    """How the weights came about."""

    dataset: str
    loss: dict[str, Any]
    labels: str
    """Where they came from, in words."""
    cache: CacheFacts | None
    samples: Count
    epochs: Count


class Seeds(_Part):
    """The finished runs that differ in the seed only, by their last weights."""

    seeds: list[int]
    test_mean: Share | None
    test_sd: Positive | None
    validation_mean: Share | None
    validation_sd: Positive | None


class Variant(_Part):
    """One form of the student, measured."""

    name: Literal["torch", "onnx", "onnx int8"]
    file: str | None
    """None of torch where its weights were not exported."""
    bytes: Count | None
    test_accuracy: Share | None
    validation_accuracy: Share | None
    latency_ms: dict[str, Positive]
    """Of a forward pass, by batch size."""


class LatencyFacts(_Part):
    """On what latency was measured."""

    processor: str
    threads: Count


class OnnxFacts(_Part):
    """How the ONNX model was held to torch."""

    opset: Count
    max_abs_difference: dict[str, Positive]
    """Between logits, by batch size."""


class Int8Facts(_Part):
    """How the int8 model was made."""

    calibration_samples: Count
    """Of the training split."""
    weights: Count
    """How many arrays are kept in int8."""


class FileFacts(_Part):
    """A file as it was written."""

    bytes: Count
    sha256: str


class SourceFacts(_Part):
    """What was exported: an export of anything else does not fit in the same folder."""

    weights: Literal["best", "last"]
    weights_sha256: str
    run_sha256: str
    """Of `run.yaml`."""


class Product(_Part):
    """`product.json`."""

    format: Literal[1]
    student: str
    seed: int
    source: SourceFacts
    model: ModelFacts
    preprocessing: Preprocessing
    training: Training
    parameters: Count
    macs: Count
    test_samples: Count | None
    validation_samples: Count | None
    variants: list[Variant]
    seeds: Seeds
    latency: LatencyFacts
    onnx: OnnxFacts | None
    int8: Int8Facts | None
    files: dict[str, FileFacts]
    """All but `product.json` itself."""
    versions: dict[str, str]

    def variant(self, name: str) -> Variant | None:
        """A form of the student; None where it was not exported."""
        return next((variant for variant in self.variants if variant.name == name), None)


def read_product(folder: Path) -> Product:
    """The facts of an exported student; whatever their source, they are held to this form.

    Raises:
        UsageError: no export, or a damaged one.
    """
    try:
        return Product.model_validate_json(read_text(folder / FACTS))
    except FileNotFoundError:
        raise UsageError(
            f"{folder} holds no exported student: there is no {FACTS}; make one with "
            "`logitcache export RUN --to safetensors`"
        ) from None
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{folder / FACTS} is no description of an exported student ({str(error).splitlines()[0]})"
        ) from None


def file_facts(path: Path) -> FileFacts:
    """Size and SHA-256 of a file."""
    with path.open("rb") as file:
        return FileFacts(bytes=path.stat().st_size, sha256=hashlib.file_digest(file, "sha256").hexdigest())
