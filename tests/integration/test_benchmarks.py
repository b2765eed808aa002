"""Every script in benchmarks/ runs, at the tiny size of its option `--tiny`."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.context import BaseContext
from pathlib import Path

import pytest

from tests.commands import Ended
from tests.programs import run_program

FOLDER = Path(__file__).parents[2] / "benchmarks"
SCRIPTS = sorted(path.stem for path in FOLDER.glob("*.py") if "\nif __name__ ==" in path.read_text())
RUNS = [*SCRIPTS, "twins pixels", "twins cross_modal"]
"""Each script alone, and the arguments that choose another pipeline."""
NUMBER = re.compile(r"[-+]?\d")
NOT_FINITE = re.compile(r"\b(nan|inf)\b")


@pytest.fixture(scope="module")
def results(request: pytest.FixtureRequest, forks: BaseContext) -> Iterator[Callable[[str], Future[Ended]]]:
    """The scripts that were selected, two at a time."""
    selected = [item.callspec.params["script"] for item in request.session.items if item.fspath == request.node.fspath]
    with ThreadPoolExecutor(2) as pool:
        running = {script: pool.submit(run_tiny, script, forks) for script in selected}
        yield running.__getitem__


def run_tiny(run: str, forks: BaseContext) -> Ended:
    script, *arguments = run.split()
    return run_program(forks, FOLDER / f"{script}.py", *arguments, "--tiny")


@pytest.mark.parametrize("script", RUNS)
def test_a_benchmark_ends_well_and_prints_a_table_of_finite_numbers(
    script: str, results: Callable[[str], Future[Ended]]
) -> None:
    """A script without a tiny run fails here."""
    if script == "trust" and not (FOLDER.parent / ".git").exists():
        pytest.skip("trust.py compares commits, and this is no git checkout")
    ended = results(script).result()

    assert 0 == ended.returncode, f"{ended.stdout[-2000:]}\n{ended.stderr[-4000:]}"
    cells = table_cells(ended.stdout)
    assert [] != [cell for cell in cells if NUMBER.match(cell)], ended.stdout
    assert [] == [cell for cell in cells if NOT_FINITE.search(cell)], ended.stdout


def table_cells(text: str) -> list[str]:
    """Cells of the rows under the headers of all Markdown tables."""
    cells, in_body = [], False
    for line in text.splitlines():
        if line.startswith("| ---"):
            in_body = True
        elif not line.startswith("| "):
            in_body = False
        elif in_body:
            cells += [cell.strip() for cell in line.strip("| ").split("|")]
    return cells
