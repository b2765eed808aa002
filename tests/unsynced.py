"""Files are written without waiting for the disk, in the tests and in the processes that they fork.

A process that is killed loses nothing of what it wrote; only a power loss does. What must reach the disk, and in which
order, is tested in `tests/durability/test_durability.py`, which records the calls.
"""

from __future__ import annotations

import os


def _written_at_once(descriptor: int) -> None:
    """In the place of `os.fsync`."""


os.fsync = _written_at_once
