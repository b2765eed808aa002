"""The per-cache arrays: sample table, row map, and the arrays that the encoding was fitted to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from logitcache.cache.layout import GROUP, PER_CACHE, ROW_ARRAYS, SAMPLE_ARRAYS, Block
from logitcache.cache.manifest import LOGITS, MANIFEST, ROW_OFFSETS, ROW_POSITIONS, SAMPLE_CONTENTS, Manifest
from logitcache.cache.objects import ObjectReader
from logitcache.cache.outputs import OutputLayout, output_layouts, outputs_of
from logitcache.cache.receipts import ReceiptsByView
from logitcache.cache.records import Records, description
from logitcache.data.rows import OneRowEach, RowMap, RowsOfSequences
from logitcache.data.samples import SampleTable
from logitcache.encodings import Encoding, encoding_from_config
from logitcache.errors import REBUILD, CorruptCache, IncompleteCache, LogitCacheError, UsageError


def read_per_cache_array(records: Records, array: str, objects: ObjectReader) -> np.ndarray:
    """A per-cache array, checked against its receipt.

    Raises:
        IncompleteCache: the per-cache arrays are missing.
        CorruptCache: the array differs from its receipt.
    """
    url = objects.storage.url
    if PER_CACHE not in records.receipts:
        raise IncompleteCache(f"{url}: the per-cache arrays are missing; {REBUILD}")
    [found] = [each for each in records.objects([PER_CACHE]) if each.array == array]
    [data] = objects.read({found.key: found.stored}, why=description(PER_CACHE))
    try:
        return found.values(records.layout, data)
    except ValueError:
        raise CorruptCache(f"{url}: {GROUP}/{array} differs from its receipt; run `logitcache verify --deep`") from None


def stored_encoding(records: Records, objects: ObjectReader, output: str = LOGITS) -> Encoding:
    """The encoding of one of a cache's outputs, fitted.

    Raises:
        IncompleteCache, CorruptCache: as `read_per_cache_array`.
    """
    names = stored_outputs(records.manifest)[output].fixed_names()
    arrays = {name: read_per_cache_array(records, name, objects) for name in names}
    return fitted_encoding(records.manifest, arrays, url=objects.storage.url, output=output)


def stored_outputs(manifest: Manifest) -> dict[str, OutputLayout]:
    """How each output of a cache is stored, by name, with encodings that are not fitted yet."""
    encoding = encoding_from_config(manifest.identity.encoding)
    return output_layouts(encoding, manifest.layout.num_classes, outputs_of(manifest.identity))


def fitted_encoding(
    manifest: Manifest, arrays: Mapping[str, np.ndarray], *, url: str, output: str = LOGITS
) -> Encoding:
    """The encoding of one of a cache's outputs, with the arrays that it was fitted to, by their names in the cache.

    Raises:
        CorruptCache: the arrays are invalid.
    """
    found = stored_outputs(manifest)[output]
    try:
        encoding = found.encoding.with_fitted({array: arrays[name] for name, array in found.fixed_names().items()})
        fitted = replace(found, encoding=encoding)
        if fitted.specs() != fitted.stored(manifest.layout.arrays):
            raise ValueError("the rows of layout.arrays are of another length")
        return encoding
    except (ValueError, TypeError, KeyError, LogitCacheError) as error:
        raise CorruptCache(f"{url}: the fitted arrays of {found.encoding.name} are invalid: {error}") from None


def stored_samples(records: Records, objects: ObjectReader) -> SampleTable | None:
    """The sample table; None where the cache has none.

    Raises:
        IncompleteCache, CorruptCache: as `read_per_cache_array`.
    """
    names = [name for name in SAMPLE_ARRAYS if name in records.layout.fixed]
    if PER_CACHE not in records.receipts or not names:
        return None
    arrays = {name: read_per_cache_array(records, name, objects) for name in names}
    return samples_from_arrays(records.manifest, arrays, url=objects.storage.url)


def samples_from_arrays(manifest: Manifest, arrays: Mapping[str, np.ndarray], *, url: str) -> SampleTable:
    """The sample table from its per-cache arrays.

    Raises:
        CorruptCache: the arrays are no table of as many samples.
    """
    try:
        keys = arrays["sample_keys"].tobytes().decode().split("\n") if "sample_keys" in arrays else None
        contents = None if manifest.contents_pending else arrays[SAMPLE_CONTENTS]
        return SampleTable(manifest.layout.num_samples, keys, arrays["sample_targets"], contents)
    except (KeyError, UnicodeDecodeError, UsageError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else error
        raise CorruptCache(f"{url}: its sample table is invalid: {reason}; get the cache again") from None


def stored_row_map(records: Records, objects: ObjectReader) -> RowMap:
    """Which rows belong to which sample.

    Raises:
        IncompleteCache: as `read_per_cache_array`.
        CorruptCache: the row map is damaged, or contradicts the receipts.
    """
    layout = records.layout
    if layout.sequence_rows is None:
        return OneRowEach(layout.num_samples, layout.rows_per_block)
    arrays = {name: read_per_cache_array(records, name, objects) for name in ROW_ARRAYS if name in layout.fixed}
    row_map = row_map_from_arrays(records.manifest, arrays, url=objects.storage.url)
    # Those that are read by view are compared when their blocks are read.
    for name, receipt in () if isinstance(records.receipts, ReceiptsByView) else records.receipts.items():
        if name != PER_CACHE and receipt.rows != len(row_map.block_rows(Block.from_name(name).number)):
            raise CorruptCache(f"{objects.storage.url}: the receipt of {name} and the row map differ in the rows")
    return row_map


def row_map_from_arrays(manifest: Manifest, arrays: Mapping[str, np.ndarray], *, url: str) -> RowMap:
    """The row map of samples with any number of rows, from its per-cache arrays.

    Raises:
        CorruptCache: the arrays are not those that the manifest describes.
    """
    layout = manifest.layout
    try:
        row_map = RowsOfSequences(arrays[ROW_OFFSETS], layout.rows_per_block, arrays.get(ROW_POSITIONS))
    except (KeyError, UsageError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else error
        raise CorruptCache(f"{url}: its row map is invalid: {reason}; get the cache again") from None
    found = (row_map.fingerprint(), row_map.num_rows, row_map.blocks_per_view)
    expected = (manifest.identity.rows, layout.num_rows, layout.blocks_per_view)
    if found != expected:
        raise CorruptCache(f"{url}: its row map has {found}, {MANIFEST} {expected} (hash, rows, blocks)")
    return row_map
