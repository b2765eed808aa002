"""DistillKit's compressed log-probabilities (arcee-ai), and those of open-instruct (allenai), which has the same codec.

Read with any settings of the codec; written without loss, all classes as exact float32 values.

Position t of a sequence has the log-probabilities of token t + 1 over the whole vocabulary at T = 1.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import yaml
from pydantic import BaseModel, Field, ValidationError
from torch import Tensor

from logitcache.cache.reader import LogitCache
from logitcache.data.tokens import TokenDataset
from logitcache.errors import InvalidSource, UsageError
from logitcache.extras.interchange.files import matching, read_bytes, reading
from logitcache.extras.interchange.parts import ExportResult, lists, table
from logitcache.extras.interchange.protocol import NO_IDENTITY, TAIL_KNOWN, Importer, SparseRows
from logitcache.extras.interchange.sequences import (
    Sequences,
    content_digests,
    exported_sequences,
    nested_lists,
    ragged_lists,
)
from logitcache.extras.interchange.tables import (
    check_table,
    columns,
    matrix,
    nested,
    open_parquet,
    ragged,
    record_batches,
)
from logitcache.storage.local import LocalStorage
from logitcache.strict_json import parse_json

# P positions, K entries

CONFIG, LEGACY_CONFIG = "compression_config.yaml", "legacy_logit_compression.json"
Float = Literal["float16", "bfloat16", "float32", "float64"]


class _Bin(BaseModel):
    scale_dtype: Float
    element_bits: int = Field(ge=1, le=32)
    num_elements: int = Field(ge=1)


class Codec(BaseModel):
    """`compression_config.yaml`."""

    d: int = Field(ge=2, le=2**24)
    k: int = Field(ge=1, le=2**16)
    exact_k: int = Field(ge=0)
    exact_dtype: Float = "float32"
    polynomial_terms: list[int | Literal["sqrt", "exp"]] | None = None
    term_dtype: Float = "float32"
    residual_bins: list[_Bin] = []
    delta_encoding: bool = True
    normalize_t: bool = False

    @property
    def num_bytes(self) -> int:
        """Of the values of one position."""
        bins = sum(_size(b.scale_dtype) + math.ceil(b.element_bits * b.num_elements / 8) for b in self.residual_bins)
        return self.exact_k * _size(self.exact_dtype) + len(self.polynomial_terms or []) * _size(self.term_dtype) + bins

    def ids(self, packed_PB: np.ndarray) -> np.ndarray:
        """The classes of some positions, int64 (P, K)."""
        return _unpack_bits(packed_PB, _index_bits(self.d), self.k)

    def values(self, data_PB: np.ndarray) -> Tensor:
        """The log-probabilities of some positions, float (P, K), as DistillKit's reader gives them."""
        rest = torch.from_numpy(np.array(data_PB, dtype=np.uint8))
        exact_dtype = getattr(torch, self.exact_dtype)

        def take(count: int, dtype: str) -> Tensor:
            nonlocal rest
            size = count * _size(dtype)
            part, rest = rest[:, :size].contiguous(), rest[:, size:]
            return part.view(getattr(torch, dtype)) if count else torch.empty(len(part), 0, dtype=getattr(torch, dtype))

        exact_PE = take(self.exact_k, self.exact_dtype)
        terms = self.polynomial_terms or []
        coefficients_PT = take(len(terms), self.term_dtype)
        residual = torch.zeros(len(rest), self.k - self.exact_k)
        start = 0
        for each in self.residual_bins:
            scale_P1 = take(1, each.scale_dtype)
            size = math.ceil(each.element_bits * each.num_elements / 8)
            packed, rest = rest[:, :size].numpy(), rest[:, size:]
            codes = torch.from_numpy(_unpack_bits(packed, each.element_bits, each.num_elements)).float()
            levels = codes * 2.0 - 1.0 if each.element_bits == 1 else codes - 2 ** (each.element_bits - 1)
            residual[:, start : start + each.num_elements] = levels * scale_P1
            start += each.num_elements
        approximate = residual.to(exact_dtype)
        if terms:
            count = self.k - self.exact_k
            dtype = coefficients_PT.dtype
            t = torch.linspace(0, 1, count, dtype=dtype) if self.normalize_t else torch.arange(count, dtype=dtype)
            powers = [t**term if isinstance(term, int) else getattr(torch, term)(t) for term in terms]
            fit = (torch.stack(powers, dim=-1) * coefficients_PT[:, None]).sum(dim=-1)
            approximate = fit + approximate
        values_PK = torch.cat([exact_PE, approximate], dim=-1)
        return values_PK.float().cumsum(dim=-1).to(exact_dtype) if self.delta_encoding else values_PK


