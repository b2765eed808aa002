"""Commands on existing caches."""

from __future__ import annotations

import dataclasses
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from logitcache.cli.application import (
    CacheArgument,
    JsonOption,
    OverridesArgument,
    TrustOption,
    app,
    pipeline_of,
    refuse_overrides,
    show,
)
from logitcache.cli.printing import (
    cache_summary,
    console,
    noise_summary,
    print_caches,
    print_export,
    print_mapping,
    print_merge,
    print_problems,
    print_product,
    print_report,
    print_suspects,
    print_transfer,
)
from logitcache.errors import UsageError


class MeanOf(StrEnum):
    """What `merge` averages."""

    logits = "logits"
    probabilities = "probabilities"


class ExportFormat(StrEnum):
    """Formats of `export`."""

    parquet = "parquet"
    safetensors = "safetensors"
    onnx = "onnx"


class Weights(StrEnum):
    """Weights of a run that `export` uses."""

    last = "last"
    best = "best"


@app.command("info")
def info_command(cache: CacheArgument, as_json: JsonOption = False) -> None:
    """Show a cache's metadata: shape, encoding, size, teacher, dataset and digest."""
    from logitcache.cache.summary import summarise

    found = summarise(cache)
    summary = cache_summary(found)
    show(summary, as_json, lambda: print_mapping(f"{found.names.title} ({cache})", summary))
    _note(found.missing_packages)


@app.command("ls")
def ls_command(
    location: Annotated[str, typer.Argument(metavar="URL", help="Directory or URL to search, subfolders included.")],
    as_json: JsonOption = False,
) -> None:
    """List the caches in a folder or at a URL, subfolders included; exit 1 if one can't be read."""
    from logitcache.cache.summary import Summary, find_caches

    found = find_caches(location)
    caches = [{"url": each.url} | cache_summary(each) for each in found if isinstance(each, Summary)]
    unreadable = [dataclasses.asdict(each) for each in found if not isinstance(each, Summary)]
    show({"caches": caches, "unreadable": unreadable}, as_json, lambda: print_caches(location, caches, unreadable))
    if unreadable:
        raise typer.Exit(1)


