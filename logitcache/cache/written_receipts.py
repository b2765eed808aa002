"""The receipts of a cache that is being written."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping

import numpy as np

from logitcache.cache.layout import (
    PER_CACHE,
    Block,
    is_receipt_name,
    receipt_names,
    view_blocks,
)
from logitcache.cache.manifest import (
    Manifest,
    Receipt,
)
from logitcache.cache.receipts import ReceiptsByView, is_large
from logitcache.cache.stored_records import (
    collect_receipts,
    in_place,
    read_single_receipts,
    stored_manifest,
)
from logitcache.storage import Storage

KEPT_RECEIPTS = 512
"""Receipts of a large cache that a writer keeps in memory."""


class WrittenReceipts:
    """The receipts of a cache that is being written: those in the storage, and those of this writer.

    Of a large cache only the names of all are kept, as one bit each, and the newest receipts; others are read again.

    Args:
        storage: the cache.
        manifest: its manifest.
        stored: the receipts in the storage, if they were read already; there may be some of other views.
    """

    def __init__(self, storage: Storage, manifest: Manifest, stored: Mapping[str, Receipt] | None = None) -> None:
        self._storage = storage
        self._manifest = manifest
        self._layout = manifest.layout
        self._added: OrderedDict[str, Receipt] = OrderedDict()
        self._settled: Receipt | None = None
        self.stored: Mapping[str, Receipt] = {}
        """As they were read from the storage."""
        self._start(collect_receipts(storage, manifest) if stored is None else stored)

    def settle(self, manifest: Manifest, per_cache: Receipt) -> None:
        """Take the final manifest, and the receipt of the per-cache arrays that only `receipts.json` will have."""
        self._manifest, self._layout, self._settled = manifest, manifest.layout, per_cache
        self._added.pop(PER_CACHE, None)
        self.stored = self._with_settled(self.stored)

    def _with_settled(self, stored: Mapping[str, Receipt]) -> Mapping[str, Receipt]:
        if self._settled is None:
            return stored
        if isinstance(stored, ReceiptsByView):
            return ReceiptsByView(self._settled, stored.views, stored.of_view, entries=stored.entries)
        return {**stored, PER_CACHE: self._settled}

    def _start(self, stored: Mapping[str, Receipt]) -> None:
        self.stored = self._with_settled(stored)
        self._is_there = np.zeros((len(self._layout.views), self._layout.blocks_per_view), dtype=bool)
        if isinstance(stored, ReceiptsByView) and stored.entries:  # of a sealed cache: nothing is read
            self._is_there[[view in stored.entries for view in self._layout.views]] = True
            return
        for name in stored:
            if name != PER_CACHE and is_receipt_name(self._layout, name):
                self._mark(name)

    def _mark(self, name: str) -> None:
        block = Block.from_name(name)
        self._is_there[block.view - self._layout.first_view, block.number] = True

    def __contains__(self, name: str) -> bool:
        if name == PER_CACHE:
            return name in self._added or name in self.stored
        block = Block.from_name(name)
        return bool(self._is_there[block.view - self._layout.first_view, block.number])

    def __bool__(self) -> bool:
        return bool(self._is_there.any()) or PER_CACHE in self

    def __getitem__(self, name: str) -> Receipt:
        for receipts in (self._added, self.stored):
            if name in receipts:
                return receipts[name]
        # Written by this writer, and not kept in memory.
        single = read_single_receipts(self._storage, [name])
        return single[name] if single else collect_receipts(self._storage, stored_manifest(self._storage))[name]

    def missing(self) -> Iterator[Block]:
        """The blocks that have no receipt, view by view."""
        for view, is_there in zip(self._layout.views, self._is_there, strict=True):
            for number in np.flatnonzero(~is_there):
                yield Block(view, int(number))

    def add(self, name: str, receipt: Receipt) -> None:
        """A receipt that is stored now."""
        self._added[name] = receipt
        if name != PER_CACHE:
            self._mark(name)
        if is_large(self._layout) and len(self._added) > KEPT_RECEIPTS:
            self._added.popitem(last=False)

    def clear(self) -> None:
        """There are none any more."""
        self._added.clear()
        self._start({})

    def read_again(self, *, count: bool = False) -> None:
        """Leave out receipts whose objects are gone, and take those that other writers have added.

        Args:
            count: read those of all views, also if none was missing so far.
        """
        known = self.snapshot({})
        self._added.clear()
        if not is_large(self._layout):
            self._start(in_place(self._storage, self._layout, known))
            if next(self.missing(), None) is not None:
                self._start({**self.stored, **collect_receipts(self._storage, self._manifest)})
            return
        found = collect_receipts(self._storage, self._manifest)
        if count or next(self.missing(), None) is not None:
            self._start(found)
        self.stored = self._with_settled(found)

    def complete(self) -> Mapping[str, Receipt]:
        """All receipts of a cache without missing blocks, in order, after `read_again`."""
        if isinstance(self.stored, ReceiptsByView):
            return self.stored
        return {name: self.stored[name] for name in receipt_names(self._layout)}

    def snapshot(self, others: Mapping[str, Receipt]) -> Mapping[str, Receipt]:
        """The receipts now; `others` replace those of the same blocks."""
        if not is_large(self._layout):
            return {**self.stored, **self._added, **others}

        def read(view: int) -> dict[str, Receipt]:
            names = (block.name for block in view_blocks(self._layout, view))
            there = (name for name in names if name in others or name in self)
            return {name: others[name] if name in others else self[name] for name in there}

        per_cache = self._added.get(PER_CACHE) or self.stored.get(PER_CACHE)
        return ReceiptsByView(per_cache, self._layout.views, read)
