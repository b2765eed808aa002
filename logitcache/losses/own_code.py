"""A loss of the user's own code, named `package.module:function` in a pipeline."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from torch import Tensor

from logitcache.entry_points import load_entry_point
from logitcache.errors import ShapeError, UsageError
from logitcache.losses.blends import Weighted
from logitcache.losses.protocol import Loss
from logitcache.losses.schedules import value_at
from logitcache.losses.stages import Stages
from logitcache.registry import configured

# B batch, C classes


@dataclasses.dataclass(frozen=True, kw_only=True)
class OwnLoss(Loss):
    """Calls a function (student (B, C), teacher (B, C), target, **parameters) -> (B,).

    Reading a configuration imports no code, so the function is missing until `load_code`.
    """

    name: ClassVar[str] = "own code"
    entry_point: str
    """`package.module:function`."""
    parameters: Mapping[str, Any]
    function: Callable[..., Tensor] | None = None

    @property
    def needs_target(self) -> bool:
        return True

    def at(self, progress: float) -> Loss:
        current = {name: value_at(value, progress) for name, value in self.parameters.items()}
        return self if current == self.parameters else dataclasses.replace(self, parameters=current)

    def __call__(self, student_BC: Tensor, teacher_BC: Tensor | None, target: Tensor) -> Tensor:
        if self.function is None:
            raise UsageError(f"the code of the loss {self.entry_point} is not loaded: use a loss of `load_code`")
        loss_B = self.function(student_BC, teacher_BC, target, **self.parameters)
        if not isinstance(loss_B, Tensor) or loss_B.shape != student_BC.shape[:1]:
            found = tuple(loss_B.shape) if isinstance(loss_B, Tensor) else type(loss_B).__name__
            raise ShapeError(
                f"the loss {self.entry_point} returned {found}; expected one number for each sample, "
                f"({len(student_BC)},)"
            )
        return loss_B


def load_code(loss: Loss, *, trust: bool) -> Loss:
    """A loss whose own code is imported, also within its stages and parts.

    A name may also be of a subclass of `Loss`, which is then configured with the parameters.

    Raises:
        UntrustedCode: the code is not the user's own, and `trust` is False.
        UsageError: there is no such code, or it doesn't take the parameters.
    """
    if isinstance(loss, OwnLoss):
        found = load_entry_point(loss.entry_point, trust=trust)
        if isinstance(found, type) and issubclass(found, Loss):
            return configured(f"loss {loss.entry_point}", found, loss.parameters)
        if not callable(found):
            raise UsageError(f"{loss.entry_point} is a {type(found).__name__}; expected a function or a loss class")
        return dataclasses.replace(loss, function=found)
    if isinstance(loss, Weighted):
        parts = (dataclasses.replace(part, loss=load_code(part.loss, trust=trust)) for part in loss.parts)
        return Weighted(parts=tuple(parts))
    if isinstance(loss, Stages):
        stages = (dataclasses.replace(stage, loss=load_code(stage.loss, trust=trust)) for stage in loss.stages)
        return Stages(stages=tuple(stages))
    return loss
