"""Initialising a student from its teacher's weights: some of the layers, some of the channels, or a submodule.

Parameters are matched by name. Where names are numbered (`blocks.3.`, `layer1.0.`) and the student has fewer of them,
`layers` selects the teacher's blocks; where tensors are narrower, `width` selects channels.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, ValidationError
from torch import Tensor, nn

from logitcache.catalog.calling import model_logits
from logitcache.errors import UsageError
from logitcache.extras.channels import (
    Shape,
    Structure,
    chain_structure,
    channel_scores,
    evenly_spaced,
    highest_scores,
    is_valid,
    random_channels,
    take,
    width_structure,
)

# B batch, C classes

Width = Literal["none", "uniform", "random", "magnitude", "importance"]
WIDTHS = get_args(Width)

_Blocks = Annotated[list[NonNegativeInt], Field(min_length=1)]
_First = Annotated[dict[Literal["first"], PositiveInt], Field(min_length=1)]
_Chosen = Annotated[
    dict[Literal["blocks"], _Blocks | Annotated[dict[str, _Blocks], Field(min_length=1)]], Field(min_length=1)
]


class Init(BaseModel):
    """The selection of teacher weights that a student starts from."""

    model_config = ConfigDict(frozen=True, strict=True)

    layers: Literal["all", "every_other"] | _First | _Chosen = "all"
    """Blocks of the teacher wherever the student has fewer: "all" keeps the student's numbers, "every_other",
    {"first": n}, or {"blocks": [0, 2, 5]}; {"blocks": {"layer1": [0, 2]}} by path."""
    width: Width = "none"
    """How channels are selected where the student is narrower."""
    submodel: Annotated[str, Field(min_length=1)] | None = None
    """Copy only the teacher's parameters below this path, such as "stages.1", to the same path of the student, or to
    the whole student if it has no such path."""
    calibration: PositiveInt = 256
    """Number of training samples for "importance"."""

    def config(self) -> dict[str, Any]:
        """As plain data for `init_from_config`."""
        return {"from": "teacher"} | self.model_dump()


EXPECTED = {
    "layers": "all, every_other, {first: 4}, {blocks: [0, 2, 5]} or {blocks: {layer1: [0, 2]}}",
    "width": f"one of {', '.join(WIDTHS)}",
    "submodel": "a path in the teacher such as stages.1",
    "calibration": "a number of samples",
}


def init_from_config(value: Any) -> Init:
    """An initialization from "teacher" or a mapping such as {"from": "teacher", "layers": "every_other"}.

    Raises:
        UsageError: an unknown key or value.
    """
    given = {"from": value} if isinstance(value, str) else value
    if not isinstance(given, Mapping) or given.get("from") != "teacher" or set(given) - {"from", *EXPECTED}:
        keys = ", ".join(EXPECTED)
        raise UsageError(f"init must be `teacher`, or have `from: teacher` and any of {keys}; not {value!r}")
    settings = {name: each for name, each in given.items() if name != "from"}
    try:
        return Init.model_validate(settings)
    except ValidationError as error:
        name = str(error.errors()[0]["loc"][0])
        raise UsageError(f"init.{name} must be {EXPECTED[name]}, not {settings[name]!r}") from None


@dataclass(frozen=True)
class Origin:
    """The source of one student tensor."""

    parameter: str
    shape: Shape
    source: str | None
    """The teacher's tensor; None where the student keeps its random initialization."""
    teacher_shape: Shape | None
    groups: tuple[str | None, ...] = ()
    """The selection of channels along each dimension; None for all."""


