"""Selecting channels of a wide network for a narrow one: which dimensions of which tensors share a selection.

Selecting output channels of one layer selects input channels of the layers that read them. Two structures are tried: a
chain, where each layer feeds the next, and by width, where all dimensions of one width share a selection, as residual
networks need. Each is verified: the channels of the student, with random weights, are permuted according to the
structure, and if its logits change, the structure is rejected.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from logitcache.catalog.calling import model_logits
from logitcache.devices import to_device
from logitcache.errors import UsageError
from logitcache.randomness import keyed_permutation

# D channels

Shape = tuple[int, ...]
ROUNDING = 1e-3
"""Largest change of logits by rounding in a float32 network with permuted channels, relative to their spread."""
EFFECT = 0.05
"""Smallest change by a deliberately wrong permutation, relative to the same."""


@dataclass(frozen=True)
class Axis:
    """The selection along one dimension of a tensor."""

    group: str | None
    """The group whose selection applies; None for all entries."""
    repeat: int = 1
    """Consecutive entries per channel, where a layer reads a flattened feature map."""


@dataclass(frozen=True)
class Group:
    """Dimensions that share a selection."""

    name: str
    teacher_width: int
    student_width: int


@dataclass(frozen=True)
class Structure:
    """All dimensions of a network with their groups."""

    kind: str
    """"chain" or "width"."""
    groups: dict[str, Group]
    axes: dict[str, tuple[Axis, ...]]
    """By the name of the student's tensor."""


def chain_structure(student: nn.Module, shapes: Mapping[str, tuple[Shape, Shape]]) -> Structure | None:
    """Each layer's outputs are a group that the next layer reads, in the order of registration; None if impossible.

    Args:
        student: linear layers, convolutions and norms, in any modules.
        shapes: (teacher's, student's) of each student tensor that has a teacher tensor.
    """
    groups: dict[str, Group] = {}
    axes: dict[str, tuple[Axis, ...]] = {}
    stream: Group | None = None
    try:
        for path, module in student.named_modules():
            entries = [name for name in _own_entries(path, module) if name in shapes]
            if not entries:
                # A layer without teacher weights: the next layer reads channels without a selection.
                stream = None if _own_entries(path, module) else stream
            elif isinstance(module, nn.Linear | _ConvNd) and not isinstance(module, _ConvTransposeNd):
                teacher, here = shapes[f"{path}.weight" if path else "weight"]
                if isinstance(module, _ConvNd) and 1 < module.groups == module.in_channels == module.out_channels:
                    outputs = stream
                    inside = (_axis(stream, teacher[0], here[0]), Axis(None))
                else:
                    outputs = None if teacher[0] == here[0] else Group(path, teacher[0], here[0])
                    inside = (
                        Axis(None if outputs is None else outputs.name),
                        _axis(stream, teacher[1], here[1]),
                    )
                kernel = tuple(Axis(None) for _ in teacher[2:])
                for name in entries:
                    axes[name] = (inside + kernel) if len(shapes[name][0]) > 1 else inside[:1]
                stream = outputs
                if outputs is not None:
                    groups[outputs.name] = outputs
            elif isinstance(module, _BatchNorm | nn.LayerNorm | nn.GroupNorm | nn.PReLU):
                for name in entries:
                    teacher, here = shapes[name]
                    axes[name] = tuple(_axis(stream, *widths) for widths in zip(teacher, here, strict=True))
            else:
                return None
    except (_NoChain, KeyError):
        return None
    return Structure("chain", groups, axes) if axes.keys() == shapes.keys() else None


class _NoChain(Exception):
    """A layer does not read the output of the previous layer."""


def _axis(stream: Group | None, teacher: int, here: int) -> Axis:
    if stream is None:
        if teacher != here:
            raise _NoChain
        return Axis(None)
    repeat, rest = divmod(teacher, stream.teacher_width)
    if rest or here != repeat * stream.student_width:
        raise _NoChain
    return Axis(stream.name, repeat)


def _own_entries(path: str, module: nn.Module) -> list[str]:
    own = [name for name, _ in module.named_parameters(recurse=False)]
    own += [name for name, _ in module.named_buffers(recurse=False) if name not in module._non_persistent_buffers_set]
    return [f"{path}.{name}" if path else name for name in own]


def width_structure(shapes: Mapping[str, tuple[Shape, Shape]]) -> Structure:
    """All dimensions with the same pair of widths share a selection; equal widths are copied entirely."""
    groups: dict[str, Group] = {}
    axes = {}
    for name, (teacher, here) in shapes.items():
        of_tensor = []
        for widths in zip(teacher, here, strict=True):
            group = Group(f"{widths[0]} -> {widths[1]}", *widths)
            if widths[0] != widths[1]:
                groups[group.name] = group
            of_tensor.append(Axis(group.name if widths[0] != widths[1] else None))
        axes[name] = tuple(of_tensor)
    return Structure("width", groups, axes)


