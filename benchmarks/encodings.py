"""Bytes and fidelity of every encoding, and of other systems' formats, on the same rows of real logits.

Logits: `logits` (M, C) and `photo` (M,) of a .npz file, split by photo in five folds. The first fold was looked at
while the encodings were made; the table is over the other four, each fitted to the photos outside of it. Every
encoding writes a cache of the fold's rows, one view in one block, and reads it again; bytes are those of the files.

Speed: rows encoded (without compression and disk) and decoded (`view.logits`, batches of 256 random rows); and such
batches of a resident view of 1.28 M rows against the same rows of a float16 memmap, converted. Of `LowRank`, also the
product of coefficients and basis alone, of the same shape.

    python benchmarks/encodings.py --logits logits.npz --write
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from measuring import compare, conditions, num_cores, options, parse, result_path, table, write_result
from peer_formats import PEERS, PeerFormat
from torch import Tensor

import logitcache
from logitcache.cache.fidelity import encode_all, fidelity_kl
from logitcache.cache.labelview import ResidentView
from logitcache.encodings import Dense, Encoding, LowRank, PackedTopK, Sampled, TopK, encoding_from_config

# B batch, C classes

FOLDS = 5
TEMPERATURES = (1.0, 2.0, 4.0, 8.0)
BATCH = 256
ENCODINGS: list[Encoding] = [
    LowRank(rank=256, step=0.15, bit_price=5e-4),
    LowRank(rank=256, step=0.11, bit_price=3e-4),
    LowRank(),
    LowRank(rank=288, k=0, step=0.078, bit_price=1.2e-4),
    LowRank(rank=256, k=0, step=0.16, bit_price=4e-4, search=8),
    LowRank(rank=320, k=0, step=0.082, bit_price=2e-4, search=12),
    LowRank(rank=384, step=0.05, bit_price=3e-5),
    LowRank(rank=512, step=0.03, bit_price=1e-5),
    Dense(dtype="uint8"),
    Dense(dtype="float16"),
    TopK(k=10, dtype="uint8"),
    TopK(k=10),
    TopK(k=20),
    TopK(k=50),
    TopK(k=100),
    Sampled(draws=50),
]
GATHERED: list[Encoding] = [
    TopK(k=10),
    TopK(k=100),
    PackedTopK(k=100),
    Sampled(draws=50),
    Dense(dtype="uint8"),
    Dense(dtype="float16"),
    LowRank(rank=64, step=0.15),
    LowRank(),
]


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--logits", type=Path, help="a .npz file; random ones in a tiny run")
    parser.add_argument("--folds", type=int, nargs="+", default=[1, 2, 3, 4], help="0 was looked at in development")
    parser.add_argument("--only", choices=["fidelity", "gather"])
    parser.add_argument("--encodings", nargs="+", help="these instead of the list, such as 'LowRank()'; without peers")
    parser.add_argument("--resident-rows", type=int, default=1_280_000, help="of the view that batches are read from")
    parser.add_argument("--gathers", type=int, default=200, help="batches that are read from it")
    arguments = parse(parser, folds=[1], resident_rows=2048, gathers=3)
    if arguments.logits is None and not arguments.tiny:
        parser.error("the real logits to encode are missing: pass --logits FILE.npz")

    torch.set_num_threads(num_cores())
    sections = ["# Encodings", conditions()]
    data = tiny_logits() if arguments.logits is None else np.load(arguments.logits)
    logits, photos = data["logits"].astype(np.float32), data["photo"]
    # A basis has fewer vectors than there are rows to fit it to.
    chosen = ENCODINGS if arguments.encodings is None else list(map(encoding_from_config, arguments.encodings))
    encodings = [replace(each, rank=8) if arguments.tiny and isinstance(each, LowRank) else each for each in chosen]
    peers = PEERS if arguments.encodings is None else []
    print(sections[-1], flush=True)
    if arguments.only != "gather":
        results = fidelity_results(encodings, peers, logits, photos, arguments.folds)
        sections.append(fidelity_section(results, arguments.folds, photos))
        if arguments.write and arguments.encodings is None:
            plot(results, result_path("encodings", "png", device=torch.device("cpu")))
        print(f"\n{sections[-1]}", flush=True)
    if arguments.only != "fidelity":
        gathered = GATHERED if arguments.encodings is None else chosen
        sections.append(gather_section(gathered, logits, arguments.resident_rows, arguments.gathers, arguments.tiny))
        print(f"\n{sections[-1]}", flush=True)
    if arguments.write:
        print(f"\nwritten to {write_result('encodings', chr(10).join(sections) + chr(10), device=torch.device('cpu'))}")


@dataclass(frozen=True)
class Result:
    """One format on one fold."""

    name: str
    ours: bool
    bytes_per_sample: float
    fixed_bytes: int
    kl: list[float]
    """By temperature."""
    top1_agreement: float
    encode_rows_per_second: float
    decode_rows_per_second: float
    fit_seconds: float = 0.0


def tiny_logits() -> dict[str, np.ndarray]:
    """Random logits of two rows for each of 50 photos."""
    logits = np.random.default_rng(0).normal(scale=3, size=(100, 200))
    return {"logits": logits, "photo": np.arange(100) // 2}


def fidelity_results(
    encodings: Sequence[Encoding],
    peers: Sequence[PeerFormat],
    logits: np.ndarray,
    photos: np.ndarray,
    folds: Sequence[int],
) -> dict[str, list[Result]]:
    """Every format on every fold, by name."""
    results: dict[str, list[Result]] = {}
    for fold in folds:
        held_out = np.isin(photos, fold_photos(photos, fold))
        for encoding in encodings:
            result = measure_ours(encoding, logits[~held_out], logits[held_out])
            results.setdefault(result.name, []).append(result)
        for peer in peers:
            results.setdefault(peer.name, []).append(measure_peer(peer, logits[held_out]))
        print(f"fold {fold} done", flush=True)
    return results


def fold_photos(photos: np.ndarray, fold: int) -> np.ndarray:
    """The photos of one of five folds."""
    names = np.unique(photos)
    np.random.default_rng(0).shuffle(names)
    return np.array_split(names, FOLDS)[fold]


def measure_ours(encoding: Encoding, to_fit: np.ndarray, unseen: np.ndarray) -> Result:
    """Through a cache on disk: its files' bytes, and what a student would read from it."""
    start = time.perf_counter()
    fitted = encoding.fit(to_fit)
    fit_seconds = time.perf_counter() - start
    logits_BC = torch.from_numpy(unseen)
    encode_all(fitted, logits_BC[:BATCH])
    start = time.perf_counter()
    encode_all(fitted, logits_BC)
    encode_seconds = time.perf_counter() - start
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "fold.cache"
        settings = {"num_samples": len(unseen), "num_classes": unseen.shape[1], "teacher": "npz", "dataset": "npz"}
        with logitcache.create(path, **settings, encoding=encoding, calibration=to_fit) as writer:
            writer.write(view=0, start=0, logits=unseen)
        cache = logitcache.open(path)
        label_files = [file for name in cache.layout.arrays for file in (path / "labels.zarr" / name / "c").rglob("*")]
        fixed_files = [file for name in fitted.fitted_arrays for file in (path / "labels.zarr" / name / "c").rglob("*")]
        sizes = (sum(map(size, label_files)), sum(map(size, fixed_files)))
        view = cache.view(0)
        decoded_BC, decode_seconds = decoded_in_batches(view.logits, len(unseen))
    return summarise(
        repr(encoding),
        True,
        logits_BC,
        decoded_BC,
        sizes=sizes,
        seconds=(encode_seconds, decode_seconds, fit_seconds),
    )


