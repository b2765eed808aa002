"""Text and Hugging Face models through the pipeline: mappings as inputs, padded batches, outputs with `.logits`."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

import logitcache
from logitcache.catalog.calling import call_model, logits_of
from logitcache.config.build import resolve_data, resolve_plan, resolve_teacher
from logitcache.config.schema import Pipeline
from logitcache.data.batching import collate, pad, stack
from logitcache.data.samples import input_digest
from logitcache.errors import ShapeError, UsageError
from logitcache.extras.report import write_report
from logitcache.extras.report.students import find_runs, measure_students
from logitcache.extras.student_export import export_run
from logitcache.stages.cache_teacher import cache_teacher
from logitcache.stages.finished_student import open_student
from logitcache.stages.matched_data import RecordedData, match_data
from logitcache.stages.plan import plan_pipeline
from logitcache.stages.train_student import train_students
from logitcache.stages.train_teacher import train_teacher
from logitcache.stages.verify_match import verify_match
from logitcache.verify.audit import verify
from tests.texts import Texts, pad_to_the_left

Make = Callable[..., Pipeline]

TEXT = [
    "data.name=tests.texts:texts",
    "data.validation=0",
    "data.collate=pad",
    "views.transform=null",
    "teacher.batch_size=16",
    "cache.rows_per_block=16",
    "train.batch_size=16",
]
BAG = ["teacher.model=tests.texts:BagOfTokens", "teacher.args={}", "teacher.weights=random"]
STUDENT = ["students.small.model=tests.texts:BagOfTokens", "students.small.args={}"]


@pytest.fixture(name="transformers")
def _transformers() -> None:
    """Hugging Face's library; without it tests are skipped, but in CI, which installs it, they fail."""
    if importlib.util.find_spec("transformers") is None:
        if os.environ.get("CI"):
            pytest.fail("transformers is not installed, and CI must run this (pip install 'logitcache[hf]')")
        pytest.skip("transformers is not installed (pip install 'logitcache[hf]')")


def bag(tiny: Make, *overrides: str) -> Pipeline:
    """A pipeline of texts whose teacher and student average token embeddings."""
    pipeline = tiny(*TEXT, *BAG, *STUDENT, *overrides)
    return pipeline.model_copy(update={"students": pipeline.students[:1]})


@pytest.mark.usefixtures("transformers")
def test_a_bert_teaches_a_distilbert_on_padded_texts(tiny: Make, tmp_path: Path) -> None:
    """The whole way: plan, cache, verify, spot check, train from the cache, and what the teacher says text by text."""
    pipeline = tiny(
        *TEXT,
        "teacher.model=tests.texts:bert",
        "teacher.args={}",
        "students.small.model=tests.texts:distilbert",
        "students.small.args={}",
        "students.labels.model=tests.texts:bert",
        "students.labels.args={layers: 1}",
    )
    assert 3 == plan_pipeline(pipeline).num_classes

    cache_teacher(pipeline)
    rows = train_students(pipeline)

    cache = logitcache.open(pipeline.cache.path)
    data = resolve_data(pipeline, trust=False)
    teacher, _ = resolve_teacher(pipeline, data, resolve_plan(pipeline, data, trust=False), trust=False)
    with torch.inference_mode():
        alone = [
            teacher(**{name: torch.tensor([ids]) for name, ids in data.train[row][0].items()}) for row in range(60)
        ]
    expected = torch.cat([output.logits for output in alone]).log_softmax(dim=1)
    for view in (0, 1):
        torch.testing.assert_close(
            cache.view(view).logits(np.arange(60)).log_softmax(dim=1), expected, atol=1e-5, rtol=0
        )
    assert [] == verify_match(pipeline, recompute=20)
    assert ["small", "labels"] == [row.name for row in rows]
    runs = find_runs(Path(pipeline.runs.path), cache)
    measure_students(runs, cache, 0, RecordedData(pipeline.cache.path).of_run)
    assert [None, None] == [student.not_measured for student in runs.students]
    assert write_report(
        pipeline.cache.path, tmp_path / "report.html", data=match_data(pipeline.cache.path, pipeline)
    ).path.is_file()


@pytest.mark.usefixtures("transformers")
def test_a_bert_is_trained_on_texts_and_then_teaches(tiny: Make) -> None:
    pipeline = tiny(
        *TEXT, "teacher.model=tests.texts:bert", "teacher.args={}", "teacher.weights=trained", "train.epochs=12"
    )

    assert train_teacher(pipeline)["accuracy"] > 0.8
    cache_teacher(pipeline)

    logits = logitcache.open(pipeline.cache.path).view(0).logits(np.arange(60))
    assert (logits.argmax(dim=1).numpy() == np.arange(60) % 3).mean() > 0.8


