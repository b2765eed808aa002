"""A student's card, as model hubs have it: what it is, how to load it, what it reaches and what it costs."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import yaml

from logitcache.cache.card import Card
from logitcache.extras.student_export.facts import INT8, ONNX, SAFETENSORS, Product, Variant
from logitcache.markdown import LONGEST_NAME, code, escaped, fenced, one_line

SHOWN_CLASSES = 20
LONGEST_JSON = 4_000
"""Characters of the preprocessing and of the loss that a card shows; `product.json` has them whole."""


def render_model_card(product: Product, stated: Card) -> str:
    """The card, front matter and all; names that somebody chose stand in code or are escaped.

    Args:
        product: without the card among its files.
        stated: what the pipeline's `cache.card` says.
    """
    front = yaml.safe_dump(_front_matter(product, stated), sort_keys=False, allow_unicode=True, width=10_000)
    return "\n".join([f"---\n{front}---\n", *_sections(product, stated)])


def _front_matter(product: Product, stated: Card) -> dict[str, Any]:
    best = _stated_variant(product)
    dataset = one_line(stated.dataset or product.training.dataset, LONGEST_NAME)
    front: dict[str, Any] = {
        "license": one_line(stated.license or "unknown", LONGEST_NAME),
        "library_name": "logitcache",
        "pipeline_tag": "image-classification",
        "tags": ["knowledge-distillation", "student", *(["onnx"] if ONNX in product.files else []), "logitcache"],
    }
    if stated.dataset and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", stated.dataset):
        front["datasets"] = [stated.dataset]
    if len(product.preprocessing.shape) != 3:
        del front["pipeline_tag"]
    accuracies = [("test", best.test_accuracy), ("validation", best.validation_accuracy)]
    results = [
        {
            "task": {"type": "image-classification"},
            "dataset": {"type": dataset, "name": dataset, "split": split},
            "metrics": [{"type": "accuracy", "value": accuracy, "name": f"Accuracy, {best.name}"}],
        }
        for split, accuracy in accuracies
        if accuracy is not None
    ]
    if results:
        front["metrics"] = ["accuracy"]
        front["model-index"] = [{"name": one_line(product.student, LONGEST_NAME), "results": results}]
    return front


def _stated_variant(product: Product) -> Variant:
    """The form that the front matter's accuracy is of: the first that has a file."""
    return next((variant for variant in product.variants if variant.file is not None), product.variants[0])


def _sections(product: Product, stated: Card) -> Iterator[str]:
    yield f"# {escaped(one_line(product.student, LONGEST_NAME))}\n"
    yield from _what_this_is(product, stated)
    yield "## Load it\n"
    yield from _how_to_load_it(product)
    yield from _input(product)
    yield "## What it reaches, and what it costs\n"
    yield from _numbers(product)


def _what_this_is(product: Product, stated: Card) -> Iterator[str]:
    training, model = product.training, product.model
    yield "A student of offline knowledge distillation, exported by logitcache.\n"
    teacher = f", of the teacher {escaped(one_line(stated.teacher, LONGEST_NAME))}" if stated.teacher else ""
    lines = [
        f"- Net: {code(model.name)} with the arguments {code(json.dumps(model.args, ensure_ascii=False))}",
        f"- Weights: {_weights(product)} of seed {product.seed}, trained on {training.samples:,} samples",
        f"- Dataset: {code(stated.dataset or training.dataset)}",
        f"- Labels: {training.labels}{teacher if training.labels != 'true labels' else ''}",
        f"- Loss: {code(json.dumps(training.loss, ensure_ascii=False))}",
    ]
    if training.cache is not None:
        digest = training.cache.digest
        said = f"; its digest when this was exported: {code(digest)}" if digest else "; it was not at hand"
        lines.insert(4, f"  - The cache's id: {code(training.cache.id)}{said}")
    if model.class_names:
        shown = ", ".join(code(name) for name in model.class_names[:SHOWN_CLASSES])
        more = len(model.class_names) - SHOWN_CLASSES
        lines.append(f"- Classes, in the order of the logits: {shown}{f' and {more:,} more' if more > 0 else ''}")
    lines.append(f"- License: {code(stated.license) if stated.license else 'unknown: its maker did not say'}")
    yield "\n".join(lines) + "\n"


def _weights(product: Product) -> str:
    epochs = product.training.epochs
    if product.source.weights == "last":
        return f"those after all {epochs:,} epochs"
    return f"the best of {epochs:,} epochs by validation accuracy, which is therefore a little too high,"


