"""Opening and memory of large caches.

Open: a simulated cache of 300 views of 14 M samples, with its manifest, its 256 000 receipts of real size, and a sample
table that its receipts describe; no label and no table is stored, so nothing can read them. `logitcache.open` in a
process of its own, from a folder and from S3 (moto on the loopback interface): seconds, and growth of the peak memory
over that of the imports. At most 0.5 s and 100 MB. Beside it the receipts of one view, and, from the folder, the same
cache with all receipts in one file.

Memory: peak memory of a build (`logitcache.create`, the writer and sealing) and of a reader (opens the cache and reads
two views in order, in batches of 4 096 rows with a memory budget of 4 MiB), each in a process of its own, over that of
the imports: few and many samples, few and many views.

    python benchmarks/opening.py --write
    python benchmarks/opening.py --only memory --samples 10000 1000000
"""

from __future__ import annotations

import math
import multiprocessing
import os
import secrets
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from measuring import conditions, fresh_folder, options, parse, table, write_result

import logitcache
from logitcache.arrays import ArraySpec
from logitcache.cache import receipts as by_view
from logitcache.cache.layout import PER_CACHE, object_limits, view_blocks
from logitcache.cache.manifest import (
    MANIFEST,
    RECEIPTS,
    Manifest,
    PerCacheSpec,
    Receipt,
    StoredObject,
    dump_manifest,
)
from logitcache.cache.receipts import ReceiptsByView
from logitcache.cache.records import Records
from logitcache.data.rows import OneRowEach
from logitcache.storage import open_storage

sys.path.insert(0, str(Path(__file__).parent.parent))
from tests import servers

MAX_SECONDS, MAX_MEGABYTES = 0.5, 100
KEY_BYTES = 24
"""Of a sample's key."""

Shape = Mapping[str, int]
PROCESSES = multiprocessing.get_context("forkserver")
"""Each measurement has a process of its own, forked from one that has only imported what is needed."""
PROCESSES.set_forkserver_preload(["__main__", "logitcache.cache.reader", "logitcache.storage.remote", "torchvision"])


