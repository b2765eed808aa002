"""Tokenizers from local files: a folder, a GGUF file, or a `tokenizer.json`. Nothing is downloaded."""

from __future__ import annotations

import hashlib
import importlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from logitcache.digest import json_digest
from logitcache.errors import DatasetUnavailable, UsageError

# L length

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "merges.txt")
"""Files of a folder that determine its tokenizer; the first one alone is enough."""
_MASK_TOKENS = ("[MASK]", "<mask>")
_TEXTS_AT_ONCE = 1000


@dataclass(frozen=True, kw_only=True)
class Tokenizer:
    """A tokenizer, and what identifies it wherever its files lie."""

    backend: Any
    """A `tokenizers.Tokenizer`."""
    name: str
    """The file that defines it, such as "tokenizer.json"; "gguf" for a GGUF file."""
    sha256: str
    """Of that file; of all files, where several define it; of the tokenizer's fields in a GGUF file."""
    vocab_size: int
    """The largest token id, plus 1."""
    special_ids: tuple[int, ...]
    mask_id: int | None
    chat_template: str | None = None
    render: Callable[[Any, str], str] | None = None
    """Renders a list of messages with a chat template."""


@dataclass(frozen=True)
class Encoded:
    """The token ids of one text, or of one part of it."""

    ids: np.ndarray
    """Int32 (L,)."""
    starts: np.ndarray
    """Where each token starts in the text, in characters, int64 (L,)."""
    num_bytes: np.ndarray
    """Bytes of UTF-8 from the start of each token to that of the next one, int64 (L,); 0 for special tokens."""


def load_tokenizer(path: str | Path) -> Tokenizer:
    """A tokenizer from a folder in the format of `transformers`, a `.gguf` file, or a `.json` file of `tokenizers`.

    Raises:
        DatasetUnavailable: the file or a package is missing.
        UsageError: the file can't be read.
    """
    path = Path(path)
    if not path.exists():
        raise DatasetUnavailable(
            f"the tokenizer {path} does not exist; set `tokenizer` to a folder with tokenizer.json, a .gguf file, or a "
            ".json file of the package tokenizers"
        )
    # Otherwise a forked DataLoader worker prints a warning. The dataset keeps arrays, so no worker tokenizes.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    if path.suffix == ".json":
        return _from_json(path)
    if path.suffix == ".gguf":
        loaded = _from_transformers(path.parent, gguf_file=path.name)
        return _described(loaded, name="gguf", sha256=gguf_digest(path, "tokenizer."))
    present = [name for name in TOKENIZER_FILES if (path / name).is_file()]
    if not present:
        raise DatasetUnavailable(f"{path} has no tokenizer; expected one of: {', '.join(TOKENIZER_FILES)}")
    loaded = _from_transformers(path)
    digests = [hashlib.sha256((path / name).read_bytes()).hexdigest() for name in present]
    single = present[0] == TOKENIZER_FILES[0] or len(present) == 1
    return _described(loaded, name=present[0], sha256=digests[0] if single else json_digest([present, digests]))


def loaded_tokenizer(loaded: Any) -> Tokenizer:
    """A tokenizer of `transformers` that is in memory; it is copied.

    Its SHA-256 is that of its JSON without padding and truncation. It differs from that of a tokenizer's file.

    Raises:
        UsageError: it is not a fast tokenizer.
    """
    if getattr(loaded, "backend_tokenizer", None) is None:
        raise _not_fast(loaded)
    backend = need_package("tokenizers", "copies a tokenizer").Tokenizer.from_str(loaded.backend_tokenizer.to_str())
    backend.no_padding()
    backend.no_truncation()
    return _described(loaded, backend, name="in memory", sha256=hashlib.sha256(backend.to_str().encode()).hexdigest())


def encode(
    tokenizer: Tokenizer, texts: Sequence[str], *, max_length: int | None, split: bool, special_tokens: bool
) -> Iterator[list[Encoded]]:
    """The token ids of each text: one part, or with `split` as many as are needed.

    Args:
        tokenizer: is configured by this call.
        texts: any number.
        max_length: most tokens of a part, special tokens included; None is no limit.
        split: split longer texts into parts instead of cutting them off.
        special_tokens: add the tokenizer's special tokens to each part.

    Raises:
        UsageError: `max_length` leaves no room for a token.
    """
    backend = tokenizer.backend
    backend.no_padding()
    backend.no_truncation()
    if max_length is not None:
        added = backend.num_special_tokens_to_add(False) if special_tokens else 0
        if max_length <= added:
            raise UsageError(f"max_length is {max_length}; expected more than the {added} special tokens of each text")
        backend.enable_truncation(max_length)
    for start in range(0, len(texts), _TEXTS_AT_ONCE):
        some = texts[start : start + _TEXTS_AT_ONCE]
        encodings = backend.encode_batch(some, add_special_tokens=special_tokens)
        for text, encoding in zip(some, encodings, strict=True):
            bytes_before = _bytes_before(text)
            yield [_part(part, bytes_before) for part in [encoding, *(encoding.overflowing if split else ())]]


