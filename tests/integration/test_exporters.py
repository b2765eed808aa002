"""Caches in the formats of other tools: what is exported is imported again as the same distributions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import logitcache
from logitcache.config.schema import Pipeline
from logitcache.data.samples import SampleTable
from logitcache.errors import SampleMismatch, UsageError
from logitcache.extras.interchange import export_cache, import_cache
from logitcache.extras.interchange.sequences import content_digests
from logitcache.stages.cache_teacher import cache_teacher
from tests.conftest import PICTURES

Make = Callable[..., Pipeline]
LENGTHS = (3, 7, 2, 5, 9)
VOCABULARY, K = 40, 6


def tokens() -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    return [generator.integers(VOCABULARY, size=length) for length in LENGTHS]


def sequences(path: Path, *, encoding: Any = f"TopK(k={K}, dtype='float32')", **changes: Any) -> logitcache.LogitCache:
    """A cache of a causal language model: a row for each token but the last, over several blocks and two views."""
    keys = [f"text/{number}" for number in range(len(LENGTHS))]
    targets = np.full(len(LENGTHS), -1, dtype=np.int64)
    settings = {
        "num_samples": len(LENGTHS),
        "num_classes": VOCABULARY,
        "num_views": 2,
        "encoding": encoding,
        "teacher": "lm@1",
        "samples": SampleTable(len(LENGTHS), keys, targets, content_digests(tokens())),
        "rows_per_sample": [length - 1 for length in LENGTHS],
        "rows_per_block": 8,
        "calibration": some_logits(),
    } | changes
    with logitcache.create(path, **settings) as writer:
        for view in range(2):
            writer.write(view=view, start=0, logits=some_logits(view)[: sum(settings["rows_per_sample"])])
    return logitcache.open(path)


def some_logits(seed: int = 0) -> Tensor:
    rows = sum(LENGTHS)
    return torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 3


def distributions(cache: logitcache.LogitCache, view: int = 0) -> Tensor:
    return cache.view(view).logits(range(cache.num_rows)).double().softmax(dim=1)


def imported(path: Path, format: str, source: Path) -> logitcache.LogitCache:
    import_cache(format, source, path, teacher="lm@1", dataset="texts", num_classes=VOCABULARY)
    return logitcache.open(path)


@pytest.mark.parametrize("format", ["distillkit", "axolotl"])
def test_sequences_come_back_with_their_distributions_and_tokens(tmp_path: Path, format: str) -> None:
    first = sequences(tmp_path / "a.cache")
    result = export_cache(format, str(tmp_path / "a.cache"), tmp_path / "out", views="1", tokens=tokens())
    again = imported(tmp_path / "b.cache", format, tmp_path / "out")

    assert (first.num_rows, first.layout.blocks_per_view) == (result.rows, len(result.files))
    assert list(first.row_offsets) == list(again.row_offsets)
    assert torch.allclose(distributions(first, view=1), distributions(again), atol=1e-7)
    assert first.samples is not None
    assert again.samples is not None
    assert np.array_equal(first.samples.contents, again.samples.contents)


@pytest.mark.parametrize("format", ["distillkit", "axolotl"])
def test_samples_without_rows_are_left_out(tmp_path: Path, format: str) -> None:
    lengths = [length - 1 for length in LENGTHS]
    first = sequences(tmp_path / "a.cache", rows_per_sample=[0, *lengths[1:3], 0, lengths[4]])
    export_cache(format, str(tmp_path / "a.cache"), tmp_path / "out", views="0", tokens=tokens())
    again = imported(tmp_path / "b.cache", format, tmp_path / "out")

    assert [lengths[1], lengths[2], lengths[4]] == list(np.diff(again.row_offsets))
    assert torch.allclose(distributions(first), distributions(again), atol=1e-7)


def test_axolotl_columns_name_the_samples_by_key(tmp_path: Path) -> None:
    import datasets

    sequences(tmp_path / "a.cache")
    export_cache("axolotl", str(tmp_path / "a.cache"), tmp_path / "out", views="0")
    rows = datasets.Dataset.from_parquet(
        sorted(map(str, tmp_path.glob("out/*.parquet"))), cache_dir=str(tmp_path / "hf")
    )

    assert ["key", "logprobs", "target_token_ids"] == rows.column_names
    assert [f"text/{number}" for number in range(len(LENGTHS))] == rows["key"][:]
    assert [length - 1 for length in LENGTHS] == [len(each) for each in rows["logprobs"]]
    assert {K} == {len(entries) for each in rows["target_token_ids"] for entries in each}


def test_the_largest_classes_of_any_encoding_are_exported(tmp_path: Path) -> None:
    first = sequences(tmp_path / "a.cache", encoding="Dense(dtype='float32')")
    export_cache("axolotl", str(tmp_path / "a.cache"), tmp_path / "out", views="0", top=3)
    kept, ids = distributions(first).topk(3, dim=1)
    again = distributions(imported(tmp_path / "b.cache", "axolotl", tmp_path / "out"))

    assert torch.allclose(kept, again.gather(1, ids), atol=1e-7)
    assert torch.equal(ids, again.topk(3, dim=1).indices)


@pytest.mark.parametrize("top", [None, 3])
def test_a_hugging_face_dataset_loads_by_its_card_and_comes_back(
    tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, top: int | None
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import datasets
    from huggingface_hub import DatasetCard

    datasets.disable_progress_bars()
    pipeline = tiny(*PICTURES)
    cache_teacher(pipeline)
    cache = logitcache.open(pipeline.cache.path)
    export_cache("huggingface", pipeline.cache.path, tmp_path / "out", top=top)
    rows = datasets.load_dataset(str(tmp_path / "out"), split="train", cache_dir=str(tmp_path / "hf"))
    card = DatasetCard.load(tmp_path / "out/README.md")
    settings: dict[str, Any] = {"teacher": "net", "dataset": "pictures", "num_classes": cache.num_classes}
    import_cache("parquet", tmp_path / "out/data", tmp_path / "b.cache", **settings)
    again = logitcache.open(tmp_path / "b.cache")

    assert [0] * 40 + [1] * 40 == rows["view"][:]
    assert "image-classification" in card.data.task_categories
    assert "load_dataset" in card.text
    assert "logitcache.open" not in card.text
    for view in range(2):
        here, there = (each.view(view).logits(range(40)).log_softmax(dim=1) for each in (cache, again))
        kept = here if top is None else here.topk(top).values
        assert torch.allclose(kept, there if top is None else there.topk(top).values, atol=1e-5)


def test_an_export_run_again_writes_what_is_missing_and_keeps_an_edited_card(tmp_path: Path) -> None:
    sequences(tmp_path / "a.cache")
    export_cache("huggingface", str(tmp_path / "a.cache"), tmp_path / "out")
    (tmp_path / "out/README.md").write_text("mine")
    (tmp_path / "out/data/view-00001.parquet").unlink()
    again = export_cache("huggingface", str(tmp_path / "a.cache"), tmp_path / "out")

    assert [f"{tmp_path}/out/data/view-00001.parquet"] == again.written
    assert "mine" == (tmp_path / "out/README.md").read_text()
    files = export_cache("distillkit", str(tmp_path / "a.cache"), tmp_path / "kit", views="0", tokens=tokens()).files
    Path(files[1]).unlink()
    settings: dict[str, Any] = {"views": "0", "tokens": tokens()}
    assert files[1:2] == export_cache("distillkit", str(tmp_path / "a.cache"), tmp_path / "kit", **settings).written
    with pytest.raises(UsageError, match="is another export: its view is 0, expected 1"):
        export_cache("distillkit", str(tmp_path / "a.cache"), tmp_path / "kit", **settings | {"views": "1"})


def images(path: Path) -> None:
    with logitcache.create(path, num_samples=4, num_classes=VOCABULARY, teacher="net", dataset="d") as writer:
        writer.write(view=0, start=0, logits=some_logits()[:4])


def masked(path: Path) -> None:
    sequences(path, tokenization={"task": "masked"})


def gaps(path: Path) -> None:
    positions = np.concatenate([np.arange(length - 1) * 2 for length in LENGTHS])
    sequences(path, row_positions=positions)


def dense(path: Path) -> None:
    sequences(path, encoding="Dense(dtype='float32')")


REFUSED: dict[str, tuple[Callable[[Path], object], dict[str, Any], str]] = {
    "one row per sample": (images, {}, "stores sequences of tokens, and this cache has one row per sample.*parquet"),
    "a masked model": (masked, {}, "stores rows of causal models, and this cache is of a masked model"),
    "positions left out": (gaps, {}, "stores a row for each position, and sample 0 lacks some"),
    "two views": (sequences, {"views": None}, "has no views, and 2 are to be exported: choose one with --views"),
    "dense logits": (dense, {}, "stores the largest classes of each row; choose how many with --top"),
    "a view that is not there": (sequences, {"views": "2"}, "the cache holds 0:2"),
    "every class": (sequences, {"top": VOCABULARY}, "--top keeps 1 to 39 of 40 classes, not 40"),
    "other tokens": (sequences, {"tokens": tokens()[::-1]}, "sample 0 has 2 rows in the cache, which do not belong"),
    "fewer samples": (sequences, {"tokens": tokens()[1:]}, "the cache has 5 samples, the dataset has 4"),
    "no list": (sequences, {"tokens": list("abcde")}, "sample 0 of the dataset is not a list of token ids"),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("format", ["distillkit", "axolotl"])
def test_what_a_format_cannot_store_is_refused_by_name(tmp_path: Path, format: str, case: str) -> None:
    make, settings, message = REFUSED[case]
    make(tmp_path / "a.cache")
    with pytest.raises((UsageError, SampleMismatch), match=message):
        export_cache(
            format, str(tmp_path / "a.cache"), tmp_path / "out", **{"views": "0", "tokens": tokens()} | settings
        )

    assert not list(tmp_path.glob("out/*"))


def test_distillkit_needs_token_ids_and_parquet_takes_none(tmp_path: Path) -> None:
    sequences(tmp_path / "a.cache")
    with pytest.raises(UsageError, match="DistillKit stores token ids, which a cache lacks: add .* --data"):
        export_cache("distillkit", str(tmp_path / "a.cache"), tmp_path / "out", views="0")
    with pytest.raises(UsageError, match=r"parquet stores no token ids; leave out tokens \(--data\)"):
        export_cache("parquet", str(tmp_path / "a.cache"), tmp_path / "out", tokens=tokens())
    with pytest.raises(UsageError, match="unknown format 'distilkit'; did you mean 'distillkit'"):
        export_cache("distilkit", str(tmp_path / "a.cache"), tmp_path / "out")
