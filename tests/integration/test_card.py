"""The README.md in a cache: true, loadable, and nobody's way in."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import DatasetCard
from markdown_it import MarkdownIt
from torchvision.transforms import v2

import logitcache
from logitcache.cache.card import first_class_accuracy
from logitcache.config.schema import Pipeline
from logitcache.data.samples import SampleTable
from logitcache.errors import UsageError
from logitcache.stages.cache_teacher import cache_teacher
from logitcache.storage.local import _HOST
from logitcache.verify.audit import verify
from tests.conftest import ALL_DIGITS, PICTURES
from tests.programs import run_program

Make = Callable[..., Pipeline]
SAMPLES, CLASSES = 50, 6


def logits() -> torch.Tensor:
    return torch.randn(SAMPLES, CLASSES, generator=torch.Generator().manual_seed(0)) * 3


def build(path: Path, num_views: int = 1, **changes: Any) -> Path:
    settings = {"num_samples": SAMPLES, "num_classes": CLASSES, "rows_per_block": 16, "num_views": num_views}
    settings |= {"teacher": "net@1", "dataset": "pictures", "encoding": "topk(k=2)"}
    with logitcache.create(path, **(settings | changes)) as writer:  # type: ignore[arg-type]
        for view in range(num_views):
            writer.write(view=view, start=0, logits=logits() + view)
    return path


def card(path: str | Path) -> str:
    return (Path(path) / "README.md").read_text(encoding="utf-8")


def front_matter(text: str) -> dict[str, Any]:
    opening, front, _ = text.split("---\n", 2)
    assert "" == opening
    loaded: dict[str, Any] = yaml.safe_load(front)
    return loaded


def test_a_sealed_cache_has_a_card_that_the_hub_reads(tmp_path: Path) -> None:
    stated = {
        "license": "cc-by-4.0",
        "title": "Six kinds of pictures",
        "description": "First paragraph,\nstill the first.\n\nSecond.",
        "dataset": "pictures-50",
        "teacher": "A net",
        "url": "https://example.org/net?x=1",
        "tags": ["pictures"],
    }
    text = card(build(tmp_path / "a", card=stated))
    data = DatasetCard(text).data.to_dict()

    assert "cc-by-4.0" == data["license"]
    assert "Six kinds of pictures" == data["pretty_name"]
    assert {"knowledge-distillation", "soft-labels", "logitcache", "pictures"} <= set(data["tags"])
    assert ["n<1K"] == data["size_categories"]
    assert ["pictures-50"] == data["source_datasets"]
    assert ("A net", "pictures-50") == (data["teacher"], data["dataset"])
    assert "First paragraph, still the first.\n\nSecond.\n" in text
    assert "<https://example.org/net?x=1>" in text


def test_a_card_states_the_cache_and_no_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.node", lambda: "a-machine-of-ours")
    monkeypatch.setattr("sys.argv", ["a-command-of-ours", "a-folder-of-ours"])
    path = build(tmp_path / "a", num_views=2, class_names=[f"kind_{number}" for number in range(CLASSES)])
    cache, text = logitcache.open(path), card(path)
    provenance = cache.manifest.provenance
    largest = max(receipt.kl_max or 0.0 for receipt in cache.receipts.values())

    assert "unknown" == front_matter(text)["license"]
    assert f"| bytes | {cache.stored_bytes:,} |" in text
    assert f"mean {cache.kl_mean:.2g} nats, largest {largest:.2g} nats" in text
    assert f"--expect {cache.digest}" in text
    assert "`kind_0`, `kind_1`" in text
    assert f"`torch {provenance['versions']['torch']}`" in text
    assert "a-machine-of-ours" == provenance["host"]
    assert "of-ours" not in text
    assert "## Accuracy" not in text


def test_the_python_of_a_card_runs_in_its_folder(tiny: Make, forks: BaseContext) -> None:
    pipeline = tiny(*ALL_DIGITS)
    cache_teacher(pipeline)
    blocks = re.findall(r"```python\n(.*?)```", card(pipeline.cache.path), flags=re.DOTALL)
    printed = [run_program(forks, "-c", block, folder=Path(pipeline.cache.path)).stdout for block in blocks]
    expected = logitcache.open(pipeline.cache.path).view(0).logits([0])

    assert [f"{expected}\n", "(2, 1295, 10)\n"] == printed


@pytest.mark.parametrize("teacher", ["of the pipeline", "my-net"])
def test_a_card_says_how_students_train_from_the_cache(
    tiny: Make, tmp_path: Path, forks: BaseContext, teacher: str
) -> None:
    """Its expressions and its command work: for a pipeline's cache, and for one of logits from elsewhere."""
    pipeline = tiny(*ALL_DIGITS, "train.epochs=1")
    cache_teacher(pipeline)
    path = pipeline.cache.path
    data = logitcache.pipeline_data(pipeline)
    if teacher != "of the pipeline":
        views = logitcache.ViewDataset(data.train, logitcache.open(path).view_plan)
        path = str(tmp_path / "own.cache")
        with logitcache.create(
            path,
            num_samples=len(data.train),
            num_classes=data.num_classes,
            num_views=pipeline.views.count,
            teacher=teacher,
            samples=logitcache.sample_table(data.train, contents=True),
            view_plan=views.plan,
        ) as writer:
            for view in range(pipeline.views.count):
                writer.write(view=view, start=0, logits=torch.randn(len(data.train), data.num_classes))
    text = card(path)
    namespace = {"logitcache": logitcache, "dataset": data.train, "cache": logitcache.open(path)}
    [rendering] = re.findall(r"`(logitcache\.ViewDataset\(.*?\))`", text)
    views = eval(rendering, namespace)
    [command] = re.findall(r"^logitcache (train-student .*)$", text, flags=re.MULTILINE)
    (tmp_path / "pipeline.yaml").write_text(pipeline.as_yaml())
    name = pipeline.students[0].name
    words = shlex.split(command.replace("PIPELINE", "pipeline.yaml").replace("mine.cache", path).replace("NAME", name))
    ended = run_program(forks, "-m", "logitcache.cli", *words, "--student", name, folder=tmp_path)

    assert len(views) == len([views[0, sample] for sample in range(len(views))])
    assert (0, "") == (ended.returncode, "".join(re.findall("error.*", ended.stderr)))
    assert name in ended.stdout


