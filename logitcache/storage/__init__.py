"""Get, put and list objects by key, wherever they lie: one file per kind of store.

To add one: write the methods of `Storage` in a file of its own, and name its URLs in `open_storage` below.
"""

from __future__ import annotations

import os
from pathlib import Path
from urllib.parse import unquote, urlsplit

from logitcache.errors import UsageError
from logitcache.storage.local import LocalStorage as LocalStorage
from logitcache.storage.protocol import Arrived as Arrived
from logitcache.storage.protocol import Storage as Storage

SCHEMES = ("file", "s3", "gs", "az", "https", "http", "memory")
LOCATIONS = "a directory, file://, s3://, gs://, az://, https:// or http:// (reading) or memory:// (tests)"


def open_storage(location: str | os.PathLike[str]) -> Storage:
    """The storage at a directory or a URL; nothing is created, and nothing is asked of a server yet.

    Raises:
        UsageError: a URL that this version can't open, or one of an object store without the extra `remote`.
    """
    text = os.fspath(location)
    parts = urlsplit(text)
    if parts.scheme == "file":
        if parts.netloc not in ("", "localhost") or not parts.path:
            raise UsageError(f"{text}: a file:// URL is absolute and names no host: file:///folder/a.cache")
        return LocalStorage(Path(unquote(parts.path)))
    if "://" in text:
        from logitcache.storage.remote import open_remote

        if parts.scheme not in SCHEMES:
            raise UsageError(f"{text}: {parts.scheme}:// is no store that logitcache opens; expected {LOCATIONS}")
        return open_remote(text)
    return LocalStorage(local_path(text))


def local_path(location: str | os.PathLike[str]) -> Path:
    """A place on this machine, where nothing but files can be written.

    Raises:
        UsageError: a URL, or what is left of one: a path has one slash where it had two.
    """
    text = os.fspath(location)
    scheme = text.partition(":/")[0]
    if scheme in SCHEMES:
        raise UsageError(f"{text} is no path on this machine; a URL begins with {scheme}://, where one can be given")
    return Path(text).expanduser()
