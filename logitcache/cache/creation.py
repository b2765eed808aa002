"""Create a cache: its identity, its encoding and its manifest, before any logit is written."""

from __future__ import annotations

import functools
import json
import os
import platform
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any, TypeAlias

import numpy as np
from pydantic import ValidationError
from torch import Tensor

from logitcache.cache.card import write_card
from logitcache.cache.card_fields import Card, card_from
from logitcache.cache.contents import settled_samples
from logitcache.cache.destination import check_destination
from logitcache.cache.fidelity import Calibration, candidates, choose, compare
from logitcache.cache.layout import GROUP, PER_CACHE, receipt_key, view_number
from logitcache.cache.manifest import (
    CARD,
    FORMAT_VERSION,
    LOGITS,
    MANIFEST,
    MAX_MANIFEST_BYTES,
    RECEIPTS,
    ROW_OFFSETS,
    ROW_POSITIONS,
    SAMPLE_CONTENTS,
    Identity,
    Layout,
    Manifest,
    PerCacheSpec,
    check_length,
    dump,
    dump_manifest,
    max_blocks_per_view,
    read_manifest,
    read_receipts_or_index,
    receipts_limit,
)
from logitcache.cache.names import NAMES, stated_names
from logitcache.cache.objects import ObjectReader
from logitcache.cache.outputs import Output, checked_outputs, output_layouts, row_arrays
from logitcache.cache.packages import ENCODING_PACKAGES
from logitcache.cache.per_cache import stored_encoding
from logitcache.cache.receipts import by_view
from logitcache.cache.records import Records
from logitcache.cache.stored_records import collect_receipts, stored_manifest
from logitcache.cache.writer import CacheWriter
from logitcache.data.rows import RowMap, make_row_map
from logitcache.data.samples import SampleTable, SeenContents
from logitcache.data.views import ViewPlan
from logitcache.digest import canonical_json
from logitcache.encodings import ENCODINGS, Auto, Dense, Encoding, NoLogits, encoding_or_auto
from logitcache.encodings.protocol import float_tensor
from logitcache.errors import CorruptCache, IdentityMismatch, InvalidLogits, NotACache, UsageError
from logitcache.progress import track
from logitcache.storage import Storage, open_storage
from logitcache.storage.claims import CLAIMS

Json: TypeAlias = "str | int | float | bool | Sequence[Json] | Mapping[str, Json] | None"
"""A value that can be written as JSON."""
Logits: TypeAlias = Tensor | np.ndarray | Sequence[Sequence[float]]
"""Logits (M, C): a tensor, an array or lists."""
STATED_CLASSES = 2
"""Classes in the manifest of a cache that has none: every reader expects some."""


