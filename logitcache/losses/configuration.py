"""Losses by name, as pipelines write them."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from logitcache.errors import UsageError
from logitcache.losses.blends import Blend, HardPlusSoft, Part, Weighted
from logitcache.losses.correlation import Dist
from logitcache.losses.decoupled import DecoupledKD
from logitcache.losses.features import AttentionLoss, FeatureLoss, HintLoss, RelationalLoss
from logitcache.losses.hard import CURRENT_NAMES, CrossEntropy, TeacherArgmax
from logitcache.losses.protocol import Loss
from logitcache.losses.regression import LogitMSE
from logitcache.losses.relational import RKD
from logitcache.losses.schedules import Schedule, Scheduled, check_number, check_parameter, shown
from logitcache.losses.soft import JensenShannon, KLDivergence, SoftCrossEntropy
from logitcache.losses.stages import Stage, Stages

LOSSES: dict[str, type[Loss]] = {
    loss.name: loss
    for loss in (
        KLDivergence,
        SoftCrossEntropy,
        JensenShannon,
        LogitMSE,
        DecoupledKD,
        Dist,
        RKD,
        TeacherArgmax,
        CrossEntropy,
        HardPlusSoft,
        Blend,
        Weighted,
        Stages,
    )
}


def loss_from_config(config: str | Mapping[str, Any]) -> Loss:
    """A loss from its name, or from a mapping such as `{name: kl, temperature: 2}`.

    Weighted sums are `{name: weighted, parts: [{loss: dist, weight: 2}, ...]}`, sequences are
    `{stages: [{until: 0.8, loss: kl}, {loss: cross_entropy}]}`, and any number may be a schedule,
    `{from: 4, to: 1, over: 0.5, shape: cosine}`.

    Raises:
        UsageError: an unknown loss or parameter, or a parameter out of range.
    """
    return _loss(config, {})


FEATURE_LOSSES: dict[str, type[FeatureLoss]] = {loss.name: loss for loss in (HintLoss, AttentionLoss, RelationalLoss)}


def hint_loss_from_config(config: Any) -> FeatureLoss | Loss:
    """What a student learns of an output: a loss between features, or one of logits, for another head.

    Raises:
        UsageError: an unknown loss or parameter, or a loss that takes true labels, which another head has none of.
    """
    name = config.get("name") if isinstance(config, Mapping) else config
    if isinstance(name, str) and name in FEATURE_LOSSES:
        fields = {key: value for key, value in config.items() if key != "name"} if isinstance(config, Mapping) else {}
        check_keys(f"loss {name!r} has no parameter", fields, _parameters(FEATURE_LOSSES[name]))
        return FEATURE_LOSSES[name](**{field: _number_or_schedule(field, value) for field, value in fields.items()})
    stages = isinstance(config, Mapping) and "stages" in config
    if not stages and not (isinstance(name, str) and CURRENT_NAMES.get(name, name) in LOSSES):
        known = [*FEATURE_LOSSES, *LOSSES]
        raise UsageError(f"unknown loss {shown(name)}{_nearest(name, known)}; expected one of: {', '.join(known)}")
    loss = _loss(config, {})
    if loss.needs_target:
        raise UsageError(
            f"loss {loss.name!r} takes the true labels, which are the logits' and not another output's; expected a "
            "loss of teacher and student alone, such as 'kl'"
        )
    return loss


def scheduled_weight(value: Any) -> Scheduled:
    """A weight, or a schedule of one from its mapping.

    Raises:
        UsageError: neither, or one below 0.
    """
    weight: Scheduled = _number_or_schedule("weight", value)
    check_parameter("weight", weight, least=0.0)
    return weight


def _loss(config: Any, refused: Mapping[str, str]) -> Loss:
    """A loss; `refused` are those that can't stand where this one does, with the reason.

    Sums stand in stages and plain losses in both, and nothing goes deeper: an alias in YAML can hold itself.
    """
    if not isinstance(config, str | Mapping):
        raise UsageError(f"a loss is a name or a mapping such as {{name: kl, temperature: 2}}, not {shown(config)}")
    fields = {"name": config} if isinstance(config, str) else dict(config)
    name = fields.pop("name", Stages.name if "stages" in fields else None)
    name = CURRENT_NAMES.get(name, name) if isinstance(name, str) else name
    if not isinstance(name, str) or name not in LOSSES:
        known = list(LOSSES)
        raise UsageError(f"unknown loss {shown(name)}{_nearest(name, known)}; expected one of: {', '.join(known)}")
    if name in refused:
        raise UsageError(f"loss {name!r} can't stand {refused[name]}")
    check_keys(f"loss {name!r} has no parameter", fields, _parameters(LOSSES[name]))
    if name == Stages.name:
        inner = {name: "within a stage; write all stages in one list"}
        return Stages(stages=tuple(_stage(item, inner) for item in _listed("stages", fields)))
    if name == Weighted.name:
        inner = {
            name: "within another; write all parts in one list, their weights multiplied",
            Stages.name: f"within {name!r}; write stages outside, each with its own parts",
        }
        return Weighted(parts=tuple(_part(item, inner) for item in _listed("parts", fields)))
    values = {field: _number_or_schedule(field, value) for field, value in fields.items()}
    try:
        return LOSSES[name](**values)
    except UsageError as error:
        raise UsageError(f"loss {name!r}: {error}") from error


def _stage(config: Any, refused: Mapping[str, str]) -> Stage:
    fields = _mapping("a stage", "{until: 0.8, loss: kl}", config)
    check_keys("a stage has no key", fields, _parameters(Stage))
    if "loss" not in fields:
        raise UsageError("a stage has no loss; expected for example {until: 0.8, loss: kl}")
    until = fields.get("until", 1.0)
    check_number("`until` of a stage", until)
    return Stage(loss=_loss(fields["loss"], refused), until=until)


def _part(config: Any, refused: Mapping[str, str]) -> Part:
    fields = _mapping("a part", "{loss: dist, weight: 2}", config)
    check_keys("a part has no key", fields, _parameters(Part))
    if "loss" not in fields:
        raise UsageError("a part has no loss; expected for example {loss: dist, weight: 2}")
    return Part(loss=_loss(fields["loss"], refused), weight=_number_or_schedule("weight", fields.get("weight", 1.0)))


def _number_or_schedule(parameter: str, value: Any) -> Any:
    """A schedule where a mapping stands for a number; everything else is the loss's own to judge."""
    if not isinstance(value, Mapping):
        return value
    keys = {"from": "start", "to": "end", "over": "over", "shape": "shape"}
    check_keys(f"the schedule of {parameter!r} has no key", value, list(keys))
    missing = [key for key in ("from", "to") if key not in value]
    if missing:
        raise UsageError(f"the schedule of {parameter!r} lacks {missing[0]!r}; expected for example {{from: 4, to: 1}}")
    return Schedule(**{keys[key]: number for key, number in value.items()})


def _listed(key: str, fields: Mapping[str, Any]) -> Sequence[Any]:
    value = fields.get(key)
    if not isinstance(value, list | tuple):
        raise UsageError(f"{key!r} is a list, not {shown(value)}")
    return value


def _mapping(what: str, example: str, value: Any) -> Mapping[Any, Any]:
    if not isinstance(value, Mapping):
        raise UsageError(f"{what} is a mapping such as {example}, not {shown(value)}")
    return value


def check_keys(complaint: str, fields: Mapping[Any, Any], known: list[str]) -> None:
    """Refuse a key that is not known, naming the nearest one that is.

    Raises:
        UsageError: the complaint, the key and those that are known.
    """
    for key in fields:
        if key not in known:
            raise UsageError(f"{complaint} {shown(key)}{_nearest(key, known)}; it has: {', '.join(known) or 'none'}")


def _parameters(kind: type) -> list[str]:
    return [field.name for field in dataclasses.fields(kind)]


def _nearest(word: object, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5) if isinstance(word, str) else []
    return f"; did you mean {near[0]!r}?" if near else ""
