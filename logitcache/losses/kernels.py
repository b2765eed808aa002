"""Losses between student logits and targets, with their gradients, for a few rows at a time and without autograd.

Sparse targets are never expanded: the student's logits give a log-sum-exp, a sum and a few gathered values. Dense and
factored targets are decoded for a few rows at a time.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from logitcache.losses.schedules import check_used_temperature
from logitcache.targets import SparseTargets, Targets, row_slices

# B rows of a chunk, N rows, C classes, K entries

Kind = Literal["kl", "soft_cross_entropy", "js"]
Result = tuple[Tensor, Tensor | None]
"""Losses (B,) and their gradient (B, C), or None if it is not needed."""
Step = Callable[[Tensor, slice, bool, bool], Result]
"""(a chunk of the student's logits (B, C); its rows of the targets; whether the gradient is needed; whether the logits
may be overwritten) -> the losses, and their gradient with respect to the logits."""


class Entries(NamedTuple):
    """Sparse targets at temperature T, as the steps use them: row n has probabilities `extra` + `each` · `shape`."""

    ids: Tensor
    """int64 (N, K); 0 for unused entries."""
    extra: Tensor
    """(N, K): what an entry's probability has beyond a class of the tail; 0 for unused entries."""
    log_p: Tensor
    """(N, K): the entries' log-probabilities."""
    unused: Tensor
    """bool (N, K)."""
    each: Tensor
    """(N,): the probability of each class of the tail, or its factor of `shape`."""
    log_each: Tensor
    """(N,)."""
    negative_entropy: Tensor
    """(N,), in nats."""


def step_for(kind: Kind, targets: Targets, temperature: float, dtype: torch.dtype, *, compiled: bool = False) -> Step:
    """The step of a loss on targets at temperature T, times T².

    Args:
        dtype: float32 or float64, in which it computes.
        compiled: use `torch.compile`; for sparse targets only.

    Raises:
        UsageError: the temperature is not positive.
    """
    check_used_temperature(temperature)
    compute: Callable[..., Result]
    if isinstance(targets, SparseTargets):
        entries, log_shape_C = _entries(targets.softened(temperature), dtype)
        shape_C = None if log_shape_C is None else log_shape_C.exp()
        # Without a tail, a pass over all logits is saved; on a GPU, the check would wait for it.
        has_tail = targets.device.type != "cpu" or bool((entries.each > 0).any())
        compute = (_compiled if compiled else functools.partial)(_sparse, kind=kind, has_tail=has_tail)

        def step(logits_BC: Tensor, rows: slice, gradient: bool, overwrite: bool) -> Result:
            of_rows = Entries(*(values[rows] for values in entries))
            # Compiled, nothing is saved by overwriting: division and softmax are one kernel.
            overwrite = overwrite and not compiled
            return compute(logits_BC, of_rows, shape_C, log_shape_C, temperature, dtype, gradient, overwrite)

        return step

    def dense_step(logits_BC: Tensor, rows: slice, gradient: bool, overwrite: bool) -> Result:
        teacher_BC = targets[rows].dense().to(dtype) / temperature
        logits_BC = _divided(logits_BC, temperature, dtype, overwrite)
        return _scaled(*_dense(logits_BC, teacher_BC, kind, gradient), temperature)

    return dense_step


def label_step(labels_N: Tensor, weight: float, dtype: torch.dtype, *, compiled: bool = False) -> Step:
    """The step of the cross-entropy to labels, int64 (N,), times a weight; 0 for negative labels."""
    compute = _compiled(_of_labels) if compiled else _of_labels

    def step(logits_BC: Tensor, rows: slice, gradient: bool, overwrite: bool) -> Result:
        return compute(logits_BC, labels_N[rows], weight, dtype, gradient)

    return step


@functools.cache
def _compiled(function: Callable[..., Result], **fixed: Any) -> Callable[..., Result]:
    return torch.compile(functools.partial(function, **fixed) if fixed else function)


def _of_labels(logits_BC: Tensor, labels_B: Tensor, weight: float, dtype: torch.dtype, gradient: bool) -> Result:
    log_q_BC = logits_BC.to(dtype).log_softmax(dim=1)
    weight_B1 = (labels_B >= 0).to(dtype).mul(weight)[:, None]
    labels_B1 = labels_B.clamp_min(0)[:, None]
    loss_B = -(log_q_BC.gather(1, labels_B1) * weight_B1)[:, 0]
    if not gradient:
        return loss_B, None
    return loss_B, log_q_BC.exp_().mul_(weight_B1).scatter_add_(1, labels_B1, -weight_B1)