def test_a_card_recommends_only_what_the_recipe_of_its_views_allows(tmp_path: Path) -> None:
    plain = card(build(tmp_path / "plain"))
    by_hand = card(build(tmp_path / "own", view_plan=logitcache.ViewPlan(transform=v2.RandomCrop(4), seed=3)))
    spec = {"shared": [{"tests.models:brighten": {}}], "mixing": None, "teacher_input": None}
    plan = logitcache.ViewPlan()
    object.__setattr__(plan, "describe", lambda: spec)
    of_code = card(build(tmp_path / "code", view_plan=plan))

    assert ["cache.view_plan" in text for text in (plain, by_hand, of_code)] == [False, False, True]
    assert ["cache.check_plan(plan)" in text for text in (plain, by_hand, of_code)] == [False, True, False]
    assert ["train-student PIPELINE" in text for text in (plain, by_hand, of_code)] == [True, False, True]
    assert "`tests.models:brighten`" in of_code
    assert "no recipe of its views" in plain


def table(targets: np.ndarray) -> SampleTable:
    return SampleTable(len(targets), None, targets, np.zeros((len(targets), 16), dtype=np.uint8))


def test_the_accuracy_is_that_of_the_first_class_of_view_0(tmp_path: Path) -> None:
    targets = logits().argmax(dim=1).numpy()
    targets[:13] = (targets[:13] + 1) % CLASSES
    path = build(tmp_path / "a", dataset=None, samples=table(targets))

    assert (37, 50, 50) == first_class_accuracy(logitcache.open(path))
    assert "Teacher top-1 accuracy: **74.00%**, on the first 50 rows of view 0." in card(path)


