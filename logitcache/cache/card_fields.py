"""What the author of a cache states on its card."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from logitcache.errors import UsageError


class Card(BaseModel):
    """What the author states about a cache. Recorded in the manifest's provenance; not part of the identity."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    license: str | None = None
    """License identifier as hubs use it, such as "cc-by-4.0"."""
    title: str | None = None
    description: str | None = None
    """Plain text; an empty line starts a new paragraph."""
    dataset: str | None = None
    """Readable name of the dataset, such as "imagenet-1k"; takes precedence over the recorded name."""
    teacher: str | None = None
    """Readable name of the teacher; takes precedence over the recorded name."""
    url: str | None = Field(default=None, pattern=r"^https?://[\w.~:/?#@!$&*+,;=%-]+$", max_length=2000)
    """A page with more information."""
    tags: list[str] = []

    def stated(self) -> dict[str, Any]:
        """The fields that are set, as JSON."""
        return self.model_dump(exclude_defaults=True)


def card_from(value: Card | Mapping[str, Any]) -> Card:
    """A card from a mapping.

    Raises:
        UsageError: an unknown field or an invalid value; names the field.
    """
    if isinstance(value, Card):
        return value
    try:
        return Card.model_validate(dict(value))
    except ValidationError as error:
        first = error.errors()[0]
        raise UsageError(
            f"card.{'.'.join(map(str, first['loc']))}: {first['msg']}; a card has: {', '.join(Card.model_fields)}"
        ) from None
