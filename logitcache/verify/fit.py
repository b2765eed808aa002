"""Compares a cache with data, views and teacher; runs before the first step of every student."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from logitcache.cache.averaging import check_same_pixels, check_same_views
from logitcache.cache.ensemble import merged_parts
from logitcache.cache.manifest import LOGITS
from logitcache.cache.reader import LogitCache, open_sealed
from logitcache.catalog.datasets import Data
from logitcache.data.rows import rows_of_dataset
from logitcache.data.samples import (
    Dataset,
    SampleTable,
    check_targets,
    compare_samples,
    content_table,
    differing_contents,
    match_rows,
    sample_table,
)
from logitcache.data.views import ViewDataset, ViewPlan
from logitcache.errors import IdentityMismatch, IncompleteCache, UsageError, unsealed
from logitcache.progress import track

OTHER_TEACHER = (
    "\nA student can also be trained from the cache of another teacher: name the cache in `students[].labels`, as "
    "{caches: [PATH]}."
)


@dataclass(frozen=True, kw_only=True)
class TeacherIdentity:
    """The teacher that a cache is compared with."""

    name: str
    """The fingerprint of its weights, or only its name where the weights are not on this machine."""
    has_weights: bool
    """Whether `name` is a fingerprint."""
    precision: str
    sources: Mapping[str, Any] = field(default_factory=dict)
    """Where in the teacher each output comes from, as a cache's identity records it."""

    def computed(self, teacher: str) -> bool:
        """Whether this is the teacher that a cache's identity states."""
        return self.name == (teacher if self.has_weights else teacher.partition("@")[0])


def open_fitting_cache(
    location: str,
    data: Data,
    plan: ViewPlan,
    teacher: TeacherIdentity | None,
    *,
    num_views: int,
    subset: bool = False,
    trust: bool,
) -> tuple[LogitCache, np.ndarray | None]:
    """Open a sealed cache, and compare it with data, views and teacher.

    Args:
        location: of the cache.
        data, plan: what a student is trained on.
        teacher: None accepts any teacher.
        num_views: views that the cache must have.
        subset: allow the data to lack some of the cached samples.
        trust: allow entry points from outside the working directory.

    Returns:
        The cache, and the cache's row of each sample in the data, int64 (M,); None where both have the same order.

    Raises:
        IdentityMismatch: something differs; names the field or the sample.
        IncompleteCache: the cache is not sealed, or has too few views.
    """
    cache = open_sealed(location, trust=trust)
    differences = view_differences(cache, data, plan)
    if teacher is not None:
        differences += teacher_differences(cache, teacher)
    if differences:
        raise IdentityMismatch(
            f"cache {cache.id[:12]}… at {location} doesn't match this pipeline; they differ in\n  "
            + "\n  ".join(differences)
            + "\nRevert these differences, or build another cache with another cache.path."
            + (OTHER_TEACHER if all(line.startswith("teacher: ") for line in differences) else "")
        )
    _check_views(cache, location, num_views)
    if cache.samples is None:
        if cache.num_samples != len(data.train):
            raise IdentityMismatch(
                f"cache {cache.id[:12]}… has {cache.num_samples} samples; this dataset has {len(data.train)}"
            )
        return cache, None
    rows = match_rows(cache.samples, sample_table(data.train), cache_id=cache.id, subset=subset)
    differences = _sequence_differences(cache, data.train, rows)
    if differences:
        raise IdentityMismatch(
            f"cache {cache.id[:12]}… at {location} was built from other sequences; {len(differences)} differ, the "
            f"first: {differences[0]}.\nRestore them, or build another cache with another cache.path."
        )
    same_order = len(rows) == cache.num_samples and bool((rows == np.arange(len(rows))).all())
    return cache, None if same_order else rows


def open_fitting_caches(
    locations: Sequence[str], data: Data, plan: ViewPlan, *, num_views: int, subset: bool = False, trust: bool
) -> tuple[list[LogitCache], np.ndarray | None]:
    """Open the caches of several teachers; compare the first with data and views, and the others with the first.

    Raises:
        IdentityMismatch, IncompleteCache: as `open_fitting_cache`; names the cache.
    """
    first, rows = open_fitting_cache(locations[0], data, plan, None, num_views=num_views, subset=subset, trust=trust)
    caches = [first]
    for location in locations[1:]:
        cache = open_sealed(location, trust=trust)
        check_same_views(locations[0], first, location, cache)
        _check_views(cache, location, num_views)
        caches.append(cache)
    check_same_pixels(locations, caches, num_views)
    return caches, rows


