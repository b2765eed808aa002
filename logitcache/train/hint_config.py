"""Configuration of hints: losses between modules of the student and further outputs of the teacher."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from logitcache.catalog.capture import Tap
from logitcache.errors import UsageError
from logitcache.losses import FeatureLoss, Loss, hint_loss_from_config
from logitcache.losses.configuration import scheduled_weight
from logitcache.losses.schedules import Scheduled, is_zero_during, value_at
from logitcache.registry import configured

EXAMPLE = "{output: features, module: layer2, loss: hint}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hint:
    """A loss between one module of the student and one output of the teacher."""

    output: str
    """The teacher's output, by its name in the cache."""
    module: str
    """The student's module, by its path."""
    loss: FeatureLoss | Loss
    """A loss of features, or of logits where the output is that of another head."""
    weight: Scheduled = 1.0
    key: str | int | None = None
    """Key or index of the output, where the student's module returns a mapping, a list or a tuple."""

    def __post_init__(self) -> None:
        if not isinstance(self.output, str):
            raise UsageError(f"`output` must be the name of one of the cache's outputs, not {self.output!r}")
        _ = self.tap  # validates module and key

    @property
    def tap(self) -> Tap:
        """Where the student's features are taken."""
        return Tap(module=self.module, key=self.key)

    def weight_at(self, progress: float) -> float:
        """The weight at a fraction of training, 0 to 1."""
        return value_at(self.weight, progress)

    def is_needed_during(self, start: float, end: float) -> bool:
        """Whether the teacher's output is used anywhere between two fractions of training."""
        return not is_zero_during(self.weight, start, end)


def hint_from_config(config: Any) -> Hint:
    """A hint from a mapping such as `{output: features, module: layer2, loss: attention, weight: 100}`.

    Raises:
        UsageError: a key, loss or parameter is unknown or missing.
    """
    if not isinstance(config, Mapping):
        raise UsageError(f"expected a mapping such as {EXAMPLE}, not {config!r}")
    return configured("a hint", Hint, config, _converted)


def _converted(name: str, value: Any) -> Any:
    convert = {"loss": hint_loss_from_config, "weight": scheduled_weight}.get(name)
    return value if convert is None else convert(value)


def hints_config(value: Any) -> list[dict[str, Any]]:
    """`students[].hints` in its normal form, validated.

    Raises:
        UsageError: as `hint_from_config`, with the number of the hint.
    """
    if not isinstance(value, list | tuple):
        raise UsageError(f"expected a list of hints such as {EXAMPLE}, not {value!r}")
    stated = []
    for number, config in enumerate(value, start=1):
        try:
            hint_from_config(config)
        except UsageError as error:
            raise UsageError(f"hint {number}: {error}") from None
        loss = {"name": config["loss"]} if isinstance(config["loss"], str) else dict(config["loss"])
        stated.append({**config, "loss": loss, "weight": config.get("weight", 1.0)})
    return stated
