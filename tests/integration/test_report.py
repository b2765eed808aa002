"""The report: its measures against other people's, its page in a browser, its refusals."""

from __future__ import annotations

import itertools
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.spatial.distance
import scipy.stats
import torch
import yaml
from sklearn.metrics import confusion_matrix, log_loss, top_k_accuracy_score

import logitcache
from logitcache.cache.reader import open_cache
from logitcache.config.schema import Pipeline
from logitcache.data.samples import SampleTable
from logitcache.data.views import Mixing, ViewPlan
from logitcache.errors import CorruptCache, IdentityMismatch, IncompleteCache, InvalidLogits, UsageError
from logitcache.extras.report import measures, teacher, write_report
from logitcache.extras.report.attribution import attributions
from logitcache.extras.report.decision_views import choose_samples
from logitcache.extras.report.formatting import ClassNames, decimal, plain_text
from logitcache.extras.report.page import json_for_script
from logitcache.extras.report.pictures import image_uri, signed_map_uri, strongest_region
from logitcache.extras.report.samples import disagreement
from logitcache.extras.report.student_figures import agreement_figure
from logitcache.extras.report.students import ComparedStudent, RunsFound, Student, find_runs
from logitcache.extras.report.trees import drawn_nodes, most_probable_paths, node_use
from logitcache.extras.soft_tree import SoftTree
from logitcache.stages.cache_teacher import cache_teacher
from logitcache.stages.matched_data import match_data
from logitcache.stages.train_student import Row, train_students
from logitcache.stages.train_teacher import train_teacher
from logitcache.train.loop import train
from logitcache.train.reliability import means_by, reliability
from tests.commands import logitcache as command
from tests.commands import refused
from tests.conftest import ALL_DIGITS, PICTURES, tiny_settings

CHROMIUM = Path("/usr/bin/chromium")
ARGUMENTS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
NASTY = "</script><script>window.pwned=1</script>\"'><img src=x onerror=window.pwned=1>\u2028\u202e{{7*7}}"
"""A name that breaks out of whatever does not escape it."""


# Measures


@pytest.fixture(scope="module")
def logits() -> tuple[np.ndarray, np.ndarray]:
    """Logits of 500 rows over 12 classes, and true classes that they are mostly right about."""
    random = np.random.default_rng(7)
    targets = random.integers(0, 12, 500)
    values = random.normal(size=(500, 12)).astype(np.float32)
    values[np.arange(500), targets] += 1.5
    return values, targets


@pytest.fixture(scope="module")
def answers(logits: tuple[np.ndarray, np.ndarray]) -> measures.Predictions:
    return measures.predictions_of(torch.from_numpy(logits[0]), logits[1], np.zeros(500, dtype=np.bool_))


def test_entropy_is_that_of_scipy(logits: Any, answers: measures.Predictions) -> None:
    expected = scipy.stats.entropy(scipy.special.softmax(logits[0], axis=1), axis=1)

    np.testing.assert_allclose(answers.entropy, expected, rtol=1e-5)


def test_accuracy_top_5_and_nll_are_those_of_sklearn(logits: Any, answers: measures.Predictions) -> None:
    values, targets = logits
    probabilities = scipy.special.softmax(values.astype(np.float64), axis=1)

    assert top_k_accuracy_score(targets, values, k=1) == answers.correct.mean()
    assert top_k_accuracy_score(targets, values, k=5) == answers.in_top5.mean()
    assert log_loss(targets, probabilities) == pytest.approx(answers.nll.mean(), rel=1e-5)


def test_confusion_is_that_of_sklearn(logits: Any, answers: measures.Predictions) -> None:
    expected = confusion_matrix(logits[1], answers.predicted)
    a, b, number = measures.confused_pairs(answers.targets, answers.predicted, 1)[0]

    np.testing.assert_array_equal(expected, measures.confusion(answers.targets, answers.predicted, 12))
    np.fill_diagonal(expected, 0)
    assert (expected.max(), expected.max()) == (number, expected[a, b])


def test_accuracy_by_class_is_the_diagonal_over_the_rows(answers: measures.Predictions) -> None:
    matrix = confusion_matrix(answers.targets, answers.predicted)
    accuracy, counts = means_by(answers.targets, answers.correct, 12)

    np.testing.assert_allclose(matrix.diagonal() / matrix.sum(axis=1), accuracy)
    np.testing.assert_array_equal(matrix.sum(axis=1), counts)


def test_calibration_error_is_that_of_torchmetrics(logits: Any, answers: measures.Predictions) -> None:
    """No confidence of these is on the edge of a bin, where Guo et al. and torchmetrics differ."""
    from torchmetrics.functional.classification import multiclass_calibration_error

    probabilities = torch.from_numpy(logits[0]).softmax(dim=1)
    expected = multiclass_calibration_error(probabilities, torch.from_numpy(logits[1]), num_classes=12, n_bins=15)

    assert float(expected) == pytest.approx(reliability(answers.confidence, answers.correct).ece, abs=1e-6)


def test_calibration_error_of_a_case_by_hand() -> None:
    """Two rows at 0.9, one right: a gap of 0.4; two at 0.6, both right: again 0.4; one at 1, right: none."""
    confidence = np.array([0.9, 0.9, 0.6, 0.6, 1.0])
    right = np.array([True, False, True, True, True])
    found = reliability(confidence, right)

    assert (4 / 5) * 0.4 == pytest.approx(found.ece)
    assert 1 == found.counts[-1]  # a confidence of 1 lies in the last bin
    assert [2, 2, 1] == found.counts[found.counts > 0].tolist()


