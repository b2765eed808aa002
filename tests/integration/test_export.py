"""Exported Parquet says what the cache says, to every reader."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import polars
import pyarrow.parquet
import pytest
import torch
from torch import Tensor

import logitcache
from logitcache.cache.layout import parse_views
from logitcache.config.schema import Pipeline
from logitcache.errors import IncompleteCache, StorageError, UsageError
from logitcache.extras.interchange.parquet import export_parquet
from logitcache.stages.cache_teacher import cache_teacher
from tests.commands import logitcache as run
from tests.conftest import PICTURES

Make = Callable[..., Pipeline]
VIEWS, SAMPLES, CLASSES = 2, 100, 12
ENCODINGS = [
    logitcache.Dense(dtype="float32"),
    logitcache.Dense(dtype="uint8"),
    logitcache.TopK(k=3),
    logitcache.Sampled(draws=4),
    logitcache.LowRank(rank=4),
]


def some_logits() -> Tensor:
    return torch.randn(VIEWS, SAMPLES, CLASSES, generator=torch.Generator().manual_seed(0)) * 3


def built(path: Path, encoding: Any = ENCODINGS[0], **changes: Any) -> logitcache.LogitCache:
    settings = {"num_samples": SAMPLES, "num_classes": CLASSES, "num_views": VIEWS, "rows_per_block": 32}
    settings |= {"teacher": "net", "dataset": "pictures", "calibration": some_logits().flatten(0, 1)}
    with logitcache.create(path, encoding=encoding, **(settings | changes)) as writer:  # type: ignore[arg-type]
        for view in range(VIEWS):
            writer.write(view=view, start=0, logits=some_logits()[view])
    return logitcache.open(path)


def lists(column: Any) -> Tensor:
    return torch.from_numpy(np.stack([np.asarray(row) for row in column]))


@pytest.mark.parametrize("encoding", ENCODINGS, ids=repr)
def test_every_reader_finds_the_logits_of_the_cache(tmp_path: Path, encoding: Any) -> None:
    cache = built(tmp_path / "a.cache", encoding)
    export_parquet(str(tmp_path / "a.cache"), tmp_path / "out")
    expected = torch.cat([cache.view(view).logits(range(SAMPLES)) for view in range(VIEWS)])
    places = [(view, row) for view in range(VIEWS) for row in range(SAMPLES)]

    for table in (
        pyarrow.parquet.read_table(tmp_path / "out").to_pydict(),
        pandas.read_parquet(tmp_path / "out").to_dict("list"),
        polars.read_parquet(f"{tmp_path}/out/*.parquet").to_dict(as_series=False),
    ):
        assert ["view", "row", "logits"] == list(table)
        assert places == list(zip(table["view"], table["row"], strict=True))
        assert torch.equal(expected, lists(table["logits"]).float())


def test_hugging_face_datasets_read_keys_targets_and_logits(
    tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import datasets

    datasets.disable_progress_bars()
    pipeline = tiny(*PICTURES)
    cache_teacher(pipeline)
    cache = logitcache.open(pipeline.cache.path)
    export_parquet(pipeline.cache.path, tmp_path / "out")
    loaded = datasets.load_dataset(
        "parquet", data_files=f"{tmp_path}/out/*.parquet", split="train", cache_dir=str(tmp_path / "hf")
    ).with_format("numpy")
    samples = cache.samples

    assert samples is not None
    assert samples.keys is not None
    assert ["view", "row", "key", "target", "logits"] == loaded.column_names
    assert [*samples.keys, *samples.keys] == list(loaded["key"])
    assert [*samples.targets, *samples.targets] == list(loaded["target"])
    assert torch.equal(cache.view(1).logits(range(40)), lists(loaded[40:80]["logits"]))


def test_the_largest_and_the_tail_hold_the_whole_mass(tmp_path: Path) -> None:
    logits = built(tmp_path / "a.cache").view(1).logits(range(SAMPLES))
    export_parquet(str(tmp_path / "a.cache"), tmp_path / "out", top=3, views="1")
    table = pyarrow.parquet.read_table(tmp_path / "out/view-00001.parquet").to_pydict()
    classes, kept, tail = lists(table["classes"]), lists(table["logits"]).float(), torch.tensor(table["tail"])

    assert ["view", "row", "classes", "logits", "tail"] == list(table)
    assert torch.equal(logits.argsort(dim=1, descending=True)[:, :3], classes.long())
    assert torch.equal(logits.gather(1, classes.long()), kept)
    total = torch.logsumexp(torch.cat([kept, tail[:, None]], dim=1), dim=1)
    assert torch.allclose(torch.logsumexp(logits, dim=1), total, atol=1e-5)


def test_a_file_says_which_cache_it_is_of(tmp_path: Path) -> None:
    cache = built(tmp_path / "a.cache", class_names=[f"<{number}>" for number in range(CLASSES)])
    export_parquet(str(tmp_path / "a.cache"), tmp_path / "out")
    about = json.loads(pyarrow.parquet.read_metadata(tmp_path / "out/view-00001.parquet").metadata[b"logitcache"])

    assert (cache.id, cache.digest, 1) == (about["id"], about["digest"], about["view"])
    assert ("net", "pictures", "<11>") == (about["teacher"], about["dataset"], about["class_names"][11])
    assert {"name": "dense", "dtype": "float32"} == about["encoding"]


def test_a_row_group_is_a_block_or_a_part_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("logitcache.extras.interchange.parquet.PIECE_LOGITS", 20 * CLASSES)
    built(tmp_path / "a.cache")
    export_parquet(str(tmp_path / "a.cache"), tmp_path / "out", views=":1")
    footer = pyarrow.parquet.read_metadata(tmp_path / "out/view-00000.parquet")

    assert [20, 12, 20, 12, 20, 12, 4] == [footer.row_group(number).num_rows for number in range(footer.num_row_groups)]
    assert ["view-00000.parquet"] == [path.name for path in (tmp_path / "out").iterdir()]


def test_an_export_run_again_writes_what_is_missing(tmp_path: Path) -> None:
    built(tmp_path / "a.cache")
    first = export_parquet(str(tmp_path / "a.cache"), tmp_path / "out")
    files = [Path(file) for file in first.files]
    before = files[0].stat().st_mtime_ns
    files[1].unlink()
    second = export_parquet(str(tmp_path / "a.cache"), tmp_path / "out")

    assert (first.files, first.files[1:]) == (first.written, second.written)
    assert (first.files, first.rows, first.bytes) == (second.files, second.rows, second.bytes)
    assert before == files[0].stat().st_mtime_ns


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_killed_export_leaves_no_half_file_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import logitcache.extras.interchange.parquet as module

    cache = built(tmp_path / "a.cache")
    made, count = module._table, []

    def killed_in_the_second_file(*arguments: Any) -> Any:
        count.append(1)
        if len(count) == 6:
            os.kill(os.getpid(), signal.SIGKILL)
        return made(*arguments)

    child = os.fork()
    if child == 0:
        monkeypatch.setattr(module, "_table", killed_in_the_second_file)
        export_parquet(str(tmp_path / "a.cache"), tmp_path / "out")
        os._exit(0)
    assert signal.SIGKILL == os.WTERMSIG(os.waitpid(child, 0)[1])
    left = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert [f".view-00001.parquet.{child}.partial", "view-00000.parquet"] == left

    result = export_parquet(str(tmp_path / "a.cache"), tmp_path / "out")
    assert [result.files[1]] == result.written
    assert ["view-00000.parquet", "view-00001.parquet"] == sorted(path.name for path in (tmp_path / "out").iterdir())
    found = lists(pyarrow.parquet.read_table(result.files[1])["logits"].to_pylist()).float()
    assert torch.equal(cache.view(1).logits(range(SAMPLES)), found)


def test_a_full_disk_leaves_no_half_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built(tmp_path / "a.cache")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("logitcache.extras.interchange.parquet.os.fsync", full)
    with pytest.raises(StorageError, match="No space left on device; run the command again"):
        export_parquet(str(tmp_path / "a.cache"), tmp_path / "out")

    assert [] == list((tmp_path / "out").iterdir())


def other_cache(tmp_path: Path) -> None:
    export_parquet(str(tmp_path / "a.cache"), tmp_path / "out")
    built(tmp_path / "b.cache", teacher="another")


def other_columns(tmp_path: Path) -> None:
    export_parquet(str(tmp_path / "a.cache"), tmp_path / "out", top=2)


def foreign_table(tmp_path: Path) -> None:
    pandas.DataFrame({"a": [1]}).to_parquet(tmp_path / "out/view-00000.parquet")


OCCUPIED: dict[str, tuple[Callable[[Path], object], str]] = {
    "a thesis": (lambda path: (path / "out/thesis.tex").write_text("x"), "contains other files .'thesis.tex'."),
    "a table of somebody's": (foreign_table, "view-00000.parquet is not an export of a cache"),
    "no table": (lambda path: (path / "out/view-00000.parquet").write_text("x"), "is not an export of a cache"),
    "a folder": (lambda path: (path / "out/view-00000.parquet").mkdir(), "contains other files"),
    "another cache": (other_cache, "is another export: its id is"),
    "other columns": (other_columns, "is another export: its top is 2, expected None"),
}


@pytest.mark.parametrize("case", OCCUPIED)
def test_a_folder_that_holds_something_else_is_left_alone(tmp_path: Path, case: str) -> None:
    occupy, message = OCCUPIED[case]
    (tmp_path / "out").mkdir()
    built(tmp_path / "a.cache")
    occupy(tmp_path)
    exported = tmp_path / ("b.cache" if case == "another cache" else "a.cache")
    before = {path: path.is_file() and path.read_bytes() for path in (tmp_path / "out").iterdir()}

    with pytest.raises(UsageError, match=message):
        export_parquet(str(exported), tmp_path / "out")
    assert before == {path: path.is_file() and path.read_bytes() for path in (tmp_path / "out").iterdir()}


@pytest.mark.parametrize(
    ("text", "expected"),
    [(None, range(4)), ("0:2", range(2)), (":1", range(1)), ("2:", range(2, 4)), ("3", range(3, 4))],
)
def test_views_are_a_number_or_a_range(text: str | None, expected: range) -> None:
    assert expected == parse_views(text, range(4))


@pytest.mark.parametrize("text", ["", "4", "0:5", "2:2", "3:1", "-1", "a", "1:2:3", "٣"])
def test_views_that_are_not_there_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="the cache holds 0:4"):
        parse_views(text, range(4))


def test_an_open_cache_and_a_silly_top_are_refused(tmp_path: Path) -> None:
    built(tmp_path / "a.cache")
    with pytest.raises(UsageError, match="--top keeps 1 to 11 of 12 classes, not 12"):
        export_parquet(str(tmp_path / "a.cache"), tmp_path / "out", top=12)
    settings = {"num_samples": 5, "num_classes": 3, "teacher": "net", "dataset": "d"}
    logitcache.create(tmp_path / "b.cache", **settings).close()  # type: ignore[arg-type]
    with pytest.raises(IncompleteCache, match="is not sealed yet"):
        export_parquet(str(tmp_path / "b.cache"), tmp_path / "out")

    assert not (tmp_path / "out").exists()


def test_without_pyarrow_the_message_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built(tmp_path / "a.cache")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)

    with pytest.raises(UsageError, match=r"Parquet needs pyarrow: pip install 'logitcache\[parquet\]'"):
        export_parquet(str(tmp_path / "a.cache"), tmp_path / "out")


def test_the_command_exports(tmp_path: Path) -> None:
    built(tmp_path / "a.cache")
    result = run("export", tmp_path / "a.cache", "--to", "parquet", "-o", tmp_path / "out", "--views", "0:1", "--json")
    found = json.loads(result.stdout)

    assert ([f"{tmp_path}/out/view-00000.parquet"], 100) == (found["files"], found["rows"])
    again = run("export", tmp_path / "a.cache", "--to", "parquet", "-o", tmp_path / "out")
    assert "200 rows in 2 parquet files" in again.stdout
    assert "1 of them already present" in again.stdout
    wrong = run("export", tmp_path / "a.cache", "--to", "csv", "-o", tmp_path / "out")
    assert 2 == wrong.returncode
    assert "Traceback" not in wrong.stderr


def test_memory_stays_at_a_block_however_long_a_view(tmp_path: Path) -> None:
    """Growth from 4 to 40 blocks of the same size, in a process of its own each."""
    program = (
        "import resource, sys, torch, logitcache.progress; from logitcache.extras.interchange.parquet import export_parquet;"
        "logitcache.progress.silence(); export_parquet(sys.argv[1], sys.argv[1] + '.out');"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    peaks = []
    for blocks in (4, 40):
        rows, path = blocks * 1024, tmp_path / f"{blocks}.cache"
        settings = {"num_samples": rows, "num_classes": 1000, "teacher": "net", "dataset": "d", "rows_per_block": 1024}
        with logitcache.create(path, **settings, encoding="dense(dtype='uint8')") as writer:  # type: ignore[arg-type]
            for start in range(0, rows, 1024):
                writer.write(view=0, start=start, logits=torch.randn(1024, 1000))
        peaks.append(int(subprocess.check_output([sys.executable, "-c", program, str(path)], text=True)))

    print(f"peak memory: {peaks[0]} kB, {peaks[1]} kB")
    assert peaks[1] - peaks[0] < 72 * 1000  # 36 blocks of decoded logits are 144 MB