def test_mixed_rows_are_left_out_of_the_accuracy(tmp_path: Path) -> None:
    plan = logitcache.ViewPlan(seed=3, mixing=logitcache.Mixing(mixup=0.4, probability=0.5), num_classes=CLASSES)
    mixed = [row for row in range(SAMPLES) if plan.mixture(0, row, SAMPLES) is not None]
    targets = logits().argmax(dim=1).numpy()
    targets[mixed] = (targets[mixed] + 1) % CLASSES
    path = build(tmp_path / "a", dataset=None, samples=table(targets), view_plan=plan)
    unmixed = SAMPLES - len(mixed)

    assert 10 < unmixed < 40
    assert (unmixed, unmixed, 50) == first_class_accuracy(logitcache.open(path))
    assert f"**100.00%**, on the {unmixed} unmixed rows among the first 50 rows of view 0." in card(path)


def test_where_every_row_is_mixed_no_accuracy_is_stated(tmp_path: Path) -> None:
    plan = logitcache.ViewPlan(mixing=logitcache.Mixing(cutmix=1.0), num_classes=CLASSES)
    path = build(tmp_path / "a", dataset=None, samples=table(np.zeros(SAMPLES, dtype=np.int64)), view_plan=plan)

    assert "## Accuracy" not in card(path)


def test_the_accuracy_looks_at_a_bounded_number_of_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = build(tmp_path / "a", dataset=None, samples=table(logits().argmax(dim=1).numpy()))
    monkeypatch.setattr("logitcache.cache.card.MEASURED_LOGITS", 20 * CLASSES)
    cache = logitcache.open(path)
    read: list[int] = []
    whole = type(cache).read_blocks
    monkeypatch.setattr(
        type(cache),
        "read_blocks",
        lambda self, view, numbers, output: read.extend(numbers) or whole(self, view, numbers, output),
    )

    assert (20, 20, 20) == first_class_accuracy(cache)
    assert [0, 1] == read


HOSTILE = [
    "---\nlicense: mit\n---\n# Owned",
    "<script>alert(1)</script><img src=x onerror=alert(1)>",
    "![x](https://evil.example/a.png) [click](javascript:alert(1)) https://evil.example www.evil.example",
    "`</code>` ``` ~~~ | a | b |",
    "a\x00b\x1b[31m\u202eevil\u2028next\r\n\r\n- item",
    "&lt;b&gt; &#60;script&#62; <https://evil.example> <!-- -->",
    "1. one\n\n    code\n\n> quote\n===",
    "{{ template }} ${x} : - ? !!python/object:os.system",
    "`",
    "\u0085" * 5,
]


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_names_are_neither_html_nor_links_nor_front_matter(tmp_path: Path, text: str) -> None:
    stated = {"title": text, "description": text, "dataset": text, "teacher": text, "license": text, "tags": [text]}
    names = [f"{text} {number}" for number in range(CLASSES)]
    path = build(tmp_path / "a", teacher=text, dataset=text, class_names=names, card=stated)
    whole = card(path)
    clean = card(
        build(tmp_path / "b", class_names=["x"] * CLASSES, card={name: "x" for name in stated if name != "tags"})
    )
    body = whole.split("---\n", 2)[2]
    markdown = MarkdownIt("commonmark", {"html": True}).enable("table")
    kinds = [token.type for block in markdown.parse(body) for token in [block, *(block.children or [])]]
    expected = [token.type for block in markdown.parse(clean.split("---\n", 2)[2]) for token in [block]]

    assert front_matter(clean).keys() == front_matter(whole).keys()
    assert DatasetCard(whole).data.to_dict().keys() == front_matter(whole).keys()
    assert set() == {"html_inline", "html_block", "link_open", "image"} & set(kinds)
    assert expected.count("heading_open") == kinds.count("heading_open")
    assert expected.count("fence") == kinds.count("fence")
    assert not re.search(r"[\x00-\x09\x0b-\x1f\u0085\u2028\u202e]", whole)
    assert [] == verify(str(path), deep=True)


