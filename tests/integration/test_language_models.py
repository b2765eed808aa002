"""Language models through the pipeline: a teacher's distributions over next tokens, cached, and students trained on them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import logitcache
from logitcache.cache.layout import Block
from logitcache.cache.summary import summarise
from logitcache.config.build import build_context, build_runner, resolve_data, resolve_plan, resolve_teacher
from logitcache.config.schema import Pipeline
from logitcache.data.index import split_index
from logitcache.data.rows import rows_of_dataset
from logitcache.data.views import ViewDataset
from logitcache.errors import IdentityMismatch, LogitCacheError
from logitcache.stages.cache_teacher import cache_teacher, teacher_batches
from logitcache.stages.dry_run import plan_run
from logitcache.stages.train_student import Experiment, train_students
from logitcache.train import evaluation as evaluation_module
from logitcache.train.evaluation import Evaluation
from logitcache.train.labels import Labels
from logitcache.train.loop import train
from logitcache.train.optimizer import OptimizerStep
from logitcache.train.runs import RESULT
from logitcache.verify.audit import verify
from tests.integration.test_stages import log, same, weights
from tests.largest import largest_tensor
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


def measured_one_by_one(pipeline: Pipeline, weights: Path) -> tuple[float, float]:
    """KL(teacher ‖ student) per held-out row, and how often both have the same most probable token."""
    data = resolve_data(pipeline, trust=False)
    plan = resolve_plan(pipeline, data, trust=False)
    teacher, _ = resolve_teacher(pipeline, data, plan, trust=False)
    student = NextToken(data.num_classes, width=8).eval()
    student.load_state_dict(load_file(weights))
    assert data.test is not None
    rows = []
    for index in range(len(data.test)):
        inputs, targets = data.test[index]
        with torch.inference_mode():
            both = [model(inputs["input_ids"][None])[0, : len(targets)] for model in (teacher, student)]
        rows.append(torch.stack(both))
    p_RC, q_RC = torch.cat(rows, dim=1).log_softmax(dim=2)
    kl = (p_RC.exp() * (p_RC - q_RC)).sum(dim=1).mean()
    return float(kl), float((p_RC.argmax(dim=1) == q_RC.argmax(dim=1)).float().mean())


def held_out_cache(text: Make, tmp_path: Path, *overrides: str) -> str:
    """A cache of the test split, made as the guide describes."""
    path = str(tmp_path / "test.cache")
    cache_teacher(text(f"data.root={tmp_path / 'text/test.txt'}", f"cache.path={path}", *overrides))
    return path


@pytest.mark.parametrize("source", ["live", "a cache", "a live student"])
def test_students_are_compared_with_the_teacher_on_held_out_text(text: Make, tmp_path: Path, source: str) -> None:
    live = f"students=[{{name: small, model: '{MODEL}', args: {{width: 8}}, loss: kl, labels: live}}]"
    overrides = {
        "live": ["evaluation.teacher=live"],
        "a cache": [f"evaluation.teacher={held_out_cache(text, tmp_path)}", "cache.memory_budget_mb=0.001"],
        "a live student": [live],
    }
    pipeline = text(*overrides[source])
    cache_teacher(pipeline)
    [row] = train_students(pipeline)
    folder = Path(pipeline.runs.path) / "small/seed-0"
    result = json.loads((folder / RESULT).read_text())

    kl, agreement = measured_one_by_one(pipeline, folder / "last.safetensors")
    assert kl > 0
    assert (row.teacher_kl_mean, row.teacher_agreement_mean) == (result["teacher_kl"], result["teacher_agreement"])
    assert row.teacher_kl_mean == pytest.approx(kl, rel=1e-3)
    assert row.teacher_agreement_mean == pytest.approx(agreement)


def test_without_a_live_teacher_students_are_not_compared(text: Make) -> None:
    pipeline = text()
    cache_teacher(pipeline)

    [row] = train_students(pipeline)

    assert (None, None) == (row.teacher_kl_mean, row.teacher_agreement_mean)


def test_a_cache_of_other_held_out_text_is_refused_before_training(text: Make, tmp_path: Path) -> None:
    path = held_out_cache(text, tmp_path)
    pipeline = text(f"evaluation.teacher={path}")
    cache_teacher(pipeline)
    (tmp_path / "text/test.txt").write_text("\n".join([TEST[0], "One mare."]))

    with pytest.raises(IdentityMismatch, match=r"a cache of the test split: .* from other sequences.*has other tokens"):
        train_students(pipeline)


def test_the_size_of_an_evaluation_batch_changes_nothing(text: Make, tmp_path: Path) -> None:
    """Batches hold sequences of similar length; results don't depend on them, up to rounding."""
    (tmp_path / "text/test.txt").write_text("\n".join(TRAIN))
    pipeline = text("evaluation.teacher=live")
    cache_teacher(pipeline)
    job = Experiment(pipeline).job(pipeline.students[0], 0)
    assert job.test is not None
    found = []
    for batch_size in (1, 3, 256):
        evaluation = Evaluation(job.test._views, batch_size=batch_size, num_workers=0, labels=job.test._labels)
        found.append(evaluation.measure(job.model, torch.device("cpu")))
    dataset: Any = job.test._views.dataset
    batches = Evaluation(job.test._views, batch_size=3, num_workers=0)._places
    lengths = [int(dataset.lengths[index]) for batch in batches for _, index in batch]

    assert found[0] == pytest.approx(found[1], rel=1e-5)
    assert found[0] == pytest.approx(found[2], rel=1e-5)
    assert sorted(lengths, reverse=True) == lengths