def gguf_digest(path: Path, prefix: str) -> str:
    """SHA-256 of the metadata of a GGUF file whose names start with a prefix.

    Raises:
        DatasetUnavailable: the package gguf is missing.
        UsageError: not a GGUF file.
    """
    reader_class = need_package("gguf", "reads .gguf files").GGUFReader
    try:
        fields = reader_class(path).fields
    except (ValueError, OSError, IndexError, KeyError) as error:
        raise UsageError(f"{path} is not a GGUF file: {error}") from error
    digest = hashlib.sha256()
    for name in sorted(name for name in fields if name.startswith(prefix)):
        digest.update(f"{name}\n".encode())
        for part in fields[name].parts:
            digest.update(np.ascontiguousarray(part).data)
    return digest.hexdigest()


def need_package(module: str, use: str) -> Any:
    """A module of the extra `hf`.

    Raises:
        DatasetUnavailable: it is not installed; names the extra.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise DatasetUnavailable(
            f"the package {module} can't be imported; it {use}. Install it: pip install 'logitcache[hf]' ({error})"
        ) from error


def _bytes_before(text: str) -> np.ndarray:
    """Bytes of UTF-8 before each character of a text, and in all of it, int64 (characters + 1,)."""
    characters = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")
    widths = 1 + sum((characters >= limit).astype(np.int64) for limit in (0x80, 0x800, 0x10000))
    return np.concatenate([[0], np.cumsum(widths)])


def _part(encoding: Any, bytes_before: np.ndarray) -> Encoded:
    starts, ends = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2).T
    num_bytes = np.zeros(len(starts), dtype=np.int64)
    ordinary = np.flatnonzero(np.array(encoding.special_tokens_mask) == 0)
    if len(ordinary):
        limits = bytes_before[[*starts[ordinary], ends[ordinary[-1]]]]
        num_bytes[ordinary] = np.diff(limits)
    return Encoded(np.array(encoding.ids, dtype=np.int32), starts, num_bytes)


def _from_json(path: Path) -> Tokenizer:
    tokenizers = need_package("tokenizers", "reads tokenizer.json")
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the package raises bare exceptions
        raise UsageError(f"{path} is not a tokenizer of the package tokenizers: {error}") from error
    return _with_backend(backend, name=path.name, sha256=hashlib.sha256(path.read_bytes()).hexdigest())


def _from_transformers(folder: Path, **options: Any) -> Any:
    transformers = need_package("transformers", "loads tokenizers from a folder or a .gguf file")
    if options:
        need_package("gguf", "reads .gguf files")
    try:
        return transformers.AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, **options
        )
    except Exception as error:
        raise UsageError(f"the tokenizer in {folder} can't be loaded: {type(error).__name__}: {error}") from error


def _not_fast(loaded: Any) -> UsageError:
    return UsageError(
        f"{type(loaded).__name__} has no fast tokenizer; save the tokenizer as tokenizer.json with transformers"
    )


def _described(loaded: Any, backend: Any = None, *, name: str, sha256: str) -> Tokenizer:
    backend = backend or getattr(loaded, "backend_tokenizer", None)
    if backend is None:
        raise _not_fast(loaded)
    template = loaded.chat_template if isinstance(loaded.chat_template, str) else None

    def render(messages: Any, chat_template: str) -> str:
        rendered: str = loaded.apply_chat_template(messages, tokenize=False, chat_template=chat_template)
        return rendered

    return _with_backend(
        backend,
        name=name,
        sha256=sha256,
        special_ids=loaded.all_special_ids,
        mask_id=loaded.mask_token_id,
        chat_template=template,
        render=render,
    )


def _with_backend(
    backend: Any, *, special_ids: Sequence[int] = (), mask_id: int | None = None, **known: Any
) -> Tokenizer:
    added = backend.get_added_tokens_decoder()
    special = {token for token, entry in added.items() if entry.special} | set(special_ids)
    if mask_id is None:
        mask_id = next(filter(lambda token: token is not None, map(backend.token_to_id, _MASK_TOKENS)), None)
    return Tokenizer(
        backend=backend,
        vocab_size=max(backend.get_vocab(with_added_tokens=True).values()) + 1,
        special_ids=tuple(sorted(special)),
        mask_id=mask_id,
        **known,
    )
