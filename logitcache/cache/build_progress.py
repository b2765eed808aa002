"""How far the build of an open cache is, seen from its store: it needs no connection to the workers."""

from __future__ import annotations

import time
from dataclasses import dataclass

from logitcache.cache.layout import PER_CACHE, is_receipt_name, num_blocks, receipt_key
from logitcache.cache.records import Records
from logitcache.storage import Storage, Timestamped
from logitcache.storage.claims import HeldClaim, held_claims

WINDOW_SECONDS = 600.0
"""The rate is that of the commits of so many last seconds."""


@dataclass(frozen=True)
class BuildProgress:
    """What all workers of a build have committed, and what they hold."""

    blocks: int
    """Committed, of `total_blocks`."""
    total_blocks: int
    rows: int
    """In committed blocks, of `total_rows`; all views together."""
    total_rows: int
    seconds_since_commit: float | None
    """Since the last block was committed; None if there is none, or the store has no times."""
    rows_per_second: float | None
    """Of all workers, over the commits of the last `WINDOW_SECONDS`; None if there are fewer than two."""
    seconds_left: float | None
    """At this rate."""
    claims: list[HeldClaim]
    """With `--engine claims`, who computes what, by block; a worker may hold the next block, too."""


def build_progress(storage: Storage, records: Records, *, now: float | None = None) -> BuildProgress:
    """The progress of a build, from the times of its receipts and from the claims; one listing of each.

    Args:
        storage: the open cache.
        records: of this cache.
        now: seconds since 1970; by default by the clock of this machine, or the newest time in the store if it is
            later.
    """
    receipts = {name: receipt for name, receipt in records.receipts.items() if name != PER_CACHE}
    times = dict(storage.written("receipts")) if isinstance(storage, Timestamped) else {}
    commits = sorted(
        (times[key], receipt.rows) for name, receipt in receipts.items() if (key := receipt_key(name)) in times
    )
    claims = [claim for claim in held_claims(storage) if _is_open(records, claim.name)]
    if now is None:
        now = max([time.time(), *(when for when, _ in commits[-1:])])
    recent = [(when, rows) for when, rows in commits if when > now - WINDOW_SECONDS]
    rate = None
    if len(recent) > 1 and recent[-1][0] > recent[0][0]:
        # Without the rows of the first commit: they were computed before it.
        rate = sum(rows for _, rows in recent[1:]) / (recent[-1][0] - recent[0][0])
    done = sum(receipt.rows for receipt in receipts.values())
    total = records.layout.num_rows * len(records.layout.views)
    return BuildProgress(
        blocks=len(receipts),
        total_blocks=num_blocks(records.layout),
        rows=done,
        total_rows=total,
        seconds_since_commit=now - commits[-1][0] if commits else None,
        rows_per_second=rate,
        seconds_left=None if rate is None else (total - done) / rate,
        claims=claims,
    )


def _is_open(records: Records, name: str) -> bool:
    """Whether a claim is not of a committed block, whose worker may have died before it released the claim."""
    return not is_receipt_name(records.layout, name) or name not in records.receipts
