"""Students of a language model from caches of equal size: held-out NLL, and KL to the teacher.

SmolLM2-135M-Instruct runs over a part of the Brown corpus, and its logits are stored as top-k, sampled and low-rank
caches of about equal size. A Llama of a few million parameters then learns from each, from the live teacher, and from
the true tokens. Encodings are fitted to training text; everything is measured on other files, against a cache of the
teacher's exact logits of them.

    python pipelines/brown_smollm2.py
    python benchmarks/language_models.py --write
    python benchmarks/language_models.py --documents 120 --characters 0 --batch 32 --lr 0.004 --write   # with a GPU
"""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from measuring import byte_tokenizer, conditions, fresh_folder, options, parse, table, write_result

import logitcache
from logitcache.config.build import build_context, build_evaluation, resolve_data, resolve_plan, resolve_teacher
from logitcache.config.schema import Pipeline, load_pipeline
from logitcache.devices import pick_device
from logitcache.progress import silence
from logitcache.stages.cache_teacher import cache_teacher
from logitcache.stages.train_student import train_students
from logitcache.train.runs import RESULT

PIPELINE = Path(__file__).parent.parent / "pipelines" / "brown_smollm2.yaml"
ENCODINGS: dict[str, logitcache.Encoding] = {
    "top-k": logitcache.TopK(k=23, dtype="uint8"),
    "sampled": logitcache.Sampled(draws=36),
    "low-rank": logitcache.LowRank(rank=256, k=8, step=0.2, bit_price=1e-3, search=8),
}
TINY_ENCODINGS: dict[str, logitcache.Encoding] = {
    "top-k": logitcache.TopK(k=8, dtype="uint8"),
    "sampled": logitcache.Sampled(draws=8),
    "low-rank": logitcache.LowRank(rank=8, k=2),
}
LIVE, TOKENS = "live teacher", "true tokens only"


@dataclass
class Measured:
    """What one kind of labels gave, over the seeds."""

    name: str
    bytes_per_row: float | None
    nll: list[float]
    kl: list[float]
    agreement: list[float]
    epoch_seconds: float

    def cells(self) -> list[str]:
        """A line of the table."""
        size = "-" if self.bytes_per_row is None else f"{self.bytes_per_row:,.1f}"
        spreads = map(spread, (self.nll, self.kl, self.agreement))
        return [self.name, size, *spreads, f"{self.epoch_seconds:.1f}"]


def spread(values: list[float]) -> str:
    """Mean and standard deviation between seeds."""
    return f"{statistics.fmean(values):.3f}" + (f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else "")


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--documents", type=int, default=64, help="training files; a sixth as many test files")
    parser.add_argument("--characters", type=int, default=1100, help="of each file; 0 for all")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch", type=int, default=8, help="sequences in a student's batch")
    parser.add_argument("--lr", type=float, default=0.002)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--brown", type=Path, default=Path("data/brown"))
    parser.add_argument("--smollm2", type=Path, default=Path("data/smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"))
    arguments = parse(parser, documents=4, characters=60, epochs=1, seeds=1)
    silence()
    stated = conditions()
    print(stated, flush=True)
    folder = fresh_folder()
    common = tiny_pipeline(folder) if arguments.tiny else real_pipeline(folder, arguments)
    common += [
        f"train.epochs={arguments.epochs}",
        f"train.batch_size={arguments.batch}",
        f"train.lr={arguments.lr}",
        f"train.seeds={list(range(arguments.seeds))}",
        f"evaluation.teacher={folder / 'held-out.cache'}",
    ]
    held_out = load_pipeline(
        PIPELINE,
        [
            *common,
            f"data.root={folder / 'text' / 'test'}",
            "data.validation=0",
            f"cache.path={folder / 'held-out.cache'}",
            "cache.encoding={name: dense, dtype: float32}",
        ],
    )
    num_held_out = cache_teacher(held_out).manifest.layout.num_rows
    measured: list[Measured] = []
    arms: dict[str, logitcache.Encoding | None] = {LIVE: None, **(TINY_ENCODINGS if arguments.tiny else ENCODINGS)}
    for name, encoding in {**arms, TOKENS: None}.items():
        place = [f"cache.path={folder / name}.cache", f"runs.path={folder / 'runs' / name}"]
        settings = [] if encoding is None else [f"cache.encoding={json.dumps(encoding.config())}"]
        pipeline = load_pipeline(PIPELINE, [*common, *place, *settings])
        if encoding is not None:
            cache_teacher(pipeline)
        student = {LIVE: "live-teacher", TOKENS: "true-tokens"}.get(name, "distilled")
        [row] = train_students(pipeline, [student])
        folders = [Path(pipeline.runs.path) / student / f"seed-{seed}" for seed in row.seeds]
        size = None
        if encoding is not None:
            cache = logitcache.open(pipeline.cache.path)
            size = cache.target_bytes / cache.num_rows
        results = [json.loads((each / RESULT).read_text()) for each in folders]
        found = ([each[metric] for each in results] for metric in ("nll", "teacher_kl", "teacher_agreement"))
        measured.append(Measured(name, size, *found, row.epoch_seconds or 0.0))
        print(measured[-1], flush=True)
    body = (
        f"# Language models: labels of equal size\n\n{stated}\n\n{cache.num_samples} training texts with "
        f"{cache.num_rows:,} rows of {cache.num_classes:,} classes; {num_held_out:,} held-out rows of other "
        f"files, on which the teacher's NLL is {teacher_nll(held_out):.3f}. {arguments.epochs} epochs, "
        f"{arguments.seeds} seeds: mean ± standard deviation between seeds. The loss is KL at T = 1, or cross-entropy "
        "to the true tokens. Bytes are those on disk, without the arrays that are stored once per cache.\n\n"
        + table(
            [
                "labels",
                "bytes per token",
                "held-out NLL, nats",
                "KL(teacher ‖ student), nats",
                "top-1 agreement",
                "seconds per epoch",
            ],
            [each.cells() for each in measured],
        )
        + "\n\nDifferences in NLL from the live teacher's student of the same seed, and their standard error: "
        + "; ".join(difference(each, measured[0]) for each in measured[1:])
        + ".\n"
    )
    print(body)
    if arguments.write:
        print(write_result("language-models", body, device=pick_device("auto")))


