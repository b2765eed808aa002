"""Labels of several teachers over the same views: what makes the views the same, and how labels become one."""

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
    """A function of (logits (B, C) of each teacher, true labels) that gives one teacher's worth of logits (B, C).

    Args:
        combine: "logits" or "probabilities", a weighted mean of either; "best", each sample's best teacher.
        weights: for each teacher; all alike if None.
        count: how many teachers.

    Raises:
        UsageError: weights that are none.
    """
    if combine == "best":
        return best_by_label
    shares = normalised_weights(weights, count)
    mean = mean_of_logits if combine == "logits" else mean_of_probabilities
    return lambda logits, targets: mean(logits, shares)


def mean_of_logits(logits: Iterable[Tensor], weights: Sequence[float]) -> Tensor:
    """The weighted mean of float32 (B, C) logits; a class that one of them masks is masked.

    Its softmax is the normalised geometric mean of the distributions, at every temperature: to soften the mean is to
    take the mean of the softened.
    """
    total_BC: Tensor | None = None
    for logits_BC, weight in zip(logits, weights, strict=True):
        total_BC = logits_BC * weight if total_BC is None else total_BC.add_(logits_BC, alpha=weight)
    assert total_BC is not None
    return total_BC


def mean_of_probabilities(logits: Iterable[Tensor], weights: Sequence[float]) -> Tensor:
    """The logarithm of the weighted mean of the distributions at T = 1, float32 (B, C), in log space throughout.

    A class is masked where all of them mask it.
    """
    total_BC: Tensor | None = None
    for logits_BC, weight in zip(logits, weights, strict=True):
        log_p_BC = logits_BC.log_softmax(dim=1).add_(math.log(weight))
        total_BC = log_p_BC if total_BC is None else torch.logaddexp(total_BC, log_p_BC)
    assert total_BC is not None
    return total_BC


def best_by_label(logits: Sequence[Tensor], targets: Tensor) -> Tensor:
    """For each row the logits of the teacher that gives the true label the most, float32 (B, C).

    Which is the one of the least cross-entropy to it; the first of those that are equal.

    Args:
        logits: of each teacher, (B, C).
        targets: the true labels, int (B,), or as distributions (B, C) where samples were mixed.
    """
    stacked_TBC = torch.stack(list(logits)).float()
    targets = targets.to(stacked_TBC.device)
    target_p_BC = targets if targets.is_floating_point() else one_hot(targets.long(), stacked_TBC.shape[2]).float()
    log_p_TBC = stacked_TBC.log_softmax(dim=2)
    # A masked class (log p = -inf) that the label does not have costs nothing; one that it has, everything.
    cost_TB = -torch.where(target_p_BC > 0, target_p_BC * log_p_TBC, 0.0).sum(dim=2)
    return stacked_TBC[cost_TB.argmin(dim=0), torch.arange(stacked_TBC.shape[1], device=stacked_TBC.device)]


def normalised_weights(weights: Sequence[float] | None, count: int) -> list[float]:
    """Weights that sum to 1.

    Raises:
        UsageError: not one positive number for each.
    """
    weights = [1.0] * count if weights is None else list(weights)
    if len(weights) != count:
        raise UsageError(f"{len(weights)} weights for {count} caches; give one for each, in their order")
    for weight in weights:
        if not (math.isfinite(weight) and weight > 0):
            raise UsageError(f"a weight is a positive number, not {weight}; leave out a cache that is not to count")
    shares = [weight / math.fsum(weights) for weight in weights]
    if min(shares) <= 0:
        raise UsageError(f"the weights {weights} are too far apart; leave out a cache that is not to count")
    return shares


def check_same_views(first_location: str, first: LogitCache, location: str, source: LogitCache) -> None:
    """Hold a cache to the views of another, whoever its teacher is, its own input part, and what it has beside logits.

    Raises:
        IdentityMismatch: names the fields that differ.
    """
    ours, theirs = first.manifest.identity, source.manifest.identity
    own: dict[str, Any] = {"teacher": ours.teacher, "precision": ours.precision, "encoding": ours.encoding}
    # Features of two nets have nothing in common that could be averaged or compared; their logits have the classes.
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
            + "\nOnly teachers that saw the same views of the same samples have a mean: build one of the caches again, "
            "with the other's data and views. Nothing was written."
        )


def check_same_pixels(locations: Sequence[str], sources: Sequence[LogitCache], num_views: int) -> None:
    """Where two teachers take the same input, the digests of what they were given must agree.

    Raises:
        IdentityMismatch: names the view and the sample.
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
                        f"the teachers of {location} and {other_location} were given other pixels in view {view}, row "
                        f"{row} ({key}): the digest is {expected[row]} in the one, {found[row]} in the other.\n"
                        "Data, transform and seed agree, so one of the machines rendered otherwise: build both caches "
                        "with the same library versions. Nothing was written."
                    )


def refuse_sampled(locations: Sequence[str], sources: Sequence[LogitCache]) -> None:
    """Caches that have no useful mean of logits.

    Raises:
        UsageError: one that holds drawn classes only.
    """
    for location, source in zip(locations, sources, strict=True):
        if isinstance(source.encoding, Sampled):
            raise UsageError(
                f"{location} holds {source.encoding!r}: each row has only the classes that were drawn, and the mean of "
                "logits would keep only those that every teacher drew; take the mean of probabilities"
            )


def teacher_input(cache: LogitCache) -> Any:
    """The teacher's own deterministic part of the transform, as the identity has it."""
    transform = cache.manifest.identity.transform
    return transform.get("teacher_input") if isinstance(transform, dict) else transform
