"""Receiving the other parties' caches over the public set."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress

import torch

from logitcache.cache.averaging import check_same_pixels, check_same_views, refuse_sampled
from logitcache.cache.reader import LogitCache, open_cache
from logitcache.cache.stored_records import stored_manifest
from logitcache.errors import IdentityMismatch, InvalidLogits, LogitCacheError, NotACache, PartyMissing
from logitcache.progress import track
from logitcache.share.transfer import pull
from logitcache.storage import open_storage

# B batch, C classes

POLL_SECONDS = 2.0
"""Between two checks of the shared location."""
LOGITS_AT_ONCE = 2**20
SPARE_BYTES = 2**24
"""Allowed size of a cache beyond twice its logits in float32, for example for its sample table."""


def wait_for(urls: Mapping[str, str], round_number: int, *, seconds: float) -> None:
    """Wait until the caches of a round are published.

    Args:
        urls: by party.
        round_number: for the message.
        seconds: the limit; 0 checks once.

    Raises:
        PartyMissing: names the parties whose caches are missing.
    """
    end = time.monotonic() + seconds
    missing = [party for party, url in urls.items() if not is_published(url)]
    if not missing:
        return
    with track(f"waiting for round {round_number}", len(missing), unit="caches") as meter:
        while missing and time.monotonic() < end:
            meter.advance(0, note=f"of {', '.join(missing)}")
            time.sleep(min(POLL_SECONDS, max(end - time.monotonic(), 0.0)))
            waiting = [party for party in missing if not is_published(urls[party])]
            meter.advance(len(missing) - len(waiting))
            missing = waiting
    if missing:
        raise PartyMissing(
            f"round {round_number} waits for {', '.join(missing)}: after {seconds:.0f} s there is no complete cache at "
            f"{urls[missing[0]]}.\nRun the same command again later, or wait longer with --wait SECONDS; "
            "completed stages are not repeated"
        )


def receive(party: str, url: str, path: str, own: LogitCache, *, own_path: str, combine: str) -> None:
    """Copy another party's cache here, unless a copy exists, and check it against the receiving party's own.

    Shape and size are checked before anything but its records is read.

    Args:
        party: the sender.
        url: of the published cache.
        path: the directory to copy it to.
        own: the receiving party's cache over the same views.
        own_path: its location.
        combine: what the labels are used for, "logits" or "probabilities".

    Raises:
        LogitCacheError: the cache has another public set, other views or classes, is damaged, or has rows that are not
            distributions; names the party.
    """
    with _of_party(party, url):
        if not is_published(path):
            _fetch(url, path, own, own_path)
        try:
            cache = open_cache(path)
            check_same_views(own_path, own, path, cache)
            check_same_pixels([own_path, path], [own, cache], own.views.stop)
            if combine == "logits":
                refuse_sampled([path], [cache])
            check_logits(cache, masks=combine != "logits")
        except LogitCacheError:
            shutil.rmtree(path)  # so that a corrected one can be received later
            raise


def _fetch(url: str, path: str, own: LogitCache, own_path: str) -> None:
    manifest = stored_manifest(open_storage(url))
    for name in ("num_samples", "num_classes", "rows_per_block", "views"):
        ours, theirs = getattr(own.layout, name), getattr(manifest.layout, name)
        if ours != theirs:
            raise IdentityMismatch(
                f"{name} is {theirs} there and {ours} in {own_path}; all parties need the same federation file"
            )
    there = open_cache(url)
    check_same_views(own_path, own, url, there)
    most = 2 * 4 * own.num_rows * len(own.views) * own.num_classes + own.stored_bytes + SPARE_BYTES
    if there.stored_bytes > most:
        raise IdentityMismatch(f"the cache has {there.stored_bytes:,} bytes, these views need at most {most:,}")
    pull(url, path, expect=there.pin)


def check_logits(cache: LogitCache, *, masks: bool) -> None:
    """Check every row of another party's cache, which may have been written by other software.

    Args:
        cache: sealed.
        masks: whether -inf is allowed for some classes. In a mean of logits it would mask the class for all parties.

    Raises:
        InvalidLogits: names view and row.
    """
    rows_at_once = max(1, LOGITS_AT_ONCE // cache.num_classes)
    for number in cache.views:
        view = cache.view(number)
        for start in range(0, cache.num_rows, rows_at_once):
            logits_BC = view.logits(range(start, min(start + rows_at_once, cache.num_rows)))
            valid_B = torch.isfinite(logits_BC.amax(dim=1))
            if not masks:
                valid_B &= torch.isfinite(logits_BC.amin(dim=1))
            if not valid_B.all():
                row = start + int((~valid_B).nonzero()[0])
                what = "NaN, +inf or only -inf" if masks else "NaN or an infinite logit"
                raise InvalidLogits(f"view {number}, row {row} contains {what}; expected a finite logit for each class")


def is_published(location: str) -> bool:
    """Whether a location has a sealed cache."""
    with suppress(NotACache):
        return stored_manifest(open_storage(location)).state == "sealed"
    return False


@contextmanager
def _of_party(party: str, url: str) -> Iterator[None]:
    """Add the party to error messages."""
    try:
        yield
    except LogitCacheError as error:
        raise type(error)(f"the cache of party {party!r} at {url} is rejected: {error}") from error
