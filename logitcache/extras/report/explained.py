"""What makes decisions understandable: trees drawn, decisions side by side, agreement by class."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from logitcache.extras.report import charts, measures
from logitcache.extras.report.attribution import signed_picture, strongest
from logitcache.extras.report.decisions import MAX_STUDENTS, ChosenSample, Decisions, inputs_of
from logitcache.extras.report.figures import DrawnNode, DrawnPath, Figure, Section, Table, TreeDrawing
from logitcache.extras.report.students import Compared, RunsFound, Student
from logitcache.extras.report.trees import COLUMN, MAX_INNER, SIDE, Node, TreePath, drawn_nodes, paths
from logitcache.extras.report.words import ClassNames, count, counted, decimal, name_of, percent
from logitcache.extras.soft_tree import SoftTree

# C classes, M rows, S seeds

LOWEST = 20
"""Classes shown, those of the least agreement."""
MAX_TREES = 4
LEAF_NAME = 10
"""Characters of a class's name in a leaf."""


def agreement_figure(found: RunsFound, drawn: Sequence[str], names: ClassNames, num_classes: int) -> Figure | None:
    """How often each student's first class is the teacher's, by the teacher's class.

    Args:
        found: with what was measured.
        drawn: names of the students that are drawn, in the order of their colours.
        names: of the classes.
        num_classes: C.
    """
    students = [(student, compared) for student, compared in found.compared() if student.name in drawn]
    rows = found.common_rows()
    if not students or not len(rows):
        return None
    label_M = np.array([found.teacher_answers[row][0] for row in rows.tolist()])
    counts_C = np.bincount(label_M, minlength=num_classes)
    seen = np.flatnonzero(counts_C)
    by_student = np.stack([_by_class(compared, rows, label_M, num_classes) for _, compared in students])
    mean_C = by_student.mean(axis=0)
    lowest = seen[np.argsort(mean_C[seen], kind="stable")][:LOWEST].tolist()
    points = [
        {"name": names[number], "student": student.name, "value": float(by_student[place, number]),
         "rows": int(counts_C[number])}
        for number in lowest
        for place, (student, _) in enumerate(students)
    ]  # fmt: skip
    cells = [
        [names[number], count(int(counts_C[number])), *(percent(float(share)) for share in by_student[:, number])]
        for number in lowest
    ]
    worst, best = lowest[0], int(seen[np.argmax(mean_C[seen])])
    caption = (
        f"On {count(len(rows))} rows of one cached view, mean over seeds; classes are the teacher's, the least "
        f"agreement first. Over all students, {names[worst]} is met least, on {percent(float(mean_C[worst]))} of "
        f"{counted(int(counts_C[worst]), 'row', 'rows')}; {names[best]} most, on {percent(float(mean_C[best]))} of "
        f"{count(int(counts_C[best]))}."
    )
    title = "Agreement with the teacher by class"
    if len(lowest) < len(seen):
        title = f"Agreement by class: the lowest {len(lowest)} of {count(len(seen))}"
    student_names = [student.name for student, _ in students]
    spec = charts.shares_by_class(points, students=drawn, title="agreement with the teacher")
    return Figure("agreement-classes", title, caption, spec, Table(["class", "rows", *student_names], cells), "half")


def _by_class(compared: Compared, rows: np.ndarray, label_M: np.ndarray, num_classes: int) -> np.ndarray:
    """Agreement by the teacher's class, float64 (C,), the mean over seeds; NaN for a class that was not met."""
    predicted_SM = compared.predicted[:, np.searchsorted(compared.rows, rows)]
    shares = [measures.class_accuracy(label_M, predicted_M == label_M, num_classes)[0] for predicted_M in predicted_SM]
    return np.asarray(np.mean(shares, axis=0))


