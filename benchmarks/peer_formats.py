"""Other systems' ways of keeping soft labels, written and read by small functions of our own.

From descriptions of what each stores, not from their code: the bytes of a sample and what can be read back from them.
None keeps the tail's mass apart from the kept probabilities; what is not kept is spread evenly, as TinyViT does.
"""

from __future__ import annotations

import gzip
import math
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numcodecs.zstd import Zstd
from torch import Tensor

# B batch, C classes, K kept classes


@dataclass(frozen=True)
class PeerFormat:
    """A format: (B, C) logits to one bytes object a sample (or a shard of many), and back to logits."""

    name: str
    write: Callable[[Tensor], list[bytes]]
    read: Callable[[list[bytes], int], Tensor]


def tinyvit(k: int) -> PeerFormat:
    """A seed of 4 bytes, then k class ids in int16 and k probabilities in float16."""
    record = np.dtype([("seed", "<i4"), ("ids", "<i2", (k,)), ("p", "<f2", (k,))])

    def write(logits_BC: Tensor) -> list[bytes]:
        p_BK, ids_BK = logits_BC.softmax(dim=1).topk(k, dim=1)
        records = np.zeros(len(logits_BC), dtype=record)
        records["ids"], records["p"] = ids_BK.numpy(), p_BK.numpy()
        return [row.tobytes() for row in records]

    def read(data: list[bytes], num_classes: int) -> Tensor:
        records = np.frombuffer(b"".join(data), dtype=record)
        return spread_evenly(records["ids"].astype(np.int64), records["p"].astype(np.float32), num_classes)

    return PeerFormat(f"TinyViT, k={k}", write, read)


def ml_dr(k: int) -> PeerFormat:
    """A gzipped pickle a sample: k class ids and k probabilities, as Python numbers; renormalised when read."""

    def write(logits_BC: Tensor) -> list[bytes]:
        p_BK, ids_BK = logits_BC.softmax(dim=1).topk(k, dim=1)
        rows = zip(ids_BK.tolist(), p_BK.half().tolist(), strict=True)
        return [gzip.compress(pickle.dumps({"indices": ids, "probabilities": p})) for ids, p in rows]

    def read(data: list[bytes], num_classes: int) -> Tensor:
        rows = [pickle.loads(gzip.decompress(row)) for row in data]  # of our own making, a moment ago
        p_BK = torch.tensor([row["probabilities"] for row in rows])
        p_BC = torch.zeros(len(rows), num_classes)
        p_BC.scatter_(1, torch.tensor([row["indices"] for row in rows]), p_BK / p_BK.sum(dim=1, keepdim=True))
        return p_BC.log()

    return PeerFormat(f"ml-dr, k={k}", write, read)


def fkd(k: int) -> PeerFormat:
    """Four crop coordinates in float32, a flip, and k class ids and k probabilities in float16."""
    record = np.dtype([("crop", "<f4", (4,)), ("flip", "u1"), ("ids", "<f2", (k,)), ("p", "<f2", (k,))])

    def write(logits_BC: Tensor) -> list[bytes]:
        p_BK, ids_BK = logits_BC.softmax(dim=1).topk(k, dim=1)
        records = np.zeros(len(logits_BC), dtype=record)
        records["ids"], records["p"] = ids_BK.numpy(), p_BK.numpy()
        return [row.tobytes() for row in records]

    def read(data: list[bytes], num_classes: int) -> Tensor:
        records = np.frombuffer(b"".join(data), dtype=record)
        return spread_evenly(records["ids"].astype(np.int64), records["p"].astype(np.float32), num_classes)

    return PeerFormat(f"FKD, k={k}", write, read)


def megatron(k: int) -> PeerFormat:
    """A sequential shard, zstd: k class ids of 17 bits, and logarithms of probabilities in steps of 1/8 in 8 bits."""

    def write(logits_BC: Tensor) -> list[bytes]:
        log_p_BK, ids_BK = logits_BC.log_softmax(dim=1).topk(k, dim=1)
        values = (-8 * log_p_BK).round().clamp(max=255).to(torch.uint8).numpy()
        ids = np.stack([pack_bits(row, 17) for row in ids_BK.numpy()])
        return [Zstd(level=3).encode(np.concatenate([ids.ravel(), values.ravel()]))]

    def read(data: list[bytes], num_classes: int) -> Tensor:
        flat = np.frombuffer(Zstd().decode(data[0]), dtype=np.uint8)
        width = math.ceil(17 * k / 8)
        num_rows = len(flat) // (width + k)
        ids = np.stack([unpack_bits(row, 17, k) for row in flat[: num_rows * width].reshape(num_rows, width)])
        values = flat[num_rows * width :].reshape(num_rows, k).astype(np.float32)
        return spread_evenly(ids, np.exp(values / -8), num_classes)

    return PeerFormat(f"Megatron-LM, k={k}", write, read)


