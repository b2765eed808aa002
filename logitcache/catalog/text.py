"""The dataset `text`: lines, JSON lines, folders of text files, and Hugging Face datasets on disk, as token ids."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from logitcache.catalog.tokenization import (
    Encoded,
    Tokenizer,
    encode,
    load_tokenizer,
    loaded_tokenizer,
    need_package,
)
from logitcache.data.tokens import CAUSAL, CLASSIFICATION, MASKED, TASKS, TokenDataset
from logitcache.errors import DatasetUnavailable, UsageError
from logitcache.registry import unknown_name

SPLITS = {"train": ("train",), "validation": ("val", "validation"), "test": ("test",)}
"""Names of the files or folders of each split."""
SUFFIXES = (".txt", ".jsonl")
SPLIT = "split"
TRUNCATE = "truncate"


@dataclass(frozen=True, kw_only=True)
class TextFields:
    """Fields of a JSON line or of a Hugging Face dataset."""

    text: str
    prompt: str | None
    label: str | None
    key: str | None


@dataclass(frozen=True, kw_only=True)
class Document:
    """One text of a source."""

    key: str
    text: Any
    """A string, or a list of chat messages."""
    prompt: str = ""
    """Text before it, whose tokens have no rows."""
    label: Any = None


def text(
    root: Path,
    *,
    tokenizer: str,
    task: str = CAUSAL,
    max_length: int | None = None,
    long: str | None = None,
    field: str = "text",
    prompt: str | None = None,
    label: str = "label",
    key: str | None = None,
    special_tokens: bool | None = None,
    chat_template: bool | str = False,
    vocab_size: int | None = None,
) -> dict[str, TokenDataset]:
    """Token ids of texts, by split.

    Args:
        root: a `.txt` file with a text on each line, a `.jsonl` file, a folder of `.txt` files, a Hugging Face dataset
            saved with `save_to_disk`, or a folder with one of these for each split: `train`, `val`, `test`.
        tokenizer: a folder of `transformers`, a `.gguf` file, or a `.json` file of `tokenizers`.
        task: "causal", "masked" or "classification".
        max_length: most tokens of a sample, special tokens included; by default no limit.
        long: "split" makes several samples of a longer text, "truncate" cuts it off. By default classification
            truncates, and the other tasks split.
        field: of a text in JSON lines and Hugging Face datasets.
        prompt: field of a text that comes before it and has no rows.
        label: field of the class, for classification. In a folder it is the name of the first subfolder.
        key: field of the sample's key, by default its number.
        special_tokens: add the tokenizer's special tokens; by default unless there is a chat template.
        chat_template: true for that of the tokenizer, or a file. A text is then a list of messages, or one of the user.
        vocab_size: number of classes, by default that of the tokenizer. Larger where the teacher's head is padded.

    Raises:
        DatasetUnavailable: a file or a package is missing.
        UsageError: an invalid option, or a text without tokens.
    """
    sources = {name: found for name, places in SPLITS.items() if (found := _source(root, places)) is not None}
    if "train" not in sources:
        if sources:
            raise DatasetUnavailable(f"text: {root} has no train split; expected {root}/train.txt, .jsonl or a folder")
        sources = {"train": root}
    reader = _reader(
        load_tokenizer(tokenizer),
        task=task,
        max_length=max_length,
        long=long,
        field=field,
        prompt=prompt,
        label=label,
        key=key,
        special_tokens=special_tokens,
        chat_template=chat_template,
        vocab_size=vocab_size,
    )
    documents = {name: list(_documents(source, reader.fields)) for name, source in sources.items()}
    class_names = _class_names(documents["train"]) if task == CLASSIFICATION else None
    return {name: reader.dataset(found, sources[name], class_names) for name, found in documents.items()}


def text_dataset(
    split: Any,
    tokenizer: Any,
    *,
    task: str = CAUSAL,
    max_length: int | None = None,
    long: str | None = None,
    field: str = "text",
    prompt: str | None = None,
    label: str = "label",
    key: str | None = None,
    class_names: list[str] | None = None,
    special_tokens: bool | None = None,
    chat_template: bool | str = False,
    vocab_size: int | None = None,
) -> TokenDataset:
    """Token ids of a split of a Hugging Face dataset that is in memory or on disk.

    Args:
        split: a `datasets.Dataset`.
        tokenizer: a fast tokenizer of `transformers`; or a path, as in `text`.
        class_names: names of the classes, in order; by default those of a `ClassLabel`, else the sorted labels.
        task, max_length, long, field, prompt, label, key, special_tokens, chat_template, vocab_size: as in `text`.

    Raises:
        UsageError: an invalid option, an unknown column, or a text without tokens.
    """
    reader = _reader(
        load_tokenizer(tokenizer) if isinstance(tokenizer, str | Path) else loaded_tokenizer(tokenizer),
        task=task,
        max_length=max_length,
        long=long,
        field=field,
        prompt=prompt,
        label=label,
        key=key,
        special_tokens=special_tokens,
        chat_template=chat_template,
        vocab_size=vocab_size,
    )
    if isinstance(split, Mapping):
        raise UsageError(
            f"text_dataset takes one split, and this is a mapping with {', '.join(map(str, split))}; choose one of "
            f"them, such as text_dataset(splits[{next(iter(split), 'train')!r}], tokenizer)"
        )
    columns = [column for column in vars(reader.fields).values() if column is not None]
    for column in columns:
        if column not in split.column_names:
            raise UsageError(unknown_name("column", column, split.column_names))
    documents = list(_entries(split.select_columns(columns), reader.fields))
    if task == CLASSIFICATION and class_names is None:
        class_names = getattr(split.features[label], "names", None) or _class_names(documents)
    return reader.dataset(documents, "the split", class_names)


def _reader(
    tokenizer: Tokenizer,
    *,
    task: str,
    max_length: int | None,
    long: str | None,
    field: str,
    prompt: str | None,
    label: str,
    key: str | None,
    special_tokens: bool | None,
    chat_template: bool | str,
    vocab_size: int | None,
) -> _Reader:
    if task not in TASKS:
        raise UsageError(unknown_name("task", task, TASKS))
    if long not in (None, SPLIT, TRUNCATE):
        raise UsageError(unknown_name("value of `long`", long, (SPLIT, TRUNCATE)))
    template = _chat_template(tokenizer, chat_template)
    return _Reader(
        tokenizer=tokenizer,
        task=task,
        max_length=max_length,
        split=task != CLASSIFICATION if long is None else long == SPLIT,
        fields=TextFields(text=field, prompt=prompt, label=label if task == CLASSIFICATION else None, key=key),
        special_tokens=template is None if special_tokens is None else special_tokens,
        template=template,
        vocab_size=tokenizer.vocab_size if vocab_size is None else vocab_size,
    )


@dataclass(frozen=True, kw_only=True)
class _Reader:
    """Makes token sequences of documents."""

    tokenizer: Tokenizer
    task: str
    max_length: int | None
    split: bool
    fields: TextFields
    special_tokens: bool
    template: str | None
    vocab_size: int

    def dataset(self, documents: list[Document], source: Path | str, class_names: list[str] | None) -> TokenDataset:
        if not documents:
            raise UsageError(f"text: {source} has no text; expected at least one")
        texts = [self._rendered(document) for document in documents]
        encodings = encode(
            self.tokenizer,
            texts,
            max_length=self.max_length,
            split=self.split,
            special_tokens=self.special_tokens,
        )
        all_parts, keys, numbers, predicted = [], [], [], []
        for number, (document, parts) in enumerate(zip(documents, encodings, strict=True)):
            for place, part in enumerate(parts):
                all_parts.append(part)
                keys.append(f"{document.key}#{place}" if self.split and self.max_length else document.key)
                numbers.append(number)
                predicted.append(self._predicted(part, len(document.prompt)))
        targets = None
        if class_names is not None:
            targets = np.array([_class_number(documents[number], class_names) for number in numbers])
        return TokenDataset(
            [part.ids for part in all_parts],
            keys=keys,
            task=self.task,
            vocab_size=self.vocab_size,
            tokenization=self._tokenization(),
            targets=targets,
            class_names=class_names,
            predicted=predicted,
            token_bytes=[part.num_bytes for part in all_parts],
            documents=np.array(numbers),
            special_ids=self.tokenizer.special_ids,
            mask_id=self.tokenizer.mask_id,
        )

    def _rendered(self, document: Document) -> str:
        value = document.text
        if self.template is not None:
            messages = [{"role": "user", "content": value}] if isinstance(value, str) else value
            assert self.tokenizer.render is not None
            try:
                value = self.tokenizer.render(messages, self.template)
            except Exception as error:
                raise UsageError(f"the chat template fails on {document.key}: {error}") from error
        if not isinstance(value, str):
            raise UsageError(
                f"the text of sample {document.key!r} is a {type(value).__name__}; expected a string, or chat "
                "messages with `chat_template`"
            )
        if not value.strip():
            raise UsageError(f"the text of sample {document.key!r} is empty; remove the sample")
        return document.prompt + value

    def _predicted(self, part: Encoded, prompt: int) -> np.ndarray:
        ordinary = ~np.isin(part.ids, self.tokenizer.special_ids)
        if self.task == MASKED:
            return ordinary & (part.starts >= prompt)
        if not prompt:
            return np.ones(len(part.ids), dtype=bool)
        after = np.flatnonzero(ordinary & (part.starts >= prompt))
        first = after[0] if len(after) else len(part.ids)
        return np.arange(len(part.ids)) >= first  # also a special token at the end

    def _tokenization(self) -> dict[str, Any]:
        template = None if self.template is None else hashlib.sha256(self.template.encode()).hexdigest()
        return {
            "tokenizer": self.tokenizer.name,
            "sha256": self.tokenizer.sha256,
            "vocab_size": self.vocab_size,
            "max_length": self.max_length,
            "long": SPLIT if self.split else TRUNCATE,
            "special_tokens": self.special_tokens,
            "chat_template": template,
            "task": self.task,
        }


def _source(root: Path, names: tuple[str, ...]) -> Path | None:
    """The file or folder of a split, if there is one."""
    candidates = [root / f"{name}{suffix}" for name in names for suffix in ("", *SUFFIXES)]
    return next((path for path in candidates if path.exists()), None)


def _documents(source: Path, fields: TextFields) -> Iterator[Document]:
    if source.is_dir():
        if (source / "dataset_info.json").is_file() or (source / "state.json").is_file():
            return _saved_dataset(source, fields)
        return _text_files(source, labelled=fields.label is not None)
    if not source.is_file():
        raise DatasetUnavailable(
            f"text: {source} does not exist; set data.root to a .txt or .jsonl file, a folder of .txt files, a Hugging "
            "Face dataset on disk, or a folder with one of these for each split (train, val, test)"
        )
    if source.suffix == ".jsonl":
        return _json_lines(source, fields)
    if fields.label is not None:
        raise UsageError(f"text: {source} has no classes; use JSON lines, or a folder for each class")
    return _lines(source)


def _lines(path: Path) -> Iterator[Document]:
    for number, line in enumerate(_read(path).split("\n"), start=1):
        if line.strip():  # blank lines separate texts
            yield Document(key=f"{path.name}:{number}", text=line)


def _text_files(folder: Path, *, labelled: bool) -> Iterator[Document]:
    for path in sorted(folder.rglob("*.txt")):
        key = path.relative_to(folder)
        if labelled and len(key.parts) < 2:
            raise UsageError(f"text: {path} has no class; expected {folder}/CLASS/{key.name}")
        yield Document(key=key.as_posix(), text=_read(path), label=key.parts[0] if labelled else None)


def _json_lines(path: Path, fields: TextFields) -> Iterator[Document]:
    for number, line in enumerate(_read(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except ValueError as error:
            raise UsageError(f"{path}:{number} is not JSON: {error}") from error
        if not isinstance(entry, dict):
            raise UsageError(f"{path}:{number} is a {type(entry).__name__}; expected an object with {fields.text!r}")
        yield _document(entry, fields, f"{path.name}:{number}")


def _saved_dataset(folder: Path, fields: TextFields) -> Iterator[Document]:
    datasets = need_package("datasets", "reads Hugging Face datasets")
    try:
        loaded = datasets.load_from_disk(str(folder))
    except Exception as error:
        raise UsageError(f"{folder} is not a dataset of `save_to_disk`: {error}") from error
    return _entries(loaded, fields)


def _entries(loaded: Any, fields: TextFields) -> Iterator[Document]:
    feature = loaded.features.get(fields.label) if fields.label is not None else None
    names = getattr(feature, "names", None)
    for number, entry in enumerate(loaded):
        document = _document(entry, fields, str(number))
        if names and isinstance(document.label, int):
            document = replace(document, label=names[document.label])
        yield document


def _document(entry: Mapping[str, Any], fields: TextFields, place: str) -> Document:
    def value(name: str) -> Any:
        if name not in entry:
            raise UsageError(f"{place}: {unknown_name('field', name, list(entry))}")
        return entry[name]

    prompt = "" if fields.prompt is None else value(fields.prompt)
    if not isinstance(prompt, str):
        raise UsageError(f"{place}: the prompt is a {type(prompt).__name__}; expected a string")
    return Document(
        key=place if fields.key is None else str(value(fields.key)),
        text=value(fields.text),
        prompt=prompt,
        label=None if fields.label is None else value(fields.label),
    )


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 text: {error}") from error


def _chat_template(tokenizer: Tokenizer, wanted: bool | str) -> str | None:
    if not wanted:
        return None
    if tokenizer.render is None:
        raise UsageError("a chat template needs a tokenizer from a folder or a .gguf file, not a .json file")
    if isinstance(wanted, str):
        if not Path(wanted).is_file():
            raise DatasetUnavailable(f"the chat template {wanted} does not exist")
        return _read(Path(wanted))
    if tokenizer.chat_template is None:
        raise UsageError("the tokenizer has no chat template; set `chat_template` to a file")
    return tokenizer.chat_template


def _class_names(documents: list[Document]) -> list[str]:
    """Names of the classes in the training split: sorted, or by number where the labels are numbers."""
    labels = {document.label for document in documents}
    numbers = [label for label in labels if isinstance(label, int)]
    if len(numbers) == len(labels):
        return [str(number) for number in range(max(numbers, default=-1) + 1)]
    return sorted(map(str, labels))


def _class_number(document: Document, class_names: list[str]) -> int:
    label = str(document.label)
    if label not in class_names:
        raise UsageError(
            f"{document.key} has the label {document.label!r}, which no training text has; expected one of: "
            f"{', '.join(class_names)}"
        )
    return class_names.index(label)
