"""Soft trees as drawings: the visible nodes with their filters, and the paths of some samples in words."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from logitcache.extras.report.figures import Table
from logitcache.extras.report.formatting import MISSING, ClassNames, counted, percent
from logitcache.extras.report.pictures import Region, signed_map_uri, strongest_region
from logitcache.extras.report.samples import top_classes
from logitcache.extras.soft_tree import SoftTree

# B batch, I inner nodes, L leaves; nodes are numbered level by level from the root, leaves after the inner nodes

MAX_INNER = 15
"""Inner nodes that are drawn; of a larger tree, those that most samples reach."""
TOP = 2
"""Classes named for a leaf."""
LEAF_NAME = 10
"""Characters of a class name in a leaf."""
COLUMN, ROW, SIDE = 62, 104, 48
"""Of the drawing, in pixels: distance between leaves, distance between levels, side of a filter."""
SIGNS = ((1, "+"), (-1, "\N{MINUS SIGN}"))


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

    @property
    def signs(self) -> list[tuple[float, float, str]]:
        """(x, y, sign) in pixels of the regions where the filter's weights of each sign are largest."""
        return [
            (self.left + SIDE * (region.column - 1) / 3, self.top + SIDE * (region.row - 1) / 3, text)
            for (_, text), region in zip(SIGNS, self.regions(), strict=True)
            if region is not None
        ]

    def regions(self) -> list[Region | None]:
        """Where the filter's weights of each sign are largest."""
        return [None if self.filter is None else strongest_region(self.filter, sign=sign) for sign, _ in SIGNS]

    def lines(self, names: ClassNames) -> list[str]:
        """The text inside the node."""
        if self.kind == "inner":
            return [] if self.filter is not None else [f"node {self.number}"]
        classes = [f"{_cut(names[number])}: {percent(share, 0)}" for number, share in self.top_classes]
        return [counted(self.leaves, "leaf", "leaves"), *classes[:1]] if self.kind == "rest" else classes


@dataclass(frozen=True)
class Step:
    """One decision on the path of a sample."""

    node: int
    right: bool
    probability: float
    """Of this direction, given that the sample reaches the node."""


@dataclass(frozen=True)
class TreePath:
    """The most probable path of a sample."""

    steps: list[Step]
    leaf: int
    probability: float
    """Of the whole path."""
    top_classes: list[tuple[int, float]]
    """Of its leaf."""

    @property
    def nodes(self) -> list[int]:
        """The numbers of its nodes, from the root to the leaf."""
        return [*(step.node for step in self.steps), self.leaf]

    def lines(self, names: ClassNames) -> list[str]:
        """One line per decision, then the prediction of the leaf."""
        return [
            *(
                f"node {step.node}: {'right' if step.right else 'left'}, {percent(step.probability, 1)}"
                for step in self.steps
            ),
            f"leaf {self.leaf}, reached with {percent(self.probability, 1)}, predicts "
            f"{_classes(self.top_classes, names)}",
        ]


@dataclass(frozen=True)
class TreeDrawing:
    """A soft tree with the paths of some samples."""

    id: str
    title: str
    caption: str
    nodes: list[Node]
    paths: Sequence[tuple[object, TreePath]]
    """(`ChosenSample`, its path)."""
    table: Table

    @property
    def width(self) -> float:
        """Of the drawing, in pixels."""
        return max(node.left for node in self.nodes) + COLUMN / 2

    @property
    def height(self) -> float:
        """Of the drawing, in pixels."""
        return max(node.top for node in self.nodes) + SIDE / 2 + 22

    @property
    def edges(self) -> list[tuple[float, float, float, float, int]]:
        """(x, y, x, y, number of the child) of each line from parent to child."""
        by_number = {node.number: node for node in self.nodes}
        pairs = [(by_number[node.parent], node) for node in self.nodes if node.parent is not None]
        return [
            (parent.left, parent.top + SIDE / 2, node.left, node.top - SIDE / 2, node.number) for parent, node in pairs
        ]


