"""Descriptions of transforms, for the identity of a cache: they are equal on all machines for the same transform.

No transform library is imported here; each is met by its own protocol.
"""

from __future__ import annotations

import enum
import functools
import hashlib
import importlib
import inspect
import random
import types
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from logitcache.data.audio_views import AUDIO_VIEWS
from logitcache.data.batched_views import IMAGE_VIEWS
from logitcache.data.text_views import TEXT_VIEWS
from logitcache.digest import array_digest
from logitcache.entry_points import is_entry_point
from logitcache.errors import LogitCacheError, UsageError
from logitcache.registry import Registry, nearest

_BUILT_IN: Mapping[str, Callable[..., Callable[[Any], Any]]] = {**TEXT_VIEWS, **AUDIO_VIEWS, **IMAGE_VIEWS}
TRANSFORMS: Registry[Callable[..., Callable[[Any], Any]]] = Registry("transform", _BUILT_IN, allows_code=True)
"""Called with a step's parameters; each returns a callable from sample to sample. A package adds one in the entry point
group `logitcache.transforms`."""
_LIBRARIES = ("torchvision.", "timm.", "albumentations.", "torch.")


def describe_transform(transform: Callable[[Any], Any] | None) -> Any:
    """A transform as JSON: its `spec` where it was built from one, else its classes and public parameters.

    Functions and classes outside the transform libraries are told apart by their source text as well.

    Raises:
        UsageError: a part that can't be told apart, such as an object without public state.
    """
    if transform is None:
        return None
    spec = getattr(transform, "spec", None)
    if spec is not None:
        return spec
    return _describe(transform)


def adapt_transform(transform: Callable[[Any], Any] | None) -> Callable[[Any], Any] | None:
    """Any library's transform as a callable from sample to sample."""
    ignoring = _ignores_arrays(transform)
    if transform is not None and ignoring is not None:
        return TorchvisionTransform(transform, ignoring)
    if transform is not None and type(transform).__module__.startswith("albumentations."):
        return AlbumentationsTransform(transform)
    return transform


class TorchvisionTransform:
    """A transform of torchvision v2 that refuses NumPy arrays, which it would return unchanged.

    Args:
        transform: of torchvision.
        ignoring: the name of the one that ignores arrays: itself, or one within.
    """

    def __init__(self, transform: Callable[[Any], Any], ignoring: str) -> None:
        self.transform = transform
        self._ignoring = ignoring

    def __call__(self, value: Any) -> Any:
        if isinstance(value, np.ndarray):
            raise UsageError(
                f"torchvision's {self._ignoring} returns a NumPy array ({value.dtype}, {value.shape}) unchanged. Put "
                "`ToImage`, which converts arrays (H, W, C), before it, or let the dataset give PIL images or tensors "
                "(C, H, W)"
            )
        return self.transform(value)


class AlbumentationsTransform:
    """An albumentations transform on one image, its own generators set from the global one."""

    def __init__(self, transform: Any) -> None:
        self.transform = transform

    def __call__(self, image: Any) -> Any:
        # albumentations ignores the global generators and keeps its own; they are set from the view's stream.
        seed = random.getrandbits(64)
        self.transform.set_random_state(np.random.default_rng(seed), random.Random(seed))
        return self.transform(image=np.array(image))["image"]


def _ignores_arrays(transform: Any) -> str | None:
    """The first of torchvision's transforms to be given the input, where it would return a NumPy array unchanged."""
    if not type(transform).__module__.startswith("torchvision.transforms.v2."):
        return None
    children = getattr(transform, "transforms", None)
    if children is not None:
        return _ignores_arrays(next(iter(children), None))
    taken = getattr(transform, "_transformed_types", (object,))
    return None if np.ndarray in taken or object in taken else type(transform).__name__