def is_valid(student: nn.Module, structure: Structure, inputs: Any, *, seed: int) -> bool:
    """Whether permuting the channels of each group preserves the logits of the student with random weights.

    Args:
        student: not modified; its weights don't matter.
        structure: of the student.
        inputs: a batch of student inputs.
        seed: of the weights and permutations.
    """
    device = next(student.parameters()).device
    inputs = to_device(inputs, device)
    model = copy.deepcopy(student).eval()
    _randomise(model, seed)
    orders = {
        name: _not_identity(keyed_permutation(group.student_width, "channels", seed, number))
        for number, (name, group) in enumerate(structure.groups.items())
    }
    before = _logits(model, inputs)
    # Without the mean: relative to a large common offset, the effect of a wrong structure would look like rounding.
    scale = float((before - before.mean()).std())
    permuted = _logits(_permuted(model, structure, orders, outputs_only=False), inputs)
    broken = _logits(_permuted(model, structure, orders, outputs_only=True), inputs)
    # If permuted weights did not affect the logits, any structure would pass; so a wrong permutation must change them.
    has_effect = float((broken - before).abs().max()) > EFFECT * scale
    return has_effect and float((permuted - before).abs().max()) <= ROUNDING * scale


def _randomise(model: nn.Module, seed: int) -> None:
    """Random weights that preserve the scale of activations; norms of 1 and 0 would hide a wrong permutation."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if not value.is_floating_point() or not value.ndim:
                continue
            noise = torch.randn(value.shape, generator=generator).to(value)
            if value.ndim > 1:
                value.copy_(noise * (2 * len(value) / value.numel()) ** 0.5)
            elif name.endswith("running_var"):
                value.copy_(1 + 0.5 * noise.tanh())
            else:
                value.add_(0.3 * noise)


def _not_identity(order: np.ndarray) -> np.ndarray:
    return np.roll(order, 1) if (order == np.arange(len(order))).all() else order


def _permuted(
    model: nn.Module, structure: Structure, orders: Mapping[str, np.ndarray], *, outputs_only: bool
) -> nn.Module:
    model = copy.deepcopy(model)
    state = model.state_dict()
    for name, axes in structure.axes.items():
        kept = axes[:1] if outputs_only and len(axes) > 1 else () if outputs_only else axes
        state[name] = take(state[name], kept, orders)
    model.load_state_dict(state)
    return model


def _logits(model: nn.Module, inputs: Any) -> Tensor:
    with torch.inference_mode():
        return model_logits(model, inputs).float()


def take(value: Tensor, axes: tuple[Axis, ...], chosen: Mapping[str, np.ndarray]) -> Tensor:
    """A tensor's entries at the selected channels of its first dimensions."""
    for dimension, axis in enumerate(axes):
        if axis.group is not None:
            index = chosen[axis.group][:, None] * axis.repeat + np.arange(axis.repeat)
            value = value.index_select(dimension, torch.from_numpy(index.reshape(-1)).to(value.device))
    return value


def evenly_spaced(group: Group) -> np.ndarray:
    """Channels floor(i * D_teacher / D_student), int64 (D_student,).

    Source: the uniform selection of Xu et al. 2023, "Initializing Models with Larger Ones" (arXiv:2311.18823).
    """
    return np.arange(group.student_width) * group.teacher_width // group.student_width


def random_channels(group: Group, number: int, *, seed: int) -> np.ndarray:
    """Random channels, in ascending order, int64 (D_student,)."""
    return np.sort(keyed_permutation(group.teacher_width, "initial channels", seed, number)[: group.student_width])


def highest_scores(group: Group, scores: np.ndarray) -> np.ndarray:
    """The channels with the highest scores, in ascending order, the first of equal ones, int64 (D_student,)."""
    return np.sort(np.argsort(-scores, kind="stable")[: group.student_width])


def channel_scores(
    structure: Structure, group: Group, values: Mapping[str, Tensor], *, weights_only: bool
) -> np.ndarray:
    """The sum of |values| of all parameters that produce each teacher channel, float64 (D_teacher,).

    Args:
        structure: of the student.
        group: the channels to score.
        values: the teacher's parameters or their importance, by the student's name.
        weights_only: leave out biases and norms, as pruning by magnitude does.

    Raises:
        UsageError: no parameter produces these channels.
    """
    scores_D = np.zeros(group.teacher_width)
    scored = False
    for name, value in values.items():
        axes = structure.axes[name]
        if axes and axes[0].group == group.name and axes[0].repeat == 1 and (value.ndim > 1 or not weights_only):
            scores_D += value.detach().abs().double().cpu().reshape(len(value), -1).sum(dim=1).numpy()
            scored = True
    if not scored:
        raise UsageError(
            f"no weight produces the channels {group.name!r} to score them by; use init.width: uniform or random"
        )
    return scores_D
