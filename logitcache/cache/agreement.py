"""Whether outputs of a teacher agree with stored ones, within the encoding's loss and rounding."""

from __future__ import annotations

import torch
from torch import Tensor

from logitcache.cache.fidelity import fidelity_kl
from logitcache.encodings import Encoding, Sampled

# B batch, D values of a row (for logits: classes)

TOLERANCE = {"float32": 1e-3, "bfloat16": 2e-2, "float16": 5e-3}
"""Nats at T = 1 by which a teacher's distribution may differ between devices and batches, by its precision."""
DISTANCE = {"float32": 1e-3, "bfloat16": 5e-2, "float16": 1e-2}
"""The same for extra outputs: distance relative to the row's norm."""
SLACK = 1.5
"""Factor on the encoding's own loss, which rounding changes a little."""
DIFFERENT_DRAWS = 0.05
"""Share of a `Sampled` row's draws that may differ; one draw always may."""


def differing_rows(
    stored_BD: Tensor, again_BD: Tensor, encoding: Encoding, precision: str, *, view: int, rows_B: list[int]
) -> list[int]:
    """The rows in which stored and new values differ by more than the encoding's loss and rounding.

    Args:
        stored_BD: decoded values of the cache, float32.
        again_BD: new values of the teacher, float32.
        encoding: of the output, fitted.
        precision: the teacher's arithmetic; the widest tolerance applies to an unknown one.
        view, rows_B: view and row numbers, for encodings that draw random numbers.

    Returns:
        Row numbers, some of `rows_B`. New rows that the encoding can't store, such as NaN, differ.
    """
    refused = encoding.refused(again_BD).tolist()
    if any(refused):
        valid = [place for place, is_refused in enumerate(refused) if not is_refused]
        found = [row for row, is_refused in zip(rows_B, refused, strict=True) if is_refused]
        if valid:
            valid_rows = [rows_B[place] for place in valid]
            parts = stored_BD[valid], again_BD[valid]
            found += differing_rows(*parts, encoding, precision, view=view, rows_B=valid_rows)
        return sorted(found)
    # `Sampled` draws by row number, and these rows need not be consecutive: one at a time.
    pieces = [[place] for place in range(len(rows_B))] if isinstance(encoding, Sampled) else [range(len(rows_B))]
    encoded = [encoding.encode(again_BD[list(piece)], view=view, start=rows_B[piece[0]]) for piece in pieces]
    lossy_BD = torch.cat([encoding.decode(each, again_BD.shape[1]) for each in encoded])
    differing_B = differing(stored_BD, again_BD, lossy_BD, encoding, precision)
    return [row for row, differs in zip(rows_B, differing_B.tolist(), strict=True) if differs]


def differing(stored_BD: Tensor, again_BD: Tensor, lossy_BD: Tensor, encoding: Encoding, precision: str) -> Tensor:
    """As `differing_rows`, where `lossy_BD` are the new values encoded and decoded; bool (B,)."""
    if encoding.keeps_constants:
        size_B = again_BD.norm(dim=1)
        off_B, explained_B = (stored_BD - again_BD).norm(dim=1), (lossy_BD - again_BD).norm(dim=1)
        allowed_B = SLACK * explained_B + DISTANCE.get(precision, max(DISTANCE.values())) * size_B
        differing_B: Tensor = ~(off_B <= allowed_B)  # NaN differs
        return differing_B
    if isinstance(encoding, Sampled):
        moved_B = (lossy_BD.softmax(dim=1) - stored_BD.softmax(dim=1)).abs().sum(dim=1) / 2
        return ~(moved_B <= max(DIFFERENT_DRAWS, 1.01 / encoding.draws))
    explained_B = fidelity_kl(lossy_BD, again_BD)
    allowed_B = SLACK * explained_B + TOLERANCE.get(precision, max(TOLERANCE.values()))
    return ~(fidelity_kl(stored_BD, again_BD) <= allowed_B)
