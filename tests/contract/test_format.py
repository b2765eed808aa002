"""The test vectors of docs/format.md, which other implementations rely on."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from logitcache.digest import array_digest, json_digest
from logitcache.encodings import encoding_from_config
from logitcache.encodings.packing import MixedRadix

SPECIFICATION = (Path(__file__).parents[2] / "docs/format.md").read_text()
DECODING = re.findall(r"^\| `(\{.*?\})` \| (\d+) \| `(\{.*?\})` \| `(\[.*?\])` \|$", SPECIFICATION, flags=re.MULTILINE)


def test_the_hash_of_canonical_json() -> None:
    assert json_digest({"b": [1, None, True], "a": "é\n", "c": 0.5}) in SPECIFICATION


def test_the_value_hash_of_an_array() -> None:
    assert array_digest(np.array([3, 0, 65535], dtype=np.uint16)) in SPECIFICATION


def test_several_encodings_have_a_vector() -> None:
    assert {"dense", "topk", "packedtopk", "sampled", "values"} == {
        json.loads(config)["name"] for config, *_ in DECODING
    }


@pytest.mark.parametrize(("config", "num_classes", "arrays", "logits"), DECODING, ids=[row[0] for row in DECODING])
def test_a_row_decodes_as_specified(config: str, num_classes: str, arrays: str, logits: str) -> None:
    encoding = encoding_from_config(json.loads(config))
    specs = encoding.arrays(int(num_classes))
    row = {
        name: torch.tensor([value], dtype=getattr(torch, specs[name].dtype))
        for name, value in json.loads(arrays).items()
    }
    expected = [-math.inf if value is None else value for value in json.loads(logits)]

    assert specs.keys() == row.keys()
    assert encoding.decode(row, int(num_classes))[0].tolist() == pytest.approx(expected, abs=1e-4)


def test_lowrank_packs_its_coefficients_as_specified() -> None:
    numbers = r"(\[[-\d, ]+\])"
    limits, first, first_bytes, second, second_bytes = (
        json.loads(text)
        for text in re.search(
            f"With limits `{numbers}`, `q = {numbers}` is stored in the bytes `{numbers}`, and `{numbers}` in `{numbers}`",
            " ".join(SPECIFICATION.split()),
        ).groups()
    )
    packed = MixedRadix(limits).pack(torch.tensor([first, second], dtype=torch.float32))

    assert packed.tolist() == [first_bytes, second_bytes]