def measure_peer(peer: PeerFormat, unseen: np.ndarray) -> Result:
    """Written to bytes, and read back in the order of writing."""
    logits_BC = torch.from_numpy(unseen)
    start = time.perf_counter()
    data = peer.write(logits_BC)
    written = time.perf_counter()
    decoded_BC = peer.read(data, logits_BC.shape[1])
    read = time.perf_counter()
    sizes, seconds = (sum(map(len, data)), 0), (written - start, read - written, 0.0)
    return summarise(peer.name, False, logits_BC, decoded_BC, sizes=sizes, seconds=seconds)


def summarise(
    name: str,
    ours: bool,
    logits_BC: Tensor,
    decoded_BC: Tensor,
    *,
    sizes: tuple[int, int],
    seconds: tuple[float, float, float],
) -> Result:
    """Divergences and rates."""
    num_rows = len(logits_BC)
    return Result(
        name=name,
        ours=ours,
        bytes_per_sample=sizes[0] / num_rows,
        fixed_bytes=sizes[1],
        kl=[float(fidelity_kl(decoded_BC, logits_BC, T).double().mean()) for T in TEMPERATURES],
        top1_agreement=float((decoded_BC.argmax(dim=1) == logits_BC.argmax(dim=1)).float().mean()),
        encode_rows_per_second=num_rows / seconds[0],
        decode_rows_per_second=num_rows / seconds[1],
        fit_seconds=seconds[2],
    )


