"""The claims of README and documentation: code runs, keys and names exist, links resolve."""

from __future__ import annotations

import dataclasses
import pkgutil
import re
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import logitcache
from logitcache import losses
from logitcache.catalog.datasets import DATASETS, load_data
from logitcache.catalog.initialisations import INITIALISATIONS
from logitcache.catalog.models import MODELS
from logitcache.catalog.nets import MLP
from logitcache.config.schema import Pipeline, load_pipeline
from logitcache.data.batching import COLLATES
from logitcache.data.transforms import TRANSFORMS
from logitcache.encodings import ENCODINGS
from logitcache.engines import ENGINES
from logitcache.extras.interchange import IMPORTERS
from logitcache.losses import FEATURE_LOSSES, LOSSES, loss_from_config
from logitcache.storage import STORES
from logitcache.train.tracking import TRACKERS

CHECKOUT = Path(__file__).parents[2]
README = (CHECKOUT / "README.md").read_text()
KEYS = (CHECKOUT / "docs/pipeline.md").read_text()
LOSS_GUIDE = (CHECKOUT / "docs/losses.md").read_text()
API = (CHECKOUT / "docs/reference/logitcache.md").read_text()
PLUGINS = (CHECKOUT / "docs/plugins.md").read_text()
LOSS_API = (CHECKOUT / "docs/reference/losses.md").read_text()
BATCH = (CHECKOUT / "docs/a-batch.md").read_text()


