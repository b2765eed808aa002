"""The Python of the guide to streams runs as it is written."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import IterableDataset, get_worker_info

import logitcache
from logitcache.catalog.nets import MLP
from tests.pictures_in_files import COUNT, samples, write_shards

GUIDE = (Path(__file__).parents[2] / "docs/streams.md").read_text()
TEACH, TRAIN, SUMMARY, RENDER, ONE_PASS = re.findall(r"^```python\n(.*?)^```", GUIDE, flags=re.MULTILINE | re.DOTALL)


class Stream(IterableDataset[tuple[str, bytes, int]]):
    def __iter__(self) -> Iterator[tuple[str, bytes, int]]:
        worker = get_worker_info()
        return iter(samples() if worker is None else samples()[worker.id :: worker.num_workers])


def test_the_python_of_the_guide_distils(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    paths = write_shards(tmp_path)
    dataset = logitcache.TarShards(paths)
    teacher, student = (MLP((3, 8, 8), 10, (width,)).eval() for width in (32, 8))
    names: dict[str, Any] = {"paths": paths, "stream": Stream(), "teacher": teacher, "student": student}
    exec(ONE_PASS, names)
    exec(TEACH, names)
    table = logitcache.sample_table(dataset, contents=True)
    with logitcache.create(
        "pictures.cache", num_samples=COUNT, num_classes=10, num_views=2, teacher="mine", samples=table,
        view_plan=logitcache.ViewPlan(seed=0),
    ) as writer:  # fmt: skip
        for view in range(2):
            inputs = torch.stack([names["views"][(view, row)][1] for row in range(COUNT)])
            writer.write(view=view, start=0, logits=teacher(inputs), inputs=inputs)
    for program in (TRAIN, SUMMARY, RENDER):
        exec(program, names)
    caches = [logitcache.open(name) for name in ("one-pass.cache", "pictures.cache")]

    assert f"view 1: {COUNT} samples" in capsys.readouterr().out
    assert torch.equal(names["cache"].view(1).logits([0]), names["teacher_logits"])
    assert [table.fingerprint()] * 2 == [cache.manifest.identity.dataset for cache in caches]
    assert caches[1].digest == logitcache.open("streamed.cache").digest
    assert torch.equal(*(cache.view(0).logits(range(COUNT)) for cache in caches))
