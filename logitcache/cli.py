"""The command line: parse, call, print."""

from __future__ import annotations

import dataclasses
import json
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from logitcache.errors import LogitCacheError, StorageError, UsageError
from logitcache.printing import (
    cache_summary,
    console,
    plan_summary,
    print_caches,
    print_export,
    print_mapping,
    print_merge,
    print_plan,
    print_problems,
    print_report,
    print_rows,
    print_steps,
    print_transfer,
)

app = typer.Typer(
    name="logitcache",
    help="Offline knowledge distillation: run the teacher once, keep its logits, train any number of students.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)

PipelineArgument = Annotated[Path, typer.Argument(help="A pipeline file, such as pipelines/mnist5k.yaml.")]
CacheArgument = Annotated[str, typer.Argument(metavar="CACHE", help="A cache's directory or URL.")]
OverridesArgument = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...", help="Keys of the pipeline to override: views.count=4 cache.encoding.k=20"
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout, and nothing else there.")]
TrustOption = Annotated[
    bool, typer.Option("--trust", help="Run package.module:function code from outside the working folder.")
]


class MeanOf(StrEnum):
    """What `merge` averages."""

    logits = "logits"
    probabilities = "probabilities"


class ExportFormat(StrEnum):
    """What `export` writes."""

    parquet = "parquet"


@app.command("plan")
def plan_command(
    pipeline: Annotated[Path | None, typer.Argument(help="A pipeline file; or give --logits.")] = None,
    overrides: OverridesArgument = None,
    logits: Annotated[
        Path | None, typer.Option(help="A .npy or .npz file of logits, in the place of a teacher.")
    ] = None,
    group: Annotated[
        str | None,
        typer.Option(help="An array of the .npz file: rows of one group are never fitted to and measured on."),
    ] = None,
    max_kl: Annotated[
        float | None, typer.Option(help="Nats at T = 1 that may be lost; 0.01 if neither is given.")
    ] = None,
    max_bytes: Annotated[float | None, typer.Option(help="Bytes a sample that may be spent.")] = None,
    plot: Annotated[Path | None, typer.Option(help="A .png file for KL against bytes.")] = None,
    trust: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """Before any long run: bytes, fidelity and time of each encoding on a calibration sample."""
    from logitcache.pipeline import load_pipeline
    from logitcache.plan import check_plot, plan_logits, plan_pipeline, read_logits
    from logitcache.plan import plot as plot_plan

    if (pipeline is None) == (logits is None):
        raise UsageError("plan needs a pipeline file, or logits of its own (--logits FILE): one of the two")
    if plot is not None:
        check_plot(plot)
    if logits is not None:
        result = plan_logits(read_logits(logits, group), max_kl=max_kl, max_bytes=max_bytes)
    else:
        assert pipeline is not None
        loaded = load_pipeline(pipeline, overrides or ())
        result = plan_pipeline(loaded, max_kl=max_kl, max_bytes=max_bytes, trust=trust)
    if plot is not None:
        plot_plan(result, plot)
    show(plan_summary(result), as_json, lambda: print_plan(result))


@app.command("train-teacher")
def train_teacher_command(
    pipeline: PipelineArgument,
    overrides: OverridesArgument = None,
    trust: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """Train or fine-tune the teacher on true labels, where no ready one exists."""
    from logitcache.pipeline import load_pipeline
    from logitcache.train_student import train_teacher

    result = train_teacher(load_pipeline(pipeline, overrides or ()), trust=trust)
    show(result, as_json, lambda: print_mapping("teacher", result))


@app.command("cache-teacher")
def cache_teacher_command(
    pipeline: PipelineArgument,
    overrides: OverridesArgument = None,
    trust: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """Stage 1: compute the blocks of the cache that are missing, then seal it. Interrupted? Run it again."""
    from logitcache.cache_teacher import cache_teacher
    from logitcache.pipeline import load_pipeline
    from logitcache.summary import summarise

    loaded = load_pipeline(pipeline, overrides or ())
    result = cache_teacher(loaded, trust=trust)
    summary = cache_summary(summarise(loaded.cache.path))
    summary |= {"computed_blocks": len(result.computed_blocks), "total_blocks": result.total_blocks}
    show(summary, as_json, lambda: print_mapping(loaded.cache.path, summary))


@app.command("train-student")
def train_student_command(
    pipeline: PipelineArgument,
    overrides: OverridesArgument = None,
    student: Annotated[
        list[str] | None, typer.Option(help="A student of the pipeline; may be given several times.")
    ] = None,
    trust: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """Stage 2: train one, several or all students of the pipeline from the cache."""
    from logitcache.pipeline import load_pipeline
    from logitcache.train_student import train_students

    rows = train_students(load_pipeline(pipeline, overrides or ()), student or (), trust=trust)
    show({"rows": [dataclasses.asdict(row) for row in rows]}, as_json, lambda: print_rows(rows))


@app.command("run")
def run_command(
    pipeline: PipelineArgument,
    overrides: OverridesArgument = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check the file and print what would be done.")] = False,
    trust: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """All stages of a pipeline, skipping what is done."""
    from logitcache.pipeline import load_pipeline
    from logitcache.run import plan_run, run_pipeline

    loaded = load_pipeline(pipeline, overrides or ())
    if dry_run:
        steps = plan_run(loaded, trust=trust)
        show({"steps": [dataclasses.asdict(step) for step in steps]}, as_json, lambda: print_steps(steps))
    else:
        rows = run_pipeline(loaded, trust=trust)
        show({"rows": [dataclasses.asdict(row) for row in rows]}, as_json, lambda: print_rows(rows))


@app.command("info")
def info_command(cache: CacheArgument, as_json: JsonOption = False) -> None:
    """What a cache is."""
    from logitcache.summary import summarise

    summary = cache_summary(summarise(cache))
    show(summary, as_json, lambda: print_mapping(cache, summary))


@app.command("ls")
def ls_command(
    location: Annotated[str, typer.Argument(metavar="URL", help="A directory or URL with caches in or below it.")],
    as_json: JsonOption = False,
) -> None:
    """What caches lie at a location, and in the folders below it."""
    from logitcache.summary import find_caches

    caches = [{"url": found.url} | cache_summary(found) for found in find_caches(location)]
    show({"caches": caches}, as_json, lambda: print_caches(location, caches))


@app.command("push")
def push_command(
    cache: CacheArgument,
    url: Annotated[str, typer.Argument(metavar="URL", help="Where to: s3://, gs://, az://, or a directory.")],
    as_json: JsonOption = False,
) -> None:
    """Copy a cache to where others find it. Interrupted? Run it again; it shows there once it is whole."""
    from logitcache.transfer import push

    result = push(cache, url)
    show(dataclasses.asdict(result), as_json, lambda: print_transfer(url, result))


@app.command("pull")
def pull_command(
    url: Annotated[str, typer.Argument(metavar="URL", help="The cache: s3://, gs://, az://, https:// or a directory.")],
    cache: Annotated[str, typer.Argument(metavar="CACHE", help="The directory to copy it to.")],
    views: Annotated[
        str | None, typer.Option(metavar="FIRST:END", help="Some of its views only, such as 0:8 or 8:16; END excluded.")
    ] = None,
    expect: Annotated[
        str | None, typer.Option(metavar="DIGEST", help="Refuse any other content digest, before anything is copied.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Copy a cache here, every object held to its SHA-256. Interrupted? Run it again; asked again, it adds views."""
    from logitcache.transfer import pull

    result = pull(url, cache, views=views, expect=expect)
    show(dataclasses.asdict(result), as_json, lambda: print_transfer(cache, result))


@app.command("verify")
def verify_command(
    cache: CacheArgument,
    deep: Annotated[bool, typer.Option("--deep", help="Read every byte and compare its SHA-256.")] = False,
    recompute: Annotated[
        int, typer.Option(metavar="N", help="Ask the teacher of --data again about N samples drawn over all views.")
    ] = 0,
    data: Annotated[
        Path | None, typer.Option(help="A pipeline whose data, views and teacher are compared with the cache.")
    ] = None,
    trust: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """Check receipts and sizes, with --deep every byte, with --data whether the cache fits; exit 1 on a problem."""
    from logitcache.audit import Problem, verify

    if recompute and data is None:
        raise UsageError("--recompute asks the teacher again, so it needs the pipeline that has one: --data PIPELINE")
    problems = verify(cache, deep=deep)
    if data is not None and not problems:
        from logitcache.fit import all_differences
        from logitcache.reader import open_cache
        from logitcache.spot_check import spot_check

        pipeline = pipeline_of(cache, data)
        differences = all_differences(open_cache(cache, trust=trust), pipeline, trust=trust)
        problems += [Problem("", line, "differs") for line in differences]
        if recompute and not problems:
            problems += spot_check(pipeline, recompute, trust=trust)
    found = {"ok": not problems, "problems": [dataclasses.asdict(problem) for problem in problems]}
    show(found, as_json, lambda: print_problems(cache, problems))
    if problems:
        raise typer.Exit(1)


@app.command("repair")
def repair_command(
    cache: CacheArgument,
    source: Annotated[str | None, typer.Option("--from", help="A copy of the cache, to take blocks from.")] = None,
    data: Annotated[Path | None, typer.Option(help="The pipeline that made it, to compute blocks again.")] = None,
    trust: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """Make the blocks that `verify --deep` finds bad what they were, and only those; exit 1 if a problem remains."""
    from logitcache.repair import repair

    pipeline = None if data is None else pipeline_of(cache, data)
    result = repair(cache, source=source, pipeline=pipeline, trust=trust)
    found = {"ok": not result.remaining, **dataclasses.asdict(result)}

    def print_repair() -> None:
        blocks = len(result.fetched) + len(result.recomputed)
        console().print(
            f"{cache}: {len(result.problems)} problems found; {len(result.fetched)} blocks fetched, "
            f"{len(result.recomputed)} recomputed."
            if blocks or result.problems
            else f"{cache}: nothing to repair",
            highlight=False,
        )
        print_problems(cache, result.remaining)

    show(found, as_json, print_repair)
    if result.remaining:
        raise typer.Exit(1)


@app.command("merge")
def merge_command(
    caches: Annotated[list[str], typer.Argument(metavar="CACHE", help="Two or more caches over the same views.")],
    out: Annotated[str, typer.Option("--out", "-o", help="The merged cache.")],
    mean: Annotated[
        MeanOf, typer.Option(help="Of logits (geometric, at any temperature) or of probabilities (at T = 1).")
    ] = MeanOf.logits,
    weight: Annotated[
        list[float] | None, typer.Option(help="How much a cache counts: once for each, in their order.")
    ] = None,
    encoding: Annotated[
        str | None, typer.Option(help='Such as "TopK(k=20)" or auto; the first cache\'s by default.')
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Average several teachers over the same views into one cache. Interrupted? Run it again."""
    from logitcache.merge import merge
    from logitcache.reader import open_cache

    result = merge(caches, out, mean=mean.value, weights=weight or None, encoding=encoding)
    summary = cache_summary(open_cache(out)) | {
        "mean": mean.value,
        "parts": [part.model_dump(exclude={"teacher_input"}) for part in result.parts],
        "left_out_views": result.left_out,
        "computed_blocks": len(result.computed_blocks),
        "total_blocks": result.total_blocks,
    }
    show(summary, as_json, lambda: print_merge(out, summary))


@app.command("export")
def export_command(
    cache: CacheArgument,
    out: Annotated[Path, typer.Option("--out", "-o", help="A folder that holds nothing else.")],
    to: Annotated[ExportFormat, typer.Option("--to", help="What to make of it.")],
    views: Annotated[str | None, typer.Option(help="Such as 0:2 or 3; all by default.")] = None,
    top: Annotated[int | None, typer.Option(help="Keep the largest logits of each row only, and the tail.")] = None,
    as_json: JsonOption = False,
) -> None:
    """A cache's labels as a table: one Parquet file for each view, for pandas, polars, datasets, any SQL engine."""
    from logitcache.export import export_parquet

    result = export_parquet(cache, out, views=views, top=top)
    show(dataclasses.asdict(result), as_json, lambda: print_export(str(out), to.value, result))


def pipeline_of(cache: str, file: Path) -> Any:
    """A pipeline with its cache at another place."""
    from logitcache.pipeline import load_pipeline

    return load_pipeline(file, [f"cache.path={cache}"])


@app.command("report")
def report_command(
    cache: CacheArgument,
    runs: Annotated[
        Path | None, typer.Option(metavar="DIR", help="A folder below which students left their runs.")
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(metavar="PIPELINE", help="The pipeline that has the data: for pictures, and to measure students."),
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="The HTML file to write.")] = Path("report.html"),
    trust: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """One page that opens offline: the cache, its teacher, its fidelity, its views, and students side by side."""
    from logitcache.report import write_report

    pipeline = None if data is None else pipeline_of(cache, data)
    written = write_report(cache, output, runs=runs, data=pipeline, trust=trust)
    summary = {"report": str(written.path), "bytes": written.bytes, **written.headline}
    show(summary, as_json, lambda: print_report(written))


@app.command("demo")
def demo_command(
    overrides: OverridesArgument = None,
    folder: Annotated[Path, typer.Option(help="Where runs and caches go.")] = Path("runs/demo"),
    as_json: JsonOption = False,
) -> None:
    """The whole story on embedded real data: a teacher, a cache, and one small student trained five ways."""
    from logitcache.demo import run_demo

    result = run_demo(folder, overrides or ())
    summary = {
        "teacher_accuracy": result.teacher_accuracy,
        "rows": [dataclasses.asdict(row) for row in result.rows],
        "findings": result.findings,
        "cache": result.cache_path,
        "report": result.report_path,
    }

    def print_demo() -> None:
        console().print(f"The teacher is right on {result.teacher_accuracy:.1%} of the test images.")
        print_rows(result.rows)
        for line in result.findings:
            console().print(f"  {line}", highlight=False)
        console().print(f"The report is {result.report_path}: open it in a browser.", highlight=False)
        console().print(
            f"The cache is in {result.cache_path}: try `logitcache info {result.cache_path}`.", highlight=False
        )

    show(summary, as_json, print_demo)


def show(value: dict[str, Any], as_json: bool, print_it: Any) -> None:
    """One JSON object on stdout, or something for people."""
    if as_json:
        print(json.dumps(value))
    else:
        print_it()


def main() -> None:
    """Run the command line; errors become one message and their exit code."""
    try:
        app(standalone_mode=True)
    except LogitCacheError as error:
        fail(error, str(error), error.exit_code)
    except OSError as error:
        fail(
            error, f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}", StorageError.exit_code
        )


def fail(error: BaseException, message: str, exit_code: int) -> None:
    """Say what went wrong, on stderr, and with --json on stdout too."""
    print(f"error: {message}", file=sys.stderr)
    if "--json" in sys.argv:
        print(json.dumps({"error": message, "kind": type(error).__name__}))
    sys.exit(exit_code)


if __name__ == "__main__":
    main()