def test_the_upper_edge_belongs_to_a_bin() -> None:
    """(lower, upper], as Guo et al. have it."""
    assert [0, 1, 0, 0] == reliability(np.array([0.5]), np.array([True]), num_bins=4).counts.tolist()


def test_a_calibrated_teacher_has_next_to_no_calibration_error() -> None:
    random = np.random.default_rng(1)
    confidence = random.uniform(0.3, 1.0, 200_000)

    assert reliability(confidence, random.random(200_000) < confidence).ece < 4 * (0.25 * 15 / 200_000) ** 0.5


def test_jensen_shannon_is_that_of_scipy() -> None:
    p, q = np.random.default_rng(3).dirichlet(np.ones(6), size=(2, 50))
    entropy = (scipy.stats.entropy(p, axis=1) + scipy.stats.entropy(q, axis=1)) / 2
    expected = scipy.spatial.distance.jensenshannon(p, q, axis=1) ** 2

    np.testing.assert_allclose(
        expected, measures.jensen_shannon(torch.from_numpy((p + q) / 2), torch.from_numpy(entropy)), atol=1e-12
    )


def test_classes_of_no_probability_add_nothing() -> None:
    row = np.array([[0.0, 0.0, -np.inf]], dtype=np.float32)
    answer = measures.predictions_of(torch.from_numpy(row), np.array([2]), np.array([False]))

    assert (math.log(2), math.inf) == (pytest.approx(answer.entropy[0]), answer.nll[0])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_row_of_no_distribution_is_refused(bad: float) -> None:
    with pytest.raises(InvalidLogits, match="verify --deep"):
        measures.log_softmax(torch.full((1, 3), bad))


# What is read


def small_cache(path: Path, *, names: list[str] | None = None, key: str = "k", **kwargs: Any) -> Any:
    """A cache of 90 samples in 3 views, with targets and keys; half of the rows are right."""
    random = np.random.default_rng(5)
    targets = random.integers(0, 4, 90)
    contents = random.integers(0, 256, (90, 16), dtype=np.uint8)
    table = SampleTable(90, [f"{key}{row}" for row in range(90)], targets, contents)
    values = random.normal(size=(3, 90, 4)).astype(np.float32)
    values[:, np.arange(90), targets] += 1
    settings: dict[str, Any] = {"teacher": "t@1", "samples": table, "class_names": names, "rows_per_block": 16}
    settings |= kwargs
    if "dataset" in settings:
        settings["samples"] = None
    encoding = logitcache.Dense(dtype="float32")
    with logitcache.create(path, num_samples=90, num_classes=4, num_views=3, encoding=encoding, **settings) as writer:
        for view in range(3):
            writer.write(view=view, start=0, logits=values[view])
    return values, targets


def test_every_row_of_a_small_cache_is_read(tmp_path: Path) -> None:
    values, targets = small_cache(tmp_path / "x.cache")
    stats = teacher.measure_teacher(open_cache(tmp_path / "x.cache"))

    assert (270, 270, "targets") == (len(stats.predictions), stats.num_rows, stats.scored_by)
    np.testing.assert_array_equal(values.reshape(270, 4).argmax(axis=1), stats.predictions.predicted)
    np.testing.assert_array_equal(np.tile(targets, 3), stats.predictions.targets)


@pytest.mark.parametrize("max_rows", [5, 40, 100, 269])
def test_rows_of_a_large_cache_are_spread_over_samples_and_views(tmp_path: Path, max_rows: int) -> None:
    small_cache(tmp_path / "x.cache")
    chosen = teacher.select_rows(open_cache(tmp_path / "x.cache"), [0, 1, 2], max_rows=max_rows)
    rows = np.concatenate(list(chosen.values()))

    assert max_rows / 2 < len(rows) <= max_rows
    assert sum(len(np.unique(each)) for each in chosen.values()) == len(rows)
    assert {0, 1, 2} == set(chosen)
    assert rows.min() < 16
    assert rows.max() >= 70


