"""A student's results over its seeds, as a row of a table."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Row:
    """One student's results over its seeds: a row of the table."""

    name: str
    accuracy_mean: float | None
    """On the test split; None where there is none."""
    accuracy_sd: float | None
    """Between seeds; None for a single one."""
    epoch_seconds: float | None
    """Median over epochs and seeds, without evaluation."""
    validation_accuracy_mean: float | None
    samples: int
    parameters: int
    seeds: list[int]


def summarise(name: str, results: Sequence[dict[str, Any]]) -> Row:
    """A row of the table, from the results of a student's seeds."""
    accuracies = [result["accuracy"] for result in results if result["accuracy"] is not None]
    validation = [result["validation_accuracy"] for result in results if result["validation_accuracy"] is not None]
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
    )
