"""Each command on a cache of token sequences: any number of rows per sample, two views, of a pipeline over text."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

import logitcache
from logitcache.config.schema import Pipeline
from logitcache.errors import UsageError
from logitcache.train.weighting import teacher_weights
from tests.commands import logitcache as run
from tests.commands import refused, run_json
from tests.needs import need_package
from tests.texts import byte_tokenizer

Make = Callable[..., Pipeline]

LINES = ["Rows of tokens.", "x", "A block holds whole samples, as many as fit.", "Short.", "The last line of the text."]
MODEL = "tests.models:NextToken"
IMAGE_WORDS = re.compile(r"\b(image|picture|pixel|photo)s?\b", re.IGNORECASE)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text and its tokenizer."""
    need_package("tokenizers", "hf")
    folder = tmp_path_factory.mktemp("text")
    for split, lines in {"train": LINES, "test": LINES[::-1]}.items():
        (folder / f"{split}.txt").write_text("\n".join(lines))
    byte_tokenizer(folder / "tokenizer.json")
    return folder


@pytest.fixture
def text(tiny: Make, place: Path, tmp_path: Path) -> Callable[..., Path]:
    """The file of a pipeline of two views, with overrides."""

    def make(*overrides: str) -> Path:
        pipeline = tiny(
            f"data={{name: text, root: '{place}', args: {{tokenizer: '{place / 'tokenizer.json'}', max_length: 32}}}}",
            "views={count: 2, transform: [{token_dropout: {p: 0.2, token_id: 0}}]}",
            f"teacher={{model: '{MODEL}', weights: random, batch_size: 2}}",
            "cache.encoding={name: topk, k: 8, dtype: float32}",
            "cache.rows_per_block=40",
            "train={epochs: 1, batch_size: 2}",
            f"students=[{{name: small, model: '{MODEL}', args: {{width: 8}}, loss: kl}}]",
            *overrides,
        )
        path = tmp_path / "pipeline.yaml"
        path.write_text(pipeline.as_yaml())
        return path

    return make


@pytest.fixture
def built(text: Callable[..., Path], tmp_path: Path) -> tuple[Path, str]:
    """The pipeline's file, and its cache."""
    file = text()
    run_json("cache-teacher", file)
    return file, str(tmp_path / "tiny.cache")


ROWS = sum(min(len(line), 32) - 1 + max(len(line) - 33, 0) for line in LINES)
"""One for each byte but the first, in samples of at most 32 bytes."""


def test_info_ls_and_plan_count_rows(built: tuple[Path, str], tmp_path: Path) -> None:
    file, cache = built
    [listed] = run_json("ls", tmp_path)["caches"]
    planned = run_json("plan", file)

    for found in (run_json("info", cache), listed):
        assert (6, ROWS, 2, 260) == tuple(found[key] for key in ("num_samples", "num_rows", "num_views", "num_classes"))
        assert found["bytes_per_sample"] == pytest.approx(found["bytes_per_row"] * ROWS / 6)
        assert logitcache.open(cache).manifest.identity.tokenization == found["tokenization"]
    assert re.search(r"tokenization: max length +│ 32 ", run("info", cache).stdout)
    assert (6, ROWS) == (planned["num_samples"], planned["rows_per_view"])
    shown = " ".join(run("plan", file, "--max-bytes", "500").stdout.split())
    assert "rows/s" in shown
    assert "(the lowest KL at T = 1 within 500 bytes per row; for other limits, see --max-kl, --max-bytes" in shown


def test_verify_finds_nothing_and_runs_the_teacher_again(built: tuple[Path, str]) -> None:
    """The second line has one token, and so no row."""
    file, cache = built

    assert run_json("verify", cache, "--deep", "--data", file, "--recompute", "12")["ok"]


def test_verify_names_rows_that_the_teacher_computes_otherwise(built: tuple[Path, str]) -> None:
    file, cache = built
    other = Path(cache).with_name("other.cache")
    opened = logitcache.open(cache)
    identity = opened.manifest.identity
    with logitcache.create(
        other,
        num_samples=6,
        num_classes=260,
        num_views=2,
        encoding=opened.encoding,
        teacher=identity.teacher,
        samples=opened.samples,
        view_plan=opened.view_plan,
        class_names=identity.class_names,
        rows_per_sample=np.diff(opened.row_offsets),
        tokenization=identity.tokenization,
        rows_per_block=40,
    ) as writer:
        for view in range(2):
            logits = opened.view(view).logits(range(ROWS)).clone()
            logits[20] = logits[20].flip(0)
            writer.write(view=view, start=0, logits=logits, input_digests=opened.input_digests(view))
    ended = run("verify", other, "--data", file, f"cache.path={other}", "--recompute", "12", "--json")

    problems = json.loads(ended.stdout)["problems"]
    assert (1, {"row 20"}) == (ended.returncode, {problem["path"] for problem in problems})
    assert {"other logits"} == {problem["kind"] for problem in problems}


