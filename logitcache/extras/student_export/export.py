"""Export of a finished run to a folder with the student, its card and its metadata; written atomically."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import re
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from logitcache.catalog.calling import described
from logitcache.catalog.models import save_weights
from logitcache.config.build import input_part
from logitcache.errors import IdentityMismatch, ShapeError, StorageError, UsageError
from logitcache.extras.student_export.card import render_model_card
from logitcache.extras.student_export.cost import count_macs, median_seconds, processor
from logitcache.extras.student_export.metadata import (
    CARD,
    FORMAT,
    INT8,
    METADATA,
    MODEL_FILES,
    ONNX,
    SAFETENSORS,
    LatencySetup,
    Model,
    OnnxCheck,
    Preprocessing,
    Quantisation,
    StudentMetadata,
    Training,
    Variant,
    read_metadata,
    record_file,
)
from logitcache.extras.student_export.onnx_model import (
    OnnxModel,
    check_onnx_installed,
    compare_with_torch,
    export_onnx,
    quantise,
)
from logitcache.extras.student_export.source import (
    DEFAULT_FOLDER,
    label_source,
    record_source,
    seeds_of,
    source_cache,
)
from logitcache.progress import track
from logitcache.randomness import keyed_permutation
from logitcache.stages.finished_student import FinishedStudent
from logitcache.storage import local_path
from logitcache.storage.local import fsync_path, is_alive

# B batch

CALIBRATION_SAMPLES = 512
"""From the training split, rendered without augmentation, for the ranges of int8 activations."""
RENDERED_BYTES = 2**28
"""Of these inputs, at most."""
LATENCY_BATCHES = (1, 64)
ACCURACY_TOLERANCE = 0.005
"""Largest difference to the accuracy in the run's result, which another device may have rounded differently."""


@dataclass(frozen=True)
class Exported:
    """The result of an export."""

    folder: Path
    metadata: StudentMetadata
    written: bool
    """False where the folder was already complete."""

    @property
    def product(self) -> StudentMetadata:
        """Deprecated name of `metadata`."""
        warnings.warn("Exported.product is deprecated; use metadata", DeprecationWarning, stacklevel=2)
        return self.metadata


def export_run(
    student: FinishedStudent,
    out: str | os.PathLike[str] | None = None,
    *,
    to: Literal["safetensors", "onnx"],
    int8: bool = False,
) -> Exported:
    """Write a run's student to a folder: the model, `README.md` (its card) and `product.json` (its metadata).

    Needs the data: accuracies are measured again, and ONNX models are compared with torch on real inputs. If the folder
    contains other forms of the same weights, this form is added and all are measured again; if it contains this form,
    nothing changes.

    Args:
        student: from `open_student`.
        out: by default `product` inside the run, where the report looks for it.
        to: the form to add.
        int8: add a statically quantized ONNX model as well.

    Raises:
        UsageError: the folder contains other files, the student can't be exported to this form, or the extra `onnx` is
            missing. Nothing is written.
        IdentityMismatch: the data differs from the run's.
        InvalidLogits: the ONNX model's logits differ from torch's.
        StorageError: the folder can't be written.
    """
    if int8 and to != "onnx":
        raise UsageError("--int8 makes an ONNX model; add --to onnx")
    requested = {SAFETENSORS} if to == "safetensors" else {ONNX, INT8} if int8 else {ONNX}
    folder = local_path(out) if out is not None else student.run.folder / DEFAULT_FOLDER
    try:
        _clear_leftovers(folder)
        existing = _existing_export(folder, student)
    except OSError as error:
        raise StorageError(f"can't read {folder}: {error.strerror or error}") from error
    if existing is not None:
        if requested <= existing.files.keys():
            return Exported(folder, existing, written=False)
        requested |= existing.files.keys() & set(MODEL_FILES)
    if ONNX in requested:
        check_onnx_installed()
    try:
        with _new_folder(folder, replace=existing is not None) as partial:
            metadata = _write(student, partial, requested)
    except StorageError:
        raise
    except OSError as error:
        raise StorageError(f"can't write {folder}: {error.strerror or error}; nothing was changed there") from error
    return Exported(folder, metadata, written=True)


@dataclass(frozen=True)
class _Form:
    """One form of the student."""

    name: Literal["torch", "onnx", "onnx int8"]
    file: Path | None
    model: nn.Module