def test_unmixed_rows_are_judged_where_there_are_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mixing = Mixing(mixup=0.4, cutmix=0.4, probability=0.5)
    plan = ViewPlan(mixing=mixing, seed=4, num_classes=4, num_samples=90)
    small_cache(tmp_path / "x.cache", view_plan=plan)
    cache = open_cache(tmp_path / "x.cache")
    expected = np.array([plan.mixture(view, row, 90) is not None for view in range(3) for row in range(90)])

    stats = teacher.measure_teacher(cache)
    np.testing.assert_array_equal(expected, stats.predictions.mixed)
    np.testing.assert_array_equal(~expected, stats.predictions.scored)
    assert "unmixed rows" == stats.scored_by

    monkeypatch.setattr(teacher, "MIN_UNMIXED", 10_000)
    stats = teacher.measure_teacher(cache)
    assert ("dominant sample", True) == (stats.scored_by, stats.predictions.scored.all())
    for place in np.flatnonzero(expected):
        mixture = plan.mixture(place // 90, place % 90, 90)
        assert mixture is not None
        if mixture.box is None:
            row = place % 90 if mixture.weight >= 0.5 else mixture.partner
            assert cache.samples is not None
            assert cache.samples.targets[row] == stats.predictions.targets[place]


def test_disagreement_is_the_divergence_between_the_views(tmp_path: Path) -> None:
    values, _ = small_cache(tmp_path / "x.cache")
    found = disagreement(open_cache(tmp_path / "x.cache"), [0, 1, 2])
    p = scipy.special.softmax(values.astype(np.float64), axis=2)
    expected = scipy.stats.entropy(p.mean(axis=0), axis=1) - scipy.stats.entropy(p, axis=2).mean(axis=0)

    assert found is not None
    np.testing.assert_allclose(found.divergence, expected[found.rows], atol=1e-5)


def test_a_cache_without_targets_says_so_and_leaves_out_what_needs_them(tmp_path: Path) -> None:
    small_cache(tmp_path / "x.cache", dataset="cars")
    written = write_report(tmp_path / "x.cache", tmp_path / "report.html")
    page = written.path.read_text()

    assert "This cache has no true classes" in page
    assert 'id="entropy"' in page
    assert 'id="reliability"' not in page
    assert "accuracy" not in written.headline


def test_a_cache_of_many_classes_is_reported_by_the_worst_pairs_and_classes(tmp_path: Path) -> None:
    random = np.random.default_rng(2)
    contents = random.integers(0, 256, (400, 16), dtype=np.uint8)
    table = SampleTable(400, [str(row) for row in range(400)], random.integers(0, 40, 400), contents)
    settings: dict[str, Any] = {"samples": table, "teacher": "t", "num_samples": 400, "num_classes": 40}
    with logitcache.create(tmp_path / "x.cache", num_views=1, **settings) as writer:
        writer.write(view=0, start=0, logits=random.normal(size=(400, 40)).astype(np.float32))
    page = write_report(tmp_path / "x.cache", tmp_path / "r.html").path.read_text()

    assert "The 20 most confused pairs of classes" in page
    assert "Accuracy by class: the lowest 20 of 40" in page
    assert "The cache has a single view, so there is nothing to compare." in page


def test_a_half_built_cache_is_reported_by_its_whole_views(tmp_path: Path) -> None:
    path = tmp_path / "x.cache"
    with (
        pytest.raises(IncompleteCache),
        logitcache.create(path, num_samples=6, num_classes=3, num_views=2, teacher="t", dataset="d") as writer,
    ):
        writer.write(view=1, start=0, logits=np.eye(6, 3, dtype=np.float32))

    assert [1] == teacher.complete_views(open_cache(path))
    assert "not sealed" in write_report(path, tmp_path / "r.html").path.read_text()


def test_mixing_that_makes_no_sense_is_refused_before_it_is_drawn(tmp_path: Path) -> None:
    """A stranger's α could make the draw from a Beta distribution last for ever."""
    small_cache(tmp_path / "x.cache")
    cache = open_cache(tmp_path / "x.cache")
    for config in ({"mixup": math.nan}, {"mixup": 1e300}, {"mixup": "x"}, {"beta": 1.0}, [1]):
        identity = cache.manifest.identity.model_copy(update={"transform": {"mixing": config}})
        cache.manifest = cache.manifest.model_copy(update={"identity": identity})
        with pytest.raises(CorruptCache, match="invalid"):
            teacher.MixingOfCache(cache)


# Trees, maps and agreement


def test_a_linear_nets_map_is_weight_times_difference_from_black() -> None:
    """Where there is nothing to saturate but the softmax, integrated gradients of two classes are known: the logit's
    difference is w·x, and log-sigmoid's slope along the way integrates to the whole change, shared out by w·x."""
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 2))
    images, black = torch.rand(3, 1, 3, 4), torch.full((3, 1, 3, 4), -0.5)
    found = attributions(net, images, black, torch.tensor([0, 1, 0]))
    weight, bias = net[1].weight.detach(), net[1].bias.detach()  # type: ignore[union-attr, operator]
    for image, nothing, label, each in zip(images, black, (0, 1, 0), found, strict=True):
        direction, offset = weight[label] - weight[1 - label], bias[label] - bias[1 - label]
        parts = direction * (image - nothing).flatten()
        ends = [torch.nn.functional.logsigmoid(direction @ x.flatten() + offset) for x in (image, nothing)]
        expected = (parts / parts.sum() * (ends[0] - ends[1])).reshape(3, 4)
        np.testing.assert_allclose(expected.numpy(), each.values, atol=1e-5)
        assert abs(each.gap) < 1e-4


def test_a_net_without_gradients_has_no_map() -> None:
    with pytest.raises(UsageError, match="no gradient with respect to its input"):
        attributions(NoGradient(), torch.rand(1, 1, 4, 4), torch.zeros(1, 1, 4, 4), torch.tensor([0]))


class NoGradient(torch.nn.Module):
    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return torch.eye(2)[(inputs.flatten(1).sum(dim=1) > 1).long()]


def test_a_map_shows_signs_and_says_where_they_are() -> None:
    import base64
    import io

    from PIL import Image

    values = np.zeros((90, 60), dtype=np.float32)
    values[:30, 40:], values[60:, :20] = 2.0, -1.0
    picture = Image.open(io.BytesIO(base64.b64decode(signed_map_uri(values).partition(",")[2]))).convert("RGBA")
    pixels = np.asarray(picture)

    assert (56, 37) == pixels.shape[:2]
    assert [217, 95, 2, 255] == pixels[2, -2].tolist()
    assert [31, 111, 180] == pixels[-2, 2, :3].tolist()
    assert 0.4 < pixels[-2, 2, 3] / 255 < 0.6
    assert 0 == pixels[28, 18, 3]
    found = strongest_region(values, sign=1), strongest_region(values, sign=-1)
    assert [("the upper right", 1.0), ("the lower left", 1.0)] == [(each.name, each.share) for each in found if each]
    assert strongest_region(values.clip(0), sign=-1) is None