def create(
    path: str | os.PathLike[str],
    *,
    num_samples: int,
    num_classes: int,
    num_views: int = 1,
    encoding: Encoding | Auto | str | Mapping[str, Json] = "dense",
    outputs: Mapping[str, Output | Mapping[str, object]] | None = None,
    logits_source: Json = None,
    calibration: Calibration | Logits | Callable[[], Calibration | Logits] | None = None,
    teacher: str,
    dataset: str | None = None,
    teacher_name: str | None = None,
    dataset_name: str | None = None,
    samples: SampleTable | None = None,
    view_plan: ViewPlan | None = None,
    precision: str = "float32",
    class_names: Sequence[str] | None = None,
    rows_per_sample: Sequence[int] | np.ndarray | None = None,
    row_positions: np.ndarray | Sequence[Sequence[int] | np.ndarray] | None = None,
    tokenization: Mapping[str, Json] | None = None,
    rows_per_block: int | None = None,
    card: Card | Mapping[str, Json] | None = None,
    notes: Mapping[str, Json] | None = None,
    overwrite: bool = False,
) -> CacheWriter:
    """Open a cache for writing: a new one, or an existing one of the same identity, to complete it or to add views.

    Args:
        path: a directory or URL.
        num_samples, num_classes, num_views: the shape; `num_views` may exceed an existing cache's. With num_classes=0,
            or the encoding `NoLogits`, only `outputs` are stored, and no logits.
        encoding: such as `TopK(k=20)`; "auto", `Auto(max_kl=...)` or `Auto(max_bytes=...)` to choose one by
            its KL or its size.
        outputs: further outputs of the teacher to store, by name, such as {"features": Output(shape=(64, 7, 7))}.
        logits_source: where in the teacher the logits come from, if not from its forward pass; part of the identity.
        calibration: logits (M, C), a `Calibration`, or a function that returns one; required by encodings that must be
            fitted and by "auto". Used only if the cache is new. An output with an encoding that must be fitted needs a
            `Calibration` with rows of this output, or an encoding that was fitted before: `Components().fit(rows)`.
        teacher: identity of the teacher: a name, best with a version or hash, such as "convnext_large@3f9c".
        dataset: identity of the dataset: a name. Pass either `dataset` or `samples`.
        teacher_name, dataset_name: readable names, for listings, cards and reports; not part of the identity, so they
            can be changed later. By default `teacher` up to its "@", and `dataset`.
        samples: keys, targets and content digests; their fingerprint is the identity of the dataset. Without content
            digests, `view_plan.contents` must be a `SeenContents`, with which a `ViewDataset` takes them when it loads
            the samples. The cache's id is then provisional until it is sealed.
        view_plan: how the views are made; without one the cache has no `view_plan`.
        precision: arithmetic of the teacher, such as "bfloat16".
        class_names: one for each class.
        rows_per_sample: int (N,), the number of rows of each sample: of a sequence, one for each token that the teacher
            predicts, `len(ids) - 1` for a causal language model. Rows are numbered without gaps, sample after sample.
            None is one row per sample.
        row_positions: where in its sample each row lies, if only some positions have a row: int (R,), or one increasing
            sequence for each sample. None is 0, 1, 2, …
        tokenization: how text becomes tokens, as JSON: the tokenizer's hash, truncation, chat template; part of the
            identity.
        rows_per_block: the most rows of one commit, default 16 384; fixed once the cache exists. A block holds whole
            samples.
        card: fields of the cache's README.md, such as {"license": "cc-by-4.0"}. Can be changed later; None keeps those
            of an existing cache.
        notes: JSON that is added to the provenance of a new cache; not part of its identity.
        overwrite: first delete the cache at the path, if there is one. Never deletes anything else.

    Raises:
        UsageError: an impossible shape, encoding or output, or a missing calibration.
        ShapeError: `rows_per_sample` or `row_positions` don't have one entry for each sample.
        NotACache: the path holds something else.
        IdentityMismatch: the path holds a cache of another identity; names the fields that differ.
    """
    if (dataset is None) == (samples is None):
        raise UsageError(
            "create needs the identity of the dataset: pass either `dataset` (a name) or `samples` (a table)"
        )
    if samples is not None and samples.num_samples != num_samples:
        raise UsageError(f"num_samples is {num_samples}, but the sample table has {samples.num_samples}")
    contents = None if view_plan is None else view_plan.contents
    seen = contents if samples is not None and samples.contents is None and isinstance(contents, SeenContents) else None
    if samples is not None:
        dataset = samples.fingerprint() if seen is None else samples.pending_fingerprint()
    origin = Origin(
        dataset=str(dataset),
        teacher=teacher,
        precision=precision,
        transform=None if view_plan is None else view_plan.describe(),
        view_seed=0 if view_plan is None else view_plan.seed,
        class_names=class_names,
        tokenization=tokenization or {},
    )
    if num_classes == 0:
        encoding, num_classes = _no_logits(encoding, class_names), STATED_CLASSES
    _check_shape(num_samples, num_views, num_classes, rows_per_block)
    if rows_per_sample is not None and view_plan is not None and view_plan.mixes_samples:
        raise UsageError("mixup and CutMix mix samples of one class each; remove them, or rows_per_sample")
    writer = open_writer(
        path,
        origin,
        rows=make_row_map(num_samples, rows_per_sample, row_positions, rows_per_block=rows_per_block),
        num_classes=num_classes,
        num_views=num_views,
        encoding=encoding,
        outputs=outputs,
        logits_source=logits_source,
        calibration=calibration,
        samples=samples,
        seen=seen,
        card=card,
        names={"teacher": teacher_name, "dataset": dataset_name},
        notes=notes,
        overwrite=overwrite,
    )
    if view_plan is not None:
        view_plan.extend_limit(writer.layout.views)
    return writer


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where logits come from: the identity of a cache without the shape and encoding of its outputs."""

    dataset: str
    teacher: str
    precision: str
    transform: Any
    """`ViewPlan.describe()`; None without a view plan."""
    view_seed: int
    class_names: Sequence[str] | None
    tokenization: Mapping[str, Json] = field(default_factory=dict)


def _no_logits(encoding: Encoding | Auto | str | Mapping[str, Json], class_names: Sequence[str] | None) -> NoLogits:
    """The encoding of a cache without classes.

    Raises:
        UsageError: another encoding, or class names.
    """
    requested = encoding_or_auto(encoding)
    if not isinstance(requested, NoLogits) and encoding != "dense":
        raise UsageError(f"num_classes=0 is a cache without logits; leave out encoding={requested!r}")
    if class_names is not None:
        raise UsageError("num_classes=0 is a cache without logits; leave out class_names")
    return NoLogits()


def _check_shape(num_samples: int, num_views: int, num_classes: int, rows_per_block: int | None) -> None:
    if num_classes < 2 or num_samples < 1 or num_views < 1:
        raise UsageError(
            f"a cache has at least 1 sample, 1 view and 2 classes, or 0 classes without logits; found {num_samples}, "
            f"{num_views}, {num_classes}"
        )
    if rows_per_block is not None and rows_per_block < 1:
        raise UsageError(f"rows_per_block is at least 1, not {rows_per_block}")


def open_writer(
    path: str | os.PathLike[str],
    origin: Origin,
    *,
    rows: RowMap,
    num_classes: int,
    num_views: int,
    encoding: Encoding | Auto | str | Mapping[str, Json],
    outputs: Mapping[str, Output | Mapping[str, object]] | None = None,
    logits_source: Json = None,
    calibration: Calibration | Logits | Callable[[], Calibration | Logits] | None = None,
    samples: SampleTable | None = None,
    seen: SeenContents | None = None,
    card: Card | Mapping[str, Json] | None = None,
    names: Mapping[str, str | None] | None = None,
    notes: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> CacheWriter:
    """Like `create`, with the origin as one object; `notes` are added to the provenance of a new cache.

    Args: as of `create`. `seen` takes the digests of `samples`, if these have no contents.

    Raises:
        UsageError, NotACache, IdentityMismatch: as `create` does.
    """
    _check_class_names(origin.class_names, num_classes)
    changeable = {} if card is None else {"card": card_from(card).stated()}
    if names is not None and any(names.values()):
        changeable[NAMES] = {kind: name for kind, name in names.items() if name}
    others = checked_outputs(outputs or {})
    requested = encoding_or_auto(encoding)
    if isinstance(requested, NoLogits) and not others:
        raise UsageError("a cache without logits needs `outputs`, such as {'features': Output(shape=(384,))}")
    # Reject impossible caches before any computation.
    if isinstance(requested, Encoding):
        requested.arrays(num_classes)
    preliminary = requested if isinstance(requested, Encoding) else Dense()
    notes = dict(notes or {}) | changeable
    lines = dump(make_identity(origin, preliminary, num_classes, others, logits_source, rows)).splitlines()
    # In the manifest each line is indented by one more space.
    check_length(sum(map(len, lines)) + 2 * len(lines) + len(json.dumps(notes)), sealed=False)
    storage = open_storage(path)
    replaced = _keys_to_replace(storage) if overwrite else []
    stored = None if replaced else _stored(storage)
    if stored is not None:
        settled = _encoding_of(storage, stored, requested)
        others = _outputs_of(storage, stored, others)
    else:
        sample = functools.cache(lambda: _calibration(requested, others, calibration, num_classes))
        settled, choice = _settle(requested, sample)
        others = _settle_outputs(others, sample)
        notes |= {"encoding": choice} if choice else {}
    notes |= _encoding_packages([settled, *(output.encoding for output in others.values())])

    def settle_contents(stored: Records | None, settled: Encoding) -> None:
        """Take over the contents from a cache that another builder has sealed."""
        nonlocal origin, samples
        if seen is None or stored is None or samples is None or samples.contents is not None:
            return
        ours = make_identity(origin, settled, num_classes, others, logits_source, rows)
        known = settled_samples(storage, stored.manifest, ours)
        if known is not None and known.contents is not None:
            samples, origin = known, replace(origin, dataset=known.fingerprint())
            seen.add(range(known.num_samples), known.contents)

    def shape(stored: Records | None, settled: Encoding) -> tuple[Layout, dict[str, np.ndarray]]:
        # Still unfitted if the existing cache has another encoding; `_open_manifest` then raises.
        fixed = _fitted_arrays(settled, num_classes, others) | _sample_arrays(samples) | _row_arrays(rows)
        try:
            return Layout(
                num_samples=rows.num_samples,
                num_views=num_views,
                num_classes=num_classes,
                rows_per_block=rows.rows_per_block,
                sequence_rows=None if rows.one_each else rows.num_rows,
                sequence_blocks=None if rows.one_each else rows.blocks_per_view,
                arrays=row_arrays(output_layouts(settled, num_classes, others))
                if stored is None
                else stored.layout.arrays,
                fixed={
                    name: PerCacheSpec(dtype=values.dtype.name, shape=list(values.shape))
                    for name, values in fixed.items()
                },
            ), fixed
        except ValidationError as error:
            raise UsageError(
                f"a cache can't have this shape: {error.errors()[0]['msg']}; try another rows_per_block"
            ) from None

    settle_contents(stored, settled)
    layout, fixed = shape(stored, settled)
    if stored is None and layout.blocks_per_view > max_blocks_per_view(layout):
        raise UsageError(
            f"a view would have {layout.blocks_per_view:,} blocks of {layout.rows_per_block:,} rows; expected at most "
            f"{max_blocks_per_view(layout):,}, so that their receipts fit into one file. Use a larger rows_per_block"
        )
    with storage.lock():
        for key in _keys_to_replace(storage) if overwrite else []:
            storage.delete(key)
        if stored is None:
            stored = _stored(storage)
            if stored is not None:  # another builder has begun the cache meanwhile and fitted its encoding
                settled = _encoding_of(storage, stored, requested)
                others = _outputs_of(storage, stored, others)
                settle_contents(stored, settled)
                layout, fixed = shape(stored, settled)
        identity = make_identity(origin, settled, num_classes, others, logits_source, rows)
        manifest = _open_manifest(storage, identity, layout, fixed_stored=stored is not None, notes=notes)
        if NAMES in changeable:
            changeable[NAMES] = stated_names(manifest.provenance.get(NAMES)) | changeable[NAMES]
        if any(manifest.provenance.get(key) != value for key, value in changeable.items()):
            manifest = _change_provenance(storage, manifest, changeable)
        return CacheWriter(
            storage,
            manifest,
            settled,
            rows=rows,
            per_cache=fixed,
            write_card=write_card,
            seen=seen,
            outputs=others,
        )


def _keys_to_replace(storage: Storage) -> list[str]:
    """The keys of all objects of an existing cache, complete or damaged; empty if there is none.

    The manifest comes last, so that after an interrupted deletion the rest is still known as a cache's.

    Raises:
        NotACache: the location holds something else as well.
    """
    data = storage.get(MANIFEST, limit=MAX_MANIFEST_BYTES)
    if data is None:
        return []
    with suppress(CorruptCache):
        read_manifest(data, url=storage.url)
    keys = [key for key in storage.list_keys() if key != MANIFEST]
    for key in keys:
        if key not in (RECEIPTS, CARD) and not key.startswith((f"{GROUP}/", "receipts/", f"{CLAIMS}/")):
            raise NotACache(f"{storage.url} holds {key}, which is no part of a cache; move it, or choose another path")
    return [*keys, MANIFEST]


def _change_provenance(storage: Storage, manifest: Manifest, changes: dict[str, Any]) -> Manifest:
    """Change the names or card fields of an existing cache. Its README.md is deleted, and written again by `seal`."""
    storage.delete(CARD)
    manifest = manifest.model_copy(update={"provenance": manifest.provenance | changes})
    storage.put(MANIFEST, dump_manifest(manifest))
    return manifest


def _sample_arrays(samples: SampleTable | None) -> dict[str, np.ndarray]:
    """The sample table as it is stored."""
    if samples is None:
        return {}
    arrays = {"sample_targets": samples.targets}
    if samples.contents is not None:
        arrays[SAMPLE_CONTENTS] = samples.contents
    if samples.keys is not None:
        arrays["sample_keys"] = np.frombuffer("\n".join(samples.keys).encode(), dtype=np.uint8)
    return arrays


def _row_arrays(rows: RowMap) -> dict[str, np.ndarray]:
    """The row map as it is stored; nothing with one row per sample."""
    if rows.one_each:
        return {}
    return {ROW_OFFSETS: rows.offsets} | ({} if rows.positions is None else {ROW_POSITIONS: rows.positions})


def is_created(storage: Storage) -> bool:
    """Whether a cache is there with its per-cache arrays, so that another builder of it fits and hashes nothing.

    Raises:
        UsageError, NotACache: no cache can be created there.
    """
    if storage.size(MANIFEST) is None:
        _check_free(storage)
        return False
    return storage.size(receipt_key(PER_CACHE)) is not None or storage.size(RECEIPTS) is not None


def _check_free(storage: Storage) -> None:
    """Refuse a location that has no cache, and where none can be created.

    Raises:
        UsageError, NotACache: it can't be written to, or holds something else.
    """
    check_destination(storage)
    stranger = next((key for key in storage.list_keys() if not key.startswith(f"{CLAIMS}/")), None)
    # Unless another builder began just now: of what it writes, the manifest comes first.
    if stranger is not None and storage.size(MANIFEST) is None:
        raise NotACache(f"{storage.url} is not empty and no logit cache (it holds {stranger}); choose another path")


def _stored(storage: Storage) -> Records | None:
    """The records of a cache whose per-cache arrays are written; None where there is none."""
    if storage.size(MANIFEST) is None:
        _check_free(storage)
        return None
    manifest = stored_manifest(storage)
    records = Records(manifest, collect_receipts(storage, manifest))
    return records if PER_CACHE in records.receipts else None


def other_choice(manifest: Manifest, requested: Auto) -> Any:
    """The configuration of the `Auto` that chose a cache's encoding, if it is another one; else None."""
    choice = manifest.provenance.get("encoding")
    chosen_by = choice.get("chosen_by") if isinstance(choice, dict) else None
    return None if chosen_by == requested.config() else chosen_by


