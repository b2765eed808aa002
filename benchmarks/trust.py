"""What the checks on labels and caches cost: this working tree against another commit of it, by turns in one run.

The other commit is checked out into a temporary worktree. A process for each of the two trees, with the same
interpreter, libraries and settings, takes each measurement in turn, and whoever goes first changes with each pair.
Only the command line and the public Python names are used, so that one script fits both. Each tree reads caches that
it wrote itself.

    python benchmarks/trust.py --base v0.1.0 --write
    python benchmarks/trust.py --base HEAD~20 --only stage-1 open --pairs 15
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring import compare, conditions, options, parse, table, write_result

ROOT = Path(__file__).resolve().parent.parent
Ask = Callable[[str], dict[str, float]]
BATCH_SIZE = 256
NUM_CLASSES = 100
PIPELINE = """
name: trust
data: {name: mnist5k}
views:
  count: 4
  seed: 1
  transform: [{RandomAffine: {degrees: 20, translate: [0.12, 0.12], scale: [0.8, 1.2], shear: 12}}]
teacher: {model: cnn, args: {widths: [16, 32, 64]}, weights: random}
cache: {path: unset, rows_per_block: 1024, encoding: {name: dense, dtype: float16}}
train: {epochs: 8, batch_size: 32, lr: 0.008, seeds: [0]}
students:
  - {name: student, model: mlp, args: {hidden: [256]}, loss: {name: kl, temperature: 2.0}}
runs: {path: unset}
num_workers: 2
threads: 1
"""
OPEN = """
import json, re, sys, time
from pathlib import Path
import logitcache