@pytest.mark.usefixtures("transformers")
def test_a_vit_teaches_a_vit_with_hints_from_its_layers(tiny: Make) -> None:
    """Images are one tensor, given by position; a hook takes features where the model gives an output with `.logits`."""
    pipeline = tiny(
        "data.name=tests.models:pictures",
        "data.validation=0",
        "cache.rows_per_block=16",
        "teacher.model=tests.texts:vit",
        "teacher.args={}",
        "cache.outputs={pooled: vit.layernorm}",
        "students.small.model=tests.texts:vit",
        "students.small.args={}",
        "students.small.hints=[{output: pooled, module: vit.layernorm, loss: hint}]",
    )

    cache_teacher(pipeline)

    assert ["small"] == [row.name for row in train_students(pipeline, ["small"])]
    with pytest.raises(UsageError, match=r"returns a mapping of 'logits', and an exported one must return the tensor"):
        export_run(open_student(Path(pipeline.runs.path) / "small/seed-0"), to="safetensors")


@pytest.mark.parametrize("kind", ["lists", "arrays", "tensors"])
@pytest.mark.parametrize("workers", [0, 2])
def test_mappings_of_lists_arrays_and_tensors_are_padded_alike(tiny: Make, kind: str, workers: int) -> None:
    pipeline = bag(tiny, f"data.args.kind={kind}", f"num_workers={workers}")

    cache_teacher(pipeline)
    train_students(pipeline)

    assert [] == verify(pipeline.cache.path, deep=True)
    cache = logitcache.open(pipeline.cache.path)
    data = resolve_data(pipeline, trust=False)
    views = logitcache.ViewDataset(data.train, cache.view_plan)
    assert 8 == cache.verify_inputs(views, 0) == cache.verify_inputs(views, 1)


def test_digests_of_inputs_depend_neither_on_the_batch_nor_on_its_padding(tiny: Make, tmp_path: Path) -> None:
    recorded = []
    for number, overrides in enumerate((["teacher.batch_size=16"], ["teacher.batch_size=3"])):
        pipeline = bag(tiny, *overrides, f"cache.path={tmp_path}/{number}.cache")
        cache_teacher(pipeline)
        recorded.append(logitcache.open(pipeline.cache.path).input_digests(0))
    sample = Texts()[min(recorded[0])][0]

    assert recorded[0] == recorded[1]
    assert input_digest(sample).hex() == recorded[0][min(recorded[0])]


def test_a_mapping_of_numbers_is_stacked(tiny: Make) -> None:
    pipeline = bag(
        tiny,
        "data.args.kind=numbers",
        "data.collate=null",
        "teacher.model=tests.texts:OneWord",
        "students.small.model=tests.texts:OneWord",
    )

    cache_teacher(pipeline)
    train_students(pipeline)

    assert 8 == logitcache.open(pipeline.cache.path).verify_inputs(
        logitcache.ViewDataset(Texts(kind="numbers"), logitcache.open(pipeline.cache.path).view_plan), 0
    )


@pytest.mark.parametrize(
    "overrides",
    [
        ["students.small.labels=live"],
        ["students.small.labels=live", "students.small.input=[{'tests.integration.test_huggingface:as_it_is': {}}]"],
        ["together=true", "train.accumulate=2"],
        ["students.small.sampler=class_balanced", "students.small.init=teacher"],
    ],
    ids=["live", "live with inputs of its own", "together, in parts", "started from the teacher"],
)
def test_every_way_to_train_takes_padded_mappings(tiny: Make, overrides: list[str]) -> None:
    pipeline = bag(tiny, *overrides)
    twins = [pipeline.students[0], pipeline.students[0].model_copy(update={"name": "twin"})]
    pipeline = pipeline.model_copy(update={"students": twins})
    cache_teacher(pipeline)

    first, second = train_students(pipeline)

    assert first.accuracy_mean == second.accuracy_mean


def as_it_is() -> Any:
    """A transform that changes nothing."""
    return lambda value: value


@pytest.mark.parametrize("function", ["pad_to_the_left", "pad_with_a_tokenizer"])
@pytest.mark.usefixtures("transformers")
def test_a_collate_function_of_ones_own_makes_every_batch(tiny: Make, function: str) -> None:
    pipeline = bag(tiny, f"data.collate=tests.texts:{function}", "num_workers=1")
    cache_teacher(pipeline)
    expected = logitcache.open(pipeline.cache.path).view(0).logits(np.arange(60))

    padded = bag(tiny, f"cache.path={pipeline.cache.path}2")
    cache_teacher(padded)

    torch.testing.assert_close(logitcache.open(padded.cache.path).view(0).logits(np.arange(60)), expected)