@app.command("verify")
def verify_command(
    cache: CacheArgument,
    overrides: OverridesArgument = None,
    deep: Annotated[bool, typer.Option("--deep", help="Read every byte and compare its SHA-256.")] = False,
    recompute: Annotated[
        int,
        typer.Option(
            metavar="N", help="Run the teacher of --data again on N samples drawn over all views, and compare."
        ),
    ] = 0,
    data: Annotated[
        Path | None, typer.Option(help="Pipeline whose data, views and teacher are compared with the cache.")
    ] = None,
    trust: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """Check a cache: receipts and sizes; --deep: every byte; --data: its match with a pipeline. Exit 1 on a problem."""
    from logitcache.cache.summary import missing_packages_of
    from logitcache.verify.audit import verify

    if recompute and data is None:
        raise UsageError("--recompute runs the teacher, so it needs a pipeline: add --data PIPELINE")
    pipeline = pipeline_of(cache, data, overrides)
    problems = verify(cache, deep=deep)
    if pipeline is not None and not problems:
        from logitcache.config.build import has_teacher
        from logitcache.stages.verify_match import verify_match

        problems = verify_match(pipeline, recompute=recompute, trust=trust)
        if not has_teacher(pipeline):
            print(
                f"{data}: the teacher's weights are not on this machine, so only its name was compared", file=sys.stderr
            )
    found = {"ok": not problems, "problems": [dataclasses.asdict(problem) for problem in problems]}
    show(found, as_json, lambda: print_problems(cache, problems))
    _note(missing_packages_of(cache))
    if problems:
        raise typer.Exit(1)


@app.command("repair")
def repair_command(
    cache: CacheArgument,
    overrides: OverridesArgument = None,
    source: Annotated[str | None, typer.Option("--from", help="A copy of the cache to fetch blocks from.")] = None,
    data: Annotated[Path | None, typer.Option(help="The cache's pipeline, to recompute blocks.")] = None,
    trust: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """Fetch or recompute the blocks that fail `verify --deep`, and no others; exit 1 if a problem remains."""
    from logitcache.verify.repair import repair

    pipeline = pipeline_of(cache, data, overrides)

    def recompute() -> str | None:
        from logitcache.stages.cache_teacher import cache_teacher

        assert pipeline is not None
        return cache_teacher(pipeline, trust=trust).manifest.digest

    result = repair(cache, source=source, recompute=None if pipeline is None else recompute)
    found = {"ok": not result.remaining, **dataclasses.asdict(result)}

    def print_repair() -> None:
        blocks = len(result.fetched) + len(result.recomputed)
        console().print(
            f"{cache}: {len(result.problems)} problems found, {len(result.fetched)} blocks fetched, "
            f"{len(result.recomputed)} recomputed"
            if blocks or result.problems
            else f"{cache}: nothing to repair",
            highlight=False,
        )
        print_problems(cache, result.remaining)

    show(found, as_json, print_repair)
    if result.remaining:
        raise typer.Exit(1)


@app.command("seal")
def seal_command(cache: CacheArgument, as_json: JsonOption = False) -> None:
    """Seal a cache whose blocks are all written, such as one that several machines built a share of."""
    from logitcache.cache.sealing import seal
    from logitcache.cache.summary import summarise

    seal(cache)
    summary = cache_summary(summarise(cache))
    show(summary, as_json, lambda: print_mapping(cache, summary))


@app.command("push")
def push_command(
    cache: CacheArgument,
    url: Annotated[str, typer.Argument(metavar="URL", help="Destination: s3://, gs://, az:// or a directory.")],
    anonymous: Annotated[
        bool, typer.Option("--anonymous", help="Omit machine, command and paths from the copy's manifest.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Copy a cache to a store; it becomes visible there once complete. Safe to interrupt: re-run to resume."""
    from logitcache.share.transfer import push

    result = push(cache, url, anonymous=anonymous)
    show(dataclasses.asdict(result), as_json, lambda: print_transfer(url, result))


@app.command("pull")
def pull_command(
    url: Annotated[str, typer.Argument(metavar="URL", help="Source: s3://, gs://, az://, https:// or a directory.")],
    cache: Annotated[str, typer.Argument(metavar="CACHE", help="Destination directory.")],
    views: Annotated[
        str | None,
        typer.Option(metavar="FIRST:END", help="Copy only these views, such as 0:8 or 8:16; END is excluded."),
    ] = None,
    expect: Annotated[
        str | None, typer.Option(metavar="DIGEST", help="Fail before copying if the content digest differs.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Copy a cache here, or add views to a copy; every SHA-256 is checked. Safe to interrupt: re-run to resume."""
    from logitcache.cache.summary import missing_packages_of
    from logitcache.share.transfer import pull

    result = pull(url, cache, views=views, expect=expect)
    show(dataclasses.asdict(result), as_json, lambda: print_transfer(cache, result))
    _note(missing_packages_of(cache))


def _note(text: str | None) -> None:
    if text is not None:
        print(f"note: {text}", file=sys.stderr)


@app.command("merge")
def merge_command(
    caches: Annotated[list[str], typer.Argument(metavar="CACHE", help="Two or more caches of the same views.")],
    out: Annotated[str, typer.Option("--out", "-o", help="Directory of the merged cache.")],
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

    result = merge(caches, out, mean=mean.value, weights=weight or None, encoding=encoding)
    summary = cache_summary(summarise(out)) | {
        "mean": mean.value,
        "parts": [part.model_dump(exclude={"teacher_input"}) for part in result.parts],
        "left_out_views": result.left_out,
        "left_out_outputs": result.left_out_outputs,
        "computed_blocks": len(result.computed_blocks),
        "total_blocks": result.total_blocks,
    }
    show(summary, as_json, lambda: print_merge(out, summary))


@app.command("export")
def export_command(
    source: Annotated[
        str, typer.Argument(metavar="CACHE|RUN", help="A cache (parquet), or a run's folder (safetensors, onnx).")
    ],
    *,
    overrides: OverridesArgument = None,
    to: Annotated[
        ExportFormat, typer.Option("--to", help="Output format: parquet for a cache; safetensors or onnx for a run.")
    ],
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Output folder, new or empty; default for a run: RUN/product."),
    ] = None,
    views: Annotated[str | None, typer.Option(help="Views of the cache, such as 0:2 or 3; default: all.")] = None,
    top: Annotated[
        int | None, typer.Option(help="Keep only the TOP largest logits of each row, and the tail mass.")
    ] = None,
    int8: Annotated[
        bool, typer.Option("--int8", help="With --to onnx: also write a statically quantised model.")
    ] = False,
    weights: Annotated[
        Weights, typer.Option(help="Weights of the run: the last, or the best by validation accuracy.")
    ] = (Weights.last),
    data: Annotated[
        Path | None, typer.Option(metavar="PIPELINE", help="Pipeline with the data of the run; default: the run's own.")
    ] = None,
    trust: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """Export a cache's labels as Parquet, or a run's student as safetensors or ONNX with a card and measurements."""
    if data is None:
        refuse_overrides(overrides)
    if to is ExportFormat.parquet:
        _check_is_cache(source, out, int8=int8, weights=weights, data=data)
        assert out is not None
        from logitcache.extras.parquet import export_parquet

        result = export_parquet(source, out, views=views, top=top)
        show(dataclasses.asdict(result), as_json, lambda: print_export(str(out), to.value, result))
        return
    _check_is_run(source, to.value, views=views, top=top)
    from logitcache.config.schema import load_pipeline
    from logitcache.extras.student_export import export_run
    from logitcache.stages.finished_student import open_student

    pipeline = None if data is None else load_pipeline(data, overrides or ())
    student = open_student(Path(source), weights=weights.value, data=pipeline, trust=trust)
    exported = export_run(student, out, to="onnx" if to is ExportFormat.onnx else "safetensors", int8=int8)
    summary = {"folder": str(exported.folder), "written": exported.written, **exported.metadata.model_dump()}
    show(summary, as_json, lambda: print_product(exported))


def _check_is_cache(source: str, out: Path | None, *, int8: bool, weights: Weights, data: Path | None) -> None:
    if (Path(source) / "run.yaml").is_file():
        raise UsageError(f"{source} is a run: use --to safetensors or --to onnx; --to parquet needs a cache")
    if int8 or data is not None or weights is not Weights.last:
        raise UsageError("--int8, --weights and --data apply to runs; --to parquet takes --views and --top")
    if out is None:
        raise UsageError("--to parquet needs an output folder: add -o FOLDER")


def _check_is_run(source: str, to: str, *, views: str | None, top: int | None) -> None:
    if "://" in source or (Path(source) / "manifest.json").is_file():
        raise UsageError(f"{source} is a cache: use --to parquet; --to {to} needs a run, such as runs/STUDENT/seed-0")
    if views is not None or top is not None:
        raise UsageError("--views and --top apply to caches, not to runs")


@app.command("suspects")
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
    """List samples whose label is probably wrong, by confident learning on the cached logits."""
    from logitcache.extras.noise import CAUTION, find_suspects, write_suspects

    noise = find_suspects(cache)
    if output is not None:
        write_suspects(noise, output, top=top)
    shown = noise_summary(noise, top if as_json or top is not None else 20)
    show(shown, as_json, lambda: print_suspects(cache, shown, CAUTION))


@app.command("report")
def report_command(
    cache: CacheArgument,
    overrides: OverridesArgument = None,
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
    show(summary, as_json, lambda: print_report(written))
