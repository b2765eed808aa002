"""Students that start from their teacher's weights: what goes where, what is refused, and that a run resumes."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from logitcache.catalog.nets import CNN, MLP, CIFARResNet
from logitcache.config.schema import Pipeline
from logitcache.errors import UsageError
from logitcache.extras.initialisation import Init, init_from_config, initialise, taylor_importance
from logitcache.stages.cache_teacher import cache_teacher
from logitcache.stages.train_student import Experiment, train_students
from logitcache.stages.train_teacher import train_teacher
from tests.conftest import ALL_DIGITS
from tests.integration.test_stages import log, run_for, same, weights

Make = Callable[..., Pipeline]
IMAGES = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def seeded(make: Callable[[], nn.Module], seed: int) -> nn.Module:
    """A net whose norms are not at their starting values."""
    torch.manual_seed(seed)
    net = make().eval()
    with torch.no_grad():
        for value in net.state_dict().values():
            if value.is_floating_point():
                value += 0.1 * torch.rand_like(value)
    return net


def mlp(*hidden: int, seed: int = 0) -> nn.Module:
    return seeded(lambda: MLP((1, 8, 8), 10, hidden), seed)


def cnn(*widths: int, seed: int = 0) -> nn.Module:
    return seeded(lambda: CNN((1, 8, 8), 10, widths), seed)


def resnet(depth: int, width: int, seed: int = 0) -> nn.Module:
    return seeded(lambda: CIFARResNet((1, 8, 8), 10, depth, width), seed)


class Stream(nn.Module):
    """A residual net with layer norms: a stem, blocks that add to its stream, a head."""

    def __init__(self, width: int, inner: int, depth: int = 3) -> None:
        super().__init__()
        self.stem = nn.Linear(64, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, inner), nn.GELU(), nn.Linear(inner, width))
            for _ in range(depth)
        )
        self.head = nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        stream = self.stem(images.flatten(1))
        for block in self.blocks:
            stream = stream + block(stream)
        logits: Tensor = self.head(stream)
        return logits


class Flattened(nn.Module):
    """A convolution whose feature map is flattened before the head."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, width, 3)
        self.head = nn.Linear(width * 36, 10)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.conv(images).relu().flatten(1))
        return logits


@pytest.mark.parametrize("width", ["none", "uniform", "random"])
@pytest.mark.parametrize(
    "make",
    [lambda seed: mlp(12, seed=seed), lambda seed: cnn(6, 8, seed=seed), lambda seed: resnet(14, 4, seed=seed)],
    ids=["mlp", "cnn", "resnet"],
)
def test_a_student_like_its_teacher_takes_everything(make: Callable[[int], nn.Module], width: str) -> None:
    teacher, student = make(0), make(1)
    before = student(IMAGES)
    report = initialise(student, teacher, Init(width=width), seed=0)

    assert not torch.equal(before, teacher(IMAGES))
    assert torch.equal(student(IMAGES), teacher(IMAGES))
    assert all(each.source == each.parameter for each in report.origins)
    assert {} == report.channels


def test_every_other_block() -> None:
    teacher, student = Stream(16, 8, depth=5), Stream(16, 8, depth=3)
    report = initialise(student, teacher, Init(layers="every_other"), seed=0)
    sources = {each.parameter: each.source for each in report.origins}

    for mine, theirs in enumerate([0, 2, 4]):
        assert f"blocks.{theirs}.1.weight" == sources[f"blocks.{mine}.1.weight"]
        assert torch.equal(student.blocks[mine][3].weight, teacher.blocks[theirs][3].weight)  # type: ignore[index]
    assert torch.equal(student.head.weight, teacher.head.weight)


@pytest.mark.parametrize(
    ("layers", "blocks"),
    [
        ({"first": 6}, None),
        ({"blocks": [0, 2, 3, 5, 6, 8]}, [0, 2, 3, 5, 6, 8]),
        ({"blocks": {"body": [0, 1, 3, 4, 6, 7]}}, [0, 1, 3, 4, 6, 7]),
    ],
    ids=["first", "blocks", "blocks of a place"],
)
def test_blocks_of_a_resnet_by_number(layers: dict[str, Any], blocks: list[int] | None) -> None:
    """The first six of nine blocks end in the second stage, and so don't fit."""
    teacher, student = resnet(20, 4), resnet(14, 4, seed=1)
    if blocks is None:
        with pytest.raises(
            UsageError,
            match=r"the student's body\.2\.conv1\.weight is \(8, 4, 3, 3\), the teacher's body\.2\.conv1\.weight is \(4, 4, 3, 3\); select channels",
        ):
            initialise(student, teacher, Init(layers=layers), seed=0)
        return
    initialise(student, teacher, Init(layers=layers), seed=0)

    for mine, theirs in enumerate(blocks):
        assert same(student.body[mine].state_dict(), teacher.body[theirs].state_dict())  # type: ignore[index]


