"""One contract for every encoding: subclass, name a configuration, and the suite says whether it is right."""

import math
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from logitcache.encodings import Dense, Encoding, TopK, encoding_from_config
from logitcache.errors import UsageError
from logitcache.losses import kl_divergence


def teacher_like(rows: int, classes: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, classes, generator=generator) * 2 + 4 * F.one_hot(torch.arange(rows) % classes, classes)


class EncodingContract:
    """What every encoding owes."""

    encoding: ClassVar[Encoding]
    largest_kl: ClassVar[float]
    """Mean KL(teacher ‖ decoded) at T = 1 that this configuration may lose on `teacher_like` rows of 100 classes."""

    def roundtrip(self, logits: Tensor) -> Tensor:
        return self.encoding.decode(self.encoding.encode(logits), logits.shape[1])

    def test_arrays_have_the_declared_dtype_and_shape(self) -> None:
        specs = self.encoding.arrays(100)
        encoded = self.encoding.encode(teacher_like(7, 100))

        assert specs.keys() == encoded.keys()
        for name, spec in specs.items():
            assert getattr(torch, spec.dtype) == encoded[name].dtype
            assert (7, *spec.row_shape) == tuple(encoded[name].shape)

    def test_decoding_gives_float32_logits_close_to_the_teacher(self) -> None:
        logits = teacher_like(64, 100)
        decoded = self.roundtrip(logits)

        assert (torch.float32, (64, 100)) == (decoded.dtype, tuple(decoded.shape))
        assert kl_divergence(decoded, logits).mean() <= self.largest_kl

    def test_the_most_probable_class_survives(self) -> None:
        logits = teacher_like(64, 100)

        assert torch.equal(logits.argmax(dim=1), self.roundtrip(logits).argmax(dim=1))

    def test_a_row_does_not_depend_on_its_batch(self) -> None:
        logits = teacher_like(9, 100)
        whole = self.encoding.encode(logits)
        alone = self.encoding.encode(logits[4:5])

        assert all(torch.equal(whole[name][4:5], alone[name]) for name in whole)

    def test_a_constant_per_row_changes_nothing_but_rounding(self) -> None:
        logits = teacher_like(16, 100)

        assert kl_divergence(self.roundtrip(logits + 300.0), self.roundtrip(logits)).max() < 1e-3

    @pytest.mark.parametrize("classes", [22, 300, 70_000])
    def test_any_number_of_classes(self, classes: int) -> None:
        logits = teacher_like(3, classes)

        assert torch.equal(logits.argmax(dim=1), self.roundtrip(logits).argmax(dim=1))

    @pytest.mark.parametrize(
        "row",
        [
            pytest.param([0.0] * 50, id="constant"),
            pytest.param([1e4] + [0.0] * 49, id="one huge logit"),
            pytest.param([3.0, 2.0] + [-math.inf] * 48, id="masked classes"),
            pytest.param([-200.0] * 49 + [-199.0], id="far below zero"),
        ],
    )
    def test_odd_rows_keep_their_distribution(self, row: list[float]) -> None:
        logits = torch.tensor([row])
        decoded = self.roundtrip(logits).softmax(dim=1)

        torch.testing.assert_close(decoded, logits.softmax(dim=1), atol=2e-3, rtol=2e-2)

    def test_its_configuration_survives_json(self) -> None:
        config: dict[str, Any] = self.encoding.config()

        assert self.encoding == encoding_from_config(config) == encoding_from_config(repr(self.encoding))


class TestDenseFloat32(EncodingContract):
    encoding = Dense(dtype="float32")
    largest_kl = 1e-7

    def test_is_exact_to_the_bit(self) -> None:
        logits = teacher_like(8, 100)

        assert torch.equal(logits, self.roundtrip(logits))


class TestDenseFloat16(EncodingContract):
    encoding = Dense(dtype="float16")
    largest_kl = 1e-6


class TestTopK(EncodingContract):
    encoding = TopK(k=20)
    largest_kl = 0.12

    def test_keeps_the_mass_of_the_tail(self) -> None:
        """Renormalised top-k would give the kept classes more than the teacher does."""
        logits = teacher_like(32, 100)
        kept = logits.topk(20, dim=1).indices
        mass = logits.softmax(dim=1).gather(1, kept)

        torch.testing.assert_close(self.roundtrip(logits).softmax(dim=1).gather(1, kept), mass, atol=1e-3, rtol=2e-3)


class TestTopKFloat32(EncodingContract):
    encoding = TopK(k=21, dtype="float32")
    largest_kl = 0.12


@pytest.mark.parametrize(
    ("config", "message"),
    [
        pytest.param("Topk(k=0)", "at least 1", id="k is zero"),
        pytest.param({"name": "topk"}, "k", id="k is missing"),
        pytest.param({"name": "dense", "bits": 8}, "no parameter 'bits'", id="unknown parameter"),
        pytest.param("zip", "unknown encoding 'zip'; expected one of: dense, topk", id="unknown encoding"),
        pytest.param("__import__('os').system('true')", "can't read the encoding", id="code"),
        pytest.param({"name": "dense", "dtype": "int8"}, "'float16' or 'float32'", id="unknown dtype"),
    ],
)
def test_a_wrong_encoding_says_what_is_wrong(config: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message.replace("(", r"\(")):
        encoding_from_config(config)


def test_top_k_of_all_classes_is_refused() -> None:
    with pytest.raises(UsageError, match="use Dense"):
        TopK(k=10).arrays(10)
