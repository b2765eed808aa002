"""Token sequences: a dataset of token ids, the rows of each sequence, and batches of similar length.

A row is one prediction. In a causal language model it is that of the next token, at the position before it; in a masked
one it is that of the token at its own position.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from logitcache.data.batching import NO_TARGET
from logitcache.errors import UsageError

# N samples, T tokens of all samples, R rows, B sequences of a batch, P rows of a packed batch, L length

CAUSAL = "causal"
MASKED = "masked"
CLASSIFICATION = "classification"
TASKS = (CAUSAL, MASKED, CLASSIFICATION)
NO_CLASS = -1
"""The target of a sample that has no class."""


def content_of_ids(ids: np.ndarray) -> bytes:
    """The bytes that the digest of a sequence of token ids is computed from."""
    return b"token ids, int32, little-endian\n" + ids.astype("<i4").tobytes()


class TokenDataset:
    """Sequences of token ids. Item i is ({"input_ids", "attention_mask"}, target), both tensors int64 (L,).

    The target is the sample's class, or for language models the true token of each row, int64 (rows,).

    Args:
        sequences: the token ids of each sample.
        keys: one unique string per sample.
        task: "causal", "masked" or "classification".
        vocab_size: number of token ids.
        tokenization: how the ids were made, as JSON; part of a cache's identity.
        targets: class numbers; default -1, which is no class.
        class_names: of the targets.
        predicted: for each sample a mask of the tokens that a row predicts. Default: all. The first token of a causal
            sequence never has a row.
        token_bytes: for each sample the bytes of text of each token; gives `num_bytes`.
        documents: number of the document that each sample is from; a split keeps documents whole.
        special_ids: ids that text views never change.
        mask_id: id of the mask token; None if there is none.

    Raises:
        UsageError: an empty sequence, or an id beyond the vocabulary; names the sample.
    """

    in_memory = True

    def __init__(
        self,
        sequences: Sequence[np.ndarray],
        *,
        keys: Sequence[str],
        task: str,
        vocab_size: int,
        tokenization: Mapping[str, Any],
        targets: np.ndarray | None = None,
        class_names: list[str] | None = None,
        predicted: Sequence[np.ndarray] | None = None,
        token_bytes: Sequence[np.ndarray] | None = None,
        documents: np.ndarray | None = None,
        special_ids: Sequence[int] = (),
        mask_id: int | None = None,
    ) -> None:
        if task not in TASKS:
            raise UsageError(f"unknown task {task!r}; expected one of: {', '.join(TASKS)}")
        if not len(sequences):
            raise UsageError("the dataset has no text; expected at least one sequence of tokens")
        self.keys = list(keys)
        self.task = task
        self.vocab_size = vocab_size
        self.tokenization = dict(tokenization)
        self.class_names = class_names
        self.special_ids = tuple(special_ids)
        self.mask_id = mask_id
        count = len(sequences)
        self.targets = np.full(count, NO_CLASS, dtype=np.int64) if targets is None else np.asarray(targets, np.int64)
        self.documents = np.arange(count) if documents is None else np.asarray(documents, dtype=np.int64)
        self.lengths = np.array([len(ids) for ids in sequences], dtype=np.int64)
        """Tokens of each sample, int64 (N,)."""
        self._starts = np.concatenate([[0], np.cumsum(self.lengths)]).astype(np.int64)
        self._ids = np.concatenate([np.asarray(ids, dtype=np.int32) for ids in sequences])
        self._check_ids()
        self.rows_per_sample: np.ndarray | None = None
        """Rows of each sample, int64 (N,); None for classification, where each sample has one row."""
        self.row_positions: np.ndarray | None = None
        """Position of each row in its sample, int32 (R,); None if it is 0, 1, 2, …"""
        self._row_tokens: np.ndarray | None = None
        self._token_bytes = None if token_bytes is None else np.concatenate(token_bytes).astype(np.int32)
        if task != CLASSIFICATION:
            self._place_rows(None if predicted is None else np.concatenate([np.asarray(p, bool) for p in predicted]))

    @property
    def num_classes(self) -> int:
        """Classes of a row: token ids, or those of the targets."""
        if self.task != CLASSIFICATION:
            return self.vocab_size
        return len(self.class_names) if self.class_names else int(self.targets.max()) + 1

    @property
    def num_bytes(self) -> int | None:
        """Bytes of text that the rows predict, for bits per byte; None if unknown."""
        if self._token_bytes is None or self._row_tokens is None:
            return None
        return int(self._token_bytes[self._row_tokens].sum())

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> tuple[dict[str, Tensor], int | Tensor]:
        ids = torch.from_numpy(self.ids(index).astype(np.int64))
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, self._target(index)

    def _target(self, index: int) -> int | Tensor:
        """The class of a sample, or the true token of each of its rows."""
        if self._row_tokens is None:
            return int(self.targets[index])
        first, stop = np.searchsorted(self._row_tokens, self._starts[index : index + 2])
        return torch.from_numpy(self.row_targets(np.arange(first, stop)))

    def target_of_view(self, index: int, target: Any, selected: Tensor) -> Any:
        """A sample's target in a view that masks tokens: in a masked model, only the selected tokens have a class.

        The others are visible in the input, so their class, -100, does not count in losses and measures.

        Args:
            index: of the sample.
            target: from `dataset[index]`.
            selected: the tokens that the view selected, bool (L,).
        """
        if self.task != MASKED or self._row_tokens is None:
            return target
        first, stop = np.searchsorted(self._row_tokens, self._starts[index : index + 2])
        positions = torch.from_numpy(self._row_tokens[first:stop] - self._starts[index])
        return target.masked_fill(~selected[positions], NO_TARGET)

    def ids(self, index: int) -> np.ndarray:
        """The token ids of a sample, int32 (L,)."""
        if not 0 <= index < len(self):
            raise IndexError(f"there is no sample {index} of {len(self)}")
        return self._ids[self._starts[index] : self._starts[index + 1]]

    def content(self, index: int) -> bytes:
        """The token ids, which are all that a model is given."""
        return content_of_ids(self.ids(index))

    def row_targets(self, rows: Any) -> np.ndarray:
        """The true token of each row, int64 (B,), whatever a view does to the inputs.

        Args:
            rows: row numbers of this dataset, int (B,).

        Raises:
            UsageError: the task is classification, where `targets` has the classes.
        """
        if self._row_tokens is None:
            raise UsageError("the samples of a classification have targets, not tokens to predict; use `targets`")
        tokens: np.ndarray = self._ids[self._row_tokens[np.asarray(rows)]].astype(np.int64)
        return tokens

    def select(self, indices: np.ndarray) -> TokenDataset:
        """Some samples in a given order, with their keys."""
        chosen = [int(index) for index in indices]

        def parts(of_tokens: np.ndarray) -> list[np.ndarray]:
            return [of_tokens[self._starts[index] : self._starts[index + 1]] for index in chosen]

        predicted = None
        if self._row_tokens is not None:
            is_predicted = np.zeros(len(self._ids), dtype=bool)
            is_predicted[self._row_tokens] = True
            predicted = parts(is_predicted)
        return TokenDataset(
            parts(self._ids),
            keys=[self.keys[index] for index in chosen],
            task=self.task,
            vocab_size=self.vocab_size,
            tokenization=self.tokenization,
            targets=self.targets[chosen],
            class_names=self.class_names,
            predicted=predicted,
            token_bytes=None if self._token_bytes is None else parts(self._token_bytes),
            documents=self.documents[chosen],
            special_ids=self.special_ids,
            mask_id=self.mask_id,
        )

    def _check_ids(self) -> None:
        if not self.lengths.all():
            key = self.keys[int(self.lengths.argmin())]
            raise UsageError(f"sample {key!r} has no tokens; remove it, or use a tokenizer with special tokens")
        beyond = np.flatnonzero((self._ids < 0) | (self._ids >= self.vocab_size))
        if len(beyond):
            sample = int(np.searchsorted(self._starts, beyond[0], side="right")) - 1
            raise UsageError(
                f"sample {self.keys[sample]!r} has the token id {self._ids[beyond[0]]}, beyond a vocabulary of "
                f"{self.vocab_size} (0 to {self.vocab_size - 1}); use the tokenizer of this vocabulary"
            )

    def _place_rows(self, predicted: np.ndarray | None) -> None:
        positions = np.arange(len(self._ids)) - np.repeat(self._starts[:-1], self.lengths)
        is_predicted = np.ones(len(self._ids), dtype=bool) if predicted is None else predicted.copy()
        if self.task == CAUSAL:
            is_predicted[self._starts[:-1]] = False
            positions -= 1
        tokens = np.flatnonzero(is_predicted)
        counts = np.add.reduceat(is_predicted, self._starts[:-1], dtype=np.int64)
        within = np.arange(len(tokens)) - np.repeat(np.cumsum(counts) - counts, counts)
        self._row_tokens, self.rows_per_sample = tokens, counts
        if not np.array_equal(within, positions[tokens]):
            self.row_positions = positions[tokens].astype(np.int32)


def length_batches(lengths: np.ndarray, batch_size: int, max_tokens: int | None = None) -> list[np.ndarray]:
    """Batches of sequences of similar length, as positions in `lengths`: a pure function of the lengths.

    The longest sequences come first, so that the first batch takes the most memory. Equal lengths keep their order.

    Args:
        lengths: int (N,).
        batch_size: most sequences of a batch.
        max_tokens: most tokens of a batch with its padding; a longer sequence is a batch of its own.
    """
    order = np.argsort(-np.asarray(lengths, dtype=np.int64), kind="stable")
    batches = []
    start = 0
    while start < len(order):
        size = batch_size
        if max_tokens is not None:
            size = max(1, min(size, max_tokens // max(int(lengths[order[start]]), 1)))
        batches.append(order[start : start + size])
        start += size
    return batches
