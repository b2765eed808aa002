"""Workers of stage 1 that are killed at seeded instants: the cache is that of a single process.

Ray: builds on a cluster of two nodes on this machine; one of them is killed as its worker stores an object, the number
of which is drawn. Claims: four processes build a cache together, and three of them are killed at times that are drawn;
their claims expire after a second, and the process that is left takes their blocks over.

    python benchmarks/kills.py --write
"""

from __future__ import annotations

import functools
import os
import sys
from pathlib import Path

import torch
from measuring import conditions, fresh_folder, options, parse, table, write_result

from logitcache.progress import silence
from tests.conftest import tiny_pipeline
from tests.durability.test_engines import kill_at_seeded_instants
from tests.durability.test_ray import build_with_a_killed_node, two_nodes


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--only", choices=["ray", "claims"], help="one of the two")
    parser.add_argument("--ray-builds", type=int, default=10, help="0 leaves Ray out")
    parser.add_argument("--claims-builds", type=int, default=20, help="0 leaves claims out")
    arguments = parse(parser, ray_builds=0, claims_builds=1)  # tests/durability/test_ray.py is the tiny run with Ray
    silence()
    os.chdir(Path(__file__).parents[1])  # entry points such as `tests.texts:sentences` lie there
    sections = ["# Killed workers", conditions()]
    print(sections[-1], flush=True)
    failures = 0
    for name, measure, builds in (
        ("ray", killed_nodes, arguments.ray_builds),
        ("claims", killed_workers, arguments.claims_builds),
    ):
        if arguments.only in (None, name) and builds:
            section, failed = measure(builds)
            sections.append(section)
            failures += failed
            print(f"\n{section}", flush=True)
    if arguments.write:
        subject = "kills" if arguments.only is None else f"kills-{arguments.only}"
        written = write_result(subject, "\n\n".join(sections) + "\n", device=torch.device("cpu"))
        print(f"\nwritten to {written}")
    sys.exit(f"{failures} builds failed" if failures else 0)


def killed_nodes(builds: int) -> tuple[str, int]:
    """The section about Ray, and the number of builds with another result than one process."""
    rows, failures = [], 0
    with two_nodes() as nodes:
        for seed in range(builds):
            folder = fresh_folder()
            killed = build_with_a_killed_node(seed, nodes, functools.partial(tiny_pipeline, folder), folder)
            same = killed.single.manifest.digest == killed.result.manifest.digest
            reported = set(killed.single.computed_blocks) == set(killed.result.computed_blocks)
            failures += not (same and reported and killed.died and not killed.problems)
            blocks = f"{len(set(killed.result.computed_blocks))} of {killed.result.total_blocks}"
            verdict = ["yes" if each else "no" for each in (killed.died, same)]
            rows.append([seed, killed.data, killed.dies_at, *verdict, blocks, len(killed.problems)])
    header = [
        "seed",
        "data",
        "object that the killed worker did not store",
        "node died",
        "digest of one process",
        "blocks reported",
        "problems of `verify --deep`",
    ]
    about = (
        "Two nodes with one CPU each. The raylet of the second node and its worker get SIGKILL as the worker stores "
        "an object; the worker of the first node waits for that, so that it does not do everything alone."
    )
    return f"## Ray: a killed node\n\n{about}\n\n{table(header, rows)}", failures


def killed_workers(builds: int) -> tuple[str, int]:
    """The section about claims, and the number of builds with another result than one process."""
    rows, failures = [], 0
    for attempt, survived in enumerate(kill_at_seeded_instants(builds, 0, fresh_folder())):
        same = "yes" if survived.same_digest else "no"
        failures += not survived.same_digest or bool(survived.problems)
        counted = [survived.killed, survived.unfinished, survived.takeovers, survived.repeated]
        rows.append([attempt, *counted, same, len(survived.problems)])
    header = [
        "build",
        "workers killed while they ran",
        "blocks that they had begun and not committed",
        "expired claims taken over",
        "blocks begun more than once",
        "digest of one process",
        "problems of `verify --deep`",
    ]
    about = (
        "Four processes with `--engine claims --engine-option seconds=1`, of which the last three get SIGKILL at drawn "
        "times within the time that one process needs for the cache. A worker whose kill came after its end is not "
        "counted. An expired claim may be that of the creation of the cache."
    )
    killed = sum(int(row[1]) for row in rows)
    total = f"{killed} workers killed in {builds} builds."
    return f"## Claims: killed workers\n\n{about} {total}\n\n{table(header, rows)}", failures


if __name__ == "__main__":
    main()
