"""Where tensors live and in what precision nets compute."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from logitcache.errors import UsageError

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Of glibc's malloc.h."""


def pick_device(name: str, *, threads: int | None = None) -> torch.device:
    """A device by name; "auto" takes CUDA, then Apple's MPS, then the CPU.

    Args:
        name: such as "auto" or "cuda:1".
        threads: how many CPU threads torch uses from here on; None leaves it as it is.

    Raises:
        UsageError: a device that is not there.
    """
    _keep_freed_buffers()
    if threads is not None:
        torch.set_num_threads(threads)
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", _local_rank())
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device("cuda", _local_rank()) if name == "cuda" else torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"device {name!r} is not available ({str(error).splitlines()[0]}); try device=auto") from None
    return device


def _keep_freed_buffers() -> None:
    """Let glibc keep buffers that torch frees on the CPU, instead of returning each of them to the kernel.

    Every forward pass would otherwise map its activations anew, and the kernel would clear each page: a fifth of the
    CPU time of stage 1 with a small teacher. Up to 128 MB of freed memory stay with the process.
    """
    if sys.platform != "linux":
        return
    with contextlib.suppress(OSError, AttributeError):  # another C library than glibc
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, 2**25)  # the most that glibc takes
        libc.mallopt(M_TRIM_THRESHOLD, 2**27)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Limit torch to one CPU thread.

    Small operations on several threads are slow while worker processes occupy all cores.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def seed_device(device: torch.device, seed: int) -> None:
    """Set an accelerator's own generator; the CPU's is set by `seed_generators`."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)
    elif device.type == "mps":
        torch.mps.manual_seed(seed)


def autocast(device: torch.device, precision: str) -> AbstractContextManager[Any]:
    """Autocast to "bfloat16" or "float16"; nothing for "float32"."""
    if precision == "float32":
        return nullcontext()
    return torch.autocast(device.type, dtype=getattr(torch, precision))


def _local_rank() -> int:
    """Which of this machine's GPUs is this process's, where `torchrun` started several."""
    return int(os.environ.get("LOCAL_RANK", 0))


def to_device(batch: Any, device: torch.device, *, channels_last: bool = False) -> Any:
    """A batch of tensors, or a nest of them, on a device; images in channels-last order where asked."""
    if isinstance(batch, Tensor):
        images = channels_last and batch.ndim == 4
        memory_format = torch.channels_last if images else torch.preserve_format
        return batch.to(device, non_blocking=device.type == "cuda", memory_format=memory_format)
    if isinstance(batch, dict):
        return {name: to_device(part, device, channels_last=channels_last) for name, part in batch.items()}
    if isinstance(batch, tuple | list):
        return type(batch)(to_device(part, device, channels_last=channels_last) for part in batch)
    return batch
