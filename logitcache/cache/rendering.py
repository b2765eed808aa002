"""Render the views of a cache again, and check that the result is what the teacher saw."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import numpy as np
import torch

from logitcache.cache.layout import Block
from logitcache.cache.manifest import Manifest, Receipt
from logitcache.data.index import NO_ROW, index_tensor, split_index
from logitcache.data.recorded import PARAMETERS, Parameters, RecordedTransform, build_replay, recorded_step
from logitcache.data.rows import RowMap
from logitcache.data.samples import SampleTable, batch_item, input_digest
from logitcache.data.transforms import build_transform, entry_points_of
from logitcache.data.views import Mixing, ViewDataset, ViewPlan, proof_rows
from logitcache.devices import one_thread, to_device
from logitcache.errors import CorruptCache, IdentityMismatch, ShapeError, UntrustedCode, UsageError

PARTS = {"shared": "`transform`", "teacher_input": "`preprocess`"}
"""The argument of `ViewPlan` that each part of a recorded transform comes from."""


Replay = Callable[[Any, Parameters], Any]


def recorded_plan(
    manifest: Manifest,
    samples: SampleTable | None,
    rows: RowMap,
    *,
    url: str,
    trust: bool,
    read: Callable[[int], np.ndarray],
    replay: Replay | None = None,
) -> ViewPlan:
    """The plan of a cache's views; it checks samples against their content digests.

    Args:
        manifest, samples, rows, url: of the cache.
        trust: allow third-party code.
        read: reads the parameters of a view, float32 (N, D), of a cache whose views another tool chose.
        replay: renders a sample from these, in place of the recorded replay.

    Raises:
        UsageError: the cache has no description of its views, or the transform can't be built from it.
        UntrustedCode: the transform is third-party code, and `trust` is False.
    """
    transform = manifest.identity.transform
    if transform is None:
        raise UsageError(
            f"{url} was created without `view_plan`, so its views can't be rendered from it; make the same ViewPlan "
            "yourself"
        )
    specs = {part: transform[part] for part in PARTS}
    recorded = recorded_step(specs["shared"])
    if replay is not None and recorded is None:
        raise UsageError(f"the views of {url} are not those that another tool recorded; use `cache.view_plan`")
    if recorded is not None and recorded["replay"] is None and replay is None:
        raise UsageError(
            f"the transform of the views of {url} is not stored, only its {_stored(recorded)}. Pass this transform: "
            "`cache.view_plan_with(function)`, a function of (sample, parameters)"
        )
    for part, spec in specs.items():
        if not _is_recipe(spec):
            raise UsageError(
                f"the views of {url} were made with a Python object as {PARTS[part]}, which can't be made from the "
                "cache: make the same ViewPlan again, and check it with `cache.check_plan(plan)`"
            )
    named = named_code(transform if replay is None else transform | {"shared": None})
    if named and not trust:
        raise UntrustedCode(
            f"the views of {url} are made by code that the cache names: {', '.join(named)}.\nReview this code, even if "
            "it is in the working directory. Then open the cache with logitcache.open(..., trust=True), or use --trust "
            "on the command line; or make the same ViewPlan yourself, and check it with `cache.check_plan(plan)`"
        )
    shared: Callable[[Any], Any] | None
    shared, preprocess = (
        None if spec is None or (part == "shared" and recorded is not None) else build_transform(spec, trust=trust)
        for part, spec in specs.items()
    )
    if recorded is not None:
        shared = _recorded_transform(manifest, recorded, read, replay, trust=trust)
    return ViewPlan(
        transform=shared,
        seed=manifest.identity.view_seed,
        mixing=Mixing(**(transform["mixing"] or {})),
        preprocess=preprocess,
        num_classes=manifest.layout.num_classes,
        num_samples=manifest.layout.num_samples,
        contents=None if samples is None else samples.contents,
        views=manifest.layout.views,
        rows=rows,
    )


def _stored(recorded: Mapping[str, Any]) -> str:
    if "seed_high" not in recorded["columns"]:
        return f"parameters: {', '.join(recorded['columns'])}"
    return (
        "seeds. TinyViT draws from `numpy.random.Generator(numpy.random.PCG64(parameters['seed']))`; the configuration "
        "of its transform, and the partners of its mixup, are not in its files"
    )


def _recorded_transform(
    manifest: Manifest,
    recorded: Mapping[str, Any],
    read: Callable[[int], np.ndarray],
    replay: Replay | None,
    *,
    trust: bool,
) -> RecordedTransform:
    """The recorded views of a cache.

    Raises:
        UsageError: the cache was merged, without the parameters of its views.
        CorruptCache: the cache does not store what its identity names.
    """
    stored, expected = manifest.identity.outputs.get(PARAMETERS), [len(recorded["columns"])]
    if stored is None:
        raise UsageError(
            "this cache has recorded views without their parameters, as merged caches do: use the view plan of the "
            "imported cache, `cache.check_plan(imported.view_plan)`"
        )
    if stored != expected or len(recorded["views"]) < manifest.layout.num_views:
        raise CorruptCache(
            f"the cache has recorded views, but its output {PARAMETERS!r} is {stored}, and {len(recorded['views'])} "
            f"views have a hash; expected {expected}, and {manifest.layout.num_views} views"
        )
    if replay is None:
        replay = build_replay(recorded["replay"], trust=trust)
    return RecordedTransform(
        recorded["columns"], recorded["views"], read=read, replay=replay, replay_step=recorded["replay"]
    )


def has_recipe(transform: Mapping[str, Any]) -> bool:
    """Whether `recorded_plan` can build a recorded transform: named transforms or none, not Python objects."""
    try:
        recorded = recorded_step(transform.get("shared"))
    except UsageError:  # an untrusted manifest
        return False
    return all(_is_recipe(transform.get(part)) for part in PARTS) and not (recorded and recorded["replay"] is None)


def _is_recipe(spec: Any) -> bool:
    return spec is None or isinstance(spec, list)


def named_code(transform: Mapping[str, Any]) -> list[str]:
    """The `package.module:function` names in a recorded transform that `has_recipe`.

    Raises:
        UsageError: a list that does not name transforms.
    """
    recorded = recorded_step(transform.get("shared"))
    steps = {"shared": [] if recorded["replay"] is None else [recorded["replay"]]} if recorded is not None else {}
    specs = [steps.get(part, transform.get(part) or []) for part in PARTS]
    return list(dict.fromkeys(name for spec in specs for name in entry_points_of(spec)))


def recorded_digests(manifest: Manifest, receipts: Mapping[str, Receipt], rows: RowMap, view: int) -> dict[int, str]:
    """The stored digests of the teacher's inputs for a few samples of a view, by sample number."""
    digests: dict[int, str] = {}
    for sample in proof_rows(manifest.identity.view_seed, view, manifest.layout.num_samples):
        receipt = receipts.get(Block(view, int(rows.blocks_of(rows.sample_rows(sample).start))).name)
        if receipt is not None and str(sample) in receipt.inputs:
            digests[sample] = receipt.inputs[str(sample)]
    return digests