def test_names_in_code_are_shown_as_they_are(tmp_path: Path) -> None:
    names = ["a`b", "<i>", "__init__", "c|d", "e", "f"]
    body = card(build(tmp_path / "a", class_names=names)).split("---\n", 2)[2]
    tokens = [token for block in MarkdownIt("commonmark").parse(body) for token in block.children or []]

    assert names == [token.content for token in tokens if token.type == "code_inline"][2:8]


@pytest.mark.parametrize(
    ("stated", "message"),
    [
        pytest.param({"licence": "mit"}, "card.licence: .*; a card has: license, title", id="unknown"),
        pytest.param({"url": "javascript:alert(1)"}, "card.url: ", id="url"),
        pytest.param({"url": "https://x> <b"}, "card.url: ", id="url with HTML"),
        pytest.param({"tags": "one"}, "card.tags: ", id="tags"),
    ],
)
def test_a_card_that_cant_be_is_refused_before_anything_is_written(
    tmp_path: Path, stated: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        build(tmp_path / "a", card=stated)

    assert not (tmp_path / "a").exists()


def test_a_card_is_no_part_of_the_cache_and_comes_back(tmp_path: Path) -> None:
    path = build(tmp_path / "a", card={"license": "mit"})
    text, digest = card(path), logitcache.open(path).digest
    (path / "README.md").unlink()

    assert [] == verify(str(path), deep=True)
    build(path)
    assert (text, digest) == (card(path), logitcache.open(path).digest)


def test_an_edited_card_is_left_alone_until_the_cache_grows(tmp_path: Path) -> None:
    path = build(tmp_path / "a", card={"license": "mit"})
    (path / "README.md").write_text("mine")
    build(path)
    assert "mine" == card(path)

    build(path, num_views=2)
    assert "mit" == front_matter(card(path))["license"]
    assert "| views | 2 |" in card(path)


def test_a_writer_that_was_killed_between_records_and_card_leaves_no_outdated_card(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = build(tmp_path / "a")

    def killed(_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("logitcache.cache.creation.write_card", killed)
        build(path, num_views=2)
    assert logitcache.open(path).sealed
    assert not (path / "README.md").exists()

    build(path, num_views=2)
    assert "| views | 2 |" in card(path)


def test_what_a_sealed_cache_says_of_itself_can_be_changed(tmp_path: Path) -> None:
    path = build(tmp_path / "a", card={"license": "mit"})
    before = logitcache.open(path)
    build(path, card={"license": "apache-2.0"})
    after = logitcache.open(path)

    assert "apache-2.0" == front_matter(card(path))["license"]
    assert (before.id, before.digest, True) == (after.id, after.digest, after.sealed)
    assert [] == verify(str(path), deep=True)


def test_a_pipeline_says_it_under_cache_card(tiny: Make) -> None:
    pipeline = tiny(*PICTURES, "cache.card.license=mit", "cache.card.tags=[digits]")
    cache_teacher(pipeline)
    front = front_matter(card(pipeline.cache.path))

    assert ("mit", ["image-classification"]) == (front["license"], front["task_categories"])
    assert "digits" in front["tags"]
    with pytest.raises(UsageError, match="unknown key 'cache.card.licence'; did you mean 'license'"):
        tiny("cache.card.licence=mit")


def test_a_writer_that_was_killed_as_it_wrote_the_card_leaves_nothing_behind(tmp_path: Path) -> None:
    build(tmp_path / "a")
    card = (tmp_path / "a/README.md").read_bytes()
    (tmp_path / "a/README.md").unlink()
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    partial = tmp_path / f"a/.README.md.{_HOST}.{dead.pid}.0.partial"
    partial.write_bytes(card[:100])
    build(tmp_path / "a")

    assert card == (tmp_path / "a/README.md").read_bytes()
    assert not partial.exists()
