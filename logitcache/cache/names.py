"""Readable names of a cache's teacher and dataset: recorded in provenance, outside identity and digest."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from logitcache.cache.ensemble import merged_parts
from logitcache.cache.manifest import Manifest
from logitcache.errors import CorruptCache
from logitcache.markdown import LONGEST_NAME, one_line

NAMES = "names"
"""The key in a manifest's provenance: {"teacher": ..., "dataset": ...}, each optional."""


class CacheNames(NamedTuple):
    """What people call the teacher and the dataset; one line each, at most 200 characters."""

    teacher: str
    dataset: str

    @property
    def title(self) -> str:
        """A title, such as "Logits of resnet50 on imagenet"."""
        return one_line(f"Logits of {self.teacher} on {self.dataset}", LONGEST_NAME)


def recorded_names(manifest: Manifest) -> dict[str, str]:
    """The names in a manifest's provenance; those on the card come first."""
    provenance = manifest.provenance
    return stated_names(provenance.get(NAMES)) | stated_names(provenance.get("card"))


def names_of(manifest: Manifest) -> CacheNames:
    """Readable names of a cache: the recorded ones, else the identity's, with fingerprints shortened."""
    recorded = recorded_names(manifest)
    identity = manifest.identity
    teacher = recorded.get("teacher") or _mean_of(manifest) or identity.teacher.partition("@")[0]
    return CacheNames(*(_shortened(name) for name in (teacher, recorded.get("dataset") or identity.dataset)))


def stated_names(names: Any) -> dict[str, str]:
    """The names of a mapping; an untrusted manifest may have anything in its place."""
    stated = names if isinstance(names, Mapping) else {}
    found = {kind: stated.get(kind) for kind in CacheNames._fields}
    return {kind: one_line(name, LONGEST_NAME) for kind, name in found.items() if isinstance(name, str) and name}


def _mean_of(manifest: Manifest) -> str | None:
    try:
        parts = merged_parts(manifest)
    except CorruptCache:  # an untrusted manifest
        return None
    return f"the mean of {len(parts)} teachers" if parts else None


def _shortened(name: str) -> str:
    return f"{name[:12]}…" if re.fullmatch(r"[0-9a-f]{64}", name) else one_line(name, LONGEST_NAME)
