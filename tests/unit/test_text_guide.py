"""The Python of the guide to language models runs as it is written."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import logitcache
from logitcache.data.index import join_index, split_index
from tests.models import NextToken

GUIDE = (Path(__file__).parents[2] / "docs/text.md").read_text()
PROGRAMS = re.findall(r"^```python\n(.*?)^```", GUIDE, flags=re.MULTILINE | re.DOTALL)
VOCABULARY = 200


@pytest.fixture
def names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the guide says is there."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    sequences = [torch.randint(VOCABULARY, (length,)) for length in (5, 9, 2, 7, 12, 3)]
    teacher, student = NextToken(VOCABULARY), NextToken(VOCABULARY, width=8)
    return {"sequences": sequences, "vocab_size": VOCABULARY, "teacher": teacher, "student": student}


def test_a_student_learns_from_a_cache_of_ones_own_sequences(names: dict[str, Any]) -> None:
    for program in PROGRAMS[:2]:
        exec(program, names)
    rows = split_index(names["index"][names["has_row"]])[1].tolist()
    with torch.inference_mode():
        expected = torch.cat([names["teacher"](names["sequences"][sample][None])[0, :-1] for sample in (3, 0, 5)])
    stored = logitcache.TopK(k=64)

    assert [*range(13, 19), *range(4), *range(30, 32)] == rows
    assert names["student"].head.weight.grad is not None
    assert torch.allclose(
        stored.decode(stored.encode(expected), VOCABULARY).softmax(dim=1),
        names["view"].targets(rows).dense().softmax(dim=1),
        atol=1e-5,
    )


def test_records_of_a_serving_engine_become_rows(names: dict[str, Any]) -> None:
    names["outputs"] = []
    for ids in names["sequences"]:
        with torch.inference_mode():
            values, classes = names["teacher"](ids[None])[0, :-1].log_softmax(dim=1).topk(20, dim=1)
        records = [
            {token: SimpleNamespace(logprob=value) for token, value in zip(*row, strict=True)}
            for row in zip(classes.tolist(), values.tolist(), strict=True)
        ]
        names["outputs"].append(SimpleNamespace(prompt_logprobs=[None, *records]))
    exec("import logitcache\nimport torch\n" + PROGRAMS[2], names)
    cache = logitcache.open("served.cache")
    with torch.inference_mode():
        expected = names["teacher"](names["sequences"][1][None])[0, :-1].argmax(dim=1)

    assert 32 == cache.num_rows
    assert torch.equal(expected, cache.logits([join_index(0, row) for row in range(4, 12)]).argmax(dim=1))
