"""Measure size and accuracy of encodings on real logits, and choose one."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from logitcache.cache.layout import encode_block, encode_per_cache
from logitcache.encodings import (
    Auto,
    Dense,
    Encoding,
    LowRank,
    PackedTopK,
    Sampled,
    TopK,
    TopLowRank,
    TrellisLowRank,
)
from logitcache.encodings.auto import TEMPERATURES as TEMPERATURES
from logitcache.encodings.largest import MANY_CLASSES
from logitcache.encodings.protocol import float_tensor
from logitcache.errors import UsageError
from logitcache.losses import kl_divergence
from logitcache.targets import SparseTargets, Targets

# B batch, C classes, M calibration rows

HELD_OUT = 0.2
"""Share of the calibration groups that encodings are measured on instead of fitted to."""
ROWS_AT_ONCE = 1024
SLOW = TrellisLowRank
"""Encodings that can take longer than the teacher."""
SLOW_ROWS = 512
"""The most rows that these are measured on."""
SLOW_GAIN = 2.0
"""How many times fewer bytes, or nats, a slow encoding must have to be chosen. It is no measured speed, so that the
choice is the same on every machine."""


@dataclass(frozen=True)
class Calibration:
    """A sample of a teacher's logits, to fit and to measure encodings."""

    logits: Any = ()
    """Floats (M, C): a tensor, an array or a memory map. Not needed for a cache without logits."""
    groups: np.ndarray | None = None
    """Group of each row, int64 (M,). Rows of one group, such as views of one photo, stay on one side of the split."""
    outputs: Mapping[str, Any] = field(default_factory=dict)
    """Floats (M, *shape) of other outputs, by name: what their encodings are fitted to."""

    def split(self, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Row numbers to fit to and to measure on, sorted; a fifth of the groups is held out.

        Raises:
            UsageError: fewer than two groups.
        """
        groups = np.arange(len(self.logits)) if self.groups is None else np.asarray(self.groups)
        names = np.unique(groups)
        if len(names) < 2:
            raise UsageError(
                f"{len(self.logits)} calibration rows in {len(names)} group can't be split; expected at least two "
                "groups, one to fit to and one to measure on"
            )
        held_out = np.random.default_rng(seed).permutation(names)[: max(1, round(HELD_OUT * len(names)))]
        measured = np.isin(groups, held_out)
        return np.flatnonzero(~measured), np.flatnonzero(measured)


@dataclass(frozen=True)
class Fidelity:
    """Size and accuracy of one encoding, measured on logits that it was not fitted to."""

    encoding: Encoding
    bytes_per_row: float
    """Compressed bytes per row, as one block on disk."""
    fixed_bytes: int
    """Bytes that are stored once per cache."""
    kl: dict[float, float]
    """Mean KL(teacher ‖ decoded) by temperature, in nats, without the factor T²; infinite if classes are dropped."""
    kl_max: float
    """Largest KL of a row at T = 1."""
    top1_agreement: float
    """Share of rows whose most probable class is unchanged."""
    encode_rows_per_second: float
    decode_rows_per_second: float


def measure(encoding: Encoding, logits: Any, *, temperatures: Sequence[float] = TEMPERATURES) -> Fidelity:
    """Encode logits, compress them like a block, decode them, and compare.

    Args:
        encoding: fitted, if it needs fitting.
        logits: floats (B, C).
        temperatures: to measure the KL divergence at.
    """
    logits_BC = float_tensor(logits)
    start = time.perf_counter()
    encoded = encode_all(encoding, logits_BC)
    encoding_seconds = time.perf_counter() - start
    specs = encoding.arrays(logits_BC.shape[1])
    stored = sum(len(encode_block(specs[name], values.numpy(), len(values))) for name, values in encoded.items())
    kl: dict[float, float] = dict.fromkeys(temperatures, 0.0)
    kl_max, agreeing, decoding_seconds = 0.0, 0, 0.0
    for first in range(0, len(logits_BC), ROWS_AT_ONCE):
        rows = slice(first, first + ROWS_AT_ONCE)
        start = time.perf_counter()
        decoded_BC = encoding.decode({name: values[rows] for name, values in encoded.items()}, logits_BC.shape[1])
        decoding_seconds += time.perf_counter() - start
        for temperature in temperatures:
            kl_B = fidelity_kl(decoded_BC, logits_BC[rows], temperature)
            kl[temperature] += float(kl_B.double().sum()) / len(logits_BC)
            kl_max = max(kl_max, float(kl_B.max())) if temperature == 1.0 else kl_max
        agreeing += int((decoded_BC.argmax(dim=1) == logits_BC[rows].argmax(dim=1)).sum())
    return Fidelity(
        encoding=encoding,
        bytes_per_row=stored / len(logits_BC),
        fixed_bytes=fixed_bytes(encoding),
        kl=kl,
        kl_max=kl_max,
        top1_agreement=agreeing / len(logits_BC),
        encode_rows_per_second=len(logits_BC) / encoding_seconds,
        decode_rows_per_second=len(logits_BC) / decoding_seconds,
    )


def fixed_bytes(encoding: Encoding) -> int:
    """Compressed bytes of the arrays that a cache stores once for an encoding."""
    return sum(len(encode_per_cache(values)) for values in encoding.fitted_values().values())


def encode_all(encoding: Encoding, logits_BC: Tensor) -> dict[str, Tensor]:
    """Encode rows as view 0, in batches."""
    starts = range(0, len(logits_BC), ROWS_AT_ONCE)
    parts = [encoding.encode(logits_BC[start : start + ROWS_AT_ONCE], view=0, start=start) for start in starts]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def fidelity_kl(decoded_BC: Tensor, teacher_BC: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(teacher ‖ decoded) at a temperature, in nats, float32 (B,), without the factor T² of the loss.

    Classes with probability 0 on both sides contribute 0, and negative rounding errors count as 0.
    """
    impossible_BC = (decoded_BC == -torch.inf) & ((teacher_BC / temperature).softmax(dim=1) == 0)
    decoded_BC = decoded_BC.masked_fill(impossible_BC, MASKED)
    return kl_divergence(decoded_BC, teacher_BC, temperature=temperature).clamp(min=0) / temperature**2


def targets_kl(targets: Targets, teacher_BC: Tensor, temperature: float = 1.0) -> Tensor:
    """As `fidelity_kl`, of encoded rows as losses take them.

    Sparse rows of many classes are not expanded on a CPU: one softmax of the teacher's rows, and with the shape of a
    tail one product, give all sums over classes.
    """
    num_classes = teacher_BC.shape[1]
    few = num_classes < MANY_CLASSES or teacher_BC.device.type != "cpu"
    if few or not isinstance(targets, SparseTargets) or bool((targets.tail == -torch.inf).any()):
        return fidelity_kl(targets.dense(), teacher_BC, temperature)
    below_BC = (teacher_BC - teacher_BC.amax(dim=1, keepdim=True)).div_(temperature)
    p_BC = below_BC.softmax(dim=1)
    # The largest class has exp(0) = 1 before the softmax divides by the sum.
    negative_entropy_B = below_BC.clamp_(min=MASKED).mul_(p_BC).sum(dim=1) + p_BC.amax(dim=1).log()
    decoded = targets.softened(temperature)
    p_BK = p_BC.gather(1, decoded.ids.clamp(min=0)).masked_fill_(decoded.ids < 0, 0.0)
    cross_B = torch.where(p_BK > 0, p_BK * decoded.log_probs, 0.0).sum(dim=1)
    cross_B += (1.0 - p_BK.sum(dim=1)).clamp_(min=0.0) * decoded.log_each()
    if decoded.tail_shape is not None:
        cross_B += p_BC @ decoded.tail_shape - (p_BK * decoded.tail_shape[decoded.ids.clamp(min=0)]).sum(dim=1)
    kl_B: Tensor = negative_entropy_B - cross_B
    return kl_B.clamp_(min=0.0)


MASKED = -1e30
"""Logit of a class that is masked on both sides; -inf would give 0 * -inf = NaN in the divergence."""


def candidates(num_classes: int, num_rows: int) -> list[Encoding]:
    """Encodings worth trying for a number of classes and of rows to fit to."""
    dense: list[Encoding] = [Dense(dtype="float32"), Dense(dtype="float16"), Dense(dtype="uint8")]
    if num_classes >= MANY_CLASSES:
        low_ranks: list[Encoding] = []
        if num_rows > FEWEST_COMPONENTS:
            low_ranks += [replace(each, rank=min(each.rank, num_rows - 1)) for each in TOP_LOW_RANKS]
            low_ranks += [replace(each, rank=min(each.rank, num_rows - 1)) for each in TRELLISES]
        return [*dense, *low_ranks, *PACKED]
    most = min(int(0.55 * num_classes), num_rows // 4)
    lowranks = [
        LowRank(rank=min(rank, most), step=step, bit_price=bit_price)
        for rank, step, bit_price in LOWRANKS
        if most >= FEWEST_COMPONENTS
    ]
    topks = [TopK(k=k, dtype="uint8") for k in (5, 10, 20, 50, 100) if 4 * k <= num_classes]
    sampled = [Sampled(draws=50)] if num_classes >= 200 else []
    return [*dense, *lowranks, *topks, *sampled]


FEWEST_COMPONENTS = 16
"""Smallest rank worth trying; with fewer classes or rows a dense encoding is small enough."""
LOWRANKS = [
    (32, 0.1, 2e-4),
    (96, 0.1, 2e-4),
    (256, 0.15, 5e-4),
    (256, 0.11, 3e-4),
    (256, 0.075, 1e-4),
    (384, 0.05, 3e-5),
    (512, 0.03, 1e-5),
]
"""Rank, step and bit price, by size."""
TOP_LOW_RANKS = [
    TopLowRank(rank=128, bit_price=0.003),
    TopLowRank(),
    TopLowRank(rank=256, bit_price=0.0007, search=16),
    TopLowRank(rank=576, bit_price=0.0002, soft_weight=1.0, search=16),
]
TRELLISES = [
    TrellisLowRank(),
    TrellisLowRank(rank=576, bit_price=0.0018, soft_weight=2.0),
]
"""The fewest bytes, but slow to encode."""
PACKED: list[Encoding] = [
    PackedTopK(k=16),
    PackedTopK(k=64),
    PackedTopK(k=64, prior=True, step=0.5),
    PackedTopK(k=100, most=300, prior=True, step=0.5),
    Sampled(draws=50, packed=True),
]
"""For vocabularies, where `LowRank` takes minutes to fit."""


def compare(
    calibration: Calibration, encodings: Sequence[Encoding], *, advance: Callable[[], object] | None = None
) -> list[Fidelity]:
    """Fit encodings to four fifths of a calibration sample and measure them on the rest; smallest first.

    Slow encodings are measured on at most `SLOW_ROWS` of these rows, evenly spaced. Encodings that can't be fitted to
    these logits, such as logits of a scale beyond an encoding's largest step, are left out.

    Args:
        calibration: the sample of logits.
        encodings: the encodings to compare.
        advance: called after each encoding.

    Raises:
        UsageError: the sample can't be split, or none of the encodings can be fitted to it.
    """
    fitted_rows, measured_rows = calibration.split()
    to_fit, to_measure = calibration.logits[fitted_rows], calibration.logits[measured_rows]
    some = to_measure[:: -(-len(to_measure) // SLOW_ROWS)]
    results, failed = [], None
    for encoding in encodings:
        try:
            fitted = encoding.fit(to_fit)
        except UsageError as error:
            failed = error
        else:
            results.append(measure(fitted, some if isinstance(encoding, SLOW) else to_measure))
        if advance is not None:
            advance()
    if failed is not None and not results:
        raise failed
    return sorted(results, key=lambda result: result.bytes_per_row)


def choose(results: Sequence[Fidelity], limits: Auto) -> Fidelity:
    """The smallest encoding within `max_kl` nats, or the most accurate within `max_bytes` per row; see `Auto`.

    Args:
        results: the measured encodings.
        limits: the limits, and the temperature of the KL.

    Raises:
        UsageError: no encoding is within the limits; names the closest.
    """

    def kl(each: Fidelity) -> float:
        return each.kl[limits.temperature]

    def size(each: Fidelity) -> float:
        return each.bytes_per_row

    most_bytes, most_kl = limits.max_bytes, limits.max_kl
    small = [each for each in results if most_bytes is None or size(each) <= most_bytes]
    within = [each for each in small if most_kl is None or kl(each) <= most_kl]
    at = f"at T = {limits.temperature:g}"
    if not small:
        smallest = min(results, key=size)
        raise UsageError(
            f"no encoding stays within {most_bytes:g} bytes per row; the smallest, {smallest.encoding!r}, takes "
            f"{size(smallest):.1f} bytes and loses {kl(smallest):.2g} nats {at}: raise max_bytes (--max-bytes)"
        )
    if not within:
        best = min(small, key=kl)
        both, of_these = ("", "") if most_bytes is None else (f" and {most_bytes:g} bytes per row", " of this size")
        raise UsageError(
            f"no encoding stays within {most_kl:g} nats {at}{both}; the most accurate{of_these}, {best.encoding!r}, "
            f"takes {size(best):.1f} bytes and loses {kl(best):.2g} nats: raise max_kl (--max-kl)"
        )
    cost = size if most_bytes is None else kl
    best = min(within, key=cost)
    others = [each for each in within if not isinstance(each.encoding, SLOW)]
    if isinstance(best.encoding, SLOW) and others:
        fast = min(others, key=cost)
        best = fast if cost(fast) <= SLOW_GAIN * cost(best) else best
    return best
