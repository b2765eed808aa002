"""The pipelines of text (S6) and speech (S7): students of the cache, of all true labels and of a tenth of them.

A fourth student starts from the weights of the cache's student and is fine-tuned on the true labels of a tenth. Each
student is trained with several learning rates and the first seed; the rate with the best validation accuracy is
then trained with the other seeds. The test split chooses nothing. Runs that are finished are not repeated. With --write
each pipeline's table goes to benchmarks/results/.

    python pipelines/wordnet_minilm.py; python benchmarks/text_and_speech.py wordnet_minilm --write
    python pipelines/spoken_words_whisper.py; python benchmarks/text_and_speech.py spoken_words_whisper --write
"""

from __future__ import annotations

import json
import math
import statistics
import wave
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring import TINY, byte_tokenizer, conditions, fresh_folder, options, parse, table, write_result

from logitcache.catalog.calling import model_logits
from logitcache.catalog.models import load_weights
from logitcache.config.build import clean_views, resolve_model, student_folder
from logitcache.config.schema import Pipeline, StudentConfig, load_pipeline
from logitcache.data.loading import rendered_batches
from logitcache.data.order import batches, run_seed
from logitcache.losses import loss_from_config
from logitcache.progress import silence
from logitcache.stages.cache_teacher import cache_teacher
from logitcache.stages.train_student import Experiment
from logitcache.stages.train_teacher import train_teacher
from logitcache.train.loop import train

# S seeds, N samples of the test split

PIPELINES = Path(__file__).parent.parent / "pipelines"
TEXT, SPEECH = "wordnet_minilm", "spoken_words_whisper"
RATES = {TEXT: [0.002, 0.008], SPEECH: [0.004, 0.012]}
DISTILLED, TENTH, FINE_TUNED = "distilled", "a-tenth-of-the-labels", "distilled-then-a-tenth"
FINE_TUNING = 0.1
"""Of the learning rates and of the epochs on a tenth of the labels."""
PACKAGES = ("transformers", "tokenizers", "ctranslate2")
BATCH_SIZE = 256
WEIGHTS = "last.safetensors"


@dataclass
class Measured:
    """A student at its best learning rate."""

    name: str
    runs: list[Path]
    """Folder of each seed's run."""
    true_labels: int
    """How many the student's loss uses."""
    rate: float
    tried: dict[float, float]
    """Validation accuracy of the first seed at each rate."""
    results: list[dict[str, Any]]
    """Of each seed."""
    correct: np.ndarray
    """Whether each test sample is classified correctly, by each seed, bool (S, N)."""

    @property
    def accuracies(self) -> list[float]:
        """Test accuracy of each seed."""
        return [result["accuracy"] for result in self.results]

    def cells(self) -> list[object]:
        """A line of the table."""
        validation = [100 * result["validation_accuracy"] for result in self.results]
        test = [100 * accuracy for accuracy in self.accuracies]
        error = f"{statistics.stdev(test) / math.sqrt(len(test)):.2f}" if len(test) > 1 else "-"
        return [self.name, f"{self.true_labels:,}", f"{self.rate:g}", spread(validation), spread(test), error]


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("names", nargs="*", help=f"{TEXT}, {SPEECH}; both by default")
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parse(parser, seeds=2)
    silence()
    stated = conditions() + f"\n- other packages: {other_versions()}"
    for name in arguments.names or (TEXT, SPEECH):
        if name not in RATES:
            parser.error(f"{name} is neither {TEXT} nor {SPEECH}")
        overrides = {TEXT: tiny_text, SPEECH: tiny_speech}[name](fresh_folder()) if arguments.tiny else []
        pipeline = load_pipeline(PIPELINES / f"{name}.yaml", overrides)
        body = f"# {name}\n\n{stated}\n\n{section(pipeline, RATES[name], arguments.seeds)}\n"
        print(body, flush=True)
        if arguments.write:
            print(write_result(name, body, device=torch.device("cpu")))


