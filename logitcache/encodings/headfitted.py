"""Encodings of a low-rank basis that are fitted to logits, or to a language model's head and hidden states."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Self, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from logitcache.encodings.basis import principal_directions, principal_span
from logitcache.encodings.fitted import FittedEncoding
from logitcache.encodings.protocol import float_tensor, full_precision
from logitcache.errors import ShapeError, UsageError

# C classes, R rank, N calibration rows, S of them, D values of a hidden state

Arrays = TypeVar("Arrays")


@dataclass(frozen=True, kw_only=True)
class HeadFittedEncoding(FittedEncoding[Arrays]):
    """An encoding with a basis of the logits that matter, in which errors count by the divergence that they cause."""

    how_to_fit: ClassVar[str] = f"{FittedEncoding.how_to_fit} or .fit_head(…)"
    fit_rows: ClassVar[int]
    """Rows on which weights of classes and frequencies of coefficients are measured."""
    enough_rows: ClassVar[str]
    """How many rows a fit should have, for messages."""

    rank: int
    """The most components of the basis."""

    @full_precision
    def fit(self, calibration: Any) -> Self:
        num_rows, num_classes = calibration.shape
        self._check_fit(num_rows, num_classes)
        span_CD, hidden_ND = principal_span(calibration, min(self.rank + 64, num_rows, num_classes))
        sample_S = self._sample(num_rows)
        return self._fit(span_CD, None, hidden_ND, lambda rows: float_tensor(calibration[sample_S[rows].numpy()]))

    @full_precision
    def fit_head(self, weight: Tensor, bias: Tensor | None, hidden: Tensor) -> Self:
        """The same encoding, fitted to the logits `hidden @ weight.T + bias` of a model's last layer.

        Args:
            weight: float (C, D), and
            bias: float (C,) or None, of the layer.
            hidden: float (N, D), its inputs, for at least `rank` + 1 rows, of as many different texts as possible.

        Raises:
            ShapeError: the shapes don't agree.
            UsageError: too few rows, or too few classes for the rank.
        """
        shapes = [tuple(values.shape) for values in (weight, hidden)]
        if weight.ndim != 2 or hidden.ndim != 2 or weight.shape[1] != hidden.shape[1]:
            raise ShapeError(f"weight and hidden are {shapes[0]} and {shapes[1]}; expected (C, D) and (N, D)")
        if bias is not None and bias.shape != weight.shape[:1]:
            raise ShapeError(f"the bias is {tuple(bias.shape)}; expected ({len(weight)},), one value for each class")
        self._check_fit(len(hidden), len(weight))
        weight_CD, hidden_ND = weight.detach().float(), hidden.detach().float().to(weight.device)
        bias_C = None if bias is None else bias.detach().float().to(weight.device)
        some_SD = hidden_ND[self._sample(len(hidden)).to(weight.device)]
        return self._fit(weight_CD, bias_C, hidden_ND, lambda rows: F.linear(some_SD[rows], weight_CD, bias_C))

    @abstractmethod
    def _fit(
        self, span_CD: Tensor, bias_C: Tensor | None, hidden_ND: Tensor, logits_of: Callable[[slice], Tensor]
    ) -> Self:
        """Fit to logits that are `hidden @ span.T + bias`, up to what the span leaves out.

        Args:
            logits_of: the logits of some of the rows that `_sample` names.
        """

    def _basis(
        self,
        span_CD: Tensor,
        bias_C: Tensor | None,
        hidden_ND: Tensor,
        weights_C: Tensor,
        of_means_DD: Tensor,
        step: float,
    ) -> tuple[Tensor, Tensor]:
        """The components with the largest variance in the mean metric of the divergences.

        Args:
            span_CD, bias_C, hidden_ND: as for `_fit`.
            weights_C: the mean weight of an error in each class, of sum 1.
            of_means_DD: the mean of the squares of weighted mean errors, in the span.
            step: root mean square change of the logits for one step of a coefficient.

        Returns:
            The basis, float16 (R, C), and the mean of the logits, float32 (C,).

        Raises:
            UsageError: a step exceeds float16.
        """
        mean_D = hidden_ND.mean(dim=0)
        centred_CD = span_CD - weights_C @ span_CD
        mean_C = centred_CD @ mean_D
        if bias_C is not None:
            mean_C += bias_C - weights_C @ bias_C
        # To second order, a divergence is half the variance of the logits' errors: the mean of their squares without
        # the square of their mean.
        metric_DD = (span_CD.T * weights_C) @ span_CD - of_means_DD
        components_RD = principal_directions(metric_DD, hidden_ND - mean_D, self.rank)
        basis_RC = (step * components_RD @ centred_CD.T).half()
        if not bool(torch.isfinite(basis_RC).all()):
            raise UsageError(f"{self!r}: a step exceeds float16: lower bit_price, or check the scale of the logits")
        return basis_RC, mean_C

    def _check_fit(self, num_rows: int, num_classes: int) -> None:
        self.arrays(num_classes)
        if num_rows <= self.rank:
            raise UsageError(
                f"{type(self).__name__}(rank={self.rank}) can't be fitted on {num_rows} calibration rows; it needs "
                f"more rows than the rank, preferably {self.enough_rows}: raise `cache.calibration`, or lower the rank"
            )

    def _sample(self, num_rows: int) -> Tensor:
        """Up to `fit_rows` row numbers, int64 (S,), sorted."""
        chosen = np.random.default_rng(0).choice(num_rows, min(self.fit_rows, num_rows), replace=False)
        return torch.from_numpy(np.sort(chosen))
