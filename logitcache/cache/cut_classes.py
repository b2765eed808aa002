"""The classes that a teacher's head was cut by, and their probability: a head may be padded beyond the tokenizer."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from logitcache.cache.manifest import Manifest

CUT_CLASSES = "cut_classes"
"""The key in a manifest's provenance."""

Probability = Annotated[float, Field(ge=0, le=1)]


class CutClasses(BaseModel):
    """Classes of the teacher that a cache leaves out, and the probability that the teacher gave them."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    classes: int = Field(ge=1)
    rows: int = Field(ge=1)
    """That the probabilities were measured on."""
    mass_mean: Probability
    mass_max: Probability
    """Of any of these rows."""

    @property
    def text(self) -> str:
        """A sentence for people."""
        return (
            f"{self.classes:,} classes of the teacher's head beyond the vocabulary, with {self.mass_mean:.2g} of its "
            f"probability on average and {self.mass_max:.2g} at most, measured on {self.rows:,} rows"
        )


def cut_classes_of(manifest: Manifest) -> CutClasses | None:
    """What a manifest states about cut classes; None for none, or if an untrusted manifest has anything else there."""
    try:
        return CutClasses.model_validate(manifest.provenance.get(CUT_CLASSES))
    except ValidationError:
        return None
