"""Who the teacher of a merged cache is: the mean of several caches' teachers, named by what it is made of."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from logitcache.cache.manifest import Manifest, Sha256
from logitcache.digest import json_digest
from logitcache.errors import CorruptCache

MERGED = "merged"
"""Where a manifest's provenance says which caches a merged one is the mean of."""
_NAME = re.compile(r"mean-of-(logits|probabilities):[0-9a-f]{64}")


class Part(BaseModel):
    """One of the caches that a merged cache is the mean of."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: Sha256
    digest: Sha256
    teacher: str
    precision: str
    teacher_input: Any
    """The teacher's own part of the transform, which may differ between parts."""
    weight: float = Field(gt=0, le=1)
    """All weights together are 1."""
    location: str = ""
    """Where it lay; no part of what it is."""


def merged_name(parts: Sequence[Part], mean: str) -> str:
    """The identity's `teacher` of a mean over these parts, in whatever order they come."""
    described = [part.model_dump(exclude={"location"}) for part in sorted(parts, key=lambda part: part.id)]
    return f"mean-of-{mean}:{json_digest(described)}"


def merged_parts(manifest: Manifest) -> list[Part]:
    """The parts of a merged cache; none where it is of one teacher.

    Raises:
        CorruptCache: what the provenance says is not what the teacher's name was made from.
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
            f"cache {manifest.id[:12]}… is a mean of caches, but those that its provenance names are not the ones that "
            "its teacher's name was made from; merge them again"
        )
    return parts