def size(file: Path) -> int:
    return file.stat().st_size if file.is_file() else 0


def decoded_in_batches(logits: Callable[[Tensor], Tensor], num_rows: int) -> tuple[Tensor, float]:
    """Every row, in batches of random ones; the rows in order, and the seconds that it took."""
    order = torch.randperm(num_rows, generator=torch.Generator().manual_seed(0))
    logits(order[:BATCH])
    start = time.perf_counter()
    parts = [logits(rows) for rows in order.split(BATCH)]
    seconds = time.perf_counter() - start
    decoded_BC = torch.empty(num_rows, parts[0].shape[1])
    decoded_BC[order] = torch.cat(parts)
    return decoded_BC, seconds


def fidelity_section(results: dict[str, list[Result]], folds: Sequence[int], photos: np.ndarray) -> str:
    header = [
        "encoding",
        "bytes a sample",
        "fixed, KiB",
        *(f"KL, T={T:g}" for T in TEMPERATURES),
        "top-1 agreement",
        "rows/s to encode",
        "rows/s to decode",
        "fit, s",
    ]
    ordered = sorted(results.values(), key=lambda runs: (not runs[0].ours, mean(runs, "bytes_per_sample")))
    rows = [
        [
            f"`{runs[0].name}`" if runs[0].ours else runs[0].name,
            spread([run.bytes_per_sample for run in runs], ".1f"),
            f"{mean(runs, 'fixed_bytes') / 1024:.0f}" if runs[0].fixed_bytes else "",
            *(
                spread([run.kl[index] for run in runs], ".4f" if runs[0].kl[index] > 1e-3 else ".1e")
                for index in range(4)
            ),
            f"{mean(runs, 'top1_agreement'):.1%}",
            f"{statistics.median(run.encode_rows_per_second for run in runs):,.0f}",
            f"{statistics.median(run.decode_rows_per_second for run in runs):,.0f}",
            f"{statistics.median(run.fit_seconds for run in runs):.1f}" if runs[0].fit_seconds > 0.01 else "",
        ]
        for runs in ordered
    ]
    about = (
        f"{len(photos)} rows of {len(np.unique(photos))} photos; folds {', '.join(map(str, folds))} of {FOLDS} by "
        "photo, each fitted to the rest: mean (least to most). KL(teacher ‖ decoded) in nats; infinite where a class "
        "is left out. Rates: medians. Bytes of ours are those of the files on disk; fixed bytes are stored once in a "
        "cache. Peers' formats are written from their descriptions, with one record a sample and no file system blocks "
        "or indices."
    )
    return f"## Bytes and fidelity\n\n{about}\n\n{table(header, rows)}\n"


def mean(runs: Sequence[Result], name: str) -> float:
    return statistics.fmean(getattr(run, name) for run in runs)