def test_first_blocks_and_a_submodel() -> None:
    teacher = nn.ModuleDict({"trunk": Stream(16, 8, depth=4), "other": nn.Linear(3, 3)})
    student = Stream(16, 8, depth=2)
    report = initialise(student, teacher, Init(layers={"first": 2}, submodel="trunk"), seed=0)

    assert same(student.blocks[1].state_dict(), teacher["trunk"].blocks[1].state_dict())  # type: ignore[index]
    assert all(each.source == f"trunk.{each.parameter}" for each in report.origins)

    student, teacher_net = Stream(16, 8), Stream(16, 8)
    fresh = student.head.weight.detach().clone()
    report = initialise(student, teacher_net, Init(submodel="blocks.1"), seed=0)
    assert {"blocks.1"} == {each.parameter[:8] for each in report.origins if each.source}
    assert torch.equal(fresh, student.head.weight)
    (told,) = [line for line in report.as_table().splitlines() if line.startswith("head.weight")]
    assert ["head.weight", "10x16", "fresh", "-"] == told.split()


def test_evenly_spaced_channels_by_hand() -> None:
    """floor(i * 6 / 4) = 0, 1, 3, 4 of the hidden layer: its rows, its bias, and the columns that read it."""
    teacher, student = mlp(6), mlp(4, seed=1)
    report = initialise(student, teacher, Init(width="uniform"), seed=0, inputs=IMAGES)
    theirs, mine, kept = teacher.state_dict(), student.state_dict(), [0, 1, 3, 4]

    assert torch.equal(theirs["body.0.weight"][kept], mine["body.0.weight"])
    assert torch.equal(theirs["body.0.bias"][kept], mine["body.0.bias"])
    assert torch.equal(theirs["head.weight"][:, kept], mine["head.weight"])
    assert torch.equal(theirs["head.bias"], mine["head.bias"])
    assert ({"body.0": kept}, "chain") == (report.channels, report.structure)
    assert "[body.0] = 0, 1, 3, 4" in report.as_table()
    assert ["body.0", None] == json.loads(report.as_json())["parameters"][0]["channels"]


def test_the_largest_channels_of_a_chain_by_hand() -> None:
    teacher, student = cnn(4, 5), cnn(2, 3, seed=1)
    state = teacher.state_dict()
    for name, order in (("body.0.weight", [3.0, 1.0, 2.0, 0.5]), ("body.4.weight", [0.1, 5.0, 0.2, 4.0, 3.0])):
        state[name].copy_(torch.tensor(order)[:, None, None, None].expand_as(state[name]))
    report = initialise(student, teacher, Init(width="magnitude"), seed=0, inputs=IMAGES)
    mine = student.state_dict()

    assert {"body.0": [0, 2], "body.4": [1, 3, 4]} == report.channels
    assert torch.equal(state["body.4.weight"][[1, 3, 4]][:, [0, 2]], mine["body.4.weight"])
    assert torch.equal(state["body.1.running_var"][[0, 2]], mine["body.1.running_var"])
    assert torch.equal(state["head.weight"][:, [1, 3, 4]], mine["head.weight"])


def test_a_flattened_feature_map_keeps_whole_channels() -> None:
    teacher, student = seeded(lambda: Flattened(4), 0), seeded(lambda: Flattened(2), 1)
    initialise(student, teacher, Init(width="uniform"), seed=0, inputs=IMAGES)
    theirs = teacher.state_dict()["head.weight"].reshape(10, 4, 36)

    assert torch.equal(theirs[:, [0, 2]].reshape(10, 72), student.state_dict()["head.weight"])


