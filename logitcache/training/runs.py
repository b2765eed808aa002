"""What a run leaves behind: the resolved YAML, its logs, weights, and where to resume."""

from __future__ import annotations

import csv
import io
import json
import math
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from logitcache.catalog.models import save_weights
from logitcache.errors import CorruptCache, UsageError
from logitcache.storage import LocalStorage
from logitcache.training.tracking import Tracker

CONFIG, RESOLVED = "run.yaml", "pipeline.yaml"
"""What this run is, and the whole pipeline that it is a part of."""
METRICS, RESULT, CHECKPOINT = "metrics.jsonl", "result.json", "resume.pt"
EPOCHS = "metrics.csv"
"""A line for each epoch."""


class RunFolder:
    """One run's folder.

    Args:
        path: where it lies; created where it is not there.
        config: what the run is, as plain data; a folder of another run is refused.

    Raises:
        UsageError: the folder holds a run of another configuration; names the keys that differ.
    """

    def __init__(self, path: Path, config: dict[str, Any]) -> None:
        self.path = path
        self._storage = LocalStorage(path)
        config = json.loads(json.dumps(config))
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._storage.remove_leftovers()
            existing = self._read(CONFIG)
        except OSError as error:
            raise UsageError(f"can't write to {path}: {error.strerror}; choose another `runs.path`") from error
        if existing is None:
            self.write(CONFIG, yaml.safe_dump(config, sort_keys=False, allow_unicode=True))
        else:
            before = yaml.safe_load(existing)
            if before != config:
                keys = ", ".join(_different_keys(before, config))
                raise UsageError(
                    f"{path} holds a run of another configuration (differs in {keys}).\n"
                    "Choose another `runs.path`, or delete that folder to start afresh."
                )
        self._events: Any = None
        self._tracker: Tracker | None = None
        self._epochs: list[dict[str, float]] = []

    def result(self) -> dict[str, Any] | None:
        """The result of a finished run."""
        text = self._read(RESULT)
        return None if text is None else json.loads(text)

    def finish(self, result: dict[str, Any]) -> None:
        """Record the result, and drop what was kept to resume."""
        self.write(RESULT, json.dumps(result, indent=1) + "\n")
        (self.path / CHECKPOINT).unlink(missing_ok=True)
        if self._events is not None:
            self._events.close()
        if self._tracker is not None:
            self._tracker.finish()

    def checkpoint(self) -> dict[str, Any] | None:
        """The state to resume from, if any.

        Raises:
            CorruptCache: a damaged checkpoint.
        """
        path = self.path / CHECKPOINT
        if not path.is_file():
            return None
        try:
            state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            raise CorruptCache(f"{path} can't be read ({error}); delete it to train from the start") from error
        return state

    def save_checkpoint(self, state: dict[str, Any]) -> None:
        """Replace the state to resume from, whole or not at all."""
        buffer = io.BytesIO()
        torch.save(state, buffer)
        self._storage.put(CHECKPOINT, buffer.getvalue())

    def save_weights(self, model: nn.Module, name: str) -> None:
        """Write a model's weights as `NAME.safetensors`."""
        save_weights(model, self.path / f"{name}.safetensors")

    def start_log(self, step: int, tracker: Tracker | None = None, description: dict[str, Any] | None = None) -> None:
        """Open the logs at a step; what they say of later steps is forgotten.

        Args:
            step: where the run goes on.
            tracker: gets the same metrics.
            description: what the tracker is told of the run.
        """
        self._tracker = tracker
        if tracker is not None:
            tracker.start(description or {})
        text = self._read(METRICS) or ""
        kept = [line for line in text.splitlines() if _step_of(line) <= step]
        self.write(METRICS, "".join(f"{line}\n" for line in kept))
        self._epochs = [values for line in kept if "epoch" in (values := json.loads(line))]
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:  # the extra `train` is not installed: the JSONL log has it all
            return
        self._events = SummaryWriter(str(self.path), purge_step=step + 1)

    def log(self, step: int, values: dict[str, float]) -> None:
        """Append a line of metrics."""
        with (self.path / METRICS).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        if self._events is not None:
            for name, value in values.items():
                self._events.add_scalar(name, value, step)
        if self._tracker is not None:
            self._tracker.log(values, step)

    def log_epoch(self, step: int, values: dict[str, float]) -> None:
        """Append a line of metrics, which ends an epoch, and bring the table of epochs up to date."""
        self.log(step, values)
        self._epochs.append({"step": step, **values})
        table = io.StringIO()
        # Whole each time: a line for each epoch is little, and a file that was cut short needs no mending.
        writer = csv.DictWriter(table, list(dict.fromkeys(name for line in self._epochs for name in line)))
        writer.writeheader()
        writer.writerows(self._epochs)
        self.write(EPOCHS, table.getvalue())

    def write(self, name: str, text: str) -> None:
        """Write a file, whole or not at all."""
        self._storage.put(name, text.encode())

    def _read(self, name: str) -> str | None:
        try:
            return (self.path / name).read_text(encoding="utf-8")
        except FileNotFoundError:
            return None


class Onlooker:
    """A run's folder as every process but the first has it, where several train one net: nothing is written.

    What is in it comes from the first process.
    """

    def result(self) -> None: ...

    def checkpoint(self) -> None: ...

    def write(self, name: str, text: str) -> None: ...

    def save_checkpoint(self, state: dict[str, Any]) -> None: ...

    def save_weights(self, model: nn.Module, name: str) -> None: ...

    def start_log(
        self, step: int, tracker: Tracker | None = None, description: dict[str, Any] | None = None
    ) -> None: ...

    def log(self, step: int, values: dict[str, float]) -> None: ...

    def log_epoch(self, step: int, values: dict[str, float]) -> None: ...

    def finish(self, result: dict[str, Any]) -> None: ...


def _step_of(line: str) -> float:
    """The step of a line of the log; a line that was cut short belongs to a step that never was."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError):
        return math.inf


def _different_keys(before: Any, now: Any, prefix: str = "") -> list[str]:
    if not isinstance(before, dict) or not isinstance(now, dict):
        return [prefix or "the whole"]
    keys = []
    for key in dict.fromkeys([*before, *now]):
        if before.get(key) != now.get(key):
            name = f"{prefix}.{key}" if prefix else str(key)
            nested = isinstance(before.get(key), dict) and isinstance(now.get(key), dict)
            keys += _different_keys(before[key], now[key], name) if nested else [name]
    return keys