class LegacyCodec(BaseModel):
    """The settings of DistillKit's first codec, which writes no file with them: `legacy_logit_compression.json`."""

    k: int = Field(ge=1, le=2**16)
    exact_k: int = Field(ge=0)
    polynomial_degree: int = Field(ge=0, le=64)
    vocab_size: int = Field(ge=2, le=2**24)
    invert_polynomial: bool = True
    with_sqrt_term: bool = False
    term_dtype: Float = "float32"

    @property
    def d(self) -> int:
        """The bits of ids are those of the vocabulary's size."""
        return self.vocab_size

    @property
    def num_words(self) -> int:
        """Of the ids of one position: whole ids in words of 64 bits."""
        return math.ceil(self.k / (64 // _index_bits(self.d)))

    def ids(self, words_PW: np.ndarray) -> np.ndarray:
        """The classes of some positions, int64 (P, K)."""
        bits = _index_bits(self.d)
        shifts = np.arange(64 // bits, dtype=np.uint64) * np.uint64(bits)
        parts = words_PW.astype(np.uint64)[:, :, None] >> shifts & np.uint64(2**bits - 1)
        ids: np.ndarray = parts.reshape(len(words_PW), -1)[:, : self.k].astype(np.int64)
        return ids

    def values(self, exact_PE: np.ndarray, coefficients_PT: np.ndarray) -> Tensor:
        """The log-probabilities of some positions, float32 (P, K)."""
        t = torch.arange(self.k - self.exact_k, dtype=torch.float32) + 1
        sign = -1 if self.invert_polynomial else 1
        powers = [t ** (sign * power) for power in range(self.polynomial_degree + 1)]
        powers += [t.sqrt()] if self.with_sqrt_term else []
        coefficients = torch.from_numpy(coefficients_PT.astype(np.float32))
        fit = (torch.stack(powers, dim=-1) * coefficients[:, None]).sum(dim=-1)
        return torch.cat([torch.from_numpy(exact_PE.astype(np.float32)), fit], dim=-1)

    @property
    def num_terms(self) -> int:
        return self.polynomial_degree + 1 + self.with_sqrt_term


class DistillKit(Importer):
    """`data_{n}.parquet` and `compression_config.yaml`; a row of a table is a sequence."""

    name: ClassVar[str] = "distillkit"
    tool: ClassVar[str] = "DistillKit"
    excess = 1.0  # the codec is lossy, and what it decodes can exceed 1 by much

    def __init__(self, source: Path, *, num_classes: int | None = None) -> None:
        super().__init__(source, num_classes=num_classes)
        found = matching(source, r"data_(\d{1,9})\.parquet")
        self._parts = [path for _, path in sorted(found, key=lambda pair: int(pair[0][1]))]
        if not self._parts:
            raise UsageError(f"{source} has no data_0.parquet")
        self._codec, config = self._read_codec()
        self.files = [*self._parts, config]
        self.require_classes(f"; {config.name} has ids below {self._codec.d:,}, often the vocabulary's size plus 1")
        self.k = self._codec.k
        expected = ["input_ids", *self._columns]
        lengths: list[int] = []
        digests = []
        for file in self._parts:
            reader = open_parquet(file)
            check_table(file, reader, expected)
            for batch in record_batches(file, reader, ["input_ids", self._columns[0]]):
                ids = ragged(batch["input_ids"])
                digests.append(content_digests(ids))
                positions = [len(each) for each in nested(batch[self._columns[0]])]
                for number, (each, count) in enumerate(zip(ids, positions, strict=True)):
                    if not 1 <= count <= len(each):
                        raise InvalidSource(
                            f"{file}: sequence {len(lengths) + number} has {count} positions for {len(each)} tokens"
                        )
                lengths += positions
        self.num_samples = len(lengths)
        self.rows_per_sample = np.array(lengths, dtype=np.int64)
        self.contents = np.concatenate(digests)
        self.missing = {
            "identity": f"{NO_IDENTITY}. The tokenizer and the order of the dataset are not stored; token ids are",
            "tail": f"{TAIL_KNOWN}. The codec is lossy: where its probabilities exceed 1, the row is normalised",
        }
        self.notes = {"codec": self._codec.model_dump(mode="json"), "alignment": "row t predicts token t + 1"}
        left_out = sorted({"messages", "text"} & set(columns(open_parquet(self._parts[0]))))
        if left_out:
            self.notes["columns_left_out"] = left_out

    @property
    def _columns(self) -> list[str]:
        if isinstance(self._codec, LegacyCodec):
            return ["packed_indices", "exact_values", "coeffs"]
        return ["bytepacked_indices", "compressed_logprobs"]

    def _read_codec(self) -> tuple[Codec | LegacyCodec, Path]:
        config, legacy = self.source / CONFIG, self.source / LEGACY_CONFIG
        try:
            if config.is_file():
                with reading(config):
                    codec: Codec | LegacyCodec = Codec.model_validate(yaml.safe_load(read_bytes(config, 2**20)))
                    assert isinstance(codec, Codec)
                    if codec.exact_k + sum(each.num_elements for each in codec.residual_bins) > codec.k:
                        raise InvalidSource(f"{config}: exact_k and residual_bins have more elements than k")
                    return codec, config
            if legacy.is_file():
                with reading(legacy):
                    codec = LegacyCodec.model_validate(parse_json(read_bytes(legacy, 2**20), max_bytes=2**20))
                    if codec.exact_k > codec.k:
                        raise InvalidSource(f"{legacy}: exact_k is above k")
                    return codec, legacy
        except InvalidSource as error:
            if isinstance(error.__cause__, ValidationError):
                first = error.__cause__.errors()[0]
                where = ".".join(map(str, first["loc"]))
                raise InvalidSource(f"{config if config.is_file() else legacy}: {where}: {first['msg']}") from None
            raise
        raise UsageError(
            f"{self.source} has no {CONFIG}, without which the bytes can't be decoded. For files of the "
            f"first codec, write its settings into {LEGACY_CONFIG}: k, exact_k, polynomial_degree, vocab_size, "
            "invert_polynomial, with_sqrt_term, term_dtype"
        )

    def batches(self) -> Iterator[SparseRows]:
        start = 0
        for file in self._parts:
            for batch in record_batches(file, open_parquet(file), self._columns):
                lists = [nested(batch[name]) for name in self._columns]
                flat = [[position for sequence in each for position in sequence] for each in lists]
                ids, values = self._decode(file, flat)
                yield SparseRows(0, start, ids, values.float().numpy(), file)
                start += len(ids)

    def _decode(self, file: Path, flat: list[list[np.ndarray]]) -> tuple[np.ndarray, Tensor]:
        codec = self._codec
        if isinstance(codec, LegacyCodec):
            widths = [codec.num_words, codec.exact_k, codec.num_terms]
        else:
            widths = [math.ceil(codec.k * _index_bits(codec.d) / 8), codec.num_bytes]
        if len({len(each) for each in flat}) != 1:
            raise InvalidSource(f"{file} has columns with different numbers of positions")
        parts = [matrix(each, width, file, name) for each, width, name in zip(flat, widths, self._columns, strict=True)]
        return codec.ids(parts[0]), codec.values(*parts[1:])


class OpenInstruct(DistillKit):
    """As DistillKit. The columns `messages` and `text` may hold user data and are not imported."""

    name: ClassVar[str] = "open_instruct"
    tool: ClassVar[str] = "open-instruct"


def export_distillkit(
    cache: LogitCache,
    folder: Path,
    *,
    views: str | None,
    top: int | None,
    tokens: TokenDataset | Sequence[Any] | None,
) -> ExportResult:
    """Write one view as `compression_config.yaml` and `data_{n}.parquet`, one file per block.

    Raises:
        UsageError: DistillKit can't store this cache, or the token ids are missing.
        SampleMismatch: the token ids are not those of the cache.
    """
    sequences = exported_sequences(cache, tool=DistillKit.tool, views=views, top=top, tokens=tokens)
    if tokens is None:
        raise UsageError("DistillKit stores token ids, which a cache lacks: add the cache's own dataset with --data")
    codec = Codec(d=cache.num_classes, k=sequences.k, exact_k=sequences.k, delta_encoding=False)
    config = yaml.safe_dump(codec.model_dump(mode="json"), sort_keys=False).encode()
    if LocalStorage(folder).get(CONFIG, limit=2**20) not in (None, config):
        raise UsageError(f"{folder} contains another {CONFIG}; an export needs a folder of its own")
    tables = functools.partial(_tables, sequences, codec)
    result = sequences.write(folder, "data_{}.parquet", tables, also=[CONFIG])
    LocalStorage(folder).put(CONFIG, config)  # last: without it the folder can't be read
    return result


def _tables(sequences: Sequences, codec: Codec, block: int) -> Iterator[Any]:
    import pyarrow as pa

    labels = sequences.labels()
    for samples in sequences.groups(block):
        ids_PK, log_probs_PK = sequences.entries(labels, samples)
        offsets = np.concatenate([[0], np.cumsum(sequences.lengths(samples))])
        exact_PB = np.ascontiguousarray(log_probs_PK, dtype=np.float32).view(np.uint8)
        tokens = [sequences.ids(sample) for sample in samples]
        yield table(
            {
                "input_ids": ragged_lists(tokens, pa.uint64()),
                "compressed_logprobs": nested_lists(lists(exact_PB), offsets),
                "bytepacked_indices": nested_lists(lists(_pack_bits(ids_PK, _index_bits(codec.d))), offsets),
            }
        )


def _size(dtype: str) -> int:
    size: int = getattr(torch, dtype).itemsize
    return size


def _index_bits(d: int) -> int:
    """As DistillKit computes it, in float32."""
    return int(torch.log2(torch.tensor(d, dtype=torch.float32)).ceil())


def _unpack_bits(packed_PB: np.ndarray, bits: int, count: int) -> np.ndarray:
    """Numbers of some bits each, most significant bit first, int64 (P, count)."""
    stream = np.unpackbits(np.ascontiguousarray(packed_PB, dtype=np.uint8), axis=1)[:, : bits * count]
    weights = 2 ** np.arange(bits - 1, -1, -1, dtype=np.int64)
    numbers: np.ndarray = stream.reshape(len(packed_PB), count, bits) @ weights
    return numbers


def _pack_bits(numbers_PK: np.ndarray, bits: int) -> np.ndarray:
    """The inverse of `_unpack_bits`: uint8 (P, bytes), the last byte of a row filled with zeros."""
    if int(numbers_PK.max()) >= 2**bits:
        raise UsageError(f"DistillKit stores class numbers in {bits} bits, and class {numbers_PK.max()} needs more")
    digits = numbers_PK[:, :, None] >> np.arange(bits - 1, -1, -1) & 1
    return np.packbits(digits.astype(np.uint8).reshape(len(numbers_PK), -1), axis=1)
