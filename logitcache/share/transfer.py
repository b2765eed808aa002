"""Push and pull: copies a cache between stores; resumable, with the SHA-256 of every object checked.

The copy becomes visible when it is complete: objects first, then receipts, then the manifest, then the card.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from threading import BoundedSemaphore, Lock

from logitcache.cache.card import write_card
from logitcache.cache.destination import check_destination
from logitcache.cache.layout import parse_views
from logitcache.cache.manifest import CARD, MANIFEST, RECEIPTS, Layout
from logitcache.cache.objects import read_object
from logitcache.cache.reader import LogitCache
from logitcache.cache.records import CacheObject, Records, description
from logitcache.cache.stored_records import read_records
from logitcache.digest import canonical_json, sha256_hex
from logitcache.errors import (
    CorruptCache,
    IncompleteCache,
    MissingPackage,
    NotACache,
    StorageError,
    UsageError,
    unsealed,
)
from logitcache.progress import Meter, track
from logitcache.share.publish import (
    PlannedRecords,
    anonymised,
    check_expected,
    plan_records,
    publish,
    target_records,
)
from logitcache.storage import Storage, Transactional, open_storage

MAX_CARD_BYTES = 2**20
ROUNDS = 10
"""Attempts to publish a copy while other processes change the same target."""
UNFINISHED_PUSH = "push.json"
"""States the content of an unfinished push to an object store; the objects of that push are not sent again."""

Objects = dict[str, CacheObject]
"""By key."""


@dataclass(frozen=True)
class Transfer:
    """What a push or a pull did."""

    id: str
    digest: str
    """Content digest of the copy."""
    source_digest: str
    """Content digest of the source; it differs where only some views were copied."""
    pin: str
    """Pin of the source, the best value for `expect`. It is the source's digest, except in format 1."""
    matched: str | None
    """What `expect` matched: "pin" or "digest" (of format 1); None where nothing was expected."""
    views: str
    """The views of the copy, as FIRST:END."""
    copied_objects: int
    copied_bytes: int
    kept_objects: int
    """Objects that were there already, from an earlier or an interrupted run."""
    seconds: float


def push(cache: str, url: str, *, anonymous: bool = False) -> Transfer:
    """Copy a sealed cache to a store.

    Args:
        cache: a directory or URL.
        url: the destination.
        anonymous: leave machine, command and paths out of the manifest of the copy.

    Raises:
        UsageError: the store can't be written to, or holds an unfinished push of other content.
        IncompleteCache: the cache is not sealed.
        IdentityMismatch: the destination holds another cache.
        CorruptCache: an object of the cache is damaged.
        StorageError: a store refuses, or can't be reached.
    """
    target = open_storage(url)
    with target.transaction() if isinstance(target, Transactional) else nullcontext(target) as written:
        return _copy(open_storage(cache), written, views=None, expect=None, anonymous=anonymous)


def pull(url: str, cache: str, *, views: str | None = None, expect: str | None = None) -> Transfer:
    """Copy a sealed cache, or some of its views, from a store; views are added to those that were pulled before.

    Args:
        url: the cache.
        cache: the destination, preferably a directory.
        views: such as "0:8"; all if None.
        expect: the pin or the content digest that the cache must have, or at least its first 12 digits. The decoded
            values of every object are then checked too, not only its bytes.

    Raises:
        UsageError: the cache doesn't have these views, or they would leave a gap.
        IncompleteCache: the cache is not sealed.
        IdentityMismatch: another digest than expected, or the destination holds another cache.
        CorruptCache: an object is damaged.
        StorageError: a store refuses, or can't be reached.
    """
    return _copy(open_storage(url), open_storage(cache), views=views, expect=expect)


