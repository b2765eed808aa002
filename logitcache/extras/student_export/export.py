"""From a finished run to a folder that holds the student, its card and its numbers; whole or not at all."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from logitcache.catalog.calling import described
from logitcache.catalog.datasets import Data
from logitcache.catalog.models import save_weights
from logitcache.config.build import clean_views, input_part, resolve_data, resolve_model, resolve_plan
from logitcache.config.schema import Pipeline
from logitcache.errors import IdentityMismatch, ShapeError, StorageError, UsageError
from logitcache.extras.student_export.card import render_model_card
from logitcache.extras.student_export.cost import count_macs, median_seconds, processor
from logitcache.extras.student_export.facts import (
    CARD,
    FACTS,
    FORMAT,
    INT8,
    MODEL_FILES,
    ONNX,
    SAFETENSORS,
    Int8Facts,
    LatencyFacts,
    ModelFacts,
    OnnxFacts,
    Preprocessing,
    Product,
    Training,
    Variant,
    file_facts,
    read_product,
)
from logitcache.extras.student_export.onnx_model import (
    OnnxModel,
    check_onnx_installed,
    export_onnx,
    hold_to_torch,
    quantise,
)
from logitcache.extras.student_export.source import (
    DEFAULT_FOLDER,
    Source,
    Weights,
    cache_of,
    labels_of,
    open_source,
    seeds_of,
)
from logitcache.progress import track
from logitcache.randomness import keyed_permutation
from logitcache.storage import local_path
from logitcache.storage.local import fsync_path, is_alive
from logitcache.train.evaluation import Evaluation

# B batch

CALIBRATION_SAMPLES = 512
"""Of the training split, rendered without augmentation, that int8 ranges are taken from."""
RENDERED_BYTES = 2**28
"""Of these inputs at most."""
LATENCY_BATCHES = (1, 64)
ACCURACY_TOLERANCE = 0.005
"""How far an accuracy measured here may lie from the run's own, which another device may have rounded otherwise."""


@dataclass(frozen=True)
class Exported:
    """What an export did."""

    folder: Path
    product: Product
    written: bool
    """False where all of it was there."""


def export_run(
    run: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    *,
    to: Literal["safetensors", "onnx"],
    int8: bool = False,
    weights: Weights = "last",
    data: Pipeline | None = None,
    trust: bool = False,
) -> Exported:
    """Write a run's student as a folder: the model, `README.md` (its card) and `product.json` (its numbers).

    The data are needed: accuracies are measured again, and ONNX models are held to torch on real inputs. A folder
    that already holds other forms of the same weights gets this one beside them, all measured anew; one that holds
    this form too stays as it is.

    Args:
        run: a finished run's folder.
        out: by default `product` inside the run, where the report finds it.
        to: the form to add.
        int8: a statically quantised ONNX model as well.
        weights: "last", which the run's accuracy is of, or "best" by validation accuracy.
        data: the pipeline that has the data; the run's own by default.
        trust: run `package.module:function` code from outside the working folder.

    Raises:
        UsageError: no finished run, a folder that holds something else, a student that has no such form, or the extra
            `onnx` is missing; nothing is written then.
        IdentityMismatch: the data at hand are not the run's.
        InvalidLogits: the ONNX model does not say what torch says.
        StorageError: the folder can't be written.
    """
    if int8 and to != "onnx":
        raise UsageError("--int8 makes an ONNX model; add --to onnx")
    asked = {SAFETENSORS} if to == "safetensors" else {ONNX, INT8} if int8 else {ONNX}
    source = open_source(Path(run), weights=weights, given=data)
    folder = local_path(out) if out is not None else source.run.folder / DEFAULT_FOLDER
    try:
        _clear_leftovers(folder)
        there = _product_there(folder, source)
    except OSError as error:
        raise StorageError(f"can't read {folder}: {error.strerror or error}") from error
    if there is not None and asked <= there.files.keys():
        return Exported(folder, there, written=False)
    if there is not None:
        asked |= there.files.keys() & set(MODEL_FILES)
    if ONNX in asked:
        check_onnx_installed()
    try:
        partial = _fresh_folder(folder)
        try:
            product = _Export(source, partial, asked, trust=trust).write()
            _put_in_place(partial, folder, replace=there is not None)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except StorageError:
        raise
    except OSError as error:
        raise StorageError(f"can't write {folder}: {error.strerror or error}; nothing was changed there") from error
    return Exported(folder, product, written=True)


