"""The contract suite of encodings, for the tests of packages that add one; needs pytest."""

from __future__ import annotations

import math
import re
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from logitcache.cache.fidelity import fidelity_kl
from logitcache.cache.manifest import DTYPES
from logitcache.encodings import Encoding, encoding_from_config


def teacher_like(rows: int, classes: int, seed: int = 0) -> Tensor:
    """Random logits (rows, classes) of a fairly certain teacher."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, classes, generator=generator) * 2 + 4 * F.one_hot(torch.arange(rows) % classes, classes)


class EncodingContract:
    """Tests of an encoding's interface; subclass it once for each configuration to test.

    ```python
    class TestGrid(EncodingContract):
        encoding = Grid(step=0.02)
        largest_kl = 1e-4
    ```
    """

    encoding: ClassVar[Encoding]
    largest_kl: ClassVar[float]
    """Upper bound of the mean KL(teacher ‖ decoded) at T = 1, in nats, on `teacher_like` rows of 100 classes."""
    keeps_every_class: ClassVar[bool] = True
    """Whether decoded probabilities are above 0 wherever the teacher's are; else `largest_kl` is not tested."""
    top1_agreement: ClassVar[float] = 1.0
    """Smallest share of rows whose most probable class survives."""
    odd_rows_atol: ClassVar[float] = 2e-3
    """Absolute tolerance of the probabilities of unusual rows."""
    class_counts: ClassVar[tuple[int, ...]] = (22, 300, 70_000)
    """Numbers of classes to try."""

    def fitted(self, classes: int) -> Encoding:
        """The encoding, fitted to other rows of the same distribution if it needs a fit."""
        if not self.encoding.fitted_arrays:
            return self.encoding
        return self.encoding.fit(teacher_like(min(max(400, 2 * classes), 2000), classes, seed=1))

    def roundtrip(self, logits: Tensor) -> Tensor:
        """Logits after encoding and decoding."""
        encoding = self.fitted(logits.shape[1])
        return encoding.decode(encoding.encode(logits), logits.shape[1])

    def test_arrays_have_the_declared_dtype_and_shape(self) -> None:
        encoding = self.fitted(100)
        specs = encoding.arrays(100)
        encoded = encoding.encode(teacher_like(7, 100))

        assert specs.keys() == encoded.keys()
        for name, spec in specs.items():
            assert re.fullmatch("[a-z]{1,20}", name)
            assert spec.dtype in DTYPES
            assert len(spec.row_shape) <= 1
            assert getattr(torch, spec.dtype) == encoded[name].dtype
            assert (7, *spec.row_shape) == tuple(encoded[name].shape)

    def test_decoding_gives_float32_logits_close_to_the_teacher(self) -> None:
        logits = teacher_like(64, 100)
        decoded = self.roundtrip(logits)

        assert (torch.float32, (64, 100)) == (decoded.dtype, tuple(decoded.shape))
        if self.keeps_every_class:
            assert fidelity_kl(decoded, logits).mean() <= self.largest_kl

    def test_the_most_probable_class_survives(self) -> None:
        logits = teacher_like(64, 100)
        agreeing = logits.argmax(dim=1) == self.roundtrip(logits).argmax(dim=1)

        assert agreeing.float().mean() >= self.top1_agreement

    def test_targets_are_the_decoded_distribution(self) -> None:
        """Losses see the same distribution in either form, and no more rows than were given."""
        logits = teacher_like(9, 100)
        encoding = self.fitted(100)
        encoded = encoding.encode(logits)
        targets, decoded = encoding.targets(encoded, 100), encoding.decode(encoded, 100)

        assert (len(targets), targets.num_classes) == (9, 100)
        torch.testing.assert_close(targets.dense().log_softmax(dim=1), decoded.log_softmax(dim=1))
        assert torch.equal(targets.argmax(), decoded.argmax(dim=1))
        torch.testing.assert_close(targets[2:4].dense(), targets.dense()[2:4])

    def test_a_row_does_not_depend_on_its_batch(self) -> None:
        logits = teacher_like(9, 100)
        encoding = self.fitted(100)
        whole = encoding.encode(logits)
        alone = encoding.encode(logits[4:5], start=4)

        assert all(torch.equal(whole[name][4:5], alone[name]) for name in whole)

    def test_encoding_twice_gives_the_same(self) -> None:
        logits = teacher_like(9, 100)
        first, second = (self.fitted(100).encode(logits, view=3, start=5) for _ in range(2))

        assert all(torch.equal(first[name], second[name]) for name in first)

    def test_a_constant_per_row_changes_nothing_but_rounding(self) -> None:
        logits = teacher_like(16, 100)

        torch.testing.assert_close(
            self.roundtrip(logits + 300.0).softmax(dim=1), self.roundtrip(logits).softmax(dim=1), atol=0.02, rtol=0.02
        )

    def test_any_number_of_classes(self) -> None:
        for classes in self.class_counts:
            logits = teacher_like(3, classes)

            assert torch.equal(logits.argmax(dim=1), self.roundtrip(logits).argmax(dim=1)), classes

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
        if -math.inf in row and not self.encoding.holds_masks:
            return  # the writer refuses such a row
        decoded = self.roundtrip(logits).softmax(dim=1)

        torch.testing.assert_close(decoded, logits.softmax(dim=1), atol=self.odd_rows_atol, rtol=2e-2)

    def test_its_configuration_survives_json(self) -> None:
        config: dict[str, Any] = self.encoding.config()

        assert self.encoding == encoding_from_config(config) == encoding_from_config(repr(self.encoding))

    def test_what_was_fitted_survives_its_arrays(self) -> None:
        fitted = self.fitted(100)
        again = self.encoding.with_fitted(fitted.fitted_values())
        logits = teacher_like(8, 100)

        assert {name: values.ndim for name, values in fitted.fitted_values().items()} == dict(fitted.fitted_arrays)
        assert again.arrays(100) == fitted.arrays(100)
        first, second = fitted.encode(logits), again.encode(logits)
        assert all(torch.equal(first[name], second[name]) for name in first)
