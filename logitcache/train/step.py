"""The loss of one batch: the student's loss on labels, its hint losses, sample weights and penalties."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from logitcache.cache.manifest import LOGITS
from logitcache.catalog.calling import call_model, logits_of
from logitcache.catalog.language_models import without_head
from logitcache.data.index import split_index
from logitcache.data.rows import RowMap
from logitcache.data.sequences import BatchRows, batch_rows, samples_of_sequences, sequence_rows
from logitcache.devices import autocast, to_device
from logitcache.losses import Loss
from logitcache.losses.linear import linear_terms
from logitcache.losses.protocol import teacher_for
from logitcache.train.job import Job

# B batch, C classes


def losses(job: Job, net: nn.Module, progress: float, index: Tensor, inputs: Any, targets: Any) -> Tensor:
    """The loss of each sample of a batch, (B,), including the model's own penalty, if it adds one.

    The loss of a sequence is the sum over its rows.

    Args:
        job: the run's settings, labels and loss.
        net: the job's model as it is trained: compiled, in parallel, with hooks for hints.
        progress: the fraction of training that is done, 0 to 1, for schedules.
        index: view and row of each sample, int (B,), from `ViewDataset`.
        inputs: the student's, or (the student's, the teacher's) where the labels need both.
        targets: the true labels, int (B,), or float (B, C) where samples were mixed; of sequences (B, rows), padded.
    """
    inputs, teacher_inputs, targets = _on_device(job, inputs, targets)
    loss = job.loss.at(progress)
    rows = sequence_rows(job.views)
    if rows is not None:
        loss_B, penalty = _losses_of_sequences(job, net, loss, rows, index, inputs, teacher_inputs, targets)
        return _weighted(job, loss_B, penalty, samples_of_sequences(index, rows))
    from_teacher = _from_teacher(job, progress, index, teacher_inputs, targets, logits=loss.needs_teacher)
    student_BC, features, penalty = _forward(job, net, inputs)
    loss_B = loss(student_BC, from_teacher.get(LOGITS) if loss.needs_teacher else None, targets)
    if job.hints is not None:
        loss_B = loss_B + job.hints.losses(features, from_teacher, progress)
    return _weighted(job, loss_B, penalty, split_index(index)[1])


def chunked_loss(
    job: Job, net: nn.Module, progress: float, counted: int, index: Tensor, inputs: Any, targets: Any
) -> Tensor:
    """The sum of what `losses` returns, with the head and the loss computed by chunks of rows.

    Args:
        job: with `train.chunked_head`; `Job` has checked that loss and model allow it.
        counted: samples that count, the first ones of the batch.
        net, progress, index, inputs, targets: as for `losses`.
    """
    inputs, teacher_inputs, targets = _on_device(job, inputs, targets)
    terms = job.loss.at(progress).terms()
    with without_head(job.model) as head:
        hidden, _, penalty = _forward(job, net, inputs)
    rows = sequence_rows(job.views)
    sample_B: Any = split_index(index)[1]
    at, hidden_RD, targets_R, place_R = index, hidden, targets, torch.arange(len(index))
    if rows is not None:
        of_batch = batch_rows(index, rows, inputs, hidden)
        at, hidden_RD = of_batch.index, of_batch.of_output(hidden)
        targets_R = _targets_of_rows(job.loss, of_batch, targets)
        sample_B, place_R = samples_of_sequences(index, rows), torch.repeat_interleave(of_batch.counts)
    factors_R = None
    if counted < len(index) or job.sample_weights is not None:
        factors_B = (torch.arange(len(index)) < counted).float()
        if job.sample_weights is not None:
            factors_B *= job.sample_weights[sample_B]
        factors_R = factors_B[place_R].to(hidden.device)
    teacher = None
    if any(term.kind != "cross_entropy" for term in terms):
        assert job.labels is not None
        of_teacher = job.labels.targets(at, teacher_inputs, targets_R)
        teacher = of_teacher.of_first_classes(head.out_features)  # see StudentConfig.vocab_size
    chunk_rows = job.config.chunked_head
    with autocast(job.device, job.config.precision):
        loss = linear_terms(
            hidden_RD,
            head.weight,
            terms,
            targets=teacher,
            labels=targets_R,
            bias=head.bias,
            factors=factors_R,
            chunk_rows=None if isinstance(chunk_rows, bool) else chunk_rows,
        )
    return loss if penalty is None else loss + penalty.expand(len(index))[:counted].sum()


def _on_device(job: Job, inputs: Any, targets: Any) -> tuple[Any, Any, Any]:
    """The student's input and the targets on the device, with the teacher's input between them."""
    if job.views.on_device:
        inputs = job.views.finish(to_device(inputs, job.device))
    teacher_inputs = inputs
    if job.labels is not None and job.labels.needs_teacher_inputs:
        inputs, teacher_inputs = inputs
    inputs = to_device(inputs, job.device, channels_last=job.config.channels_last)
    return inputs, teacher_inputs, to_device(targets, job.device)


def _weighted(job: Job, loss_B: Tensor, penalty: Tensor | None, samples_B: Any) -> Tensor:
    if job.sample_weights is not None:
        loss_B = loss_B * job.sample_weights[samples_B].to(loss_B.device)
    return loss_B if penalty is None else loss_B + penalty


def _losses_of_sequences(
    job: Job, net: nn.Module, loss: Loss, rows: RowMap, index: Tensor, inputs: Any, teacher_inputs: Any, targets: Any
) -> tuple[Tensor, Tensor | None]:
    """The sum of the losses of each sequence's rows, (B,), and the model's penalty."""
    student, _, penalty = _forward(job, net, inputs)
    of_batch = batch_rows(index, rows, inputs, student)
    targets_R = _targets_of_rows(loss, of_batch, targets)
    student_RC = of_batch.of_output(student)
    teacher = None
    if loss.needs_teacher:
        assert job.labels is not None
        of_teacher = job.labels.targets(of_batch.index, teacher_inputs, targets_R)
        teacher = teacher_for(loss, of_teacher.of_first_classes(student_RC.shape[1]))  # see StudentConfig.vocab_size
    loss_R = loss(student_RC, teacher, targets_R)
    return of_batch.summed(loss_R), penalty


def _targets_of_rows(loss: Loss, of_batch: BatchRows, targets: Tensor) -> Tensor:
    """The true class of each row, int64 (R,); the targets as they are, where they are none of rows and not used."""
    return of_batch.of_targets(targets) if loss.needs_target or targets.ndim == 2 else targets


def _from_teacher(
    job: Job, progress: float, index: Tensor, teacher_inputs: Any, targets: Tensor, *, logits: bool
) -> dict[str, Tensor]:
    """The teacher's outputs for the batch that are used now, by name."""
    needed = {LOGITS} if logits else set()
    if job.hints is not None:
        needed |= job.hints.needed_at(progress)
    if job.labels is None or not needed:
        return {}
    return job.labels.outputs(sorted(needed), index, teacher_inputs, targets)


def _forward(job: Job, net: nn.Module, inputs: Any) -> tuple[Tensor, dict[str, Tensor], Tensor | None]:
    """The student's logits, (B, C) or (B, L, C), its features by hint number, and its penalty, if any."""
    adds_penalty = getattr(job.model, "adds_penalty", False)
    with autocast(job.device, job.config.precision):
        options = {"with_penalty": True} if adds_penalty else {}
        output = call_model(net, inputs, like=job.model, **options)
    features: dict[str, Tensor] = {}
    if job.hints is not None:
        output, features = output
    output, penalty = output if adds_penalty else (output, None)
    return logits_of(output), features, penalty
