"""Stores: get, put and list objects by key, in a directory or behind a URL; one file per kind of store.

To add a store, implement `Storage`. A package adds a function from a URL to its `Storage`, named like the URL's scheme,
in the entry point group `logitcache.stores`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from urllib.parse import unquote, urlsplit

from logitcache.errors import UsageError
from logitcache.registry import Registry, unknown_name
from logitcache.storage.local import LocalStorage as LocalStorage
from logitcache.storage.protocol import Arrived as Arrived
from logitcache.storage.protocol import Storage as Storage
from logitcache.storage.protocol import Timestamped as Timestamped
from logitcache.storage.protocol import Transactional as Transactional


def open_storage(location: str | os.PathLike[str]) -> Storage:
    """The store of a directory or URL. Nothing is created, and no request is sent.

    Raises:
        UsageError: an invalid URL, an unknown scheme, or an object store without the extra `remote`.
    """
    text = os.fsdecode(location)
    if "://" not in text and not text.lower().startswith("file:"):
        return LocalStorage(local_path(text))
    try:
        parts = urlsplit(text)
        _ = parts.port  # urlsplit checks it only on access
    except ValueError as error:
        raise UsageError(f"{text} is not a valid URL: {error}") from None
    if parts.scheme not in STORES:
        known = [f"{scheme}://" for scheme in STORES]
        expected = f"a directory or one of: {', '.join(known)}"
        raise UsageError(f"{text}: {unknown_name('store', f'{parts.scheme}://', known, expected)}")
    return STORES[parts.scheme](text)


def _local(url: str) -> Storage:
    parts = urlsplit(url)
    if parts.netloc not in ("", "localhost") or not parts.path:
        raise UsageError(f"{url}: a file:// URL is absolute and names no host: file:///folder/a.cache")
    return LocalStorage(_path(unquote(parts.path)))


def _remote(url: str) -> Storage:
    from logitcache.storage.remote import open_remote

    return open_remote(url)


def _hub(url: str) -> Storage:
    from logitcache.storage.hub import open_hub

    return open_hub(url)


STORES: Registry[Callable[[str], Storage]] = Registry(
    "store", {"file": _local} | dict.fromkeys(("s3", "gs", "az", "https", "http", "memory"), _remote) | {"hf": _hub}
)
"""Functions from a URL to its `Storage`, by scheme."""


def local_path(location: str | os.PathLike[str]) -> Path:
    """A path on this machine, for what can only be written to files.

    Raises:
        UsageError: a URL, also with a single slash, which is what `Path` leaves of the two.
    """
    text = os.fsdecode(location)
    scheme = text.partition(":/")[0]
    if scheme in STORES:
        raise UsageError(f"{text} is not a path on this machine; a URL begins with {scheme}://, where one is allowed")
    try:
        return _path(text).expanduser()
    except RuntimeError as error:  # an unknown user in ~user
        raise UsageError(f"{text}: {error}") from None


def _path(text: str) -> Path:
    try:
        if b"\0" not in os.fsencode(text):
            return Path(text)
    except UnicodeEncodeError:
        pass
    raise UsageError(f"{text!r} contains a character that is not allowed in paths")
