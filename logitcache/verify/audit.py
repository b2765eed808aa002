"""Is everything there, and is it what was written?"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from logitcache.arrays import ArraySpec
from logitcache.cache.card import CARD
from logitcache.cache.committed import (
    fitted_encoding,
    num_rows,
    pinned_receipts_key,
    stored_manifest,
    stored_samples,
)
from logitcache.cache.digests import content_digest
from logitcache.cache.layout import (
    FIXED,
    FIXED_RECEIPT_KEY,
    GROUP,
    SAMPLE_ARRAYS,
    Block,
    all_blocks,
    block_key,
    decode_object,
    fixed_array_key,
    group_metadata,
    is_block,
)
from logitcache.cache.manifest import (
    LOGITS,
    MANIFEST,
    MAX_RECEIPT_BYTES,
    RECEIPTS,
    Layout,
    Manifest,
    Receipt,
    StoredObject,
    output_of,
    read_receipt,
    read_receipts,
    receipts_limit,
)
from logitcache.cache.outputs import outputs_of
from logitcache.cache.packages import require_packages
from logitcache.data.samples import SampleTable
from logitcache.digest import array_digest, sha256_hex
from logitcache.encodings import ENCODINGS, encoding_from_config
from logitcache.errors import CorruptCache
from logitcache.progress import track
from logitcache.storage import Storage, open_storage

MAX_MISSING = 2**16
"""Receipts that are looked for in vain before the search ends: a stranger's manifest may claim millions."""


@dataclass(frozen=True)
class Problem:
    """Something that is not as it should be."""

    block: str
    """Such as "v00003/b00012", "fixed" for the sample table, "" for the cache as a whole."""
    path: str
    kind: str
    """"missing", "wrong size", "wrong bytes", "wrong values", "wrong digest", "damaged", "not finite", "stray" or
    "differs"."""


def verify(location: str, *, deep: bool = False) -> list[Problem]:
    """Hold a cache to its receipts: what is missing, of another size, or not accounted for.

    Args:
        location: the cache.
        deep: also read every byte, compare its SHA-256, decode it, compare the SHA-256 of its values, and look for
            labels that are NaN or infinite, and for a sample table or fitted arrays that make no sense.

    Returns:
        The problems; of blocks without a receipt the first 65 536.

    Raises:
        NotACache: no cache there.
        CorruptCache: a manifest that can't be read.
        MissingPackage: with `deep`, the encoding comes from a package that is not installed.
    """
    storage = open_storage(location)
    manifest = stored_manifest(storage)
    if deep:
        require_packages(manifest, ENCODINGS, url=storage.url)
    specs = manifest.layout.arrays
    fixed = manifest.layout.fixed
    problems: list[Problem] = []
    receipts = _all_receipts(storage, manifest, problems)
    known = {MANIFEST, RECEIPTS, CARD}
    checks = []
    for name, receipt in receipts.items():
        if receipt.rows != num_rows(manifest.layout, name):
            problems.append(Problem(name, RECEIPTS, "wrong rows"))
        known |= {f"{GROUP}/{array}/zarr.json" for array in receipt.objects}
        for array, stored in receipt.objects.items():
            spec = specs.get(array)
            if array not in (fixed if name == FIXED else specs):
                problems.append(Problem(name, array, "damaged"))
                continue
            path = (
                fixed_array_key(array, fixed[array]) if spec is None else block_key(array, spec, Block.from_name(name))
            )
            known.add(path)
            checks.append((name, array, spec, path, stored))

    outputs = outputs_of(manifest.identity) if deep else {}
    encodings = {LOGITS: encoding_from_config(manifest.identity.encoding)} if deep else {}
    encodings |= {name: output.encoding for name, output in outputs.items()}
    num_values = {LOGITS: manifest.layout.num_classes} | {name: output.num_values for name, output in outputs.items()}
    once: dict[str, np.ndarray] = {}

    def check(name: str, array: str, spec: ArraySpec | None, path: str, stored: StoredObject) -> Problem | None:
        kind = _what_is_wrong(storage, path, stored, sizes)
        if kind is None and deep:
            found = _values_inside(storage, manifest.layout, name, array, path, stored)
            if isinstance(found, str):
                kind = found
            elif spec is None:
                once[array] = found
            elif array.endswith("ids") and int(found.max()) >= num_values[output_of(array)]:
                kind = "damaged"
            elif not encodings[output_of(array)].accepts(array.rpartition("_")[2], torch.from_numpy(found)):
                kind = "not finite"
        return None if kind is None else Problem(name, path, kind)

    # Listed once, where that can be done: asking a store for each size would take a request each.
    sizes = dict(storage.sizes()) if storage.can_list else None
    with ThreadPoolExecutor(storage.concurrency) as threads, track("verifying", len(checks), unit="objects") as meter:
        for problem in threads.map(check, *zip(*checks, strict=True)) if checks else ():
            problems += [] if problem is None else [problem]
            meter.advance()
    if once.keys() == fixed.keys():
        problems += [Problem(FIXED, path, "damaged") for path in _nonsense(manifest, once)]
    for path, data in group_metadata(manifest.layout).items():
        known.add(path)
        found = storage.get(path, limit=len(data))
        if found != data:
            problems.append(Problem("", path, "missing" if found is None else "wrong bytes"))
    strays = [path for path in sizes or () if path not in known and not path.startswith("receipts/")]
    problems += [Problem("", path, "stray") for path in strays]
    if manifest.state == "sealed" and content_digest(manifest, receipts) != manifest.digest:
        problems.append(Problem("", MANIFEST, "wrong digest"))
    return problems


