"""What every store owes: objects by key, whole or not at all."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Protocol

Arrived = Callable[[int], None]
"""Is told how many bytes of an object have come so far: fewer than before where it is asked for anew."""


class Storage(Protocol):
    """Objects by key; a key is a relative path with forward slashes."""

    url: str
    """Where it is, as people and commands name it."""
    is_remote: bool
    """Whether every call crosses a network: then objects that were read are worth keeping nearby."""
    concurrency: int
    """How many calls at once it is best asked with."""
    can_write: bool
    can_list: bool
    """A web server does neither."""

    def get(self, key: str, *, limit: int | None = None) -> bytes | None:
        """The object's bytes, or None where there is none; no more than one byte beyond the limit is kept.

        Raises:
            StorageError: the store refuses, or can't be reached.
        """

    def get_view(self, key: str, *, limit: int | None = None, arrived: Arrived | None = None) -> memoryview | None:
        """As `get`, but where they lie: `bytes` of what a store's client holds are a copy, and labels are large.

        Args:
            key: which.
            limit: as for `get`.
            arrived: is told of large objects as they come.
        """

    def put(self, key: str, data: bytes | memoryview, *, durable: bool = True) -> None:
        """Store an object whole or not at all; on return it survives a power loss, unless that is left for later.

        Args:
            key: which.
            data: its bytes.
            durable: if False, its name may be lost in a power loss until `make_durable` is called.
        """

    def make_durable(self, keys: Iterable[str]) -> None:
        """See to it that objects stored before survive a power loss."""

    def create(self, key: str, data: bytes) -> bool:
        """Store an object unless there is one already, of two writers only one; whether it was stored."""

    def size(self, key: str) -> int | None:
        """The object's bytes counted, or None where there is none."""

    def sizes(self, prefix: str = "") -> Iterator[tuple[str, int]]:
        """Every key under a folder, with its object's size in bytes."""

    def list_keys(self, prefix: str = "") -> Iterator[str]:
        """Every key under a folder."""

    def folders(self, prefix: str = "") -> list[str]:
        """The names of the folders that lie directly in a folder, sorted."""

    def delete(self, key: str) -> None:
        """Remove an object; it may be gone already."""

    def remove_leftovers(self) -> int:
        """Delete what dead writers left half-written; returns how many."""

    def lock(self) -> AbstractContextManager[None]:
        """Held while records are replaced, so that nobody else does it meanwhile; object stores have none.

        Not reentrant. The folder is made where there is none.
        """
