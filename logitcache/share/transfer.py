"""Caches from place to place: push and pull, resumable, every object held to its SHA-256, visible once whole.

objects that are missing -> held to their receipts -> durable -> receipts -> card -> manifest, last.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass
from threading import BoundedSemaphore, Lock
from typing import NamedTuple

from logitcache.cache.card import CARD, write_card
from logitcache.cache.committed import read_records
from logitcache.cache.digests import pin_of
from logitcache.cache.layout import FIXED, Block, block_key, decode_object, fixed_array_key, parse_views
from logitcache.cache.manifest import MANIFEST, RECEIPTS, Layout, StoredObject
from logitcache.cache.objects import read_object
from logitcache.cache.place import check_place
from logitcache.cache.reader import LogitCache
from logitcache.digest import array_digest, canonical_json, sha256_hex
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
from logitcache.share.records import (
    PlannedRecords,
    Records,
    check_expected,
    plan_records,
    publish,
    records_there,
    without_maker,
)
from logitcache.storage import Storage, open_storage

MAX_CARD_BYTES = 2**20
ROUNDS = 10
"""How often a copy begins anew because others change the same place."""
UNDER_WAY = "push.json"
"""Says which content an unfinished push to an object store is of: its own objects need not be sent again."""


class _Object(NamedTuple):
    """An object as a receipt describes it."""

    stored: StoredObject
    name: str
    """Of the receipt: a block's, or `FIXED`."""
    array: str

    @property
    def why(self) -> str:
        """Who vouches for it, for messages."""
        return "what is stored once" if self.name == FIXED else f"block {self.name}"


Objects = dict[str, _Object]
"""By key."""


@dataclass(frozen=True)
class Transfer:
    """What a push or a pull did."""

    id: str
    digest: str
    """Of what is there now."""
    source_digest: str
    """Of what it was copied from; another one where only some views were copied."""
    pin: str
    """Of what it was copied from: what `expect` is best given. The source's digest, but in format 1 stronger."""
    matched: str | None
    """Which of the two `expect` was: "pin" or "digest" (of format 1); None where nothing was expected."""
    views: str
    """That are there now, as FIRST:END."""
    copied_objects: int
    copied_bytes: int
    kept_objects: int
    """That were there already, from before or from an interrupted run."""
    seconds: float


def push(cache: str, url: str, *, anonymous: bool = False) -> Transfer:
    """Copy a sealed cache to a store.

    Args:
        cache: a directory or URL.
        url: where to.
        anonymous: leave out of the manifest there what says who made it: machine, command, and where anything lay.

    Raises:
        UsageError: the store can't be written to, or somebody else's unfinished push is in the way.
        IncompleteCache: the cache is not sealed.
        IdentityMismatch: another cache is there.
        CorruptCache: an object of the cache is not what was written.
        StorageError: a store refuses, or can't be reached.
    """
    return _copy(open_storage(cache), open_storage(url), views=None, expect=None, anonymous=anonymous)


def pull(url: str, cache: str, *, views: str | None = None, expect: str | None = None) -> Transfer:
    """Copy a sealed cache, or some of its views, from a store; views join those that were pulled before.

    Args:
        url: the cache.
        cache: where to, at best a directory.
        views: such as "0:8"; all if None.
        expect: the pin or the content digest that the cache must have, or its first 12 digits and more. Values are
            then compared as well, not only the bytes that they are stored in.

    Raises:
        UsageError: views that it does not have, or that would leave a gap.
        IncompleteCache: the cache is not sealed.
        IdentityMismatch: another digest than expected, or another cache is in the place.
        CorruptCache: an object is not what was written.
        StorageError: a store refuses, or can't be reached.
    """
    return _copy(open_storage(url), open_storage(cache), views=views, expect=expect)