def _copy(
    source: Storage, target: Storage, *, views: str | None, expect: str | None, anonymous: bool = False
) -> Transfer:
    start = time.monotonic()
    check_destination(target)
    records = read_records(source)
    if records.manifest.state != "sealed":
        raise unsealed(source.url)
    pin = records.pin()
    matched = check_expected(source.url, records, pin, expect)
    if anonymous:
        records = Records(anonymised(records.manifest), records.receipts)
    existing = target_records(target, records)
    copied_views = parse_views(views, records.layout.views)
    planned = plan_records(source.url, records, copied_views, target.url, existing)
    wanted, available = _by_key(planned.records), _by_key(records)
    sizes = dict(target.sizes())
    _refuse_foreign_objects(target, sizes, available | wanted)
    target.remove_leftovers()
    values_of = None if expect is None else records.layout
    at_first = sizes.keys() & available.keys()
    checked: set[str] = set()
    copied: Objects = {}
    for _ in range(ROUNDS):
        unchecked = {key: each for key, each in wanted.items() if key not in checked}
        present = _present(target, sizes, unchecked, existing, str(records.manifest.digest), values_of)
        if values_of is not None and target.is_remote:
            present -= available.keys()  # their values were never compared
        missing = {key: each for key, each in unchecked.items() if key not in present}
        lost = [description(each.receipt) for key, each in missing.items() if key not in available]
        if lost:
            raise IncompleteCache(f"{target.url} has lost {lost[0]}, which {source.url} lacks too; repair it first")
        total = sum(each.stored.bytes for each in missing.values())
        with track(f"copying {len(missing)} objects", total, unit="bytes") as meter:
            _copy_objects(source, target, missing, meter, values_of=values_of)
        copied |= missing
        checked |= unchecked.keys()
        target.make_durable(wanted)  # including the objects of an interrupted run
        with target.lock():
            leftovers = at_first | copied.keys()
            before, existing = existing, target_records(target, records)  # another process may have published meanwhile
            try:
                planned = plan_records(source.url, records, copied_views, target.url, existing)
            except UsageError:
                assert existing is not None
                _delete(target, leftovers - _by_key(existing).keys())
                raise
            wanted = _by_key(planned.records)
            if not target.is_remote or existing != before:
                sizes = dict(target.sizes())
                checked -= {key for key in checked & wanted.keys() if sizes.get(key) != wanted[key].stored.bytes}
            if wanted.keys() <= checked and publish(target, planned, anonymous=anonymous):
                _write_card(source, target, planned, same_content=planned.digest == records.manifest.digest)
                _delete(target, leftovers - wanted.keys())  # of an interrupted pull of other views
                break
    else:
        raise StorageError(f"{target.url} was changed by other processes {ROUNDS} times; run the same command again")
    if target.is_remote:
        target.delete(UNFINISHED_PUSH)
    layout = planned.records.layout
    return Transfer(
        id=records.manifest.id,
        digest=str(planned.digest),
        source_digest=str(records.manifest.digest),
        pin=pin,
        matched=matched,
        views=f"{layout.first_view}:{layout.num_views}",
        copied_objects=len(copied),
        copied_bytes=sum(each.stored.bytes for each in copied.values()),
        kept_objects=len(wanted.keys() - copied.keys()),
        seconds=time.monotonic() - start,
    )


def _by_key(records: Records) -> Objects:
    return {each.key: each for each in records.objects()}


def _matches_values(layout: Layout, wanted: CacheObject, data: bytes | memoryview) -> bool:
    """Whether an object decodes to the values that its receipt states; the digest doesn't cover its bytes."""
    try:
        wanted.values(layout, data)
    except ValueError:
        return False
    return True


def _refuse_foreign_objects(target: Storage, sizes: Mapping[str, int], ours: Objects) -> None:
    """Never overwrite what is not part of this cache."""
    for key in sizes:
        is_ours = key in ours or key in (MANIFEST, RECEIPTS, CARD, UNFINISHED_PUSH) or key.endswith("/zarr.json")
        if not is_ours and not key.startswith("receipts/"):
            raise NotACache(f"{target.url} holds {key}, which is not part of this cache; choose an empty destination")


