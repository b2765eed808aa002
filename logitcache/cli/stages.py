"""Commands that run the stages of a pipeline."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from logitcache.cli.application import (
    FLAG,
    PIPELINES,
    JsonOption,
    OverridesArgument,
    PipelineArgument,
    TrustOption,
    app,
    show,
)
from logitcache.cli.printing import (
    cache_summary,
    plan_summary,
    print_cache,
    print_checked,
    print_mapping,
    print_next,
    print_plan,
    print_rows,
)
from logitcache.errors import UsageError

if TYPE_CHECKING:
    from logitcache.engines import Engine


@app.command("plan", rich_help_panel=PIPELINES)
def plan_command(
    pipeline: Annotated[Path | None, typer.Argument(help="Pipeline file; or use --logits.")] = None,
    overrides: OverridesArgument = None,
    logits: Annotated[Path | None, typer.Option(help="A .npy or .npz file of logits, instead of a teacher.")] = None,
    group: Annotated[
        str | None,
        typer.Option(
            help="Array in the .npz file; rows of one group are used either to fit or to measure, never both."
        ),
    ] = None,
    max_kl: Annotated[
        float | None, typer.Option(help="Largest accepted KL, in nats; default without --max-bytes: 0.01.")
    ] = None,
    max_bytes: Annotated[float | None, typer.Option(help="Largest accepted size, in bytes per row.")] = None,
    temperature: Annotated[
        float | None, typer.Option(help="Temperature of the KL that encodings are chosen by: 1 (default), 2 or 4.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Write a plot of KL against bytes to this .png file.")] = None,
    trust: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """Compare encodings before a long run: size, fidelity and time, measured on a calibration sample."""
    from logitcache.config.schema import load_pipeline
    from logitcache.encodings import Auto
    from logitcache.extras.plan_plot import check_plot
    from logitcache.extras.plan_plot import plot as plot_plan
    from logitcache.stages.plan import plan_logits, plan_pipeline, read_logits

    if (pipeline is None) == (logits is None):
        raise UsageError("plan needs either a pipeline file or --logits FILE")
    if plot is not None:
        check_plot(plot)
    if logits is not None:
        limits = Auto(max_kl=max_kl, max_bytes=max_bytes, temperature=1.0 if temperature is None else temperature)
        result = plan_logits(read_logits(logits, group), limits)
    else:
        assert pipeline is not None
        loaded = load_pipeline(pipeline, overrides or ())
        result = plan_pipeline(loaded, max_kl=max_kl, max_bytes=max_bytes, temperature=temperature, trust=trust)
    if plot is not None:
        plot_plan(result, plot)
    show(plan_summary(result), as_json, lambda: print_plan(result))


@app.command("train-teacher", rich_help_panel=PIPELINES)
def train_teacher_command(
    pipeline: PipelineArgument,
    overrides: OverridesArgument = None,
    trust: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """Train the teacher on true labels, if the pipeline has `weights: trained`. Safe to interrupt: re-run to resume."""
    from logitcache.config.schema import load_pipeline
    from logitcache.stages.train_teacher import train_teacher
    from logitcache.train.ranks import is_first_process

    result = train_teacher(load_pipeline(pipeline, overrides or ()), trust=trust)

    def print_result() -> None:
        print_mapping("teacher", result)
        print_next("cache-teacher", pipeline, overrides)

    if is_first_process():
        show(result, as_json, print_result)


@app.command("cache-teacher", rich_help_panel=PIPELINES)
def cache_teacher_command(
    pipeline: PipelineArgument,
    overrides: OverridesArgument = None,
    shard: Annotated[
        str | None,
        typer.Option(metavar="INDEX/COUNT", help="Compute every COUNT-th block, for job arrays; INDEX counts from 0."),
    ] = None,
    engine: Annotated[
        str | None,
        typer.Option(
            help="How the blocks are distributed: local, torchrun, claims, ray, or a plugin's engine. Default: local, "
            "or torchrun in a process that torchrun started."
        ),
    ] = None,
    engine_option: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="Option of the engine; can be repeated.")
    ] = None,
    trust: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """Stage 1: run the teacher and write the cache. Safe to interrupt: re-run to resume."""
    from logitcache.cache.summary import summarise
    from logitcache.config.schema import load_pipeline
    from logitcache.stages.cache_teacher import cache_teacher
    from logitcache.train.ranks import is_first_process

    chosen = _engine(engine, engine_option or (), shard)
    loaded = load_pipeline(pipeline, overrides or ())
    result = cache_teacher(loaded, engine=chosen, trust=trust)
    if not is_first_process():
        return
    summary = cache_summary(summarise(loaded.cache.path))
    summary |= {
        "computed_blocks": len(result.computed_blocks),
        "total_blocks": result.total_blocks,
        "missing_blocks": len(result.missing_blocks),
    }

    def print_result() -> None:
        print_cache(loaded.cache.path, summary)
        if summary["sealed"] and loaded.students:
            print_next("train-student", pipeline, overrides)

    show(summary, as_json, print_result)
    if result.missing_blocks:
        print(
            f"{len(result.missing_blocks)} of {result.total_blocks} blocks are missing. The shard that finishes last "
            f"seals the cache; if a shard failed, run it again. `logitcache seal {loaded.cache.path}` seals it, or "
            "names the missing blocks",
            file=sys.stderr,
        )


def _engine(name: str | None, options: Sequence[str], shard: str | None) -> Engine | None:
    from logitcache.config.overrides import override
    from logitcache.engines import Shard, engine_from_name

    if shard is not None:
        if name is not None:
            raise UsageError(f"--shard {shard} and --engine {name} exclude each other: a shard runs by itself")
        return Shard.parse(shard)
    if name is None:
        if options:
            raise UsageError("--engine-option needs --engine")
        return None
    values: dict[str, Any] = {}
    for option in options:
        override(values, option)
    return engine_from_name(name, values)


@app.command("train-student", rich_help_panel=PIPELINES)
def train_student_command(
    pipeline: PipelineArgument,
    overrides: OverridesArgument = None,
    student: Annotated[list[str] | None, typer.Option(help="Train only this student; can be repeated.")] = None,
    trust: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """Stage 2: train students from the cache. Safe to interrupt: re-run to resume."""
    from logitcache.config.schema import load_pipeline
    from logitcache.stages.train_student import train_students
    from logitcache.train.ranks import is_first_process

    rows = train_students(load_pipeline(pipeline, overrides or ()), student or (), trust=trust)
    if is_first_process():
        show({"rows": [dataclasses.asdict(row) for row in rows]}, as_json, lambda: print_rows(rows))


@app.command("run", rich_help_panel=PIPELINES)
def run_command(
    arguments: Annotated[
        list[str],
        typer.Argument(
            metavar="PIPELINE|KEY=VALUE",
            help="Pipeline file, and keys to override. With --dry-run, any number of pipeline and federation files.",
        ),
    ],
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            metavar=FLAG,
            help="Check the files, and the cache and runs that exist; list the stages. Runs and downloads nothing.",
        ),
    ] = False,
    require_data: Annotated[
        bool,
        typer.Option(
            "--require-data", metavar=FLAG, help="With --dry-run: load all data; exit 1 if anything is missing."
        ),
    ] = False,
    trust: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """Run all stages of a pipeline; completed ones are skipped. Safe to interrupt: re-run to resume."""
    files = [Path(each) for each in arguments if "=" not in each]
    overrides = [each for each in arguments if "=" in each]
    if dry_run:
        _dry_run(files, overrides, require_data=require_data, trust=trust, as_json=as_json)
        return
    if require_data:
        raise UsageError("--require-data needs --dry-run")
    if len(files) != 1:
        raise UsageError(f"expected one pipeline file, found {len(files)}; only --dry-run takes several")
    from logitcache.config.schema import load_pipeline
    from logitcache.stages.run import run_pipeline

    rows = run_pipeline(load_pipeline(files[0], overrides), trust=trust)
    show({"rows": [dataclasses.asdict(row) for row in rows]}, as_json, lambda: print_rows(rows))


def _dry_run(files: list[Path], overrides: list[str], *, require_data: bool, trust: bool, as_json: bool) -> None:
    if not files:
        raise UsageError("expected at least one pipeline file")
    from logitcache.cli.dry_run import check_files

    checked = check_files(files, overrides, trust=trust, require_data=require_data)
    summary = {"pipelines": [dataclasses.asdict(each) for each in checked]}
    if len(checked) == 1:
        summary["steps"] = summary["pipelines"][0]["steps"]
    show(summary, as_json, lambda: print_checked(checked))
    if any(each.error for each in checked):
        raise typer.Exit(UsageError.exit_code)
    in_conflict = next((each.exit_code for each in checked if each.exit_code), 0)
    if in_conflict:
        raise typer.Exit(in_conflict)
    if require_data and any(each.missing for each in checked):
        raise typer.Exit(1)
