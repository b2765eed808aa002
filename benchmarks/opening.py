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

import json
import math
import os
import secrets
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping
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

START = """
import json, sys, time
import logitcache, torch, torchvision
import logitcache.cache.creation, logitcache.cache.reader, logitcache.storage.remote
from logitcache.cache import receipts as by_view
from logitcache.storage import open_storage

def memory(name):
    [kilobytes] = [line.split()[1] for line in open("/proc/self/status") if line.startswith(name)]
    return int(kilobytes) / 1e3

location, arguments = sys.argv[1], json.loads(sys.argv[2])
open_storage(location).size("manifest.json")  # connections and credentials are not the cache's
open("/proc/self/clear_refs", "w").write("5")
before, start = memory("VmRSS:"), time.perf_counter()
"""
OPEN = """
cache = logitcache.open(location)
opened, seconds = memory("VmHWM:") - before, time.perf_counter() - start
assert (arguments["views"], arguments["samples"]) == (cache.num_views, cache.num_samples)
cache.input_digests(arguments["views"] // 2)
print(json.dumps([seconds, opened, time.perf_counter() - start - seconds, memory("VmHWM:") - before]))
"""
BUILD = """
import torch
rows, classes = 4096, 10
logits = torch.randn(rows, classes, generator=torch.Generator().manual_seed(0))
samples, views = arguments["samples"], arguments["views"]
with logitcache.create(location, num_samples=samples, num_classes=classes, num_views=views,
                       encoding=logitcache.Dense(dtype="uint8"), teacher="noise", dataset="none") as writer:
    for view in range(views):
        for first in range(0, samples, rows):
            writer.write(view=view, start=first, logits=logits[: samples - first])
print(json.dumps([time.perf_counter() - start, memory("VmHWM:") - before]))
"""
READ = """
samples, views = arguments["samples"], arguments["views"]
cache = logitcache.open(location)
for number in (0, views - 1):
    view = cache.view(number, memory_budget=2**22)
    for first in range(0, samples, 4096):
        view.logits(range(first, min(first + 4096, samples)))
print(json.dumps([time.perf_counter() - start, memory("VmHWM:") - before]))
"""


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--only", choices=["open", "memory"], help="one of the two measurements")
    parser.add_argument("--simulated", type=int, nargs=2, default=[14_000_000, 300], help="samples and views to open")
    parser.add_argument("--samples", type=int, nargs=2, default=[10_000, 10_000_000], help="few and many, for memory")
    parser.add_argument("--views", type=int, nargs=2, default=[8, 300], help="few and many, for memory")
    parser.add_argument("--repeats", type=int, default=7, help="of opening")
    arguments = parse(parser, simulated=[200_000, 400], samples=[100, 20_000], views=[2, 3], repeats=2)
    folder = fresh_folder()
    sections = ["# Opening", conditions()]
    print(sections[-1], flush=True)
    if arguments.only != "memory":
        sections.append(open_section(folder, *arguments.simulated, arguments.repeats))
        print(f"\n{sections[-1]}", flush=True)
    if arguments.only != "open":
        sections.append(memory_section(folder, arguments.samples, arguments.views))
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
    found = np.array([measured(OPEN, location, shape) for _ in range(repeats)])
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


def memory_section(folder: Path, samples: list[int], views: list[int]) -> str:
    """Peak memory of builds and readers of several shapes."""
    rows = []
    for num_samples, num_views in ((samples[0], views[0]), (samples[1], views[0]), (samples[0], views[1])):
        path = folder / f"{num_samples}-{num_views}.cache"
        shape = {"samples": num_samples, "views": num_views}
        seconds, building = measured(BUILD, str(path), shape)
        readers = [measured(READ, str(path), shape)[1] for _ in range(3)]
        rows.append(
            [f"{num_samples:,}", num_views, f"{building:.0f} MB", f"{statistics.median(readers):.0f} MB",
             f"{seconds:.0f} s"]
        )  # fmt: skip
    header = ["samples", "views", "build", "reader, median of 3", "time of the build"]
    return f"## Memory\n\nGrowth of the peak memory over that of the imports.\n\n{table(header, rows)}"


def measured(program: str, location: str, arguments: Mapping[str, int]) -> list[float]:
    """What a program prints that runs in a process of its own."""
    command = [sys.executable, "-c", START + program, location, json.dumps(arguments)]
    ended = subprocess.run(command, capture_output=True, text=True, check=True)
    found: list[float] = json.loads(ended.stdout)
    return found


if __name__ == "__main__":
    main()
