"""A student's results over its seeds, as a row of the results table."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Row:
    """A student's results over its seeds."""

    name: str
    accuracy_mean: float | None
    """On the test split; None without one."""
    accuracy_sd: float | None
    """Standard deviation between seeds; None for a single seed."""
    epoch_seconds: float | None
    """Median over epochs and seeds, without evaluation."""
    validation_accuracy_mean: float | None
    samples: int
    parameters: int
    seeds: list[int]
    nll_mean: float | None = None
    """Of sequences: negative log-likelihood of the true classes on the test split, in nats per row."""
    nll_sd: float | None = None
    """Standard deviation between seeds; None for a single seed."""


def summarise(name: str, results: Sequence[dict[str, Any]]) -> Row:
    """A row of the table, from the result of each seed."""
    accuracies = [result["accuracy"] for result in results if result["accuracy"] is not None]
    validation = [result["validation_accuracy"] for result in results if result["validation_accuracy"] is not None]
    nlls = [result["nll"] for result in results if result.get("nll") is not None]
    seconds = [result["epoch_seconds"] for result in results if result["epoch_seconds"] is not None]
    return Row(
        name=name,
        accuracy_mean=statistics.fmean(accuracies) if accuracies else None,
        accuracy_sd=statistics.stdev(accuracies) if len(accuracies) > 1 else None,
        epoch_seconds=statistics.median(seconds) if seconds else None,
        validation_accuracy_mean=statistics.fmean(validation) if validation else None,
        samples=results[0]["samples"],
        parameters=results[0]["parameters"],
        seeds=[result["seed"] for result in results],
        nll_mean=statistics.fmean(nlls) if nlls else None,
        nll_sd=statistics.stdev(nlls) if len(nlls) > 1 else None,
    )
