"""The records of a copy: what the target holds, what it will hold, and how that is published."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from logitcache.cache.ensemble import MERGED
from logitcache.cache.layout import PER_CACHE
from logitcache.cache.manifest import MANIFEST, RECEIPTS, Manifest, Receipt, Sha256, dump_manifest
from logitcache.cache.names import NAMES
from logitcache.cache.packages import ENCODING_PACKAGES
from logitcache.cache.receipts import selected
from logitcache.cache.records import Records, matching_receipts
from logitcache.cache.stored_records import (
    pinned_receipts_key,
    put_view_receipts,
    read_records,
    replace_records,
    stored_manifest,
    write_group_metadata,
)
from logitcache.errors import REBUILD, CorruptCache, IdentityMismatch, NotACache, UsageError
from logitcache.storage import Storage

PUBLIC_PROVENANCE = ("created", "python", "versions", "encoding", ENCODING_PACKAGES, "card", NAMES, MERGED)
"""Keys of the provenance that an anonymous push keeps."""


@dataclass(frozen=True)
class PlannedRecords:
    """The records that the target will hold."""

    records: Records
    gathered: bytes
    """`receipts.json`."""
    existing: Records | None
    """The records that it holds now."""

    @property
    def digest(self) -> Sha256 | None:
        """Content digest of the copy."""
        return self.records.manifest.digest


def anonymised(manifest: Manifest) -> Manifest:
    """The manifest with the public part of its provenance; an allow-list, so that new keys stay private."""
    kept = {name: manifest.provenance[name] for name in PUBLIC_PROVENANCE if name in manifest.provenance}
    if isinstance(kept.get(MERGED), dict):
        parts = [{**part, "location": ""} for part in kept[MERGED].get("parts", [])]
        kept[MERGED] = {**kept[MERGED], "parts": parts}
    return manifest.model_copy(update={"provenance": kept})


def check_expected(url: str, records: Records, pin: str, expect: str | None) -> str | None:
    """Compare the source with the expected hash; which of its hashes matched: "pin", "digest" or None.

    Raises:
        IdentityMismatch: neither matches, or the source's digest doesn't match its receipts.
        UsageError: `expect` is not a hash.
    """
    digest = records.manifest.digest
    if records.content_digest() != digest:
        raise IdentityMismatch(f"{url}: the receipts don't match the manifest's digest; run `logitcache verify` on it")
    if expect is None:
        return None
    if len(expect) < 12 or set(expect.lower()) - set("0123456789abcdef"):
        raise UsageError(
            f"--expect is {expect!r}; expected a content digest, or at least its first 12 hexadecimal digits"
        )
    if pin.startswith(expect.lower()):
        return "pin"
    if str(digest).startswith(expect.lower()):
        return "digest"
    raise IdentityMismatch(
        f"{url} has content digest {digest}{'' if pin == digest else f' and pin {pin}'}; expected {expect.lower()}. "
        "Nothing was copied. Get the right digest from the cache's owner, or leave out --expect"
    )


def target_records(target: Storage, source: Records) -> Records | None:
    """The records of this cache that the target holds already; None where there are none.

    Raises:
        NotACache, CorruptCache: something else is there, or damaged records that the source's can't replace.
        IdentityMismatch, UsageError: another cache is there, other labels, or an open cache.
    """
    manifest, receipts = source.manifest, source.receipts
    try:
        found = read_records(target)
    except NotACache:
        if target.size(MANIFEST) is not None:
            raise
        return None
    except CorruptCache:
        # Two processes that published at the same time may have left one's manifest and the other's receipts.
        existing = stored_manifest(target)
        is_same = (existing.id, existing.state) == (manifest.id, "sealed")
        known = matching_receipts(existing, receipts) if is_same else None
        if known is None:
            raise
        found = Records(existing, known)
    existing = found.manifest
    if existing.id != manifest.id:
        raise IdentityMismatch(
            f"{target.url} holds another cache ({existing.id[:12]}…, not {manifest.id[:12]}…); nothing was changed. "
            "Choose another destination, or delete that cache"
        )
    if existing.state != "sealed":
        raise UsageError(
            f"{target.url} holds this cache, incomplete; nothing was changed. To complete it, {REBUILD}. "
            "To replace it by a copy, delete it first"
        )
    for name in _differing(found, source):
        if _values(found.receipts[name]) != _values(receipts[name]):
            raise IdentityMismatch(
                f"{target.url} holds a cache of the same identity with other labels: {name} differs (digest "
                f"{str(existing.digest)[:12]}…, not {str(manifest.digest)[:12]}…); nothing was changed.\n"
                "The teacher ran twice, with different rounding. Choose another destination, or delete that cache"
            )
    return found


def _differing(found: Records, source: Records) -> Iterator[str]:
    """Receipts that may state other values: those of the per-cache arrays, and of each view with another digest."""
    if PER_CACHE in found.receipts and PER_CACHE in source.receipts:
        yield PER_CACHE
    there = set(found.by_view.views)
    for view in source.by_view.views:
        if view in there and found.view_digest(view) != source.view_digest(view):
            yield from (name for name in found.by_view.of_view(view) if name in source.receipts)


def _values(receipt: Receipt) -> dict[str, str]:
    return {name: stored.values_sha256 for name, stored in receipt.objects.items()}


def plan_records(url: str, source: Records, copied: range, target_url: str, existing: Records | None) -> PlannedRecords:
    """The records of the target once views are copied; those of the source where all its views are there.

    Args:
        url: of the source.
        source: its records.
        copied: the views that are copied.
        target_url: of the target.
        existing: the records that the target holds.

    Raises:
        UsageError: a gap between the views would be left.
    """
    manifest = source.manifest
    views = copied if existing is None else _joined(copied, existing.layout.views, target_url)
    provenance = manifest.provenance
    if views != manifest.layout.views:
        provenance = provenance | {"copied_from": {"url": url, "digest": manifest.digest}}
    layout = manifest.layout.model_copy(update={"first_view": views.start, "num_views": views.stop})
    sources = dict.fromkeys(views, source.by_view)
    if existing is not None:
        sources |= dict.fromkeys(existing.layout.views, existing.by_view)
    first = source if existing is None else existing
    kept = selected(layout, first.receipts[PER_CACHE], sources)
    records, gathered = Records(manifest, kept).sealed(layout=layout, provenance=provenance)
    return PlannedRecords(records, gathered, existing)


def _joined(copied: range, held: range, url: str) -> range:
    """The views of the target, with those that are copied."""
    if copied.start > held.stop or held.start > copied.stop:
        gap = range(min(copied.stop, held.stop), max(copied.start, held.start))
        raise UsageError(
            f"{url} holds views {held.start}:{held.stop}; {copied.start}:{copied.stop} would leave a gap. Pull "
            f"{gap.start}:{gap.stop} first, or into another directory"
        )
    return range(min(copied.start, held.start), max(copied.stop, held.stop))


def publish(target: Storage, planned: PlannedRecords, *, anonymous: bool) -> bool:
    """Write the records under the target's lock; a concurrent reader finds a complete cache at every moment.

    Returns:
        False where another process published first, in a store without a lock: read what it holds again.
    """
    manifest, gathered = planned.records.manifest, planned.gathered
    write_group_metadata(target, manifest.layout)
    put_view_receipts(target, planned.records)
    if planned.existing is None:
        pinned = pinned_receipts_key(str(manifest.receipts))
        # In an object store, `receipts.json` may belong to another process already.
        target.put(pinned if target.is_remote else RECEIPTS, gathered)
        if not target.create(MANIFEST, dump_manifest(manifest)):
            if stored_manifest(target).receipts != manifest.receipts:
                target.delete(pinned)
            return False
        if target.is_remote:
            target.put(RECEIPTS, gathered)
            target.delete(pinned)
    else:
        replaced = planned.existing.manifest
        replace_records(target, manifest, gathered, replaces=replaced)
        if anonymous and replaced.provenance != manifest.provenance:
            target.put(MANIFEST, dump_manifest(manifest))  # an earlier push was not anonymous
    if planned.existing is not None and not target.is_remote:
        for key in planned.existing.view_receipts_keys().keys() - planned.records.view_receipts_keys().keys():
            target.delete(key)
    return not target.is_remote or stored_manifest(target).receipts == manifest.receipts
