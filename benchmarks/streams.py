"""Streams against their bounds: throughput of a joined stream, and stage 1 in one pass over the data instead of two.

Stream: `StreamViews` over JPEG files in a tar file, against the same stream with the same decoding and transform, but
without keys, seeds and cache. Both run in this process by turns: at least 0.97 of the plain stream's throughput. The
first pass is shown beside later ones: it joins the stream to the cache anew, and hashes and compares each content.

Render: `render` of one sample against a `ViewDataset` of this one sample, made and read for each, as one writes it for
samples that don't come from a map-style dataset. Both decode and augment the same files by turns, bit for bit alike.

Stage 1: `cache_teacher` over a folder of JPEG files against the same build as it was before: it first hashes all files,
and then runs the teacher. By turns; before each run the files are dropped from the system's page cache, as with data
that does not fit into memory. The ids and digests of both caches are equal.

    python benchmarks/streams.py --write
    python benchmarks/streams.py --only stream --repeats 15
"""

from __future__ import annotations

import argparse
import gc
import io
import os
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from measuring import compare, conditions, options, parse, table, write_result
from PIL import Image
from torch.utils.data import DataLoader, IterableDataset
from torchvision.transforms import v2

import logitcache
from logitcache.config.schema import Pipeline, parse_pipeline
from logitcache.data.samples import Dataset, SampleTable, content_table, sample_table
from logitcache.data.shards import decode_image
from logitcache.data.views import to_float_image
from logitcache.progress import silence
from logitcache.stages import cache_teacher as stage

MIN_THROUGHPUT = 0.97
CLASSES = 10
BATCH = 64
SIDE = 256
"""Of an image, in pixels; about 35 kB as a JPEG file."""
CROP = {"RandomResizedCrop": {"size": 224, "antialias": True}}
FLIP = {"RandomHorizontalFlip": {}}


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--only", choices=["stream", "render", "stage1"], help="one of the measurements")
    parser.add_argument("--repeats", type=int, default=7, help="rounds of passes over the stream")
    parser.add_argument("--samples", type=int, default=4000, help="of the stream; `render` takes up to 500")
    parser.add_argument("--images", type=int, default=20_000, help="of stage 1")
    parser.add_argument("--builds", type=int, default=3, help="pairs of builds")
    parser.add_argument("--workers", type=int, default=2, help="DataLoader workers of stage 1")
    parser.add_argument("--folder", type=Path, help="where images and caches are written and removed again")
    arguments = parse(parser, repeats=1, samples=24, images=24, builds=1, workers=0)
    silence()
    torch.set_num_threads(1)
    sections = ["# Streams", conditions()]
    print(sections[-1], flush=True)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        if arguments.only in (None, "stream"):
            sections.append(stream_section(Path(folder), arguments.samples, arguments.repeats))
            print(f"\n{sections[-1]}", flush=True)
        if arguments.only in (None, "render"):
            sections.append(render_section(min(arguments.samples, 500), arguments.repeats))
            print(f"\n{sections[-1]}", flush=True)
        if arguments.only in (None, "stage1"):
            sections.append(stage1_section(Path(folder), arguments))
            print(f"\n{sections[-1]}", flush=True)
    if arguments.write:
        name = "streams" if arguments.only is None else f"streams-{arguments.only}"
        written = write_result(name, "\n\n".join(sections) + "\n", device=torch.device("cpu"))
        print(f"\nwritten to {written}")


def jpeg(random: np.random.Generator) -> bytes:
    """A smooth image with some noise, as a JPEG file."""
    coarse = Image.fromarray(random.integers(0, 256, (16, 16, 3), dtype=np.uint8)).resize((SIDE, SIDE), Image.BICUBIC)
    noise = random.integers(-12, 13, (SIDE, SIDE, 3))
    pixels = np.clip(np.asarray(coarse).astype(np.int16) + noise, 0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="JPEG", quality=90)
    return file.getvalue()


@dataclass(frozen=True)
class Cost:
    """What one run took, in seconds."""

    wall: float
    cpu: float
    """Of all threads and of the workers."""


def timed(run: Callable[[], object]) -> Cost:
    gc.collect()
    start, cpu_start = time.perf_counter(), sum(os.times()[:4])
    run()
    return Cost(time.perf_counter() - start, sum(os.times()[:4]) - cpu_start)


