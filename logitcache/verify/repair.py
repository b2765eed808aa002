"""Bad blocks made good again, and only those: fetched from a copy, or recomputed by the teacher."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from logitcache.cache.committed import collect_receipts, stored_manifest
from logitcache.cache.ensemble import merged_parts
from logitcache.cache.layout import FIXED, GROUP, Block, block_key, fixed_array_key
from logitcache.cache.manifest import (
    MANIFEST,
    RECEIPTS,
    Manifest,
    Receipt,
    contents,
    dump_manifest,
)
from logitcache.cache.publish import receipts_in_copy, write_group_metadata
from logitcache.config.schema import Pipeline
from logitcache.digest import canonical_json, sha256_hex
from logitcache.errors import CorruptCache, IdentityMismatch, NotACache, UsageError
from logitcache.stages.cache_teacher import cache_teacher
from logitcache.storage import Storage, open_storage
from logitcache.verify.audit import Problem, verify


@dataclass(frozen=True)
class RepairResult:
    """What was wrong, and what became of it."""

    problems: list[Problem]
    """Found before; none means that nothing was touched."""
    fetched: list[str]
    """Blocks taken from the copy."""
    recomputed: list[str]
    """Blocks that the teacher computed again."""
    remaining: list[Problem]
    """Found after; empty when the cache is whole."""
    digest: str | None
    """Of the content, the same as before the damage when nothing remains."""


def repair(
    location: str, *, source: str | None = None, pipeline: Pipeline | None = None, trust: bool = False
) -> RepairResult:
    """Find every bad block of a cache, and make it what it was.

    A copy is asked first; what it gives is held to the receipts. What it does not have is recomputed with a pipeline:
    the cache is opened again with those blocks missing, so that a repair that is interrupted goes on when it, or
    `cache-teacher`, is run again.

    Raises:
        CorruptCache: the manifest or the receipts are damaged, and there is no copy of this cache.
        UsageError: blocks are bad, and there is neither a copy that has them nor a pipeline.
        IdentityMismatch: the copy or the pipeline is of another cache, or the teacher's labels came out otherwise.
    """
    storage = open_storage(location)
    copy = None if source is None else open_storage(source)
    if copy is not None:
        _restore_records(storage, copy)
    problems = verify(location, deep=True)
    if all(problem.kind == "stray" for problem in problems):
        return RepairResult(problems, [], [], problems, stored_manifest(storage).digest)
    manifest = stored_manifest(storage)
    receipts = collect_receipts(storage, manifest)
    with storage.lock():
        write_group_metadata(storage, manifest.layout)
    bad = sorted({problem.block for problem in problems if problem.block})
    fetched = [] if copy is None else [name for name in bad if _fetch(storage, copy, manifest, receipts, name)]
    left = [name for name in bad if name not in fetched]
    digest = manifest.digest or manifest.provenance.get("repairing")
    if left:
        if pipeline is None:
            raise UsageError(
                f"{location}: {', '.join(left[:5])}{' and more' if len(left) > 5 else ''} can't be repaired without "
                f"{'a copy that has them (--from)' if copy is None else 'more than this copy has'}, or the pipeline "
                "that made them (--data)"
            )
        if merged_parts(manifest):
            raise UsageError(
                f"{location} is the mean of several caches, and no one teacher can make it again; give a copy "
                "(--from), or delete it and merge again"
            )
        if FIXED in left:
            raise UsageError(
                f"{location}: what is stored once is damaged, and no teacher can make it again; give a copy (--from)"
            )
        _reopen(storage, manifest, receipts, left)
        digest_after = cache_teacher(pipeline, trust=trust).manifest.digest
        if digest is not None and digest_after != digest:
            raise IdentityMismatch(
                f"{location}: the recomputed blocks are not what they were: the content digest was {digest[:12]}…, now "
                f"{(digest_after or '')[:12]}….\nThe cache is whole, but another; the teacher's machine or libraries "
                "differ from those in the manifest's provenance. Take the blocks from a copy to have it as it was."
            )
    remaining = verify(location, deep=True)
    return RepairResult(problems, fetched, left, remaining, stored_manifest(storage).digest)


def _restore_records(storage: Storage, copy: Storage) -> None:
    """Take manifest and receipts from a copy, where ours can't be read and the copy's are of the same cache.

    The copy may have more views than ours.
    """
    theirs = stored_manifest(copy)
    try:
        ours: Manifest | None = stored_manifest(storage)
    except (CorruptCache, NotACache):
        if next(storage.list_keys(GROUP), None) is None:
            raise  # no damaged cache, but none
        ours = None
    if ours is not None and not _is_copy(ours, theirs, copy):
        raise IdentityMismatch(f"{copy.url} is no copy of {storage.url}: its id or its content digest is another")
    with storage.lock():
        if ours is None:
            storage.put(MANIFEST, dump_manifest(theirs))
            ours = theirs
        try:
            collect_receipts(storage, ours)
        except CorruptCache:
            receipts = collect_receipts(copy, theirs)
            known = (receipts_in_copy(ours, receipts) if ours.state == "sealed" else None) or receipts
            gathered = _records(known)
            storage.put(RECEIPTS, gathered)
            if ours.state == "sealed" and ours.receipts != sha256_hex(gathered):  # the same values, stored otherwise
                changes = {"receipts": sha256_hex(gathered), "contents": contents(known, fixed=FIXED)}
                storage.put(MANIFEST, dump_manifest(ours.model_copy(update=changes)))


def _is_copy(ours: Manifest, theirs: Manifest, copy: Storage) -> bool:
    if ours.id != theirs.id or ours.digest in (None, theirs.digest):
        return ours.id == theirs.id
    return receipts_in_copy(ours, collect_receipts(copy, theirs)) is not None


def _fetch(storage: Storage, copy: Storage, manifest: Manifest, receipts: dict[str, Receipt], name: str) -> bool:
    """Whether every object of a block could be taken from the copy; nothing is stored that its receipt does not fit."""
    if name not in receipts:
        return False
    objects: dict[str, Any] = {}
    for array, stored in receipts[name].objects.items():
        if name == FIXED:
            key = fixed_array_key(array, manifest.layout.fixed[array])
        else:
            key = block_key(array, manifest.layout.arrays[array], Block.from_name(name))
        data = copy.get(key, limit=stored.bytes)
        if data is None or sha256_hex(data) != stored.sha256:
            return False
        objects[key] = data
    for key, data in objects.items():
        if storage.get(key, limit=len(data)) != data:
            storage.put(key, data)
    return True


def _reopen(storage: Storage, manifest: Manifest, receipts: dict[str, Receipt], bad: list[str]) -> None:
    """Open a cache again, with some blocks missing; it says which content it is to come back to."""
    provenance = manifest.provenance | ({} if manifest.digest is None else {"repairing": manifest.digest})
    kept = {name: receipt for name, receipt in receipts.items() if name not in bad}
    opened = manifest.model_copy(update={"state": "open", "digest": None, "provenance": provenance})
    with storage.lock():
        # The manifest first: a sealed cache whose receipts lack a block is damaged, an open one is merely not finished.
        storage.put(MANIFEST, dump_manifest(opened))
        storage.put(RECEIPTS, _records(kept))
        for name in bad:
            storage.delete(Block.from_name(name).receipt_key)


def _records(receipts: dict[str, Receipt]) -> bytes:
    return canonical_json({name: receipt.model_dump() for name, receipt in receipts.items()})