def _encoding_of(storage: Storage, stored: Records, requested: Encoding | Auto) -> Encoding:
    """The cache's fitted encoding if it is the requested one; else the requested one, which is rejected later."""
    chosen_by = other_choice(stored.manifest, requested) if isinstance(requested, Auto) else None
    if chosen_by is not None:
        raise IdentityMismatch(
            f"{storage.url} has an encoding that was chosen by {chosen_by}, not by {requested.config()}.\n"
            "Request the same, name the encoding itself, or choose another `cache.path`; nothing was changed."
        )
    if isinstance(requested, Auto) or requested.config() == stored.manifest.identity.encoding:
        return stored_encoding(stored, ObjectReader(storage))
    return requested


def _fitted_arrays(encoding: Encoding, num_classes: int, outputs: Mapping[str, Output]) -> dict[str, np.ndarray]:
    """What the encodings of all outputs are fitted to, by the names in the cache; nothing of those that are not yet."""
    return {
        name: values[array]
        for output in output_layouts(encoding, num_classes, outputs).values()
        if output.encoding.is_fitted
        for values in [output.encoding.fitted_values()]
        for name, array in output.fixed_names().items()
    }


def _outputs_of(storage: Storage, stored: Records, requested: Mapping[str, Output]) -> dict[str, Output]:
    """The requested outputs, with the encodings that an existing cache has fitted; others are rejected later."""
    known = stored.manifest.identity.output_encodings
    return {
        name: replace(output, encoding=stored_encoding(stored, ObjectReader(storage), name))
        if output.encoding.fitted_arrays and output.encoding.config() == known.get(name)
        else output
        for name, output in requested.items()
    }


