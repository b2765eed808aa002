"""Top-k encodings of a language model's logits: bytes per token against KL at several temperatures.

The teacher is SmolLM2-135M-Instruct (49 152 classes), the text the Brown corpus in sequences of 256 tokens, one for
each file. `PackedTopK` is fitted to some files, and all encodings are measured on others, in several splits by file.
Every encoding writes a cache of the measured rows in one block, and reads it again; bytes are those of its files.
Speed: rows encoded, without compression and disk, and rows read as targets in batches of 256 random rows.

    python pipelines/brown_smollm2.py               # the corpus and the GGUF file, in data/
    python benchmarks/top_k.py --states states.npz  # the teacher's hidden states: computed once, then read
    python benchmarks/top_k.py --states states.npz --write
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from measuring import conditions, num_cores, options, parse, table, write_result
from torch import Tensor

import logitcache
from logitcache.cache.fidelity import encode_all, fidelity_kl
from logitcache.encodings import Encoding, PackedTopK, Sampled, TopK

# B rows, C classes, D width of the hidden states, N rows of all files

TEMPERATURES = (1.0, 2.0, 4.0)
LENGTH = 256
BATCH = 256
ENCODINGS: list[Encoding] = [
    TopK(k=64, dtype="uint8"),
    PackedTopK(k=64),
    PackedTopK(k=64, prior=True, step=0.5),
    PackedTopK(k=80, prior=True, step=0.5),
    PackedTopK(k=100, prior=True, step=0.5),
    PackedTopK(k=64, most=192, prior=True, step=0.5),
    PackedTopK(k=80, most=240, prior=True, step=0.5),
    PackedTopK(k=100, most=300, prior=True, step=0.5),
    Sampled(draws=50),
    Sampled(draws=50, packed=True),
]
TINY: list[Encoding] = [TopK(k=4), PackedTopK(k=4), PackedTopK(k=4, most=9, prior=True), Sampled(draws=9, packed=True)]


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--states", type=Path, help="a .npz file of hidden states; written if it is not there")
    parser.add_argument("--splits", type=int, default=3, help="splits by file")
    parser.add_argument("--fit-rows", type=int, default=4096)
    parser.add_argument("--rows", type=int, default=1536, help="measured rows of a split")
    arguments = parse(parser, splits=1, fit_rows=60, rows=40)
    if arguments.states is None and not arguments.tiny:
        parser.error("name the file of the teacher's hidden states: --states FILE.npz")
    torch.set_num_threads(num_cores())
    print(stated := conditions(), flush=True)
    states = tiny_states() if arguments.states is None else teacher_states(arguments.states)
    results: dict[str, list[Result]] = {}
    for split in range(arguments.splits):
        to_fit, measured = split_by_file(states, split, arguments)
        for encoding in TINY if arguments.tiny else ENCODINGS:
            result = measure(encoding, to_fit, measured)
            results.setdefault(repr(encoding), []).append(result)
            print(split, repr(encoding), result, flush=True)
    about = (
        f"{arguments.splits} splits by file, each with {arguments.rows:,} measured rows, fitted to at most "
        f"{arguments.fit_rows:,} rows of other files: means, and the range of the splits. KL(teacher ‖ decoded) in "
        "nats; infinite where a class is left out. Bytes are those of the files of one block on disk; what is stored "
        "once per cache is a column of its own. Rates: medians."
    )
    body = f"# Top-k encodings of tokens\n\n{stated}\n\n{about}\n\n{results_table(results)}\n"
    print(body)
    if arguments.write:
        print(f"written to {write_result('top-k', body, device=torch.device('cpu'))}")


@dataclass(frozen=True)
class States:
    """Hidden states of a teacher, and its head."""

    hidden: Tensor
    """Float32 (N, D): the inputs of the head."""
    weight: Tensor
    """Float32 (C, D)."""
    file: np.ndarray
    """int64 (N,): the file of each row."""

    def logits(self, rows: np.ndarray) -> Tensor:
        """Float32 (B, C)."""
        return torch.cat([part @ self.weight.T for part in self.hidden[rows].split(128)])


def tiny_states() -> States:
    """Random states of 20 files."""
    draw = torch.Generator().manual_seed(0)
    return States(
        torch.randn(200, 8, generator=draw), torch.randn(300, 8, generator=draw), np.repeat(np.arange(20), 10)
    )


def teacher_states(path: Path) -> States:
    """The states in a file, or of one sequence of each text of the training split."""
    if not path.exists():
        from transformers import AutoTokenizer

        from logitcache.catalog.language_models import transformers_model, without_head

        if not Path("data/smollm2").exists() or not Path("data/brown").exists():
            raise SystemExit("the teacher and the texts are missing: run `python pipelines/brown_smollm2.py` first")
        gguf = Path("data/smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        model = transformers_model(49_152, task="causal", path=str(gguf)).eval()
        texts = [tokenizer(file.read_text())["input_ids"] for file in sorted(Path("data/brown/train").rglob("*.txt"))]
        ids = torch.tensor([each[: LENGTH + 1] for each in texts if len(each) > LENGTH])
        with torch.inference_mode(), without_head(model) as head:
            hidden = torch.cat([model(input_ids=batch).logits[:, :-1] for batch in ids.split(4)])
            np.savez(
                path,
                hidden=hidden.flatten(0, 1).numpy(),
                weight=head.weight.numpy(),
                files=np.repeat(np.arange(len(ids)), LENGTH),
            )
    found = np.load(path)
    return States(torch.from_numpy(found["hidden"]), torch.from_numpy(found["weight"]), found["files"])


def split_by_file(states: States, split: int, arguments: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """Logits of some files to fit to, and of others to measure on."""
    files = np.random.default_rng(split).permutation(np.unique(states.file))
    is_measured = np.isin(states.file, files[: len(files) // 4])
    draw = np.random.default_rng(split)
    measured, rest = (draw.permutation(np.flatnonzero(each)) for each in (is_measured, ~is_measured))
    return states.logits(rest[: arguments.fit_rows]), states.logits(measured[: arguments.rows])


@dataclass(frozen=True)
class Result:
    """One encoding in one split."""

    bytes_per_token: float
    fixed_bytes: int
    kl: list[float]
    """By temperature."""
    top1_agreement: float
    encode_rows_per_second: float
    read_rows_per_second: float


def measure(encoding: Encoding, to_fit: Tensor, logits_BC: Tensor) -> Result:
    """Through a cache on disk."""
    fitted = encoding.fit(to_fit)
    encode_all(fitted, logits_BC[:BATCH])
    start = time.perf_counter()
    encode_all(fitted, logits_BC)
    encode_seconds = time.perf_counter() - start
    num_rows, num_classes = logits_BC.shape
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.cache"
        with logitcache.create(
            path,
            num_samples=num_rows,
            num_classes=num_classes,
            encoding=fitted,
            teacher="smollm2",
            dataset="brown",
        ) as writer:
            writer.write(view=0, start=0, logits=logits_BC)
        cache = logitcache.open(path)
        view = cache.view(0)
        order = torch.randperm(num_rows, generator=torch.Generator().manual_seed(0))
        view.targets(order[:BATCH])
        start = time.perf_counter()
        for rows in order.split(BATCH):
            view.targets(rows)
        read_seconds = time.perf_counter() - start
        kl_TB, agreeing = torch.zeros(len(TEMPERATURES)), 0
        for rows in torch.arange(num_rows).split(128):
            decoded_BC, teacher_BC = view.logits(rows), logits_BC[rows]
            for number, temperature in enumerate(TEMPERATURES):
                kl_TB[number] += fidelity_kl(decoded_BC, teacher_BC, temperature).sum()
            agreeing += int((decoded_BC.argmax(dim=1) == teacher_BC.argmax(dim=1)).sum())
        once = sum(stored.bytes for stored in cache.receipts["fixed"].objects.values())
        return Result(
            cache.target_bytes / num_rows,
            once,
            (kl_TB / num_rows).tolist(),
            agreeing / num_rows,
            num_rows / encode_seconds,
            num_rows / read_seconds,
        )


def results_table(results: dict[str, list[Result]]) -> str:
    header = [
        "encoding",
        "bytes per token",
        "fixed, KiB",
        *(f"KL, T = {T:g}" for T in TEMPERATURES),
        "top-1",
        "rows/s encoded",
        "rows/s read",
    ]
    return table(
        header,
        [
            [
                f"`{name}`",
                spread([run.bytes_per_token for run in runs], ".1f"),
                f"{runs[0].fixed_bytes / 1024:.0f}",
                *(spread([run.kl[number] for run in runs], ".3f") for number in range(len(TEMPERATURES))),
                f"{statistics.fmean(run.top1_agreement for run in runs):.1%}",
                f"{statistics.median(run.encode_rows_per_second for run in runs):,.0f}",
                f"{statistics.median(run.read_rows_per_second for run in runs):,.0f}",
            ]
            for name, runs in results.items()
        ],
    )


def spread(values: list[float], form: str) -> str:
    if not np.isfinite(values).all():
        return "∞"
    return f"{statistics.fmean(values):{form}} ({min(values):{form}} to {max(values):{form}})"


if __name__ == "__main__":
    main()
