"""One tree of errors, grouped by what the caller does about them.

`exit_code` is what the command line returns: 2 when the request was wrong, 1 when it was right and something
was found amiss. Every class keeps a built-in parent, so that `except ValueError` goes on working.
"""

from __future__ import annotations


class LogitCacheError(Exception):
    """Anything that logitcache refuses or finds wrong."""

    exit_code = 1


class UsageError(LogitCacheError, ValueError):
    """The request can't be carried out as written: mend the pipeline, the argument or the path."""

    exit_code = 2


class UntrustedCode(UsageError):
    """A `package.module:function` from outside the working folder, without the user's consent."""


class DatasetUnavailable(UsageError, LookupError):
    """The dataset is not on this machine; the message says how to get it."""


class MissingPackage(UsageError, ImportError):
    """The cache's encoding comes from a package that is not installed; the message names the package."""


class NotACache(UsageError):
    """The path holds no logit cache."""


class UnsupportedFormat(NotACache):
    """The cache was written in a format that this version can't read."""


class IdentityMismatch(LogitCacheError, ValueError):
    """The cache belongs to other data, another teacher or other views than those at hand."""


class SampleMismatch(IdentityMismatch):
    """One sample is not the one the teacher saw."""


class IncompleteCache(LogitCacheError, RuntimeError):
    """Blocks are missing; what builds the cache computes them when it is run again."""


REBUILD = "run again what builds it, which goes on: `logitcache cache-teacher`, `logitcache merge` or your own writer"
"""What to do about blocks that are missing."""


def unsealed(location: str) -> IncompleteCache:
    """The error of a cache that must be whole, and is not yet."""
    return IncompleteCache(f"{location} is not sealed yet; {REBUILD}")


class PartyMissing(LogitCacheError, TimeoutError):
    """Another party's cache is not there yet; the same command goes on when it is."""


class CorruptCache(LogitCacheError, ValueError):
    """Stored bytes are not the bytes that were written."""


class CorruptRun(LogitCacheError, ValueError):
    """A file of a run's folder is damaged, or belongs to another run; the message names what to delete."""


class InvalidLogits(LogitCacheError, ValueError):
    """Logits that no distribution can be made of: NaN, +inf, or a row of nothing but -inf."""


class IndexBeyondEnd(UsageError, IndexError):
    """A sample was asked for that the dataset does not have; it ends a `for` loop, as an IndexError does."""


class UnreadableSample(LogitCacheError, ValueError):
    """A sample of the dataset could not be loaded."""


class ShapeError(LogitCacheError, ValueError):
    """Arrays of the wrong shape."""


class StorageError(LogitCacheError, OSError):
    """The store refused: no space, no permission, no such folder."""