@pytest.mark.parametrize("width", ["random", "magnitude"])
def test_channels_that_do_nothing_are_left_out_of_a_chain_without_any_loss(width: str) -> None:
    """The teacher is a narrow net with dead channels, so magnitude finds that net again; chance does not."""
    narrow, teacher, student = cnn(3, 4), cnn(6, 7), cnn(3, 4, seed=2)
    live = {"body.0": [1, 2, 5], "body.4": [0, 2, 3, 6]}
    state, small = teacher.state_dict(), narrow.state_dict()
    for value in state.values():
        if value.is_floating_point():
            value.zero_()
    for name, group, reads in (
        ("body.0", "body.0", None),
        ("body.1", "body.0", None),
        ("body.4", "body.4", "body.0"),
        ("body.5", "body.4", None),
        ("head", None, "body.4"),
    ):
        for entry in [each for each in small if each.startswith(f"{name}.")]:
            value = small[entry]
            if value.ndim and group is not None:
                rows = torch.tensor(live[group])
                if reads and value.ndim > 1:
                    state[entry][rows[:, None], torch.tensor(live[reads])] = value
                else:
                    state[entry][rows] = value
            elif reads and value.ndim > 1:
                state[entry][:, live[reads]] = value
            else:
                state[entry].copy_(value)
    for name in ("body.1", "body.5"):
        state[f"{name}.running_var"].clamp_(min=0.01)
    report = initialise(student, teacher, Init(width=width), seed=3, inputs=IMAGES)
    unchanged = bool((student(IMAGES) - teacher(IMAGES)).abs().max() < 1e-5)

    assert (width == "magnitude") == unchanged == (report.channels == live)


def test_the_stream_of_a_residual_net_is_sliced_as_one() -> None:
    """It is no chain, and permuting proves so; one choice for all that is as wide as the stream holds."""
    teacher, student = seeded(lambda: Stream(16, 12), 0), seeded(lambda: Stream(8, 6), 1)
    report = initialise(student, teacher, Init(width="random"), seed=0, inputs=IMAGES)
    stream, inner = report.channels["16 -> 8"], report.channels["12 -> 6"]

    assert "width" == report.structure
    assert torch.equal(teacher.stem.weight[stream], student.stem.weight)  # type: ignore[index]
    for mine, theirs in zip(student.blocks, teacher.blocks, strict=True):  # type: ignore[arg-type]
        assert torch.equal(theirs[1].weight[inner][:, stream], mine[1].weight)
        assert torch.equal(theirs[3].weight[stream][:, inner], mine[3].weight)
    assert torch.equal(teacher.head.weight[:, stream], student.head.weight)  # type: ignore[index]


def test_padded_shortcuts_are_refused_but_for_even_spacing() -> None:
    """Channel c of 8 goes on as channel c of 16, so choices of the two widths depend on each other."""
    teacher, student = resnet(14, 8), resnet(14, 4, seed=1)
    with pytest.raises(
        UsageError,
        match=r"(?s)can't select channels of this network, starting at stem\.weight, \(8, 1, 3, 3\) in the teacher and \(4, 1, 3, 3\) in the student.*Use init\.width: uniform",
    ):
        initialise(student, teacher, Init(width="magnitude"), seed=0, inputs=IMAGES)
    report = initialise(student, teacher, Init(width="uniform"), seed=0, inputs=IMAGES)

    assert {"8 -> 4": [0, 2, 4, 6], "16 -> 8": [0, 2, 4, 6, 8, 10, 12, 14]} == {
        name: report.channels[name] for name in ("8 -> 4", "16 -> 8")
    }


def mobilenet(width: float) -> nn.Module:
    import torchvision

    return torchvision.models.mobilenet_v2(num_classes=10, width_mult=width)  # type: ignore[no-any-return]


def transformer(width: int) -> nn.Module:
    import torchvision

    return torchvision.models.VisionTransformer(32, 16, 2, 2, width, 2 * width, num_classes=10)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("teacher", "student", "proven"),
    [(lambda: mobilenet(1.0), lambda: mobilenet(0.5), True), (lambda: transformer(32), lambda: transformer(16), False)],
    ids=["mobilenet", "transformer"],
)
def test_nets_of_torchvision(teacher: Callable[[], nn.Module], student: Callable[[], nn.Module], proven: bool) -> None:
    """Attention keeps queries, keys and values in one matrix, whose parts must be chosen alike: evenly, or not at all."""
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    for width in ("uniform", "magnitude"):
        if width == "magnitude" and not proven:
            with pytest.raises(UsageError, match="can't select channels of this network"):
                initialise(student(), teacher(), Init(width=width), seed=0, inputs=images)
        else:
            report = initialise(student(), teacher(), Init(width=width), seed=0, inputs=images)
            assert "width" == report.structure
            assert all(each.source for each in report.origins)


