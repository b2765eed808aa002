"""Choose the hyperparameters of the demo's students on its validation split; the test split is never looked at.

Each kind of student gets a learning rate of its own, and the distilled ones a temperature, so that none is compared
at another's best setting. Prints validation accuracy, mean ± standard deviation over seeds that the demo does not
use; the pipeline file holds the winners, and `docs/design/0013-demo-settings.md` lists what was tried.

    python benchmarks/tune_mnist5k.py --folder runs/tune
    python benchmarks/tune_mnist5k.py --pipeline pipelines/mnist5k.yaml --folder runs/tune-mnist5k
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from measuring import TINY_MNIST5K, fresh_folder, options, parse, table

from logitcache.config.schema import load_pipeline
from logitcache.extras.demo import ALL, MATCHED, MISMATCHED, TENTH, clean_labels
from logitcache.stages.cache_teacher import cache_teacher
from logitcache.stages.train_student import Experiment, summarise
from logitcache.stages.train_teacher import train_teacher
from logitcache.train.loop import train

DEMO = Path(__file__).parent.parent / "pipelines" / "demo.yaml"


def main() -> None:
    parser = options(__doc__, writes=None)
    parser.add_argument("--pipeline", type=Path, default=DEMO)
    parser.add_argument("--folder", type=Path, default=Path("runs/tune"))
    parser.add_argument("--rates", type=float, nargs="+", default=[0.002, 0.004, 0.008])
    parser.add_argument("--temperatures", type=float, nargs="+", default=[1.0, 2.0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[10, 11, 12])
    parser.add_argument("overrides", nargs="*", help="key=value of the pipeline")
    arguments = parse(parser, rates=[0.002], temperatures=[1.0], seeds=[10])
    folder, tiny = (fresh_folder(), TINY_MNIST5K) if arguments.tiny else (arguments.folder, [])

    paths = [f"runs.path={folder}/runs", f"cache.path={folder}/views.cache"]
    pipeline = load_pipeline(arguments.pipeline, [*paths, *tiny, *arguments.overrides])
    train_teacher(pipeline)
    cache_teacher(pipeline)
    bench = Experiment(pipeline)
    bench.data = replace(bench.data, test=None)  # so that no run can report on it
    mismatched_labels = clean_labels(bench, folder / "clean.cache")
    cases = [(name, rate, None) for name in (TENTH, ALL) for rate in arguments.rates]
    cases += [
        (name, rate, temperature)
        for name in (MISMATCHED, MATCHED)
        for rate in arguments.rates
        for temperature in arguments.temperatures
    ]
    print(table(["setting", "validation accuracy, %"], []))
    for name, rate, temperature in cases:
        student = pipeline.student(MATCHED if name == MISMATCHED else name)
        loss = student.loss if temperature is None else {**student.loss, "temperature": temperature}
        label = f"{name}-lr{rate}" + ("" if temperature is None else f"-T{temperature}")
        student = student.model_copy(update={"name": label, "loss": loss, "train": {**student.train, "lr": rate}})
        labels = mismatched_labels if name == MISMATCHED else None
        results = [train(bench.job(student, seed, labels=labels)) for seed in arguments.seeds]
        print(f"| {label} | {summary(results)} |", flush=True)


def summary(results: list[dict[str, object]]) -> str:
    """Validation accuracy in per cent, mean ± standard deviation between seeds."""
    row = summarise("", [{**result, "accuracy": result["validation_accuracy"]} for result in results])
    spread = "" if row.accuracy_sd is None else f" ± {100 * row.accuracy_sd:.2f}"
    return f"{100 * (row.accuracy_mean or 0):.2f}{spread}"


if __name__ == "__main__":
    main()
