"""Records of a copy: what a place holds of a cache already, what it will hold, and how that is published."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from logitcache.cache.committed import pinned_receipts_key, read_records, stored_manifest
from logitcache.cache.digests import content_digest
from logitcache.cache.ensemble import MERGED
from logitcache.cache.layout import FIXED, Block
from logitcache.cache.manifest import MANIFEST, RECEIPTS, Manifest, Receipt, contents, dump_manifest
from logitcache.cache.packages import ENCODING_PACKAGES
from logitcache.cache.publish import receipts_in_copy, replace_records, write_group_metadata
from logitcache.digest import canonical_json, sha256_hex
from logitcache.errors import REBUILD, CorruptCache, IdentityMismatch, NotACache, UsageError
from logitcache.storage import Storage

PUBLIC_PROVENANCE = ("created", "python", "versions", "encoding", ENCODING_PACKAGES, "card", MERGED)
"""What an anonymous push keeps of a manifest's provenance."""

Records = tuple[Manifest, dict[str, Receipt]]


@dataclass(frozen=True)
class PlannedRecords:
    """What a place will hold."""

    manifest: Manifest
    receipts: dict[str, Receipt]
    gathered: bytes
    """`receipts.json`."""
    there: Records | None
    """What it holds before."""

    @property
    def records(self) -> Records:
        """Manifest and receipts."""
        return self.manifest, self.receipts


def without_maker(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """What provenance says of the cache itself; whatever else it says, now or in later versions, stays here."""
    kept = {name: provenance[name] for name in PUBLIC_PROVENANCE if name in provenance}
    if isinstance(kept.get(MERGED), dict):
        parts = [{**part, "location": ""} for part in kept[MERGED].get("parts", [])]
        kept[MERGED] = {**kept[MERGED], "parts": parts}
    return kept


def check_expected(url: str, records: Records, pin: str, expect: str | None) -> str | None:
    """Which of a source's two hashes was expected: "pin", "digest" or, where nothing was, None.

    Raises:
        IdentityMismatch: neither of them, or the source contradicts itself.
        UsageError: no such hash.
    """
    manifest, receipts = records
    if content_digest(manifest, receipts) != manifest.digest:
        raise IdentityMismatch(
            f"{url}: the receipts don't add up to the manifest's digest; run `logitcache verify` on it"
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
        f"{url} has content digest {manifest.digest}{'' if pin == manifest.digest else f' and pin {pin}'}; expected "
        f"{expect.lower()}. Nothing was copied. Ask whoever shared it which digest is meant, or leave out --expect"
    )


def records_there(target: Storage, source: Records) -> Records | None:
    """What the target holds of this cache already.

    Raises:
        NotACache, CorruptCache: records of something else, or damaged ones that the source can't make good.
        IdentityMismatch, UsageError: another cache, other labels, or an open cache.
    """
    manifest, receipts = source
    try:
        there, there_receipts = read_records(target)
    except NotACache:
        if target.size(MANIFEST) is not None:
            raise
        return None
    except CorruptCache:
        # Two at once may have left the manifest of the one and the receipts of the other.
        there = stored_manifest(target)
        known = receipts_in_copy(there, receipts) if (there.id, there.state) == (manifest.id, "sealed") else None
        if known is None:
            raise
        there_receipts = known
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


def plan_records(url: str, source: Records, copied: range, place: str, there: Records | None) -> PlannedRecords:
    """What there will be once some views join those that are there; of a whole cache they are the source's records.

    Args:
        url: the source's.
        source: its records.
        copied: the views that are copied from it.
        place: the target's URL.
        there: what the target holds.

    Raises:
        UsageError: a gap would be left.
    """
    manifest, receipts = source
    views, held = _joined(copied, there, place)
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
    return PlannedRecords(manifest.model_copy(update=changes), kept, gathered, there)


def _joined(copied: range, there: Records | None, url: str) -> tuple[range, dict[str, Receipt]]:
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


def publish(target: Storage, planned: PlannedRecords, *, anonymous: bool) -> bool:
    """Write the records, the manifest last, under the target's lock; whoever reads meanwhile finds a whole cache.

    Returns:
        False where somebody else was first, in a store that has no lock: look again at what is there.
    """
    manifest, gathered = planned.manifest, planned.gathered
    write_group_metadata(target, manifest.layout)
    if planned.there is None:
        pinned = pinned_receipts_key(str(manifest.receipts))
        if target.is_remote:
            target.put(pinned, gathered)  # `receipts.json` may be somebody else's already
        else:
            target.put(RECEIPTS, gathered)
        if not target.create(MANIFEST, dump_manifest(manifest)):
            if stored_manifest(target).receipts != manifest.receipts:
                target.delete(pinned)
            return False
        if target.is_remote:
            target.put(RECEIPTS, gathered)
            target.delete(pinned)
    else:
        replaced = planned.there[0]
        replace_records(target, manifest, gathered, replaces=replaced)
        if anonymous and replaced.provenance != manifest.provenance:
            target.put(MANIFEST, dump_manifest(manifest))  # it was pushed before, with the maker's name on it
    return not target.is_remote or stored_manifest(target).receipts == manifest.receipts