def section(pipeline: Pipeline, rates: list[float], num_seeds: int) -> str:
    """Run a pipeline; its table, and the differences between its students."""
    teacher = train_teacher(pipeline, trust=True)
    print(f"teacher: {teacher['accuracy']:.4f}, validation {teacher['validation_accuracy']:.4f}", flush=True)
    cache_teacher(pipeline, trust=True)
    experiment = Experiment(pipeline, trust=True)
    measured = {student.name: measure(experiment, student, rates, num_seeds) for student in pipeline.students}
    tenth = pipeline.student(TENTH)
    epochs = max(1, round(FINE_TUNING * pipeline.train_config(tenth).epochs))
    tuned = tenth.model_copy(update={"name": FINE_TUNED, "train": {**tenth.train, "epochs": epochs}})
    lower = [FINE_TUNING * rate for rate in rates]
    measured[FINE_TUNED] = measure(experiment, tuned, lower, num_seeds, start_from=measured[DISTILLED].runs)
    data = experiment.data
    assert data.test is not None
    assert data.validation is not None
    header = ["student", "true labels", "learning rate", "validation accuracy, %", "test accuracy, %", "SE"]
    pairs = [
        (DISTILLED, "true-labels"), (DISTILLED, TENTH), (FINE_TUNED, DISTILLED), (FINE_TUNED, TENTH)
    ]  # fmt: skip
    differences = [difference(measured[one], measured[other]) for one, other in pairs]
    tried = [
        [each.name, "; ".join(f"{rate:g}: {100 * accuracy:.2f}" for rate, accuracy in each.tried.items())]
        for each in measured.values()
    ]
    return (
        f"{len(data.train):,} samples for training, {len(data.validation):,} for validation, {len(data.test):,} for "
        f"the test. The teacher, trained on all true labels, has a test accuracy of {100 * teacher['accuracy']:.2f} % "
        f"and a validation accuracy of {100 * teacher['validation_accuracy']:.2f} %.\n\n"
        f"Mean ± standard deviation between {num_seeds} seeds; SE is the standard error of the mean between seeds.\n\n"
        f"{table(header, [each.cells() for each in measured.values()])}\n\n"
        "Differences of test accuracy in points. Seeds are paired: the same seed has the same initial weights. The SE "
        "between test samples is that of the paired mean over samples, each averaged over seeds; a difference is shown "
        "where it exceeds twice the root of the sum of both squared.\n\n"
        f"{table(['difference', 'mean', 'SE between seeds', 'SE between test samples', 'shown'], differences)}\n\n"
        "The first seed at each learning rate; the best one was trained with all seeds.\n\n"
        f"{table(['student', 'learning rate: validation accuracy, %'], tried)}"
    )


def measure(
    experiment: Experiment,
    student: StudentConfig,
    rates: list[float],
    num_seeds: int,
    start_from: list[Path] | None = None,
) -> Measured:
    """Choose a student's learning rate on the validation split, and train it with all seeds.

    Args:
        experiment: of the pipeline.
        student: of the pipeline, or derived from one.
        rates: to choose from.
        num_seeds: S.
        start_from: the run of each seed whose weights the student starts from.
    """

    def run(seed: int, rate: float) -> tuple[StudentConfig, dict[str, Any]]:
        weights = None if start_from is None else str(start_from[seed] / WEIGHTS)
        update = {"name": f"{student.name}-lr{rate:g}", "weights": weights, "train": {**student.train, "lr": rate}}
        candidate = student.model_copy(update=update)
        return candidate, train(experiment.job(candidate, seed))

    tried = {rate: run(0, rate)[1]["validation_accuracy"] for rate in rates}
    best = max(tried, key=tried.__getitem__)
    runs = [run(seed, best) for seed in range(num_seeds)]  # that of seed 0 is not repeated
    results = [result for _, result in runs]
    measured = Measured(
        name=student.name,
        runs=[student_folder(experiment.pipeline, chosen.name, seed) for seed, (chosen, _) in enumerate(runs)],
        true_labels=results[0]["samples"] if loss_from_config(student.loss).needs_target else 0,
        rate=best,
        tried=tried,
        results=results,
        correct=np.stack([correct(experiment, chosen, seed) for seed, (chosen, _) in enumerate(runs)]),
    )
    if not np.allclose(measured.accuracies, measured.correct.mean(axis=1)):
        raise SystemExit(f"{student.name}: stored weights have another test accuracy than the run's result")
    print(measured.cells(), flush=True)
    return measured


