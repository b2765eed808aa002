"""Metrics of a run in an experiment tracker, which `runs.tracker` names.

A tracker is a function. It is called once for each run with a description of the run, and returns an object with `log`
and `finish`.
"""

from __future__ import annotations

import importlib.util
import itertools
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

from logitcache.errors import UsageError
from logitcache.registry import Registry

PROJECT = "logitcache"
"""The project of Weights & Biases, or the experiment of MLflow, where their environment variables name none."""


class Handle(Protocol):
    """What a tracker returns for a run; `wandb.init(...)` returns one."""

    def log(self, values: dict[str, float], *, step: int) -> Any:
        """Record the metrics of a step."""

    def finish(self) -> Any:
        """End the run."""


Start = Callable[[dict[str, Any]], Handle]


def start_wandb(config: dict[str, Any]) -> Handle:
    """A run of Weights & Biases in the project `WANDB_PROJECT`, online or offline as `WANDB_MODE` says."""
    import wandb

    handle: Handle = wandb.init(
        project=os.environ.get("WANDB_PROJECT", PROJECT),
        name=f"{config['name']}-{config['seed']}",
        id=config["id"],
        resume="allow",
        config=config,
        reinit="create_new",  # students that train together have one run each
    )
    return handle


def start_mlflow(config: dict[str, Any]) -> Handle:
    """A run of MLflow at `MLFLOW_TRACKING_URI`, in the experiment `MLFLOW_EXPERIMENT_NAME`."""
    return _MLflowRun(config)


class _MLflowRun:
    """A run through MLflow's client, which needs no active run: students that train together have one run each."""

    _id_tag = "logitcache.id"
    _params_at_once = 100
    """MLflow's limit."""

    def __init__(self, config: dict[str, Any]) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Param

        self._client = MlflowClient()
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        existing = self._client.get_experiment_by_name(name)
        experiment = self._client.create_experiment(name) if existing is None else existing.experiment_id
        found = self._client.search_runs([experiment], f"tags.`{self._id_tag}` = '{config['id']}'", max_results=1)
        if found:
            self._run = found[0].info.run_id
            self._client.update_run(self._run, status="RUNNING")
            return
        tags = {self._id_tag: config["id"]}
        started = self._client.create_run(experiment, tags=tags, run_name=f"{config['name']}-{config['seed']}")
        self._run = started.info.run_id
        params = (Param(key, value) for key, value in _flat(config))
        while batch := list(itertools.islice(params, self._params_at_once)):
            self._client.log_batch(self._run, params=batch)

    def log(self, values: dict[str, float], *, step: int) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._client.log_batch(self._run, metrics=[Metric(name, value, now, step) for name, value in values.items()])

    def finish(self) -> None:
        self._client.set_terminated(self._run)


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """The values of nested mappings as MLflow's parameters: names with dots, within its limits."""
    for name, value in values.items():
        path = prefix + re.sub(r"[^\w. :/-]", "_", name)
        if isinstance(value, Mapping):
            yield from _flat(value, f"{path}.")
        else:
            yield path[:250], str(value)[:500]


TRACKERS: Registry[Start] = Registry("tracker", {"wandb": start_wandb, "mlflow": start_mlflow}, allows_code=True)
"""A package adds one in the entry point group `logitcache.trackers`."""


class Tracker:
    """A tracker whose errors don't stop the run: the first one is printed.

    Args:
        name: `runs.tracker` of the pipeline.
        start: the function of that name.
    """

    def __init__(self, name: str, start: Start) -> None:
        self._name = name
        self._start = start
        self._handle: Handle | None = None
        self._failed = False

    def start(self, config: dict[str, Any]) -> None:
        """Begin a run, or resume it."""
        with self._reported("when the run started"):
            self._handle = self._start(config)

    def log(self, values: dict[str, float], step: int) -> None:
        """Log the metrics of a step."""
        if self._handle is not None:
            with self._reported(f"at step {step}"):
                self._handle.log(values, step=step)

    def finish(self) -> None:
        """End the run."""
        if self._handle is not None:
            with self._reported("when the run finished"):
                self._handle.finish()

    @contextmanager
    def _reported(self, when: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if not self._failed:
                print(
                    f"runs.tracker {self._name} failed {when} ({type(error).__name__}: {error}); training continues, "
                    "and metrics.jsonl has all metrics",
                    file=sys.stderr,
                )
            self._failed = True


def load_tracker(name: str, *, trust: bool) -> Callable[[], Tracker]:
    """A function that makes a tracker for each run.

    Raises:
        UntrustedCode: the function is outside the working directory, and `trust` is False.
        UsageError: the name is unknown, or its package is not installed.
    """
    start = TRACKERS.resolve(name, trust=trust)
    if start in (start_wandb, start_mlflow) and importlib.util.find_spec(name) is None:
        raise UsageError(f"runs.tracker {name} needs the package {name}: pip install 'logitcache[{name}]'")
    return lambda: Tracker(name, start)
