"""ONNX export with a dynamic batch size, comparison with torch on real inputs, and int8 quantization."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from logitcache.errors import InvalidLogits, UsageError

# B batch, C classes

INPUT, OUTPUT = "input", "logits"
TOLERANCE = 1e-4
"""Largest difference between logits of ONNX Runtime and torch, relative to the largest logit or 1."""
CHECKED_BATCHES = (1, 7)
CALIBRATION_BATCH = 32


def check_onnx_installed() -> None:
    """Check that the packages of the extra `onnx` are installed.

    Raises:
        UsageError: names the missing ones.
    """
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(f"ONNX needs {', '.join(missing)}: pip install 'logitcache[onnx]'")


def export_onnx(model: nn.Module, inputs: Tensor, path: Path) -> int:
    """Write a model in evaluation mode as ONNX with a dynamic batch size; returns the opset version.

    Args:
        inputs: two samples or more.

    Raises:
        UsageError: torch can't export this model; gives the reason.
    """
    import onnx

    dynamic_batch = ({0: torch.export.Dim("batch")},)
    try:
        with _quiet():
            program = torch.onnx.export(
                model, (inputs[:2],), dynamo=True, dynamic_shapes=dynamic_batch, input_names=[INPUT],
                output_names=[OUTPUT], verbose=False,
            )  # fmt: skip
        assert program is not None
        exported = program.model_proto
    except Exception as error:
        raise UsageError(
            f"this student can't be exported to ONNX with a dynamic batch size: {type(error).__name__}: "
            f"{_first_line(error)}; use --to safetensors"
        ) from error
    _anonymise(exported)
    onnx.checker.check_model(exported)
    path.write_bytes(exported.SerializeToString())
    return int(next(entry.version for entry in exported.opset_import if entry.domain in ("", "ai.onnx")))


class OnnxModel(nn.Module):
    """An ONNX file as a module, run by ONNX Runtime on the CPU."""

    def __init__(self, path: Path, *, threads: int) -> None:
        import onnxruntime

        super().__init__()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def forward(self, inputs: Tensor) -> Tensor:
        (logits_BC,) = self._session.run([OUTPUT], {INPUT: inputs.numpy()})
        return torch.from_numpy(logits_BC)


def compare_with_torch(model: nn.Module, onnx_model: nn.Module, inputs: Tensor) -> dict[str, float]:
    """The largest difference between the logits of both models, for batches of 1 and 7.

    Raises:
        InvalidLogits: it exceeds the tolerance, or the batch size is not dynamic.
    """
    differences = {}
    for size in CHECKED_BATCHES:
        batch = inputs[torch.arange(size) % len(inputs)]
        with torch.inference_mode():
            expected_BC = model(batch)
            try:
                found_BC = onnx_model(batch)
            except Exception as error:
                raise InvalidLogits(
                    f"the exported ONNX model fails on a batch of {size}: {_first_line(error)}; use --to safetensors"
                ) from error
        shapes = tuple(found_BC.shape), tuple(expected_BC.shape)
        if shapes[0] != shapes[1]:
            raise InvalidLogits(
                f"the exported ONNX model returns {shapes[0]} for a batch of {size}; torch returns {shapes[1]}"
            )
        difference = float((found_BC - expected_BC).abs().max())
        limit = TOLERANCE * max(1.0, float(expected_BC.abs().max()))
        if not difference <= limit:
            raise InvalidLogits(
                f"ONNX Runtime's logits differ from torch's by {difference:.3g} on a batch of {size}; the tolerance is "
                f"{limit:.3g}. The student may draw random numbers, or the export is wrong: use --to safetensors"
            )
        differences[str(size)] = difference
    return differences


def quantise(source: Path, target: Path, inputs: Tensor) -> int:
    """Write an ONNX model with int8 weights (one scale per channel) and activations; returns the number of weights.

    Static quantization in QDQ form; the ranges of activations are their minimum and maximum on the inputs.

    Raises:
        UsageError: the graph can't be quantized, or has no weights to quantize.
    """
    import onnx
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    prepared = target.with_name(f".{target.name}.prepared")
    try:
        with _quiet():
            quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
            quantize_static(
                str(prepared), str(target), _Reader(inputs), quant_format=QuantFormat.QDQ, per_channel=True,
                activation_type=QuantType.QInt8, weight_type=QuantType.QInt8,
                calibrate_method=CalibrationMethod.MinMax,
            )  # fmt: skip
        quantised = onnx.load(target)
    except Exception as error:
        raise UsageError(
            f"this student's graph can't be quantized to int8: {type(error).__name__}: {_first_line(error)}; "
            "export without --int8"
        ) from error
    finally:
        prepared.unlink(missing_ok=True)
    int8_weights = [
        entry
        for entry in quantised.graph.initializer
        if entry.data_type == onnx.TensorProto.INT8 and len(entry.dims) > 1
    ]
    if not int8_weights:
        raise UsageError(
            "this student's graph has no weights that can be quantized to int8 (weights of convolutions and matrix "
            "products can); export without --int8"
        )
    _anonymise(quantised)
    target.write_bytes(quantised.SerializeToString())
    return len(int8_weights)


class _Reader:
    """Calibration inputs in ONNX Runtime's interface."""

    def __init__(self, inputs: Tensor) -> None:
        self._batches: Iterator[Tensor] = iter(torch.split(inputs, CALIBRATION_BATCH))

    def get_next(self) -> dict[str, np.ndarray] | None:
        batch = next(self._batches, None)
        return None if batch is None else {INPUT: batch.numpy()}


def _anonymise(message: Any) -> None:
    """Remove torch's debugging information, at any depth: stack traces contain paths of this machine."""
    for field, value in message.ListFields():
        if field.name in ("metadata_props", "doc_string"):
            message.ClearField(field.name)
        elif field.message_type is not None:
            for each in value if isinstance(value, Sequence) else [value]:
                _anonymise(each)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without log messages of the exporters; errors are still raised."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), "")[:300]
