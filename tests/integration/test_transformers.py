"""Language models of `transformers` over token ids: built, checked, cached and distilled."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import logitcache
from logitcache.cache.card import render_card
from logitcache.catalog.calling import model_logits
from logitcache.catalog.language_models import check_head, check_packing, head_of, transformers_model, without_head
from logitcache.catalog.models import build_model, fingerprint_args, load_weights, model_fingerprint, save_weights
from logitcache.config.build import resolve_collate, resolve_data, resolve_plan, resolve_teacher
from logitcache.config.schema import Pipeline
from logitcache.data.batching import pad
from logitcache.data.packing import pack
from logitcache.errors import DatasetUnavailable, UsageError
from logitcache.stages.cache_teacher import cache_teacher
from logitcache.stages.train_student import train_students
from tests.commands import run_json
from tests.needs import need_package
from tests.texts import BYTE_VOCABULARY, byte_tokenizer

Make = Callable[..., Pipeline]

SMALL: dict[str, dict[str, Any]] = {
    "llama": {
        "model_type": "llama",
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 32,
    },
    "gpt2": {"model_type": "gpt2", "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32},
    "bert": {
        "model_type": "bert",
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 32,
    },
}
CAPPED = {
    **SMALL["llama"],
    "model_type": "gemma2",
    "num_key_value_heads": 2,
    "final_logit_softcapping": 1.0,
    "head_dim": 8,
}
POEM = "".join(f"{number} bottles of beer on the wall\n" for number in range(24))


@pytest.fixture(autouse=True)
def _transformers() -> None:
    need_package("transformers", "hf")


def small(kind: str = "llama", task: str = "causal", num_classes: int = BYTE_VOCABULARY, **options: Any) -> Any:
    torch.manual_seed(0)
    tokenization = {"task": task, "vocab_size": BYTE_VOCABULARY}
    return transformers_model(num_classes, tokenization, config=SMALL[kind], **options).eval()


def sequences(*lengths: int) -> list[dict[str, torch.Tensor]]:
    draw = torch.Generator().manual_seed(1)
    return [
        {
            "input_ids": torch.randint(4, BYTE_VOCABULARY, (length,), generator=draw),
            "attention_mask": torch.ones(length, dtype=torch.int64),
        }
        for length in lengths
    ]


@pytest.mark.parametrize(
    ("kind", "task", "shape"),
    [
        ("llama", "causal", (2, 5, BYTE_VOCABULARY)),
        ("gpt2", "causal", (2, 5, BYTE_VOCABULARY)),
        ("bert", "masked", (2, 5, BYTE_VOCABULARY)),
        ("bert", "classification", (2, 3)),
    ],
)
def test_a_model_has_the_sizes_of_the_data(kind: str, task: str, shape: tuple[int, ...]) -> None:
    model = small(kind, task, 3 if task == "classification" else BYTE_VOCABULARY)

    assert shape == tuple(model_logits(model, pad(sequences(5, 3))).shape)


@pytest.mark.parametrize(("kind", "task"), [("llama", "causal"), ("gpt2", "causal"), ("bert", "masked")])
def test_hidden_states_and_the_head_give_the_logits(kind: str, task: str) -> None:
    model, inputs = small(kind, task), pad(sequences(5, 3))

    with torch.no_grad(), without_head(model) as head:
        hidden = model_logits(model, inputs)

    assert (2, 5, 16) == tuple(hidden.shape)
    with torch.no_grad():
        torch.testing.assert_close(nn.functional.linear(hidden, head.weight, head.bias), model_logits(model, inputs))
    check_head(model, inputs)


def test_a_model_that_caps_its_logits_or_has_no_head_is_refused() -> None:
    torch.manual_seed(0)
    capped = transformers_model(BYTE_VOCABULARY, task="causal", config={**CAPPED, "initializer_range": 1.0})

    with pytest.raises(UsageError, match=r"Gemma2ForCausalLM changes the logits after its output layer"):
        check_head(capped, pad(sequences(5)))
    with pytest.raises(UsageError, match="BertForSequenceClassification has no linear output layer over hidden states"):
        head_of(small("bert", "classification", 3))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_packed_sequences_have_the_logits_of_each_alone(kind: str) -> None:
    model, parts = small(kind), sequences(7, 4, 3, 1)

    with torch.no_grad():
        packed = model_logits(model, pack(parts))
        alone = [model_logits(model, pad([part]))[0] for part in parts]

    check_packing(model, BYTE_VOCABULARY)
    torch.testing.assert_close(packed[0], alone[0])
    torch.testing.assert_close(packed[1], torch.cat(alone[1:])[:7])


def test_models_that_can_not_keep_packed_sequences_apart_are_refused() -> None:
    with pytest.raises(UsageError, match="BertForMaskedLM does not keep packed sequences apart; use data.collate=pad"):
        check_packing(small("bert", "masked"), BYTE_VOCABULARY)


def test_a_folder_has_the_weights_that_were_saved_there_wherever_it_lies(tmp_path: Path) -> None:
    model = small()
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "two")
    inputs = pad(sequences(5))

    loaded = [
        build_model(
            "transformers",
            num_classes=BYTE_VOCABULARY,
            input_shape=(),
            args={"path": str(tmp_path / folder), "task": "causal"},
        ).eval()
        for folder in ("one", "two")
    ]

    with torch.no_grad():
        torch.testing.assert_close(model_logits(loaded[0], inputs), model_logits(model, inputs))
    first, second = (
        model_fingerprint(
            each,
            name="teacher",
            args=fingerprint_args("transformers", {"path": str(tmp_path / folder), "task": "causal"}),
        )
        for each, folder in zip(loaded, ("one", "two"), strict=True)
    )
    assert first == second


def test_a_padded_head_is_cut_to_the_vocabulary_of_the_data(tmp_path: Path) -> None:
    wide = transformers_model(BYTE_VOCABULARY + 12, task="causal", config=SMALL["llama"]).eval()
    wide.save_pretrained(tmp_path)  # type: ignore[operator]

    cut = transformers_model(BYTE_VOCABULARY, task="causal", path=str(tmp_path)).eval()

    inputs = pad(sequences(5))
    with torch.no_grad():
        torch.testing.assert_close(model_logits(cut, inputs), model_logits(wide, inputs)[..., :BYTE_VOCABULARY])
    with pytest.raises(UsageError, match=r"the model has 272 token ids, the data 300; use the tokenizer of the model"):
        transformers_model(300, task="causal", path=str(tmp_path))


@pytest.mark.parametrize("collate", ["pad", "pack"])
def test_the_mass_of_a_heads_padding_is_counted_and_shown(language: Make, tmp_path: Path, collate: str) -> None:
    wide = transformers_model(BYTE_VOCABULARY + 12, task="causal", config=SMALL["llama"]).eval()
    with torch.no_grad():
        wide.lm_head.weight *= 20  # type: ignore[operator, union-attr]
        wide.lm_head.weight[BYTE_VOCABULARY:] -= 5  # type: ignore[index, union-attr]
    wide.save_pretrained(tmp_path / "wide")  # type: ignore[operator]
    pipeline = language(f"teacher.args={{path: {tmp_path / 'wide'}}}", f"data.collate={collate}")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        cache_teacher(pipeline)
    cache = logitcache.open(pipeline.cache.path)
    dataset = resolve_data(pipeline, trust=False).train
    with torch.inference_mode():
        rows = [model_logits(wide, pad([dataset[i][0]]))[0, :-1] for i in range(len(dataset))]
    mass_R = torch.cat(rows).softmax(dim=1)[:, BYTE_VOCABULARY:].sum(dim=1)
    shown = run_json("info", pipeline.cache.path)

    assert 12 == shown["cut_classes"]
    assert shown["cut_mass_mean"] == pytest.approx(float(mass_R.mean()), rel=1e-3)
    assert shown["cut_mass_max"] == pytest.approx(float(mass_R.max()), rel=1e-3)
    assert "Left out: 12 classes of the teacher's head beyond the vocabulary" in render_card(cache)
    assert (shown["cut_mass_mean"] > 0.01) == any("the 12 others have" in str(each.message) for each in caught)
    assert "cut_classes" not in run_json("info", plain_cache(language))


def plain_cache(language: Make) -> str:
    pipeline = language("cache.path=" + str(Path(language().cache.path).with_name("plain.cache")))
    cache_teacher(pipeline)
    return pipeline.cache.path


def test_weights_of_a_run_are_loaded_into_a_model_with_tied_embeddings(tmp_path: Path) -> None:
    model, other = small("gpt2"), transformers_model(BYTE_VOCABULARY, task="causal", config=SMALL["gpt2"])

    save_weights(model, tmp_path / "last.safetensors")
    load_weights(other, tmp_path / "last.safetensors")

    with torch.no_grad():
        assert torch.equal(model_logits(model, pad(sequences(4))), model_logits(other.eval(), pad(sequences(4))))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "set either `path`, for a model with its weights, or `config`"),
        ({"config": {"hidden_size": 8}}, "`config` must have `model_type`, such as llama, gpt2 or bert"),
        ({"config": {"model_type": "llama", "vocab_size": 9}}, "`config` has vocab_size 9, the data 260; leave it out"),
        ({"path": "no/such"}, "the model no/such does not exist"),
        ({"config": "no/such"}, "the model's configuration no/such does not exist"),
        ({"config": SMALL["bert"], "task": "masked"}, "the model's task is masked, that of the data causal"),
        ({"config": SMALL["llama"], "task": "casual"}, r"unknown task 'casual'; did you mean 'causal'\?"),
    ],
    ids=["neither", "type", "vocabulary", "path", "file", "other task", "task"],
)
def test_what_makes_no_model_is_refused_by_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        transformers_model(BYTE_VOCABULARY, {"task": "causal", "vocab_size": BYTE_VOCABULARY}, **options)


def test_a_model_without_weights_for_the_task_is_refused(tmp_path: Path) -> None:
    small("bert", "masked").bert.save_pretrained(tmp_path)

    with pytest.raises(UsageError, match=r"has no weights for cls.predictions.*; choose a model that was trained"):
        transformers_model(BYTE_VOCABULARY, task="masked", path=str(tmp_path))
    with pytest.raises(DatasetUnavailable, match="does not exist"):
        transformers_model(BYTE_VOCABULARY, task="masked", path=str(tmp_path / "gone.gguf"))


@pytest.fixture(name="language")
def _language(tiny: Make, tmp_path: Path) -> Make:
    """A pipeline of a Llama of a few thousand parameters and a smaller student over lines of text, byte by byte."""
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    (corpus / "train.txt").write_text(POEM)
    (corpus / "test.txt").write_text("99 bottles of wine on the wall\n100 bottles of wine\n")
    tokenizer = byte_tokenizer(tmp_path / "tokenizer.json")
    student = {**SMALL["llama"], "num_hidden_layers": 1}

    def make(*overrides: str) -> Pipeline:
        pipeline = tiny(
            "data.name=text",
            f"data.root={corpus}",
            f"data.args={json.dumps({'tokenizer': str(tokenizer), 'max_length': 20})}",
            "data.validation=0.1",
            "data.collate=pad",
            "views.transform=null",
            "views.count=1",
            "teacher.model=transformers",
            f"teacher.args={json.dumps({'config': SMALL['llama']})}",
            "teacher.batch_size=8",
            "cache.rows_per_block=128",
            "train.batch_size=8",
            "students.small.model=transformers",
            f"students.small.args={json.dumps({'config': student})}",
            "students.labels.model=transformers",
            f"students.labels.args={json.dumps({'config': student})}",
            *overrides,
        )
        return pipeline

    return make


def test_texts_are_padded_by_default(language: Make) -> None:
    assert resolve_collate(language("data.collate=null"), trust=False) is pad


def test_a_teacher_is_named_after_its_files(language: Make) -> None:
    assert "transformers" == language().teacher_name
    assert "Tiny-1M.Q4" == language("teacher.args={path: models/Tiny-1M.Q4.gguf}").teacher_name


@pytest.mark.parametrize("collate", ["pad", "pack"])
def test_a_language_model_teaches_a_smaller_one_from_its_cache(language: Make, collate: str) -> None:
    pipeline = language(f"data.collate={collate}")
    cache_teacher(pipeline)
    rows = train_students(pipeline)

    cache = logitcache.open(pipeline.cache.path)
    data = resolve_data(pipeline, trust=False)
    teacher, _ = resolve_teacher(pipeline, data, resolve_plan(pipeline, data, trust=False), trust=False)
    with torch.inference_mode():
        alone = [model_logits(teacher, pad([data.train[i][0]]))[0, :-1] for i in range(len(data.train))]
    torch.testing.assert_close(cache.view(0).logits(np.arange(cache.num_rows)), torch.cat(alone), atol=1e-5, rtol=0)
    assert ["small", "labels"] == [row.name for row in rows]


@pytest.mark.parametrize(
    "overrides",
    [
        ["students.small.init={from: teacher, layers: {first: 1}}", "together=true"],
        ["train.accumulate=2", "train.ema=0.9", "num_workers=1"],
        ["cache.memory_budget_mb=0.01", "cache.encoding=TopK(k=8)"],
    ],
    ids=["initialised, together", "accumulated, averaged, with workers", "streamed"],
)
def test_the_ways_to_train_take_sequences(language: Make, overrides: list[str]) -> None:
    pipeline = language("train.epochs=1", *overrides)
    cache_teacher(pipeline)

    assert all(row.nll_mean is not None for row in train_students(pipeline))


def test_students_of_a_part_of_the_samples_keep_the_rows_of_each(language: Make) -> None:
    pipeline = language("students.small.samples=0.5", "students.labels.samples=0.5", "train.epochs=1")
    cache_teacher(pipeline)

    rows = train_students(pipeline)

    assert len({row.samples for row in rows}) == 1
    assert rows[0].samples < len(resolve_data(pipeline, trust=False).train)
    assert all(row.nll_mean is not None for row in rows)


@pytest.mark.parametrize("task", ["masked", "classification"])
def test_other_tasks_go_the_whole_way(language: Make, tmp_path: Path, task: str) -> None:
    tokenizer = tmp_path / "tokenizer.json"
    entries = [
        {"text": f"{number % 2} is {'odd' if number % 2 else 'even'}", "label": number % 2} for number in range(24)
    ]
    for split in ("train", "test"):
        (tmp_path / "corpus" / f"{split}.txt").unlink()
        (tmp_path / "corpus" / f"{split}.jsonl").write_text("".join(f"{json.dumps(entry)}\n" for entry in entries))
    args = {"tokenizer": str(tokenizer), "task": task}
    bert = json.dumps({"config": SMALL["bert"]})
    masking = "[{token_masking: {p: 0.3}}]" if task == "masked" else "null"
    pipeline = language(
        f"data.args={json.dumps(args)}",
        f"teacher.args={bert}",
        f"students.small.args={bert}",
        f"students.labels.args={bert}",
        f"views.transform={masking}",
        "views.count=2",
    )

    cache_teacher(pipeline)
    rows = train_students(pipeline)

    cache = logitcache.open(pipeline.cache.path)
    same = torch.equal(cache.view(0).logits([0, 1, 2]), cache.view(1).logits([0, 1, 2]))
    assert (task == "classification") == same
    assert ["small", "labels"] == [row.name for row in rows]
