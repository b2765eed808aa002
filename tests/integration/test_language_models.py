"""Language models through the pipeline: a teacher's distributions over next tokens, cached, and students trained on them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import logitcache
from logitcache.cache.layout import Block
from logitcache.config.build import build_context, build_runner, resolve_data, resolve_plan, resolve_teacher
from logitcache.config.schema import Pipeline
from logitcache.data.index import split_index
from logitcache.data.rows import rows_of_dataset
from logitcache.data.views import ViewDataset
from logitcache.errors import IdentityMismatch, LogitCacheError
from logitcache.stages.cache_teacher import cache_teacher, teacher_batches
from logitcache.stages.train_student import Experiment, train_students
from logitcache.train.labels import Labels
from logitcache.train.loop import train
from logitcache.train.runs import RESULT
from logitcache.verify.audit import verify
from tests.models import NextToken
from tests.needs import need_package
from tests.texts import byte_tokenizer

Make = Callable[..., Pipeline]

TRAIN = [
    "The cache holds one row for each token.",
    "Short.",
    "A block holds whole samples, as many as fit.",
    "I",
    "Labels must match the text that the teacher saw, token by token.",
    "Rows have numbers without gaps.",
    "A longer line follows here, which is cut into several parts because it has more bytes than one sample may have.",
    "The end.",
]
TEST = ["Another text of some length.", "One more."]
MODEL = "tests.models:NextToken"


@pytest.fixture
def text(tiny: Make, tmp_path: Path) -> Make:
    """The tiny pipeline over the lines of a text, as bytes."""
    need_package("tokenizers", "hf")
    (tmp_path / "text").mkdir()
    (tmp_path / "text/train.txt").write_text("\n".join(TRAIN))
    (tmp_path / "text/test.txt").write_text("\n".join(TEST))
    byte_tokenizer(tmp_path / "tokenizer.json")

    def make(*overrides: str) -> Pipeline:
        return tiny(
            "data.name=text",
            f"data.root={tmp_path / 'text'}",
            f"data.args={{tokenizer: {tmp_path / 'tokenizer.json'}, max_length: 32}}",
            "data.collate=pad",
            "data.validation=0",
            "views={count: 1}",
            f"teacher={{model: '{MODEL}', weights: random, batch_size: 4}}",
            "cache.rows_per_block=64",
            "train={epochs: 2, batch_size: 4, lr: 0.01}",
            f"students=[{{name: small, model: '{MODEL}', args: {{width: 8}}, loss: {{name: kl, temperature: 2.0}}}}]",
            *overrides,
        )

    return make


def losses(pipeline: Pipeline, name: str) -> list[str]:
    folder = Path(pipeline.runs.path) / name / "seed-0"
    return [line for line in (folder / "metrics.jsonl").read_text().splitlines() if "train_loss" in line]


def test_each_row_is_the_teachers_distribution_of_the_next_token(text: Make) -> None:
    pipeline = text()
    result = cache_teacher(pipeline)
    cache = logitcache.open(pipeline.cache.path)
    data = resolve_data(pipeline, trust=False)
    teacher, _ = resolve_teacher(pipeline, data, resolve_plan(pipeline, data, trust=False), trust=False)
    expected = []
    for index in range(len(data.train)):
        inputs, targets = data.train[index]
        with torch.inference_mode():
            expected.append(teacher(inputs["input_ids"][None])[0, : len(targets)])
    rows = torch.cat(expected)

    assert result.total_blocks > 2
    assert [] == verify(pipeline.cache.path, deep=True)
    assert len(rows) == cache.num_rows == int(np.sum([len(data.train[index][1]) for index in range(len(data.train))]))
    assert torch.allclose(rows, cache.view(0).logits(range(cache.num_rows)), atol=1e-5)


def test_a_student_of_the_cache_is_the_student_of_the_live_teacher_bit_for_bit(text: Make) -> None:
    """One sequence at a time: other shapes of a matrix product may round its last bit differently."""
    common = f"model: '{MODEL}', args: {{width: 8}}, loss: {{name: kl, temperature: 2.0}}"
    students = f"students=[{{name: small, {common}}}, {{name: live, {common}, labels: live}}]"
    pipeline = text(students, "teacher.batch_size=1", "train.batch_size=1")
    cache_teacher(pipeline)

    cached, of_teacher = train_students(pipeline)

    assert losses(pipeline, "small") == losses(pipeline, "live")
    runs = Path(pipeline.runs.path)
    of_cache, of_live = (load_file(runs / name / "seed-0/last.safetensors") for name in ("small", "live"))
    assert all(torch.equal(weights, of_live[name]) for name, weights in of_cache.items())
    assert (cached.nll_mean, cached.accuracy_mean) == (of_teacher.nll_mean, of_teacher.accuracy_mean)


class LiveOnTheCachesBatches(Labels):
    """The teacher, run now on the batches that it had in stage 1: others may round a last bit differently."""

    def __init__(self, pipeline: Pipeline) -> None:
        data = resolve_data(pipeline, trust=False)
        plan = resolve_plan(pipeline, data, trust=False)
        teacher, _ = resolve_teacher(pipeline, data, plan, trust=False)
        runner = build_runner(pipeline, teacher, build_context(pipeline, trust=False))
        rows = plan.rows
        assert rows is not None
        self.logits_RC = torch.empty(rows.num_rows, data.num_classes)
        blocks = [Block(0, number) for number in range(rows.blocks_per_view)]
        batches = [list(samples) for _, samples in teacher_batches(rows, blocks, pipeline.teacher.batch_size)]
        views = ViewDataset(data.train, plan)
        outputs = runner.run(views, ([(0, sample) for sample in samples] for samples in batches))
        for samples, output in zip(batches, outputs, strict=True):
            numbers = [row for sample in samples for row in rows.sample_rows(sample)]
            self.logits_RC[numbers] = output.logits

    def outputs(self, names: Any, index: torch.Tensor, teacher_inputs: Any, targets: Any) -> dict[str, torch.Tensor]:
        return {"logits": self.logits_RC[split_index(index[index >= 0])[1]]}


def test_in_batches_too_a_student_of_the_cache_is_that_of_the_live_teacher(text: Make, tmp_path: Path) -> None:
    pipeline = text("train.batch_size=3")
    cache_teacher(pipeline)
    train_students(pipeline)
    experiment = Experiment(text("train.batch_size=3", f"runs.path={tmp_path / 'live'}"))
    train(experiment.job(experiment.pipeline.students[0], 0, labels=LiveOnTheCachesBatches(pipeline)))

    of_cache, of_live = (
        load_file(folder / "small/seed-0/last.safetensors") for folder in (Path(pipeline.runs.path), tmp_path / "live")
    )
    assert all(torch.equal(weights, of_live[name]) for name, weights in of_cache.items())


def test_workers_change_nothing(text: Make, tmp_path: Path) -> None:
    pipeline = text()
    cache_teacher(pipeline)
    [alone] = train_students(pipeline)
    other = text("num_workers=2", f"runs.path={tmp_path / 'other'}")

    [again] = train_students(other)

    assert losses(pipeline, "small") == losses(other, "small")
    assert alone.nll_mean == again.nll_mean


def test_the_loss_of_a_batch_is_the_mean_over_its_rows(text: Make) -> None:
    """Long sequences count for more: not a mean of means."""
    pipeline = text("train.batch_size=64", "train.epochs=1", "students.small.loss=cross_entropy")
    cache_teacher(pipeline)
    train_students(pipeline)
    experiment = Experiment(pipeline)
    job = experiment.job(pipeline.students[0], 0)
    model = job.model.eval()
    nll, rows = 0.0, 0
    for index in range(len(experiment.data.train)):
        inputs, targets = experiment.data.train[index]
        with torch.inference_mode():
            logits = model(inputs["input_ids"][None])[0, : len(targets)]
        nll += float(torch.nn.functional.cross_entropy(logits, targets, reduction="sum"))
        rows += len(targets)

    found = json.loads(losses(pipeline, "small")[0])["train_loss"]
    assert found == pytest.approx(nll / rows, rel=1e-5)


def test_students_are_measured_by_nll(text: Make) -> None:
    pipeline = text()
    cache_teacher(pipeline)
    [row] = train_students(pipeline)
    result = json.loads((Path(pipeline.runs.path) / "small/seed-0" / RESULT).read_text())

    assert {"nll", "perplexity", "accuracy"} <= result.keys()
    assert row.nll_mean == result["nll"] == pytest.approx(np.log(result["perplexity"]))


def test_a_student_may_have_the_first_classes_of_a_padded_head_only(text: Make) -> None:
    """The teacher's head has 264 classes, the tokenizer 260."""
    args = ["data.args.vocab_size=264", "cache.encoding={name: topk, k: 8}"]
    pipeline = text(*args, "students.small.vocab_size=260")
    cache_teacher(pipeline)
    train_students(pipeline)
    weights = load_file(Path(pipeline.runs.path) / "small/seed-0/last.safetensors")

    assert (264, 260) == (logitcache.open(pipeline.cache.path).num_classes, len(weights["head.weight"]))
    with pytest.raises(LogitCacheError, match="vocab_size is 300; expected at most the 264 classes"):
        train_students(text(*args, "students.small.vocab_size=300"))


