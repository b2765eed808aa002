"""The contract suite over every built-in encoding, and what is particular to each."""

import functools
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from logitcache.cache.fidelity import fidelity_kl
from logitcache.encodings import (
    Components,
    Dense,
    Encoding,
    LowRank,
    PackedTopK,
    Sampled,
    TopK,
    TopLowRank,
    TrellisLowRank,
    Values,
    encoding_from_config,
    lowrank,
)
from logitcache.encodings.basis import principal_components
from logitcache.encodings.headfitted import HeadFittedEncoding
from logitcache.encodings.packing import LARGEST, MixedRadix
from logitcache.encodings.rangecoder import TOTAL, RangeDecoder, range_encoded
from logitcache.errors import InvalidLogits, ShapeError, UsageError
from logitcache.losses import kl_divergence
from logitcache.testing import EncodingContract, teacher_like


class TestDenseFloat32(EncodingContract):
    encoding = Dense(dtype="float32")
    largest_kl = 1e-7

    def test_is_exact_to_the_bit(self) -> None:
        logits = teacher_like(8, 100)

        assert torch.equal(logits, self.roundtrip(logits))


class TestDenseFloat16(EncodingContract):
    encoding = Dense(dtype="float16")
    largest_kl = 1e-6


class TestDenseUint8(EncodingContract):
    encoding = Dense(dtype="uint8")
    largest_kl = 1e-3

    def test_is_at_most_half_a_step_off(self) -> None:
        logits = teacher_like(32, 100)
        step = (logits.amax(dim=1) - logits.amin(dim=1)) / 254
        decoded = self.roundtrip(logits)
        off = logits - logits.amax(dim=1, keepdim=True) - (decoded - decoded.amax(dim=1, keepdim=True))

        assert (off.abs().amax(dim=1) <= 0.501 * step).all()


class TestValuesFloat32(EncodingContract):
    encoding = Values(dtype="float32")
    largest_kl = 1e-7

    def test_is_exact_to_the_bit(self) -> None:
        logits = teacher_like(8, 100)

        assert torch.equal(logits, self.roundtrip(logits))


class TestValuesFloat16(EncodingContract):
    encoding = Values(dtype="float16")
    largest_kl = 1e-6

    def test_a_constant_per_row_changes_nothing_but_rounding(self) -> None:
        """It is kept, and so takes its share of the digits: half a step of 300 in float16 is 1/8."""
        logits = teacher_like(16, 100) + 300.0

        torch.testing.assert_close(self.roundtrip(logits), logits, atol=0.126, rtol=0)


class TestValuesUint8(EncodingContract):
    encoding = Values(dtype="uint8")
    largest_kl = 1e-3


def features(rows: int, seed: int, num_values: int = 60, scale: float = 1.0) -> Tensor:
    """Rows in which a few of many directions vary most, around a mean."""
    draw = torch.Generator().manual_seed(0)
    directions = torch.linalg.qr(torch.randn(num_values, num_values, generator=draw))[0]
    sizes = 0.9 ** torch.arange(num_values)
    mean = torch.randn(num_values, generator=draw)
    return scale * (mean + torch.randn(rows, num_values, generator=draw.manual_seed(seed)) * sizes @ directions)


class TestComponents(EncodingContract):
    encoding = Components(error=0.02)
    largest_kl = 5e-3
    class_counts = (22, 300)

    def test_a_row_does_not_depend_on_its_batch(self) -> None:
        """But for the rounding of matrix products, which the writer's fixed slabs keep from showing."""
        rows = features(9, seed=1)
        encoding = Components(error=0.1).fit(features(500, seed=2))
        whole, alone = (encoding.decode(encoding.encode(part), 60) for part in (rows, rows[4:5]))

        torch.testing.assert_close(whole[4:5], alone, atol=0.2, rtol=0)

    def test_a_constant_per_row_changes_nothing_but_rounding(self) -> None:
        """Not for logits: it is one of the values."""

    @pytest.mark.parametrize(
        "row",
        [
            pytest.param([0.0] * 60, id="zeros"),
            pytest.param([1e4] + [0.0] * 59, id="one huge value"),
            pytest.param([-200.0] * 60, id="far below zero"),
            pytest.param([2.0**59] * 60, id="the largest values"),
        ],
    )
    def test_odd_rows_keep_their_distribution(self, row: list[float]) -> None:
        """As far as features have one: rows unlike those that were fitted to lose more, but not all."""
        fitted_to = features(500, seed=2)
        encoding = Components(error=0.02).fit(fitted_to)
        decoded = encoding.decode(encoding.encode(torch.tensor([row])), 60)

        assert (decoded - torch.tensor([row])).norm() < 0.8 * (torch.tensor(row) - fitted_to.mean(dim=0)).norm()

    @pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
    @pytest.mark.parametrize("error", [0.02, 0.1, 0.3])
    def test_unseen_rows_have_the_wanted_error(self, error: float, scale: float) -> None:
        encoding = Components(error=error).fit(features(2000, seed=1, scale=scale))
        rows = features(500, seed=2, scale=scale)
        off = encoding.decode(encoding.encode(rows), 60) - rows

        assert error == pytest.approx(float(off.norm() / (rows - rows.mean(dim=0)).norm()), rel=0.15)

    def test_a_larger_error_takes_fewer_components_and_bytes(self) -> None:
        rows = features(500, seed=2)
        bits, ranks = [], []
        for error in (0.05, 0.3):
            encoding = Components(error=error).fit(features(2000, seed=1))
            bits.append(sum(entropy(column) for column in encoding.encode(rows)["coefficients"].T))
            ranks.append(len(encoding.fitted_values()["basis"]))

        assert bits[1] < 0.5 * bits[0]
        assert ranks[1] < ranks[0]

    def test_rows_with_more_values_than_there_are_rows_are_fitted(self) -> None:
        few = torch.randn(5, 400, generator=torch.Generator().manual_seed(0))
        rows, unseen = (torch.randn(n, 5, generator=torch.Generator().manual_seed(n)) @ few for n in (100, 20))
        encoding = Components(error=0.1).fit(rows)
        off = encoding.decode(encoding.encode(unseen), 400) - unseen

        assert off.norm() < 0.15 * unseen.norm()

    @pytest.mark.parametrize(
        ("rows", "message"),
        [
            pytest.param(torch.randn(20, 5), "at least 32 calibration rows, not 20", id="few rows"),
            pytest.param(torch.ones(50, 5), "all are equal. Give more and different", id="equal rows"),
            pytest.param(torch.randn(50, 400), "their components leave an error of 0.9", id="noise"),
            pytest.param(torch.full((50, 5), math.nan), "contain NaN", id="NaN"),
        ],
    )
    def test_rows_that_can_not_be_fitted_to_are_refused(self, rows: Tensor, message: str) -> None:
        with pytest.raises(UsageError, match=message):
            Components(error=0.1).fit(rows)

    def test_any_bytes_decode_to_finite_values(self) -> None:
        encoding = Components(error=0.05).fit(features(500, seed=2))
        draw = torch.Generator().manual_seed(0)
        encoded = {
            name: torch.randint(0, 256, (50, *spec.row_shape), generator=draw)
            .to(torch.uint8)
            .view(getattr(torch, spec.dtype))
            for name, spec in encoding.arrays(60).items()
        }

        assert torch.isfinite(encoding.decode(encoded, 60)).all()


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


