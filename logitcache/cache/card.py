"""A cache's card: the `README.md` that says to a reader on a data hub what lies here and how to load it.

The front matter is what data cards have (license, tags, task, size). Every text that somebody could have chosen
(names, keys of classes, transforms) stands in a code span or is escaped, so that it can be neither HTML nor a link.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from logitcache.cache.ensemble import Part, merged_parts
from logitcache.cache.layout import PER_CACHE, SAMPLE_ARRAYS
from logitcache.cache.manifest import CARD
from logitcache.cache.reader import LogitCache
from logitcache.data.views import Mixing, ViewPlan
from logitcache.errors import CorruptCache, UsageError
from logitcache.markdown import LONGEST_NAME, code, escaped, fenced, one_line, table

ACCURACY_ROWS = 65_536
ACCURACY_LOGITS = 2**26
"""Rows of view 0, and logits of them, that the accuracy is taken over: sealing stays cheap."""
ROWS_AT_ONCE = 1024
SHOWN_CLASSES = 20
LONGEST_TEXT, LONGEST_TRANSFORM = 10_000, 4_000
"""Characters of the description and of the transform that a card shows."""


class Card(BaseModel):
    """What only its maker can say of a cache. Recorded in the manifest's provenance, and no part of its identity."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    license: str | None = None
    """A hub's identifier, such as "cc-by-4.0"."""
    title: str | None = None
    description: str | None = None
    """Plain text; an empty line starts a paragraph."""
    dataset: str | None = None
    """What people call the dataset, such as "imagenet-1k"."""
    teacher: str | None = None
    """What people call the teacher."""
    url: str | None = Field(default=None, pattern=r"^https?://[\w.~:/?#@!$&*+,;=%-]+$", max_length=2000)
    """Where to read more."""
    tags: list[str] = []

    def stated(self) -> dict[str, Any]:
        """The fields that say something, as JSON."""
        return self.model_dump(exclude_defaults=True)


def card_from(value: Card | Mapping[str, Any]) -> Card:
    """A card from a mapping.

    Raises:
        UsageError: an unknown field, or a value of another kind; names it.
    """
    if isinstance(value, Card):
        return value
    try:
        return Card.model_validate(dict(value))
    except ValidationError as error:
        first = error.errors()[0]
        raise UsageError(
            f"card.{'.'.join(map(str, first['loc']))}: {first['msg']}; a card has: {', '.join(Card.model_fields)}"
        ) from None


def write_card(cache: LogitCache) -> None:
    """Write the card of a sealed cache.

    Raises:
        CorruptCache: the labels that the teacher's accuracy is taken over are damaged.
    """
    cache.storage.put(CARD, render_card(cache).encode())


def write_missing_card(cache: LogitCache) -> None:
    """Write the card of a cache that was just sealed, or whose writer was killed before it wrote the card."""
    if cache.storage.size(CARD) is None:
        cache.storage.remove_leftovers()
        write_card(cache)


def render_card(cache: LogitCache) -> str:
    """The card of a sealed cache, front matter and all."""
    try:
        stated = card_from(cache.manifest.provenance.get("card", {}))
    except (UsageError, TypeError, ValueError):  # a stranger's manifest
        stated = Card()
    front = yaml.safe_dump(_front_matter(cache, stated), sort_keys=False, allow_unicode=True, width=10_000)
    parts = [f"---\n{front}---\n", *_sections(cache, stated)]
    return "\n".join(parts)


def _front_matter(cache: LogitCache, stated: Card) -> dict[str, Any]:
    identity = cache.manifest.identity
    named = [one_line(tag, LONGEST_NAME) for tag in stated.tags]
    front: dict[str, Any] = {
        "license": one_line(stated.license or "unknown", LONGEST_NAME),
        "pretty_name": _title(cache, stated),
        "tags": list(dict.fromkeys(["knowledge-distillation", "soft-labels", "logits", "logitcache", *named])),
        "size_categories": [_size_category(cache.num_samples)],
        "dataset": one_line(stated.dataset or identity.dataset, LONGEST_NAME),
        "teacher": one_line(stated.teacher or identity.teacher, LONGEST_NAME),
    }
    if identity.transform is not None:
        front["task_categories"] = ["image-classification"]
    if stated.dataset:
        front["source_datasets"] = [one_line(stated.dataset, LONGEST_NAME)]
    return front