def changed(tmp_path: Path, line: int, text: str | None) -> None:
    lines = list(TRAIN)
    if text is None:
        del lines[line]
    else:
        lines[line] = text
    (tmp_path / "text/train.txt").write_text("\n".join(lines))


DIFFERENCES: dict[str, tuple[Any, str]] = {
    "one token": (lambda path: changed(path, 1, "Shore."), r"sample 2 .* has other tokens"),
    "a sample is missing": (lambda path: changed(path, 7, None), "samples"),
    "one token less": (lambda path: changed(path, 1, "Short"), r"sample 2 .* has 5 rows, 4 here"),
    "another tokenizer": (lambda path: byte_tokenizer(path / "tokenizer.json", special_tokens=True), "tokenization."),
}


@pytest.mark.parametrize(("change", "message"), DIFFERENCES.values(), ids=DIFFERENCES)
def test_a_cache_of_other_text_is_refused_before_the_first_step(
    text: Make, tmp_path: Path, change: Callable[[Path], object], message: str
) -> None:
    pipeline = text()
    cache_teacher(pipeline)
    change(tmp_path)

    with pytest.raises(IdentityMismatch, match=message):
        train_students(pipeline)


@pytest.mark.parametrize(
    ("override", "field"),
    [
        ("data.args.max_length=31", "tokenization.max_length"),
        ("data.args.vocab_size=261", "outputs.logits"),
    ],
)
def test_another_truncation_or_vocabulary_is_refused_by_name(text: Make, override: str, field: str) -> None:
    cache_teacher(text())

    with pytest.raises(LogitCacheError, match=field):
        train_students(text(override))


