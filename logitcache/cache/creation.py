"""A cache's beginning: what it is, and the manifest that says so before any logit is written."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
from pydantic import ValidationError
from torch import Tensor

from logitcache.cache.card import Card, card_from, write_missing_card
from logitcache.cache.destination import check_destination
from logitcache.cache.fidelity import Calibration, candidates, choose, compare
from logitcache.cache.layout import GROUP, PER_CACHE, Block
from logitcache.cache.manifest import (
    CARD,
    FORMAT_VERSION,
    LOGITS,
    MANIFEST,
    MAX_MANIFEST_BYTES,
    RECEIPTS,
    Identity,
    Layout,
    Manifest,
    PerCacheSpec,
    check_length,
    dump,
    dump_manifest,
    read_manifest,
    read_receipts,
    receipts_limit,
)
from logitcache.cache.objects import ObjectReader
from logitcache.cache.outputs import Output, checked_outputs, output_layouts, row_arrays
from logitcache.cache.packages import ENCODING_PACKAGES
from logitcache.cache.per_cache import stored_encoding
from logitcache.cache.records import Records, collect_receipts, stored_manifest
from logitcache.cache.writer import CacheWriter
from logitcache.data.samples import SampleTable
from logitcache.data.views import ViewPlan
from logitcache.digest import canonical_json
from logitcache.encodings import ENCODINGS, Auto, Dense, Encoding, encoding_or_auto
from logitcache.encodings.protocol import float_tensor
from logitcache.errors import CorruptCache, IdentityMismatch, InvalidLogits, NotACache, UsageError
from logitcache.progress import track
from logitcache.storage import Storage, open_storage

DEFAULT_ROWS_PER_BLOCK = 16_384


def create(
    path: str | os.PathLike[str],
    *,
    num_samples: int,
    num_classes: int,
    num_views: int = 1,
    encoding: Encoding | Auto | str | Mapping[str, Any] = "dense",
    outputs: Mapping[str, Output | Mapping[str, Any]] | None = None,
    logits_source: Any = None,
    calibration: Any = None,
    teacher: str,
    dataset: str | None = None,
    samples: SampleTable | None = None,
    view_plan: ViewPlan | None = None,
    precision: str = "float32",
    class_names: Sequence[str] | None = None,
    rows_per_block: int | None = None,
    card: Card | Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> CacheWriter:
    """Open a cache for writing: a new one, or one of the same identity that was left unfinished or grows by views.

    Args:
        path: the cache's directory.
        num_samples, num_classes, num_views: its shape; `num_views` may exceed an existing cache's.
        encoding: such as `TopK(k=20)`; "auto" or `Auto(max_kl=...)` for the cheapest that is faithful enough.
        outputs: what else of the teacher is held, by name, such as {"features": Output(shape=(64, 7, 7))}.
        logits_source: where in the teacher the logits come from, as JSON, where that is not what its forward gives.
        calibration: logits (M, C), a `Calibration`, or a callable that gives one; for `LowRank`, which is fitted, and
            for "auto". It is asked for only when a cache is new.
        teacher, dataset: what the logits come from, where no fingerprints say it.
        samples: keys, targets and content digests; the dataset's identity then is their fingerprint.
        view_plan: how the views were made; without one the cache can't hand out a `view_plan`.
        precision: the teacher's arithmetic.
        rows_per_block: rows of one commit, 16 384 by default; fixed once the cache exists.
        card: what its README.md says beside what it knows itself, such as {"license": "cc-by-4.0"}; it may be changed
            later, and None leaves what was said before.
        overwrite: delete the cache that is at the path first, if there is one; never anything else.

    Raises:
        UsageError: a shape, an encoding or an output that can't be, or no calibration for one that needs it.
        NotACache: a folder that holds something else.
        IdentityMismatch: the path holds a cache of another identity; names the fields.
    """
    if (dataset is None) == (samples is None):
        raise UsageError(
            "create needs the dataset's identity: `dataset` (a name) or `samples` (a table), one of the two"
        )
    if samples is not None and samples.num_samples != num_samples:
        raise UsageError(f"num_samples is {num_samples}, but the sample table has {samples.num_samples}")
    origin = Origin(
        dataset=samples.fingerprint() if samples is not None else str(dataset),
        teacher=teacher,
        precision=precision,
        transform=None if view_plan is None else view_plan.describe(),
        view_seed=0 if view_plan is None else view_plan.seed,
        class_names=class_names,
    )
    return open_writer(
        path,
        origin,
        num_samples=num_samples,
        num_classes=num_classes,
        num_views=num_views,
        encoding=encoding,
        outputs=outputs,
        logits_source=logits_source,
        calibration=calibration,
        samples=samples,
        rows_per_block=rows_per_block,
        card=card,
        overwrite=overwrite,
    )


@dataclass(frozen=True, kw_only=True)
class Origin:
    """What logits come from: a cache's identity, but for the logits' shape and encoding."""

    dataset: str
    teacher: str
    precision: str
    transform: Any
    """`ViewPlan.describe()`, or None where nobody said how the views were made."""
    view_seed: int
    class_names: Sequence[str] | None


def open_writer(
    path: str | os.PathLike[str],
    origin: Origin,
    *,
    num_samples: int,
    num_classes: int,
    num_views: int,
    encoding: Encoding | Auto | str | Mapping[str, Any],
    outputs: Mapping[str, Output | Mapping[str, Any]] | None = None,
    logits_source: Any = None,
    calibration: Any = None,
    samples: SampleTable | None = None,
    rows_per_block: int | None = None,
    card: Card | Mapping[str, Any] | None = None,
    notes: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> CacheWriter:
    """The same as `create`, for logits whose origin is known by its parts; `notes` join a new cache's provenance.

    Raises:
        UsageError, NotACache, IdentityMismatch: as `create` does.
    """
    if num_classes < 2 or num_samples < 1 or num_views < 1:
        raise UsageError(
            f"a cache has at least 1 sample, 1 view and 2 classes; found {num_samples}, {num_views}, {num_classes}"
        )
    rows_per_block = DEFAULT_ROWS_PER_BLOCK if rows_per_block is None else rows_per_block
    if rows_per_block < 1:
        raise UsageError(f"rows_per_block is at least 1, not {rows_per_block}")
    _check_class_names(origin.class_names, num_classes)
    stated = None if card is None else card_from(card).stated()
    others = checked_outputs(outputs or {})
    requested = encoding_or_auto(encoding)
    # Refuse what can't be a cache before anything is computed.
    if isinstance(requested, Encoding):
        requested.arrays(num_classes)
    preliminary = requested if isinstance(requested, Encoding) else Dense()
    notes = dict(notes or {}) | ({} if stated is None else {"card": stated})
    lines = dump(make_identity(origin, preliminary, num_classes, others, logits_source)).splitlines()
    # In the manifest each line is indented by one more space.
    check_length(sum(map(len, lines)) + 2 * len(lines) + len(json.dumps(notes)), sealed=False)
    storage = open_storage(path)
    replaced = _keys_to_replace(storage) if overwrite else []
    stored = None if replaced else _stored(storage)
    if stored is not None:
        settled = _encoding_of(storage, stored, requested)
    else:
        settled, choice = _settle(requested, calibration, num_classes)
        notes |= {"encoding": choice} if choice else {}
    notes |= _encoding_packages([settled, *(output.encoding for output in others.values())])
    table = _sample_arrays(samples)

    def shape(stored: Records | None, settled: Encoding) -> tuple[Layout, dict[str, np.ndarray]]:
        # Unfitted still where the cache that is there has another encoding: about to be refused for that.
        fixed = (settled.fitted_values() if settled.is_fitted else {}) | table
        try:
            return Layout(
                num_samples=num_samples,
                num_views=num_views,
                num_classes=num_classes,
                rows_per_block=min(rows_per_block, num_samples),
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
                f"a cache can't have this shape: {error.errors()[0]['msg']}; try a smaller rows_per_block"
            ) from None

    layout, fixed = shape(stored, settled)
    with storage.lock():
        for key in _keys_to_replace(storage) if overwrite else []:
            storage.delete(key)
        if stored is None:
            stored = _stored(storage)
            if stored is not None:  # another builder began it meanwhile, and fitted its encoding
                settled = _encoding_of(storage, stored, requested)
                layout, fixed = shape(stored, settled)
        identity = make_identity(origin, settled, num_classes, others, logits_source)
        manifest = _open_manifest(storage, identity, layout, fixed_stored=stored is not None, notes=notes)
        if stated is not None and manifest.provenance.get("card") != stated:
            manifest = _change_card(storage, manifest, stated)
        return CacheWriter(storage, manifest, settled, per_cache=fixed, after_sealing=write_missing_card)


def _keys_to_replace(storage: Storage) -> list[str]:
    """The objects of the cache that is there, whole or damaged; none where there is no cache.

    The manifest comes last, so that a deletion that was interrupted is one of a cache still, and can be done again.

    Raises:
        NotACache: something else is there, or lies beside it.
    """
    data = storage.get(MANIFEST, limit=MAX_MANIFEST_BYTES)
    if data is None:
        return []
    with suppress(CorruptCache):
        read_manifest(data, url=storage.url)
    keys = [key for key in storage.list_keys() if key != MANIFEST]
    for key in keys:
        if key not in (RECEIPTS, CARD) and not key.startswith((f"{GROUP}/", "receipts/")):
            raise NotACache(f"{storage.url} holds {key}, which is no part of a cache; move it, or choose another path")
    return [*keys, MANIFEST]


def _change_card(storage: Storage, manifest: Manifest, stated: dict[str, Any]) -> Manifest:
    """Say something else of a cache that is there; its card is gone until the writer seals, or finds it sealed."""
    storage.delete(CARD)
    manifest = manifest.model_copy(update={"provenance": manifest.provenance | {"card": stated}})
    storage.put(MANIFEST, dump_manifest(manifest))
    return manifest


def _sample_arrays(samples: SampleTable | None) -> dict[str, np.ndarray]:
    """The sample table as it is stored."""
    if samples is None:
        return {}
    assert samples.contents is not None
    arrays = {"sample_targets": samples.targets, "sample_contents": samples.contents}
    if samples.keys is not None:
        arrays["sample_keys"] = np.frombuffer("\n".join(samples.keys).encode(), dtype=np.uint8)
    return arrays


def _stored(storage: Storage) -> Records | None:
    """The records of a cache whose per-cache arrays are written; None where there is none."""
    if storage.size(MANIFEST) is None:
        check_destination(storage)
        stranger = next(iter(storage.list_keys()), None)
        # Unless another builder began just now: of what it writes, the manifest comes first.
        if stranger is not None and storage.size(MANIFEST) is None:
            raise NotACache(f"{storage.url} is not empty and no logit cache (it holds {stranger}); choose another path")
        return None
    manifest = stored_manifest(storage)
    records = Records(manifest, collect_receipts(storage, manifest))
    return records if PER_CACHE in records.receipts else None


def _encoding_of(storage: Storage, stored: Records, requested: Encoding | Auto) -> Encoding:
    """The encoding to go on with: the cache's, where it is the one that is asked for; else that one, to be refused."""
    choice = stored.manifest.provenance.get("encoding")
    chosen_by = choice.get("chosen_by") if isinstance(choice, dict) else None
    if isinstance(requested, Auto) and chosen_by is not None and chosen_by != requested.config():
        raise IdentityMismatch(
            f"{storage.url} has an encoding that was chosen by {chosen_by}, not by {requested.config()}.\n"
            "Ask for the same, name the encoding itself, or choose another `cache.path`; nothing was changed."
        )
    if isinstance(requested, Auto) or requested.config() == stored.manifest.identity.encoding:
        return stored_encoding(stored, ObjectReader(storage))
    return requested