def _write(student: FinishedStudent, folder: Path, files: set[str]) -> StudentMetadata:
    """Write the files and measure all forms; returns the contents of `product.json`."""
    inputs, model, data = _training_inputs(student), student.model(), student.data
    _check_output(model, inputs)
    packages = ["logitcache", "torch", "torchvision"]
    onnx, quantisation = None, None
    # The first form is always torch.
    forms = [_Form("torch", folder / SAFETENSORS if SAFETENSORS in files else None, model)]
    if SAFETENSORS in files:
        save_weights(model, folder / SAFETENSORS)
    if ONNX in files:
        packages += ["onnx", "onnxscript", "onnxruntime"]
        opset = export_onnx(model, inputs, folder / ONNX)
        onnx_model = OnnxModel(folder / ONNX, threads=torch.get_num_threads())
        onnx = OnnxCheck(opset=opset, max_abs_difference=compare_with_torch(model, onnx_model, inputs))
        forms.append(_Form("onnx", folder / ONNX, onnx_model))
    if INT8 in files:
        num_weights = quantise(folder / ONNX, folder / INT8, inputs)
        quantisation = Quantisation(calibration_samples=len(inputs), weights=num_weights)
        forms.append(_Form("onnx int8", folder / INT8, OnnxModel(folder / INT8, threads=torch.get_num_threads())))
    variants = _measure(student, forms, inputs)
    _check_accuracy(student, variants[0])
    run, config = student.run, student.config
    kind, _ = label_source(run)
    metadata = StudentMetadata(
        format=FORMAT,
        student=run.result.name,
        seed=run.result.seed,
        source=record_source(run.folder, student.weights),
        model=Model(name=config.model, args=config.args, num_classes=data.num_classes, class_names=data.class_names),
        preprocessing=Preprocessing(
            shape=list(inputs.shape[1:]),
            dtype=str(inputs.dtype).removeprefix("torch."),
            steps=getattr(input_part(config, trust=student.trust), "spec", []),
        ),
        training=Training(
            dataset=student.dataset_name,
            loss=config.loss,
            labels="a cache of teacher logits" if kind == "cache" else kind,
            cache=source_cache(student),
            samples=run.result.samples,
            epochs=run.result.epochs,
        ),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        macs=count_macs(model, inputs[:1]),
        test_samples=None if data.test is None else len(data.test),
        validation_samples=None if data.validation is None else len(data.validation),
        variants=variants,
        seeds=seeds_of(run),
        latency=LatencySetup(processor=processor(), threads=1),
        onnx=onnx,
        int8=quantisation,
        files={name: record_file(folder / name) for name in MODEL_FILES if name in files},
        versions={name: importlib.metadata.version(name) for name in packages},
    )
    (folder / CARD).write_text(render_model_card(metadata, student.card), encoding="utf-8")
    metadata = metadata.model_copy(update={"files": metadata.files | {CARD: record_file(folder / CARD)}})
    (folder / METADATA).write_text(metadata.model_dump_json(indent=1) + "\n", encoding="utf-8")
    return metadata


def _measure(student: FinishedStudent, forms: list[_Form], inputs: Tensor) -> list[Variant]:
    """Accuracy and latency of each form."""
    accuracies: dict[str, dict[str, float | None]] = {form.name: {} for form in forms}
    with track("measuring", 2 * len(forms), unit="accuracies") as meter:
        for split, dataset in (("test", student.data.test), ("validation", student.data.validation)):
            evaluation = None if dataset is None else student.evaluation(dataset)
            for form in forms:
                measured = None if evaluation is None else evaluation.measure(form.model, torch.device("cpu"))
                accuracies[form.name][f"{split}_accuracy"] = None if measured is None else measured["accuracy"]
                meter.advance()
    one_thread: dict[str, nn.Module] = {
        form.name: OnnxModel(form.file, threads=1) if form.file and isinstance(form.model, OnnxModel) else form.model
        for form in forms
    }
    latency: dict[str, dict[str, float]] = {form.name: {} for form in forms}
    for size in LATENCY_BATCHES:
        batch = inputs[torch.arange(size) % len(inputs)]
        passes = {name: functools.partial(model, batch) for name, model in one_thread.items()}
        for name, seconds in median_seconds(passes).items():
            latency[name][str(size)] = 1000 * seconds
    return [
        Variant(
            name=form.name,
            file=None if form.file is None else form.file.name,
            bytes=None if form.file is None else form.file.stat().st_size,
            latency_ms=latency[form.name],
            **accuracies[form.name],
        )
        for form in forms
    ]


