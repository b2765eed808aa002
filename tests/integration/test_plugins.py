"""Packages of others: an encoding, a loss, a dataset and a store from a wheel, found by their entry points."""

import base64
import copy
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

import logitcache
from logitcache.cache.manifest import MANIFEST
from logitcache.cache.summary import Summary, find_caches, summarise
from logitcache.catalog.datasets import load_data
from logitcache.config.schema import parse_pipeline
from logitcache.digest import json_digest
from logitcache.errors import CorruptCache, MissingPackage, UsageError
from logitcache.share.transfer import pull, push
from logitcache.verify.audit import verify

CHECKOUT = Path(__file__).parents[2]
MESSAGE = r"encoding 'grid' comes from the package grid-codec 0\.1\.0, which is not installed.*pip install 'grid-codec==0\.1\.0'"

PYPROJECT = """
[project]
name = "grid-codec"
version = "0.1.0"

[project.entry-points."logitcache.encodings"]
grid = "grid_codec:Grid"

[project.entry-points."logitcache.losses"]
focal_kl = "grid_codec.training:FocalKL"

[project.entry-points."logitcache.datasets"]
stripes = "grid_codec.training:stripes"

[project.entry-points."logitcache.stores"]
drawer = "grid_codec.drawer:open_drawer"
"""

TRAINING = '''
import dataclasses
from typing import ClassVar

import numpy as np
from PIL import Image
from torch import Tensor

from logitcache.losses import Loss, kl_divergence


@dataclasses.dataclass(frozen=True, kw_only=True)
class FocalKL(Loss):
    """KL that pays less attention to samples that the student has learned."""

    name: ClassVar[str] = "focal_kl"
    gamma: float = 1.0

    def __call__(self, student_BC: Tensor, teacher_BC: Tensor | None, target: Tensor) -> Tensor:
        kl_B = kl_divergence(student_BC, teacher_BC)
        return (1 - (-kl_B).exp()) ** self.gamma * kl_B


class Stripes:
    """Images of horizontal or vertical stripes."""

    class_names = ["horizontal", "vertical"]

    def __init__(self, count: int, seed: int) -> None:
        self.targets = [index % 2 for index in range(count)]
        self.pixels = np.random.default_rng(seed).integers(0, 60, (count, 8, 8), dtype=np.uint8)
        for pixels, target in zip(self.pixels, self.targets, strict=True):
            (pixels if target == 0 else pixels.T)[::2] += 190

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.pixels[index]), self.targets[index]


def stripes(count: int, root: str) -> dict[str, Stripes]:
    assert str(root) == "somewhere"
    return {"train": Stripes(count, 0), "validation": Stripes(count, 1), "test": Stripes(count, 2)}
'''

DRAWER = """
import os
from pathlib import Path

from logitcache.storage import LocalStorage


def open_drawer(url: str) -> LocalStorage:
    storage = LocalStorage(Path(os.environ["DRAWERS"], url.removeprefix("drawer://")))
    storage.url = url
    return storage
"""

PIPELINE = {
    "name": "plugins",
    "data": {"name": "stripes", "root": "somewhere", "args": {"count": 48}},
    "teacher": {"model": "mlp", "args": {"hidden": [8]}, "weights": "random", "batch_size": 16},
    "cache": {"path": "drawer://stripes.cache", "rows_per_block": 16, "encoding": "Grid(step=0.02)"},
    "views": {"count": 2},
    "train": {"epochs": 1, "batch_size": 16},
    "students": [
        {"name": "small", "model": "mlp", "args": {"hidden": [4]}, "loss": {"name": "focal_kl", "gamma": 0.5}}
    ],
    "num_workers": 0,
    "threads": 1,
}


def write_source(folder: Path) -> Path:
    """The source tree of a package; its encoding is the example in the documentation of `Encoding`."""
    example = re.search(r"```python\n(.*?)```", str(logitcache.Encoding.__doc__), re.DOTALL)
    assert example is not None
    (folder / "grid_codec").mkdir(parents=True)
    (folder / "pyproject.toml").write_text(PYPROJECT)
    (folder / "grid_codec" / "__init__.py").write_text(textwrap.dedent("    " + example[1].lstrip()))
    (folder / "grid_codec" / "training.py").write_text(TRAINING)
    (folder / "grid_codec" / "drawer.py").write_text(DRAWER)
    return folder


