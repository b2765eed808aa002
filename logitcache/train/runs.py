"""Run folders: the resolved pipeline, logs, weights, the result, and the checkpoint to resume from."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor, nn

from logitcache.catalog.models import read_weights, save_weights
from logitcache.checksums import CHECKSUMS, check_file, checksums_text, file_sha256
from logitcache.digest import json_digest, sha256_hex
from logitcache.errors import CorruptCache, CorruptRun, UsageError
from logitcache.storage import LocalStorage
from logitcache.storage.local import fsync_path
from logitcache.train.tracking import Tracker

CONFIG, RESOLVED = "run.yaml", "pipeline.yaml"
"""The run's identity, and the resolved pipeline that it belongs to."""
METRICS, RESULT, CHECKPOINT = "metrics.jsonl", "result.json", "resume.pt"
EPOCHS = "metrics.csv"
"""One line per epoch."""

MAX_FILE_BYTES = 2**26
"""Largest text file that is read."""
RESUME_HEADER = b"logitcache resume 1\n"
"""Followed by the SHA-256 of the payload in hexadecimal digits, a newline, and the payload of `torch.save`."""
RESUME_HEADER_BYTES = len(RESUME_HEADER) + 65
FROM_START = "delete it to train from the start"

Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Positive = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class RunResult(BaseModel):
    """`result.json` of a finished run."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    name: str
    seed: int
    accuracy: Share | None
    validation_accuracy: Share | None
    nll: Positive | None = None
    validation_nll: Positive | None = None
    perplexity: Positive | None = None
    bits_per_byte: Positive | None = None
    teacher_kl: float | None = Field(default=None, ge=-1e-3, allow_inf_nan=False)
    """Of a model that equals its teacher, rounding makes it slightly negative."""
    teacher_agreement: Share | None = None
    epoch_seconds: Positive | None
    epochs: int = Field(ge=1)
    samples: int = Field(ge=1)
    parameters: int = Field(ge=0)


class RunFolder:
    """The folder of one run.

    Args:
        path: created where it is missing.
        config: the run's identity, as plain data.

    Raises:
        UsageError: the folder contains a run of another configuration; names the keys that differ.
        CorruptRun: the folder's `run.yaml` is damaged.
    """

    def __init__(self, path: Path, config: dict[str, Any]) -> None:
        self.path = path
        self._storage = LocalStorage(path)
        config = json.loads(json.dumps(config))
        self._run = json_digest(config)
        self._logged = 0
        """Size of the log in bytes."""
        self._log_hash = hashlib.sha256()
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._storage.remove_leftovers()
        except OSError as error:
            raise UsageError(f"can't write to {path}: {error.strerror}; choose another `runs.path`") from error
        before = recorded_configuration(path)
        if before is None:
            self.write(CONFIG, yaml.safe_dump(config, sort_keys=False, allow_unicode=True))
        else:
            check_configuration(path, before, config)
        self._events: Any = None
        self._tracker: Tracker | None = None
        self._epochs: list[dict[str, float]] = []

    def result(self, name: str, seed: int) -> dict[str, Any] | None:
        """The result, if the run is finished.

        Raises:
            CorruptRun: it is damaged, or of another name or seed.
        """
        path = self.path / RESULT
        text = _read_text(self.path, RESULT)
        if text is None:
            return None
        for file in (self.path / CONFIG, path):  # the configuration too: a result of another one has other checksums
            check_file(file)
        try:
            result: dict[str, Any] = json.loads(text)
            found = RunResult.model_validate(result)
            if (found.name, found.seed) != (name, seed):
                raise ValueError(f"expected the result of {name}, seed {seed}; found {found.name}, seed {found.seed}")
        except (ValueError, RecursionError) as error:
            raise CorruptRun(
                f"{path} is not the result of this run: {_first_line(error)}; delete {self.path} to train from the "
                "start"
            ) from error
        return result

    def finish(self, result: dict[str, Any]) -> None:
        """Write the result and the checksums, and delete the checkpoint."""
        text = json.dumps(result, indent=1) + "\n"
        names = [CONFIG, METRICS, "best.safetensors", "last.safetensors"]
        checksums = {name: file_sha256(self.path / name) for name in names if (self.path / name).is_file()}
        # Result last: a run without it is not finished, and writes its checksums again.
        self.write(CHECKSUMS, checksums_text({**checksums, RESULT: sha256_hex(text.encode())}))
        self.write(RESULT, text)
        (self.path / CHECKPOINT).unlink(missing_ok=True)
        if self._events is not None:
            self._events.close()
        if self._tracker is not None:
            self._tracker.finish()

    def checkpoint(self) -> dict[str, Any] | None:
        """The state to resume from, if any.

        Raises:
            CorruptRun: it is damaged, of another run or of an earlier version, or does not match the log.
        """
        path = self.path / CHECKPOINT
        data = self._get(CHECKPOINT)
        if data is None:
            return None
        if not data.startswith(RESUME_HEADER):
            raise CorruptRun(
                f"{path} is damaged, or from a version of logitcache without SHA-256 in checkpoints: expected it to "
                f"begin with {RESUME_HEADER!r}, found {data[: len(RESUME_HEADER)]!r}; {FROM_START}"
            )
        header, payload = data[:RESUME_HEADER_BYTES], data[RESUME_HEADER_BYTES:]
        del data  # a checkpoint may be large
        if header != _resume_header(payload):
            raise CorruptRun(f"{path} is damaged: its content does not match the SHA-256 in its header; {FROM_START}")
        try:
            saved: dict[str, Any] = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
            run, logged, log_sha256 = saved.pop("run"), saved.pop("logged"), saved.pop("log_sha256")
        except Exception as error:
            raise CorruptRun(f"{path} can't be read: {_first_line(error)}; {FROM_START}") from error
        if run != self._run:
            raise CorruptRun(f"{path} is of another run: expected run {self._run}, found {run}; {FROM_START}")
        log = (self._get(METRICS) or b"")[:logged]
        if sha256_hex(log) != log_sha256:
            raise CorruptRun(
                f"{self.path / METRICS} does not match the checkpoint {path}: expected {logged} bytes of SHA-256 "
                f"{log_sha256}, found {len(log)} of {sha256_hex(log)}.\nRestore the log, or delete {path} to train "
                "from the start"
            )
        self._logged = logged
        return saved

    def save_checkpoint(self, state: dict[str, Any]) -> None:
        """Replace the checkpoint atomically."""
        fsync_path(self.path / METRICS)
        log = {"logged": self._logged, "log_sha256": self._log_hash.hexdigest()}
        buffer = io.BytesIO()
        buffer.write(_resume_header(b""))
        torch.save({**state, "run": self._run, **log}, buffer)
        data = buffer.getbuffer()
        data[:RESUME_HEADER_BYTES] = _resume_header(data[RESUME_HEADER_BYTES:])
        self._storage.put(CHECKPOINT, data)

    def save_weights(self, model: nn.Module, name: str, step: int) -> None:
        """Write a model's weights as `NAME.safetensors`, with the step."""
        save_weights(model, self.path / f"{name}.safetensors", {"run": self._run, "step": step})

    def best_weights(self, step: int) -> dict[str, Tensor]:
        """The weights in `best.safetensors`, of a step or later.

        Later ones are accepted: a run that was interrupted right after it wrote them repeats the steps before them, and
        where rounding differs, may not write them again.

        Raises:
            CorruptRun: they are missing, damaged, of another run, or of an earlier step.
        """
        path = self.path / "best.safetensors"
        try:
            state, origin = read_weights(path)
            if origin["run"] != self._run or not origin["step"] >= step:
                raise ValueError(
                    f"expected weights of run {self._run} after step {step}, found run {origin['run']} after step "
                    f"{origin['step']}"
                )
        except (KeyError, TypeError, ValueError) as error:
            raise CorruptRun(
                f"{path} was not written by this run: {_first_line(error)}.\nRestore it, or delete {self.path} to "
                "train from the start"
            ) from error
        return state

    def start_log(self, step: int, tracker: Tracker | None = None, description: dict[str, Any] | None = None) -> None:
        """Open the logs, and drop what was logged after the checkpoint.

        Args:
            step: where the run starts or resumes.
            tracker: gets the same metrics.
            description: of the run, for the tracker.
        """
        self._tracker = tracker
        if tracker is not None:
            tracker.start(description or {})
        kept = (self._get(METRICS) or b"")[: self._logged]
        self._log_hash = hashlib.sha256(kept)
        self._storage.put(METRICS, kept)
        self._epochs = [values for line in kept.splitlines() if "epoch" in (values := json.loads(line))]
        # Left over from a finished run whose result was deleted.
        (self.path / CHECKSUMS).unlink(missing_ok=True)
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:  # extra `train` is not installed; metrics.jsonl has everything
            return
        self._events = SummaryWriter(str(self.path), purge_step=step + 1)

    def log(self, step: int, values: dict[str, float]) -> None:
        """Append a line of metrics."""
        line = (json.dumps({"step": step, **values}) + "\n").encode()
        with (self.path / METRICS).open("ab") as file:
            file.write(line)
        self._logged += len(line)
        self._log_hash.update(line)
        if self._events is not None:
            for name, value in values.items():
                self._events.add_scalar(name, value, step)
        if self._tracker is not None:
            self._tracker.log(values, step)

    def log_epoch(self, step: int, values: dict[str, float]) -> None:
        """Append the metrics of an epoch, and update the table of epochs."""
        self.log(step, values)
        self._epochs.append({"step": step, **values})
        table = io.StringIO()
        # Rewritten as a whole each time: it is small, and never incomplete.
        writer = csv.DictWriter(table, list(dict.fromkeys(name for line in self._epochs for name in line)))
        writer.writeheader()
        writer.writerows(self._epochs)
        self.write(EPOCHS, table.getvalue())

    def write(self, name: str, text: str) -> None:
        """Write a file atomically."""
        self._storage.put(name, text.encode())

    def _get(self, name: str) -> bytes | None:
        return _read_bytes(self.path, name)


