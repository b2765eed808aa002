"""Finished runs, read back from their folders, which may come from a stranger."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from logitcache.checksums import check_file
from logitcache.config.schema import Pipeline, parse_pipeline
from logitcache.errors import UsageError
from logitcache.train.runs import CONFIG, MAX_FILE_BYTES, METRICS, RESOLVED, RESULT
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


@dataclass(frozen=True)
class Run:
    """A finished run."""

    folder: Path
    config: dict[str, Any]
    """What the run is: its `run.yaml`."""
    result: RunResult
    curve: list[CurvePoint]


def read_run(folder: Path) -> Run:
    """A finished run.

    Raises:
        OSError, ValueError, yaml.YAMLError: a file that is missing, too long, or not what it should be; CorruptRun,
            which is a ValueError, where it is not the one that the run left.
    """
    for name in (CONFIG, RESULT, METRICS):
        check_file(folder / name)
    config = yaml.safe_load(read_text(folder / CONFIG))
    if not isinstance(config, dict):
        raise ValueError(f"{CONFIG} is no mapping")
    result = RunResult.model_validate_json(read_text(folder / RESULT))
    return Run(folder, config, result, _curve(folder))


def run_pipeline(run: Run) -> Pipeline:
    """The pipeline that a run was a part of; found in a folder of runs, it must not fetch anything.

    Raises:
        UsageError: `pipeline.yaml` is missing or damaged; says that one can be named.
    """
    try:
        raw = yaml.safe_load(read_text(run.folder / RESOLVED))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UsageError(f"{RESOLVED} of the run can't be read; name a pipeline with --data") from error
    if not isinstance(raw, dict):
        raise UsageError(f"{RESOLVED} of the run is no mapping; name a pipeline with --data")
    pipeline = parse_pipeline(raw, source=RESOLVED)
    return pipeline.model_copy(update={"data": pipeline.data.model_copy(update={"download": False})})


def read_text(path: Path) -> str:
    """A text file of bounded length.

    Raises:
        OSError, ValueError: no such file, one that is too long, or no UTF-8.
    """
    with path.open("rb") as file:
        data = file.read(MAX_FILE_BYTES + 1)
    if len(data) > MAX_FILE_BYTES:
        raise ValueError(f"{path} has more than {MAX_FILE_BYTES} bytes")
    return data.decode()


def _curve(folder: Path) -> list[CurvePoint]:
    """The epochs of a run's log; the lines between them hold other values."""
    points = []
    for line in read_text(folder / METRICS).splitlines():
        try:
            points.append(CurvePoint.model_validate_json(line))
        except ValidationError:
            continue
    return points
