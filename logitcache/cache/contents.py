"""Content digests of samples that are taken while the teacher sees the samples, for a cache that is still open.

Until the last digest is there, the dataset's fingerprint and so the cache's id are not known. The manifest of the open
cache has `Manifest.contents_pending` and a provisional id (docs/design/0014-one-pass.md).
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np

from logitcache.cache.manifest import SAMPLE_CONTENTS, Identity, Manifest, PerCacheSpec
from logitcache.cache.objects import ObjectReader
from logitcache.cache.per_cache import stored_samples
from logitcache.cache.records import Records
from logitcache.cache.stored_records import collect_receipts
from logitcache.data.rows import RowMap
from logitcache.data.samples import DIGEST_BYTES, SampleTable, SeenContents
from logitcache.errors import IncompleteCache, SampleMismatch, UsageError
from logitcache.storage import Storage

FOLDER = "receipts/contents"
_NUMBER = re.compile(r"receipts/(contents|v[0-9]+)/b([0-9]+)[.](?:bin|json)")
CHECKSUM_BYTES = 32


class PendingContents:
    """The digests of an open cache: in memory as they are taken, and stored with the first block of their samples.

    One object has the digests of the samples of one block number, in any view, and their SHA-256. It is stored before
    the block's receipt.

    Args:
        storage: the cache.
        rows: which samples belong to which block.
        num_views: of the cache.
        seen: takes the digests.
    """

    def __init__(self, storage: Storage, rows: RowMap, num_views: int, seen: SeenContents) -> None:
        self._storage = storage
        self._num_views = num_views
        self._rows = rows
        self.seen = seen
        self._stored: set[int] = set()

    def resume(self) -> None:
        """Read the stored digests; samples are compared with them when they are loaded. Call it under the lock.

        If digests were lost, one of the blocks that have these samples is computed again: it loses its receipt, if no
        such block is missing anyway.
        """
        receipts: Counter[int] = Counter()
        first: dict[int, str] = {}
        numbers = []
        for key in self._storage.list_keys("receipts"):
            found = _NUMBER.fullmatch(key)
            if found is None or int(found[2]) >= self._rows.blocks_per_view:
                continue
            number = int(found[2])
            if found[1] == "contents":
                numbers.append(number)
            else:
                receipts[number] += 1
                first[number] = min(key, first.get(number, key))
        for number, digests in self._read_all(numbers):
            if digests is not None:
                self.seen.add(self._rows.covered_samples(number), digests)
                self._stored.add(number)
        for number, count in receipts.items():
            if number not in self._stored and count == self._num_views:
                self._storage.delete(first[number])

    def store(self, number: int) -> None:
        """Store the digests of a block's samples, unless they are stored. Call it under the lock.

        Raises:
            UsageError: a sample's digest was not taken.
            SampleMismatch: another writer has stored other digests; names the sample.
        """
        if number in self._stored:
            return
        samples = self._rows.covered_samples(number)
        digests = self.seen.of(samples)
        if digests is None:
            raise UsageError(
                f"the digests of samples {samples.start} to {samples.stop - 1} were not taken, because these samples "
                "were not loaded by a ViewDataset of this plan; pass create(samples=sample_table(dataset, "
                "contents=True)), or load them with it"
            )
        there = self._read(number)
        if there is None:
            data = digests.tobytes()
            self._storage.put(contents_key(number), data + hashlib.sha256(data).digest())
        else:
            self._compare(samples, there, digests)
        self._stored.add(number)

    def compare(self, contents: np.ndarray) -> None:
        """Compare the digests that were taken here with those of the sealed cache.

        Raises:
            SampleMismatch: they differ; names the sample.
        """
        for number in range(self._rows.blocks_per_view):
            samples = self._rows.covered_samples(number)
            digests = self.seen.of(samples)
            if digests is not None:
                self._compare(samples, contents[samples.start : samples.stop], digests)

    def _compare(self, samples: range, there: np.ndarray, digests: np.ndarray) -> None:
        differing = np.flatnonzero((there != digests).any(axis=1))
        if len(differing):
            raise SampleMismatch(
                f"sample {samples[differing[0]]} has another content here than where another process of this build "
                f"loaded it ({len(differing)} samples differ).\nGive all processes the same data, and build the cache "
                "again at another path."
            )

    def table(self) -> np.ndarray:
        """The digests of all samples, uint8 (N, 16), as stored by all writers.

        Raises:
            IncompleteCache: some are missing or damaged.
        """
        contents = np.empty((self._rows.num_samples, DIGEST_BYTES), dtype=np.uint8)
        for number, digests in self._read_all(range(self._rows.blocks_per_view)):
            samples = self._rows.covered_samples(number)
            if digests is None:
                raise IncompleteCache(
                    f"{self._storage.url}: the digests of samples {samples.start} to {samples.stop - 1} are missing; "
                    "run `logitcache cache-teacher` again, which computes one of their blocks again"
                )
            contents[samples.start : samples.stop] = digests
        return contents

    def _read_all(self, numbers: range | list[int]) -> Iterator[tuple[int, np.ndarray | None]]:
        with ThreadPoolExecutor(self._storage.concurrency) as threads:
            yield from zip(numbers, threads.map(self._read, numbers), strict=True)

    def _read(self, number: int) -> np.ndarray | None:
        """The stored digests of a block's samples, uint8 (samples, 16); None if they are missing or damaged."""
        length = len(self._rows.covered_samples(number)) * DIGEST_BYTES
        data = self._storage.get(contents_key(number), limit=length + CHECKSUM_BYTES)
        if data is None or hashlib.sha256(data[:length]).digest() != data[length:]:
            return None
        return np.frombuffer(data[:length], dtype=np.uint8).reshape(-1, DIGEST_BYTES)


def contents_key(number: int) -> str:
    """Key of the digests of the samples of one block number, while the cache is open."""
    return f"{FOLDER}/b{number:05d}.bin"


def settled_samples(storage: Storage, manifest: Manifest, pending: Identity) -> SampleTable | None:
    """The sample table of a cache that was opened with a pending identity, and sealed since; None if it is another one.

    Args:
        storage: where the cache is.
        manifest: that is stored there, without pending contents.
        pending: the identity of this build.
    """
    if manifest.contents_pending or manifest.identity.differences(
        pending.model_copy(update={"dataset": manifest.identity.dataset})
    ):
        return None
    samples = stored_samples(Records(manifest, collect_receipts(storage, manifest)), ObjectReader(storage))
    same = samples is not None and replace(samples, contents=None).pending_fingerprint() == pending.dataset
    return samples if same else None


def settled_manifest(manifest: Manifest, samples: SampleTable) -> Manifest:
    """The manifest of an open cache with the dataset's fingerprint, once all contents are known."""
    identity = manifest.identity.model_copy(update={"dataset": samples.fingerprint()})
    spec = PerCacheSpec(dtype="uint8", shape=[samples.num_samples, DIGEST_BYTES])
    layout = manifest.layout.model_copy(update={"fixed": manifest.layout.fixed | {SAMPLE_CONTENTS: spec}})
    return manifest.model_copy(update={"id": identity.cache_id, "identity": identity, "layout": layout})
