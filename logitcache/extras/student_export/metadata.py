"""`product.json`: the metadata and measured numbers of an exported student, which its card and the report show."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from logitcache.errors import UsageError
from logitcache.train.finished import Positive, Share, read_text

METADATA, CARD = "product.json", "README.md"
SAFETENSORS, ONNX, INT8 = "model.safetensors", "model.onnx", "model-int8.onnx"
MODEL_FILES = (SAFETENSORS, ONNX, INT8)
FORMAT: Literal[1] = 1

Count = Annotated[int, Field(ge=0, lt=2**63)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)


class Model(_Part):
    """How to build the model again."""

    name: str
    args: dict[str, Any]
    num_classes: Annotated[int, Field(ge=1, lt=2**31)]
    class_names: list[str] | None


class Preprocessing(_Part):
    """The input of the model."""

    shape: list[Count]
    """Of one sample: (channels, height, width) for images."""
    dtype: str
    steps: list[dict[str, Any]]
    """The student's `input` transforms, in order, applied to an image as float32 (C, H, W) in [0, 1]."""


class SourceCache(_Part):
    """The cache that the student was trained from."""

    id: str
    digest: str | None
    """None where the cache was not available."""


class Training(_Part):
    """How the student was trained."""

    dataset: str
    loss: dict[str, Any]
    labels: str
    """The source of the labels."""
    cache: SourceCache | None
    samples: Count
    epochs: Count


class Seeds(_Part):
    """Accuracies of the finished runs that differ only in the seed, with their last weights."""

    seeds: list[int]
    test_mean: Share | None
    test_sd: Positive | None
    validation_mean: Share | None
    validation_sd: Positive | None


class Variant(_Part):
    """One exported form of the student, measured."""

    name: Literal["torch", "onnx", "onnx int8"]
    file: str | None
    """None for torch where its weights were not exported."""
    bytes: Count | None
    test_accuracy: Share | None
    validation_accuracy: Share | None
    latency_ms: dict[str, Positive]
    """Of a forward pass, by batch size."""


class LatencySetup(_Part):
    """The hardware that latency was measured on."""

    processor: str
    threads: Count


class OnnxCheck(_Part):
    """The comparison of the ONNX model with torch."""

    opset: Count
    max_abs_difference: dict[str, Positive]
    """Of logits, by batch size."""


class Quantisation(_Part):
    """How the int8 model was made."""

    calibration_samples: Count
    """From the training split."""
    weights: Count
    """Number of int8 arrays."""


class FileRecord(_Part):
    """A file at export."""

    bytes: Count
    sha256: str


class SourceRun(_Part):
    """What was exported. All exports in one folder have the same source."""

    weights: Literal["best", "last"]
    weights_sha256: str
    run_sha256: str
    """Of `run.yaml`."""


class StudentMetadata(_Part):
    """`product.json`."""

    format: Literal[1]
    student: str
    seed: int
    source: SourceRun
    model: Model
    preprocessing: Preprocessing
    training: Training
    parameters: Count
    macs: Count
    test_samples: Count | None
    validation_samples: Count | None
    variants: list[Variant]
    seeds: Seeds
    latency: LatencySetup
    onnx: OnnxCheck | None
    int8: Quantisation | None
    files: dict[str, FileRecord]
    """All except `product.json` itself."""
    versions: dict[str, str]

    def variant(self, name: str) -> Variant | None:
        """A form of the student; None where it was not exported."""
        return next((variant for variant in self.variants if variant.name == name), None)


def read_metadata(folder: Path) -> StudentMetadata:
    """The validated metadata of an exported student.

    Raises:
        UsageError: the folder is not an export, or is damaged.
    """
    try:
        return StudentMetadata.model_validate_json(read_text(folder / METADATA))
    except FileNotFoundError:
        raise UsageError(
            f"{folder} contains no exported student: there is no {METADATA}; create one with "
            "`logitcache export RUN --to safetensors`"
        ) from None
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{folder / METADATA} is not the metadata of an exported student ({str(error).splitlines()[0]})"
        ) from None


def record_file(path: Path) -> FileRecord:
    """Size and SHA-256 of a file."""
    with path.open("rb") as file:
        return FileRecord(bytes=path.stat().st_size, sha256=hashlib.file_digest(file, "sha256").hexdigest())
