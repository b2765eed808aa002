"""Calls models and finds their logits, for plain PyTorch modules and Hugging Face models."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from logitcache.errors import ShapeError

# B batch, C classes

LOGITS_ATTRIBUTE = "logits"


def call_model(model: Any, inputs: Any, *, like: Any = None, **options: Any) -> Any:
    """The output of a model for a batch.

    A mapping is passed as keyword arguments where `forward` accepts them, as for Hugging Face models. Any other batch
    is passed as one positional argument.

    Args:
        model: a module or any callable.
        inputs: the batch, on the model's device.
        like: the model whose `forward` is inspected, where `model` wraps it (compiled, in parallel, with hooks).
        options: further keyword arguments.
    """
    if isinstance(inputs, Mapping) and _accepts(model if like is None else like, inputs):
        return model(**inputs, **options)
    return model(inputs, **options)


def logits_of(output: Any) -> Tensor:
    """The logits in a model's output: the tensor itself, `output.logits`, or `output["logits"]`.

    Raises:
        ShapeError: no logits are found; describes the output, and how to name the logits.
    """
    found = output
    if isinstance(output, Mapping):
        found = output.get(LOGITS_ATTRIBUTE)
    elif not isinstance(output, Tensor):
        found = getattr(output, LOGITS_ATTRIBUTE, None)
    if not isinstance(found, Tensor):
        raise ShapeError(
            f"the model returns {described(output)}; expected a tensor of logits (B, C), or an output with `logits` as "
            "Hugging Face models return. For a teacher, name the module that gives the logits under `cache.outputs` "
            "(logits: MODULE); or name a package.module:function that wraps the model and returns the tensor"
        )
    return found


def model_logits(model: Any, inputs: Any) -> Tensor:
    """The logits of a model for a batch, from `call_model` and `logits_of`."""
    return logits_of(call_model(model, inputs))


def described(value: Any) -> str:
    """A model's input or output in a few words, for messages."""
    if isinstance(value, Tensor):
        return f"a tensor of {str(value.dtype).removeprefix('torch.')}"
    if isinstance(value, Mapping):
        return f"a mapping of {', '.join(map(repr, value))}"
    if isinstance(value, list | tuple):
        return f"a {type(value).__name__} of {len(value)}"
    return f"a {type(value).__name__}"


def input_described(model: Any, inputs: Any) -> str:
    """A model's input for messages: its shapes, and the names that `forward` has no parameter for."""
    if not isinstance(inputs, Mapping):
        return f"an input of shape {tuple(getattr(inputs, 'shape', ()))}"
    shapes = ", ".join(f"{name}: {tuple(getattr(value, 'shape', ()))}" for name, value in inputs.items())
    parameters = inspect.signature(getattr(model, "forward", model)).parameters
    unknown = [str(name) for name in inputs if name not in parameters]
    partly = 0 < len(unknown) < len(inputs)
    hint = f", whose `forward` has no parameter {', '.join(unknown)}" if partly else ""
    return f"the inputs {{{shapes}}}{hint}"


def _accepts(model: Any, inputs: Mapping[Any, Any]) -> bool:
    try:
        inspect.signature(getattr(model, "forward", model)).bind(**inputs)
    except TypeError:
        return False
    return True
