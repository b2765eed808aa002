"""Models by name, their weights, and their fingerprints."""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast
from urllib.error import URLError

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import nn

from logitcache.catalog.calling import call_model, input_described, logits_of
from logitcache.catalog.language_models import identifying_args, transformers_model
from logitcache.catalog.nets import CNN, MLP, CIFARResNet
from logitcache.checksums import check_file
from logitcache.data.rows import RowMap
from logitcache.data.sequences import batch_rows
from logitcache.digest import canonical_json
from logitcache.entry_points import is_entry_point
from logitcache.errors import CorruptRun, LogitCacheError, ShapeError, UsageError
from logitcache.registry import Registry, unknown_name
from logitcache.storage import LocalStorage

# B batch, C classes

TRANSFORMERS = "transformers"
MODELS: Registry[Callable[..., nn.Module]] = Registry(
    "model",
    {
        "mlp": MLP,
        "cnn": CNN,
        "cifar_resnet": CIFARResNet,
        "resnet20": functools.partial(CIFARResNet, depth=20),
        "resnet32": functools.partial(CIFARResNet, depth=32),
        TRANSFORMERS: transformers_model,
    },
    allows_code=True,
)
"""Called with a pipeline's `args`, and with `input_shape` of one sample, `num_classes` and the data's `tokenization` if
they have parameters of these names. A package adds one in the entry point group `logitcache.models`."""

ORIGIN = "logitcache"
"""The entry of a safetensors file's metadata that describes, in JSON, the run of its weights."""


def build_model(
    name: str,
    *,
    num_classes: int,
    input_shape: Sequence[int],
    weights: str | None = None,
    args: Mapping[str, Any] | None = None,
    trust: bool = False,
    new_head: bool = True,
    tokenization: Mapping[str, Any] | None = None,
) -> nn.Module:
    """A model by name: one of `MODELS`, a classifier of torchvision, or what `package.module:function` returns.

    Args:
        name: one of `MODELS`, a torchvision classifier, or an entry point.
        num_classes: C; a torchvision head of another size is replaced.
        input_shape: of one sample; sizes the built-in models.
        weights: a `.safetensors` file, the name of torchvision weights such as "IMAGENET1K_V2", or None.
        args: further arguments of the constructor or function.
        trust: allow an entry point outside the working directory.
        new_head: replace the head of pretrained weights with another number of classes by an untrained one.
        tokenization: of the dataset `text`.

    Raises:
        UsageError: the model, an argument or the weights are unknown, or the weights don't fit.
    """
    args = dict(args or {})
    stated = args
    path = Path(weights) if weights is not None and weights.endswith(".safetensors") else None
    named_weights = weights if path is None else None
    if path is not None and not path.is_file():
        raise UsageError(f"weights file {path} does not exist")
    try:
        if is_entry_point(name) or name in MODELS:
            factory = MODELS.resolve(name, trust=trust)
            taken = inspect.signature(factory).parameters
            sizes = {"input_shape": input_shape, "num_classes": num_classes, "tokenization": tokenization}
            args = {key: size for key, size in sizes.items() if key in taken} | args
            model: Any = factory(**args)
        else:
            model = _torchvision_model(name, num_classes, named_weights, args, new_head)
            named_weights = None
    except LogitCacheError:
        raise
    except Exception as error:
        raise UsageError(
            f"model {name!r} can't be built with the arguments {stated}: {type(error).__name__}: {error}"
        ) from error
    if not isinstance(model, nn.Module):
        raise UsageError(f"model {name!r} is a {type(model).__name__}; expected a torch.nn.Module")
    if named_weights is not None:
        raise UsageError(f"model {name!r} has no weights named {named_weights!r}; use a .safetensors file, or none")
    if path is not None:
        load_weights(model, path)
    return model


def brings_weights(name: str, args: Mapping[str, Any]) -> bool:
    """Whether a model has trained weights without any from a pipeline's `weights`."""
    return is_entry_point(name) or (name == TRANSFORMERS and args.get("path") is not None)