def _settle_outputs(outputs: Mapping[str, Output], calibration: Callable[[], Calibration]) -> dict[str, Output]:
    """The outputs of a new cache, with fitted encodings.

    Raises:
        UsageError: there are no calibration rows of an output, or they have another shape.
    """
    settled = {}
    for name, output in outputs.items():
        settled[name] = output
        if not output.encoding.is_fitted:
            rows = calibration().outputs.get(name)
            if rows is None or tuple(np.shape(rows)[1:]) != output.shape:
                found = "none are given" if rows is None else f"they are {tuple(np.shape(rows))}"
                raise UsageError(
                    f"the encoding {output.encoding!r} of output {name!r} needs calibration rows of shape "
                    f"{('M', *output.shape)}, and {found}: pass "
                    f"calibration=Calibration(logits, outputs={{{name!r}: rows}}), or an encoding that was fitted with "
                    "its method `fit(rows)`"
                )
            settled[name] = replace(output, encoding=output.encoding.fit(rows))
    return settled


def _calibration(
    requested: Encoding | Auto,
    outputs: Mapping[str, Output],
    calibration: Calibration | Logits | Callable[[], Calibration | Logits] | None,
    num_classes: int,
) -> Calibration:
    """A sample of the teacher's outputs; without rows if none is given, and the logits need none.

    Raises:
        UsageError: the logits need one, or it has another number of classes.
        InvalidLogits: its logits are no logits.
    """
    if calibration is None:
        if isinstance(requested, Encoding) and requested.is_fitted:
            return Calibration(np.zeros((0, num_classes), dtype=np.float32))
        raise UsageError(
            f"encoding {requested.name!r} needs a sample of the teacher's logits: "
            "pass calibration=logits (M, C), ideally ten thousand rows of different samples"
        )
    sample = calibration() if callable(calibration) else calibration
    if not isinstance(sample, Calibration):
        sample = Calibration(float_tensor(sample).numpy() if isinstance(sample, Tensor) else np.asarray(sample))
    if isinstance(requested, NoLogits):
        return sample
    if sample.logits.ndim != 2 or sample.logits.shape[1] != num_classes:
        raise UsageError(f"calibration logits are {tuple(sample.logits.shape)}; expected (M, {num_classes})")
    if not np.isfinite(np.asarray(sample.logits).max(axis=1)).all():
        raise InvalidLogits("the calibration logits contain NaN, +inf, or a row of -inf only")
    return sample


