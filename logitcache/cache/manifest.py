"""What a cache is (identity), how it came to be (provenance), and which blocks are whole (receipts)."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    field_validator,
    model_serializer,
    model_validator,
)

from logitcache.arrays import ArraySpec
from logitcache.digest import json_digest
from logitcache.errors import CorruptCache, NotACache, UnsupportedFormat, UsageError
from logitcache.strict_json import parse_json

FORMAT_VERSION = 2
"""Of new caches; those of format 1 stay in it. docs/design/0001-format.md says what differs."""
MANIFEST = "manifest.json"
RECEIPTS = "receipts.json"
"""All receipts in one file; written at sealing."""
CARD = "README.md"

MAX_MANIFEST_BYTES = 2**24
SEALING_BYTES = 2**16
"""Left free in the manifest of an open cache, for what sealing, copies and repairs add."""
MAX_RECEIPT_BYTES = 2**16
MAX_RECEIPTS_BYTES = 2**30
"""Of the gathered receipts, whatever the manifest claims; a million blocks need half of it."""
MAX_BLOCKS = 2**24
MAX_CHUNK_BYTES = 2**33
"""Of an array's chunk or of a fixed array, decompressed."""
DTYPES = ("uint8", "uint16", "uint32", "int8", "int64", "float16", "float32")

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
ArrayName = Annotated[str, Field(pattern=r"^[a-z][a-z_]{0,39}$")]


LOGITS = "logits"
"""The output that every cache has."""


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    left_out_if_empty: ClassVar[tuple[str, ...]] = ()
    """Fields that came later: where there is nothing to say, records, and what is hashed of them, are as before."""

    @model_serializer(mode="wrap")
    def _without_what_is_empty(self, dump_all: SerializerFunctionWrapHandler) -> dict[str, Any]:
        dumped: dict[str, Any] = dump_all(self)
        return {name: value for name, value in dumped.items() if value or name not in self.left_out_if_empty}


class Identity(_Record):
    """What makes two caches the same cache; the cache id is the SHA-256 of its canonical JSON."""

    left_out_if_empty = ("output_encodings", "output_sources")

    format_version: int = Field(ge=1)
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
    """Shape of each output for one sample: {"logits": [C], "features": [64, 7, 7]}."""
    class_names: list[str] | None
    output_encodings: dict[str, dict[str, Any]] = {}
    """Encoding of each output but the logits, which `encoding` is of; left out where there are none."""
    output_sources: dict[str, Any] = {}
    """Where in the teacher an output comes from, as far as anybody said; left out likewise."""

    @field_validator("transform")
    @classmethod
    def _as_a_plan_describes_it(cls, transform: Any) -> Any:
        """What every reader of it may rely on; the parts themselves are whatever somebody's transform says."""
        if transform is None:
            return None
        if not isinstance(transform, dict) or transform.keys() != {"shared", "mixing", "teacher_input"}:
            raise ValueError("it describes the shared part, the mixing and the teacher's input, and nothing else")
        mixing = transform["mixing"]
        if mixing is None:
            return transform
        if not isinstance(mixing, dict) or mixing.keys() != {"mixup", "cutmix", "probability"}:
            raise ValueError("mixing has the numbers mixup, cutmix and probability")
        for value in mixing.values():
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise ValueError(f"mixing has the numbers mixup, cutmix and probability, not {value!r:.40}")
        return transform

    @property
    def cache_id(self) -> Sha256:
        return json_digest(self.model_dump())

    def differences(self, other: Identity, *, mine: str = "in the cache", theirs: str = "here") -> list[str]:
        """The fields in which another identity differs, a line each: this one's value first, then the other's."""
        lines = []
        for name in type(self).model_fields:
            ours, others = getattr(self, name), getattr(other, name)
            if ours != others:
                path, ours, others = _first_difference(name, ours, others)
                lines.append(f"{path}: {_short(ours)} {mine}, {_short(others)} {theirs}")
        return lines


class PerCacheSpec(_Record):
    """An array that is stored once, in one chunk."""

    dtype: str
    shape: list[int] = Field(min_length=1, max_length=2)