def checked_plan(cache: LogitCache, plan: ViewPlan | None) -> ViewPlan:
    """A view plan that is compared with a cache, before there is a dataset; by default the cache's own.

    Raises:
        IdentityMismatch: the plan is not that of the cache.
        IncompleteCache: the cache is not sealed.
        UsageError: no plan is given, and the cache can't make one; or views of a cache that has none recorded.
    """
    if not cache.sealed:
        raise unsealed(cache.storage.url)
    plan = cache.view_plan if plan is None else plan
    if cache.manifest.identity.transform is None and any(plan.describe().values()):
        raise UsageError(
            f"{cache.storage.url} was created without `view_plan`, so the views of this plan can't be compared with "
            "it; use a plan without transform, mixing and preprocess, or create the cache with view_plan=plan"
        )
    _refuse(cache, plan_differences(cache, plan), "this view plan")
    return plan if plan.views is not None else replace(plan, views=cache.views)


def matched_views(
    cache: LogitCache,
    dataset: Dataset,
    plan: ViewPlan | None = None,
    *,
    preprocess: Callable[[Any], Any] | None = None,
    rows: np.ndarray | None = None,
    on_device: bool = False,
) -> ViewDataset:
    """The views of a dataset, after it is compared with a cache: samples, labels, tokens, and view plan.

    For training loops without a pipeline. Samples are matched by key, so they may be a part of the cache's, in any
    order. A dataset without `keys` needs `rows`, if the cache has keys. Each one's content is compared
    with the cache when it is first loaded. `cache.check_batch` compares rendered inputs.

    Args:
        cache: sealed.
        dataset: map-style, or a `ViewDataset` of it, whose plan, preprocessing and rows are the defaults. Without
            `targets`, each sample is loaded once, to compare its label, if the cache has labels.
        plan: how the views are made; by default `cache.view_plan`.
        preprocess: the model's deterministic preprocessing; by default the teacher's.
        rows: the number in the cache of each sample, for a dataset without keys.
        on_device: as `ViewDataset` takes it.

    Raises:
        IdentityMismatch: something differs; names the field or the sample.
        IncompleteCache: the cache is not sealed.
        UsageError: no plan is given, and the cache can't make one; or views of a cache that has none recorded.
    """
    if isinstance(dataset, ViewDataset):
        plan, rows = plan or dataset.plan, dataset.rows if rows is None else rows
        dataset, preprocess = dataset.dataset, preprocess or dataset.preprocess
    plan = checked_plan(cache, plan)
    if plan.rows is None:
        plan = replace(plan, rows=rows_of_dataset(dataset, cache.layout.rows_per_block))
    data = Data(train=dataset, num_classes=cache.num_classes, class_names=getattr(dataset, "class_names", None))
    differences = view_differences(cache, data, plan)
    if not cache.manifest.identity.tokenization and cache.samples is not None and cache.samples.contents is not None:
        # Written without `tokenization=`; the tokens themselves are compared.
        differences = [each for each in differences if not each.startswith("tokenization.")]
    _refuse(cache, differences, "this dataset and view plan")
    if cache.samples is None:
        if rows is None and cache.num_samples != len(dataset):
            raise IdentityMismatch(
                f"cache {cache.id[:12]}… has {cache.num_samples} samples; this dataset has {len(dataset)}. Use that of "
                "stage 1; for a part of it, pass the row of each sample in the cache: rows=, or ViewDataset(rows=...)"
            )
    else:
        rows = _matched_rows(cache, sample_table(dataset), rows)
    samples = np.arange(len(dataset)) if rows is None else rows
    _refuse(cache, _sequence_differences(cache, dataset, samples), "these sequences")
    if cache.row_map.one_each:
        _refuse(cache, _content_differences(cache, dataset, samples), "these samples")
    return views_of_cache(cache, dataset, plan, rows, preprocess, on_device=on_device)


