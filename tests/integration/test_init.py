"""`logitcache init`: each starter pipeline is valid as written, and runs once its data is there."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from logitcache.cli.init import DataKind
from tests.commands import logitcache as run
from tests.commands import refused, run_json
from tests.needs import need_package
from tests.programs import run_program
from tests.texts import BYTE_VOCABULARY, byte_tokenizer

CHECKOUT = Path(__file__).parents[2]
README = (CHECKOUT / "README.md").read_text()
TINY = ["views.count=1", "train.epochs=1", "cache.encoding=dense", "num_workers=0", "threads=1"]


@pytest.fixture
def command(forks: BaseContext, tmp_path: Path) -> Callable[..., Any]:
    """Run a command in the test's folder, in a process of its own; the JSON object that it prints."""

    def run(*arguments: object) -> Any:
        ended = run_program(forks, "-m", "logitcache.cli", *arguments, "--json", folder=tmp_path)
        assert 0 == ended.returncode, ended.stderr
        return json.loads(ended.stdout)

    return run


def images(count: int, side: int = 8) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    return generator.integers(0, 256, (count, side, side, 3), dtype=np.uint8), np.arange(count) % 3


def write_arrays(folder: Path) -> None:
    train, test = images(30), images(9)
    np.savez(
        folder / "images.npz", train_images=train[0], train_labels=train[1], test_images=test[0], test_labels=test[1]
    )