def draw_tree(
    id: str,
    title: str,
    tree: SoftTree,
    use: np.ndarray,
    paths: Sequence[tuple[object, TreePath]],
    names: ClassNames,
) -> TreeDrawing:
    """A tree as a drawing with a caption and a table of its nodes.

    Args:
        tree: in evaluation mode.
        use: of each node, from `node_use`.
        paths: (sample, its path).
    """
    nodes = drawn_nodes(tree, use)
    caption = (
        f"{counted(2**tree.depth - 1, 'inner node')} in {counted(tree.depth, 'level')} and "
        f"{counted(2**tree.depth, 'leaf', 'leaves')}; "
    )
    if sum(node.kind == "inner" for node in nodes) == 2**tree.depth - 1:
        caption += "all are drawn. "
    else:
        caption += f"the {MAX_INNER} inner nodes that most samples reach are drawn; dashed boxes are subtrees. "
    if tree.predict == "mixture":
        caption += "The prediction is the mean of all leaves, weighted by path probability; only one path is shown."
    else:
        caption += "The prediction is that of the leaf at the end of the most probable path."
    return TreeDrawing(id, title, caption, nodes, paths, _table(nodes, names))


def node_use(tree: SoftTree, inputs: Tensor) -> np.ndarray:
    """Mean probability of reaching each node over some inputs, float64 (I + L,)."""
    sums = np.zeros(2 ** (tree.depth + 1) - 1)
    with torch.inference_mode():
        for batch in torch.split(inputs, 256):
            log_paths = tree.log_path_probabilities(tree.decisions(batch))
            sums += torch.cat(log_paths, dim=1).double().exp().sum(dim=0).numpy()
    return np.asarray(sums / max(len(inputs), 1))


def _leaf_probabilities(tree: SoftTree) -> np.ndarray:
    """The distribution of every leaf, float64 (L, C)."""
    return tree.leaves.detach().double().softmax(dim=1).numpy()


def most_probable_paths(tree: SoftTree, inputs: Tensor) -> list[TreePath]:
    """The path to the most probable leaf of each input."""
    with torch.inference_mode():
        decisions_BI = tree.decisions(inputs)
        right_BI = decisions_BI.double().sigmoid().numpy()
        log_leaves_BL = tree.log_path_probabilities(decisions_BI)[-1].double().numpy()
    first_leaf = 2**tree.depth - 1
    p_LC = _leaf_probabilities(tree)
    found = []
    for right_I, log_leaves_L in zip(right_BI, log_leaves_BL, strict=True):
        chosen = int(log_leaves_L.argmax())
        steps: list[Step] = []
        node = first_leaf + chosen
        while node:
            parent, right = (node - 1) // 2, node % 2 == 0
            steps.insert(0, Step(parent, right, float(right_I[parent] if right else 1 - right_I[parent])))
            node = parent
        probability = float(np.exp(log_leaves_L[chosen]))
        found.append(TreePath(steps, first_leaf + chosen, probability, top_classes(p_LC[chosen], TOP)))
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
        below = np.fromiter(_leaves_below(node, num_inner), dtype=np.int64)
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


def _leaves_below(node: int, num_inner: int) -> Iterator[int]:
    first = last = node
    while first < num_inner:
        first, last = 2 * first + 1, 2 * last + 2
    return iter(range(first, last + 1))


def _cut(name: str) -> str:
    return name if len(name) <= LEAF_NAME else f"{name[: LEAF_NAME - 1]}…"


def _classes(found: list[tuple[int, float]], names: ClassNames) -> str:
    return ", ".join(f"{names[number]} with {percent(probability, 0)}" for number, probability in found)


def _table(nodes: list[Node], names: ClassNames) -> Table:
    """A row for each drawn node."""
    use = {node.number: node.use for node in nodes}
    rows = []
    for node in nodes:
        right = use.get(2 * node.number + 2) if node.kind == "inner" and node.use > 0 else None
        kind = {"inner": "node", "leaf": "leaf", "rest": "subtree"}[node.kind]
        rows.append(
            [
                f"{kind} {node.number}",
                "root" if node.parent is None else f"{'left' if node.number % 2 else 'right'} of node {node.parent}",
                percent(node.use, 1),
                MISSING if right is None else percent(right / node.use, 1),
                *(MISSING if region is None else region.name for region in node.regions()),
                _classes(node.top_classes, names),
            ]
        )
    columns = [
        "node",
        "position",
        "reached by",
        "goes right",
        "largest weights (+)",
        "smallest weights (−)",
        "predicts",
    ]
    return Table(columns, rows)
