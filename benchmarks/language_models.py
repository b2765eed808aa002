"""Students of a language model from caches of equal size: held-out NLL, and KL to the teacher.

SmolLM2-135M-Instruct runs once over a part of the Brown corpus. Its logits are stored whole (a student of them has the
weights of the live teacher's student, bit for bit), and as top-k, sampled and low-rank caches of about equal size. A
Llama of a few million parameters then learns from each, and from the true tokens. Encodings are fitted to training
text; everything is measured on other files.

    python pipelines/brown_smollm2.py
    python benchmarks/language_models.py --write
"""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring import conditions, fresh_folder, options, parse, table, write_result

import logitcache
from logitcache.config.build import resolve_data
from logitcache.config.schema import Pipeline, load_pipeline
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
DENSE, TOKENS = "all logits (the live teacher)", "true tokens only"
ROWS_AT_ONCE = 512


@dataclass
class Measured:
    """What one kind of labels gave, over the seeds."""

    name: str
    bytes_per_row: float | None
    nll: list[float]
    kl: list[float]
    epoch_seconds: float

    def cells(self) -> list[str]:
        """A line of the table."""
        size = "-" if self.bytes_per_row is None else f"{self.bytes_per_row:,.1f}"
        return [self.name, size, spread(self.nll), spread(self.kl), f"{self.epoch_seconds:.1f}"]


def spread(values: list[float]) -> str:
    """Mean and standard deviation between seeds."""
    return f"{statistics.fmean(values):.3f}" + (f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else "")


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--documents", type=int, default=64, help="training files; a quarter as many test files")
    parser.add_argument("--characters", type=int, default=1100, help="of each file")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--brown", type=Path, default=Path("data/brown"))
    parser.add_argument("--smollm2", type=Path, default=Path("data/smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"))
    arguments = parse(parser, documents=4, characters=60, epochs=1, seeds=1)
    silence()
    stated = conditions()
    print(stated, flush=True)
    folder = fresh_folder()
    common = tiny_pipeline(folder) if arguments.tiny else real_pipeline(folder, arguments)
    common += [f"train.epochs={arguments.epochs}", f"train.seeds={list(range(arguments.seeds))}"]
    source = folder / "dense.cache"
    teacher = load_pipeline(PIPELINE, [*common, f"cache.path={source}", "cache.encoding={name: dense, dtype: float32}"])
    cache_teacher(teacher)
    test = folder / "test.cache"
    cache_teacher(with_path(teacher, test, root=folder / "text/test"))
    common.append(f"evaluation.teacher={test}")
    paths = {DENSE: source}
    for name, encoding in (TINY_ENCODINGS if arguments.tiny else ENCODINGS).items():
        paths[name] = folder / f"{name}.cache"
        encode_again(logitcache.open(source), paths[name], encoding)
    measured = []
    for name, path in [*paths.items(), (TOKENS, source)]:
        student = "true-tokens" if name == TOKENS else "distilled"
        pipeline = load_pipeline(PIPELINE, [*common, f"cache.path={path}", f"runs.path={folder / 'runs' / path.stem}"])
        [row] = train_students(pipeline, [student])
        folders = [Path(pipeline.runs.path) / student / f"seed-{seed}" for seed in row.seeds]
        size = None if name == TOKENS else logitcache.open(path).target_bytes / logitcache.open(path).num_rows
        results = [json.loads((each / RESULT).read_text()) for each in folders]
        nlls, kls = ([result[key] for result in results] for key in ("nll", "teacher_kl"))
        measured.append(Measured(name, size, nlls, kls, row.epoch_seconds or 0.0))
        print(measured[-1], flush=True)
    cache, num_held_out = logitcache.open(source), logitcache.open(test).num_rows
    body = (
        f"# Language models: labels of equal size\n\n{stated}\n\n{cache.num_samples} training texts with "
        f"{cache.num_rows:,} rows of {cache.num_classes:,} classes; {num_held_out:,} held-out rows of other "
        f"files, on which the teacher's NLL is {teacher_nll(teacher, test):.3f}. {arguments.epochs} epochs, "
        f"{arguments.seeds} seeds: mean ± standard deviation between seeds. The loss is KL at T = 1, or cross-entropy "
        "to the true tokens. Bytes are those on disk, without the arrays that are stored once per cache.\n\n"
        + table(
            ["labels", "bytes per token", "held-out NLL, nats", "KL(teacher ‖ student), nats", "seconds per epoch"],
            [each.cells() for each in measured],
        )
        + "\n"
    )
    print(body)
    if arguments.write:
        print(write_result("language-models", body, device=torch.device("cpu")))