def _sections(cache: LogitCache, stated: Card) -> Iterator[str]:
    yield f"# {escaped(_title(cache, stated))}\n"
    yield from _what_this_is(cache, stated)
    yield from _how_to_load_it(cache)
    yield "## Size\n"
    rows = cache.num_samples * len(cache.views)
    yield table(
        {
            "samples": f"{cache.num_samples:,}",
            "views of each": _views(cache),
            "classes": f"{cache.num_classes:,}",
            "encoding": code(repr(cache.encoding)),
            "bytes": f"{cache.stored_bytes:,}",
            "bytes a sample and view": f"{cache.target_bytes / rows:.1f}",
            **{
                f"output {name}": f"{code(str(output.shape))} a sample, {code(repr(output.encoding))}, "
                f"{cache.contents.output_bytes[name] / rows:.1f} bytes"
                for name, output in cache.extra_outputs.items()
            },
        }
    )
    yield "## Fidelity\n"
    yield _fidelity(cache)
    accuracy = _accuracy(cache)
    if accuracy is not None:
        yield "## Accuracy\n"
        yield accuracy
    yield from _how_it_was_made(cache)


def _what_this_is(cache: LogitCache, stated: Card) -> Iterator[str]:
    identity = cache.manifest.identity
    if stated.description:
        paragraphs = re.split(r"\n\s*\n", stated.description[:LONGEST_TEXT])
        yield from (f"{escaped(one_line(text, LONGEST_TEXT))}\n" for text in paragraphs if text.strip())
    yield (
        "The logits of a teacher over deterministic views of a dataset, for offline knowledge distillation: a student "
        "trains from them without the teacher. The images are not here; a student renders the same views again.\n"
    )
    lines = [f"- Teacher: {_known_as(stated.teacher)}{code(identity.teacher)}"]
    lines += [f"  - {code(part.teacher)}, weight {part.weight:.4g}" for part in _parts(cache)]
    lines.append(f"- Dataset: {_known_as(stated.dataset)}{code(identity.dataset)}")
    if identity.class_names:
        shown = ", ".join(code(name) for name in identity.class_names[:SHOWN_CLASSES])
        more = cache.num_classes - SHOWN_CLASSES
        lines.append(f"- Classes: {shown}{f' and {more:,} more' if more > 0 else ''}")
    licensed = code(stated.license) if stated.license else "unknown: its maker did not say"
    lines.append(f"- License: {licensed}")
    if stated.url:
        lines.append(f"- More: <{stated.url}>")
    yield "\n".join(lines) + "\n"


def _known_as(name: str | None) -> str:
    return f"{escaped(one_line(name, LONGEST_NAME))}, " if name else ""


def _parts(cache: LogitCache) -> list[Part]:
    """What a merged cache is the mean of."""
    try:
        return merged_parts(cache.manifest)
    except CorruptCache:  # a stranger's manifest
        return []


def _how_to_load_it(cache: LogitCache) -> Iterator[str]:
    array = next(iter(cache.layout.arrays))
    yield "## Load it\n"
    yield (
        "```python\nimport logitcache\n\n"
        'cache = logitcache.open(".")  # this folder, or wherever it lies\n'
        f'assert cache.digest == "{cache.digest}"\n'
        f"print(cache.view({cache.views.start}).logits([0]))  # float32 (1, {cache.num_classes}), "
        "right up to a constant per row\n"
        + "".join(
            f'print(cache.view({cache.views.start}).output("{name}", [0]))  # float32 {(1, *output.shape)}\n'
            for name, output in cache.extra_outputs.items()
        )
        + "```\n"
    )
    if cache.manifest.identity.transform is not None:
        yield (
            "`logitcache.ViewDataset(dataset, cache.view_plan)` renders the views that the teacher saw, and "
            "`cache.verify_inputs` and `cache.check_batch` prove it. The same from the command line, with the pipeline "
            "that names the data:\n"
        )
    yield (
        f"```\nlogitcache pull URL mine.cache --expect {cache.pin}\n"
        "logitcache verify mine.cache --deep\n"
        "logitcache train-student PIPELINE cache.path=mine.cache\n```\n"
    )
    yield "Any Zarr v3 reader opens the encoded labels, in any language:\n"
    yield f'```python\nimport zarr\n\nprint(zarr.open_group("labels.zarr", mode="r")["{array}"].shape)\n```\n'


def _views(cache: LogitCache) -> str:
    part = cache.manifest.provenance.get("copied_from") is not None
    numbers = f", {cache.views.start} to {cache.views.stop - 1}: a part of the cache" if part else ""
    return f"{len(cache.views):,}{numbers}"


def _fidelity(cache: LogitCache) -> str:
    blocks = [receipt for name, receipt in cache.receipts.items() if name != PER_CACHE]
    measured = [receipt.kl_max for receipt in blocks if receipt.kl_max is not None]
    lines = []
    if measured and cache.kl_mean is not None:
        lines.append(
            f"KL(teacher ‖ cache) of the logits at T = 1, over every row when it was written: mean {cache.kl_mean:.2g} "
            f"nats, largest {max(measured):.2g} nats."
        )
        if _parts(cache):
            lines.append("The teacher, there, is the mean of what the caches hold that this one was merged from.")
    if len(measured) < len(blocks):
        lines.append(
            f"In {len(blocks) - len(measured):,} of {len(blocks):,} blocks it is infinite: the encoding leaves out "
            "classes that the teacher thinks possible."
        )
    return " ".join(lines) + "\n"


