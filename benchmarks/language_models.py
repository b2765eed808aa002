"""Students of a language model from caches of equal size: held-out NLL, and KL to the teacher.

SmolLM2-135M-Instruct runs over a part of the Brown corpus, and its logits are stored as top-k, sampled and low-rank
caches of about equal size. A Llama of a few million parameters then learns from each, from the live teacher, and from
the true tokens. Encodings are fitted to training text; everything is measured on other files.

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
import torch
from measuring import byte_tokenizer, conditions, fresh_folder, options, parse, table, write_result

import logitcache
from logitcache.catalog.models import load_weights
from logitcache.config.build import (
    build_context,
    build_runner,
    resolve_data,
    resolve_model,
    resolve_plan,
    resolve_teacher,
)
from logitcache.config.schema import Pipeline, load_pipeline
from logitcache.data.rows import rows_of_dataset
from logitcache.data.sequences import batch_rows
from logitcache.data.views import ViewDataset
from logitcache.devices import pick_device, to_device
from logitcache.losses import kl_divergence
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
        "evaluation.teacher=none",  # `HeldOut` compares with the teacher
    ]
    measured: list[Measured] = []
    held_out: HeldOut | None = None
    arms: dict[str, logitcache.Encoding | None] = {LIVE: None, **(TINY_ENCODINGS if arguments.tiny else ENCODINGS)}
    for name, encoding in {**arms, TOKENS: None}.items():
        place = [f"cache.path={folder / name}.cache", f"runs.path={folder / 'runs' / name}"]
        settings = [] if encoding is None else [f"cache.encoding={json.dumps(encoding.config())}"]
        pipeline = load_pipeline(PIPELINE, [*common, *place, *settings])
        held_out = held_out or HeldOut(pipeline)
        if encoding is not None:
            cache_teacher(pipeline)
        student = {LIVE: "live-teacher", TOKENS: "true-tokens"}.get(name, "distilled")
        [row] = train_students(pipeline, [student])
        folders = [Path(pipeline.runs.path) / student / f"seed-{seed}" for seed in row.seeds]
        size = None
        if encoding is not None:
            cache = logitcache.open(pipeline.cache.path)
            size = cache.target_bytes / cache.num_rows
        nlls = [json.loads((each / RESULT).read_text())["nll"] for each in folders]
        kls = [held_out.kl(pipeline, student, each / "last.safetensors") for each in folders]
        measured.append(Measured(name, size, nlls, kls, row.epoch_seconds or 0.0))
        print(measured[-1], flush=True)
    assert held_out is not None
    body = (
        f"# Language models: labels of equal size\n\n{stated}\n\n{cache.num_samples} training texts with "
        f"{cache.num_rows:,} rows of {cache.num_classes:,} classes; {held_out.num_rows:,} held-out rows of other "
        f"files, on which the teacher's NLL is {held_out.teacher_nll:.3f}. {arguments.epochs} epochs, "
        f"{arguments.seeds} seeds: mean ± standard deviation between seeds. The loss is KL at T = 1, or cross-entropy "
        "to the true tokens. Bytes are those on disk, without the arrays that are stored once per cache.\n\n"
        + table(
            ["labels", "bytes per token", "held-out NLL, nats", "KL(teacher ‖ student), nats", "seconds per epoch"],
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


class HeldOut:
    """The teacher's logits on the test split, in the device's memory."""

    def __init__(self, pipeline: Pipeline) -> None:
        data = resolve_data(pipeline, trust=False)
        assert data.test is not None
        plan = resolve_plan(pipeline, data, trust=False)
        self._data, self._plan = data, plan
        rows = rows_of_dataset(data.test)
        self._views = ViewDataset(data.test, logitcache.ViewPlan(collate=plan.collate, rows=rows))
        self._rows = rows
        self.num_rows = rows.num_rows
        teacher, _ = resolve_teacher(pipeline, data, plan, trust=False)
        context = build_context(pipeline, trust=False)
        self._device = context.device
        runner = build_runner(pipeline, teacher, context)
        outputs = list(runner.run(self._views, ([(0, index)] for index in range(len(data.test)))))
        self._logits = [output.logits.float() for output in outputs]
        targets = torch.cat([torch.as_tensor(data.test[index][1]) for index in range(len(data.test))])
        nll = torch.nn.functional.cross_entropy
        parts = zip(self._logits, targets.split([len(logits) for logits in self._logits]), strict=True)
        self.teacher_nll = sum(
            float(nll(logits, ids.to(logits.device), reduction="sum")) for logits, ids in parts
        ) / len(targets)

    def kl(self, pipeline: Pipeline, student: str, weights: Path) -> float:
        """Mean KL(teacher ‖ student) over the held-out rows, in nats at T = 1."""
        model = resolve_model(pipeline.student(student), self._data, self._plan, weights=None, seed=0, trust=False)
        load_weights(model, weights)
        model.to(self._device).eval()
        total = 0.0
        with torch.inference_mode():
            for sample, teacher_RC in enumerate(self._logits):
                index, inputs, _ = self._views.collate(self._views.__getitems__([(0, sample)]))
                inputs = to_device(inputs, self._device)
                output = model(**inputs)
                logits = output if isinstance(output, torch.Tensor) else output.logits
                student_RC = batch_rows(index, self._rows, inputs, logits).of_output(logits)
                total += float(kl_divergence(student_RC, teacher_RC, reduction="sum"))
        return total / self.num_rows


if __name__ == "__main__":
    main()