def correct(experiment: Experiment, student: StudentConfig, seed: int) -> np.ndarray:
    """Whether a trained student classifies each test sample correctly, bool (N,)."""
    pipeline, data = experiment.pipeline, experiment.data
    assert data.test is not None
    model = resolve_model(student, data, experiment.plan, weights=None, seed=run_seed(seed), trust=True)
    load_weights(model, student_folder(pipeline, student.name, seed) / WEIGHTS)
    model.eval()
    views = clean_views(data.test, student, pipeline, trust=True)
    places = [[(0, index) for index in batch.tolist()] for batch in batches(np.arange(len(views)), BATCH_SIZE)]
    with torch.inference_mode():
        found = [
            model_logits(model, inputs).argmax(dim=1) == targets.flatten()
            for _, inputs, targets in rendered_batches(views, places, num_workers=0)
        ]
    return torch.cat(found).numpy()


def difference(one: Measured, other: Measured) -> list[object]:
    """A line of the table of differences."""
    points_SN = 100 * (one.correct.astype(float) - other.correct)
    points_S, points_N = points_SN.mean(axis=1), points_SN.mean(axis=0)
    between_seeds = float(points_S.std(ddof=1) / math.sqrt(len(points_S))) if len(points_S) > 1 else 0.0
    between_samples = float(points_N.std(ddof=1) / math.sqrt(len(points_N)))
    mean = float(points_SN.mean())
    shown = abs(mean) > 2 * math.hypot(between_seeds, between_samples)
    return [
        f"{one.name} - {other.name}", f"{mean:+.2f}", f"{between_seeds:.2f}", f"{between_samples:.2f}",
        "yes" if shown else "no",
    ]  # fmt: skip


def spread(values: list[float]) -> str:
    """Mean and standard deviation between seeds."""
    return f"{statistics.fmean(values):.2f}" + (f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else "")


def other_versions() -> str:
    """Of packages that only some of the pipelines need."""
    found = []
    for name in PACKAGES:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            found.append(f"no {name}")
    return ", ".join(found)


def tiny(folder: Path) -> list[str]:
    """Overrides of a tiny run of both pipelines."""
    return [
        *(override for override in TINY if not override.startswith("data.name=")),
        "students.a-tenth-of-the-labels.train.epochs=1",
        f"cache.path={folder}/views.cache",
        f"runs.path={folder}/runs",
    ]


def tiny_text(folder: Path) -> list[str]:
    """Overrides for lines of two classes as bytes, and a random BERT as the teacher."""
    for split in ("train", "val", "test"):
        lines = [
            {"key": f"{split}-{number}", "text": f"{'aaa' if number % 2 else 'bbb'} {number}", "label": number % 2}
            for number in range(40)
        ]
        (folder / "text").mkdir(exist_ok=True)
        (folder / "text" / f"{split}.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    model = (
        "{config: {model_type: bert, hidden_size: 16, intermediate_size: 16, num_hidden_layers: 1, "
        "num_attention_heads: 2, max_position_embeddings: 64, pad_token_id: 0}}"
    )
    return [
        f"data.root={folder / 'text'}",
        f"data.args.tokenizer={byte_tokenizer(folder)}",
        "teacher.model=transformers",
        f"teacher.args={model}",
        *tiny(folder),
    ]


def tiny_speech(folder: Path) -> list[str]:
    """Overrides for tones of two heights, and a CNN as the teacher."""
    rate = 16_000
    times = np.arange(rate // 4) / rate
    for split in ("train", "val", "test"):
        for number in range(40):
            file = folder / "clips" / split / f"tone-{number % 2}" / f"{number}.wav"
            file.parent.mkdir(parents=True, exist_ok=True)
            tone = np.sin(2 * np.pi * (400 + 800 * (number % 2) + number) * times)
            with wave.open(str(file), "wb") as out:
                out.setparams((1, 2, rate, 0, "NONE", "not compressed"))
                out.writeframes(np.round(tone * 16_000).astype("<i2").tobytes())
    return [
        f"data.root={folder / 'clips'}",
        "data.args.seconds=0.25",
        "teacher.model=cnn",
        "teacher.args={widths: [4, 8]}",
        *tiny(folder),
    ]


if __name__ == "__main__":
    main()