def grown_tree(depth: int) -> tuple[SoftTree, torch.Tensor]:
    torch.manual_seed(depth)
    tree = SoftTree((1, 4, 4), 3, depth=depth, beta=3.0).eval()
    torch.nn.init.normal_(tree.leaves)
    return tree, torch.randn(50, 1, 4, 4)


def test_use_of_a_tree_adds_up_and_paths_lead_to_the_likeliest_leaf() -> None:
    tree, inputs = grown_tree(3)
    use = node_use(tree, inputs)
    leaves = tree.log_path_probabilities(tree.decisions(inputs))[-1].exp().detach().numpy()

    assert [1.0] * 4 == pytest.approx([use[0], use[1:3].sum(), use[3:7].sum(), use[7:].sum()])
    np.testing.assert_allclose(leaves.mean(axis=0), use[7:], rtol=1e-5)
    for path, leaves_L in zip(most_probable_paths(tree, inputs), leaves, strict=True):
        assert leaves_L.argmax() + 7 == path.nodes[-1]
        assert leaves_L.max() == pytest.approx(path.reached[-1], rel=1e-5)
        assert [0, *path.nodes[:-1]] == [0, *((node - 1) // 2 for node in path.nodes[1:])]
    path, right = most_probable_paths(tree, inputs)[0], tree.decisions(inputs)[0].sigmoid().tolist()
    for number, (node, child) in enumerate(itertools.pairwise(path.nodes)):
        probability = 1 - right[node] if child % 2 else right[node]
        assert probability == pytest.approx(path.reached[number + 1] / path.reached[number], rel=1e-4)


@pytest.mark.parametrize(("depth", "inner", "rests"), [(1, 1, 0), (4, 15, 0), (7, 15, 16)])
def test_of_a_large_tree_the_most_used_part_is_drawn(depth: int, inner: int, rests: int) -> None:
    tree, inputs = grown_tree(depth)
    use = node_use(tree, inputs)
    nodes = drawn_nodes(tree, use)
    kinds = [node.kind for node in nodes]
    shown = {node.number for node in nodes if node.kind == "inner"}

    assert (inner, inner + 1) == (kinds.count("inner"), len(kinds) - inner)
    assert rests == kinds.count("rest")
    assert 2**depth == sum(node.leaves for node in nodes if node.kind != "inner")
    assert 1.0 == pytest.approx(sum(node.use for node in nodes if node.kind != "inner"))
    assert all(node.parent is None or node.parent in shown for node in nodes)
    waiting = [use[node.number] for node in nodes if node.kind == "rest"]
    assert all(use[number] >= max(waiting, default=0.0) for number in shown)
    assert len({(node.left, node.top) for node in nodes}) == len(nodes)


def compared_student(name: str, rows: np.ndarray, predicted: np.ndarray) -> Student:
    row = Row(name, None, None, None, None, 1, 1, [0])
    compared: Any = ComparedStudent(None, None, "", rows, predicted, np.ones(len(rows)), None)  # type: ignore[arg-type]
    return Student(name, [], row, "this cache", compared=compared)


def test_agreement_by_class_shows_the_lowest_of_many() -> None:
    """Class c of 40 is met by c/40 of a student's 80 rows; another is always right. On the rows that both have."""
    label = np.repeat(np.arange(40), 80)
    rows = np.arange(len(label))
    met = np.tile(np.arange(80), 40) < 2 * label
    wrong = np.where(met, label, (label + 1) % 40)
    students = [
        compared_student("half", rows, np.stack([wrong, label])),
        compared_student("right", np.append(rows, 9999), np.append(label, 0)[None]),
    ]
    answers = {row: (int(each), 1.0) for row, each in enumerate(label)}
    found = RunsFound(students, [], [], [], teacher_predictions=answers)
    figure = agreement_figure(found, ["half", "right", "not measured"], ClassNames(None), 40)

    assert figure is not None
    assert (["half", "right"], 40, 3200) == tuple(figure.notes[name] for name in ("students", "seen", "rows"))
    assert [str(number) for number in range(20)] == [row["name"] for row in figure.rows]
    expected = [[(number / 40 + 1) / 2, 1.0] for number in range(20)]
    assert expected == [[row[0], row[1]] for row in figure.rows]
    assert {80} == {row["rows"] for row in figure.rows}


def test_samples_that_are_shown_are_the_most_disputed_and_some_on_which_all_agree(tmp_path: Path) -> None:
    """Three students contradict the teacher of 90 rows on 1, 2 and 5 of them; the rows of one end before the last 10."""
    values, targets = small_cache(tmp_path / "x.cache")
    label, rows = values[0].argmax(axis=1), np.arange(90)
    students = []
    for number, wrong in enumerate(([7], [7, 85], [7, 85, 20, 30, 40])):
        predicted = label.copy()
        predicted[wrong] = (predicted[wrong] + 1) % 4
        kept = rows if number else rows[:80]
        students.append(compared_student(str(number), kept, predicted[kept][None]))
    sure = {row: 0.9 if row == 30 else 0.5 for row in rows.tolist()}
    answers = {row: (int(label[row]), sure[row]) for row in rows.tolist()}
    found = RunsFound(students, [], [], [], teacher_predictions=answers)
    chosen = choose_samples(found, open_cache(tmp_path / "x.cache"), None)

    assert [(7, 3), (30, 1), (20, 1)] == [(sample.row, sample.num_disagreeing) for sample in chosen[:3]]
    assert [0, 0, 0] == [sample.num_disagreeing for sample in chosen[3:]]
    assert not {sample.row for sample in chosen[3:]} & {7, 20, 30, 40}
    assert all(sample.row < 80 and sample.target == targets[sample.row] for sample in chosen)
    assert chosen[0].key == "k7"


# Words


def test_json_inside_a_script_ends_no_script_and_stays_the_same() -> None:
    text = json_for_script({"name": NASTY, "comment": "<!--"})

    assert not set("<>&\u2028\u2029") & set(text)
    assert {"name": NASTY, "comment": "<!--"} == json.loads(text)
    with pytest.raises(ValueError, match="JSON"):
        json_for_script(math.nan)


def test_a_strangers_names_are_one_line_without_control_characters() -> None:
    assert "a b c d" == plain_text("a\nb\u202ec\u2028d")
    assert 80 >= len(plain_text("x" * 10_000))
    assert '{"a": 1}' == plain_text({"a": 1})


def test_class_names_stay_apart() -> None:
    names = ClassNames(["cat", "cat", "", "dog"])

    assert ["cat (0)", "cat (1)", " (2)", "dog", "4"] == [names[number] for number in range(5)]


def test_numbers_read_well() -> None:
    assert ["0.0123", "12", "∞", "–", "5.33\u202f×\u202f10⁻⁸", "0"] == [
        decimal(value) for value in (0.0123, 12.0, math.inf, math.nan, 5.33e-8, 0.0)
    ]


def test_pictures_are_small_and_lie_in_range() -> None:
    import base64
    import io

    from PIL import Image

    uri = image_uri(torch.linspace(-3, 5, 3 * 300 * 200).reshape(3, 300, 200))
    assert uri is not None
    picture = Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))

    assert (112, "RGB") == (max(picture.size), picture.mode)
    assert all(image_uri(other) is None for other in (torch.zeros(5), torch.full((1, 2, 2), math.nan), "text"))


