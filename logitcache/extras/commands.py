"""Commands of the extras."""

from __future__ import annotations

import dataclasses
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from logitcache.cli.application import (
    CACHES,
    FLAG,
    MORE,
    PIPELINES,
    CacheArgument,
    DataOverridesArgument,
    JsonOption,
    OldOutputOption,
    TrustOption,
    app,
    chosen_output,
    pipeline_of,
    refuse_overrides,
    show,
)
from logitcache.cli.printing import cache_summary
from logitcache.errors import UsageError
from logitcache.extras import printing
from logitcache.extras.interchange import FORMATS


class MeanOf(StrEnum):
    """What `merge` averages."""

    logits = "logits"
    probabilities = "probabilities"


class ExportFormat(StrEnum):
    """Formats of `export`."""

    parquet = "parquet"
    huggingface = "huggingface"
    distillkit = "distillkit"
    axolotl = "axolotl"
    safetensors = "safetensors"
    onnx = "onnx"


RUN_FORMATS = (ExportFormat.safetensors, ExportFormat.onnx)
CACHE_FORMATS = [each.value for each in ExportFormat if each not in RUN_FORMATS]


class Weights(StrEnum):
    """Weights of a run that `export` uses."""

    last = "last"
    best = "best"


@app.command("merge", rich_help_panel=CACHES)
def merge_command(
    caches: Annotated[list[str], typer.Argument(metavar="CACHE", help="Two or more caches of the same views.")],
    output: Annotated[
        str | None, typer.Option("--output", "-o", metavar="CACHE", help="Directory of the merged cache; required.")
    ] = None,
    old_output: OldOutputOption = None,
    mean: Annotated[
        MeanOf, typer.Option(help="Average logits (a geometric mean, for any temperature) or probabilities (at T = 1).")
    ] = MeanOf.logits,
    weight: Annotated[
        list[float] | None, typer.Option(help="Weight of a cache; repeat the option, once per cache in order.")
    ] = None,
    encoding: Annotated[
        str | None, typer.Option(help='Such as "TopK(k=20)" or auto; default: the first cache\'s.')
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Average the caches of several teachers over the same views. Safe to interrupt: re-run to resume."""
    from logitcache.cache.summary import summarise
    from logitcache.extras.merge import merge

    out = chosen_output(output, old_output)
    if out is None:
        raise UsageError("merge needs a directory for the merged cache: add --output CACHE")
    result = merge(caches, out, mean=mean.value, weights=weight or None, encoding=encoding)
    summary = cache_summary(summarise(out)) | {
        "mean": mean.value,
        "parts": [part.model_dump(exclude={"teacher_input"}) for part in result.parts],
        "left_out_views": result.left_out,
        "left_out_outputs": result.left_out_outputs,
        "computed_blocks": len(result.computed_blocks),
        "total_blocks": result.total_blocks,
    }
    show(summary, as_json, lambda: printing.print_merge(out, summary))


@app.command("export", rich_help_panel=CACHES)
def export_command(
    source: Annotated[str, typer.Argument(metavar="CACHE|RUN", help="A cache, or a run's folder (safetensors, onnx).")],
    *,
    overrides: DataOverridesArgument = None,
    to: Annotated[
        ExportFormat,
        typer.Option(
            "--to",
            metavar="FORMAT",
            help=f"Output format: {', '.join(CACHE_FORMATS)} for a cache; safetensors, onnx for a run.",
        ),
    ],
    output: Annotated[
        str | None,
        typer.Option(
            "--output", "-o", metavar="FOLDER", help="Output folder, new or empty; default for a run: RUN/product."
        ),
    ] = None,
    old_output: OldOutputOption = None,
    views: Annotated[str | None, typer.Option(help="Views of the cache, such as 0:2 or 3; default: all.")] = None,
    top: Annotated[int | None, typer.Option(help="Keep only the TOP largest logits of each row, and the tail.")] = None,
    int8: Annotated[
        bool, typer.Option("--int8", metavar=FLAG, help="With --to onnx: also write a statically quantized model.")
    ] = False,
    weights: Annotated[
        Weights, typer.Option(help="Weights of the run: the last, or the best by validation accuracy.")
    ] = (Weights.last),
    data: Annotated[
        Path | None,
        typer.Option(
            metavar="PIPELINE",
            help="Pipeline with the data of the cache, for its token ids (distillkit, axolotl), or of the run; default "
            "for a run: its own.",
        ),
    ] = None,
    trust: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """Export a cache in a format of other tools, or a run's student as safetensors or ONNX with a card."""
    if data is None:
        refuse_overrides(overrides)
    chosen = chosen_output(output, old_output)
    out = None if chosen is None else Path(chosen)
    if to not in RUN_FORMATS:
        _check_is_cache(source, to.value, out, int8=int8, weights=weights)
        assert out is not None
        from logitcache.extras.interchange import export_cache

        tokens: Any = None
        if data is not None:
            from logitcache.config.build import pipeline_data
            from logitcache.config.schema import load_pipeline

            tokens = pipeline_data(load_pipeline(data, overrides or ()), trust=trust).train
        result = export_cache(to.value, source, out, views=views, top=top, tokens=tokens)
        show(dataclasses.asdict(result), as_json, lambda: printing.print_export(str(out), to.value, result))
        return
    _check_is_run(source, to.value, views=views, top=top)
    from logitcache.config.schema import load_pipeline
    from logitcache.extras.student_export import export_run
    from logitcache.stages.finished_student import open_student

    pipeline = None if data is None else load_pipeline(data, overrides or ())
    student = open_student(Path(source), weights=weights.value, data=pipeline, trust=trust)
    exported = export_run(student, out, to="onnx" if to is ExportFormat.onnx else "safetensors", int8=int8)
    summary = {"folder": str(exported.folder), "written": exported.written, **exported.metadata.model_dump()}
    show(summary, as_json, lambda: printing.print_student_export(exported))


def _check_is_cache(source: str, to: str, out: Path | None, *, int8: bool, weights: Weights) -> None:
    if (Path(source) / "run.yaml").is_file():
        raise UsageError(f"{source} is a run: use --to safetensors or --to onnx; --to {to} needs a cache")
    if int8 or weights is not Weights.last:
        raise UsageError(f"--int8 and --weights apply to runs; --to {to} takes --views, --top and --data")
    if out is None:
        raise UsageError(f"--to {to} needs an output folder: add -o FOLDER")


def _check_is_run(source: str, to: str, *, views: str | None, top: int | None) -> None:
    if "://" in source or (Path(source) / "manifest.json").is_file():
        raise UsageError(
            f"{source} is a cache: use --to {', '.join(CACHE_FORMATS)}; --to {to} needs a run, such as "
            "runs/STUDENT/seed-0"
        )
    if views is not None or top is not None:
        raise UsageError("--views and --top apply to caches, not to runs")


@app.command(
    "import", rich_help_panel=CACHES, epilog="\n\n".join(f"{name}: {source}" for name, source in FORMATS.items())
)
def import_command(
    format: Annotated[
        str, typer.Argument(metavar="FORMAT", help=f"One of {', '.join(FORMATS)}, or a format of a plugin.")
    ],
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="Local file or folder, as listed below.")],
    cache: Annotated[str, typer.Argument(metavar="CACHE", help="Directory or URL of the cache to write.")],
    *,
    teacher: Annotated[
        str, typer.Option(metavar="NAME", help="Identity of the teacher, best with a version; formats don't record it.")
    ],
    dataset: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Identity of the dataset. Not needed with --data, or for token ids."),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(metavar="PIPELINE", help="Pipeline with your copy of the dataset; rows are matched by key."),
    ] = None,
    num_classes: Annotated[
        int | None, typer.Option(min=2, help="Number of classes of the teacher; most formats don't record it.")
    ] = None,
    encoding: Annotated[
        str | None, typer.Option(help='Such as "TopK(k=20)" or auto; default: float32, with the source\'s k.')
    ] = None,
    head: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Weights of the teacher with its head, for formats of hidden states."),
    ] = None,
    details: Annotated[
        Path | None,
        typer.Option(metavar="NPZ", help="Also write keys, and the seeds or crop boxes that the format stores."),
    ] = None,
    overrides: DataOverridesArgument = None,
    trust: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """Import the logits that another tool has stored as a cache. Safe to interrupt: re-run to resume."""
    from logitcache.cache.summary import summarise
    from logitcache.extras.interchange import import_cache

    samples = None
    pipeline = pipeline_of(cache, data, overrides)
    if pipeline is not None:
        from logitcache.config.build import pipeline_data
        from logitcache.data.samples import sample_table

        samples = sample_table(pipeline_data(pipeline, trust=trust).train, contents=True)
    result = import_cache(
        format,
        source,
        cache,
        teacher=teacher,
        dataset=dataset,
        samples=samples,
        num_classes=num_classes,
        head=head,
        encoding=encoding,
        details=details,
    )
    summary = cache_summary(summarise(cache)) | {
        "format": format,
        "source_files": result.source_files,
        "source_bytes": result.source_bytes,
        "missing": result.missing,
        "tail_mean": result.tail_mean,
        "normalised_rows": result.normalised_rows,
        "details": result.details,
    }
    show(summary, as_json, lambda: printing.print_import(cache, summary))


