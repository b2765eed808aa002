"""The SHA-256 of each file of a finished run, in a file `SHA256SUMS` that `sha256sum -c` reads too."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from logitcache.errors import CorruptRun

CHECKSUMS = "SHA256SUMS"
MAX_BYTES = 2**20
_LINE = re.compile(r"([0-9a-f]{64})  ([^/\n]+)")


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checksums_text(checksums: dict[str, str]) -> str:
    """The lines of `SHA256SUMS`, from SHA-256 by file name."""
    return "".join(f"{checksum}  {name}\n" for name, checksum in checksums.items())


def check_file(path: Path) -> bool:
    """Compare a file with the `SHA256SUMS` beside it; False where it is not listed there, and nothing is known of it.

    Raises:
        CorruptRun: its SHA-256 is another, or `SHA256SUMS` is damaged.
        OSError: the file can't be read.
    """
    beside = path.parent / CHECKSUMS
    if not beside.is_file():
        return False
    with beside.open("rb") as file:
        text = file.read(MAX_BYTES).decode("utf-8", errors="replace")
    lines = [_LINE.fullmatch(line) for line in text.splitlines()]
    expected = {line[2]: line[1] for line in lines if line}.get(path.name)
    if None in lines:
        raise CorruptRun(f"{beside} is damaged: expected lines of SHA-256 and file name; restore it, or delete it")
    if expected is None:
        return False
    found = file_sha256(path)
    if found != expected:
        raise CorruptRun(
            f"{path} is not the file that its run left: expected SHA-256 {expected} (from {beside}), found {found}.\n"
            f"Restore the file, or delete {path.parent} and run the same command again"
        )
    return True