class TestTopKUint8(EncodingContract):
    encoding = TopK(k=21, dtype="uint8")
    largest_kl = 0.13


class TestPackedTopK(EncodingContract):
    encoding = PackedTopK(k=21)
    largest_kl = 0.13
    odd_rows_atol = 1e-2


class TestPackedTopKWithPrior(EncodingContract):
    encoding = PackedTopK(k=20, prior=True)
    largest_kl = 0.13
    odd_rows_atol = 1e-2
    class_counts = (22, 300, 5000)


class TestPackedTopKWithBudget(EncodingContract):
    encoding = PackedTopK(k=10, most=21, prior=True, step=0.1)
    largest_kl = 0.3
    odd_rows_atol = 1e-2
    class_counts = (22, 300, 5000)

    def test_rows_have_as_many_entries_on_average_as_the_budget_allows(self) -> None:
        rows = teacher_like(2000, 100, seed=2)
        rows[::2] *= 3  # half of the rows are certain, and need few entries
        encoding = PackedTopK(k=10, most=40, prior=True).fit(rows)
        count = encoding.encode(teacher_like(1, 100).expand(3, -1))["count"]
        counts = encoding.encode(rows)["count"].float()

        assert abs(counts.mean() - 10) < 0.1
        assert counts[::2].mean() < 0.5 * counts[1::2].mean()
        assert len(set(count.tolist())) == 1


