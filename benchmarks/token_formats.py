"""Other systems' ways of storing a language model's distributions, written and read by small functions of our own.

From descriptions of what each stores, not from their code: files of top-k entries, and what a loss can read back from
them. What differs is the number format, the coding of class ids, and what is known of the classes without an entry.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numcodecs.zstd import Zstd
from peer_formats import pack_bits, unpack_bits
from torch import Tensor

from logitcache.targets import SparseTargets

# N rows, K entries of a row, C classes

TEMPERATURES = (1.0, 2.0, 4.0)
ROWS_AT_ONCE = 512


@dataclass(frozen=True)
class Entries:
    """The most probable classes of each row, largest first."""

    ids: Tensor
    """int64 (N, K)."""
    logits: Tensor
    """Float32 (N, K)."""
    log_sums: Tensor
    """Float32 (N, 3): log-sum-exp of all logits of a row, divided by each of `TEMPERATURES`."""

    @property
    def log_probs(self) -> Tensor:
        return self.logits - self.log_sums[:, :1]


def entries_of(logits_NC: Tensor, k: int) -> Entries:
    parts = []
    for rows_BC in logits_NC.split(ROWS_AT_ONCE):
        values_BK, ids_BK = rows_BC.topk(k, dim=1)
        sums = torch.stack([(rows_BC / temperature).logsumexp(dim=1) for temperature in TEMPERATURES], dim=1)
        parts.append((ids_BK, values_BK, sums))
    return Entries(*(torch.cat(each) for each in zip(*parts, strict=True)))


@dataclass(frozen=True)
class TokenFormat:
    """A format of files: entries to a file, and a file to targets."""

    name: str
    k: int
    write: Callable[[Entries, Path], None]
    read: Callable[[Path, int], SparseTargets]
    others_are_one_class: bool = False
    """Whether its loss counts all classes without an entry as one class. Otherwise they have probability 0."""


def renormalised(ids: np.ndarray, log_probs: np.ndarray, num_classes: int) -> SparseTargets:
    """The entries alone, with sum 1."""
    log_p_NK = torch.tensor(log_probs, dtype=torch.float32).log_softmax(dim=1)
    no_tail_N = torch.full((len(log_p_NK),), -math.inf)
    return SparseTargets(torch.tensor(ids, dtype=torch.int64), log_p_NK, no_tail_N, num_classes)


def with_the_rest(ids: np.ndarray, log_probs: np.ndarray, num_classes: int) -> SparseTargets:
    """The entries, and what they leave of 1."""
    log_p_NK = torch.tensor(log_probs, dtype=torch.float32)
    rest_N = (1.0 - log_p_NK.exp().sum(dim=1)).clamp(min=1e-8).log()
    return SparseTargets(torch.tensor(ids, dtype=torch.int64), log_p_NK, rest_N, num_classes)


def distillkit(k: int, exact: int, terms: int, num_classes: int) -> TokenFormat:
    """Parquet: ids in as many bits as they need; the first log-probabilities in float16, a polynomial for the others.

    The polynomial is in the root of the rank and is fitted in float64. DistillKit's default loss renormalises.
    """
    bits = (num_classes - 1).bit_length()
    rank = np.arange(k - exact, dtype=np.float64) / (k - exact)
    design = np.stack([rank ** (power / 2) for power in range(terms)], axis=1)

    def write(entries: Entries, path: Path) -> None:
        log_p_NK = entries.log_probs.numpy()
        fitted = np.linalg.lstsq(design, log_p_NK[:, exact:].T.astype(np.float64), rcond=None)[0].T.astype(
            "<f4", order="C"
        )
        values = np.concatenate(
            [log_p_NK[:, :exact].astype("<f2", order="C").view(np.uint8), fitted.view(np.uint8)], axis=1
        )
        ids = np.stack([pack_bits(row, bits) for row in entries.ids.numpy()])
        columns = {"compressed_logprobs": list(values), "bytepacked_indices": list(ids)}
        pq.write_table(pa.table({name: pa.array(rows, pa.list_(pa.uint8())) for name, rows in columns.items()}), path)

    def read(path: Path, num_classes: int) -> SparseTargets:
        table = pq.read_table(path)
        values, packed = (
            np.asarray(table[name].combine_chunks().flatten()).reshape(table.num_rows, -1)
            for name in ("compressed_logprobs", "bytepacked_indices")
        )
        ids = np.stack([unpack_bits(row, bits, k) for row in packed])
        first = np.ascontiguousarray(values[:, : 2 * exact]).view("<f2").astype(np.float32)
        others = np.ascontiguousarray(values[:, 2 * exact :]).view("<f4") @ design.T
        return renormalised(ids, np.concatenate([first, others], axis=1), num_classes)

    return TokenFormat("DistillKit", k, write, read)


def maxtext(k: int) -> TokenFormat:
    """The k largest logits in float32 and ids of one to three bytes, with zstd in the place of ArrayRecord's coding.

    The logits have no normaliser, so the mass of the other classes is lost.
    """

    def write(entries: Entries, path: Path) -> None:
        count = np.array([entries.ids.numel()], dtype="<i8").tobytes()
        ids = varints(entries.ids.numpy().ravel())
        path.write_bytes(Zstd(level=3).encode(count + entries.logits.numpy().tobytes() + ids))

    def read(path: Path, num_classes: int) -> SparseTargets:
        data = np.frombuffer(Zstd().decode(path.read_bytes()), dtype=np.uint8)
        end_of_logits = 8 + 4 * int(data[:8].view("<i8")[0])
        logits, ids = data[8:end_of_logits].view("<f4"), from_varints(data[end_of_logits:])
        return renormalised(ids.reshape(-1, k), logits.reshape(-1, k), num_classes)

    return TokenFormat("MaxText", k, write, read)


def axolotl(k: int) -> TokenFormat:
    """Parquet with lists of log-probabilities in float64 and of ids in int64; the reader renormalises."""

    def write(entries: Entries, path: Path) -> None:
        log_p = pa.array(list(entries.log_probs.double().numpy()), pa.list_(pa.float64()))
        ids = pa.array(list(entries.ids.numpy()), pa.list_(pa.int64()))
        pq.write_table(pa.table({"logprobs": log_p, "target_token_ids": ids}), path)

    def read(path: Path, num_classes: int) -> SparseTargets:
        table = pq.read_table(path)
        log_p, ids = (
            np.asarray(table[name].combine_chunks().flatten()).reshape(-1, k)
            for name in ("logprobs", "target_token_ids")
        )
        return renormalised(ids, log_p, num_classes)

    return TokenFormat("axolotl", k, write, read)


def megatron(k: int) -> TokenFormat:
    """zstd of tensors: log-probabilities in float16, 16 low bits of each id, and a 17th as a byte of its own."""

    def write(entries: Entries, path: Path) -> None:
        ids = entries.ids
        low = (ids & 0xFFFF).to(torch.uint16)
        buffer = io.BytesIO()
        torch.save({"values": entries.log_probs.half(), "indices_low": low, "bit_17": ids > 0xFFFF}, buffer)
        path.write_bytes(Zstd(level=3).encode(buffer.getvalue()))

    def read(path: Path, num_classes: int) -> SparseTargets:
        found = torch.load(io.BytesIO(Zstd().decode(path.read_bytes())), weights_only=True)
        ids = found["indices_low"].long() + (found["bit_17"].long() << 16)
        return with_the_rest(ids.numpy(), found["values"].float().numpy(), num_classes)

    return TokenFormat("Megatron-LM", k, write, read, others_are_one_class=True)


def eullm(k: int) -> TokenFormat:
    """Arrays without compression: ids in uint32, logits in bfloat16, the log-sum-exp at three temperatures in float32.

    The description leaves the loss of the remaining mass open; taken as Megatron-LM's.
    """

    def write(entries: Entries, path: Path) -> None:
        arrays = {
            "ids": entries.ids.numpy().astype(np.uint32),
            "logits": entries.logits.bfloat16().view(torch.int16).numpy(),
            "log_sums": entries.log_sums.numpy(),
        }
        with path.open("wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]

    def read(path: Path, num_classes: int) -> SparseTargets:
        with np.load(path) as found:
            logits = torch.from_numpy(found["logits"]).view(torch.bfloat16).float().numpy()
            return with_the_rest(found["ids"].astype(np.int64), logits - found["log_sums"][:, :1], num_classes)

    return TokenFormat("EULLM", k, write, read, others_are_one_class=True)


def varints(numbers: np.ndarray) -> bytes:
    """Whole numbers below 2^21 in one to three bytes of 7 bits, low bits first; all but the last have their top bit."""
    digits = numbers[:, None] >> np.array([0, 7, 14]) & 0x7F
    length = 1 + (numbers >= 1 << 7).astype(int) + (numbers >= 1 << 14)
    place = np.arange(3)
    digits = digits | np.where(place < length[:, None] - 1, 0x80, 0)
    return digits[place < length[:, None]].astype(np.uint8).tobytes()


def from_varints(data: np.ndarray) -> np.ndarray:
    """The numbers of `varints`, int64."""
    ends = np.flatnonzero(data < 128)
    starts = np.concatenate([[0], ends[:-1] + 1])
    number = np.repeat(np.arange(len(ends)), ends - starts + 1)
    values = (data & 0x7F).astype(np.int64) << 7 * (np.arange(len(data)) - starts[number])
    return np.bincount(number, weights=values, minlength=len(ends)).astype(np.int64)
