"""Reads objects of a cache and checks their hashes; remote ones are kept in a local directory."""

from __future__ import annotations

import contextlib
import os
import threading
import time
import warnings
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from logitcache.cache.manifest import StoredObject
from logitcache.digest import sha256_hex
from logitcache.errors import CorruptCache, StorageError
from logitcache.storage import Arrived, Storage
from logitcache.storage.blockdir import BlockDirectory

ATTEMPTS = 3
"""Requests for a remote object whose hash is wrong, such as an older version or the error page of a proxy."""
PAUSE_SECONDS = 0.2
AHEAD = 8
"""Blocks that are fetched ahead at once; the other connections are free for blocks that are needed now."""

Wanted = Mapping[str, StoredObject]
"""Objects of one receipt, by key."""


def read_object(
    storage: Storage, key: str, stored: StoredObject, *, why: str = "", arrived: Arrived | None = None
) -> memoryview:
    """One object, with its size and SHA-256 checked; a remote object that differs is requested again.

    Args:
        storage: where it is.
        key: its key.
        stored: its entry in the receipt.
        why: which receipt this is, for messages, such as "block v00000/b00003".
        arrived: called with the number of bytes that have arrived.

    Raises:
        CorruptCache: the object is missing, or differs from its receipt.
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
        raise CorruptCache(f"{storage.url}: {key} is missing, although the receipt of {why or 'the cache'} lists it")
    raise CorruptCache(
        f"{storage.url}: {key} differs from its receipt: its SHA-256 is not the one of {why or 'the cache'}.\n"
        "`logitcache verify --deep` lists every damaged block, and `logitcache repair` restores them."
    )


class ObjectReader:
    """Reads the objects of a cache, remote ones in parallel and only once.

    Args:
        storage: where the cache is.
        nearby: local directory for remote objects; None keeps none.
    """

    def __init__(self, storage: Storage, nearby: BlockDirectory | None = None) -> None:
        self.storage = storage
        self.nearby = nearby
        self._keeps = nearby is not None
        self._start()

    def _start(self) -> None:
        """The state of a new process; threads start when they are needed."""
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
        """The objects of several receipts, each with its description for messages."""
        if not self.storage.is_remote:
            return [self._read(wanted, why) for wanted, why in groups]
        begun = [self._begin(wanted, why) for wanted, why in groups]
        try:
            return [reading.result() for reading in begun]
        except BaseException:
            for reading in begun:
                reading.cancel()
            raise

    def read_ahead(self, groups: Iterable[tuple[Wanted, str]]) -> None:
        """Fetch objects into the local directory in the background. Errors are ignored: reading raises them again."""
        if self.nearby is None or not self._keeps:
            return

        def fetch() -> None:
            running: deque[Future[list[memoryview]]] = deque()
            with contextlib.suppress(Exception):
                for wanted, why in groups:
                    if self.nearby is None or not self._keeps:
                        return
                    if entry_name(wanted) not in self.nearby:
                        running.append(self._begin(wanted, why))
                    if len(running) >= AHEAD:
                        running.popleft().result()
                for reading in running:
                    reading.result()

        # A daemon thread: the process exits without waiting for it.
        threading.Thread(target=fetch, name="logitcache-ahead", daemon=True).start()

    def _begin(self, wanted: Wanted, why: str) -> Future[list[memoryview]]:
        """Start reading, or join a read of the same objects."""
        name = entry_name(wanted)
        if self._process != os.getpid():
            self._start()  # after a fork: the parent's threads don't exist here, and its lock may be held
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
        """Store objects in the local directory; after the first failure, warn and only read from it."""
        if self.nearby is not None and self._keeps:
            try:
                self.nearby.put(name, b"".join(objects))
            except StorageError as error:
                self._keeps = False
                warnings.warn(str(error), RuntimeWarning, stacklevel=2)


def entry_name(wanted: Wanted) -> str:
    """Name of the objects' entry in the block directory: the SHA-256 of their hashes."""
    return sha256_hex("\n".join(stored.sha256 for stored in wanted.values()).encode())


def _total_bytes(wanted: Wanted) -> int:
    return sum(stored.bytes for stored in wanted.values())


def _split(data: bytes | None, wanted: Wanted) -> list[memoryview] | None:
    """The objects of an entry; None where it is incomplete or damaged."""
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