class TestLowRank(EncodingContract):
    encoding = LowRank(rank=20, k=4, step=0.1)
    largest_kl = 0.5  # these rows are noise in every direction: the worst that a basis can meet
    top1_agreement = 0.85
    odd_rows_atol = 0.02
    class_counts = (22, 300, 5000)

    def test_a_row_does_not_depend_on_its_batch(self) -> None:
        """But for the rounding of matrix products, which the writer's fixed slabs keep from showing."""
        logits = teacher_like(9, 100)
        encoding = self.fitted(100)
        whole, alone = (encoding.decode(encoding.encode(part), 100) for part in (logits, logits[4:5]))

        assert fidelity_kl(alone, whole[4:5]).max() < 1e-3

    def test_integer_products_decode_the_same_values(self, monkeypatch: pytest.MonkeyPatch) -> None:
        logits = teacher_like(64, 300, seed=2)
        encoding = self.fitted(300)
        decoded, dtypes = [], []
        for integers in (False, True):
            monkeypatch.setattr(lowrank, "_multiplies_integers", lambda integers=integers: integers)
            fresh = LowRank(rank=20, k=4, step=0.1).with_fitted(encoding.fitted_values())
            targets = fresh.targets(encoding.encode(logits), 300)
            dtypes.append(targets.coefficients.dtype)
            decoded.append(targets.dense())

        assert [torch.float32, torch.int8] == dtypes
        torch.testing.assert_close(decoded[1], decoded[0], rtol=1e-5, atol=1e-5)

    def test_a_basis_of_an_older_version_is_not_rounded(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(lowrank, "_multiplies_integers", lambda: True)
        fitted = self.fitted(300).fitted_values()
        older = fitted | {"basis": (fitted["basis"].astype(np.float32) * 1.1).astype(np.float16)}
        encoding = LowRank(rank=20, k=4, step=0.1).with_fitted(older)
        logits = teacher_like(64, 300, seed=2)
        encoded = encoding.encode(logits)
        steps = encoding.fitted.radix.unpack(encoded["coefficients"])
        uncorrected = encoding.decode(encoded | {"corrections": torch.zeros_like(encoded["corrections"])}, 300)

        torch.testing.assert_close(
            uncorrected,
            torch.from_numpy(older["mean"]) + steps @ torch.from_numpy(older["basis"].astype(np.float32)),
        )

    def test_more_search_loses_less(self) -> None:
        logits = teacher_like(256, 300, seed=2)
        sample = teacher_like(1000, 300, seed=1)
        lost = []
        for rounds in (0, 2, 6):
            encoding = LowRank(rank=40, k=0, step=0.3, search=rounds).fit(sample)
            lost.append(float(fidelity_kl(encoding.decode(encoding.encode(logits), 300), logits).mean()))

        assert lost[0] > lost[1] > lost[2]

    def test_a_higher_bit_price_saves_entropy(self) -> None:
        """Of the coefficients, in bits a row, over what an entropy coder of order zero would need."""
        logits = teacher_like(512, 300, seed=2)
        sample = teacher_like(1000, 300, seed=1)
        bits = []
        for price in (0.0, 0.01):
            encoding = LowRank(rank=40, k=0, step=0.2, bit_price=price).fit(sample)
            bits.append(sum(entropy(column) for column in encoding.encode(logits)["coefficients"].T))

        assert bits[1] < 0.9 * bits[0]

    def test_the_basis_has_the_components_of_a_singular_value_decomposition(self) -> None:
        sample = teacher_like(300, 40, seed=1)
        mean, basis = principal_components(sample, 5)
        centred = sample - sample.mean(dim=1, keepdim=True)
        vectors = torch.linalg.svd(centred - centred.mean(dim=0))[2][:5]

        torch.testing.assert_close(mean, centred.mean(dim=0), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close((basis @ vectors.T).abs(), torch.eye(5), atol=1e-3, rtol=1e-3)

    def test_many_classes_take_a_randomised_basis_that_explains_as_much(self) -> None:
        generator = torch.Generator().manual_seed(0)
        sample = torch.randn(400, 8, generator=generator) @ torch.randn(8, 5000, generator=generator)
        sample += 0.01 * torch.randn(400, 5000, generator=generator)
        mean, basis = principal_components(sample, 8)
        centred = sample - sample.mean(dim=1, keepdim=True) - mean
        left = centred - (centred @ basis.T) @ basis

        assert left.square().sum() < 1e-3 * centred.square().sum()

    @pytest.mark.parametrize(
        ("encoding", "rows", "message"),
        [
            pytest.param(LowRank(rank=50), 50, "more rows than the rank", id="too few rows"),
            pytest.param(LowRank(rank=100), 200, "needs more than 100 classes", id="rank of all classes"),
            pytest.param(LowRank(rank=5, step=1e-7), 200, "too fine", id="step too fine"),
        ],
    )
    def test_a_fit_that_can_not_be_is_refused(self, encoding: LowRank, rows: int, message: str) -> None:
        with pytest.raises(UsageError, match=message):
            encoding.fit(teacher_like(rows, 100))

    def test_encoding_before_fitting_is_refused(self) -> None:
        with pytest.raises(UsageError, match="not fitted yet"):
            LowRank(rank=5).encode(teacher_like(3, 100))


class HeadFittedContract(EncodingContract):
    """Of encodings that are also fitted to the head of a language model."""

    encoding: HeadFittedEncoding

    def test_a_head_of_another_width_is_refused(self) -> None:
        encoding = replace(self.encoding, rank=5)
        with pytest.raises(ShapeError, match=r"\(100, 7\) and \(50, 8\)"):
            encoding.fit_head(torch.zeros(100, 7), None, torch.zeros(50, 8))
        with pytest.raises(ShapeError, match="one value for each class"):
            encoding.fit_head(torch.zeros(100, 7), torch.zeros(7), torch.zeros(50, 7))

    def test_encoding_before_fitting_is_refused(self) -> None:
        with pytest.raises(UsageError, match="not fitted yet"):
            self.encoding.encode(teacher_like(3, 100))


class TestTopLowRank(HeadFittedContract):
    encoding = TopLowRank(rank=20, k=4, bit_price=1e-4)
    largest_kl = 0.5  # these rows are noise in every direction: the worst that a basis can meet
    odd_rows_atol = 0.02
    class_counts = (22, 300, 1500)

    def test_a_row_does_not_depend_on_its_batch(self) -> None:
        """But for the rounding of matrix products, which the writer's fixed slabs keep from showing."""
        logits = teacher_like(9, 100)
        encoding = self.fitted(100)
        whole, alone = (encoding.decode(encoding.encode(part), 100) for part in (logits, logits[4:5]))

        assert fidelity_kl(alone, whole[4:5]).max() < 1e-3

    def test_the_stored_classes_and_the_tail_keep_their_probabilities(self) -> None:
        """Within half a step: of the values, and of the base that all of them share."""
        logits = teacher_like(64, 100)
        encoding = self.fitted(100)
        log_p = logits.log_softmax(dim=1)
        log_q = encoding.decode(encoding.encode(logits), 100).log_softmax(dim=1)
        kept = logits.topk(4, dim=1).indices
        tail_p, tail_q = ((1 - log.gather(1, kept).exp().sum(dim=1)).log() for log in (log_p, log_q))

        assert (log_p.gather(1, kept) - log_q.gather(1, kept)).abs().max() < 0.09 + 0.13 + 0.05
        assert (tail_p - tail_q).abs().max() < 0.09 + 0.13 + 0.05

    def test_the_divergence_that_it_returns_is_the_measured_one(self) -> None:
        logits = teacher_like(64, 100)
        encoding = self.fitted(100)
        encoded, kl = encoding.encode_with_kl(logits)

        assert kl is not None
        torch.testing.assert_close(kl, fidelity_kl(encoding.decode(encoded, 100), logits), atol=1e-4, rtol=1e-3)

    def test_more_search_loses_less_in_fewer_bits(self) -> None:
        logits, sample = language_like(512, 600, seed=2), language_like(2000, 600, seed=1)
        costs = []
        for rounds in (0, 8):
            encoding = TopLowRank(rank=30, k=4, bit_price=1e-3, search=rounds).fit(sample)
            encoded, kl = encoding.encode_with_kl(logits)
            assert kl is not None
            bits = sum(entropy(column) for column in encoded["coefficients"].T)
            costs.append(float(kl.mean()) + 1e-3 * bits)

        assert costs[1] < costs[0]

    def test_a_higher_bit_price_takes_fewer_bits_and_components(self) -> None:
        logits, sample = language_like(512, 600, seed=2), language_like(2000, 600, seed=1)
        cheap, dear = (TopLowRank(rank=30, k=4, bit_price=price).fit(sample) for price in (1e-4, 0.1))
        bits = [sum(entropy(column) for column in each.encode(logits)["coefficients"].T) for each in (cheap, dear)]

        assert bits[1] < 0.5 * bits[0]
        assert len(dear.fitted_values()["limits"]) < len(cheap.fitted_values()["limits"])

    def test_a_fit_to_the_head_is_a_fit_to_its_logits(self) -> None:
        weight, hidden = language_head(600)
        bias = torch.linspace(-1, 1, 600)
        logits = torch.addmm(bias, hidden, weight.T)
        encoding = TopLowRank(rank=30, k=4, bit_price=1e-3)
        fitted = [encoding.fit_head(weight, bias, hidden[:2000]), encoding.fit(logits[:2000])]
        of_head, of_logits = (
            float(fidelity_kl(roundtrip(each, logits[2000:]), logits[2000:]).mean()) for each in fitted
        )

        assert of_head == pytest.approx(of_logits, rel=0.03)

    def test_ids_beyond_65536_classes_take_a_wider_array(self) -> None:
        logits = (
            3
            * torch.randn(40, 4, generator=torch.Generator().manual_seed(0))
            @ torch.randn(4, 70_000, generator=torch.Generator().manual_seed(1))
        )
        encoding = TopLowRank(rank=4, k=2).fit(logits)
        encoded = encoding.encode(logits[:8])

        assert torch.uint16 == encoded["highids"].dtype
        assert torch.equal(logits[:8].argmax(dim=1), encoding.decode(encoded, 70_000).argmax(dim=1))

    @pytest.mark.parametrize("seed", range(5))
    def test_damaged_rows_decode_to_a_distribution(self, seed: int) -> None:
        encoding = self.fitted(100)
        encoded = encoding.encode(teacher_like(16, 100))
        generator = torch.Generator().manual_seed(seed)
        for values in encoded.values():
            values.view(torch.uint8).copy_(
                torch.randint(0, 256, values.shape, generator=generator, dtype=torch.uint8), non_blocking=False
            )
        decoded = encoding.decode(encoded, 100)

        assert torch.isfinite(decoded).all()
        torch.testing.assert_close(decoded.softmax(dim=1).sum(dim=1), torch.ones(16))

    @pytest.mark.parametrize(
        ("part", "value", "message"),
        [
            pytest.param("basis", None, "don't agree", id="basis too short"),
            pytest.param("mean", math.nan, "NaN", id="mean"),
            pytest.param("weights", math.inf, "NaN or infinity", id="weights"),
            pytest.param("limits", None, "don't agree", id="limits too short"),
            pytest.param("limits", 0, "a limit is between 1 and", id="limit of zero"),
            pytest.param("classes", 3, "each once", id="class twice"),
            pytest.param("classes", 100, "each once", id="no such class"),
        ],
    )
    def test_what_was_fitted_must_fit_together(self, part: str, value: float | None, message: str) -> None:
        check_that_arrays_are_refused(self.fitted(100), part, value, message)

    @pytest.mark.parametrize(
        ("encoding", "rows", "message"),
        [
            pytest.param(TopLowRank(rank=50), 50, "more rows than the rank", id="too few rows"),
            pytest.param(TopLowRank(rank=100), 200, "needs more than 100 classes", id="rank of all classes"),
            pytest.param(TopLowRank(rank=5, k=100), 200, "needs more than 100 classes", id="all classes stored"),
            pytest.param(TopLowRank(rank=5, bit_price=1e-13), 200, "too low", id="price too low"),
        ],
    )
    def test_a_fit_that_can_not_be_is_refused(self, encoding: TopLowRank, rows: int, message: str) -> None:
        with pytest.raises(UsageError, match=message):
            encoding.fit(teacher_like(rows, 100))


class TestTrellisLowRank(HeadFittedContract):
    encoding = TrellisLowRank(rank=90, bit_price=3e-3, soft_weight=1.0)
    largest_kl = 0.1
    top1_agreement = 0.85
    odd_rows_atol = 0.04  # a difference of one logit is less than a step
    class_counts = (22, 80)

    def fitted(self, classes: int) -> Encoding:
        """These rows are noise in every direction: a basis needs as many components as there are classes."""
        encoding = replace(self.encoding, rank=min(self.encoding.rank, classes - 1))
        return fitted_once(encoding, classes)

    def test_a_row_does_not_depend_on_its_batch(self) -> None:
        """But for the rounding of matrix products, which the writer's fixed slabs keep from showing."""
        logits = teacher_like(9, 100)
        encoding = self.fitted(100)
        whole, alone = (encoding.decode(encoding.encode(part), 100) for part in (logits, logits[4:5]))

        assert fidelity_kl(alone, whole[4:5]).max() < 1e-3

    def test_the_divergence_that_it_returns_is_the_measured_one(self) -> None:
        logits = teacher_like(64, 100)
        encoding = self.fitted(100)
        encoded, kl = encoding.encode_with_kl(logits)

        assert kl is not None
        torch.testing.assert_close(kl, fidelity_kl(encoding.decode(encoded, 100), logits), atol=1e-4, rtol=1e-3)

    def test_it_needs_fewer_bytes_for_a_lower_divergence_than_toplowrank(self) -> None:
        """At every temperature."""
        logits, sample = language_like(512, 600, seed=2), language_like(2000, 600, seed=1)
        plain = TopLowRank(rank=40, k=1, bit_price=3e-4, soft_weight=1.0, search=16).fit(sample)
        trellis = TrellisLowRank(rank=40, bit_price=4e-3, soft_weight=1.0).fit(sample)
        divergences, sizes = [], []
        for encoding in (plain, trellis):
            encoded = encoding.encode(logits)
            decoded = encoding.decode(encoded, 600)
            divergences.append([float(fidelity_kl(decoded, logits, T).mean()) for T in (1.0, 2.0, 4.0)])
            sizes.append(encoded)
        plain_bytes = sum(entropy(column) / 8 for values in sizes[0].values() for column in values.view(512, -1).T)
        trellis_bytes = float(row_lengths(sizes[1]["coefficients"]).mean())

        assert trellis_bytes < plain_bytes
        assert all(ours < theirs for ours, theirs in zip(divergences[1], divergences[0], strict=True))

    def test_a_higher_bit_price_takes_fewer_bytes_and_components(self) -> None:
        logits, sample = language_like(256, 600, seed=2), language_like(2000, 600, seed=1)
        cheap, dear = (TrellisLowRank(rank=30, bit_price=price).fit(sample) for price in (1e-3, 1.0))
        lengths = [row_lengths(each.encode(logits)["coefficients"]).mean() for each in (cheap, dear)]

        assert lengths[1] < 0.5 * lengths[0]
        assert len(dear.fitted_values()["basis"]) < len(cheap.fitted_values()["basis"])

    def test_a_fit_to_the_head_is_a_fit_to_its_logits(self) -> None:
        weight, hidden = language_head(600)
        bias = torch.linspace(-1, 1, 600)
        logits = torch.addmm(bias, hidden, weight.T)
        encoding = TrellisLowRank(rank=30, bit_price=3e-3)
        fitted = [encoding.fit_head(weight, bias, hidden[:2000]), encoding.fit(logits[:2000])]
        of_head, of_logits = (
            float(fidelity_kl(roundtrip(each, logits[2000:]), logits[2000:]).mean()) for each in fitted
        )

        assert of_head == pytest.approx(of_logits, rel=0.05)

    def test_rows_unlike_the_fitted_ones_have_no_more_bytes_than_the_array(self) -> None:
        """Their bits get a higher price, until they fit."""
        encoding = TrellisLowRank(rank=30, bit_price=3e-3).fit(language_like(1000, 600, seed=1))
        usual = language_like(4, 600, seed=2)
        rows = torch.cat([usual, 6 * usual])
        encoded, kl = encoding.encode_with_kl(rows)

        assert kl is not None
        torch.testing.assert_close(kl, fidelity_kl(encoding.decode(encoded, 600), rows), atol=1e-4, rtol=1e-3)
        assert row_lengths(encoded["coefficients"]).max() <= int(encoding.fitted_values()["longest"][0])

    def test_rows_that_do_not_fit_at_any_price_are_refused(self) -> None:
        encoding = self.fitted(100)
        one_byte = encoding.fitted_values() | {"longest": np.array([1], dtype=np.uint32)}
        with pytest.raises(InvalidLogits, match="need more than 1 bytes"):
            encoding.with_fitted(one_byte).encode(teacher_like(8, 100))

    @pytest.mark.parametrize("smallest", [0, 255])
    def test_damaged_rows_decode_to_a_distribution(self, smallest: int) -> None:
        encoding = self.fitted(100)
        shape = encoding.encode(teacher_like(16, 100))["coefficients"].shape
        generator = torch.Generator().manual_seed(0)
        damaged = torch.randint(smallest, 256, shape, generator=generator, dtype=torch.uint8)
        decoded = encoding.decode({"coefficients": damaged}, 100)

        assert torch.isfinite(decoded).all()
        torch.testing.assert_close(decoded.softmax(dim=1).sum(dim=1), torch.ones(16))

    @pytest.mark.parametrize(
        ("part", "value", "message"),
        [
            pytest.param("basis", None, "don't agree", id="basis too short"),
            pytest.param("mean", math.nan, "NaN", id="mean"),
            pytest.param("rest", math.inf, "NaN or infinity", id="rest"),
            pytest.param("scales", 200, "don't agree", id="no such table"),
            pytest.param("thresholds", None, "don't agree", id="thresholds too short"),
            pytest.param("frequencies", 0, "at least 1", id="frequency of zero"),
            pytest.param("frequencies", 9, "add up to 65536", id="sum of frequencies"),
            pytest.param("longest", 0, "between 1 and", id="no bytes"),
        ],
    )
    def test_what_was_fitted_must_fit_together(self, part: str, value: float | None, message: str) -> None:
        check_that_arrays_are_refused(self.fitted(100), part, value, message)

    @pytest.mark.parametrize(
        ("encoding", "rows", "message"),
        [
            pytest.param(TrellisLowRank(rank=50), 50, "more rows than the rank", id="too few rows"),
            pytest.param(TrellisLowRank(rank=100), 200, "needs more than 100 classes", id="rank of all classes"),
            pytest.param(TrellisLowRank(rank=5, bit_price=1e-9), 200, "too low", id="price too low"),
            pytest.param(
                TrellisLowRank(rank=5, bit_price=1e12),
                200,
                "a step exceeds float16: lower bit_price",
                id="price too high",
            ),
        ],
    )
    def test_a_fit_that_can_not_be_is_refused(self, encoding: TrellisLowRank, rows: int, message: str) -> None:
        with pytest.raises(UsageError, match=message):
            encoding.fit(teacher_like(rows, 100))


def check_that_arrays_are_refused(encoding: Encoding, part: str, value: float | None, message: str) -> None:
    """With one of them shortened (None), or the first two values in each of its rows replaced."""
    values = {name: array.copy() for name, array in encoding.fitted_values().items()}
    if value is None:
        values[part] = values[part][..., :-1]
    else:
        values[part][..., :2] = value
    with pytest.raises(ValueError, match=message):
        encoding.with_fitted(values)


@functools.cache
def fitted_once(encoding: Encoding, classes: int) -> Encoding:
    return encoding.fit(teacher_like(400, classes, seed=1))


def row_lengths(packed: Tensor) -> Tensor:
    """Bytes of each row without the zeros at its end."""
    return ((packed != 0) * torch.arange(1, packed.shape[1] + 1)).amax(dim=1).double()


@given(st.integers(1, 40), st.integers(0, 2**32 - 1))
def test_a_range_coder_decodes_what_it_encoded(num_symbols: int, seed: int) -> None:
    """Also the rarest symbols, whose intervals carry into many bytes, in as many bytes as they are worth."""
    draw = np.random.default_rng(seed)
    frequencies = np.ones((3, 5), dtype=np.int64)
    for row, cuts in zip(frequencies, np.sort(draw.integers(0, TOTAL - 4, (3, 4)), axis=1), strict=True):
        row += np.diff(cuts, prepend=0, append=TOTAL - 5)
    starts = torch.from_numpy(np.pad(frequencies.cumsum(axis=1), ((0, 0), (1, 0))))
    symbols = torch.from_numpy(np.stack([np.repeat(np.arange(5, dtype=np.int16), row) for row in frequencies]))
    tables = torch.from_numpy(draw.integers(0, 3, (num_symbols, 7)))
    message = torch.from_numpy(draw.integers(0, 5, (num_symbols, 7)))
    first, last = starts[tables, message], starts[tables, message + 1]
    packed = range_encoded(zip(first, last - first, strict=True), 7, torch.device("cpu"))
    decoder = RangeDecoder(packed)
    worth = (16 - (last - first).double().log2()).sum(dim=0) / 8

    assert torch.equal(message, torch.stack([decoder.next(symbols, starts, table) for table in tables]))
    assert (row_lengths(packed) <= worth + 1.1).all()


def language_head(classes: int, rows: int = 2512, width: int = 40) -> tuple[Tensor, Tensor]:
    """Weights (classes, width) and hidden states (rows, width) of decreasing variance."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.arange(1, width + 1).float().rsqrt()
    weight = torch.randn(classes, width, generator=generator)
    return weight, 1.5 * torch.randn(rows, width, generator=generator) * scale


def language_like(rows: int, classes: int, seed: int) -> Tensor:
    """Logits (rows, classes) of a linear head over random hidden states."""
    weight, hidden = language_head(classes)
    order = torch.randperm(len(hidden), generator=torch.Generator().manual_seed(seed))[:rows]
    return hidden[order] @ weight.T


def roundtrip(encoding: Encoding, logits: Tensor) -> Tensor:
    """Logits after encoding and decoding."""
    return encoding.decode(encoding.encode(logits), logits.shape[1])


class TestSampled(EncodingContract):
    encoding = Sampled(draws=200, seed=3)
    largest_kl = math.inf
    keeps_every_class = False
    top1_agreement = 0.9
    odd_rows_atol = 0.01  # a share is a multiple of 1/200
    class_counts = (22, 300)

    def test_shares_are_unbiased_and_renormalised_top_k_is_not(self) -> None:
        """Within 4σ of independent draws, which is more than these spread, and their mean's own σ."""
        logits = torch.randn(1, 30, generator=torch.Generator().manual_seed(0)).mul(1.5)
        draws, builds = 10, 4000
        encoding = Sampled(draws=draws, seed=1)
        encoded = encoding.encode(logits.expand(builds, -1), view=0, start=0)
        shares = encoding.decode(encoded, 30).exp()
        p = logits.softmax(dim=1)[0]
        sigma = (p * (1 - p) / (draws * builds)).sqrt()

        assert ((shares.mean(dim=0) - p).abs() < 4 * sigma).all()
        assert shares.var(dim=0).sum() < (p * (1 - p) / draws).sum()
        kept = logits.topk(10, dim=1)
        renormalised = torch.zeros(30).scatter(0, kept.indices[0], kept.values[0].softmax(dim=0))
        assert ((renormalised - p).abs() > 4 * sigma).sum() > 20

    def test_the_expected_gradient_is_that_of_the_full_distribution(self) -> None:
        generator = torch.Generator().manual_seed(0)
        logits, student = torch.randn(2, 30, generator=generator)
        student = student.expand(4000, -1).clone().requires_grad_()
        encoding = Sampled(draws=10)
        sampled = encoding.decode(encoding.encode(logits.expand(4000, -1)), 30)
        kl_divergence(student, sampled).sum().backward()
        assert student.grad is not None
        full = student.detach()[0].softmax(dim=0) - logits.softmax(dim=0)
        sigma = student.grad.std(dim=0) / 4000**0.5

        assert ((student.grad.mean(dim=0) - full).abs() <= 4 * sigma + 1e-6).all()

    def test_draws_depend_on_seed_view_and_row_alone(self) -> None:
        logits = teacher_like(1, 100).expand(6, -1)
        ids = Sampled(draws=20).encode(logits, view=1, start=10)["ids"]

        assert torch.equal(ids[2:4], Sampled(draws=20).encode(logits[:2], view=1, start=12)["ids"])
        assert not torch.equal(ids, Sampled(draws=20).encode(logits, view=2, start=10)["ids"])
        assert not torch.equal(ids, Sampled(draws=20, seed=1).encode(logits, view=1, start=10)["ids"])


class TestSampledPacked(EncodingContract):
    encoding = Sampled(draws=200, seed=3, packed=True)
    largest_kl = math.inf
    keeps_every_class = False
    top1_agreement = 0.9
    odd_rows_atol = 0.01
    class_counts = (22, 300)

    def test_it_holds_the_same_draws(self) -> None:
        logits = teacher_like(16, 100)
        plain = Sampled(draws=200, seed=3)
        expected = plain.decode(plain.encode(logits, view=1, start=7), 100)

        torch.testing.assert_close(
            expected, self.encoding.decode(self.encoding.encode(logits, view=1, start=7), 100), atol=1e-6, rtol=1e-6
        )


@given(st.lists(st.integers(1, 5) | st.integers(1, LARGEST), min_size=1, max_size=60), st.integers(0, 2**32 - 1))
def test_mixed_radix_packs_and_unpacks(limits: list[int], seed: int) -> None:
    radix = MixedRadix(limits)
    bounds = torch.tensor(limits, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    numbers = (torch.rand(20, len(limits), generator=generator) * (2 * bounds + 1)).floor() - bounds
    numbers[0], numbers[1] = bounds, -bounds
    packed = radix.pack(numbers)

    assert (torch.uint8, (20, radix.num_bytes)) == (packed.dtype, tuple(packed.shape))
    assert torch.equal(numbers, radix.unpack(packed))
    small = numbers.clamp(-127, 127)
    assert torch.equal(small, radix.unpack_int8(radix.pack(small)).float())


def entropy(symbols: Tensor) -> float:
    """In bits a symbol."""
    p = symbols.unique(return_counts=True)[1] / len(symbols)
    return float(-(p * p.log2()).sum())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        pytest.param("Topk(k=0)", "at least 1", id="k is zero"),
        pytest.param({"name": "topk"}, "k", id="k is missing"),
        pytest.param({"name": "dense", "bits": 8}, "no parameter 'bits'", id="unknown parameter"),
        pytest.param(
            "zip",
            "unknown encoding 'zip'; expected one of: dense, topk, packedtopk, lowrank, toplowrank, trellislowrank, sampled, "
            "values, components, nologits, auto",
            id="unknown encoding",
        ),
        pytest.param("__import__('os').system('true')", "can't read the encoding", id="code"),
        pytest.param("TopK(5)", "expected a name with keyword arguments", id="positional"),
        pytest.param({"name": "dense", "dtype": "int8"}, "'float16' or 'uint8'", id="unknown dtype"),
        pytest.param("LowRank(rank=0)", "rank is a whole number, at least 1", id="rank"),
        pytest.param("TopLowRank(k=0)", "k is a whole number, at least 1", id="top classes"),
        pytest.param("TopLowRank(bit_price=0)", "bit_price is a positive number", id="bit price"),
        pytest.param("TrellisLowRank(rank=0)", "rank is a whole number, at least 1", id="trellis rank"),
        pytest.param("TrellisLowRank(soft_weight=-1)", "soft_weight at least 0", id="soft weight"),
        pytest.param("Sampled(draws=-1)", "draws is a whole number, at least 1", id="draws"),
        pytest.param("Sampled(packed=1)", "packed is true or false", id="packed"),
        pytest.param("PackedTopK(k=0)", "k is a whole number of classes, at least 1", id="entries"),
        pytest.param("PackedTopK(k=5, most=5)", "most is a whole number of classes above k=5", id="most"),
        pytest.param("PackedTopK(k=5, most=9)", "set prior=True", id="most without prior"),
        pytest.param("PackedTopK(k=5, step=0)", "step is between 0.1 and 4", id="step"),
        pytest.param("Components(error=1)", "error is a relative error between 0.005 and 0.9", id="error"),
        pytest.param("Auto(max_kl=0)", "max_kl is a positive number", id="max_kl"),
        pytest.param("auto", "still to be chosen", id="auto"),
    ],
)
def test_a_wrong_encoding_says_what_is_wrong(config: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message.replace("(", r"\(")):
        encoding_from_config(config)


@pytest.mark.parametrize("encoding", [TopK(k=10), PackedTopK(k=10), PackedTopK(k=2, most=10, prior=True)], ids=repr)
def test_top_k_of_all_classes_is_refused(encoding: Encoding) -> None:
    with pytest.raises(UsageError, match="use Dense"):
        encoding.arrays(10)


SETS = [
    PackedTopK(k=9),
    PackedTopK(k=5, most=12, prior=True, step=4.0),
    Sampled(draws=9, packed=True),
    Sampled(draws=300, packed=True),
]


@pytest.mark.parametrize("classes", [20, 300, 70_000])
@pytest.mark.parametrize("encoding", SETS, ids=repr)
def test_any_bytes_in_sets_of_classes_decode_to_distributions(encoding: Encoding, classes: int) -> None:
    """In the arrays of integers; in those of floats, NaN and +inf are refused."""
    encoding = encoding.fit(teacher_like(50, classes, seed=1))
    draw = np.random.default_rng(0)
    for smallest in (0, 200):
        encoded = {}
        for name, spec in encoding.arrays(classes).items():
            shape = (30, *spec.row_shape)
            if spec.dtype == "float16":
                encoded[name] = torch.from_numpy(draw.choice([-np.inf, -65504, 0, 65504], shape).astype(np.float16))
            else:
                highest = np.iinfo(spec.dtype).max
                numbers = draw.integers(smallest * (highest // 255), highest, shape, endpoint=True, dtype=spec.dtype)
                encoded[name] = torch.from_numpy(numbers)
            assert encoding.accepts(name, encoded[name])
        targets = encoding.targets(encoded, classes)
        p = encoding.decode(encoded, classes).softmax(dim=1)

        torch.testing.assert_close(p.sum(dim=1), torch.ones(30))
        torch.testing.assert_close(p, targets.dense().softmax(dim=1))
        assert all(len(set(ids := row[row >= 0].tolist())) == len(ids) >= 1 for row in targets.ids)
    assert not PackedTopK(k=9).accepts("tail", torch.tensor([0.0, math.nan]))
    assert not PackedTopK(k=9).accepts("tail", torch.tensor([0.0, math.inf]))


@pytest.mark.parametrize("encoding", [Dense(), Dense(dtype="uint8"), TopK(k=5), TopK(k=5, dtype="uint8")], ids=repr)
@pytest.mark.parametrize("lowest", [-1e9, -1e5, -math.inf])
def test_nearly_masked_classes_cost_the_others_nothing(encoding: Encoding, lowest: float) -> None:
    logits = teacher_like(64, 40)
    logits[:, ::4] = lowest
    logits[:, 0] = 5.0
    decoded = encoding.decode(encoding.encode(logits), 40)
    exact = fidelity_kl(decoded, logits).mean()
    top5 = encoding.name == "topk"

    assert (logits.argmax(dim=1) == decoded.argmax(dim=1)).float().mean() > 0.9
    assert exact < (0.8 if top5 else 5e-3)


def test_the_divergence_counts_what_is_spread_over_masked_classes() -> None:
    logits = teacher_like(64, 100)
    logits[:, 50:] = -math.inf
    decoded = TopK(k=10).decode(TopK(k=10).encode(logits), 100)
    p, q = logits.softmax(dim=1), decoded.softmax(dim=1)
    by_hand = (p[:, :50] * (p[:, :50] / q[:, :50]).log()).sum(dim=1)

    torch.testing.assert_close(by_hand, fidelity_kl(decoded, logits), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "unfitted", [LowRank(rank=20, k=0), LowRank(rank=20, k=2), TopLowRank(rank=20), TrellisLowRank(rank=20)], ids=repr
)
def test_autocast_around_a_training_step_changes_nothing(unfitted: Encoding) -> None:
    logits = teacher_like(64, 100)
    encoding = unfitted.fit(teacher_like(300, 100, seed=1))
    encoded = encoding.encode(logits)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        again, decoded = encoding.encode(logits), encoding.decode(encoded, 100)

    assert torch.float32 == decoded.dtype
    assert torch.equal(encoding.decode(encoded, 100), decoded)
    assert all(torch.equal(encoded[name], again[name]) for name in encoded)


@pytest.mark.parametrize("part", ["basis", "mean", "limits", "bit_costs"])
def test_what_was_fitted_must_fit_together(part: str) -> None:
    encoding = LowRank(rank=20).fit(teacher_like(300, 100, seed=1))
    values = encoding.fitted_values()
    with pytest.raises(ValueError, match="don't agree|NaN"):
        encoding.with_fitted({**values, part: values[part][..., :-1]})
    if part != "limits":
        with pytest.raises(ValueError, match="NaN"):
            encoding.with_fitted({**values, part: np.full_like(values[part], np.nan)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param({"order": np.zeros(100, dtype=np.uint8)}, "each class once", id="a class twice"),
        pytest.param({"order": np.arange(100, dtype=np.uint16)}, "uint16", id="dtype"),
        pytest.param({"order": np.arange(99, dtype=np.uint8)}, "don't agree", id="classes"),
        pytest.param({"prior": np.full(100, np.nan, dtype=np.float16)}, "NaN", id="NaN"),
        pytest.param({"least": np.array([2.0], dtype=np.float32)}, "no probability", id="threshold"),
        pytest.param({"least": np.array([0.5, 0.5], dtype=np.float32)}, "don't agree", id="thresholds"),
    ],
)
def test_a_prior_of_other_classes_or_values_is_refused(change: dict[str, np.ndarray], message: str) -> None:
    encoding = PackedTopK(k=5, prior=True).fit(teacher_like(50, 100))

    with pytest.raises(ValueError, match=message):
        encoding.with_fitted(encoding.fitted_values() | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param({"basis": np.zeros((3, 60), dtype=np.float16)}, "don't agree", id="components"),
        pytest.param({"mean": np.full(60, np.inf, dtype=np.float32)}, "NaN or infinity", id="infinite"),
        pytest.param({"step": np.zeros(1, dtype=np.float32)}, "not positive", id="step"),
        pytest.param({"limits": np.zeros(60, dtype=np.int8)}, "limits is int8", id="dtype"),
    ],
)
def test_components_that_make_no_sense_are_refused(change: dict[str, np.ndarray], message: str) -> None:
    encoding = Components(error=0.02).fit(features(500, seed=1))

    with pytest.raises(ValueError, match=message):
        encoding.with_fitted(encoding.fitted_values() | change)
