"""A student's model card: what it is, how to load it, its accuracy and its cost."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import yaml

from logitcache.cache.card_fields import Card
from logitcache.extras.student_export.metadata import INT8, ONNX, SAFETENSORS, StudentMetadata, Variant
from logitcache.markdown import LONGEST_NAME, code, escaped, fenced, one_line

SHOWN_CLASSES = 20
LONGEST_JSON = 4_000
"""Characters of the preprocessing that a card shows; `product.json` has all of it."""


def render_model_card(metadata: StudentMetadata, stated: Card) -> str:
    """The card with its front matter. Names from users are shown as code or escaped.

    Args:
        metadata: without the card among its files.
        stated: the pipeline's `cache.card`.
    """
    front = yaml.safe_dump(_front_matter(metadata, stated), sort_keys=False, allow_unicode=True, width=10_000)
    return "\n".join([f"---\n{front}---\n", *_sections(metadata, stated)])


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


def _sections(metadata: StudentMetadata, stated: Card) -> Iterator[str]:
    yield f"# {escaped(one_line(metadata.student, LONGEST_NAME))}\n"
    yield "A student trained by offline knowledge distillation, exported by logitcache.\n"
    yield _description(metadata, stated)
    yield "## Loading\n"
    yield from _loading(metadata)
    yield "## Input\n"
    yield from _input(metadata)
    yield "## Accuracy and cost\n"
    yield from _numbers(metadata)


def _description(metadata: StudentMetadata, stated: Card) -> str:
    training, model = metadata.training, metadata.model
    epochs = f"after all {training.epochs:,} epochs"
    if metadata.source.weights == "best":
        epochs = (
            f"of the epoch with the best validation accuracy (of {training.epochs:,}; that accuracy is therefore "
            "optimistic)"
        )
    teacher = ""
    if stated.teacher and training.labels != "true labels":
        teacher = f", of the teacher {escaped(one_line(stated.teacher, LONGEST_NAME))}"
    lines = [
        f"- Model: {code(model.name)} with the arguments {code(json.dumps(model.args, ensure_ascii=False))}",
        f"- Weights: {epochs}, seed {metadata.seed}, trained on {training.samples:,} samples",
        f"- Dataset: {code(stated.dataset or training.dataset)}",
        f"- Labels: {training.labels}{teacher}",
    ]
    if training.cache is not None:
        digest = training.cache.digest
        known = f"digest at export: {code(digest)}" if digest else "the cache was not available at export"
        lines.append(f"  - Cache id: {code(training.cache.id)}; {known}")
    lines.append(f"- Loss: {code(json.dumps(training.loss, ensure_ascii=False))}")
    if model.class_names:
        shown = ", ".join(code(name) for name in model.class_names[:SHOWN_CLASSES])
        more = len(model.class_names) - SHOWN_CLASSES
        lines.append(f"- Classes, in the order of the logits: {shown}{f' and {more:,} more' if more > 0 else ''}")
    lines.append(f"- License: {code(stated.license) if stated.license else 'unknown (not stated)'}")
    return "\n".join(lines) + "\n"


def _loading(metadata: StudentMetadata) -> Iterator[str]:
    shape = ", ".join(map(str, metadata.preprocessing.shape))
    num_classes = metadata.model.num_classes
    if SAFETENSORS in metadata.files:
        yield (
            "```python\nfrom logitcache.extras.student_export import load_student\n\n"
            'student = load_student(".")  # the path of this folder\n'
            f"inputs = student.preprocess(image)[None]  # float32 (1, {shape})\n"
            f"logits = student.model(inputs)  # (1, {num_classes})\n```\n"
        )
    if ONNX in metadata.files:
        other = f"  # or {INT8}" if INT8 in metadata.files else ""
        yield (
            "```python\nimport onnxruntime\n\n"
            f'session = onnxruntime.InferenceSession("{ONNX}", providers=["CPUExecutionProvider"]){other}\n'
            f'(logits,) = session.run(["logits"], {{"input": inputs}})  # float32 (B, {shape}) -> (B, '
            f"{num_classes}), any B\n```\n"
        )


def _input(metadata: StudentMetadata) -> Iterator[str]:
    preprocessing = metadata.preprocessing
    image = len(preprocessing.shape) == 3
    layout = "batch, channels, height, width" if image else "batch first"
    yield f"`{preprocessing.dtype}` of shape (B, {', '.join(map(str, preprocessing.shape))}): {layout}.\n"
    if image:
        yield "Divide an 8-bit image by 255 to get `float32` (channels, height, width). Then apply, in this order:\n"
    if not preprocessing.steps:
        yield "no further transforms.\n" if image else "Inputs are used as the dataset returns them.\n"
        return
    steps = json.dumps(preprocessing.steps, ensure_ascii=True, indent=1)
    yield fenced(steps[:LONGEST_JSON] + ("\n…" if len(steps) > LONGEST_JSON else ""), "json")


def _numbers(metadata: StudentMetadata) -> Iterator[str]:
    yield f"{metadata.parameters:,} parameters; {metadata.macs:,} multiply-accumulates (MACs) per sample.\n"
    yield (
        "| | file | bytes | test accuracy | validation accuracy | ms, batch 1 | ms, batch 64 |\n"
        "|---|---|---|---|---|---|---|\n" + "".join(map(_line, metadata.variants))
    )
    splits = [
        f"{name} split: {count:,} samples"
        for name, count in (("test", metadata.test_samples), ("validation", metadata.validation_samples))
        if count is not None
    ]
    versions = ", ".join(f"{name} {version}" for name, version in metadata.versions.items())
    measured = f"Accuracies were measured on the exported forms; {'; '.join(splits)}. " if splits else ""
    yield (
        f"{measured}Milliseconds are medians of forward passes on {metadata.latency.threads} thread of "
        f"{code(metadata.latency.processor)}; the forms alternate. MACs are half the operations that torch's "
        "`FlopCounterMode` counts: matrix products, convolutions and attention, without biases, norms, activations and "
        f"pooling. Versions: {code(versions)}.\n"
    )
    seeds = metadata.seeds
    spread = [
        f"{name} {100 * mean:.2f} ± {100 * deviation:.2f} %"
        for name, mean, deviation in (
            ("test", seeds.test_mean, seeds.test_sd),
            ("validation", seeds.validation_mean, seeds.validation_sd),
        )
        if mean is not None and deviation is not None
    ]
    if spread:
        yield (
            f"Over the seeds {', '.join(map(str, seeds.seeds))}, mean ± standard deviation of their last weights, in "
            f"torch: {'; '.join(spread)}.\n"
        )
    if metadata.onnx is not None:
        differences = ", ".join(
            f"{value:.2g} (batch {size})" for size, value in metadata.onnx.max_abs_difference.items()
        )
        yield f"ONNX opset {metadata.onnx.opset}; largest difference to torch's logits on real inputs: {differences}.\n"
    if metadata.int8 is not None:
        yield (
            f"int8: static quantisation, one scale per channel, of {metadata.int8.weights:,} weights; ranges of "
            f"activations from {metadata.int8.calibration_samples:,} samples of the training split.\n"
        )


def _line(variant: Variant) -> str:
    cells = [
        variant.name,
        f"`{variant.file}`" if variant.file else "–",
        "–" if variant.bytes is None else f"{variant.bytes:,}",
        *(
            "–" if share is None else f"{100 * share:.2f} %"
            for share in (variant.test_accuracy, variant.validation_accuracy)
        ),
        *(f"{variant.latency_ms[size]:.3g}" if size in variant.latency_ms else "–" for size in ("1", "64")),
    ]
    return f"| {' | '.join(cells)} |\n"
