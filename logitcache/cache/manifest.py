"""Schema of the manifest (identity, layout, provenance) and of receipts, and their bytes."""

from __future__ import annotations

import dataclasses
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
    field_serializer,
    field_validator,
    model_serializer,
    model_validator,
)

from logitcache.arrays import ArraySpec
from logitcache.digest import PENDING, json_digest
from logitcache.errors import CorruptCache, NotACache, UnsupportedFormat, UsageError
from logitcache.strict_json import parse_json

FORMAT_VERSION = 2
"""Of new caches. Caches of format 1 keep it; docs/format.md lists the differences."""
MANIFEST = "manifest.json"
RECEIPTS = "receipts.json"
"""All receipts in one file, or the index of the views' receipts; written at sealing."""
CARD = "README.md"

MAX_MANIFEST_BYTES = 2**24
SEALING_BYTES = 2**16
"""Reserved in the manifest of an open cache for what sealing, copies and repairs add."""
MAX_RECEIPT_BYTES = 2**16
MAX_RECEIPTS_BYTES = 2**30
"""Of `receipts.json`, whatever the manifest claims; a million blocks need half of it."""
MAX_BLOCKS = 2**24
MAX_CHUNK_BYTES = 2**33
"""Of a decompressed chunk."""
DTYPES = ("uint8", "uint16", "uint32", "int8", "int32", "int64", "float16", "float32")

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
ArrayName = Annotated[str, Field(pattern=r"^[a-z][a-z_]{0,39}$")]

TemperedKL = dict[Annotated[str, Field(pattern="^[24]$")], Annotated[float, Field(ge=0, allow_inf_nan=False)]]
"""Divergences in nats, by temperature."""

ROW_OFFSETS = "row_offsets"
"""Per-cache array: the first row of each sample, and the number of rows at the end."""
ROW_POSITIONS = "row_positions"
"""Per-cache array: the position of each row in its sample."""

SAMPLE_CONTENTS = "sample_contents"
"""Per-cache array: the digest of each sample's content."""

LOGITS = "logits"
"""Name of the output of the teacher's logits."""
NO_LOGITS = "nologits"
"""Name of the encoding of a cache that stores only other outputs."""


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    left_out_if_empty: ClassVar[tuple[str, ...]] = ()
    """Fields of later versions, left out when empty so that older records keep their bytes and hashes."""

    @model_serializer(mode="wrap")
    def _dump_without_empty_fields(self, dump_all: SerializerFunctionWrapHandler) -> dict[str, Any]:
        dumped: dict[str, Any] = dump_all(self)
        return {name: value for name, value in dumped.items() if value or name not in self.left_out_if_empty}


class Identity(_Record):
    """What defines a cache; the cache id is the SHA-256 of its canonical JSON."""

    left_out_if_empty = ("output_encodings", "output_sources", "rows", "tokenization")

    format_version: int = Field(ge=1)
    dataset: str
    """Fingerprint of ordered keys, targets and contents, or the name given to `create`."""
    teacher: str
    """Fingerprint of entry point and weights, or the name given to `create`."""
    precision: str
    transform: Any
    """`ViewPlan.describe()`: the shared part, mixing, and the teacher's own part."""
    view_seed: int
    encoding: dict[str, Any]
    outputs: dict[str, list[int]]
    """Shape of each output for one sample: {"logits": [C], "features": [64, 7, 7]}."""
    class_names: list[str] | None
    output_encodings: dict[str, dict[str, Any]] = {}
    """Encoding of each extra output, by name; `encoding` is that of the logits."""
    output_sources: dict[str, Any] = {}
    """Which module of the teacher an output comes from, where it is known."""
    rows: Sha256 | None = None
    """`RowMap.fingerprint`: how many rows each sample has, and where; None with one row per sample."""
    tokenization: dict[str, Any] = {}
    """How text becomes tokens: hash of the tokenizer, truncation, chat template; empty for other data."""

    @field_validator("transform")
    @classmethod
    def _has_the_form_of_a_plan(cls, transform: Any) -> Any:
        """Check the keys and the mixing; the transforms themselves have no fixed form."""
        if transform is None:
            return None
        if not isinstance(transform, dict) or transform.keys() != {"shared", "mixing", "teacher_input"}:
            raise ValueError("expected exactly the keys shared, mixing and teacher_input")
        mixing = transform["mixing"]
        if mixing is None:
            return transform
        if not isinstance(mixing, dict) or mixing.keys() != {"mixup", "cutmix", "probability"}:
            raise ValueError("mixing: expected exactly the numbers mixup, cutmix and probability")
        for value in mixing.values():
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise ValueError(f"mixing: expected the numbers mixup, cutmix and probability, not {value!r:.40}")
        return transform

    @property
    def has_logits(self) -> bool:
        """Whether logits are stored, and not only other outputs."""
        return self.encoding.get("name") != NO_LOGITS

    @property
    def cache_id(self) -> Sha256:
        return json_digest(self.model_dump())

    def differences(self, other: Identity, *, mine: str = "in the cache", theirs: str = "here") -> list[str]:
        """The fields that differ from another identity, one line each: this value first, then the other."""
        lines = []
        for name in type(self).model_fields:
            ours, others = getattr(self, name), getattr(other, name)
            if name == "tokenization":
                # All of its entries: the first one by name may follow from another, such as the tokenizer.
                keys = sorted(ours.keys() | others.keys(), key=lambda key: (key != "sha256", key))
                pairs = [(f"{name}.{key}", ours.get(key, _ABSENT), others.get(key, _ABSENT)) for key in keys]
            else:
                pairs = [(name, ours, others)]
            for path, a, b in pairs:
                if a != b:
                    path, a, b = _first_difference(path, a, b)
                    known = next((words for field, words in FIELDS_IN_WORDS.items() if path.startswith(field)), None)
                    lines.append(f"{path}{f' ({known})' if known else ''}: {_short(a)} {mine}, {_short(b)} {theirs}")
        return lines


