"""The soft decision tree: its distribution and its penalty by hand, its training, its export."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from logitcache.catalog.models import build_model
from logitcache.config.schema import Pipeline
from logitcache.errors import UsageError
from logitcache.extras.soft_tree import SoftTree
from logitcache.extras.student_export import export_run, load_student
from logitcache.extras.student_export.onnx_model import OnnxModel, compare_with_torch, export_onnx
from logitcache.stages.cache_teacher import cache_teacher
from logitcache.stages.finished_student import open_student
from logitcache.stages.train_student import train_students
from logitcache.stages.train_teacher import train_teacher
from tests.durability.test_ranks import torchrun
from tests.integration.test_stages import log, same, weights
from tests.integration.test_train import EVERYTHING, train_until

Make = Callable[..., Pipeline]
TREE = [
    "students.small.model=soft_tree",
    "students.small.args={depth: 3, balance: 0.5}",
]


def tree(depth: int = 3, **arguments: Any) -> SoftTree:
    torch.manual_seed(depth)
    return SoftTree((1, 4, 4), 5, depth=depth, **arguments).double()


def images(count: int = 12) -> Tensor:
    return torch.randn(count, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def penalty_of(model: SoftTree) -> float:
    return float(model(images(), with_penalty=True)[1].detach())


def walked(model: SoftTree, image: np.ndarray) -> list[float]:
    """The probability of reaching every node, root first, by walking down from each to its children."""
    weight, bias = (value.detach().numpy() for value in (model.filters.weight, model.filters.bias))
    reached = [1.0]
    for node in range(len(bias)):
        right = 1 / (1 + math.exp(-model.beta * (float(weight[node] @ image.ravel()) + float(bias[node]))))
        reached += [reached[node] * (1 - right), reached[node] * right]
    return reached


def test_a_tree_of_one_decision_is_what_it_is_by_hand() -> None:
    """x = 2, w = 0.5, b = -0.25, beta = 2: right with sigmoid(1.5); leaves of (3/4, 1/4) and (1/5, 4/5)."""
    model = SoftTree((1,), 2, depth=1, beta=2.0)
    with torch.no_grad():
        model.filters.weight.fill_(0.5)
        model.filters.bias.fill_(-0.25)
        model.leaves.copy_(torch.tensor([[0.75, 0.25], [0.2, 0.8]]).log() + 3.0)
    right = 1 / (1 + math.exp(-1.5))
    expected = [(1 - right) * 0.75 + right * 0.2, (1 - right) * 0.25 + right * 0.8]

    assert expected == pytest.approx(model(torch.tensor([[2.0]])).exp()[0].tolist(), abs=1e-6)
    model.predict = "greatest_path"
    assert [0.2, 0.8] == pytest.approx(model.eval()(torch.tensor([[2.0]])).exp()[0].tolist(), abs=1e-6)
    assert expected == pytest.approx(model.train()(torch.tensor([[2.0]])).exp()[0].tolist(), abs=1e-6), (
        "training is by the mixture"
    )


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_the_mixture_is_that_of_a_walk_and_sums_to_one(depth: int) -> None:
    model = tree(depth, beta=1.7)
    found = model(images()).exp().detach().numpy()
    leaves = torch.softmax(model.leaves, dim=1).detach().numpy()
    expected = [np.array(walked(model, image.numpy())[-(2**depth) :]) @ leaves for image in images()]

    np.testing.assert_allclose(expected, found, rtol=1e-9)
    np.testing.assert_allclose(np.ones(12), found.sum(axis=1), rtol=1e-12)
    torch.testing.assert_close(torch.log_softmax(model(images()), dim=1), model(images()))


def test_greatest_path_gives_the_likeliest_leaf() -> None:
    model = tree(predict="greatest_path").eval()
    likeliest = [int(np.argmax(walked(model, image.numpy())[-8:])) for image in images()]

    assert len(set(likeliest)) > 1
    torch.testing.assert_close(torch.log_softmax(model.leaves, dim=1)[likeliest], model(images()))


def test_the_penalty_is_the_papers() -> None:
    """-λ 2^-row (log α / 2 + log(1 - α) / 2), a node at a time, with α over the whole batch."""
    model = tree(beta=3.0, balance=0.7)
    reached = np.array([walked(model, image.numpy()) for image in images()])
    expected = 0.0
    for node in range(7):
        alpha = reached[:, 2 * node + 2].sum() / reached[:, node].sum()
        strength = 0.7 * 2.0 ** -math.floor(math.log2(node + 1))
        expected -= strength * (0.5 * math.log(alpha) + 0.5 * math.log(1 - alpha))

    assert expected == pytest.approx(penalty_of(model), rel=1e-9)
    assert 0 == penalty_of(tree(balance=0.0))


def test_even_use_costs_least() -> None:
    model = tree(depth=1, balance=1.0)
    with torch.no_grad():
        model.filters.weight.zero_()
        penalties = []
        for bias in (-50.0, -1.0, 0.0, 1.0, 50.0):
            model.filters.bias.fill_(bias)
            penalties.append(penalty_of(model))

    assert math.log(2) == pytest.approx(min(penalties), rel=1e-12)
    assert 2 == int(np.argmin(penalties))
    assert all(math.isfinite(penalty) for penalty in penalties)


def test_gradients_of_log_probabilities_and_penalty_are_those_of_differences() -> None:
    model = tree(depth=2)
    parameters = dict(model.named_parameters())

    def outputs(*values: Tensor) -> tuple[Tensor, Tensor]:
        given = dict(zip(parameters, values, strict=True))
        found: tuple[Tensor, Tensor] = torch.func.functional_call(model, given, images(4), {"with_penalty": True})
        return found

    assert torch.autograd.gradcheck(outputs, tuple(parameters.values()))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"depth": 0}, "depth of a soft tree must be an integer from 1 to 10, not 0"),
        ({"depth": 40}, "from 1 to 10, not 40"),
        ({"beta": 0.0}, "beta > 0 and balance >= 0"),
        ({"balance": math.nan}, "beta > 0 and balance >= 0"),
        ({"predict": "best"}, "one of mixture, greatest_path, not 'best'"),
    ],
)
def test_what_makes_no_tree_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build_model("soft_tree", num_classes=5, input_shape=(1, 4, 4), args=arguments)


def test_the_penalty_is_part_of_every_step(tiny: Make, tmp_path: Path) -> None:
    """With a learning rate of next to nothing the losses differ by the penalty of a batch, whatever the loss is."""
    cache_teacher(tiny())
    for name, balance in (("with", 2.0), ("without", 0.0)):
        settings = [f"students.small.args={{depth: 3, balance: {balance}}}", f"runs.path={tmp_path}/{name}"]
        train_students(tiny(*TREE, *settings, "train.lr=1e-9", "train.epochs=1"), ["small"])
    added = [
        one["train_loss"] - other["train_loss"]
        for one, other in zip(*(log(tmp_path / f"{name}/small/seed-0") for name in ("with", "without")), strict=True)
        if "train_loss" in one
    ]
    # Fresh decisions are nearly even, which costs ln 2 in each of 3 rows: 1 node, 2 halves, 4 quarters.
    assert [2.0 * 3 * math.log(2)] * len(added) == pytest.approx(added, rel=0.05)


def test_a_tree_learns_real_digits(tiny: Make) -> None:
    """From the cached labels of a trained teacher; guessing is right on a tenth."""
    pipeline = tiny(
        "teacher.weights=trained", "teacher.train.epochs=6", *TREE, "students.small.args={depth: 4}", "train.epochs=8", "train.lr=0.03",
        "views.transform=clean", "views.count=1", "data.validation=0.2",
    )  # fmt: skip
    train_teacher(pipeline)
    cache_teacher(pipeline)
    (row,) = train_students(pipeline, ["small"])

    assert 0.6 < (row.validation_accuracy_mean or 0.0)


def test_a_killed_run_of_a_tree_ends_with_the_same_weights(tiny: Make, tmp_path: Path, forks: Any) -> None:
    """With everything else switched on, but batch norm."""
    cache_teacher(tiny())
    settings = [
        override for override in EVERYTHING if "students.small.model" not in override and "args" not in override
    ]
    whole, cut = (tiny(*settings, *TREE, f"runs.path={tmp_path}/{name}") for name in ("whole", "cut"))
    train_students(whole, ["small"])
    process = forks.Process(target=train_until, args=(cut, 7))
    process.start()
    process.join()
    assert -9 == process.exitcode
    train_students(cut, ["small"])
    folders = [tmp_path / f"{name}/small/seed-0" for name in ("whole", "cut")]

    assert same(weights(folders[0]), weights(folders[1]))
    assert log(folders[0]) == log(folders[1])


def test_trees_that_take_turns_end_as_they_would_alone(tiny: Make, tmp_path: Path) -> None:
    cache_teacher(tiny())
    other = ["students.labels.model=soft_tree", "students.labels.args={depth: 2}", "students.labels.loss=kl"]
    train_students(tiny(*TREE, *other, f"runs.path={tmp_path}/alone"))
    train_students(tiny(*TREE, *other, f"runs.path={tmp_path}/together", "together=true"))

    for name in ("small", "labels"):
        assert same(*(weights(tmp_path / f"{folder}/{name}/seed-0") for folder in ("alone", "together")))


def test_several_processes_train_a_tree(tiny: Make, tmp_path: Path) -> None:
    """Each takes the penalty over its own share of a batch, so the losses are nearly those of one."""
    cache_teacher(tiny())
    settings = [*TREE, "train.epochs=1", "train.checkpoint_steps=1", "students.small.samples=0.2"]
    train_students(tiny(*settings, f"runs.path={tmp_path}/one"), ["small"])
    done = torchrun(2, tiny(*settings, f"runs.path={tmp_path}/two"), "train-student", "--student=small")
    assert 0 == done.returncode, done.stderr
    losses = [
        [line["train_loss"] for line in log(tmp_path / f"{name}/small/seed-0") if "train_loss" in line]
        for name in ("one", "two")
    ]

    assert losses[0] == pytest.approx(losses[1], rel=0.01)


def test_an_exported_tree_says_what_it_says_in_torch(tiny: Make, tmp_path: Path) -> None:
    pipeline = tiny("teacher.weights=trained", "teacher.train.epochs=1", *TREE, "train.epochs=1")
    train_teacher(pipeline)
    cache_teacher(pipeline)
    train_students(pipeline, ["small"])
    run = tmp_path / "runs/small/seed-0"
    export_run(open_student(run), to="onnx")
    exported = export_run(open_student(run), to="safetensors")
    facts = json.loads((exported.folder / "product.json").read_text())
    model = SoftTree((1, 8, 8), 10, depth=3)
    model.load_state_dict(weights(run))
    inputs = torch.rand(7, 1, 8, 8)

    assert all(difference < 1e-4 for difference in facts["onnx"]["max_abs_difference"].values())
    assert torch.equal(model.eval()(inputs), load_student(exported.folder).model(inputs))


def test_a_tree_that_answers_by_its_greatest_path_is_the_same_in_onnx(tmp_path: Path) -> None:
    model = tree(predict="greatest_path").float().eval()
    export_onnx(model, images().float(), tmp_path / "model.onnx")
    differences = compare_with_torch(model, OnnxModel(tmp_path / "model.onnx", threads=1), images().float())

    assert all(difference < 1e-4 for difference in differences.values())
