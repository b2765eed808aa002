"""Stores of objects by key: directories, object stores and web servers.

To add one, implement `Storage` in a new module, and open its URLs in `open_storage`.
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
    """The storage at a directory or a URL; creates nothing and sends no request.

    Raises:
        UsageError: an unsupported or invalid URL, or the extra `remote` is not installed.
    """
    text = os.fsdecode(location)
    if "://" not in text and not text.lower().startswith("file:"):
        return LocalStorage(local_path(text))
    try:
        parts = urlsplit(text)
        _ = parts.port  # validated only on access
    except ValueError as error:
        raise UsageError(f"{text} is not a valid URL: {error}; expected {LOCATIONS}") from None
    if parts.scheme == "file":
        if parts.netloc not in ("", "localhost") or not parts.path:
            raise UsageError(f"{text}: a file:// URL must be absolute and without host: file:///folder/a.cache")
        return LocalStorage(_path(unquote(parts.path)))
    if parts.scheme not in SCHEMES:
        raise UsageError(f"{text}: {parts.scheme}:// is not supported; expected {LOCATIONS}")
    from logitcache.storage.remote import open_remote

    return open_remote(text)


def local_path(location: str | os.PathLike[str]) -> Path:
    """A path on this machine.

    Raises:
        UsageError: a URL, also one that went through `Path` and lost a slash.
    """
    text = os.fsdecode(location)
    scheme = text.partition(":/")[0]
    if scheme in SCHEMES:
        raise UsageError(f"{text} is not a path on this machine; where URLs are supported, they start with {scheme}://")
    try:
        return _path(text).expanduser()
    except RuntimeError as error:  # an unknown user: ~name
        raise UsageError(f"{text}: {error}") from None


def _path(text: str) -> Path:
    try:
        if b"\0" not in os.fsencode(text):
            return Path(text)
    except UnicodeEncodeError:
        pass
    raise UsageError(f"{text!r} contains a character that paths can't have")