def _settle(requested: Encoding | Auto, calibration: Callable[[], Calibration]) -> tuple[Encoding, dict[str, Any]]:
    """The encoding of a new cache, chosen and fitted, and a record of the choice for the provenance."""
    if isinstance(requested, Encoding) and requested.is_fitted:
        return requested, {}
    sample = calibration()
    num_classes = sample.logits.shape[1]
    notes: dict[str, Any] = {"calibration_rows": len(sample.logits)}
    if isinstance(requested, Encoding):
        return requested.fit(sample.logits), notes
    tried = [
        each for each in candidates(num_classes, len(sample.split()[0])) if each.holds_masks or not _masked(sample)
    ]
    with track("choosing an encoding", len(tried), unit="encodings") as meter:
        results = compare(sample, tried, advance=meter.advance)
    choice = choose(results, requested)
    notes |= {
        "chosen_by": requested.config(),
        "kl": choice.kl[requested.temperature],
        "bytes_per_row": choice.bytes_per_row,
    }
    return choice.encoding.fit(sample.logits), notes


def _encoding_packages(encodings: Iterable[Encoding]) -> dict[str, Any]:
    """What the manifest's provenance records of the packages that encodings come from; {} if all are built in.

    Raises:
        UsageError: an encoding that no reader of the cache could find.
    """
    packages = {}
    for encoding in encodings:
        if encoding.name not in ENCODINGS:
            raise UsageError(
                f"encoding {encoding.name!r} is not registered, so the cache could not be opened. Install the package "
                f"of {type(encoding).__qualname__} with an entry point in the group {ENCODINGS.group!r}"
            )
        package = ENCODINGS.package_of(encoding.name)
        if package is not None:
            packages[encoding.name] = asdict(package)
    return {ENCODING_PACKAGES: packages} if packages else {}


