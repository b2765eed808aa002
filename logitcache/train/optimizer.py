"""Updates weights: optimizer, learning-rate schedule, gradient clipping, loss scaling for float16, and averaging."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from logitcache.config.schema import TrainConfig

ONE_CYCLE_RISE = 0.3
"""Fraction of all steps until the peak of one-cycle, where `warmup_epochs` is 0."""
ONE_CYCLE_START, ONE_CYCLE_END = 1 / 25, 1 / 25 / 1e4
"""Fractions of the largest rate; these three are the defaults of torch's `OneCycleLR`."""


def learning_rate(config: TrainConfig, step: int, steps_per_epoch: int) -> float:
    """The learning rate of a step, counted from 0; a pure function, without state to resume.

    `constant` and `cosine` (which ends at zero) follow a linear warm-up. `one_cycle` rises along a cosine from 1/25 of
    `lr`, and falls along another one to 1/250 000 of it (Smith and Topin 2017, arXiv:1708.07120, as in torch's
    `OneCycleLR`, but with constant momentum).
    """
    total = config.epochs * steps_per_epoch
    warmup = round(config.warmup_epochs * steps_per_epoch)
    if config.schedule == "one_cycle":
        top = (warmup or ONE_CYCLE_RISE * total) - 1
        if step <= top:
            return config.lr * _half_cosine(ONE_CYCLE_START, 1.0, step / top if top > 0 else 1.0)
        return config.lr * _half_cosine(1.0, ONE_CYCLE_END, (step - top) / (total - 1 - top))
    if step < warmup:
        return config.lr * (step + 1) / warmup
    if config.schedule == "constant":
        return config.lr
    return config.lr * _half_cosine(1.0, 0.0, min((step - warmup) / max(total - warmup, 1), 1.0))


class OptimizerStep:
    """Backward pass and optimizer step of a model.

    Args:
        model: on its device.
        config: optimizer, schedule, clipping and precision.
        device: of the model.
        steps_per_epoch: of the schedule.
    """

    def __init__(self, model: nn.Module, config: TrainConfig, device: torch.device, steps_per_epoch: int) -> None:
        self._config = config
        self._steps_per_epoch = steps_per_epoch
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._optimizer = _optimizer(self._parameters, config)
        self._scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "float16")

    def learning_rate(self, step: int) -> float:
        """The learning rate of a step."""
        return learning_rate(self._config, step, self._steps_per_epoch)

    def backward(self, loss: Tensor) -> None:
        """Add a loss's gradients to the present ones."""
        self._scaler.scale(loss).backward()  # type: ignore[no-untyped-call]

    def apply(self, step: int) -> None:
        """Update the weights from the gradients, and clear the gradients."""
        for group in self._optimizer.param_groups:
            group["lr"] = self.learning_rate(step)
        if self._config.clip_norm is not None:
            self._scaler.unscale_(self._optimizer)
            nn.utils.clip_grad_norm_(self._parameters, self._config.clip_norm)
        self._scaler.step(self._optimizer)
        self._scaler.update()
        self._optimizer.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, Any]:
        """The state for a checkpoint."""
        return {"optimizer": self._optimizer.state_dict(), "scaler": self._scaler.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load the state from a checkpoint.

        Raises:
            AttributeError, KeyError, RuntimeError, TypeError, ValueError: the state of another optimizer or model.
        """
        expected = [_settings(group) for group in self._optimizer.param_groups]
        self._optimizer.load_state_dict(state["optimizer"])
        if expected != [_settings(group) for group in self._optimizer.param_groups]:
            raise ValueError("the optimizer has other settings")
        for parameter, moments in self._optimizer.state.items():
            for name, value in moments.items():
                # torch checks the number of parameters, but not their shapes.
                if isinstance(value, Tensor) and value.dim() and value.shape != parameter.shape:
                    shapes = f"{tuple(value.shape)}, its parameter {tuple(parameter.shape)}"
                    raise ValueError(f"{name} of the optimizer has shape {shapes}")
        self._scaler.load_state_dict(state["scaler"])


def weight_average(model: nn.Module, decay: float) -> AveragedModel:
    """An exponential moving average of a model's weights and batch-norm statistics.

    After n updates the decay is the smaller of `decay` and (1 + n) / (10 + n), so that the first steps don't dominate
    the average of a short run (as in TensorFlow's `ExponentialMovingAverage`). Statistics are averaged like weights (as
    in torchvision and timm), since those of the last step would belong to other weights. Integers, such as batch norm's
    counter, are copied.
    """

    def mix(averaged: Any, current: Any, _: Any) -> None:
        if not averaged[0].is_floating_point():
            for mean, value in zip(averaged, current, strict=True):
                mean.copy_(value)
            return
        updates = int(average.n_averaged)  # on the CPU: no device synchronization
        step_decay = min(decay, (1 + updates) / (10 + updates))
        get_ema_multi_avg_fn(step_decay)(averaged, current, None)  # type: ignore[no-untyped-call]

    average = AveragedModel(model, multi_avg_fn=mix, use_buffers=True)
    return average


def _settings(group: dict[str, Any]) -> dict[str, Any]:
    """Settings of a parameter group, without the learning rate, which each step sets."""
    return {name: value for name, value in group.items() if name not in ("params", "lr")}


def _half_cosine(start: float, end: float, progress: float) -> float:
    return end + (start - end) / 2.0 * (1.0 + math.cos(math.pi * progress))


def _optimizer(parameters: list[nn.Parameter], config: TrainConfig) -> torch.optim.Optimizer:
    if config.optimizer == "sgd":
        return torch.optim.SGD(
            parameters,
            lr=config.lr,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
            nesterov=config.momentum > 0,
        )
    kind = torch.optim.AdamW if config.optimizer == "adamw" else torch.optim.Adam
    return kind(parameters, lr=config.lr, weight_decay=config.weight_decay)
