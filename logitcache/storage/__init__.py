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
    text = os.fsdecode(location)
    if "://" not in text and not text.lower().startswith("file:"):
        return LocalStorage(local_path(text))
    try:
        parts = urlsplit(text)
        _ = parts.port  # checked only when it is asked for
    except ValueError as error:
        raise UsageError(f"{text} is no URL: {error}; expected {LOCATIONS}") from None
    if parts.scheme == "file":
        if parts.netloc not in ("", "localhost") or not parts.path:
            raise UsageError(f"{text}: a file:// URL is absolute and names no host: file:///folder/a.cache")
        return LocalStorage(_path(unquote(parts.path)))
    if parts.scheme not in SCHEMES:
        raise UsageError(f"{text}: {parts.scheme}:// is no store that logitcache opens; expected {LOCATIONS}")
    from logitcache.storage.remote import open_remote

    return open_remote(text)


def local_path(location: str | os.PathLike[str]) -> Path:
    """A place on this machine, where nothing but files can be written.

    Raises:
        UsageError: a URL, or what is left of one: a path has one slash where it had two.
    """
    text = os.fsdecode(location)
    scheme = text.partition(":/")[0]
    if scheme in SCHEMES:
        raise UsageError(f"{text} is no path on this machine; a URL begins with {scheme}://, where one can be given")
    try:
        return _path(text).expanduser()
    except RuntimeError as error:  # ~somebody
        raise UsageError(f"{text}: {error}") from None


def _path(text: str) -> Path:
    try:
        if b"\0" not in os.fsencode(text):
            return Path(text)
    except UnicodeEncodeError:
        pass
    raise UsageError(f"{text!r} holds a character that no path has")