def _all_receipts(storage: Storage, manifest: Manifest, problems: list[Problem]) -> dict[str, Receipt]:
    receipts: dict[str, Receipt] = {}
    limit = receipts_limit(manifest.layout)
    gathered = storage.get(RECEIPTS, limit=limit)
    if gathered is not None:
        if manifest.state == "sealed" and sha256_hex(gathered) != manifest.receipts:
            # A copy that was cut off while it was given more views has them under another name, whole.
            pinned = storage.get(pinned_receipts_key(str(manifest.receipts)), limit=limit)
            gathered = gathered if pinned is None else pinned
        if manifest.state == "sealed" and sha256_hex(gathered) != manifest.receipts:
            problems.append(Problem("", RECEIPTS, "wrong bytes"))
        try:
            receipts = read_receipts(gathered, url=storage.url)
        except CorruptCache:
            problems.append(Problem("", RECEIPTS, "damaged"))
    elif manifest.state == "sealed":
        problems.append(Problem("", RECEIPTS, "missing"))
    layout = manifest.layout
    wanted = itertools.chain(
        [(FIXED, FIXED_RECEIPT_KEY)], ((block.name, block.receipt_key) for block in all_blocks(layout))
    )
    missing = 0
    for name, key in wanted:
        if name in receipts:
            continue
        data = storage.get(key, limit=MAX_RECEIPT_BYTES)
        if data is None:
            problems.append(Problem(name, key, "missing"))
            missing += 1
            if missing == MAX_MISSING:
                break
            continue
        try:
            receipts[name] = read_receipt(data, key=key)
        except CorruptCache:
            problems.append(Problem(name, key, "damaged"))
    return {name: receipt for name, receipt in receipts.items() if name == FIXED or is_block(layout, name)}


def _what_is_wrong(storage: Storage, path: str, stored: StoredObject, sizes: Mapping[str, int] | None) -> str | None:
    found = storage.size(path) if sizes is None else sizes.get(path)
    if found is None:
        return "missing"
    return None if found == stored.bytes else "wrong size"


def _nonsense(manifest: Manifest, once: Mapping[str, np.ndarray]) -> Iterator[str]:
    """The path of an array in each group of those that are stored once that was written so, and makes no sense."""
    fixed = manifest.layout.fixed
    table = {name: once[name] for name in SAMPLE_ARRAYS if name in fixed}
    fitted = {name: values for name, values in once.items() if name not in table}
    for arrays, read in ((table, _read_table), (fitted, fitted_encoding)):
        if arrays:
            try:
                read(manifest, arrays, url="")
            except CorruptCache:
                array = next(iter(arrays))
                yield fixed_array_key(array, fixed[array])


def _read_table(manifest: Manifest, arrays: Mapping[str, np.ndarray], *, url: str) -> SampleTable:
    return stored_samples(arrays, manifest.layout.num_samples, url=url)


def _values_inside(
    storage: Storage,
    layout: Layout,
    name: str,
    array: str,
    path: str,
    stored: StoredObject,
) -> np.ndarray | str:
    """The values of an object, or what is wrong with it."""
    data = storage.get(path, limit=stored.bytes) or b""
    if sha256_hex(data) != stored.sha256:
        return "wrong bytes"
    try:
        values = decode_object(layout, name, array, data)
    except (ValueError, RuntimeError):
        return "damaged"
    return values if array_digest(values) == stored.values_sha256 else "wrong values"
