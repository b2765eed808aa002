"""Caches from place to place: push and pull, resumable, every object held to its SHA-256, visible once whole.

objects that are missing -> held to their receipts -> durable -> receipts -> card -> manifest, last.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass
from threading import BoundedSemaphore, Lock
from typing import Any, NamedTuple

from logitcache.cache.card import CARD, write_card
from logitcache.cache.committed import pinned_receipts_key, read_records
from logitcache.cache.digests import content_digest, pin_of
from logitcache.cache.ensemble import MERGED
from logitcache.cache.layout import (
    FIXED,
    Block,
    block_key,
    decode_object,
    fixed_array_key,
    group_metadata,
    parse_views,
)
from logitcache.cache.manifest import (
    MANIFEST,
    MAX_MANIFEST_BYTES,
    RECEIPTS,
    Layout,
    Manifest,
    Receipt,
    StoredObject,
    contents,
    dump_manifest,
    read_manifest,
)
from logitcache.cache.objects import read_object
from logitcache.cache.place import check_place
from logitcache.cache.reader import LogitCache
from logitcache.digest import array_digest, canonical_json, sha256_hex
from logitcache.errors import REBUILD, CorruptCache, IdentityMismatch, IncompleteCache, NotACache, UsageError, unsealed
from logitcache.progress import Meter, track
from logitcache.storage import Storage, open_storage

MAX_CARD_BYTES = 2**20
UNDER_WAY = "push.json"
"""Says which content an unfinished push to an object store is of: its own objects need not be sent again."""

PUBLIC_PROVENANCE = ("created", "python", "versions", "encoding", "card", MERGED)
"""What an anonymous push keeps of a manifest's provenance."""


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
    manifest, receipts = read_records(source)
    if manifest.state != "sealed":
        raise unsealed(source.url)
    pin = pin_of(manifest, receipts)
    matched = _check_digest(source, manifest, receipts, pin, expect)
    if anonymous:
        manifest = manifest.model_copy(update={"provenance": _without_maker(manifest.provenance)})
    there = _records_there(target, manifest, receipts)
    copied_views = parse_views(views, manifest.layout.views)
    new = _resulting_records(manifest, receipts, _joined(copied_views, there, target.url), source.url)
    wanted, on_offer = _objects(new[0].layout, new[1]), _objects(manifest.layout, receipts)
    sizes = dict(target.sizes())
    _refuse_strangers(target, sizes, on_offer | wanted)
    target.remove_leftovers()
    values_of = None if expect is None else new[0].layout
    present = _present(target, sizes, wanted, there, str(manifest.digest), values_of)
    missing = {key: wanted[key] for key in wanted if key not in present}
    lacking = [each.why for key, each in missing.items() if key not in on_offer]
    if lacking:
        raise IncompleteCache(f"{target.url} has lost {lacking[0]}, which {source.url} does not hold; repair it first")
    total = sum(each.stored.bytes for each in missing.values())
    with track(f"copying {len(missing)} objects", total, unit="bytes") as meter:
        _copy_objects(source, target, missing, meter, values_of=values_of)
    target.make_durable(wanted)  # those too that an interrupted run has left
    _publish(target, new[0], new[2], replaces=None if there is None else there[0])
    if anonymous and there is not None and there[0].provenance != new[0].provenance:
        target.put(MANIFEST, dump_manifest(new[0]))  # it was pushed before, with the maker's name on it
    if new[0].digest == manifest.digest:
        _copy_card(source, target)
    else:
        write_card(LogitCache(target, written=new[:2]))  # of these views
    for key in sizes.keys() & (on_offer.keys() - wanted.keys()):
        target.delete(key)  # left by a pull of other views that was interrupted
    if target.is_remote:
        target.delete(UNDER_WAY)
    return Transfer(
        id=new[0].id,
        digest=str(new[0].digest),
        source_digest=str(manifest.digest),
        pin=pin,
        matched=matched,
        views=f"{new[0].layout.first_view}:{new[0].layout.num_views}",
        copied_objects=len(missing),
        copied_bytes=total,
        kept_objects=len(present),
        seconds=time.monotonic() - start,
    )


