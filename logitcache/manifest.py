"""What a cache is (identity), how it came to be (provenance), and which blocks are whole (receipts)."""

from __future__ import annotations

import json
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from logitcache.digest import json_digest, sha256_hex
from logitcache.encodings import ArraySpec
from logitcache.errors import CorruptCache, NotACache, UnsupportedFormat

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
RECEIPTS = "receipts.json"
"""All receipts in one file; written at sealing."""

Sha256 = str


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Identity(_Record):
    """What makes two caches the same cache; the cache id is the SHA-256 of its canonical JSON."""

    format_version: int
    dataset: str
    """Fingerprint of ordered keys, targets and contents; or the name that `create` was given."""
    teacher: str
    """Fingerprint of entry point and weights; or the name that `create` was given."""
    precision: str
    transform: Any
    """`ViewPlan.describe()`: shared part, mixing, the teacher's own part."""
    view_seed: int
    encoding: dict[str, Any]
    outputs: dict[str, list[int]]
    """Shape of each output for one sample: {"logits": [C]}."""
    class_names: list[str] | None

    @property
    def cache_id(self) -> Sha256:
        return json_digest(self.model_dump())

    def differences(self, other: Identity) -> list[str]:
        """The fields in which another identity differs, a line each: this one's value first, then the other's."""
        lines = []
        for name in type(self).model_fields:
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                path, mine, theirs = _first_difference(name, mine, theirs)
                lines.append(f"{path}: {_short(mine)} in the cache, {_short(theirs)} here")
        return lines


class Layout(_Record):
    """Shape of the cache on disk. Views may be added; the rest is fixed when the cache is created."""

    num_samples: int = Field(ge=1)
    num_views: int = Field(ge=1)
    num_classes: int = Field(ge=2)
    rows_per_block: int = Field(ge=1)
    arrays: dict[str, ArraySpec]
    """What is stored for every row, by array name."""


class Manifest(_Record):
    """`manifest.json`."""

    format: Literal["logitcache"] = "logitcache"
    id: Sha256
    identity: Identity
    layout: Layout
    state: Literal["open", "sealed"]
    digest: Sha256 | None
    """SHA-256 over the sorted value hashes of every object; set at sealing."""
    provenance: dict[str, Any]
    """Host, time, versions, command: recorded, never hashed."""


class StoredObject(_Record):
    """One object of a block: a chunk of one array."""

    bytes: int = Field(ge=0)
    sha256: Sha256
    """Of the stored bytes: guards transport and disk."""
    values_sha256: Sha256
    """Of the decoded values: what it says, whatever the compressor's version."""


class Receipt(_Record):
    """The record, written last, that a block is whole."""

    rows: int = Field(ge=0)
    objects: dict[str, StoredObject]
    """By array name."""
    kl_mean: float | None
    """KL(teacher ‖ decoded) at T = 1 over the block's rows, in nats."""
    kl_max: float | None
    inputs: dict[str, str]
    """Row -> digest of the teacher's input, for the view's proof rows in this block."""


def content_digest(receipts: list[Receipt]) -> Sha256:
    """The digest of what a cache says: SHA-256 over the sorted value hashes."""
    hashes = sorted(stored.values_sha256 for receipt in receipts for stored in receipt.objects.values())
    return sha256_hex("\n".join(hashes).encode())


def dump(record: BaseModel) -> bytes:
    """A record as readable JSON."""
    return (json.dumps(record.model_dump(), indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode()


def read_manifest(data: bytes | None, *, url: str) -> Manifest:
    """A manifest from its bytes.

    Raises:
        NotACache: no manifest, or the manifest of something else.
        UnsupportedFormat: written by a newer version.
        CorruptCache: a manifest that contradicts itself.
    """
    if data is None:
        raise NotACache(f"{url} is no logit cache: it has no {MANIFEST}; run `logitcache cache-teacher` to build one")
    try:
        raw = json.loads(data)
        is_ours = isinstance(raw, dict) and raw.get("format") == "logitcache"
    except (ValueError, RecursionError) as error:
        raise NotACache(f"{url} is no logit cache: its {MANIFEST} is not JSON ({error})") from None
    if not is_ours:
        raise NotACache(f"{url} is no logit cache: its {MANIFEST} was not written by logitcache")
    identity = raw.get("identity")
    version = identity.get("format_version") if isinstance(identity, dict) else None
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise UnsupportedFormat(
            f"{url} has format version {version}; this logitcache reads up to {FORMAT_VERSION}: upgrade logitcache"
        )
    try:
        manifest = Manifest.model_validate(raw)
    except ValidationError as error:
        raise CorruptCache(f"{url}: {MANIFEST} is damaged: {_first_error(error)}") from None
    if manifest.identity.cache_id != manifest.id:
        raise CorruptCache(
            f"{url}: {MANIFEST} is damaged: its identity hashes to {manifest.identity.cache_id[:12]}…, "
            f"but it says {manifest.id[:12]}…"
        )
    return manifest


def read_receipt(data: bytes, *, key: str) -> Receipt:
    """A receipt from its bytes.

    Raises:
        CorruptCache: bytes that are no receipt.
    """
    try:
        return Receipt.model_validate_json(data)
    except ValidationError as error:
        raise CorruptCache(f"{key} is damaged: {_first_error(error)}") from None


def read_receipts(data: bytes, *, url: str) -> dict[str, Receipt]:
    """The gathered receipts by name, from the bytes of `receipts.json`.

    Raises:
        CorruptCache: bytes that are no receipts.
    """
    try:
        raw = json.loads(data)
        return {str(name): Receipt.model_validate(receipt) for name, receipt in raw.items()}
    except (ValueError, AttributeError, RecursionError) as error:
        reason = _first_error(error) if isinstance(error, ValidationError) else error
        raise CorruptCache(f"{url}: {RECEIPTS} is damaged: {reason}") from None


def _first_error(error: ValidationError) -> str:
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"


def _first_difference(path: str, mine: Any, theirs: Any) -> tuple[str, Any, Any]:
    """Descend to the first place in which two JSON values differ."""
    if isinstance(mine, dict) and isinstance(theirs, dict):
        for key in sorted(mine.keys() | theirs.keys()):
            if mine.get(key, _ABSENT) != theirs.get(key, _ABSENT):
                return _first_difference(f"{path}.{key}", mine.get(key, _ABSENT), theirs.get(key, _ABSENT))
    if isinstance(mine, list) and isinstance(theirs, list) and len(mine) == len(theirs):
        for index, (a, b) in enumerate(zip(mine, theirs, strict=True)):
            if a != b:
                return _first_difference(f"{path}[{index}]", a, b)
    return path, mine, theirs


class _Absent:
    def __repr__(self) -> str:
        return "absent"


_ABSENT = _Absent()


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else repr(value) if isinstance(value, _Absent) else json.dumps(value)
    return text if len(text) <= 60 else f"{text[:28]}…{text[-28:]}"
