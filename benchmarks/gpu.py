"""Both stages on a GPU, against a bare loop over the same nets: at most eight minutes.

Teachers: ResNet-50 and ViT-B/16 of torchvision in bfloat16, channels last, with and without `torch.compile`; a loop
that writes their logits of images in GPU memory, against the same loop that drops them. Then `cache_teacher` whole
over pictures that workers render, against the same loader and teacher with the output dropped.

Encodings: rows encoded and decoded per second on the device, of 1000 and of 151 936 classes. The logits are those of
a random linear head; `LowRank` is fitted on the CPU before, which is not timed.

Heads: a training step's loss and gradients for a head of 151 936 classes: chunked losses (`linear_cross_entropy`,
`linear_kl_divergence`; compiled or not) and all logits at once, time and peak memory.

Students: an epoch of a ResNet-18 on labels only, from the cache and with the live ResNet-50; then a Llama of four
layers with the live model of SmolLM2's size.

All nets have random weights and the data is random: their content has no influence on the time. Without a GPU, sizes
are tiny.

    python benchmarks/gpu.py --write
    python benchmarks/gpu.py --only heads encodings
"""

from __future__ import annotations

import functools
import gc
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import stage1
import stage2
import tokens
import torch
from measuring import compare, conditions, num_cores, options, parse, result_path, table
from torch import Tensor, nn
from torchvision.models import get_model

import logitcache
from logitcache.config.schema import Pipeline, parse_pipeline
from logitcache.devices import autocast, pick_device
from logitcache.losses import kl_divergence, linear_cross_entropy, linear_kl_divergence
from logitcache.progress import silence
from logitcache.targets import SparseTargets

# B batch, C classes, D hidden size, K entries, N rows

MODULE = Path(__file__).stem
SECTIONS = ("heads", "resident", "encodings", "loader", "students", "tokens")
MAX_RATIO = 1.05
NUM_CLASSES = 1000
ENCODE_SECONDS = 1.0
"""Approximate seconds per repeat; encodings differ in speed by a factor of a thousand."""


@dataclass(frozen=True)
class Sizes:
    """Sizes of nets and data."""

    teachers: tuple[str, ...]
    image: int
    batch: int
    batches: int
    pictures: int
    repeats: int
    classes: tuple[int, int]
    rows: tuple[int, int]
    ranks: tuple[int, int]
    positions: int
    width: int
    sequences: int


REAL = Sizes(
    teachers=("resnet50", "vit_b_16"),
    image=224,
    batch=256,
    batches=64,
    pictures=8192,
    repeats=3,
    classes=(NUM_CLASSES, 151_936),
    rows=(65_536, 1024),
    ranks=(128, 64),
    positions=8192,
    width=1024,
    sequences=384,
)
TINY = Sizes(
    teachers=("resnet18",),
    image=32,
    batch=4,
    batches=2,
    pictures=16,
    repeats=1,
    classes=(100, 400),
    rows=(512, 64),
    ranks=(8, 8),
    positions=32,
    width=16,
    sequences=3,
)


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--only", choices=SECTIONS, nargs="+", default=SECTIONS, help="some of the measurements")
    parser.add_argument("--repeats", type=int, help="measurements of each kind")
    parser.add_argument("--teachers", nargs="+", help="of images")
    arguments = parse(parser)
    silence()
    device = pick_device("auto")
    sizes = TINY if arguments.tiny else REAL
    if arguments.repeats is not None:
        sizes = replace(sizes, repeats=arguments.repeats)
    if arguments.teachers is not None:
        sizes = replace(sizes, teachers=tuple(arguments.teachers))
    if device.type != "cuda" and not arguments.tiny:
        parser.error("there is no GPU; use --tiny to see that the script works")
    sections = ["# On a GPU", conditions()]
    print(sections[-1], flush=True)
    for name in arguments.only:
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            section = MEASUREMENTS[name](sizes, device, Path(folder))
        torch._dynamo.reset()
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        sections.append(f"{section}\n\nThis section took {time.perf_counter() - start:.0f} s.")
        print(f"\n{sections[-1]}", flush=True)
        if arguments.write:  # after each, so that a run that is cut short leaves what it has
            result_path(MODULE, "md", device=device).write_text("\n\n".join(sections) + "\n", encoding="utf-8")