def _copy(
    source: Storage, target: Storage, *, views: str | None, expect: str | None, anonymous: bool = False
) -> Transfer:
    start = time.monotonic()
    check_place(target)
    records = manifest, receipts = read_records(source)
    if manifest.state != "sealed":
        raise unsealed(source.url)
    pin = pin_of(manifest, receipts)
    matched = check_expected(source.url, records, pin, expect)
    if anonymous:
        manifest = manifest.model_copy(update={"provenance": without_maker(manifest.provenance)})
        records = manifest, receipts
    there = records_there(target, records)
    copied_views = parse_views(views, manifest.layout.views)
    planned = plan_records(source.url, records, copied_views, target.url, there)
    wanted, on_offer = _objects(planned.records), _objects(records)
    sizes = dict(target.sizes())
    _refuse_strangers(target, sizes, on_offer | wanted)
    target.remove_leftovers()
    values_of = None if expect is None else manifest.layout
    at_first = sizes.keys() & on_offer.keys()
    right: set[str] = set()
    copied: Objects = {}
    for _ in range(ROUNDS):
        unknown = {key: each for key, each in wanted.items() if key not in right}
        present = _present(target, sizes, unknown, there, str(manifest.digest), values_of)
        if values_of is not None and target.is_remote:
            present -= on_offer.keys()  # nobody has compared the values of what is there
        missing = {key: each for key, each in unknown.items() if key not in present}
        lacking = [each.why for key, each in missing.items() if key not in on_offer]
        if lacking:
            raise IncompleteCache(
                f"{target.url} has lost {lacking[0]}, which {source.url} does not hold; repair it first"
            )
        total = sum(each.stored.bytes for each in missing.values())
        with track(f"copying {len(missing)} objects", total, unit="bytes") as meter:
            _copy_objects(source, target, missing, meter, values_of=values_of)
        copied |= missing
        right |= unknown.keys()
        target.make_durable(wanted)  # those too that an interrupted run has left
        with target.lock():
            leftovers = at_first | copied.keys()
            before, there = there, records_there(target, records)  # somebody else may have published here meanwhile
            try:
                planned = plan_records(source.url, records, copied_views, target.url, there)
            except UsageError:
                assert there is not None
                _delete(target, leftovers - _objects(there).keys())
                raise
            wanted = _objects(planned.records)
            if not target.is_remote or there != before:
                sizes = dict(target.sizes())
                right -= {key for key in right & wanted.keys() if sizes.get(key) != wanted[key].stored.bytes}
            if wanted.keys() <= right and publish(target, planned, anonymous=anonymous):
                _write_card(source, target, planned, whole=planned.manifest.digest == manifest.digest)
                _delete(target, leftovers - wanted.keys())  # left by a pull of other views that was interrupted
                break
    else:
        raise StorageError(f"{target.url} was changed by others time and again; run the same command again")
    if target.is_remote:
        target.delete(UNDER_WAY)
    layout = planned.manifest.layout
    return Transfer(
        id=planned.manifest.id,
        digest=str(planned.manifest.digest),
        source_digest=str(manifest.digest),
        pin=pin,
        matched=matched,
        views=f"{layout.first_view}:{layout.num_views}",
        copied_objects=len(copied),
        copied_bytes=sum(each.stored.bytes for each in copied.values()),
        kept_objects=len(wanted.keys() - copied.keys()),
        seconds=time.monotonic() - start,
    )


def _objects(records: Records) -> Objects:
    objects: Objects = {}
    layout, receipts = records[0].layout, records[1]
    for name, receipt in receipts.items():
        for array, stored in receipt.objects.items():
            if name == FIXED:
                key = fixed_array_key(array, layout.fixed[array])
            else:
                key = block_key(array, layout.arrays[array], Block.from_name(name))
            objects[key] = _Object(stored, name, array)
    return objects


def _holds_values(layout: Layout, wanted: _Object, data: bytes | memoryview) -> bool:
    """Whether an object decodes to the values that its receipt states: its bytes are no part of a digest."""
    try:
        values = decode_object(layout, wanted.name, wanted.array, data)
    except (ValueError, RuntimeError):
        return False
    return array_digest(values) == wanted.stored.values_sha256