@dataclass(frozen=True)
class InitReport:
    """The source of every parameter."""

    origins: list[Origin]
    channels: dict[str, list[int]]
    """The selected teacher channels, by the name of the group."""
    structure: str | None
    """The structure used to select channels: "chain" or "width"."""

    def as_json(self) -> str:
        """The report as JSON."""
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
        return json.dumps({"parameters": rows, "channels": self.channels, "reading": self.structure}, indent=1) + "\n"

    def as_table(self) -> str:
        """One line per parameter, then one per group of channels."""
        cells = [("student", "shape", "teacher", "shape", "channels")]
        for each in self.origins:
            selected = ", ".join("all" if group is None else f"[{group}]" for group in each.groups)
            cells.append(
                (each.parameter, _shown(each.shape), each.source or "fresh", _shown(each.teacher_shape), selected)
            )
        widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in cells]
        lines += [f"[{name}] = {', '.join(map(str, selected))}" for name, selected in self.channels.items()]
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
    """Copy the teacher's weights into a student, in place; parameters without a match keep their random initialization.

    Args:
        student, teacher: on the CPU.
        init: the selection.
        seed: of random channels, and of the check of the network's structure.
        inputs: a few samples of student inputs; needed where channels are selected.
        importance: returns |w * dL/dw| of each teacher parameter, by name; needed for "importance".

    Raises:
        UsageError: no parameter matches, or one can't be copied; names the parameter and both shapes.
    """
    mine, theirs = student.state_dict(), teacher.state_dict()
    sources = matched_names(mine, theirs, init)
    if not sources:
        raise UsageError(
            f"no parameter of the student has the same name as one of the teacher: the student has {_some(mine)}, the "
            f"teacher {_some(theirs)}; set init.submodel to a part of the teacher, or remove init"
        )
    shapes = {name: (tuple(theirs[source].shape), tuple(mine[name].shape)) for name, source in sources.items()}
    for name, (there, here) in shapes.items():
        _check_fit(name, sources[name], there, here, init, student)
    selected: dict[str, np.ndarray] = {}
    structure: Structure | None = None
    if any(there != here for there, here in shapes.values()):
        structure = _find_structure(student, shapes, init, inputs, seed)
        selected = _selected_channels(structure, teacher, sources, init, seed, importance)
    origins = []
    for name, value in list(mine.items()):
        source = sources.get(name)
        axes = () if structure is None or source is None else structure.axes[name]
        if source is not None:
            mine[name] = take(theirs[source], axes, selected).detach().to(value).clone()
        teacher_shape = None if source is None else shapes[name][0]
        origins.append(Origin(name, tuple(value.shape), source, teacher_shape, tuple(axis.group for axis in axes)))
    student.load_state_dict(mine)
    channels = {name: each.tolist() for name, each in selected.items()}
    return InitReport(origins, channels, None if structure is None else structure.kind)


def _some(names: Iterable[str]) -> str:
    return ", ".join([*list(names)[:3], "…"])


def _check_fit(name: str, source: str, there: Shape, here: Shape, init: Init, student: nn.Module) -> None:
    if there == here:
        return
    both = f"the student's {name} is {here}, the teacher's {source} is {there}"
    if len(there) != len(here):
        raise UsageError(f"{both}: the numbers of dimensions differ; use another init.submodel or another student")
    module = student.get_submodule(name.rpartition(".")[0])
    if isinstance(module, nn.modules.conv._ConvNd) and there[2:] != here[2:]:
        raise UsageError(f"{both}: kernel sizes differ; use the teacher's kernel size in the student")
    if init.width == "none":
        raise UsageError(
            f"{both}; select channels with init.width ({', '.join(WIDTHS[1:])}), or blocks with init.layers"
        )
    if any(mine > theirs for mine, theirs in zip(here, there, strict=True)):
        raise UsageError(f"{both}: a student can be narrower than its teacher, not wider")


