"""All errors that logitcache raises on purpose, grouped by what the caller does about them.

`exit_code` is what the command line returns: 2 if the request was wrong, 1 if the request was right and a check failed.
Every class also has a built-in parent, so `except ValueError` keeps working.
"""

from __future__ import annotations


class LogitCacheError(Exception):
    """Base class of all errors."""

    exit_code = 1


class UsageError(LogitCacheError, ValueError):
    """The request is not possible as written: correct the pipeline, the argument or the path."""

    exit_code = 2


class UntrustedCode(UsageError):
    """A `package.module:function` from outside the working directory, without the user's permission."""


class DatasetUnavailable(UsageError, LookupError):
    """The dataset is not on this machine; the message says how to get it."""


class MissingPackage(UsageError, ImportError):
    """The cache's encoding comes from a package that is not installed; the message names the package."""


class NotACache(UsageError):
    """The path holds no logit cache."""


class UnsupportedFormat(NotACache):
    """The cache was written in a format that this version can't read."""


class IdentityMismatch(LogitCacheError, ValueError):
    """The cache belongs to other data, another teacher or other views."""


class SampleMismatch(IdentityMismatch):
    """A sample is not the one that the teacher saw."""


class IncompleteCache(LogitCacheError, RuntimeError):
    """Blocks are missing; re-run the build to compute them."""


REBUILD = "re-run the build to resume it: `logitcache cache-teacher`, `logitcache merge` or your own writer"
"""What to do about blocks that are missing."""


def unsealed(location: str) -> IncompleteCache:
    """The error for a cache that is incomplete but must be sealed."""
    return IncompleteCache(f"{location} is not sealed yet; {REBUILD}")


class PartyMissing(LogitCacheError, TimeoutError):
    """Another party's cache does not exist yet; re-run the command later to resume."""


class CorruptCache(LogitCacheError, ValueError):
    """Stored bytes are not the bytes that were written."""


class CorruptRun(LogitCacheError, ValueError):
    """A file in a run's folder is damaged or belongs to another run; the message names what to delete."""


class InvalidLogits(LogitCacheError, ValueError):
    """Logits that define no distribution: NaN, +inf, or a row with only -inf."""

    def __init__(self, message: str, *, row: int | None = None) -> None:
        super().__init__(message)
        self.row = row
        """Number of the first wrong row, where it is known."""


class InvalidSource(LogitCacheError, ValueError):
    """A file of another tool can't be imported: it is damaged, malicious, or not of its format."""


class IndexBeyondEnd(UsageError, IndexError):
    """The dataset has no sample with this index; like IndexError, it ends a `for` loop."""


class UnreadableSample(LogitCacheError, ValueError):
    """A sample of the dataset could not be loaded."""


class ShapeError(LogitCacheError, ValueError):
    """An array has the wrong shape."""


class StorageError(LogitCacheError, OSError):
    """The store can't be read or written: no space, no permission, no such folder, no connection."""