def test_a_cache_written_by_hand_serves_the_same_students(text: Make, tmp_path: Path) -> None:
    """`create` with rows_per_sample, as a serving engine's records are written."""
    pipeline = text()
    data = resolve_data(pipeline, trust=False)
    rows = rows_of_dataset(data.train)
    torch.manual_seed(0)
    model = NextToken(data.num_classes)
    with logitcache.create(
        tmp_path / "own.cache",
        num_samples=rows.num_samples,
        num_classes=data.num_classes,
        teacher="own",
        dataset="text",
        rows_per_sample=data.train.rows_per_sample,
    ) as writer:
        for index in range(len(data.train)):
            inputs, targets = data.train[index]
            with torch.inference_mode():
                logits = model(inputs["input_ids"][None])[0, : len(targets)]
            writer.write(view=0, start=rows.sample_rows(index).start, logits=logits)

    assert rows.offsets.tolist() == logitcache.open(tmp_path / "own.cache").row_offsets.tolist()


def test_students_of_a_serving_engines_cache_need_no_cache_of_the_pipelines_teacher(text: Make, tmp_path: Path) -> None:
    engine = tmp_path / "engine.cache"
    pipeline = text(f"students.small.labels={{caches: ['{engine}']}}", "train.chunked_head=true")
    data = resolve_data(pipeline, trust=False)
    torch.manual_seed(0)
    model = NextToken(data.num_classes)
    with (
        logitcache.create(
            engine,
            num_samples=len(data.train),
            num_classes=data.num_classes,
            encoding=logitcache.TopK(k=4),
            teacher="engine@1",
            samples=logitcache.sample_table(data.train, contents=True),
            view_plan=resolve_plan(pipeline, data, trust=False),
            rows_per_sample=data.train.rows_per_sample,
            row_positions=data.train.row_positions,
            tokenization=data.train.tokenization,
        ) as writer,
        torch.inference_mode(),
    ):
        for index in range(len(data.train)):
            inputs, targets = data.train[index]
            if len(targets):
                log_probs, ids = model(inputs["input_ids"][None])[0, : len(targets)].log_softmax(dim=1).topk(4)
                start = writer.row_map.sample_rows(index).start
                writer.write_sparse(view=0, start=start, ids=ids, log_probs=log_probs)

    [row] = train_students(pipeline)

    assert not Path(pipeline.cache.path).exists()
    assert row.nll_mean is not None
    assert 2 == len(losses(pipeline, "small"))


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
