"""SIGKILL at seeded instants across build, seal, added views and repair: always the digest of an undisturbed run.

More of them than in CI:

    python -m tests.durability.test_kill 200
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

import logitcache
from logitcache.data.rows import make_row_map
from logitcache.progress import silence
from logitcache.verify.audit import verify
from logitcache.verify.repair import repair

VIEWS, SAMPLES, CLASSES = 3, 96, 20
JOBS = ("build", "grow", "repair", "tokens")


def labels() -> torch.Tensor:
    return torch.randn(VIEWS + 1, SAMPLES, CLASSES, generator=torch.Generator().manual_seed(0)) * 3


def build(path: Path, num_views: int = VIEWS) -> str:
    shape = {"num_samples": SAMPLES, "num_classes": CLASSES, "num_views": num_views, "rows_per_block": 16}
    settings = {"teacher": "net", "dataset": "pictures", "calibration": labels().flatten(0, 1)}
    with logitcache.create(path, **shape, **settings, encoding=logitcache.LowRank(rank=6)) as writer:
        for view in range(num_views):
            for start in range(0, SAMPLES, 12):
                writer.write(view=view, start=start, logits=labels()[view, start : start + 12])
    return logitcache.open(path).digest or ""


COUNTS = [5, 0, 17, 3, 40, 1, 22, 8]
"""Tokens of each sequence."""


def build_sequences(path: Path, computed: list[tuple[int, int]] | None = None) -> str:
    """A cache of sequences; only those of missing blocks are computed, one at a time, as (view, sample)."""
    computed = [] if computed is None else computed
    shape = {"num_samples": len(COUNTS), "num_classes": CLASSES, "num_views": VIEWS, "rows_per_block": 40}
    settings = {"teacher": "model", "dataset": "texts", "encoding": logitcache.TopK(k=4), "rows_per_sample": COUNTS}
    with logitcache.create(path, **shape, **settings) as writer:
        for block in writer.missing_blocks():
            for sample in writer.row_map.block_samples(block.number):
                rows = writer.row_map.sample_rows(sample)
                if rows:
                    computed.append((block.view, sample))
                    writer.write(view=block.view, start=rows.start, logits=labels()[block.view, rows.start : rows.stop])
    return logitcache.open(path).digest or ""


class Bench:
    """The four jobs that are killed, and what each must end in."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.sealed = folder / "sealed.cache"
        self.digests = {"build": build(self.sealed), "grow": build(folder / "grown.cache", VIEWS + 1)}
        self.digests["repair"] = self.digests["build"]
        self.digests["tokens"] = build_sequences(folder / "tokens.cache")

    def prepare(self, job: str) -> Path:
        path = self.folder / "victim.cache"
        shutil.rmtree(path, ignore_errors=True)
        if job not in ("build", "tokens"):
            shutil.copytree(self.sealed, path)
        if job == "repair":
            for file in sorted(file for file in path.rglob("*") if file.is_file())[::2]:
                file.write_bytes(file.read_bytes()[:-1])
        return path

    def run(self, job: str, path: Path) -> str:
        if job == "tokens":
            return build_sequences(path)
        if job == "repair":
            return repair(str(path), source=str(self.sealed)).digest or ""
        return build(path, VIEWS + (job == "grow"))


def check_that_no_committed_sequence_is_computed_again(path: Path) -> None:
    """A block is committed when its receipt is there."""
    rows = make_row_map(len(COUNTS), COUNTS, None, rows_per_block=40)
    committed = {
        (int(receipt.parent.name[1:]), sample)
        for receipt in path.glob("receipts/v*/b*.json")
        for sample in rows.block_samples(int(receipt.stem[1:]))
    }
    if (path / "receipts.json").exists():  # killed after sealing had begun
        committed = {(view, sample) for view in range(VIEWS) for sample in range(len(COUNTS))}
    computed: list[tuple[int, int]] = []
    build_sequences(path, computed)

    assert set() == committed & set(computed)
    missing = {(view, sample) for view in range(VIEWS) for sample, count in enumerate(COUNTS) if count} - committed
    assert sorted(missing) == sorted(computed)


def kill_at_seeded_instants(count: int, seed: int, folder: Path, jobs: Sequence[str] = JOBS) -> Counter[str]:
    """Kill until so many jobs were still running when they were killed; how many of each."""
    bench = Bench(folder)
    draw = random.Random(seed)
    durations: dict[str, float] = {}
    killed: Counter[str] = Counter()
    while killed.total() < count:
        job = jobs[killed.total() % len(jobs)]
        path = bench.prepare(job)
        if job not in durations:
            start = time.perf_counter()
            assert bench.digests[job] == bench.run(job, path)
            durations[job] = time.perf_counter() - start
            continue
        delay = draw.uniform(0, 1.5 * durations[job])
        child = os.fork()
        if child == 0:
            try:
                bench.run(job, path)
            finally:
                os._exit(0)
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
        killed[job] += os.WIFSIGNALED(os.waitpid(child, 0)[1])
        if job == "tokens":
            check_that_no_committed_sequence_is_computed_again(path)
        assert bench.digests[job] == bench.run(job, path), f"{job} killed after {delay:.4f} s"
        assert [] == verify(str(path), deep=True)
    return killed


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize(("jobs", "count"), [(JOBS[:3], 60), (JOBS[3:], 30)], ids=["views", "tokens"])
def test_a_killed_job_ends_in_the_digest_of_an_undisturbed_one(tmp_path: Path, jobs: Sequence[str], count: int) -> None:
    assert dict.fromkeys(jobs, count // len(jobs)) == kill_at_seeded_instants(count, 0, tmp_path, jobs)


if __name__ == "__main__":
    torch.set_num_threads(1)
    silence()
    with tempfile.TemporaryDirectory() as folder:
        print(dict(kill_at_seeded_instants(int(sys.argv[1]), 1, Path(folder))), "killed, same digests")