def matched_names(mine: Iterable[str], theirs: Iterable[str], init: Init) -> dict[str, str]:
    """The name of the teacher tensor for each student tensor that has one.

    Raises:
        UsageError: the teacher has no such submodule, or `layers` doesn't fit its blocks.
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
    """The numbers that follow a path in names, ascending."""
    prefix = f"{place}." if place else ""
    following = {name[len(prefix) :].partition(".")[0] for name in names if name.startswith(prefix)}
    return sorted(int(part) for part in following if part.isdecimal())


def _blocks(here: list[int], there: list[int], layers: Any, place: str) -> dict[int, int]:
    """The teacher's block for each of the student's at one path; empty if the numbers stay the same."""
    if len(here) == len(there) or not there or layers == "all":
        return dict(zip(here, there, strict=True)) if len(here) == len(there) else {}
    selection = layers
    if isinstance(layers, Mapping) and isinstance(layers.get("blocks"), Mapping):
        if place not in layers["blocks"]:
            return {}
        selection = {"blocks": layers["blocks"][place]}
    if selection == "every_other":
        selected = there[::2]
    elif "first" in selection:
        selected = there[: selection["first"]]
    else:
        selected = list(selection["blocks"])
        unknown = [number for number in selected if number not in there]
        if unknown:
            raise UsageError(f"the teacher has no {place}.{unknown[0]}; its numbers there are {there}")
    if len(selected) != len(here):
        raise UsageError(
            f"init.layers selects {len(selected)} of the teacher's {len(there)} blocks at {place or 'the top'} "
            f"({selected}), but the student has {len(here)} there; change the student, or list init.layers.blocks"
        )
    return dict(zip(here, selected, strict=True))


def _find_structure(
    student: nn.Module, shapes: Mapping[str, tuple[Shape, Shape]], init: Init, inputs: Any, seed: int
) -> Structure:
    if inputs is None:
        raise UsageError("selecting channels needs a few samples of student inputs: pass `inputs`")
    chain = chain_structure(student, shapes)
    if chain is not None and is_valid(student, chain, inputs, seed=seed):
        return chain
    by_width = width_structure(shapes)
    if init.width == "uniform" or is_valid(student, by_width, inputs, seed=seed):
        return by_width
    name = next(name for name, (there, here) in shapes.items() if there != here)
    there, here = shapes[name]
    raise UsageError(
        f"init.width: {init.width} can't select channels of this network, starting at {name}, {there} in the teacher "
        f"and {here} in the student: it is neither a chain of layers nor a network whose tensors of equal width share "
        "their channels (for example because of grouped norms, padded shortcuts or fused projections).\n"
        "Use init.width: uniform, which takes evenly spaced entries of every dimension, or give the student the "
        "teacher's width."
    )


def _selected_channels(
    structure: Structure,
    teacher: nn.Module,
    sources: Mapping[str, str],
    init: Init,
    seed: int,
    importance: Callable[[], Mapping[str, Tensor]] | None,
) -> dict[str, np.ndarray]:
    if init.width == "uniform":
        return {name: evenly_spaced(group) for name, group in structure.groups.items()}
    if init.width == "random":
        numbered = enumerate(structure.groups.items())
        return {name: random_channels(group, number, seed=seed) for number, (name, group) in numbered}
    weights_only = init.width == "magnitude"
    by_parameter: Mapping[str, Tensor] = dict(teacher.named_parameters())
    if not weights_only:
        if importance is None:
            raise UsageError("init.width: importance needs data, and none was given; use magnitude")
        by_parameter = importance()
    values = {name: by_parameter[source] for name, source in sources.items() if source in by_parameter}
    return {
        name: highest_scores(group, channel_scores(structure, group, values, weights_only=weights_only))
        for name, group in structure.groups.items()
    }


def taylor_importance(teacher: nn.Module, batches: Iterable[tuple[Any, Tensor]]) -> dict[str, Tensor]:
    """The importance of each teacher parameter: |w * dL/dw|, the mean over batches, by name.

    L is the cross-entropy to the true labels, with the network in evaluation mode. Source: Molchanov et al. 2017
    (arXiv:1611.06440) and 2019 (arXiv:1906.10771), the first-order criterion.

    Raises:
        UsageError: no batch.
    """
    parameters = dict(teacher.named_parameters())
    before = {name: parameter.requires_grad for name, parameter in parameters.items()}
    was_training = teacher.training
    teacher.eval().requires_grad_(True)
    total = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    count = 0
    try:
        for inputs, targets in batches:
            loss = F.cross_entropy(model_logits(teacher, inputs).float(), targets)
            gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
            for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True):
                if gradient is not None:
                    total[name] += (parameter * gradient).detach().abs()
            count += 1
    finally:
        teacher.train(was_training)
        for name, parameter in parameters.items():
            parameter.requires_grad_(before[name])
    if not count:
        raise UsageError("init.width: importance needs data, and there was none")
    return {name: value / count for name, value in total.items()}


class FromTeacher:
    """`students[].init: teacher`, in the registry of initializations."""

    def config(self, value: Any) -> dict[str, Any]:
        """The pipeline's `init`, validated and in its full form."""
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
        """Copy weights of the teacher into a student, in place."""
        init = init_from_config(value)
        return initialise(
            student,
            teacher,
            init,
            seed=seed,
            inputs=inputs,
            importance=lambda: taylor_importance(teacher, batches(init.calibration)),
        )


FROM_TEACHER = FromTeacher()