def _refuse_strangers(target: Storage, sizes: Mapping[str, int], ours: Objects) -> None:
    """Nothing of anybody else's is written over or mixed with."""
    for key in sizes:
        is_ours = key in ours or key in (MANIFEST, RECEIPTS, CARD, UNDER_WAY) or key.endswith("/zarr.json")
        if not is_ours and not key.startswith("receipts/"):
            raise NotACache(f"{target.url} holds {key}, which is no part of this cache; choose an empty place")


def _present(
    target: Storage,
    sizes: Mapping[str, int],
    wanted: Objects,
    there: Records | None,
    digest: str,
    values_of: Layout | None,
) -> set[str]:
    """The keys whose objects are there and right: read again where that is cheap, else vouched for."""
    candidates = [key for key, each in wanted.items() if sizes.get(key) == each.stored.bytes]
    if not target.is_remote:

        def is_right(key: str) -> bool:
            data = target.get(key) or b""
            return sha256_hex(data) == wanted[key].stored.sha256 and (
                values_of is None or _holds_values(values_of, wanted[key], data)
            )

        with ThreadPoolExecutor(target.concurrency) as threads:
            return {key for key, right in zip(candidates, threads.map(is_right, candidates), strict=True) if right}
    if _goes_on(target, digest):
        return set(candidates)
    vouched = {} if there is None else _objects(there)
    return {key for key in candidates if key in vouched and vouched[key].stored.sha256 == wanted[key].stored.sha256}


def _goes_on(target: Storage, digest: str) -> bool:
    """Whether a push of this content was interrupted here; one is begun where none was.

    Raises:
        UsageError: a push of something else was.
    """
    mark = canonical_json({"digest": digest})
    if target.create(UNDER_WAY, mark):
        return False
    found = target.get(UNDER_WAY, limit=2**12) or b""
    if found == mark:
        return True
    with suppress(ValueError, KeyError, TypeError):
        found = str(json.loads(found)["digest"])[:12].encode()
    raise UsageError(
        f"{target.url} holds an unfinished push of another content ({found.decode(errors='replace')[:40]}); finish "
        "that one, delete it, or choose another URL"
    )


def _copy_objects(
    source: Storage, target: Storage, missing: Objects, meter: Meter, *, values_of: Layout | None
) -> None:
    """Several at a time; the first that goes wrong ends it, and what has arrived stays for the next time.

    With a layout, objects are decoded and their values compared too.
    """
    # As many are read at once as the source likes, whatever the target is busy with.
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
            data = read_object(source, key, wanted.stored, why=wanted.why, arrived=count)
        if values_of is not None and not _holds_values(values_of, wanted, data):
            raise CorruptCache(
                f"{source.url}: {key} does not hold the values that its receipt states and --expect pins. Somebody "
                "changed the cache; nothing was published here. Get it from another place"
            )
        with writing:
            target.put(key, data, durable=False)
        count(wanted.stored.bytes)

    threads = ThreadPoolExecutor(source.concurrency + target.concurrency, thread_name_prefix="logitcache-copy")
    try:
        for copied in as_completed([threads.submit(copy, key) for key in missing]):
            copied.result()
    except BaseException as error:
        # What is on its way still arrives; but whoever interrupts does not wait for it.
        threads.shutdown(wait=isinstance(error, Exception), cancel_futures=True)
        raise
    threads.shutdown()


def _delete(target: Storage, keys: Iterable[str]) -> None:
    for key in keys:
        target.delete(key)


def _write_card(source: Storage, target: Storage, planned: PlannedRecords, *, whole: bool) -> None:
    if whole:
        _copy_card(source, target)
    else:
        try:
            write_card(LogitCache(target, written=planned.records))  # of these views
        except MissingPackage:
            target.delete(CARD)  # it describes other views


def _copy_card(source: Storage, target: Storage) -> None:
    """As it is, which may be as somebody edited it."""
    card = source.get(CARD, limit=MAX_CARD_BYTES)
    if card is not None and len(card) <= MAX_CARD_BYTES and card != target.get(CARD, limit=MAX_CARD_BYTES):
        target.put(CARD, card)
