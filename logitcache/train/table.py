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

    def of_seeds(key: str) -> tuple[float | None, float | None]:
        return spread([result.get(key) for result in results])

    accuracy, nll, teacher_kl, teacher_agreement = map(of_seeds, ("accuracy", "nll", "teacher_kl", "teacher_agreement"))
    seconds = [result["epoch_seconds"] for result in results if result["epoch_seconds"] is not None]
    return Row(
        name=name,
        accuracy_mean=accuracy[0],
        accuracy_sd=accuracy[1],
        epoch_seconds=statistics.median(seconds) if seconds else None,
        validation_accuracy_mean=of_seeds("validation_accuracy")[0],
        samples=results[0]["samples"],
        parameters=results[0]["parameters"],
        seeds=[result["seed"] for result in results],
        nll_mean=nll[0],
        nll_sd=nll[1],
        perplexity_mean=of_seeds("perplexity")[0],
        bits_per_byte_mean=of_seeds("bits_per_byte")[0],
        teacher_kl_mean=teacher_kl[0],
        teacher_kl_sd=teacher_kl[1],
        teacher_agreement_mean=teacher_agreement[0],
        teacher_agreement_sd=teacher_agreement[1],
    )


def spread(values: Sequence[float | None]) -> tuple[float | None, float | None]:
    """(mean, standard deviation) of the known values; None where there are too few."""
    known = [value for value in values if value is not None]
    return (statistics.fmean(known) if known else None), (statistics.stdev(known) if len(known) > 1 else None)
