"""The command that writes a starter pipeline."""

from __future__ import annotations

from enum import StrEnum
from importlib.resources import files
from pathlib import Path
from typing import Annotated

import typer

from logitcache.cli.application import PIPELINES, JsonOption, app, show
from logitcache.cli.printing import say
from logitcache.errors import UsageError


class DataKind(StrEnum):
    """Kinds of data that a starter pipeline reads."""

    folders = "folders"
    arrays = "arrays"
    huggingface = "huggingface"
    logits = "logits"
    text = "text"


STARTERS = {
    DataKind.folders: {"pipeline.yaml": "folders.yaml"},
    DataKind.arrays: {"pipeline.yaml": "arrays.yaml", "my_data.py": "arrays.py"},
    DataKind.huggingface: {"pipeline.yaml": "huggingface.yaml", "my_data.py": "huggingface.py"},
    DataKind.logits: {"pipeline.yaml": "logits.yaml", "my_data.py": "arrays.py", "make_cache.py": "make_cache.py"},
    DataKind.text: {"pipeline.yaml": "text.yaml"},
}
"""File to write -> file in `logitcache.cli.starters`."""


@app.command("init", rich_help_panel=PIPELINES)
def init_command(
    folder: Annotated[Path, typer.Argument(help="Folder to write to.")] = Path(),
    data: Annotated[
        DataKind,
        typer.Option(
            help="Images in folders, images in arrays (.npz), a Hugging Face dataset, your own logits, or texts for a "
            "language model."
        ),
    ] = DataKind.folders,
    as_json: JsonOption = False,
) -> None:
    """Write a commented starter pipeline; existing files are never overwritten."""
    written = {folder / name: source for name, source in STARTERS[data].items()}
    for path in written:
        if path.exists():
            raise UsageError(f"{path} exists already; choose another folder or delete it")
    folder.mkdir(parents=True, exist_ok=True)
    for path, source in written.items():
        path.write_text((files("logitcache.cli.starters") / source).read_text("utf-8"), encoding="utf-8")
    names = [str(path) for path in written]

    def print_written() -> None:
        enter = "" if folder == Path() else f"cd {folder} && "
        # Its `load` downloads; the others only read.
        check = "run --dry-run" if data is DataKind.huggingface else "run --dry-run --require-data"
        say(f"Wrote {', '.join(names)}.\nEdit, then check: {enter}logitcache {check} pipeline.yaml")

    show({"files": names}, as_json, print_written)
