"""The principal subspace of a teacher's logits, computed on a sample, a few rows at a time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from logitcache.encodings.protocol import float_tensor

# B batch, C classes, R rank, N rows, D values of a hidden state

DEEPEST = 40.0
"""Distance below a row's largest logit at which logits are clamped: their probability is below 1e-17."""
EXACT_CLASSES = 4096
"""Up to this many classes the basis is computed from the full covariance; above, by randomized subspace iteration."""


def principal_components(calibration: Any, rank: int) -> tuple[Tensor, Tensor]:
    """Mean (C,) and orthonormal principal components (rank, C) of logits, each row's own mean removed.

    The calibration logits are read a few rows at a time, several times, so they can be a memory map that is larger than
    memory. Above `EXACT_CLASSES` classes: randomized subspace iteration (Halko, Martinsson and Tropp 2011,
    arXiv:0909.4061, algorithm 4.4).
    """
    num_rows, num_classes = calibration.shape
    total_C = torch.zeros(num_classes, dtype=torch.float64)
    for rows_BC in _batches(calibration):
        total_C += rows_BC.sum(dim=0, dtype=torch.float64)
    mean_C = (total_C / num_rows).float()
    if num_classes <= EXACT_CLASSES:
        covariance_CC = torch.zeros(num_classes, num_classes)
        for rows_BC in _batches(calibration):
            rows_BC -= mean_C
            covariance_CC += rows_BC.T @ rows_BC
        vectors_CR = torch.linalg.eigh(covariance_CC)[1].flip(1)[:, :rank]
        return mean_C, _sign_fixed(vectors_CR.T)
    width = min(rank + 32, num_classes)
    vectors_CR = torch.randn(num_classes, width, generator=torch.Generator().manual_seed(0))
    for _ in range(3):
        vectors_CR = torch.linalg.qr(vectors_CR)[0]
        product_CR = torch.zeros_like(vectors_CR)
        for rows_BC in _batches(calibration):
            rows_BC -= mean_C
            product_CR += rows_BC.T @ (rows_BC @ vectors_CR)
        inner_RR = vectors_CR.T @ product_CR
        vectors_CR = product_CR
    # Rayleigh-Ritz: sorts the components by variance.
    basis_CR = torch.linalg.qr(product_CR)[0]
    inner_RR = torch.zeros(width, width)
    for rows_BC in _batches(calibration):
        inner_RR += (projected := (rows_BC - mean_C) @ basis_CR).T @ projected
    return mean_C, _sign_fixed((basis_CR @ torch.linalg.eigh(inner_RR)[1].flip(1)[:, :rank]).T)


def principal_span(calibration: Any, width: int) -> tuple[Tensor, Tensor]:
    """Orthonormal directions (C, width) that hold most of the variance of logits, and the rows' coordinates (N, width).

    Each row's own mean is removed. Two passes of randomized subspace iteration: if the logits have no higher rank than
    `width`, as those of a language model with a smaller hidden state, then the span holds all of them.
    """
    num_classes = calibration.shape[1]
    generator = torch.Generator().manual_seed(0)
    product_CD = torch.zeros(num_classes, width)
    for rows_BC in _batches(calibration):
        product_CD += rows_BC.T @ torch.randn(len(rows_BC), width, generator=generator)
    span_CD = torch.linalg.qr(product_CD)[0]
    product_CD.zero_()
    for rows_BC in _batches(calibration):
        product_CD += rows_BC.T @ (rows_BC @ span_CD)
    span_CD = torch.linalg.qr(product_CD)[0]
    return span_CD, torch.cat([rows_BC @ span_CD for rows_BC in _batches(calibration)])


def principal_directions(metric_DD: Tensor, hidden_ND: Tensor, rank: int) -> Tensor:
    """Directions of hidden states (R, D) with the largest variance in a metric, orthogonal and of norm 1 in it."""
    device, metric_DD = metric_DD.device, metric_DD.cpu().double()  # some devices have no float64
    values_D, vectors_DD = torch.linalg.eigh(metric_DD)
    roots_D = values_D.clamp(min=1e-9 * float(values_D.amax())).sqrt()
    covariance_DD = (hidden_ND.T @ hidden_ND).cpu().double() / len(hidden_ND)
    to_norm_DD = vectors_DD * roots_D
    principal_DR = torch.linalg.eigh(to_norm_DD.T @ covariance_DD @ to_norm_DD)[1].flip(1)[:, :rank]
    components_RD = (principal_DR.T / roots_D) @ vectors_DD.T
    largest_R1 = components_RD.gather(1, components_RD.abs().argmax(dim=1, keepdim=True))
    signed_RD: Tensor = components_RD * largest_R1.sign()  # the sign of an eigenvector is arbitrary
    return signed_RD.float().to(device)


def least_squares(basis_CR: Tensor, weights_C: Tensor) -> Tensor:
    """What logits are multiplied with to give their coefficients (C, R), by least squares with weights of sum 1.

    Each column has the sum 0, so a constant per row changes nothing.
    """
    weighted_CR = basis_CR * weights_C[:, None]
    weighted_CR -= weights_C[:, None] * weighted_CR.sum(dim=0)
    inner_RR = (weighted_CR.T @ basis_CR).cpu().double()
    inner_RR.diagonal().add_(1e-9 * float(inner_RR.diagonal().mean()) + torch.finfo(torch.float32).tiny)
    projection_CR: Tensor = weighted_CR @ torch.linalg.pinv(inner_RR, hermitian=True).float().to(basis_CR.device)
    return projection_CR


def _sign_fixed(basis_RC: Tensor) -> Tensor:
    """The components with signs such that the largest entry is positive: the sign of an eigenvector is arbitrary."""
    largest_R1 = basis_RC.gather(1, basis_RC.abs().argmax(dim=1, keepdim=True))
    return (basis_RC * largest_R1.sign()).contiguous()


def _batches(calibration: Any) -> Any:
    size = max(1, 2**24 // calibration.shape[1])
    for start in range(0, len(calibration), size):
        yield centred(float_tensor(calibration[start : start + size]))


def centred(logits_BC: Tensor) -> Tensor:
    """Logits minus their mean in each row, after clamping at `DEEPEST` below the row's largest."""
    logits_BC = (logits_BC - logits_BC.amax(dim=1, keepdim=True)).clamp_(min=-DEEPEST)
    return logits_BC - logits_BC.mean(dim=1, keepdim=True)
