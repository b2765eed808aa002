"""Losses from their configuration in a pipeline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from logitcache.entry_points import is_entry_point
from logitcache.errors import UsageError
from logitcache.losses.blends import Blend, HardPlusSoft, Part, Weighted
from logitcache.losses.correlation import Dist
from logitcache.losses.decoupled import DecoupledKD
from logitcache.losses.features import AttentionLoss, FeatureLoss, HintLoss, RelationalLoss
from logitcache.losses.hard import CURRENT_NAMES, CrossEntropy, TeacherArgmax, with_one_spelling
from logitcache.losses.own_code import OwnLoss
from logitcache.losses.protocol import Loss
from logitcache.losses.regression import LogitMSE
from logitcache.losses.relational import RKD
from logitcache.losses.schedules import Schedule, Scheduled, check_number, check_parameter, shown
from logitcache.losses.soft import JensenShannon, KLDivergence, SoftCrossEntropy
from logitcache.losses.stages import Stage, Stages
from logitcache.registry import Registry, check_keys, configured, parameters

T = TypeVar("T")

_BUILT_IN: tuple[type[Loss], ...] = (
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
LOSSES: Registry[type[Loss]] = Registry(
    "loss", {loss.name: loss for loss in _BUILT_IN}, plural="losses", base=Loss, allows_code=True
)
"""Losses between logits. A package adds one, a frozen dataclass, in the entry point group `logitcache.losses`."""
FEATURE_LOSSES: Registry[type[FeatureLoss]] = Registry(
    "feature loss",
    {loss.name: loss for loss in (HintLoss, AttentionLoss, RelationalLoss)},
    plural="feature_losses",
    base=FeatureLoss,
)
"""Losses between features, which hints take; a package adds one in `logitcache.feature_losses`."""


def loss_from_config(config: str | Mapping[str, Any]) -> Loss:
    """A loss from its name, or from a mapping such as `{name: kl, temperature: 2}`.

    Weighted sums are `{name: weighted, parts: [{loss: dist, weight: 2}, ...]}`, sequences are
    `{stages: [{until: 0.8, loss: kl}, {loss: cross_entropy}]}`, and any number may be a schedule,
    `{from: 4, to: 1, over: 0.5, shape: cosine}`. A name `package.module:function` imports nothing: see `load_code`.

    Raises:
        UsageError: an unknown loss or parameter, or a parameter out of range.
    """
    return _loss(config, {})


def hint_loss_from_config(config: Any) -> FeatureLoss | Loss:
    """The loss of a hint: one between features, or one between logits for another head.

    Raises:
        UsageError: an unknown loss or parameter, or a loss that takes true labels, which other heads don't have.
    """
    name = config.get("name") if isinstance(config, Mapping) else config
    if isinstance(name, str) and name in FEATURE_LOSSES:
        fields = {} if isinstance(config, str) else config
        return _configured(name, FEATURE_LOSSES[name], {key: fields[key] for key in fields if key != "name"})
    loss = _loss(config, {}, also=list(FEATURE_LOSSES))
    if loss.needs_target:
        raise UsageError(
            f"loss {loss.name!r} takes the true labels, which belong to the logits; expected a loss of teacher and "
            "student alone, such as 'kl'"
        )
    return loss


def scheduled_weight(value: Any) -> Scheduled:
    """A weight, or a schedule of a weight from its mapping.

    Raises:
        UsageError: neither, or a weight below 0.
    """
    weight: Scheduled = _number_or_schedule("weight", value)
    check_parameter("weight", weight, least=0.0)
    return weight


def _loss(config: Any, refused: Mapping[str, str], also: Sequence[str] = ()) -> Loss:
    """A loss; `refused` are the losses that are not allowed here, with the reason.

    Stages may contain weighted sums, both may contain plain losses, and nothing nests deeper: an alias in YAML can
    contain itself.
    """
    if not isinstance(config, str | Mapping):
        raise UsageError(f"a loss is a name or a mapping such as {{name: kl, temperature: 2}}, not {shown(config)}")
    fields = {"name": config} if isinstance(config, str) else with_one_spelling(config)
    name = fields.pop("name", Stages.name if "stages" in fields else None)
    name = CURRENT_NAMES.get(name, name) if isinstance(name, str) else name
    if isinstance(name, str) and is_entry_point(name):
        return OwnLoss(
            entry_point=name, parameters={key: _number_or_schedule(key, value) for key, value in fields.items()}
        )
    if not isinstance(name, str) or name not in LOSSES:
        raise UsageError(LOSSES.unknown(name, also))
    if name in refused:
        raise UsageError(f"loss {name!r} can't stand {refused[name]}")
    if name == Stages.name:
        inner = {name: "within a stage; write all stages in one list"}
        return _configured(name, Stages, _with_items("stages", fields, Stage, "{until: 0.8, loss: kl}", inner))
    if name == Weighted.name:
        inner = {
            name: "within another; write all parts in one list, their weights multiplied",
            Stages.name: f"within {name!r}; write stages outside, each with its own parts",
        }
        return _configured(name, Weighted, _with_items("parts", fields, Part, "{loss: dist, weight: 2}", inner))
    return _configured(name, LOSSES[name], fields)


def _configured(name: str, kind: type[T], fields: Mapping[Any, Any]) -> T:
    return configured(f"loss {name!r}", kind, fields, _number_or_schedule)


def _with_items(
    key: str, fields: Mapping[Any, Any], kind: type[Stage | Part], example: str, refused: Mapping[str, str]
) -> dict[Any, Any]:
    """The fields of a loss with the items of its list, mappings such as the example, as objects."""
    items = fields.get(key)
    if not isinstance(items, list | tuple):
        raise UsageError(f"{key!r} is a list, not {shown(items)}")
    what = f"a {kind.__name__.lower()}"
    objects = []
    for item in items:
        if not isinstance(item, Mapping):
            raise UsageError(f"{what} is a mapping such as {example}, not {shown(item)}")
        check_keys(f"{what} has no key", item, parameters(kind))
        if "loss" not in item:
            raise UsageError(f"{what} has no loss; expected for example {example}")
        loss = _loss(item["loss"], refused)
        if "until" in item:
            check_number("`until` of a stage", item["until"])
        numbers = {name: _number_or_schedule(name, value) for name, value in item.items() if name != "loss"}
        objects.append(kind(loss=loss, **numbers))
    return {**fields, key: tuple(objects)}


def _number_or_schedule(parameter: str, value: Any) -> Any:
    """A schedule from a mapping in the place of a number; any other value is left to the loss to check."""
    if not isinstance(value, Mapping):
        return value
    keys = {"from": "start", "to": "end", "over": "over", "shape": "shape"}
    check_keys(f"the schedule of {parameter!r} has no key", value, list(keys))
    missing = [key for key in ("from", "to") if key not in value]
    if missing:
        raise UsageError(f"the schedule of {parameter!r} lacks {missing[0]!r}; expected for example {{from: 4, to: 1}}")
    return Schedule(**{keys[key]: number for key, number in value.items()})
