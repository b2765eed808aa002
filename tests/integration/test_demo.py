"""The demo: what it prints, and what it refuses to conclude."""

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from logitcache.cache.creation import create
from logitcache.cache.reader import open_cache
from logitcache.data.views import Mixing, ViewDataset, ViewPlan
from logitcache.encodings import Dense
from logitcache.errors import UsageError
from logitcache.extras.demo import (
    COST_STUDENTS,
    MATCHED,
    MISMATCHED,
    CleanLabels,
    DemoResult,
    accuracy_finding,
    compare,
    compare_cost,
    cost_finding,
    demo_report,
    run_demo,
)
from logitcache.extras.printing import demo_summary, print_demo
from logitcache.extras.report.page import check_installed
from logitcache.stages.train_student import Row, summarise
from tests.models import pictures

SMALL = [
    "data.name=digits",
    "views.transform=[{RandomAffine: {degrees: 5}}]",
    "views.count=2",
    "teacher.model=mlp",
    "teacher.args={hidden: [16]}",
    "teacher.train={epochs: 1}",
    "train.epochs=2",
    "train.seeds=[0, 1]",
    "train.batch_size=64",
    "students.true-labels-of-a-tenth.train.epochs=2",
    "num_workers=0",
]
"""The demo in seconds: digits of 8 x 8 pixels, and little training."""


def results(accuracies: Sequence[float], seconds: float = 1.0) -> list[dict[str, Any]]:
    return [
        {
            "accuracy": accuracy,
            "validation_accuracy": None,
            "epoch_seconds": seconds + 0.01 * seed,
            "epochs": 10,
            "samples": 100,
            "parameters": 10,
            "seed": seed,
        }
        for seed, accuracy in enumerate(accuracies)
    ]


def row(name: str, *accuracies: float) -> Row:
    return summarise(name, results(accuracies))


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, DemoResult]:
    folder = tmp_path_factory.mktemp("demo")
    return folder, run_demo(folder, SMALL)


def test_the_demo_compares_cost_view_matching_and_few_labels(
    demo: tuple[Path, DemoResult], capsys: pytest.CaptureFixture[str]
) -> None:
    """A table with standard errors, three sentences, and the keys that scripts rely on."""
    _, result = demo
    summary = json.loads(json.dumps(demo_summary(result, None)))
    print_demo(result, None)
    printed = capsys.readouterr().out

    assert ["Cost", "View matching", "Few labels"] == [line.split(":")[0] for line in result.findings]
    assert {"name", "accuracy_mean", "accuracy_sd", "epoch_seconds", "accuracy_standard_error"} <= set(
        summary["rows"][0]
    )
    assert [row.accuracy_sd / math.sqrt(2) for row in result.rows if row.accuracy_sd is not None] == [
        row["accuracy_standard_error"] for row in summary["rows"]
    ]
    assert COST_STUDENTS == summary["cost"]["students"]
    assert "cached logits of the matching views" in printed
    assert "±" in printed


def test_a_demo_that_is_run_again_repeats_nothing_and_says_the_same(demo: tuple[Path, DemoResult]) -> None:
    """The time of stage 1 is kept beside the cache."""
    folder, result = demo

    assert result == run_demo(folder, SMALL)


def test_one_seed_gives_no_conclusion_and_no_timing(demo: tuple[Path, DemoResult]) -> None:
    folder, _ = demo
    result = run_demo(folder, [*SMALL, "train.seeds=[0]"])

    assert result.cost is None
    assert "Cost: no statement" in result.findings[0]
    assert all(line.endswith("; no conclusion from one seed.") for line in result.findings[1:])


def test_a_difference_that_the_seeds_cannot_carry_is_no_conclusion() -> None:
    rows = {MATCHED: row(MATCHED, 0.90, 0.94), MISMATCHED: row(MISMATCHED, 0.89, 0.93)}
    found = compare(rows[MATCHED], rows[MISMATCHED])

    assert not found.significant
    assert "no significant difference over 2 seeds" in accuracy_finding("View matching", found, rows)


def test_a_difference_that_the_seeds_carry_comes_with_its_interval() -> None:
    """Student's t for two groups of three: 2.776 standard errors either way."""
    rows = {MATCHED: row(MATCHED, 0.91, 0.92, 0.93), MISMATCHED: row(MISMATCHED, 0.81, 0.82, 0.83)}
    found = compare(rows[MATCHED], rows[MISMATCHED])

    assert pytest.approx(math.sqrt(2 / 3)) == found.standard_error
    assert pytest.approx((10 - 2.776 * math.sqrt(2 / 3), 10 + 2.776 * math.sqrt(2 / 3)), abs=1e-3) == found.interval
    assert "+10.0 points (95 % interval +7.7 to +12.3)." in accuracy_finding("View matching", found, rows)


def test_the_cost_of_the_cache_includes_running_the_teacher_once() -> None:
    cost = compare_cost(results([0.9, 0.9], seconds=3.0), results([0.9, 0.9], seconds=1.0), 20.0)

    assert cost is not None
    assert pytest.approx(COST_STUDENTS * 10 * 3.005) == cost.live_seconds
    assert pytest.approx(20.0 + COST_STUDENTS * 10 * 1.005) == cost.cached_seconds
    assert "running the teacher once (20 s) included" in cost_finding(cost)


def test_a_stage_1_that_was_interrupted_leaves_no_cost_to_compare() -> None:
    assert compare_cost(results([0.9, 0.9]), results([0.9, 0.9]), None) is None


@pytest.mark.parametrize("mixing", [Mixing(cutmix=1.0), Mixing(mixup=0.4)], ids=["cutmix", "mixup"])
def test_labels_of_the_clean_view_are_mixed_by_the_area_of_each_image(tmp_path: Path, mixing: Mixing) -> None:
    """With a teacher that is always right they are the mixed true labels, so only the augmentation is ignored."""
    dataset = pictures()
    logits = 50.0 * torch.nn.functional.one_hot(torch.from_numpy(dataset.targets), 10).float()
    where, encoding = tmp_path / "clean.cache", Dense(dtype="float32")
    with create(where, num_samples=40, num_classes=10, encoding=encoding, teacher="right", dataset="d") as writer:
        writer.write(view=0, start=0, logits=logits.numpy())
    views = ViewDataset(dataset, ViewPlan(mixing=mixing, num_classes=10))
    labels = CleanLabels(open_cache(where), views, torch.device("cpu"))
    labels.start_view(1, None)
    rows = torch.arange(len(dataset))
    mixed = torch.stack([views[(1, index)][2] for index in range(len(dataset))])

    torch.testing.assert_close(labels.logits(rows, None, mixed).softmax(dim=1), mixed, atol=1e-5, rtol=0)


def test_the_demo_needs_no_package_of_the_report_and_a_report_names_the_extra(
    demo: tuple[Path, DemoResult], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, result = demo
    monkeypatch.setitem(sys.modules, "vl_convert", None)
    report = demo_report(result, folder / "report.html")
    print_demo(result, report)
    with pytest.raises(UsageError, match=r"a report needs vl_convert: pip install 'logitcache\[report\]'"):
        check_installed()

    assert report is None
    assert "pip install 'logitcache[report]'" in capsys.readouterr().out
