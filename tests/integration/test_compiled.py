"""What torch.compile compiles on a CPU."""

from __future__ import annotations

import shutil
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from logitcache.losses import linear_cross_entropy, linear_kl_divergence
from logitcache.targets import SparseTargets
from tests.contract.test_outputs import HEADS, Make, check_that_stage_1_keeps_what_modules_give
from tests.unit.test_linear_losses import CLASSES, LABELS, gradients, head, sparse


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_chunks_give_the_same() -> None:
    inputs = head(torch.float32)[:2]
    shaped = sparse(shaped=True)
    wide = SparseTargets(shaped.ids, shaped.log_probs.float(), shaped.tail.float(), CLASSES, shaped.tail_shape)
    losses: list[Callable[[bool], Tensor]] = [
        lambda compiled: linear_kl_divergence(
            *inputs, wide, temperature=2.0, labels=LABELS, chunk_rows=2, compiled=compiled
        ),
        lambda compiled: linear_cross_entropy(*inputs, LABELS, chunk_rows=2, compiled=compiled),
    ]
    for loss in losses:
        torch.testing.assert_close(gradients(loss(True), inputs), gradients(loss(False), inputs), rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.filterwarnings("ignore:Guards may run slower on Python 3.13.0")
def test_stage_1_keeps_what_the_modules_of_a_compiled_teacher_give(tiny: Make) -> None:
    check_that_stage_1_keeps_what_modules_give(tiny(*HEADS, "teacher.compile=true", "views.count=1"))
