"""A cache's beginning: what it is, and the manifest that says so before any logit is written."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from logitcache.digest import canonical_json
from logitcache.encodings import Encoding, encoding_from_config
from logitcache.errors import IdentityMismatch, NotACache, UsageError
from logitcache.layout import FIXED, GROUP, Block
from logitcache.manifest import (
    FORMAT_VERSION,
    MANIFEST,
    RECEIPTS,
    Identity,
    Layout,
    Manifest,
    dump,
    read_manifest,
    read_receipts,
)
from logitcache.samples import SampleTable
from logitcache.storage import LocalStorage, open_storage
from logitcache.views import ViewPlan
from logitcache.writer import CacheWriter

DEFAULT_ROWS_PER_BLOCK = 16_384


def create(
    path: str | os.PathLike[str],
    *,
    num_samples: int,
    num_classes: int,
    num_views: int = 1,
    encoding: Encoding | str | Mapping[str, Any] = "dense",
    calibration: Any = None,
    teacher: str,
    dataset: str | None = None,
    samples: SampleTable | None = None,
    view_plan: ViewPlan | None = None,
    precision: str = "float32",
    class_names: Sequence[str] | None = None,
    rows_per_block: int | None = None,
) -> CacheWriter:
    """Open a cache for writing: a new one, or one of the same identity that was left unfinished or grows by views.

    Args:
        path: the cache's directory.
        num_samples, num_classes, num_views: its shape; `num_views` may exceed an existing cache's.
        encoding: such as `TopK(k=20)`.
        calibration: logits (M, C) for encodings that are fitted; `Dense` and `TopK` need none.
        teacher, dataset: what the logits come from, where no fingerprints say it.
        samples: keys, targets and content digests; the dataset's identity then is their fingerprint.
        view_plan: how the views were made; without one the cache can't hand out a `view_plan`.
        precision: the teacher's arithmetic.
        rows_per_block: rows of one commit, 16 384 by default; fixed once the cache exists.

    Raises:
        UsageError: a shape or an encoding that can't be, or a folder that holds something else.
        IdentityMismatch: the path holds a cache of another identity; names the fields.
    """
    del calibration  # for encodings that are fitted
    if (dataset is None) == (samples is None):
        raise UsageError(
            "create needs the dataset's identity: `dataset` (a name) or `samples` (a table), one of the two"
        )
    if samples is not None and samples.num_samples != num_samples:
        raise UsageError(f"num_samples is {num_samples}, but the sample table has {samples.num_samples}")
    if num_classes < 2 or num_samples < 1 or num_views < 1:
        raise UsageError(
            f"a cache has at least 1 sample, 1 view and 2 classes; found {num_samples}, {num_views}, {num_classes}"
        )
    rows_per_block = DEFAULT_ROWS_PER_BLOCK if rows_per_block is None else rows_per_block
    if rows_per_block < 1:
        raise UsageError(f"rows_per_block is at least 1, not {rows_per_block}")
    encoding = encoding_from_config(encoding)
    encoding.arrays(num_classes)  # refuses a number of classes that it can't hold
    identity = make_identity(
        dataset=samples.fingerprint() if samples is not None else str(dataset),
        teacher=teacher,
        precision=precision,
        view_plan=view_plan,
        encoding=encoding,
        num_classes=num_classes,
        class_names=class_names,
    )
    layout = Layout(
        num_samples=num_samples,
        num_views=num_views,
        num_classes=num_classes,
        rows_per_block=min(rows_per_block, num_samples),
    )
    storage = open_storage(path)
    return CacheWriter(storage, _open_manifest(storage, identity, layout), samples=samples)


def make_identity(
    *,
    dataset: str,
    teacher: str,
    precision: str,
    view_plan: ViewPlan | None,
    encoding: Encoding,
    num_classes: int,
    class_names: Sequence[str] | None,
) -> Identity:
    """An identity in the form that JSON gives back, so that two of them compare field by field."""
    fields = {
        "format_version": FORMAT_VERSION,
        "dataset": dataset,
        "teacher": teacher,
        "precision": precision,
        "transform": None if view_plan is None else view_plan.describe(),
        "view_seed": 0 if view_plan is None else view_plan.seed,
        "encoding": encoding.config(),
        "outputs": {"logits": [num_classes]},
        "class_names": None if class_names is None else list(class_names),
    }
    return Identity.model_validate(json.loads(canonical_json(fields)))


def _open_manifest(storage: LocalStorage, identity: Identity, layout: Layout) -> Manifest:
    """The manifest of the cache at hand, written anew where there is none or where views are added."""
    existing = storage.get(MANIFEST)
    if existing is None:
        stranger = next(iter(storage.list_keys()), None)
        if stranger is not None:
            raise NotACache(f"{storage.url} is not empty and no logit cache (it holds {stranger}); choose another path")
        manifest = Manifest(
            id=identity.cache_id,
            identity=identity,
            layout=layout,
            state="open",
            digest=None,
            provenance=provenance(),
        )
        storage.put(MANIFEST, dump(manifest))
        return manifest
    manifest = read_manifest(existing, url=storage.url)
    differences = manifest.identity.differences(identity)
    for name in ("num_samples", "rows_per_block"):
        if getattr(manifest.layout, name) != getattr(layout, name):
            differences.append(f"{name}: {getattr(manifest.layout, name)} in the cache, {getattr(layout, name)} here")
    if differences:
        raise IdentityMismatch(
            f"{storage.url} holds another cache ({manifest.id[:12]}…); it differs in\n  "
            + "\n  ".join(differences)
            + "\nChoose another `cache.path`, or restore what differs; nothing was changed."
        )
    if manifest.state == "open" and layout.num_views < manifest.layout.num_views:
        manifest = _forget_views(storage, manifest, layout)
    if layout.num_views > manifest.layout.num_views:
        manifest = manifest.model_copy(update={"layout": layout, "state": "open", "digest": None})
        storage.put(MANIFEST, dump(manifest))
    return manifest


def _forget_views(storage: LocalStorage, manifest: Manifest, layout: Layout) -> Manifest:
    """Take back views that were asked for and never finished; those that were sealed before stay."""
    gathered = storage.get(RECEIPTS)
    names = read_receipts(gathered, url=storage.url).keys() - {FIXED} if gathered is not None else set()
    num_views = max([layout.num_views, *(Block.from_name(name).view + 1 for name in names)])
    kept = manifest.layout.model_copy(update={"num_views": num_views})
    arrays = encoding_from_config(manifest.identity.encoding).arrays(kept.num_classes)
    for view in range(num_views, manifest.layout.num_views):
        for folder in (f"receipts/v{view:05d}", *(f"{GROUP}/{array}/c/{view}" for array in arrays)):
            for key in list(storage.list_keys(folder)):
                storage.delete(key)
    manifest = manifest.model_copy(update={"layout": kept})
    storage.put(MANIFEST, dump(manifest))
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
        "command": sys.argv,
    }