@pytest.mark.parametrize("source", ["copy", "teacher"])
def test_a_damaged_block_is_repaired(built: tuple[Path, str], tmp_path: Path, source: str) -> None:
    file, cache = built
    digest = run_json("info", cache)["digest"]
    shutil.copytree(cache, tmp_path / "copy")
    chunk = next(path for path in Path(cache, "labels.zarr").rglob("c/1/1/*") if path.is_file())
    chunk.write_bytes(chunk.read_bytes()[:-1])

    ended = run("verify", cache, "--deep")
    assert (1, True) == (ended.returncode, "`logitcache repair CACHE --data PIPELINE` computes" in ended.stdout)
    repaired = run_json("repair", cache, *(["--from", tmp_path / "copy"] if source == "copy" else ["--data", file]))

    assert (True, digest) == (repaired["ok"], repaired["digest"])


def test_a_cache_is_pushed_and_a_part_of_its_views_pulled(built: tuple[Path, str], tmp_path: Path) -> None:
    _, cache = built
    run_json("push", cache, tmp_path / "shared")
    run_json("pull", tmp_path / "shared", tmp_path / "part", "--views", "1:2")
    part, whole = logitcache.open(tmp_path / "part"), logitcache.open(cache)

    assert [1] == list(part.views)
    assert part.row_offsets.tolist() == whole.row_offsets.tolist()
    assert torch.equal(whole.view(1).logits(range(ROWS)), part.view(1).logits(range(ROWS)))
    assert run_json("verify", tmp_path / "part", "--deep")["ok"]


def test_an_open_cache_is_completed_and_sealed(built: tuple[Path, str], text: Callable[..., Path]) -> None:
    """Blocks that are there are not computed again; `seal` refuses a cache without them."""
    file, cache = built
    digest = run_json("info", cache)["digest"]
    grown = text("views.count=3", "cache.path=" + cache)

    refused(run("seal", file.parent / "none"), 2, "none")
    summary = run_json("cache-teacher", grown)

    assert (summary["total_blocks"] - summary["total_blocks"] // 3 * 2, 3) == (
        summary["computed_blocks"],
        summary["num_views"],
    )
    assert summary["digest"] not in (None, digest)
    assert summary["digest"] == run_json("seal", cache)["digest"]


def test_the_card_is_about_tokens(built: tuple[Path, str]) -> None:
    card = (Path(built[1]) / "README.md").read_text()

    assert "task_categories:\n- text-generation\n" in card
    for line in (
        f"| rows per view | {ROWS} |",
        "| predicted tokens per sample | ",
        '  - `tokenizer`: `"tokenizer.json"`',
        "the stored classes have",
        "of the teacher's probability",
        "a perplexity of ",
        "- License: not stated",
        "The rows of sample `i` are `cache.row_map.sample_rows(i)`. The row at position `t` predicts token `t + 1`.",
    ):
        assert line in card
    assert [] == IMAGE_WORDS.findall(card)


def test_the_entropy_on_the_card_is_that_of_the_rows(built: tuple[Path, str]) -> None:
    card = (Path(built[1]) / "README.md").read_text()
    log_p = logitcache.open(built[1]).view(0).logits(range(ROWS)).log_softmax(dim=1)
    [found] = re.findall(r"is ([\d.]+) nats, a perplexity of", card)

    assert float(found) == pytest.approx(float(-(log_p.exp() * log_p).sum(dim=1).mean()), abs=6e-4)


