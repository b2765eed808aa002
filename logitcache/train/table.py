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
    perplexity_mean: float | None = None
    """Of sequences: exp of the negative log-likelihood, mean over seeds."""
    bits_per_byte_mean: float | None = None
    """Of text: bits per byte of the test split."""
    teacher_kl_mean: float | None = None
    """KL(teacher ‖ student) on the test split at T = 1, in nats per row; None if the teacher was not compared."""
    teacher_kl_sd: float | None = None
    """Standard deviation between seeds; None for a single seed."""
    teacher_agreement_mean: float | None = None
    """Share of rows for which student and teacher have the same most probable class."""
    teacher_agreement_sd: float | None = None
    """Standard deviation between seeds; None for a single seed."""


def summarise(name: str, results: Sequence[dict[str, Any]]) -> Row:
    """A row of the table, from the result of each seed."""

    def of_seeds(key: str) -> list[float]:
        return [result[key] for result in results if result.get(key) is not None]

    accuracies, nlls, seconds = of_seeds("accuracy"), of_seeds("nll"), of_seeds("epoch_seconds")
    kls, agreements = of_seeds("teacher_kl"), of_seeds("teacher_agreement")
    return Row(
        name=name,
        accuracy_mean=_mean(accuracies),
        accuracy_sd=_deviation(accuracies),
        epoch_seconds=statistics.median(seconds) if seconds else None,
        validation_accuracy_mean=_mean(of_seeds("validation_accuracy")),
        samples=results[0]["samples"],
        parameters=results[0]["parameters"],
        seeds=[result["seed"] for result in results],
        nll_mean=_mean(nlls),
        nll_sd=_deviation(nlls),
        perplexity_mean=_mean(of_seeds("perplexity")),
        bits_per_byte_mean=_mean(of_seeds("bits_per_byte")),
        teacher_kl_mean=_mean(kls),
        teacher_kl_sd=_deviation(kls),
        teacher_agreement_mean=_mean(agreements),
        teacher_agreement_sd=_deviation(agreements),
    )


def _mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None


def _deviation(values: Sequence[float]) -> float | None:
    """The standard deviation between seeds; None for a single seed."""
    return statistics.stdev(values) if len(values) > 1 else None
