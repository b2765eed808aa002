"""A student that starts from its teacher's weights: some of the layers, some of the channels, or one part of the net.

Parameters are matched by name. Where names are numbered (`blocks.3.`, `layer1.0.`) and the student has fewer of them,
`layers` says which of the teacher's the student's are; where tensors are narrower, `width` says which channels.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from logitcache.catalog.calling import model_logits
from logitcache.errors import UsageError
from logitcache.extras.channels import (
    Reading,
    Shape,
    channel_scores,
    drawn,
    evenly_spaced,
    highest,
    is_proven,
    read_as_chain,
    read_by_width,
    take,
)

# B batch, C classes

EVERY_OTHER, ALL = "every_other", "all"
NONE, UNIFORM, RANDOM, MAGNITUDE, IMPORTANCE = "none", "uniform", "random", "magnitude", "importance"
WIDTHS = (NONE, UNIFORM, RANDOM, MAGNITUDE, IMPORTANCE)


@dataclass(frozen=True, kw_only=True)
class Init:
    """Which of the teacher's weights a student starts from."""

    layers: str | Mapping[str, Any] = ALL
    """"all" by their numbers, "every_other", {"first": n}, or {"blocks": [0, 2, 5]}: the teacher's numbers wherever the
    student has fewer; {"blocks": {"layer1": [0, 2]}} for each place of its own."""
    width: str = NONE
    """How channels are chosen where the student is narrower; one of `WIDTHS`."""
    submodel: str | None = None
    """Only what lies below this path in the teacher, such as "stages.1"; into the same path of the student, or into the
    whole student where it has no such path."""
    calibration: int = 256
    """Training samples that "importance" is measured on."""

    def __post_init__(self) -> None:
        if self.width not in WIDTHS:
            raise UsageError(f"unknown init.width {self.width!r}; expected one of: {', '.join(WIDTHS)}")
        if not _is_layers(self.layers):
            raise UsageError(
                f"init.layers is {self.layers!r}; expected all, every_other, {{first: 4}}, {{blocks: [0, 2, 5]}} or "
                "{blocks: {layer1: [0, 2]}}"
            )
        if self.submodel is not None and (not isinstance(self.submodel, str) or not self.submodel):
            raise UsageError(f"init.submodel is a path in the teacher such as stages.1, not {self.submodel!r}")
        if not _is_count(self.calibration):
            raise UsageError(f"init.calibration is a number of samples, not {self.calibration!r}")

    def config(self) -> dict[str, Any]:
        """As plain data, which `init_from_config` reads again."""
        return {"from": "teacher"} | {field.name: getattr(self, field.name) for field in fields(self)}


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_layers(layers: Any) -> bool:
    if layers in (ALL, EVERY_OTHER):
        return True
    if not isinstance(layers, Mapping) or len(layers) != 1:
        return False
    if "first" in layers:
        return _is_count(layers["first"])
    blocks = layers.get("blocks")
    lists = list(blocks.values()) if isinstance(blocks, Mapping) else [blocks]
    return bool(lists) and all(
        isinstance(each, list) and each and all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in each)
        for each in lists
    )


def init_from_config(value: Any) -> Init:
    """An initialisation from "teacher" or from a mapping such as {"from": "teacher", "layers": "every_other"}.

    Raises:
        UsageError: an unknown key or value.
    """
    given = {"from": value} if isinstance(value, str) else value
    known = [field.name for field in fields(Init)]
    if not isinstance(given, Mapping) or given.get("from") != "teacher" or set(given) - {"from", *known}:
        raise UsageError(f"init is `teacher`, or has `from: teacher` and any of {', '.join(known)}; found {value!r}")
    settings: dict[str, Any] = {name: each for name, each in given.items() if name != "from"}
    return Init(**settings)


@dataclass(frozen=True)
class Origin:
    """Where one of the student's tensors comes from."""

    parameter: str
    shape: Shape
    source: str | None
    """The teacher's tensor; None where the student keeps its fresh one."""
    teacher_shape: Shape | None
    groups: tuple[str | None, ...] = ()
    """The choice of channels along each dimension; None takes everything."""


