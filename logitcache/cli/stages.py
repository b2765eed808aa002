"""Commands that take a pipeline through its stages."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from logitcache.cli.application import JsonOption, OverridesArgument, PipelineArgument, TrustOption, app, show
from logitcache.cli.printing import (
    cache_summary,
    demo_summary,
    plan_summary,
    print_demo,
    print_mapping,
    print_plan,
    print_rows,
    print_steps,
    print_turns,
)
from logitcache.errors import UsageError


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
    from logitcache.config.schema import load_pipeline
    from logitcache.stages.plan import check_plot, plan_logits, plan_pipeline, read_logits
    from logitcache.stages.plan import plot as plot_plan

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
    from logitcache.config.schema import load_pipeline
    from logitcache.stages.train_student import train_teacher
    from logitcache.train.ranks import is_first_process

    result = train_teacher(load_pipeline(pipeline, overrides or ()), trust=trust)
    if is_first_process():
        show(result, as_json, lambda: print_mapping("teacher", result))


@app.command("cache-teacher")
def cache_teacher_command(
    pipeline: PipelineArgument,
    overrides: OverridesArgument = None,
    trust: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """Stage 1: compute the blocks of the cache that are missing, then seal it. Interrupted? Run it again."""
    from logitcache.cache.summary import summarise
    from logitcache.config.schema import load_pipeline
    from logitcache.stages.cache_teacher import cache_teacher
    from logitcache.train.ranks import is_first_process

    loaded = load_pipeline(pipeline, overrides or ())
    result = cache_teacher(loaded, trust=trust)
    if not is_first_process():
        return
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
    from logitcache.config.schema import load_pipeline
    from logitcache.stages.train_student import train_students
    from logitcache.train.ranks import is_first_process

    rows = train_students(load_pipeline(pipeline, overrides or ()), student or (), trust=trust)
    if is_first_process():
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
    from logitcache.config.schema import load_pipeline
    from logitcache.stages.run import plan_run, run_pipeline

    loaded = load_pipeline(pipeline, overrides or ())
    if dry_run:
        steps = plan_run(loaded, trust=trust)
        show({"steps": [dataclasses.asdict(step) for step in steps]}, as_json, lambda: print_steps(steps))
    else:
        rows = run_pipeline(loaded, trust=trust)
        show({"rows": [dataclasses.asdict(row) for row in rows]}, as_json, lambda: print_rows(rows))


@app.command("federate")
def federate_command(
    file: Annotated[
        Path, typer.Argument(metavar="FEDERATION", help="A federation file, such as pipelines/federated_mnist.yaml.")
    ],
    overrides: OverridesArgument = None,
    party: Annotated[
        str | None, typer.Option(metavar="NAME", help="Do the work of this party only; of all in turn by default.")
    ] = None,
    wait: Annotated[
        float, typer.Option(metavar="SECONDS", min=0, help="How long to wait for the others in each round.")
    ] = 3600.0,
    trust: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """Federated distillation: parties exchange logits on a public set, in rounds. Interrupted? Run it again."""
    from logitcache.extras.federation.configuration import load_federation
    from logitcache.extras.federation.rounds import federate

    outcomes = federate(load_federation(file, overrides or ()), party=party, wait=wait, trust=trust)
    show({"turns": [dataclasses.asdict(each) for each in outcomes]}, as_json, lambda: print_turns(outcomes))


@app.command("demo")
def demo_command(
    overrides: OverridesArgument = None,
    folder: Annotated[Path, typer.Option(help="Where runs and caches go.")] = Path("runs/demo"),
    full: Annotated[
        bool, typer.Option("--full", help="More seeds, and a student on all true labels: the documentation's table.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """What a cache buys, on embedded data: time, view matching, few labels. Safe to interrupt: re-run to resume."""
    from logitcache.extras.demo import demo_report, run_demo

    if not as_json:
        minutes = "about 8 minutes" if full else "about 90 seconds"
        typer.echo(f"Training a teacher, caching it and training students: {minutes} on two idle cores.", err=True)
    result = run_demo(folder, overrides or (), full=full)
    report = demo_report(result, folder / "report.html")
    show(demo_summary(result, report), as_json, lambda: print_demo(result, report))