def _divided(logits_BC: Tensor, temperature: float, dtype: torch.dtype, overwrite: bool) -> Tensor:
    """Logits divided by T; a copy only if it is needed."""
    wide_BC = logits_BC.to(dtype)
    if temperature == 1.0:
        return wide_BC
    return wide_BC.div_(temperature) if overwrite or logits_BC.dtype != dtype else wide_BC / temperature


def _scaled(loss_B: Tensor, gradient_BC: Tensor | None, temperature: float) -> Result:
    """A loss times T², and its gradient with respect to the logits before they are divided by T."""
    if temperature == 1.0:
        return loss_B, gradient_BC
    return loss_B * temperature**2, None if gradient_BC is None else gradient_BC.mul_(temperature)


def _sparse(
    logits_BC: Tensor,
    entries: Entries,
    shape_C: Tensor | None,
    log_shape_C: Tensor | None,
    temperature: float,
    dtype: torch.dtype,
    gradient: bool,
    overwrite: bool,
    *,
    kind: Kind,
    has_tail: bool,
) -> Result:
    log_q_BC = _divided(logits_BC, temperature, dtype, overwrite).log_softmax(dim=1)
    if kind == "js":
        result = _sparse_jensen_shannon(log_q_BC, entries, shape_C, log_shape_C, has_tail, gradient)
    else:
        result = _sparse_cross_entropy(log_q_BC, entries, shape_C, has_tail, kind == "kl", gradient)
    return _scaled(*result, temperature)


def _entries(targets: SparseTargets, dtype: torch.dtype) -> tuple[Entries, Tensor | None]:
    """The entries of softened targets, and the tail's shape in log space, (C,)."""
    unused_NK = targets.ids < 0
    ids_NK = targets.ids.clamp_min(0)
    log_each_N, p_NK = targets.log_each(), targets.log_probs.exp()
    shape_C = targets.tail_shape
    part_NK = torch.ones_like(p_NK) if shape_C is None else shape_C.exp()[ids_NK]
    extra_NK = (p_NK - log_each_N.exp()[:, None] * part_NK).masked_fill_(unused_NK, 0.0)
    # The sum of p log p, of the entries and of the tail.
    negative_entropy_N = _times_log(p_NK, targets.log_probs).sum(dim=1) + _times_log(targets.tail.exp(), log_each_N)
    if shape_C is not None:
        of_shape_C = _times_log(shape_C.exp(), shape_C)
        others_N = of_shape_C.sum() - of_shape_C[ids_NK].masked_fill(unused_NK, 0.0).sum(dim=1)
        negative_entropy_N = negative_entropy_N + log_each_N.exp() * others_N
    values = (extra_NK, targets.log_probs, unused_NK, log_each_N.exp(), log_each_N, negative_entropy_N)
    cast = (each if each.dtype == torch.bool else each.to(dtype) for each in values)
    return Entries(ids_NK, *cast), None if shape_C is None else shape_C.to(dtype)


def _times_log(p: Tensor, log_p: Tensor) -> Tensor:
    """p log p; 0 where p is 0."""
    return torch.where(p == 0, 0.0, p * log_p)


def _expected(values_BC: Tensor, entries: Entries, shape_C: Tensor | None, has_tail: bool) -> Tensor:
    """The mean of some values of the classes under the targets, (B,)."""
    of_entries_BK = values_BC.gather(1, entries.ids) * entries.extra
    # A class of probability 0 adds nothing, even where the student's value is infinite.
    expected_B = torch.where(entries.extra == 0, 0.0, of_entries_BK).sum(dim=1)
    if not has_tail:
        return expected_B
    total_B = values_BC.sum(dim=1) if shape_C is None else values_BC @ shape_C
    return expected_B + torch.where(entries.each == 0, 0.0, entries.each * total_B)


def _sparse_cross_entropy(
    log_q_BC: Tensor, entries: Entries, shape_C: Tensor | None, has_tail: bool, divergence: bool, gradient: bool
) -> Result:
    """The cross-entropy to sparse targets, or the KL divergence; overwrites the student's log-probabilities."""
    loss_B = -_expected(log_q_BC, entries, shape_C, has_tail)
    if divergence:
        loss_B = loss_B + entries.negative_entropy
    if not gradient:
        return loss_B, None
    gradient_BC = log_q_BC.exp_()
    if has_tail and shape_C is None:
        gradient_BC.sub_(entries.each[:, None])
    elif has_tail and shape_C is not None:
        gradient_BC.addr_(entries.each, shape_C, alpha=-1)
    return loss_B, gradient_BC.scatter_add_(1, entries.ids, -entries.extra)