def decision_section(decisions: Decisions | None, found: RunsFound) -> Section:
    """Teacher and students side by side on some samples."""
    section = Section("decisions", "Decisions side by side")
    if not found.compared():
        section.lead.append("No student could be compared with the teacher, so there are no decisions to show.")
        return section
    if decisions is None:
        section.lead.append("For decisions with their images, name the pipeline that has the data: --data PIPELINE.")
        return section
    section.lead.append(
        f"What the teacher and {counted(len(decisions.students), 'student', 'students')} (the best, at most "
        f"{MAX_STUDENTS}; first seed) say of samples of one cached view of the training samples, as the teacher saw "
        f"them, chosen among {count(len(found.common_rows()))} rows: those that most students see otherwise than the "
        "teacher, and some drawn at random on which all agree. Rows that mix two samples are taken only where there is "
        "nothing else."
    )
    if any(decision.picture for _, here in decisions.samples for decision in here):
        section.lead.append(
            "Maps are integrated gradients (Sundararajan et al. 2017, by captum) of the log-probability of each net's "
            "own decision, from a black image on: orange places speak for the decision, blue ones against it, and "
            "together they make up its log-probability beyond that of the black image, here to within "
            f"{decimal(decisions.largest_gap)} nats. Each map has a scale of its own."
        )
    if decisions.without_map:
        section.lead.append(f"Without maps: {name_of('; '.join(decisions.without_map), 600)}.")
    disputed = [sample for sample in decisions.samples if sample[0].dissenters]
    agreed = [sample for sample in decisions.samples if not sample[0].dissenters]
    groups = [("Where students and teacher disagree", disputed), ("Where all agree", agreed)]
    section.decisions = [(title, samples) for title, samples in groups if samples]
    return section


def tree_section(found: RunsFound, chosen: list[ChosenSample], names: ClassNames) -> Section | None:
    """Every student that is a soft tree, drawn; None where there is none."""
    trees = [(student, compared) for student, compared in found.compared() if compared.reached is not None]
    if not trees:
        return None
    section = Section("trees", "Trees to follow")
    section.lead.append(
        "Students that are soft decision trees (Frosst and Hinton 2017), first seed. A node shows its filter: where it "
        "is orange (strongest at +), a brighter pixel sends an image to the right, where it is blue (strongest at −) "
        "to the left. A leaf shows the distribution that it holds. Shares are of the "
        f"{count(found.agreement_rows)} rows of one cached view that students were compared on."
    )
    if len(trees) > MAX_TREES:
        section.lead.append(f"The {MAX_TREES} best of {count(len(trees))} trees are drawn.")
    section.trees = [
        _drawing(f"tree-{number}", student, compared, found.view, chosen, names)
        for number, (student, compared) in enumerate(trees[:MAX_TREES])
    ]
    return section


def _drawing(
    id: str, student: Student, compared: Compared, view: int, chosen: list[ChosenSample], names: ClassNames
) -> TreeDrawing:
    tree = compared.load()
    assert isinstance(tree, SoftTree)
    assert compared.reached is not None
    nodes = drawn_nodes(tree, compared.reached)
    places = {node.number: node for node in nodes}
    num_inner = sum(node.kind == "inner" for node in nodes)
    caption = (
        f"{counted(2**tree.depth - 1, 'inner node', 'inner nodes')} in {counted(tree.depth, 'row', 'rows')} and "
        f"{counted(2**tree.depth, 'leaf', 'leaves')}; "
    )
    if num_inner == 2**tree.depth - 1:
        caption += "all are drawn. "
    else:
        caption += f"the {MAX_INNER} inner nodes that most samples reach are drawn, what lies below in dashed boxes. "
    if tree.predict == "mixture":
        caption += "It answers with the mean of all leaves, each weighed by its path; a path is the likeliest of many."
    else:
        caption += "It answers with the leaf at the end of the likeliest path."
    drawn = [_drawn_node(node, tree, names) for node in nodes]
    edges = [
        (places[node.parent].left, places[node.parent].top + SIDE / 2, node.left, node.top - SIDE / 2, node.number)
        for node in nodes
        if node.parent is not None
    ]
    shown_paths = []
    if chosen:
        inputs = inputs_of(compared.fitted, compared.config, view, [sample.row for sample in chosen])
        shown_paths = [
            DrawnPath(sample, [*(step.node for step in path.steps), path.leaf], _words(path, names))
            for sample, path in zip(chosen, paths(tree, inputs), strict=True)
        ]
    return TreeDrawing(
        id=id,
        title=student.name,
        caption=caption,
        width=max(node.left for node in nodes) + COLUMN / 2,
        height=max(node.top for node in nodes) + SIDE / 2 + 22,
        nodes=drawn,
        edges=edges,
        paths=shown_paths,
        table=_table(nodes, tree, names),
    )