def _training_inputs(student: FinishedStudent) -> Tensor:
    """Training samples without augmentation, after the student's input transform, (B, ...).

    Raises:
        UsageError: inputs are not tensors, or not all of one size.
    """
    views = student.clean_views(student.data.train)
    order = keyed_permutation(len(views), "product", 0)[:CALIBRATION_SAMPLES].tolist()
    sample = views[order[0]][1]
    if not isinstance(sample, Tensor):
        raise UsageError(f"the student's inputs are {type(sample).__name__}s; only tensors can be exported")
    order = order[: max(2, RENDERED_BYTES // max(sample.nbytes, 1))]
    try:
        inputs = views.batch([(0, index) for index in order])
    except ShapeError as error:
        raise UsageError(f"without augmentation the student's inputs have different sizes: {error}") from error
    assert isinstance(inputs, Tensor)
    return inputs


def _check_output(model: nn.Module, inputs: Tensor) -> None:
    """An exported model must return the tensor of logits.

    Raises:
        UsageError: the model returns something else, such as Hugging Face's outputs.
    """
    with torch.inference_mode():
        output = model(inputs[:1])
    if not isinstance(output, Tensor):
        raise UsageError(
            f"this student returns {described(output)}, and an exported one must return the tensor of logits; train "
            "one whose `model` is a package.module:function that wraps it and returns `output.logits`"
        )


def _check_accuracy(student: FinishedStudent, measured: Variant) -> None:
    """The last weights must reproduce the accuracies in the run's result."""
    if student.weights != "last":
        return
    result = student.run.result
    for split, here, there in (
        ("test", measured.test_accuracy, result.accuracy),
        ("validation", measured.validation_accuracy, result.validation_accuracy),
    ):
        if (here is None) != (there is None) or abs((here or 0.0) - (there or 0.0)) > ACCURACY_TOLERANCE:
            found, expected = ("none" if share is None else f"{share:.2%}" for share in (here, there))
            raise IdentityMismatch(
                f"accuracy of the run's weights on the {split} split: {found}; its result.json has {expected}. The "
                "data or the weights are not those of the finished run"
            )


def _existing_export(folder: Path, student: FinishedStudent) -> StudentMetadata | None:
    """The metadata of an existing export of the same weights.

    Raises:
        UsageError: the folder contains other files, another export, or one that was modified.
    """
    if not folder.exists() and not folder.is_symlink():
        return None
    if not folder.is_dir() or folder.is_symlink():
        raise UsageError(f"{folder} is not a folder; choose another -o")
    names = {path.name for path in folder.iterdir()}
    if not names:
        return None
    if METADATA not in names:
        raise UsageError(f"{folder} contains other files ({min(names)!r}); an export needs a folder of its own")
    metadata = read_metadata(folder)
    expected, found = record_source(student.run.folder, student.weights), metadata.source
    if expected != found:
        what = f"the {found.weights} weights" if expected.weights != found.weights else "another run or other weights"
        raise UsageError(f"{folder} is an export of {what}, not of this run's {expected.weights}; choose another -o")
    others = sorted(names - metadata.files.keys() - {METADATA})
    if others:
        raise UsageError(f"{folder} contains files that are not part of the export ({others[0]!r}); choose another -o")
    for name, record in metadata.files.items():
        if name not in (*MODEL_FILES, CARD) or name not in names or record_file(folder / name) != record:
            raise UsageError(
                f"{folder / name} was modified after the export; move that folder away and export again, or choose "
                "another -o"
            )
    return metadata


def _clear_leftovers(folder: Path) -> None:
    """Remove temporary folders of killed exports, and restore an export that one had moved aside."""
    parent = folder.absolute().parent
    leftover = re.compile(rf"\.{re.escape(folder.name)}\.(?P<pid>\d+)\.(?P<what>partial|before)")
    for path in sorted(parent.iterdir()) if parent.is_dir() else []:
        found = leftover.fullmatch(path.name)
        if found is None or path.is_symlink() or is_alive(int(found["pid"])):
            continue
        if found["what"] == "before" and not folder.exists():
            path.rename(folder)
        else:
            shutil.rmtree(path, ignore_errors=True)


@contextmanager
def _new_folder(folder: Path, *, replace: bool) -> Iterator[Path]:
    """A temporary folder that is made durable and renamed to its final name at the end, unless there is an error."""
    partial, before = (
        folder.absolute().with_name(f".{folder.name}.{os.getpid()}.{what}") for what in ("partial", "before")
    )
    partial.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        for path in (*partial.iterdir(), partial):
            fsync_path(path)
        if replace:
            folder.rename(before)
        try:
            partial.rename(folder)
        except OSError as error:
            if replace:
                before.rename(folder)
            raise StorageError(f"can't rename the export to {folder}: {error.strerror}; nothing was changed") from error
        shutil.rmtree(before, ignore_errors=True)
        fsync_path(folder.absolute().parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
