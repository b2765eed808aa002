"""The third-party packages that a cache's encodings come from, as its manifest records them.

Nothing here imports torch or those packages: `info` works without either.
"""

from __future__ import annotations

import re
from collections.abc import Container
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version

from logitcache.cache.manifest import Identity, Manifest
from logitcache.errors import MissingPackage
from logitcache.registry import Package

ENCODING_PACKAGES = "encoding_packages"
"""The key in a manifest's provenance: encoding -> name and version of the package that wrote the cache."""

# A manifest may come from a stranger, and these end up in a command that a message suggests.
_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,98}[A-Za-z0-9])?")
_VERSION = re.compile(r"[0-9][0-9A-Za-z.!+_-]{0,63}")


def encoding_names(identity: Identity) -> list[str]:
    """The names of a cache's encodings, of the logits and of all other outputs."""
    names = [config.get("name") for config in (identity.encoding, *identity.output_encodings.values())]
    return sorted({name for name in names if isinstance(name, str)})


def recorded_packages(manifest: Manifest) -> dict[str, Package]:
    """The package of each encoding that is not built in."""
    packages = {}
    recorded = manifest.provenance.get(ENCODING_PACKAGES)
    for name in encoding_names(manifest.identity):
        with suppress(TypeError, KeyError):
            package = Package(**recorded[name])  # type: ignore[index]
            if _NAME.fullmatch(package.name) and _VERSION.fullmatch(package.version):
                packages[name] = package
    return packages


def missing_packages(manifest: Manifest, known: Container[str]) -> str | None:
    """Which package is missing for an encoding that is not known here, and how to install it; None if all are there."""
    for name, package in recorded_packages(manifest).items():
        if name not in known:
            try:
                state = f"not installed (version {version(package.name)} is, which lacks this encoding)"
            except PackageNotFoundError:
                state = "not installed"
            return (
                f"the encoding {name!r} comes from the package {package}, which is {state}. If you trust this package, "
                f"run: pip install '{package.name}=={package.version}'"
            )
    return None


def require_packages(manifest: Manifest, known: Container[str], *, url: str) -> None:
    """Refuse to decode labels whose encoding is not known here.

    Raises:
        MissingPackage: names the package.
    """
    missing = missing_packages(manifest, known)
    if missing is not None:
        raise MissingPackage(f"{url}: {missing}. Without it, `info`, `ls`, `verify`, `push` and `pull` work")