def test_random_channels_depend_on_the_seed_only() -> None:
    chosen = [
        initialise(mlp(8, seed=seed), mlp(32), Init(width="random"), seed=seed, inputs=IMAGES).channels["body.0"]
        for seed in (5, 5, 6)
    ]

    assert chosen[0] == chosen[1] != chosen[2]


def batches() -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    for _ in range(3):
        yield torch.rand(5, 1, 8, 8, generator=generator), torch.randint(0, 10, (5,), generator=generator)


def test_importance_is_what_finite_differences_say() -> None:
    """|w dL/dw| in float64, every weight of the head moved by hand."""
    teacher = mlp(6).double()
    worth = taylor_importance(teacher, ((images.double(), targets) for images, targets in batches()))
    weight = teacher.head.weight
    expected, step = torch.zeros_like(weight), 1e-6
    for images, targets in batches():
        for place in range(weight.numel()):
            losses = []
            for sign in (1, -1):
                with torch.no_grad():
                    weight.view(-1)[place] += sign * step  # type: ignore[operator]
                    losses.append(nn.functional.cross_entropy(teacher(images.double()), targets))
                    weight.view(-1)[place] -= sign * step  # type: ignore[operator]
            slope = (losses[0] - losses[1]) / (2 * step)
            expected.view(-1)[place] += (weight.view(-1)[place] * slope).abs().detach() / 3  # type: ignore[operator]

    assert (worth["head.weight"] - expected).abs().max() < 1e-7
    assert expected.abs().max() > 1e-4


def test_the_most_important_channels_are_those_of_a_brute_force_sum() -> None:
    teacher, student = mlp(6), mlp(3, seed=1)
    worth = taylor_importance(teacher, batches())
    report = initialise(student, teacher, Init(width="importance"), seed=0, inputs=IMAGES, importance=lambda: worth)
    scores = [float(worth["body.0.weight"][unit].sum() + worth["body.0.bias"][unit]) for unit in range(6)]

    assert sorted(sorted(range(6), key=lambda unit: -scores[unit])[:3]) == report.channels["body.0"]
    assert all(parameter.grad is None for parameter in teacher.parameters())


@pytest.mark.parametrize(
    ("student", "teacher", "init", "message"),
    [
        (lambda: mlp(4), lambda: mlp(6), Init(), r"the student's body\.0\.weight is \(4, 64\), the teacher's body\.0\.weight is \(6, 64\); select channels with init\.width"),
        (lambda: mlp(8), lambda: mlp(6), Init(width="uniform"), r"body\.0\.weight is \(8, 64\).* is \(6, 64\): a student can be narrower than its teacher, not wider"),
        (lambda: mlp(4), lambda: mlp(6), Init(width="importance"), "importance needs data, and none was given"),
        (lambda: mlp(4), lambda: cnn(4), Init(width="uniform"), r"the student's body\.0\.weight is \(4, 64\).*\(4, 1, 3, 3\): the numbers of dimensions differ"),
        (lambda: Stream(8, 4, 2), lambda: Stream(8, 4, 5), Init(layers="every_other"), r"selects 3 of the teacher's 5 blocks at blocks \(\[0, 2, 4\]\), but the student has 2 there"),
        (lambda: Stream(8, 4, 2), lambda: Stream(8, 4, 5), Init(layers={"blocks": [0, 7]}), r"the teacher has no blocks\.7; its numbers there are \[0, 1, 2, 3, 4\]"),
        (lambda: mlp(4), lambda: mlp(4), Init(submodel="stages.1"), r"no parameters below init\.submodel 'stages\.1'"),
        (lambda: nn.Linear(64, 10), lambda: mlp(4), Init(), r"no parameter of the student has the same name as one of the teacher: the student has weight, bias"),
    ],
    ids=["narrower", "wider", "importance", "kinds", "every other", "block", "submodel", "names"],
)  # fmt: skip
def test_what_can_not_fit_is_refused_by_name_and_shape(
    student: Callable[[], nn.Module], teacher: Callable[[], nn.Module], init: Init, message: str
) -> None:
    net = student()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(UsageError, match=message):
        initialise(net, teacher(), init, seed=0, inputs=IMAGES)

    assert same(before, net.state_dict())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("imagenet", "init must be `teacher`, or have `from: teacher`"),
        ({"from": "teacher", "layer": "first"}, "any of layers, width, submodel, calibration"),
        (
            {"from": "teacher", "width": "best"},
            "init.width must be one of none, uniform, random, magnitude, importance, not 'best'",
        ),
        ({"from": "teacher", "layers": {"first": 0}}, "init.layers must be all, every_other"),
        ({"from": "teacher", "layers": {"blocks": []}}, "init.layers must be all, every_other"),
        ({"from": "teacher", "calibration": 0}, "init.calibration must be a number of samples"),
    ],
)
def test_a_wrong_init_says_what_is_expected(config: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message.replace(".", r"\.")):
        init_from_config(config)


