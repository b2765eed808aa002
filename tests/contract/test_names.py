"""Caches carry readable names of teacher and dataset, outside identity and digest."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import logitcache
from logitcache.cache.names import NAMES, names_of, recorded_names
from logitcache.cache.summary import summarise
from logitcache.config.schema import Pipeline
from logitcache.share.transfer import pull, push
from logitcache.stages.cache_teacher import cache_teacher
from tests.conftest import PICTURES

SAMPLES, CLASSES = 8, 5


def build(path: Path, num_views: int = 1, **settings: Any) -> logitcache.LogitCache:
    settings = {"teacher": "net@3f9c", "dataset": "pictures-2026"} | settings
    with logitcache.create(path, num_samples=SAMPLES, num_classes=CLASSES, num_views=num_views, **settings) as writer:
        for view in range(num_views):
            writer.write(view=view, start=0, logits=torch.arange(SAMPLES * CLASSES).view(SAMPLES, CLASSES).float())
    return logitcache.open(path)


def title(path: Path | str) -> str:
    return names_of(logitcache.open(path).manifest).title


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, "Logits of net on pictures-2026"),
        ({"teacher_name": "ResNet-50"}, "Logits of ResNet-50 on pictures-2026"),
        ({"teacher_name": "ResNet-50", "dataset_name": "Pictures"}, "Logits of ResNet-50 on Pictures"),
        ({"dataset": "57ba" * 16}, "Logits of net on 57ba57ba57ba…"),
        ({"dataset": "57ba" * 16, "dataset_name": "Pictures"}, "Logits of net on Pictures"),
        ({"teacher_name": "a", "card": {"teacher": "A net", "dataset": "Art"}}, "Logits of A net on Art"),
        ({"teacher_name": "a\n# b\u202e"}, "Logits of a # b on pictures-2026"),
    ],
)
def test_a_title_is_made_of_the_most_readable_names(tmp_path: Path, settings: Any, expected: str) -> None:
    build(tmp_path / "a", **settings)

    assert expected == title(tmp_path / "a") == summarise(str(tmp_path / "a")).names.title
    assert expected in (tmp_path / "a/README.md").read_text().replace("\\#", "#").replace("\\-", "-")


def test_names_are_no_part_of_id_and_digest(tmp_path: Path) -> None:
    plain = build(tmp_path / "a")
    named = build(tmp_path / "b", teacher_name="ResNet-50", dataset_name="Pictures")

    assert (plain.id, plain.digest) == (named.id, named.digest)


def test_names_can_be_changed_later_one_at_a_time(tmp_path: Path) -> None:
    digest = build(tmp_path / "a", teacher_name="ResNet-50", dataset_name="Pictures").digest
    build(tmp_path / "a", teacher_name="ResNet-101")

    assert "Logits of ResNet-101 on Pictures" == title(tmp_path / "a")
    assert "# Logits of ResNet-101 on Pictures" in (tmp_path / "a/README.md").read_text()
    assert digest == logitcache.open(tmp_path / "a").digest


def test_names_stay_when_views_are_added(tmp_path: Path) -> None:
    build(tmp_path / "a", teacher_name="ResNet-50")
    build(tmp_path / "a", num_views=2)

    assert "Logits of ResNet-50 on pictures-2026" == title(tmp_path / "a")


def test_copies_keep_names_even_anonymous_ones(tmp_path: Path) -> None:
    build(tmp_path / "a", num_views=2, teacher_name="ResNet-50", dataset_name="Pictures")
    push(str(tmp_path / "a"), str(tmp_path / "anonymous"), anonymous=True)
    pull(str(tmp_path / "anonymous"), str(tmp_path / "part"), views="1:2")

    assert "host" not in logitcache.open(tmp_path / "anonymous").manifest.provenance
    assert ["Logits of ResNet-50 on Pictures"] * 2 == [title(tmp_path / name) for name in ("anonymous", "part")]


def test_a_pipeline_gives_its_names(tiny: Callable[..., Pipeline]) -> None:
    pipeline = tiny(*PICTURES)
    cache_teacher(pipeline)
    manifest = logitcache.open(pipeline.cache.path, trust=True).manifest

    assert {"teacher": "mlp", "dataset": "tiny"} == manifest.provenance[NAMES] == recorded_names(manifest)
    assert 64 == len(manifest.identity.dataset)


@pytest.mark.parametrize("names", [None, "x", {"teacher": 3, "dataset": ""}, {"dataset": ["x"]}], ids=str)
def test_whatever_an_untrusted_manifest_names_it_has_a_title(tmp_path: Path, names: Any) -> None:
    manifest = build(tmp_path / "a").manifest
    provenance = json.loads(json.dumps(manifest.provenance)) | {NAMES: names, "card": names}

    assert "Logits of net on pictures-2026" == names_of(manifest.model_copy(update={"provenance": provenance})).title


@pytest.mark.parametrize(
    ("data", "name"),
    [("{name: 'my_data:load'}", "tiny"), ("{name: mnist5k}", "mnist5k"), ("{name: text, root: data/brown}", "brown")],
)
def test_the_dataset_of_a_function_is_named_after_the_pipeline(
    tiny: Callable[..., Pipeline], data: str, name: str
) -> None:
    assert name == tiny(f"data={data}").dataset_name
