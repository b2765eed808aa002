"""The guide *Getting started*: its Python and its pipeline run and distil."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import DataLoader

import logitcache
from logitcache.config.schema import load_pipeline
from logitcache.stages.cache_teacher import cache_teacher
from logitcache.stages.train_student import train_students
from logitcache.stages.train_teacher import train_teacher
from tests.unit.test_readme import CHECKOUT, blocks

GETTING_STARTED = (CHECKOUT / "docs/getting-started.md").read_text()
IN_PYTHON, ON_THE_COMMAND_LINE = GETTING_STARTED.split("## On the command line")


def test_the_python_of_getting_started_distils(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All blocks in order, as one program."""
    monkeypatch.chdir(tmp_path)
    program = "\n".join(blocks(IN_PYTHON, "python"))
    namespace: dict[str, Any] = {"__name__": "__main__"}
    exec(program, namespace)
    settings = {"num_samples": 1400, "num_classes": 10, "encoding": logitcache.Dense(dtype="float16")}
    settings |= {"teacher": "mlp-256", "dataset": "digits-1400", "view_plan": namespace["plan"], "num_views": 6}
    with logitcache.create("digits.cache", **settings) as writer:
        missing = [block.view for block in writer.missing_blocks()]
        namespace["write_missing_blocks"](writer, namespace["views"], namespace["teacher"])
    accuracies = dict(re.findall(r"(\w+): ([\d.]+)%", capsys.readouterr().out))

    assert ([4, 5], True) == (missing, logitcache.open("digits.cache").sealed)
    assert {"teacher", "student"} == accuracies.keys()
    assert all(float(accuracy) > 85 for accuracy in accuracies.values())


def test_the_pipeline_of_getting_started_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("digits.yaml").write_text(blocks(ON_THE_COMMAND_LINE, "yaml")[0])
    pipeline = load_pipeline(Path("digits.yaml"), ["train.epochs=2"])
    train_teacher(pipeline)
    cache_teacher(pipeline)

    assert ["small"] == [row.name for row in train_students(pipeline)]

    namespace: dict[str, Any] = {}
    exec("\n".join(blocks(ON_THE_COMMAND_LINE, "python")), namespace)
    cache, views = namespace["cache"], namespace["views"]
    batches = DataLoader(views, batch_size=500, sampler=logitcache.ViewSampler(views))

    assert 0 < len(namespace["data"].validation)
    assert [2, 2, 2] == [cache.check_batch(index, inputs) for index, inputs, _ in batches]