# The page, in a browser


@dataclass
class Visit:
    """A page in a browser, and what it did."""

    page: Any
    requests: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium; where CI is set it must be there."""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError as error:
        missing(f"playwright is not installed: {error}")
    if not CHROMIUM.is_file():
        missing(f"there is no {CHROMIUM}: apt-get install chromium")
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=str(CHROMIUM), args=ARGUMENTS)
        yield opened
        opened.close()


def missing(what: str) -> None:
    if os.environ.get("CI"):
        pytest.fail(what)
    pytest.skip(what)


def eventually(page: Any, holds: Callable[[], bool]) -> None:
    """Playwright's own wait evaluates strings, which the page's policy forbids."""
    for _ in range(200):
        if holds():
            return
        page.wait_for_timeout(50)
    pytest.fail("did not come to hold within ten seconds")


@pytest.fixture
def visit(browser: Any) -> Iterator[Callable[..., Visit]]:
    """Opens a report; whatever is asked for besides the file itself is recorded and refused."""
    contexts = []

    def open_page(path: Path, *, scheme: str = "light", width: int = 1280) -> Visit:
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        contexts.append(context)
        visit = Visit(context.new_page())
        own = path.absolute().as_uri()

        def route(route: Any) -> None:
            visit.requests.append(route.request.url)
            route.continue_() if route.request.url == own else route.abort()

        visit.page.route("**/*", route)
        visit.page.on("console", lambda message: visit.complaints.append(f"{message.type}: {message.text}"))
        visit.page.on("pageerror", lambda error: visit.complaints.append(f"error: {error}"))
        visit.page.goto(own)
        visit.page.wait_for_selector("html[data-drawn=yes]", timeout=60_000)
        return visit

    yield open_page
    for context in contexts:
        context.close()


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, Any]]:
    """(folder, report, headline) of a trained teacher, its cache, and two students of two seeds each."""

    from logitcache import progress
    from logitcache.config.schema import parse_pipeline

    progress.silence()
    folder = tmp_path_factory.mktemp("report")
    raw = tiny_settings(folder, *ALL_DIGITS)
    raw["teacher"] |= {"weights": "trained", "train": {"epochs": 3}}
    raw["views"] |= {"mixup": 0.3, "mix_probability": 0.4, "count": 3}
    raw["train"]["seeds"] = [0, 1]
    raw["students"][1] |= {"model": "soft_tree", "args": {"depth": 3}}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(raw))
    pipeline = parse_pipeline(raw, source="tiny")
    train_teacher(pipeline)
    cache_teacher(pipeline)
    train_students(pipeline)
    written = write_report(
        pipeline.cache.path,
        folder / "report.html",
        runs=folder / "runs",
        data=match_data(pipeline.cache.path, pipeline),
    )
    return folder, written.path, written.headline


EXPECTED_CHARTS = {
    "reliability",
    "confidence",
    "entropy",
    "confusion",
    "classes",
    "divergence",
    "bytes",
    "disagreement",
    "score-parameters",
    "score-latency",
    "score-epoch",
    "curve-validation",
    "curve-loss",
    "agreement-classes",
}


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 375])
def test_the_page_opens_offline_with_every_chart_drawn(built: Any, visit: Any, scheme: str, width: int) -> None:
    _, report, _ = built
    visited = visit(report, scheme=scheme, width=width)
    marks = visited.page.evaluate(
        "Object.fromEntries([...document.querySelectorAll('.chart')].map(chart =>"
        "[chart.id, chart.querySelectorAll('svg [role=\"graphics-symbol\"]').length]))"
    )
    broken = visited.page.evaluate(
        "[...document.images].filter(image => !image.complete || !image.naturalWidth).length"
    )
    overflow = visited.page.evaluate("document.documentElement.scrollWidth - innerWidth")
    ink, paper = visited.page.evaluate(
        "[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]"
    )

    assert [] == visited.complaints
    assert [report.absolute().as_uri()] == visited.requests
    assert EXPECTED_CHARTS == {name for name, count in marks.items() if count > 0}
    assert (0, 0) == (broken, overflow)
    assert visited.page.locator(".views img").count() >= 32
    dark_ink = sum(map(int, ink[4:-1].split(","))) < sum(map(int, paper[4:-1].split(",")))
    assert dark_ink == (scheme == "light")


def test_the_charts_follow_the_theme(built: Any, visit: Any) -> None:
    visited = visit(built[1])
    fill = "document.querySelector('#bytes .mark-rect path').getAttribute('fill')"
    light = visited.page.evaluate(fill)
    visited.page.emulate_media(color_scheme="dark")
    drawn = "document.documentElement.dataset.drawn === 'yes'"
    eventually(visited.page, lambda: visited.page.evaluate(f"{drawn} && {fill} !== {json.dumps(light)}"))

    assert [] == visited.complaints


def test_the_keyboard_reaches_every_part(built: Any, visit: Any) -> None:
    """Tab goes from the skip link through figures and tables; what has the focus is seen, and is outlined."""
    page = visit(built[1]).page
    seen: list[str] = []
    for _ in range(150):
        page.keyboard.press("Tab")
        focused = page.evaluate(
            """() => {
              const element = document.activeElement, box = element.getBoundingClientRect();
              if (element === document.body) return null;
              return {
                name: element.className === 'skip' ? 'skip' : element.tagName.toLowerCase() + (element.id ? '#' + element.id : ''),
                visible: box.width > 0 && box.bottom > 0 && box.top < innerHeight && box.right > 0 && box.left < innerWidth,
                outline: getComputedStyle(element).outlineStyle !== 'none' && parseFloat(getComputedStyle(element).outlineWidth) >= 2,
              };
            }"""
        )
        if focused is None:
            break
        assert focused["visible"], focused
        assert focused["outline"], focused
        seen.append(focused["name"])

    assert "skip" == seen[0]
    assert {f"figure#figure-{name}" for name in (*EXPECTED_CHARTS, "tree-0")} <= set(seen)
    assert len(EXPECTED_CHARTS) + 1 == seen.count("summary")
    assert 2 + page.locator("[data-path]").count() == seen.count("button")


def test_the_skip_link_and_the_numbers_work_by_keyboard(built: Any, visit: Any) -> None:
    page = visit(built[1]).page
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    assert "main" == page.evaluate("document.activeElement.id")

    summary = page.locator("#figure-reliability summary")
    summary.focus()
    page.keyboard.press("Enter")
    table = page.locator("#figure-reliability table")
    assert table.is_visible()
    assert table.locator("th[scope=col]").count() == 4
    assert table.locator("tbody th[scope=row]").count() > 3


def test_a_student_can_be_highlighted(built: Any, visit: Any) -> None:
    page = visit(built[1]).page
    button = page.locator("[data-student=small]")
    button.focus()
    page.keyboard.press("Enter")
    faint = "[...document.querySelectorAll('#curve-loss .mark-line path')].filter(path => path.getAttribute('opacity') === '0.12').length"
    eventually(page, lambda: page.evaluate(faint) == 1)
    assert "true" == button.get_attribute("aria-pressed")
    page.keyboard.press("Enter")
    eventually(page, lambda: page.evaluate(faint) == 0)
    assert "false" == button.get_attribute("aria-pressed")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 375])
def test_axe_finds_no_serious_violation(built: Any, visit: Any, scheme: str, width: int) -> None:
    try:
        from axe_playwright_python.sync_playwright import Axe
    except ImportError as error:
        missing(f"axe-playwright-python is not installed: {error}")
    page = visit(built[1], scheme=scheme, width=width).page
    page.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")
    found = Axe().run(page).response

    assert len(found["passes"]) > 20  # it did look
    assert [] == [
        (violation["id"], violation["nodes"][0]["html"][:200], violation["nodes"][0].get("failureSummary"))
        for violation in found["violations"]
        if violation["impact"] in ("serious", "critical", "moderate")
    ]


def test_a_samples_path_can_be_shown_in_the_tree(built: Any, visit: Any) -> None:
    page = visit(built[1]).page
    buttons = page.locator("[data-path]")
    on = "[...document.querySelectorAll('#tree-0 g.on')].map(node => node.dataset.node)"
    expected = [each.split() for each in buttons.evaluate_all("all => all.map(each => each.dataset.path)")]

    assert buttons.count() >= 4
    assert expected[0] == page.evaluate(on)
    buttons.nth(2).focus()
    page.keyboard.press("Enter")
    assert expected[2] == page.evaluate(on)
    assert ["false", "false", "true"] == [buttons.nth(place).get_attribute("aria-pressed") for place in range(3)]
    page.keyboard.press("Enter")
    assert [] == page.evaluate(on)


def test_every_decision_is_in_words_beside_its_map(built: Any, visit: Any) -> None:
    """Whoever does not see the colours reads what is for and against; the samples are of both kinds."""
    page = visit(built[1]).page
    titles = page.locator("#decisions > h3").all_inner_texts()
    alts = page.locator("#decisions .nets img").evaluate_all("all => all.map(each => each.alt)")
    maps = [text for text in alts if text.startswith("Attribution map of ")]
    words = page.locator("#trees .paths li ol li:last-child").all_inner_texts()

    assert ["Students and teacher disagree", "All agree"] == titles
    assert 6 == len(alts) - len(maps)
    assert 6 * 3 == len(maps)
    assert {"teacher", "small", "labels"} == {text.split(":")[0].removeprefix("Attribution map of ") for text in maps}
    assert all("evidence for: mostly the " in text and "evidence against: " in text for text in maps)
    assert 6 == len(words)
    assert all("reached with" in text and " predicts " in text for text in words)
    assert "8 leaves; all are drawn" in page.locator("#tree-0-caption").inner_text()


def test_hostile_names_execute_nothing(tmp_path: Path, visit: Any) -> None:
    path = tmp_path / "x.cache"
    small_cache(path, names=[f"{NASTY}{number}" for number in range(4)], key=NASTY, teacher=NASTY, precision=NASTY)
    runs = tmp_path / "runs"
    for name in (NASTY, "plain"):
        folder = runs / f"{name[:2].strip('</')}x" / "seed-0"
        folder.mkdir(parents=True)
        result = {"name": name, "seed": 0, "accuracy": 0.5, "validation_accuracy": 0.4, "epoch_seconds": 1.0}
        (folder / "result.json").write_text(json.dumps(result | {"epochs": 1, "samples": 9, "parameters": 5}))
        (folder / "run.yaml").write_text(yaml.safe_dump({"student": {"name": name}}))
        (folder / "pipeline.yaml").write_text(yaml.safe_dump({"name": NASTY}))
        (folder / "metrics.jsonl").write_text('{"step": 1, "epoch": 1, "loss": 1.0, "validation_accuracy": 0.4}\n')
    report = write_report(path, tmp_path / "report.html", runs=runs).path
    visited = visit(report)
    visited.page.locator("#figure-classes .mark-rect path").first.hover()
    visited.page.locator("[data-student]").first.click()

    assert [] == visited.complaints
    assert [report.as_uri()] == visited.requests
    assert visited.page.evaluate("window.pwned") is None
    assert 0 == visited.page.locator("img[src=x]").count()
    assert "onerror" in visited.page.locator("h1").inner_text()  # shown as the text that it is
    assert "49" not in visited.page.title()


def test_the_policy_forbids_what_the_page_does_not_hold(built: Any, visit: Any) -> None:
    """Should something slip through the escaping, it still may neither run nor call home."""
    visited = visit(built[1])
    visited.page.evaluate(
        "() => { const script = document.createElement('script'); script.textContent = 'window.pwned = 1';"
        "document.body.append(script); const image = new Image(); image.src = 'https://example.invalid/x';"
        "document.body.append(image); }"
    )
    eventually(visited.page, lambda: 2 == len(visited.complaints))

    assert visited.page.evaluate("window.pwned") is None
    assert 1 == len(visited.requests)
    assert all("Content Security Policy" in complaint for complaint in visited.complaints)


# Students, data and refusals


def test_without_the_teachers_weights_students_have_maps_alone(built: Any, tmp_path: Path) -> None:
    from logitcache.config.schema import load_pipeline

    folder, _, _ = built
    gone = load_pipeline(folder / "tiny.yaml", [f"runs.path={tmp_path}/gone"])
    matched = match_data(str(folder / "tiny.cache"), gone)
    page = write_report(folder / "tiny.cache", tmp_path / "r.html", runs=folder / "runs", data=matched).path.read_text()

    assert "Without maps: teacher: the weights are not available locally." in page
    assert "Attribution map of teacher" not in page
    assert 6 * 2 == page.count('alt="Attribution map of ')


def test_the_same_samples_are_chosen_each_time(built: Any, tmp_path: Path) -> None:
    folder, report, _ = built
    from logitcache.config.schema import load_pipeline

    matched = match_data(str(folder / "tiny.cache"), load_pipeline(folder / "tiny.yaml"))
    again = write_report(
        folder / "tiny.cache", tmp_path / "r.html", runs=folder / "runs", data=matched
    ).path.read_text()
    decisions = [
        text[text.index('<section id="decisions"') : text.index("</main>")] for text in (report.read_text(), again)
    ]

    assert decisions[0] == decisions[1]


def test_students_are_measured_on_the_data(built: Any) -> None:
    _, _, headline = built
    students = {student["name"]: student for student in headline["students"]}

    assert {"small", "labels"} == set(students)
    for student in students.values():
        assert 0.1 < student["agreement_mean"] <= 1
        assert student["latency_ms"] > 0
    assert 0.5 < headline["accuracy"] <= 1
    assert headline["rows"] == 3 * 1295
    assert headline["judged_rows"] < headline["rows"]


def test_agreement_is_that_of_the_weights(built: Any) -> None:
    """Measured again, by hand, on the same view."""
    from safetensors.torch import load_file

    from logitcache.catalog.nets import MLP
    from logitcache.config.build import resolve_data
    from logitcache.config.schema import load_pipeline
    from logitcache.extras.report.teacher import select_rows

    folder, _, headline = built
    cache = open_cache(folder / "tiny.cache")
    views = logitcache.ViewDataset(
        resolve_data(load_pipeline(folder / "tiny.yaml"), trust=False).train, cache.view_plan
    )
    (rows,) = select_rows(cache, [0], max_rows=2000, max_blocks=8).values()
    inputs = torch.stack([views[(0, int(row))][1] for row in rows])
    expected = cache.view(0).logits(rows).argmax(dim=1)
    shares = []
    for seed in (0, 1):
        model = MLP((1, 8, 8), 10, (8,))
        model.load_state_dict(load_file(folder / f"runs/small/seed-{seed}/last.safetensors"))
        shares.append(float((model.eval()(inputs).argmax(dim=1) == expected).float().mean()))
    found = next(student for student in headline["students"] if student["name"] == "small")

    assert np.mean(shares) == pytest.approx(found["agreement_mean"], abs=2e-3)


def test_without_data_each_runs_own_pipeline_is_asked(built: Any, tmp_path: Path) -> None:
    folder, _, headline = built
    written = write_report(folder / "tiny.cache", tmp_path / "r.html", runs=folder / "runs")

    assert [student["agreement_mean"] for student in headline["students"]] == [
        student["agreement_mean"] for student in written.headline["students"]
    ]
    assert "<img" not in written.path.read_text().split("<script", 1)[0]


def test_what_can_not_be_measured_says_why(built: Any, tmp_path: Path) -> None:
    folder, _, _ = built
    shutil.copytree(folder / "runs", tmp_path / "runs")
    for file in (tmp_path / "runs").rglob("pipeline.yaml"):
        raw = yaml.safe_load(file.read_text())
        raw["data"] = {"name": "image_folder", "root": str(tmp_path / "gone")}
        file.write_text(yaml.safe_dump(raw))
    (tmp_path / "runs/small/seed-1/result.json").unlink()
    (tmp_path / "runs/labels/seed-1/result.json").write_text("{")
    written = write_report(folder / "tiny.cache", tmp_path / "r.html", runs=tmp_path / "runs")
    page = written.path.read_text()

    assert "are not measured: image_folder: the folder" in page
    assert "Not finished, and left out: small/seed-1." in page
    assert "Not readable, and left out: labels/seed-1." in page
    assert all(student["agreement_mean"] is None for student in written.headline["students"])


def test_runs_say_where_their_labels_came_from(built: Any) -> None:
    folder, _, _ = built
    found = find_runs(folder / "runs", open_cache(folder / "tiny.cache"))

    assert {"small": "this cache", "labels": "true labels"} == {
        student.name: student.labels for student in found.students
    }
    assert ["teacher"] == [run.result.name for run in found.teachers]


def test_labels_that_a_program_gave_are_not_called_the_caches(built: Any, tmp_path: Path) -> None:
    """As the demo does for the student on labels of one clean view."""
    from logitcache.config.schema import load_pipeline
    from logitcache.extras.demo import CleanLabels
    from logitcache.stages.train_student import Experiment

    folder, _, _ = built
    cache = open_cache(folder / "tiny.cache")
    experiment = Experiment(load_pipeline(folder / "tiny.yaml", [f"runs.path={tmp_path}"]))
    views = logitcache.ViewDataset(experiment.data.train, experiment.plan)
    train(experiment.job(experiment.pipeline.student("small"), 0, labels=CleanLabels(cache, views, experiment.device)))

    assert ["given by the program"] == [student.labels for student in find_runs(tmp_path, cache).students]


def test_data_of_another_kind_is_refused(built: Any, tiny: Callable[..., Pipeline]) -> None:
    folder, _, _ = built
    with pytest.raises(IdentityMismatch, match="view_seed"):
        match_data(str(folder / "tiny.cache"), tiny("views.seed=9", f"runs.path={folder / 'runs'}"))
    with pytest.raises(IdentityMismatch):
        match_data(str(folder / "tiny.cache"), tiny(*PICTURES))


def test_the_command_writes_a_page_and_says_so_in_json(built: Any, tmp_path: Path) -> None:
    folder, _, headline = built
    out = tmp_path / "page.html"
    ended = command("report", folder / "tiny.cache", "--runs", folder / "runs", "-o", out, "--json")
    found = json.loads(ended.stdout)

    assert (str(out), out.stat().st_size) == (found["report"], found["bytes"])
    assert (headline["accuracy"], headline["ece"]) == (found["accuracy"], found["ece"])


def test_wrong_requests_are_refused_and_what_was_there_stays(built: Any, tmp_path: Path) -> None:
    folder, _, _ = built
    cache, old = folder / "tiny.cache", tmp_path / "old.html"
    old.write_text("before")

    refused(command("report", cache, "-o", tmp_path), 2, "is a directory; name the file to write")
    refused(command("report", cache, "-o", tmp_path / "gone" / "r.html"), 2, "there is no folder")
    refused(command("report", tmp_path, "-o", old), 2, "is not a logit cache")
    refused(command("report", cache, "-o", old, "--runs", tmp_path / "gone"), 2, "there is no such folder")
    (tmp_path / "empty").mkdir()
    refused(command("report", cache, "-o", old, "--runs", tmp_path / "empty"), 2, "contains no run")
    refused(command("report", cache, "-o", old, "--data", tmp_path / "gone.yaml"), 2, "gone.yaml does not exist")
    assert "before" == old.read_text()


def test_a_missing_package_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from logitcache.extras.report import page

    real = page.importlib.util.find_spec
    monkeypatch.setattr(page.importlib.util, "find_spec", lambda name: None if name == "captum" else real(name))
    with pytest.raises(UsageError, match=r"a report needs captum: pip install 'logitcache\[report\]'"):
        write_report(tmp_path, tmp_path / "r.html")
