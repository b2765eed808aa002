"""The programs in examples/ run, and do in several processes what one process does."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import logitcache
from tests.needs import need_package

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_an_example_is_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 60


def run(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [name, str(folder)])
    runpy.run_path(str(EXAMPLES / f"{name}.py"))


def test_a_trainer_distils_an_image_classifier(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    need_package("transformers", "hf")
    run("trainer_images", tmp_path, monkeypatch)
    [accuracy] = re.findall(r"^student: ([\d.]+)%$", capsys.readouterr().out, re.MULTILINE)

    assert float(accuracy) > 80


def test_a_trainer_distils_a_language_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    need_package("transformers", "hf")
    run("trainer_language_model", tmp_path, monkeypatch)
    [perplexity] = re.findall(r"^student: perplexity ([\d.]+) per token$", capsys.readouterr().out, re.MULTILINE)

    assert float(perplexity) < 250, "of 400 tokens"


@pytest.fixture(name="ranks", scope="module")
def _ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """What two processes under torchrun found, and the folder of their caches."""
    need_package("transformers", "hf")
    folder = tmp_path_factory.mktemp("ranks")
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "tests.several_processes"]
    ended = subprocess.run(
        [sys.executable, *command, str(folder)],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(EXAMPLES.parent)},
    )
    assert 0 == ended.returncode, ended.stderr
    return folder, [torch.load(folder / f"rank-{rank}.pt") for rank in range(2)]


def test_processes_of_a_loop_divide_the_samples_of_each_view(ranks: Any) -> None:
    first, second = (found["example"]["read"] for found in ranks[1])

    for epoch in range(4):
        assert {epoch} == {view for view, _ in first[epoch] + second[epoch]}
        assert list(range(1400)) == sorted(sample for _, sample in first[epoch] + second[epoch])


def test_processes_of_a_loop_average_their_gradients(ranks: Any) -> None:
    """The weights are those of one process with the batches of both, up to rounding."""
    folder, (first, second) = ranks
    cache = logitcache.open(folder / "digits.cache")
    plan, views = digits_of_the_example()
    cache.check_plan(plan)
    sampler = logitcache.ViewSampler(views, cycle=cache.views)
    torch.manual_seed(0)
    student = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    optimizer = torch.optim.Adam(student.parameters(), lr=0.01)
    for epoch in range(8):
        sampler.set_epoch(epoch)
        for index, inputs, _ in torch.utils.data.DataLoader(views, batch_size=64, sampler=sampler):
            loss = logitcache.losses.kl_divergence(student(inputs), cache.logits(index), temperature=2.0)
            optimizer.zero_grad()
            loss.mean().backward()
            optimizer.step()

    for name, value in student.state_dict().items():
        assert torch.equal(first["example"]["weights"][name], second["example"]["weights"][name])
        torch.testing.assert_close(first["example"]["weights"][name], value, atol=1e-3, rtol=1e-3)


def digits_of_the_example() -> tuple[logitcache.ViewPlan, logitcache.ViewDataset]:
    from sklearn.datasets import load_digits
    from torchvision.transforms import v2

    pixels, classes = load_digits(return_X_y=True)
    images = torch.tensor(pixels / 16, dtype=torch.float32).reshape(-1, 1, 8, 8)
    dataset = [(images[number], int(classes[number])) for number in range(1400)]
    plan = logitcache.ViewPlan(transform=v2.RandomAffine(degrees=10, translate=(0.1, 0.1)), seed=0)
    return plan, logitcache.ViewDataset(dataset, plan)


def test_the_loop_of_the_guide_with_accelerate_is_the_plain_loop(ranks: Any) -> None:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    guide = (EXAMPLES.parent / "docs/integrations.md").read_text()
    [program] = re.findall(r"\*\*Accelerate\*\* .*?```python\n(.*?)^```", guide, flags=re.DOTALL | re.MULTILINE)
    plan, views = digits_of_the_example()
    cache = logitcache.open(ranks[0] / "digits.cache")
    cache.check_plan(plan)
    parts = {"cache": cache, "views": views, "logitcache": logitcache, "DataLoader": torch.utils.data.DataLoader}
    namespace: dict[str, Any] = parts | a_student() | {"accelerator": Accelerator(cpu=True)}
    try:
        exec(program, namespace)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    plain = a_student()
    sampler = logitcache.ViewSampler(views, cycle=cache.views)
    for epoch in range(16):
        sampler.set_epoch(epoch)
        for index, inputs, _ in torch.utils.data.DataLoader(views, batch_size=64, sampler=sampler):
            logits = plain["student"](inputs)
            plain["optimizer"].zero_grad()
            logitcache.losses.kl_divergence(logits, cache.logits(index), temperature=2.0, reduction="mean").backward()
            plain["optimizer"].step()

    expected, found = (each["student"].state_dict() for each in (plain, namespace))
    assert all(torch.equal(value, found[name]) for name, value in expected.items())


def a_student() -> dict[str, Any]:
    torch.manual_seed(0)
    student = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    return {"student": student, "optimizer": torch.optim.Adam(student.parameters(), lr=0.01)}


def test_processes_of_a_prepared_loader_divide_the_samples_of_each_view(ranks: Any) -> None:
    first, second = (found["accelerated"] for found in ranks[1])

    for epoch in range(3):
        views, samples = logitcache.split_index(first[epoch] + second[epoch])
        assert ({epoch}, list(range(40))) == (set(views.tolist()), sorted(samples.tolist()))


def test_a_trainer_in_several_processes_resumes_within_an_epoch(ranks: Any) -> None:
    """Three steps per epoch; the resumed run starts at the second step of the second one."""
    for found in ranks[1]:
        whole, resumed = found["whole"], found["resumed"]

        assert whole["read"][4:] == resumed["read"]
        assert all(torch.equal(value, resumed["weights"][name]) for name, value in whole["weights"].items())
    for epoch in range(3):
        steps = [step for found in ranks[1] for step in found["whole"]["read"][3 * epoch : 3 * epoch + 3]]
        views, samples = logitcache.split_index([number for step in steps for number in step])
        assert ({epoch}, set(range(40))) == (set(views.tolist()), set(samples.tolist()))
