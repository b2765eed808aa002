"""Files are written without waiting for the disk, in tests and in the processes that they fork.

A process that is killed loses nothing of what it wrote; only a power loss does. Which files must reach the disk, and in
which order, is tested in `tests/durability/test_durability.py`, which records the calls.
"""

from __future__ import annotations

import os


def _skip_fsync(descriptor: int) -> None:
    """Replaces `os.fsync`; does nothing."""


os.fsync = _skip_fsync