@dataclass(frozen=True)
class InitReport:
    """Which parameters came from where."""

    origins: list[Origin]
    channels: dict[str, list[int]]
    """The teacher's channels that were chosen, by the name of the choice."""
    reading: str | None
    """How the net was read where channels were chosen: "chain" or "width"."""

    def as_json(self) -> str:
        """All of it."""
        rows = [
            {
                "parameter": each.parameter,
                "shape": list(each.shape),
                "from": each.source,
                "teacher_shape": None if each.teacher_shape is None else list(each.teacher_shape),
                "channels": list(each.groups),
            }
            for each in self.origins
        ]
        return json.dumps({"parameters": rows, "channels": self.channels, "reading": self.reading}, indent=1) + "\n"

    def as_table(self) -> str:
        """A line for each parameter, then one for each choice of channels."""
        cells = [("student", "shape", "teacher", "shape", "channels")]
        for each in self.origins:
            chosen = ", ".join("all" if group is None else f"[{group}]" for group in each.groups)
            cells.append(
                (each.parameter, _shown(each.shape), each.source or "fresh", _shown(each.teacher_shape), chosen)
            )
        widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in cells]
        lines += [f"[{name}] = {', '.join(map(str, chosen))}" for name, chosen in self.channels.items()]
        return "\n".join(lines) + "\n"


def _shown(shape: Shape | None) -> str:
    return "-" if shape is None else "x".join(map(str, shape)) or "scalar"


def initialise(
    student: nn.Module,
    teacher: nn.Module,
    init: Init,
    *,
    seed: int,
    inputs: Any = None,
    importance: Callable[[], Mapping[str, Tensor]] | None = None,
) -> InitReport:
    """Put the teacher's weights into a student, in place; what has no namesake in the teacher stays fresh.

    Args:
        student, teacher: on the CPU.
        init: what goes where.
        seed: of channels that are drawn, and of the proof that channels go together.
        inputs: a few samples as the student takes them; needed where channels are chosen.
        importance: gives |w * dL/dw| of each of the teacher's parameters, by name; needed for "importance".

    Raises:
        UsageError: nothing fits, or something can't; names the parameter and both shapes.
    """
    mine, theirs = student.state_dict(), teacher.state_dict()
    sources = matched_names(mine, theirs, init)
    if not sources:
        raise UsageError(
            f"no parameter of the student has a namesake in the teacher: the student has {_some(mine)}, the teacher "
            f"{_some(theirs)}; name the part to take in init.submodel, or train from fresh weights without init"
        )
    shapes = {name: (tuple(theirs[source].shape), tuple(mine[name].shape)) for name, source in sources.items()}
    for name, (there, here) in shapes.items():
        _check_fit(name, sources[name], there, here, init, student)
    chosen: dict[str, np.ndarray] = {}
    reading: Reading | None = None
    if any(there != here for there, here in shapes.values()):
        reading = _reading(student, shapes, init, inputs, seed)
        chosen = _chosen_channels(reading, teacher, sources, init, seed, importance)
    for name, source in sources.items():
        axes = () if reading is None else reading.axes[name]
        mine[name] = take(theirs[source], axes, chosen).detach().to(mine[name]).clone()
    student.load_state_dict(mine)
    origins = [
        Origin(
            name,
            tuple(value.shape),
            sources.get(name),
            shapes[name][0] if name in shapes else None,
            () if reading is None or name not in sources else tuple(axis.group for axis in reading.axes[name]),
        )
        for name, value in mine.items()
    ]
    channels = {name: each.tolist() for name, each in chosen.items()}
    return InitReport(origins, channels, None if reading is None else reading.kind)


def _some(names: Iterable[str]) -> str:
    first = list(names)[:3]
    return ", ".join(first) + ", …"


