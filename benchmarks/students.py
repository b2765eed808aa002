"""The tables of students in the README: of `logitcache demo --full`, or of a pipeline, with what they were measured on.

    python benchmarks/students.py demo --write
    python benchmarks/students.py pipelines/fashion_mnist.yaml --write

Runs whatever is not done yet, in the folders that the pipeline names (`runs/demo` for the demo), so it may take as long
as the pipeline; a second call only prints.
"""

from __future__ import annotations

import math
import sys
import time
from pathlib import Path

from measuring import TINY_MNIST5K, conditions, fresh_folder, options, parse, table, write_result

from logitcache.config.schema import load_pipeline
from logitcache.devices import pick_device
from logitcache.errors import DatasetUnavailable
from logitcache.extras.demo import run_demo
from logitcache.stages.run import run_pipeline
from logitcache.stages.train_student import Row
from logitcache.stages.train_teacher import train_teacher


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("pipeline", nargs="?", default="demo", help='a pipeline file, or "demo"')
    parser.add_argument("overrides", nargs="*", help="key=value of the pipeline")
    parser.add_argument("--folder", type=Path, default=Path("runs/demo"), help="of the demo")
    arguments = parse(parser)
    folder = fresh_folder() if arguments.tiny else arguments.folder
    overrides = [*(TINY_MNIST5K if arguments.tiny else []), *arguments.overrides]

    before = conditions()
    start = time.perf_counter()
    if arguments.pipeline == "demo":
        result = run_demo(folder, overrides, full=not arguments.tiny)
        subject, rows, teacher_accuracy, findings = "demo", result.rows, result.teacher["accuracy"], result.findings
    else:
        pipeline = load_pipeline(arguments.pipeline, overrides)
        rows = run_pipeline(pipeline)
        subject, teacher_accuracy, findings = pipeline.name, train_teacher(pipeline)["accuracy"], []
    minutes = (time.perf_counter() - start) / 60

    body = f"# Students of {subject}\n\n{before}\n- wall time of this call: {minutes:.1f} minutes\n\n"
    body += f"The teacher's test accuracy is {100 * teacher_accuracy:.2f} %.\n\n{students_table(rows)}\n"
    body += "".join(f"\n- {line}" for line in findings) + ("\n" if findings else "")
    print(body)
    if arguments.write:
        print(write_result(subject, body, device=pick_device("auto")))


def students_table(rows: list[Row]) -> str:
    """Accuracy in per cent, mean ± standard deviation between seeds; its standard error; median seconds of an epoch."""
    lines = []
    for row in rows:
        spread = "" if row.accuracy_sd is None else f" ± {100 * row.accuracy_sd:.2f}"
        error = "-" if row.accuracy_sd is None else f"{100 * row.accuracy_sd / math.sqrt(len(row.seeds)):.2f}"
        accuracy = "-" if row.accuracy_mean is None else f"{100 * row.accuracy_mean:.2f}{spread}"
        seconds = "-" if row.epoch_seconds is None else f"{row.epoch_seconds:.2f}"
        lines.append([row.name, f"{row.parameters:,}", f"{row.samples:,}", len(row.seeds), accuracy, error, seconds])
    header = ["student", "parameters", "samples", "seeds", "test accuracy, %", "standard error", "seconds an epoch"]
    return table(header, lines)


if __name__ == "__main__":
    try:
        main()
    except DatasetUnavailable as error:
        sys.exit(str(error))