class _Export:
    """One export under way, into a folder that nobody sees yet."""

    def __init__(self, source: Source, folder: Path, files: set[str], *, trust: bool) -> None:
        self._source, self._folder, self._files, self._trust = source, folder, files, trust
        self._pipeline = source.pipeline()
        self._data: Data = resolve_data(self._pipeline, trust=trust)
        self._onnx: OnnxFacts | None = None
        self._int8: Int8Facts | None = None

    def write(self) -> Product:
        """All the files; returns what `product.json` says."""
        source, data = self._source, self._data
        inputs = self._training_inputs()
        plan = resolve_plan(self._pipeline, data, trust=self._trust)
        model = resolve_model(
            source.student, data, plan, weights=str(source.weights_file), seed=0, trust=self._trust
        ).eval()
        _refuse_outputs(model, inputs)
        models = self._write_models(model, inputs)
        variants = self._measure(models, inputs)
        self._hold_to_result(variants[0])
        run = source.run
        product = Product(
            format=FORMAT,
            student=run.result.name,
            seed=run.result.seed,
            source=source.facts(),
            model=ModelFacts(
                name=source.student.model,
                args=source.student.args,
                num_classes=data.num_classes,
                class_names=data.class_names,
            ),
            preprocessing=Preprocessing(
                shape=list(inputs.shape[1:]),
                dtype=str(inputs.dtype).removeprefix("torch."),
                steps=getattr(input_part(source.student, trust=self._trust), "spec", []),
            ),
            training=Training(
                dataset=self._pipeline.data.name,
                loss=source.student.loss,
                labels=labels_of(run),
                cache=cache_of(run, self._pipeline, given=source.given is not None),
                samples=run.result.samples,
                epochs=run.result.epochs,
            ),
            parameters=sum(parameter.numel() for parameter in model.parameters()),
            macs=count_macs(model, inputs[:1]),
            test_samples=None if data.test is None else len(data.test),
            validation_samples=None if data.validation is None else len(data.validation),
            variants=variants,
            seeds=seeds_of(run),
            latency=LatencyFacts(processor=processor(), threads=1),
            onnx=self._onnx,
            int8=self._int8,
            files={name: file_facts(self._folder / name) for name in MODEL_FILES if name in self._files},
            versions=_versions(with_onnx=self._onnx is not None),
        )
        (self._folder / CARD).write_text(render_model_card(product, self._pipeline.cache.card), encoding="utf-8")
        files = product.files | {CARD: file_facts(self._folder / CARD)}
        product = product.model_copy(update={"files": files})
        (self._folder / FACTS).write_text(product.model_dump_json(indent=1) + "\n", encoding="utf-8")
        return product

    def _write_models(self, model: nn.Module, inputs: Tensor) -> dict[str, tuple[str | None, Any]]:
        """The files that are asked for; (file, net) of each form, torch's always."""
        folder = self._folder
        models: dict[str, tuple[str | None, Any]] = {"torch": (None, model)}
        if SAFETENSORS in self._files:
            save_weights(model, folder / SAFETENSORS)
            models["torch"] = (SAFETENSORS, model)
        if ONNX in self._files:
            opset = export_onnx(model, inputs, folder / ONNX)
            onnx_model = OnnxModel(folder / ONNX, threads=torch.get_num_threads())
            self._onnx = OnnxFacts(opset=opset, max_abs_difference=hold_to_torch(model, onnx_model, inputs))
            models["onnx"] = (ONNX, onnx_model)
        if INT8 in self._files:
            num_weights = quantise(folder / ONNX, folder / INT8, inputs)
            self._int8 = Int8Facts(calibration_samples=len(inputs), weights=num_weights)
            models["onnx int8"] = (INT8, OnnxModel(folder / INT8, threads=torch.get_num_threads()))
        return models

    def _measure(self, models: dict[str, tuple[str | None, Any]], inputs: Tensor) -> list[Variant]:
        splits = {"test": self._data.test, "validation": self._data.validation}
        accuracy: dict[str, dict[str, float | None]] = {name: {} for name in models}
        with track("measuring", len(models) * len(splits), unit="accuracies") as meter:
            for split, dataset in splits.items():
                evaluation = None
                if dataset is not None:
                    views = clean_views(dataset, self._source.student, self._pipeline, trust=self._trust)
                    evaluation = Evaluation(views, batch_size=256, num_workers=self._pipeline.num_workers)
                for name, (_, model) in models.items():
                    accuracy[name][split] = (
                        None if evaluation is None else evaluation.measure(model, torch.device("cpu"))["accuracy"]
                    )
                    meter.advance()
        latency: dict[str, dict[str, float]] = {name: {} for name in models}
        one_thread = {
            name: OnnxModel(self._folder / file, threads=1) if file in (ONNX, INT8) else model
            for name, (file, model) in models.items()
        }
        for size in LATENCY_BATCHES:
            batch = inputs[torch.arange(size) % len(inputs)]
            passes = {name: functools.partial(model, batch) for name, model in one_thread.items()}
            for name, seconds in median_seconds(passes).items():
                latency[name][str(size)] = 1000 * seconds
        return [
            Variant.model_validate(
                {
                    "name": name,
                    "file": file,
                    "bytes": None if file is None else (self._folder / file).stat().st_size,
                    "test_accuracy": accuracy[name]["test"],
                    "validation_accuracy": accuracy[name]["validation"],
                    "latency_ms": latency[name],
                }
            )
            for name, (file, _) in models.items()
        ]

    def _training_inputs(self) -> Tensor:
        """Training samples without augmentation, as the student takes them, (B, ...).

        Raises:
            UsageError: inputs that are no tensors, or of no fixed size.
        """
        views = clean_views(self._data.train, self._source.student, self._pipeline, trust=self._trust)
        order = keyed_permutation(len(views), "product", 0)[:CALIBRATION_SAMPLES].tolist()
        sample = views[order[0]][1]
        if not isinstance(sample, Tensor):
            raise UsageError(f"the student's inputs are {type(sample).__name__}s, not tensors: no form can hold it")
        order = order[: max(2, RENDERED_BYTES // max(sample.nbytes, 1))]
        try:
            inputs = views.batch([(0, index) for index in order])
        except ShapeError as error:
            raise UsageError(f"without augmentation the student's inputs are of several sizes: {error}") from error
        assert isinstance(inputs, Tensor)
        return inputs

    def _hold_to_result(self, torch_variant: Variant) -> None:
        """What the last weights reach here is what the run says that they reach."""
        if self._source.weights != "last":
            return
        result = self._source.run.result
        for split, here, there in (
            ("test", torch_variant.test_accuracy, result.accuracy),
            ("validation", torch_variant.validation_accuracy, result.validation_accuracy),
        ):
            if (here is None) != (there is None) or abs((here or 0.0) - (there or 0.0)) > ACCURACY_TOLERANCE:
                raise IdentityMismatch(
                    f"the run's weights are right on {_shown(here)} of the {split} split at hand; its result.json says "
                    f"{_shown(there)}. These are not the data, or not the weights, that the run ended with"
                )


def _refuse_outputs(model: nn.Module, inputs: Tensor) -> None:
    """Whoever loads an export calls the model and gets logits.

    Raises:
        UsageError: the model returns something else, such as Hugging Face's outputs.
    """
    with torch.inference_mode():
        output = model(inputs[:1])
    if not isinstance(output, Tensor):
        raise UsageError(
            f"this student returns {described(output)}, and an exported one must return the tensor of logits; name a "
            "package.module:function that wraps the model and returns `output.logits`, and train it"
        )


def _shown(share: float | None) -> str:
    return "none" if share is None else f"{share:.2%}"


def _versions(*, with_onnx: bool) -> dict[str, str]:
    names = ["logitcache", "torch", "torchvision", *(["onnx", "onnxscript", "onnxruntime"] if with_onnx else [])]
    return {name: importlib.metadata.version(name) for name in names}


def _product_there(folder: Path, source: Source) -> Product | None:
    """The same weights' product that is there already.

    Raises:
        UsageError: something else lies there, another student's product, or one that was changed.
    """
    if not folder.exists() and not folder.is_symlink():
        return None
    if not folder.is_dir() or folder.is_symlink():
        raise UsageError(f"{folder} is no folder; choose another -o")
    names = {path.name for path in folder.iterdir()}
    if not names:
        return None
    if FACTS not in names:
        raise UsageError(f"{folder} holds something else ({min(names)!r}); an export needs a folder of its own")
    product = read_product(folder)
    expected, found = source.facts(), product.source
    if expected != found:
        what = f"the {found.weights} weights" if expected.weights != found.weights else "another run or other weights"
        raise UsageError(f"{folder} holds an export of {what}, not of this run's {expected.weights}; choose another -o")
    others = sorted(names - product.files.keys() - {FACTS})
    if others:
        raise UsageError(f"{folder} holds something else beside the export ({others[0]!r}); choose another -o")
    for name, facts in product.files.items():
        if name not in (*MODEL_FILES, CARD) or name not in names or file_facts(folder / name) != facts:
            raise UsageError(
                f"{folder / name} is not as it was exported; move that folder away and export again, or choose "
                "another -o"
            )
    return product


def _clear_leftovers(folder: Path) -> None:
    """Remove what killed exports left beside the folder, and give back what one had moved aside."""
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


def _fresh_folder(folder: Path) -> Path:
    """An empty folder beside the one to come."""
    partial = folder.absolute().with_name(f".{folder.name}.{os.getpid()}.partial")
    partial.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    return partial


def _put_in_place(partial: Path, folder: Path, *, replace: bool) -> None:
    """Make the whole folder durable, and then visible under its name."""
    for path in (*partial.iterdir(), partial):
        fsync_path(path)
    before = folder.absolute().with_name(f".{folder.name}.{os.getpid()}.before")
    if replace:
        folder.rename(before)
    try:
        partial.rename(folder)
    except OSError as error:
        if replace:
            before.rename(folder)
        raise StorageError(f"can't put the export at {folder}: {error.strerror}; it is left as it was") from error
    shutil.rmtree(before, ignore_errors=True)
    fsync_path(folder.absolute().parent)
