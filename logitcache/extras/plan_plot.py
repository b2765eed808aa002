"""A plot of a plan: bytes and KL of each encoding."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from logitcache.cache.fidelity import Fidelity
from logitcache.errors import UsageError
from logitcache.stages.plan import Plan

MARKERS = {"dense": "s", "lowrank": "o", "toplowrank": "D", "topk": "^", "sampled": "x"}


def pareto_front(fidelities: Sequence[Fidelity]) -> list[Fidelity]:
    """The encodings that no other one beats in both bytes and KL at T = 1, smallest first."""
    front: list[Fidelity] = []
    for each in sorted(fidelities, key=lambda each: (each.bytes_per_row, each.kl[1.0])):
        if np.isfinite(each.kl[1.0]) and (not front or each.kl[1.0] < front[-1].kl[1.0]):
            front.append(each)
    return front


def check_plot(path: Path) -> None:
    """Check that a plot can be written, before anything is computed for it.

    Raises:
        UsageError: the suffix is not .png, the folder is missing, or matplotlib is not installed.
    """
    if path.suffix != ".png" or not path.absolute().parent.is_dir():
        raise UsageError(f"--plot expects a .png file in an existing folder, not {path}")
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError("a plot needs matplotlib: pip install 'logitcache[plot]'")


def plot(plan: Plan, path: Path) -> None:
    """Plot KL against bytes, one point per encoding, with the Pareto front.

    Raises:
        UsageError: see `check_plot`.
    """
    check_plot(path)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    shown = [each for each in plan.fidelities if np.isfinite(each.kl[1.0]) and each.kl[1.0] > 0]
    front = [each for each in pareto_front(plan.fidelities) if each in shown]
    axes.plot([each.bytes_per_row for each in front], [each.kl[1.0] for each in front], color="0.7", zorder=1)
    for name, marker in MARKERS.items():
        points = [each for each in shown if each.encoding.name == name]
        if points:
            axes.scatter([p.bytes_per_row for p in points], [p.kl[1.0] for p in points], marker=marker, label=name)
    if plan.recommended in shown:
        place = (plan.recommended.bytes_per_row, plan.recommended.kl[1.0])
        axes.annotate("recommended", place, xytext=(8, 8), textcoords="offset points")
    axes.set(
        xscale="log", yscale="log", xlabel="bytes per row, compressed", ylabel="KL(teacher ‖ decoded) at T = 1, nats"
    )
    axes.grid(which="both", alpha=0.2)
    axes.legend()
    figure.savefig(path, dpi=150)
