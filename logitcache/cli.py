"""The command line: parse, call, print."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from logitcache.errors import LogitCacheError, StorageError, UsageError

app = typer.Typer(
    name="logitcache",
    help="Offline knowledge distillation: run the teacher once, keep its logits, train any number of students.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)

PipelineArgument = Annotated[Path, typer.Argument(help="A pipeline file, such as pipelines/mnist5k.yaml.")]
CacheArgument = Annotated[str, typer.Argument(metavar="CACHE", help="A cache's directory or file:// URL.")]
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
    from logitcache.plan import plan_logits, plan_pipeline, read_logits
    from logitcache.plan import plot as plot_plan

    if (pipeline is None) == (logits is None):
        raise UsageError("plan needs a pipeline file, or logits of its own (--logits FILE): one of the two")
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
    from logitcache.reader import open_cache

    loaded = load_pipeline(pipeline, overrides or ())
    result = cache_teacher(loaded, trust=trust)
    summary = cache_summary(open_cache(loaded.cache.path))
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
    from logitcache.reader import open_cache

    summary = cache_summary(open_cache(cache))
    show(summary, as_json, lambda: print_mapping(cache, summary))


@app.command("verify")
def verify_command(
    cache: CacheArgument,
    deep: Annotated[bool, typer.Option("--deep", help="Read every byte and compare its SHA-256.")] = False,
    data: Annotated[
        Path | None, typer.Option(help="A pipeline whose data, views and teacher are compared with the cache.")
    ] = None,
    trust: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """Check receipts and sizes, with --deep every byte, with --data whether the cache fits; exit 1 on a problem."""
    from logitcache.audit import Problem, verify

    problems = verify(cache, deep=deep)
    if data is not None and not problems:
        from logitcache.fit import all_differences
        from logitcache.pipeline import load_pipeline
        from logitcache.reader import open_cache

        differences = all_differences(open_cache(cache, trust=trust), load_pipeline(data), trust=trust)
        problems += [Problem("", line, "differs") for line in differences]
    found = {"ok": not problems, "problems": [dataclasses.asdict(problem) for problem in problems]}
    show(found, as_json, lambda: print_problems(cache, problems))
    if problems:
        raise typer.Exit(1)


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
    }

    def print_demo() -> None:
        console().print(f"The teacher is right on {result.teacher_accuracy:.1%} of the test images.")
        print_rows(result.rows)
        for line in result.findings:
            console().print(f"  {line}", highlight=False)
        console().print(
            f"The cache is in {result.cache_path}: try `logitcache info {result.cache_path}`.", highlight=False
        )

    show(summary, as_json, print_demo)


def cache_summary(cache: Any) -> dict[str, Any]:
    """The keys of `info`."""
    rows = sum(receipt.rows for name, receipt in cache.receipts.items() if name != "fixed")
    return {
        "id": cache.id,
        "digest": cache.digest,
        "sealed": cache.sealed,
        "num_samples": cache.num_samples,
        "num_views": cache.num_views,
        "num_classes": cache.num_classes,
        "encoding": repr(cache.encoding),
        "bytes": cache.stored_bytes,
        "bytes_per_sample": cache.label_bytes / rows if rows else None,
        "teacher": cache.manifest.identity.teacher,
        "dataset": cache.manifest.identity.dataset,
        "kl_mean": cache.kl_mean,
        "created": cache.manifest.provenance.get("created"),
    }


def plan_summary(plan: Any) -> dict[str, Any]:
    """The keys of `plan`."""

    def finite(nats: float) -> float | None:
        return nats if math.isfinite(nats) else None

    return {
        "num_rows": plan.num_rows,
        "num_classes": plan.num_classes,
        "recommended": repr(plan.recommended.encoding),
        "encodings": [
            {
                "encoding": repr(each.encoding),
                "bytes_per_sample": each.bytes_per_sample,
                "fixed_bytes": each.fixed_bytes,
                "total_bytes": plan.total_bytes(each),
                "kl": {f"{temperature:g}": finite(nats) for temperature, nats in each.kl.items()},
                "kl_max": finite(each.kl_max),
                "top1_agreement": each.top1_agreement,
            }
            for each in plan.fidelities
        ],
        "num_samples": plan.num_samples,
        "num_views": plan.num_views,
        "samples_per_second": plan.samples_per_second,
        "hours": plan.hours,
    }


def print_plan(plan: Any) -> None:
    """The table of encodings, and what to make of it."""
    whole = plan.num_samples is not None
    temperatures = list(plan.recommended.kl)
    columns = ["encoding", "bytes/sample", *(["total"] if whole else []), *(f"KL T={t:g}" for t in temperatures)]
    table = Table(
        *columns, "largest", "top-1 agreement", title=f"{plan.num_rows:,} rows of {plan.num_classes:,} classes"
    )
    for each in plan.fidelities:
        chosen = each is plan.recommended
        total = [decimal(int(plan.total_bytes(each)))] if whole else []
        nats = [f"{nats:.2g}" if math.isfinite(nats) else "-" for nats in (*each.kl.values(), each.kl_max)]
        cells = [spelled(each.encoding), f"{each.bytes_per_sample:.1f}", *total, *nats, f"{each.top1_agreement:.1%}"]
        table.add_row(*cells, style="bold" if chosen else None)
    console().print(table)
    if plan.hours is not None:
        console().print(
            f"{plan.num_views} views of {plan.num_samples:,} samples at {plan.samples_per_second:,.0f} a second: "
            f"cache-teacher would take {timedelta(seconds=round(3600 * plan.hours))}.",
            highlight=False,
        )
    console().print(f'Recommended: cache.encoding="{spelled(plan.recommended.encoding)}"', highlight=False)


def spelled(encoding: Any) -> str:
    """An encoding as one would write it: without the parameters that have their default."""
    changed = [
        f"{field.name}={getattr(encoding, field.name)!r}"
        for field in dataclasses.fields(encoding)
        if field.compare and getattr(encoding, field.name) != field.default
    ]
    return f"{type(encoding).__name__}({', '.join(changed)})"


def show(value: dict[str, Any], as_json: bool, print_it: Any) -> None:
    """One JSON object on stdout, or something for people."""
    if as_json:
        print(json.dumps(value))
    else:
        print_it()


def console() -> Console:
    """Standard output; wide enough for a table where no terminal says how wide it is."""
    return Console(soft_wrap=True) if sys.stdout.isatty() else Console(soft_wrap=True, width=120)


def print_mapping(title: str, values: dict[str, Any]) -> None:
    """A two-column table."""
    table = Table(title=title, show_header=False, title_justify="left")
    for name, value in values.items():
        shown = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else value
        table.add_row(name.replace("_", " "), f"{shown:.4g}" if isinstance(shown, float) else str(shown))
    console().print(table)


def print_rows(rows: list[Any]) -> None:
    """The table of students."""
    table = Table("student", "parameters", "samples", "seeds", "test accuracy", "validation", "s/epoch")
    for row in rows:
        spread = "" if row.accuracy_sd is None else f" ± {100 * row.accuracy_sd:.2f}"
        table.add_row(
            row.name,
            f"{row.parameters:,}",
            f"{row.samples:,}",
            str(len(row.seeds)),
            "-" if row.accuracy_mean is None else f"{100 * row.accuracy_mean:.2f}{spread}",
            "-" if row.validation_accuracy_mean is None else f"{100 * row.validation_accuracy_mean:.2f}",
            "-" if row.epoch_seconds is None else f"{row.epoch_seconds:.2f}",
        )
    console().print(table)


def print_steps(steps: list[Any]) -> None:
    """What a run would do."""
    table = Table("stage", "what", "state")
    for step in steps:
        table.add_row(step.stage, step.what, "done" if step.done else "to do")
    console().print(table)


def print_problems(cache: str, problems: list[Any]) -> None:
    """What `verify` found."""
    if not problems:
        console().print(f"{cache}: no problem found", highlight=False)
        return
    table = Table("block", "path", "kind", title=f"{cache}: {len(problems)} problems", title_justify="left")
    for problem in problems:
        table.add_row(problem.block, problem.path, problem.kind)
    console().print(table)


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
