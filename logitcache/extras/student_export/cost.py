"""What a net costs: multiply-accumulates, and seconds of a forward pass."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

LATENCY_PASSES = 200
LATENCY_SECONDS = 2.0
"""Of each engine, after which no further pass is made, if there were five."""
WARM_UP = 5


def count_macs(model: nn.Module, input_1: Tensor) -> int:
    """Multiply-accumulates of one sample: half the operations that torch's `FlopCounterMode` counts.

    Matrix products, convolutions and attention; neither biases, norms, activations, pooling nor other elementwise
    work.
    """
    from torch.utils.flop_counter import FlopCounterMode

    # With gradients, since without them torch may fuse a whole transformer block into one operator, which has no count.
    with torch.enable_grad(), FlopCounterMode(display=False) as counter:
        model(input_1)
    return int(counter.get_total_flops()) // 2


def median_seconds(passes: Mapping[str, Callable[[], Any]]) -> dict[str, float]:
    """Seconds of each of some forward passes on one CPU thread: medians, after some to warm up.

    They are run by turns, so that whatever else this machine does meanwhile meets all of them alike. Torch is held to
    one thread here; another engine must have been told so.
    """
    seconds: dict[str, list[float]] = {name: [] for name in passes}
    limit = LATENCY_SECONDS * len(passes)
    with _one_thread(), torch.inference_mode():
        start = time.perf_counter()
        for _ in range(WARM_UP):
            for forward in passes.values():
                forward()
            if time.perf_counter() - start > limit:
                break
        start = time.perf_counter()
        for number in range(LATENCY_PASSES):
            for name, forward in passes.items():
                before = time.perf_counter()
                forward()
                seconds[name].append(time.perf_counter() - before)
            if number >= 4 and time.perf_counter() - start > limit:
                break
    return {name: statistics.median(values) for name, values in seconds.items()}


def processor() -> str:
    """What the CPU calls itself; not the machine's name."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


@contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
