"""What a result states beside its numbers (hardware, versions, commit), how numbers are compared, and where they go."""

from __future__ import annotations

import argparse
import atexit
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
TINY = ["data.name=digits", "teacher.train.epochs=1", "train.epochs=1", "num_workers=0"]
"""Overrides of a pipeline for a tiny run."""
TINY_MNIST5K = [
    *TINY,
    "train.seeds=[0]",
    "students.true-labels-of-a-tenth.train.epochs=1",
    "views.transform=[{RandomAffine: {degrees: 5}}]",
]
"""Of `mnist5k.yaml` and `demo.yaml`: one student has epochs of its own, and crops to 28 pixels don't fit the digits."""


def options(description: str, *, writes: str | None = "benchmarks/results/") -> argparse.ArgumentParser:
    """The options of every script: `--tiny`, and `--write` where the script has results to keep."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--tiny", action="store_true", help="run at the smallest size, to see that the script works: no measurement"
    )
    if writes is not None:
        parser.add_argument("--write", action="store_true", help=f"write the result to {writes}")
    return parser


def parse(parser: argparse.ArgumentParser, **tiny: Any) -> argparse.Namespace:
    """The arguments of the command line; `tiny` are the defaults of a tiny run."""
    if "--tiny" in sys.argv:
        parser.set_defaults(**tiny)
    arguments = parser.parse_intermixed_args()
    if arguments.tiny and getattr(arguments, "write", False):
        parser.error("a tiny run measures nothing: leave out --write")
    return arguments


def fresh_folder() -> Path:
    """A folder that is removed when the script ends."""
    folder = tempfile.TemporaryDirectory(prefix="logitcache-benchmark-")
    atexit.register(folder.cleanup)
    return Path(folder.name)


def byte_tokenizer(folder: Path) -> Path:
    """A tokenizer with one token per byte, for tiny runs; returns the path of its file."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    path = folder / "tokenizer.json"
    tokenizer.save(str(path))
    return path


def num_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def hardware() -> str:
    """CPU model, cores and memory, and the GPUs where there are any."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    model = names[0] if names else platform.processor() or platform.machine()
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    gpus = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    return f"{model}, {num_cores()} cores, {memory:.0f} GiB, " + (", ".join(gpus) if gpus else "no GPU")


def versions() -> str:
    """Of Python and of the libraries that the numbers depend on."""
    packages = ("torch", "torchvision", "zarr", "numpy", "logitcache")
    return ", ".join([f"python {platform.python_version()}", *(f"{name} {version(name)}" for name in packages)])


@cache
def commit() -> str:
    """The commit at hand when this is first asked, 7 digits, `+dirty` where tracked files differ; or `unknown`."""
    command = ["git", "describe", "--always", "--dirty=+dirty", "--abbrev=7", "--exclude=*"]
    try:
        described = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return described


def conditions() -> str:
    """Everything that a result depends on besides the code, as Markdown; take it before the first measurement."""
    lines = {
        "hardware": hardware(),
        "load before": f"{os.getloadavg()[0]:.2f} (mean over a minute)",
        "versions": versions(),
        "commit": commit(),
        "command": f"`{' '.join(['python', *map(_portable, sys.argv)])}`",
    }
    return "\n".join(f"- {name}: {text}" for name, text in lines.items())


def _portable(argument: str) -> str:
    """An argument of the command line; of an absolute path only the name, since it means nothing elsewhere."""
    return Path(argument).name if Path(argument).is_absolute() else argument


@dataclass(frozen=True)
class Comparison:
    """Repeated measurements of one thing against another, taken in pairs."""

    median: float
    reference_median: float
    ratios: list[float]
    """Of each pair."""

    @property
    def ratio(self) -> float:
        """Of the medians."""
        return self.median / self.reference_median

    @property
    def quartiles(self) -> str:
        """Median of the pairs' ratios, and their quartiles."""
        if len(self.ratios) == 1:
            return f"{self.ratios[0]:.3f} (one pair)"
        first, median, third = statistics.quantiles(self.ratios, n=4)
        return f"{median:.3f} (quartiles {first:.3f} to {third:.3f})"

    def __str__(self) -> str:
        return f"{self.ratio:.3f} (pairs: {min(self.ratios):.3f} to {max(self.ratios):.3f})"


def compare(measured: Sequence[float], reference: Sequence[float]) -> Comparison:
    """Compare measurements with those of a reference that ran beside them, pair by pair."""
    ratios = [ours / theirs for ours, theirs in zip(measured, reference, strict=True)]
    return Comparison(statistics.median(measured), statistics.median(reference), ratios)


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def write_result(subject: str, body: str, *, device: torch.device) -> Path:
    """Write a result in Markdown to `result_path`."""
    path = result_path(subject, "md", device=device)
    path.write_text(body, encoding="utf-8")
    return path


def result_path(subject: str, suffix: str, *, device: torch.device) -> Path:
    """`results/YEAR-MONTH-DEVICE-COMMIT-SUBJECT.SUFFIX`, such as `2026-11-cpu2-a1b2c3d-stage1.md`.

    DEVICE is the kind that was computed on, with the number of cores (of GPUs, on a GPU).
    """
    count = torch.cuda.device_count() if device.type == "cuda" else num_cores()
    RESULTS.mkdir(exist_ok=True)
    name = f"{datetime.now():%Y-%m}-{device.type}{count}-{commit().partition('+')[0]}-{subject}.{suffix}"
    return RESULTS / name