@app.command("suspects", rich_help_panel=MORE)
def suspects_command(
    cache: CacheArgument,
    top: Annotated[
        int | None, typer.Option(min=1, help="List only the TOP most suspicious samples; default without --json: 20.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="CSV", help="Also write the list to a CSV file.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """List samples whose true label is probably wrong, found by confident learning on the cached logits."""
    from logitcache.extras.noise import CAUTION, find_suspects, write_suspects

    noise = find_suspects(cache)
    if output is not None:
        write_suspects(noise, output, top=top)
    shown = printing.noise_summary(noise, top if as_json or top is not None else 20)
    show(shown, as_json, lambda: printing.print_suspects(cache, shown, CAUTION))


@app.command("report", rich_help_panel=MORE)
def report_command(
    cache: CacheArgument,
    overrides: DataOverridesArgument = None,
    runs: Annotated[Path | None, typer.Option(metavar="DIR", help="Folder with the students' runs.")] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            metavar="PIPELINE",
            help="Pipeline with the data, for example images; default for students: their runs' own data.",
        ),
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="HTML file to write.")] = Path("report.html"),
    trust: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """Write an offline HTML report: the cache, its teacher, fidelity and views, and a comparison of students."""
    from logitcache.extras.report import check_report, write_report
    from logitcache.stages.matched_data import match_data

    pipeline = pipeline_of(cache, data, overrides)
    check_report(output)
    matched = None if pipeline is None else match_data(cache, pipeline, trust=trust)
    written = write_report(cache, output, runs=runs, data=matched, trust=trust)
    summary = {"report": str(written.path), "bytes": written.bytes, **written.headline}
    show(summary, as_json, lambda: printing.print_report(written))


@app.command("federate", rich_help_panel=MORE)
def federate_command(
    file: Annotated[Path, typer.Argument(metavar="FEDERATION", help="Federation file, such as federation.yaml.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Keys of the federation file to override, such as rounds=5."),
    ] = None,
    party: Annotated[
        str | None, typer.Option(metavar="NAME", help="Run only this party; default: all parties in turn.")
    ] = None,
    wait: Annotated[
        float, typer.Option(metavar="SECONDS", min=0, help="How long to wait for the other parties in each round.")
    ] = 3600.0,
    trust: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """Federated distillation: parties exchange logits on a public dataset. Safe to interrupt: re-run to resume."""
    from logitcache.extras.federation.configuration import load_federation
    from logitcache.extras.federation.rounds import federate

    outcomes = federate(load_federation(file, overrides or ()), party=party, wait=wait, trust=trust)
    show({"turns": [dataclasses.asdict(each) for each in outcomes]}, as_json, lambda: printing.print_turns(outcomes))


@app.command("demo", rich_help_panel=PIPELINES)
def demo_command(
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Keys of the demo's pipeline to override, such as train.epochs=5."),
    ] = None,
    folder: Annotated[Path, typer.Option(help="Where runs and caches go.")] = Path("runs/demo"),
    full: Annotated[
        bool,
        typer.Option(
            "--full", metavar=FLAG, help="More seeds, and a student on all true labels, as in the documentation."
        ),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Compare training from a cache with training with the live teacher, on 5 000 MNIST images.

    Safe to interrupt: re-run to resume.
    """
    from logitcache.extras.demo import demo_report, run_demo

    if not as_json:
        typer.echo("Training a teacher, caching it and training students. This takes a few minutes.", err=True)
    result = run_demo(folder, overrides or (), full=full)
    report = demo_report(result, folder / "report.html")
    show(printing.demo_summary(result, report), as_json, lambda: printing.print_demo(result, report))