def measured(program: Callable[[str, Shape], list[float]], location: str, shape: Shape) -> list[float]:
    """What a program measures in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=PROCESSES) as process:
        return process.submit(begin, program, location, shape, dict(os.environ)).result()


def begin(
    program: Callable[[str, Shape], list[float]], location: str, shape: Shape, environment: dict[str, str]
) -> list[float]:
    os.environ.update(environment)
    open_storage(location).size(MANIFEST)  # connections and credentials are not the cache's
    return program(location, shape)


class Usage:
    """Seconds, and growth of the peak memory in MB, since it was made."""

    def __init__(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        self._memory, self._start = self._read("VmRSS"), time.perf_counter()

    def measure(self) -> tuple[float, float]:
        return time.perf_counter() - self._start, self._read("VmHWM") - self._memory

    @staticmethod
    def _read(name: str) -> float:
        status = Path("/proc/self/status").read_text().splitlines()
        [kilobytes] = [line.split()[1] for line in status if line.startswith(f"{name}:")]
        return int(kilobytes) / 1e3


def open_it(location: str, shape: Shape) -> list[float]:
    """Seconds and MB of opening, and of the receipts of one view with it."""
    usage = Usage()
    cache = logitcache.open(location)
    seconds, memory = usage.measure()
    assert (shape["views"], shape["samples"]) == (cache.num_views, cache.num_samples)
    cache.input_digests(shape["views"] // 2)
    both, memory_of_both = usage.measure()
    return [seconds, memory, both - seconds, memory_of_both]


def build_it(location: str, shape: Shape) -> list[float]:
    """Seconds and MB of a build."""
    rows, classes = 4096, 10
    logits = torch.randn(rows, classes, generator=torch.Generator().manual_seed(0))
    usage = Usage()
    with logitcache.create(
        location, num_samples=shape["samples"], num_classes=classes, num_views=shape["views"],
        encoding=logitcache.Dense(dtype="uint8"), teacher="noise", dataset="none",
    ) as writer:  # fmt: skip
        for view in range(shape["views"]):
            for first in range(0, shape["samples"], rows):
                writer.write(view=view, start=first, logits=logits[: shape["samples"] - first])
    return list(usage.measure())


def read_it(location: str, shape: Shape) -> list[float]:
    """Seconds and MB of reading the first and the last view."""
    usage = Usage()
    cache = logitcache.open(location)
    for number in (0, shape["views"] - 1):
        view = cache.view(number, memory_budget=2**22)
        for first in range(0, shape["samples"], 4096):
            view.logits(range(first, min(first + 4096, shape["samples"])))
    return list(usage.measure())


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--only", choices=["open", "memory"], help="one of the two measurements")
    parser.add_argument("--simulated", type=int, nargs=2, default=[14_000_000, 300], help="samples and views to open")
    parser.add_argument("--samples", type=int, nargs=2, default=[10_000, 10_000_000], help="few and many, for memory")
    parser.add_argument("--views", type=int, nargs=2, default=[8, 300], help="few and many, for memory")
    parser.add_argument("--repeats", type=int, default=7, help="of opening")
    arguments = parse(parser, simulated=[200_000, 400], samples=[100, 20_000], views=[2, 3], repeats=1)
    folder = fresh_folder()
    sections = ["# Opening", conditions()]
    print(sections[-1], flush=True)
    if arguments.only != "memory":
        sections.append(open_section(folder, *arguments.simulated, arguments.repeats))
        print(f"\n{sections[-1]}", flush=True)
    if arguments.only != "open":
        sections.append(memory_section(folder, arguments.samples, arguments.views, min(arguments.repeats, 3)))
        print(f"\n{sections[-1]}", flush=True)
    if arguments.write:
        name = "opening" if arguments.only is None else f"opening-{arguments.only}"
        path = write_result(name, "\n\n".join(sections) + "\n", device=torch.device("cpu"))
        print(f"\nwritten to {path}")


def open_section(folder: Path, num_samples: int, num_views: int, repeats: int) -> str:
    """Opening a cache that is too large to make."""
    path = folder / "a.cache"
    manifest, receipts = simulated(path, num_samples, num_views)
    assert by_view.splits_receipts(manifest)
    store(path, manifest, receipts)
    shape = {"samples": num_samples, "views": num_views}
    rows = [opening_row("a folder", str(path), shape, repeats)]
    (folder / "moto").mkdir()
    with servers.moto(folder / "moto") as endpoint:
        os.environ.update(servers.KEYS | {"AWS_ENDPOINT_URL": endpoint, "LOGITCACHE_CACHE_GB": "0"})
        there = open_storage("s3://team/a.cache")
        for file in sorted(file for file in path.rglob("*.json") if file.name != "zarr.json"):
            there.put(file.relative_to(path).as_posix(), file.read_bytes())
        rows.append(opening_row("S3", "s3://team/a.cache", shape, repeats))
    index = (path / RECEIPTS).stat().st_size
    by_view.GATHERED_RECEIPTS = 2**40
    (folder / "one").mkdir()
    store(folder / "one/a.cache", manifest, dict(receipts))
    rows.append(opening_row("a folder, all receipts in one file", str(folder / "one/a.cache"), shape, 1))
    rows.append(["bound", f"<= {MAX_SECONDS} s", f"<= {MAX_MEGABYTES} MB", "", ""])
    header = ["from", "open", "memory", "receipts of one view", "memory with them"]
    whole = (folder / "one/a.cache" / RECEIPTS).stat().st_size
    return (
        f"## Opening\n\n{num_views} views of {num_samples:,} samples, {len(receipts):,} receipts; medians of {repeats} "
        f"processes, the most memory. `{RECEIPTS}` has {index / 1e3:,.0f} kB by view, and {whole / 1e6:,.1f} MB in one "
        f"file.\n\n{table(header, rows)}"
    )


def opening_row(name: str, location: str, shape: Mapping[str, int], repeats: int) -> list[str]:
    found = np.array([measured(open_it, location, shape) for _ in range(repeats)])
    seconds, view_seconds = np.median(found[:, 0]), np.median(found[:, 2])
    return [
        name, f"{seconds:.3f} s", f"{found[:, 1].max():.1f} MB", f"{view_seconds:.3f} s", f"{found[:, 3].max():.1f} MB"
    ]  # fmt: skip


def simulated(path: Path, num_samples: int, num_views: int) -> tuple[Manifest, ReceiptsByView]:
    """Manifest and receipts as a build would write them, with hashes of nothing."""
    encoding = logitcache.TopK(k=20)
    logitcache.create(
        path, num_samples=num_samples, num_classes=1000, num_views=num_views, encoding=encoding, teacher="t",
        dataset="d", rows_per_block=min(16_384, num_samples // 16),
    ).close()  # fmt: skip
    opened = logitcache.open(path).manifest
    samples = {
        "sample_keys": PerCacheSpec(dtype="uint8", shape=[KEY_BYTES * num_samples]),
        "sample_targets": PerCacheSpec(dtype="int64", shape=[num_samples]),
        "sample_contents": PerCacheSpec(dtype="uint8", shape=[num_samples, 16]),
    }
    layout = opened.layout.model_copy(update={"fixed": samples})
    row_map = OneRowEach(num_samples, layout.rows_per_block)

    def stored(size: int) -> StoredObject:
        return StoredObject(bytes=size, sha256=secrets.token_hex(32), values_sha256=secrets.token_hex(32))

    def block_bytes(spec: ArraySpec, rows: int) -> int:
        return rows * math.prod(spec.row_shape) * np.dtype(spec.dtype).itemsize

    def of_view(view: int) -> Iterator[tuple[str, Receipt]]:
        for block in view_blocks(layout, view):
            rows = len(row_map.block_rows(block.number))
            objects = {name: stored(block_bytes(spec, rows)) for name, spec in layout.arrays.items()}
            yield block.name, Receipt(rows=rows, objects=objects, kl_mean=0.0123456789, kl_max=1.23456789, inputs={})

    limits = object_limits(layout)
    table_objects = {name: stored(limits[name] // 2) for name in samples}
    fixed = Receipt(rows=num_samples, objects=table_objects, kl_mean=None, kl_max=None, inputs={})
    receipts = ReceiptsByView(fixed, layout.views, lambda view: dict(of_view(view)))
    assert PER_CACHE in receipts
    return opened.model_copy(update={"layout": layout}), receipts


def store(path: Path, manifest: Manifest, receipts: Mapping[str, Receipt]) -> None:
    """Seal records, without any label."""
    storage = open_storage(path)
    records, gathered = Records(manifest, receipts).sealed(put=storage.put)
    storage.put(RECEIPTS, gathered)
    storage.put(MANIFEST, dump_manifest(records.manifest))


def memory_section(folder: Path, samples: list[int], views: list[int], repeats: int) -> str:
    """Peak memory of builds and readers of several shapes."""
    rows = []
    for num_samples, num_views in ((samples[0], views[0]), (samples[1], views[0]), (samples[0], views[1])):
        path = folder / f"{num_samples}-{num_views}.cache"
        shape = {"samples": num_samples, "views": num_views}
        seconds, building = measured(build_it, str(path), shape)
        readers = [measured(read_it, str(path), shape)[1] for _ in range(repeats)]
        rows.append(
            [f"{num_samples:,}", num_views, f"{building:.0f} MB", f"{statistics.median(readers):.0f} MB",
             f"{seconds:.0f} s"]
        )  # fmt: skip
    header = ["samples", "views", "build", "reader", "time of the build"]
    about = f"Growth of the peak memory over that of the imports; of readers the median of {repeats}."
    return f"## Memory\n\n{about}\n\n{table(header, rows)}"


if __name__ == "__main__":
    main()