def _settle(requested: Encoding | Auto, calibration: Any, num_classes: int) -> tuple[Encoding, dict[str, Any]]:
    """The encoding of a new cache, chosen and fitted, and what provenance says of it."""
    if isinstance(requested, Encoding) and requested.is_fitted:
        return requested, {}
    if calibration is None:
        raise UsageError(
            f"encoding {requested.name!r} needs a sample of the teacher's logits; "
            "pass calibration=logits, (M, C), at best some ten thousand rows of different samples"
        )
    sample = calibration() if callable(calibration) else calibration
    if not isinstance(sample, Calibration):
        sample = Calibration(float_tensor(sample).numpy() if isinstance(sample, Tensor) else np.asarray(sample))
    if sample.logits.ndim != 2 or sample.logits.shape[1] != num_classes:
        raise UsageError(f"calibration logits are {tuple(sample.logits.shape)}; expected (M, {num_classes})")
    if not np.isfinite(np.asarray(sample.logits).max(axis=1)).all():
        raise InvalidLogits("the calibration logits hold NaN or +inf, or a row of nothing but -inf")
    notes: dict[str, Any] = {"calibration_rows": len(sample.logits)}
    if isinstance(requested, Encoding):
        return requested.fit(sample.logits), notes
    tried = [
        each for each in candidates(num_classes, len(sample.split()[0])) if each.holds_masks or not _masked(sample)
    ]
    with track("choosing an encoding", len(tried), unit="encodings") as meter:
        results = compare(sample, tried, advance=meter.advance)
    choice = choose(results, max_kl=requested.max_kl)
    notes |= {"chosen_by": requested.config(), "kl": choice.kl[1.0], "bytes_per_sample": choice.bytes_per_sample}
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
    logits_source: Any,
) -> Identity:
    """An identity in the form that JSON gives back, so that two of them compare field by field."""
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
    }
    try:
        return Identity.model_validate(json.loads(canonical_json(fields)))
    except ValidationError as error:
        first = error.errors()[0]
        raise UsageError(f"{'.'.join(map(str, first['loc']))} can't be part of a cache: {first['msg']}") from None
    except (TypeError, ValueError, RecursionError) as error:
        raise UsageError(f"what the cache is can't be written as JSON: {error}") from None


