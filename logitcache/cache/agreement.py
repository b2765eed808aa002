"""Whether what a teacher gives now is what a cache holds: up to its encoding, and to other roundings."""

from __future__ import annotations

import torch
from torch import Tensor

from logitcache.cache.fidelity import fidelity_kl
from logitcache.encodings import Encoding, Sampled

# B batch, D values of a row: classes of logits

TOLERANCE = {"float32": 1e-3, "bfloat16": 2e-2, "float16": 5e-3}
"""Nats at T = 1 by which a teacher's distribution may differ between devices and batches, by its precision."""
DISTANCE = {"float32": 1e-3, "bfloat16": 5e-2, "float16": 1e-2}
"""Distance by which other outputs may differ likewise, in parts of the row's norm."""
SLACK = 1.5
"""Factor on what the encoding alone loses: other roundings of nearly the same values."""
DIFFERENT_DRAWS = 0.05
"""Share of a `Sampled` row's draws that may come out otherwise; one draw always may."""


def differing_rows(
    stored_BD: Tensor, again_BD: Tensor, encoding: Encoding, precision: str, *, view: int, rows_B: list[int]
) -> list[int]:
    """The rows whose stored values are further from what the teacher gives now than encoding it would explain.

    Args:
        stored_BD: what the cache holds, decoded, float32.
        again_BD: what the teacher gives now, float32.
        encoding: of the output, fitted.
        precision: the teacher's arithmetic; an unknown one takes the widest tolerance.
        view, rows_B: where the rows lie, for encodings that draw random numbers.

    Returns:
        Row numbers, some of `rows_B`.
    """
    # One at a time, since random draws go by row; all at once where nothing is drawn.
    pieces = [[place] for place in range(len(rows_B))] if isinstance(encoding, Sampled) else [range(len(rows_B))]
    encoded = [encoding.encode(again_BD[list(piece)], view=view, start=rows_B[piece[0]]) for piece in pieces]
    lossy_BD = torch.cat([encoding.decode(each, again_BD.shape[1]) for each in encoded])
    differing_B = differing(stored_BD, again_BD, lossy_BD, encoding, precision)
    return [row for row, differs in zip(rows_B, differing_B.tolist(), strict=True) if differs]


def differing(stored_BD: Tensor, again_BD: Tensor, lossy_BD: Tensor, encoding: Encoding, precision: str) -> Tensor:
    """As `differing_rows`, with what the encoding makes of the new values at hand; bool (B,)."""
    if encoding.keeps_constants:
        size_B = again_BD.norm(dim=1)
        off_B, explained_B = (stored_BD - again_BD).norm(dim=1), (lossy_BD - again_BD).norm(dim=1)
        allowed_B = SLACK * explained_B + DISTANCE.get(precision, max(DISTANCE.values())) * size_B
        differing_B: Tensor = off_B > allowed_B
        return differing_B
    if isinstance(encoding, Sampled):
        moved_B = (lossy_BD.softmax(dim=1) - stored_BD.softmax(dim=1)).abs().sum(dim=1) / 2
        return moved_B > max(DIFFERENT_DRAWS, 1.01 / encoding.draws)
    explained_B = fidelity_kl(lossy_BD, again_BD)
    return fidelity_kl(stored_BD, again_BD) > SLACK * explained_B + TOLERANCE.get(precision, max(TOLERANCE.values()))
