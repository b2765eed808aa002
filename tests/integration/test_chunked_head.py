"""Students whose head and loss are computed by chunks of rows: `train.chunked_head`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from logitcache.config.schema import Pipeline
from logitcache.data.loading import rendered_batches
from logitcache.errors import UsageError
from logitcache.stages.cache_teacher import cache_teacher
from logitcache.stages.train_student import Experiment, train_students
from logitcache.train.evaluation import LOGITS_AT_ONCE
from logitcache.train.loop import Run
from logitcache.train.runs import NullRunFolder
from tests.durability.test_ranks import torchrun
from tests.largest import largest_tensor
from tests.models import NextToken
from tests.needs import need_package

Make = Callable[..., Pipeline]

OWN = "model: 'tests.models:NextToken', args: {width: 8}"
LLAMA = """model: transformers, args: {config: {model_type: llama, hidden_size: 16, intermediate_size: 24,
    num_hidden_layers: 1, num_attention_heads: 2, max_position_embeddings: 32, tie_word_embeddings: true}}"""
LOSSES = {
    "kl": "{name: kl, temperature: 2.0}",
    "soft_cross_entropy": "soft_cross_entropy",
    "js": "js",
    "teacher_argmax": "teacher_argmax",
    "cross_entropy": "cross_entropy",
    "blend": "{name: blend, alpha: 0.3, temperature: 2.0}",
    "hard_plus_soft": "{name: hard_plus_soft, weight: {from: 1, to: 0.5}, hard: teacher_argmax}",
    "weighted": "{name: weighted, parts: [{loss: js, weight: 2}, {loss: cross_entropy, weight: 0.5}]}",
    "stages": "{stages: [{until: 0.5, loss: kl}, {loss: cross_entropy}]}",
}


@pytest.fixture
def sentences(tiny: Make) -> Make:
    """A teacher of random sequences, and a cache with a few classes per row."""

    def make(model: str, loss: str, *overrides: str) -> Pipeline:
        return tiny(
            "data={name: 'tests.texts:sentences', collate: pad}",
            "views={count: 1}",
            "teacher={model: 'tests.models:NextToken', weights: random, batch_size: 4}",
            "cache.encoding={name: topk, k: 5}",
            "cache.rows_per_block=256",
            "train={epochs: 2, batch_size: 5, lr: 0.05, optimizer: sgd}",
            f"students=[{{name: small, {model}, loss: {loss}}}]",
            *overrides,
        )

    return make


def trained(pipeline: Pipeline) -> tuple[list[float], dict[str, Tensor]]:
    """The losses in the log, and the last weights."""
    train_students(pipeline)
    folder = Path(pipeline.runs.path) / "small/seed-0"
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [line["train_loss"] for line in lines if "train_loss" in line]
    return losses, load_file(folder / "last.safetensors")


def check_same(pipeline: Pipeline, tmp_path: Path, chunk: str = "true") -> None:
    """Losses and weights are the same with the head in chunks and without, up to rounding."""
    cache_teacher(pipeline)
    expected = trained(pipeline)
    settings = pipeline.train.model_copy(update={"chunked_head": json.loads(chunk)})
    runs = pipeline.runs.model_copy(update={"path": str(tmp_path / "chunked")})
    found = trained(pipeline.model_copy(update={"train": settings, "runs": runs}))

    assert found[0] == pytest.approx(expected[0], rel=2e-5)
    assert expected[1].keys() == found[1].keys()
    for name, values in expected[1].items():
        torch.testing.assert_close(found[1][name], values, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("loss", LOSSES)
def test_a_student_is_the_same_up_to_rounding(sentences: Make, tmp_path: Path, loss: str) -> None:
    check_same(sentences(OWN, LOSSES[loss]), tmp_path)


@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param(["train.accumulate=2"], id="in parts"),
        pytest.param(["train.ema=0.5", "train.clip_norm=0.1"], id="averaged and clipped"),
        pytest.param(["students.small.labels=live"], id="live teacher"),
        pytest.param(["cache.encoding={name: dense, dtype: float32}"], id="dense"),
    ],
)
def test_it_works_with_other_features(sentences: Make, tmp_path: Path, overrides: list[str]) -> None:
    pipeline = sentences(OWN, LOSSES["blend"], *overrides)
    check_same(pipeline, tmp_path, chunk="3")


@pytest.mark.parametrize("collate", ["pad", "pack"])
def test_a_model_of_transformers_is_the_same_up_to_rounding(sentences: Make, tmp_path: Path, collate: str) -> None:
    need_package("transformers", "hf")
    check_same(
        sentences(LLAMA, LOSSES["blend"], f"data.collate={collate}", f"teacher={{{LLAMA}, weights: random}}"), tmp_path
    )


@pytest.mark.parametrize("override", ["train.compile=false", "train.compile=true"], ids=["eager", "compiled"])
def test_one_row_per_sample_and_weights_work_too(tiny: Make, tmp_path: Path, override: str) -> None:
    student = "{name: small, model: 'tests.models:Headed', loss: {name: kl}, sample_weights: teacher_agreement}"
    check_same(tiny(f"students=[{student}]", override), tmp_path, chunk="7")


def test_processes_that_train_together_give_the_same(sentences: Make, tmp_path: Path) -> None:
    pipeline = sentences(OWN, LOSSES["blend"], "train.chunked_head=true")
    cache_teacher(pipeline)
    expected = trained(pipeline)
    runs = pipeline.runs.model_copy(update={"path": str(tmp_path / "two")})
    pipeline = pipeline.model_copy(update={"runs": runs})

    ended = torchrun(2, pipeline, "train-student")

    assert 0 == ended.returncode, ended.stderr
    found = trained(pipeline)
    assert found[0] == pytest.approx(expected[0], rel=2e-5)
    for name, values in expected[1].items():
        torch.testing.assert_close(found[1][name], values, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        ("logit_mse", "loss 'logit_mse' can't be computed by chunks"),
        ("{name: kl, standardise: true}", "loss 'kl' can't be computed by chunks"),
        ("{name: cross_entropy, label_smoothing: {from: 0, to: 0.1}}", "loss 'cross_entropy' can't"),
        ("{stages: [{until: 0.5, loss: kl}, {loss: dist}]}", "loss 'dist' can't be computed by chunks"),
        ("{name: weighted, parts: [{loss: kl}, {loss: dist}]}", "loss 'dist' can't be computed by chunks"),
    ],
)
def test_a_loss_that_needs_all_logits_is_refused_before_training(sentences: Make, loss: str, message: str) -> None:
    pipeline = sentences(OWN, loss, "train.chunked_head=true")
    cache_teacher(pipeline)

    with pytest.raises(UsageError, match=message):
        train_students(pipeline)
    assert not Path(pipeline.runs.path).exists()


class NoHead(NextToken):
    """Its last layer has another name."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        self.last = self.head
        del self.head

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        hidden, _ = self.layer(self.embedding(input_ids))
        logits: Tensor = self.last(hidden)
        return logits