def test_a_report_shows_rows_and_students_without_words_of_images(built: tuple[Path, str], tmp_path: Path) -> None:
    need_package("vl_convert", "report")
    need_package("captum", "report")
    file, cache = built
    run_json("train-student", file, "evaluation.teacher=live")
    written = run_json("report", cache, "--runs", tmp_path / "runs", "--data", file, "-o", tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    main = re.sub(r"<script.*?</script>|<style>.*?</style>", "", page, flags=re.DOTALL)
    [student] = written["students"]

    assert student["nll_mean"] > 0
    assert student["teacher_kl_mean"] > 0
    assert 0 <= student["agreement_mean"] <= 1
    for text in ("best student, test NLL", "rows per view", "test NLL, nats per row", "KL to the teacher, nats"):
        assert text in main
    for figure in ("NLL against size", "NLL against training time"):
        assert figure in main
    assert re.search(r"train\.txt:\d+\S*, position \d+", main)
    assert [] == IMAGE_WORDS.findall(re.sub(r"<[^>]*>", "", main))


def test_labels_are_exported_with_their_rows(built: tuple[Path, str], tmp_path: Path) -> None:
    need_package("pyarrow", "parquet")

    assert 2 * ROWS == run_json("export", built[1], "--to", "parquet", "-o", tmp_path / "table")["rows"]


def test_sequences_are_exported_with_the_tokens_of_the_pipeline(built: tuple[Path, str], tmp_path: Path) -> None:
    need_package("pyarrow", "parquet")
    file, cache = built
    whole = ("export", cache, "--to", "distillkit", "-o", tmp_path / "out", "--views", "1")
    refused(run(*whole), 2, "DistillKit stores token ids, which a cache lacks: add the cache's own dataset with --data")
    exported = run_json(*whole, "--data", file)
    classes = str(logitcache.open(cache).num_classes)
    again = ("import", "distillkit", tmp_path / "out", tmp_path / "b.cache", "--num-classes", classes)
    imported = run_json(*again, "--teacher", "net")

    assert ROWS == exported["rows"] == imported["num_rows"]
    first, second = (logitcache.open(path).samples for path in (cache, tmp_path / "b.cache"))
    assert first is not None
    assert second is not None
    assert first.contents is not None
    assert second.contents is not None
    has_rows = np.diff(logitcache.open(cache).row_offsets) > 0
    assert np.array_equal(first.contents[has_rows], second.contents)


def test_two_teachers_are_merged_and_other_rows_are_refused(
    built: tuple[Path, str], text: Callable[..., Path], tmp_path: Path
) -> None:
    _, first = built
    second, shorter, split = (str(tmp_path / name) for name in ("second.cache", "shorter.cache", "split.cache"))
    run_json("cache-teacher", text(f"cache.path={second}", "teacher.args={width: 24}", "cache.rows_per_block=64"))
    merged = run_json("merge", first, second, "--output", tmp_path / "mean.cache", "--mean", "probabilities")
    caches = [logitcache.open(path) for path in (first, second, tmp_path / "mean.cache")]
    for view in range(2):
        p, q, mean = (cache.view(view).logits(range(ROWS)).softmax(dim=1) for cache in caches)
        assert (mean - (p + q) / 2).abs().max() < 0.02  # of each, eight classes are stored

    assert (ROWS, 6) == (merged["num_rows"], merged["num_samples"])
    assert caches[0].row_offsets.tolist() == caches[2].row_offsets.tolist()
    assert run_json("verify", tmp_path / "mean.cache", "--deep")["ok"]
    again = run_json("merge", first, second, "--output", tmp_path / "mean.cache", "--mean", "probabilities")
    assert (0, merged["digest"]) == (again["computed_blocks"], again["digest"])

    run_json("cache-teacher", text(f"cache.path={shorter}", "teacher.args={width: 24}", "data.args.max_length=20"))
    ended = run("merge", first, shorter, "--output", tmp_path / "none.cache")
    refused(ended, 1, "not of the same views", "tokenization.max_length: 32", "rows (")
    flat = logitcache.open(first)
    with logitcache.create(
        split,
        num_samples=6,
        num_classes=260,
        num_views=2,
        teacher="other",
        samples=flat.samples,
        view_plan=flat.view_plan,
        tokenization=flat.manifest.identity.tokenization,
        rows_per_sample=[ROWS - 5, 1, 1, 1, 1, 1],
    ) as writer:
        for view in range(2):
            writer.write(view=view, start=0, logits=torch.zeros(ROWS, 260))
    refused(run("merge", first, split, "--output", tmp_path / "none.cache"), 1, "rows (")
    assert not (tmp_path / "none.cache").exists()


@pytest.mark.parametrize("combine", ["logits", "probabilities", "best"])
def test_students_learn_from_several_caches_of_texts(
    built: tuple[Path, str], text: Callable[..., Path], tmp_path: Path, combine: str
) -> None:
    second = tmp_path / "second.cache"
    run_json("cache-teacher", text(f"cache.path={second}", "teacher.args={width: 24}"))
    labels = f"{{caches: ['{built[1]}', '{second}'], combine: {combine}}}"
    [row] = run_json("train-student", text(f"students.small.labels={labels}"))["rows"]

    assert row["nll_mean"] > 0


def test_samples_are_weighted_by_the_teachers_mean_confidence(
    built: tuple[Path, str], text: Callable[..., Path], tmp_path: Path
) -> None:
    cache = logitcache.open(built[1])
    found = teacher_weights(cache, "teacher_confidence", range(2))
    p = torch.stack([cache.view(view).logits(range(ROWS)).softmax(dim=1) for view in range(2)]).mean(dim=0)
    expected = [float(p[start:stop].max(dim=1).values.mean()) for start, stop in pairwise(cache.row_offsets.tolist())]

    assert np.allclose(found, expected, equal_nan=True)
    assert 1 == np.isnan(found).sum()  # the sample without rows
    file = text("students.small.sample_weights=teacher_confidence")
    assert run_json("train-student", file)["rows"][0]["nll_mean"] > 0


def test_keys_give_samples_and_rows_are_refused_where_a_sample_has_several(built: tuple[Path, str]) -> None:
    cache = logitcache.open(built[1])
    key = cache.samples.key(2)  # type: ignore[union-attr]

    with pytest.raises(UsageError, match=r"samples have several rows.*cache.samples.rows\(keys\).*cache.row_offsets"):
        cache.rows([key])


def test_suspects_needs_one_row_per_sample(built: tuple[Path, str]) -> None:
    refused(run("suspects", built[1]), 2, "has several rows per sample")