def _present(
    target: Storage,
    sizes: Mapping[str, int],
    wanted: Objects,
    existing: Records | None,
    digest: str,
    values_of: Layout | None,
) -> set[str]:
    """The keys of objects that need no copy: those that were read and checked, or are in a remote target's receipts."""
    candidates = [key for key, each in wanted.items() if sizes.get(key) == each.stored.bytes]
    if not target.is_remote:

        def is_right(key: str) -> bool:
            data = target.get(key) or b""
            return sha256_hex(data) == wanted[key].stored.sha256 and (
                values_of is None or _matches_values(values_of, wanted[key], data)
            )

        with ThreadPoolExecutor(target.concurrency) as threads:
            return {key for key, right in zip(candidates, threads.map(is_right, candidates), strict=True) if right}
    if _resumes_push(target, digest):
        return set(candidates)
    listed = {} if existing is None else _by_key(existing)
    return {key for key in candidates if key in listed and listed[key].stored.sha256 == wanted[key].stored.sha256}


def _resumes_push(target: Storage, digest: str) -> bool:
    """Whether the target holds an interrupted push of this content; if it holds none, mark the begin of this one.

    Raises:
        UsageError: it holds an interrupted push of other content.
    """
    mark = canonical_json({"digest": digest})
    if target.create(UNFINISHED_PUSH, mark):
        return False
    found = target.get(UNFINISHED_PUSH, limit=2**12) or b""
    if found == mark:
        return True
    with suppress(ValueError, KeyError, TypeError):
        found = str(json.loads(found)["digest"])[:12].encode()
    raise UsageError(
        f"{target.url} holds an unfinished push of other content ({found.decode(errors='replace')[:40]}); finish "
        "that push, delete it, or choose another URL"
    )


def _copy_objects(
    source: Storage, target: Storage, missing: Objects, meter: Meter, *, values_of: Layout | None
) -> None:
    """Copy objects, several at once; the first error ends it, and the next run keeps what was copied.

    Args:
        values_of: the layout, to check the decoded values of every object too.
    """
    # Separate limits: the source is read at its own concurrency while the target is busy.
    reading, writing = BoundedSemaphore(source.concurrency), BoundedSemaphore(target.concurrency)
    counting = Lock()

    def copy(key: str) -> None:
        wanted = missing[key]
        counted = 0

        def count(arrived: int) -> None:
            nonlocal counted
            with counting:
                meter.advance(arrived - counted)
            counted = arrived

        with reading:
            data = read_object(source, key, wanted.stored, why=description(wanted.receipt), arrived=count)
        if values_of is not None and not _matches_values(values_of, wanted, data):
            raise CorruptCache(
                f"{source.url}: {key} does not hold the values that its receipt states and --expect pins. The cache "
                "was changed; nothing was published here. Get it from another source"
            )
        with writing:
            target.put(key, data, durable=False)
        count(wanted.stored.bytes)

    threads = ThreadPoolExecutor(source.concurrency + target.concurrency, thread_name_prefix="logitcache-copy")
    try:
        for copied in as_completed([threads.submit(copy, key) for key in missing]):
            copied.result()
    except BaseException as error:
        # Running copies are completed, except on an interrupt, which should not wait.
        threads.shutdown(wait=isinstance(error, Exception), cancel_futures=True)
        raise
    threads.shutdown()


def _delete(target: Storage, keys: Iterable[str]) -> None:
    for key in keys:
        target.delete(key)


def _write_card(source: Storage, target: Storage, planned: PlannedRecords, *, same_content: bool) -> None:
    """Copy the source's card, which may have been edited; write a new one where the copy has other views."""
    if not same_content:
        try:
            write_card(LogitCache(target, records=planned.records))
        except MissingPackage:
            target.delete(CARD)  # it describes other views
        return
    card = source.get(CARD, limit=MAX_CARD_BYTES)
    if card is not None and len(card) <= MAX_CARD_BYTES and card != target.get(CARD, limit=MAX_CARD_BYTES):
        target.put(CARD, card)