def _check_class_names(class_names: Sequence[str] | None, num_classes: int) -> None:
    """Two classes may have one name, as in ImageNet."""
    if class_names is None:
        return
    if isinstance(class_names, str) or not all(isinstance(name, str) for name in class_names):
        raise UsageError("class_names is a list of strings, one for each class")
    if len(class_names) != num_classes:
        raise UsageError(f"{len(class_names)} class_names for {num_classes} classes; expected one for each, in order")


def _open_manifest(
    storage: Storage, identity: Identity, layout: Layout, *, fixed_stored: bool, notes: dict[str, Any]
) -> Manifest:
    """The manifest of the cache at hand, written anew where there is none or where views are added."""
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
        # Somebody else began at the same moment.
        existing = storage.get(MANIFEST, limit=MAX_MANIFEST_BYTES)
    manifest = read_manifest(existing, url=storage.url)
    # A cache stays in the format that it was begun in.
    identity = identity.model_copy(update={"format_version": manifest.identity.format_version})
    new = new.model_copy(update={"id": identity.cache_id, "identity": identity})
    if not fixed_stored and not manifest.identity.differences(identity):
        # Cut off before anything was stored but this: begun again.
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
            + "\nChoose another place, or restore what differs; nothing was changed."
        )
    if manifest.state == "open" and layout.num_views < manifest.layout.num_views:
        manifest = _forget_views(storage, manifest, layout)
    if layout.num_views > manifest.layout.num_views or manifest.layout.first_view > 0:
        manifest = manifest.model_copy(update={"layout": layout, "state": "open", "digest": None, "contents": None})
        storage.put(MANIFEST, dump_manifest(manifest))
    return manifest


def _forget_views(storage: Storage, manifest: Manifest, layout: Layout) -> Manifest:
    """Take back views that were asked for and never finished; those that were sealed before stay."""
    gathered = storage.get(RECEIPTS, limit=receipts_limit(manifest.layout))
    names = read_receipts(gathered, url=storage.url).keys() - {PER_CACHE} if gathered is not None else set()
    num_views = max([layout.num_views, *(Block.from_name(name).view + 1 for name in names)])
    kept = manifest.layout.model_copy(update={"num_views": num_views})
    for view in range(num_views, manifest.layout.num_views):
        for folder in (f"receipts/v{view:05d}", *(f"{GROUP}/{array}/c/{view}" for array in kept.arrays)):
            for key in list(storage.list_keys(folder)):
                storage.delete(key)
    manifest = manifest.model_copy(update={"layout": kept})
    storage.put(MANIFEST, dump_manifest(manifest))
    return manifest


def provenance() -> dict[str, Any]:
    """How this came to be: recorded, never hashed."""
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
    ):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "host": platform.node(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "versions": versions,
        "command": [argument.encode(errors="replace").decode() for argument in sys.argv],
    }
