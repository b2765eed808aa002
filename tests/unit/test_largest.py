"""The largest logits of many classes, and what `TopK` computes from them in one pass."""

import math

import pytest
import torch
from torch import Tensor

from logitcache import TopK
from logitcache.cache.fidelity import fidelity_kl
from logitcache.encodings.largest import GROUP, MANY_CLASSES, largest

# B rows, C classes, K largest

MANY = MANY_CLASSES + GROUP // 2
"""The last classes are no whole group."""


def rows(scale: float = 1.0, classes: int = MANY) -> Tensor:
    return scale * torch.randn(5, classes, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("classes", [40, MANY_CLASSES, MANY])
@pytest.mark.parametrize("k", [1, 5, 39])
def test_the_largest_are_those_of_topk(classes: int, k: int) -> None:
    logits = rows(classes=classes)
    logits[1, -k:] += 100
    logits[2, :k] += 100
    expected, found = logits.topk(k, dim=1), largest(logits, k)

    assert torch.equal(expected.values, found[0])
    assert torch.equal(expected.indices, found[1])


def test_equal_logits_have_different_classes() -> None:
    values, classes = largest(torch.zeros(2, MANY), 64)

    assert torch.equal(torch.zeros(2, 64), values)
    assert [64, 64] == [len(set(row)) for row in classes.tolist()]


@pytest.mark.parametrize("dtype", ["float16", "float32", "uint8"])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 10.0])
def test_divergence_and_tail_are_those_of_the_decoded_rows(dtype: str, scale: float) -> None:
    encoding, logits = TopK(k=20, dtype=dtype), rows(scale)
    encoded, kl = encoding.encode_with_kl(logits)
    ids = encoded["ids"].long()
    tail = (logits - logits.amax(dim=1, keepdim=True)).double().scatter(1, ids, -math.inf).logsumexp(dim=1)

    assert kl is not None
    expected = fidelity_kl(encoding.decode(encoded, MANY).double(), logits.double()).float()
    torch.testing.assert_close(kl, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(encoded["tail"].double(), tail, rtol=1e-3, atol=1e-5)
    assert all(torch.equal(values, encoding.encode(logits)[name]) for name, values in encoded.items())


def test_a_tail_of_almost_no_mass_and_masked_classes_are_exact() -> None:
    logits = torch.full((4, MANY), -300.0)
    logits[:, :20] = torch.arange(20.0)
    logits[1, 20:] = -math.inf
    logits[2, 15:] = -math.inf
    logits[3, 20:30] = -1.0
    logits[3, 30:] = -math.inf
    encoded, kl = TopK(k=20, dtype="float32").encode_with_kl(logits)
    rest = math.log(MANY - 20)

    assert kl is not None
    assert encoded["tail"].tolist() == pytest.approx([-319 + rest, -math.inf, -math.inf, -20 + math.log(10)])
    assert [0, 0, 0] == pytest.approx(kl[:3].tolist(), abs=1e-6)
    assert bool(kl[3].isnan())  # the row is decoded instead
