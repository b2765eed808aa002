"""A student's model card: what it is, how to load it, its accuracy and its cost; the text is in `card.md`."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jinja2
import yaml

from logitcache.cache.card_fields import Card
from logitcache.extras.student_export.metadata import ONNX, StudentMetadata
from logitcache.markdown import LONGEST_NAME, code, escaped, fenced, one_line

SHOWN_CLASSES = 20
LONGEST_JSON = 4_000
"""Characters of the preprocessing that a card shows; `product.json` has all of it."""


def render_model_card(metadata: StudentMetadata, stated: Card) -> str:
    """The card with its front matter.

    Args:
        metadata: without the card among its files.
        stated: the pipeline's `cache.card`.
    """
    front = yaml.safe_dump(_front_matter(metadata, stated), sort_keys=False, allow_unicode=True, width=10_000)
    return f"---\n{front}---\n\n{_body(metadata, stated)}"


def _front_matter(metadata: StudentMetadata, stated: Card) -> dict[str, Any]:
    dataset = one_line(stated.dataset or metadata.training.dataset, LONGEST_NAME)
    front: dict[str, Any] = {
        "license": one_line(stated.license or "unknown", LONGEST_NAME),
        "library_name": "logitcache",
        "tags": ["knowledge-distillation", "student", *(["onnx"] if ONNX in metadata.files else []), "logitcache"],
    }
    if len(metadata.preprocessing.shape) == 3:
        front["pipeline_tag"] = "image-classification"
    if stated.dataset and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", stated.dataset):
        front["datasets"] = [stated.dataset]
    # Of the first form that has a file.
    best = next((variant for variant in metadata.variants if variant.file is not None), metadata.variants[0])
    results = [
        {
            "task": {"type": "image-classification"},
            "dataset": {"type": dataset, "name": dataset, "split": split},
            "metrics": [{"type": "accuracy", "value": accuracy, "name": f"Accuracy, {best.name}"}],
        }
        for split, accuracy in (("test", best.test_accuracy), ("validation", best.validation_accuracy))
        if accuracy is not None
    ]
    if results:
        front["metrics"] = ["accuracy"]
        front["model-index"] = [{"name": one_line(metadata.student, LONGEST_NAME), "results": results}]
    return front


def _body(metadata: StudentMetadata, stated: Card) -> str:
    """The text. Names from users are shown as code or escaped, by the template's filters."""
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {
        "code": code,
        "fenced": fenced,
        "name": lambda text: escaped(one_line(text, LONGEST_NAME)),
        "json": lambda value: json.dumps(value, ensure_ascii=False),
        "count": lambda number: "–" if number is None else f"{number:,}",
        "percent": lambda share: "–" if share is None else f"{100 * share:.2f} %",
        "milliseconds": lambda value: "–" if value is None else f"{value:.3g}",
    }
    seeds, steps = metadata.seeds, json.dumps(metadata.preprocessing.steps, indent=1)
    splits = {"test": metadata.test_samples, "validation": metadata.validation_samples}
    spreads = {"test": (seeds.test_mean, seeds.test_sd), "validation": (seeds.validation_mean, seeds.validation_sd)}
    template = environment.from_string(Path(__file__).with_name("card.md").read_text(encoding="utf-8"))
    return template.render(
        metadata=metadata,
        stated=stated,
        model=metadata.model,
        training=metadata.training,
        shape=", ".join(map(str, metadata.preprocessing.shape)),
        steps=steps[:LONGEST_JSON] + ("\n…" if len(steps) > LONGEST_JSON else ""),
        shown_classes=SHOWN_CLASSES,
        versions=", ".join(f"{name} {version}" for name, version in metadata.versions.items()),
        splits=[f"{name} split: {size:,} samples" for name, size in splits.items() if size is not None],
        spreads=[
            f"{name} {100 * mean:.2f} ± {100 * deviation:.2f} %"
            for name, (mean, deviation) in spreads.items()
            if mean is not None and deviation is not None
        ],
    )
