"""An autoencoder of soft labels with a vector-quantised code: the idea of arXiv:2603.03808, in a small form of our own.

Only the paper's summary was at hand. Assumed here: an encoder and a decoder with one hidden layer each; a code of m
vectors, each the nearest of 256 entries of one codebook, so one byte a vector; the divergence from the teacher as the
loss of reconstruction; a codebook of moving averages (van den Oord et al. 2017, arXiv:1711.00937, appendix A.1).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numcodecs.zstd import Zstd
from torch import Tensor, nn

from logitcache.losses import kl_divergence

# B batch, C classes, E entries of the codebook, M vectors of a code, D values of a vector

ENTRIES = 256
VALUES = 8
HIDDEN = 512
COMMITMENT = 0.25
DECAY = 0.99
BATCH = 128


@dataclass(frozen=True)
class Coded:
    """Labels as they are read back, and what they take."""

    logits: Tensor
    """Float32 (N, C)."""
    num_bytes: int
    """Of all codes, after zstd."""
    fixed_bytes: int
    """Of the decoder and the codebook, stored once, in float32."""


def coded(logits_NC: Tensor, num_vectors: int, *, epochs: int, seed: int = 0) -> Coded:
    """Fit an autoencoder to some labels, and write and read the same labels with it."""
    torch.manual_seed(seed)
    model = Autoencoder(logits_NC, num_vectors)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=1e-4)
    steps = epochs * -(-len(logits_NC) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=steps, pct_start=0.1)
    for epoch in range(epochs):
        if epoch == epochs // 5:
            model.start_codebook(logits_NC)
        for rows in torch.randperm(len(logits_NC)).split(BATCH):
            loss = model.loss(logits_NC[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    model.eval()
    with torch.inference_mode():
        codes_NM = model.codes(model.vectors(logits_NC))
        data = Zstd(level=19).encode(np.ascontiguousarray(codes_NM.T.numpy()))
        read_MN = np.frombuffer(Zstd().decode(data), dtype=np.uint8).reshape(num_vectors, -1)
        decoded = model.decoded(model.codebook[torch.from_numpy(read_MN.T.astype(np.int64))])
    fixed = [*model.decoder.parameters(), model.mean, model.scale, model.codebook]
    return Coded(decoded.clone(), len(data), sum(each.numel() * 4 for each in fixed))


class Autoencoder(nn.Module):
    """Logits (B, C) to M vectors and back."""

    mean: Tensor
    scale: Tensor
    codebook: Tensor
    counts: Tensor
    sums: Tensor

    def __init__(self, logits_NC: Tensor, num_vectors: int) -> None:
        super().__init__()
        num_classes = logits_NC.shape[1]
        centred_NC = logits_NC - logits_NC.mean(dim=1, keepdim=True)
        self.register_buffer("mean", centred_NC.mean(dim=0))
        self.register_buffer("scale", (centred_NC - self.mean).std())
        self.register_buffer("codebook", torch.zeros(ENTRIES, VALUES))
        self.register_buffer("counts", torch.ones(ENTRIES))
        self.register_buffer("sums", torch.zeros(ENTRIES, VALUES))
        self.quantises = False
        width = num_vectors * VALUES
        self.encoder = nn.Sequential(nn.Linear(num_classes, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, width))
        self.decoder = nn.Sequential(nn.Linear(width, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, num_classes))

    def vectors(self, logits_BC: Tensor) -> Tensor:
        """Before quantisation, (B, M, D)."""
        centred_BC = logits_BC - logits_BC.mean(dim=1, keepdim=True)
        encoded: Tensor = self.encoder((centred_BC - self.mean) / self.scale)
        return encoded.unflatten(1, (-1, VALUES))

    def decoded(self, vectors_BMD: Tensor) -> Tensor:
        """Logits (B, C)."""
        decoded: Tensor = self.decoder(vectors_BMD.flatten(1))
        return decoded * self.scale + self.mean

    def codes(self, vectors_BMD: Tensor) -> Tensor:
        """The nearest entry of each vector, uint8 (B, M)."""
        return torch.cdist(vectors_BMD.flatten(0, 1), self.codebook).argmin(dim=1).view(len(vectors_BMD), -1).byte()

    def loss(self, logits_BC: Tensor) -> Tensor:
        vectors_BMD = self.vectors(logits_BC)
        used_BMD, commitment = vectors_BMD, vectors_BMD.new_zeros(())
        if self.quantises:
            codes_BM = self.codes(vectors_BMD.detach()).long()
            self._update(vectors_BMD.detach().flatten(0, 1), codes_BM.flatten())
            nearest_BMD = self.codebook[codes_BM]
            commitment = COMMITMENT * (vectors_BMD - nearest_BMD).square().mean()
            used_BMD = vectors_BMD + (nearest_BMD - vectors_BMD).detach()  # the gradient goes straight through
        return kl_divergence(self.decoded(used_BMD), logits_BC).mean() + commitment

    @torch.no_grad()
    def start_codebook(self, logits_NC: Tensor) -> None:
        """Quantise from now on, with some vectors of the labels as the first entries."""
        some = self.vectors(logits_NC[torch.randint(len(logits_NC), (4 * ENTRIES,))]).flatten(0, 1)
        self.codebook.copy_(some[torch.randint(len(some), (ENTRIES,))])
        self.sums.copy_(self.codebook)
        self.quantises = True

    @torch.no_grad()
    def _update(self, vectors_VD: Tensor, codes_V: Tensor) -> None:
        found_E = torch.bincount(codes_V, minlength=ENTRIES).float()
        self.counts.mul_(DECAY).add_(found_E, alpha=1 - DECAY)
        total_ED = torch.zeros_like(self.sums).index_add_(0, codes_V, vectors_VD)
        self.sums.mul_(DECAY).add_(total_ED, alpha=1 - DECAY)
        self.codebook.copy_(self.sums / self.counts[:, None].clamp(min=1e-5))
        is_unused_E = self.counts < 0.05
        if is_unused_E.any():  # of no use where no vector is near them
            drawn = vectors_VD[torch.randint(len(vectors_VD), (int(is_unused_E.sum()),))]
            self.codebook[is_unused_E], self.sums[is_unused_E], self.counts[is_unused_E] = drawn, drawn, 1.0
