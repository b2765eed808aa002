"""Packages that some tests need beyond the extra `test-core`."""

from __future__ import annotations

import importlib.util
import os

import pytest


def need_package(module: str, extra: str) -> None:
    """Skip the test if a package is not installed; in CI, which installs all of them, fail."""
    if importlib.util.find_spec(module) is None:
        how = f"{module} is not installed (pip install 'logitcache[{extra}]')"
        if os.environ.get("CI"):
            pytest.fail(f"{how}, and CI must run this")
        pytest.skip(how, allow_module_level=True)