class Layout(_Record):
    """Shape of the cache on disk. Views may be added; the rest is fixed when the cache is created."""

    num_samples: int = Field(ge=1, le=2**40)
    num_views: int = Field(ge=1, le=2**20)
    num_classes: int = Field(ge=2, le=2**24)
    rows_per_block: int = Field(ge=1, le=2**31)
    arrays: dict[ArrayName, ArraySpec]
    """What is stored for every row, by array name."""
    fixed: dict[ArrayName, PerCacheSpec]
    """What is stored once: the sample table, and what the encoding was fitted to."""
    first_view: int = Field(default=0, ge=0)
    """The views from here on are held: more than 0 in a copy that was made of some views only."""

    @property
    def views(self) -> range:
        """The views that are held."""
        return range(self.first_view, self.num_views)

    @model_validator(mode="after")
    def _within_bounds(self) -> Layout:
        """No shape that a reader could not hold: a manifest may come from a stranger."""
        if self.first_view >= self.num_views:
            raise ValueError(f"first_view is {self.first_view} of {self.num_views} views")
        if self.num_views * -(-self.num_samples // self.rows_per_block) > MAX_BLOCKS:
            raise ValueError(f"more than {MAX_BLOCKS} blocks")
        for name, spec in self.arrays.items():
            if len(spec.row_shape) > 1 or not 0 <= spec.level <= 22:
                raise ValueError(f"array {name} has no shape or level that logitcache writes: {spec}")
            _check_size(name, spec.dtype, (self.rows_per_block, *spec.row_shape))
        for name, fixed in self.fixed.items():
            _check_size(name, fixed.dtype, tuple(fixed.shape))
        if self.arrays.keys() & self.fixed.keys():
            raise ValueError(f"{sorted(self.arrays.keys() & self.fixed.keys())[0]} is stored both by row and once")
        return self


class Contents(_Record):
    """What the receipts of a sealed cache add up to, so that `info` need not read them."""

    left_out_if_empty = ("output_bytes",)

    bytes: int = Field(ge=0)
    """Of all stored objects."""
    label_bytes: int = Field(ge=0)
    """Of these, the labels alone, all outputs, without what is stored once."""
    rows: int = Field(ge=0)
    """Of labels: samples times views."""
    kl_mean: float | None = Field(default=None, allow_inf_nan=False)
    """KL(teacher ‖ decoded) of the logits at T = 1 over all rows, in nats."""
    output_bytes: dict[str, int] = {}
    """Of the labels, by output; left out where there are logits only."""


class Manifest(_Record):
    """`manifest.json`."""

    format: Literal["logitcache"] = "logitcache"
    id: Sha256
    identity: Identity
    layout: Layout
    state: Literal["open", "sealed"]
    digest: Sha256 | None
    """`digests.content_digest`; set at sealing."""
    provenance: dict[str, Any]
    """Host, time, versions, command: recorded, and no part of identity or digest."""
    receipts: Sha256 | None = None
    """SHA-256 of `receipts.json`; set at sealing."""
    contents: Contents | None = None
    """Set at sealing."""
    checksum: Sha256 | None = None
    """SHA-256 of the canonical JSON of all the above: against accidents, not against liars. Only ever on disk."""

    @model_validator(mode="after")
    def _has_a_name_for_each_class(self) -> Manifest:
        names = self.identity.class_names
        if names is not None and len(names) != self.layout.num_classes:
            raise ValueError(f"{len(names)} class names for {self.layout.num_classes} classes")
        return self


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
    kl_mean: float | None = Field(allow_inf_nan=False)
    """KL(teacher ‖ decoded) of the logits at T = 1 over the block's rows, in nats."""
    kl_max: float | None = Field(allow_inf_nan=False)
    inputs: dict[str, str]
    """Row -> digest of the teacher's input, for the view's proof rows in this block."""


def output_of(array: str) -> str:
    """The output that an array of rows belongs to: `features` for `features_values`, and else the logits."""
    return array.rpartition("_")[0] or LOGITS


def dump(record: BaseModel) -> bytes:
    """A record as readable JSON."""
    return (json.dumps(record.model_dump(), indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode()


def dump_manifest(manifest: Manifest) -> bytes:
    """A manifest as readable JSON, with its checksum.

    Raises:
        UsageError: it would be longer than what is read, or hold text that is no Unicode.
    """
    try:
        data = dump(manifest.model_copy(update={"checksum": _checksum(manifest.model_dump(mode="json"))}))
    except UnicodeEncodeError as error:
        raise UsageError(f"the cache's {MANIFEST} can't hold {error.object[error.start]!r}: {error.reason}") from None
    check_length(len(data), sealed=manifest.state == "sealed")
    return data


def check_length(length: int, *, sealed: bool) -> None:
    """Refuse to write a manifest of so many bytes, if nobody could read it.

    Raises:
        UsageError: says how long it is, and what may be shortened.
    """
    limit = MAX_MANIFEST_BYTES - (0 if sealed else SEALING_BYTES)
    if length > limit:
        raise UsageError(
            f"the cache's {MANIFEST} would take {length:,} bytes; at most {limit:,} can be read. Shorten "
            "`class_names`, or leave them out; else shorten the card, or the description of the transform"
        )


def _checksum(raw: Mapping[str, Any]) -> str:
    """Over the keys that are there: a manifest from before a key was added keeps its checksum."""
    return json_digest({key: value for key, value in raw.items() if key != "checksum"})


def read_manifest(data: bytes | None, *, url: str) -> Manifest:
    """A manifest from its bytes.

    Raises:
        NotACache: no manifest, or the manifest of something else.
        UnsupportedFormat: written by a newer version.
        CorruptCache: a manifest that contradicts itself.
    """
    if data is None:
        raise NotACache(
            f"{url} is no logit cache: it has no {MANIFEST}. Is it the right place? `logitcache ls` shows "
            "what caches lie somewhere, `logitcache cache-teacher` builds one"
        )
    try:
        raw = parse_json(data, max_bytes=MAX_MANIFEST_BYTES)
        is_ours = isinstance(raw, dict) and raw.get("format") == "logitcache"
    except ValueError as error:
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
        raise CorruptCache(f"{url}: {MANIFEST} is damaged: {_reason(error)}") from None
    if manifest.identity.cache_id != manifest.id:
        raise CorruptCache(
            f"{url}: {MANIFEST} is damaged: its identity hashes to {manifest.identity.cache_id[:12]}…, "
            f"but it says {manifest.id[:12]}…"
        )
    if manifest.checksum != _checksum(raw):
        raise CorruptCache(f"{url}: {MANIFEST} is damaged: it does not have the checksum that it states")
    if not data.endswith(b"\n"):
        raise CorruptCache(f"{url}: {MANIFEST} is damaged: its last newline is missing")
    return manifest.model_copy(update={"checksum": None})


def read_receipt(data: bytes, *, key: str) -> Receipt:
    """A receipt from its bytes.

    Raises:
        CorruptCache: bytes that are no receipt.
    """
    try:
        return Receipt.model_validate(parse_json(data, max_bytes=MAX_RECEIPT_BYTES))
    except ValueError as error:
        raise CorruptCache(f"{key} is damaged: {_reason(error)}") from None


def receipts_limit(layout: Layout) -> int:
    """Bytes that the gathered receipts of a cache may take, about twice what logitcache writes.

    A receipt states 235 bytes for each of its arrays at most, and 700 besides where it has all proof rows of a view.
    """
    num_receipts = 1 + len(layout.views) * -(-layout.num_samples // layout.rows_per_block)
    num_arrays = max(len(layout.arrays), len(layout.fixed))
    return min((num_receipts + 16) * (1024 + 384 * num_arrays), MAX_RECEIPTS_BYTES)


def read_receipts(data: bytes, *, url: str) -> dict[str, Receipt]:
    """The gathered receipts by name, from the bytes of `receipts.json`.

    Raises:
        CorruptCache: bytes that are no receipts.
    """
    try:
        raw = parse_json(data, max_bytes=MAX_RECEIPTS_BYTES)
        if not isinstance(raw, dict):
            raise ValueError("no JSON object")
        return {name: Receipt.model_validate(receipt) for name, receipt in raw.items()}
    except ValueError as error:
        raise CorruptCache(f"{url}: {RECEIPTS} is damaged: {_reason(error)}") from None


def _check_size(name: str, dtype: str, shape: tuple[int, ...]) -> None:
    if dtype not in DTYPES:
        raise ValueError(f"array {name} has dtype {dtype!r}; expected one of {', '.join(DTYPES)}")
    if min(shape) < 0 or math.prod(shape) * np.dtype(dtype).itemsize > MAX_CHUNK_BYTES:
        raise ValueError(f"array {name} has chunks of shape {shape}, more than {MAX_CHUNK_BYTES} bytes")


def _reason(error: ValueError) -> str:
    if not isinstance(error, ValidationError):
        return str(error)
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