@one_thread()
def check_rendered(
    views: ViewDataset, view: int, recorded: Mapping[int, str], manifest: Manifest, samples: SampleTable | None
) -> int:
    """Render rows of a view and compare them with recorded digests; returns the number of rows compared.

    Raises:
        IdentityMismatch: a row differs; names the sample and the library versions that may be the cause.
    """
    views = ViewDataset(views.dataset, views.plan, rows=views.rows)  # with the teacher's preprocessing
    index_of_row = None if views.rows is None else {int(row): index for index, row in enumerate(views.rows)}
    compared = 0
    for row, expected in recorded.items():
        index = row if index_of_row is None else index_of_row.get(row)
        if index is None:
            continue
        found = input_digest(views[(view, index)][1]).hex()
        if found != expected:
            key = samples.key(row) if samples is not None else str(row)
            raise input_mismatch(view, row, key, found, expected, manifest, knows_samples=samples is not None)
        compared += 1
    return compared


def input_mismatch(
    view: int, sample: int, key: str, found: str, expected: str, manifest: Manifest, *, knows_samples: bool
) -> IdentityMismatch:
    """The error for a rendered input whose digest is not that of the teacher's input."""
    return IdentityMismatch(
        f"view {view} of sample {sample} ({key}) is not what the teacher saw: rendered here its digest is {found}, in "
        f"the cache {expected}.\n"
        f"{_possible_causes(knows_samples)} The cache was built with "
        f"{_versions(manifest) or 'unknown library versions'} on {manifest.provenance.get('platform', 'unknown')}."
    )


def _possible_causes(knows_samples: bool) -> str:
    if knows_samples:
        return "Data, transform and seed agree, so the libraries render differently: use the versions of the cache."
    return (
        "Possible causes: other data or another order than in stage 1; a dataset that augments its samples itself; a "
        "cache that was written from shuffled inputs or another view; other library versions."
    )


class RendersAgain(Protocol):
    """Views that can render samples of a batch again: a `ViewDataset`, or a stream that keeps a few samples."""

    def at_hand(self, numbers: Sequence[int]) -> Sequence[int]:
        """The places of those samples, of some by number, that can be rendered; called before the others."""

    def index_of(self, row: int) -> int | None:
        """The index of a sample for `batch`, by its number in the cache; None if it is not available."""

    def batch(self, items: Iterable[tuple[int, int]]) -> Any:
        """The batched inputs of some (view, index)."""


Views = TypeVar("Views", bound=RendersAgain)


