"""Choose the hyperparameters of `pipelines/soft_tree_mnist.yaml` on its validation split; no test split is looked at.

Every student gets a learning rate of its own, the trees a strength of their penalty, and those that are distilled a
temperature. All tries share rendered batches. Prints validation accuracy, mean over seeds; the pipeline file holds the
winners.

    python benchmarks/tune_soft_tree.py --folder runs/tune-soft-tree
"""

from __future__ import annotations

import itertools
from pathlib import Path

from measuring import TINY, fresh_folder, options, parse, table

from logitcache.config.schema import load_pipeline
from logitcache.stages.cache_teacher import cache_teacher
from logitcache.stages.train_student import Experiment, summarise, train_by_turns
from logitcache.stages.train_teacher import train_teacher
from logitcache.train.ranks import ALONE

PIPELINE = Path(__file__).parent.parent / "pipelines" / "soft_tree_mnist.yaml"


def main() -> None:
    parser = options(__doc__, writes=None)
    parser.add_argument("--folder", type=Path, default=Path("runs/tune-soft-tree"))
    parser.add_argument("--rates", type=float, nargs="+", default=[0.003, 0.01, 0.03])
    parser.add_argument("--balances", type=float, nargs="+", default=[0.01, 0.1])
    parser.add_argument("--temperatures", type=float, nargs="+", default=[1.0, 2.0, 4.0])
    parser.add_argument("--students", nargs="+", help="some of them; all by default")
    parser.add_argument("--seeds", type=int, nargs="+", default=[10, 11])
    arguments = parse(parser, rates=[0.01], balances=[0.1], temperatures=[1.0], seeds=[10])
    folder, tiny = (fresh_folder(), TINY) if arguments.tiny else (arguments.folder, [])

    paths = [f"runs.path={folder}/runs", f"cache.path={folder}/views.cache"]
    pipeline = load_pipeline(PIPELINE, [*paths, *tiny, f"train.seeds={arguments.seeds}", "together=true"])
    train_teacher(pipeline)
    cache_teacher(pipeline)
    tries = []
    for student in pipeline.students:
        if arguments.students and student.name not in arguments.students:
            continue
        balances = arguments.balances if student.model == "soft_tree" else [None]
        temperatures = arguments.temperatures if "temperature" in student.loss else [None]
        for rate, balance, temperature in itertools.product(arguments.rates, balances, temperatures):
            args = student.args if balance is None else {**student.args, "balance": balance}
            loss = student.loss if temperature is None else {**student.loss, "temperature": temperature}
            label = f"{student.name}-lr{rate}" + ("" if balance is None else f"-balance{balance}")
            label += "" if temperature is None else f"-T{temperature}"
            changed = {"name": label, "args": args, "loss": loss, "train": {**student.train, "lr": rate}}
            tries.append(student.model_copy(update=changed))
    bench = Experiment(pipeline)
    # Without the test split no run can report on it.
    bench.data = type(bench.data)(**{**vars(bench.data), "test": None})
    print(table(["setting", "validation accuracy, %"], []))
    for name, results in train_by_turns(bench, tries, ALONE).items():
        row = summarise(name, results)
        print(f"| {name} | {100 * (row.validation_accuracy_mean or 0):.2f} |", flush=True)


if __name__ == "__main__":
    main()
