"""What the README and its guides say, run."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import logitcache
from logitcache.catalog.nets import MLP
from logitcache.config.build import resolve_data
from logitcache.config.schema import Pipeline, load_pipeline
from logitcache.losses import LOSSES, loss_from_config
from logitcache.stages.cache_teacher import cache_teacher
from logitcache.stages.train_student import train_teacher

CHECKOUT = Path(__file__).parents[2]
README = (CHECKOUT / "README.md").read_text()
KEYS = (CHECKOUT / "docs/pipeline.md").read_text()
LOSS_GUIDE = (CHECKOUT / "docs/losses.md").read_text()
BLOCKS = re.findall(r"```python\n(import logitcache.*?)```", README, flags=re.DOTALL)


def test_the_training_loop_of_the_readme_distils(
    tiny: Callable[..., Pipeline], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = tiny(f"cache.path={tmp_path}/caches/mnist5k.cache", "teacher.weights=trained", "teacher.train.epochs=8")
    train_teacher(pipeline)
    cache_teacher(pipeline)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    student = MLP((1, 8, 8), 10, (16,))
    dataset = resolve_data(pipeline, trust=False).train
    namespace: dict[str, Any] = {
        "dataset": dataset,
        "student": student,
        "optimizer": torch.optim.Adam(student.parameters(), lr=0.01),
    }
    cache = logitcache.open("caches/mnist5k.cache")
    views = logitcache.ViewDataset(dataset, cache.view_plan)
    inputs = torch.stack([views[(0, index)][1] for index in range(200)])

    def distance() -> float:
        with torch.no_grad():
            return float(logitcache.losses.kl_divergence(student(inputs), cache.view(0).logits(range(200))).mean())

    before = distance()
    exec(BLOCKS[0], namespace)
    assert distance() < before / 3


def test_the_cache_of_any_logits_of_the_readme_reads_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    teacher_logits = torch.randn(1000, 10) * 4
    exec(BLOCKS[1], {"teacher_logits": teacher_logits})
    read = logitcache.open("caches/mine.cache").view(0).logits([7, 0, 42])

    assert torch.equal(teacher_logits[[7, 0, 42]].argmax(dim=1), read.argmax(dim=1))


def test_every_key_of_the_guide_exists() -> None:
    known = {f"{section}.{key}" for section, model in _sections().items() for key in model.model_fields}
    known |= set(Pipeline.model_fields) | {"train.*", "students[].train.*"}
    table = KEYS.split("| key | what | default |", 1)[1].split("\n\n", 1)[0]
    cells = re.findall(r"^\| (`.*?) \|", table, flags=re.MULTILINE)
    keys = [key for cell in cells for key in re.findall(r"`([^`]+)`", cell)]
    keys = [f"cache.card{key}" if key.startswith(".") else key for key in keys]
    keys = [key if "*" in key else key.replace("students[]", "students") for key in keys]

    assert len(keys) > 30
    assert [] == [key for key in keys if key not in known]


def test_every_key_of_the_schema_is_in_the_guide() -> None:
    stated = set(re.findall(r"\w+", KEYS))
    known = {key for model in _sections().values() for key in model.model_fields} | set(Pipeline.model_fields)

    assert set() == known - stated - {"data", "views", "teacher", "cache", "train", "students", "runs"}


def test_every_loss_of_the_guide_exists_with_its_parameters() -> None:
    """And none is missing, nor any of its parameters, nor what they are by default."""
    header = "| | compares | parameters, and what they are by default | source |"
    table = LOSS_GUIDE.split(header, 1)[1].split("\n\n", 1)[0]
    rows = [line.split("|") for line in table.splitlines() if line.startswith("| `")]
    stated = {
        name: {key: yaml.safe_load(default) for key, default in re.findall(r"`(\w+)` ?([\w.]*)", row[3])}
        for row in rows
        for name in re.findall(r"`(\w+)`", row[1])
    }
    del stated["hard_plus_soft"]["alpha"], stated["blend"]["weight"]
    fields = {name: dataclasses.fields(LOSSES[name]) for name in LOSSES if name != "stages"}  # type: ignore[arg-type]
    known = {name: {field.name: field.default for field in fields[name]} for name in fields}
    known["weighted"] = {"parts": None}  # which has no default

    assert known == stated


def test_the_losses_of_the_guide_are_well_formed() -> None:
    lines = [line for line in LOSS_GUIDE.splitlines() if line.startswith("loss: {")]

    assert 2 == len(lines)
    assert all(loss_from_config(yaml.safe_load(line)["loss"]).at(0.5) for line in lines)


PAGES = [
    *CHECKOUT.glob("*.md"),
    *CHECKOUT.glob("docs/**/*.md"),
    *(CHECKOUT / folder / "README.md" for folder in ("pipelines", "data")),
]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(CHECKOUT).as_posix())
def test_every_link_of_a_page_leads_somewhere(page: Path) -> None:
    """To a file of the project, and to a heading that it has."""
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text(), flags=re.MULTILINE)
            assert anchor in {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}, (
                target
            )


def _sections() -> dict[str, Any]:
    from logitcache.config import schema

    return {
        "data": schema.DataConfig,
        "views": schema.ViewsConfig,
        "teacher": schema.TeacherConfig,
        "train": schema.TrainConfig,
        "cache": schema.CacheConfig,
        "cache.card": schema.CacheConfig.model_fields["card"].annotation,
        "students": schema.StudentConfig,
        "runs": schema.RunsConfig,
    }


PIPELINES = [path for path in sorted((CHECKOUT / "pipelines").glob("*.yaml")) if not path.stem.startswith("federated_")]
"""Federations have a form of their own, and are held to it in tests/integration/test_federation.py."""


@pytest.mark.parametrize("path", PIPELINES, ids=lambda path: path.stem)
def test_every_pipeline_is_well_formed(path: Path) -> None:
    pipeline = load_pipeline(path)

    assert pipeline == type(pipeline).model_validate(yaml.safe_load(pipeline.as_yaml()))