@one_thread()
def check_arrived(
    datasets: Iterable[Views],
    index: Any,
    inputs: Any,
    manifest: Manifest,
    samples: SampleTable | None,
    rows: RowMap,
) -> list[tuple[int, Views]]:
    """Render the first and the last sample of a batch again and compare them with the batch.

    Of a batch of a stream, the first and the last of those that the stream has kept.

    Args:
        datasets: the views that the batch may come from; one that renders the same inputs is enough.
        index: the batch's index from a `ViewDataset`, int (B,).
        inputs: the batch's inputs from the loader.
        manifest, samples, rows: of the cache.

    Samples without any row have no index and are not compared.

    Returns:
        The view of each compared sample, and the dataset that rendered it alike.

    Raises:
        UsageError: plain row numbers, or none of the datasets has the samples.
        ShapeError: fewer inputs than indices.
        IdentityMismatch: a sample differs from the view that its index names.
    """
    index_B = index_tensor(index)
    views_B, rows_B = (part.tolist() for part in split_index(index_B))
    with_rows = torch.nonzero(index_B.cpu() != NO_ROW).flatten().tolist()
    datasets = list(datasets)
    numbers = [int(number) for number in rows.samples_of([rows_B[place] for place in with_rows])] if with_rows else []
    at_hand = [found for views in datasets if (found := views.at_hand(numbers))]
    # A stream has few samples at hand, a dataset all.
    chosen = [with_rows[place] for place in min(at_hand, key=len, default=range(len(with_rows)))]
    places = sorted({chosen[0], chosen[-1]}) if chosen else []
    if any(views_B[place] < 0 for place in places):
        raise UsageError(
            "the batch has plain row numbers, which name no view; pass the index that `ViewDataset` gives with each "
            "sample"
        )
    alike = []
    for place in places:
        view, row = views_B[place], int(rows.samples_of(rows_B[place]))
        try:
            arrived = batch_item(inputs, place)
        except IndexError:
            raise ShapeError(
                f"the batch has {len(rows_B)} indices, but fewer inputs; expected one input each"
            ) from None
        reasons = []
        for views in datasets:
            number = views.index_of(row)
            if number is not None:
                rendered = views.batch([(view, number)])
                if isinstance(views, ViewDataset) and isinstance(arrived, torch.Tensor) and arrived.is_floating_point():
                    rendered = views.finish(to_device(rendered, arrived.device))  # what `on_device` leaves to do
                reasons.append(_difference(arrived, batch_item(rendered, 0)))
                if reasons[-1] is None:
                    alike.append((view, views))
                    break
        if not reasons:
            raise UsageError(
                f"no ViewDataset of this cache has sample {row} of this batch. Create it with `cache.view_plan`, or "
                "with the same ViewPlan object that `check_plan` was called with; or pass it as `views=`. With "
                "`StreamViews`, check the first batch of an epoch"
            )
        if None not in reasons:
            key = samples.key(row) if samples is not None else str(row)
            raise IdentityMismatch(
                f"sample {row} ({key}) of this batch is not view {view} as it is rendered here: {reasons[0]}.\n"
                "Something between the dataset and this call changes the inputs (a loader that casts or normalizes, a "
                "transform on the device) or pairs them with other indices. Check the batch as it comes from the "
                "dataset, and pass a model's own steps as `preprocess=`"
            )
    return alike


def _difference(arrived: Any, rendered: Any) -> str | None:
    """How an input of a batch differs from the rendered one; None if it doesn't.

    Ignores another float type, padding of a sequence on either side, and entries that a collate function added.
    """
    if isinstance(rendered, Mapping) and isinstance(arrived, Mapping):
        if not arrived.keys() >= rendered.keys():
            return f"it has the entries {sorted(arrived)}, expected {sorted(rendered)}"
        return next(filter(None, (_difference(arrived[name], rendered[name]) for name in rendered)), None)
    if isinstance(rendered, tuple | list) and isinstance(arrived, tuple | list) and len(rendered) == len(arrived):
        return next(filter(None, map(_difference, arrived, rendered)), None)
    if isinstance(rendered, str | bytes):
        return None if arrived == rendered else "another text arrived"
    try:
        found, expected = torch.as_tensor(arrived).detach().cpu(), torch.as_tensor(rendered).detach().cpu()
    except (TypeError, ValueError, RuntimeError):
        return None if input_digest(arrived) == input_digest(rendered) else "its digest differs"
    if found.dtype != expected.dtype and not (found.is_floating_point() and expected.is_floating_point()):
        return f"{found.dtype} arrived, expected {expected.dtype}"
    if found.shape != expected.shape:
        if found.ndim != 1 or expected.ndim != 1 or len(found) < len(expected):
            return f"shape {tuple(found.shape)} arrived, expected {tuple(expected.shape)}"
        ends = found[: len(expected)], found[len(found) - len(expected) :]
        return None if any(torch.equal(end, expected) for end in ends) else "other values arrived"
    expected = expected.to(found.dtype)
    if torch.equal(found, expected):
        return None
    differing = found != expected
    most = float((found[differing].double() - expected[differing].double()).abs().max())
    return f"{int(differing.sum())} of {found.numel()} values differ, by {most:.3g} at most"


def _versions(manifest: Manifest) -> str:
    versions = manifest.provenance.get("versions")
    known = versions if isinstance(versions, dict) else {}
    return ", ".join(f"{name} {known[name]}" for name in ("torchvision", "pillow") if name in known)