def real_pipeline(folder: Path, arguments: object) -> list[str]:
    """Overrides for the first characters of some files of the corpus."""
    for split, count in (("train", arguments.documents), ("test", max(1, arguments.documents // 4))):  # type: ignore[attr-defined]
        files = sorted((arguments.brown / split).rglob("*.txt"))  # type: ignore[attr-defined]
        if len(files) < count:
            raise SystemExit(f"{arguments.brown} has {len(files)} {split} files; run pipelines/brown_smollm2.py")  # type: ignore[attr-defined]
        (folder / "text" / split).mkdir(parents=True)
        for number in np.linspace(0, len(files) - 1, count).astype(int):
            text = files[number].read_text()[: arguments.characters].rpartition(" ")[0]  # type: ignore[attr-defined]
            (folder / "text" / split / files[number].name).write_text(text)
    gguf = arguments.smollm2.resolve()  # type: ignore[attr-defined]
    return [
        f"data.root={folder / 'text'}",
        f"data.args={{tokenizer: {gguf}, max_length: 256, long: truncate}}",
        f"teacher.args={{path: {gguf}}}",
    ]


def tiny_pipeline(folder: Path) -> list[str]:
    """Overrides for a few lines as bytes, and models of a few thousand parameters."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.save(str(folder / "tokenizer.json"))
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
        f"data.args={{tokenizer: {folder / 'tokenizer.json'}, max_length: 48}}",
        f"teacher={{model: transformers, weights: random, batch_size: 4, args: {model}}}",
        *(f"students.{name}.args={model}" for name in ("distilled", "live-teacher", "true-tokens")),
    ]


def encode_again(source: logitcache.LogitCache, path: Path, encoding: logitcache.Encoding) -> None:
    """A cache of the same rows with another encoding."""
    view, identity = source.view(0), source.manifest.identity
    calibration = view.logits(np.linspace(0, source.num_rows - 1, min(2048, source.num_rows)).astype(int))
    with logitcache.create(
        path,
        num_samples=source.num_samples,
        num_classes=source.num_classes,
        encoding=encoding,
        calibration=calibration,
        teacher=identity.teacher,
        samples=source.samples,
        view_plan=source.view_plan,
        rows_per_sample=np.diff(source.row_offsets),
        row_positions=source.row_map.positions,
        tokenization=identity.tokenization,
        rows_per_block=source.layout.rows_per_block,
    ) as writer:
        for start in range(0, source.num_rows, ROWS_AT_ONCE):
            rows = range(start, min(start + ROWS_AT_ONCE, source.num_rows))
            writer.write(view=0, start=start, logits=view.logits(rows), input_digests=source.input_digests(0))


def with_path(pipeline: Pipeline, path: Path, *, root: Path) -> Pipeline:
    """The pipeline of a cache at another path, over other texts."""
    data = pipeline.data.model_copy(update={"root": str(root)})
    return pipeline.model_copy(update={"data": data, "cache": pipeline.cache.model_copy(update={"path": str(path)})})


def teacher_nll(pipeline: Pipeline, path: Path) -> float:
    """The teacher's negative log-likelihood of the test split, in nats per row, from a cache of it."""
    test: Any = resolve_data(pipeline, trust=False).test
    view, total = logitcache.open(path).view(0, memory_budget=2**28), 0.0
    for start in range(0, view.num_rows, ROWS_AT_ONCE):
        rows = np.arange(start, min(start + ROWS_AT_ONCE, view.num_rows))
        targets = torch.from_numpy(test.row_targets(rows))
        total += float(torch.nn.functional.cross_entropy(view.logits(rows), targets, reduction="sum"))
    return total / view.num_rows


if __name__ == "__main__":
    main()