def _filter(tree: SoftTree, node: int) -> np.ndarray | None:
    """A node's weights, float32 (H, W), channels summed; None where the input is no image."""
    if len(tree.input_shape) != 3:
        return None
    weights: torch.Tensor = tree.filters.weight.detach()[node]
    return weights.reshape(tree.input_shape).sum(dim=0).numpy()


def _drawn_node(node: Node, tree: SoftTree, names: ClassNames) -> DrawnNode:
    if node.kind != "inner":
        lines = [f"{_cut(names[number])}: {percent(probability, 0)}" for number, probability in node.top_classes]
        if node.kind == "rest":
            lines = [counted(node.leaves, "leaf", "leaves"), *lines[:1]]
        return DrawnNode(node, None, [], lines)
    values_HW = _filter(tree, node.number)
    if values_HW is None:
        return DrawnNode(node, None, [], [f"node {node.number}"])
    signs = []
    for sign, text in ((1, "+"), (-1, "\N{MINUS SIGN}")):
        place = strongest(values_HW, sign=sign)
        if place is not None:
            x = node.left + SIDE * ((place.column + 0.5) / 3 - 0.5)
            signs.append((x, node.top + SIDE * ((place.row + 0.5) / 3 - 0.5), text))
    return DrawnNode(node, signed_picture(values_HW), signs, [])


def _cut(name: str) -> str:
    return name if len(name) <= LEAF_NAME else f"{name[: LEAF_NAME - 1]}…"


def _words(path: TreePath, names: ClassNames) -> list[str]:
    """A path, a decision in each line, and what its leaf says."""
    lines = [
        f"node {step.node}: {'right' if step.right else 'left'}, {percent(step.probability, 1)}" for step in path.steps
    ]
    said = ", ".join(f"{names[number]} with {percent(probability, 0)}" for number, probability in path.top_classes)
    return [*lines, f"leaf {path.leaf}, reached with {percent(path.probability, 1)}, says {said}"]


def _table(nodes: list[Node], tree: SoftTree, names: ClassNames) -> Table:
    """Every node that is drawn, in words."""
    reached = {node.number: node.use for node in nodes}
    rows = []
    for node in nodes:
        right = reached.get(2 * node.number + 2) if node.kind == "inner" else None
        values_HW = _filter(tree, node.number) if node.kind == "inner" else None
        where = []
        for sign in (1, -1):
            place = None if values_HW is None else strongest(values_HW, sign=sign)
            where.append("–" if place is None else place.place)
        said = ", ".join(f"{names[number]} with {percent(probability, 0)}" for number, probability in node.top_classes)
        kind = {"inner": "node", "leaf": "leaf", "rest": "subtree"}[node.kind]
        rows.append(
            [
                f"{kind} {node.number}",
                "root" if node.parent is None else f"{'left' if node.number % 2 else 'right'} of node {node.parent}",
                percent(node.use, 1),
                "–" if right is None or node.use <= 0 else percent(right / node.use, 1),
                *where,
                said,
            ]
        )
    columns = ["node", "is", "reached by", "goes right", "right by light at (+)", "left by light at (−)", "below it"]
    return Table(columns, rows)