def _masked(sample: Calibration) -> bool:
    return bool(np.isneginf(np.asarray(sample.logits)).any())


def make_identity(
    origin: Origin,
    encoding: Encoding,
    num_classes: int,
    outputs: Mapping[str, Output],
    logits_source: Json,
    rows: RowMap,
) -> Identity:
    """An identity with its values as JSON returns them, so that two identities compare field by field."""
    sources = {LOGITS: logits_source} | {name: output.source for name, output in outputs.items()}
    fields = {
        "format_version": FORMAT_VERSION,
        "dataset": origin.dataset,
        "teacher": origin.teacher,
        "precision": origin.precision,
        "transform": origin.transform,
        "view_seed": origin.view_seed,
        "encoding": encoding.config(),
        "outputs": {LOGITS: [num_classes]} | {name: list(output.shape) for name, output in outputs.items()},
        "class_names": None if origin.class_names is None else list(origin.class_names),
        "output_encodings": {name: output.encoding.config() for name, output in outputs.items()},
        "output_sources": {name: source for name, source in sources.items() if source is not None},
        "rows": rows.fingerprint(),
        "tokenization": origin.tokenization,
    }
    try:
        return Identity.model_validate(json.loads(canonical_json(fields)))
    except ValidationError as error:
        first = error.errors()[0]
        raise UsageError(f"{'.'.join(map(str, first['loc']))} can't be part of a cache: {first['msg']}") from None
    except (TypeError, ValueError, RecursionError) as error:
        raise UsageError(f"the identity of the cache can't be written as JSON: {error}") from None