def _describe(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, enum.Enum):
        return f"{type(value).__name__}.{value.name}"
    if isinstance(value, torch.Tensor):
        return {"tensor": array_digest(value.detach().cpu().numpy())}
    if isinstance(value, np.ndarray):
        return {"array": array_digest(value)}
    if isinstance(value, torch.dtype | torch.device | np.generic | np.dtype):
        return str(value)
    if isinstance(value, list | tuple | torch.nn.ModuleList):
        return [_describe(item) for item in value]
    if isinstance(value, set | frozenset):
        return sorted(map(str, value))
    if isinstance(value, Mapping):
        return {str(key): _describe(item) for key, item in value.items()}
    if isinstance(value, functools.partial):
        return {"partial": _describe(value.func), "args": _describe(value.args), "kwargs": _describe(value.keywords)}
    if isinstance(value, types.FunctionType):
        closure = [_describe(cell.cell_contents) for cell in value.__closure__ or ()]
        return {"function": value.__qualname__, "source": _source(value), "closure": closure}
    if isinstance(value, types.MethodType):
        return {"method": value.__name__, "of": _describe(value.__self__)}
    if isinstance(value, type | types.BuiltinFunctionType):
        return f"{value.__module__}.{value.__qualname__}"
    if type(value).__module__.startswith("albumentations."):
        return {"albumentations": _describe(value.to_dict()["transform"])}
    return _describe_object(value)


def _describe_object(value: Any) -> dict[str, Any]:
    kind = type(value)
    module = f"{kind.__module__}."
    described: dict[str, Any] = {"class": f"{kind.__module__}.{kind.__qualname__}"}
    if not module.startswith(_LIBRARIES):
        described["source"] = _source(kind)
    try:
        state = dict(vars(value))
    except TypeError:
        raise UsageError(
            f"the transform holds a {kind.__qualname__}, which can't be told from another one; "
            "give the transform an attribute `spec` with JSON that describes it"
        ) from None
    children = state.get("_modules") or {}
    described["parameters"] = {
        name: _describe(item) for name, item in sorted(state.items()) if not name.startswith("_") and name != "training"
    }
    if children:
        described["children"] = {name: _describe(child) for name, child in children.items()}
    return described


def _source(value: Any) -> str:
    """A digest of source text, free of where it stands; names are all that is left where there is none."""
    try:
        text = inspect.cleandoc(inspect.getsource(value))
    except (OSError, TypeError):
        return "unavailable"
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def normalise_spec(spec: Any) -> list[dict[str, Any]]:
    """A transform specification in its one form: a list of {name: parameters}.

    Raises:
        UsageError: neither names nor single-key mappings.
    """
    steps = []
    for step in spec if isinstance(spec, list) else [spec]:
        if isinstance(step, str):
            step = {step: {}}
        if not isinstance(step, dict) or len(step) != 1 or not isinstance(next(iter(step)), str):
            raise UsageError(f"a transform is a name or {{name: {{parameters}}}}, not {step!r}")
        name, parameters = next(iter(step.items()))
        parameters = {} if parameters is None else parameters
        if not isinstance(parameters, dict):
            raise UsageError(f"transform {name}: parameters are a mapping such as {{size: 28}}, not {parameters!r}")
        if "transforms" in parameters:
            parameters = {**parameters, "transforms": normalise_spec(parameters["transforms"])}
        steps.append({name: parameters})
    return steps


def entry_points_of(spec: Any) -> list[str]:
    """The `package.module:function` names in a transform's specification, in their order, without their digests.

    Raises:
        UsageError: no specification.
    """
    found = []
    for step in normalise_spec(spec):
        name, parameters = next(iter(step.items()))
        bare_name = name.partition("@")[0]
        found += [bare_name] if is_entry_point(bare_name) else []
        found += entry_points_of(parameters.get("transforms", []))
    return found


