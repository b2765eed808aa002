"""A cache is read by others: by plain zarr, by tensorstore, and by a stranger who has only the documents."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import logitcache
from logitcache.cache.per_cache import read_per_cache_array
from logitcache.data.samples import SampleTable
from tests.contract.conftest import Stranger

VIEWS, SAMPLES, CLASSES = 2, 70, 20
ENCODINGS = [
    logitcache.Dense(dtype="float32"),
    logitcache.Dense(dtype="float16"),
    logitcache.Dense(dtype="uint8"),
    logitcache.TopK(k=4),
    logitcache.TopK(k=4, dtype="float32"),
    logitcache.TopK(k=4, dtype="uint8"),
    logitcache.PackedTopK(k=4),
    logitcache.PackedTopK(k=4, most=9, prior=True, step=0.5),
    logitcache.Sampled(draws=9),
    logitcache.Sampled(draws=9, packed=True),
    logitcache.LowRank(rank=7, k=2),
    logitcache.TopLowRank(rank=7, k=2),
    logitcache.TrellisLowRank(rank=7, bit_price=0.001),
    logitcache.LowRank(rank=5, k=0, step=0.004, search=0),  # so fine that a coefficient takes two bytes
]


def some_logits(masked: bool) -> Tensor:
    logits = torch.randn(VIEWS, SAMPLES, CLASSES, generator=torch.Generator().manual_seed(0)) * 3
    if masked:
        logits[:, ::3, 5:9] = -torch.inf
    return logits


@pytest.mark.parametrize("reader", ["zarr", "tensorstore"])
@pytest.mark.parametrize("encoding", ENCODINGS, ids=repr)
def test_a_stranger_reads_every_array_and_every_logit(
    tmp_path: Path, stranger: Stranger, encoding: Any, reader: str
) -> None:
    logits = some_logits(masked=encoding.holds_masks)
    keys = [f"bild/ä-{number}.png" for number in range(SAMPLES)]
    contents = np.random.default_rng(0).integers(0, 256, (SAMPLES, 16), dtype=np.uint8)
    samples = SampleTable(SAMPLES, keys, np.arange(SAMPLES, dtype=np.int64) % CLASSES, contents)
    shape = {"num_samples": SAMPLES, "num_classes": CLASSES, "num_views": VIEWS, "rows_per_block": 32}
    with logitcache.create(
        tmp_path / "a", **shape, encoding=encoding, calibration=logits.flatten(0, 1), teacher="net", samples=samples
    ) as writer:
        for view in range(VIEWS):
            writer.write(view=view, start=0, logits=logits[view])
    cache = logitcache.open(tmp_path / "a")
    found = stranger(tmp_path / "a", reader)

    for name in cache.layout.arrays:
        for view in range(VIEWS):
            ours = cache.read_blocks(view, range(cache.layout.blocks_per_view))[name]
            np.testing.assert_array_equal(ours, found[f"array_{name}"][view])
            assert ours.dtype == found[f"array_{name}"].dtype
    for name in cache.layout.fixed:
        ours = read_per_cache_array(cache.records, name, cache._objects)
        np.testing.assert_array_equal(ours, found[f"array_{name}"])
    assert keys == found["array_sample_keys"].tobytes().decode().split("\n")
    assert cache.digest == str(found["digest"])
    assert sorted(cache.receipts) == found["receipts"].tolist()
    decoded = torch.stack([cache.view(view).logits(range(SAMPLES)) for view in range(VIEWS)])
    np.testing.assert_allclose(found["decoded"], decoded.numpy(), rtol=2e-6, atol=2e-5)
    if "step=0.004" in repr(encoding):
        assert int(found["array_limits"].max()) > 127


@pytest.mark.parametrize("name", ["format-2", "format-2-by-view"])
def test_a_stranger_reads_the_receipts(tmp_path: Path, stranger: Stranger, name: str) -> None:
    """From one file, or from the objects of the views."""
    path = tmp_path / "a"
    shutil.copytree(Path(__file__).parents[1] / f"golden/{name}.cache", path)
    found = stranger(path, "zarr")
    cache = logitcache.open(path)

    assert sorted(cache.receipts) == found["receipts"].tolist()
    assert cache.digest == str(found["digest"])


@pytest.mark.parametrize("reader", ["zarr", "tensorstore"])
def test_a_stranger_reads_every_output(tmp_path: Path, stranger: Stranger, reader: str) -> None:
    """Features in each of the encodings of values."""
    path = tmp_path / "a"
    shutil.copytree(Path(__file__).parents[1] / "golden/format-2-outputs.cache", path)
    found = stranger(path, reader)
    cache = logitcache.open(path)

    assert {"components", "values"} == {output.encoding.name for output in cache.extra_outputs.values()}
    assert cache.digest == str(found["digest"])
    for name in cache.extra_outputs:
        ours = torch.stack([cache.view(view).output(name, range(cache.num_rows)) for view in cache.views])
        np.testing.assert_allclose(found[f"output_{name}"], ours.numpy(), rtol=2e-6, atol=2e-5)
