"""How a cache's views are rendered again, and whether that gives the pixels that the teacher was given."""

from __future__ import annotations

from collections.abc import Mapping

from logitcache.cache.layout import Block
from logitcache.cache.manifest import Manifest, Receipt
from logitcache.data.samples import SampleTable, input_digest
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
        model_input=parts[1],
        num_classes=manifest.layout.num_classes,
        num_samples=manifest.layout.num_samples,
        contents=None if samples is None else samples.contents,
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


def _versions(manifest: Manifest) -> str:
    versions = manifest.provenance.get("versions")
    known = versions if isinstance(versions, dict) else {}
    return ", ".join(f"{name} {known[name]}" for name in ("torchvision", "pillow") if name in known)
