"""Losses of a linear head and its inputs, a few rows at a time: the (rows, C) logits never exist as a whole.

A language model's logits, their gradient and the teacher's distributions each have (positions, vocabulary) values: far
more than all else in a training step. Here each chunk of rows goes through the head, the loss and both gradients before
the next one starts. The idea is that of Wijmans et al. 2024, "Cut Your Losses in Large-Vocabulary Language Models",
arXiv:2411.09009, and of Hsu et al. 2024, "Liger Kernel", arXiv:2410.10989.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, ParamSpec

import torch
from torch import Tensor

from logitcache.errors import ShapeError, UsageError
from logitcache.losses.hard import IGNORED
from logitcache.losses.kernels import Result, Step, label_step, step_for, wide_dtype
from logitcache.losses.protocol import Reduction, Term, counting_rows, reduced
from logitcache.targets import DenseTargets, Targets, row_slices

# N rows, B rows of a chunk, D hidden size, C classes

Arguments = ParamSpec("Arguments")


def linear_kl_divergence(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor | Targets,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    labels: Tensor | None = None,
    label_weight: float = 1.0,
    mask: Tensor | None = None,
    chunk_rows: int | None = None,
    compiled: bool | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """KL(teacher ‖ student) through the student's head, times T², in nats: a scalar, or (N,) with reduction "none".

    It equals `kl_divergence(hidden @ weight.T + bias, targets, ...)`, plus `label_weight` times the cross-entropy to
    the labels, if there are any. Memory does not grow with N × C: the logits and their gradient exist for a few rows at
    a time, and sparse targets are not expanded. For "mean" and "sum", the gradients are computed in the forward pass;
    for "none", the backward pass computes the logits again. The gradient of the weight is accumulated in float32.

    Args:
        hidden: (N, D), the inputs of the head. Select the positions that have a target before: `hidden[index >= 0]`.
        weight: (C, D), and
        bias: (C,), of the head: `head.weight`, `head.bias`.
        targets: `view.targets(index)`, or the teacher's logits (N, C).
        labels: int (N,), such as the next tokens; -100 for none.
        mask: bool (N,), true for the rows that count; the others have loss 0 and no gradient, and "mean" is over those
            that count.
        chunk_rows: rows of a chunk; None for 64 MiB of float32 logits on a CPU, and 256 MiB on a GPU.
        compiled: compile the computation of a chunk with `torch.compile`; None for: on CUDA.
        reduction: "mean" or "sum" over the rows that count returns a scalar; "none" returns (N,).

    Raises:
        ShapeError: shapes that do not agree.
        UsageError: `chunk_rows` below 1, a temperature that is not positive, or a label on a CPU that is neither a
            class nor -100.
    """
    _check_shapes(hidden, weight, bias, labels)
    targets = DenseTargets(targets) if isinstance(targets, Tensor) else targets
    _check_targets(hidden, weight, targets)
    rows = None if mask is None else counting_rows(mask, len(hidden)).to(hidden.device)
    _check_labels(labels, mask, len(weight))
    if rows is not None:
        targets, labels = targets[rows], None if labels is None else labels[rows]
    dtype, compiled = wide_dtype(_compute_dtype(hidden, weight)), _compiles(compiled, hidden.device)
    steps = [] if labels is None else [label_step(labels.long(), label_weight, dtype, compiled=compiled)]
    steps.append(step_for("kl", targets, temperature, dtype, compiled=compiled))
    return _linear_loss(hidden, weight, bias, steps, rows, chunk_rows, reduction)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    chunk_rows: int | None = None,
    compiled: bool | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """Cross-entropy to labels through the student's head, in nats: a scalar, or (N,) with reduction "none".

    It equals `cross_entropy(hidden @ weight.T + bias, labels, ...)`, computed like `linear_kl_divergence`.

    Args:
        hidden, weight, bias, mask, chunk_rows, compiled, reduction: as for `linear_kl_divergence`.
        labels: int (N,); a row with -100 does not count.

    Raises:
        ShapeError: shapes that do not agree.
        UsageError: `chunk_rows` below 1, or a label on a CPU that is neither a class nor -100.
    """
    _check_shapes(hidden, weight, bias, labels)
    counts_N = labels != IGNORED
    if mask is not None:
        counting_rows(mask, len(hidden))
        counts_N = counts_N & mask.to(labels.device)
    _check_labels(labels, mask, len(weight))
    rows = counting_rows(counts_N, len(hidden)).to(hidden.device)
    dtype = wide_dtype(_compute_dtype(hidden, weight))
    step = label_step(labels[rows].long(), 1.0, dtype, compiled=_compiles(compiled, hidden.device))
    return _linear_loss(hidden, weight, bias, [step], rows, chunk_rows, reduction)


def linear_terms(
    hidden: Tensor,
    weight: Tensor,
    terms: Sequence[Term],
    *,
    targets: Tensor | Targets | None = None,
    labels: Tensor | None = None,
    bias: Tensor | None = None,
    factors: Tensor | None = None,
    chunk_rows: int | None = None,
) -> Tensor:
    """The sum over all rows of a loss's terms, through the student's head, in nats: a scalar.

    It equals `loss(hidden @ weight.T + bias, targets, labels).sum()`, computed like `linear_kl_divergence`.

    Args:
        hidden, weight, bias, chunk_rows: as for `linear_kl_divergence`.
        terms: of the loss: `loss.at(progress).terms()`.
        targets: the teacher's, for the terms that need them.
        labels: int (N,), the true classes, for the cross-entropy; -100 for none.
        factors: (N,), multiplied with the loss of each row; None for 1.

    Raises:
        ShapeError: shapes that do not agree.
        UsageError: a term's targets or labels are missing.
    """
    _check_shapes(hidden, weight, bias, labels)
    targets = DenseTargets(targets) if isinstance(targets, Tensor) else targets
    if targets is not None:
        _check_targets(hidden, weight, targets)
    dtype, compiled = wide_dtype(_compute_dtype(hidden, weight)), _compiles(None, hidden.device)
    steps: list[Step] = []
    for term in terms:
        if term.kind == "cross_entropy" and labels is not None:
            step = label_step(labels.long(), term.weight, dtype, compiled=compiled)
        elif term.kind == "cross_entropy" or targets is None:
            missing = "labels" if term.kind == "cross_entropy" else "targets of the teacher"
            raise UsageError(f"the term {term.kind} needs {missing}, and none were given")
        elif term.kind == "teacher_argmax":
            step = label_step(targets.argmax(), term.weight, dtype, compiled=compiled)
        else:
            step = step_for(term.kind, targets, term.temperature, dtype, compiled=compiled)
            step = step if term.weight == 1.0 else _multiplied(step, term.weight)
        steps.append(step if factors is None else _multiplied(step, factors.to(dtype)))
    return _linear_loss(hidden, weight, bias, steps, None, chunk_rows, "sum")


def _multiplied(step: Step, factor: float | Tensor) -> Step:
    """A step whose losses and gradients are multiplied by one number, or by one for each row, (N,)."""

    def multiplied(logits_BC: Tensor, rows: slice, gradient: bool, overwrite: bool) -> Result:
        loss_B, gradient_BC = step(logits_BC, rows, gradient, overwrite)
        factor_B1 = factor[rows, None] if isinstance(factor, Tensor) else factor
        loss_B = loss_B * (factor_B1[:, 0] if isinstance(factor_B1, Tensor) else factor_B1)
        return loss_B, None if gradient_BC is None else gradient_BC.mul_(factor_B1)

    return multiplied


def _check_targets(hidden: Tensor, weight: Tensor, targets: Targets) -> None:
    """Raise ShapeError unless the targets are (N, C)."""
    if targets.shape != (len(hidden), len(weight)):
        raise ShapeError(
            f"the head gives logits of {(len(hidden), len(weight))}, the teacher's are {targets.shape}; expected the "
            "same rows and the same classes"
        )


def _check_shapes(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor | None) -> None:
    """Raise ShapeError unless the arguments have shapes (N, D), (C, D), (C,) and (N,)."""
    shapes = [tuple(values.shape) for values in (hidden, weight)]
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ShapeError(f"hidden and weight are {shapes[0]} and {shapes[1]}; expected (N, D) and (C, D)")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ShapeError(f"the bias is {tuple(bias.shape)}; expected ({len(weight)},), one value for each class")
    if labels is not None and labels.shape != hidden.shape[:1]:
        raise ShapeError(f"labels are {tuple(labels.shape)}; expected ({len(hidden)},), one for each row")


def _check_labels(labels: Tensor | None, mask: Tensor | None, num_classes: int) -> None:
    """Raise UsageError unless each label on a CPU is a class or -100; on other devices, a check would wait for them."""
    if labels is None or labels.device.type != "cpu":
        return
    wrong = ((labels < 0) & (labels != IGNORED)) | (labels >= num_classes)
    if mask is not None:
        wrong &= mask.cpu()
    if wrong.any():
        row = int(wrong.nonzero()[0])
        raise UsageError(
            f"row {row} has the label {labels[row].item()}; expected 0 to {num_classes - 1}, or {IGNORED} for a row "
            "without a label"
        )


def _compute_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """The type of the matrix products: that of autocast, if it is enabled."""
    device = hidden.device.type
    if weight.dtype != torch.float64 and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return torch.promote_types(hidden.dtype, weight.dtype)


def _compiles(compiled: bool | None, device: torch.device) -> bool:
    if compiled is None:
        return device.type == "cuda" and importlib.util.find_spec("triton") is not None
    return compiled


def _not_compiled(function: Callable[Arguments, Tensor]) -> Callable[Arguments, Tensor]:
    """`torch.compiler.disable`, but the compiler is imported only by code that compiles: it takes as long as torch."""

    @functools.wraps(function)
    def call(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Tensor:
        called = function
        if torch.compiler.is_compiling():
            called = torch.compiler.disable(function)  # type: ignore[no-untyped-call]
        return called(*args, **kwargs)

    return call


@_not_compiled
def _linear_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    steps: Sequence[Step],
    rows: Tensor | None,
    chunk_rows: int | None,
    reduction: Reduction,
) -> Tensor:
    """The sum of the steps' losses over the given rows."""
    if chunk_rows is not None and chunk_rows < 1:
        raise UsageError(f"chunk_rows is at least 1, not {chunk_rows}")
    hidden_ND = hidden if rows is None else hidden[rows]
    head = _Head(steps, _compute_dtype(hidden, weight), chunk_rows)
    # Within a Function's forward pass gradients are always off.
    at_once = reduction != "none" and torch.is_grad_enabled()
    loss: Tensor = _LinearLoss.apply(hidden_ND, weight, bias, head, reduction != "none", at_once)
    if reduction == "mean":
        return loss / max(1, len(hidden_ND))
    if reduction == "none" and rows is not None:
        return loss.new_zeros(len(hidden)).index_copy(0, rows, loss)
    return reduced(loss, reduction)