class TarStream(IterableDataset[tuple[str, bytes, int]]):
    """(key, file, target) of the samples of a tar file, read from its beginning to its end."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __iter__(self) -> Iterator[tuple[str, bytes, int]]:
        with tarfile.open(self.path, "r|") as archive:
            image = b""
            for member in archive:
                file = archive.extractfile(member)
                assert file is not None
                key, _, suffix = member.name.partition(".")
                if suffix == "jpg":
                    image = file.read()
                else:
                    yield key, image, int(file.read())


class PlainStream(IterableDataset[tuple[torch.Tensor, int]]):
    """The same stream and transform, as one writes it without a cache."""

    def __init__(self, stream: TarStream, transform: Callable[[object], object]) -> None:
        self.stream = stream
        self.transform = transform

    def __iter__(self) -> Iterator[tuple[torch.Tensor, int]]:
        for _, image, target in self.stream:
            yield to_float_image(self.transform(decode_image(image))), target


def stream_section(folder: Path, num_samples: int, repeats: int) -> str:
    random = np.random.default_rng(0)
    path = folder / "images.tar"
    with tarfile.open(path, "w") as archive:
        for number in range(num_samples):
            for suffix, data in (("jpg", jpeg(random)), ("cls", str(number % CLASSES).encode())):
                member = tarfile.TarInfo(f"{number:06d}.{suffix}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    transform = v2.Compose([v2.RandomResizedCrop(224, antialias=True), v2.RandomHorizontalFlip()])
    plan = logitcache.ViewPlan(transform=transform, seed=0)
    dataset = logitcache.TarShards([path], num_classes=CLASSES)
    with logitcache.create(
        folder / "stream.cache",
        num_samples=num_samples,
        num_classes=CLASSES,
        teacher="random",
        samples=sample_table(dataset, contents=True),
        view_plan=plan,
    ) as writer:
        writer.write(
            view=0,
            start=0,
            logits=torch.randn(num_samples, CLASSES),
            input_digests=logitcache.ViewDataset(dataset, plan).input_digests(0),
        )
    cache = logitcache.open(folder / "stream.cache")
    stream = TarStream(path)
    plain = PlainStream(stream, transform)
    joined = logitcache.StreamViews(stream, cache, plan=plan, decode=decode_image)

    def read_plain() -> None:
        assert sum(len(targets) for _, targets in DataLoader(plain, BATCH)) == num_samples

    def read_joined() -> None:
        joined.set_view(0)
        assert sum(len(targets) for _, _, targets in DataLoader(joined, BATCH)) == num_samples

    def read_joined_first() -> None:
        first = logitcache.StreamViews(stream, cache, plan=plan, decode=decode_image)
        assert sum(len(targets) for _, _, targets in DataLoader(first, BATCH)) == num_samples

    read_plain()
    read_joined()
    costs = by_turns([read_plain, read_joined, read_joined_first], repeats)
    rows = []
    for name, arm in (("later passes", costs[1]), ("first pass, with hashes", costs[2])):
        pairs = [
            compare([getattr(cost, kind) for cost in costs[0]], [getattr(cost, kind) for cost in arm])
            for kind in ("wall", "cpu")
        ]
        speed = f"{num_samples / pairs[0].reference_median:.0f}"
        rows.append([name, speed, f"{num_samples / pairs[0].median:.0f}", *(pair.quartiles for pair in pairs)])
    header = ["", "joined, samples/s", "plain, samples/s", "ratio of throughputs, wall time", "by CPU time"]
    about = (
        f"{num_samples} JPEG files of {SIDE} x {SIDE} pixels in one tar file; random crops of 224 pixels and flips; "
        f"batches of {BATCH}, one process, one thread, {repeats} rounds. Bound for the ratio: >= {MIN_THROUGHPUT}."
    )
    return f"## Throughput of a joined stream\n\n{about}\n\n{table(header, rows)}"


def render_section(num_samples: int, repeats: int) -> str:
    random = np.random.default_rng(2)
    large = [(jpeg(random), number % CLASSES) for number in range(num_samples)]
    small = [(random.integers(0, 256, (3, 32, 32), dtype=np.uint8), number % CLASSES) for number in range(num_samples)]
    kinds = {
        "JPEG files, crops of 224 pixels": (large, decode_image, v2.RandomResizedCrop(224, antialias=True)),
        "tensors of 32 pixels, flips": (small, torch.from_numpy, v2.RandomHorizontalFlip()),
    }
    rows = []
    for name, (samples, decode, transform) in kinds.items():
        plan = logitcache.ViewPlan(transform=transform, seed=0)

        def alone(
            samples: Sequence[tuple[bytes, int]] = samples,
            decode: Callable[..., object] = decode,
            plan: logitcache.ViewPlan = plan,
        ) -> list[object]:
            return [
                logitcache.render(plan, 0, number, (decode(data), target))[1]
                for number, (data, target) in enumerate(samples)
            ]

        def in_dataset(
            samples: Sequence[tuple[bytes, int]] = samples,
            decode: Callable[..., object] = decode,
            plan: logitcache.ViewPlan = plan,
        ) -> list[object]:
            of_all = replace(plan, num_samples=num_samples)
            return [
                logitcache.ViewDataset([(decode(data), target)], of_all, rows=np.array([number]))[0, 0][1]
                for number, (data, target) in enumerate(samples)
            ]

        assert all(map(torch.equal, in_dataset(), alone())), "render and ViewDataset differ"
        costs = by_turns([in_dataset, alone], repeats)
        pairs = [
            compare([getattr(cost, kind) for cost in costs[1]], [getattr(cost, kind) for cost in costs[0]])
            for kind in ("wall", "cpu")
        ]
        times = [f"{1e6 * median / num_samples:.0f} µs" for median in (pairs[0].median, pairs[0].reference_median)]
        rows.append([name, *times, *(pair.quartiles for pair in pairs)])
    about = (
        f"{num_samples} samples, one process, one thread, {repeats} rounds, decoding included. The ratio is the "
        "time of `render` divided by that of a `ViewDataset` of one sample."
    )
    header = ["", "`render`", "`ViewDataset` of one sample", "ratio, wall time", "by CPU time"]
    return f"## One sample at a time\n\n{about}\n\n{table(header, rows)}"


def by_turns(arms: Sequence[Callable[[], None]], repeats: int) -> list[list[Cost]]:
    """All arms in each round, in another order each time, so that a slow minute hits all."""
    costs: list[list[Cost]] = [[] for _ in arms]
    for repeat in range(repeats):
        order = [(repeat + number) % len(arms) for number in range(len(arms))]
        for number in order if repeat % 2 == 0 else reversed(order):
            costs[number].append(timed(arms[number]))
    return costs


def stage1_section(folder: Path, arguments: argparse.Namespace) -> str:
    random = np.random.default_rng(1)
    root = folder / "images"
    num_bytes = 0
    for number in range(arguments.images):
        path = root / f"{number % CLASSES}" / f"{number:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        num_bytes += path.write_bytes(jpeg(random))
    os.sync()

    def pipeline(name: str) -> Pipeline:
        return parse_pipeline(
            {
                "name": "streams",
                "data": {"name": "image_folder", "root": str(root)},
                "views": {"count": 1, "transform": [CROP, FLIP]},
                "teacher": {"model": "mlp", "args": {"hidden": [8]}, "weights": "random", "batch_size": 64},
                "cache": {"path": str(folder / f"{name}.cache"), "encoding": {"name": "dense", "dtype": "float16"}},
                "device": "cpu",
                "threads": 1,
                "num_workers": arguments.workers,
            },
            source=__file__,
        )

    def build(name: str) -> Callable[[], None]:
        def run() -> None:
            made = pipeline(name)
            with two_passes(arguments.workers) if name == "two" else one_pass():
                stage.cache_teacher(made, trust=True)

        return run

    costs: dict[str, list[Cost]] = {"one": [], "two": []}
    digests = set()
    for repeat in range(arguments.builds):
        for name in ("two", "one") if repeat % 2 == 0 else ("one", "two"):
            forget_pages(root)
            costs[name].append(timed(build(name)))
            cache = logitcache.open(folder / f"{name}.cache")
            digests.add((cache.id, cache.digest))
            for key in [*cache.storage.list_keys()]:
                cache.storage.delete(key)
    assert len(digests) == 1, "one and two passes build different caches"
    wall, cpu = (
        compare(*([getattr(cost, kind) for cost in costs[name]] for name in ("one", "two"))) for kind in ("wall", "cpu")
    )
    rows = [
        ["two passes (before)", f"{wall.reference_median:.1f} s", f"{cpu.reference_median:.1f} s"],
        ["one pass", f"{wall.median:.1f} s", f"{cpu.median:.1f} s"],
        ["ratio", wall, cpu],
    ]
    about = (
        f"{arguments.images} JPEG files ({num_bytes / 2**20:.0f} MiB), one view of random crops, {arguments.workers} "
        f"workers, {arguments.builds} pairs of builds. The teacher is a small MLP, so that reading and rendering are "
        "most of the work, as with a fast GPU. Both caches have the same id and digest."
    )
    return f"## Stage 1 in one pass\n\n{about}\n\n{table(['', 'wall time', 'CPU time, with workers'], rows)}"


@contextmanager
def one_pass() -> Iterator[None]:
    yield


@contextmanager
def two_passes(num_workers: int) -> Iterator[None]:
    """Stage 1 hashes all samples before it starts."""
    identify = stage.identify_samples

    def hash_first(dataset: Dataset, existing: logitcache.LogitCache | None) -> SampleTable:
        return replace(identify(dataset, existing), contents=content_table(dataset, num_workers=num_workers))

    stage.identify_samples = hash_first
    try:
        yield
    finally:
        stage.identify_samples = identify


def forget_pages(root: Path) -> None:
    """Drop files from the page cache, where the system can."""
    if not hasattr(os, "posix_fadvise"):
        return
    for path in root.rglob("*.jpg"):
        file = os.open(path, os.O_RDONLY)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)


if __name__ == "__main__":
    main()
