"""Hidden states of a language model's last layer: SpecForge and speculators. The model's head makes logits of them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

import numpy as np
import torch
from torch import Tensor

from logitcache.cache.outputs import Output
from logitcache.digest import array_digest
from logitcache.encodings import Values
from logitcache.errors import InvalidSource, UsageError
from logitcache.extras.interchange.files import MAX_FILE_BYTES, inflate, load_torch, read_bytes, reading
from logitcache.extras.interchange.protocol import ROWS_AT_ONCE, DenseRows, Importer
from logitcache.extras.interchange.sequences import content_digests

# C classes, H values of a hidden state, S tokens of a sequence

HIDDEN = "hidden_state"
"""Name of the output that stores the states."""
HEADS = ("lm_head.weight", "model.embed_tokens.weight")
"""Names of a model's head in its weights; the second where it is shared with the embedding."""
GZIP = 31
"""zlib's window bits for a gzip header."""
Head: TypeAlias = Tensor | np.ndarray | str | Path | Callable[[Tensor], Tensor]
"""The matrix (C, H), a .safetensors file with it, or a function from states float32 (S, H) to logits (S, C)."""


class _HiddenStates(Importer):
    """One file for each sequence, with its token ids and the states of the last layer.

    Row t predicts token t + 1; the state of the last token predicts none that the file has.
    """

    takes_head: ClassVar[bool] = True

    def __init__(self, source: Path, *, num_classes: int | None = None, head: Head | None = None) -> None:
        super().__init__(source, num_classes=num_classes)
        if head is None:
            raise UsageError(
                f"{self.tool} stores hidden states; the teacher's head makes logits of them. Add --head FILE, a "
                ".safetensors file of its weights (head=, also a function from states to logits)"
            )
        self.files = self._found()
        if not self.files:
            raise UsageError(f"{source} has no files {self.pattern}")
        tokens, sizes = [], set()
        for file in self.files:
            ids, states = self._checked(file)
            tokens.append(ids)
            sizes.add(states.shape[1])
        if len(sizes) != 1:
            raise InvalidSource(
                f"{source} has states of {', '.join(map(str, sorted(sizes)))} values; expected one size"
            )
        with reading(source):
            self.contents = content_digests(tokens)
        [size] = sizes
        self._head, notes = _head(head, size)
        self.num_classes = self._head(torch.zeros(1, size)).shape[1] if num_classes is None else num_classes
        self.num_samples = len(tokens)
        self.rows_per_sample = np.array([max(0, len(ids) - 1) for ids in tokens])
        self.outputs = {HIDDEN: Output(shape=(size,), encoding=Values(dtype="float16"))}
        self.dtype = "float16"
        self.missing = {
            "identity": "teacher, layers, tokenizer and template are not stored; the names are those given at import",
            "head": "not stored; the logits are those of the head given at import",
        }
        self.notes = {"alignment": "row t predicts token t + 1", "hidden_size": size, **notes}

    pattern: ClassVar[str]

    @abstractmethod
    def _found(self) -> list[Path]:
        """The files, in the order of the samples."""

    @abstractmethod
    def _read(self, file: Path) -> tuple[Any, Any]:
        """Token ids (S,) and states (S, H) of a file, as they are stored."""

    def _checked(self, file: Path) -> tuple[np.ndarray, Tensor]:
        with reading(file):
            ids, states = self._read(file)
            if not isinstance(ids, Tensor) or not isinstance(states, Tensor):
                raise InvalidSource(f"{file} lacks its token ids or hidden states")
            if ids.ndim != 1 or states.ndim != 2 or len(ids) != len(states) or not states.is_floating_point():
                raise InvalidSource(
                    f"{file} has token ids {tuple(ids.shape)} and states {tuple(states.shape)} of {states.dtype}; "
                    "expected (S,) and floats (S, H)"
                )
            return ids.numpy(), states

    def batches(self) -> Iterator[DenseRows]:
        start = 0
        for file in self.files:
            states_SH = self._checked(file)[1][:-1].float()
            for first in range(0, len(states_SH), ROWS_AT_ONCE):
                states = states_SH[first : first + ROWS_AT_ONCE]
                logits = self._head(states)
                if tuple(logits.shape) != (len(states), self.num_classes):
                    raise UsageError(
                        f"the head makes logits {tuple(logits.shape)} of {len(states)} states; expected "
                        f"({len(states)}, {self.num_classes})"
                    )
                yield DenseRows(0, start, logits.numpy(), file, outputs={HIDDEN: states.numpy()})
                start += len(states)