def _check_fit(name: str, source: str, there: Shape, here: Shape, init: Init, student: nn.Module) -> None:
    if there == here:
        return
    both = f"the student's {name} is {here}, the teacher's {source} is {there}"
    if len(there) != len(here):
        raise UsageError(f"{both}: they are of different kinds; take another part of the teacher or another student")
    module = student.get_submodule(name.rpartition(".")[0])
    if isinstance(module, nn.modules.conv._ConvNd) and there[2:] != here[2:]:
        raise UsageError(f"{both}: kernels of another size can't be taken; give the student the teacher's")
    if init.width == NONE:
        raise UsageError(
            f"{both}; say how to choose channels with init.width ({', '.join(WIDTHS[1:])}), or which layers the "
            "student's are with init.layers"
        )
    if any(mine > theirs for mine, theirs in zip(here, there, strict=True)):
        raise UsageError(f"{both}: a student can be narrower than its teacher, not wider")


def matched_names(mine: Iterable[str], theirs: Iterable[str], init: Init) -> dict[str, str]:
    """The teacher's name of each of the student's tensors that has one.

    Raises:
        UsageError: the teacher has no such part, or other numbers of blocks than `layers` gives.
    """
    mine, theirs = list(mine), list(theirs)
    into = ""
    if init.submodel is not None:
        prefix = init.submodel + "."
        theirs = [name for name in theirs if name.startswith(prefix)]
        if not theirs:
            raise UsageError(f"the teacher has no parameters below init.submodel {init.submodel!r}")
        into = "" if any(name.startswith(prefix) for name in mine) else prefix
        mine = [name for name in mine if into or name.startswith(prefix)]
    known = set(theirs)
    numbers: dict[tuple[str, str], dict[int, int]] = {}
    sources = {}
    for name in mine:
        source = into.rstrip(".").split(".") if into else []
        parts = name.split(".")
        for place, part in enumerate(parts):
            here, there = ".".join(parts[:place]), ".".join(source)
            if part.isdecimal():
                if (here, there) not in numbers:
                    numbers[here, there] = _blocks(_numbers(mine, here), _numbers(theirs, there), init.layers, here)
                part = str(numbers[here, there].get(int(part), int(part)))
            source.append(part)
        if ".".join(source) in known:
            sources[name] = ".".join(source)
    return sources


def _numbers(names: Iterable[str], place: str) -> list[int]:
    """The numbers that follow a place in names, ascending."""
    prefix = f"{place}." if place else ""
    following = {name[len(prefix) :].partition(".")[0] for name in names if name.startswith(prefix)}
    return sorted(int(part) for part in following if part.isdecimal())


def _blocks(here: list[int], there: list[int], layers: str | Mapping[str, Any], place: str) -> dict[int, int]:
    """Which of the teacher's numbers each of the student's is, at one place; by its own number where none is named."""
    if len(here) == len(there) or not there or layers == ALL:
        return dict(zip(here, there, strict=True)) if len(here) == len(there) else {}
    asked: Any = layers
    if isinstance(layers, Mapping) and isinstance(layers.get("blocks"), Mapping):
        if place not in layers["blocks"]:
            return {}
        asked = {"blocks": layers["blocks"][place]}
    if asked == EVERY_OTHER:
        chosen = there[::2]
    elif "first" in asked:
        chosen = there[: asked["first"]]
    else:
        chosen = list(asked["blocks"])
        strangers = [number for number in chosen if number not in there]
        if strangers:
            raise UsageError(f"the teacher has no {place}.{strangers[0]}; its numbers there are {there}")
    if len(chosen) != len(here):
        raise UsageError(
            f"init.layers takes {len(chosen)} of the teacher's {len(there)} at {place or 'the top'} ({chosen}), but "
            f"the student has {len(here)} there; give the student {len(chosen)}, or name them in init.layers.blocks"
        )
    return dict(zip(here, chosen, strict=True))


