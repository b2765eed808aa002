"""Which channels of a wide net make a narrow one: along which dimensions of which tensors the same choice must hold.

A choice of output channels of one layer is a choice of input channels of the layers that read them. Two readings of a
net are tried: as a chain, where each layer feeds the next, and by width, where all dimensions of one width share one
choice, as the stream of a residual net needs it. Neither is believed: the student, with fresh random weights, has its
channels permuted as the reading says, and a reading under which its logits change is dropped.
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
PROVEN_WITHIN = 1e-3
"""Of the spread of the logits: what rounding may change in a float32 net whose channels were permuted."""
SHOWN_FROM = 0.05
"""Of the same: what a permutation that is wrong on purpose must change."""


@dataclass(frozen=True)
class Axis:
    """What is chosen along one dimension of a tensor."""

    group: str | None
    """The group whose choice holds here; None takes everything."""
    repeat: int = 1
    """Consecutive entries for each channel, where a layer reads a flattened feature map."""


@dataclass(frozen=True)
class Group:
    """Dimensions that share one choice."""

    name: str
    teacher_width: int
    student_width: int


@dataclass(frozen=True)
class Reading:
    """A whole net's dimensions, each with its group."""

    kind: str
    """"chain" or "width"."""
    groups: dict[str, Group]
    axes: dict[str, tuple[Axis, ...]]
    """By the name of the student's tensor."""


def read_as_chain(student: nn.Module, shapes: Mapping[str, tuple[Shape, Shape]]) -> Reading | None:
    """Each layer's outputs are a group that the next layer reads, in the order of registration; None if that can't be.

    Args:
        student: linear layers, convolutions and norms, in whatever modules.
        shapes: (teacher's, student's) of each of the student's tensors that a teacher's tensor was found for.
    """
    groups: dict[str, Group] = {}
    axes: dict[str, tuple[Axis, ...]] = {}
    stream: Group | None = None
    try:
        for path, module in student.named_modules():
            entries = [name for name in _own_entries(path, module) if name in shapes]
            if not entries:
                # A layer of no teacher's: what comes after it reads channels that nothing was chosen for.
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
    return Reading("chain", groups, axes) if axes.keys() == shapes.keys() else None


class _NoChain(Exception):
    """A layer does not read what the layer before it gives."""


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


def read_by_width(shapes: Mapping[str, tuple[Shape, Shape]]) -> Reading:
    """All dimensions that go from one width to one other share one choice; equal widths are taken whole."""
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
    return Reading("width", groups, axes)


def is_proven(student: nn.Module, reading: Reading, inputs: Any, *, seed: int) -> bool:
    """Whether permuting each group's channels leaves the logits of a net of random weights as they were.

    Args:
        student: its weights don't matter; it stays as it is.
        reading: of the student.
        inputs: a batch as the student takes it.
        seed: of the weights and permutations.
    """
    device = next(student.parameters()).device
    inputs = to_device(inputs, device)
    net = copy.deepcopy(student).eval()
    _randomise(net, seed)
    orders = {
        name: _no_identity(keyed_permutation(group.student_width, "channels", seed, number))
        for number, (name, group) in enumerate(reading.groups.items())
    }
    before = _logits(net, inputs)
    # Of what tells the samples and classes apart: beside a large common part a wrong reading would look like rounding.
    scale = float((before - before.mean()).std())
    permuted = _logits(_permuted(net, reading, orders, outputs_only=False), inputs)
    broken = _logits(_permuted(net, reading, orders, outputs_only=True), inputs)
    # Weights of which nothing reaches the logits would prove any reading; so a wrong one must show.
    shows = float((broken - before).abs().max()) > SHOWN_FROM * scale
    return shows and float((permuted - before).abs().max()) <= PROVEN_WITHIN * scale


def _randomise(net: nn.Module, seed: int) -> None:
    """Random weights that keep the size of activations, and norms away from 1 and 0, which would hide a wrong order."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in net.state_dict().items():
            if not value.is_floating_point() or not value.ndim:
                continue
            noise = torch.randn(value.shape, generator=generator).to(value)
            if value.ndim > 1:
                value.copy_(noise * (2 * len(value) / value.numel()) ** 0.5)
            elif name.endswith("running_var"):
                value.copy_(1 + 0.5 * noise.tanh())
            else:
                value.add_(0.3 * noise)


def _no_identity(order: np.ndarray) -> np.ndarray:
    return np.roll(order, 1) if (order == np.arange(len(order))).all() else order


def _permuted(net: nn.Module, reading: Reading, orders: Mapping[str, np.ndarray], *, outputs_only: bool) -> nn.Module:
    net = copy.deepcopy(net)
    state = net.state_dict()
    for name, axes in reading.axes.items():
        kept = axes[:1] if outputs_only and len(axes) > 1 else () if outputs_only else axes
        state[name] = take(state[name], kept, orders)
    net.load_state_dict(state)
    return net


def _logits(net: nn.Module, inputs: Any) -> Tensor:
    with torch.inference_mode():
        return model_logits(net, inputs).float()


def take(value: Tensor, axes: tuple[Axis, ...], chosen: Mapping[str, np.ndarray]) -> Tensor:
    """A tensor's entries at the channels that were chosen along its first dimensions."""
    for dimension, axis in enumerate(axes):
        if axis.group is not None:
            index = entries(chosen[axis.group], axis.repeat)
            value = value.index_select(dimension, torch.from_numpy(index).to(value.device))
    return value


def entries(channels: np.ndarray, repeat: int) -> np.ndarray:
    """The entries that channels take, `repeat` consecutive ones each, int64."""
    return (channels[:, None] * repeat + np.arange(repeat)).reshape(-1)


def evenly_spaced(group: Group) -> np.ndarray:
    """Channels floor(i * D_teacher / D_student), int64 (D_student,).

    Source: the uniform selection of Xu et al. 2023, "Initializing Models with Larger Ones" (arXiv:2311.18823).
    """
    return np.arange(group.student_width) * group.teacher_width // group.student_width


def drawn(group: Group, number: int, *, seed: int) -> np.ndarray:
    """Channels drawn at random, in ascending order, int64 (D_student,)."""
    return np.sort(keyed_permutation(group.teacher_width, "initial channels", seed, number)[: group.student_width])


def highest(group: Group, scores: np.ndarray) -> np.ndarray:
    """The channels of the highest scores, in ascending order; of equal ones the first, int64 (D_student,)."""
    return np.sort(np.argsort(-scores, kind="stable")[: group.student_width])


def channel_scores(reading: Reading, group: Group, values: Mapping[str, Tensor], *, weights_only: bool) -> np.ndarray:
    """The sum of |values| over all that gives each of the teacher's channels, float64 (D_teacher,).

    Args:
        reading: of the student.
        group: whose channels are scored.
        values: the teacher's parameters, or what each is worth, by the student's name.
        weights_only: leave biases and norms out, as pruning by magnitude does.

    Raises:
        UsageError: nothing gives these channels, so there is nothing to score them by.
    """
    scores_D = np.zeros(group.teacher_width)
    scored = False
    for name, value in values.items():
        axes = reading.axes[name]
        if axes and axes[0].group == group.name and axes[0].repeat == 1 and (value.ndim > 1 or not weights_only):
            scores_D += (
                value.detach().abs().double().cpu().flatten(1).sum(dim=1).numpy()
                if value.ndim > 1
                else (value.detach().abs().double().cpu().numpy())
            )
            scored = True
    if not scored:
        raise UsageError(
            f"no weight gives the channels {group.name!r}, so they can't be scored; use init.width: uniform or random"
        )
    return scores_D
