"""Combines the labels of several teachers, after checking that they saw the same views."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import combinations
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from logitcache.cache.manifest import LOGITS
from logitcache.cache.reader import LogitCache
from logitcache.encodings import Sampled
from logitcache.errors import IdentityMismatch, UsageError

# B batch, C classes, T teachers


def combination(combine: str, weights: Sequence[float] | None, count: int) -> Callable[[list[Tensor], Tensor], Tensor]:
    """A function that combines the logits (B, C) of each teacher, given the true labels, to logits (B, C).

    Args:
        combine: "logits" or "probabilities" for a weighted mean; "best" for the best teacher of each sample.
        weights: one for each teacher; equal if None.
        count: number of teachers.

    Raises:
        UsageError: invalid weights.
    """
    if combine == "best":
        return best_by_label
    shares = normalised_weights(weights, count)
    mean = mean_of_logits if combine == "logits" else mean_of_probabilities
    return lambda logits, targets: mean(logits, shares)


def mean_of_logits(logits: Iterable[Tensor], weights: Sequence[float]) -> Tensor:
    """The weighted mean of float32 (B, C) logits; a class that one teacher masks is masked.

    Its softmax is the normalized geometric mean of the teachers' distributions, at every temperature.
    """
    total_BC: Tensor | None = None
    for logits_BC, weight in zip(logits, weights, strict=True):
        total_BC = logits_BC * weight if total_BC is None else total_BC.add_(logits_BC, alpha=weight)
    assert total_BC is not None
    return total_BC


def mean_of_probabilities(logits: Iterable[Tensor], weights: Sequence[float]) -> Tensor:
    """The logarithm of the weighted mean of the distributions at T = 1, float32 (B, C), computed in log space.

    A class is masked where all teachers mask it.
    """
    total_BC: Tensor | None = None
    for logits_BC, weight in zip(logits, weights, strict=True):
        log_p_BC = logits_BC.log_softmax(dim=1).add_(math.log(weight))
        total_BC = log_p_BC if total_BC is None else torch.logaddexp(total_BC, log_p_BC)
    assert total_BC is not None
    return total_BC


def best_by_label(logits: Sequence[Tensor], targets: Tensor) -> Tensor:
    """For each row the logits of the teacher with the lowest cross-entropy to the true label, float32 (B, C).

    The first teacher wins a tie.

    Args:
        logits: of each teacher, (B, C).
        targets: the true labels, int (B,), or distributions (B, C) where samples are mixed; without a label, a
            negative number, the first teacher is taken.
    """
    stacked_TBC = torch.stack(list(logits)).float()
    targets = targets.to(stacked_TBC.device)
    target_p_BC = targets
    if not targets.is_floating_point():
        target_p_BC = one_hot(targets.long().clamp_min(0), stacked_TBC.shape[2]).float() * (targets >= 0)[:, None]
    log_p_TBC = stacked_TBC.log_softmax(dim=2)
    # A masked class (log p = -inf) counts only where the label includes it.
    cost_TB = -torch.where(target_p_BC > 0, target_p_BC * log_p_TBC, 0.0).sum(dim=2)
    return stacked_TBC[cost_TB.argmin(dim=0), torch.arange(stacked_TBC.shape[1], device=stacked_TBC.device)]


def normalised_weights(weights: Sequence[float] | None, count: int) -> list[float]:
    """Weights that sum to 1.

    Raises:
        UsageError: not one positive number for each cache.
    """
    weights = [1.0] * count if weights is None else list(weights)
    if len(weights) != count:
        raise UsageError(f"{len(weights)} weights for {count} caches; give one for each, in the same order")
    for weight in weights:
        if not (math.isfinite(weight) and weight > 0):
            raise UsageError(
                f"a weight must be a positive number, not {weight}; leave out a cache that should not count"
            )
    shares = [weight / math.fsum(weights) for weight in weights]
    if min(shares) <= 0:
        raise UsageError(f"the weights {weights} are too far apart; leave out a cache that should not count")
    return shares


def check_same_views(first_location: str, first: LogitCache, location: str, source: LogitCache) -> None:
    """Check that two caches are of the same views; teachers, their input transforms and other outputs may differ.

    Raises:
        IdentityMismatch: the views differ; lists the fields.
    """
    ours, theirs = first.manifest.identity, source.manifest.identity
    own: dict[str, Any] = {"teacher": ours.teacher, "precision": ours.precision, "encoding": ours.encoding}
    # Only logits of different teachers can be compared: they share the classes.
    own |= {"output_encodings": ours.output_encodings, "output_sources": ours.output_sources}
    own["format_version"] = ours.format_version
    own["outputs"] = ours.outputs | {LOGITS: theirs.outputs[LOGITS]}
    if isinstance(theirs.transform, dict) and isinstance(ours.transform, dict):
        own["transform"] = theirs.transform | {"teacher_input": teacher_input(first)}
    differences = ours.differences(theirs.model_copy(update=own), mine=f"in {first_location}", theirs=f"in {location}")
    if first.num_samples != source.num_samples:
        differences.append(f"num_samples: {first.num_samples} in {first_location}, {source.num_samples} in {location}")
    if differences:
        raise IdentityMismatch(
            f"{location} is not of the same views as {first_location}; they differ in\n  "
            + "\n  ".join(differences)
            + "\nLabels can only be combined for the same views of the same samples: rebuild one of the caches with "
            "the data and views of the other. Nothing was written."
        )


def check_same_pixels(locations: Sequence[str], sources: Sequence[LogitCache], num_views: int) -> None:
    """Compare the input digests of teachers that have the same input transform.

    Raises:
        IdentityMismatch: they differ; names the view and the sample.
    """
    pairs = combinations(zip(locations, sources, strict=True), 2)
    alike = [(one, other) for one, other in pairs if teacher_input(one[1]) == teacher_input(other[1])]
    for view in range(num_views):
        for (location, source), (other_location, other) in alike:
            expected, found = source.input_digests(view), other.input_digests(view)
            for row in sorted(expected.keys() & found.keys()):
                if expected[row] != found[row]:
                    key = source.samples.key(row) if source.samples is not None else str(row)
                    raise IdentityMismatch(
                        f"the teachers of {location} and {other_location} had different inputs in view {view}, row "
                        f"{row} ({key}): the digests are {expected[row]} and {found[row]}.\n"
                        "Data, transform and seed agree, so the machines rendered the view differently: build both "
                        "caches with the same library versions. Nothing was written."
                    )


def refuse_sampled(locations: Sequence[str], sources: Sequence[LogitCache]) -> None:
    """Refuse caches with a `Sampled` encoding, which have no useful mean of logits.

    Raises:
        UsageError: a cache has this encoding.
    """
    for location, source in zip(locations, sources, strict=True):
        if isinstance(source.encoding, Sampled):
            raise UsageError(
                f"{location} has the encoding {source.encoding!r}: a row has only the classes that were drawn, and the "
                "mean of logits would keep only classes drawn for every teacher; use the mean of probabilities"
            )


def teacher_input(cache: LogitCache) -> Any:
    """The teacher's own input transform, as the identity describes it."""
    transform = cache.manifest.identity.transform
    return transform.get("teacher_input") if isinstance(transform, dict) else transform