def _without_maker(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """What provenance says of the cache itself; whatever else it says, now or in later versions, stays here."""
    kept = {name: provenance[name] for name in PUBLIC_PROVENANCE if name in provenance}
    if isinstance(kept.get(MERGED), dict):
        parts = [{**part, "location": ""} for part in kept[MERGED].get("parts", [])]
        kept[MERGED] = {**kept[MERGED], "parts": parts}
    return kept


def _check_digest(
    source: Storage, manifest: Manifest, receipts: dict[str, Receipt], pin: str, expect: str | None
) -> str | None:
    """Which of the source's two hashes was expected."""
    if content_digest(manifest, receipts) != manifest.digest:
        raise IdentityMismatch(
            f"{source.url}: the receipts don't add up to the manifest's digest; run `logitcache verify` on it"
        )
    if expect is None:
        return None
    if len(expect) < 12 or set(expect.lower()) - set("0123456789abcdef"):
        raise UsageError(f"--expect is {expect!r}; expected the content digest, or 12 hexadecimal digits of it or more")
    if pin.startswith(expect.lower()):
        return "pin"
    if str(manifest.digest).startswith(expect.lower()):
        return "digest"
    raise IdentityMismatch(
        f"{source.url} has content digest {manifest.digest}"
        f"{'' if pin == manifest.digest else f' and pin {pin}'}; expected {expect.lower()}. Nothing was copied. "
        "Ask whoever shared it which digest is meant, or leave out --expect"
    )


def _records_there(
    target: Storage, manifest: Manifest, receipts: dict[str, Receipt]
) -> tuple[Manifest, dict[str, Receipt]] | None:
    """What the target holds of this cache already."""
    try:
        there, there_receipts = read_records(target)
    except NotACache:
        if target.size(MANIFEST) is not None:
            raise
        return None
    if there.id != manifest.id:
        raise IdentityMismatch(
            f"{target.url} holds another cache ({there.id[:12]}…, not {manifest.id[:12]}…); nothing was changed. "
            "Choose another place, or delete what is there"
        )
    if there.state != "sealed":
        raise UsageError(
            f"{target.url} holds this very cache, unfinished; nothing was changed. To finish it, {REBUILD}. "
            "To copy over it, delete it first"
        )
    for name in there_receipts.keys() & receipts.keys():
        if _values(there_receipts[name]) != _values(receipts[name]):
            raise IdentityMismatch(
                f"{target.url} holds a cache of the same identity, but with other labels: they differ in {name} "
                f"(digest {str(there.digest)[:12]}…, not {str(manifest.digest)[:12]}…); nothing was changed.\n"
                "The teacher ran twice, and rounded differently. Choose another place, or delete what is there"
            )
    return there, there_receipts


def _values(receipt: Receipt) -> dict[str, str]:
    return {name: stored.values_sha256 for name, stored in receipt.objects.items()}


def _joined(
    copied: range, there: tuple[Manifest, dict[str, Receipt]] | None, url: str
) -> tuple[range, dict[str, Receipt]]:
    """The views that there will be, and the receipts of those that are there."""
    if there is None:
        return copied, {}
    held = there[0].layout.views
    if copied.start > held.stop or held.start > copied.stop:
        gap = range(min(copied.stop, held.stop), max(copied.start, held.start))
        raise UsageError(
            f"{url} holds views {held.start}:{held.stop}; {copied.start}:{copied.stop} would leave a gap. Pull "
            f"{gap.start}:{gap.stop} first, or into another directory"
        )
    return range(min(copied.start, held.start), max(copied.stop, held.stop)), there[1]


def _resulting_records(
    manifest: Manifest, receipts: dict[str, Receipt], joined: tuple[range, dict[str, Receipt]], url: str
) -> tuple[Manifest, dict[str, Receipt], bytes]:
    """Manifest, receipts and `receipts.json` of what there will be; of a whole cache they are the source's."""
    views, held = joined
    layout = manifest.layout.model_copy(update={"first_view": views.start, "num_views": views.stop})
    names = [name for name in {**receipts, **held} if name == FIXED or Block.from_name(name).view in views]
    kept = {name: held[name] if name in held else receipts[name] for name in sorted(names)}
    gathered = canonical_json({name: receipt.model_dump() for name, receipt in kept.items()})
    changes = {
        "layout": layout,
        "digest": content_digest(manifest.model_copy(update={"layout": layout}), kept),
        "receipts": sha256_hex(gathered),
        "contents": contents(kept, fixed=FIXED),
    }
    if views != manifest.layout.views:
        changes["provenance"] = manifest.provenance | {"copied_from": {"url": url, "digest": manifest.digest}}
    return manifest.model_copy(update=changes), kept, gathered


def _objects(layout: Layout, receipts: dict[str, Receipt]) -> Objects:
    objects: Objects = {}
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
    there: tuple[Manifest, dict[str, Receipt]] | None,
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
    goes_on = _goes_on(target, digest)
    if values_of is not None:
        return set()  # nobody has compared the values of what is there
    if goes_on:
        return set(candidates)
    vouched = {} if there is None else _objects(there[0].layout, there[1])
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


def _publish(target: Storage, manifest: Manifest, gathered: bytes, *, replaces: Manifest | None) -> None:
    """Records, the manifest last; whoever reads meanwhile finds the old cache, or the new one."""
    for key, data in group_metadata(manifest.layout).items():
        if target.get(key, limit=len(data)) != data:
            target.put(key, data)
    if replaces is None:
        target.put(RECEIPTS, gathered)
        if target.create(MANIFEST, dump_manifest(manifest)):
            return
        replaces = read_manifest(target.get(MANIFEST, limit=MAX_MANIFEST_BYTES), url=target.url)
        if (replaces.id, replaces.digest) != (manifest.id, manifest.digest):
            raise IdentityMismatch(f"{target.url}: somebody else put cache {replaces.id[:12]}… there meanwhile")
        return
    pinned = pinned_receipts_key(str(manifest.receipts))
    if replaces.receipts != manifest.receipts:
        # Receipts under a second name first, so that those that the manifest names are there at every moment.
        target.put(pinned, gathered)
        target.put(MANIFEST, dump_manifest(manifest))
    if target.get(RECEIPTS, limit=len(gathered)) != gathered:
        target.put(RECEIPTS, gathered)
    target.delete(pinned)


def _copy_card(source: Storage, target: Storage) -> None:
    """As it is, which may be as somebody edited it."""
    card = source.get(CARD, limit=MAX_CARD_BYTES)
    if card is not None and len(card) <= MAX_CARD_BYTES and card != target.get(CARD, limit=MAX_CARD_BYTES):
        target.put(CARD, card)