def _matched_rows(cache: LogitCache, here: SampleTable, rows: np.ndarray | None) -> np.ndarray | None:
    """The cache's row of each sample in a dataset, int64 (M,); None where both have the same samples in one order.

    Raises:
        IdentityMismatch: a sample is missing, unknown or relabelled; names the first one.
    """
    cached = cache.samples
    assert cached is not None
    if here.keys is None and rows is not None:
        rows = np.asarray(rows, dtype=np.int64)
        check_targets(cached, here, rows, cache_id=cache.id)
    else:
        rows = match_rows(cached, here, cache_id=cache.id, subset=True)
    same_order = len(rows) == cached.num_samples and bool((rows == np.arange(len(rows))).all())
    return None if same_order else rows


def _refuse(cache: LogitCache, differences: Sequence[str], what: str) -> None:
    if differences:
        shown = [*differences[:10], *([f"and {len(differences) - 10} more"] if len(differences) > 10 else [])]
        raise IdentityMismatch(
            f"cache {cache.id[:12]}… at {cache.storage.url} doesn't match {what}; they differ in\n  "
            + "\n  ".join(shown)
            + "\nUse what the teacher saw, or build a cache of this data."
        )


def views_of_cache(
    cache: LogitCache,
    dataset: Dataset,
    plan: ViewPlan,
    rows: np.ndarray | None,
    preprocess: Callable[[Any], Any] | None = None,
    *,
    on_device: bool = False,
) -> ViewDataset:
    """A dataset's views with the rows of a cache; each sample is compared with its content digest when it is loaded.

    Args:
        cache: has this view plan.
        dataset, plan: what is rendered.
        rows: from `open_fitting_cache`.
        preprocess: of the model; the teacher's by default.
        on_device: as `ViewDataset` takes it.
    """
    contents = None if cache.samples is None else cache.samples.contents
    plan = replace(plan, num_samples=cache.num_samples, contents=contents, rows=cache.row_map)
    return ViewDataset(dataset, plan, preprocess=preprocess, rows=rows, on_device=on_device)


def _check_views(cache: LogitCache, location: str, count: int) -> None:
    if count > len(cache.views):
        raise IncompleteCache(
            f"the pipeline needs {count} views; {location} has {len(cache.views)}. "
            "Add views with `logitcache cache-teacher`, copy shared ones with `logitcache pull`, or lower views.count"
        )


def plan_differences(cache: LogitCache, plan: ViewPlan) -> list[str]:
    """The fields of the cache's identity that differ from a view plan; those of the data are not compared."""
    return identity_differences(cache, _plan_fields(cache, plan))


def _plan_fields(cache: LogitCache, plan: ViewPlan) -> dict[str, Any]:
    recorded = cache.manifest.identity.transform is not None
    return {"view_seed": plan.seed, **({"transform": plan.describe()} if recorded else {})}


def view_differences(cache: LogitCache, data: Data, plan: ViewPlan) -> list[str]:
    """The fields of the cache's identity that differ from the views here; samples are compared separately."""
    cached = cache.manifest.identity
    current = _plan_fields(cache, plan)
    if cached.has_logits:
        current["outputs"] = cached.outputs | {LOGITS: [data.num_classes]}
    if cached.class_names is not None and data.class_names is not None:
        current["class_names"] = data.class_names
    if cached.rows is None or plan.rows is None or plan.rows.one_each:
        current["rows"] = None if plan.rows is None else plan.rows.fingerprint()
    current["tokenization"] = getattr(data.train, "tokenization", None) or {}
    return identity_differences(cache, current)


def _sequence_differences(cache: LogitCache, dataset: Dataset, samples: np.ndarray) -> list[str]:
    """Sequences whose tokens or rows differ from those of the cache, one line each; for data in memory only.

    Args:
        cache: the cache.
        dataset: of sequences or other samples.
        samples: the cache's sample of each sample here, int64 (M,).
    """
    theirs, ours = cache.row_map, rows_of_dataset(dataset)
    if theirs.one_each:
        return []
    differences = []
    counts, own_counts = np.diff(theirs.offsets)[samples], np.diff(ours.offsets)
    for index in np.flatnonzero(counts != own_counts):
        differences.append(f"{_named(cache, samples[index])} has {counts[index]} rows, {own_counts[index]} here")
    if differences:
        return differences
    if theirs.positions is not None or ours.positions is not None:
        shift = np.repeat(theirs.offsets[samples] - ours.offsets[:-1], own_counts)
        rows = np.arange(ours.num_rows)
        moved = theirs.positions_of(rows + shift) != ours.positions_of(rows)
        others = np.unique(ours.samples_of(rows[moved]))
        differences += [f"{_named(cache, samples[index])} has rows at other positions" for index in others]
    return differences + _content_differences(cache, dataset, samples)


