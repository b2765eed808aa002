"""Restores damaged blocks, and only those: from a copy, or by computing them again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from logitcache.cache.ensemble import merged_parts
from logitcache.cache.layout import GROUP, PER_CACHE, Block, receipt_key
from logitcache.cache.manifest import MANIFEST, RECEIPTS, Manifest, Receipt, dump_manifest
from logitcache.cache.receipts import ReceiptsByView, by_view, splits_receipts
from logitcache.cache.records import Records, matching_receipts
from logitcache.cache.stored_records import collect_receipts, put_view_receipts, stored_manifest, write_group_metadata
from logitcache.digest import sha256_hex
from logitcache.errors import CorruptCache, IdentityMismatch, NotACache, UsageError
from logitcache.storage import Storage, open_storage
from logitcache.verify.audit import Problem, verify

SHOWN_BLOCKS = 5
"""Damaged blocks that an error message lists."""


@dataclass(frozen=True)
class RepairResult:
    """What a repair found and did."""

    problems: list[Problem]
    """Found before; if there are none, nothing was changed."""
    fetched: list[str]
    """Blocks taken from the copy."""
    recomputed: list[str]
    """Blocks that the teacher computed again."""
    remaining: list[Problem]
    """Found after; empty when the cache is intact."""
    digest: str | None
    """Content digest; the same as before the damage when nothing remains."""


def repair(
    location: str, *, source: str | None = None, recompute: Callable[[], str | None] | None = None
) -> RepairResult:
    """Find every damaged block of a cache, and restore it.

    Blocks come from a copy where it has them, checked against the receipts. The cache is then opened again without the
    others, and `recompute` computes them. An interrupted repair resumes when it, or `cache-teacher`, runs again.

    Args:
        location: the cache.
        source: a copy of it.
        recompute: computes the missing blocks of the cache, seals it and returns its content digest, as
            `cache_teacher` does with the pipeline that built the cache.

    Raises:
        CorruptCache: the manifest or the receipts are damaged, and there is no copy of this cache.
        UsageError: blocks are damaged, the copy doesn't have them, and they can't be computed.
        IdentityMismatch: the copy or the pipeline is of another cache, or the teacher's labels differ now.
    """
    storage = open_storage(location)
    copy = None if source is None else open_storage(source)
    if copy is not None:
        _restore_records(storage, copy)
    problems = verify(location, deep=True)
    if all(problem.kind == "stray" for problem in problems):
        return RepairResult(problems, [], [], problems, stored_manifest(storage).digest)
    manifest = stored_manifest(storage)
    records = Records(manifest, collect_receipts(storage, manifest))
    with storage.lock():
        write_group_metadata(storage, manifest.layout)
    damaged = sorted({problem.block for problem in problems if problem.block})
    fetched = [] if copy is None else [name for name in damaged if _fetch(storage, copy, records, name)]
    left = [name for name in damaged if name not in fetched]
    if left:
        if recompute is None:
            raise UsageError(
                f"{location}: {', '.join(left[:SHOWN_BLOCKS])}{' and more' if len(left) > SHOWN_BLOCKS else ''} can't "
                f"be repaired without {'a copy that has them (--from)' if copy is None else 'a more complete copy'}, "
                "or the pipeline that built the cache (--data)"
            )
        if merged_parts(manifest):
            raise UsageError(
                f"{location} is the mean of several caches, which no single teacher can recompute; give a copy "
                "(--from), or delete it and merge again"
            )
        if PER_CACHE in left:
            raise UsageError(
                f"{location}: the per-cache arrays are damaged, and the teacher can't recompute them; give a copy "
                "(--from)"
            )
        _reopen(storage, records, left)
        expected, found = manifest.digest or manifest.provenance.get("repairing"), recompute()
        if expected is not None and found != expected:
            raise IdentityMismatch(
                f"{location}: the recomputed blocks differ from the original ones: the content digest was "
                f"{expected[:12]}…, now {(found or '')[:12]}….\nThe cache is intact, but has another digest; the "
                "teacher's machine or libraries differ from those in the manifest's provenance. Repair from a copy "
                "(--from) to restore the original."
            )
    remaining = verify(location, deep=True)
    return RepairResult(problems, fetched, left, remaining, stored_manifest(storage).digest)


def _restore_records(storage: Storage, copy: Storage) -> None:
    """Take manifest and receipts from a copy where those of the cache can't be read.

    The copy may have more views.
    """
    theirs = stored_manifest(copy)
    try:
        ours: Manifest | None = stored_manifest(storage)
    except (CorruptCache, NotACache):
        if next(storage.list_keys(GROUP), None) is None:
            raise  # not a damaged cache, but none
        ours = None
    if ours is not None and not _is_copy(ours, theirs, copy):
        raise IdentityMismatch(f"{copy.url} is no copy of {storage.url}: its id or its content digest differs")
    with storage.lock():
        if ours is None:
            storage.put(MANIFEST, dump_manifest(theirs))
            ours = theirs
        try:
            there = by_view(collect_receipts(storage, ours))
            for view in there.entries:
                there.of_view(view)
        except CorruptCache:
            receipts = collect_receipts(copy, theirs)
            known = (matching_receipts(ours, receipts) if ours.state == "sealed" else None) or receipts
            records, gathered = Records(ours, known).gathered()
            put_view_receipts(storage, records, again=True)
            storage.put(RECEIPTS, gathered)
            if ours.state == "sealed" and ours.receipts != sha256_hex(gathered):  # the same values in other bytes
                changes = {
                    "receipts": sha256_hex(gathered),
                    "receipts_by_view": splits_receipts(ours),
                    "contents": records.contents(),
                }
                storage.put(MANIFEST, dump_manifest(ours.model_copy(update=changes)))


def _is_copy(ours: Manifest, theirs: Manifest, copy: Storage) -> bool:
    if ours.id != theirs.id or ours.digest in (None, theirs.digest):
        return ours.id == theirs.id
    return matching_receipts(ours, collect_receipts(copy, theirs)) is not None


def _fetch(storage: Storage, copy: Storage, records: Records, name: str) -> bool:
    """Take the objects of a block from a copy; False, and nothing is stored, unless all fit the receipt."""
    try:
        if name not in records.receipts:
            return False
    except CorruptCache:  # the receipts of its view are damaged
        return False
    fetched = {}
    for wanted in records.objects([name]):
        data = copy.get(wanted.key, limit=wanted.stored.bytes)
        if data is None or sha256_hex(data) != wanted.stored.sha256:
            return False
        fetched[wanted.key] = data
    for key, data in fetched.items():
        if storage.get(key, limit=len(data)) != data:
            storage.put(key, data)
    return True


def _reopen(storage: Storage, records: Records, damaged: list[str]) -> None:
    """Open a cache again without some blocks; its provenance states the digest that it must have afterwards."""
    manifest = records.manifest
    provenance = manifest.provenance | ({} if manifest.digest is None else {"repairing": manifest.digest})
    lacking = set(damaged)
    receipts = records.by_view

    def read(view: int) -> dict[str, Receipt]:
        try:
            of_view = receipts.of_view(view)
        except CorruptCache:  # all its blocks are computed again
            return {}
        return {name: receipt for name, receipt in of_view.items() if name not in lacking}

    # Entries of untouched views stay; the others are made anew.
    touched = {Block.from_name(name).view for name in damaged}
    entries = {view: entry for view, entry in receipts.entries.items() if view not in touched}
    kept = ReceiptsByView(receipts.per_cache, receipts.views, read, entries=entries)
    opened = manifest.model_copy(update={"state": "open", "digest": None, "provenance": provenance})
    with storage.lock():
        # The manifest first: a sealed cache that lacks a receipt is damaged, an open one is only incomplete.
        storage.put(MANIFEST, dump_manifest(opened))
        _, gathered = Records(opened, kept).gathered(put=storage.put)
        storage.put(RECEIPTS, gathered)
        for name in damaged:
            storage.delete(receipt_key(name))
