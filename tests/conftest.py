"""Fixtures of many tests: a pipeline that runs in a second on real images, servers, and a marker for each tier."""

from __future__ import annotations

import copy
import functools
import multiprocessing
import signal
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch

from logitcache import progress
from logitcache.config.overrides import override
from logitcache.config.schema import Pipeline, parse_pipeline
from tests import servers

torch.set_num_threads(1)
pytest.register_assert_rewrite("logitcache.testing")
# Examples have no deadline: a busy machine is no failure. All other settings stay, such as Hypothesis's own for CI.
hypothesis.settings.register_profile("without deadline", hypothesis.settings(), deadline=None)
hypothesis.settings.load_profile("without deadline")
# A shell starts background jobs with SIGINT ignored, and programs that tests interrupt would inherit that.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

TINY: dict[str, Any] = {
    "name": "tiny",
    "data": {"name": "tests.models:digits", "validation": 0.1},
    "views": {
        "count": 2,
        "seed": 3,
        "transform": [{"RandomAffine": {"degrees": 10, "translate": [0.1, 0.1]}}],
    },
    "teacher": {"model": "mlp", "args": {"hidden": [16]}, "weights": "random", "batch_size": 32},
    "cache": {"path": "", "rows_per_block": 64, "encoding": {"name": "dense", "dtype": "float32"}},
    "train": {"epochs": 2, "batch_size": 16, "lr": 0.01},
    "students": [
        {"name": "small", "model": "mlp", "args": {"hidden": [8]}, "loss": {"name": "kl", "temperature": 2.0}},
        {"name": "labels", "model": "mlp", "args": {"hidden": [8]}, "loss": "cross_entropy"},
    ],
    "runs": {"path": ""},
    "num_workers": 0,
    "threads": 1,
}
"""Digits of 8 x 8 pixels, a teacher with fresh weights: cheap, and real all the way."""

PICTURES = ["data.name=tests.models:pictures", "data.validation=0", "cache.rows_per_block=16", "train.batch_size=16"]
"""Overrides that put forty keyed pictures in the place of the digits."""

ALL_DIGITS = ["data.name=digits", "cache.rows_per_block=256", "train.batch_size=64"]
"""The catalog's full digits (1 295 for training), for tests that train to some accuracy or compare stored identities."""

FEW_DIGITS = ["data.name=tests.models:few_digits", "data.validation=0", *PICTURES[2:]]
"""Overrides that keep 96 of the digits for training, in six blocks for each view, and 32 for the test."""


def pytest_configure() -> None:
    """Only under pytest: benchmarks that import from here wait for the disk."""
    from tests import unsynced as unsynced


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark each test with its tier, the name of its folder."""
    for item in items:
        item.add_marker(item.path.relative_to(Path(__file__).parent).parts[0])


@pytest.fixture(autouse=True)
def _plain() -> None:
    progress.silence()


@pytest.fixture(autouse=True)
def _in_the_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    """Entry points such as `tests.models:pictures` lie under the working directory."""
    monkeypatch.chdir(Path(__file__).parent.parent)


def tiny_settings(folder: Path, *overrides: str) -> dict[str, Any]:
    """The settings of the tiny pipeline with overrides; caches and runs lie in a folder."""
    raw = copy.deepcopy(TINY)
    raw["cache"]["path"] = str(folder / "tiny.cache")
    raw["runs"]["path"] = str(folder / "runs")
    for text in overrides:
        override(raw, text)
    return raw


def tiny_pipeline(folder: Path, *overrides: str) -> Pipeline:
    """The tiny pipeline with overrides; caches and runs lie in a folder."""
    return parse_pipeline(tiny_settings(folder, *overrides), source="tiny")


@pytest.fixture
def tiny(tmp_path: Path) -> Callable[..., Pipeline]:
    """`tiny_pipeline` in the test's own folder."""
    return functools.partial(tiny_pipeline, tmp_path)


@pytest.fixture(scope="session")
def forks() -> multiprocessing.context.BaseContext:
    """Processes that start with logitcache imported, to be killed."""
    context = multiprocessing.get_context("forkserver")
    stages = ["logitcache.stages.cache_teacher", "logitcache.stages.train_student"]
    # Which the stages import when they need them.
    needed = ["torchvision", "torchvision.transforms.v2", "sklearn.datasets", "torch.utils.tensorboard"]
    context.set_forkserver_preload(["tests.unsynced", *stages, *needed])
    return context


@pytest.fixture(scope="session")
def moto_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with servers.moto(tmp_path_factory.mktemp("moto")) as url:
        yield url


@pytest.fixture(scope="session")
def seaweedfs_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with servers.seaweedfs(tmp_path_factory.mktemp("seaweedfs")) as url:
        yield url


@pytest.fixture(scope="session")
def google(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """What belongs into the environment, as for `azure`."""
    with servers.google(tmp_path_factory.mktemp("google")) as environment:
        yield environment


@pytest.fixture(scope="session")
def azure(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    with servers.azurite(tmp_path_factory.mktemp("azure")) as environment:
        yield environment


@pytest.fixture
def on(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """An empty place on a store: `on("moto")` is an s3:// URL."""

    def place(store: str) -> str:
        if store == "memory":
            return f"memory://team-{uuid.uuid4().hex}"
        if store in ("google", "azure"):
            environment = request.getfixturevalue(store)
        else:
            environment = servers.KEYS | {"AWS_ENDPOINT_URL": request.getfixturevalue(f"{store}_url")}
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        scheme = {"google": "gs", "azure": "az"}.get(store, "s3")
        return f"{scheme}://team/{uuid.uuid4().hex}"

    return place
