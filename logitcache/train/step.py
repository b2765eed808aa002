"""What one batch costs: the student's loss for each of its samples, by whatever it learns from."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from logitcache.cache.manifest import LOGITS
from logitcache.catalog.calling import call_model, logits_of
from logitcache.data.index import split_index
from logitcache.devices import autocast, to_device
from logitcache.train.job import Job
from logitcache.train.labels import OutputLabels

# B batch, C classes


def losses(job: Job, net: nn.Module, progress: float, index: Tensor, inputs: Any, targets: Any) -> Tensor:
    """The loss of each sample of a batch, (B,), with the penalty that the net itself adds, if it does.

    Args:
        job: whose.
        net: its model as it is trained: compiled, in parallel, with what its hints take beside the logits.
        progress: the share of training that is done, 0 to 1, which schedules go by.
        index: of each sample, int (B,): its view and its row in the cache, as `ViewDataset` gives it.
        inputs: as the labels need them: the student's, or (the student's, the teacher's).
        targets: the true labels, int (B,), or float (B, C) where samples were mixed.
    """
    teacher_inputs = inputs
    if job.labels is not None and job.labels.needs_teacher_inputs:
        inputs, teacher_inputs = inputs
    inputs = to_device(inputs, job.device, channels_last=job.config.channels_last)
    targets = to_device(targets, job.device)
    loss = job.loss.at(progress)
    from_teacher = _from_teacher(job, progress, index, teacher_inputs, targets, logits=loss.needs_teacher)
    student_BC, features, penalty = _forward(job, net, inputs)
    loss_B = loss(student_BC, from_teacher.get(LOGITS) if loss.needs_teacher else None, targets)
    if job.hints is not None:
        loss_B = loss_B + job.hints.losses(features, from_teacher, progress)
    if job.sample_weights is not None:
        loss_B = loss_B * job.sample_weights[split_index(index)[1]].to(loss_B.device)
    return loss_B if penalty is None else loss_B + penalty


def _from_teacher(
    job: Job, progress: float, index: Tensor, teacher_inputs: Any, targets: Tensor, *, logits: bool
) -> dict[str, Tensor]:
    """What the teacher said of the batch that is needed now, by the name of the output."""
    needed = {LOGITS} if logits else set()
    if job.hints is not None:
        assert isinstance(job.labels, OutputLabels)
        needed |= job.hints.needed_at(progress)
        return job.labels.outputs(sorted(needed), index, teacher_inputs, targets) if needed else {}
    if job.labels is None or not needed:
        return {}
    return {LOGITS: job.labels.logits(index, teacher_inputs, targets)}


def _forward(job: Job, net: nn.Module, inputs: Any) -> tuple[Tensor, dict[str, Tensor], Tensor | None]:
    """The student's logits (B, C), what its hints take by the hint's number, and the penalty that it adds, if any."""
    adds_penalty = getattr(job.model, "adds_penalty", False)
    with autocast(job.device, job.config.precision):
        options = {"with_penalty": True} if adds_penalty else {}
        given = call_model(net, inputs, like=job.model, **options)
    features: dict[str, Tensor] = {}
    if job.hints is not None:
        given, features = given
    output, penalty = given if adds_penalty else (given, None)
    return logits_of(output), features, penalty
