"""Receipts by name: of a small cache all in memory, of a large one read view by view when they are needed."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress

from logitcache.cache.layout import PER_CACHE, Block, num_blocks
from logitcache.cache.manifest import (
    LOGITS,
    Contents,
    Layout,
    Manifest,
    Receipt,
    ReceiptIndex,
    Sha256,
    StoredObject,
    ViewEntry,
    output_of,
)
from logitcache.digest import canonical_json, sha256_hex

GATHERED_RECEIPTS = 4096
"""The most receipts that sealing gathers in `receipts.json`. Of more, each view's receipts become one object, which is
read when the view is; to read this many takes a few tenths of a second."""
KEPT_VIEWS, KEPT_RECEIPTS = 2, 2**13
"""The receipts of the most recently read views stay in memory: of two views, and of more up to this number (40 MB)."""


def is_large(layout: Layout) -> bool:
    """Whether a cache has too many receipts to keep them in one file and in memory."""
    return 1 + num_blocks(layout) > GATHERED_RECEIPTS


def splits_receipts(manifest: Manifest) -> bool:
    """Whether sealing stores the receipts by view. The digest of format 1 needs those of all views at once."""
    return manifest.identity.format_version > 1 and is_large(manifest.layout)


class ReceiptsByView(Mapping[str, Receipt]):
    """Receipts by name that are read view by view, on first use; only those of a few views stay in memory.

    Args:
        per_cache: the receipt of the per-cache arrays.
        views: the views that may have receipts.
        read: the receipts of one view, by name.
        entries: of the index, by view, where it is known.
    """

    def __init__(
        self,
        per_cache: Receipt | None,
        views: Iterable[int],
        read: Callable[[int], Mapping[str, Receipt]],
        *,
        entries: Mapping[int, ViewEntry] | None = None,
    ) -> None:
        self.per_cache = per_cache
        numbers = sorted(views)
        whole = range(numbers[0], numbers[-1] + 1) if numbers else range(0)
        self.views: Sequence[int] = whole if len(whole) == len(numbers) else numbers
        self.entries = {} if entries is None else entries
        self._read = read
        self._kept: OrderedDict[int, Mapping[str, Receipt]] = OrderedDict()

    @property
    def is_indexed(self) -> bool:
        """Whether there is an entry for each view."""
        return bool(self.entries) and len(self.entries) == len(self.views)

    def of_view(self, view: int) -> Mapping[str, Receipt]:
        """The receipts of one view, by name.

        Raises:
            CorruptCache: they are damaged.
            StorageError: they can't be read.
        """
        found = self._kept.get(view)
        if found is None:
            found = self._kept[view] = self._read(view)
            with suppress(KeyError):  # several threads may read
                while len(self._kept) > KEPT_VIEWS and sum(map(len, self._kept.values())) > KEPT_RECEIPTS:
                    self._kept.popitem(last=False)
        return found

    def __getitem__(self, name: str) -> Receipt:
        if name == PER_CACHE and self.per_cache is not None:
            return self.per_cache
        try:
            view = Block.from_name(name).view
        except ValueError:
            raise KeyError(name) from None
        if view not in self.views:
            raise KeyError(name)
        return self.of_view(view)[name]

    def __eq__(self, other: object) -> bool:
        """Compares the entries of two indexes, which state everything; otherwise all receipts."""
        if isinstance(other, ReceiptsByView) and self.is_indexed and other.is_indexed:
            return (self.per_cache, self.entries) == (other.per_cache, other.entries)
        return super().__eq__(other)

    __hash__ = None  # type: ignore[assignment]

    def __iter__(self) -> Iterator[str]:
        if self.per_cache is not None:
            yield PER_CACHE
        for view in self.views:
            yield from self.of_view(view)

    def __len__(self) -> int:
        return (self.per_cache is not None) + sum(len(self.of_view(view)) for view in self.views)


def by_view(receipts: Mapping[str, Receipt]) -> ReceiptsByView:
    """The same receipts, grouped by view; those in memory stay there."""
    if isinstance(receipts, ReceiptsByView):
        return receipts
    grouped: dict[int, dict[int, str]] = {}
    for name in receipts:
        if name != PER_CACHE:
            block = Block.from_name(name)
            grouped.setdefault(block.view, {})[block.number] = name

    def of_view(view: int) -> dict[str, Receipt]:
        names = grouped[view]
        return {names[number]: receipts[names[number]] for number in sorted(names)}

    return ReceiptsByView(receipts.get(PER_CACHE), grouped, of_view)


def selected(layout: Layout, per_cache: Receipt, sources: Mapping[int, ReceiptsByView]) -> Mapping[str, Receipt]:
    """The receipts of a layout, each view's from one source.

    Args:
        layout: of the result.
        per_cache: the receipt of the per-cache arrays.
        sources: the receipts of one or more caches, by view.
    """
    entries = {view: source.entries[view] for view, source in sources.items() if view in source.entries}
    receipts = ReceiptsByView(per_cache, layout.views, lambda view: sources[view].of_view(view), entries=entries)
    return receipts if is_large(layout) else dict(receipts)


def view_digest(receipts: Mapping[str, Receipt]) -> Sha256:
    """The digest of a view: SHA-256 over the values of each array in each of its blocks, in order."""
    return lines_digest(
        f"{Block.from_name(name).number} {line}" for name, receipt in receipts.items() for line in value_lines(receipt)
    )


def value_lines(receipt: Receipt) -> list[str]:
    """A line with the hash of its values for each array of a receipt."""
    return [f"{array} {stored.values_sha256}" for array, stored in sorted(receipt.objects.items())]


def lines_digest(lines: Iterable[str]) -> Sha256:
    """SHA-256 of lines that each end with a newline."""
    return sha256_hex("".join(f"{line}\n" for line in lines).encode())


def dump_receipts(receipts: Mapping[str, Receipt]) -> bytes:
    """The bytes of an object with receipts by name."""
    return canonical_json({name: receipt.model_dump() for name, receipt in receipts.items()})


def dump_index(per_cache: Receipt, entries: Mapping[str, ViewEntry]) -> bytes:
    """The bytes of a `receipts.json` that is an index; entries by the name of the view."""
    return canonical_json(ReceiptIndex(fixed=per_cache, views=dict(entries)).model_dump())


def view_entry(receipts: Mapping[str, Receipt], gathered: bytes | memoryview) -> ViewEntry:
    """The entry of a view in the index.

    Args:
        receipts: of the view, by name, in order.
        gathered: the bytes of the object that holds them.
    """
    measured = [receipt for receipt in receipts.values() if receipt.kl_mean is not None]
    rows = sum(receipt.rows for receipt in measured)
    output_bytes: dict[str, int] = {}
    for receipt in receipts.values():
        for array, stored in receipt.objects.items():
            output_bytes[output_of(array)] = output_bytes.get(output_of(array), 0) + stored.bytes
    return ViewEntry(
        object=StoredObject(bytes=len(gathered), sha256=sha256_hex(gathered), values_sha256=view_digest(receipts)),
        rows=sum(receipt.rows for receipt in receipts.values()),
        output_bytes=output_bytes,
        measured_rows=rows,
        measured_blocks=sum(receipt.kl_max is not None for receipt in receipts.values()),
        kl_mean=_mean(sum(receipt.rows * (receipt.kl_mean or 0.0) for receipt in measured), rows),
        kl_max=max((receipt.kl_max for receipt in receipts.values() if receipt.kl_max is not None), default=None),
        kl_at=mean_kl_at(receipts.values()),
    )


def _mean(total: float, count: int) -> float | None:
    """None of no rows, or if untrusted receipts add up to infinity."""
    return total / count if count and math.isfinite(total) else None


def mean_kl_at(records: Iterable[Receipt | ViewEntry]) -> dict[str, float]:
    """The divergences at higher temperatures, weighted by rows, over the records that state them."""
    sums: dict[str, tuple[float, int]] = {}
    for record in records:
        for temperature, nats in record.kl_at.items():
            total, rows = sums.get(temperature, (0.0, 0))
            sums[temperature] = total + record.rows * nats, rows + record.rows
    return {temperature: total / rows for temperature, (total, rows) in sums.items() if rows}


def contents_of(per_cache: Receipt | None, entries: Iterable[ViewEntry]) -> Contents:
    """The sums over a cache, from the entries of its views."""
    entries = list(entries)
    output_bytes: dict[str, int] = {}
    for entry in entries:
        for output, number in entry.output_bytes.items():
            output_bytes[output] = output_bytes.get(output, 0) + number
    measured = sum(entry.measured_rows for entry in entries)
    kl = sum(entry.measured_rows * (entry.kl_mean or 0.0) for entry in entries)
    fixed = sum(stored.bytes for stored in per_cache.objects.values()) if per_cache is not None else 0
    label_bytes = sum(output_bytes.values())
    return Contents(
        bytes=fixed + label_bytes,
        label_bytes=label_bytes,
        rows=sum(entry.rows for entry in entries),
        kl_mean=_mean(kl, measured),
        kl_at=mean_kl_at(entries),
        output_bytes=output_bytes if output_bytes.keys() - {LOGITS} else {},
    )