def _content_differences(cache: LogitCache, dataset: Dataset, samples: np.ndarray) -> list[str]:
    """Samples whose content differs from that of the cache, one line each; for data in memory only."""
    contents = None if cache.samples is None else cache.samples.contents
    if contents is None or not getattr(dataset, "in_memory", False):
        return []
    changed = differing_contents(contents[samples], content_table(dataset))
    what = "other content" if cache.row_map.one_each else "other tokens"
    return [f"{_named(cache, samples[index])} has {what}" for index in np.flatnonzero(changed)]


def _named(cache: LogitCache, sample: Any) -> str:
    return f"sample {sample}" + ("" if cache.samples is None else f" ({cache.samples.key(int(sample))})")


def teacher_differences(cache: LogitCache, teacher: TeacherIdentity) -> list[str]:
    """The fields of the cache's identity that differ from a teacher, or from the sources of its outputs.

    Outputs that only one of them has are no difference: those that a student needs are checked separately.
    """
    cached = cache.manifest.identity
    current: dict[str, Any] = {"precision": teacher.precision}
    # The cache of a mean matches any of its teachers.
    parts = merged_parts(cache.manifest)
    if not parts:
        current["output_sources"] = _sources(cached.output_sources, teacher.sources)
    part = next((part for part in parts if teacher.computed(part.teacher)), None)
    if part is not None and part.precision == teacher.precision:
        del current["precision"]
    if part is None and not teacher.computed(cached.teacher):
        current["teacher"] = teacher.name
    differences = identity_differences(cache, current)
    if parts and part is None:
        teachers = ", ".join(part.teacher for part in parts)
        differences.append(f"teacher: the cache is the mean of {teachers}, none of which is {teacher.name}")
    return differences


def _sources(cached: dict[str, Any], current: Mapping[str, Any]) -> dict[str, Any]:
    """The cache's sources, replaced by the current ones for the logits and for outputs that both have."""
    shared = {name: current[name] for name in cached.keys() & current.keys()}
    logits = {LOGITS: current[LOGITS]} if LOGITS in current else {}
    return {name: source for name, source in cached.items() if name != LOGITS} | shared | logits


def all_differences(
    cache: LogitCache, data: Data, plan: ViewPlan, teacher: TeacherIdentity, *, num_views: int, num_workers: int
) -> list[str]:
    """All differences between data, views and teacher and those of a cache, one line each.

    Reads every sample once, and renders the proof rows of every view.
    """
    differences = view_differences(cache, data, plan) + teacher_differences(cache, teacher)
    if num_views > len(cache.views):
        differences.append(f"views.count: {len(cache.views)} in the cache, {num_views} here")
    if cache.samples is None:
        return differences
    current = sample_table(data.train)
    with track("reading the data", current.num_samples, unit="samples") as meter:
        contents = content_table(data.train, num_workers=num_workers, advance=meter.advance)
    current = replace(current, contents=contents)
    differences += compare_samples(cache.samples, current)
    if not differences:
        samples = match_rows(cache.samples, current, cache_id=cache.id)
        differences += _sequence_differences(cache, data.train, samples)
    if not differences:
        views = ViewDataset(data.train, plan, rows=samples)
        for view in cache.views:
            try:
                cache.verify_inputs(views, view)
            except IdentityMismatch as error:
                differences.append(str(error).splitlines()[0])
    return differences


def identity_differences(cache: LogitCache, current: Mapping[str, Any]) -> list[str]:
    """The given fields of an identity that differ from those of a cache, one line each."""
    cached = cache.manifest.identity
    return cached.differences(type(cached).model_validate(cached.model_dump() | json.loads(json.dumps(dict(current)))))
