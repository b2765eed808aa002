"""What parties see of each other: caches over the public set, published without a word about their maker."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress

import torch

from logitcache.cache.averaging import check_same_pixels, check_same_views, refuse_sampled
from logitcache.cache.reader import LogitCache, open_cache
from logitcache.cache.records import stored_manifest
from logitcache.errors import IdentityMismatch, InvalidLogits, LogitCacheError, NotACache, PartyMissing
from logitcache.progress import track
from logitcache.share.transfer import pull, push
from logitcache.storage import open_storage

# B batch, C classes

POLL_SECONDS = 2.0
"""Between two looks at the shared place."""
LOGITS_AT_ONCE = 2**20
SPARE_BYTES = 2**24
"""What a cache may take beyond twice its logits in float32: its sample table and the like."""


def published_at(shared: str, round_number: int, party: str) -> str:
    """Where a party's cache of a round is found."""
    return f"{shared.rstrip('/')}/round-{round_number:03d}/{party}.cache"


def publish(cache: str, url: str) -> None:
    """Copy a party's cache to the shared place: labels of the public set, without machine, command or paths.

    Raises:
        IdentityMismatch: another cache is there.
        StorageError: the store refuses, or can't be reached.
    """
    push(cache, url, anonymous=True)


def wait_for(urls: Mapping[str, str], round_number: int, *, seconds: float) -> None:
    """Wait until the caches of a round are there.

    Args:
        urls: where, by party.
        round_number: for the message.
        seconds: how long at most; 0 looks once.

    Raises:
        PartyMissing: names the parties whose caches are not there yet.
    """
    end = time.monotonic() + seconds
    missing = [party for party, url in urls.items() if not is_there(url)]
    if not missing:
        return
    with track(f"waiting for round {round_number}", len(missing), unit="caches") as meter:
        while missing and time.monotonic() < end:
            meter.advance(0, note=f"of {', '.join(missing)}")
            time.sleep(min(POLL_SECONDS, max(end - time.monotonic(), 0.0)))
            arrived = [party for party in missing if is_there(urls[party])]
            missing = [party for party in missing if party not in arrived]
            meter.advance(len(arrived))
    if missing:
        raise PartyMissing(
            f"round {round_number} waits for {', '.join(missing)}: after {seconds:.0f} s there is no whole cache at "
            f"{urls[missing[0]]}.\nRun the same command again when it is there, or wait longer with --wait SECONDS; "
            "what is done is not repeated"
        )


def receive(party: str, url: str, path: str, own: LogitCache, *, own_path: str, combine: str) -> None:
    """Bring another party's cache here, unless it was brought before, and hold it to the party's own.

    Its shape and size are held to bounds before anything but its records is read.

    Args:
        party: whose it is.
        url: where it was published.
        path: the directory that it is copied to.
        own: the cache of the party that receives it, over the same views.
        own_path: where that is.
        combine: what the labels are for, "logits" or "probabilities".

    Raises:
        LogitCacheError: it is of another public set, of other views or classes, damaged, or no distributions can be
            made of it; names the party.
    """
    with _of_party(party, url):
        if not is_there(path):
            _fetch(url, path, own, own_path)
        try:
            cache = open_cache(path)
            check_same_views(own_path, own, path, cache)
            check_same_pixels([own_path, path], [own, cache], own.views.stop)
            if combine == "logits":
                refuse_sampled([path], [cache])
            check_logits(cache, masks=combine != "logits")
        except LogitCacheError:
            shutil.rmtree(path)  # so that a better one can be taken in its place
            raise


def _fetch(url: str, path: str, own: LogitCache, own_path: str) -> None:
    manifest = stored_manifest(open_storage(url))
    for name in ("num_samples", "num_classes", "rows_per_block", "views"):
        ours, theirs = getattr(own.layout, name), getattr(manifest.layout, name)
        if ours != theirs:
            raise IdentityMismatch(
                f"{name} is {theirs} in it, {ours} in {own_path}; all parties need the same federation file"
            )
    there = open_cache(url)
    check_same_views(own_path, own, url, there)
    most = 2 * 4 * own.num_samples * len(own.views) * own.num_classes + own.stored_bytes + SPARE_BYTES
    if there.stored_bytes > most:
        raise IdentityMismatch(f"it has {there.stored_bytes:,} bytes; logits of these views take {most:,} at most")
    pull(url, path, expect=there.pin)


def check_logits(cache: LogitCache, *, masks: bool) -> None:
    """Look at every row of a stranger's cache: writers refuse what is no distribution, but it was not our writer.

    Args:
        cache: sealed.
        masks: whether a class may be masked by -inf. In a mean of logits it would be masked for everybody.

    Raises:
        InvalidLogits: names view and row.
    """
    rows_at_once = max(1, LOGITS_AT_ONCE // cache.num_classes)
    for number in cache.views:
        view = cache.view(number)
        for start in range(0, cache.num_samples, rows_at_once):
            logits_BC = view.logits(range(start, min(start + rows_at_once, cache.num_samples)))
            right_B = torch.isfinite(logits_BC.amax(dim=1))
            if not masks:
                right_B &= torch.isfinite(logits_BC.amin(dim=1))
            if not right_B.all():
                row = start + int((~right_B).nonzero()[0])
                what = "NaN, +inf or nothing but -inf" if masks else "NaN or an infinite logit"
                raise InvalidLogits(f"view {number}, row {row} holds {what}; expected a number for each class")


def is_there(location: str) -> bool:
    """Whether a whole cache lies at a location."""
    with suppress(NotACache):
        return stored_manifest(open_storage(location)).state == "sealed"
    return False


@contextmanager
def _of_party(party: str, url: str) -> Iterator[None]:
    """Say whose cache it is that something is wrong with."""
    try:
        yield
    except LogitCacheError as error:
        raise type(error)(f"the cache of party {party!r} at {url} is refused: {error}") from error
