"""Soft trees as drawings: the visible nodes with their filters, and the most probable paths of some samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from logitcache.extras.report.pictures import Region, signed_map_uri, strongest_region
from logitcache.extras.report.samples import ChosenSample, top_classes
from logitcache.extras.soft_tree import SoftTree

# B batch, I inner nodes, L leaves; nodes are numbered level by level from the root, leaves after the inner nodes

MAX_INNER = 15
"""Inner nodes that are drawn; of a larger tree, those that most samples reach."""
TOP = 2
"""Classes named for a leaf."""
COLUMN, ROW, SIDE = 62, 104, 48
"""Of the drawing, in pixels: distance between leaves, distance between levels, side of a filter."""


@dataclass(frozen=True)
class Node:
    """One node of the drawing."""

    number: int
    kind: Literal["inner", "leaf", "rest"]
    """"rest" represents a subtree that is not drawn."""
    left: float
    """Of its centre, in pixels."""
    top: float
    use: float
    """Mean probability of reaching it."""
    right: float | None
    """Share of the samples that reach an inner node and go to the right; None for others and where none do."""
    leaves: int
    """Below it; 1 for a leaf."""
    top_classes: list[tuple[int, float]]
    """(class, probability) of the most probable classes; of an inner node, of the mixture of the leaves below."""
    filter: np.ndarray | None
    """Weights of an inner node, float32 (H, W), summed over channels; None where the input is not an image."""

    @property
    def parent(self) -> int | None:
        """Its number; None for the root."""
        return (self.number - 1) // 2 if self.number else None

    @property
    def picture(self) -> str | None:
        """The filter as a data URI."""
        return None if self.filter is None else signed_map_uri(self.filter)

    def regions(self) -> list[Region | None]:
        """Where the filter's positive and negative weights are largest."""
        return [None if self.filter is None else strongest_region(self.filter, sign=sign) for sign in (1, -1)]


@dataclass(frozen=True)
class TreePath:
    """The most probable path of a sample."""

    nodes: list[int]
    """From the root to the leaf."""
    reached: list[float]
    """The probability of reaching each of them."""
    top_classes: list[tuple[int, float]]
    """Of its leaf."""


@dataclass(frozen=True)
class TreeDrawing:
    """A soft tree with the paths of some samples."""

    student: str
    tree: SoftTree
    nodes: list[Node]
    paths: Sequence[tuple[ChosenSample, TreePath]]

    @property
    def edges(self) -> list[tuple[Node, Node]]:
        """(parent, child) of each line."""
        by_number = {node.number: node for node in self.nodes}
        return [(by_number[node.parent], node) for node in self.nodes if node.parent is not None]


def node_use(tree: SoftTree, inputs: Tensor) -> np.ndarray:
    """Mean probability of reaching each node over some inputs, float64 (I + L,)."""
    return np.asarray(sum(_reached(tree, batch).sum(axis=0) for batch in torch.split(inputs, 256)) / len(inputs))


def _reached(tree: SoftTree, inputs: Tensor) -> np.ndarray:
    """The probability of reaching each node, float64 (B, I + L)."""
    with torch.inference_mode():
        log_paths = tree.log_path_probabilities(tree.decisions(inputs))
    return torch.cat(log_paths, dim=1).double().exp().numpy()


def _leaf_probabilities(tree: SoftTree) -> np.ndarray:
    """The distribution of every leaf, float64 (L, C)."""
    return tree.leaves.detach().double().softmax(dim=1).numpy()


def most_probable_paths(tree: SoftTree, inputs: Tensor) -> list[TreePath]:
    """The path to the most probable leaf of each input."""
    first_leaf = 2**tree.depth - 1
    p_LC = _leaf_probabilities(tree)
    found = []
    for reached_N in _reached(tree, inputs):
        leaf = int(reached_N[first_leaf:].argmax())
        nodes = [first_leaf + leaf]
        while nodes[0]:
            nodes.insert(0, (nodes[0] - 1) // 2)
        found.append(TreePath(nodes, reached_N[nodes].tolist(), top_classes(p_LC[leaf], TOP)))
    return found


def drawn_nodes(tree: SoftTree, use: np.ndarray) -> list[Node]:
    """The nodes of the drawing, parents first: the whole tree, or the part of a large tree that most samples reach.

    Args:
        tree: in evaluation mode.
        use: of each node, from `node_use`.
    """
    num_inner = 2**tree.depth - 1
    expanded = _most_used(use, num_inner)
    p_LC = _leaf_probabilities(tree)
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
        below = _leaves_below(node, num_inner)
        weights = use[below]
        mean_C = np.average(p_LC[below - num_inner], axis=0, weights=weights if weights.sum() > 0 else None)
        filter_HW = None
        if node in expanded and len(tree.input_shape) == 3:
            filter_HW = tree.filters.weight.detach()[node].reshape(tree.input_shape).sum(dim=0).numpy()
        nodes.append(
            Node(
                number=node,
                kind="inner" if node in expanded else "rest" if node < num_inner else "leaf",
                left=(columns[node] + 0.5) * COLUMN,
                top=ROW * ((node + 1).bit_length() - 1) + SIDE / 2 + 4,
                use=float(use[node]),
                right=float(use[2 * node + 2] / use[node]) if node in expanded and use[node] else None,
                leaves=len(below),
                top_classes=top_classes(mean_C, TOP),
                filter=filter_HW,
            )
        )
    return nodes


def _most_used(use: np.ndarray, num_inner: int) -> set[int]:
    """Inner nodes to draw: starting at the root, repeatedly the most used node whose parent is drawn."""
    expanded, waiting = set[int](), [0]
    while waiting and len(expanded) < MAX_INNER:
        node = max(waiting, key=lambda each: (use[each], -each))
        waiting.remove(node)
        expanded.add(node)
        waiting += [child for child in (2 * node + 1, 2 * node + 2) if child < num_inner]
    return expanded


def _leaves_below(node: int, num_inner: int) -> np.ndarray:
    first = last = node
    while first < num_inner:
        first, last = 2 * first + 1, 2 * last + 2
    return np.arange(first, last + 1)
