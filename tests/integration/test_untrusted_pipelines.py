"""A pipeline from somebody else runs no code, in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

CHECKOUT = str(Path(__file__).parents[2])

PIPELINE = """
name: attack
data: {{name: "{data}", args: {args}}}
views: {{count: 1, transform: {transform}}}
teacher: {{model: mlp, weights: random}}
cache: {{path: {path}/attack.cache}}
"""


@pytest.mark.parametrize(("folder", "place"), [("/", "data"), (sys.base_prefix, "views"), ("here", "views")])
def test_a_strangers_pipeline_runs_nothing(tmp_path: Path, folder: str, place: str) -> None:
    marker = tmp_path / "executed"
    attack = f"{{command: 'touch {marker}'}}"
    settings = {"data": "digits", "args": "{}", "transform": "clean", "path": tmp_path}
    settings |= (
        {"data": "os:system", "args": attack} if place == "data" else {"transform": f"[{{'os:system': {attack}}}]"}
    )
    (tmp_path / "p.yaml").write_text(PIPELINE.format(**settings))
    (tmp_path / "here").mkdir()
    program = f"import sys; sys.path.insert(0, {CHECKOUT!r}); from logitcache.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-P", "-c", program, "cache-teacher", str(tmp_path / "p.yaml")],
        cwd=tmp_path / folder,
        capture_output=True,
        text=True,
        check=False,
    )

    assert (2, False) == (done.returncode, marker.exists()), done.stderr
    assert "os:system would run code from outside the working directory" in done.stderr
    assert "--trust" in done.stderr