def build_transform(spec: Any, *, trust: bool = False) -> SpecifiedTransform:
    """A transform from its specification: steps that run one after the other.

    A step is a transform of torchvision v2 (`RandomCrop: {size: 28}`), of albumentations
    (`albumentations.GaussNoise: {p: 0.3}`), `timm: {input_size: 224, is_training: true}` for
    `timm.data.create_transform`, one of `TRANSFORMS`, or `package.module:function`. The last two are functions, called
    with the parameters to make a callable; the digest of the function's source is appended to its name in `spec`, since
    the source can change while the name stays the same.

    Raises:
        UsageError: an unknown transform or parameter, or a library that is not installed.
        UntrustedCode: an entry point from outside the working directory without `trust`.
    """
    steps = [_build_step(*next(iter(step.items())), trust=trust) for step in normalise_spec(spec)]
    return SpecifiedTransform([step for step, _ in steps], [transform for _, transform in steps])


class SpecifiedTransform:
    """A transform that knows the specification it was built from."""

    def __init__(self, spec: list[dict[str, Any]], steps: list[Callable[[Any], Any]]) -> None:
        self.spec = spec
        self.steps = steps

    def __call__(self, value: Any) -> Any:
        for step in self.steps:
            value = step(value)
        return value


def _build_step(name: str, parameters: dict[str, Any], *, trust: bool) -> tuple[dict[str, Any], Callable[[Any], Any]]:
    """One step's own specification, and the step."""
    bare_name, _, source = name.partition("@")
    factory: Any
    if name in _BUILT_IN:  # no digest of the source: what these do never changes
        factory = _BUILT_IN[name]
    elif is_entry_point(bare_name) or _is_registered(bare_name):
        factory = TRANSFORMS.resolve(bare_name, trust=trust)
        found = _source(factory)
        if source and source != found:
            raise UsageError(
                f"transform {bare_name} is not the one that the cache was built with: its source has the digest "
                f"{found} here, {source} there; restore it"
            )
        name = f"{bare_name}@{found}"
    elif name == "recorded":
        raise UsageError(
            "views.transform: `recorded` renders the views of a cache that was imported from another tool, and is the "
            "only step"
        )
    elif name == "timm":
        factory = _library("timm.data", "timm").create_transform
    elif name.startswith("albumentations."):
        factory = _named(_library("albumentations", "albumentations"), name.removeprefix("albumentations."), name)
    elif name == "Lambda":
        raise UsageError("transform Lambda can't be written in a file; name a `package.module:function` instead")
    else:
        factory = _named(_torchvision(), name, name)
    try:
        given = (
            parameters if name == "timm" else {k: _argument(k, value, trust=trust) for k, value in parameters.items()}
        )
        step = factory(**given)
    except LogitCacheError:
        raise
    except Exception as error:
        raise UsageError(f"transform {name}: {error}") from error
    adapted = adapt_transform(step)
    if not callable(adapted):
        raise UsageError(f"transform {name} is no callable, but a {type(step).__name__}")
    return {name: parameters}, adapted


def _is_registered(name: str) -> bool:
    """Whether an installed package offers a transform; it can't replace timm's or one of torchvision's."""
    return name in TRANSFORMS and name != "timm" and not hasattr(_torchvision(), name)


def _torchvision() -> Any:
    return _library("torchvision.transforms.v2", "torchvision")


def _argument(key: str, value: Any, *, trust: bool) -> Any:
    """A parameter as the library wants it, from what YAML can say."""
    if key == "dtype" and isinstance(value, str):
        dtype = getattr(torch, value, None)
        if not isinstance(dtype, torch.dtype):
            raise UsageError(f"{value!r} is no dtype; expected for example float32 or uint8")
        return dtype
    if key == "interpolation" and isinstance(value, str):
        return _library("torchvision.transforms", "torchvision").InterpolationMode(value)
    if key == "transforms":
        return [_build_step(*next(iter(step.items())), trust=trust)[1] for step in value]
    return value


def _library(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UsageError(f"a transform of this pipeline needs {package}: pip install {package} ({error})") from error


def _named(library: Any, attribute: str, name: str) -> Any:
    found = getattr(library, attribute, None)
    if attribute.startswith("_") or not isinstance(found, type):
        known = [entry for entry in dir(library) if entry[:1].isupper() and isinstance(getattr(library, entry), type)]
        raise UsageError(f"unknown transform {name!r}{nearest(attribute, [*known, *TRANSFORMS])}")
    return found