def spread(values: Sequence[float], form: str) -> str:
    """The mean, and how far single folds are from it."""
    if not np.isfinite(values).all():
        return "∞"
    return f"{statistics.fmean(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def gather_section(encodings: Sequence[Encoding], logits: np.ndarray, num_rows: int, repeats: int, tiny: bool) -> str:
    """Random batches of a large resident view against a float16 memmap, in turns."""
    few = torch.from_numpy(logits[:8192])
    generator = np.random.default_rng(0)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        shape = (num_rows, logits.shape[1])
        memmap = np.memmap(Path(folder) / "logits.f16", dtype=np.float16, mode="w+", shape=shape)
        for start in range(0, num_rows, len(few)):
            memmap[start : start + len(few)] = few[: num_rows - start].half().numpy()
        memmap.flush()
        for each in encodings:
            encoding = replace(each, rank=8) if tiny and isinstance(each, LowRank) else each
            fitted = encoding.fit(logits)
            encoded = encode_all(fitted, few)
            copies = -(-num_rows // len(few))
            arrays = {
                name: values.repeat(copies, *[1] * (values.ndim - 1))[:num_rows] for name, values in encoded.items()
            }
            view = ResidentView(0, fitted, arrays, logits.shape[1])
            rank = encoding.rank if isinstance(encoding, LowRank) else 0
            coefficients_BR, basis_RC = torch.ones(BATCH, rank), torch.ones(rank, logits.shape[1])
            ours, theirs, products = [], [], []
            for _ in range(repeats):
                rows_B = generator.integers(num_rows, size=BATCH)
                times = [time.perf_counter()]
                view.logits(rows_B)
                times.append(time.perf_counter())
                torch.from_numpy(memmap[rows_B]).float()
                times.append(time.perf_counter())
                coefficients_BR @ basis_RC
                times.append(time.perf_counter())
                for measured, seconds in zip((ours, theirs, products), np.diff(times).tolist(), strict=True):
                    measured.append(seconds)
            found = compare(ours, theirs)
            rows.append(
                [
                    f"`{encoding!r}`",
                    f"{1e3 * found.median:.3f}",
                    f"{1e3 * statistics.median(products):.3f}" if rank else "",
                    f"{1e3 * found.reference_median:.3f}",
                    found.quartiles,
                ]
            )
            del arrays, view
    about = (
        f"`view.logits` of {BATCH} random rows of a resident view of {num_rows:,} rows, {logits.shape[1]} "
        "classes, beside the same rows of a float16 memmap, converted to float32, and the product of coefficients and "
        f"basis in float32; {repeats} batches each, by turns, medians."
    )
    header = ["encoding", "`view.logits`, ms", "product in float32, ms", "memmap, ms", "`view.logits` / memmap, pairs"]
    return f"## Random batches\n\n{about}\n\n{table(header, rows)}\n"


def plot(results: dict[str, list[Result]], path: Path) -> None:
    """KL at T = 1 against bytes: ours and the peers'."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    kinds: dict[str, list[tuple[float, float, str]]] = {}
    for runs in results.values():
        nats = statistics.fmean(run.kl[0] for run in runs)
        if np.isfinite(nats):
            kind = runs[0].name.partition("(")[0] if runs[0].ours else "other systems"
            kinds.setdefault(kind, []).append((mean(runs, "bytes_per_sample"), nats, runs[0].name))
    for kind, marker in (("LowRank", "o-"), ("TopK", "^-"), ("Dense", "s-"), ("other systems", "kx")):
        points = sorted(kinds[kind])
        axes.plot([point[0] for point in points], [point[1] for point in points], marker, label=kind)
        if kind == "other systems":
            for num_bytes, nats, name in points:
                axes.annotate(name, (num_bytes, nats), xytext=(5, 3), textcoords="offset points", fontsize=8)
    axes.set(xscale="log", yscale="log", xlabel="bytes a sample", ylabel="KL(teacher ‖ decoded) at T = 1, nats")
    axes.grid(which="both", alpha=0.2)
    axes.legend()
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