def difference(measured: Measured, reference: Measured) -> str:
    """The mean difference in NLL between runs of the same seed, and its standard error."""
    pairs = [one - other for one, other in zip(measured.nll, reference.nll, strict=True)]
    error = f" ± {statistics.stdev(pairs) / len(pairs) ** 0.5:.4f}" if len(pairs) > 1 else ""
    return f"{measured.name} {statistics.fmean(pairs):+.4f}{error}"


def real_pipeline(folder: Path, arguments: object) -> list[str]:
    """Overrides for the first characters of some files of the corpus."""
    for split, count in (("train", arguments.documents), ("test", max(1, arguments.documents // 6))):  # type: ignore[attr-defined]
        files = sorted((arguments.brown / split).rglob("*.txt"))  # type: ignore[attr-defined]
        if len(files) < count:
            raise SystemExit(f"{arguments.brown} has {len(files)} {split} files; run pipelines/brown_smollm2.py")  # type: ignore[attr-defined]
        (folder / "text" / split).mkdir(parents=True)
        for number in np.linspace(0, len(files) - 1, count).astype(int):
            text = files[number].read_text()[: arguments.characters or None].rpartition(" ")[0]  # type: ignore[attr-defined]
            (folder / "text" / split / files[number].name).write_text(text)
    gguf = arguments.smollm2.resolve()  # type: ignore[attr-defined]
    return [
        f"data.root={folder / 'text'}",
        f"data.args={{tokenizer: {gguf}, max_length: 256, long: truncate}}",
        f"teacher.args={{path: {gguf}}}",
    ]


def tiny_pipeline(folder: Path) -> list[str]:
    """Overrides for a few lines as bytes, and models of a few thousand parameters."""
    for split in ("train", "test"):
        (folder / "text" / split).mkdir(parents=True)
        for number in range(8):
            (folder / "text" / split / f"{number}.txt").write_text(
                f"{split} text {number}: {'a few words ' * (number + 2)}"
            )
    model = (
        "{config: {model_type: llama, hidden_size: 16, intermediate_size: 32, num_hidden_layers: 1, "
        "num_attention_heads: 2, max_position_embeddings: 64}}"
    )
    return [
        f"data.root={folder / 'text'}",
        f"data.args={{tokenizer: {byte_tokenizer(folder)}, max_length: 48}}",
        f"teacher={{model: transformers, weights: random, batch_size: 4, args: {model}}}",
        *(f"students.{name}.args={model}" for name in ("distilled", "live-teacher", "true-tokens")),
    ]


def teacher_nll(pipeline: Pipeline) -> float:
    """The teacher's negative log-likelihood of the training split of a pipeline, in nats per row."""
    data = resolve_data(pipeline, trust=False)
    teacher, _ = resolve_teacher(pipeline, data, resolve_plan(pipeline, data, trust=False), trust=False)
    context = build_context(pipeline, trust=False)
    evaluation = build_evaluation(pipeline, data.train, pipeline.teacher, context)
    assert evaluation is not None
    return evaluation.measure(teacher.to(context.device), context.device)["nll"]


if __name__ == "__main__":
    main()
