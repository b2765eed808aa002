"""Reads finished runs from their folders. Folders may be untrusted: every file is bounded in size and validated."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from logitcache.checksums import check_file
from logitcache.train.runs import CONFIG, MAX_FILE_BYTES, METRICS, RESULT
from logitcache.train.runs import Positive as Positive
from logitcache.train.runs import RunResult as RunResult
from logitcache.train.runs import Share as Share


class CurvePoint(BaseModel):
    """One epoch's line of `metrics.jsonl`."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    step: int = Field(ge=0)
    epoch: int = Field(ge=1)
    loss: Annotated[float, Field(allow_inf_nan=False)]
    validation_accuracy: Share | None = None
    validation_nll: Positive | None = None


@dataclass(frozen=True)
class Run:
    """A finished run."""

    folder: Path
    config: dict[str, Any]
    """The run's identity, from `run.yaml`."""
    result: RunResult
    curve: list[CurvePoint]


def read_run(folder: Path) -> Run:
    """A finished run.

    Raises:
        OSError, ValueError, yaml.YAMLError: a file is missing, too long or invalid; `CorruptRun`, which is a
            ValueError, where it differs from its checksum.
    """
    for name in (CONFIG, RESULT, METRICS):
        check_file(folder / name)
    config = yaml.safe_load(read_text(folder / CONFIG))
    if not isinstance(config, dict):
        raise ValueError(f"{CONFIG} is not a mapping")
    result = RunResult.model_validate_json(read_text(folder / RESULT))
    return Run(folder, config, result, _curve(folder))


def read_text(path: Path) -> str:
    """A text file of at most `MAX_FILE_BYTES`.

    Raises:
        OSError, ValueError: the file is missing, too long, or not UTF-8.
    """
    with path.open("rb") as file:
        data = file.read(MAX_FILE_BYTES + 1)
    if len(data) > MAX_FILE_BYTES:
        raise ValueError(f"{path} has more than {MAX_FILE_BYTES} bytes")
    return data.decode()


def _curve(folder: Path) -> list[CurvePoint]:
    """The epochs of a run's log; the lines between them log training losses."""
    points = []
    for line in read_text(folder / METRICS).splitlines():
        try:
            points.append(CurvePoint.model_validate_json(line))
        except ValidationError:
            continue
    return points
