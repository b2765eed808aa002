"""The small twins of the systems S0 to S5, pipelines of pipelines/twins/, run to their tables.

Likewise the pipeline of hints, the twin with a row for each pixel, and the one whose student sees other inputs than its
teacher.

Students beside the same net on true labels, over several seeds. Settings are those of the systems, or were written
down before the first run, but for S3 and S4: their first nets (1 442 weights and fewer, ten epochs) were still at 30
to 50 % on the validation split, so they were made larger. Runs that are finished are not repeated. With --write the
tables go to pipelines/README.md and to benchmarks/results/. Students are held to the last one of their pipeline: true
labels in a twin, and KD alone in that of hints, whose rates and weights were chosen on the validation split by seed 0.

    python benchmarks/twins.py --write
    python benchmarks/twins.py s1 s5
    python benchmarks/twins.py hints --write
    python benchmarks/twins.py pixels --write
    python benchmarks/twins.py cross_modal --write
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from measuring import TINY, conditions, fresh_folder, options, parse, table, write_result

from logitcache.config.build import teacher_folder
from logitcache.config.schema import load_pipeline
from logitcache.progress import silence
from logitcache.stages.run import run_pipeline
from logitcache.stages.train_student import Row
from logitcache.train.runs import RESULT

PIPELINES = Path(__file__).parent.parent / "pipelines"
END = "<!-- end -->"
TWINS = "twins"
OTHERS = {"hints": "hints_mnist", "pixels": "twins/pixels", "cross_modal": "twins/cross_modal"}
"""Pipelines with tables of their own, by the name on the command line."""
SMALL_TEACHER = ["teacher.model=mlp", "teacher.args={hidden: [16]}", "teacher.input=null"]
"""Of a tiny run; hints need modules of their own teacher."""


def main() -> None:
    parser = options(__doc__, writes="pipelines/README.md and benchmarks/results/")
    parser.add_argument(
        "names", nargs="*", help=f"some twins, such as s1, all by default; or one of {', '.join(OTHERS)}"
    )
    arguments = parse(parser)
    silence()
    what = arguments.names[0] if len(arguments.names) == 1 and arguments.names[0] in OTHERS else TWINS
    files = [PIPELINES / f"{OTHERS[what]}.yaml"] if what in OTHERS else sorted((PIPELINES / "twins").glob("s*.yaml"))
    sections = [conditions()]
    for file in files:
        if what in OTHERS or not arguments.names or file.stem in arguments.names:
            sections.append(section(file, tiny_of(what) if arguments.tiny else []))
            print(sections[-1], flush=True)
    if arguments.write:
        body = "\n\n".join(sections)
        path = write_result(what, f"# {what.capitalize()}\n\n{body}\n", device=torch.device("cpu"))
        readme = PIPELINES / "README.md"
        tables = "\n\n".join(sections[1:])
        begin = f"<!-- made by benchmarks/twins.py{'' if what == TWINS else f' {what}'} -->"
        made = f"{begin}\n\n{tables}\n\nResult: [{path.name}](../benchmarks/results/{path.name}).\n\n{END}"
        readme.write_text(re.sub(f"{begin}.*?{END}", lambda _: made, readme.read_text(), flags=re.DOTALL))


def tiny_of(what: str) -> list[str]:
    """Overrides of a tiny run; only the twins of systems have a teacher and data that others can take the place of."""
    if what in ("pixels", "cross_modal"):
        training = [override for override in TINY if not override.startswith("data.name=")]
        sizes = ["data.args={train: 40, validation: 8, test: 8}"] if what == "pixels" else []
        return [*tiny_places(), *training, *sizes]
    return tiny_overrides(SMALL_TEACHER if what == TWINS else [])


def tiny_overrides(more: Sequence[str] = ()) -> list[str]:
    """For a pipeline at the smallest size, in a folder of its own."""
    return [*TINY, *more, *tiny_places()]


def tiny_places() -> list[str]:
    """Two seeds, and a new folder for cache and runs."""
    folder = fresh_folder()
    return ["train.seeds=[0, 1]", f"cache.path={folder}/views.cache", f"runs.path={folder}/runs"]


def section(file: Path, overrides: Sequence[str]) -> str:
    """One pipeline's table, and what it says."""
    about = " ".join(line.lstrip("# ") for line in file.read_text().splitlines() if line.startswith("#"))
    pipeline = load_pipeline(file, overrides)
    rows = run_pipeline(pipeline, trust=True)
    teacher = json.loads((teacher_folder(pipeline) / RESULT).read_text())["accuracy"]
    cells = [
        [row.name, f"{row.parameters:,}", row.samples, len(row.seeds), f"{100 * (row.accuracy_mean or 0):.2f} ± "
         f"{100 * (row.accuracy_sd or 0):.2f}"]
        for row in rows
    ]  # fmt: skip
    header = ["student", "parameters", "samples", "seeds", "test accuracy, %"]
    if any(row.nll_mean is not None for row in rows):
        header.append("test NLL, nats per row")
        for cell, row in zip(cells, rows, strict=True):
            cell.append(f"{row.nll_mean or 0:.4f} ± {row.nll_sd or 0:.4f}")
    found = " ".join(difference(row, rows[-1]) for row in rows[:-1])
    return (
        f"### {file.stem.upper()}\n\n{about}\n\n`logitcache run {file.relative_to(PIPELINES.parent)}`. "
        f"Teacher top-1 accuracy: {100 * teacher:.2f} %.\n\n{table(header, cells)}\n\n{found}"
    )


def difference(row: Row, other: Row) -> str:
    """What a student gains over the same net that was trained otherwise."""
    assert row.accuracy_mean is not None
    assert other.accuracy_mean is not None
    points = 100 * (row.accuracy_mean - other.accuracy_mean)
    error = 100 * math.sqrt(sum((each.accuracy_sd or 0.0) ** 2 / len(each.seeds) for each in (row, other)))
    verdict = (
        "more than two standard errors"
        if abs(points) > 2 * error
        else "within two standard errors: no significant difference"
    )
    return f"{row.name} against {other.name}: {points:+.2f} points, {verdict} (standard error {error:.2f})."


if __name__ == "__main__":
    main()