def _check_class_names(class_names: Sequence[str] | None, num_classes: int) -> None:
    """Check the number and type of class names. They may repeat, as in ImageNet."""
    if class_names is None:
        return
    if isinstance(class_names, str) or not all(isinstance(name, str) for name in class_names):
        raise UsageError("class_names is a list of strings, one for each class")
    if len(class_names) != num_classes:
        raise UsageError(f"{len(class_names)} class_names for {num_classes} classes; expected one for each, in order")


def _open_manifest(
    storage: Storage, identity: Identity, layout: Layout, *, fixed_stored: bool, notes: dict[str, Any]
) -> Manifest:
    """The manifest of the cache: the stored one, or a new one if there is none or if views are added."""
    existing = storage.get(MANIFEST, limit=MAX_MANIFEST_BYTES)
    new = Manifest(
        id=identity.cache_id,
        identity=identity,
        layout=layout,
        state="open",
        digest=None,
        provenance=provenance() | notes,
    )
    if existing is None:
        if storage.create(MANIFEST, dump_manifest(new)):
            return new
        # Another builder created it at the same moment.
        existing = storage.get(MANIFEST, limit=MAX_MANIFEST_BYTES)
    manifest = read_manifest(existing, url=storage.url)
    # An existing cache keeps its format.
    identity = identity.model_copy(update={"format_version": manifest.identity.format_version})
    new = new.model_copy(update={"id": identity.cache_id, "identity": identity})
    same = identity
    if new.contents_pending and not fixed_stored:  # an earlier builder may have known the contents
        same = identity.model_copy(update={"dataset": manifest.identity.dataset})
    if not fixed_stored and not manifest.identity.differences(same):
        # An earlier builder was killed before it stored anything else.
        storage.put(MANIFEST, dump_manifest(new))
        return new
    differences = manifest.identity.differences(identity)
    for name in ("num_samples", "rows_per_block"):
        if getattr(manifest.layout, name) != getattr(layout, name):
            differences.append(f"{name}: {getattr(manifest.layout, name)} in the cache, {getattr(layout, name)} here")
    if differences:
        raise IdentityMismatch(
            f"{storage.url} holds another cache ({manifest.id[:12]}…); it differs in\n  "
            + "\n  ".join(differences)
            + "\nChoose another path, delete this cache, or restore what differs; nothing was changed."
        )
    if manifest.state == "open" and layout.num_views < manifest.layout.num_views:
        manifest = _forget_views(storage, manifest, layout)
    if layout.num_views > manifest.layout.num_views or manifest.layout.first_view > 0:
        manifest = manifest.model_copy(update={"layout": layout, "state": "open", "digest": None, "contents": None})
        storage.put(MANIFEST, dump_manifest(manifest))
    return manifest


