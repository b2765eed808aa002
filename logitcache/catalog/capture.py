"""What the modules of a net give on the way to its logits: taken by forward hooks, module by module."""

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
from logitcache.registry import unknown_name

# B batch, C channels, H height, W width


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tap:
    """A module of a net, and what is taken of its output."""

    module: str
    """Its path, as `named_modules` has it: `layer3`, `body.4`, `blocks.11.attn`."""
    key: str | int | None = None
    """Which part, where the module gives a mapping, a list or a tuple."""
    pool: int | None = None
    """Height and width that (B, C, H, W) is brought to, by adaptive average pooling; None leaves it as it is."""

    def __post_init__(self) -> None:
        if not isinstance(self.module, str) or not self.module:
            raise UsageError(f"`module` is the path of a module, such as layer3, not {self.module!r}")
        if isinstance(self.key, bool) or not isinstance(self.key, str | int | None):
            raise UsageError(f"`key` of {self.module!r} is a name or a number, not {self.key!r}")
        if self.pool is not None and (isinstance(self.pool, bool) or not isinstance(self.pool, int) or self.pool < 1):
            raise UsageError(
                f"`pool` of {self.module!r} is a number of rows and columns, at least 1, not {self.pool!r}"
            )

    def config(self) -> dict[str, Any]:
        """Its fields that say something, as JSON."""
        return {name: value for name, value in dataclasses.asdict(self).items() if value is not None}

    def take(self, given: Any) -> Tensor:
        """What is taken of a module's output, a copy.

        Raises:
            UsageError: no tensor of floats.
            ShapeError: nothing that can be pooled.
        """
        taken = given
        if self.key is not None:
            try:
                taken = given[self.key]
            except (KeyError, IndexError, TypeError):
                raise UsageError(
                    f"module {self.module!r} gives {described(given)}, which has no {self.key!r}"
                ) from None
        if not isinstance(taken, Tensor) or not taken.is_floating_point():
            raise UsageError(
                f"module {self.module!r} gives {described(taken)}; expected a tensor of floats. Name a part of it by "
                "`key`, or a module within it"
            )
        if self.pool is None:
            # A copy: the next module may change its input in place, as ReLU(inplace=True) does.
            return taken.clone()
        if taken.ndim != 4:
            raise ShapeError(
                f"module {self.module!r} gives {tuple(taken.shape)}; only (B, C, H, W) can be pooled: leave out `pool`"
            )
        return F.adaptive_avg_pool2d(taken, self.pool)


def tap_from_config(config: str | Mapping[str, Any]) -> Tap:
    """A tap from a module's path, or from a mapping of its fields.

    Raises:
        UsageError: an unknown field, or a value that can't be.
    """
    if isinstance(config, str):
        return Tap(module=config)
    known = [field.name for field in dataclasses.fields(Tap)]
    for field in config:
        if field not in known:
            raise UsageError(unknown_name("key", field, known))
    if "module" not in config:
        raise UsageError("`module` is missing: the path of a module, such as layer3")
    return Tap(**config)


class Capture(nn.Module):
    """A net that gives its logits and, by name, what some of its modules gave: forward -> (logits, {name: tensor}).

    Args:
        net: it is called as it is, and its state is its own; hooks take nothing when it is called by others.
        taps: by name; that of the name `logits` takes the place of what the net gives.

    Raises:
        UsageError: a module that the net does not have; names those nearest.
    """

    def __init__(self, net: nn.Module, taps: Mapping[str, Tap]) -> None:
        super().__init__()
        self.net = net
        self.taps = dict(taps)
        self._taken: dict[str, Tensor] | None = None
        for tap in self.taps.values():
            module_at(net, tap.module)

    def hook(self) -> list[RemovableHandle]:
        """Begin to take, after whatever replaces modules; the handles end it."""
        return [
            module_at(self.net, tap.module).register_forward_hook(self._taking(name, tap))
            for name, tap in self.taps.items()
        ]

    def forward(self, *inputs: Any, **options: Any) -> tuple[Any, dict[str, Tensor]]:
        self._taken = {}
        try:
            logits = self.net(*inputs, **options)
            taken = self._taken
        finally:
            self._taken = None
        for name, tap in self.taps.items():
            if name not in taken:
                raise UsageError(f"module {tap.module!r} was not called on the way to the logits; name one that is")
        return taken.pop(LOGITS, logits), taken

    def _taking(self, name: str, tap: Tap) -> Callable[[nn.Module, Any, Any], None]:
        # A function, which a deep copy of the net shares: the copy is never called while this one takes.
        def take(module: nn.Module, inputs: Any, given: Any) -> None:
            if self._taken is None:
                return
            if name in self._taken:
                raise UsageError(
                    f"module {tap.module!r} is called more than once for one batch, so its output is not one thing; "
                    "name a module that is called once"
                )
            self._taken[name] = tap.take(given)

        return take


def module_at(net: nn.Module, path: str) -> nn.Module:
    """A module by its path.

    Raises:
        UsageError: no such module; names those nearest.
    """
    known = [name for name, _ in net.named_modules() if name]
    if path in known:
        return net.get_submodule(path)
    near = difflib.get_close_matches(path, known, n=3, cutoff=0.4) or known[:8]
    raise UsageError(
        f"{type(net).__name__} has no module {path!r}; "
        + (f"near it are: {', '.join(near)}" if near else "it has no modules within")
    )


def captured_shapes(net: nn.Module, taps: Mapping[str, Tap], inputs: Any) -> dict[str, tuple[int, ...]]:
    """The shape of each tapped output for one sample, from a forward pass in evaluation mode.

    Args:
        net: on the device of the inputs; it is left as it was.
        taps: by name.
        inputs: a batch of two samples, so that rows can be told from values.

    Raises:
        UsageError: a module that is not there, not called, or gives no tensor.
        ShapeError: an output whose first dimension is not the batch, or an input that the net can't take.
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
            f"the net can't take {input_described(net, inputs)}: {error}; look at its `input` transforms and `args`"
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
                f"module {taps[name].module!r} gives {tuple(values.shape)} for two samples; expected (2, ...), a row "
                "for each sample"
            )
    return {name: tuple(values.shape[1:]) for name, values in taken.items()}