def test_the_configuration_reads_back() -> None:
    init = Init(layers={"blocks": {"layer1": [0, 2]}}, width="importance", submodel="trunk", calibration=64)

    assert init == init_from_config(init.config())
    assert Init() == init_from_config("teacher")


TRAINED = ["teacher.weights=trained", "teacher.args={hidden: [32]}", "teacher.train={epochs: 4}"]


@pytest.mark.parametrize("width", ["magnitude", "importance"])
def test_a_run_says_where_its_parameters_came_from_and_starts_there(tiny: Make, tmp_path: Path, width: str) -> None:
    pipeline = tiny(*TRAINED, f"students.small.init={{from: teacher, width: {width}, calibration: 100}}")
    train_teacher(pipeline)
    cache_teacher(pipeline)
    job = Experiment(pipeline).job(pipeline.student("small"), 0)
    started = {name: value.clone() for name, value in job.model.state_dict().items()}
    train_students(pipeline, ["small"])
    folder = tmp_path / "runs/small/seed-0"
    told = json.loads((folder / "init.json").read_text())
    teacher = weights(tmp_path / "runs/teacher")

    assert torch.equal(teacher["body.0.weight"][told["channels"]["body.0"]], started["body.0.weight"])
    assert "body.0.weight  8x64   body.0.weight  32x64  [body.0], all" in (folder / "init.txt").read_text()
    assert "started_from: mlp@" in (folder / "run.yaml").read_text()
    with pytest.raises(
        UsageError, match=r"contains a run of another configuration \(differs in student.init, started_from\)"
    ):
        train_students(tiny(*TRAINED), ["small"])
    with pytest.raises(UsageError, match=r"contains a run of another configuration \(differs in student.init.width\)"):
        train_students(
            tiny(*TRAINED, "students.small.init={from: teacher, width: random, calibration: 100}"), ["small"]
        )


def test_a_head_start_shows(tiny: Make, tmp_path: Path) -> None:
    """A student like its teacher, without a step of training, is as right as the teacher."""
    pipeline = tiny(*ALL_DIGITS, *TRAINED, "students.small.args={hidden: [32]}", "students.small.init=teacher")
    result = train_teacher(pipeline)
    cache_teacher(pipeline)
    job = Experiment(pipeline).job(pipeline.student("small"), 0)

    assert job.test is not None
    assert result["accuracy"] == job.test.measure(job.model, job.device)["accuracy"] > 0.7


def test_a_teacher_without_weights_says_so(tiny: Make) -> None:
    cache_teacher(tiny())
    with pytest.raises(UsageError, match="run `logitcache train-teacher` first"):
        train_students(tiny("teacher.weights=trained", "students.small.init=teacher"), ["small"])
    with pytest.raises(UsageError, match="starts from `weights` or from its teacher"):
        tiny("students.small.init=teacher", "students.small.weights=x.safetensors")


def test_a_killed_training_that_started_from_its_teacher_resumes_exactly(
    tiny: Make, tmp_path: Path, forks: BaseContext
) -> None:
    overrides = [
        "students.small.init={from: teacher, width: random}",
        "students.small.sample_weights=teacher_agreement",
        "students.small.sampler=class_balanced",
        "train.epochs=6",
        "train.checkpoint_steps=3",
    ]
    cache_teacher(tiny())
    train_students(tiny(*overrides), ["small"])
    run_for(forks, int)
    instants, kills = random.Random(11), 0
    disturbed = tiny(*overrides, f"runs.path={tmp_path}/disturbed")
    for _ in range(4):
        kills += run_for(forks, train_students, disturbed, ["small"], kill_after=instants.uniform(0.3, 1.5)) < 0
    train_students(disturbed, ["small"])
    whole, pieces = tmp_path / "runs/small/seed-0", tmp_path / "disturbed/small/seed-0"

    assert kills > 0
    assert same(weights(whole), weights(pieces))
    assert log(whole) == log(pieces)
    assert (whole / "init.json").read_text() == (pieces / "init.json").read_text()
