"""Choose the hyperparameters of `pipelines/mnist5k.yaml` on its validation split; the test split is never looked at.

Each kind of student gets a learning rate of its own, and the distilled ones a temperature, so that none is compared
at another's best setting. Prints validation accuracy, mean over seeds; the pipeline file holds the winners.

    python benchmarks/tune_mnist5k.py --folder runs/tune
"""

from __future__ import annotations

from pathlib import Path

from measuring import TINY_MNIST5K, fresh_folder, options, parse, table

from logitcache.extras.demo import ALL, MATCHED, TENTH, embedded_pipeline
from logitcache.stages.cache_teacher import cache_teacher
from logitcache.stages.train_student import Experiment, summarise
from logitcache.stages.train_teacher import train_teacher
from logitcache.train.loop import train


def main() -> None:
    parser = options(__doc__, writes=None)
    parser.add_argument("--folder", type=Path, default=Path("runs/tune"))
    parser.add_argument("--rates", type=float, nargs="+", default=[0.002, 0.004, 0.008])
    parser.add_argument("--temperatures", type=float, nargs="+", default=[1.0, 2.0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[10, 11])
    parser.add_argument("overrides", nargs="*", help="key=value of the pipeline")
    arguments = parse(parser, rates=[0.002], temperatures=[1.0], seeds=[10])
    folder, tiny = (fresh_folder(), TINY_MNIST5K) if arguments.tiny else (arguments.folder, [])

    paths = [f"runs.path={folder}/runs", f"cache.path={folder}/views.cache"]
    pipeline = embedded_pipeline([*paths, *tiny, *arguments.overrides])
    train_teacher(pipeline)
    cache_teacher(pipeline)
    bench = Experiment(pipeline)
    cases = [(name, rate, None) for name in (TENTH, ALL) for rate in arguments.rates]
    cases += [(MATCHED, rate, temperature) for rate in arguments.rates for temperature in arguments.temperatures]
    print(table(["setting", "validation accuracy, %"], []))
    for name, rate, temperature in cases:
        student = pipeline.student(name)
        loss = student.loss if temperature is None else {**student.loss, "temperature": temperature}
        label = f"{name}-lr{rate}" + ("" if temperature is None else f"-T{temperature}")
        student = student.model_copy(update={"name": label, "loss": loss, "train": {**student.train, "lr": rate}})
        # Without the test split no run can report on it.
        bench.data = type(bench.data)(**{**vars(bench.data), "test": None})
        row = summarise(label, [train(bench.job(student, seed)) for seed in arguments.seeds])
        print(f"| {label} | {100 * (row.validation_accuracy_mean or 0):.2f} |", flush=True)


if __name__ == "__main__":
    main()