def build_wheel(source: Path, folder: Path) -> Path:
    """What a build backend makes of a pure Python package, without a backend: none can be downloaded here."""
    project = tomllib.loads((source / "pyproject.toml").read_text())["project"]
    name, version = project["name"].replace("-", "_"), project["version"]
    info = f"{name}-{version}.dist-info"
    entry_points = "".join(
        f"[{group}]\n" + "".join(f"{key} = {value}\n" for key, value in entries.items())
        for group, entries in project["entry-points"].items()
    )
    files = {path.relative_to(source).as_posix(): path.read_text() for path in sorted(source.rglob("*.py"))}
    files |= {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/entry_points.txt": entry_points,
    }
    record = "".join(
        f"{path},sha256={base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b'=').decode()},"
        f"{len(text.encode())}\n"
        for path, text in files.items()
    )
    wheel = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for path, text in {**files, f"{info}/RECORD": f"{record}{info}/RECORD,,\n"}.items():
            archive.writestr(path, text)
    return wheel


def python(*arguments: object, cwd: Path, path: list[Path], **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, path))} | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which a pipeline with all four plugins was run; the wheel is installed in `packages`."""
    folder = tmp_path_factory.mktemp("plugins")
    wheel = build_wheel(write_source(folder / "source"), folder)
    pip = python(
        *("-m", "pip", "install", "--no-deps", "--no-index", "--disable-pip-version-check"),
        *("--target", folder / "packages", wheel),
        cwd=folder,
        path=[],
    )
    assert 0 == pip.returncode, pip.stderr
    (folder / "pipeline.yaml").write_text(yaml.safe_dump(PIPELINE))
    return folder


def command(built: Path, *arguments: object, installed: bool = True) -> subprocess.CompletedProcess[str]:
    path = [CHECKOUT, *([built / "packages"] if installed else [])]
    return python("-m", "logitcache.cli", *arguments, cwd=built, path=path, DRAWERS=str(built / "drawers"))


@pytest.fixture(scope="module")
def cache(built: Path) -> Path:
    """The cache of that pipeline, in a directory."""
    for name in ("plan", "cache-teacher", "train-student"):
        ended = command(built, name, "pipeline.yaml", "--json")
        assert 0 == ended.returncode, ended.stderr
        found = json.loads(ended.stdout)
        if name == "train-student":
            assert ["small"] == [row["name"] for row in found["rows"]]
    return built / "drawers" / "stripes.cache"


def test_a_wheels_encoding_loss_dataset_and_store_serve_a_pipeline(built: Path, cache: Path) -> None:
    program = (
        "import logitcache; cache = logitcache.open('drawer://stripes.cache')\n"
        "print(repr(cache.encoding), tuple(cache.view(1).logits(range(48)).shape), cache.kl_mean < 1e-3)"
    )
    path = [CHECKOUT, built / "packages"]
    ended = python("-c", program, cwd=built, path=path, DRAWERS=str(built / "drawers"))

    assert "Grid(step=0.02) (48, 2) True\n" == ended.stdout, ended.stderr
    recorded = json.loads((cache / MANIFEST).read_text())["provenance"]["encoding_packages"]
    assert {"grid": {"name": "grid-codec", "version": "0.1.0"}} == recorded


def test_the_documented_encoding_passes_the_contract_suite(built: Path) -> None:
    (built / "test_grid.py").write_text(
        "from grid_codec import Grid\nfrom logitcache.testing import EncodingContract\n\n\n"
        "class TestGrid(EncodingContract):\n    encoding = Grid(step=0.02)\n    largest_kl = 1e-3\n"
    )
    ended = python(
        *("-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", built, "test_grid.py"),
        cwd=built,
        path=[CHECKOUT, built / "packages"],
    )

    assert 0 == ended.returncode, ended.stdout
    assert " passed" in ended.stdout


# Without the package, which this process does not find.


def test_open_names_the_missing_package(cache: Path) -> None:
    with pytest.raises(MissingPackage, match=MESSAGE):
        logitcache.open(cache)


def test_a_version_without_the_encoding_is_named(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "grid_codec-0.2.0.dist-info").mkdir()
    (tmp_path / "grid_codec-0.2.0.dist-info" / "METADATA").write_text("Name: grid-codec\nVersion: 0.2.0\n")
    monkeypatch.syspath_prepend(tmp_path)

    with pytest.raises(MissingPackage, match=r"is not installed \(version 0\.2\.0 is, which lacks this encoding\)"):
        logitcache.open(cache)


def test_bytes_are_verified_without_the_package_and_values_are_not(cache: Path, tmp_path: Path) -> None:
    shutil.copytree(cache, tmp_path / "a.cache")
    assert [] == verify(str(tmp_path / "a.cache"))
    with pytest.raises(MissingPackage, match=MESSAGE):
        verify(str(tmp_path / "a.cache"), deep=True)

    (tmp_path / "a.cache" / "labels.zarr" / "steps" / "c" / "1" / "0" / "0").unlink()

    assert ["missing"] == [problem.kind for problem in verify(str(tmp_path / "a.cache"))]


def test_a_cache_is_copied_without_the_package(cache: Path, tmp_path: Path) -> None:
    copied = pull(str(cache), str(tmp_path / "whole.cache"), expect=summarise(str(cache)).manifest.digest)
    push(str(tmp_path / "whole.cache"), str(tmp_path / "pushed.cache"), anonymous=True)
    part = pull(str(cache), str(tmp_path / "part.cache"), views="0:1")

    assert ("0:2", "0:1") == (copied.views, part.views)
    assert (tmp_path / "whole.cache" / "README.md").read_text() == (cache / "README.md").read_text()
    assert not (tmp_path / "part.cache" / "README.md").exists()
    for name in ("pushed", "part"):
        with pytest.raises(MissingPackage, match=MESSAGE):
            logitcache.open(tmp_path / f"{name}.cache")


def test_commands_note_the_missing_package(built: Path, cache: Path, tmp_path: Path) -> None:
    found = {name: command(built, *name.split(), installed=False) for name in (f"info {cache}", f"ls {cache.parent}")}
    found["verify"] = command(built, "verify", cache, installed=False)
    found["pull"] = command(built, "pull", cache, tmp_path / "a.cache", installed=False)

    for name, ended in found.items():
        assert 0 == ended.returncode, ended.stderr
        assert name.startswith("ls") or re.search(f"note: the {MESSAGE}", ended.stderr)
    assert "name grid-codec, version 0.1.0" in found[f"info {cache}"].stdout


def test_info_needs_neither_torch_nor_the_package(built: Path, cache: Path) -> None:
    program = (
        "import sys\nfrom logitcache.cache.summary import summarise\n"
        f"found = summarise({str(cache)!r})\n"
        "print(found.encoding, found.missing_packages, 'torch' in sys.modules)"
    )
    ended = python("-c", program, cwd=built, path=[CHECKOUT])

    assert re.search(rf"^grid\(step=0\.02\) the {MESSAGE} False$", ended.stdout), ended.stderr
    assert [str(cache)] == [each.url for each in find_caches(str(cache.parent)) if isinstance(each, Summary)]


@pytest.mark.parametrize(
    ("section", "message"),
    [
        pytest.param(
            "data", "unknown dataset 'stripes'; expected package.module:function or one of: mnist5k", id="data"
        ),
        pytest.param("cache", "unknown encoding 'grid'; expected one of: dense", id="encoding"),
        pytest.param("students", "unknown loss 'focal_kl'; expected package.module:function or one of: kl", id="loss"),
    ],
)
def test_a_pipeline_names_what_is_unknown(section: str, message: str) -> None:
    raw = copy.deepcopy(PIPELINE)
    for other in {"data", "cache", "students"} - {section}:
        raw[other] = {"data": {"name": "digits"}, "cache": {"path": "x"}, "students": []}[other]

    with pytest.raises(UsageError, match=re.escape(message)):
        load_data(parse_pipeline(raw, source="p.yaml").data.name)


@pytest.mark.parametrize(
    "package",
    [
        pytest.param({"name": "--index-url=https://example.org/", "version": "1"}, id="option"),
        pytest.param({"name": "grid'; rm -rf ~; '", "version": "1"}, id="shell"),
        pytest.param({"name": "grid-codec", "version": "1' other-package"}, id="version"),
        pytest.param({"name": "grid-codec"}, id="no version"),
        pytest.param({"name": "grid-codec", "version": ["1"]}, id="list"),
        pytest.param(["grid-codec"], id="no mapping"),
        pytest.param(None, id="null"),
    ],
)
def test_a_manifest_suggests_no_command_but_the_installation_of_a_package(
    cache: Path, tmp_path: Path, package: object
) -> None:
    shutil.copytree(cache, tmp_path / "a.cache")
    raw = json.loads((tmp_path / "a.cache" / MANIFEST).read_text())
    raw["provenance"]["encoding_packages"] = {"grid": package}
    raw["checksum"] = json_digest({key: value for key, value in raw.items() if key != "checksum"})
    (tmp_path / "a.cache" / MANIFEST).write_text(json.dumps(raw) + "\n")

    with pytest.raises(CorruptCache, match="unknown encoding 'grid'"):
        logitcache.open(tmp_path / "a.cache")