@pytest.mark.parametrize("kind", DataKind)
def test_a_starter_is_valid_without_its_data(kind: DataKind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From any folder; its code is imported only from its own."""
    monkeypatch.chdir(tmp_path)
    written = run_json("init", "here", "--data", kind.value)["files"]

    [found] = run_json("run", "--dry-run", "here/pipeline.yaml")["pipelines"]
    assert written[0] == "here/pipeline.yaml"
    assert found["error"] is None
    assert [step["done"] for step in found["steps"]] == [False] * len(found["steps"])
    assert found["missing"] != []


def test_existing_files_are_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "my_data.py").write_text("mine")

    refused(run("init", tmp_path, "--data", "arrays"), 2, f"{tmp_path}/my_data.py exists already")
    assert [path.name for path in tmp_path.iterdir()] == ["my_data.py"]


def test_the_starter_for_folders_runs(tmp_path: Path, command: Callable[..., Any]) -> None:
    command("init")
    pixels, labels = images(12, side=32)
    for number, (image, label) in enumerate(zip(pixels, labels, strict=True)):
        file = tmp_path / "images/train" / f"class-{label}" / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(file)
    small = ["views.transform=[{RandomResizedCrop: {size: [32, 32]}}]"]
    for net in ("teacher", "students.distilled", "students.baseline"):
        small += [f"{net}.model=mlp", f"{net}.args={{hidden: [8]}}", f"{net}.input=[{{Resize: {{size: [32, 32]}}}}]"]
    small += ["teacher.start_from=null", "teacher.train.epochs=1", "data.validation=0.25"]

    stages = re.findall(r"^logitcache (\S+) pipeline.yaml ", README, flags=re.MULTILINE)
    assert stages == ["train-teacher", "cache-teacher", "train-student"]
    *_, last = [command(stage, "pipeline.yaml", *TINY, *small) for stage in stages]
    assert [row["name"] for row in last["rows"]] == ["distilled", "baseline"]


def test_the_starter_for_arrays_runs(tmp_path: Path, command: Callable[..., Any], forks: BaseContext) -> None:
    command("init", "--data", "arrays")
    write_arrays(tmp_path)
    small = ["teacher.args={depth: 8, width: 4}", "teacher.train.epochs=1"]

    [found] = command("run", "--dry-run", "--require-data", "pipeline.yaml")["pipelines"]
    assert found["missing"] == []
    rows = command("run", "pipeline.yaml", *TINY, *small)["rows"]
    assert [(row["name"], row["samples"]) for row in rows] == [("distilled", 27), ("baseline", 27)]

    ended = run_program(forks, "-c", PIPELINES_CACHE_IN_PYTHON, folder=tmp_path)
    assert ["27", "27", "2"] == ended.stdout.split(), ended.stderr


PIPELINES_CACHE_IN_PYTHON = """
import logitcache
from my_data import load
from torch.utils.data import Subset

cache = logitcache.open("caches/starter.cache")
everything = load("images.npz")["train"]
kept = Subset(everything, [int(key) for key in cache.samples.keys])
for dataset in (logitcache.pipeline_data("pipeline.yaml").train, kept):
    views = logitcache.ViewDataset(dataset, cache.view_plan)
    print(len([views[0, sample] for sample in range(len(views))]))  # each sample is compared with its digest
half = Subset(everything, [int(key) for key in cache.samples.keys[::-2]])
rows = cache.rows(cache.samples.keys[::-2])
views = logitcache.ViewDataset(half, cache.view_plan, rows=rows)
assert 14 == len([views[0, sample] for sample in range(len(views))])
print(cache.check_batch(*views.collate([views[0, 0], views[0, 13]])[:2]))
"""


def test_the_starter_for_hugging_face_runs(tmp_path: Path, command: Callable[..., Any]) -> None:
    datasets = pytest.importorskip("datasets")
    command("init", "--data", "huggingface")
    (tmp_path / "hub").mkdir()
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b", "c"])})
    for split, count in (("train", 30), ("test", 9)):
        pixels, labels = images(count)
        columns = {"img": [Image.fromarray(image) for image in pixels], "label": labels.tolist()}
        datasets.Dataset.from_dict(columns, features=features).to_parquet(str(tmp_path / f"hub/{split}.parquet"))
    small = ["teacher.args={depth: 8, width: 4}", "teacher.train.epochs=1", f"data.args.path={tmp_path}/hub"]
    small += ["views.transform=[{RandomCrop: {size: 8, padding: 1}}]"]

    rows = command("run", "pipeline.yaml", *TINY, *small)["rows"]
    assert [(row["name"], row["samples"]) for row in rows] == [("distilled", 27), ("baseline", 27)]


def test_the_starter_for_logits_trains_on_them(tmp_path: Path, command: Callable[..., Any], forks: BaseContext) -> None:
    command("init", "--data", "logits")
    write_arrays(tmp_path)
    np.save(tmp_path / "logits.npy", np.random.default_rng(1).normal(size=(30, 3)).astype(np.float32))
    made = run_program(forks, tmp_path / "make_cache.py", folder=tmp_path)
    assert 0 == made.returncode, made.stderr

    rows = command("train-student", "pipeline.yaml", "train.epochs=1", "num_workers=0")["rows"]
    assert [(row["name"], row["samples"]) for row in rows] == [("distilled", 30), ("baseline", 30)]
    check = ("run", "--dry-run", "--require-data", "pipeline.yaml", "train.epochs=1")
    [found] = command(*check)["pipelines"]
    assert found["missing"] == []
    assert [(step["done"], step["conflict"]) for step in found["steps"]] == [(True, None)] * 3


def test_the_starter_for_text_runs(tmp_path: Path, command: Callable[..., Any]) -> None:
    need_package("transformers", "hf")
    from transformers import AutoModelForCausalLM, LlamaConfig

    command("init", "--data", "text")
    (tmp_path / "texts").mkdir()
    for split, count in (("train", 12), ("test", 3)):
        (tmp_path / f"texts/{split}.txt").write_text("\n".join(f"Text {number} of {split}." for number in range(count)))
    byte_tokenizer(tmp_path / "tokenizer.json")
    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=BYTE_VOCABULARY, **small)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "teacher")
    changes = ["data.args.tokenizer=tokenizer.json", "data.validation=0.25", "train.epochs=1", "threads=1"]
    for student in ("distilled", "baseline"):
        changes += [f"students.{student}.args.config.{name}={size}" for name, size in small.items()]

    [found] = command("run", "--dry-run", "--require-data", "pipeline.yaml", *changes)["pipelines"]
    assert [] == found["missing"]
    rows = command("run", "pipeline.yaml", *changes)["rows"]
    assert [("distilled", 9), ("baseline", 9)] == [(row["name"], row["samples"]) for row in rows]
    assert all(row["nll_mean"] > 0 for row in rows)


def test_the_starter_for_arrays_names_the_array_that_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "my_data", raising=False)
    monkeypatch.setattr(sys, "path", list(sys.path))
    run("init", "--data", "arrays")
    np.savez(tmp_path / "images.npz", images=np.zeros((2, 8, 8)), labels=np.arange(2))

    refused(
        run("run", "--dry-run", "--require-data", "pipeline.yaml"),
        2,
        "images.npz has no array train_images; it has: images, labels",
    )
    monkeypatch.delitem(sys.modules, "my_data")


@pytest.mark.parametrize("spelled", ["LowRank()", "TopK(k=5)", "Dense()"])
def test_the_encodings_that_the_starters_name_are_valid(
    spelled: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run("init", "--data", "folders")

    [found] = run_json("run", "--dry-run", "pipeline.yaml", f"cache.encoding={spelled}")["pipelines"]
    assert spelled.partition("(")[0] in found["steps"][1]["what"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel's files, installed into a folder; without hatchling the tests are skipped, but in CI they fail."""
    if importlib.util.find_spec("hatchling") is None:
        if os.environ.get("CI"):
            pytest.fail("hatchling is not installed, and CI must run this (pip install 'logitcache[test]')")
        pytest.skip("hatchling is not installed (pip install 'logitcache[test]')")
    built, installed = tmp_path_factory.mktemp("built"), tmp_path_factory.mktemp("installed")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    build = ["wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(built), str(CHECKOUT)]
    subprocess.run([*pip, *build], check=True)
    [file] = built.glob("logitcache-*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--no-index", "--target", str(installed), str(file)], check=True)
    return installed


def of_wheel(wheel: Path, folder: Path, *arguments: str) -> str:
    """What a Python program with the installed wheel prints; the package is not that of the checkout."""
    ended = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(wheel)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert 0 == ended.returncode, ended.stderr
    return ended.stdout


def test_the_wheel_alone_writes_and_checks_each_starter(wheel: Path, tmp_path: Path) -> None:
    for kind in DataKind:
        of_wheel(wheel, tmp_path, "-m", "logitcache.cli", "init", kind.value, "--data", kind.value)
    files = [f"{kind.value}/pipeline.yaml" for kind in DataKind]

    found = json.loads(of_wheel(wheel, tmp_path, "-m", "logitcache.cli", "run", "--dry-run", *files, "--json"))[
        "pipelines"
    ]
    assert [(each["file"], each["error"]) for each in found] == [(file, None) for file in files]


def test_the_wheel_holds_the_pipeline_of_the_demo(wheel: Path, tmp_path: Path) -> None:
    program = "from logitcache.extras.demo import embedded_file; from logitcache.config.schema import load_pipeline; print(load_pipeline(embedded_file()).data.name)"

    assert "mnist5k" == of_wheel(wheel, tmp_path, "-c", program).strip()