def _how_to_load_it(product: Product) -> Iterator[str]:
    shape = ", ".join(map(str, product.preprocessing.shape))
    if SAFETENSORS in product.files:
        yield (
            "```python\nfrom logitcache.extras.student_export import load_student\n\n"
            'student = load_student(".")  # this folder, or wherever it lies\n'
            f"inputs = student.preprocess(image)[None]  # float32 (1, {shape})\n"
            f"logits = student.model(inputs)  # (1, {product.model.num_classes})\n```\n"
        )
    if ONNX in product.files:
        other = f"  # or {INT8}" if INT8 in product.files else ""
        yield (
            "```python\nimport onnxruntime\n\n"
            f'session = onnxruntime.InferenceSession("{ONNX}", providers=["CPUExecutionProvider"]){other}\n'
            f'(logits,) = session.run(["logits"], {{"input": inputs}})  # float32 (B, {shape}) -> (B, '
            f"{product.model.num_classes}), any B\n```\n"
        )


def _input(product: Product) -> Iterator[str]:
    facts = product.preprocessing
    yield "## Input\n"
    image = len(facts.shape) == 3
    layout = "batch, channels, height, width" if image else "batch first"
    yield f"`{facts.dtype}` of shape (B, {', '.join(map(str, facts.shape))}): {layout}.\n"
    if image:
        yield "An 8-bit image becomes `float32` (channels, height, width) by division by 255. Then, in this order:\n"
    steps = json.dumps(facts.steps, ensure_ascii=True, indent=1)
    if facts.steps:
        yield fenced(steps[:LONGEST_JSON] + ("\n…" if len(steps) > LONGEST_JSON else ""), "json")
    else:
        yield "nothing more.\n" if image else "Inputs are taken as the dataset gives them.\n"


def _numbers(product: Product) -> Iterator[str]:
    yield f"{product.parameters:,} parameters; {product.macs:,} multiply-accumulates (MACs) a sample.\n"
    yield (
        "| | file | bytes | test accuracy | validation accuracy | ms, batch 1 | ms, batch 64 |\n"
        "|---|---|---|---|---|---|---|\n" + "".join(map(_line, product.variants))
    )
    splits = [
        f"the {name} split has {count:,} samples"
        for name, count in (("test", product.test_samples), ("validation", product.validation_samples))
        if count is not None
    ]
    measured = f"Accuracies were measured on these very forms; {' and '.join(splits)}. " if splits else ""
    with_versions = ", ".join(f"{name} {version}" for name, version in product.versions.items())
    yield (
        f"{measured}Milliseconds are medians of forward passes on {product.latency.threads} thread of "
        f"{code(product.latency.processor)}, each form in its turn. MACs are half the operations that torch's "
        "`FlopCounterMode` counts: matrix products, convolutions and attention; no biases, norms, activations or "
        f"pooling. With {code(with_versions)}.\n"
    )
    seeds = product.seeds
    if len(seeds.seeds) > 1:
        spread = [
            f"{name} {100 * mean:.2f} ± {100 * deviation:.2f} %"
            for name, mean, deviation in (
                ("test", seeds.test_mean, seeds.test_sd),
                ("validation", seeds.validation_mean, seeds.validation_sd),
            )
            if mean is not None and deviation is not None
        ]
        if spread:
            numbers = ", ".join(map(str, seeds.seeds))
            yield (
                f"Over the seeds {numbers}, mean ± standard deviation of their last weights, in torch: "
                f"{'; '.join(spread)}.\n"
            )
    if product.onnx is not None:
        differences = " and ".join(
            f"{value:.2g} (batch {size})" for size, value in product.onnx.max_abs_difference.items()
        )
        yield (
            f"ONNX opset {product.onnx.opset}; its logits differ from torch's by at most {differences} on real "
            "inputs.\n"
        )
    if product.int8 is not None:
        yield (
            f"int8: static, a scale for each channel of {product.int8.weights:,} weights; activations' ranges from "
            f"{product.int8.calibration_samples:,} samples of the training split.\n"
        )


def _line(variant: Variant) -> str:
    cells = [
        variant.name,
        f"`{variant.file}`" if variant.file else "–",
        "–" if variant.bytes is None else f"{variant.bytes:,}",
        _percent(variant.test_accuracy),
        _percent(variant.validation_accuracy),
        *(f"{variant.latency_ms[size]:.3g}" if size in variant.latency_ms else "–" for size in ("1", "64")),
    ]
    return f"| {' | '.join(cells)} |\n"


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.2f} %"
