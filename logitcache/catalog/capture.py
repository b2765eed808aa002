"""Captures outputs of a model's modules with forward hooks."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from logitcache.cache.manifest import LOGITS
from logitcache.catalog.calling import call_model, described, input_described
from logitcache.errors import LogitCacheError, ShapeError, UsageError
from logitcache.registry import configured

# B batch, C channels, H height, W width


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tap:
    """A module, and the part of its output to capture."""

    module: str
    """Its path, as in `named_modules`: `layer3`, `body.4`, `blocks.11.attn`."""
    key: str | int | None = None
    """Key or index, where the module returns a mapping, a list or a tuple."""
    pool: int | None = None
    """Height and width after adaptive average pooling of (B, C, H, W); None doesn't pool."""

    def __post_init__(self) -> None:
        if not isinstance(self.module, str) or not self.module:
            raise UsageError(f"`module` must be the path of a module, such as layer3, not {self.module!r}")
        if isinstance(self.key, bool) or not isinstance(self.key, str | int | None):
            raise UsageError(f"`key` of {self.module!r} must be a string or an integer, not {self.key!r}")
        if self.pool is not None and (isinstance(self.pool, bool) or not isinstance(self.pool, int) or self.pool < 1):
            raise UsageError(f"`pool` of {self.module!r} must be an integer of at least 1, not {self.pool!r}")

    def config(self) -> dict[str, Any]:
        """Its fields that are set, as JSON."""
        return {name: value for name, value in dataclasses.asdict(self).items() if value is not None}

    def take(self, output: Any) -> Tensor:
        """A copy of the captured part of a module's output.

        Raises:
            UsageError: it is not a floating-point tensor.
            ShapeError: its shape can't be pooled.
        """
        taken = output
        if self.key is not None:
            try:
                taken = output[self.key]
            except (KeyError, IndexError, TypeError):
                raise UsageError(
                    f"module {self.module!r} returns {described(output)}, which has no {self.key!r}"
                ) from None
        if not isinstance(taken, Tensor) or not taken.is_floating_point():
            raise UsageError(
                f"module {self.module!r} returns {described(taken)}; expected a floating-point tensor. Select a part "
                "of it with `key`, or name a submodule"
            )
        if self.pool is None:
            # A copy: the next module may modify its input in place, as ReLU(inplace=True) does.
            return taken.clone()
        if taken.ndim != 4:
            raise ShapeError(
                f"module {self.module!r} returns {tuple(taken.shape)}; only (B, C, H, W) can be pooled: remove `pool`"
            )
        return F.adaptive_avg_pool2d(taken, self.pool)


def tap_from_config(config: str | Mapping[str, Any]) -> Tap:
    """A tap from a module's path, or from a mapping of its fields.

    Raises:
        UsageError: unknown field or invalid value.
    """
    return configured("the output", Tap, {"module": config} if isinstance(config, str) else config)


class Capture(nn.Module):
    """A model that also returns outputs of its modules: forward -> (logits, {name: tensor}).

    Args:
        net: the model; hooks capture nothing when it is called directly.
        taps: by name; a tap named `logits` replaces the model's output.

    Raises:
        UsageError: the model has no such module; suggests the nearest ones.
    """

    def __init__(self, net: nn.Module, taps: Mapping[str, Tap]) -> None:
        super().__init__()
        self.net = net
        self.taps = dict(taps)
        self._captured: dict[str, Tensor] | None = None
        for tap in self.taps.values():
            module_at(net, tap.module)

    def hook(self) -> list[RemovableHandle]:
        """Register the hooks, after any replacement of modules; returns handles that remove them."""
        return [
            module_at(self.net, tap.module).register_forward_hook(self._hook(name, tap))
            for name, tap in self.taps.items()
        ]

    def forward(self, *inputs: Any, **options: Any) -> tuple[Any, dict[str, Tensor]]:
        self._captured = {}
        try:
            logits = self.net(*inputs, **options)
            taken = self._captured
        finally:
            self._captured = None
        for name, tap in self.taps.items():
            if name not in taken:
                raise UsageError(f"module {tap.module!r} was not called in the forward pass; name one that is")
        return taken.pop(LOGITS, logits), taken

    def _hook(self, name: str, tap: Tap) -> Callable[[nn.Module, Any, Any], None]:
        # A function, which deep copies of the model share: a copy is never called while this one captures.
        def take(module: nn.Module, inputs: Any, output: Any) -> None:
            if self._captured is None:
                return
            if name in self._captured:
                raise UsageError(
                    f"module {tap.module!r} is called more than once per batch, so its output is ambiguous; name a "
                    "module that is called once"
                )
            self._captured[name] = tap.take(output)

        return take


def module_at(net: nn.Module, path: str) -> nn.Module:
    """A module by its path.

    Raises:
        UsageError: the model has no such module; suggests the nearest ones.
    """
    known = [name for name, _ in net.named_modules() if name]
    if path in known:
        return net.get_submodule(path)
    near = difflib.get_close_matches(path, known, n=3, cutoff=0.4) or known[:8]
    raise UsageError(
        f"{type(net).__name__} has no module {path!r}; "
        + (f"nearest: {', '.join(near)}" if near else "it has no submodules")
    )


def captured_shapes(net: nn.Module, taps: Mapping[str, Tap], inputs: Any) -> dict[str, tuple[int, ...]]:
    """The shape of each tapped output for one sample, from a forward pass in evaluation mode.

    Args:
        net: on the device of the inputs; not changed.
        taps: by name.
        inputs: a batch of two samples, so that the batch dimension can be recognized.

    Raises:
        UsageError: a module does not exist, is not called, or returns no tensor.
        ShapeError: the first dimension of an output is not the batch, or the model can't process the input.
    """
    capture = Capture(net, taps)
    was_training = net.training
    net.eval()
    handles = capture.hook()
    try:
        with torch.inference_mode():
            logits, taken = call_model(capture, inputs, like=net)
    except LogitCacheError:
        raise
    except Exception as error:
        raise ShapeError(
            f"the model can't process {input_described(net, inputs)}: {error}; check its `input` transforms and `args`"
        ) from error
    finally:
        net.train(was_training)
        for handle in handles:
            handle.remove()
    if LOGITS in taps:
        taken = {LOGITS: logits, **taken}
    for name, values in taken.items():
        if values.ndim < 2 or len(values) != 2:
            raise ShapeError(
                f"module {taps[name].module!r} returns {tuple(values.shape)} for two samples; expected (2, ...), one "
                "row per sample"
            )
    return {name: tuple(values.shape[1:]) for name, values in taken.items()}