def test_views_in_python_are_padded_by_the_plans_collate() -> None:
    views = logitcache.ViewDataset(Texts(), logitcache.ViewPlan(collate=pad))

    index, inputs, targets = next(iter(DataLoader(views, batch_size=8, collate_fn=views.collate)))

    longest = max(len(tokens) for tokens in Texts().tokens[:8])
    assert {"input_ids": (8, longest), "attention_mask": (8, longest)} == {
        name: tuple(values.shape) for name, values in inputs.items()
    }
    assert (list(range(8)), [0, 1, 2, 0, 1, 2, 0, 1]) == (logitcache.split_index(index)[1].tolist(), targets.tolist())


def test_a_writer_takes_the_digests_of_inputs_that_were_padded(tmp_path: Path) -> None:
    views = logitcache.ViewDataset(Texts(), logitcache.ViewPlan(collate=pad))
    with logitcache.create(
        tmp_path / "own.cache", num_samples=60, num_classes=3, teacher="mine", samples=None, view_plan=views.plan,
        dataset="texts",
    ) as writer:  # fmt: skip
        logits = torch.randn(60, 3)
        writer.write(view=0, start=0, logits=logits, input_digests=views.input_digests(0))

    assert 8 == logitcache.open(tmp_path / "own.cache").verify_inputs(views, 0)


def test_different_lengths_without_padding_say_how_to_pad(tiny: Make) -> None:
    pipeline = bag(tiny, "data.collate=null")

    with pytest.raises(ShapeError, match=r"input_ids: a list of \d+.*data.collate=pad or your own function"):
        cache_teacher(pipeline)


def test_a_collate_function_that_loses_samples_is_refused(tiny: Make) -> None:
    pipeline = bag(tiny, "data.collate=tests.texts:drop_the_last")

    with pytest.raises(ShapeError, match=r"drop_the_last returns 15 rows for 16 samples; expected one row for each"):
        cache_teacher(pipeline)


def test_a_collate_function_that_fails_is_named() -> None:
    with pytest.raises(UsageError, match=r"pad_to_the_left fails on 1 inputs, the first of them \(2,\): "):
        collate([(0, torch.ones(2), 0)], pad_to_the_left)


def test_an_unknown_collate_names_what_there_is(tiny: Make) -> None:
    with pytest.raises(
        UsageError, match=r"data.collate: unknown collate function 'padd'; did you mean 'pad'.*one of: stack, pad"
    ):
        tiny("data.collate=padd")


@pytest.mark.parametrize("mixing", ["views.mixup=0.4", "views.cutmix=1"])
@pytest.mark.parametrize(
    ("kind", "found"), [("lists", "a dict"), ("bare arrays", r"integers \(torch.int64\)")], ids=["mapping", "integers"]
)
def test_mixing_texts_is_refused_before_any_work(
    tiny: Make, mixing: str, kind: str, found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("logitcache.stages.cache_teacher.create", lambda *given, **options: pytest.fail("long work"))
    pipeline = bag(tiny, f"data.args.kind={kind}", mixing, "views.mix_probability=0.01")

    with pytest.raises(UsageError, match=rf"the samples are {found}; expected float images.*views.mixup=0"):
        cache_teacher(pipeline)


def test_a_mapping_goes_by_keywords_where_forward_takes_them_and_else_as_one_argument() -> None:
    class Keywords(torch.nn.Module):
        def forward(self, ids: Any, mask: Any = None) -> str:
            return "keywords"

    class OneMapping(torch.nn.Module):
        def forward(self, batch: Any, **options: Any) -> str:
            return type(batch).__name__

    assert "keywords" == call_model(Keywords(), {"ids": 1})
    assert "dict" == call_model(OneMapping(), {"ids": 1})
    assert "Tensor" == call_model(OneMapping(), torch.ones(1))


def test_a_name_that_forward_does_not_take_is_named(tiny: Make) -> None:
    pipeline = bag(tiny, "teacher.model=tests.integration.test_huggingface:ids_only")

    with pytest.raises(
        ShapeError, match=r"inputs \{input_ids: \(1, \d+\), .*whose `forward` has no parameter attention_mask"
    ):
        cache_teacher(pipeline)


def ids_only(num_classes: int) -> torch.nn.Module:
    class IdsOnly(torch.nn.Module):
        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            return input_ids.float().mean(dim=1, keepdim=True).expand(-1, num_classes)

    return IdsOnly()


def test_lists_and_read_only_arrays_become_tensors() -> None:
    fixed = np.arange(3, dtype=np.float32)
    fixed.flags.writeable = False

    assert torch.equal(torch.tensor([[1, 2], [3, 4]]), stack([[1, 2], [3, 4]]))
    assert torch.equal(torch.tensor([[0.0, 1.0, 2.0]] * 2), stack([fixed, fixed]))
    assert torch.equal(torch.tensor([[1, 0], [3, 4]]), pad([[1], [3, 4]]))


def test_logits_are_found_in_every_usual_output() -> None:
    logits = torch.ones(2, 3)

    assert logits is logits_of(logits) is logits_of({"logits": logits}) is logits_of(SimpleNamespace(logits=logits))