def recorded_configuration(path: Path) -> dict[str, Any] | None:
    """The identity of the run in a folder, from its `run.yaml`; None if there is no run.

    Raises:
        CorruptRun: `run.yaml` is damaged.
    """
    text = _read_text(path, CONFIG)
    if text is None:
        return None
    try:
        recorded = yaml.safe_load(text)
        if not isinstance(recorded, dict):
            raise ValueError("expected a mapping")
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise CorruptRun(f"{path / CONFIG} is damaged: {_first_line(error)}; delete {path} to start again") from error
    return recorded


def check_configuration(path: Path, before: dict[str, Any], config: dict[str, Any]) -> None:
    """Refuse a folder whose run has another identity, as plain data.

    Raises:
        UsageError: names the keys that differ.
    """
    if before == config:
        return
    keys = _different_keys(before, config)
    rename = "Give the student another name, choose" if "student" in config else "Choose"
    remedy = f"{rename} another `runs.path`, or delete that folder to start again."
    if keys == ["num_views"] and "student" in config:
        remedy = _remedy_for_views(config["student"]["name"], before["num_views"], config["num_views"])
    raise UsageError(f"{path} contains a run of another configuration (differs in {', '.join(keys)}).\n{remedy}")


def _read_text(folder: Path, name: str) -> str | None:
    data = _read_bytes(folder, name, limit=MAX_FILE_BYTES)
    try:
        if data is not None and len(data) > MAX_FILE_BYTES:
            raise ValueError(f"expected at most {MAX_FILE_BYTES} bytes")
        return None if data is None else data.decode()
    except ValueError as error:
        raise CorruptRun(
            f"{folder / name} is damaged: {_first_line(error)}; delete {folder} to train from the start"
        ) from error