def test_an_evaluation_makes_no_tensor_of_all_rows_and_classes(text: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither of the student nor of the teacher: what a batch may hold is bounded."""
    pipeline = text("evaluation.teacher=live")
    cache_teacher(pipeline)

    assert largest_of_an_evaluation(pipeline) >= 2 * 27 * 260
    monkeypatch.setattr(evaluation_module, "LOGITS_AT_ONCE", 2 * 32 * 260)
    assert largest_of_an_evaluation(pipeline) <= 32 * 260


def largest_of_an_evaluation(pipeline: Pipeline) -> int:
    job = Experiment(pipeline).job(pipeline.students[0], 0)
    evaluation = job.test
    assert evaluation is not None
    return largest_tensor(lambda: evaluation.measure(job.model, torch.device("cpu")))


MASKED = [
    "views={count: 2, transform: [{token_masking: {p: 0.3, mask_id: 3}}]}",
    "evaluation.teacher=live",
]


@pytest.fixture
def masked(text: Make, tmp_path: Path) -> Make:
    """The pipeline of a masked model, whose views mask other tokens."""
    args = f"data.args={{tokenizer: {tmp_path / 'tokenizer.json'}, max_length: 32, task: masked}}"
    return lambda *overrides: text(args, *MASKED, *overrides)


def test_each_view_of_a_masked_model_is_cached_under_its_own_mask(masked: Make) -> None:
    pipeline = masked("teacher.batch_size=1")
    cache_teacher(pipeline)
    cache = logitcache.open(pipeline.cache.path)
    data = resolve_data(pipeline, trust=False)
    plan = resolve_plan(pipeline, data, trust=False)
    teacher, _ = resolve_teacher(pipeline, data, plan, trust=False)
    views = ViewDataset(data.train, plan)
    sample = int(np.argmax(data.train.lengths))
    inputs = [views[(view, sample)][1]["input_ids"] for view in range(2)]
    rows = cache.row_map.sample_rows(sample)

    assert not torch.equal(*inputs)
    for view, ids in enumerate(inputs):
        with torch.inference_mode():
            torch.testing.assert_close(cache.view(view).logits(rows), teacher(ids[None])[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("chunked", ["false", "true"])
def test_true_tokens_of_a_masked_model_count_where_the_view_masks_them(masked: Make, chunked: str) -> None:
    """In training by the mean over the selected tokens, and in the evaluation."""
    pipeline = masked(
        "train={epochs: 2, batch_size: 64, lr: 1.0e-9}",
        f"train.chunked_head={chunked}",
        "students.small.loss=cross_entropy",
    )
    cache_teacher(pipeline)
    [row] = train_students(pipeline)
    job = Experiment(pipeline).job(pipeline.students[0], 0)
    assert job.test is not None

    for epoch, line in enumerate(json.loads(line)["train_loss"] for line in losses(pipeline, "small")):
        assert line == pytest.approx(nll_of_masked(job.model, job.views, epoch), rel=1e-4)
    assert row.nll_mean == pytest.approx(nll_of_masked(job.model, job.test._views, 0), rel=1e-4)
    assert row.teacher_kl_mean is not None
    assert row.bits_per_byte_mean is None  # the rows predict a part of the text


def nll_of_masked(model: Any, views: ViewDataset, view: int) -> float:
    """The mean negative log-likelihood of the tokens that a view selects, one sequence at a time."""
    nll, count = 0.0, 0
    for sample in range(len(views)):
        _, inputs, targets = views[(view, sample)]
        with torch.inference_mode():
            log_p = model.eval()(inputs["input_ids"][None])[0].log_softmax(dim=1)
        selected = torch.nonzero(targets != -100).flatten()
        nll -= float(log_p[selected, targets[selected]].sum())
        count += len(selected)
    assert count < sum(int(length) for length in views.dataset.lengths)  # type: ignore[attr-defined]
    return nll / count


def test_a_masked_student_of_the_cache_is_that_of_the_live_teacher(masked: Make) -> None:
    common = f"model: '{MODEL}', args: {{width: 8}}, loss: {{name: hard_plus_soft, weight: 0.5}}"
    students = f"students=[{{name: small, {common}}}, {{name: live, {common}, labels: live}}]"
    pipeline = masked(students, "teacher.batch_size=1", "train.batch_size=1")
    cache_teacher(pipeline)

    cached, of_teacher = train_students(pipeline)

    assert losses(pipeline, "small") == losses(pipeline, "live")
    assert (cached.nll_mean, cached.teacher_kl_mean) == (of_teacher.nll_mean, of_teacher.teacher_kl_mean)


def test_a_student_may_have_the_first_classes_of_a_padded_head_only(text: Make) -> None:
    """The teacher's head has 264 classes, the tokenizer 260."""
    args = ["data.args.vocab_size=264", "cache.encoding={name: topk, k: 8}"]
    pipeline = text(*args, "students.small.vocab_size=260")
    cache_teacher(pipeline)
    train_students(pipeline)
    weights = load_file(Path(pipeline.runs.path) / "small/seed-0/last.safetensors")

    cache = logitcache.open(pipeline.cache.path)
    p_RC = cache.view(0).logits(range(cache.num_rows)).softmax(dim=1)
    cut = json.loads((Path(pipeline.runs.path) / "small/seed-0/cut_classes.json").read_text())

    assert (264, 260) == (cache.num_classes, len(weights["head.weight"]))
    assert (4, cache.num_rows) == (cut["classes"], cut["rows"])
    assert cut["mass_mean"] == pytest.approx(float(p_RC[:, 260:].sum(dim=1).mean()), rel=1e-4)
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
    "another tokenizer": (
        lambda path: byte_tokenizer(path / "tokenizer.json", special_tokens=True),
        r"tokenization\.sha256 \(the tokenizer\)",
    ),
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


def test_another_truncation_is_the_first_difference_when_stage_1_runs_again(text: Make) -> None:
    cache_teacher(text())

    with pytest.raises(IdentityMismatch, match=r"First difference: tokenization.max_length: 32 in the cache, 31 here"):
        cache_teacher(text("data.args.max_length=31"))


def test_a_missing_package_is_no_missing_data(text: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def without(name: str) -> Any:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr("logitcache.catalog.tokenization.importlib.import_module", without)
    checked = plan_run(text())

    assert [] == checked.missing_data
    assert any("tokenizers can't be imported" in line for line in checked.missing)


def test_a_misspelt_teacher_is_unknown_before_its_weights_are_missing(text: Make) -> None:
    with pytest.raises(LogitCacheError, match="unknown model 'transformer'; did you mean 'transformers'"):
        cache_teacher(text("teacher={model: transformer}"))


def test_a_student_of_another_teachers_cache_is_pointed_to_its_labels(text: Make, tmp_path: Path) -> None:
    cache_teacher(text())

    with pytest.raises(IdentityMismatch, match=r"(?s)teacher: .*name the cache in `students\[\].labels`"):
        train_students(text("teacher.args={width: 4}"))


def test_a_cache_with_a_row_for_each_token_is_refused(text: Make, tmp_path: Path) -> None:
    """The last token of a causal sequence predicts nothing: L tokens have L - 1 rows."""
    pipeline = text(f"students.small.labels={{caches: ['{tmp_path / 'own.cache'}']}}")
    data = resolve_data(pipeline, trust=False)
    lengths = np.diff(rows_of_dataset(data.train).offsets) + 1
    with logitcache.create(
        tmp_path / "own.cache",
        num_samples=len(data.train),
        num_classes=data.num_classes,
        teacher="own",
        samples=logitcache.sample_table(data.train, contents=True),
        view_plan=resolve_plan(pipeline, data, trust=False),
        rows_per_sample=lengths,
        tokenization=data.train.tokenization,
    ) as writer:
        writer.write(view=0, start=0, logits=torch.zeros(int(lengths.sum()), data.num_classes))

    with pytest.raises(IdentityMismatch, match=r"sample 0 .* has 32 rows, 31 here"):
        train_students(pipeline)


def test_a_cache_written_by_hand_serves_the_same_students(text: Make, tmp_path: Path) -> None:
    """`create` with rows_per_sample, by a loop of one's own over the pipeline's teacher."""
    own = tmp_path / "own.cache"
    common = f"model: '{MODEL}', args: {{width: 8}}, loss: {{name: kl, temperature: 2.0}}"
    students = f"students=[{{name: small, {common}}}, {{name: own, {common}, labels: {{caches: ['{own}']}}}}]"
    pipeline = text(students, "teacher.batch_size=1")
    cache_teacher(pipeline)
    data = resolve_data(pipeline, trust=False)
    plan = resolve_plan(pipeline, data, trust=False)
    teacher, _ = resolve_teacher(pipeline, data, plan, trust=False)
    with logitcache.create(
        own,
        num_samples=len(data.train),
        num_classes=data.num_classes,
        encoding=logitcache.Dense(dtype="float32"),
        teacher="own",
        samples=logitcache.sample_table(data.train, contents=True),
        view_plan=plan,
        rows_per_sample=data.train.rows_per_sample,
        tokenization=data.train.tokenization,
    ) as writer:
        for index in range(len(data.train)):
            inputs, targets = data.train[index]
            with torch.inference_mode():
                logits = teacher(inputs["input_ids"][None])[0, : len(targets)]
            writer.write(view=0, start=writer.row_map.sample_rows(index).start, logits=logits)

    train_students(pipeline)

    assert losses(pipeline, "small") == losses(pipeline, "own")
    assert same(*(weights(Path(pipeline.runs.path) / name / "seed-0") for name in ("small", "own")))


EVERYTHING = [
    "data.validation=0.25",
    "train={epochs: 4, batch_size: 2, optimizer: sgd, lr: 0.3, accumulate: 2, clip_norm: 0.5, ema: 0.9, "
    "early_stopping: 3, checkpoint_steps: 1}",
]


@pytest.mark.parametrize("at", [1, 3, 6])
def test_a_student_of_sequences_that_is_interrupted_ends_with_the_same_weights(
    text: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    cache_teacher(text(*EVERYTHING))
    train_students(text(*EVERYTHING))
    pipeline = text(*EVERYTHING, f"runs.path={tmp_path / 'interrupted'}")
    apply = OptimizerStep.apply

    def interrupted(updates: OptimizerStep, step: int) -> None:
        if step == at:
            raise KeyboardInterrupt
        apply(updates, step)

    with monkeypatch.context() as patched:
        patched.setattr(OptimizerStep, "apply", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train_students(pipeline)
    train_students(pipeline)

    whole, pieces = tmp_path / "runs/small/seed-0", tmp_path / "interrupted/small/seed-0"
    assert log(whole) == log(pieces)
    for name in ("last", "best"):
        assert same(weights(whole, name), weights(pieces, name))


def test_students_of_sequences_stop_early_by_their_nll(text: Make) -> None:
    """Not by their accuracy, which is best in another epoch."""
    settings = "train={epochs: 40, batch_size: 2, lr: 0.1, schedule: constant, early_stopping: 3}"
    pipeline = text("data.validation=0.25", settings, "students.small.loss=cross_entropy")
    train_students(pipeline)
    folder = Path(pipeline.runs.path) / "small/seed-0"
    epochs = [line for line in log(folder) if "epoch" in line]
    nll = [line["validation_nll"] for line in epochs]
    best = int(np.argmin(nll))
    result = json.loads((folder / RESULT).read_text())

    assert best + 4 == len(nll) == result["epochs"] < 40
    assert ("best", nll[best]) == (result["measured"], result["validation_nll"])
    assert best != int(np.argmax([line["validation_accuracy"] for line in epochs]))


def test_trackers_get_the_metrics_of_students_of_sequences(
    text: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRACKED", str(tmp_path / "tracked.jsonl"))
    pipeline = text("data.validation=0.25", "runs.tracker=tests.models:file_tracker")
    cache_teacher(pipeline)
    train_students(pipeline)
    tracked = [json.loads(line) for line in (tmp_path / "tracked.jsonl").read_text().splitlines()]

    assert {"name": "small", "seed": 0} == tracked[0]
    without_time = [{name: value for name, value in line.items() if name != "epoch_seconds"} for line in tracked[1:-1]]
    assert log(Path(pipeline.runs.path) / "small/seed-0") == without_time
    assert any("validation_nll" in line for line in tracked)
    assert {"finished": True} == tracked[-1]


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


def test_the_guides_cache_of_a_serving_engine_serves_a_pipelines_students(text: Make, tmp_path: Path) -> None:
    served = str(tmp_path / "served.cache")
    guide = (Path(__file__).parents[2] / "docs/text.md").read_text()
    [program] = re.findall(r"^```\n(train = logitcache\.pipeline_data.*?)^```", guide, flags=re.MULTILINE | re.DOTALL)
    pipeline = text(f"students.small.labels={{caches: ['{served}']}}")
    names: dict[str, Any] = {"logitcache": logitcache, "pipeline": pipeline}
    exec(program.replace('"pipeline.yaml"', "pipeline").replace('"served.cache"', repr(served)), names)
    torch.manual_seed(0)
    with names["writer"] as writer:
        for sample, ids in enumerate(names["prompts"]):
            if len(ids) > 1:
                log_probs, classes = torch.randn(len(ids) - 1, 99).log_softmax(dim=1).topk(21)
                start = writer.row_map.sample_rows(sample).start
                writer.write_sparse(view=0, start=start, ids=classes, log_probs=log_probs)

    [row] = train_students(pipeline)

    assert row.nll_mean is not None
    assert "my-corpus" == summarise(served).names.dataset


def test_the_guides_head_in_chunks_has_the_loss_of_all_logits() -> None:
    need_package("transformers", "hf")
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    student = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=30, **sizes))
    guide = (Path(__file__).parents[2] / "docs/text.md").read_text()
    [program] = re.findall(r"^```\n(from logitcache.*?without_head.*?)^```", guide, flags=re.MULTILINE | re.DOTALL)
    targets = logitcache.SparseTargets(
        torch.tensor([[3], [4], [5]]), torch.full((3, 1), -0.5), torch.full((3,), -1.0), num_classes=30
    )
    ids, has_row = torch.tensor([[1, 2, 3, 4]]), torch.tensor([[True, True, True, False]])
    names = {"student": student, "ids": ids, "has_row": has_row, "targets": targets, "logitcache": logitcache}
    exec(program, names)
    of_all = logitcache.losses.kl_divergence(student(ids).logits[has_row], targets, temperature=2.0, reduction="mean")

    torch.testing.assert_close(of_all, names["loss"])
    assert student.lm_head.weight.grad is not None


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