def _accuracy(cache: LogitCache) -> str | None:
    counted = first_class_accuracy(cache)
    if counted is None:
        return None
    right, rows, looked_at = counted
    looked = f"the first {looked_at:,} rows of view {cache.views.start}"
    where = looked if rows == looked_at else f"the {rows:,} unmixed ones among {looked}"
    return (
        f"The first class of the cached labels is the sample's own in **{right / rows:.2%}** of {where}. These are the "
        "samples that students train on, and the teacher may have been trained on them too: it is no test accuracy.\n"
    )


def first_class_accuracy(cache: LogitCache) -> tuple[int, int, int] | None:
    """How often the likeliest cached class is the sample's target: (right, unmixed rows, rows looked at).

    At most the first 65 536 rows of the first view are looked at, fewer where classes are very many. None without
    targets, and where mixup or CutMix left no row as it was.

    Raises:
        CorruptCache: labels or sample table are damaged.
    """
    if not set(SAMPLE_ARRAYS[1:]) <= cache.layout.fixed.keys() or cache.samples is None:
        return None
    looked_at = min(cache.num_samples, ACCURACY_ROWS, max(1, ACCURACY_LOGITS // cache.num_classes))
    rows = _unmixed_rows(cache, looked_at)
    if not rows:
        return None
    view = cache.view(
        cache.views.start, memory_budget=1, ahead=False
    )  # a block or two in memory, however long the view is
    targets = cache.samples.targets
    right = 0
    for start in range(0, len(rows), ROWS_AT_ONCE):
        batch = rows[start : start + ROWS_AT_ONCE]
        right += int((view.logits(batch).argmax(dim=1).numpy() == targets[batch]).sum())
    return right, len(rows), looked_at


def _unmixed_rows(cache: LogitCache, count: int) -> list[int]:
    identity = cache.manifest.identity
    try:
        mixing = Mixing(**((identity.transform or {}).get("mixing") or {}))
    except (AttributeError, TypeError, ValueError):  # not as `ViewPlan.describe` writes it
        return []
    plan = ViewPlan(seed=identity.view_seed, mixing=mixing)
    return [row for row in range(count) if plan.mixture(cache.views.start, row, cache.num_samples) is None]


def _how_it_was_made(cache: LogitCache) -> Iterator[str]:
    """Versions and views; neither the machine's name nor the command, since a card is public."""
    manifest = cache.manifest
    versions = manifest.provenance.get("versions")
    yield "## How it was made\n"
    lines = [
        f"- Id (what it is): {code(cache.id)}",
        f"- Digest (what it says): {code(cache.digest or '')}; hold a copy to it with `--expect`",
        f"- Teacher's arithmetic: {code(manifest.identity.precision)}",
        f"- View seed: {manifest.identity.view_seed}",
    ]
    created = manifest.provenance.get("created")
    if isinstance(created, str):
        lines.append(f"- Begun: {code(created)}")
    if isinstance(versions, dict) and versions:
        named = ", ".join(code(f"{name} {version}") for name, version in sorted(versions.items())[:SHOWN_CLASSES])
        lines.append(f"- With: {named}")
    yield "\n".join(lines) + "\n"
    if manifest.identity.transform is not None:
        described = json.dumps(manifest.identity.transform, ensure_ascii=True, indent=1, sort_keys=True)
        cut = described[:LONGEST_TRANSFORM] + ("\n…" if len(described) > LONGEST_TRANSFORM else "")
        yield f"Its views, each a pure function of sample, transform, seed and view:\n\n{fenced(cut, 'json')}"


def _title(cache: LogitCache, stated: Card) -> str:
    merged = f"the mean of {len(_parts(cache))} teachers" if _parts(cache) else None
    teacher = stated.teacher or merged or cache.manifest.identity.teacher.partition("@")[0]
    dataset = stated.dataset or cache.manifest.identity.dataset
    dataset = f"{dataset[:12]}…" if re.fullmatch(r"[0-9a-f]{64}", dataset) else dataset
    return one_line(stated.title or f"Logits of {teacher} on {dataset}", LONGEST_NAME)


def _size_category(num_samples: int) -> str:
    """The hub's name of an order of magnitude."""
    names = ["1K", "10K", "100K", "1M", "10M", "100M", "1B", "10B", "100B", "1T"]
    for power, name in enumerate(names):
        if num_samples < 1000 * 10**power:
            return f"n<{name}" if power == 0 else f"{names[power - 1]}<n<{name}"
    return "n>1T"
