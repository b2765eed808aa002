"""The records of a cache: its manifest, its receipts, and the objects that the receipts describe."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from logitcache.cache.layout import (
    PER_CACHE,
    array_specs,
    decode_object,
    object_key,
    view_blocks,
    view_name,
    view_receipts_key,
)
from logitcache.cache.manifest import (
    Contents,
    Layout,
    Manifest,
    Receipt,
    Sha256,
    StoredObject,
    ViewEntry,
)
from logitcache.cache.receipts import (
    ReceiptsByView,
    by_view,
    contents_of,
    dump_index,
    dump_receipts,
    lines_digest,
    selected,
    splits_receipts,
    value_lines,
    view_digest,
    view_entry,
)
from logitcache.digest import array_digest, sha256_hex

DIGEST_HEADER = "logitcache content 2"


class CacheObject(NamedTuple):
    """One object of a cache, as its receipt describes it."""

    key: str
    receipt: str
    """Name of the receipt: a block's, or `PER_CACHE`."""
    array: str
    num_rows: int
    """As the receipt states."""
    stored: StoredObject

    def values(self, layout: Layout, data: bytes | memoryview) -> np.ndarray:
        """The values of the object, decoded from its bytes.

        Raises:
            ValueError: the bytes can't be decoded, or hold other values than the receipt states.
        """
        values = decode_object(layout, self.receipt, self.array, data, num_rows=self.num_rows)
        if array_digest(values) != self.stored.values_sha256:
            raise ValueError("the values differ from the receipt")
        return values


def description(name: str) -> str:
    """What a receipt describes, for messages."""
    return "the per-cache arrays" if name == PER_CACHE else f"block {name}"


@dataclass(frozen=True)
class Records:
    """The manifest of a cache, and receipts by name: all of a sealed cache, those that exist of an open one."""

    manifest: Manifest
    receipts: Mapping[str, Receipt]

    @property
    def layout(self) -> Layout:
        """The manifest's layout."""
        return self.manifest.layout

    def objects(self, names: Iterable[str] | None = None) -> Iterator[CacheObject]:
        """The objects that receipts describe: those of the given names, or all.

        Arrays that the layout doesn't have are left out.
        """
        layout = self.layout
        for name in self.receipts if names is None else names:
            specs = array_specs(layout, name)
            receipt = self.receipts[name]
            for array, stored in receipt.objects.items():
                if array in specs:
                    yield CacheObject(object_key(layout, name, array), name, array, receipt.rows, stored)

    def content_digest(self) -> Sha256:
        """The content digest as the cache's format defines it; in format 2 it is the pin."""
        if self.manifest.identity.format_version > 1:
            return self.pin()
        # Format 1 covers which values there are, not where they are.
        hashes = sorted(stored.values_sha256 for each in self.receipts.values() for stored in each.objects.values())
        return sha256_hex("\n".join(hashes).encode())

    @cached_property
    def by_view(self) -> ReceiptsByView:
        """The receipts, grouped by view."""
        return by_view(self.receipts)

    def pin(self) -> Sha256:
        """SHA-256 over the id and the values of each array in each block (docs/format.md)."""
        lines = [
            DIGEST_HEADER,
            f"id {self.manifest.id}",
            f"num_samples {self.layout.num_samples}",
            f"rows_per_block {self.layout.rows_per_block}",
        ]
        if self.by_view.per_cache is not None:
            lines += (f"fixed {line}" for line in value_lines(self.by_view.per_cache))
        lines += (f"view {view} {self.view_digest(view)}" for view in self.by_view.views)
        return lines_digest(lines)

    def view_digest(self, view: int) -> Sha256:
        """The digest of one view; from the index, if there is one."""
        entry = self.by_view.entries.get(view)
        return view_digest(self.by_view.of_view(view)) if entry is None else entry.object.values_sha256

    def view_entry(self, view: int) -> ViewEntry:
        """Sums over one view; from the index, if there is one. Only then `object` is that of its receipts."""
        return self.by_view.entries.get(view) or view_entry(self.by_view.of_view(view), b"")

    def contents(self) -> Contents:
        """Sizes and fidelity, summed over all views."""
        return contents_of(self.by_view.per_cache, map(self.view_entry, self.by_view.views))

    def sealed(self, *, put: Callable[[str, bytes], None] | None = None, **changes: Any) -> tuple[Records, bytes]:
        """The same records with a sealed manifest, and the bytes of its `receipts.json`.

        Args:
            put: stores the objects with the receipts of single views, of a cache that has them; `put_view_receipts`
                stores them later.
            changes: fields of the manifest to replace, such as its layout or provenance.
        """
        records, gathered = Records(self.manifest.model_copy(update=changes), self.receipts).gathered(put=put)
        sealed = {
            "state": "sealed",
            "digest": records.content_digest(),
            "receipts": sha256_hex(gathered),
            "receipts_by_view": splits_receipts(records.manifest),
            "contents": records.contents(),
        }
        return Records(records.manifest.model_copy(update=sealed), records.receipts), gathered

    def gathered(self, *, put: Callable[[str, bytes], None] | None = None) -> tuple[Records, bytes]:
        """The same records, with the entries of the index if there is one, and the bytes of `receipts.json`.

        Args:
            put: as in `sealed`.
        """
        if not splits_receipts(self.manifest):
            return self, dump_receipts(self.receipts)
        receipts = self.by_view
        assert receipts.per_cache is not None
        entries: dict[int, ViewEntry] = {}
        for view in receipts.views:
            entry = receipts.entries.get(view)
            if entry is None:
                of_view = receipts.of_view(view)
                data = dump_receipts(of_view)
                entry = view_entry(of_view, data)
                if put is not None:
                    put(view_receipts_key(view, entry.object.sha256), data)
            entries[view] = entry
        indexed = ReceiptsByView(receipts.per_cache, receipts.views, receipts.of_view, entries=entries)
        named = {view_name(view): entry for view, entry in entries.items()}
        return Records(self.manifest, indexed), dump_index(receipts.per_cache, named)

    def view_receipts_keys(self) -> dict[str, int]:
        """The keys of the objects with the receipts of single views, and the views; none of a small cache."""
        return {view_receipts_key(view, each.object.sha256): view for view, each in self.by_view.entries.items()}


def matching_receipts(manifest: Manifest, receipts: Mapping[str, Receipt]) -> Mapping[str, Receipt] | None:
    """The receipts of a sealed cache from those of a copy, which may have more views; None if the labels differ."""
    layout, there = manifest.layout, by_view(receipts)
    if there.per_cache is None or not all(has_view(there, layout, view) for view in layout.views):
        return None
    kept = selected(layout, there.per_cache, dict.fromkeys(layout.views, there))
    return kept if Records(manifest, kept).content_digest() == manifest.digest else None


def has_view(receipts: ReceiptsByView, layout: Layout, view: int) -> bool:
    """Whether there is a receipt of each block of a view."""
    if view in receipts.entries:
        return True
    return view in receipts.views and all(block.name in receipts.of_view(view) for block in view_blocks(layout, view))
