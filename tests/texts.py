"""Short texts as token ids of different lengths, and Hugging Face models that read them; named as `tests.texts:function`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from logitcache.data.tokens import TokenDataset

VOCABULARY = 24
WORDS = 4
"""Ids from 2 on that only texts of one class have."""


class Texts:
    """Texts of 3 to 11 tokens; two of three words are of the class's own."""

    num_classes = 3

    def __init__(self, count: int = 60, kind: str = "lists", seed: int = 0) -> None:
        draw = np.random.default_rng(seed)
        self.targets = np.arange(count) % self.num_classes
        lengths = draw.integers(3, 12, size=count)
        self.tokens = [
            np.where(
                draw.random(length) < 0.67,
                2 + WORDS * target + draw.integers(0, WORDS, size=length),
                2 + WORDS * self.num_classes + draw.integers(0, 8, size=length),
            )
            for length, target in zip(lengths, self.targets, strict=True)
        ]
        self.keys = [f"text/{index:03d}" for index in range(count)]
        self.kind = kind
        self.class_names = ["sport", "science", "music"]

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        ids = self.tokens[index]
        target = int(self.targets[index])
        if self.kind == "bare arrays":
            return ids, target
        mask = np.ones_like(ids)
        if self.kind == "lists":
            return {"input_ids": ids.tolist(), "attention_mask": mask.tolist()}, target
        if self.kind == "arrays":
            return {"input_ids": ids, "attention_mask": mask}, target
        if self.kind == "tensors":
            return {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}, target
        assert self.kind == "numbers"
        return {"word": int(ids[0]), "weight": 1.0}, target


def texts(count: int = 60, kind: str = "lists") -> dict[str, Texts]:
    return {"train": Texts(count, kind), "test": Texts(30, kind, seed=1)}


def sentences(vocab_size: int = VOCABULARY, count: int = 24, length: int = 11) -> dict[str, TokenDataset]:
    """Sequences of 1 to `length` random token ids for a causal language model; the longest first."""

    def split(count: int, seed: int) -> TokenDataset:
        draw = np.random.default_rng(seed)
        lengths = [length, *draw.integers(1, length + 1, size=count - 1)]
        return TokenDataset(
            [draw.integers(0, vocab_size, size=each) for each in lengths],
            keys=[f"{seed}/{number}" for number in range(count)],
            task="causal",
            vocab_size=vocab_size,
            tokenization={"task": "causal", "vocab_size": vocab_size},
        )

    return {"train": split(count, 0), "test": split(4, 1)}


BYTE_TOKENS = ["<pad>", "<s>", "</s>", "<mask>"]
"""Special tokens of the byte tokenizer: ids 0 to 3."""
BYTE_VOCABULARY = 4 + 256


def byte_tokenizer(path: Path, *, special_tokens: bool = False) -> Path:
    """A tokenizer with one token for each byte of UTF-8, from id 4 on; optionally one that puts <s> and </s> around."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*BYTE_TOKENS, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.add_special_tokens(BYTE_TOKENS)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    if special_tokens:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
        )
    tokenizer.save(str(path))
    return path


def pad_to_the_left(inputs: list[Any]) -> dict[str, torch.Tensor]:
    """A collate function of the user's own."""
    longest = max(len(each["input_ids"]) for each in inputs)
    padded = {
        name: [[0] * (longest - len(each[name])) + list(each[name]) for each in inputs]
        for name in ("input_ids", "attention_mask")
    }
    return {name: torch.tensor(values) for name, values in padded.items()}


def pad_with_a_tokenizer(inputs: list[Any]) -> Any:
    """A collate function as Hugging Face's: a mapping that is no dict, of NumPy arrays."""
    from transformers import BatchEncoding

    return BatchEncoding({name: values.numpy() for name, values in pad_to_the_left(inputs).items()})


def drop_the_last(inputs: list[Any]) -> dict[str, torch.Tensor]:
    """A collate function that loses a sample."""
    return pad_to_the_left(inputs[: max(len(inputs) - 1, 1)])


def bert(num_classes: int, layers: int = 2, seed: int = 0) -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
        num_labels=num_classes,
    )
    return BertForSequenceClassification(config)


def distilbert(num_classes: int) -> nn.Module:
    from transformers import DistilBertConfig, DistilBertForSequenceClassification

    config = DistilBertConfig(
        vocab_size=VOCABULARY,
        dim=16,
        n_layers=1,
        n_heads=2,
        hidden_dim=32,
        max_position_embeddings=16,
        num_labels=num_classes,
    )
    return DistilBertForSequenceClassification(config)


def vit(num_classes: int, layers: int = 1) -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        image_size=8,
        patch_size=4,
        num_channels=1,
        hidden_size=16,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=32,
        num_labels=num_classes,
    )
    return ViTForImageClassification(config)


class BagOfTokens(nn.Module):
    """The mean of token embeddings, from a mapping as the one argument; gives a mapping with `logits`."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 8)
        self.head = nn.Linear(8, num_classes)

    def forward(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        mask = batch["attention_mask"].unsqueeze(-1).float()
        mean = (self.embedding(batch["input_ids"]) * mask).sum(dim=1) / mask.sum(dim=1)
        return {"logits": self.head(mean)}


class OneWord(nn.Module):
    """One word of a text and its weight, as keywords."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, num_classes)

    def forward(self, word: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.embedding(word) * weight.unsqueeze(-1).float()
        return logits


class Pair(nn.Module):
    """A model that gives a tuple, as with `return_dict=False`."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Flatten(), nn.Linear(64, num_classes))

    def forward(self, inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.inner(inputs), inputs
