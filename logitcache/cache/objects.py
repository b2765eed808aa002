"""Objects of a cache, read and held to their hashes: from the storage, or from nearby where they were read before."""

from __future__ import annotations

import contextlib
import os
import threading
import time
import warnings
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from logitcache.cache.manifest import StoredObject
from logitcache.digest import sha256_hex
from logitcache.errors import CorruptCache, StorageError
from logitcache.storage import Arrived, Storage
from logitcache.storage.blockdir import BlockDirectory

ATTEMPTS = 3
"""How often a remote object is asked for that arrives as something else: a proxy's page, an older version."""
PAUSE_SECONDS = 0.2
AHEAD = 8
"""Blocks that are brought at once for later: some of the connections are left to what is read now."""

Wanted = Mapping[str, StoredObject]
"""The objects that one receipt vouches for, by key."""


def read_object(
    storage: Storage, key: str, stored: StoredObject, *, why: str = "", arrived: Arrived | None = None
) -> memoryview:
    """One object, held to its size and SHA-256; a remote one that arrives otherwise is asked for again.

    Args:
        storage: where it is.
        key: which.
        stored: what its receipt says of it.
        why: for the message, who vouches for it, such as "block v00000/b00003".
        arrived: is told how far it is.

    Raises:
        CorruptCache: it is gone, or it is not what was written.
        StorageError: the store can't be reached.
    """
    for attempt in range(ATTEMPTS):
        data = storage.get_view(key, limit=stored.bytes, arrived=arrived)
        if data is not None and len(data) == stored.bytes and sha256_hex(data) == stored.sha256:
            return data
        if not storage.is_remote:
            break
        if attempt + 1 < ATTEMPTS:
            time.sleep(PAUSE_SECONDS * 2**attempt)
    if data is None:
        raise CorruptCache(f"{storage.url}: {key} is gone, though {why or 'the cache'} has a receipt for it")
    raise CorruptCache(
        f"{storage.url}: {key} is not what was written: its SHA-256 differs from the receipt of {why or 'the cache'}.\n"
        "`logitcache verify --deep` lists every block like it, and `logitcache repair` mends them."
    )


class ObjectReader:
    """Reads the objects of a cache, several at once where that is faster, each over the network only once.

    Args:
        storage: where the cache is.
        nearby: where objects that crossed a network are kept; None keeps none.
    """

    def __init__(self, storage: Storage, nearby: BlockDirectory | None = None) -> None:
        self.storage = storage
        self.nearby = nearby
        self._keeps = nearby is not None
        self._start()

    def _start(self) -> None:
        """Without threads, which begin when they are needed."""
        self._process = os.getpid()
        self._threads: ThreadPoolExecutor | None = None
        self._running: dict[str, Future[list[memoryview]]] = {}
        self._lock = threading.Lock()

    def read(self, wanted: Wanted, *, why: str = "") -> list[memoryview]:
        """The objects of one receipt, in its order.

        Raises:
            CorruptCache, StorageError: as `read_object`.
        """
        return self._begin(wanted, why).result() if self.storage.is_remote else self._read(wanted, why)

    def read_all(self, groups: Sequence[tuple[Wanted, str]]) -> list[list[memoryview]]:
        """The objects of several receipts, each with who vouches for it."""
        if not self.storage.is_remote:
            return [self._read(wanted, why) for wanted, why in groups]
        begun = [self._begin(wanted, why) for wanted, why in groups]
        try:
            return [reading.result() for reading in begun]
        except BaseException:
            for reading in begun:
                reading.cancel()
            raise

    def read_ahead(self, groups: Sequence[tuple[Wanted, str]]) -> None:
        """Bring objects nearby in the background, a few at a time; what goes wrong is met when they are read."""
        if self.nearby is None or not self._keeps:
            return

        def bring() -> None:
            coming: deque[Future[list[memoryview]]] = deque()
            with contextlib.suppress(Exception):
                for wanted, why in groups:
                    if self.nearby is None or not self._keeps:
                        return
                    if entry_name(wanted) not in self.nearby:
                        coming.append(self._begin(wanted, why))
                    if len(coming) >= AHEAD:
                        coming.popleft().result()
                for reading in coming:
                    reading.result()

        # A daemon: whoever leaves does not wait for what would be needed next.
        threading.Thread(target=bring, name="logitcache-ahead", daemon=True).start()

    def _begin(self, wanted: Wanted, why: str) -> Future[list[memoryview]]:
        """Start reading, or join whoever is reading the same."""
        name = entry_name(wanted)
        if self._process != os.getpid():
            self._start()  # after a fork: the parent's threads are not here, and the lock may be held for ever
        with self._lock:
            running = self._running.get(name)
            if running is not None and not running.cancelled():
                return running
            if self._threads is None:
                self._threads = ThreadPoolExecutor(self.storage.concurrency, thread_name_prefix="logitcache-reader")
            reading = self._threads.submit(self._read, wanted, why)
            self._running[name] = reading
        reading.add_done_callback(lambda ended: self._end(name, ended))
        return reading

    def _end(self, name: str, ended: Future[list[memoryview]]) -> None:
        if self._running.get(name) is ended:
            del self._running[name]

    def _read(self, wanted: Wanted, why: str) -> list[memoryview]:
        nearby = self.nearby
        name = entry_name(wanted) if nearby is not None else ""
        if nearby is not None:
            found = _split(nearby.get(name, limit=_total_bytes(wanted)), wanted)
            if found is not None:
                return found
            nearby.drop(name)
        objects = [read_object(self.storage, key, stored, why=why) for key, stored in wanted.items()]
        self.keep(name, objects)
        return objects

    def keep(self, name: str, objects: Sequence[bytes | memoryview]) -> None:
        """Keep objects nearby; where that is impossible, say so once and read only what is there already."""
        if self.nearby is not None and self._keeps:
            try:
                self.nearby.put(name, b"".join(objects))
            except StorageError as error:
                self._keeps = False
                warnings.warn(str(error), RuntimeWarning, stacklevel=2)


def entry_name(wanted: Wanted) -> str:
    """What an entry of the block directory is called: the SHA-256 of its objects' hashes."""
    return sha256_hex("\n".join(stored.sha256 for stored in wanted.values()).encode())


def _total_bytes(wanted: Wanted) -> int:
    return sum(stored.bytes for stored in wanted.values())


def _split(data: bytes | None, wanted: Wanted) -> list[memoryview] | None:
    """An entry's objects, or None where it is not whole."""
    if data is None or len(data) != _total_bytes(wanted):
        return None
    objects = []
    start = 0
    for stored in wanted.values():
        piece = memoryview(data)[start : start + stored.bytes]
        if sha256_hex(piece) != stored.sha256:
            return None
        objects.append(piece)
        start += stored.bytes
    return objects
