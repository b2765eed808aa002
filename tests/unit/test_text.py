"""The dataset `text`: sources, tokenizers, and what identifies the token ids."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from logitcache.catalog.datasets import Data, load_data
from logitcache.data.samples import sample_table
from logitcache.data.tokens import TokenDataset
from logitcache.errors import DatasetUnavailable, UsageError
from tests.needs import need_package
from tests.texts import BYTE_VOCABULARY, byte_tokenizer

Load = Callable[..., Data]


@pytest.fixture(name="load")
def _load(tmp_path: Path) -> Load:
    """`load(root, **args)` with the byte tokenizer."""
    need_package("tokenizers", "hf")
    tokenizer = byte_tokenizer(tmp_path / "tokenizer.json")

    def load(root: Path, *, validation: float = 0.0, **args: Any) -> Data:
        return load_data("text", root=root, validation=validation, args={"tokenizer": str(tokenizer), **args})

    return load


def written(path: Path, content: Any) -> Path:
    """A file of text, or of JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not isinstance(content, str):
        content = "".join(f"{json.dumps(entry)}\n" for entry in content)
    path.write_text(content, encoding="utf-8")
    return path


def texts_of(dataset: Any, tmp_path: Path) -> list[str]:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    return [tokenizer.decode(dataset.ids(index).tolist()) for index in range(len(dataset))]


def test_each_line_is_a_text_and_blank_lines_are_not(load: Load, tmp_path: Path) -> None:
    data = load(written(tmp_path / "poem.txt", "over the hills\n\nand far away\n"))

    assert ["over the hills", "and far away"] == texts_of(data.train, tmp_path)
    assert ["poem.txt:1", "poem.txt:3"] == data.train.keys  # type: ignore[attr-defined]
    assert (BYTE_VOCABULARY, None, None) == (data.num_classes, data.validation, data.test)


def test_a_long_text_is_split_into_samples_of_at_most_max_length(load: Load, tmp_path: Path) -> None:
    root = written(tmp_path / "a.txt", "abcdefghij\nk\n")

    split, cut = load(root, max_length=4).train, load(root, max_length=4, long="truncate").train

    assert (["abcd", "efgh", "ij", "k"], ["abcd", "k"]) == (texts_of(split, tmp_path), texts_of(cut, tmp_path))
    assert ["a.txt:1#0", "a.txt:1#1", "a.txt:1#2", "a.txt:2#0"] == split.keys  # type: ignore[attr-defined]
    assert ["a.txt:1", "a.txt:2"] == cut.keys  # type: ignore[attr-defined]
    assert ([3, 3, 1, 0], [0, 0, 0, 1]) == (split.rows_per_sample.tolist(), split.documents.tolist())  # type: ignore[attr-defined]


def test_a_folder_of_texts_has_one_sample_for_each_file_and_a_folder_for_each_split(load: Load, tmp_path: Path) -> None:
    for name in ("train/b.txt", "train/a/x.txt", "val/c.txt", "test/d.txt"):
        written(tmp_path / "corpus" / name, f"text\nof {name}")

    data = load(tmp_path / "corpus")

    assert ["a/x.txt", "b.txt"] == data.train.keys  # type: ignore[attr-defined]
    assert "text\nof train/a/x.txt" == texts_of(data.train, tmp_path)[0]
    assert (["c.txt"], ["d.txt"]) == (data.validation.keys, data.test.keys)  # type: ignore[union-attr]


def test_classes_are_the_names_of_folders(load: Load, tmp_path: Path) -> None:
    for name in ("train/good/1.txt", "train/bad/2.txt", "train/good/3.txt", "test/good/4.txt"):
        written(tmp_path / "corpus" / name, "text")

    data = load(tmp_path / "corpus", task="classification")

    assert (["bad", "good"], [0, 1, 1], [1]) == (
        data.class_names,
        data.train.targets.tolist(),
        data.test.targets.tolist(),
    )  # type: ignore[attr-defined, union-attr]
    assert (2, None) == (data.num_classes, data.train.rows_per_sample)  # type: ignore[attr-defined]


def test_json_lines_have_texts_classes_and_keys_in_fields(load: Load, tmp_path: Path) -> None:
    entries = [{"body": "one", "kind": "b", "id": 7}, {"body": "two", "kind": "a", "id": 9}]

    data = load(written(tmp_path / "a.jsonl", entries), task="classification", field="body", label="kind", key="id")

    assert (["7", "9"], ["a", "b"], [1, 0]) == (data.train.keys, data.class_names, data.train.targets.tolist())  # type: ignore[attr-defined]
    assert ["one", "two"] == texts_of(data.train, tmp_path)


def test_a_class_that_only_the_test_split_has_is_refused(load: Load, tmp_path: Path) -> None:
    for name in ("train/good/1.txt", "test/bad/2.txt"):
        written(tmp_path / "corpus" / name, "text")

    with pytest.raises(
        UsageError, match="bad/2.txt has the label 'bad', which no training text has; expected one of: good"
    ):
        load(tmp_path / "corpus", task="classification")


