"""Content digest and pin of a cache: one SHA-256 over what the cache is and over every value at its place."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from logitcache.cache.layout import FIXED, Block
from logitcache.cache.manifest import Manifest, Receipt, Sha256
from logitcache.digest import sha256_hex

HEADER = "logitcache content 2"


def content_digest(manifest: Manifest, receipts: Mapping[str, Receipt]) -> Sha256:
    """The content digest as the cache's format defines it; in format 2 it is the pin.

    Args:
        manifest: id, format and layout are used.
        receipts: by name, of all blocks that the cache holds.
    """
    if manifest.identity.format_version > 1:
        return pin_of(manifest, receipts)
    # Format 1 covers which values there are, not where they are.
    hashes = sorted(stored.values_sha256 for receipt in receipts.values() for stored in receipt.objects.values())
    return sha256_hex("\n".join(hashes).encode())


def pin_of(manifest: Manifest, receipts: Mapping[str, Receipt]) -> Sha256:
    """SHA-256 over the id and over the values of each array in each block; docs/design/0001-format.md has the lines."""
    by_view: dict[int, list[tuple[int, Receipt]]] = {}
    for name, receipt in receipts.items():
        if name != FIXED:
            block = Block.from_name(name)
            by_view.setdefault(block.view, []).append((block.number, receipt))
    layout = manifest.layout
    lines = [
        HEADER,
        f"id {manifest.id}",
        f"num_samples {layout.num_samples}",
        f"rows_per_block {layout.rows_per_block}",
    ]
    if FIXED in receipts:
        lines += (f"fixed {line}" for line in _value_lines(receipts[FIXED]))
    lines += (f"view {view} {view_digest(by_view[view])}" for view in sorted(by_view))
    return _digest_of(lines)


def view_digest(blocks: Iterable[tuple[int, Receipt]]) -> Sha256:
    """SHA-256 over the values of each array in each block of one view; blocks are (number, receipt)."""
    in_order = sorted(blocks, key=lambda numbered: numbered[0])
    return _digest_of(f"{number} {line}" for number, receipt in in_order for line in _value_lines(receipt))


def _value_lines(receipt: Receipt) -> list[str]:
    return [f"{array} {stored.values_sha256}" for array, stored in sorted(receipt.objects.items())]


def _digest_of(lines: Iterable[str]) -> Sha256:
    return sha256_hex("".join(f"{line}\n" for line in lines).encode())
