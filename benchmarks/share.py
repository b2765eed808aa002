"""Sharing against its bounds.

Pull: `logitcache.share.transfer.pull` against plain obstore gets of the same objects, as many at once, by turns:
into files without fsync, into memory, and into files that are hashed and fsynced, which is what a pull cannot do
without. From SeaweedFS, an S3 server, and from nginx, each in a network namespace of its own behind a link of so many
gigabits a second, as another machine would be (left out without root and iproute2); and from these and moto, another S3
server, on the loopback interface, where the same cores serve and pull, and a byte costs less to send than to hash.
Plain gets / pull is to be at least 0.9.

Info: a simulated cache of 300 views of 1 280 000 samples, its manifest and its 23 700 receipts of real size, and no
label. `logitcache info URL` in a process of its own: requests, seconds, peak memory. Two requests at most, under a
second, under 100 MB. Opening it for reading is shown beside it.

Warm: a student trained by turns, epoch by epoch, from a local cache and from the same cache by its URL, whose blocks
are all nearby: at most 1.02; and the seconds to make a view of 1 280 000 rows resident.

    python benchmarks/share.py --write
    python benchmarks/share.py --only pull --megabytes 100
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import secrets
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import obstore
import pytest
import torch
from measuring import TINY, compare, conditions, options, parse, table, write_result
from obstore.store import from_url

import logitcache
from logitcache.arrays import ArraySpec
from logitcache.cache.layout import PER_CACHE, all_blocks
from logitcache.cache.manifest import MANIFEST, RECEIPTS, Receipt, StoredObject, dump_manifest
from logitcache.cache.records import Records
from logitcache.config.schema import load_pipeline
from logitcache.data.loading import rendered_batches
from logitcache.data.rows import OneRowEach
from logitcache.losses import loss_from_config
from logitcache.progress import silence, track
from logitcache.share.transfer import pull, push
from logitcache.stages.cache_teacher import cache_teacher
from logitcache.stages.train_student import Experiment
from logitcache.storage import open_storage
from logitcache.storage.local import fsync_path
from logitcache.storage.remote import CONCURRENCY
from logitcache.train.loop import Run as TrainingRun
from logitcache.train.loop import train_epoch
from logitcache.train.runs import RunFolder
from tests import servers

PIPELINE = Path(__file__).parent.parent / "pipelines" / "mnist5k.yaml"
LINKS = {"1 Gbit/s": 1.0, "2.5 Gbit/s": 2.5, "5 Gbit/s": 5.0, "loopback": None}


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--only", choices=["pull", "info", "warm"], help="one of the measurements")
    parser.add_argument("--megabytes", type=int, default=1200, help="of the cache that is pulled, before compression")
    parser.add_argument("--repeats", type=int, default=7, help="of each measurement")
    parser.add_argument("--epochs", type=int, default=40, help="of each of the two students")
    parser.add_argument("--views", type=int, default=300, help="of the simulated cache")
    parser.add_argument("--samples", type=int, default=1_280_000, help="of the simulated cache, and of a large view")
    arguments = parse(parser, megabytes=1, repeats=1, epochs=4, views=2, samples=10_000)
    silence()
    sections = ["# Share", conditions()]
    print(sections[-1], flush=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["LOGITCACHE_CACHE_DIR"] = str(folder / "nearby")
        links = {"loopback": None} if arguments.tiny else usable_links()
        overrides = TINY if arguments.tiny else []
        measurements = {
            "pull": lambda: pull_section(folder / "pull", links, arguments.megabytes, arguments.repeats),
            "info": lambda: info_section(folder / "info", arguments.views, arguments.samples, arguments.repeats),
            "warm": lambda: warm_section(
                folder / "warm", overrides, arguments.epochs, arguments.samples, arguments.repeats
            ),
        }
        for name, measure in measurements.items():
            if arguments.only in (None, name):
                try:
                    sections.append(measure())
                except pytest.skip.Exception as reason:
                    sections.append(f"## {name.capitalize()}\n\nNot measured: {reason}.")
                print(f"\n{sections[-1]}", flush=True)
    if arguments.write:
        subject = "share" if arguments.only is None else f"share-{arguments.only}"
        print(write_result(subject, "\n\n".join(sections) + "\n", device=torch.device("cpu")))


@contextmanager
def served(folder: Path, root: Path, host: servers.Host = servers.LOOPBACK, path: str = "") -> Iterator[str]:
    """A folder by nginx, or what lies at a path in it."""
    folder.mkdir(parents=True)
    with servers.nginx(folder, root, host) as url:
        yield f"{url}/{path}"


@contextmanager
def stored(
    folder: Path, cache: Path, server: Callable[..., AbstractContextManager[str]], host: servers.Host = servers.LOOPBACK
) -> Iterator[str]:
    """A cache on an S3 server."""
    folder.mkdir(parents=True)
    with server(folder, host) as endpoint:
        os.environ.update(servers.KEYS | {"AWS_ENDPOINT_URL": endpoint})
        push(str(cache), f"s3://team/{cache.name}")
        yield f"s3://team/{cache.name}"


def usable_links() -> dict[str, float | None]:
    """The links that can be set up here: `LINKS`, or only the loopback interface."""
    if shutil.which("ip") and shutil.which("tc"):
        name = "logitcache-probe"
        if subprocess.run(["ip", "netns", "add", name], check=False, capture_output=True).returncode == 0:
            subprocess.run(["ip", "netns", "delete", name], check=True)
            return LINKS
    return {"loopback": None}


@contextmanager
def behind_link(gigabits: float | None) -> Iterator[servers.Host]:
    """A host of its own, whose answers cross a link of so many gigabits a second; if None, this one."""
    if gigabits is None:
        yield servers.LOOPBACK
        return
    name, here, there, network = "logitcache", "logitcache0", "logitcache1", "10.203.119"
    in_there = ("ip", "netns", "exec", name)
    try:
        for command in (
            f"ip netns add {name}",
            f"ip link add {here} type veth peer name {there} netns {name}",
            f"ip address add {network}.1/30 dev {here}",
            f"ip link set {here} up",
            f"ip -n {name} address add {network}.2/30 dev {there}",
            f"ip -n {name} link set {there} up",
            f"ip -n {name} link set lo up",
            f"{' '.join(in_there)} tc qdisc add dev {there} root tbf rate {gigabits}gbit burst 1mb latency 50ms",
        ):
            subprocess.run(command.split(), check=True)
        yield servers.Host(f"{network}.2", in_there)
    finally:
        # The name alone would go: a namespace lives, and keeps its end of the link, until its last socket is closed.
        subprocess.run(["ip", "link", "delete", here], check=False)
        subprocess.run(["ip", "netns", "delete", name], check=False)


def pull_section(folder: Path, links: dict[str, float | None], megabytes: int, repeats: int) -> str:
    """Pull against plain gets."""
    rows_per_block, num_classes = 8192, 64
    num_samples = 16 * rows_per_block
    num_views = max(1, megabytes * 10**6 // (2 * num_samples * num_classes))
    (folder / "www").mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    shape = {"num_samples": num_samples, "num_classes": num_classes, "num_views": num_views}
    with logitcache.create(
        folder / "www/a.cache", **shape, rows_per_block=rows_per_block, teacher="noise", dataset="none"
    ) as writer:
        for view in range(num_views):
            for start in range(0, num_samples, rows_per_block):
                logits = torch.randn(rows_per_block, num_classes, generator=generator)
                writer.write(view=view, start=start, logits=logits)
    cache = logitcache.open(folder / "www/a.cache")
    keys = [key for key in cache.storage.list_keys("labels.zarr") if "/c/" in key]
    rows = []
    absent = [] if LINKS.keys() <= links.keys() else ["links between two hosts, which need root and iproute2"]
    for link, gigabits in links.items():
        with behind_link(gigabits) as host:
            sources = {
                "SeaweedFS (S3)": stored(
                    folder / f"SeaweedFS-{gigabits}", folder / "www/a.cache", servers.seaweedfs, host
                ),
                "nginx": served(folder / f"nginx-{gigabits}", folder / "www", host, "a.cache"),
            }
            if gigabits is None:
                sources["moto (S3)"] = stored(folder / "moto", folder / "www/a.cache", servers.moto)
            for name, source in sources.items():
                try:
                    with source as url:
                        rows.append([f"{name}, {link}", *by_turns(url, keys, folder, repeats)])
                except pytest.skip.Exception as reason:
                    absent.append(str(reason))
    left_out = f" Left out: {'; '.join(dict.fromkeys(absent))}." if absent else ""
    header = [
        "from",
        "pull",
        "plain gets into files / pull",
        "into memory / pull",
        "into files, hashed, fsynced / pull",
    ]
    return (
        f"## Pull\n\n{len(keys)} objects, {cache.stored_bytes / 1e6:.0f} MB, {CONCURRENCY} at a time; medians of "
        f"{repeats}, by turns. Bound: >= 0.9.{left_out}\n\n{table(header, rows)}"
    )


def by_turns(url: str, keys: list[str], folder: Path, repeats: int) -> list[str]:
    """Speed of a pull, and what plain gets take of its time."""
    ours, memory, files, held = [], [], [], []
    for _ in range(repeats + 1):  # the first warms up
        memory.append(plain_gets(url, keys, None))
        files.append(plain_gets(url, keys, folder / "plain"))
        empty(folder / "plain")
        held.append(plain_gets(url, keys, folder / "plain", hold=True))
        empty(folder / "plain")
        start = time.perf_counter()
        done = pull(url, str(folder / "pulled"))
        ours.append(time.perf_counter() - start)
        assert done.copied_objects == len(keys)
        empty(folder / "pulled")
    speed = f"{done.copied_bytes / statistics.median(ours[1:]) / 1e6:.0f} MB/s"
    return [speed, *(str(compare(plain[1:], ours[1:])) for plain in (files, memory, held))]


def empty(folder: Path) -> None:
    """Out of the way, without its bytes but with its files.

    ext4 keeps the inodes of deleted files from new ones for minutes, and steps over each of them to find another, which
    takes longer than what is measured here.
    """
    gone = folder.rename(folder.with_name(f"{folder.name}-{secrets.token_hex(4)}"))
    for path in gone.rglob("*"):
        if path.is_file():
            os.truncate(path, 0)


def plain_gets(url: str, keys: list[str], into: Path | None, *, hold: bool = False) -> float:
    """Seconds that obstore takes for the same objects, nothing checked; or each hashed, and on the disk in the end."""
    store = from_url(url, client_options={"allow_http": True})

    def get(key: str) -> int:
        data = obstore.get(store, key).bytes()
        if into is not None:
            path = into / key
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        if hold:
            hashlib.sha256(data).digest()
        return len(data)

    start = time.perf_counter()
    with ThreadPoolExecutor(CONCURRENCY) as threads:
        sum(threads.map(get, keys))
        if hold and into is not None:
            list(threads.map(lambda key: fsync_path(into / key), keys))
    return time.perf_counter() - start


def info_section(folder: Path, num_views: int, num_samples: int, repeats: int) -> str:
    """`info` of a cache that is too large to make."""
    (folder / "www").mkdir(parents=True)
    records_of_a_large_cache(folder / "www/a.cache", num_views, num_samples)
    receipts = (folder / "www/a.cache" / RECEIPTS).stat().st_size
    seconds, memory, requests = [], [], []
    with served(folder / "nginx", folder / "www", path="a.cache") as url:
        log = folder / "nginx/access.log"
        for _ in range(repeats):
            before = len(log.read_text().splitlines())
            program = (
                "import sys; sys.argv = ['logitcache', 'info', sys.argv[1], '--json']\n"
                "from logitcache.cli import main\n"
                "try: main()\n"
                "finally: print(*[line for line in open('/proc/self/status') if 'VmHWM' in line], file=sys.stderr)"
            )
            start = time.perf_counter()
            ended = subprocess.run([sys.executable, "-c", program, url], capture_output=True, text=True, check=True)
            seconds.append(time.perf_counter() - start)
            said = json.loads(ended.stdout)
            assert (said["num_views"], said["num_samples"]) == (num_views, num_samples)
            memory.append(int(ended.stderr.split()[-2]) / 1000)
            requests.append(len(log.read_text().splitlines()) - before)
        opens = []
        for _ in range(repeats):
            shutil.rmtree(os.environ["LOGITCACHE_CACHE_DIR"], ignore_errors=True)
            before = len(log.read_text().splitlines())
            start = time.perf_counter()
            logitcache.open(url)
            opens.append(time.perf_counter() - start)
            open_requests = len(log.read_text().splitlines()) - before
    rows = [
        ["requests", f"{max(requests)}", "<= 2"],
        ["seconds, with the start of Python", f"{statistics.median(seconds):.2f}", "< 1"],
        ["peak memory of the process", f"{max(memory):.0f} MB", "< 100 MB"],
        [
            f"to open it for reading: {open_requests} requests, {receipts / 1e6:.1f} MB",
            f"{statistics.median(opens):.2f} s",
            "",
        ],
    ]
    return (
        f"## Info\n\n{num_views} views of {num_samples:,} samples; medians of {repeats}, or the most.\n\n"
        f"{table(['`logitcache info URL`', 'measured', 'bound'], rows)}"
    )


def records_of_a_large_cache(path: Path, num_views: int, num_samples: int) -> None:
    """Manifest and receipts as sealing would write them, with hashes of nothing."""
    encoding = logitcache.TopK(k=20)
    writer = logitcache.create(
        path, num_samples=num_samples, num_classes=1000, num_views=num_views, encoding=encoding, teacher="t",
        dataset="d",
        class_names=[f"class number {number}" for number in range(1000)],
    )  # fmt: skip
    manifest = writer.manifest
    writer.close()

    def stored(spec: ArraySpec, rows: int) -> StoredObject:
        size = rows * math.prod(spec.row_shape) * np.dtype(spec.dtype).itemsize
        return StoredObject(bytes=size, sha256=secrets.token_hex(32), values_sha256=secrets.token_hex(32))

    receipts = {PER_CACHE: Receipt(rows=num_samples, objects={}, kl_mean=None, kl_max=None, inputs={})}
    row_map = OneRowEach(num_samples, manifest.layout.rows_per_block)
    for block in all_blocks(manifest.layout):
        rows = len(row_map.block_rows(block.number))
        objects = {name: stored(spec, rows) for name, spec in manifest.layout.arrays.items()}
        receipts[block.name] = Receipt(rows=rows, objects=objects, kl_mean=0.0123456789, kl_max=1.23456789, inputs={})
    sealed, gathered = Records(manifest, receipts).sealed(put=open_storage(path).put)
    (path / RECEIPTS).write_bytes(gathered)
    (path / MANIFEST).write_bytes(dump_manifest(sealed.manifest))


def warm_section(folder: Path, overrides: Sequence[str], epochs: int, num_samples: int, repeats: int) -> str:
    """Training from blocks that are nearby, against a local cache."""
    (folder / "www").mkdir(parents=True)
    common = [*overrides, "teacher.weights=random", f"train.epochs={epochs}", "train.seeds=[0]"]
    local = load_pipeline(PIPELINE, [*common, f"cache.path={folder / 'www/a.cache'}", f"runs.path={folder / 'local'}"])
    cache_teacher(local, trust=True)
    cached = [each for each in local.students if each.labels == "cache"]
    student = next(each for each in cached if loss_from_config(each.loss).needs_teacher)
    with served(folder / "nginx", folder / "www", path="a.cache") as url:
        remote = load_pipeline(PIPELINE, [*common, f"cache.path={url}", f"runs.path={folder / 'remote'}"])
        cache = logitcache.open(remote.cache.path)
        for view in cache.views:
            cache.view(view)
        runs = []
        for pipeline in (local, remote):
            bench = Experiment(pipeline, trust=True)
            bench.data = replace(bench.data, validation=None, test=None)
            job = bench.job(student, seed=0)
            run = TrainingRun(job, RunFolder(job.folder, job.identity))
            runs.append((run, rendered_batches(job.views, run.places(), num_workers=job.num_workers)))
        with track("alternating", 2 * epochs, unit="epochs") as meter:
            for epoch in range(epochs):
                for run, loader in runs if epoch % 2 == 0 else reversed(runs):
                    train_epoch(run, loader, meter)
        from_local, from_nearby = (run.state.epoch_seconds[2:] for run, _ in runs)
        found = compare(from_nearby, from_local)
        views = large_views(folder, url, num_samples, repeats)
    rows = [
        ["an epoch, local cache", f"{found.reference_median:.3f} s"],
        ["an epoch, URL with its blocks nearby", f"{found.median:.3f} s"],
        ["ratio of the medians", f"{found.ratio:.3f}"],
        ["median of the pairs' ratios", found.quartiles],
        ["bound", "<= 1.02"],
        [f"a view of {num_samples:,} rows, nearby / local", views],
    ]
    return f"## A warm local directory\n\n{len(from_local)} pairs of epochs, by turns.\n\n{table(['', ''], rows)}"


def large_views(folder: Path, url: str, num_samples: int, repeats: int) -> str:
    """Seconds until a view is resident."""
    rows_per_block = 65_536
    with logitcache.create(
        folder / "www/large.cache", num_samples=num_samples, num_classes=1000, encoding=logitcache.TopK(k=10),
        rows_per_block=rows_per_block, teacher="noise", dataset="none",
    ) as writer:  # fmt: skip
        generator = torch.Generator().manual_seed(0)
        for start in range(0, num_samples, 8192):
            writer.write(
                view=0, start=start, logits=torch.randn(min(8192, num_samples - start), 1000, generator=generator)
            )
    seconds: dict[str, list[float]] = {"local": [], "nearby": []}
    for _ in range(repeats + 1):
        for name, location in (
            ("local", str(folder / "www/large.cache")),
            ("nearby", url.replace("a.cache", "large.cache")),
        ):
            cache = logitcache.open(location)
            start = time.perf_counter()
            cache.view(0)
            seconds[name].append(time.perf_counter() - start)
    found = compare(seconds["nearby"][1:], seconds["local"][1:])
    return f"{found}; {1e3 * found.median:.0f} ms / {1e3 * found.reference_median:.0f} ms"


if __name__ == "__main__":
    main()