def test_numbers_are_classes_as_they_are(load: Load, tmp_path: Path) -> None:
    entries = [{"text": "one", "label": 2}, {"text": "two", "label": 0}]

    data = load(written(tmp_path / "a.jsonl", entries), task="classification")

    assert (3, [2, 0]) == (data.num_classes, data.train.targets.tolist())  # type: ignore[attr-defined]


def test_a_hugging_face_dataset_on_disk_is_read_with_its_class_names(load: Load, tmp_path: Path) -> None:
    need_package("datasets", "hf")
    from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

    features = Features({"text": Value("string"), "label": ClassLabel(names=["dog", "cat"])})
    split = Dataset.from_dict({"text": ["woof", "meow"], "label": [0, 1]}, features=features)
    DatasetDict({"train": split, "test": split.select([1])}).save_to_disk(str(tmp_path / "animals"))

    data = load(tmp_path / "animals", task="classification")

    assert (["cat", "dog"], [1, 0], [0]) == (data.class_names, data.train.targets.tolist(), data.test.targets.tolist())  # type: ignore[attr-defined, union-attr]
    assert (["0", "1"], ["woof", "meow"]) == (data.train.keys, texts_of(data.train, tmp_path))  # type: ignore[attr-defined]


def test_only_the_tokens_after_a_prompt_have_rows(load: Load, tmp_path: Path) -> None:
    entries = [{"question": "ab", "text": "cde"}, {"question": "", "text": "xy"}]

    dataset = load(written(tmp_path / "a.jsonl", entries), prompt="question").train

    assert ["abcde", "xy"] == texts_of(dataset, tmp_path)
    assert [3, 1] == dataset.rows_per_sample.tolist()  # type: ignore[attr-defined]
    assert [1, 2, 3, 0] == dataset.row_positions.tolist()  # type: ignore[attr-defined]


def test_special_tokens_are_around_each_part_and_have_no_row_in_a_masked_model(tmp_path: Path) -> None:
    need_package("tokenizers", "hf")
    tokenizer = str(byte_tokenizer(tmp_path / "tokenizer.json", special_tokens=True))
    root = written(tmp_path / "a.txt", "abcd\n")
    args = {"tokenizer": tokenizer, "task": "masked", "max_length": 4}

    with_special = load_data("text", root=root, args=args).train
    without = load_data("text", root=root, args={**args, "special_tokens": False}).train

    assert [1, 2] == with_special.ids(0)[[0, -1]].tolist()  # type: ignore[attr-defined]
    assert ([2, 2], [1, 2, 1, 2]) == (with_special.rows_per_sample.tolist(), with_special.row_positions.tolist())  # type: ignore[attr-defined]
    assert ([4], None) == (without.rows_per_sample.tolist(), without.row_positions)  # type: ignore[attr-defined]
    assert ((0, 1, 2, 3), 3) == (with_special.special_ids, with_special.mask_id)  # type: ignore[attr-defined]


def test_a_split_keeps_the_parts_of_a_document_together(load: Load, tmp_path: Path) -> None:
    root = written(tmp_path / "a.txt", "".join(f"{number:02d}-{'x' * 20}\n" for number in range(20)))

    data = load(root, validation=0.25, max_length=8)

    kept, apart = ({key.partition("#")[0] for key in split.keys} for split in (data.train, data.validation))  # type: ignore[attr-defined, union-attr]
    assert (15, 5, set()) == (len(kept), len(apart), kept & apart)


def test_the_rows_predict_all_bytes_but_those_of_each_first_token(load: Load, tmp_path: Path) -> None:
    """For bits per byte: a character of several bytes has several tokens here, and counts once."""
    root = written(tmp_path / "a.txt", "ab €5\nxy\n")

    causal, masked = load(root).train, load(root, task="masked").train

    assert (7 - 1 + 2 - 1, 9) == (causal.num_bytes, masked.num_bytes)  # type: ignore[attr-defined]
    assert 1 == causal.select(np.array([1])).num_bytes  # type: ignore[attr-defined]


@pytest.mark.parametrize("option", ["tokenizer", "max_length", "long", "special_tokens", "task", "vocab_size"])
def test_everything_that_changes_token_ids_is_in_the_tokenization(load: Load, tmp_path: Path, option: str) -> None:
    root = written(tmp_path / "a.txt", "abcd\n")
    other = byte_tokenizer(tmp_path / "other.json", special_tokens=True)
    changes = {
        "tokenizer": str(other), "max_length": 8, "long": "truncate", "special_tokens": False, "task": "masked",
        "vocab_size": 300,
    }  # fmt: skip

    first, second = load(root).train, load(root, **{option: changes[option]}).train

    assert isinstance(first, TokenDataset)
    assert first.tokenization != second.tokenization  # type: ignore[attr-defined]
    assert first.tokenization == json.loads(json.dumps(first.tokenization))


