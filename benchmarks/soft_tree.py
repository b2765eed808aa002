"""The soft tree as a student: `pipelines/soft_tree_mnist.yaml`, run to its table.

Settings were chosen on the validation split by `benchmarks/tune_soft_tree.py`. Runs that are finished are not repeated.
With --write the table goes to pipelines/README.md and to benchmarks/results/.

    python benchmarks/soft_tree.py --write
"""

from __future__ import annotations

import json
import re

import torch
from measuring import conditions, options, parse, table, write_result
from twins import PIPELINES, difference, tiny_overrides

from logitcache.config.build import teacher_folder
from logitcache.config.schema import load_pipeline
from logitcache.progress import silence
from logitcache.stages.run import run_pipeline
from logitcache.train.runs import RESULT

BEGIN, END = "<!-- made by benchmarks/soft_tree.py -->", "<!-- end of the tree -->"
AGAINST = [
    ("distilled-tree", "tree-on-true-labels"),
    ("distilled-tree", "distilled-linear"),
    ("distilled-linear", "linear-on-true-labels"),
    ("tree-on-true-labels", "linear-on-true-labels"),
]


def main() -> None:
    parser = options(__doc__, writes="pipelines/README.md and benchmarks/results/")
    arguments = parse(parser)
    silence()
    stated = conditions()
    pipeline = load_pipeline(PIPELINES / "soft_tree_mnist.yaml", tiny_overrides() if arguments.tiny else [])
    rows = {row.name: row for row in run_pipeline(pipeline)}
    teacher = json.loads((teacher_folder(pipeline) / RESULT).read_text())["accuracy"]
    cells = [
        [row.name, f"{row.parameters:,}", f"{100 * (row.validation_accuracy_mean or 0):.2f}",
         f"{100 * (row.accuracy_mean or 0):.2f} ± {100 * (row.accuracy_sd or 0):.2f}"]
        for row in rows.values()
    ]  # fmt: skip
    header = [
        "student",
        "parameters",
        "validation accuracy, %",
        f"test accuracy, %, {len(next(iter(rows.values())).seeds)} seeds",
    ]
    found = "\n".join(f"- {difference(rows[one], rows[other])}" for one, other in AGAINST)
    body = (
        f"`logitcache run pipelines/soft_tree_mnist.yaml`. Teacher top-1 accuracy: {100 * teacher:.2f} %.\n\n"
        f"{table(header, cells)}\n\n{found}"
    )
    print(body)
    if arguments.write:
        path = write_result("soft-tree", f"# A tree as a student\n\n{stated}\n\n{body}\n", device=torch.device("cpu"))
        readme = PIPELINES / "README.md"
        made = f"{BEGIN}\n\n{body}\n\nResult: [{path.name}](../benchmarks/results/{path.name}).\n\n{END}"
        readme.write_text(re.sub(f"{BEGIN}.*{END}", lambda _: made, readme.read_text(), flags=re.DOTALL))


if __name__ == "__main__":
    main()