def _reading(
    student: nn.Module, shapes: Mapping[str, tuple[Shape, Shape]], init: Init, inputs: Any, seed: int
) -> Reading:
    if inputs is None:
        raise UsageError("choosing channels needs a few samples as the student takes them: give `inputs`")
    chain = read_as_chain(student, shapes)
    if chain is not None and is_proven(student, chain, inputs, seed=seed):
        return chain
    by_width = read_by_width(shapes)
    if init.width == UNIFORM or is_proven(student, by_width, inputs, seed=seed):
        return by_width
    name = next(name for name, (there, here) in shapes.items() if there != here)
    there, here = shapes[name]
    raise UsageError(
        f"init.width: {init.width} can't choose channels of this net, from {name}, {there} in the teacher and {here} "
        "in the student, on: it is neither a chain of layers nor one whose tensors of equal width share their channels "
        "(grouped norms, padded shortcuts and fused projections are such cases).\n"
        "Use init.width: uniform, which takes evenly spaced entries of every dimension, or give the student the "
        "teacher's width."
    )


def _chosen_channels(
    reading: Reading,
    teacher: nn.Module,
    sources: Mapping[str, str],
    init: Init,
    seed: int,
    importance: Callable[[], Mapping[str, Tensor]] | None,
) -> dict[str, np.ndarray]:
    if init.width == UNIFORM:
        return {name: evenly_spaced(group) for name, group in reading.groups.items()}
    if init.width == RANDOM:
        return {name: drawn(group, number, seed=seed) for number, (name, group) in enumerate(reading.groups.items())}
    if init.width == IMPORTANCE and importance is None:
        raise UsageError("init.width: importance is measured on data, and none was given; use magnitude")
    worth = dict(teacher.named_parameters()) if importance is None or init.width == MAGNITUDE else importance()
    values = {name: worth[source] for name, source in sources.items() if source in worth}
    weights_only = init.width == MAGNITUDE
    return {
        name: highest(group, channel_scores(reading, group, values, weights_only=weights_only))
        for name, group in reading.groups.items()
    }


def taylor_importance(teacher: nn.Module, batches: Iterable[tuple[Any, Tensor]]) -> dict[str, Tensor]:
    """What each of a teacher's parameters is worth: |w * dL/dw|, the mean over batches, by name.

    L is the cross-entropy to the true labels, the net in evaluation mode. Source: Molchanov et al. 2017
    (arXiv:1611.06440) and 2019 (arXiv:1906.10771), the first-order criterion.

    Raises:
        UsageError: no batch.
    """
    parameters = dict(teacher.named_parameters())
    before = {name: parameter.requires_grad for name, parameter in parameters.items()}
    was_training = teacher.training
    teacher.eval().requires_grad_(True)
    worth = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    count = 0
    try:
        for inputs, targets in batches:
            loss = F.cross_entropy(model_logits(teacher, inputs).float(), targets)
            gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
            for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True):
                if gradient is not None:
                    worth[name] += (parameter * gradient).detach().abs()
            count += 1
    finally:
        teacher.train(was_training)
        for name, parameter in parameters.items():
            parameter.requires_grad_(before[name])
    if not count:
        raise UsageError("importance is measured on data, and there was none")
    return {name: value / count for name, value in worth.items()}


class FromTeacher:
    """`students[].init: teacher`, for the registry of initialisations."""

    def config(self, value: Any) -> dict[str, Any]:
        """The pipeline's `init` in its one form, checked."""
        return init_from_config(value).config()

    def start(
        self,
        student: nn.Module,
        teacher: nn.Module,
        value: Any,
        *,
        seed: int,
        inputs: Any,
        batches: Callable[[int], Iterable[tuple[Any, Tensor]]],
    ) -> InitReport:
        """Put weights of the teacher into a student, in place."""
        init = init_from_config(value)
        importance = functools.partial(_importance, teacher, batches, init.calibration)
        return initialise(
            student,
            teacher,
            init,
            seed=seed,
            inputs=inputs,
            importance=importance if init.width == IMPORTANCE else None,
        )


def _importance(
    teacher: nn.Module, batches: Callable[[int], Iterable[tuple[Any, Tensor]]], count: int
) -> dict[str, Tensor]:
    return taylor_importance(teacher, batches(count))


FROM_TEACHER = FromTeacher()