def test_a_moved_tokenizer_is_the_same(load: Load, tmp_path: Path) -> None:
    root = written(tmp_path / "a.txt", "abcd\n")
    moved = byte_tokenizer(written(tmp_path / "elsewhere/tokenizer.json", ""))

    first, second = load(root).train, load(root, tokenizer=str(moved)).train

    assert first.tokenization == second.tokenization  # type: ignore[attr-defined]
    assert sample_table(first, contents=True).fingerprint() == sample_table(second, contents=True).fingerprint()


CASES: dict[str, tuple[Any, dict[str, Any], str]] = {
    "nothing": ("\n\n", {}, r"has no text; expected at least one"),
    "empty": ([{"text": "a"}, {"text": " "}], {}, r"the text of sample 'data.jsonl:2' is empty; remove the sample"),
    "field": ([{"body": "a"}], {}, r"data.jsonl:1: unknown field 'text'; expected one of: body"),
    "no JSON": ("{]\n", {"jsonl": True}, r"data.jsonl:1 is not JSON"),
    "no object": ("[1]\n", {"jsonl": True}, r"data.jsonl:1 is a list; expected an object with 'text'"),
    "messages": ([{"text": [{"role": "user"}]}], {}, r"sample 'data.jsonl:1' is a list; expected a string, or chat messages"),
    "no class": ("a\n", {"task": "classification"}, r"has no classes; use JSON lines, or a folder for each class"),
    "task": ("a\n", {"task": "casual"}, r"unknown task 'casual'; did you mean 'causal'\?"),
    "long": ("a\n", {"long": "chunk"}, r"unknown value of `long` 'chunk'; expected one of: split, truncate"),
    "option": ("a\n", {"max_len": 3}, r"data.args: the dataset text has no parameter 'max_len'; did you mean 'max_length'"),
    "vocabulary": ("a\n", {"vocab_size": 9}, r"sample 'data.txt:1' has the token id \d+, beyond a vocabulary of 9"),
    "template": ("a\n", {"chat_template": True}, r"a chat template needs a tokenizer from a folder or a .gguf file"),
    "tokenizer": ("a\n", {"tokenizer": "no/such.json"}, r"the tokenizer no/such.json does not exist; set `tokenizer`"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_what_makes_no_dataset_is_refused_by_name(load: Load, tmp_path: Path, case: str) -> None:
    content, args, message = CASES[case]
    suffix = "jsonl" if args.pop("jsonl", False) or not isinstance(content, str) else "txt"

    with pytest.raises(UsageError, match=message):
        load(written(tmp_path / f"data.{suffix}", content), **args)


def test_room_for_special_tokens_is_needed(tmp_path: Path) -> None:
    need_package("tokenizers", "hf")
    tokenizer = str(byte_tokenizer(tmp_path / "tokenizer.json", special_tokens=True))

    with pytest.raises(UsageError, match="max_length is 2; expected more than the 2 special tokens of each text"):
        load_data("text", root=written(tmp_path / "a.txt", "a\n"), args={"tokenizer": tokenizer, "max_length": 2})


def test_missing_files_say_what_is_expected(load: Load, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()

    with pytest.raises(DatasetUnavailable, match=r"gone.txt does not exist; set data.root to a .txt or .jsonl file"):
        load(tmp_path / "gone.txt")
    with pytest.raises(DatasetUnavailable, match=r"folder has no tokenizer; expected one of: tokenizer.json"):
        load(written(tmp_path / "a.txt", "a"), tokenizer=str(tmp_path / "folder"))
    with pytest.raises(DatasetUnavailable, match="has no train split"):
        load(written(tmp_path / "corpus/test.txt", "a").parent)


def test_a_missing_package_is_named_with_its_extra(load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.import_module

    def without(name: str) -> Any:
        if name == "tokenizers":
            raise ImportError("No module named 'tokenizers'")
        return found(name)

    monkeypatch.setattr("logitcache.catalog.tokenization.importlib.import_module", without)

    with pytest.raises(
        DatasetUnavailable, match=r"tokenizers can't be imported; it reads .* pip install 'logitcache\[hf\]'"
    ):
        load(written(tmp_path / "a.txt", "a"))


def test_a_file_that_is_no_tokenizer_is_refused(load: Load, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"broken.json is not a tokenizer of the package tokenizers"):
        load(written(tmp_path / "a.txt", "a"), tokenizer=str(written(tmp_path / "broken.json", "{}")))


def test_text_that_is_not_utf_8_is_refused(load: Load, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"caf\xe9\n")

    with pytest.raises(UsageError, match=r"a.txt is not UTF-8 text"):
        load(tmp_path / "a.txt")


def test_texts_without_classes_are_not_divided_into_parts(load: Load, tmp_path: Path) -> None:
    from logitcache.catalog.parts import PartConfig

    with pytest.raises(UsageError, match="data.part divides the samples of each class, and samples with several rows"):
        load_data(
            "text",
            root=written(tmp_path / "a.txt", "a\nb\n"),
            args={"tokenizer": str(tmp_path / "tokenizer.json")},
            part=PartConfig(index=0, of=2),
        )