def kib(field):
    return int(re.search(rf"^{field}:\\s+(\\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)[1])

few, many = sys.argv[1:]
logitcache.open(few).view(0)  # imports what is needed
Path("/proc/self/clear_refs").write_text("5")  # the peak from here on, not that of the imports
start = time.perf_counter()
cache = logitcache.open(many)
seconds, peak = time.perf_counter() - start, kib("VmHWM")
start = time.perf_counter()
cache.view(0)
print(json.dumps([seconds, peak, time.perf_counter() - start]))
"""


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    pipeline: list[str]
    """Overrides."""
    blocks: int
    """Of the cache that is opened, in three views of eight rows a block."""
    rows: int
    """Of the view that batches are read from."""
    batches: int
    rendered: int
    """Samples."""
    written: int
    """Blocks."""


FULL = Sizes(pipeline=[], blocks=3000, rows=100_000, batches=400, rendered=4000, written=150)
TINY = Sizes(
    pipeline=["data.name=digits", "views.count=1", "train.epochs=1", "num_workers=0"],
    blocks=6,
    rows=1000,
    batches=3,
    rendered=20,
    written=3,
)


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--base", metavar="COMMIT", help="what to compare with")
    parser.add_argument("--pairs", type=int, default=9, help="of each measurement")
    parser.add_argument("--only", choices=list(MEASUREMENTS), nargs="+", default=list(MEASUREMENTS))
    parser.add_argument("--folder", type=Path, help="where caches are written and removed again; on a real disk")
    parser.add_argument("--serve", type=Path, nargs=2, help=argparse.SUPPRESS)
    arguments = parse(parser, base="HEAD", pairs=1)
    sizes = TINY if arguments.tiny else FULL
    if arguments.serve is not None:
        serve(*arguments.serve, sizes)
        return
    if arguments.base is None:
        parser.error("expected --base COMMIT, such as HEAD~1")

    with tempfile.TemporaryDirectory(dir=arguments.folder) as name, checked_out(arguments.base, Path(name)) as base:
        stated = f"{conditions()}\n- base: {git('rev-parse', '--short=7', 'HEAD', folder=base)}"
        print(f"# Trust\n\n{stated}", flush=True)
        with contextlib.ExitStack() as stack:
            base_tree, new_tree = (
                stack.enter_context(worker(tree, Path(name) / which, tiny=arguments.tiny))
                for tree, which in ((base, "of-base"), (ROOT, "of-new"))
            )
            rows = []
            for measurement in arguments.only:
                rows += by_turns(measurement, base_tree, new_tree, arguments.pairs)
                print(f"{measurement} done", flush=True)
    header = ["", "base", "new", "new / base, median of the pairs"]
    body = f"{about(sizes)} {arguments.pairs} pairs, by turns.\n\n{table(header, rows)}"
    print(f"\n{body}")
    if arguments.write:
        path = write_result("trust", f"# Trust\n\n{stated}\n\n{body}\n", device=torch.device("cpu"))
        print(f"\nwritten to {path}")


def about(sizes: Sizes) -> str:
    """What was measured."""
    return (
        "Stage 1: `logitcache cache-teacher` on mnist5k with the demo's CNN, 4 views, 2 workers, whole. Stage 2: "
        "`logitcache train-student` from such a cache, 8 epochs. "
        f"Open: `logitcache.open` of a cache of {sizes.blocks} blocks, and its first view, in a process of their own. "
        f"Write: `logitcache.create`, {sizes.written} blocks of 8 rows, sealed. "
        f"Read: `view.logits` of {BATCH_SIZE} random rows of {sizes.rows:,}, {NUM_CLASSES} classes, TopK(k=10); "
        "indices are those of `ViewDataset`. "
        f"Render: `ViewDataset` on {sizes.rendered} images of 28x28 pixels, affine transform and mixup, no workers. "
        "Pull: `logitcache pull` of the cache that is read from, into a new folder."
    )


def by_turns(measurement: str, base: Ask, new: Ask, pairs: int) -> list[list[str]]:
    """Rows of the table; whoever goes first changes with each pair, so that a slow minute hits both."""
    found: list[dict[str, Any]] = []
    for pair in range(pairs):
        both = {}
        for name, ask in [("base", base), ("new", new)][:: 1 if pair % 2 == 0 else -1]:
            both[name] = ask(measurement)
        found.append(both)
    rows = []
    for quantity in found[0]["new"]:
        compared = compare(*([both[name][quantity] for both in found] for name in ("new", "base")))
        rows.append([quantity, f"{compared.reference_median:.4g}", f"{compared.median:.4g}", compared.quartiles])
    return rows


def git(*command: str, folder: Path = ROOT) -> str:
    """What a git command prints; it ends the script if it fails."""
    try:
        return subprocess.run(["git", *command], cwd=folder, check=True, capture_output=True, text=True).stdout.strip()
    except FileNotFoundError:
        sys.exit("git is not installed, and the commit to compare with comes from it")
    except subprocess.CalledProcessError as error:
        sys.exit(f"`git {' '.join(command)}` failed: {error.stderr.strip()}")


@contextlib.contextmanager
def checked_out(revision: str, folder: Path) -> Iterator[Path]:
    """A worktree of a commit, removed in the end."""
    tree = folder / "base"
    git("worktree", "add", "--detach", str(tree), revision)
    try:
        yield tree
    finally:
        git("worktree", "remove", "--force", str(tree))


@contextlib.contextmanager
def worker(tree: Path, folder: Path, *, tiny: bool) -> Iterator[Ask]:
    """A process that takes measurements with the code of a tree, and has made its caches in a folder."""
    folder.mkdir()
    command = [sys.executable, __file__, *(["--tiny"] if tiny else []), "--serve", str(tree), str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(tree)}
    log = folder / "log"
    with (
        log.open("w") as errors,
        subprocess.Popen(
            command, env=environment, cwd=tree, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
        ) as process,
    ):
        assert process.stdin is not None
        assert process.stdout is not None
        requests, answers = process.stdin, process.stdout

        def ask(measurement: str) -> dict[str, float]:
            try:
                print(measurement, file=requests, flush=True)
                answer = answers.readline()
            except BrokenPipeError:
                answer = ""
            if not answer:
                raise RuntimeError(f"{measurement} failed with the code of {tree}:\n{log.read_text()[-4000:]}")
            found: dict[str, float] = json.loads(answer)
            return found

        yield ask


def serve(tree: Path, folder: Path, sizes: Sizes) -> None:
    """Make the caches, then take the measurements that standard input names, until it ends."""
    import logitcache

    if not Path(logitcache.__file__).resolve().is_relative_to(tree.resolve()):
        sys.exit(f"logitcache comes from {logitcache.__file__}, expected it from {tree}")
    torch.set_num_threads(1)
    bench = Bench(folder, sizes)
    for line in sys.stdin:
        gc.collect()
        print(json.dumps(MEASUREMENTS[line.strip()](bench)), flush=True)


class Bench:
    """Caches and inputs of one tree, and the measurements on them: what is measured, with its unit, and how much."""

    def __init__(self, folder: Path, sizes: Sizes) -> None:
        from PIL import Image
        from torchvision.transforms import v2

        import logitcache

        self.folder, self.sizes = folder, sizes
        self.count = 0
        (folder / "trust.yaml").write_text(PIPELINE)
        self.stage_1(warm_up=True)
        generator = np.random.default_rng(0)
        self.write_cache("few.cache", 8, 1, 8)
        self.write_cache("many.cache", 8 * sizes.blocks // 3, 3, 8)
        self.write_cache("rows.cache", sizes.rows, 1, 1024, encoding=logitcache.TopK(k=10))
        self.view = logitcache.open(folder / "rows.cache").view(0)
        blank = [(np.zeros((1, 1), dtype=np.uint8), 0)] * sizes.rows
        plain = logitcache.ViewDataset(blank, logitcache.ViewPlan())
        self.indices = torch.tensor([plain[(0, row)][0] for row in range(sizes.rows)])
        self.picked = [torch.from_numpy(generator.integers(sizes.rows, size=BATCH_SIZE)) for _ in range(sizes.batches)]
        images = generator.integers(256, size=(sizes.rendered, 28, 28), dtype=np.uint8)
        self.views = logitcache.ViewDataset(
            [(Image.fromarray(image), number % 10) for number, image in enumerate(images)],
            logitcache.ViewPlan(
                transform=v2.RandomAffine(degrees=20, translate=(0.12, 0.12), scale=(0.8, 1.2), shear=12),
                mixing=logitcache.Mixing(mixup=0.4, probability=0.5),
                num_classes=10,
            ),
        )

    def fresh(self, name: str) -> Path:
        """A path that nobody has used."""
        self.count += 1
        return self.folder / f"{self.count}-{name}"

    def write_cache(self, path: str | Path, num_samples: int, num_views: int, rows_per_block: int, **more: Any) -> None:
        """A sealed cache of random logits."""
        import logitcache

        logits_BC = np.random.default_rng(0).normal(scale=3, size=(num_samples, NUM_CLASSES)).astype(np.float32)
        with logitcache.create(
            self.folder / path,
            num_samples=num_samples,
            num_classes=NUM_CLASSES,
            num_views=num_views,
            rows_per_block=rows_per_block,
            teacher="random",
            dataset="none",
            **more,
        ) as writer:
            for view in range(num_views):
                writer.write(view=view, start=0, logits=logits_BC)

    def stage_1(self, *, warm_up: bool = False) -> dict[str, float]:
        path = self.folder / "stage-2.cache" if warm_up else self.fresh("stage-1.cache")
        overrides = [*self.sizes.pipeline, f"cache.path={path}"]
        wall, cpu, _ = timed(lambda: command("cache-teacher", str(self.folder / "trust.yaml"), *overrides))
        return {"stage 1, s": wall, "stage 1, CPU time with workers, s": cpu}

    def stage_2(self) -> dict[str, float]:
        overrides = [
            *self.sizes.pipeline,
            f"cache.path={self.folder / 'stage-2.cache'}",
            f"runs.path={self.fresh('runs')}",
        ]
        _, cpu, said = timed(lambda: command("train-student", str(self.folder / "trust.yaml"), *overrides))
        return {
            "stage 2, an epoch, s": said["rows"][0]["epoch_seconds"],
            "stage 2, whole, CPU time with workers, s": cpu,
        }

    def open(self) -> dict[str, float]:
        paths = [str(self.folder / name) for name in ("few.cache", "many.cache")]
        ended = subprocess.run([sys.executable, "-c", OPEN, *paths], check=True, stdout=subprocess.PIPE, text=True)
        seconds, kib, view_seconds = json.loads(ended.stdout)
        return {
            "open, ms": 1e3 * seconds,
            "open, peak memory of the process, MiB": kib / 1024,
            "open, first view, ms": 1e3 * view_seconds,
        }

    def write(self) -> dict[str, float]:
        path = self.fresh("written.cache")
        wall, _, _ = timed(lambda: self.write_cache(path, 8 * self.sizes.written, 1, 8))
        shutil.rmtree(path)
        return {"write, a block, ms": 1e3 * wall / self.sizes.written}

    def read(self) -> dict[str, float]:
        seconds: dict[str, list[float]] = {"row numbers": [], "indices": []}
        for rows_B in self.picked:
            for name, index_B in (("row numbers", rows_B), ("indices", self.indices[rows_B])):
                start = time.perf_counter()
                self.view.logits(index_B)
                seconds[name].append(time.perf_counter() - start)
        return {f"read, a batch by {name}, ms": 1e3 * statistics.median(times) for name, times in seconds.items()}

    def render(self) -> dict[str, float]:
        self.count += 1  # a view that has not been rendered before
        places = [(self.count, index) for index in range(len(self.views))]
        wall, _, _ = timed(lambda: [self.views[place] for place in places])
        return {"render, a sample, µs": 1e6 * wall / len(places)}

    def pull(self) -> dict[str, float]:
        path = self.fresh("pulled.cache")
        wall, _, _ = timed(lambda: command("pull", str(self.folder / "rows.cache"), str(path)))
        return {"pull, s": wall}


MEASUREMENTS: dict[str, Callable[[Bench], dict[str, float]]] = {
    "stage-1": Bench.stage_1,
    "stage-2": Bench.stage_2,
    "open": Bench.open,
    "write": Bench.write,
    "read": Bench.read,
    "render": Bench.render,
    "pull": Bench.pull,
}


def timed(work: Callable[[], Any]) -> tuple[float, float, Any]:
    """Wall time and CPU time of all threads and of ended workers, in seconds; and the result."""
    start, cpu_start = time.perf_counter(), sum(os.times()[:4])
    result = work()
    wall = time.perf_counter() - start
    gc.collect()  # ends the workers, whose time counts from then on
    return wall, sum(os.times()[:4]) - cpu_start, result


def command(*arguments: str) -> dict[str, Any]:
    """What `logitcache ... --json` prints, run in this process, since a start of Python would blur what it costs."""
    from logitcache.cli import main as logitcache_main

    sys.argv = ["logitcache", *arguments, "--json"]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        try:
            logitcache_main()
        except SystemExit as ended:
            if ended.code:
                raise RuntimeError(f"{' '.join(sys.argv)} ended with {ended.code}: {printed.getvalue()}") from ended
    said: dict[str, Any] = json.loads(printed.getvalue())
    return said


if __name__ == "__main__":
    main()