class Scaled(NextToken):
    """Changes its logits after the head."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return 2 * super().forward(input_ids)


@pytest.mark.parametrize(
    ("model", "message"),
    [("NoHead", "NoHead has no linear output layer"), ("Scaled", "Scaled changes the logits after its output layer")],
)
def test_a_model_without_a_head_is_refused_before_training(sentences: Make, model: str, message: str) -> None:
    pipeline = sentences(f"model: '{__name__}:{model}'", "kl", "train.chunked_head=true")
    cache_teacher(pipeline)

    with pytest.raises(UsageError, match=message):
        train_students(pipeline)
    assert not Path(pipeline.runs.path).exists()


def test_a_run_records_chunks_only_where_they_are_used(sentences: Make) -> None:
    """Runs of earlier versions resume."""
    without = sentences(OWN, "kl").train

    assert "chunked_head" not in without.identity(0)
    assert 3 == without.model_copy(update={"chunked_head": 3}).identity(0)["chunked_head"]


VOCABULARY, LENGTH = 151_936, 9
"""The vocabulary of Qwen 2."""


@pytest.mark.parametrize("loss", ["blend", "cross_entropy"])
@pytest.mark.parametrize("model", [OWN, LLAMA], ids=["own", "llama"])
def test_a_step_has_no_tensor_of_positions_and_classes(sentences: Make, model: str, loss: str) -> None:
    """Neither of the teacher nor of the student, forward or backward."""
    if model == LLAMA:
        need_package("transformers", "hf")
    pipeline = sentences(
        model,
        LOSSES[loss],
        f"data.args={{vocab_size: {VOCABULARY}, count: 4, length: {LENGTH}}}",
        "teacher.args={width: 4}",
        "cache.encoding.k=64",
        "train.batch_size=4",
        "train.epochs=1",
        "train.chunked_head=1",
    )
    cache_teacher(pipeline)
    width = 16 if model == LLAMA else 8

    assert largest_of_a_step(pipeline) == VOCABULARY * width
    assert largest_of_a_step(pipeline, chunked_head=False) >= VOCABULARY * 4 * LENGTH


def largest_of_a_step(pipeline: Pipeline, **changes: Any) -> int:
    train = pipeline.train.model_copy(update=changes)
    job = Experiment(pipeline.model_copy(update={"train": train})).job(pipeline.students[0], 0)
    run = Run(job, NullRunFolder())
    batch = next(iter(rendered_batches(job.views, run.places(), num_workers=0)))
    run.begin_epoch()
    return largest_tensor(lambda: run.train_step(*batch))


def test_an_evaluation_has_few_sequences_of_a_large_vocabulary_at_once(sentences: Make) -> None:
    data = f"data.args={{vocab_size: {VOCABULARY}, count: 4, length: 250}}"
    pipeline = sentences(OWN, "cross_entropy", data)
    job = Experiment(pipeline).job(pipeline.students[0], 0)
    assert job.test is not None

    lengths = job.test._views.dataset.lengths  # type: ignore[attr-defined]
    batches = [[lengths[index] for _, index in places] for places in job.test._places]
    assert 1 == len(batches[0])
    assert all(len(batch) == 1 or len(batch) * max(batch) * VOCABULARY <= LOGITS_AT_ONCE for batch in batches)
