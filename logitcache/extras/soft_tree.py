"""A soft decision tree (Frosst and Hinton 2017, arXiv:1711.09784): a student with interpretable decisions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from logitcache.errors import UsageError

# B batch, C classes, I inner nodes, L leaves; tensors without I or L belong to one level of the tree

MAX_DEPTH = 10
"""1023 inner nodes, each with a filter of the input's size; the mixture needs B x L x C numbers."""
LEAF_SPREAD = 0.1
"""Standard deviation of the leaves' initial logits."""

Prediction = Literal["mixture", "greatest_path"]


class SoftTree(nn.Module):
    """A binary tree of depth d: 2^d - 1 inner nodes, each with a filter over the whole input, and 2^d leaves.

    Inner node i sends an input to its right subtree with probability sigmoid(beta (w_i · x + b_i)), otherwise to the
    left one. Each leaf has a fixed distribution over classes. The output is log-probabilities (B, C), which are valid
    logits. Nodes are numbered level by level from the root, so the children of node i are 2i + 1 and 2i + 2.

    Training and, by default, prediction use the mixture of all leaves, weighted by path probability. The paper trains
    on the weighted mean of the leaves' cross entropies instead, which can't be computed from logits, and predicts by
    the greatest path.

    Args:
        input_shape: of one sample.
        num_classes: C.
        depth: d, from 1 to 10.
        beta: inverse temperature of the decisions; larger values give harder decisions.
        balance: strength λ of the penalty on nodes that use their two subtrees unequally.
        predict: in evaluation, "greatest_path" returns the distribution of the leaf with the greatest path probability,
            which a single path explains; "mixture" is smoother.

    Raises:
        UsageError: an argument is out of range.
    """

    adds_penalty = True
    """The training loop calls `forward(..., with_penalty=True)`."""

    def __init__(
        self,
        input_shape: Sequence[int],
        num_classes: int,
        depth: int = 4,
        beta: float = 1.0,
        balance: float = 0.1,
        predict: Prediction = "mixture",
    ) -> None:
        super().__init__()
        if not isinstance(depth, int) or not 1 <= depth <= MAX_DEPTH:
            raise UsageError(f"depth of a soft tree must be an integer from 1 to {MAX_DEPTH}, not {depth!r}")
        if not (math.isfinite(beta) and beta > 0 and math.isfinite(balance) and balance >= 0):
            raise UsageError(f"a soft tree needs finite beta > 0 and balance >= 0, not {beta!r} and {balance!r}")
        if predict not in get_args(Prediction):
            raise UsageError(f"predict of a soft tree is one of {', '.join(get_args(Prediction))}, not {predict!r}")
        self.depth, self.beta, self.balance, self.predict = depth, beta, balance, predict
        self.input_shape = tuple(input_shape)
        self.filters = nn.Linear(math.prod(self.input_shape), 2**depth - 1)
        self.leaves = nn.Parameter(LEAF_SPREAD * torch.randn(2**depth, num_classes))

    def forward(self, inputs: Tensor, *, with_penalty: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Log-probabilities (B, C), and with `with_penalty` the balance penalty of the batch, a scalar."""
        decisions_BI = self.decisions(inputs)
        log_paths = self.log_path_probabilities(decisions_BI)
        log_q_LC = F.log_softmax(self.leaves, dim=1)
        if self.training or self.predict == "mixture":
            log_p_BC = torch.logsumexp(log_paths[-1][:, :, None] + log_q_LC, dim=1)
        else:
            log_p_BC = log_q_LC[log_paths[-1].argmax(dim=1)]
        return (log_p_BC, self._balance_penalty(decisions_BI, log_paths)) if with_penalty else log_p_BC

    def decisions(self, inputs: Tensor) -> Tensor:
        """beta (w · x + b) of every inner node, (B, I); positive values favour the right subtree."""
        activations_BI: Tensor = self.filters(inputs.flatten(1))
        # Sums of logarithms lose too much precision in autocast's half precision.
        return self.beta * activations_BI.to(torch.promote_types(activations_BI.dtype, torch.float32))

    def log_path_probabilities(self, decisions_BI: Tensor) -> list[Tensor]:
        """Log-probabilities of reaching each node, (B, 2^level), level by level from the root to the leaves."""
        log_paths = [torch.zeros_like(decisions_BI[:, :1])]
        for level in range(self.depth):
            here = decisions_BI[:, 2**level - 1 : 2 ** (level + 1) - 1]
            left, right = log_paths[-1] + F.logsigmoid(-here), log_paths[-1] + F.logsigmoid(here)
            log_paths.append(torch.stack([left, right], dim=2).flatten(1))
        return log_paths

    def _balance_penalty(self, decisions_BI: Tensor, log_paths: Sequence[Tensor]) -> Tensor:
        """-λ Σ_i 2^-level(i) (log α_i + log(1 - α_i)) / 2 of a batch, a scalar.

        α_i is the share of the batch that node i sends to the right, weighted by the probability of reaching the node.
        The paper uses running averages; the batch's own share needs no state to restore when a run resumes.
        """
        penalty = torch.zeros_like(decisions_BI[0, 0])
        for level, log_paths_BI in enumerate(log_paths[:-1]):
            here = decisions_BI[:, 2**level - 1 : 2 ** (level + 1) - 1]
            reached_I = torch.logsumexp(log_paths_BI, dim=0)
            right_I = torch.logsumexp(log_paths_BI + F.logsigmoid(here), dim=0) - reached_I
            left_I = torch.logsumexp(log_paths_BI + F.logsigmoid(-here), dim=0) - reached_I
            penalty = penalty - 0.5 * 2.0**-level * (right_I + left_I).sum()
        return self.balance * penalty