def _read_bytes(folder: Path, name: str, *, limit: int | None = None) -> bytes | None:
    try:
        return LocalStorage(folder).get(name, limit=limit)
    except CorruptCache as error:
        raise CorruptRun(f"{error}; delete it to train from the start") from error


class NullRunFolder:
    """Stands for the run folder in every process but the first: each method of `RunFolder` does nothing."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return lambda *arguments: None


def _resume_header(payload: bytes | memoryview) -> bytes:
    return RESUME_HEADER + sha256_hex(payload).encode() + b"\n"


def _first_line(error: BaseException) -> str:
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    return (str(error).splitlines() or [type(error).__name__])[0]


def _remedy_for_views(student: str, before: Any, now: Any) -> str:
    return (
        f"Its result is of {before} views, and stays valid; this run has {now}. To train on {now} views beside it, "
        f"give the student another name: students.{student}.name={student}-{now}-views. To keep only the result, set "
        f"views.count={before} again. To replace it, delete that folder."
    )


def _different_keys(before: Any, now: Any, prefix: str = "") -> list[str]:
    if not isinstance(before, dict) or not isinstance(now, dict):
        return [prefix or "everything"]
    keys = []
    for key in dict.fromkeys([*before, *now]):
        if before.get(key) != now.get(key):
            name = f"{prefix}.{key}" if prefix else str(key)
            nested = isinstance(before.get(key), dict) and isinstance(now.get(key), dict)
            keys += _different_keys(before[key], now[key], name) if nested else [name]
    return keys