def _sparse_jensen_shannon(
    log_q_BC: Tensor,
    entries: Entries,
    shape_C: Tensor | None,
    log_shape_C: Tensor | None,
    has_tail: bool,
    gradient: bool,
) -> Result:
    """The Jensen-Shannon divergence to sparse targets; overwrites the student's log-probabilities."""
    log_tail_B1 = entries.log_each[:, None]
    log_m_BC = torch.logaddexp(log_q_BC, log_tail_B1 if log_shape_C is None else log_tail_B1 + log_shape_C)
    # So far every class counts as one of the tail.
    log_m_BK = torch.logaddexp(log_q_BC.gather(1, entries.ids), entries.log_p)
    change_BK = (log_m_BK - log_m_BC.gather(1, entries.ids)).masked_fill(entries.unused, 0.0)
    log_m_BC = log_m_BC.scatter_add_(1, entries.ids, change_BK).sub_(math.log(2.0))
    of_teacher_B = entries.negative_entropy - _expected(log_m_BC, entries, shape_C, has_tail)
    return _jensen_shannon(log_q_BC, log_m_BC, of_teacher_B, gradient)


def _jensen_shannon(log_q_BC: Tensor, log_m_BC: Tensor, of_teacher_B: Tensor, gradient: bool) -> Result:
    """Half the divergences of student and teacher from their mean m; overwrites its first two arguments."""
    ratio_BC = log_m_BC.neg_().add_(log_q_BC)
    q_BC = log_q_BC.exp_()
    of_student_B = torch.linalg.vecdot(q_BC, ratio_BC)
    loss_B = 0.5 * (of_student_B + of_teacher_B)
    return loss_B, ratio_BC.sub_(of_student_B[:, None]).mul_(q_BC).mul_(0.5) if gradient else None


def _dense(logits_BC: Tensor, teacher_BC: Tensor, kind: Kind, gradient: bool) -> Result:
    """Any loss between logits that are divided by T."""
    log_q_BC = logits_BC.log_softmax(dim=1)
    if kind == "js":
        log_p_BC = teacher_BC.log_softmax(dim=1)
        log_m_BC = torch.logaddexp(log_q_BC, log_p_BC).sub_(math.log(2.0))
        # With probabilities, not log_target: a masked class has log-probability -inf, and 0 * -inf is NaN.
        of_teacher_B = F.kl_div(log_m_BC, log_p_BC.exp(), reduction="none").sum(dim=1)
        return _jensen_shannon(log_q_BC, log_m_BC, of_teacher_B, gradient)
    p_BC = teacher_BC.softmax(dim=1)
    loss_BC = F.kl_div(log_q_BC, p_BC, reduction="none") if kind == "kl" else -p_BC * log_q_BC
    loss_B = loss_BC.sum(dim=1)
    return loss_B, log_q_BC.exp_().sub_(p_BC) if gradient else None


class _OnTargets(torch.autograd.Function):
    """A loss of (N, C) student logits on targets, (N,); computed a few rows at a time."""

    @staticmethod
    def forward(student_NC: Tensor, step: Step) -> Tensor:
        loss_N = student_NC.new_empty(len(student_NC), dtype=wide_dtype(student_NC.dtype))
        for rows in row_slices(len(student_NC), student_NC.shape[1], student_NC.device):
            loss_N[rows] = step(student_NC[rows], rows, False, False)[0]
        return loss_N

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Step], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0])
        ctx.step = inputs[1]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream_N: Tensor) -> tuple[Tensor, None]:
        (student_NC,) = ctx.saved_tensors
        gradient_NC = torch.empty_like(student_NC)
        for rows in row_slices(len(student_NC), student_NC.shape[1], student_NC.device):
            gradient_NC[rows] = ctx.step(student_NC[rows], rows, True, False)[1].mul_(upstream_N[rows, None])
        return gradient_NC, None


def on_targets(kind: Kind, student_NC: Tensor, targets: Targets, temperature: float) -> Tensor:
    """A loss of student logits on targets, times T², in nats, (N,): float64 if the logits are float64, else float32."""
    step = step_for(kind, targets, temperature, wide_dtype(student_NC.dtype))
    loss_N: Tensor = _OnTargets.apply(student_NC, step)
    return loss_N


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type in which a loss of logits of this type is computed."""
    return torch.float64 if dtype == torch.float64 else torch.float32
