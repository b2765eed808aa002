"""A file system that can't be written to."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from logitcache.verify.audit import verify
from tests.contract.test_refusals import build

READ_ONLY = """
import sys
import logitcache
sys.path.insert(0, {checkout!r})
from tests.contract.test_refusals import build
from logitcache.errors import StorageError
from pathlib import Path
for path, changes in ((Path({folder!r}) / "a", {{"num_views": 2}}), (Path({folder!r}) / "new", {{}})):
    try:
        build(path, **changes)
    except StorageError as error:
        print(error)
"""


def test_growing_a_cache_on_a_read_only_file_system_says_what_to_do(tmp_path: Path) -> None:
    """A real one, mounted for one process."""
    build(tmp_path / "a")
    program = READ_ONLY.format(checkout=str(Path(__file__).parents[2]), folder=str(tmp_path))
    script = 'mount --bind "$1" "$1" && mount -o remount,ro,bind "$1" && exec "$2" -c "$3"'
    try:
        done = subprocess.run(
            ["unshare", "-rm", "sh", "-c", script, "sh", str(tmp_path), sys.executable, program],
            capture_output=True,
            text=True,
            check=False,
        )
    except FileNotFoundError:
        pytest.skip("no unshare here")
    if done.stderr.startswith(("unshare", "mount")):
        pytest.skip(f"no mounts here: {done.stderr}")

    assert "" == done.stderr
    remedy = "the file system is read-only; choose another path"
    assert 2 == done.stdout.count(remedy)
    assert f"can't write {tmp_path}/a/manifest.json: {remedy}" in done.stdout
    assert [] == verify(str(tmp_path / "a"), deep=True)
