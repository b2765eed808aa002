"""Losses of the user's own code, named `package.module:function`."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from logitcache.config.schema import Pipeline
from logitcache.errors import ShapeError, UntrustedCode, UsageError
from logitcache.losses import Loss, hint_loss_from_config, kl_divergence, load_code, loss_from_config
from logitcache.stages.cache_teacher import cache_teacher
from logitcache.stages.dry_run import plan_run
from logitcache.stages.train_student import train_students

Make = Callable[..., Pipeline]
HERE = "tests.integration.test_own_loss"
STUDENT, TEACHER, TARGET = torch.randn(4, 5), torch.randn(4, 5), torch.tensor([0, 1, 2, 3])


def own_kl(student: Tensor, teacher: Tensor, target: Tensor, temperature: float = 1.0) -> Tensor:
    return kl_divergence(student, teacher, temperature=temperature)


def mean_kl(student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
    return kl_divergence(student, teacher, reduction="mean")


@dataclass(frozen=True, kw_only=True)
class OwnKL(Loss):
    name: ClassVar[str] = "own_kl"
    temperature: float = 1.0

    def __call__(self, student_BC: Tensor, teacher_BC: Tensor | None, target: Tensor) -> Tensor:
        assert teacher_BC is not None
        return kl_divergence(student_BC, teacher_BC, temperature=self.temperature)


def loaded(config: Any) -> Loss:
    return load_code(loss_from_config(config), trust=False)


def test_a_student_trains_on_an_own_loss_as_on_the_built_in_one(tiny: Make, tmp_path: Path) -> None:
    pipeline = tiny()
    cache_teacher(pipeline)
    train_students(pipeline, ["small"])
    own = tiny(f"students.small.loss={{name: '{HERE}:own_kl', temperature: 2}}", f"runs.path={tmp_path}/own")
    train_students(own, ["small"])
    expected, found = (load_file(Path(each.runs.path) / "small/seed-0/last.safetensors") for each in (pipeline, own))

    assert all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.mark.parametrize("name", ["own_kl", "OwnKL"], ids=["function", "class"])
def test_parameters_reach_the_code(name: str) -> None:
    found = loaded({"name": f"{HERE}:{name}", "temperature": 3.0})(STUDENT, TEACHER, TARGET)

    assert torch.equal(kl_divergence(STUDENT, TEACHER, temperature=3.0), found)


def test_it_may_be_scheduled_weighted_and_staged() -> None:
    scheduled = {"name": f"{HERE}:own_kl", "temperature": {"from": 4, "to": 2}}
    weighted = loaded({"name": "weighted", "parts": [{"loss": scheduled, "weight": 2}]})
    staged = loaded({"stages": [{"until": 0.5, "loss": "cross_entropy"}, {"loss": scheduled}]})

    assert torch.equal(2 * kl_divergence(STUDENT, TEACHER, temperature=3.0), weighted.at(0.5)(STUDENT, TEACHER, TARGET))
    assert torch.equal(kl_divergence(STUDENT, TEACHER, temperature=3.0), staged.at(0.75)(STUDENT, TEACHER, TARGET))


def test_reading_a_pipeline_imports_no_code(tmp_path: Path) -> None:
    (tmp_path / "tells.py").write_text("print('imported')\n\ndef loss(student, teacher, target): ...\n")
    config = {"name": "x", "data": {"name": "digits"}, "teacher": {"model": "mlp"}, "cache": {"path": "x.cache"}}
    config["students"] = [{"name": "a", "model": "mlp", "loss": "tells:loss"}]
    program = f"from logitcache.config.schema import parse_pipeline as p; p({json.dumps(config)}, source='x')"

    assert "" == subprocess.check_output([sys.executable, "-c", program], text=True, cwd=tmp_path)


def test_code_from_outside_the_working_directory_needs_trust(tiny: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = tiny("students.small.loss=torch.nn.functional:mse_loss")
    cache_teacher(pipeline)
    with pytest.raises(UntrustedCode, match="torch.nn.functional:mse_loss"):
        train_students(pipeline, ["small"])

    assert ["torch.nn.functional:mse_loss would run"] == [line[:38] for line in plan_run(pipeline).missing]


def test_a_dry_run_lists_code_that_is_missing(tiny: Make) -> None:
    [missing] = plan_run(tiny("students.small.loss=tests.nowhere:loss")).missing

    assert "tests.nowhere:loss" in missing


def test_mistakes_are_named() -> None:
    with pytest.raises(ShapeError, match=r"mean_kl returned \(\); expected one number for each sample, \(4,\)"):
        loaded(f"{HERE}:mean_kl")(STUDENT, TEACHER, TARGET)
    with pytest.raises(UsageError, match="is a str; expected a function or a loss class"):
        loaded(f"{HERE}:HERE")
    with pytest.raises(
        UsageError, match="has no parameter 'heat'.*its parameters|has no parameter 'heat'; it has: temperature"
    ):
        loaded({"name": f"{HERE}:OwnKL", "heat": 3})
    with pytest.raises(UsageError, match="is not loaded"):
        loss_from_config(f"{HERE}:own_kl")(STUDENT, TEACHER, TARGET)
    with pytest.raises(UsageError, match="expected a loss of teacher and student alone"):
        hint_loss_from_config(f"{HERE}:own_kl")