def distillkit(k: int, exact: int, terms: int) -> PeerFormat:
    """Class ids in as many bits as they need, the first few values exact, the rest a polynomial in the rank's root."""

    def design() -> np.ndarray:
        rank = np.arange(k - exact, dtype=np.float64) / (k - exact)
        return np.stack([rank ** (power / 2) for power in range(terms)], axis=1)

    def write(logits_BC: Tensor) -> list[bytes]:
        bits = (logits_BC.shape[1] - 1).bit_length()
        log_p_BK, ids_BK = logits_BC.log_softmax(dim=1).topk(k, dim=1)
        fitted = np.linalg.lstsq(design(), log_p_BK[:, exact:].double().numpy().T, rcond=None)[0].T.astype("<f4")
        first = log_p_BK[:, :exact].numpy().astype("<f2")
        return [
            pack_bits(ids, bits).tobytes() + values.tobytes() + coefficients.tobytes()
            for ids, values, coefficients in zip(ids_BK.numpy(), first, fitted, strict=True)
        ]

    def read(data: list[bytes], num_classes: int) -> Tensor:
        bits = (num_classes - 1).bit_length()
        width = math.ceil(bits * k / 8)
        flat = np.frombuffer(b"".join(data), dtype=np.uint8).reshape(len(data), -1)
        ids = np.stack([unpack_bits(row, bits, k) for row in flat[:, :width]])
        first = np.ascontiguousarray(flat[:, width : width + 2 * exact]).view("<f2").astype(np.float32)
        fitted = np.ascontiguousarray(flat[:, width + 2 * exact :]).view("<f4") @ design().T
        return spread_evenly(ids, np.exp(np.concatenate([first, fitted], axis=1)), num_classes)

    return PeerFormat(f"DistillKit, k={k}", write, read)


def lpqld(k: int) -> PeerFormat:
    """LPQLD (arXiv:2604.18135), "marginal re-normalisation": k ids in int16 and k logits in float16, softmaxed alone.

    The crop's parameters are left out. Of its other parts, pruning is a number of views; the schedules of the
    temperatures belong to training.
    """

    def write(logits_BC: Tensor) -> list[bytes]:
        values_BK, ids_BK = logits_BC.topk(k, dim=1)
        ids, values = ids_BK.numpy().astype("<i2"), values_BK.numpy().astype("<f2")
        return [row.tobytes() + kept.tobytes() for row, kept in zip(ids, values, strict=True)]

    def read(data: list[bytes], num_classes: int) -> Tensor:
        flat = np.frombuffer(b"".join(data), dtype=np.uint8).reshape(len(data), 4 * k)
        ids = np.ascontiguousarray(flat[:, : 2 * k]).view("<i2").astype(np.int64)
        values = np.ascontiguousarray(flat[:, 2 * k :]).view("<f2").astype(np.float32)
        logits_BC = torch.full((len(data), num_classes), -math.inf)
        return logits_BC.scatter_(1, torch.from_numpy(ids), torch.from_numpy(values))

    return PeerFormat(f"LPQLD, k={k}", write, read)


PEERS = [
    tinyvit(10),
    tinyvit(100),
    ml_dr(10),
    fkd(5),
    megatron(10),
    megatron(100),
    distillkit(50, exact=1, terms=3),
    distillkit(128, exact=16, terms=6),
]


def spread_evenly(ids: np.ndarray, p: np.ndarray, num_classes: int) -> Tensor:
    """Kept probabilities as they are, and what is left of 1 spread over the other classes, as logits (B, C)."""
    p_BK = torch.from_numpy(np.asarray(p, dtype=np.float32)).clamp_(min=1e-8)
    p_BK /= p_BK.sum(dim=1, keepdim=True).clamp(min=1.0)
    rest_B1 = (1.0 - p_BK.sum(dim=1, keepdim=True)).clamp_(min=1e-6) / (num_classes - p_BK.shape[1])
    p_BC = rest_B1.repeat(1, num_classes)
    return p_BC.scatter_(1, torch.from_numpy(np.asarray(ids, dtype=np.int64)), p_BK).log_()


def pack_bits(numbers: Any, bits: int) -> np.ndarray:
    """Whole numbers of so many bits each, end to end, uint8."""
    digits = (np.asarray(numbers)[:, None] >> np.arange(bits)) & 1
    return np.packbits(digits.astype(np.uint8).ravel())


def unpack_bits(packed: np.ndarray, bits: int, count: int) -> np.ndarray:
    """The first `count` numbers of `pack_bits`, int64."""
    digits = np.unpackbits(packed)[: bits * count].reshape(count, bits).astype(np.int64)
    return (digits << np.arange(bits)).sum(axis=1)