FIELDS_IN_WORDS = {
    "tokenization.sha256": "the tokenizer",
    "rows": "hash of the rows of all samples",
    "transform.teacher_input": "`preprocess` of the plan, `teacher.input` of a pipeline",
}
"""What fields of an identity are, where their names do not tell."""


class PerCacheSpec(_Record):
    """A per-cache array: stored once, in one chunk."""

    dtype: str
    shape: list[int] = Field(min_length=1, max_length=2)


class Layout(_Record):
    """Shape of the cache on disk. Views may be added later; everything else is set at creation."""

    left_out_if_empty = ("sequence_rows", "sequence_blocks")

    num_samples: int = Field(ge=1, le=2**40)
    num_views: int = Field(ge=1, le=2**20)
    num_classes: int = Field(ge=2, le=2**24)
    rows_per_block: int = Field(ge=1, le=2**31)
    arrays: dict[ArrayName, ArraySpec]
    """Arrays with an entry for every row, by name."""
    fixed: dict[ArrayName, PerCacheSpec]
    """Per-cache arrays, by name: the sample table, and the arrays that the encoding was fitted to."""
    first_view: int = Field(default=0, ge=0)
    """First view that is stored; above 0 in a copy of some views."""
    sequence_rows: int | None = Field(default=None, ge=1, le=2**40)
    """Rows of a view, if samples have any number of rows; None with one row per sample."""
    sequence_blocks: int | None = Field(default=None, ge=1)
    """Blocks of a view, if samples have any number of rows."""

    @field_serializer("arrays")
    def _dump_arrays(self, arrays: dict[str, ArraySpec]) -> dict[str, dict[str, Any]]:
        """Without `by_row` where it is false, so that older manifests keep their bytes."""
        dumped = {name: dataclasses.asdict(spec) for name, spec in arrays.items()}
        return {name: {k: v for k, v in each.items() if v or k != "by_row"} for name, each in dumped.items()}

    @property
    def num_rows(self) -> int:
        """Rows of a view."""
        return self.num_samples if self.sequence_rows is None else self.sequence_rows

    @property
    def blocks_per_view(self) -> int:
        """Blocks of a view."""
        if self.sequence_blocks is not None:
            return self.sequence_blocks
        return -(-self.num_samples // self.rows_per_block)

    @property
    def stored_rows(self) -> int:
        """Rows of a view in the Zarr arrays: those of sequences have unused rows at the end of each block."""
        return self.num_rows if self.sequence_rows is None else self.blocks_per_view * self.rows_per_block

    @property
    def views(self) -> range:
        """The views that are stored."""
        return range(self.first_view, self.num_views)

    @model_validator(mode="after")
    def _within_bounds(self) -> Layout:
        """Limit memory and work: the manifest may be hostile."""
        if self.first_view >= self.num_views:
            raise ValueError(f"first_view is {self.first_view} of {self.num_views} views")
        if (self.sequence_rows is None) != (self.sequence_blocks is None):
            raise ValueError("sequence_rows and sequence_blocks are given together")
        if not self.blocks_per_view <= self.num_rows <= self.blocks_per_view * self.rows_per_block:
            raise ValueError(f"{self.num_rows} rows in {self.blocks_per_view} blocks of up to {self.rows_per_block}")
        self._check_row_arrays()
        if self.num_views * self.blocks_per_view > MAX_BLOCKS:
            raise ValueError(f"more than {MAX_BLOCKS} blocks")
        for name, spec in self.arrays.items():
            if len(spec.row_shape) > 1 or not 0 <= spec.level <= 22:
                raise ValueError(f"array {name} has an unsupported shape or level: {spec}")
            _check_size(name, spec.dtype, (self.rows_per_block, *spec.row_shape))
        for name, once in self.fixed.items():
            _check_size(name, once.dtype, tuple(once.shape))
        if self.arrays.keys() & self.fixed.keys():
            raise ValueError(f"{min(self.arrays.keys() & self.fixed.keys())} is both in `arrays` and in `fixed`")
        return self

    def _check_row_arrays(self) -> None:
        expected = {}
        if self.sequence_rows is not None:
            expected = {ROW_OFFSETS: PerCacheSpec(dtype="int64", shape=[self.num_samples + 1])}
            if ROW_POSITIONS in self.fixed:
                expected[ROW_POSITIONS] = PerCacheSpec(dtype="int32", shape=[self.sequence_rows])
        found = {name: self.fixed[name] for name in (ROW_OFFSETS, ROW_POSITIONS) if name in self.fixed}
        if found != expected:
            raise ValueError(f"the arrays of rows are {found}; expected {expected}")


class Contents(_Record):
    """Sums over the receipts of a sealed cache, so that `info` doesn't need to read them."""

    left_out_if_empty = ("output_bytes", "kl_at")

    bytes: int = Field(ge=0)
    """Of all stored objects."""
    label_bytes: int = Field(ge=0)
    """Of the labels of all outputs, without the per-cache arrays."""
    rows: int = Field(ge=0)
    """Rows of labels, in all views."""
    kl_mean: float | None = Field(default=None, allow_inf_nan=False)
    """KL(teacher ‖ decoded) of the logits at T = 1 over all rows, in nats."""
    kl_at: TemperedKL = {}
    """The same at higher temperatures, over some rows."""
    output_bytes: dict[str, int] = {}
    """Of the labels, by output; empty where there are only logits."""


class Manifest(_Record):
    """`manifest.json`."""

    left_out_if_empty = ("receipts_by_view",)

    format: Literal["logitcache"] = "logitcache"
    id: Sha256
    identity: Identity
    layout: Layout
    state: Literal["open", "sealed"]
    digest: Sha256 | None
    """`Records.content_digest`; set at sealing."""
    provenance: dict[str, Any]
    """Host, time, versions, command; not part of identity or digest."""
    receipts: Sha256 | None = None
    """SHA-256 of `receipts.json`; set at sealing."""
    receipts_by_view: bool = False
    """Whether `receipts.json` is an index, and each view's receipts are one object; set at sealing."""
    contents: Contents | None = None
    """Set at sealing."""
    checksum: Sha256 | None = None
    """SHA-256 of the canonical JSON of all other fields; detects damage, not forgery. Only set on disk."""

    @property
    def contents_pending(self) -> bool:
        """Whether digests of the samples are still being taken, so that the id is provisional."""
        pending = self.identity.dataset.startswith(PENDING) and "sample_targets" in self.layout.fixed
        return pending and self.state == "open" and SAMPLE_CONTENTS not in self.layout.fixed

    @model_validator(mode="after")
    def _has_a_name_for_each_class(self) -> Manifest:
        names = self.identity.class_names
        if names is not None and len(names) != self.layout.num_classes:
            raise ValueError(f"{len(names)} class names for {self.layout.num_classes} classes")
        return self


class StoredObject(_Record):
    """One object of a receipt: a chunk of one array."""

    bytes: int = Field(ge=0)
    sha256: Sha256
    """Of the stored bytes; detects damage in transport and on disk."""
    values_sha256: Sha256
    """Of the decoded values; independent of the compressor's version."""


class Receipt(_Record):
    """States that a block is complete; written after its objects."""

    left_out_if_empty = ("kl_at",)

    rows: int = Field(ge=0)
    objects: dict[str, StoredObject]
    """By array name."""
    kl_mean: float | None = Field(allow_inf_nan=False)
    """KL(teacher ‖ decoded) of the logits at T = 1 over the block's rows, in nats."""
    kl_max: float | None = Field(allow_inf_nan=False)
    kl_at: TemperedKL = {}
    """KL(teacher ‖ decoded) at higher temperatures, without the factor T², over some of the block's rows."""
    inputs: dict[str, str]
    """Digest of the teacher's input, by row, for the view's proof rows in this block."""


class ViewEntry(_Record):
    """What the index states of one view, so that totals and digest need no other object."""

    left_out_if_empty = ("kl_at",)

    object: StoredObject
    """The view's receipts as one object; the hash of its values is the view's digest."""
    rows: int = Field(ge=0)
    output_bytes: dict[str, Annotated[int, Field(ge=0)]]
    """Of the labels, by output."""
    measured_rows: int = Field(ge=0)
    """Rows of the blocks that state a mean KL."""
    measured_blocks: int = Field(ge=0)
    """Blocks that state a largest KL."""
    kl_mean: float | None = Field(allow_inf_nan=False)
    """Over the measured rows."""
    kl_max: float | None = Field(allow_inf_nan=False)
    kl_at: TemperedKL = {}
    """Of the receipts, weighted by the rows of their blocks."""


class ReceiptIndex(_Record):
    """`receipts.json` of a cache with very many receipts."""

    fixed: Receipt
    """Of the per-cache arrays."""
    views: dict[Annotated[str, Field(pattern=r"^v[0-9]{5,8}$")], ViewEntry]
    """By name, such as "v00003"."""


def output_of(array: str) -> str:
    """The output that an array belongs to: `features` for `features_values`, `logits` for names without prefix."""
    return array.rpartition("_")[0] or LOGITS


def dump(record: BaseModel) -> bytes:
    """A record as readable JSON."""
    return (json.dumps(record.model_dump(), indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode()


def dump_manifest(manifest: Manifest) -> bytes:
    """A manifest as readable JSON, with its checksum.

    Raises:
        UsageError: it would exceed the limit for reading, or contain text that is not Unicode.
    """
    try:
        data = dump(manifest.model_copy(update={"checksum": _checksum(manifest.model_dump(mode="json"))}))
    except UnicodeEncodeError as error:
        raise UsageError(f"the cache's {MANIFEST} can't store {error.object[error.start]!r}: {error.reason}") from None
    check_length(len(data), sealed=manifest.state == "sealed")
    return data


def check_length(length: int, *, sealed: bool) -> None:
    """Refuse to write a manifest that is too long to be read.

    Raises:
        UsageError: it is too long.
    """
    limit = MAX_MANIFEST_BYTES - (0 if sealed else SEALING_BYTES)
    if length > limit:
        raise UsageError(
            f"the cache's {MANIFEST} would have {length:,} bytes; the limit is {limit:,}. Shorten or leave out "
            "`class_names`, the card or the description of the transform"
        )


def _checksum(raw: Mapping[str, Any]) -> str:
    """Covers the keys that are present: manifests of earlier versions keep their checksum."""
    return json_digest({key: value for key, value in raw.items() if key != "checksum"})


def read_manifest(data: bytes | None, *, url: str) -> Manifest:
    """A manifest from its bytes.

    Raises:
        NotACache: no manifest, or not one of a cache.
        UnsupportedFormat: the cache was written by a newer version.
        CorruptCache: the manifest is damaged.
    """
    if data is None and url.endswith(f"/{MANIFEST}"):
        raise NotACache(
            f"{url!r} is not a logit cache; expected the folder that it is in, {url.removesuffix(f'/{MANIFEST}')!r}"
        )
    if data is None:
        raise NotACache(
            f"{url!r} is not a logit cache: it has no {MANIFEST}. Check the path: `logitcache ls FOLDER` lists the "
            "caches in a folder. `logitcache cache-teacher` builds a cache"
        )
    try:
        raw = parse_json(data, max_bytes=MAX_MANIFEST_BYTES)
        is_ours = isinstance(raw, dict) and raw.get("format") == "logitcache"
    except ValueError as error:
        raise NotACache(f"{url!r} is not a logit cache: its {MANIFEST} is not JSON ({error})") from None
    if not is_ours:
        raise NotACache(f"{url!r} is not a logit cache: its {MANIFEST} was not written by logitcache")
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
            f"but it states {manifest.id[:12]}…"
        )
    if manifest.checksum != _checksum(raw):
        raise CorruptCache(f"{url}: {MANIFEST} is damaged: its checksum is wrong")
    if not data.endswith(b"\n"):
        raise CorruptCache(f"{url}: {MANIFEST} is damaged: its last newline is missing")
    return manifest.model_copy(update={"checksum": None})


def read_receipt(data: bytes, *, key: str) -> Receipt:
    """A receipt from its bytes.

    Raises:
        CorruptCache: the receipt is damaged.
    """
    try:
        return Receipt.model_validate(parse_json(data, max_bytes=MAX_RECEIPT_BYTES))
    except ValueError as error:
        raise CorruptCache(f"{key} is damaged: {_reason(error)}") from None


def receipts_limit(layout: Layout) -> int:
    """The most bytes that the receipts of a cache may have in one file, about twice what logitcache writes.

    A receipt takes at most 235 bytes for each of its arrays, and 700 more with all proof rows of a view.
    """
    return _limit(layout, 1 + len(layout.views) * layout.blocks_per_view)


def view_receipts_limit(layout: Layout) -> int:
    """The most bytes that the object with the receipts of one view may have."""
    return _limit(layout, layout.blocks_per_view)


def index_limit(layout: Layout) -> int:
    """The most bytes that a `receipts.json` may have that is an index; an entry is no longer than a receipt."""
    return _limit(layout, 1 + len(layout.views))


def _limit(layout: Layout, num_receipts: int) -> int:
    num_arrays = max(len(layout.arrays), len(layout.fixed))
    return min((num_receipts + 16) * (1024 + 384 * num_arrays), MAX_RECEIPTS_BYTES)


def max_blocks_per_view(layout: Layout) -> int:
    """The most blocks of one view of a new cache: their receipts are one object of at most `MAX_RECEIPTS_BYTES`.

    A receipt with its name takes at most 235 bytes for each array and 300 for the rest, without the few proof rows.
    """
    return MAX_RECEIPTS_BYTES // (300 + 235 * len(layout.arrays))


def read_receipts(data: bytes | memoryview, *, url: str, key: str = RECEIPTS) -> dict[str, Receipt]:
    """Receipts by name, from the bytes of an object that holds those of a view or of a cache.

    Raises:
        CorruptCache: the object is damaged.
    """
    found = read_receipts_or_index(data, url=url, key=key)
    if isinstance(found, ReceiptIndex):
        raise CorruptCache(f"{url}: {key} is damaged: it is an index of views; expected receipts")
    return found


def read_receipts_or_index(
    data: bytes | memoryview, *, url: str, key: str = RECEIPTS
) -> dict[str, Receipt] | ReceiptIndex:
    """The content of `receipts.json`: receipts by name, or the index of the views' receipts.

    Raises:
        CorruptCache: the file is damaged.
    """
    try:
        raw = parse_json(bytes(data), max_bytes=MAX_RECEIPTS_BYTES)
        if not isinstance(raw, dict):
            raise ValueError("expected a JSON object")
        if "views" in raw:
            return ReceiptIndex.model_validate(raw)
        return {name: Receipt.model_validate(receipt) for name, receipt in raw.items()}
    except ValueError as error:
        raise CorruptCache(f"{url}: {key} is damaged: {_reason(error)}") from None


def _check_size(name: str, dtype: str, shape: tuple[int, ...]) -> None:
    if dtype not in DTYPES:
        raise ValueError(f"array {name} has dtype {dtype!r}; expected one of {', '.join(DTYPES)}")
    if min(shape) < 0 or math.prod(shape) * np.dtype(dtype).itemsize > MAX_CHUNK_BYTES:
        raise ValueError(f"array {name} has chunks of shape {shape}, above the limit of {MAX_CHUNK_BYTES} bytes")


def _reason(error: ValueError) -> str:
    if not isinstance(error, ValidationError):
        return str(error)
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"


def _first_difference(path: str, mine: Any, theirs: Any) -> tuple[str, Any, Any]:
    """The path and the values of the first difference between two JSON values; of two names before all else."""
    if isinstance(mine, dict) and isinstance(theirs, dict):
        for key in sorted(mine.keys() | theirs.keys(), key=lambda key: (key != "name", key)):
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
