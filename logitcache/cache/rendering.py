"""How a cache's views are rendered again, and whether that gives the pixels that the teacher was given."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from logitcache.cache.layout import Block
from logitcache.cache.manifest import Manifest, Receipt
from logitcache.data.index import split_index
from logitcache.data.samples import SampleTable, batch_item, input_digest
from logitcache.data.transforms import build_transform, entry_points_of
from logitcache.data.views import Mixing, ViewDataset, ViewPlan, proof_rows
from logitcache.errors import IdentityMismatch, UntrustedCode, UsageError


def recorded_plan(manifest: Manifest, samples: SampleTable | None, *, url: str, trust: bool) -> ViewPlan:
    """The plan of a cache's views, which holds samples to their content digests.

    Raises:
        UsageError: the cache does not say how its views were made, or in a way that can't be built here.
        UntrustedCode: a transform that is somebody's code, wherever it lies, and `trust` is False.
    """
    transform = manifest.identity.transform
    if transform is None:
        raise UsageError(
            f"{url} does not say how its views were made: it was created without `view_plan`; render the views as its "
            "maker did"
        )
    specs = {part: transform[part] for part in ("shared", "teacher_input")}
    for part, spec in specs.items():
        if spec is not None and not isinstance(spec, list):
            raise UsageError(
                f"{url} was made with a transform given as a Python object ({part}): make the same ViewPlan again, and "
                "hold it to the cache with `cache.check_plan(plan)`"
            )
    named = list(dict.fromkeys(name for spec in specs.values() for name in entry_points_of(spec or [])))
    if named and not trust:
        raise UntrustedCode(
            f"the views of {url} are made by code that the cache names: {', '.join(named)}.\nA cache never vouches for "
            "code, even in the working folder. Look at it, then open the cache with logitcache.open(..., trust=True), "
            "or --trust on the command line; or make the same ViewPlan yourself, and compare it with "
            "`cache.check_plan(plan)`"
        )
    parts = [None if spec is None else build_transform(spec, trust=trust) for spec in specs.values()]
    return ViewPlan(
        transform=parts[0],
        seed=manifest.identity.view_seed,
        mixing=Mixing(**(transform["mixing"] or {})),
        preprocess=parts[1],
        num_classes=manifest.layout.num_classes,
        num_samples=manifest.layout.num_samples,
        contents=None if samples is None else samples.contents,
        views=manifest.layout.views,
    )


def recorded_digests(manifest: Manifest, receipts: Mapping[str, Receipt], view: int) -> dict[int, str]:
    """The digest of what the teacher was given, by row, for the proof rows of a view that are known."""
    layout = manifest.layout
    digests: dict[int, str] = {}
    for row in proof_rows(manifest.identity.view_seed, view, layout.num_samples):
        receipt = receipts.get(Block(view, row // layout.rows_per_block).name)
        if receipt is not None and str(row) in receipt.inputs:
            digests[row] = receipt.inputs[str(row)]
    return digests


def check_rendered(
    views: ViewDataset, view: int, recorded: Mapping[int, str], manifest: Manifest, samples: SampleTable | None
) -> int:
    """Render rows of a view and hold their pixels to recorded digests; returns how many were compared.

    Raises:
        IdentityMismatch: names the sample, and the library versions that may be the cause.
    """
    views = ViewDataset(views.dataset, views.plan, rows=views.rows)  # the teacher's own part, whatever the model's
    index_of_row = None if views.rows is None else {int(row): index for index, row in enumerate(views.rows)}
    compared = 0
    for row, expected in recorded.items():
        index = row if index_of_row is None else index_of_row.get(row)
        if index is None:
            continue
        found = input_digest(views[(view, index)][1]).hex()
        if found != expected:
            key = samples.key(row) if samples is not None else str(row)
            raise IdentityMismatch(
                f"view {view} of sample {row} ({key}) is not what the teacher saw: rendered here its digest is "
                f"{found}, in the cache {expected}.\n"
                "Data, transform and seed agree, so the transform's code renders otherwise here: the cache was built "
                f"with {_versions(manifest) or 'unknown library versions'} on "
                f"{manifest.provenance.get('platform', 'unknown')}.\n"
                "Use those versions, or build the cache again."
            )
        compared += 1
    return compared


def check_arrived(
    datasets: Iterable[ViewDataset], index: Any, inputs: Any, manifest: Manifest, samples: SampleTable | None
) -> int:
    """Render the first and the last sample of a batch again and compare them with what arrived.

    Args:
        datasets: the views that the batch may come from; one that renders the same inputs is enough.
        index: of the batch, int (B,), as a `ViewDataset` gave it.
        inputs: of the batch, as the loader gave them.

    Returns:
        How many samples were compared.

    Raises:
        UsageError: no dataset at hand holds the batch's samples, or plain row numbers.
        IdentityMismatch: what arrived is not the view that the index names.
    """
    views_B, rows_B = (part.tolist() for part in split_index(index))
    places = sorted({0, len(rows_B) - 1}) if rows_B else []
    if any(views_B[place] < 0 for place in places):
        raise UsageError(
            "the batch has plain row numbers, which name no view; pass the index that `ViewDataset` gives with each "
            "sample"
        )
    datasets = list(datasets)
    for place in places:
        view, row = views_B[place], rows_B[place]
        reasons = []
        for views in datasets:
            number = views.index_of(row)
            if number is not None:
                rendered = batch_item(views.batch([(view, number)]), 0)
                reasons.append(_difference(batch_item(inputs, place), rendered))
        if not reasons:
            raise UsageError(
                f"no dataset at hand has sample {row} of this batch; create `ViewDataset(dataset, cache.view_plan)` "
                "first, or pass it as `views=`"
            )
        if None not in reasons:
            key = samples.key(row) if samples is not None else str(row)
            raise IdentityMismatch(
                f"sample {row} ({key}) of this batch is not view {view} as it is rendered here: {reasons[0]}.\n"
                "Something between the dataset and this call changes the inputs (a loader that casts or normalises, a "
                "transform on the device), or pairs them with other indices. Check the batch as the dataset gives it, "
                "and pass a model's own steps as `preprocess=`"
            )
    return len(places)


def _difference(arrived: Any, rendered: Any) -> str | None:
    """In what an input that arrived differs from the one that was rendered; None where it is the same.

    A float input may have arrived in another float type, a sequence may have been padded on either side, and a collate
    function may have added entries.
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
