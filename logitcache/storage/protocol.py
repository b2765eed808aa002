"""The interface of a store: objects by key, each written completely or not at all."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol, runtime_checkable

Arrived = Callable[[int], None]
"""Called with the number of bytes of an object that have arrived, which decreases when a request is repeated."""


class Storage(Protocol):
    """Objects by key; a key is a relative path with forward slashes.

    Methods with a body suit stores whose objects are durable when `put` returns, and that have neither partial files
    nor a lock.
    """

    url: str
    """Its location, as users and commands write it."""
    is_remote: bool
    """Whether every call crosses a network; objects of a remote store are kept in a local directory."""
    concurrency: int
    """Calls that it serves best at once."""
    can_write: bool
    can_list: bool
    """A web server supports neither writing nor listing."""

    def get(self, key: str, *, limit: int | None = None) -> bytes | None:
        """The object's bytes, at most one more than the limit; None if there is no such object.

        Raises:
            StorageError: the store refuses, or can't be reached.
        """

    def get_view(self, key: str, *, limit: int | None = None, arrived: Arrived | None = None) -> memoryview | None:
        """As `get`, without copying the bytes out of the client's buffer.

        Args:
            key: of the object.
            limit: as for `get`.
            arrived: called while a large object arrives.
        """
        data = self.get(key, limit=limit)
        return None if data is None else memoryview(data)

    def put(self, key: str, data: bytes | memoryview, *, durable: bool = True) -> None:
        """Store an object, completely or not at all.

        Args:
            key: of the object.
            data: its bytes.
            durable: survive a power loss once this returns; if False, only after `make_durable`.
        """

    def make_durable(self, keys: Iterable[str]) -> None:
        """Make objects that were stored before survive a power loss."""
        return

    def create(self, key: str, data: bytes) -> bool:
        """Store an object unless it exists; returns whether it was stored. Of two writers, only one succeeds."""

    def size(self, key: str) -> int | None:
        """The object's size in bytes; None if there is no such object."""

    def sizes(self, prefix: str = "") -> Iterator[tuple[str, int]]:
        """Every key below a folder, with the size of its object in bytes."""

    def list_keys(self, prefix: str = "") -> Iterator[str]:
        """Every key below a folder."""
        return (key for key, _ in self.sizes(prefix))

    def folders(self, prefix: str = "") -> list[str]:
        """Names of the folders directly in a folder, sorted."""

    def delete(self, key: str) -> None:
        """Delete an object if it exists."""

    def remove_leftovers(self) -> int:
        """Delete partial files of dead writers; returns their number."""
        return 0

    def lock(self) -> AbstractContextManager[None]:
        """Exclusive lock for replacing records. Object stores have none.

        Not reentrant. The folder is created if needed.
        """
        return nullcontext()


@runtime_checkable
class Timestamped(Protocol):
    """A store that can state when objects were written."""

    def written(self, prefix: str = "") -> Iterator[tuple[str, float]]:
        """Every key below a folder, with the time of its last write in seconds since 1970, by the store's clock."""


@runtime_checkable
class Transactional(Protocol):
    """A store that is written by whole copies only, such as a repository."""

    def transaction(self) -> AbstractContextManager[Storage]:
        """A store for a copy. What is written to it appears when the context ends without an error."""
