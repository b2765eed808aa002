"""Workers of a DataLoader, forked and started afresh, share what they have seen."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from logitcache.data.samples import DIGEST_BYTES, SeenContents, content_table
from logitcache.data.views import ViewDataset, ViewPlan
from logitcache.errors import SampleMismatch
from tests.models import Pictures


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_workers_of_every_kind_hold_samples_to_their_contents(context: str) -> None:
    views = ViewDataset(Pictures(repaint=7), ViewPlan(contents=content_table(Pictures())))
    order = [index for index in range(40) if index != 7]
    list(DataLoader(views, sampler=order, batch_size=8, num_workers=1, multiprocessing_context=context))
    with pytest.raises(SampleMismatch, match="sample 7"):
        list(DataLoader(views, batch_size=8, num_workers=1, multiprocessing_context=context))

    assert 39 == views._checked.sum(), "workers tell each other what they have checked"


@pytest.mark.parametrize(("context", "passes"), [("fork", 2), ("spawn", 1)])
def test_workers_of_every_kind_share_the_digests(context: str, passes: int) -> None:
    seen = SeenContents(20)
    seen.add(range(2), np.full((2, DIGEST_BYTES), 9, dtype=np.uint8))
    for _ in range(passes):
        assert 20 == len(list(DataLoader(Taking(seen), num_workers=2, multiprocessing_context=context)))
    digests = seen.of(range(20))

    assert digests is not None
    assert [9, 9, *range(2, 20)] == digests[:, 0].tolist()


class Taking(torch.utils.data.Dataset[int]):
    """Takes a digest for each number."""

    def __init__(self, seen: SeenContents) -> None:
        self.seen = seen

    def __len__(self) -> int:
        return 20

    def __getitem__(self, number: int) -> int:
        self.seen.take(number, bytes([number]) * DIGEST_BYTES)
        return number