class SpecForge(_HiddenStates):
    """`rows_{a}-{b}/data_{i}.ckpt` or `.ckpt.gz`: `input_ids`, and `hidden_state` after the final norm."""

    name: ClassVar[str] = "specforge"
    tool: ClassVar[str] = "SpecForge"
    pattern: ClassVar[str] = "data_{i}.ckpt or data_{i}.ckpt.gz"

    def _found(self) -> list[Path]:
        return _numbered(self.source, "**/data_*.ckpt*", ("data_",), (".ckpt", ".ckpt.gz"))

    def _read(self, file: Path) -> tuple[Any, Any]:
        data = read_bytes(file)
        stored = load_torch(inflate(data, MAX_FILE_BYTES, GZIP) if file.suffix == ".gz" else data)
        states = stored.get("hidden_state")
        return stored.get("input_ids"), states[0] if isinstance(states, Tensor) and len(states) == 1 else states


class Speculators(_HiddenStates):
    """`hidden_states/hs_{i}.safetensors`: `token_ids`, and `hidden_states` (S, layers, H), the last layer last.

    Its files are expected to hold the state before the final norm, so the head is a function with this norm.
    """

    name: ClassVar[str] = "speculators"
    tool: ClassVar[str] = "speculators"
    pattern: ClassVar[str] = "hs_{i}.safetensors"

    def _found(self) -> list[Path]:
        return _numbered(self.source, "**/hs_*.safetensors", ("hs_",), (".safetensors",))

    def _read(self, file: Path) -> tuple[Any, Any]:
        from safetensors.torch import load

        stored = load(read_bytes(file))
        states = stored.get("hidden_states")
        return stored.get("token_ids"), states[:, -1] if states is not None and states.ndim == 3 else states


def _numbered(source: Path, pattern: str, prefixes: tuple[str, ...], suffixes: tuple[str, ...]) -> list[Path]:
    """Files by the number in their names.

    Raises:
        InvalidSource: a number occurs twice.
    """
    if not source.is_dir():
        raise UsageError(f"{source} is not a folder")
    found: dict[int, Path] = {}
    for path in sorted(source.glob(pattern)):
        suffix = next((each for each in suffixes if path.name.endswith(each)), None)
        number = "" if suffix is None else path.name.removesuffix(suffix).removeprefix(prefixes[0])
        if number.isdecimal() and len(number) < 10:
            if int(number) in found:
                raise InvalidSource(f"{found[int(number)]} and {path} have the same number")
            found[int(number)] = path
    return [found[number] for number in sorted(found)]


def _head(head: Head, size: int) -> tuple[Callable[[Tensor], Tensor], dict[str, Any]]:
    """A function from states (S, H) to logits (S, C), and what the provenance states of it.

    Raises:
        UsageError: no matrix for states of this size.
    """
    if callable(head) and not isinstance(head, Tensor):
        function = head

        def own(states_SH: Tensor) -> Tensor:
            with torch.no_grad():
                return torch.as_tensor(function(states_SH)).float().cpu()

        return own, {"head": "a function"}
    matrix = _matrix(Path(head)) if isinstance(head, str | Path) else torch.as_tensor(head)
    if matrix.ndim != 2 or matrix.shape[1] != size or not matrix.is_floating_point():
        raise UsageError(f"the head is {matrix.dtype} {tuple(matrix.shape)}; expected floats (C, {size})")
    matrix_CH = matrix.detach().float().cpu()
    return lambda states_SH: states_SH @ matrix_CH.T, {"head": array_digest(matrix_CH.numpy())}


def _matrix(file: Path) -> Tensor:
    """The head in a file of weights: by its name, or the only matrix."""
    from safetensors import safe_open

    if not file.is_file():
        raise UsageError(f"the head {file} does not exist")
    with reading(file), safe_open(str(file), framework="pt") as weights:
        names = list(weights.keys())
        name = next((each for each in HEADS if each in names), names[0] if len(names) == 1 else None)
        if name is None:
            raise UsageError(f"{file} has none of the tensors {', '.join(HEADS)}, and {len(names)} others")
        matrix: Tensor = weights.get_tensor(name)
    return matrix
