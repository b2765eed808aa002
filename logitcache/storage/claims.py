"""Claims: which worker computes what, for workers that share nothing but a store and may be killed at any moment.

A claim is a small object, `claims/NAME.00001.json`. Creating it is conditional, so of two workers only one succeeds.
Its owner writes it again at intervals. A worker that has seen the same bytes for `seconds` of its own clock regards the
owner as dead, and takes the claim over by creating the next number. No two clocks are compared, and an owner writes its
own number only: a late renewal can't undo a takeover.

A claim saves work and is not a lock: where a store has no conditional writes, or an owner was not dead but only stopped
for a while, two workers may hold the same claim. What they write must not depend on who writes it.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import TracebackType

from logitcache.errors import StorageError, UsageError
from logitcache.storage.protocol import Storage, Timestamped

CLAIMS = "claims"
"""Folder of the claims in a store. They are no part of a cache, and are removed when it is sealed."""
CLAIM_SECONDS = 120.0
"""After which a claim that is not renewed is taken over; above what NFS clients may cache (60 s by default)."""
RENEWALS = 4
"""Renewals within the time after which a claim expires."""
FIRST_PAUSE_SECONDS = 0.05
MAX_CLAIM_BYTES = 4096


class Claims:
    """The claims of one worker; a context manager, which renews them in a thread and releases them at its end.

    Args:
        storage: where the claims are.
        seconds: without renewal, after which another worker may take a claim over.
        owner: names the worker, for people who look at the claims; unique.
        clock: seconds that never go back.
    """

    def __init__(
        self,
        storage: Storage,
        *,
        seconds: float = CLAIM_SECONDS,
        owner: str | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if not seconds > 0:
            raise UsageError(f"claims expire after {seconds} seconds; expected more than 0")
        self.owner = owner or f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
        self.seconds = seconds
        self._storage = storage
        self._clock = clock
        self._held: dict[str, int] = {}
        self._seen: dict[str, tuple[int, bytes, float]] = {}
        """Claims of others: number and bytes, and when they were first seen like this."""
        self._renewals = 0
        self._pauses = 0
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep_renewing, name="logitcache-claims", daemon=True)

    @property
    def held(self) -> frozenset[str]:
        """Names of the claims that this worker holds."""
        with self._lock:
            return frozenset(self._held)

    def take(self, name: str) -> bool:
        """Claim something that nobody has claimed, or whose claim has expired; returns whether this worker has it."""
        if name in self.held:
            return True
        number, found = self._newest(name)
        if found is not None and not self._has_expired(name, number, found):
            return False
        if not self._storage.create(_key(name, number + 1), self._content()):
            return False
        self._seen.pop(name, None)
        self._pauses = 0
        with self._lock:
            self._held[name] = number + 1
        return True

    def release(self, name: str) -> None:
        """Remove a claim of this worker; nothing if another one has taken it over."""
        with self._lock:
            number = self._held.pop(name, 0)
        if number and self._storage.size(_key(name, number + 1)) is None:
            for each in range(1, number + 1):  # with those that it replaced
                self._storage.delete(_key(name, each))

    def renew(self) -> None:
        """Write every claim of this worker again, and forget those that were taken over."""
        self._renewals += 1
        for name in self.held:
            with self._lock:  # a released claim must not be written again
                number = self._held.get(name)
                if number is None:
                    continue
                if self._storage.size(_key(name, number + 1)) is not None:
                    del self._held[name]
                else:
                    self._storage.put(_key(name, number), self._content(), durable=False)

    @contextmanager
    def wait_for(self, name: str, done: Callable[[], bool] = lambda: False) -> Iterator[bool]:
        """Hold a claim, after waiting for it; continue without it, and give False, as soon as `done` returns True."""
        while not (finished := done()) and not self.take(name):
            self.pause()
        try:
            yield not finished
        finally:
            self.release(name)

    def pause(self) -> None:
        """Wait before looking at the claims of others again; longer each time, until this worker takes one."""
        self._ended.wait(min(FIRST_PAUSE_SECONDS * 2**self._pauses, self.seconds / RENEWALS))
        self._pauses = min(self._pauses + 1, 16)

    def __enter__(self) -> Claims:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()
        with suppress(StorageError):  # what is left expires
            for name in self.held:
                self.release(name)

    def _keep_renewing(self) -> None:
        while not self._ended.wait(self.seconds / RENEWALS):
            with suppress(StorageError):  # tried again; others may take over meanwhile
                self.renew()

    def _newest(self, name: str) -> tuple[int, bytes | None]:
        """Number and bytes of a claim; (0, None) if there is none."""
        number, newest = 0, None
        while (found := self._storage.get(_key(name, number + 1), limit=MAX_CLAIM_BYTES)) is not None:
            number, newest = number + 1, found
        return number, newest

    def _has_expired(self, name: str, number: int, found: bytes) -> bool:
        now = self._clock()
        before = self._seen.get(name)
        if before is None or before[:2] != (number, found):
            self._seen[name] = number, found, now
            return False
        return now - before[2] >= max(self.seconds, _stated_seconds(found))

    def _content(self) -> bytes:
        stated = {"owner": self.owner, "seconds": self.seconds, "renewals": self._renewals}
        return json.dumps(stated).encode()


@dataclass(frozen=True)
class HeldClaim:
    """A claim as it is stored, for people who watch the workers."""

    name: str
    worker: str
    seconds_since_renewal: float | None
    """By the clocks of the store and of this machine; None if the store has no times."""
    expired: bool
    """Whether it was not renewed in time; another worker takes it over."""


def held_claims(storage: Storage, *, now: float | None = None) -> list[HeldClaim]:
    """The claims that are stored, by name.

    Args:
        storage: where they are.
        now: seconds since 1970; by default by the clock of this machine.
    """
    now = time.time() if now is None else now
    times = dict(storage.written(CLAIMS)) if isinstance(storage, Timestamped) else {}
    newest: dict[str, str] = {}
    for key in sorted(storage.list_keys(CLAIMS)):
        newest[key.rsplit(".", 2)[0]] = key
    found = []
    for stem, key in newest.items():
        content = storage.get(key, limit=MAX_CLAIM_BYTES)
        if content is None:  # released meanwhile
            continue
        age = max(0.0, now - times[key]) if key in times else None
        expired = age is not None and age >= (_stated_seconds(content) or CLAIM_SECONDS)
        name = stem.removeprefix(f"{CLAIMS}/").replace("-", "/")
        found.append(HeldClaim(name, _stated_owner(content), age, expired))
    return found


def remove_claims(storage: Storage) -> None:
    """Remove all claims, including those of dead workers."""
    for key in list(storage.list_keys(CLAIMS)):
        storage.delete(key)


def _key(name: str, number: int) -> str:
    return f"{CLAIMS}/{name.replace('/', '-')}.{number:05d}.json"


def _stated_owner(content: bytes) -> str:
    with suppress(ValueError, KeyError, TypeError):
        return str(json.loads(content)["owner"])
    return "unknown"


def _stated_seconds(content: bytes) -> float:
    """After how long a claim expires, as its owner states it; at most a day."""
    with suppress(ValueError, KeyError, TypeError):
        return min(float(json.loads(content)["seconds"]), 86_400.0)
    return 0.0
