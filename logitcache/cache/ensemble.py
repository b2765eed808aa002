"""The teacher of a merged cache: the mean of several teachers, named by a hash of its parts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from logitcache.cache.manifest import Manifest, Sha256
from logitcache.digest import json_digest
from logitcache.errors import CorruptCache

MERGED = "merged"
"""Key of the provenance that lists the parts of a merged cache."""
_NAME = re.compile(r"mean-of-(logits|probabilities):[0-9a-f]{64}")


class Part(BaseModel):
    """One of the caches that were merged."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: Sha256
    digest: Sha256
    teacher: str
    precision: str
    teacher_input: Any
    """The teacher's own part of the transform, which may differ between parts."""
    weight: float = Field(gt=0, le=1)
    """The weights of all parts sum to 1."""
    location: str = ""
    """Where it was; not part of the name's hash."""


def merged_name(parts: Sequence[Part], mean: str) -> str:
    """The identity's `teacher` of a mean of these parts; independent of their order."""
    described = [part.model_dump(exclude={"location"}) for part in sorted(parts, key=lambda part: part.id)]
    return f"mean-of-{mean}:{json_digest(described)}"


def merged_parts(manifest: Manifest) -> list[Part]:
    """The parts of a merged cache; none for the cache of one teacher.

    Raises:
        CorruptCache: the parts in the provenance don't match the hash in the teacher's name.
    """
    named = _NAME.fullmatch(manifest.identity.teacher)
    merged = manifest.provenance.get(MERGED)
    if named is None or merged is None:
        return []
    try:
        parts = [Part.model_validate(part) for part in merged["parts"]]
    except (ValidationError, TypeError, KeyError):
        parts = []
    if merged_name(parts, named[1]) != manifest.identity.teacher:
        raise CorruptCache(
            f"cache {manifest.id[:12]}… is a mean of caches, but the parts in its provenance don't match the hash in "
            "its teacher's name; merge the caches again"
        )
    return parts
