"""A soft tree as a drawing: which of its nodes are shown, where they stand, and the path of a sample through them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from logitcache.extras.soft_tree import SoftTree

# B batch, I inner nodes, L leaves; nodes are numbered in rows from the root, leaves after the inner ones

MAX_INNER = 15
"""Inner nodes that are drawn; of a larger tree, those that most samples reach."""
TOP = 2
"""Classes named for a leaf."""
COLUMN, ROW, SIDE = 62, 104, 48
"""Of the drawing, in pixels: between neighbouring leaves, between rows, and a filter's side."""


@dataclass(frozen=True)
class Node:
    """One node of the drawing."""

    number: int
    kind: Literal["inner", "leaf", "rest"]
    """"rest" stands for a whole subtree that is not drawn."""
    parent: int | None
    left: float
    """Of its middle, in pixels."""
    top: float
    use: float
    """Mean probability of reaching it."""
    leaves: int
    """Below it, or itself."""
    top_classes: list[tuple[int, float]]
    """(class, probability) of the most probable classes; of a subtree, of the mixture of what reaches its leaves."""


@dataclass(frozen=True)
class Step:
    """A decision on the way of a sample."""

    node: int
    right: bool
    probability: float
    """Of going this way, given that the sample is here."""


@dataclass(frozen=True)
class TreePath:
    """The most probable path of a sample."""

    steps: list[Step]
    leaf: int
    probability: float
    """Of the whole path."""
    top_classes: list[tuple[int, float]]
    """What its leaf says."""


def mean_use(tree: SoftTree, inputs: Tensor) -> np.ndarray:
    """Mean probability of reaching each node over some inputs, float64 (I + L,)."""
    sums = np.zeros(2 ** (tree.depth + 1) - 1)
    with torch.inference_mode():
        for batch in torch.split(inputs, 256):
            log_paths = tree.log_path_probabilities(tree.decisions(batch))
            sums += torch.cat(log_paths, dim=1).double().exp().sum(dim=0).numpy()
    use: np.ndarray = sums / max(len(inputs), 1)
    return use


def leaf_probabilities(tree: SoftTree) -> np.ndarray:
    """The distribution of every leaf, float64 (L, C)."""
    return tree.leaves.detach().double().softmax(dim=1).numpy()


def paths(tree: SoftTree, inputs: Tensor) -> list[TreePath]:
    """The path to the most probable leaf of each of some inputs."""
    with torch.inference_mode():
        decisions_BI = tree.decisions(inputs)
        right_BI = decisions_BI.double().sigmoid().numpy()
        log_leaves_BL = tree.log_path_probabilities(decisions_BI)[-1].double().numpy()
    first_leaf = 2**tree.depth - 1
    says_LC = leaf_probabilities(tree)
    found = []
    for right_I, log_leaves_L in zip(right_BI, log_leaves_BL, strict=True):
        leaf = first_leaf + int(log_leaves_L.argmax())
        steps: list[Step] = []
        node = leaf
        while node:
            parent, right = (node - 1) // 2, node % 2 == 0
            steps.insert(0, Step(parent, right, float(right_I[parent] if right else 1 - right_I[parent])))
            node = parent
        chosen = leaf - first_leaf
        found.append(TreePath(steps, leaf, float(np.exp(log_leaves_L[chosen])), _top(says_LC[chosen])))
    return found


def drawn_nodes(tree: SoftTree, use: np.ndarray) -> list[Node]:
    """The nodes that are drawn, parents first: the whole tree, or of a large one the part that most samples reach.

    Args:
        tree: in evaluation mode.
        use: of each node, from `mean_use`.
    """
    num_inner = 2**tree.depth - 1
    expanded = _most_used(use, num_inner)
    says_LC = leaf_probabilities(tree)
    columns: dict[int, float] = {}
    rightmost = 0

    def place(node: int) -> float:
        nonlocal rightmost
        if node in expanded:
            columns[node] = (place(2 * node + 1) + place(2 * node + 2)) / 2
        else:
            columns[node] = float(rightmost)
            rightmost += 1
        return columns[node]

    place(0)
    nodes = []
    for node in sorted(columns):
        below = np.fromiter(_leaves_below(node, num_inner), dtype=np.int64)
        weights = use[below]
        mean_C = np.average(says_LC[below - num_inner], axis=0, weights=weights if weights.sum() > 0 else None)
        kind: Literal["inner", "leaf", "rest"] = "inner" if node in expanded else "leaf"
        if node not in expanded and node < num_inner:
            kind = "rest"
        nodes.append(
            Node(
                number=node,
                kind=kind,
                parent=(node - 1) // 2 if node else None,
                left=(columns[node] + 0.5) * COLUMN,
                top=ROW * ((node + 1).bit_length() - 1) + SIDE / 2 + 4,
                use=float(use[node]),
                leaves=len(below),
                top_classes=_top(mean_C),
            )
        )
    return nodes


def _most_used(use: np.ndarray, num_inner: int) -> set[int]:
    """Inner nodes to draw: from the root on, always the most used one whose parent is drawn."""
    expanded, waiting = set[int](), [0]
    while waiting and len(expanded) < MAX_INNER:
        node = max(waiting, key=lambda each: (use[each], -each))
        waiting.remove(node)
        expanded.add(node)
        waiting += [child for child in (2 * node + 1, 2 * node + 2) if child < num_inner]
    return expanded


def _leaves_below(node: int, num_inner: int) -> Iterator[int]:
    first = last = node
    while first < num_inner:
        first, last = 2 * first + 1, 2 * last + 2
    return iter(range(first, last + 1))


def _top(p_C: np.ndarray) -> list[tuple[int, float]]:
    return [(int(each), float(p_C[each])) for each in np.argsort(-p_C, kind="stable")[:TOP]]