class _Gradients(NamedTuple):
    """Of hidden states, weight and bias; None where not needed. Those of the head are float32 or float64."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


class _Head(NamedTuple):
    """What is computed of each chunk of rows."""

    steps: Sequence[Step]
    dtype: torch.dtype
    chunk_rows: int | None

    def losses(
        self,
        hidden_ND: Tensor,
        weight_CD: Tensor,
        bias_C: Tensor | None,
        needed: Sequence[bool],
        upstream_N: Tensor | None,
    ) -> tuple[Tensor, _Gradients]:
        """The losses (N,), and the needed gradients of their sum, weighted by `upstream_N` if it is given."""
        num_rows, num_classes, wide = len(hidden_ND), len(weight_CD), wide_dtype(self.dtype)
        of_hidden, of_weight, of_bias = needed
        gradients = _Gradients(
            torch.empty_like(hidden_ND) if of_hidden else None,
            torch.zeros_like(weight_CD, dtype=wide) if of_weight else None,
            torch.zeros(num_classes, dtype=wide, device=weight_CD.device) if of_bias else None,
        )
        loss_N = torch.zeros(num_rows, dtype=wide, device=hidden_ND.device)
        cast_CD = weight_CD.to(self.dtype)
        for rows in row_slices(num_rows, num_classes, hidden_ND.device, self.chunk_rows):
            hidden_BD = hidden_ND[rows].to(self.dtype)
            logits_BC = hidden_BD @ cast_CD.T
            if bias_C is not None:
                logits_BC += bias_C
            gradient_BC = None
            for step in self.steps:
                loss_B, of_step_BC = step(logits_BC, rows, any(needed), step is self.steps[-1])
                loss_N[rows] += loss_B
                gradient_BC = of_step_BC if gradient_BC is None or of_step_BC is None else gradient_BC.add_(of_step_BC)
            del logits_BC
            if gradient_BC is None:
                continue
            if upstream_N is not None:
                gradient_BC.mul_(upstream_N[rows, None])
            if gradients.bias is not None:
                gradients.bias.add_(gradient_BC.sum(dim=0))
            gradient_BC = gradient_BC.to(self.dtype)
            if gradients.hidden is not None:
                gradients.hidden[rows] = gradient_BC @ cast_CD
            if gradients.weight is not None and self.dtype == wide:
                gradients.weight.addmm_(gradient_BC.T, hidden_BD)
            elif gradients.weight is not None:
                gradients.weight.add_(gradient_BC.T @ hidden_BD)
        return loss_N, gradients


class _LinearLoss(torch.autograd.Function):
    """Losses (N,), or their sum, with which the gradients can be computed at once."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_CD: Tensor,
        bias_C: Tensor | None,
        head: _Head,
        summed: bool,
        at_once: bool,
    ) -> Tensor:
        needed = ctx.needs_input_grad[:3] if at_once else (False, False, False)
        with torch.autocast(hidden_ND.device.type, enabled=False):
            loss_N, gradients = head.losses(hidden_ND, weight_CD, bias_C, needed, None)
        ctx.save_for_backward(hidden_ND, weight_CD, bias_C)
        ctx.head, ctx.summed, ctx.gradients = head, summed, gradients if at_once else None
        return loss_N.sum() if summed else loss_N

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        inputs = ctx.saved_tensors
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:  # losses of rows, or a second pass through the same graph
            upstream_N = None if ctx.summed else upstream
            with torch.autocast(inputs[0].device.type, enabled=False):
                gradients = ctx.head.losses(*inputs, ctx.needs_input_grad[:3], upstream_N)[1]
        if ctx.summed:
            for gradient in gradients:
                if gradient is not None:
                    gradient.mul_(upstream)  # in place: memory is scarcest now
        as_given = (
            gradient if gradient is None else gradient.to(like.dtype)
            for gradient, like in zip(gradients, inputs, strict=True)
        )
        return (*as_given, None, None, None)
