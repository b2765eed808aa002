"""The card of a cache: a `README.md` for data hubs, with what the cache is and how to load it.

The front matter has the fields of data cards (license, tags, task, size). Untrusted text (names, class names,
transforms) is escaped or put into code spans, so that it is neither HTML nor a link.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import yaml

from logitcache.cache.card_fields import Card, card_from
from logitcache.cache.cut_classes import cut_classes_of
from logitcache.cache.ensemble import Part, merged_parts
from logitcache.cache.layout import SAMPLE_ARRAYS
from logitcache.cache.manifest import CARD
from logitcache.cache.names import names_of, recorded_names
from logitcache.cache.reader import LogitCache, ViewParameters
from logitcache.cache.rendering import has_recipe, named_code
from logitcache.data.recorded import RecordedMixing, recorded_step
from logitcache.data.views import Mixing, ViewPlan
from logitcache.encodings import PackedTopK, Sampled, TopK
from logitcache.errors import CorruptCache, UsageError
from logitcache.markdown import LONGEST_NAME, code, escaped, fenced, one_line, table
from logitcache.targets import SparseTargets, row_slices

MEASURED_ROWS = 65_536
MEASURED_LOGITS = 2**26
"""Limits on the rows, and the logits of these rows, that a card is measured on, to keep sealing cheap."""
ROWS_AT_ONCE = 1024
TASK_CATEGORIES = {"causal": "text-generation", "masked": "fill-mask", "classification": "text-classification"}
"""Of the Hugging Face Hub, by the task of a tokenization."""
ROW_NAMES = {"causal": "predicted tokens", "masked": "predicted tokens"}
"""What the rows of a sample are, by the task of a tokenization."""
SHOWN_CLASSES = 20
LONGEST_TEXT, LONGEST_TRANSFORM = 10_000, 4_000
"""Maximum characters of the description and of the transform on a card."""


def write_card(cache: LogitCache) -> None:
    """Write the card of a sealed cache.

    Raises:
        CorruptCache: the labels that the teacher's accuracy is measured on are damaged.
    """
    cache.storage.put(CARD, render_card(cache).encode())


def render_card(cache: LogitCache, *, front: Mapping[str, Any] | None = None, loading: str | None = None) -> str:
    """The card of a sealed cache, with front matter.

    Args:
        cache: the cache.
        front: more fields of the front matter.
        loading: a section in place of that on how to load the cache, for its labels in another format.
    """
    try:
        stated = card_from(cache.manifest.provenance.get("card", {}))
    except (UsageError, TypeError, ValueError):  # an untrusted manifest
        stated = Card()
    fields = _front_matter(cache, stated) | dict(front or {})
    dumped = yaml.safe_dump(fields, sort_keys=False, allow_unicode=True, width=10_000)
    parts = [f"---\n{dumped}---\n", *_sections(cache, stated, loading)]
    return "\n".join(parts)


def _front_matter(cache: LogitCache, stated: Card) -> dict[str, Any]:
    identity, recorded = cache.manifest.identity, recorded_names(cache.manifest)
    named = [one_line(tag, LONGEST_NAME) for tag in stated.tags]
    front: dict[str, Any] = {
        "license": one_line(stated.license or "unknown", LONGEST_NAME),
        "pretty_name": _title(cache, stated),
        "tags": list(dict.fromkeys(["knowledge-distillation", "soft-labels", "logits", "logitcache", *named])),
        "size_categories": [_size_category(cache.num_samples)],
        "dataset": recorded.get("dataset") or one_line(identity.dataset, LONGEST_NAME),
        "teacher": recorded.get("teacher") or one_line(identity.teacher, LONGEST_NAME),
    }
    task = TASK_CATEGORIES.get(str(identity.tokenization.get("task"))) if identity.tokenization else None
    if task is None and identity.transform is not None and cache.row_map.one_each and not identity.tokenization:
        task = "image-classification"
    if task is not None:
        front["task_categories"] = [task]
    if stated.dataset:
        front["source_datasets"] = [one_line(stated.dataset, LONGEST_NAME)]
    return front


def _sections(cache: LogitCache, stated: Card, loading: str | None) -> Iterator[str]:
    yield f"# {escaped(_title(cache, stated))}\n"
    yield from _what_this_is(cache, stated)
    yield from _how_to_load_it(cache) if loading is None else [loading]
    yield "## Size\n"
    rows = cache.num_rows * len(cache.views)
    sequences = not cache.row_map.one_each
    yield table(
        {
            "samples": f"{cache.num_samples:,}",
            **(_rows_of_samples(cache) if sequences else {}),
            "views": _views(cache),
            "classes": f"{cache.num_classes:,}" if cache.has_logits else "none: the cache has no logits",
            "encoding": code(repr(cache.encoding)),
            "bytes": f"{cache.stored_bytes:,}",
            f"bytes per {'row' if sequences else 'sample'} and view": f"{cache.target_bytes / rows:.1f}",
            **{
                f"output {name}": f"{code(str(output.shape))} per sample, {code(repr(output.encoding))}, "
                f"{cache.contents.output_bytes[name] / rows:.1f} bytes"
                for name, output in cache.extra_outputs.items()
            },
        }
    )
    if cache.has_logits:
        yield "## Fidelity\n"
        yield _fidelity(cache)
    distributions = _distributions(cache)
    if distributions is not None:
        yield "## Distributions\n"
        yield distributions
    accuracy = _accuracy(cache)
    if accuracy is not None:
        yield "## Accuracy\n"
        yield accuracy
    yield from _how_it_was_made(cache)


def _what_this_is(cache: LogitCache, stated: Card) -> Iterator[str]:
    identity, recorded = cache.manifest.identity, recorded_names(cache.manifest)
    if stated.description:
        paragraphs = re.split(r"\n\s*\n", stated.description[:LONGEST_TEXT])
        yield from (f"{escaped(one_line(text, LONGEST_TEXT))}\n" for text in paragraphs if text.strip())
    yield (
        f"The {'logits' if cache.has_logits else 'outputs'} of a teacher on deterministic views of a dataset, for "
        "offline knowledge distillation: a student "
        f"trains from them without running the teacher. The {'texts' if identity.tokenization else 'samples'} are not "
        "included; students make the same views from their own copy of the dataset.\n"
    )
    lines = [f"- Teacher: {_known_as(recorded.get('teacher'))}{code(identity.teacher)}"]
    lines += [f"  - {code(part.teacher)}, weight {part.weight:.4g}" for part in _parts(cache)]
    lines.append(f"- Dataset: {_known_as(recorded.get('dataset'))}{code(identity.dataset)}")
    if identity.class_names:
        shown = ", ".join(code(name) for name in identity.class_names[:SHOWN_CLASSES])
        more = cache.num_classes - SHOWN_CLASSES
        lines.append(f"- Classes: {shown}{f' and {more:,} more' if more > 0 else ''}")
    if identity.tokenization:
        lines.append("- Tokenization:")
        stated_fields = sorted(identity.tokenization.items())[:SHOWN_CLASSES]
        lines += [f"  - {code(name)}: {code(json.dumps(value))}" for name, value in stated_fields]
    cut = cut_classes_of(cache.manifest)
    if cut is not None:
        lines.append(f"- Left out: {cut.text}")
    licensed = code(stated.license) if stated.license else "not stated"
    lines.append(f"- License: {licensed}")
    if stated.url:
        lines.append(f"- More: <{stated.url}>")
    yield "\n".join(lines) + "\n"


def _known_as(name: str | None) -> str:
    return f"{escaped(name)}, " if name else ""


def _parts(cache: LogitCache) -> list[Part]:
    """The caches that a merged cache is the mean of."""
    try:
        return merged_parts(cache.manifest)
    except CorruptCache:  # an untrusted manifest
        return []


def _how_to_load_it(cache: LogitCache) -> Iterator[str]:
    array = next(iter(cache.layout.arrays))
    yield "## Load it\n"
    yield (
        "```python\nimport logitcache\n\n"
        'cache = logitcache.open(".")  # this folder; also takes other paths and URLs\n'
        f'assert cache.digest == "{cache.digest}"\n'
        + (
            f"print(cache.view({cache.views.start}).logits([0]))  # float32 (1, {cache.num_classes}), "
            "up to a constant per row\n"
            if cache.has_logits
            else ""
        )
        + "".join(
            f'print(cache.view({cache.views.start}).output("{name}", [0]))  # float32 {(1, *output.shape)}\n'
            for name, output in cache.extra_outputs.items()
        )
        + "```\n"
    )
    if not cache.row_map.one_each:
        yield _which_rows(cache)
    yield from _how_to_render_it(cache)
    command = _training_command(cache)
    yield "On the command line" + (", with a pipeline for your copy of the data:\n" if command else ":\n")
    yield (
        f"```\nlogitcache pull URL mine.cache --expect {cache.pin}\nlogitcache verify mine.cache --deep\n{command}```\n"
    )
    yield "Any Zarr v3 reader, in any language, opens the encoded logits:\n"
    yield f'```python\nimport zarr\n\nprint(zarr.open_group("labels.zarr", mode="r")["{array}"].shape)\n```\n'


def _which_rows(cache: LogitCache) -> str:
    """Which rows belong to a sample, and what they predict."""
    text = "The rows of sample `i` are `cache.row_map.sample_rows(i)`."
    if cache.manifest.identity.tokenization.get("task") == "causal":
        text += " The row at position `t` predicts token `t + 1`."
    if cache.row_map.positions is not None:
        text += " Some positions have no row: `cache.row_map.positions_of(rows)` are those that have one."
    return f"{text} `logitcache.position_index` gives the index of each position of a padded batch.\n"


def _how_to_render_it(cache: LogitCache) -> Iterator[str]:
    """How the samples become what the teacher saw, in Python."""
    transform = cache.manifest.identity.transform
    samples = f"`dataset` has the {cache.num_samples:,} samples of the cache in its order"
    samples += "." if cache.samples is None or cache.samples.keys is None else ": `cache.samples.keys`."
    checked = "`cache.verify_inputs` and `cache.check_batch` check that."
    if transform is None:
        yield (
            "This cache has no recipe of its views: prepare the samples as for the teacher, and look up their logits "
            "by row number.\n"
        )
    elif has_recipe(transform):
        yield (
            "`logitcache.ViewDataset(dataset, cache.view_plan)` renders the views that the teacher saw; "
            f"{checked} Here {samples}\n"
        )
        named = _code_of_views(transform)
        if named:
            shown = ", ".join(map(code, named))
            yield f"The views need code that is not here: {shown}. Review it, then open the cache with `trust=True`.\n"
    elif _is_recorded(transform):
        yield (
            "The tool that chose the views stored their parameters, such as seeds, but not its transform. With that "
            "transform, `logitcache.ViewDataset(dataset, cache.view_plan_with(function))` renders the views: it calls "
            f"`function(sample, parameters)`. Here {samples}\n"
        )
    else:
        parts = "transform=..., preprocess=..., seed=..." if transform["teacher_input"] else "transform=..., seed=..."
        yield (
            "The transform was a Python object, which can't be stored. Make the same plan from its description below, "
            f"`plan = logitcache.ViewPlan({parts})`, and call `cache.check_plan(plan)`, which compares "
            f"the two. Then `logitcache.ViewDataset(dataset, plan)` renders the views that the teacher saw; {checked} "
            f"Here {samples}\n"
        )


def _training_command(cache: LogitCache) -> str:
    """The line that trains students from the cache; empty where no pipeline can describe its views or tokenization."""
    identity = cache.manifest.identity
    tokenized_elsewhere = bool(identity.tokenization) and "task" not in identity.tokenization
    if tokenized_elsewhere or not (identity.transform is None or has_recipe(identity.transform)):
        return ""
    # Any pipeline's teacher has a fingerprint; labels of named caches are of any teacher.
    teachers = [part.teacher for part in _parts(cache)] or [identity.teacher]
    of_a_pipeline = all(re.search(r"@[0-9a-f]{64}$", teacher) for teacher in teachers)
    labels = "cache.path=mine.cache" if of_a_pipeline else "'students.NAME.labels={caches: [mine.cache]}'"
    views = " 'views.transform={recorded: {cache: mine.cache}}'" if _is_recorded(identity.transform) else ""
    return f"logitcache train-student PIPELINE {labels}{views}\n"


def _is_recorded(transform: Any) -> bool:
    """Whether another tool chose the views."""
    try:
        return isinstance(transform, dict) and recorded_step(transform.get("shared")) is not None
    except UsageError:  # an untrusted manifest
        return False


def _code_of_views(transform: dict[str, Any]) -> list[str]:
    try:
        return named_code(transform)
    except UsageError:  # an untrusted manifest
        return []


def _views(cache: LogitCache) -> str:
    part = cache.manifest.provenance.get("copied_from") is not None
    numbers = f" (numbers {cache.views.start} to {cache.views.stop - 1}; a partial copy)" if part else ""
    return f"{len(cache.views):,}{numbers}"


def _fidelity(cache: LogitCache) -> str:
    entries = [cache.records.view_entry(view) for view in cache.records.by_view.views]
    num_blocks = len(entries) * cache.layout.blocks_per_view
    measured = sum(entry.measured_blocks for entry in entries)
    largest = max((entry.kl_max for entry in entries if entry.kl_max is not None), default=None)
    lines = []
    if measured and cache.kl_mean is not None:
        lines.append(
            f"KL(teacher ‖ cache) of the logits at T = 1, measured on every row at writing: mean {cache.kl_mean:.2g} "
            f"nats, largest {largest:.2g} nats."
        )
        if cache.contents.kl_at:
            at = " and ".join(f"{nats:.2g} nats at T = {T}" for T, nats in sorted(cache.contents.kl_at.items()))
            lines.append(f"At higher temperatures, measured on some rows: mean {at}, without the factor T².")
        if _parts(cache):
            lines.append("Here the teacher is the mean of the logits in the merged caches.")
    if measured < num_blocks:
        where = f"In {num_blocks - measured:,} of {num_blocks:,} blocks"
        if isinstance(cache.encoding, Sampled):
            lines.append(f"{where} it is infinite: the encoding gives zero probability to classes that have some.")
        else:
            lines.append(f"{where} it is unknown: only some of the teacher's log-probabilities were available.")
    return " ".join(lines) + "\n"


def _rows_of_samples(cache: LogitCache) -> dict[str, str]:
    """Rows of a view and of a sample, for samples with several."""
    counts_N = np.diff(cache.row_offsets)
    what = ROW_NAMES.get(str(cache.manifest.identity.tokenization.get("task")), "rows")
    return {
        "rows per view": f"{cache.num_rows:,}",
        f"{what} per sample": f"{counts_N.mean():,.1f} on average, {counts_N.max():,} at most",
    }


def _distributions(cache: LogitCache) -> str | None:
    """How concentrated the distributions of sequences are, measured on some rows; None with one row per sample.

    Raises:
        CorruptCache: the labels are damaged.
    """
    if cache.row_map.one_each or not cache.has_logits:
        return None
    num_rows = _num_measured(cache)
    view = cache.view(cache.views.start, memory_budget=1, ahead=False)
    entropy, kept = 0.0, 0.0
    for start in range(0, num_rows, ROWS_AT_ONCE):
        targets = view.targets(range(start, min(start + ROWS_AT_ONCE, num_rows)))
        for rows in row_slices(len(targets), cache.num_classes, targets.device):
            entropy += float(targets[rows].entropy().sum())
        if isinstance(targets, SparseTargets):
            kept += float((1.0 - targets.softened().tail.exp()).sum())
    mean = entropy / num_rows
    lines = [f"On the first {num_rows:,} rows of view {cache.views.start}:"]
    if isinstance(cache.encoding, PackedTopK | TopK):
        lines.append(f"the stored classes have {kept / num_rows:.2%} of the teacher's probability.")
    lines.append(
        f"The mean entropy of the stored distributions is {mean:.3f} nats, a perplexity of {math.exp(mean):,.2f}."
    )
    return " ".join(lines) + "\n"


def _accuracy(cache: LogitCache) -> str | None:
    counted = first_class_accuracy(cache)
    if counted is None:
        return None
    right, rows, looked_at = counted
    looked = f"the first {looked_at:,} rows of view {cache.views.start}"
    where = looked if rows == looked_at else f"the {rows:,} unmixed rows among {looked}"
    return (
        f"Teacher top-1 accuracy: **{right / rows:.2%}**, on {where}. These are training samples, and the teacher may "
        "have been trained on them, so this is not a test accuracy.\n"
    )


def first_class_accuracy(cache: LogitCache) -> tuple[int, int, int] | None:
    """Top-1 accuracy of the cached labels: (correct rows, unmixed rows, rows considered).

    Considers the first 65 536 rows of the first view, fewer with very many classes. None without targets, and if mixup
    or CutMix changed every row.

    Raises:
        CorruptCache: the labels or the sample table are damaged.
    """
    if not set(SAMPLE_ARRAYS[1:]) <= cache.layout.fixed.keys() or cache.samples is None or not cache.row_map.one_each:
        return None
    if not cache.has_logits:
        return None
    if bool((cache.samples.targets < 0).any()):  # samples without a class
        return None
    looked_at = _num_measured(cache)
    rows = _unmixed_rows(cache, looked_at)
    if not rows:
        return None
    # Streamed: keeps a block or two in memory.
    view = cache.view(cache.views.start, memory_budget=1, ahead=False)
    targets = cache.samples.targets
    right = 0
    for start in range(0, len(rows), ROWS_AT_ONCE):
        batch = rows[start : start + ROWS_AT_ONCE]
        right += int((view.logits(batch).argmax(dim=1).numpy() == targets[batch]).sum())
    return right, len(rows), looked_at


def _num_measured(cache: LogitCache) -> int:
    """How many rows of the first view a card is measured on."""
    return min(cache.num_rows, MEASURED_ROWS, max(1, MEASURED_LOGITS // cache.num_classes))


def _unmixed_rows(cache: LogitCache, count: int) -> list[int]:
    identity = cache.manifest.identity
    try:
        mixing = Mixing(**((identity.transform or {}).get("mixing") or {}))
    except (AttributeError, TypeError, ValueError):  # not the format of `ViewPlan.describe`
        return []
    recorded = RecordedMixing.of(identity.transform, ViewParameters(cache))
    if recorded is not None:
        return np.flatnonzero(recorded.of_view(cache.views.start)[0][:count] < 0).tolist()
    plan = ViewPlan(seed=identity.view_seed, mixing=mixing)
    return [row for row in range(count) if plan.mixture(cache.views.start, row, cache.num_samples) is None]


def _how_it_was_made(cache: LogitCache) -> Iterator[str]:
    """Versions and views, without host name and command, because a card is public."""
    manifest = cache.manifest
    versions = manifest.provenance.get("versions")
    yield "## How it was made\n"
    lines = [
        f"- Id (hash of the identity): {code(cache.id)}",
        f"- Digest (hash of the content): {code(cache.digest or '')}; check copies with `--expect`",
        f"- Precision of the teacher: {code(manifest.identity.precision)}",
        f"- View seed: {manifest.identity.view_seed}",
    ]
    created = manifest.provenance.get("created")
    if isinstance(created, str):
        lines.append(f"- Created: {code(created)}")
    if isinstance(versions, dict) and versions:
        named = ", ".join(code(f"{name} {version}") for name, version in sorted(versions.items())[:SHOWN_CLASSES])
        lines.append(f"- Versions: {named}")
    yield "\n".join(lines) + "\n"
    if manifest.identity.transform is not None:
        try:
            described = json.dumps(manifest.identity.transform, ensure_ascii=True, indent=1, sort_keys=True)
        except RecursionError:
            described = "too deeply nested to be shown"
        cut = described[:LONGEST_TRANSFORM] + ("\n…" if len(described) > LONGEST_TRANSFORM else "")
        yield f"Views, each a pure function of sample, transform, seed and view number:\n\n{fenced(cut, 'json')}"


def _title(cache: LogitCache, stated: Card) -> str:
    return one_line(stated.title or names_of(cache.manifest).title, LONGEST_NAME)


def _size_category(num_samples: int) -> str:
    """The size category of data cards, such as "10K<n<100K"."""
    names = ["1K", "10K", "100K", "1M", "10M", "100M", "1B", "10B", "100B", "1T"]
    for power, name in enumerate(names):
        if num_samples < 1000 * 10**power:
            return f"n<{name}" if power == 0 else f"{names[power - 1]}<n<{name}"
    return "n>1T"