def _forget_views(storage: Storage, manifest: Manifest, layout: Layout) -> Manifest:
    """Remove views that were requested and never finished; views that were sealed before stay."""
    gathered = storage.get(RECEIPTS, limit=receipts_limit(manifest.layout))
    found = {} if gathered is None else read_receipts_or_index(gathered, url=storage.url)
    sealed_views = by_view(found).views if isinstance(found, dict) else list(map(view_number, found.views))
    num_views = max([layout.num_views, *(view + 1 for view in sealed_views)])
    kept = manifest.layout.model_copy(update={"num_views": num_views})
    for view in range(num_views, manifest.layout.num_views):
        for folder in (f"receipts/v{view:05d}", *(f"{GROUP}/{array}/c/{view}" for array in kept.arrays)):
            for key in list(storage.list_keys(folder)):
                storage.delete(key)
    manifest = manifest.model_copy(update={"layout": kept})
    storage.put(MANIFEST, dump_manifest(manifest))
    return manifest


@functools.cache  # parses the metadata of each package
def _versions() -> dict[str, str]:
    versions = {}
    for package in (
        "logitcache",
        "torch",
        "torchvision",
        "numpy",
        "pillow",
        "zarr",
        "numcodecs",
        "timm",
        "albumentations",
        "transformers",
        "tokenizers",
    ):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions


def provenance() -> dict[str, Any]:
    """Time, host, versions and command, for the record; not part of any hash."""
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "host": platform.node(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "versions": dict(_versions()),
        "command": [argument.encode(errors="replace").decode() for argument in sys.argv],
    }