def seconds_by_turns(
    arms: dict[str, Callable[[], object]], repeats: int, device: torch.device
) -> dict[str, list[float]]:
    """Seconds of each, by turns, after one of each that warms up."""
    for arm in arms.values():
        arm()
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for repeat in range(repeats):
        for name in list(arms) if repeat % 2 == 0 else reversed(list(arms)):
            start = stage2.now(device)
            arms[name]()
            seconds[name].append(stage2.now(device) - start)
    return seconds


def heads_section(sizes: Sizes, device: torch.device, folder: Path) -> str:
    """Losses of a head with many classes: chunked on labels, on sparse targets, and with all logits at once."""
    num_rows, width, num_classes, k = sizes.positions, sizes.width, sizes.classes[1], min(64, sizes.classes[1] // 4)
    generator = torch.Generator(device).manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    draw = {"generator": generator, "device": device}
    hidden_ND = torch.randn(num_rows, width, **draw, dtype=dtype).requires_grad_()  # type: ignore[call-overload]
    weight_CD = (torch.randn(num_classes, width, **draw, dtype=dtype) * width**-0.5).requires_grad_()  # type: ignore[call-overload]
    labels_N = torch.randint(num_classes, (num_rows,), **draw)  # type: ignore[call-overload]
    ids_NK = torch.rand(num_rows, num_classes, device=device).topk(k, dim=1).indices
    log_p_NK = torch.randn(num_rows, k + 1, **draw).log_softmax(dim=1)  # type: ignore[call-overload]
    targets = SparseTargets(ids_NK, log_p_NK[:, :k].contiguous(), log_p_NK[:, k].contiguous(), num_classes)

    def chunked_labels(compiled: bool) -> Tensor:
        return linear_cross_entropy(hidden_ND, weight_CD, labels_N, compiled=compiled)

    def chunked(compiled: bool) -> Tensor:
        return linear_kl_divergence(hidden_ND, weight_CD, targets, compiled=compiled)

    def whole_labels() -> Tensor:
        return nn.functional.cross_entropy((hidden_ND @ weight_CD.T).float(), labels_N)

    def whole_sparse() -> Tensor:
        return kl_divergence((hidden_ND @ weight_CD.T).float(), targets).mean()

    def whole_dense() -> Tensor:
        return kl_divergence((hidden_ND @ weight_CD.T).float(), targets.dense()).mean()

    losses: dict[str, Callable[[], Tensor]] = {
        "labels only, chunked": lambda: chunked_labels(compiled=False),
        "sparse targets, chunked": lambda: chunked(compiled=False),
        "labels only, all logits": whole_labels,
        "sparse targets, all logits of the student": whole_sparse,
        "all logits of student and teacher": whole_dense,
    }
    if device.type == "cuda":
        compiled: dict[str, Callable[[], Tensor]] = {
            "labels only, chunked, compiled": lambda: chunked_labels(compiled=True),
            "sparse targets, chunked, compiled": lambda: chunked(compiled=True),
        }
        losses = compiled | losses

    def step(loss: Callable[[], Tensor]) -> None:
        hidden_ND.grad = weight_CD.grad = None
        loss().backward()  # type: ignore[no-untyped-call]

    arms = {name: (lambda loss=loss: step(loss)) for name, loss in losses.items()}
    seconds = seconds_by_turns(arms, 3 * sizes.repeats, device)
    peaks = {name: stage2.peak_bytes(arm, device) for name, arm in arms.items()}
    reference = next(iter(losses))
    rows = [
        [
            name,
            f"{1e3 * found.median:.1f} ms",
            f"{found.ratio:.3f}",
            f"{peaks[name] / 2**20:,.0f} MiB",
            f"{peaks[name] / peaks[reference]:.3f}",
        ]
        for name in losses
        for found in [compare(seconds[name], seconds[reference])]
    ]
    about = (
        f"{num_rows:,} positions, hidden size {width}, {num_classes:,} classes, {k} entries in a row; {dtype} head, "
        f"losses in float32. Forward and backward. Medians of {3 * sizes.repeats} by turns; ratios to the first line."
    )
    header = ["loss and gradients", "time", "ratio", "peak memory", "ratio"]
    return f"## Losses of a head with many classes\n\n{about}\n\n{table(header, rows)}"


def encodings_section(sizes: Sizes, device: torch.device, folder: Path) -> str:
    """Rows per second of each encoding, on the device."""
    rows = []
    for num_classes, num_rows, rank in zip(sizes.classes, sizes.rows, sizes.ranks, strict=True):
        generator = torch.Generator(device).manual_seed(0)
        hidden_ND = torch.randn(num_rows, 256, generator=generator, device=device)
        head_DC = torch.randn(256, num_classes, generator=generator, device=device)
        logits_NC = hidden_ND @ head_DC / 4
        encodings: list[logitcache.Encoding] = [
            logitcache.Dense(dtype="float16"),
            logitcache.Dense(dtype="uint8"),
            logitcache.TopK(k=10),
            logitcache.TopK(k=64),
            logitcache.Sampled(draws=50),
            logitcache.Sampled(draws=50, packed=True),
            logitcache.LowRank(rank=rank, k=8, search=4),
            logitcache.PackedTopK(k=min(64, num_classes // 4)),
            logitcache.TopLowRank(rank=rank),
            logitcache.TrellisLowRank(rank=rank),
        ]
        if num_rows >= 4 * num_classes:  # as many features as classes, with enough rows to fit to
            encodings.append(logitcache.Components(error=0.1))
        for encoding in encodings:
            num_fitted = 4 * (num_classes if encoding.keeps_constants else rank)
            fitted = encoding.fit(logits_NC[:num_fitted].cpu()) if encoding.fitted_arrays else encoding
            slab = max(1, 2**24 // num_classes)

            def encode(rows_NC: Tensor, fitted: logitcache.Encoding = fitted, slab: int = slab) -> None:
                for piece in rows_NC.split(slab):
                    fitted.encode_with_kl(piece)

            encoded_rows = rows_in_time(encode, logits_NC, device)
            chosen_NC = logits_NC[:encoded_rows]
            encoded = [fitted.encode(piece) for piece in chosen_NC.split(slab)]

            def decode(
                fitted: logitcache.Encoding = fitted, encoded: list[Any] = encoded, num_classes: int = num_classes
            ) -> None:
                for part in encoded:
                    fitted.decode(part, num_classes)

            seconds = seconds_by_turns(
                {"encode": functools.partial(encode, chosen_NC), "decode": decode}, sizes.repeats, device
            )
            medians = {name: statistics.median(values) for name, values in seconds.items()}
            rows.append(
                [f"{num_classes:,}", fitted.config()["name"] + described(fitted), f"{encoded_rows:,}"]
                + [f"{encoded_rows / medians[name]:,.0f}" for name in ("encode", "decode")]
            )
    about = (
        f"Rows of float32 logits on the device, encoded in slabs of 64 MB with their divergence where the encoding "
        f"gives it; as many rows as are encoded within {ENCODE_SECONDS:.0f} s, at most {sizes.rows[0]:,} and "
        f"{sizes.rows[1]:,}. Medians of {sizes.repeats}."
    )
    header = ["classes", "encoding", "rows", "rows encoded/s", "rows decoded/s"]
    return f"## Encodings\n\n{about}\n\n{table(header, rows)}"


def rows_in_time(encode: Callable[[Tensor], object], logits_NC: Tensor, device: torch.device) -> int:
    """How many of the rows are encoded within `ENCODE_SECONDS`, judged by the first that take a tenth of it."""
    num_rows, seconds = 64, 0.0
    encode(logits_NC[:num_rows])  # warms up
    while seconds < ENCODE_SECONDS / 10 and num_rows < len(logits_NC):
        num_rows = min(4 * num_rows, len(logits_NC))
        start = stage2.now(device)
        encode(logits_NC[:num_rows])
        seconds = stage2.now(device) - start
    return min(len(logits_NC), max(64, round(num_rows * ENCODE_SECONDS / seconds))) if seconds else num_rows


def described(encoding: logitcache.Encoding) -> str:
    """The parameters of an encoding."""
    given = {name: value for name, value in encoding.config().items() if name != "name"}
    return f"({', '.join(f'{name}={value}' for name, value in given.items())})"


def resident_section(sizes: Sizes, device: torch.device, folder: Path) -> str:
    """The writer alone: a loop over images in GPU memory that writes the logits, against one that drops them."""
    rows = []
    dtype = "bfloat16" if device.type == "cuda" else "float32"
    images = torch.randn(sizes.batch, 3, sizes.image, sizes.image, device=device)
    images = images.to(memory_format=torch.channels_last)
    num_samples = sizes.batch * sizes.batches
    for name in sizes.teachers:
        for compiled in (False, True) if device.type == "cuda" else (False,):
            teacher = get_model(name, weights=None).eval().to(device, memory_format=torch.channels_last)
            forward = torch.compile(teacher) if compiled else teacher

            def bare(forward: Callable[[Tensor], Tensor] = forward) -> None:
                with torch.inference_mode(), autocast(device, dtype):
                    for _ in range(sizes.batches):
                        forward(images)

            def written(encoding: logitcache.Encoding, forward: Callable[[Tensor], Tensor] = forward) -> None:
                with (
                    tempfile.TemporaryDirectory(dir=folder) as fresh,
                    logitcache.create(
                        f"{fresh}/written.cache",
                        num_samples=num_samples,
                        num_classes=NUM_CLASSES,
                        encoding=encoding,
                        teacher="random weights",
                        dataset="random images",
                        precision=dtype,
                        rows_per_block=max(1, num_samples // 3),
                    ) as writer,
                    torch.inference_mode(),
                ):
                    for batch in range(sizes.batches):
                        with autocast(device, dtype):
                            logits = forward(images)
                        writer.write(view=0, start=batch * sizes.batch, logits=logits)

            calibration = torch.randn(2000, 256) @ torch.randn(256, NUM_CLASSES)
            lowrank = logitcache.LowRank(rank=sizes.ranks[0], k=8).fit(calibration)
            arms: dict[str, Callable[[], object]] = {
                "bare": bare,
                "TopK(k=10)": lambda written=written: written(logitcache.TopK(k=10)),
                "LowRank": lambda written=written, lowrank=lowrank: written(lowrank),
            }
            seconds = seconds_by_turns(arms, sizes.repeats, device)
            for arm in ("TopK(k=10)", "LowRank"):
                found = compare(seconds[arm], seconds["bare"])
                rows.append(
                    [
                        name,
                        "yes" if compiled else "no",
                        arm + (f" of rank {sizes.ranks[0]}" if arm == "LowRank" else ""),
                        f"{num_samples / found.reference_median:,.0f}",
                        f"{num_samples / found.median:,.0f}",
                        found,
                    ]
                )
    about = (
        f"{num_samples:,} images of {sizes.image} pixels, batches of {sizes.batch} in the device's memory, {dtype}, "
        f"channels last. The cache is created, written, synchronised to disk and sealed within the time. Medians of "
        f"{sizes.repeats}, by turns. Bound: <= {MAX_RATIO}."
    )
    header = ["teacher", "compiled", "encoding", "images/s, bare", "images/s, written", "written / bare"]
    return f"## Stage 1, images on the device\n\n{about}\n\n{table(header, rows)}"


class Pictures:
    """Random pictures, uint8 (3, S, S), of which a few differ."""

    num_classes = NUM_CLASSES

    def __init__(self, count: int, size: int) -> None:
        self._pictures = torch.randint(256, (64, 3, size, size), dtype=torch.uint8, generator=torch.Generator())
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self._pictures[index % 64], index % NUM_CLASSES


def pictures(count: int, size: int) -> Pictures:
    """The dataset of the pipelines below."""
    return Pictures(count, size)


def pipeline_of_pictures(sizes: Sizes, device: torch.device, folder: Path, **teacher: Any) -> Pipeline:
    """Random crops of random pictures, rendered by workers."""
    on_gpu = device.type == "cuda"
    net = {"precision": "bfloat16" if on_gpu else "float32", "channels_last": True}
    return parse_pipeline(
        {
            "name": MODULE,
            "data": {
                "name": f"{MODULE}:pictures",
                "args": {"count": sizes.pictures, "size": sizes.image * 8 // 7},
            },
            "views": {
                "transform": [
                    {"RandomResizedCrop": {"size": sizes.image, "scale": [0.35, 1.0]}},
                    {"RandomHorizontalFlip": {}},
                ],
                "count": 2,
            },
            "teacher": {"weights": "random", "batch_size": sizes.batch, **net, **teacher},
            "cache": {
                "path": f"{folder}/pictures.cache",
                "encoding": "TopK(k=10)",
                "rows_per_block": max(4, sizes.pictures // 2),
            },
            "train": {"batch_size": sizes.batch, "epochs": 4, **net},
            "students": [{"name": "student", "model": "resnet18", "loss": "kl"}],
            "runs": {"path": f"{folder}/runs"},
            "num_workers": max(1, num_cores() - 2) if on_gpu else 0,
        },
        source=__file__,
    )


def loader_section(sizes: Sizes, device: torch.device, folder: Path) -> str:
    """`cache_teacher` whole over pictures that workers render."""
    parts = []
    for name in sizes.teachers:
        for compiled in (False, True) if device.type == "cuda" else (False,):
            pipeline = pipeline_of_pictures(sizes, device, folder, model=name, compile=compiled)
            teacher = f"compiled {name}" if compiled else name
            parts.append(stage1.time_section(teacher, pipeline, max(1, sizes.repeats // 2), folder))
    return "\n\n".join(parts)


def students_section(sizes: Sizes, device: torch.device, folder: Path) -> str:
    """Epochs of a student of images."""
    pipeline = pipeline_of_pictures(sizes, device, folder, model=sizes.teachers[0])
    return stage2.epochs_section(pipeline, None, max(1, sizes.repeats - 1), 3)


def tokens_section(sizes: Sizes, device: torch.device, folder: Path) -> str:
    """Both stages of a language model."""
    num_classes, length = (300, 9) if sizes is TINY else (49_152, 257)
    given = tokens.Sizes(
        sizes.sequences, length, 16 if sizes is TINY else 256, tiny=sizes is TINY, batch=32, rows_per_block=16_384
    )
    repeats = sizes.repeats
    parts = {}
    for precision in ("float32", "bfloat16"):
        pipeline = given.pipeline(str(folder / precision), num_classes)
        teacher = pipeline.teacher.model_copy(update={"precision": precision})
        parts[precision] = tokens.stage1_section(pipeline.model_copy(update={"teacher": teacher}), repeats)
    parts["float32 students"] = tokens.epochs_section(given.pipeline(str(folder / "epochs"), num_classes), repeats)
    return "\n\n".join(part.replace("## ", f"## Language model, {name}: ", 1) for name, part in parts.items())


MEASUREMENTS: dict[str, Callable[[Sizes, torch.device, Path], str]] = {
    "heads": heads_section,
    "encodings": encodings_section,
    "resident": resident_section,
    "tokens": tokens_section,
    "loader": loader_section,
    "students": students_section,
}


if __name__ == "__main__":
    main()
