"""Is everything there, and is it what was written?"""

from __future__ import annotations

from dataclasses import dataclass

from logitcache.digest import sha256_hex
from logitcache.encodings import encoding_from_config
from logitcache.errors import CorruptCache
from logitcache.layout import (
    FIXED,
    FIXED_RECEIPT_KEY,
    GROUP,
    Block,
    all_blocks,
    block_key,
    group_metadata,
)
from logitcache.manifest import (
    MANIFEST,
    RECEIPTS,
    Manifest,
    Receipt,
    content_digest,
    read_manifest,
    read_receipt,
    read_receipts,
)
from logitcache.progress import track
from logitcache.storage import LocalStorage, open_storage


@dataclass(frozen=True)
class Problem:
    """Something that is not as it should be."""

    block: str
    """Such as "v00003/b00012", "fixed" for the sample table, "" for the cache as a whole."""
    path: str
    kind: str
    """"missing", "wrong size", "wrong bytes", "damaged", "stray" or "differs"."""


def verify(location: str, *, deep: bool = False) -> list[Problem]:
    """Hold a cache to its receipts: what is missing, of another size, or not accounted for.

    Args:
        location: the cache.
        deep: also read every byte and compare its SHA-256.

    Raises:
        NotACache: no cache there.
        CorruptCache: a manifest that can't be read.
    """
    storage = open_storage(location)
    manifest = read_manifest(storage.get(MANIFEST), url=storage.url)
    problems: list[Problem] = []
    receipts = _all_receipts(storage, manifest, problems)
    expected = _expected_objects(storage, manifest, receipts)
    with track("verifying", len(expected), unit="objects") as meter:
        for path, (block, size, sha256) in expected.items():
            problems += _check_object(storage, path, block, size, sha256, deep=deep)
            meter.advance()
    known = {MANIFEST, RECEIPTS, "README.md", *expected, *_metadata(storage, manifest)}
    for path in storage.list_keys():
        if path not in known and not path.startswith("receipts/"):
            problems.append(Problem("", path, "stray"))
    for path, data in _metadata(storage, manifest).items():
        if data is not None and storage.get(path) != data:
            problems.append(Problem("", path, "wrong bytes" if storage.size(path) is not None else "missing"))
    if manifest.state == "sealed" and content_digest(list(receipts.values())) != manifest.digest:
        problems.append(Problem("", MANIFEST, "wrong digest"))
    return problems


def _all_receipts(storage: LocalStorage, manifest: Manifest, problems: list[Problem]) -> dict[str, Receipt]:
    receipts: dict[str, Receipt] = {}
    gathered = storage.get(RECEIPTS)
    if gathered is not None:
        try:
            receipts = read_receipts(gathered, url=storage.url)
        except CorruptCache:
            problems.append(Problem("", RECEIPTS, "damaged"))
    elif manifest.state == "sealed":
        problems.append(Problem("", RECEIPTS, "missing"))
    wanted = {FIXED: FIXED_RECEIPT_KEY} | {block.name: block.receipt_key for block in all_blocks(manifest.layout)}
    for name, key in wanted.items():
        data = storage.get(key) if name not in receipts else None
        if data is not None:
            try:
                receipts[name] = read_receipt(data, key=key)
            except CorruptCache:
                problems.append(Problem(name, key, "damaged"))
        elif name not in receipts:
            problems.append(Problem(name, key, "missing"))
    return {name: receipt for name, receipt in receipts.items() if name in wanted}


def _expected_objects(
    storage: LocalStorage, manifest: Manifest, receipts: dict[str, Receipt]
) -> dict[str, tuple[str, int, str]]:
    """Path -> (block, bytes, SHA-256) of every object that has a receipt."""
    specs = encoding_from_config(manifest.identity.encoding).arrays(manifest.layout.num_classes)
    expected = {}
    for name, receipt in receipts.items():
        for array, stored in receipt.objects.items():
            if name == FIXED:
                rank = 2 if array == "sample_contents" else 1
                path = "/".join([GROUP, array, "c", *["0"] * rank])
            else:
                path = block_key(array, specs[array], Block.from_name(name))
            expected[path] = (name, stored.bytes, stored.sha256)
    return expected


def _metadata(storage: LocalStorage, manifest: Manifest) -> dict[str, bytes | None]:
    """The `zarr.json` of every array: what it must say, or None where only its presence is known."""
    specs = encoding_from_config(manifest.identity.encoding).arrays(manifest.layout.num_classes)
    metadata: dict[str, bytes | None] = dict(group_metadata(specs, manifest.layout))
    return metadata | {f"{GROUP}/sample_{part}/zarr.json": None for part in ("keys", "targets", "contents")}


def _check_object(storage: LocalStorage, path: str, block: str, size: int, sha256: str, *, deep: bool) -> list[Problem]:
    found = storage.size(path)
    if found is None:
        return [Problem(block, path, "missing")]
    if found != size:
        return [Problem(block, path, "wrong size")]
    if deep and sha256_hex(storage.get(path) or b"") != sha256:
        return [Problem(block, path, "wrong bytes")]
    return []