def blocks(page: str, language: str) -> list[str]:
    """The code blocks of a page in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", page, flags=re.DOTALL | re.MULTILINE)


def test_the_loops_of_the_readme_distil(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    digits = load_data("digits").train
    dataset = [digits[index] for index in range(200)]
    teacher, student = (MLP((1, 8, 8), 10, (width,)).eval() for width in (64, 16))
    stage_1, stage_2 = blocks(README, "python")
    namespace: dict[str, Any] = {"dataset": dataset, "teacher": teacher, "student": student}
    namespace["optimizer"] = torch.optim.Adam(student.parameters(), lr=0.01)
    exec(stage_1, namespace)
    cache = logitcache.open("mine.cache")
    inputs = torch.stack([namespace["views"][(0, index)][1] for index in range(200)])

    def distance() -> float:
        with torch.no_grad():
            return float(losses.kl_divergence(student(inputs), cache.view(0).logits(range(200))).mean())

    before = distance()
    exec(stage_2, namespace)

    assert distance() < before / 2

    card = Path("mine.cache/README.md").read_text()
    for rendered in re.findall(r"`(cache\.check_plan\(.*?\)|logitcache\.ViewDataset\(.*?\))`", card):
        exec(rendered, namespace)
    assert "cache.view_plan" not in card
    assert "train-student" not in card, "no pipeline can have a transform that is a Python object"


def test_the_guide_to_plugins_has_every_registry_and_its_example_works(monkeypatch: pytest.MonkeyPatch) -> None:
    registries = (
        COLLATES,
        DATASETS,
        ENCODINGS,
        ENGINES,
        FEATURE_LOSSES,
        IMPORTERS,
        INITIALISATIONS,
        LOSSES,
        MODELS,
        STORES,
        TRACKERS,
        TRANSFORMS,
    )
    module = types.ModuleType("my_package")
    monkeypatch.setitem(sys.modules, "my_package", module)
    exec(blocks(PLUGINS, "python")[0], vars(module))
    loss = module.FocalKL(gamma=0.5)
    (image, target), *_ = module.stripes(root="data", num_samples=4)["train"]

    assert {registry.group for registry in registries} == set(
        re.findall(r"^\| `(logitcache\.\w+)`", PLUGINS, re.MULTILINE)
    )
    assert [0.0] == loss(torch.ones(1, 3), torch.ones(1, 3), torch.zeros(1)).tolist()
    assert ((1, 8, 8), 0) == (tuple(image.shape), target)


def test_the_api_reference_has_every_public_name() -> None:
    described = set(re.findall(r"^::: logitcache\.(\w+)$", API, flags=re.MULTILINE))

    assert described | {"losses"} == set(logitcache.__all__)


def test_every_name_of_a_submodule_that_a_guide_uses_is_public() -> None:
    """Pages for contributors use internal names too."""
    rows = re.findall(r"^\| (`logitcache\..*?) \| (.*?) \|", API, flags=re.MULTILINE)
    public = {
        f"{module}.{name}"
        for modules, names in rows
        for module in re.findall(r"`([\w.]+)`", modules)
        for name in re.findall(r"`(\w+)`", names)
    }
    pages = [page.read_text() for page in sorted(CHECKOUT.glob("docs/*.md")) if page.stem not in ("a-batch", "format")]
    used = {
        f"{module}.{name}"
        for page in pages
        for module, names in re.findall(r"^from (logitcache(?:\.\w+)+) import (.+)$", page, flags=re.MULTILINE)
        for name in names.split(", ")
    }
    used |= {
        name
        for page in pages
        for name in re.findall(r"(?<!/)\b(logitcache(?:\.\w+)+\.[A-Z]\w*|logitcache\.data(?:\.\w+){2,})", page)
    }

    assert len(used) > 20
    assert set() == {name for name in used if not name.startswith("logitcache.losses.")} - public
    assert all(pkgutil.resolve_name(name) for name in public if not name.startswith("logitcache.integrations"))


def test_the_reference_of_losses_has_every_loss() -> None:
    names = set(re.findall(r"^from [\w.]+ import (\w+) as \1$", Path(losses.__file__).read_text(), flags=re.MULTILINE))
    described = set(re.findall(r"^::: logitcache\.losses\.(\w+)$", LOSS_API, flags=re.MULTILINE))

    assert names - {"FEATURE_LOSSES", "LOSSES", "Reduction", "recorded_loss"} == described


def test_a_batch_passes_through_functions_that_exist() -> None:
    names = re.findall(r"`(logitcache\.[\w.]+)`", BATCH)

    assert len(names) > 25
    assert len(BATCH.splitlines()) <= 60
    assert all(callable(pkgutil.resolve_name(name)) for name in names)


def test_every_key_of_the_guide_exists() -> None:
    known = {f"{section}.{key}" for section, model in _sections().items() for key in model.model_fields}
    known |= set(Pipeline.model_fields)
    tables = KEYS.split("## Keys", 1)[1].split("\n## ", 1)[0]
    cells = re.findall(r"^\| (`.*?) \|", tables, flags=re.MULTILINE)
    keys = [key for cell in cells for key in re.findall(r"`([^`]+)`", cell)]
    keys = [f"cache.card{key}" if key.startswith(".") else key for key in keys]
    keys = [key.replace("students[]", "students") for key in keys]

    assert len(keys) > 60
    assert [] == [key for key in keys if key not in known]


def test_every_key_of_the_schema_is_in_the_guide() -> None:
    stated = set(re.findall(r"\w+", KEYS))
    known = {key for model in _sections().values() for key in model.model_fields} | set(Pipeline.model_fields)

    assert set() == known - stated - {"data", "views", "teacher", "cache", "train", "students", "runs"}


def test_every_loss_of_the_guide_exists_with_its_parameters() -> None:
    """And none is missing, nor any of its parameters, nor what they are by default."""
    header = "| loss | definition | parameters and defaults | source |"
    table = LOSS_GUIDE.split(header, 1)[1].split("\n\n", 1)[0]
    rows = [line.split("|") for line in table.splitlines() if line.startswith("| `")]
    stated = {
        name: {key: yaml.safe_load(default) for key, default in re.findall(r"`(\w+)` ?([\w.]*)", row[3])}
        for row in rows
        for name in re.findall(r"`(\w+)`", row[1])
    }
    fields = {name: dataclasses.fields(LOSSES[name]) for name in LOSSES if name != "stages"}  # type: ignore[arg-type]
    known = {name: {field.name: field.default for field in fields[name]} for name in fields}
    known["weighted"] = {"parts": None}  # which has no default

    assert known == stated


def test_the_losses_of_the_guide_are_well_formed() -> None:
    lines = [line for line in LOSS_GUIDE.splitlines() if line.startswith("loss: {")]

    assert 4 == len(lines)
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


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(CHECKOUT).as_posix())
def test_every_test_and_script_that_a_page_names_exists(page: Path) -> None:
    text = page.read_text()
    named = re.findall(r"`(?:python )?((?:tests|benchmarks|logitcache|pipelines)/[\w/]+\.\w+)", text)
    named += [module.replace(".", "/") + ".py" for module in re.findall(r"`python -m (tests[.\w]+)", text)]

    assert [] == [file for file in named if not (CHECKOUT / file).is_file()]


SITE, REPOSITORY = "https://logitcache.readthedocs.io/en/latest/", "https://github.com/logitcache/logitcache/blob/main/"


def test_links_of_the_readme_are_absolute_and_lead_to_files_of_the_repository() -> None:
    """The README is also shown by package indices, where relative links break."""
    targets = re.findall(r"\]\(([^)\s]+)\)", README)
    files = [
        re.sub(r"(?:\.html|/)$", ".md", target.replace(SITE, "docs/")).replace("docs.md", "docs/index.md")
        if target.startswith(SITE)
        else target.removeprefix(REPOSITORY)
        for target in targets
    ]

    assert len(files) > 8
    assert [] == [file for file in files if not (CHECKOUT / file).is_file()]


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
        "evaluation": schema.EvaluationConfig,
        "runs": schema.RunsConfig,
    }


PIPELINES = [path for path in sorted((CHECKOUT / "pipelines").glob("*.yaml")) if not path.stem.startswith("federated_")]
"""Federations have a form of their own, and are held to it in tests/integration/test_federation.py."""


@pytest.mark.parametrize("path", PIPELINES, ids=lambda path: path.stem)
def test_every_pipeline_is_well_formed(path: Path) -> None:
    pipeline = load_pipeline(path)

    assert pipeline == type(pipeline).model_validate(yaml.safe_load(pipeline.as_yaml()))