def fingerprint_args(name: str, args: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a model that identify it, wherever its files lie."""
    return identifying_args(args) if name == TRANSFORMERS else dict(args)


def check_model_name(name: str, *, trust: bool) -> None:
    """Check that a model of this name exists, without building it; an entry point is imported.

    Raises:
        UsageError: unknown model, or an entry point that can't be imported.
    """
    if is_entry_point(name):
        MODELS.resolve(name, trust=trust)
        return
    if name in MODELS:
        return
    import torchvision

    known = torchvision.models.list_models(module=torchvision.models)
    if name not in known:
        expected = f"package.module:function, a torchvision classifier, or one of: {', '.join(MODELS)}"
        raise UsageError(unknown_name("model", name, [*MODELS, *known], expected))


def _torchvision_model(
    name: str, num_classes: int, weights: str | None, args: dict[str, Any], new_head: bool
) -> nn.Module:
    import torchvision

    check_model_name(name, trust=False)
    if weights is None:
        if name in ("googlenet", "inception_v3"):
            args.setdefault("aux_logits", False)  # otherwise they return more than logits in training
        return cast("nn.Module", torchvision.models.get_model(name, weights=None, num_classes=num_classes, **args))
    try:
        model = torchvision.models.get_model(name, weights=weights, **args)
    except (ValueError, KeyError, AttributeError) as error:
        choices = [entry.name for entry in torchvision.models.get_model_weights(name)]
        raise UsageError(f"{name} has no weights {weights!r}; torchvision has: {', '.join(choices)}") from error
    except (URLError, OSError) as error:
        url = torchvision.models.get_weight(f"{torchvision.models.get_model_weights(name).__name__}.{weights}").url
        raise UsageError(
            f"the weights of {name} could not be downloaded from {url}: {error}\n"
            f"Put that file into {torch.hub.get_dir()}/checkpoints, or use a .safetensors file."
        ) from error
    if new_head:
        _resize_head(model, num_classes)
    return cast("nn.Module", model)


def _resize_head(model: nn.Module, num_classes: int) -> None:
    """Replace the last linear layer or 1x1 convolution by an untrained one, where it does not have C outputs."""
    for name, module in reversed(list(model.named_modules())):
        parent = model.get_submodule(name.rpartition(".")[0])
        if isinstance(module, nn.Linear):
            if module.out_features != num_classes:
                fresh: nn.Module = nn.Linear(module.in_features, num_classes, bias=module.bias is not None)
                setattr(parent, name.rpartition(".")[2], fresh)
            return
        if isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1):
            if module.out_channels != num_classes:
                setattr(parent, name.rpartition(".")[2], nn.Conv2d(module.in_channels, num_classes, 1))
            return


def load_weights(model: nn.Module, path: Path) -> None:
    """Load a safetensors file into a model.

    Raises:
        UsageError: not a safetensors file, or weights of another model; names the first entry that does not fit.
        CorruptRun: the file differs from its entry in `SHA256SUMS`, or weights of a run are damaged.
    """
    try:
        listed = check_file(path)
    except OSError as error:
        raise UsageError(f"{path} can't be read: {error}") from error
    load_state(model, read_weights(path, verify=not listed)[0], path)


def read_weights(path: Path, *, verify: bool = True) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """A safetensors file's tensors, and the origin that `save_weights` recorded; {} in other files.

    Raises:
        UsageError: not a safetensors file.
        CorruptRun: with `verify`, the tensors differ from the recorded SHA-256.
    """
    try:
        state = safetensors.torch.load_file(path)
        with safetensors.safe_open(path, framework="pt") as file:
            origin = json.loads((file.metadata() or {}).get(ORIGIN, "{}"))
    except (safetensors.SafetensorError, OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{path} is not a safetensors file: {error}") from error
    if not isinstance(origin, dict):
        raise UsageError(f"{path} is not a safetensors file of a run: its metadata {ORIGIN!r} is not an object")
    if verify and "sha256" in origin and origin["sha256"] != _state_sha256(state):
        raise CorruptRun(
            f"{path} is damaged: its tensors don't match the SHA-256 in its metadata; restore it, or delete the folder "
            "and train again"
        )
    return state, origin


def load_state(model: nn.Module, state: Mapping[str, torch.Tensor], path: Path) -> None:
    """Load a state that was read from a file into a model.

    Raises:
        UsageError: the state is of another model; names the first entry that does not fit.
    """
    expected = model.state_dict()
    for name in sorted(expected.keys() | state.keys()):
        here, there = expected.get(name), state.get(name)
        if here is None or there is None or here.shape != there.shape:
            shapes = ["absent" if entry is None else f"{tuple(entry.shape)}" for entry in (there, here)]
            raise UsageError(
                f"{path} does not fit the model: {name} is {shapes[0]} in the file, {shapes[1]} in the model"
            )
    model.load_state_dict(state)


def save_weights(model: nn.Module, path: Path, origin: Mapping[str, Any] | None = None) -> None:
    """Write a model's state as safetensors, atomically.

    Args:
        origin: where the weights come from, as plain data; recorded with the SHA-256 of the tensors.
    """
    state = {name: value.detach().cpu().contiguous().clone() for name, value in model.state_dict().items()}
    # A single entry: safetensors writes several in any order, and equal weights must give equal files.
    metadata = None
    if origin is not None:
        metadata = {ORIGIN: canonical_json({**origin, "sha256": _state_sha256(state)}).decode()}
    LocalStorage(path.parent).put(path.name, safetensors.torch.save(state, metadata))


def _state_sha256(state: Mapping[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for entry in sorted(state):
        _add_entry(digest, entry, state[entry])
    return digest.hexdigest()


def _add_entry(digest: Any, entry: str, value: torch.Tensor) -> None:
    tensor = value.detach().cpu().contiguous()
    digest.update(canonical_json([entry, str(tensor.dtype), list(tensor.shape)]))
    digest.update(np.asarray(tensor.reshape(-1).view(torch.uint8)).data if tensor.numel() else b"")


def model_fingerprint(model: nn.Module, *, name: str, args: Mapping[str, Any] | None = None) -> str:
    """`name@sha256`: over the constructor's arguments and each state entry's name, dtype, shape and bytes."""
    digest = hashlib.sha256(canonical_json([name, dict(args or {})]))
    for entry, value in model.state_dict().items():
        _add_entry(digest, entry, value)
    return f"{name}@{digest.hexdigest()}"


def check_output(
    model: nn.Module,
    inputs: Any,
    num_classes: int,
    *,
    name: str,
    index: Any = None,
    rows: RowMap | None = None,
) -> None:
    """Run a batch of one sample through a model, and check that its logits are (1, C), or (1, L, C) for a sequence.

    Args:
        model: the model.
        inputs: the batch.
        num_classes: C.
        name: for messages.
        index, rows: of a sequence: its index and the row map.

    Raises:
        ShapeError: the model can't process the input, or has another number of classes.
    """
    was_training = model.training
    model.eval()
    with torch.inference_mode():
        try:
            output = call_model(model, inputs)
        except Exception as error:
            raise ShapeError(
                f"model {name!r} can't process {input_described(model, inputs)}: {error}; check its `input` transforms "
                "and `args`"
            ) from error
    model.train(was_training)
    try:
        logits = logits_of(output)
    except ShapeError as error:
        raise ShapeError(f"model {name!r}: {error}") from None
    if rows is not None:
        logits = batch_rows(index, rows, inputs, logits).of_output(logits)[:1]
    if logits.shape != (1, num_classes):
        raise ShapeError(
            f"model {name!r} returns {tuple(logits.shape)} for one sample; expected (1, {num_classes}), one logit for "
            f"each of the data's {num_classes} classes. Use another head, other weights or other data"
        )
