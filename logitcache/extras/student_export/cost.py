"""The cost of a model: multiply-accumulates, and the time of a forward pass."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from logitcache.devices import one_thread

LATENCY_PASSES = 200
LATENCY_SECONDS = 2.0
"""Per engine. After this time no further pass starts, if there were more than ten."""
WARM_UP = 5
"""Passes that are not counted."""


def count_macs(model: nn.Module, input_1: Tensor) -> int:
    """Multiply-accumulates of one sample: half of what torch's `FlopCounterMode` counts.

    Includes matrix products, convolutions and attention; excludes biases, norms, activations, pooling and other
    elementwise operations.
    """
    from torch.utils.flop_counter import FlopCounterMode

    # With gradients: without them torch may fuse a transformer block into one operator that the counter doesn't know.
    with torch.enable_grad(), FlopCounterMode(display=False) as counter:
        model(input_1)
    return int(counter.get_total_flops()) // 2


def median_seconds(passes: Mapping[str, Callable[[], Any]]) -> dict[str, float]:
    """Median seconds of each forward pass on one CPU thread, after a warm-up.

    The passes alternate, so that other load on the machine affects all of them equally. This limits torch to one
    thread; other engines must be configured by the caller.
    """
    seconds: dict[str, list[float]] = {name: [] for name in passes}
    end = time.perf_counter() + LATENCY_SECONDS * len(passes)
    with one_thread(), torch.inference_mode():
        for number in range(WARM_UP + LATENCY_PASSES):
            for name, forward in passes.items():
                before = time.perf_counter()
                forward()
                seconds[name].append(time.perf_counter() - before)
            if number >= 2 * WARM_UP and time.perf_counter() > end:
                break
    return {name: statistics.median(values[WARM_UP:]) for name, values in seconds.items()}


def processor() -> str:
    """The model name of the CPU; not the name of the machine."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
